"""Arithmetic of a token or a step: two operations for every weight that a row meets."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.parameters import leaves


@dataclasses.dataclass(frozen=True)
class TokenFlops:
    """Floating-point operations of one token; norms, rotations and the softmax are left out.

    Attributes:
      loop: one pass of the block, attention over `context` tokens included.
      projected: keys and values of one loop, projected from the state with which a token left.
      head: the vocabulary head.
    """

    loop: float
    projected: float
    head: float

    @classmethod
    def of(cls, cfg: DecoderConfig, context: float) -> TokenFlops:
        """Those of a model, where a token sees `context` tokens on average."""
        weights = {"all": 0, "kv": 0}
        for leaf in leaves(cfg).values():
            if leaf.kind not in ("weight", "lora_a", "lora_b"):
                continue
            size = math.prod(leaf.shape)
            if leaf.kind != "weight":
                size //= cfg.num_loops  # a token meets the factors of its loop only
            weights["all"] += size
            weights["kv"] += size if leaf.projection in ("k", "v") else 0
        windows = cfg.window_table()  # [layer, loop]
        seen = np.full((cfg.num_layers, cfg.num_loops), context)
        if windows is not None:
            seen = np.where(windows > 0, np.minimum(seen, windows), seen)
        attention = 4 * cfg.num_heads * cfg.head_dim * float(seen.mean(axis=1).sum())
        return cls(
            2.0 * weights["all"] + attention,
            2.0 * weights["kv"],
            2.0 * cfg.embed_dim * cfg.vocab_size,
        )

    def per_token(
        self, exit_loops: np.ndarray, num_loops: int, needs_logits: bool, missing_kv: str
    ) -> float:
        """Mean operations of tokens that left after `exit_loops`.

        A measure that reads logits runs the head after every loop up to the exit. With 'complete'
        a token runs its other loops all the same; with 'propagate' it projects keys and values.
        """
        mean = float(np.mean(exit_loops))
        rest = num_loops - mean
        skipped = {"complete": self.loop, "propagate": self.projected, "copy": 0.0}[missing_kv]
        heads = mean if needs_logits else 1.0
        return mean * self.loop + rest * skipped + heads * self.head


def training_flops(
    cfg: DecoderConfig,
    length: int,
    loops: int | None = None,
    exits: bool = False,
    teacher: DecoderConfig | None = None,
) -> float:
    """Model operations of one token in a training step.

        3 · (loops · block + heads · head) + (teacher's loops · block + head)

    Forward is 1, backward 2: a product has two gradients. The teacher runs forward only. `block` is
    2 · weights (LoRA factors of one loop included) + 4 · heads · head_dim · context per layer, with
    a mean context of (length + 1) / 2 tokens, or the attention window if that is shorter. `head` is
    2 · embed_dim · vocabulary. Recomputed activations, the embedding lookup, norms, softmax and the
    optimizer are left out, as in PaLM's MFU (arXiv 2204.02311, App. B). Packed documents that are
    shorter than a row attend to less.

    Args:
      cfg: of the student.
      length: tokens per row.
      loops: that the step runs; None: all of them.
      exits: earlier loops have a loss, so the head runs after every loop.
      teacher: vanilla model that is distilled.
    """
    context = (length + 1) / 2
    loops = cfg.num_loops if loops is None else loops
    cost = TokenFlops.of(cfg, context)
    student = loops * cost.loop + (loops if exits else 1) * cost.head
    return 3 * student + (full_depth(teacher, context) if teacher is not None else 0.0)


def full_depth(cfg: DecoderConfig, context: float) -> float:
    """Operations of a token that runs all loops and the head once."""
    cost = TokenFlops.of(cfg, context)
    return cfg.num_loops * cost.loop + cost.head


def comparison(cfg: DecoderConfig, context: float, per_token: float) -> dict[str, Any]:
    """`flops_per_token`, and its share of full depth."""
    return {"flops_per_token": per_token, "flops_share": per_token / full_depth(cfg, context)}
