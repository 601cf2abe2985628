"""Tying: fold a vanilla model's layers into one block that runs several times, and unfold it.

`DecoderConfig.depths` says which source layers share a layer of the block; in the paper's order,
CYCLE, these are `loop * num_layers + layer` (arXiv 2410.20672v3 §2.2). A method chooses the shared
weight from theirs. The residual, a loop's source weight minus the shared weight, starts the LoRA of
that loop (§2.3, `low_rank`).
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.parameters import LORA, Leaf, init_params, leaves
from recursive_jax.weights import joint, low_rank, names, rank_budget
from recursive_jax.weights.tie_config import TieConfig, selected_depths, tied_config

# The projections that read each pre-norm's output: its scale is folded into their weights.
_FOLDED_INTO = {"pre_attention_norm": ("q", "k", "v"), "pre_mlp_norm": ("gate", "up")}

LAYERS_AT_ONCE = 2  # 'joint' holds some ten float64 matrices of a layer
LARGE = 1 << 23  # entries of a weight of which one layer at a time is fitted
Params = Mapping[str, Any]  # nested, or flat with keys like 'block/attention/q/w' (may be lazy)
# (projection, source layer, scale, bias) -> metric of its weight. Scale and bias `[in]` are those
# of the norm in front where they are folded into the weight, else None.
MetricOf = Callable[[str, int, np.ndarray | None, np.ndarray | None], joint.Metric]


def tie(
    params: Params,
    cfg: DecoderConfig,
    how: TieConfig,
    on_projection: Callable[[str, float, np.ndarray], None] | None = None,
    place: Callable[[Any], Any] = lambda leaf: _float32(leaf),
    metric: MetricOf | None = None,
) -> tuple[dict[str, Any], DecoderConfig]:
    """Params and config of the recursive model: a block that runs `num_loops` times.

    The params are read layer by layer. Memory: the float32 result and a few matrices.

    Args:
      params: the vanilla parameters, nested or flat. A flat mapping may load on access. With a
        method `layers(path, depths)`, as `names.LazyParams` has, it may load single layers.
      cfg: the vanilla model: `num_loops == 1`, no LoRA, `norms == 'tied'`.
      how: options of the conversion.
      on_projection: called after each projection with its name, the share of the squared residual
        ‖W - shared‖² that the LoRAs keep over all layers and loops, and the share of each layer of
        the block, `[layer]`. Under 'split' the residual is taken from the mean. 'random' does not
        call it.
      place: moves a finished leaf to its device, in float32. The result is then never in memory
        twice. The default gives numpy arrays.
      metric: of the source's weights, for 'joint'; None: the plain squared error.

    Returns:
      Nested params of float32 arrays, and their config.

    Raises:
      ValueError: an impossible loop count, rank or combination; leaves missing, misshapen or
        left over.
    """
    tied, how = tied_config(cfg, how), how.resolved()
    source, tied_leaves = _Source(params, cfg), leaves(tied)
    out, vectors, weights = {}, {}, []
    for leaf in source.leaves.values():
        if not leaf.in_block:
            out[leaf.path] = place(source.stored(leaf.path))
        elif how.method == "random":
            continue
        elif leaf.kind == "weight":
            weights.append(leaf)
        else:
            vectors[leaf.path] = source(leaf.path)  # [depth, F]
    if how.method == "random":
        fresh = jax.jit(lambda key: init_params(tied, key)["block"])(jax.random.key(how.seed))
        return names.nested(out) | {"block": jax.tree.map(place, fresh)}, tied
    folds = {}
    if how.norms == "folded":
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
        arrays, residual, error = _tie_projection(leaf.projection, layer, fold, tied, how, metric)
        del layer
        out |= {leaf.sibling(name): place(arrays.pop(name)) for name in list(arrays)}
        if on_projection:
            whole = _kept(residual.sum(keepdims=True), error.sum(keepdims=True))
            on_projection(leaf.projection, float(whole[0]), _kept(residual, error))
    for path, table in vectors.items():
        out[path] = place(_tie_vector(tied_leaves[path], table, tied, how))
    for path, leaf in tied_leaves.items():
        if leaf.kind == "prefix":  # of the size of a normalised state
            rng = np.random.default_rng([how.seed, len(cfg.projections)])
            out[path] = place(rng.standard_normal(leaf.shape, np.float32))
        elif leaf.kind == "prefix_gate":
            out[path] = place(np.zeros(leaf.shape, np.float32))
    return names.nested(out), tied


def rank_gains(
    params: Params,
    cfg: DecoderConfig,
    how: TieConfig,
    metric: MetricOf,
    on_projection: Callable[[], Any] = lambda: None,
) -> dict[str, np.ndarray]:
    """What each further rank takes off the error of a projection, summed over the block's layers.

    The arguments are those of `tie`; see `rank_budget.gains` for the values.
    """
    tied, source = tied_config(cfg, how), _Source(params, cfg)
    folds = {}
    if how.norms == "folded":
        norms = (path for path, leaf in source.leaves.items() if leaf.kind == "pre_norm")
        vectors = {path: source(path) for path in norms}
        folds = _take_folds(vectors, cfg)
    found = {}
    for leaf in source.leaves.values():
        if not (leaf.in_block and leaf.kind == "weight"):
            continue
        name, layer = leaf.projection, source.by_layer(leaf.path)
        weights_of = _Weights(name, layer, folds.get(name, _NO_FOLD), tied, metric)

        def gains(layer: int, weights_of=weights_of) -> np.ndarray:
            return rank_budget.gains(*weights_of.loops(layer))

        found[name] = sum(_in_parallel(gains, range(tied.num_layers), tied.projections[name]))
        on_projection()
    return found


def untie(params: Params, cfg: DecoderConfig) -> tuple[dict[str, Any], DecoderConfig]:
    """Params and config of the vanilla model with the same logits: unrolled, LoRAs merged.

    Args:
      params: nested or flat.
      cfg: their config; any number of loops.

    Returns:
      Nested float32 params of `cfg.depth` distinct layers, and their config.
    """
    return names.nested(Unrolled(params, cfg)), unrolled_config(cfg)


def unrolled_config(cfg: DecoderConfig) -> DecoderConfig:
    """The config of the vanilla model with the same logits."""
    return cfg.replace(
        num_layers=cfg.depth, num_loops=1, sharing="cycle", norms="tied", lora_ranks=()
    )


class Unrolled(Mapping):
    """The params of `untie` as a flat lazy mapping: a parameter is made when it is read."""

    def __init__(self, params: Params, cfg: DecoderConfig):
        self._source, self._cfg, self._places = _Source(params, cfg), cfg, cfg.places()
        self._leaves = leaves(unrolled_config(cfg))

    def __getitem__(self, path: str) -> Any:
        leaf, cfg = self._leaves[path], self._cfg
        stored = self._source(path)
        if not leaf.in_block:
            return stored
        if leaf.kind == "weight":
            rank = cfg.rank(leaf.projection)
            a, b = (self._source(leaf.sibling(name)) if rank else None for name in LORA)
            out = np.empty(leaf.shape, np.float32)
            for depth, (loop, layer) in enumerate(self._places):
                shared = stored[layer]
                out[depth] = shared + a[layer, loop] @ b[layer, loop] if rank else shared
            return out
        has_loops = "loop" in self._source.leaves[path].axes
        rows = (stored[layer, loop] if has_loops else stored[layer] for loop, layer in self._places)
        return np.stack(list(rows)).reshape(leaf.shape)  # a prefix keeps its loop axis

    def __iter__(self) -> Iterator[str]:
        return iter(self._leaves)

    def __len__(self) -> int:
        return len(self._leaves)


def _kept(residual: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Shares of the residuals that the LoRAs keep; 1 where there is none."""
    return 1 - np.divide(error, residual, out=np.zeros_like(error), where=residual != 0)


