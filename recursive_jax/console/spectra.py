"""A picture of LoRA ranks: what each further rank of a projection gains, per parameter."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from recursive_jax import calibration
from recursive_jax.console.pictures import check_picture
from recursive_jax.models.config import DecoderConfig
from recursive_jax.weights.tie_config import TieConfig, break_even_rank


def check(path: str | pathlib.Path, how: TieConfig) -> None:
    """Raise ValueError if a conversion would measure no spectra, or `save` cannot draw them."""
    if not calibration.needed(how):
        raise ValueError(
            "a picture of ranks needs a calibrated conversion: LoRAs with lora_init=joint"
        )
    check_picture(path, "a picture of ranks")


def save(path: str | pathlib.Path, certificate: Mapping[str, Any], cfg: DecoderConfig) -> None:
    """Draw the spectra of a calibrated conversion's certificate; `cfg`: of its result.

    A line for each projection, over the rank. A dot marks the rank it has. A line ends at the
    break-even rank, where untying the matrix is as small, and exact.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, gains in certificate["calibration"]["spectra"].items():
        shape = cfg.projections[name]
        most = max(int(min(break_even_rank(*shape, cfg.num_loops), len(gains))), 1)
        per_parameter = np.maximum(np.array(gains[:most]) / (cfg.depth * sum(shape)), 1e-30)
        (line,) = axes.plot(np.arange(1, most + 1), per_parameter, label=name)
        rank = cfg.rank(name)
        if 0 < rank <= most:
            axes.plot(rank, per_parameter[rank - 1], "o", color=line.get_color())
    axes.set(
        xscale="log", yscale="log", xlabel="rank of the LoRAs of a projection",
        ylabel="error removed per parameter",
        title=f"{cfg.num_loops} loops × {cfg.num_layers} layers",
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
