"""What a conversion preserved: sizes, the full-rank identity, agreement with the source on text.

No function needs more memory than the converted model. The source runs layer by layer, as it is
read, and its log-probabilities are stored on disk.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm, trange

from recursive_jax import text
from recursive_jax.evaluation.perplexity import exp
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.parameters import abstract_params, head_params, parameter_counts
from recursive_jax.weights import names, tie_config, tying
from recursive_jax.weights.source import Source
from recursive_jax.weights.tie_config import TieConfig


def sizes(source: DecoderConfig, cfg: DecoderConfig) -> dict[str, Any]:
    """Parameter counts by group, the counts of the source, and their ratios."""
    before = parameter_counts(abstract_params(source))
    after = parameter_counts(abstract_params(cfg))
    return {
        "source": before["shared"],
        "source_total": before["total"],
        **after,
        "ratio_to_source": round(after["total"] / before["total"], 4),
        "block_ratio_to_source": round(_stored(after) / before["shared"], 4),
    }


def _stored(counts: Mapping[str, int]) -> int:
    """Matrices of the block, and what relaxes them."""
    return counts["shared"] + counts["lora"] + counts["prefix"]


def tie_with_certificate(
    source: Source,
    how: TieConfig,
    progress: bool = True,
    metric: tying.MetricOf | None = None,
    name: str = "tying",
) -> tuple[Any, DecoderConfig, dict[str, Any]]:
    """Params and config of `tying.tie`, and a certificate without measurements on text.

    Shows a progress bar, called `name`, on process 0 and if `progress`.
    """
    energy: dict[str, float] = {}
    by_layer: dict[str, list[float]] = {}
    projections, hidden = len(source.cfg.projections), not progress or jax.process_index() != 0
    with tqdm(total=projections, desc=name, unit="projection", disable=hidden) as bar:

        def on_projection(name, kept, layers):
            if not math.isfinite(kept):
                raise ValueError(
                    f"{source.path}: the weights of projection {name} are so large that their "
                    "squares exceed float32. Nothing was written; check the source"
                )
            energy[name] = round(kept, 6)
            by_layer[name] = [round(float(share), 6) for share in layers]
            bar.set_postfix_str(f"{name} keeps {kept:.1%}")
            bar.update()

        params, cfg = tying.tie(
            source.params,
            source.cfg,
            how,
            on_projection=on_projection,
            place=on_device,
            metric=metric,
        )
    certificate = {
        "source": str(source.path),
        "family": cfg.family,
        "recipe": how.to_json(),
        "tensors": source.params.num_tensors,
        "parameters": sizes(source.cfg, cfg),
        "energy_kept": energy,
        "energy_kept_by_layer": by_layer,
        "warnings": warnings(source.cfg, cfg),
    }
    return params, cfg, certificate


def certified_kl(certificate: Mapping[str, Any] | None) -> float | None:
    """KL(source ‖ model) in nats per token as a certificate has measured it; None: it has not."""
    certificate = certificate or {}
    if "kl" in certificate:
        return certificate["kl"]
    calibration = certificate.get("calibration", {})
    kl = calibration.get("kl_by_metric", {}).get(calibration.get("metric"))
    return kl if kl is None else min(kl, calibration.get("refit_kl", kl))


def warnings(source: DecoderConfig, cfg: DecoderConfig) -> list[str]:
    """A line for every LoRA that is larger than the saving by sharing (`break_even_rank`)."""
    out = []
    for name, (rank, limit) in tie_config.costly_projections(cfg).items():
        out.append(
            f"{name}: rank {rank} stores more than untying the matrix would, which is exact "
            f"(break-even {limit:.0f}); a rank below saves memory"
        )
    counts, before = sizes(source, cfg), parameter_counts(abstract_params(source))["shared"]
    if _stored(counts) > before:
        added = "LoRAs" + (" and prefixes" if counts["prefix"] else "")
        out.append(
            f"the recursive block with its {added} ({_stored(counts):,}) is larger "
            f"than the source's layers ({before:,})"
        )
    return out


_OVERFLOW = (
    "{} log-probabilities that are no finite numbers: activations exceed float32. Nothing was "
    "written; check the source's weights"
)

# TPUs and some GPUs round float32 factors by default. These functions prove equalities.
exact = jax.default_matmul_precision("highest")


@exact
def full_rank_identity(source: Source, how: TieConfig, windows: text.Windows) -> dict[str, Any]:
    """The largest logit error of a full-rank conversion, which must give the source's logits.

    It proves the code path on the source's real weights. A small model is made of the block's first
    and last layer from every loop: all layers would need the source and its full-rank twin in
    memory. Norms are per loop. Tied norms break the identity at any rank (paper §2.3 overlooks
    this).

    Raises:
      ValueError: the logits differ by more than 1e-4 of their scale.
    """
    if how.method == "random":
        return {"skipped": "a random start keeps no layer of the source"}
    tied = tie_config.checked_config(source.cfg, how)
    ends = {0, tied.num_layers - 1}
    depths = [depth for depth, (_, layer) in enumerate(tied.places()) if layer in ends]
    cfg, block = source.layers(depths)
    outer, tokens = jax.tree.map(on_device, source.outer_params()), windows.tokens[:1]
    want = next(hidden_states(Decoder(cfg), outer | jax.tree.map(jnp.asarray, block), tokens))
    norms = "folded" if how.norms == "folded" else "per_loop"
    full = {"lora_init": "svd", "lora_rank": "full", "norm_start": None, "lora_budget": None}
    exact_how = dataclasses.replace(how, norms=norms, **full)
    recursive, cfg = tying.tie(names.flat(block | outer), cfg, exact_how, place=on_device)
    recursive = outer | {"block": recursive["block"]}  # both models use one embedding
    del block
    got = next(hidden_states(Decoder(cfg), recursive, tokens))
    del recursive
    score, error, scale = _head(Decoder(cfg)), 0.0, 0.0
    for rows in _chunks(len(want)):
        a, b = (np.asarray(score(outer, hidden[rows])) for hidden in (want, got))
        error = np.maximum(error, np.abs(b - a).max())  # NaN stays, unlike in max()
        scale = np.maximum(scale, np.abs(a).max())
    if not np.isfinite(scale):
        raise ValueError(_OVERFLOW.format(f"{source.path} gives"))
    error = float(error / scale)
    if not error <= 1e-4:
        raise ValueError(
            f"the full-rank identity fails for {source.path}: max |Δlogit| is {error:.2e} of the "
            "logit scale, expected <= 1e-4. Nothing was written; this is a bug in the conversion "
            "of its family, please report it"
        )
    return {"max_logit_error": error, "depths": depths}


class Reference:
    """The source's log-probabilities on windows of text, stored on disk at `path`.

    Shows progress bars if `progress`.
    """

    @exact
    def __init__(
        self, path: pathlib.Path, source: Source, windows: text.Windows, progress: bool = True
    ):
        self._windows, self._progress = windows, progress
        self._mask = windows.scored[:, 1:]
        shape = (int(self._mask.sum()), source.cfg.vocab_size)
        with open(path, "wb") as file:
            size = max(4 * math.prod(shape), 1)
            if hasattr(os, "posix_fallocate"):  # a full disk raises here, not SIGBUS on a write
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        self._rows = np.memmap(path, np.float32, "r+", shape=shape)
        outer = jax.tree.map(on_device, source.outer_params())
        hidden = layerwise_hidden_states(source, outer, windows.tokens, progress)
        for start, rows, _ in self._scan(Decoder(source.cfg), outer, hidden):
            self._rows[start : start + len(rows)] = rows

    @exact
    def compare(self, model: Decoder, params: Any) -> dict[str, float]:
        """Perplexities, KL(source ‖ model) in nats and top-1 agreement, means per scored token."""
        hidden = hidden_states(model, params, self._windows.tokens)
        sums = np.zeros(4)
        total, quiet = len(self._mask), not self._progress
        bar = tqdm(hidden, total=total, desc="result on the text", unit="window", disable=quiet)
        with bar:
            for start, q, targets in self._scan(model, params, bar):
                p = np.asarray(self._rows[start : start + len(q)])
                at = np.arange(len(q))
                sums += (
                    -p[at, targets].sum(dtype=np.float64),
                    -q[at, targets].sum(dtype=np.float64),
                    (np.exp(p) * (p - q)).sum(dtype=np.float64),
                    (p.argmax(-1) == q.argmax(-1)).sum(),
                )
        if not np.isfinite(sums).all():
            raise ValueError(_OVERFLOW.format("the source or the result gives"))
        nll_source, nll, kl, agreement = (float(x) for x in sums / len(self._rows))
        return {
            "source_perplexity": exp(nll_source),
            "perplexity": exp(nll),
            "source_nll": nll_source,
            "nll": nll,
            "kl": kl,
            "top1_agreement": agreement,
            "text_tokens": len(self._rows),
        }

    def _scan(
        self, model: Decoder, params: Any, hidden: Iterable[jax.Array]
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(first row, log-probabilities `[n, V]`, targets `[n]`) of the scored positions."""
        start, score = 0, _head(model)
        for tokens, mask, states in zip(self._windows.tokens, self._mask, hidden, strict=True):
            for rows in _chunks(len(states)):
                log_p = np.asarray(score(params, states[rows]))[mask[rows]]
                yield start, log_p, tokens[1:][rows][mask[rows]]
                start += len(log_p)


