"""AdamW with warm-up, cosine decay and clipping, from optax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from recursive_jax.models.parameters import LORA, MATRICES, kinds
from recursive_jax.training.values import check_kinds

DECAYED = {"matrices": MATRICES, "weights": ("weight", "head")}  # kinds of parameters


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Settings of AdamW. Defaults are the paper's (App. E); those marked * are common practice.

    Attributes:
      learning_rate: its peak.
      warmup_steps: steps of the linear rise from 0.
      final_fraction*: learning rate of the last step, as a share of the peak.
      b1*, b2*, eps*: Adam moments.
      weight_decay*: decoupled; never applied to norms and biases. The paper does not say which
        value it used, or on what.
      decay_on: 'weights': the projections and an own head, not LoRA factors and embeddings.
        'matrices': these as well. Measured equal (docs/results.md, Weight decay).
      clip_norm*: largest global norm of the gradient; 0 = no clipping. The gradient of a looped
        weight is a sum over loops, so its norm is up to num_loops times that of a vanilla layer.
      lora_lr_scale: learning rate of LoRA matrices relative to the rest (the paper: one for all).
    """

    learning_rate: float = 2e-4
    warmup_steps: int = 200
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_on: str = "weights"
    clip_norm: float = 1.0
    lora_lr_scale: float = 1.0

    def __post_init__(self):
        check_kinds(self, "optimizer.")
        if self.learning_rate <= 0:
            raise ValueError(f"optimizer.learning_rate must be > 0, got {self.learning_rate}")
        if self.warmup_steps < 0:
            raise ValueError(f"optimizer.warmup_steps must be >= 0, got {self.warmup_steps}")
        for name in ("clip_norm", "weight_decay", "lora_lr_scale", "final_fraction"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name} must be >= 0, got {getattr(self, name)}")
        if self.decay_on not in DECAYED:
            raise ValueError(
                f"optimizer.decay_on={self.decay_on!r}; expected one of {', '.join(DECAYED)}"
            )
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} must be in [0, 1), got {getattr(self, name)}")


def learning_rate_schedule(cfg: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate by step: warm-up, then cosine to `final_fraction` at `num_steps`."""
    warmup = min(cfg.warmup_steps, max(num_steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else cfg.learning_rate,
        peak_value=cfg.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(num_steps, warmup + 1),
        end_value=cfg.learning_rate * cfg.final_fraction,
    )


def make_optimizer(cfg: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """The gradient transformation of a run of `num_steps` steps."""
    schedule = learning_rate_schedule(cfg, num_steps)
    parts = [optax.clip_by_global_norm(cfg.clip_norm)] if cfg.clip_norm else []
    parts += [
        optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps),
        optax.add_decayed_weights(cfg.weight_decay, mask=_of_kind(*DECAYED[cfg.decay_on])),
        optax.scale_by_learning_rate(schedule),
    ]
    if cfg.lora_lr_scale != 1.0:
        parts.append(optax.masked(optax.scale(cfg.lora_lr_scale), _of_kind(*LORA)))
    return optax.chain(*parts)


def _of_kind(*wanted: str) -> Callable[[Any], Any]:
    """A mask for optax: params -> whether each leaf has one of these `parameters.KINDS`."""

    def mask(params):
        return jax.tree.map(lambda kind: kind in wanted, kinds(params))

    return mask
