"""Exit measures: scores that decide whether a token has run enough loops.

A measure scores tokens that have just run a loop. A token leaves when its score is *above* the
threshold of that loop. The measure does not choose the next token. Measures that read logits need
the head after every loop; with other measures the head runs only when a token leaves.

    EngineConfig(measure=TopProbability(0.9))              # one threshold for all loops
    EngineConfig(measure=Cosine(), thresholds=(0.9, 0.8))  # after loop 1, after loop 2
    EngineConfig(measure=Static(2))                        # measures without a threshold

Axes: n rows, D embed, V vocab, L loops.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from recursive_jax.decoding.requests import check_number

NO_GUESS = -1


@struct.dataclass
class ExitInputs:
    """Inputs of a measure: n tokens that have just run a loop."""

    loops: jax.Array  # int32 [n], loops executed, 1 … L
    before: jax.Array  # [n, D], the state before that loop
    after: jax.Array  # [n, D]
    recorded: jax.Array  # int32 [n], loops after which this token left when it was recorded
    logits: jax.Array | None = None  # f32 [n, V]; None unless the measure reads them
    guesses: jax.Array | None = None  # int32 [n, L], most likely token after each earlier loop


class Measure(abc.ABC):
    """`score(inputs) -> f32 [n]`. Subclasses are frozen dataclasses: part of a compiled tick."""

    name: ClassVar[str]
    needs_logits: ClassVar[bool] = False
    needs_previous: ClassVar[bool] = False  # `guesses` after the loop before, too
    can_exit: ClassVar[bool] = True  # False: tokens run all loops
    least_loops: ClassVar[int] = 2  # of a model that the measure works for
    takes_threshold: ClassVar[bool] = False
    default_threshold: ClassVar[float] = 0.0
    threshold: ClassVar[float | None] = None

    @abc.abstractmethod
    def score(self, inputs: ExitInputs) -> jax.Array:
        """The score of each token, f32 [n]; it leaves above the threshold."""

    def check_threshold(self, value: Any) -> None:
        """Raises ValueError unless `value` is a threshold for this measure."""
        raise ValueError(f"exit measure {self.name} takes no threshold; leave it out")

    def check_loops(self, num_loops: int) -> None:
        """Raises ValueError if no token of a model with so many loops can leave early."""
        if num_loops < self.least_loops:
            raise ValueError(
                f"exit measure {self.name!r} needs a model of at least {self.least_loops} loops, "
                f"this one has {num_loops}; make one with python -m recursive_jax.convert "
                f"--num_loops={self.least_loops}, or use --exit_measure=none"
            )


@dataclasses.dataclass(frozen=True)
class ThresholdMeasure(Measure):
    """A measure that compares its score with a threshold.

    Attributes:
      threshold: tokens leave above it, after every loop; None: `default_threshold`. It is an input
        of compiled programs, not part of them: `EngineConfig` moves it into its `thresholds`.
    """

    threshold: float | None = None
    takes_threshold = True
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)  # of thresholds

    def __post_init__(self):
        if self.threshold is not None:
            self.check_threshold(self.threshold)

    def check_threshold(self, value):
        check_number(f"exit threshold of {self.name}", value, False, *self.range)


@dataclasses.dataclass(frozen=True)
class Static(Measure):
    """Every token leaves after the same number of loops."""

    loops: int
    name = "static"

    def __post_init__(self):
        check_number("loops of the static exit", self.loops, True, 1, 2**31 - 1)

    def check_loops(self, num_loops):
        super().check_loops(num_loops)
        if self.loops > num_loops:
            raise ValueError(
                f"exit measure static:{self.loops}: the model has {num_loops} loops; expected "
                f"1 … {num_loops}"
            )

    def score(self, inputs):
        return jnp.where(inputs.loops >= self.loops, jnp.inf, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class Recorded(Measure):
    """Tokens leave after `Request.recorded_loops`, so that measurements can be repeated."""

    name = "recorded"

    def score(self, inputs):
        return jnp.where(inputs.loops >= inputs.recorded, jnp.inf, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class TopProbability(ThresholdMeasure):
    """Probability of the most likely token (CALM's and LayerSkip's softmax confidence)."""

    name, needs_logits, default_threshold = "top1", True, 0.9

    def score(self, inputs):
        return jnp.exp(jnp.max(inputs.logits, axis=-1) - jax.nn.logsumexp(inputs.logits, axis=-1))


@dataclasses.dataclass(frozen=True)
class Margin(ThresholdMeasure):
    """Probability of the most likely token, less that of the second (CALM)."""

    name, needs_logits, default_threshold = "margin", True, 0.5

    def score(self, inputs):
        top = jax.lax.top_k(inputs.logits, 2)[0]
        top = jnp.exp(top - jax.nn.logsumexp(inputs.logits, axis=-1, keepdims=True))
        return top[:, 0] - top[:, 1]


@dataclasses.dataclass(frozen=True)
class Stable(ThresholdMeasure):
    """1 if the loop kept the most likely token, else 0; 0 after the first loop."""

    name, needs_logits, default_threshold = "stable", True, 0.5
    needs_previous, least_loops = True, 3  # two to compare, and one to save

    def score(self, inputs):
        earlier = jnp.maximum(inputs.loops - 2, 0)
        previous = jnp.take_along_axis(inputs.guesses, earlier[:, None], axis=1)[:, 0]
        same = jnp.argmax(inputs.logits, axis=-1) == jnp.where(inputs.loops > 1, previous, NO_GUESS)
        return same.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Cosine(ThresholdMeasure):
    """Cosine of the states before and after the loop: 1 when it only scaled them (CALM)."""

    name, default_threshold, range = "cosine", 0.95, (-1.0, 1.0)

    def score(self, inputs):
        before, after = inputs.before.astype(jnp.float32), inputs.after.astype(jnp.float32)
        norms = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
        return jnp.sum(before * after, axis=-1) / jnp.maximum(norms, 1e-30)


@dataclasses.dataclass(frozen=True)
class Oracle(Measure):
    """Full depth; `exit_loops` tell where each token could have left with the same successor.

    That is the first loop whose most likely token is that of the last loop (paper §3.8).
    """

    name, needs_logits, can_exit = "oracle", True, False

    def score(self, inputs):
        return jnp.full(inputs.loops.shape, -jnp.inf)


MEASURES = {m.name: m for m in (Recorded, TopProbability, Margin, Stable, Cosine, Oracle)}
MEASURE_NAMES = ("static:N", *MEASURES)


def make_measure(spec: str) -> Measure:
    """The measure called `spec`; 'static:N' leaves after N loops.

    Raises:
      ValueError: no such measure.
    """
    name, _, loops = spec.partition(":")
    if name == "static" and loops.isdecimal():
        return Static(int(loops))
    if spec not in MEASURES:
        raise ValueError(f"exit measure {spec!r} is unknown; expected {', '.join(MEASURE_NAMES)}")
    return MEASURES[spec]()
