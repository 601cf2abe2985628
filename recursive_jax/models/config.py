"""`DecoderConfig`: the frozen, validated, JSON-serialisable description of a decoder.

All packages share it. A *family* (gemma, llama, gpt_neox, ...) is a choice of these fields; see
`weights.hf_config`. Attention window and rope kind are tables over depth. A shared layer may
therefore be local in one loop and global in the next, as its depths were in the source model.
`shared_depths` maps depth to loop and layer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
NORM_MODES = ("tied", "per_loop", "folded")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
ROPE_SCALINGS = ("none", "linear", "llama3", "yarn")
SHARINGS = ("cycle", "sequence", "cycle_rev")


def shared_depths(sharing: str, num_loops: int, num_layers: int) -> np.ndarray:
    """The depths at which a layer of the block runs: int `[layer, loop]` (paper App. B).

    Layers by depth, of three layers and two loops: 'cycle' 1,2,3,1,2,3; 'sequence' 1,1,2,2,3,3;
    'cycle_rev' 1,2,3,3,2,1. A layer's loop counts how often it has run before.
    """
    depths = np.arange(num_loops * num_layers)
    if sharing == "sequence":
        return depths.reshape(num_layers, num_loops)
    by_loop = depths.reshape(num_loops, num_layers)
    if sharing == "cycle_rev":
        by_loop[1::2] = by_loop[1::2, ::-1].copy()
    return np.ascontiguousarray(by_loop.T)


@dataclasses.dataclass(frozen=True)
class Rope:
    """One kind of rotary embedding. `scaling` is 'none', 'linear', 'llama3' or 'yarn'.

    'linear' divides all frequencies by `factor`. 'llama3' divides the frequencies of long
    wavelengths by `factor`, keeps those of short ones and interpolates between. Long and short are
    relative to `original_length`. 'yarn' (arXiv 2309.00071) interpolates over the index of the
    frequency: it keeps those that turn more than `beta_fast` times within `original_length`, and
    divides those that turn less than `beta_slow` times.
    """

    theta: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # 'yarn' rounds the bounds of its interpolation to whole indices
    attention_factor: float = 1.0  # multiplies cos and sin

    def __post_init__(self):
        if self.scaling not in ROPE_SCALINGS:
            raise ValueError(
                f"rope scaling {self.scaling!r} is not implemented; "
                f"expected one of {', '.join(ROPE_SCALINGS)}"
            )
        if self.scaling == "yarn" and not self.theta > 1:
            raise ValueError(f"rope theta is {self.theta}; yarn scaling needs one above 1")

    def frequencies(self, rotary_dim: int) -> np.ndarray:
        """Angle per position, radians: f32 `[rotary_dim / 2]`."""
        exponent = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
        freqs = (1.0 / np.float32(self.theta) ** exponent).astype(np.float32)
        if self.scaling == "linear":
            freqs = freqs / np.float32(self.factor)
        elif self.scaling == "llama3":
            wavelength = 2 * math.pi / freqs
            low = self.original_length / self.low_freq_factor
            high = self.original_length / self.high_freq_factor
            smooth = (self.original_length / wavelength - self.low_freq_factor) / (
                self.high_freq_factor - self.low_freq_factor
            )
            between = (1 - smooth) * freqs / self.factor + smooth * freqs
            scaled = np.where(wavelength > low, freqs / self.factor, freqs)
            freqs = np.where((wavelength <= low) & (wavelength >= high), between, scaled)
        elif self.scaling == "yarn":
            divided = self._yarn_ramp(rotary_dim)
            freqs = freqs / self.factor * divided + freqs * (1 - divided)
        return freqs.astype(np.float32)

    def _yarn_ramp(self, rotary_dim: int) -> np.ndarray:
        """How far a frequency is divided by `factor`, 0 to 1: f64 `[rotary_dim / 2]`."""

        def index(turns: float) -> float:
            """Of the frequency that turns so many times within `original_length`."""
            wavelength = self.original_length / turns
            return rotary_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(self.theta))

        low, high = index(self.beta_fast), index(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)
        if low == high:
            high += 0.001  # as transformers does
        return np.clip((np.arange(rotary_dim // 2) - low) / (high - low), 0, 1)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer whose block of `num_layers` layers runs `num_loops` times.

    `num_loops == 1` is a vanilla model (source, teacher). All lengths are in tokens.
    """

    family: str
    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int  # layers of the shared block, not of the unrolled network
    num_loops: int = 1
    max_length: int = 2048  # positions the source model was trained for

    norm: str = "rms"  # 'rms' | 'layer'
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # gemma multiplies by (1 + scale)
    post_norms: bool = False  # norm after attention and mlp, before the residual add
    qk_norm: bool = False  # per-head norm of queries and keys before rope
    parallel_residual: bool = False  # attention and mlp read the same residual (Pythia)

    activation: str = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False

    rotary_fraction: float = 1.0  # share of head_dim that is rotated
    ropes: tuple[Rope, ...] = (Rope(),)
    rope_of_depth: tuple[int, ...] = ()  # index into `ropes` by depth; () means all 0
    windows: tuple[int, ...] = ()  # attention window by depth, 0 = unlimited; () means all 0

    query_scale: float | None = None  # multiplies q·k; None means head_dim ** -0.5
    attn_softcap: float | None = None
    final_softcap: float | None = None
    embed_scale: float = 1.0
    tied_head: bool = True

    sharing: str = "cycle"  # order in which the layers run, see `shared_depths`
    norms: str = "tied"  # which small vectors have a loop axis, see `vector_loops`
    lora_ranks: tuple[tuple[str, int], ...] = ()  # (projection, rank); absent means 0
    prefix_length: int = 0  # learnable vectors of every layer and loop that all queries see

    def __post_init__(self):
        """Normalise: mappings and lists become tuples, which hash; zero ranks are left out."""

        def store(name, value):
            object.__setattr__(self, name, value)  # the dataclass is frozen

        if isinstance(self.lora_ranks, Mapping):
            store("lora_ranks", tuple(self.lora_ranks.items()))
        unknown = [name for name, _ in self.lora_ranks if name not in self.projections]
        if unknown:
            raise ValueError(
                f"lora_ranks names unknown projections {unknown}; "
                f"this model has {list(self.projections)}"
            )
        ranks = ((name, int(rank)) for name, rank in self.lora_ranks if rank)
        store("lora_ranks", tuple(sorted(ranks, key=lambda item: PROJECTIONS.index(item[0]))))
        store("ropes", tuple(Rope(**r) if isinstance(r, Mapping) else r for r in self.ropes))
        store("windows", tuple(int(w) for w in self.windows))
        store("rope_of_depth", tuple(int(k) for k in self.rope_of_depth))
        self._validate()

    def _validate(self):
        for name in (
            "vocab_size embed_dim mlp_dim num_heads num_kv_heads head_dim num_layers num_loops"
        ).split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.prefix_length < 0:
            raise ValueError(f"prefix_length must be at least 0, got {self.prefix_length}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        for name, allowed in (
            ("norm", ("rms", "layer")),
            ("activation", ACTIVATIONS),
            ("norms", NORM_MODES),
            ("sharing", SHARINGS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}; expected one of {allowed}")
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"rotary_fraction={self.rotary_fraction} of head_dim={self.head_dim} "
                f"gives {self.rotary_dim} rotated dimensions; expected an even number in "
                f"2..{self.head_dim}"
            )
        for name in ("windows", "rope_of_depth"):
            table = getattr(self, name)
            if table and len(table) != self.depth:
                raise ValueError(
                    f"{name} has {len(table)} entries; expected one per depth, {self.depth}"
                )
        if any(w < 0 for w in self.windows):
            raise ValueError(f"windows must be >= 0 (0 = unlimited), got {self.windows}")
        if any(not 0 <= k < len(self.ropes) for k in self.rope_of_depth):
            raise ValueError(f"rope_of_depth names a kind outside 0..{len(self.ropes) - 1}")
        for name, rank in self.lora_ranks:
            full = min(self.projections[name])
            if not 0 <= rank <= full:
                raise ValueError(
                    f"lora rank {rank} of projection {name!r} is impossible; "
                    f"its shape {self.projections[name]} allows 0..{full}"
                )

    @property
    def depth(self) -> int:
        """Layers of the unrolled network."""
        return self.num_layers * self.num_loops

    def depths(self) -> np.ndarray:
        """`shared_depths` of this model: int `[layer, loop]`."""
        return shared_depths(self.sharing, self.num_loops, self.num_layers)

    def places(self) -> list[tuple[int, int]]:
        """(loop, layer) by depth: the inverse of `depths`."""
        layers, loops = np.divmod(np.argsort(self.depths(), axis=None), self.num_loops)
        return list(zip(loops.tolist(), layers.tolist(), strict=True))

    @property
    def has_exits(self) -> bool:
        """Whether the state after an earlier loop may be an exit."""
        return self.num_loops > 1 and self.sharing == "cycle"

    def check_cycle(self, what: str, instead: str = "leave it out") -> None:
        """Raise ValueError unless the block runs whole, loop after loop.

        Args:
          what: needs that.
          instead: what the user can do with this model.
        """
        if self.sharing != "cycle":
            raise ValueError(
                f"{what} needs sharing='cycle', where the block runs as a whole, loop after loop; "
                f"this model has sharing={self.sharing!r}. Convert with sharing=cycle, or {instead}"
            )

    def check_decodes(self) -> None:
        """Raise ValueError if the engine cannot decode with the model."""
        self.check_cycle(
            "decoding",
            "decode the plain model with the same logits, which "
            "recursive_jax.load(MODEL).untie().save(DIRECTORY) makes",
        )

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rotary_fraction)

    @property
    def attention_scale(self) -> float:
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """The block's linear layers: name -> (in, out)."""
        q_dim, kv_dim = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        d, f = self.embed_dim, self.mlp_dim
        shapes = {"q": (d, q_dim), "k": (d, kv_dim), "v": (d, kv_dim), "o": (q_dim, d)}
        shapes |= {"gate": (d, f)} if self.gated_mlp else {}
        return shapes | {"up": (d, f), "down": (f, d)}

    def rank(self, projection: str) -> int:
        """LoRA rank of a projection, 0 when it has none."""
        return dict(self.lora_ranks).get(projection, 0)

    def vector_loops(self, kind: str) -> int:
        """Length of the loop axis of a small vector, 0 when it is tied over loops.

        `kind` is 'pre_norm', 'post_norm', 'qk_norm' or 'bias'. Under 'folded' the pre-norm scales
        are part of the projections that read them, so pre-norms are tied identities. Vectors that
        cannot be folded keep a row per loop.
        """
        if self.norms == "tied" or (self.norms == "folded" and kind == "pre_norm"):
            return 0
        return self.num_loops

    def window_table(self) -> np.ndarray | None:
        """Attention window as int32 `[layer, loop]` (0 = unlimited), None if no layer has one."""
        return self._by_layer(self.windows) if any(self.windows) else None

    def rope_table(self) -> np.ndarray | None:
        """Index into `ropes` as int32 `[layer, loop]`, None when there is only one kind."""
        return self._by_layer(self.rope_of_depth) if len(set(self.rope_of_depth)) > 1 else None

    def ropes_in_use(self) -> tuple[Rope, ...]:
        """The kinds that `rope_table` names; one where there is no table."""
        if self.rope_table() is not None:
            return self.ropes
        return (self.ropes[self.rope_of_depth[0] if self.rope_of_depth else 0],)

    def rope_frequencies(self) -> np.ndarray:
        """Rope frequencies of every kind in use: f32 `[kind, rotary_dim / 2]`."""
        return np.stack([rope.frequencies(self.rotary_dim) for rope in self.ropes_in_use()])

    def _by_layer(self, table: tuple[int, ...]) -> np.ndarray:
        return np.asarray(table, np.int32)[self.depths()]

    def replace(self, **changes: Any) -> DecoderConfig:
        return dataclasses.replace(self, **changes)

    def at_depths(self, depths: Sequence[int]) -> DecoderConfig:
        """A vanilla model that keeps these layers of this one, with their windows and ropes."""
        return self.replace(
            num_layers=len(depths),
            windows=tuple(self.windows[d] for d in depths if self.windows),
            rope_of_depth=tuple(self.rope_of_depth[d] for d in depths if self.rope_of_depth),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain dict for `json.dump`; inverse of `from_json`."""
        out = dataclasses.asdict(self)
        out["lora_ranks"] = dict(self.lora_ranks)
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DecoderConfig:
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ValueError(f"unknown decoder config keys {unknown}; expected {sorted(known)}")
        needed = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        missing = sorted(needed - set(data))
        if missing:
            raise ValueError(f"decoder config keys missing: {missing}")
        return cls(**data)
