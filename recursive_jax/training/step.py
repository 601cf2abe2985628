"""One optimiser step: student forward, teacher forward, loss, update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from recursive_jax.models.chunked_head import chunk_length, chunked_sum
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.parameters import head_params
from recursive_jax.training.data import Batch
from recursive_jax.training.losses import Objective, token_losses


@struct.dataclass
class TrainState:
    """The arrays of a run: everything that a resumed run needs except the data position."""

    step: jax.Array  # int32 []
    params: Any
    opt_state: Any


def init_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params))


def make_loss(
    model: Decoder,
    objective: Objective,
    teacher: Decoder | None = None,
    logits_bytes: int = 256 << 20,
) -> Callable[[Any, Batch, Any], tuple[jax.Array, dict[str, jax.Array]]]:
    """`loss(params, batch, teacher_params) -> (mean loss per scored token, metrics)`.

    Args:
      model: the student.
      objective: weights of the terms.
      teacher: vanilla source whose logits are distilled. It runs in the same step, without
        gradient. Required if `objective.kd` > 0, else None.
      logits_bytes: memory per device for the logits of one chunk of positions.

    Raises:
      ValueError: teacher and objective contradict each other, or the vocabularies differ.
    """
    if (teacher is None) != (objective.kd == 0):
        raise ValueError(
            f"objective.kd={objective.kd} and teacher={'given' if teacher else 'none'}: "
            "distillation needs a teacher, and a teacher needs objective.kd > 0"
        )
    if teacher is not None and teacher.cfg.vocab_size != model.cfg.vocab_size:
        raise ValueError(
            f"teacher vocabulary {teacher.cfg.vocab_size} differs from the student's "
            f"{model.cfg.vocab_size}; distillation compares logits token by token"
        )
    exits = objective.exits and model.cfg.num_loops > 1

    def loss(params, batch, teacher_params):
        inputs = (batch.tokens, batch.positions, batch.segment_ids)
        hidden = model.apply({"params": params}, *inputs, all_loops=exits)
        hidden = hidden if exits else hidden[None]
        data = {"targets": batch.targets, "weights": batch.weights}
        if teacher is not None:
            with jax.named_scope("teacher"):
                data["teacher"] = jax.lax.stop_gradient(
                    teacher.apply({"params": teacher_params}, *inputs)
                )
            teacher_head = jax.lax.stop_gradient(head_params(teacher_params))

        def chunk_loss(head, hidden, data):
            teacher_logits = None
            if teacher is not None:
                teacher_logits = _unembed(teacher, teacher_head, data["teacher"])
            logits = [_unembed(model, head, x) for x in hidden]
            return token_losses(objective, logits, data["targets"], data["weights"], teacher_logits)

        num_exits, batch_size, length, _ = hidden.shape
        chunk = chunk_length(
            -(-batch_size // model.data_shards),
            length,
            model.cfg.vocab_size,
            num_exits + (teacher is not None),
            logits_bytes,
        )
        with jax.named_scope("head_and_loss"):
            total, sums = chunked_sum(chunk_loss, head_params(params), hidden, data, chunk)
        count = jnp.maximum(batch.weights.sum(), 1.0)
        means = jax.tree.map(lambda x: x / count, sums)
        metrics = {"loss": total / count, "tokens": batch.weights.sum()}
        metrics |= {"ce": means["ce"][-1], "accuracy": means["correct"][-1]}
        if teacher is not None:
            metrics["kd"] = means["kd"]
        if exits:
            for i in range(num_exits - 1):
                metrics[f"ce_exit_{i + 1}"] = means["ce"][i]
                metrics[f"accuracy_exit_{i + 1}"] = means["correct"][i]
            if objective.exit_kd:
                metrics["exit_kd"] = means["exit_kd"]
        return total / count, metrics

    return loss


def _unembed(model: Decoder, head: Any, x: jax.Array) -> jax.Array:
    return model.apply({"params": head}, x, method="unembed")


def make_train_step(
    model: Decoder,
    tx: optax.GradientTransformation,
    objective: Objective,
    teacher: Decoder | None = None,
    **loss_options,
) -> Callable[[TrainState, Batch, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """`step(state, batch, teacher_params) -> (state, metrics)`; jit it with donate_argnums=0."""
    loss = make_loss(model, objective, teacher, **loss_options)

    def step(state, batch, teacher_params):
        grad_fn = jax.value_and_grad(loss, has_aux=True)
        (_, metrics), grads = grad_fn(state.params, batch, teacher_params)
        with jax.named_scope("optimizer"):
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics["grad_norm"] = optax.global_norm(grads)
        return TrainState(state.step + 1, params, opt_state), metrics

    return step
