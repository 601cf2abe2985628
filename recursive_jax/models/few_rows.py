"""`x @ wt.T` for a few rows x: where decoding on a CPU spends its time.

XLA's CPU kernels read the matrix once for every row, or copy it into blocks first. `few_rows.cc`
reads it once for all rows, and adds their LoRAs on the way. It is compiled for this machine when it
is first needed, by the system's C++ compiler, and kept in the user's cache; without a compiler
XLA's kernels do.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MOST_ROWS = 64  # of our kernel: for more, XLA's take less time

_SOURCE = pathlib.Path(__file__).with_suffix(".cc")
_TARGET = "recursive_jax_few_rows"
_FLAGS = ("-O2", "-march=native", "-std=c++17", "-shared", "-fPIC")


class Lora(NamedTuple):
    """LoRAs of projections that read the same rows, for all loops: what `split_layers` makes."""

    loop: jax.Array  # int32 [N], of each row
    num_loops: int
    at: jax.Array  # [sum of L·R, in], of one projection after the other
    bts: Sequence[jax.Array]  # [out, L·R] of each


def few_rows(x: jax.Array, wt: jax.Array, out_dtype=None) -> jax.Array:
    """`x [..., in] @ wt.T` for `wt [out, in]`, on one CPU; speeds are in docs/results.md."""
    rows = x.reshape(-1, x.shape[-1])
    if takes(rows, wt, out_dtype or x.dtype):
        y = by_kernel(rows, wt)
    else:
        y = by_xla(rows, wt, out_dtype)
    return y.reshape(*x.shape[:-1], wt.shape[0])


def takes(rows: jax.Array, wt: jax.Array, out_dtype) -> bool:
    """Whether our kernel multiplies these `rows [N, in]`: few, of float32, on a CPU."""
    dtypes = {jnp.dtype(d) for d in (rows.dtype, wt.dtype, out_dtype)}
    ours = 0 < len(rows) <= MOST_ROWS and wt.size and dtypes == {jnp.dtype(jnp.float32)}
    return bool(ours and jax.default_backend() == "cpu" and kernel())


def by_kernel(
    rows: jax.Array,
    wt: jax.Array,
    members: Sequence[tuple[int, int]] = (),
    lora: Lora | None = None,
) -> jax.Array:
    """`rows [N, in] @ (wt.T + a[loop] @ b[loop])` by `few_rows.cc`; where `takes` is True.

    Args:
      members: (rows of wt, first rows of x that it is asked for) of the projections that wt joins;
        what nobody asks for is not computed, and undefined. () is one that is asked for all.
    """
    members = members or ((len(wt), len(rows)),)
    shape = jax.ShapeDtypeStruct((len(rows), len(wt)), jnp.float32)
    loras = () if lora is None else (lora.loop.astype(jnp.int32), lora.at, *lora.bts)
    outs, asked = (np.array(numbers, np.int64) for numbers in zip(*members, strict=True))
    loops = np.int64(0 if lora is None else lora.num_loops)
    return jax.ffi.ffi_call(_TARGET, shape)(rows, wt, *loras, outs=outs, rows=asked, loops=loops)


def by_xla(rows: jax.Array, wt: jax.Array, out_dtype=None) -> jax.Array:
    """`rows [N, in] @ wt.T` in the form that XLA's CPU kernels take least time for.

    With the matrix on the left two rows and more take 0.7 to 0.8 of the time. The barrier keeps XLA
    from turning the product around again, and from making one row part of a slow loop. Rows of
    zeros fill up what the kernel takes at once: without them 12 rows take longer than 16.
    """
    count = len(rows)
    full = count if count == 1 else 4 if count <= 4 else -(-count // 8) * 8
    rows = jnp.pad(rows, ((0, full - count), (0, 0)))
    y = jnp.matmul(wt, rows.T, preferred_element_type=out_dtype)
    return jax.lax.optimization_barrier(y).T[:count]


@functools.cache
def kernel() -> bool:
    """Whether `few_rows.cc` can be used here; compiles and registers it. Warns if not."""
    try:
        handler = ctypes.CDLL(str(_compiled())).FewRows
    except (OSError, RuntimeError, AttributeError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", None) or "").strip() or str(error)
        logging.warning(
            "%s is not used, and a CPU decodes few requests more slowly: %s",
            _SOURCE.name,
            said.splitlines()[0],
        )
        return False
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(handler), platform="cpu")
    return True


def _compiled() -> pathlib.Path:
    """The library for this source, compiler, CPU and interface of XLA, made if it is not there.

    Raises:
      OSError, RuntimeError, subprocess.SubprocessError: no compiler, it fails, there is no home, or
        the cache cannot be written.
    """
    given = shlex.split(os.environ.get("CXX", ""))  # a compiler and options, or "ccache g++"
    wanted = given[:1] or ["c++", "g++", "clang++"]
    compiler = next(filter(shutil.which, wanted), None)
    if compiler is None:
        raise FileNotFoundError(f"no C++ compiler (looked for {', '.join(wanted)}; or set CXX)")
    run = functools.partial(subprocess.run, check=True, capture_output=True, text=True, timeout=120)
    command = [compiler, *given[1:], *_FLAGS]
    # What the compiler defines tells its version and what the CPU can do.
    defined = run([*command, "-dM", "-E", "-x", "c++", os.devnull]).stdout
    headers = pathlib.Path(jax.ffi.include_dir())
    interface = (headers / "xla" / "ffi" / "api" / "c_api.h").read_text()
    what = hashlib.sha256("\0".join([_SOURCE.read_text(), interface, defined]).encode())
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    library = cache / "recursive_jax" / f"few_rows-{what.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            made = pathlib.Path(scratch) / library.name
            run([*command, "-isystem", headers, _SOURCE, "-o", made])
            made.replace(library)  # whole or not at all: others may be at it too
    return library
