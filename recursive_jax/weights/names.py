"""Name tables between our parameters and the tensors of Hugging Face and GGUF files.

A row is `(our path, their name, transform)`; `{}` in a name is the layer. Reading and writing use
the same table. A row applies when the config has its parameter, so one table serves models with
and without biases, query norms or an untied head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.parameters import leaves


class Transform(NamedTuple):
    """How a tensor of theirs relates to one layer of a parameter of ours (the piece)."""

    split: Callable[[np.ndarray, DecoderConfig], np.ndarray]  # their tensor -> piece
    join: Callable[[Sequence[np.ndarray], DecoderConfig], np.ndarray]  # all pieces -> their tensor
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]  # shape of a piece -> of their tensor


class Row(NamedTuple):
    ours: str
    theirs: str
    transform: Transform


AS_IS = Transform(lambda x, cfg: x, lambda xs, cfg: xs[0], lambda s: s)
# PyTorch stores linear weights as [out, in].
TRANSPOSE = Transform(lambda x, cfg: x.T, lambda xs, cfg: xs[0].T, lambda s: s[::-1])


def _fused(part: int) -> Transform:
    """One of q, k, v in GPT-NeoX's fused projection, whose rows are [heads, 3, head_dim]."""

    def split(x, cfg):
        parts = x.reshape(cfg.num_heads, 3, cfg.head_dim, *x.shape[1:])
        return parts[:, part].reshape(-1, *x.shape[1:]).T

    def join(xs, cfg):
        parts = [x.T.reshape(cfg.num_heads, cfg.head_dim, *x.shape[:-1]) for x in xs]
        return np.stack(parts, axis=1).reshape(-1, *xs[0].shape[:-1])

    return Transform(split, join, lambda s: (3 * s[-1], *s[:-1]))


def _linears(block: str, names: Mapping[str, str]) -> list[Row]:
    return [
        Row(f"block/{ours}/{leaf}", f"{block}{theirs}.{suffix}", transform)
        for ours, theirs in names.items()
        for leaf, suffix, transform in (("w", "weight", TRANSPOSE), ("b", "bias", AS_IS))
    ]


def _norms(names: Mapping[str, str]) -> list[Row]:
    return [
        Row(f"{ours}/{leaf}", f"{theirs}.{suffix}", AS_IS)
        for ours, theirs in names.items()
        for leaf, suffix in (("scale", "weight"), ("bias", "bias"))
    ]


_LLAMA_LINEARS = {
    "attention/q": "self_attn.q_proj",
    "attention/k": "self_attn.k_proj",
    "attention/v": "self_attn.v_proj",
    "attention/o": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}
_LLAMA_BASE = [
    Row("embedding", "model.embed_tokens.weight", AS_IS),
    Row("head", "lm_head.weight", TRANSPOSE),
    *_linears("model.layers.{}.", _LLAMA_LINEARS),
    *_norms(
        {
            "final_norm": "model.norm",
            "block/attention/q_norm": "model.layers.{}.self_attn.q_norm",
            "block/attention/k_norm": "model.layers.{}.self_attn.k_norm",
            "block/pre_attention_norm": "model.layers.{}.input_layernorm",
        }
    ),
]
LLAMA = _LLAMA_BASE + _norms({"block/pre_mlp_norm": "model.layers.{}.post_attention_layernorm"})
GEMMA2 = _LLAMA_BASE + _norms(
    {
        "block/post_attention_norm": "model.layers.{}.post_attention_layernorm",
        "block/pre_mlp_norm": "model.layers.{}.pre_feedforward_layernorm",
        "block/post_mlp_norm": "model.layers.{}.post_feedforward_layernorm",
    }
)
_QKV = "gpt_neox.layers.{}.attention.query_key_value."
GPT_NEOX = [
    Row("embedding", "gpt_neox.embed_in.weight", AS_IS),
    Row("head", "embed_out.weight", TRANSPOSE),
    *(
        Row(f"block/attention/{name}/{leaf}", _QKV + suffix, _fused(part))
        for part, name in enumerate("qkv")
        for leaf, suffix in (("w", "weight"), ("b", "bias"))
    ),
    *_linears(
        "gpt_neox.layers.{}.",
        {
            "attention/o": "attention.dense",
            "mlp/up": "mlp.dense_h_to_4h",
            "mlp/down": "mlp.dense_4h_to_h",
        },
    ),
    *_norms(
        {
            "final_norm": "gpt_neox.final_layer_norm",
            "block/pre_attention_norm": "gpt_neox.layers.{}.input_layernorm",
            "block/pre_mlp_norm": "gpt_neox.layers.{}.post_attention_layernorm",
        }
    ),
]
HF_TABLES = {
    "gemma": LLAMA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA2,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gpt_neox": GPT_NEOX,
}


