"""Builds the kernels for this CPU, when they are first needed.

The system's C++ compiler makes one library, which is kept in the user's cache directory. Without
a compiler XLA's own kernels are used.
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
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import jax

from recursive_jax import files

KERNELS = pathlib.Path(__file__).parent / "kernels"
SOURCES = {
    "SkinnyMatmul": "skinny_matmul.cc",
    "DecodeAttention": "decode_attention.cc",
    "Top1": "top1.cc",
}
HEADERS = ("vectors.h",)
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O2", "-march=native", "-std=c++17", "-shared", "-fPIC")
SECONDS = 120  # the longest that a compiler may take
PAGE = 2 << 20  # bytes of a large page
MADV_COLLAPSE = 25


def call(name: str, result: Any, **options) -> Any:
    """`jax.ffi.ffi_call` of a kernel for which `has` is True."""
    return jax.ffi.ffi_call(target(name), result, **options)


def has(name: str, say: Callable[[str], None] = logging.warning) -> bool:
    """Whether the kernel, one of `SOURCES`, can be used on this machine.

    The first call builds the library, if need be. `say` is then given one line before the build,
    and one line when it fails.
    """
    return name in _registered(say)


def target(name: str) -> str:
    """The name under which XLA finds a kernel."""
    return f"recursive_jax_{name}"


def use_huge_pages(arrays: Iterable[Any]) -> None:
    """Move the host memory of arrays to large pages, where Linux offers them.

    A product of few rows reads its weights from small pages a tenth slower. Other data on the same
    pages is moved as well; pages that cannot be moved stay.
    """
    if sys.platform != "linux":
        return
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    pages = set()
    ours = [a for a in arrays if isinstance(a, jax.Array) and a.nbytes >= PAGE // 2]
    for shard in (s.data for a in jax.block_until_ready(ours) for s in a.addressable_shards):
        first = shard.unsafe_buffer_pointer()
        pages.update(range(first // PAGE, -(-(first + shard.nbytes) // PAGE)))
    for page in sorted(pages):
        advise(page * PAGE, PAGE, MADV_COLLAPSE)


_names: frozenset[str] | None = None  # registered kernels; None before the first call


def _registered(say: Callable[[str], None]) -> frozenset[str]:
    global _names
    if _names is None:
        _names = frozenset(_register(say))
    return _names


def _register(say: Callable[[str], None]) -> list[str]:
    """Build and register the kernels: all of them, or none."""
    try:
        library = ctypes.CDLL(str(_library(say)))
        handlers = {name: getattr(library, name) for name in SOURCES}
    except (OSError, RuntimeError, AttributeError, subprocess.SubprocessError) as error:
        reason = str(getattr(error, "stderr", None) or "").strip() or str(error)
        say(
            f"{', '.join(SOURCES.values())} are not used, and a CPU decodes more slowly: "
            f"{reason.splitlines()[0]}"
        )
        return []
    for name, handler in handlers.items():
        jax.ffi.register_ffi_target(target(name), jax.ffi.pycapsule(handler), platform="cpu")
    return list(handlers)


def _library(say: Callable[[str], None]) -> pathlib.Path:
    """The library for these sources, this compiler and CPU, and this XLA; built where missing.

    Raises:
      OSError, RuntimeError, subprocess.SubprocessError: there is no compiler, the compiler fails,
        there is no home directory, or the cache cannot be written.
    """
    given = shlex.split(os.environ.get("CXX", ""))  # a compiler and options, or "ccache g++"
    wanted = given[:1] or COMPILERS
    compiler = next(filter(shutil.which, wanted), None)
    if compiler is None:
        raise FileNotFoundError(f"no C++ compiler (looked for {', '.join(wanted)}; or set CXX)")
    run = functools.partial(
        subprocess.run, check=True, capture_output=True, text=True, timeout=SECONDS
    )
    command = [compiler, *given[1:], *FLAGS]
    # The predefined macros identify the compiler's version and the CPU's instructions.
    macros = run([*command, "-dM", "-E", "-x", "c++", os.devnull]).stdout
    include = pathlib.Path(jax.ffi.include_dir())
    interface = (include / "xla" / "ffi" / "api" / "c_api.h").read_text()
    sources = [KERNELS / source for source in SOURCES.values()]
    texts = [path.read_text() for path in (*sources, *(KERNELS / header for header in HEADERS))]
    key = hashlib.sha256("\0".join([*texts, interface, macros]).encode()).hexdigest()[:16]
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    place = cache / "recursive_jax"
    for library in sorted(place.glob(f"kernels-{key}-*.so")):
        if library.name == _name(key, library.read_bytes()):
            return library
    place.mkdir(parents=True, exist_ok=True)
    say(f"building CPU kernels with {compiler} into {place} (once, some 20 seconds)")
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        made = pathlib.Path(scratch) / "kernels.so"
        run([*command, "-isystem", include, *sources, "-o", made])
        library = place / _name(key, made.read_bytes())
        files.put_in_place(made, library)  # another process may build it too
    return library


def _name(key: str, content: bytes) -> str:
    """The name of a library. It holds size and checksum: mapping a cut file kills the process."""
    return f"kernels-{key}-{len(content)}-{zlib.crc32(content):08x}.so"
