"""AdamW with warm-up, cosine decay and clipping, from optax."""

from __future__ import annotations

import dataclasses

import jax
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Defaults are the paper's where it states them (App. E), else common practice (marked *).

    Attributes:
      learning_rate: peak.
      warmup_steps: linear from 0.
      final_fraction*: of the peak, reached at the last step.
      b1*, b2*, eps*: Adam moments.
      weight_decay*: decoupled, on matrices only (never on norms and biases).
      clip_norm*: global norm of the gradient; 0 = no clipping. The gradient of a looped weight is
        the sum over loops, so its norm is up to num_loops times that of a vanilla layer.
      lora_lr_scale: learning rate of LoRA matrices relative to the rest (the paper: one for all).
    """

    learning_rate: float = 2e-4
    warmup_steps: int = 200
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    lora_lr_scale: float = 1.0

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ValueError(f"optimizer.learning_rate must be > 0, got {self.learning_rate}")
        if self.warmup_steps < 0:
            raise ValueError(f"optimizer.warmup_steps must be >= 0, got {self.warmup_steps}")
        for name in ("clip_norm", "weight_decay", "lora_lr_scale", "final_fraction"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name} must be >= 0, got {getattr(self, name)}")
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
        optax.add_decayed_weights(cfg.weight_decay, mask=_is_matrix),
        optax.scale_by_learning_rate(schedule),
    ]
    if cfg.lora_lr_scale != 1.0:
        parts.append(optax.masked(optax.scale(cfg.lora_lr_scale), _is_lora))
    return optax.chain(*parts)


def _is_matrix(params):
    names = ("w", "lora_a", "lora_b", "embedding", "head")
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in names, params)


def _is_lora(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("lora_a", "lora_b"), params
    )