def _tie_projection(name, source, fold, cfg, how, metric):
    """Shared weight and LoRA factors of one projection, by parameter name; and the share kept.

    Args:
      name: of the projection.
      source: depth -> weight `[in, out]`.
      fold: of the norm in front.
      cfg: of the result.
      how: of the conversion, resolved.
      metric: as in `tie`.

    Returns:
      The arrays; by layer of the block, float64 `[layer]`: the squared residuals of the shared
      weight, and what the LoRAs leave of them, measured on the arrays or, under 'joint', in its
      metric.
    """
    selected = _selected(cfg, how)
    loops, layers, rank = cfg.num_loops, cfg.num_layers, cfg.rank(name)
    in_dim, out_dim = cfg.projections[name]
    projection = list(cfg.projections).index(name)
    rng = np.random.default_rng([how.seed, projection])
    arrays = {"w": np.empty((layers, in_dim, out_dim), np.float32)}
    if rank:
        arrays["lora_a"] = np.empty((layers, loops, in_dim, rank), np.float32)
        arrays["lora_b"] = np.empty((layers, loops, rank, out_dim), np.float32)

    weights_of = _Weights(name, source, fold, cfg, metric)
    read = weights_of.read
    residual, error = np.zeros(layers), np.zeros(layers)
    if how.lora_init == "joint":

        def fit(layer: int) -> joint.Fit:
            own_rng = np.random.default_rng([how.seed, projection, layer])
            return joint.fit(*weights_of.loops(layer), rank, own_rng)

        for layer, found in enumerate(_in_parallel(fit, range(layers), (in_dim, out_dim))):
            residual[layer], error[layer] = found.residual, found.objective[-1]
            arrays["w"][layer] = found.base
            for loop, (a, b) in enumerate(found.factors):
                arrays["lora_a"][layer, loop], arrays["lora_b"][layer, loop] = a, b
        return arrays, residual, error
    for layer in range(layers):
        weights = [read(depth) for depth in cfg.depths()[layer]]
        base = low_rank.mean(weights) if selected is None else read(selected[layer])
        residual[layer] = sum(low_rank.squared_norm(w - base) for w in weights)
        factors = []
        if how.lora_init == "zero" and rank:
            factors = [low_rank.zero_start(in_dim, out_dim, rank, rng) for _ in weights]
        elif how.lora_init == "svd" and rank:
            start = low_rank.residual_start if selected is not None else low_rank.centred_start
            factors = start(weights, base, rank, rng)
        elif how.lora_init == "split" and rank:
            base, factors = low_rank.split_spectrum(weights, rank, rng)
        arrays["w"][layer] = base
        for loop, (a, b) in enumerate(factors):
            arrays["lora_a"][layer, loop], arrays["lora_b"][layer, loop] = a, b
            error[layer] += low_rank.squared_norm(weights[loop] - base - a @ b)
    return arrays, residual, error if rank else residual


