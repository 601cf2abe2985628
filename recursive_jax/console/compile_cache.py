"""Compiled programs that are kept between starts: JAX's persistent compilation cache."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import platform

import jax
from absl import flags
from jax.experimental.compilation_cache import compilation_cache

AUTO, OFF = "auto", "off"
MAX_BYTES = 10 << 30  # of the user's cache; the oldest files are deleted


def define(values: flags.FlagValues) -> None:
    """Define the flag, unless it is there."""
    if "compilation_cache" in values:
        return
    flags.DEFINE_string(
        "compilation_cache", AUTO,
        "where compiled programs are kept: a directory, 'off', or 'auto': the user's cache, and "
        "the workdir of a training on several hosts", flag_values=values,
    )  # fmt: skip


def use(choice: str, shared: str | None = None) -> str | None:
    """The directory that compiled programs are kept in from now on; None: they are not kept.

    Args:
      choice: the flag.
      shared: with 'auto', a directory that all processes see. JAX writes on process 0 only, so the
        caches of the other hosts would stay empty.
    """
    if choice == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    if choice != AUTO:
        jax.config.update("jax_compilation_cache_dir", choice)
    elif "JAX_COMPILATION_CACHE_DIR" not in os.environ and (kind := cpu_kind()):
        directory = f"{shared or _prune(user_cache())}/{kind}"
        jax.config.update("jax_compilation_cache_dir", directory)
        compilation_cache.reset_cache()  # it may be in use already, with another directory
    return jax.config.jax_compilation_cache_dir


def user_cache() -> pathlib.Path:
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(root).expanduser() / "recursive_jax" / "compiled"


def cpu_kind() -> str | None:
    """A name of this machine's kind of CPU; None where it cannot be told.

    A program for CPUs holds instructions that another kind may not have, and JAX's key of a program
    does not tell them apart. A home directory may be mounted by machines of both kinds.
    """
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    names = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    facts = sorted({line for line in text.splitlines() if line.startswith(names)})
    key = hashlib.blake2b("\n".join(facts).encode(), digest_size=6).hexdigest()
    return f"{platform.machine()}-{key}"


def _prune(directory: pathlib.Path) -> pathlib.Path:
    """The directory, without its oldest files beyond `MAX_BYTES`."""
    with contextlib.suppress(OSError):  # another process may delete them as well
        found = [(f.stat().st_mtime, f.stat().st_size, f) for f in directory.rglob("*-cache")]
        total = 0
        for _, size, file in sorted(found, reverse=True):
            total += size
            if total > MAX_BYTES:
                file.unlink()
    return directory