def shapes(cfg: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of `cfg`, by path."""
    return {path: leaf.shape for path, leaf in leaves(cfg).items()}


def leaf_shapes(cfg: DecoderConfig) -> Mapping[str, tuple[int, ...]]:
    """`shapes` of a vanilla model; a recursive model has no names in other formats."""
    if cfg.prefix_length:
        raise ValueError(
            f"the model has prefixes (prefix_length={cfg.prefix_length}), which no other format "
            "has; it can only be saved as a checkpoint"
        )
    if cfg.num_loops != 1 or cfg.lora_ranks:
        raise ValueError(
            f"only vanilla models have names elsewhere; this one has num_loops={cfg.num_loops} "
            f"and lora_ranks={dict(cfg.lora_ranks)}. Untie it first"
        )
    return shapes(cfg)


def used_rows(table: Sequence[Row], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Row]:
    """By our path, the rows whose parameter this model has."""
    rows = {row.ours: row for row in table if row.ours in shapes}
    assert set(rows) == set(shapes), f"name table lacks {sorted(set(shapes) - set(rows))}"
    return rows


def layer_names(row: Row, shape: tuple[int, ...]) -> list[str]:
    """Their names for our parameter, in layer order; one name where there is no layer axis."""
    return [row.theirs.format(i) for i in range(shape[0])] if "{}" in row.theirs else [row.theirs]


def tensor_shapes(
    table: Sequence[Row], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of theirs, by name, in the order of `tensors`."""
    out = {}
    for path, row in used_rows(table, shapes).items():
        piece = shapes[path][1:] if "{}" in row.theirs else shapes[path]
        for name in layer_names(row, shapes[path]):
            out[name] = tuple(row.transform.shape(piece))
    return out


def check_paths(params: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless flat `params` has the parameters of `shapes` and no other."""
    wrong = sorted(set(shapes) ^ set(params))
    if wrong:
        raise ValueError(f"parameters missing or left over for this config: {', '.join(wrong)}")


def tensors(
    params: Mapping[str, Any],
    table: Sequence[Row],
    shapes: Mapping[str, tuple[int, ...]],
    cfg: DecoderConfig,
    dtype: np.dtype | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and values of every tensor of theirs; one parameter of ours is in memory at a time.

    Args:
      params: flat, perhaps lazy.
      table: name table.
      shapes: of our parameters.
      cfg: config of the model.
      dtype: of the tensors; None: that of each parameter.

    Raises:
      ValueError: a parameter is missing, left over, or has another shape than its config says.
    """
    check_paths(params, shapes)
    groups: dict[str, list[Row]] = {}
    for row in used_rows(table, shapes).values():
        groups.setdefault(row.theirs, []).append(row)  # several rows: a fused tensor
    for rows in groups.values():
        leaves = [np.asarray(params[row.ours]) for row in rows]
        for row, leaf in zip(rows, leaves, strict=True):
            if leaf.shape != shapes[row.ours]:
                raise ValueError(
                    f"parameter {row.ours} is {list(leaf.shape)}; the config expects "
                    f"{list(shapes[row.ours])}"
                )
        if dtype is not None:
            with np.errstate(over="ignore"):  # infinity, which `check_finite` finds
                leaves = [leaf.astype(dtype, copy=False) for leaf in leaves]
        for i, name in enumerate(layer_names(rows[0], shapes[rows[0].ours])):
            pieces = [leaf[i] if "{}" in rows[0].theirs else leaf for leaf in leaves]
            yield name, np.ascontiguousarray(rows[0].transform.join(pieces, cfg))


def audit(
    table: Sequence[Row],
    shapes: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    where: str,
) -> None:
    """Check that a model's tensors are those of its config.

    Args:
      table: name table.
      shapes: of our parameters, see `leaf_shapes`.
      found: shapes of their tensors.
      where: file or directory, for the message.

    Raises:
      ValueError: tensors are left over, missing or misshapen; the message names them.
    """
    expected = tensor_shapes(table, shapes)
    problems = {
        "missing": sorted(set(expected) - set(found)),
        "left over": sorted(set(found) - set(expected)),
        "misshapen": [
            f"{name} {list(found[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in found and tuple(found[name]) != shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
        raise ValueError(
            f"{where}: the tensors do not fit the model's config. {listed}. "
            "Check that the config belongs to these weights"
        )


def _some(names: Sequence[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


class LazyParams(Mapping):
    """Flat mapping of our parameters, `{'block/attention/q/w': array}`, read on access.

    Each access reads, transforms and stacks the layers of one parameter. Nothing is kept. A tensor
    with a value that is no finite number raises a ValueError when it is read.
    """

    def __init__(
        self,
        rows: Mapping[str, Row],
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], np.ndarray],
        cfg: DecoderConfig,
        stored: Callable[[str], np.dtype],
        dtype: np.dtype | None = None,
        where: str = "the model",
    ):
        """A mapping that has read nothing yet.

        Args:
          rows: name table by our path, see `used_rows`.
          shapes: of our parameters.
          read: name of a tensor -> the tensor.
          cfg: config of the model.
          stored: name of a tensor -> the dtype to read it in, when `dtype` is None.
          dtype: of the arrays; None means as stored.
          where: file or directory, for error messages.
        """
        self._rows, self._shapes, self._read, self._cfg = rows, shapes, read, cfg
        self._stored, self.dtype, self._where = stored, dtype, where

    @property
    def num_tensors(self) -> int:
        """How many tensors of theirs the model has; `audit` has refused any others."""
        return len({n for p, row in self._rows.items() for n in layer_names(row, self._shapes[p])})

    def __getitem__(self, path: str) -> np.ndarray:
        return self._stack(path, layer_names(self._rows[path], self._shapes[path]))

    def layers(self, path: str, depths: Sequence[int]) -> np.ndarray:
        """`self[path][depths]` of a parameter of the block; the other layers are not read."""
        names = layer_names(self._rows[path], self._shapes[path])
        return self._stack(path, [names[depth] for depth in depths])

    def _stack(self, path: str, names: Sequence[str]) -> np.ndarray:
        row, shape = self._rows[path], self._shapes[path]
        dtype = self.dtype
        if dtype is None:  # layers may be stored in different types: take one that holds them all
            dtype = np.result_type(*{self._stored(name) for name in names})
        by_layer = "{}" in row.theirs
        out = np.empty((len(names), *shape[1:]) if by_layer else shape, dtype)
        for name, piece in zip(names, out if by_layer else [out], strict=True):
            with np.errstate(over="ignore"):  # float64 may exceed float32: infinity, found below
                piece[...] = row.transform.split(self._read(name), self._cfg)
            if not all_finite(piece):
                raise ValueError(
                    f"{self._where}: tensor {name} holds NaN or infinity in {dtype}; the file is "
                    "damaged or the model's training diverged. Take another copy or an earlier "
                    "checkpoint"
                )
        return out

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def check_finite(name: str, x: np.ndarray) -> np.ndarray:
    """The array itself; ValueError if a value is no finite number."""
    if not all_finite(np.ascontiguousarray(x)):
        raise ValueError(
            f"{name} holds NaN or infinity in {x.dtype}. If its weights are finite, choose float32 "
            "or bfloat16; else take an earlier checkpoint"
        )
    return x


def all_finite(x: np.ndarray) -> bool:
    """Whether an array of floats has no NaN and no infinity.

    Seen as integers, these are the largest positive and the largest negative numbers. Two maxima
    take a fifth of the time of `np.isfinite` for 16-bit types, and no memory.
    """
    infinity, size = np.array(np.inf, x.dtype), x.dtype.itemsize
    return bool(
        x.view(f"i{size}").max() < infinity.view(f"i{size}")
        and x.view(f"u{size}").max() < (-infinity).view(f"u{size}")
    )


def nested(flat: Mapping[str, np.ndarray]) -> dict:
    """`{'a': {'b': x}}` from `{'a/b': x}`; reads a lazy mapping item by item."""
    return traverse_util.unflatten_dict({path: flat[path] for path in flat}, sep="/")


def flat(params: Mapping) -> Mapping[str, np.ndarray | jax.Array]:
    """Params by path. A mapping that is flat already (perhaps lazy) is returned unread."""
    if any("/" in key for key in params):
        return params
    return traverse_util.flatten_dict(params, sep="/")