def _chunks(length: int, size: int = 64) -> Iterator[slice]:
    """Slices of a few positions: their logits have up to 262k columns each."""
    return (slice(start, start + size) for start in range(0, length, size))


def hidden_states(model: Decoder, params: Any, tokens: np.ndarray) -> Iterator[jax.Array]:
    """Hidden states before the head, `[T - 1, D]` for each window of tokens `[N, T]`."""

    @jax.jit
    def run(params, row):
        positions = jnp.arange(len(row), dtype=jnp.int32)[None]
        return model.apply({"params": params}, row[None], positions)[0]

    for row in tokens:
        yield run(params, jnp.asarray(row[:-1]))


def layerwise_hidden_states(
    source: Source, outer: Mapping[str, Any], tokens: np.ndarray, progress: bool = True
) -> list[jax.Array]:
    """`hidden_states` of a vanilla model, with one layer in memory at a time.

    All windows pass a layer before the next layer is read. `outer`: embedding, head and final norm.
    """
    inputs = jnp.asarray(tokens[:, :-1])
    positions = jnp.arange(inputs.shape[1], dtype=jnp.int32)[None]
    embed = functools.partial(Decoder(source.cfg).apply, {"params": outer}, method="embed")
    hidden = [embed(row[None]) for row in inputs]
    quiet = not progress
    for depth in trange(source.cfg.depth, desc="source on the text", unit="layer", disable=quiet):
        cfg, block = source.layers([depth])
        params = outer | jax.tree.map(on_device, block)
        hidden = [_layer(Decoder(cfg))(params, x, positions) for x in hidden]
        jax.block_until_ready(hidden)
        del block, params
    return [x[0] for x in hidden]


@functools.lru_cache(maxsize=8)  # few distinct configs: layers differ in window and rope only
def _layer(model: Decoder):
    return jax.jit(
        lambda params, x, positions: model.apply(
            {"params": params}, x, jnp.int32(0), positions, method="run_loop"
        )
    )


@functools.lru_cache(maxsize=8)
def _head(model: Decoder):
    """Jitted `(params, hidden [n, D]) -> log-probabilities f32 [n, V]`."""

    def score(params, hidden):
        logits = model.apply({"params": params}, hidden, method="unembed")
        return jax.nn.log_softmax(logits, axis=-1)

    jitted = jax.jit(score)
    return lambda params, hidden: jitted(head_params(params), hidden)


def on_device(leaf: Any) -> jax.Array:
    """The array on the default device, in float32; the host array is free when this returns."""
    return jax.block_until_ready(jnp.asarray(leaf, jnp.float32))
