"""Our kernels for a CPU: compiled for this machine when they are first needed.

By the system's C++ compiler; the library is kept in the user's cache. Without a compiler XLA's
kernels do. Here, too: large pages for what they read.
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
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

import jax

_SOURCES = {
    "SkinnyMatmul": "kernels/skinny_matmul.cc",
    "DecodeAttention": "kernels/decode_attention.cc",
    "Top1": "kernels/top1.cc",
}
_HEADERS = ("kernels/vectors.h",)
_PAGE = 2 << 20
_MADV_COLLAPSE = 25
_FLAGS = ("-O2", "-march=native", "-std=c++17", "-shared", "-fPIC")


def call(name: str, result: Any, **options) -> Any:
    """`jax.ffi.ffi_call` of a kernel that `has` is True of."""
    return jax.ffi.ffi_call(_target(name), result, **options)


def has(name: str) -> bool:
    """Whether the kernel, one of `_SOURCES`, can be used here. Warns once if not."""
    return name in _registered()


def use_huge_pages(arrays: Iterable[Any]) -> None:
    """Puts what of `arrays` XLA has in this host's memory on large pages, if Linux has them.

    From small ones a product of few rows takes a tenth longer to read its weights. What else lies
    on a page comes with it; what cannot be moved stays.
    """
    if sys.platform != "linux":
        return
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    pages = set()
    ours = [a for a in arrays if isinstance(a, jax.Array) and a.nbytes >= _PAGE // 2]
    for shard in (s.data for a in jax.block_until_ready(ours) for s in a.addressable_shards):
        first = shard.unsafe_buffer_pointer()
        pages.update(range(first // _PAGE, -(-(first + shard.nbytes) // _PAGE)))
    for page in sorted(pages):
        advise(page * _PAGE, _PAGE, _MADV_COLLAPSE)


def _target(name: str) -> str:
    return f"recursive_jax_{name}"


@functools.cache
def _registered() -> frozenset[str]:
    """Compiles and registers the kernels: all of them, or none."""
    try:
        library = ctypes.CDLL(str(_compiled()))
        handlers = {name: getattr(library, name) for name in _SOURCES}
    except (OSError, RuntimeError, AttributeError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", None) or "").strip() or str(error)
        logging.warning(
            "%s are not used, and a CPU decodes more slowly: %s",
            ", ".join(_SOURCES.values()),
            said.splitlines()[0],
        )
        return frozenset()
    for name, handler in handlers.items():
        jax.ffi.register_ffi_target(_target(name), jax.ffi.pycapsule(handler), platform="cpu")
    return frozenset(handlers)


def _compiled() -> pathlib.Path:
    """The library for these sources, compiler, CPU and interface of XLA, made if it is not there.

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
    include = pathlib.Path(jax.ffi.include_dir())
    interface = (include / "xla" / "ffi" / "api" / "c_api.h").read_text()
    here = pathlib.Path(__file__).parent
    sources = [here / source for source in _SOURCES.values()]
    texts = [path.read_text() for path in (*sources, *(here / header for header in _HEADERS))]
    what = hashlib.sha256("\0".join([*texts, interface, defined]).encode())
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    library = cache / "recursive_jax" / f"kernels-{what.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            made = pathlib.Path(scratch) / library.name
            run([*command, "-isystem", include, *sources, "-o", made])
            made.replace(library)  # whole or not at all: others may be at it too
    return library
