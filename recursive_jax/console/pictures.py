"""Files that pictures are drawn into."""

from __future__ import annotations

import pathlib

from recursive_jax.decoding.answers import check_writable


def check_picture(path: str | pathlib.Path, what: str) -> None:
    """Raise ValueError if matplotlib is missing, or cannot draw into this file.

    Call it before the work. `what`: the picture, for the message.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise ValueError(
            f"{what} needs matplotlib, which is not installed; pip install 'recursive_jax[plot]'"
        ) from error
    path, kinds = pathlib.Path(path), sorted(FigureCanvasAgg.get_supported_filetypes())
    if path.suffix[1:].lower() not in kinds:
        raise ValueError(f"{path} is no picture; expected a name that ends in .{', .'.join(kinds)}")
    check_writable(path)
