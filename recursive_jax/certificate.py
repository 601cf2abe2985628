"""What a conversion preserved: sizes, the full-rank identity, agreement with the source on text.

Nothing here needs more memory than the converted model does: the source is run layer by layer as
it is read, and its log-probabilities wait on disk.
"""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax import text
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.decoder import Decoder, abstract_params, parameter_counts
from recursive_jax.training.evaluation import head_log_probabilities, log_probabilities
from recursive_jax.weights import names, tying
from recursive_jax.weights.source import Source


def sizes(source: DecoderConfig, cfg: DecoderConfig) -> dict[str, Any]:
    """Parameter counts by group, beside the source's, and their ratio."""
    before = parameter_counts(abstract_params(source))
    after = parameter_counts(abstract_params(cfg))
    return {
        "source": before["shared"],
        "source_total": before["total"],
        **after,
        "ratio_to_source": round(after["total"] / before["total"], 4),
        "block_ratio_to_source": round((after["shared"] + after["lora"]) / before["shared"], 4),
    }


def warnings(source: DecoderConfig, cfg: DecoderConfig) -> list[str]:
    """Where the LoRA outweighs what sharing saves (paper §2.2: break-even rank per matrix)."""
    out = []
    for name, (rank, limit) in tying.costly_projections(cfg).items():
        out.append(
            f"{name}: rank {rank} stores more than untying the matrix would, which is exact "
            f"(break-even {limit:.0f}); a rank below saves memory"
        )
    counts, before = sizes(source, cfg), parameter_counts(abstract_params(source))["shared"]
    if counts["shared"] + counts["lora"] > before:
        out.append(
            f"the recursive block with its LoRAs ({counts['shared'] + counts['lora']:,}) is larger "
            f"than the source's layers ({before:,})"
        )
    return out


# TPUs and some GPUs multiply float32 coarsely unless told otherwise, and these are proofs.
exact = jax.default_matmul_precision("highest")


@exact
def full_rank_identity(source: Source, recipe, windows: text.Windows) -> dict[str, Any]:
    """With full-rank LoRA the recursive model must give the source's logits.

    The proof of the code path, on the source's real weights: the layers of the block's first and
    last position, from every loop, as a model of their own (all layers would need the source and
    its full-rank twin in memory). Norms are per loop: tied ones break the identity (paper §2.3
    overlooks this), whatever the rank.

    Raises:
      ValueError: the logits differ by more than 1e-4 of their scale.
    """
    if recipe["method"] == "random":
        return {"skipped": "a random start keeps nothing of the source"}
    loops = recipe["num_loops"]
    layers = source.cfg.depth // loops
    depths = [loop * layers + layer for loop in range(loops) for layer in sorted({0, layers - 1})]
    cfg, block = source.layers(depths)
    vanilla = on_device(block | source.outer_params())
    tokens = windows.tokens[:1]
    want = next(log_probabilities(Decoder(cfg), vanilla, tokens))
    tied = dict(recipe, lora="svd", lora_ranks="full")
    tied["norms"] = "folded" if recipe["norms"] == "folded" else "per_loop"
    recursive, cfg = tying.tie(names.flat(vanilla), cfg, **tied)
    del block, vanilla
    got = next(log_probabilities(Decoder(cfg), on_device(recursive), tokens))
    error = float(np.abs(got - want).max() / np.abs(want).max())
    if not error <= 1e-4:
        raise ValueError(
            f"the full-rank identity fails for {source.path}: max |Δlogit| is {error:.2e} of the "
            "logit scale, expected <= 1e-4. Nothing was written; this is a bug in the conversion "
            "of its family, please report it"
        )
    return {"max_logit_error": error, "depths": depths}


class Reference:
    """The source's log-probabilities on the text, kept on disk."""

    @exact
    def __init__(self, path: pathlib.Path, source: Source, windows: text.Windows):
        self._windows = windows
        self._mask = windows.scored[:, 1:]
        shape = (int(self._mask.sum()), source.cfg.vocab_size)
        self._rows = np.memmap(path, np.float32, "w+", shape=shape)
        for start, rows, _ in self._scan(layerwise_log_probabilities(source, windows.tokens)):
            self._rows[start : start + len(rows)] = rows

    @exact
    def compare(self, model: Decoder, params: Any) -> dict[str, float]:
        """Perplexity of both, KL(source ‖ model) in nats and top-1 agreement, per scored token."""
        from tqdm import tqdm

        tokens = self._windows.tokens
        batches = log_probabilities(model, params, tokens)
        sums = np.zeros(4)
        with tqdm(batches, total=len(tokens), desc="result on the text", unit="window") as bar:
            for start, q, targets in self._scan(bar):
                p = np.asarray(self._rows[start : start + len(q)])
                at = np.arange(len(q))
                sums += (
                    -p[at, targets].sum(dtype=np.float64),
                    -q[at, targets].sum(dtype=np.float64),
                    (np.exp(p) * (p - q)).sum(dtype=np.float64),
                    (p.argmax(-1) == q.argmax(-1)).sum(),
                )
        nll_source, nll, kl, agreement = sums / len(self._rows)
        return {
            "source_perplexity": math.exp(nll_source),
            "perplexity": math.exp(min(nll, 700)),
            "source_nll": nll_source,
            "nll": nll,
            "kl": kl,
            "top1_agreement": agreement,
            "text_tokens": len(self._rows),
        }

    def _scan(self, batches: Iterable[np.ndarray]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(first row, rows, their targets) of the scored positions, window by window."""
        start = 0
        for tokens, mask, log_p in zip(self._windows.tokens, self._mask, batches, strict=True):
            rows = log_p[0][mask]
            yield start, rows, tokens[1:][mask]
            start += len(rows)


def layerwise_log_probabilities(source: Source, tokens: np.ndarray) -> Iterator[np.ndarray]:
    """`log_probabilities` of a vanilla model that never has more than a layer of it in memory.

    Every window goes through a layer before the next one is read: f32 `[1, T - 1, V]` by window.
    """
    from tqdm import trange

    outer = on_device(source.outer_params())
    inputs = jnp.asarray(tokens[:, :-1])
    positions = jnp.arange(inputs.shape[1], dtype=jnp.int32)[None]
    hidden = [
        Decoder(source.cfg).apply({"params": outer}, row[None], method="embed") for row in inputs
    ]
    for depth in trange(source.cfg.depth, desc="source on the text", unit="layer"):
        cfg, block = source.layers([depth])
        params = outer | on_device(block)
        hidden = [_layer(Decoder(cfg))(params, x, positions) for x in hidden]
        jax.block_until_ready(hidden)
        del block, params
    score = head_log_probabilities(Decoder(source.cfg))
    for x in hidden:
        yield np.asarray(score(outer, x))


@functools.lru_cache(maxsize=8)  # by config: layers differ in window and rope at most
def _layer(model: Decoder):
    return jax.jit(
        lambda params, x, positions: model.apply(
            {"params": params}, x, jnp.int32(0), positions, method="run_loop"
        )[0]
    )


def on_device(params: Mapping[str, Any]) -> dict[str, Any]:
    """Params as float32 arrays of the device; takes the host's out of `params` one by one.

    So a model is never in memory twice.
    """
    out = {}
    for name in list(params):
        value = params.pop(name)
        out[name] = on_device(value) if isinstance(value, dict) else jnp.asarray(value, jnp.float32)
        del value
    return out
