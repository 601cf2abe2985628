"""Peak arithmetic of chips, to compare a run with."""

from __future__ import annotations

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


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of a JAX device, None for an unknown one."""
    words = device_kind.replace("-", " ") + " "
    known = [kind for kind in PEAK_FLOPS if words.startswith(f"{kind} ")]
    return PEAK_FLOPS[max(known, key=len)] if known else None
