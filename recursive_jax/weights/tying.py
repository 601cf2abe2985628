"""Tying: fold a vanilla model's layers into one block that runs several times, and unfold it.

CYCLE sharing (paper arXiv 2410.20672v3 §2.2): `depth = loop * num_layers + layer`. A stack
`w [depth, in, out]` is therefore `[loop, layer, in, out]` without moving data, and a method chooses
the shared `[layer, in, out]` from it. The residual, a loop's source weight minus the shared weight,
starts the LoRA of that loop (§2.3, `low_rank`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from recursive_jax.models.config import NORM_MODES, DecoderConfig
from recursive_jax.models.parameters import LORA, Leaf, init_params, leaves
from recursive_jax.weights import low_rank, names

METHODS = ("stepwise", "average", "lower", "upper", "random")
LORA_STARTS = ("svd", "zero", "split", "none")
NORM_STARTS = ("average", "choice", "zero", "own")
ROUNDINGS = {
    "even": round,  # Python's banker's rounding, which reproduces the paper's Figure 2
    "half_up": lambda x: int(np.floor(x + 0.5)),
    "floor": int,
}
# The projections that read each pre-norm's output: its scale is folded into their weights.
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
    """Params and config of the recursive model: a block that runs `num_loops` times.

    The params are read layer by layer. Memory: the float32 result and a few matrices.

    Args:
      params: the vanilla parameters, nested or flat. A flat mapping may load on access. With a
        method `layers(path, depths)`, as `names.LazyParams` has, it may load single layers.
      cfg: the vanilla model: `num_loops == 1`, no LoRA, `norms == 'tied'`.
      num_loops: must divide the depth.
      method: source of the shared weights. 'stepwise': layers at regular intervals, first and last
        included. 'average': the mean over loops. 'lower' / 'upper': the first / last `num_layers`
        layers. 'random': fresh weights and norms with the source's embedding, final norm and head.
        (The paper's random models, App. F, have fresh embeddings too: train one from scratch.)
        None: 'stepwise' without LoRA or with a 'zero' LoRA, else 'average' (paper §3.4, §3.5).
      lora: how the LoRAs start. 'svd': truncated SVD of the residuals. 'zero': Gaussian times zero.
        'split': shared weights and LoRAs fitted together, starting from 'average'. 'none'.
        None: 'zero' under 'stepwise' (the paper found that SVD hurts there) and under 'random',
        else 'svd'.
      lora_ranks: one rank for all projections, or a rank by projection (absent means 0). 'full' is
        min(in, out), which also caps every number. None or 0: no LoRA, whatever `lora` is.
      norms: 'tied', 'per_loop' or 'folded'; see `DecoderConfig.vector_loops`. 'folded' multiplies
        pre-norm scales into the next projections' weights. A LayerNorm's bias goes into their
        biases.
      rounding: of stepwise positions: 'even', 'half_up' or 'floor'.
      norm_start: how norm scales and biases start. 'average': the mean over loops. 'choice': the
        vectors of the selected layer ('average' selects none; its first loop is taken). 'zero'
        (paper App. F): zero norms; linear biases keep the method's default. 'own': each depth keeps
        its own vectors, which needs a loop axis.
        None: 'own' with a loop axis and an 'svd' or 'split' LoRA. Such a LoRA moves each loop's
        weights towards those of its depth, and at full rank the model is then exact. Otherwise
        'average' under method 'average', else 'choice', so that vectors and weights match.
      seed: of Gaussian LoRA starts and of 'random'.
      on_projection: called after each projection with its name and the share of the squared
        residual ‖W - shared‖² that the LoRAs keep, over all layers and loops. Under 'split' the
        residual is taken from the mean. 'random' does not call it.
      place: moves a finished leaf to its device, in float32. The result is then never in memory
        twice. The default gives numpy arrays.

    Returns:
      Nested params of float32 arrays, and their config.

    Raises:
      ValueError: an impossible loop count, rank or combination; leaves missing, misshapen or
        left over.
    """
    recipe = _recipe(cfg, num_loops, method, lora, lora_ranks, norms, rounding, norm_start)
    source, tied_leaves = _Source(params, cfg), leaves(recipe.cfg)
    out, vectors, weights = {}, {}, []
    for leaf in source.leaves.values():
        if not leaf.in_block:
            out[leaf.path] = place(source.stored(leaf.path))
        elif recipe.method == "random":
            continue
        elif leaf.kind == "weight":
            weights.append(leaf)
        else:
            vectors[leaf.path] = source(leaf.path)  # [depth, F]
    if recipe.method == "random":
        fresh = jax.jit(lambda key: init_params(recipe.cfg, key)["block"])(jax.random.key(seed))
        return names.nested(out) | {"block": jax.tree.map(place, fresh)}, recipe.cfg
    folds = {}
    if norms == "folded":
        for path, leaf in tied_leaves.items():
            if leaf.kind == "bias" and path not in vectors:  # new: holds a folded LayerNorm bias
                vectors[path] = np.zeros((cfg.depth, leaf.shape[-1]), np.float32)
        folds = _take_folds(vectors, cfg)

    for leaf in weights:
        layer, fold = source.by_layer(leaf.path), folds.get(leaf.projection, _NO_FOLD)
        if fold.bias is not None:
            through = [fold.bias[d] @ layer(d) for d in range(cfg.depth)]
            bias = leaf.sibling("b")
            vectors[bias] = vectors[bias] + np.stack(through)
        arrays, kept = _tie_projection(leaf.projection, layer, fold.scale, recipe, seed)
        del layer
        out |= {leaf.sibling(name): place(arrays.pop(name)) for name in list(arrays)}
        if on_projection:
            on_projection(leaf.projection, kept)
    for path, table in vectors.items():
        out[path] = place(_tie_vector(tied_leaves[path], table, recipe))
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
    """The config that `tie` returns for these arguments; nothing is read or computed."""
    return _recipe(cfg, num_loops, method, lora, lora_ranks, norms, rounding, norm_start).cfg


def recipe_from(options: Any, seed: int) -> dict[str, Any]:
    """Arguments of `tie` from the `model` section of a config ('' = default, rank -1 = full)."""
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
    """Params and config of the vanilla model with the same logits: unrolled, LoRAs merged.

    Args:
      params: nested or flat.
      cfg: their config; any number of loops.

    Returns:
      Nested float32 params of `cfg.depth` distinct layers, and their config.
    """
    source = _Source(params, cfg)
    num_layers = cfg.num_layers
    vanilla = cfg.replace(num_layers=cfg.depth, num_loops=1, norms="tied", lora_ranks=())
    out = {}
    for path, leaf in leaves(vanilla).items():
        stored = source(path)
        if not leaf.in_block:
            out[path] = stored
        elif leaf.kind == "weight":
            rank = cfg.rank(leaf.projection)
            a, b = (source(leaf.sibling(name)) if rank else None for name in LORA)
            out[path] = np.empty(leaf.shape, np.float32)
            for depth in range(cfg.depth):
                loop, layer = divmod(depth, num_layers)
                shared = stored[layer]
                out[path][depth] = shared + a[layer, loop] @ b[layer, loop] if rank else shared
        else:
            has_loops = "loop" in source.leaves[path].axes
            by_loop = stored if has_loops else np.repeat(stored[:, None], cfg.num_loops, axis=1)
            out[path] = by_loop.swapaxes(0, 1).reshape(leaf.shape)  # [layer, loop] -> [depth]
    return names.nested(out), vanilla


def selected_depths(
    method: str, depth: int, num_layers: int, rounding: str = "even"
) -> np.ndarray | None:
    """The source layer that each shared layer copies: int `[num_layers]`, None under 'average'.

    'stepwise' takes layers at regular intervals, the first and the last included (paper §2.2). The
    rounding follows the first author's later code; the paper shows only 6 -> 3. A block of one
    layer copies the first.
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
    """Rank by projection, at most min(in, out); 'full' is that minimum; zeros are left out."""
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


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """Arguments of `tie`, with every None replaced by its default."""

    cfg: DecoderConfig  # of the result
    method: str
    lora: str
    selected: np.ndarray | None  # source depth of each shared layer, None under 'average'
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
    """Shared weight and LoRA factors of one projection, by parameter name; and the share kept.

    Args:
      name: of the projection.
      source: depth -> weight `[in, out]`.
      scale: None, or `[depth, in]` to fold into the weights.
      recipe: of the conversion.
      seed: of Gaussian starts.

    Returns:
      The arrays, and the share of the squared residual that the LoRAs keep, measured on them.
    """
    cfg, selected = recipe.cfg, recipe.selected
    loops, layers, rank = cfg.num_loops, cfg.num_layers, cfg.rank(name)
    in_dim, out_dim = cfg.projections[name]
    rng = np.random.default_rng([seed, list(cfg.projections).index(name)])
    arrays = {"w": np.empty((layers, in_dim, out_dim), np.float32)}
    if rank:
        arrays["lora_a"] = np.empty((layers, loops, in_dim, rank), np.float32)
        arrays["lora_b"] = np.empty((layers, loops, rank, out_dim), np.float32)

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
        arrays["w"][layer] = base
        for loop, (a, b) in enumerate(factors):
            arrays["lora_a"][layer, loop], arrays["lora_b"][layer, loop] = a, b
            error += low_rank.squared_norm(weights[loop] - base - a @ b)
    return arrays, 1 - (error if rank else residual) / residual if residual else 1.0


def _tie_vector(leaf: Leaf, table: np.ndarray, recipe: _Recipe) -> np.ndarray:
    """The tied vector `leaf`, `[layer, F]` or `[layer, loop, F]`, from its source `[depth, F]`."""
    cfg, start, has_loops = recipe.cfg, recipe.norm_start, "loop" in leaf.axes
    own = table.reshape(cfg.num_loops, cfg.num_layers, -1).swapaxes(0, 1)  # [layer, loop, F]
    if start == "own" and has_loops:
        return np.ascontiguousarray(own)
    if start == "zero" and leaf.kind != "bias":
        shared = np.zeros_like(own[:, 0])
    elif start == "average" or (start != "choice" and recipe.selected is None):
        shared = own.mean(axis=1)
    else:
        shared = own[:, 0] if recipe.selected is None else table[recipe.selected]
    return np.repeat(shared[:, None], cfg.num_loops, axis=1) if has_loops else shared


@dataclasses.dataclass(frozen=True)
class _Fold:
    """A pre-norm's affine part: `norm(x) = x̂ * scale + bias`, each `[depth, D]`."""

    scale: np.ndarray | None = None
    bias: np.ndarray | None = None


_NO_FOLD = _Fold()


def _take_folds(vectors: dict[str, np.ndarray], cfg: DecoderConfig) -> dict[str, _Fold]:
    """The pre-norms' affine parts, by the projection that reads the norm.

    In `vectors` each of these norms becomes the identity.
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
    """The parameters of a config by path, read one at a time; none is missing or left over."""

    def __init__(self, params: Params, cfg: DecoderConfig):
        self.leaves = leaves(cfg)
        self._stored = names.flat(params)
        missing = sorted(set(self.leaves) - set(self._stored))
        unexpected = sorted(set(self._stored) - set(self.leaves))
        if missing or unexpected:
            raise ValueError(
                f"the parameters do not belong to this {cfg.family} config: "
                f"missing {missing}, left over {unexpected}"
            )

    def stored(self, path: str) -> Any:
        """A parameter in the dtype it is stored in."""
        stored, expected = self._stored[path], self.leaves[path].shape
        if stored.shape != expected:
            raise ValueError(
                f"parameter {path} has shape {stored.shape}; its config expects {expected}"
            )
        return stored

    def __call__(self, path: str) -> np.ndarray:
        return _float32(self.stored(path))

    def by_layer(self, path: str) -> Callable[[int], np.ndarray]:
        """depth -> that layer of a stack, float32; read alone where the params have `layers`."""
        read = getattr(self._stored, "layers", None)
        if read is not None:
            return lambda depth: _float32(read(path, [depth])[0])
        stack = np.asarray(self.stored(path))
        return lambda depth: _float32(stack[depth])


def _float32(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float32)
