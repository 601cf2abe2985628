"""Optimizers and learning rate schedules by name, from optax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from optax import contrib

from recursive_jax.models.parameters import LORA, MATRICES, kinds
from recursive_jax.training.rates import Rates
from recursive_jax.training.values import check_kinds

OPTIMIZERS = ("adamw", "adafactor", "lion", "muon")
SCHEDULES = ("cosine", "wsd", "constant")
MOMENTS = ("float32", "bfloat16")
ORTHOGONAL = ("weight", *LORA)  # kinds of parameters that Muon updates
MUON_RMS = 0.2  # of its updates: about that of Adam's (arXiv 2502.16982), for which rates are set
DECAYED = {"matrices": MATRICES, "weights": ("weight", "head")}  # kinds of parameters


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Settings of the updates. Defaults are the paper's (App. E), * those of common practice.

    Attributes:
      name: 'adamw'; 'adafactor', with factored second moments and none else; 'lion', which wants
        a rate several times lower; 'muon' for the projections and LoRA factors, of every layer and
        loop by itself, and AdamW for the rest.
      learning_rate: its peak.
      schedule: 'cosine'; 'wsd': the peak, then a linear fall over the last `decay_share` of the
        steps; 'constant'.
      warmup_steps: steps of the linear rise from 0.
      final_fraction*: learning rate of the last step, as a share of the peak; not for 'constant'.
      decay_share*: for 'wsd'.
      rates: factors of the learning rate by parameter, as `rates.Rates` reads them; 0 freezes.
      b1*, b2*, eps*: of AdamW. Lion has both b; Muon has b1 for its momentum.
      mu_dtype: of the first moments: float32, or bfloat16 for half of their memory.
      weight_decay*: decoupled; never applied to norms and biases. The paper does not say which
        value it used, or on what.
      decay_on: 'weights': the projections and an own head, not LoRA factors and embeddings.
        'matrices': these as well. Measured equal (docs/results.md, Weight decay).
      clip_norm*: largest global norm of the gradient; 0 = no clipping. The gradient of a looped
        weight is a sum over loops, so its norm is up to num_loops times that of a vanilla layer.
      lora_lr_scale: learning rate of LoRA matrices relative to the rest (the paper: one for all).
    """

    name: str = "adamw"
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup_steps: int = 200
    final_fraction: float = 0.1
    decay_share: float = 0.2
    rates: str = ""
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    mu_dtype: str = "float32"
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
        if not 0 < self.decay_share <= 1:
            raise ValueError(f"optimizer.decay_share must be in (0, 1], got {self.decay_share}")
        for name, known in (("name", OPTIMIZERS), ("schedule", SCHEDULES), ("mu_dtype", MOMENTS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"optimizer.{name}={getattr(self, name)!r}; expected one of {', '.join(known)}"
                )
        if self.name == "adafactor" and self.mu_dtype != "float32":
            raise ValueError(
                f"optimizer.mu_dtype={self.mu_dtype} with adafactor, which has no first moments; "
                "leave it out"
            )
        Rates(self.rates)  # raises for what cannot be read
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} must be in [0, 1), got {getattr(self, name)}")


def learning_rate_schedule(cfg: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate by step: a linear rise, then what `cfg.schedule` names, up to `num_steps`."""
    warmup = min(cfg.warmup_steps, max(num_steps - 1, 0))
    peak, end = cfg.learning_rate, cfg.learning_rate * cfg.final_fraction
    if cfg.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0 if warmup else peak,
            peak_value=peak,
            warmup_steps=warmup,
            decay_steps=max(num_steps, warmup + 1),
            end_value=end,
        )
    parts = [optax.linear_schedule(0.0, peak, warmup), optax.constant_schedule(peak)]
    ends = [warmup]
    if cfg.schedule == "wsd":
        ends.append(max(warmup, num_steps - round(cfg.decay_share * num_steps)))
        parts.append(optax.linear_schedule(peak, end, max(num_steps - ends[-1], 1)))
    return optax.join_schedules(parts, ends)


def make_optimizer(cfg: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """The gradient transformation of a run of `num_steps` steps."""
    schedule, rates = learning_rate_schedule(cfg, num_steps), Rates(cfg.rates)
    parts = [optax.clip_by_global_norm(cfg.clip_norm)] if cfg.clip_norm else []
    parts += [
        _direction(cfg),
        optax.add_decayed_weights(cfg.weight_decay, mask=_of_kind(*DECAYED[cfg.decay_on])),
        optax.scale_by_learning_rate(schedule),
    ]
    if cfg.lora_lr_scale != 1.0:
        parts.append(optax.masked(optax.scale(cfg.lora_lr_scale), _of_kind(*LORA)))
    if not cfg.rates:
        return optax.chain(*parts)
    parts.append(optax.stateless(rates.scale))
    moving = {"moving": optax.chain(*parts), "frozen": optax.set_to_zero()}
    return optax.partition(moving, rates.labels)


def _direction(cfg: OptimizerConfig) -> optax.GradientTransformation:
    """Gradients -> updates of size about 1, without decay and learning rate."""
    if cfg.name == "adafactor":
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    if cfg.name == "lion":
        return optax.scale_by_lion(cfg.b1, cfg.b2, cfg.mu_dtype)
    adam = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps, mu_dtype=cfg.mu_dtype)
    if cfg.name == "adamw":
        return adam
    muon = optax.chain(
        contrib.scale_by_muon(
            beta=cfg.b1, mu_dtype=cfg.mu_dtype, weight_dimension_numbers=_matrices
        ),
        optax.stateless(_at_muon_size),
    )
    return optax.partition({True: muon, False: adam}, _of_kind(*ORTHOGONAL))


def _matrices(params: Any) -> Any:
    """For optax: the last two axes of every leaf are a matrix, of each layer and loop."""
    axes = contrib.MuonDimensionNumbers(-2, -1)
    return jax.tree.map(lambda _: axes, params)


def _at_muon_size(updates: Any, params: Any) -> Any:
    """Orthogonal matrices times what makes `MUON_RMS` their root mean square."""
    return jax.tree.map(lambda x: x * MUON_RMS * max(x.shape[-2:]) ** 0.5, updates)


def _of_kind(*wanted: str) -> Callable[[Any], Any]:
    """A mask for optax: params -> whether each leaf has one of these `parameters.KINDS`."""

    def mask(params):
        return jax.tree.map(lambda kind: kind in wanted, kinds(params))

    return mask
