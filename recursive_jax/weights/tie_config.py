"""Options of a conversion, their defaults, and the config of the tied model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from recursive_jax.models.config import NORM_MODES, SHARINGS, DecoderConfig, shared_depths

METHODS = ("stepwise", "average", "lower", "upper", "random")
LORA_STARTS = ("joint", "svd", "zero", "split", "none")
METRICS = ("auto", "fisher", "activations", "none")
NORM_STARTS = ("average", "choice", "zero", "own")
ROUNDINGS = {
    "even": round,  # Python's banker's rounding, which reproduces the paper's Figure 2
    "half_up": lambda x: int(np.floor(x + 0.5)),
    "floor": int,
}
Rank = int | str | Mapping[str, int | str]


@dataclasses.dataclass(frozen=True)
class TieConfig:
    """Options of `tying.tie`. None means the default that the docstring names.

    Attributes:
      num_loops: must divide the depth of the source.
      method: source of the shared weights. 'stepwise': layers at regular intervals, first and last
        included. 'average': the mean over loops. 'lower' / 'upper': the first / last of the layers
        that share the weights; under 'cycle', the first / last `num_layers` layers. 'random': fresh
        weights and norms with the source's embedding, final norm and head.
        (The paper's random models, App. F, have fresh embeddings too: train one from scratch.)
        'joint' and 'split' fit the weights themselves, and take 'average' only.
        None: 'stepwise' without LoRA or with a 'zero' LoRA, else 'average' (paper §3.4, §3.5).
      lora_init: how the LoRAs start. 'joint': shared weights and LoRAs are fitted together, in a
        `metric` of calibration text; not in the paper. 'svd': truncated SVD of the residuals.
        'zero': Gaussian times zero. 'split': 'joint' in the plain metric. 'none'.
        None: with no method given 'joint', 'zero' under 'stepwise' (the paper found that SVD hurts
        there) and under 'random', else 'svd', the paper's.
      lora_rank: one rank for all projections, or a rank by projection (absent means 0). 'full' is
        min(in, out), which also caps every number. 0: no LoRA, whatever `lora_init` is.
      lora_budget: instead, the share of the parameters of the source's layers that all LoRAs have
        together. The ranks by projection are dealt by what they gain in the metric of the loss
        (`rank_budget`). None: as `lora_rank` says.
      norms: 'tied', 'per_loop' or 'folded'; see `DecoderConfig.vector_loops`. 'folded' multiplies
        pre-norm scales into the next projections' weights. A LayerNorm's bias goes into their
        biases.
      rounding: of stepwise positions: 'even', 'half_up' or 'floor'.
      norm_start: how norm scales and biases start. 'average': the mean over loops. 'choice': the
        vectors of the selected layer ('average' selects none; its first loop is taken). 'zero'
        (paper App. F): zero norms; linear biases keep the method's default. 'own': each depth keeps
        its own vectors, which needs a loop axis.
        None: 'own' with a loop axis and a 'joint', 'svd' or 'split' LoRA. It moves each loop's
        weights towards those of its depth, and at full rank the model is then exact. Otherwise
        'average' under method 'average', else 'choice', so that vectors and weights match.
      seed: of Gaussian LoRA starts and of 'random'.
      metric: of 'joint', see `weights.joint`. 'fisher': activations and gradients. 'activations'.
        'none': the plain squared error. 'auto': the better of the first two, as measured.
      refit: after 'joint' in a metric, the LoRAs are fitted anew, depth after depth, to the inputs
        that the tied model gives them (`evaluation.refit`). The better one is kept, as measured.
        It helps the embedded model much with three loops, and SmolLM2 with two not at all.
      calibrate: text of the metric, as `text.documents` takes it.
      calibration_tokens: how much of it.
      prefix_length: learnable vectors of every layer and loop, which all queries see beside the
        text (paper App. H). They start without effect. Another relaxation than LoRA, or beside it.
      sharing: order of the shared layers, see `models.config.shared_depths`. 'cycle' is the paper's
        choice. Early exits and decoding, loop after loop, need it.

    Raises:
      ValueError: an unknown value, or two values that contradict each other.
    """

    num_loops: int = 2
    method: str | None = None
    lora_init: str | None = None
    lora_rank: Rank = 0
    norms: str = "per_loop"
    rounding: str = "even"
    norm_start: str | None = None
    seed: int = 0
    metric: str = "auto"
    refit: bool = False
    calibrate: str = "docstrings:1"
    calibration_tokens: int = 16_384
    lora_budget: float | None = None
    sharing: str = "cycle"
    prefix_length: int = 0

    def __post_init__(self):
        for name in ("num_loops", "seed", "calibration_tokens", "prefix_length"):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or isinstance(value, bool):
                raise ValueError(f"{name}={value!r}; expected an integer")
            object.__setattr__(self, name, int(value))  # JSON knows no numpy numbers
        if not isinstance(self.refit, bool):
            raise ValueError(f"refit={self.refit!r}; expected True or False")
        for name, allowed in (
            ("sharing", SHARINGS),
            ("method", (None, *METHODS)),
            ("lora_init", (None, *LORA_STARTS)),
            ("norms", NORM_MODES),
            ("rounding", tuple(ROUNDINGS)),
            ("norm_start", (None, *NORM_STARTS)),
            ("metric", METRICS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}; expected one of {allowed}")
        if self.lora_init == "none" and self.has_lora:
            raise ValueError(
                f"lora_init='none' contradicts lora_rank={self.lora_rank}; leave one of them out"
            )
        if self.lora_budget is not None:
            self._check_budget()
        fitted = self.lora_init in ("joint", "split")
        if self.method == "random" and (self.lora_init == "svd" or fitted or self.norm_start):
            raise ValueError(
                f"method='random' keeps nothing of the layers that lora_init={self.lora_init!r} "
                f"with norm_start={self.norm_start!r} could start from; use lora_init='zero' and "
                "no norm_start"
            )
        if self.calibration_tokens < 64:
            raise ValueError(
                f"calibration_tokens={self.calibration_tokens}; expected at least 64, or "
                "lora_init='svd', which needs no calibration"
            )
        if self.has_lora and fitted and self.method not in (None, "average"):
            raise ValueError(
                f"lora_init={self.lora_init!r} fits the shared weights anew and starts from "
                f"method='average', got method={self.method!r}; use lora_init='svd' with it"
            )
        impossible = {"tied": "own", "folded": "zero"}  # no loop axis; folded scales are gone
        if self.norm_start and self.norm_start == impossible.get(self.norms):
            raise ValueError(
                f"norm_start={self.norm_start!r} is impossible with norms={self.norms!r}"
            )

    def _check_budget(self) -> None:
        budget = self.lora_budget
        if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget < 1:
            raise ValueError(
                f"lora_budget={budget!r}; expected a share of the source's layers, such as 0.15"
            )
        if self.lora_rank:
            raise ValueError(
                f"lora_budget={budget} beside lora_rank={self.lora_rank!r}: the budget deals the "
                "ranks; leave one of them out"
            )
        implied = self.lora_init is None and self.method is None
        if not (implied or self.lora_init == "joint") or self.metric == "none":
            raise ValueError(
                f"lora_budget={budget} deals ranks by calibration, which lora_init="
                f"{self.lora_init!r}, method={self.method!r} with metric={self.metric!r} does "
                "without; leave them out"
            )

    @property
    def has_lora(self) -> bool:
        if self.lora_budget is not None:
            return True
        if isinstance(self.lora_rank, Mapping):
            return any(self.lora_rank.values())
        return bool(self.lora_rank)

    def resolved(self) -> TieConfig:
        """The config with every None replaced by its default."""
        lora, method, norm_start = self.lora_init, self.method, self.norm_start
        if not self.has_lora and lora != "joint":
            lora = "none"
        if method is None:
            lora = lora or ("svd" if self.lora_rank == "full" else "joint")  # both are exact
            method = "stepwise" if lora in ("none", "zero") else "average"
        if lora is None:
            lora = "zero" if method in ("stepwise", "random") else "svd"
        if norm_start is None and method != "random":
            own = lora in ("joint", "svd", "split") and self.norms != "tied"
            norm_start = "own" if own else "average" if method == "average" else "choice"
        return dataclasses.replace(self, method=method, lora_init=lora, norm_start=norm_start)

    def to_json(self) -> dict[str, Any]:
        record = dataclasses.asdict(self)
        if isinstance(self.lora_rank, Mapping):
            record["lora_rank"] = dict(self.lora_rank)
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> TieConfig:
        """The config of a checkpoint's record, also of one from an older version.

        Older versions wrote '' for None, -1 for 'full', and other names of two fields.
        """
        older = {"lora": "lora_init", "lora_ranks": "lora_rank"}
        fields = {field.name for field in dataclasses.fields(cls)}
        values = {older.get(name, name): value for name, value in record.items()}
        values = {n: None if v == "" else v for n, v in values.items() if n in fields}
        if values.get("lora_rank", 0) in (None, -1):
            values["lora_rank"] = "full" if values["lora_rank"] == -1 else 0
        return cls(**values)


def checked_config(cfg: DecoderConfig, how: TieConfig) -> DecoderConfig:
    """`tied_config`; under a budget, whose ranks are dealt later, without LoRAs.

    For checks and tables before the work.
    """
    tied = tied_config(cfg, dataclasses.replace(how, lora_budget=None))
    sizes, budget = tied.projections.values(), how.lora_budget
    least = tied.depth * min(n + m for n, m in sizes)
    if budget is not None and budget * tied.depth * sum(n * m for n, m in sizes) < least:
        raise ValueError(
            f"lora_budget={budget} is less than one rank of the smallest projection, "
            f"{least:,} parameters; give more, or lora_rank=0"
        )
    return tied


def tied_config(cfg: DecoderConfig, how: TieConfig) -> DecoderConfig:
    """The config that `tying.tie` returns; nothing is read or computed.

    Raises:
      ValueError: the model is not vanilla, or has another number of layers or other projections.
    """
    if cfg.num_loops != 1 or cfg.lora_ranks or cfg.norms != "tied" or cfg.prefix_length:
        raise ValueError(
            f"tie expects a vanilla model, got num_loops={cfg.num_loops}, norms={cfg.norms!r}, "
            f"lora_ranks={dict(cfg.lora_ranks)}, prefix_length={cfg.prefix_length}; untie it first"
        )
    loops = how.num_loops
    if loops < 1 or cfg.depth % loops:
        divisors = [n for n in range(1, cfg.depth + 1) if cfg.depth % n == 0]
        raise ValueError(
            f"num_loops={loops} does not divide the model's {cfg.depth} layers; "
            f"possible: {', '.join(map(str, divisors))}"
        )
    if how.lora_budget is not None:
        raise ValueError(
            f"the ranks of lora_budget={how.lora_budget} are not dealt yet; `calibration.tie` does"
        )
    layers = cfg.depth // loops
    changes: dict[str, Any] = {}
    if (shared_depths(how.sharing, loops, layers) != shared_depths("cycle", loops, layers)).any():
        changes["sharing"] = how.sharing  # else it is the same order, which can be decoded
    if how.norms == "folded" and cfg.norm == "layer":  # LayerNorm's bias: a bias of each linear
        changes |= {"qkv_bias": True, "mlp_bias": True}
    return cfg.replace(
        num_layers=layers,
        num_loops=loops,
        norms=how.norms,
        lora_ranks=resolve_ranks(cfg, how.lora_rank),
        prefix_length=how.prefix_length,
        **changes,
    )


def selected_depths(
    method: str, depth: int, num_layers: int, rounding: str = "even", sharing: str = "cycle"
) -> np.ndarray | None:
    """The source layer that each shared layer copies: int `[num_layers]`, None under 'average'.

    'stepwise' takes layers at regular intervals, the first and the last included (paper §2.2). The
    rounding follows the first author's later code; the paper shows only 6 -> 3. A block of one
    layer copies the first.
    """
    if method == "stepwise":
        positions = np.linspace(0, depth - 1, num_layers)
        return np.array([ROUNDINGS[rounding](float(x)) for x in positions])
    if method in ("lower", "upper"):
        depths = shared_depths(sharing, depth // num_layers, num_layers)
        return depths[:, 0 if method == "lower" else -1]
    return None


def resolve_ranks(
    cfg: DecoderConfig, lora_ranks: int | str | Mapping[str, int | str] | None
) -> dict[str, int]:
    """Rank by projection, at most min(in, out); 'full' is that minimum; zeros are left out."""
    if not isinstance(lora_ranks, Mapping):
        lora_ranks = dict.fromkeys(cfg.projections, lora_ranks or 0)
    unknown = sorted(set(lora_ranks) - set(cfg.projections))
    if unknown:
        raise ValueError(
            f"lora_rank names unknown projections {unknown}; "
            f"this {cfg.family} model has {list(cfg.projections)}"
        )
    ranks = {}
    for name, rank in lora_ranks.items():
        full = min(cfg.projections[name])
        if rank != "full" and (not isinstance(rank, (int, np.integer)) or rank < 0):
            raise ValueError(
                f"LoRA rank {rank!r} of projection {name!r} is impossible; expected 'full' or a "
                f"whole number from 0 (more than {full} counts as {full})"
            )
        ranks[name] = full if rank == "full" else min(int(rank), full)
    return {name: rank for name, rank in ranks.items() if rank}


def break_even_rank(in_dim: int, out_dim: int, num_loops: int) -> float:
    """The rank at which LoRA stores as many numbers as untying the matrix.

    Untying is exact, so a higher rank is never worth it. The rank solves
    `in·out + L·R·(in + out) = L·in·out`, where L loops share the matrix.
    """
    return (num_loops - 1) * in_dim * out_dim / (num_loops * (in_dim + out_dim))


def costly_projections(cfg: DecoderConfig) -> dict[str, tuple[int, float]]:
    """Projections whose LoRA is larger than the saving by sharing: name -> (rank, break-even rank).

    Untying such a matrix is smaller and exact.
    """
    limits = {n: break_even_rank(*cfg.projections[n], cfg.num_loops) for n in cfg.projections}
    return {n: (rank, limits[n]) for n, rank in cfg.lora_ranks if rank > limits[n]}