@dataclasses.dataclass(frozen=True)
class _Weights:
    """The source's weights of one projection, with the norm in front folded in, and their metrics.

    The attributes are arguments of `_tie_projection`.
    """

    name: str
    source: Callable[[int], np.ndarray]
    fold: _Fold
    cfg: DecoderConfig
    metric: MetricOf | None

    def read(self, depth: int) -> np.ndarray:
        matrix = self.source(depth)
        return matrix if self.fold.scale is None else matrix * self.fold.scale[depth][:, None]

    def metric_of(self, depth: int) -> joint.Metric:
        if self.metric is None:
            return joint.Metric.plain(*self.cfg.projections[self.name])
        vectors = (self.fold.scale, self.fold.bias)
        return self.metric(self.name, depth, *(x if x is None else x[depth] for x in vectors))

    def loops(self, layer: int) -> tuple[list[np.ndarray], list[joint.Metric]]:
        """Weights and metrics of the source layers that share one layer of the block."""
        depths = self.cfg.depths()[layer]
        return [self.read(d) for d in depths], [self.metric_of(d) for d in depths]


def _in_parallel(
    fit: Callable[[int], Any], layers: Iterable[int], shape: tuple[int, int]
) -> Iterator[Any]:
    """The fits of some layers at a time, in order; one BLAS thread for each (`one_blas_thread`).

    Large matrices, of `shape`, come one layer at a time: memory counts, and their products keep
    all threads busy.
    """
    if shape[0] * shape[1] >= LARGE:
        yield from map(fit, layers)
        return
    workers = min(LAYERS_AT_ONCE, os.cpu_count() or 1)
    with low_rank.one_blas_thread(), ThreadPoolExecutor(workers) as pool:
        waiting: collections.deque[Any] = collections.deque()
        for layer in layers:
            waiting.append(pool.submit(fit, layer))
            if len(waiting) > workers:  # no more results in memory than workers
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _selected(cfg: DecoderConfig, how: TieConfig) -> np.ndarray | None:
    return selected_depths(how.method, cfg.depth, cfg.num_layers, how.rounding, cfg.sharing)


def _tie_vector(leaf: Leaf, table: np.ndarray, cfg: DecoderConfig, how: TieConfig) -> np.ndarray:
    """The tied vector `leaf`, `[layer, F]` or `[layer, loop, F]`, from its source `[depth, F]`."""
    start, has_loops = how.norm_start, "loop" in leaf.axes
    selected = _selected(cfg, how)
    own = table[cfg.depths()]  # [layer, loop, F]
    if start == "own" and has_loops:
        return own
    if start == "zero" and leaf.kind != "bias":
        shared = np.zeros_like(own[:, 0])
    elif start == "average" or (start != "choice" and selected is None):
        shared = own.mean(axis=1)
    else:
        shared = own[:, 0] if selected is None else table[selected]
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
