"""Peak arithmetic and bandwidths of chips, to compare a run with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

# Dense bfloat16 FLOP/s of one JAX device, by the beginning of its `device_kind`. The longest one
# goes first. A device is a chip; on TPU v2, v3 and 7x, it is one of the two cores of a chip.
PEAK_FLOPS = {
    # cloud.google.com/tpu/docs: the pages of v2 … v6e and TPU7x, "peak compute per chip (bf16)"
    "TPU v2": 45e12 / 2,
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12,
    "TPU v4 lite": 137e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p, as is the next
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
    # NVIDIA data sheets of each product: Tensor Core bfloat16, half of the value "with sparsity"
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100": 989e12,  # SXM
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
}

# Bytes/s of the memory of one JAX device, and of all links of its slice into it.
# cloud.google.com/tpu/docs, pages v5e, v5p and v6e: "HBM bandwidth per chip", and half of the
# bidirectional "inter chip interconnect bandwidth per chip".
BANDWIDTHS = {
    "TPU v5 lite": (819e9, 180e9),
    "TPU v5e": (819e9, 180e9),
    "TPU v5": (2765e9, 540e9),
    "TPU v5p": (2765e9, 540e9),
    "TPU v6 lite": (1640e9, 360e9),
    "TPU v6e": (1640e9, 360e9),
}


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of a JAX device, None for an unknown one."""
    return _of(PEAK_FLOPS, device_kind)


def bandwidths(device_kind: str) -> tuple[float, float] | None:
    """Bytes/s of a JAX device's memory, and of its links; None for an unknown one."""
    return _of(BANDWIDTHS, device_kind)


def _of(table: Mapping[str, T], device_kind: str) -> T | None:
    words = device_kind.replace("-", " ") + " "
    known = [kind for kind in table if words.startswith(f"{kind} ")]
    return table[max(known, key=len)] if known else None
