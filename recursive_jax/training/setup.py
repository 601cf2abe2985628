"""One optimiser step as a pure function: student forward, teacher forward, loss, update."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from recursive_jax.models.chunked_head import chunk_length, chunked_sum
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.parameters import head_params
from recursive_jax.training.data import Batch
from recursive_jax.training.gathered import Gather, sum_of
from recursive_jax.training.gradients import squares_by_group
from recursive_jax.training.losses import Objective, token_losses
from recursive_jax.training.skips import GRADIENT
from recursive_jax.training.state import TrainState, init_state

Sums = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class TrainSetup:
    """Everything that determines a step, except arrays.

    Attributes:
      model: the student.
      tx: the optimizer.
      objective: weights of the loss terms.
      teacher: vanilla source whose logits are distilled. It runs in the same step, without
        gradient. Required if `objective.kd` > 0 and `draws` is 0, else None.
      num_ids: the teacher and the student are compared over the first so many ids, those of their
        tokenizer. None: over all. Needed where their embeddings are padded to different sizes.
      accumulate: micro-batches of a step; divides the batch size.
      ema_decay: of the averaged params; 0: none.
      logits_bytes: memory per device for the logits of one chunk of positions.
      least_chunk: but a chunk has at least so many positions, where there are so many. A product
        with few rows reads the head longer than it multiplies.
      gather: gathers the weights once a step; None: the compiler gathers them where it needs them.
      draws: of a token from the teacher, which come with the batches in its place; 0: none.

    Raises:
      ValueError: teacher and objective contradict each other, or the vocabularies differ.
    """

    model: Decoder
    tx: optax.GradientTransformation
    objective: Objective
    teacher: Decoder | None = None
    num_ids: int | None = None
    accumulate: int = 1
    ema_decay: float = 0.0
    logits_bytes: int = 256 << 20
    least_chunk: int = 1
    gather: Gather | None = None
    draws: int = 0

    def __post_init__(self):
        if (self.teacher is None and not self.draws) != (self.objective.kd == 0):
            raise ValueError(
                f"objective.kd={self.objective.kd} and teacher="
                f"{'given' if self.teacher else 'none'}: distillation needs a teacher, and a "
                "teacher needs objective.kd > 0"
            )
        if self.draws:
            self.objective.check_draws()
        if self.teacher is not None and self.num_ids is None:
            theirs, ours = self.teacher.cfg.vocab_size, self.model.cfg.vocab_size
            if theirs != ours:
                raise ValueError(
                    f"teacher vocabulary {theirs} differs from the student's {ours}; "
                    "distillation compares logits token by token"
                )

    @property
    def exits(self) -> bool:
        """Whether earlier loops have a loss."""
        return self.objective.exits and self.model.cfg.num_loops > 1

    def init(self, params: Any) -> TrainState:
        return init_state(params, self.tx, self.ema_decay > 0)

    def loss_sum(
        self, params: Any, batch: Batch, teacher_params: Any, loops: int | None = None
    ) -> tuple[jax.Array, Sums]:
        """The loss summed over the scored tokens, and the sums of its parts with their count.

        Sums, not means: the mean over micro-batches of different counts is then right. `loops`:
        as for `step`.
        """
        taught = None
        if self.teacher is not None:
            taught = self.teacher_states(teacher_params, batch)
        return self.student_loss(params, batch, taught, self.teacher_head(teacher_params), loops)

    def teacher_states(self, teacher_params: Any, batch: Batch) -> jax.Array:
        """The teacher's hidden states `[B, T, D]`, without gradient."""
        with jax.named_scope("teacher"):
            hidden = self.teacher.apply({"params": teacher_params}, *_inputs(batch))
            return jax.lax.stop_gradient(hidden)

    def teacher_head(self, teacher_params: Any) -> Any:
        """The params of the teacher's head, without gradient; None without a teacher."""
        if self.teacher is None:
            return None
        return jax.lax.stop_gradient(head_params(teacher_params))

    def student_loss(
        self,
        params: Any,
        batch: Batch,
        taught: jax.Array | None,
        teacher_head: Any,
        loops: int | None = None,
    ) -> tuple[jax.Array, Sums]:
        """As `loss_sum`; `taught` and `teacher_head` as the two methods above return them."""
        model, teacher, exits = self.model, self.teacher, self.exits
        hidden = model.apply({"params": params}, *_inputs(batch), all_loops=exits, loops=loops)
        hidden = hidden if exits else hidden[None]
        data = {"targets": batch.targets, "weights": batch.weights}
        if self.draws:
            data["teacher"] = batch.teacher
        elif teacher is not None:
            data["teacher"] = taught

        def chunk_loss(head, hidden, data):
            teacher_logits = data.get("teacher")
            if teacher is not None:
                teacher_logits = _unembed(teacher, teacher_head, data["teacher"])
            logits = [_unembed(model, head, x) for x in hidden]
            return token_losses(
                self.objective, logits, data["targets"], data["weights"], teacher_logits,
                self.num_ids,
            )  # fmt: skip

        # The rows of a device become one row, so that a chunk is cut from all of them.
        shards = math.gcd(hidden.shape[1], model.data_shards)
        hidden = hidden.reshape(len(hidden), shards, -1, hidden.shape[-1])
        data = jax.tree.map(lambda x: x.reshape(shards, -1, *x.shape[2:]), data)
        with jax.named_scope("head_and_loss"):
            total, sums = chunked_sum(
                chunk_loss, head_params(params), hidden, data, self.chunk(*hidden.shape[::2])
            )
        return total, sums | {"loss": total, "tokens": batch.weights.sum()}

    def chunk(self, num_exits: int, positions: int) -> int:
        """Positions per chunk of the loss, of the `positions` of a device: chunks of equal size."""
        copies, vocab = num_exits + (self.teacher is not None), self.model.cfg.vocab_size
        most = chunk_length(1, positions, vocab, copies, self.logits_bytes)
        most = min(max(most, self.least_chunk), positions)
        return -(-positions // -(-positions // most))

    def gradient_sum(
        self, params: Any, batch: Batch, teacher_params: Any, loops: int | None = None
    ) -> tuple[Any, Sums]:
        """The gradient of `loss_sum`, and the sums; over micro-batches one after the other."""

        def micro(x):
            # Every device that holds rows of the batch gives some to each micro-batch.
            return x.reshape(-1, self.accumulate, *x.shape[1:]).swapaxes(0, 1)

        if self.gather is not None:
            return self._gathered(params, jax.tree.map(micro, batch), teacher_params, loops)

        def one(batch):
            grad = jax.grad(functools.partial(self.loss_sum, loops=loops), has_aux=True)
            return grad(params, batch, teacher_params)

        if self.accumulate == 1:
            return one(batch)
        return sum_of(one, jax.tree.map(micro, batch))

    def _gathered(self, params, micro, teacher_params, loops):
        """`gradient_sum` on weights that are gathered once. The teacher runs before: each of its
        layers is used once, and is best gathered by itself.

        Args:
          micro: batch `[micro-batch, row, T]`.
        """
        taught = None
        if self.teacher is not None:
            states = functools.partial(self.teacher_states, teacher_params)
            taught = jax.lax.map(states, micro) if self.accumulate > 1 else (
                states(jax.tree.map(lambda x: x[0], micro))[None]
            )  # fmt: skip

        local = dataclasses.replace(
            self,
            model=self.model.clone(data_shards=1),
            teacher=self.teacher and self.teacher.clone(data_shards=1),
        )

        def gradient(params, head, micro):
            grad = jax.grad(functools.partial(local.student_loss, loops=loops), has_aux=True)
            return grad(params, *micro, head)

        head = self.teacher_head(teacher_params)
        return self.gather.gradient(gradient, params, head, (micro, taught))

    def step(
        self, state: TrainState, batch: Batch, teacher_params: Any = None, loops: int | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """The next state, and metrics: means over the scored tokens.

        A step whose loss or gradient is not finite changes nothing but its number; the metric
        `skipped` is then 1.

        To be jitted with donate_argnums=0: the state is replaced. `loops`, static: run only the
        first so many loops of the block, and take the loss after them; None: all.
        """
        grads, sums = self.gradient_sum(state.params, batch, teacher_params, loops)
        count = jnp.maximum(sums["tokens"], 1.0)
        grads = jax.tree.map(lambda g: g / count, grads)
        with jax.named_scope("optimizer"):
            updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            ema = state.ema
            if ema is not None:
                ema = optax.incremental_update(params, ema, 1 - self.ema_decay)
        metrics = self.metrics(sums)
        squares = squares_by_group(grads)
        metrics["grad_norm"] = jnp.sqrt(sum(squares.values()))
        metrics |= {f"{GRADIENT}{name}": jnp.sqrt(x) for name, x in squares.items()}
        if loops is not None:
            metrics["loops"] = jnp.float32(loops)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        metrics["skipped"] = 1.0 - finite
        after = TrainState(state.step, params, opt_state, ema)
        after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
        return after.replace(step=state.step + 1), metrics

    def metrics(self, sums: Sums) -> dict[str, jax.Array]:
        """Means per scored token, by the names under which they are logged."""
        count = jnp.maximum(sums["tokens"], 1.0)
        means = {name: x / count for name, x in sums.items()}
        metrics = {"loss": means["loss"], "tokens": sums["tokens"]}
        metrics |= {"ce": means["ce"][-1], "accuracy": means["correct"][-1]}
        if self.objective.kd:
            metrics["kd"] = means["kd"]
        exits = len(means["ce"]) - 1  # of the loops that ran, without the last
        for i in range(exits):
            metrics[f"ce_exit_{i + 1}"] = means["ce"][i]
            metrics[f"accuracy_exit_{i + 1}"] = means["correct"][i]
        if exits and self.objective.exit_kd:
            metrics["exit_kd"] = means["exit_kd"]
        return metrics


def _inputs(batch: Batch) -> tuple[jax.Array, ...]:
    return batch.tokens, batch.positions, batch.segment_ids


def _unembed(model: Decoder, head: Any, x: jax.Array) -> jax.Array:
    return model.apply({"params": head}, x, method="unembed")
