"""The training objective: cross-entropy, distillation and exit losses of one chunk of logits.

`models.chunked_head` sums them over chunks of positions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from recursive_jax.models.chunked_head import cross_entropy
from recursive_jax.training.draws import Draws, drawn_kl
from recursive_jax.training.values import check_kinds

KD_LOSSES = ("forward_kl", "reverse_kl", "jsd", "tvd")
EXIT_LOSSES = ("aggressive", "weighted")


@dataclasses.dataclass(frozen=True)
class Objective:
    """Weights of the loss terms. Each term is a mean over the scored tokens.

    loss = Σ_i α_i·L_i over the exits i = 1 … E, of which the last loop is the last, with

    L_i = CE(exit i) + exit_kd·KD(exit i, stop_gradient(final)) for i < E,
    L_E = ce·CE(final) + kd·KD(final, teacher).

    Attributes:
      ce: weight of the cross-entropy of the last loop.
      kd: weight of distillation from the teacher; 0 trains without a teacher.
      kd_loss: divergence, one of `KD_LOSSES` (paper Table I.1; the paper chose forward KL).
      temperature: of teacher and student in the divergence.
      exit_loss: the weights α. 'aggressive': α_E = 1, all others are `exit_coefficient`.
        'weighted': α_i = i / Σ_j j (paper §3.7, "weighted CE"), which takes from the last loop.
      exit_coefficient: weight of every earlier loop under 'aggressive'; 0 trains the last loop
        only. The paper chose 0.1 (§3.7).
      exit_kd: weight of self-distillation: the exits learn from the detached final output.
    """

    ce: float = 1.0
    kd: float = 1.0
    kd_loss: str = "forward_kl"
    temperature: float = 1.0
    exit_loss: str = "aggressive"
    exit_coefficient: float = 0.0
    exit_kd: float = 0.0

    def __post_init__(self):
        check_kinds(self, "objective.")
        if self.kd_loss not in KD_LOSSES:
            raise ValueError(f"kd_loss={self.kd_loss!r}; expected one of {KD_LOSSES}")
        for name in ("ce", "kd", "exit_coefficient", "exit_kd"):
            if getattr(self, name) < 0:
                raise ValueError(f"objective.{name} must be >= 0, got {getattr(self, name)}")
        if self.temperature <= 0:
            raise ValueError(f"objective.temperature must be > 0, got {self.temperature}")
        if not self.ce and not self.kd:
            raise ValueError("objective.ce and objective.kd are both 0: nothing to train on")
        if self.exit_loss not in EXIT_LOSSES:
            raise ValueError(
                f"objective.exit_loss={self.exit_loss!r}; expected one of {', '.join(EXIT_LOSSES)}"
            )
        if self.exit_loss == "weighted" and self.exit_coefficient:
            raise ValueError(
                f"objective.exit_coefficient={self.exit_coefficient} beside exit_loss='weighted', "
                "which sets the weight of every exit itself; set objective.exit_coefficient=0"
            )
        if self.exit_kd and not self.exits:
            raise ValueError(
                f"objective.exit_kd={self.exit_kd} has no effect with exit_coefficient 0, which it "
                "is multiplied by; set objective.exit_coefficient (paper: 0.1), or "
                "objective.exit_loss=weighted"
            )

    @property
    def exits(self) -> bool:
        """Whether the hidden states of earlier loops are needed."""
        return self.exit_loss == "weighted" or self.exit_coefficient > 0

    def check_draws(self) -> None:
        """Raise ValueError for a divergence that draws from the teacher cannot estimate."""
        if self.kd_loss != "forward_kl":
            raise ValueError(
                f"objective.kd_loss={self.kd_loss!r} needs the whole distributions of the teacher; "
                "from draws (data.teacher) only forward_kl is learnt"
            )

    def exit_weights(self, num_exits: int) -> list[float]:
        """The weight α of every exit's loss, by depth; the last loop's is last."""
        if self.exit_loss == "weighted":
            total = num_exits * (num_exits + 1) / 2
            return [i / total for i in range(1, num_exits + 1)]
        return [self.exit_coefficient] * (num_exits - 1) + [1.0]


def divergence(
    student: jax.Array, teacher: jax.Array, kind: str = "forward_kl", temperature: float = 1.0
) -> jax.Array:
    """Divergence of the distributions of two logit arrays `[..., V]` -> `[...]`.

    In nats; tvd is in [0, 1]. The teacher gets no gradient. Temperature t divides both logits. The
    result is multiplied by t², which keeps the size of the gradient.
    """
    teacher = jax.lax.stop_gradient(teacher)
    log_p = jax.nn.log_softmax(teacher / temperature, axis=-1)
    log_q = jax.nn.log_softmax(student / temperature, axis=-1)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    if kind == "forward_kl":
        value = (p * (log_p - log_q)).sum(axis=-1)
    elif kind == "reverse_kl":
        value = (q * (log_q - log_p)).sum(axis=-1)
    elif kind == "jsd":
        log_m = jnp.log(0.5 * (p + q) + jnp.finfo(p.dtype).tiny)
        value = 0.5 * ((p * (log_p - log_m)).sum(-1) + (q * (log_q - log_m)).sum(-1))
    elif kind == "tvd":
        value = 0.5 * jnp.abs(p - q).sum(axis=-1)
    else:
        raise ValueError(f"unknown divergence {kind!r}; expected one of {KD_LOSSES}")
    return value * temperature**2


def token_losses(
    objective: Objective,
    logits: Sequence[jax.Array],
    targets: jax.Array,
    weights: jax.Array,
    teacher_logits: jax.Array | Draws | None,
    num_ids: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss summed over tokens, and the sums of its parts.

    Args:
      objective: weights of the terms.
      logits: f32 `[B, T, V]` of every exit E in order of depth, the last loop's last.
      targets, weights: `[B, T]`.
      teacher_logits: `[B, T, V]`, or draws in their place, or None.
      num_ids: the teacher is compared over the first so many ids only; the others are padding of
        the embedding tables. None: over all.

    Returns:
      loss sum (scalar) and sums of its parts: `ce [E]`, `kd []`, `exit_kd []`, `correct [E]`.
    """
    ce = jnp.stack([(weights * cross_entropy(x, targets)).sum() for x in logits])
    correct = jnp.stack([(weights * (x.argmax(-1) == targets)).sum() for x in logits])
    zero = jnp.zeros((), jnp.float32)
    kd, exit_kd = zero, zero
    kd_of = functools.partial(divergence, kind=objective.kd_loss, temperature=objective.temperature)
    if isinstance(teacher_logits, Draws):
        ours = logits[-1][..., :num_ids]
        kd = (weights * drawn_kl(ours, teacher_logits, objective.temperature)).sum()
    elif teacher_logits is not None:
        ours, theirs = logits[-1][..., :num_ids], teacher_logits[..., :num_ids]
        kd = (weights * kd_of(ours, theirs)).sum()
    *early, last = objective.exit_weights(len(logits))
    loss = last * (objective.ce * ce[-1] + objective.kd * kd)
    for alpha, exit_logits, exit_ce in zip(early, logits, ce, strict=False):
        loss += alpha * exit_ce
        if objective.exit_kd:
            distance = (weights * kd_of(exit_logits, logits[-1])).sum()
            exit_kd += distance
            loss += alpha * objective.exit_kd * distance
    return loss, {"ce": ce, "kd": kd, "exit_kd": exit_kd, "correct": correct}
