"""Tying: a vanilla model's layers folded into one block that runs several times, and back.

`tie` is array algebra on the stacked tree. CYCLE sharing: `depth = loop * num_layers + layer`, so
`w [depth, in, out]` is `[loop, layer, in, out]` without moving anything, and a method is a choice
of the shared `[layer, in, out]` from it (paper arXiv 2410.20672v3 §2.2). What a loop's source
layer has over the shared weight starts its LoRA (§2.3, `low_rank`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from recursive_jax.models.config import NORM_MODES, DecoderConfig
from recursive_jax.models.parameters import init_params
from recursive_jax.weights import low_rank, names

METHODS = ("stepwise", "average", "lower", "upper", "random")
LORA_STARTS = ("svd", "zero", "split", "none")
NORM_STARTS = ("average", "choice", "zero", "own")
ROUNDINGS = {
    "even": round,  # Python's banker's rounding, which reproduces the paper's Figure 2
    "half_up": lambda x: int(np.floor(x + 0.5)),
    "floor": int,
}
# What follows each pre-norm, hence what its scale is folded into.
_FOLDED_INTO = {"pre_attention_norm": ("q", "k", "v"), "pre_mlp_norm": ("gate", "up")}

Params = Mapping[str, Any]  # nested, or flat with keys like 'block/attention/q/w' (may be lazy)


def tie(
    params: Params,
    cfg: DecoderConfig,
    num_loops: int,
    method: str | None = None,
    lora: str | None = None,
    lora_ranks: int | str | Mapping[str, int | str] | None = None,
    norms: str = "per_loop",
    rounding: str = "even",
    norm_start: str | None = None,
    seed: int = 0,
    on_projection: Callable[[str, float], None] | None = None,
    place: Callable[[Any], Any] = lambda leaf: _float32(leaf),
) -> tuple[dict[str, Any], DecoderConfig]:
    """Fold a vanilla model into a block that runs `num_loops` times.

    Works through `params` layer by layer: next to its float32 result it holds a few matrices.

    Args:
      params: the vanilla parameters, nested or flat. A flat mapping may load on access, and single
        layers with `layers(path, depths)` as `names.LazyParams` does.
      cfg: the vanilla model: `num_loops == 1`, no LoRA, `norms == 'tied'`.
      num_loops: must divide the depth.
      method: where the shared weights come from. 'stepwise': layers at regular intervals, first
        and last included; 'average': the mean over loops; 'lower' / 'upper': the first / last
        `num_layers` layers; 'random': fresh weights and norms, and the source's embeddings, final
        norm and head (the paper's random models, App. F, have fresh ones of those too: train one
        from scratch).
        None: 'average', or 'stepwise' without LoRA or with a 'zero' one (paper §3.4, §3.5).
      lora: how the LoRAs start. 'svd': truncated SVD of the residuals; 'zero': Gaussian times
        zero; 'split': shared weights and LoRAs fitted together, from 'average'; 'none'. None:
        'zero' under stepwise, where the paper found SVD to hurt, and random, else 'svd'.
      lora_ranks: one rank for all projections, or by projection (absent means none). 'full' is
        min(in, out), which also caps every number. None or 0: no LoRA, whatever `lora` says.
      norms: 'tied', 'per_loop', or 'folded' (pre-norm scales go into the linears that follow,
        LayerNorm's bias into theirs); see `DecoderConfig.vector_loops`.
      rounding: of stepwise positions: 'even', 'half_up' or 'floor'.
      norm_start: what norm scales and biases start from. 'average' over the loops, 'choice': the
        selected layer's ('average' selects none: its first loop's), 'zero' (paper App. F; linear
        biases keep the method's default), or 'own': each depth's own, which needs a loop axis.
        None: 'own' with an SVD or split LoRA and a loop axis, because the LoRA then brings each
        loop's weights towards its depth's own and at full rank makes the model exact; otherwise
        vectors go with the weights that the loop uses: 'average' under average, else 'choice'.
      seed: of Gaussian LoRA starts and of 'random'.
      on_projection: called after each projection with its name and the share of the squared
        residual ‖W - shared‖² that the LoRAs keep, over all layers and loops (under 'split' the
        residual is that of the mean). Not called by 'random'.
      place: puts a finished leaf where it is wanted, in float32, such as on a device: so the result
        is never in memory twice. By default they are numpy arrays.

    Returns:
      Nested params of float32 arrays, and their config.

    Raises:
      ValueError: an impossible loop count, rank or combination; leaves missing, misshapen or
        left over.
    """
    recipe = _recipe(cfg, num_loops, method, lora, lora_ranks, norms, rounding, norm_start)
    source = _Source(params, cfg)
    out, vectors, stacks = {}, {}, []
    for path in source.shapes:
        if not path.startswith("block/"):
            out[path] = place(source.stored(path))
        elif recipe.method == "random":
            continue
        elif path.endswith("/w"):
            stacks.append(path)
        else:
            vectors[path] = source(path)  # [depth, F]
    if recipe.method == "random":
        fresh = jax.jit(lambda key: init_params(recipe.cfg, key)["block"])(jax.random.key(seed))
        return names.nested(out) | {"block": jax.tree.map(place, fresh)}, recipe.cfg
    folds = {}
    if norms == "folded":
        for path, shape in names.shapes(recipe.cfg).items():
            if path.endswith("/b") and path not in vectors:  # made to hold a folded LayerNorm bias
                vectors[path] = np.zeros((cfg.depth, shape[-1]), np.float32)
        folds = _take_folds(vectors, cfg)

    for path in stacks:
        prefix, name = path[:-1], path.split("/")[-2]
        layer, fold = source.by_layer(path), folds.get(name, _NO_FOLD)
        if fold.bias is not None:
            through = [fold.bias[d] @ layer(d) for d in range(cfg.depth)]
            vectors[prefix + "b"] = vectors[prefix + "b"] + np.stack(through)
        leaves, kept = _tie_projection(name, layer, fold.scale, recipe, seed)
        del layer
        out |= {prefix + leaf: place(leaves.pop(leaf)) for leaf in list(leaves)}
        if on_projection:
            on_projection(name, kept)
    out |= {path: place(_tie_vector(path, table, recipe)) for path, table in vectors.items()}
    return names.nested(out), recipe.cfg


def tied_config(
    cfg: DecoderConfig,
    num_loops: int,
    method: str | None = None,
    lora: str | None = None,
    lora_ranks: int | str | Mapping[str, int | str] | None = None,
    norms: str = "per_loop",
    rounding: str = "even",
    norm_start: str | None = None,
    seed: int = 0,
) -> DecoderConfig:
    """The config `tie` would return for these arguments; nothing is read or computed."""
    return _recipe(cfg, num_loops, method, lora, lora_ranks, norms, rounding, norm_start).cfg


def recipe_from(options: Any, seed: int) -> dict[str, Any]:
    """Arguments of `tie` from a config's `model` section ('' = default, rank -1 = full)."""
    return {
        "num_loops": options.num_loops,
        "method": options.method or None,
        "lora": options.lora_init or None,
        "lora_ranks": "full" if options.lora_rank == -1 else options.lora_rank,
        "norms": options.norms,
        "rounding": options.rounding,
        "seed": seed,
    }


def untie(params: Params, cfg: DecoderConfig) -> tuple[dict[str, Any], DecoderConfig]:
    """Unroll a recursive model into a vanilla one with the same logits, LoRA merged.

    Args:
      params: of `cfg`, nested or flat.
      cfg: any config.

    Returns:
      Nested float32 params of `cfg.depth` distinct layers, and their config.
    """
    source = _Source(params, cfg)
    loops, layers = cfg.num_loops, cfg.num_layers
    vanilla = cfg.replace(num_layers=cfg.depth, num_loops=1, norms="tied", lora_ranks=())
    out = {}
    for path, shape in names.shapes(vanilla).items():
        leaf = source(path)
        if not path.startswith("block/"):
            out[path] = leaf
        elif path.endswith("/w"):
            rank = cfg.rank(path.split("/")[-2])
            a, b = (source(path[:-1] + f"lora_{x}") if rank else None for x in "ab")
            out[path] = np.empty(shape, np.float32)
            for depth in range(cfg.depth):
                loop, layer = divmod(depth, layers)
                merged = leaf[layer] + a[layer, loop] @ b[layer, loop] if rank else leaf[layer]
                out[path][depth] = merged
        else:
            by_loop = leaf if leaf.ndim == 3 else np.repeat(leaf[:, None], loops, axis=1)
            out[path] = by_loop.swapaxes(0, 1).reshape(shape)  # [layer, loop, F] -> [depth, F]
    return names.nested(out), vanilla


def selected_depths(
    method: str, depth: int, num_layers: int, rounding: str = "even"
) -> np.ndarray | None:
    """The source layer each shared layer is a copy of: int `[num_layers]`, None under average.

    Stepwise takes regular intervals with the first and last layer fixed (paper §2.2; the rounding
    is the first author's later code, the paper shows only 6 -> 3). A single layer is the first.
    """
    if method == "stepwise":
        positions = np.linspace(0, depth - 1, num_layers)
        return np.array([ROUNDINGS[rounding](float(x)) for x in positions])
    if method == "lower":
        return np.arange(num_layers)
    if method == "upper":
        return np.arange(depth - num_layers, depth)
    return None


def resolve_ranks(
    cfg: DecoderConfig, lora_ranks: int | str | Mapping[str, int | str] | None
) -> dict[str, int]:
    """Rank by projection, clamped to min(in, out); 'full' is that minimum; zeros left out."""
    if not isinstance(lora_ranks, Mapping):
        lora_ranks = dict.fromkeys(cfg.projections, lora_ranks or 0)
    unknown = sorted(set(lora_ranks) - set(cfg.projections))
    if unknown:
        raise ValueError(
            f"lora_ranks names unknown projections {unknown}; "
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
    """The rank at which LoRA stores as much as untying the matrix would, which is exact.

    From `in·out + L·R·(in + out) = L·in·out` with L loops sharing the matrix.
    """
    return (num_loops - 1) * in_dim * out_dim / (num_loops * (in_dim + out_dim))


def costly_projections(cfg: DecoderConfig) -> dict[str, tuple[int, float]]:
    """Projections whose LoRA outweighs what sharing saves: name -> (rank, break-even rank).

    Untying such a matrix would be both smaller and exact.
    """
    limits = {n: break_even_rank(*cfg.projections[n], cfg.num_loops) for n in cfg.projections}
    return {n: (rank, limits[n]) for n, rank in cfg.lora_ranks if rank > limits[n]}


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """What `tie` was asked for, with every None replaced by its default."""

    cfg: DecoderConfig  # of the result
    method: str
    lora: str
    selected: np.ndarray | None  # source depth of each shared layer, None under average
    norm_start: str


def _recipe(cfg, num_loops, method, lora, lora_ranks, norms, rounding, norm_start) -> _Recipe:
    if cfg.num_loops != 1 or cfg.lora_ranks or cfg.norms != "tied":
        raise ValueError(
            f"tie expects a vanilla model, got num_loops={cfg.num_loops}, norms={cfg.norms!r}, "
            f"lora_ranks={dict(cfg.lora_ranks)}; untie it first"
        )
    if num_loops < 1 or cfg.depth % num_loops:
        divisors = [n for n in range(1, cfg.depth + 1) if cfg.depth % n == 0]
        raise ValueError(
            f"num_loops={num_loops} does not divide the model's {cfg.depth} layers; "
            f"possible: {', '.join(map(str, divisors))}"
        )
    for name, value, allowed in (
        ("method", method, (None, *METHODS)),
        ("lora", lora, (None, *LORA_STARTS)),
        ("norms", norms, NORM_MODES),
        ("rounding", rounding, tuple(ROUNDINGS)),
        ("norm_start", norm_start, (None, *NORM_STARTS)),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}; expected one of {allowed}")

    ranks = resolve_ranks(cfg, lora_ranks)
    if ranks and lora == "none":
        raise ValueError(f"lora='none' contradicts lora_ranks={ranks}; leave one of them out")
    if not ranks:
        lora = "none"
    if method is None:
        method = "stepwise" if lora in ("none", "zero") else "average"
    if lora is None:
        lora = "zero" if method in ("stepwise", "random") else "svd"
    if method == "random" and (lora in ("svd", "split") or norm_start):
        raise ValueError(
            f"method='random' keeps nothing of the layers that lora={lora!r} with "
            f"norm_start={norm_start!r} could start from; use lora='zero' and no norm_start"
        )
    if lora == "split" and method != "average":
        raise ValueError(
            f"lora='split' fits the shared weights anew and starts from method='average', "
            f"got method={method!r}; use lora='svd' with it"
        )
    impossible = {"tied": "own", "folded": "zero"}  # no loop axis; folded scales are gone
    if norm_start and norm_start == impossible.get(norms):
        raise ValueError(f"norm_start={norm_start!r} is impossible with norms={norms!r}")
    if norm_start is None:
        if lora in ("svd", "split") and norms != "tied":
            norm_start = "own"
        else:
            norm_start = "average" if method == "average" else "choice"

    changes: dict[str, Any] = {}
    if norms == "folded" and cfg.norm == "layer":  # LayerNorm's bias becomes a bias per linear
        changes = {"qkv_bias": True, "mlp_bias": True}
    num_layers = cfg.depth // num_loops
    tied = cfg.replace(
        num_layers=num_layers, num_loops=num_loops, norms=norms, lora_ranks=ranks, **changes
    )
    selected = selected_depths(method, cfg.depth, num_layers, rounding)
    return _Recipe(tied, method, lora, selected, norm_start)


def _tie_projection(name, source, scale, recipe, seed) -> tuple[dict[str, np.ndarray], float]:
    """Shared weight and LoRA leaves of one projection from its layers `source(depth) [in, out]`.

    `scale` None or `[depth, in]`, folded into the weights. Also the share of the squared residual
    that the LoRAs keep, measured on the result.
    """
    cfg, selected = recipe.cfg, recipe.selected
    loops, layers, rank = cfg.num_loops, cfg.num_layers, cfg.rank(name)
    in_dim, out_dim = cfg.projections[name]
    rng = np.random.default_rng([seed, list(cfg.projections).index(name)])
    leaves = {"w": np.empty((layers, in_dim, out_dim), np.float32)}
    if rank:
        leaves["lora_a"] = np.empty((layers, loops, in_dim, rank), np.float32)
        leaves["lora_b"] = np.empty((layers, loops, rank, out_dim), np.float32)

    def read(depth: int) -> np.ndarray:
        matrix = source(depth)
        return matrix if scale is None else matrix * scale[depth][:, None]

    residual = error = 0.0
    for layer in range(layers):
        weights = [read(loop * layers + layer) for loop in range(loops)]
        base = low_rank.mean(weights) if selected is None else read(selected[layer])
        residual += sum(low_rank.squared_norm(w - base) for w in weights)
        factors = []
        if recipe.lora == "zero" and rank:
            factors = [low_rank.zero_start(in_dim, out_dim, rank, rng) for _ in weights]
        elif recipe.lora == "svd" and rank:
            start = low_rank.residual_start if selected is not None else low_rank.centred_start
            factors = start(weights, base, rank, rng)
        elif recipe.lora == "split" and rank:
            base, factors = low_rank.split_spectrum(weights, rank, rng)
        leaves["w"][layer] = base
        for loop, (a, b) in enumerate(factors):
            leaves["lora_a"][layer, loop], leaves["lora_b"][layer, loop] = a, b
            error += low_rank.squared_norm(weights[loop] - base - a @ b)
    return leaves, 1 - (error if rank else residual) / residual if residual else 1.0


def _tie_vector(path: str, table: np.ndarray, recipe: _Recipe) -> np.ndarray:
    """A small vector `[depth, F]` as `[layer, F]`, or `[layer, loop, F]` where it is per loop."""
    cfg, start = recipe.cfg, recipe.norm_start
    own = table.reshape(cfg.num_loops, cfg.num_layers, -1).swapaxes(0, 1)  # [layer, loop, F]
    has_loops = cfg.vector_loops(_vector_kind(path)) > 0
    if start == "own" and has_loops:
        return np.ascontiguousarray(own)
    is_norm = "_norm/" in path
    if start == "zero" and is_norm:
        shared = np.zeros_like(own[:, 0])
    elif start == "average" or (start != "choice" and recipe.selected is None):
        shared = own.mean(axis=1)
    else:
        shared = own[:, 0] if recipe.selected is None else table[recipe.selected]
    return np.repeat(shared[:, None], cfg.num_loops, axis=1) if has_loops else shared


def _vector_kind(path: str) -> str:
    """The `DecoderConfig.vector_loops` kind of 'block/pre_mlp_norm/scale', 'block/mlp/up/b' ..."""
    module = path.split("/")[-2]
    if not module.endswith("_norm"):
        return "bias"
    return "qk_norm" if path.startswith("block/attention/") else module.split("_")[0] + "_norm"


@dataclasses.dataclass(frozen=True)
class _Fold:
    """A pre-norm's affine part: `norm(x) = x̂ * scale + bias`, each `[depth, D]`."""

    scale: np.ndarray | None = None
    bias: np.ndarray | None = None


_NO_FOLD = _Fold()


def _take_folds(vectors: dict[str, np.ndarray], cfg: DecoderConfig) -> dict[str, _Fold]:
    """Take the pre-norms' affine parts out of `vectors`, leaving identities.

    `(x̂ * scale + bias) @ w = x̂ @ (scale[:, None] * w) + bias @ w`.
    """
    folds = {}
    for norm, projections in _FOLDED_INTO.items():
        scale_path, bias_path = f"block/{norm}/scale", f"block/{norm}/bias"
        scale, bias = vectors[scale_path] + np.float32(cfg.norm_offset), vectors.get(bias_path)
        vectors[scale_path] = np.full_like(scale, 1 - cfg.norm_offset)
        if bias is not None:
            vectors[bias_path] = np.zeros_like(bias)
        folds |= dict.fromkeys(projections, _Fold(scale, bias))
    return folds


class _Source:
    """The parameters of a config by path: complete, nothing left over, read one at a time."""

    def __init__(self, params: Params, cfg: DecoderConfig):
        self.shapes = names.shapes(cfg)
        self._leaves = names.flat(params)
        missing = sorted(set(self.shapes) - set(self._leaves))
        unexpected = sorted(set(self._leaves) - set(self.shapes))
        if missing or unexpected:
            raise ValueError(
                f"the parameters do not belong to this {cfg.family} config: "
                f"missing {missing}, left over {unexpected}"
            )

    def stored(self, path: str) -> Any:
        """A leaf as it is stored."""
        leaf = self._leaves[path]
        if leaf.shape != self.shapes[path]:
            raise ValueError(
                f"parameter {path} has shape {leaf.shape}; its config asks for {self.shapes[path]}"
            )
        return leaf

    def __call__(self, path: str) -> np.ndarray:
        return _float32(self.stored(path))

    def by_layer(self, path: str) -> Callable[[int], np.ndarray]:
        """depth -> that layer of a stack of the block; alone read where the params can do that."""
        read = getattr(self._leaves, "layers", None)
        if read is not None:
            return lambda depth: _float32(read(path, [depth])[0])
        stack = np.asarray(self.stored(path))
        return lambda depth: _float32(stack[depth])


def _float32(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float32)
