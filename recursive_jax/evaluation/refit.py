"""LoRAs fitted once more, depth after depth, to the inputs that the tied model gives them.

The joint fit (`weights.joint`) takes the inputs of the source. In the tied model the errors of
earlier depths change them. Here the shared weights W stay. From the first depth to the last, each
LoRA is fitted so that its projection gives the outputs of the source, y, on the inputs x of the
tied model, in the metric of the loss:

    min tr[C E G Eᵀ],   E = a b - (M - W),   M = C⁻¹ E[xᵀy],   C = E[xᵀx]

The source and the tied model advance together, one layer of each at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from tqdm import tqdm

from recursive_jax.evaluation.certificate import exact
from recursive_jax.evaluation.moments import WINDOWS, Moments, block_shape, reads
from recursive_jax.models.attention import Context, rope_tables
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.decoder import Decoder, Layer, layer_tables
from recursive_jax.models.layers import Linear
from recursive_jax.models.parameters import LORA
from recursive_jax.weights import joint, low_rank
from recursive_jax.weights.source import Source

RIDGE = 1e-2  # of the mean diagonal of C, towards the weight as it is


@exact
def refit(
    source: Source,
    params: Any,
    cfg: DecoderConfig,
    rows: Any,
    found: Moments,
    kind: str,
    progress: bool = True,
) -> Any:
    """Params of the tied model with LoRAs fitted anew; all else is that of `params`.

    LoRAs of a projection whose moment is kept in blocks stay as they are: a part of the inputs
    cannot tell what the outputs lack.

    Args:
      source: vanilla.
      params, cfg: of the tied model, as `tying.tie` returns them.
      rows: a `training.data.Batch` of `[N, T]` arrays. Positions of segment 0 do not count.
      found: the source's moments, for G.
      kind: of the metric, as for `Moments.metric`.
      progress: show a bar.
    """
    flat = flatten_dict(params)
    loras = {path: np.array(x) for path, x in flat.items() if path[-1] in LORA}
    positions, segments = (jnp.asarray(x) for x in (rows.positions, rows.segment_ids))
    outer = jax.tree.map(jnp.asarray, source.outer_params())
    model = Decoder(source.cfg)
    theirs = model.apply({"params": outer}, jnp.asarray(rows.tokens), method="embed")
    ours, weights = theirs, (segments > 0).astype(jnp.float32)
    for depth in (bar := tqdm(range(cfg.depth), desc="refit", unit="layer", disable=not progress)):
        loop, layer = cfg.places()[depth]
        one, block = source.layers([depth])
        run = _source_layer(one)
        groups = [slice(n, n + WINDOWS) for n in range(0, len(theirs), WINDOWS)]
        parts = [run(block["block"], theirs[at], positions[at], segments[at]) for at in groups]
        theirs, wanted = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
        tables = jax.tree.map(lambda table, at=layer: table[at], layer_tables(cfg))
        context = Context(*rope_tables(cfg, positions), positions, segments)
        hook = _Hook(cfg, depth, wanted, weights, found, kind)
        mine = jax.tree.map(lambda x, at=layer: x[at], params["block"])
        with nn.intercept_methods(hook):
            (ours, _), _ = Layer(cfg).apply(
                {"params": mine}, (ours, None), jnp.int32(loop), context, tables
            )
        for path, (a, b) in hook.fitted.items():
            loras["block", *path, "lora_a"][layer, loop] = a
            loras["block", *path, "lora_b"][layer, loop] = b
        drift = jnp.linalg.norm((ours - theirs) * weights[..., None])
        bar.set_postfix_str(
            f"error {float(drift / jnp.linalg.norm(theirs * weights[..., None])):.1%}"
        )
    return unflatten_dict(flat | {path: jnp.asarray(x) for path, x in loras.items()})


class _Hook:
    """Fits the LoRA of every `Linear` when it is called, and lets it compute with that.

    Attributes:
      fitted: (a, b) by the path of the module.
    """

    def __init__(self, cfg, depth, wanted, weights, found, kind):
        self.cfg, self.depth, self.kind, self.found = cfg, depth, kind, found
        self.wanted, self.weights = wanted, weights.reshape(-1, 1)
        self.moments: dict[str, Any] = {}  # of inputs, by the projection that has it
        self.fitted: dict[tuple[str, ...], low_rank.Factors] = {}

    def __call__(self, call, args, kwargs, context):
        module = context.module
        if not isinstance(module, Linear) or context.method_name != "__call__":
            return call(*args, **kwargs)
        (x, loop), y = args, call(*args, **kwargs)
        name, rank = module.projection, self.cfg.rank(module.projection)
        if not rank or block_shape(x.shape[-1])[0] > 1 or x.ndim < 3:  # [P, D]: of a prefix
            return y
        stored = module.variables["params"]
        now = [np.asarray(stored[part][loop], np.float64) for part in LORA]
        a, b = self.fit(name, x, y, now[0] @ now[1], rank)
        self.fitted[module.path] = a.astype(np.float32), b.astype(np.float32)
        return y + x @ jnp.asarray(a @ b - now[0] @ now[1], jnp.float32)

    def fit(self, name, x, y, product, rank) -> low_rank.Factors:
        """The LoRA of inputs x, and outputs y with the present LoRA, whose product is given."""
        flat, count = x.reshape(-1, x.shape[-1]) * self.weights, float(self.weights.sum())
        missing = (self.wanted[name] - y).reshape(-1, y.shape[-1])
        if reads(name) not in self.moments:
            c = np.asarray(flat.T @ flat, np.float64) / count
            self.moments[reads(name)] = joint.Moment.of(c[None]), joint.Moment.of(c[None], RIDGE)
        inputs, ridged = self.moments[reads(name)]
        lacks = ridged.inverse(np.asarray(flat.T @ missing, np.float64) / count)
        outputs = self.found.metric(name, self.depth, self.kind).outputs
        a, b, *_ = joint.low_rank_step(product + lacks, joint.Metric(inputs, outputs), rank)
        return joint.normal_form(a, b)


@functools.lru_cache(maxsize=8)  # few distinct configs: layers differ in window and rope only
def _source_layer(cfg: DecoderConfig):
    """Jitted `(block, x, positions, segment_ids) -> (output, outputs of its projections)`."""

    def run(block: Mapping[str, Any], x, positions, segments):
        outputs = {}

        def tap(call, args, kwargs, context):
            y = call(*args, **kwargs)
            if isinstance(context.module, Linear) and context.method_name == "__call__":
                outputs[context.module.projection] = y
            return y

        params = jax.tree.map(lambda leaf: jnp.asarray(leaf[0], jnp.float32), block)
        tables = jax.tree.map(lambda table: table[0], layer_tables(cfg))
        context = Context(*rope_tables(cfg, positions), positions, segments)
        with nn.intercept_methods(tap):
            (x, _), _ = Layer(cfg).apply(
                {"params": params}, (x, None), jnp.int32(0), context, tables
            )
        return x, outputs

    return jax.jit(run)
