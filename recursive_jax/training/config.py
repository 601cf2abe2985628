"""The settings of a training run, validated; `configs/` sets them, and `Model.train` takes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.decoder import REMAT_CHOICES
from recursive_jax.models.parameters import leaves
from recursive_jax.training.curriculum import CURRICULA, LoopCurriculum
from recursive_jax.training.losses import Objective
from recursive_jax.training.optimizer import OptimizerConfig
from recursive_jax.training.rates import Rates
from recursive_jax.training.values import check_kinds

GATHER_CHOICES = ("auto", "step", "layer")
DTYPES = ("auto", "float32", "bfloat16")


def _at_least(section: str, least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{section}{name} must be at least {least}, got {value}")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text, and how it is cut into batches.

    Attributes:
      train: files, directories, .jsonl(.gz .zst), tfds:NAME, docstrings[:N]; comma between. Or
        directories of `recursive_jax.tokenize`, weighted as DIR1:0.7,DIR2:0.3.
      valid: the same, held out; '' = a share of `train`.
      valid_fraction: that share.
      context_length: tokens per row.
      batch_size: rows per step, over all devices.
      cache_dir: of tokenised text; '' = the user's cache directory.
      eval_tokens: scored at each evaluation.
      epochs: a run takes at most so many passes over a directory of `recursive_jax.tokenize`. Text
        that is no such directory is repeated as often as needed.
      teacher: directory of `recursive_jax.teach`: distil from its draws, without the teacher in
        memory. '': the teacher runs in each step.
    """

    train: str = "docstrings"
    valid: str = ""
    valid_fraction: float = 0.01
    context_length: int = 512
    batch_size: int = 8
    cache_dir: str = ""
    eval_tokens: int = 20_000
    epochs: int = 1
    teacher: str = ""

    def __post_init__(self):
        check_kinds(self, "data.")
        _at_least(
            "data.",
            1,
            batch_size=self.batch_size,
            context_length=self.context_length,
            eval_tokens=self.eval_tokens,
            epochs=self.epochs,
        )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices by mesh axis; one size may be -1, the devices that are left.

    `fsdp` 0: on TPUs the chips of a slice, elsewhere 1.
    """

    data: int = -1
    fsdp: int = 0
    tensor: int = 1

    def __post_init__(self):
        check_kinds(self, "mesh.")


@dataclasses.dataclass(frozen=True)
class NearStart:
    """What a run changes that distils from a start near its source, as the joint fit gives.

    A start as noisy as the paper's learns from labels as well, and at a high rate. A near one
    has more to lose: large steps undo it, and labels are noise beside the source's distribution
    (measured, docs/results.md). Runs without distillation or with exit losses change nothing.

    Attributes:
      kl: a start is near if its certificate measured at most so much KL divergence from the
        source, in nats per token. 0: none is.
      cross_entropy: its weight, instead of `objective.ce`.
      learning_rate_scale: factor of `optimizer.learning_rate`.
      max_warmup_steps: the most of `optimizer.warmup_steps`.
    """

    kl: float = 2.0
    cross_entropy: float = 0.0
    learning_rate_scale: float = 0.5
    max_warmup_steps: int = 20

    def __post_init__(self):
        check_kinds(self, "near.")
        for name in ("kl", "cross_entropy"):
            if getattr(self, name) < 0:
                raise ValueError(f"near.{name} must be >= 0, got {getattr(self, name)}")
        if self.learning_rate_scale <= 0:
            raise ValueError(
                f"near.learning_rate_scale must be > 0, got {self.learning_rate_scale}"
            )
        _at_least("near.", 0, max_warmup_steps=self.max_warmup_steps)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of a run, whatever model it starts from.

    Attributes:
      data, objective, optimizer, near, mesh: see their classes.
      tokens: trained on at least so many; a step takes `batch_size · context_length`.
      accumulate: micro-batches of a step. Their gradients are summed, so the step is that of the
        whole batch, with the activations of one micro-batch in memory.
      ema_decay: d of the averaged weights `ema ← d·ema + (1 - d)·params` after each step. With
        d > 0 the averaged weights are evaluated, and they are what the checkpoint is loaded as.
        0: none.
      loop_curriculum: loops that a step runs; the loss is taken after them. 'none': all.
        'random': a number of them, uniform. 'growing': from one to all at the start of the run.
      loop_curriculum_share: of the run, over which they grow.
      seed: of the order of the text, and of random numbers of loops.
      dtype: compute dtype; 'auto' is float32 on CPU, bfloat16 on TPU and GPU.
      remat: activations that are kept for the backward pass, see `decoder.REMAT_CHOICES`.
      gather: when weights that are spread over devices are gathered. 'step': once a step, which
        takes memory for all of them. 'layer': by the compiler, in every layer of every loop and
        every chunk of the loss. 'auto': once a step if that fits.
      unroll_layers: layers per iteration of the scan over layers.
      max_skipped_steps: a step whose loss or gradient is not finite changes nothing. After so many
        in a row the run stops.
      peak_flops: bfloat16 FLOP/s of one device, for MFU; 0: as `chips.PEAK_FLOPS` has it.
      wandb: project of Weights & Biases that gets the metrics as well; '' = none.
      log_every, eval_every, checkpoint_every: in steps.
      keep_checkpoints: the newest so many are kept.
      keep_best: and so many with the lowest validation loss; a step counts if it was evaluated.
      keep_every: and those whose step is a multiple of it; 0: none.
    """

    data: DataConfig = DataConfig()
    objective: Objective = Objective()
    optimizer: OptimizerConfig = OptimizerConfig()
    near: NearStart = NearStart()
    mesh: MeshConfig = MeshConfig()
    tokens: int = 1_000_000
    accumulate: int = 1
    ema_decay: float = 0.0
    loop_curriculum: str = "none"
    loop_curriculum_share: float = 0.25
    seed: int = 0
    dtype: str = "auto"
    remat: str = "dots"
    gather: str = "auto"
    unroll_layers: int = 1
    max_skipped_steps: int = 8
    peak_flops: float = 0.0
    wandb: str = ""
    log_every: int = 10
    eval_every: int = 250
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    keep_best: int = 0
    keep_every: int = 0

    def __post_init__(self):
        check_kinds(self)
        _at_least("", 1, tokens=self.tokens, keep_checkpoints=self.keep_checkpoints)
        _at_least("", 0, keep_best=self.keep_best, keep_every=self.keep_every)
        for name in ("log_every", "eval_every", "checkpoint_every", "max_skipped_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 step, got {getattr(self, name)}")
        if self.peak_flops < 0:
            raise ValueError(f"peak_flops must be >= 0, got {self.peak_flops}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if self.loop_curriculum not in CURRICULA:
            raise ValueError(
                f"loop_curriculum={self.loop_curriculum!r}; expected one of {', '.join(CURRICULA)}"
            )
        if not 0 < self.loop_curriculum_share <= 1:
            raise ValueError(
                f"loop_curriculum_share must be in (0, 1], got {self.loop_curriculum_share}"
            )
        if self.accumulate < 1 or self.data.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate} does not divide data.batch_size="
                f"{self.data.batch_size}; choose a divisor"
            )
        if self.data.teacher:
            self.objective.check_draws()
        if self.data.teacher and not self.objective.kd:
            raise ValueError(
                f"data.teacher={self.data.teacher} with objective.kd=0 would teach nothing; leave "
                "it out, or set objective.kd > 0"
            )
        if self.remat not in REMAT_CHOICES:
            raise ValueError(f"remat={self.remat!r}; expected one of {', '.join(REMAT_CHOICES)}")
        if self.gather not in GATHER_CHOICES:
            raise ValueError(f"gather={self.gather!r}; expected one of {', '.join(GATHER_CHOICES)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}; expected auto, float32 or bfloat16")

    @property
    def tokens_per_step(self) -> int:
        return self.data.batch_size * self.data.context_length

    @property
    def num_steps(self) -> int:
        return -(-self.tokens // self.tokens_per_step)

    def is_near(self, kl: float | None) -> bool:
        """Whether a start with this KL from its source is near; None: not measured."""
        measured = kl is not None and kl <= self.near.kl
        return measured and bool(self.objective.kd) and not self.objective.exits

    def from_near(self) -> TrainConfig:
        """The settings for a near start; see `NearStart`."""
        near, optimizer = self.near, self.optimizer
        return dataclasses.replace(
            self,
            objective=dataclasses.replace(self.objective, ce=near.cross_entropy),
            optimizer=dataclasses.replace(
                optimizer,
                learning_rate=optimizer.learning_rate * near.learning_rate_scale,
                warmup_steps=min(optimizer.warmup_steps, near.max_warmup_steps),
            ),
        )

    def curriculum(self, num_loops: int) -> LoopCurriculum | None:
        """The loops of every step of a model with so many; None: all of them, always."""
        if self.loop_curriculum == "none":
            return None
        return LoopCurriculum(
            self.loop_curriculum, self.loop_curriculum_share, num_loops, self.num_steps, self.seed
        )

    def check_fits(self, cfg: DecoderConfig) -> None:
        """Raise ValueError if a model lacks loops, exits or parameters of these settings."""
        Rates(self.optimizer.rates).check(leaves(cfg))
        if self.curriculum(cfg.num_loops) is not None:
            cfg.check_cycle("loop_curriculum")
        if self.objective.exits and cfg.num_loops > 1:
            cfg.check_cycle("a loss of exits")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The settings in a nested mapping, such as the ConfigDict of a config file.

        Other keys (where the model comes from) are left out. Raises ValueError for an unknown key
        of a section.
        """
        sections = {
            "data": DataConfig, "objective": Objective, "optimizer": OptimizerConfig,
            "near": NearStart, "mesh": MeshConfig,
        }  # fmt: skip
        for name, section in sections.items():
            known = [field.name for field in dataclasses.fields(section)]
            unknown = sorted(set(values.get(name, ())) - set(known))
            if unknown:
                raise ValueError(
                    f"unknown settings {unknown} in {name}; expected some of {', '.join(known)}"
                )
        names = [field.name for field in dataclasses.fields(cls) if field.name in values]
        given = {n: sections[n](**values[n]) if n in sections else values[n] for n in names}
        return cls(**given)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def with_changes(self, **changes: Any) -> TrainConfig:
        """The settings with other values, each named as `learning_rate` or `optimizer.b1`.

        A name without its section is looked up in all of them. `data` is the section, not the mesh
        axis. Raises ValueError for an unknown or ambiguous name.
        """
        places: dict[str, list[tuple[str, str]]] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            inner = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
            for part in inner:
                for name in (part.name, f"{field.name}.{part.name}"):
                    places.setdefault(name, []).append((field.name, part.name))
        for field in dataclasses.fields(self):
            places[field.name] = [("", field.name)]  # a whole section goes before a part's name
        top: dict[str, Any] = {}
        parts: dict[str, dict[str, Any]] = {}
        for name, value in changes.items():
            found = places.get(name, [])
            if len(found) != 1:
                few = f"; expected one of {', '.join(f'{a}.{b}' for a, b in found)}"
                known = f"; expected one of {', '.join(sorted(places))}"
                raise ValueError(f"unknown training setting {name!r}{few if found else known}")
            section, key = found[0]
            (parts.setdefault(section, {}) if section else top)[key] = value
        for section, values in parts.items():
            base = top.get(section, getattr(self, section))
            top[section] = dataclasses.replace(base, **values)
        return dataclasses.replace(self, **top)
