"""Saved steps of a checkpoint: which there are, and reading one. A damaged one is set aside."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from recursive_jax import file_lock, paths
from recursive_jax.weights import workdir_lock
from recursive_jax.weights.integrity import (
    Damaged,
    Undecodable,
    checksums,
    explain,
    json_checksum,
    quiet_orbax,
    together,
)

CONFIG = "config.json"
STEPS = "checkpoints"  # the directory of all steps
COMMITTED = "commit_success.txt"  # in a bucket Orbax writes it into a step last
DAMAGED = ".damaged"  # ends the name of a step that is set aside
Say = Callable[[str], None]
Result = TypeVar("Result")


def saved_steps(directory: str | os.PathLike) -> list[int]:
    """The complete steps, ascending: directories that Orbax has finalised and that hold files.

    Raises:
      OSError: a bucket does not answer now. Orbax would find no step.
    """
    root = paths.path_of(directory) / STEPS
    names = paths.entries(root)
    if not names:
        return []
    from orbax.checkpoint import path

    found = path.step.standard_name_format().find_all(root)
    steps = sorted(step.step for step in found if any(step.path.iterdir()))
    for name in set(names) - set(map(str, steps)) if paths.is_remote(root) else ():
        if name.isdecimal() and (root / name / COMMITTED).exists():
            raise OSError(f"{root} could not be read now: step {name} is there and is not listed")
    return steps


def latest_step(directory: str | os.PathLike) -> int | None:
    """The newest complete step, None when there is none."""
    return max(saved_steps(directory), default=None)


def restore(
    directory: str | os.PathLike,
    abstract: Mapping[str, Any],
    step: int | None = None,
    say: Say = logging.warning,
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Arrays of a step in the given shapes, dtypes and shardings, with their checksums verified.

    Args:
      directory: of the checkpoint.
      abstract: `params` and optionally `opt_state`: trees of `jax.ShapeDtypeStruct`. Arrays stored
        in another dtype are converted after the check.
      step: None for the newest that is not damaged. A damaged newer one is then set aside: it is
        renamed to STEP.damaged.
      say: is given one line per step that is set aside.

    Returns:
      The arrays, the `progress` that was saved with them, and the step.

    Raises:
      FileNotFoundError: there is no such step.
      Damaged: the step, or every step, is proven to be damaged.
      ValueError: it could not be read now, or is of another model.
    """

    def read(path):
        metadata, stored = together(lambda: _metadata(path))
        return together(lambda: _arrays(path, metadata, stored, abstract)), metadata["progress"]

    (arrays, progress), step = _first_whole(directory, step, read, say)
    logging.info("restored step %d of %s", step, directory)
    return arrays, progress, step


def load_progress(
    directory: str | os.PathLike, step: int | None = None, say: Say = logging.warning
) -> dict[str, Any]:
    """The `progress` that was saved with a step; no array is read. Arguments as in `restore`.

    Raises:
      FileNotFoundError, ValueError: as in `restore`.
    """

    def read(path):
        return together(lambda: _metadata(path))[0]["progress"]

    return _first_whole(directory, step, read, say)[0]


def weights_of(
    directory: str | os.PathLike,
    step: int | None = None,
    say: Say = logging.warning,
    ema: bool | None = None,
) -> tuple[int, str, dict[str, int]]:
    """A step, the part that holds its weights, and their checksums by path; no array is read.

    The part is `ema` in a run that averages its weights, else `params`. `ema` asks for one of them.

    Raises:
      FileNotFoundError: as in `restore`.
      ValueError: as in `restore`, or the run keeps no averaged weights and they are asked for.
    """

    def read(path):
        return together(lambda: _metadata(path))[0]["checksums"]

    sums, step = _first_whole(directory, step, read, say)
    averaged = any(name.startswith("['ema']") for name in sums)
    if ema and not averaged:
        raise ValueError(
            f"{directory} keeps no averaged weights (its run had ema_decay=0); leave out ema"
        )
    part = "ema" if averaged and ema is not False else "params"
    return step, part, {n: value for n, value in sums.items() if n.startswith(f"['{part}']")}


def params_checksum(
    directory: str | os.PathLike,
    step: int | None = None,
    say: Say = logging.warning,
    ema: bool | None = None,
) -> tuple[int, int]:
    """The number of a step and a checksum of its weights; arguments and errors as `weights_of`."""
    step, _, sums = weights_of(directory, step, say, ema)
    return step, json_checksum(sums)


def config_copy(directory: str | os.PathLike) -> tuple[dict[str, Any] | None, int | None]:
    """The copy of config.json in the newest step that has a readable one, and that step."""
    for step in reversed(saved_steps(directory)):
        try:
            config = _metadata(_path_of(directory, step))[0].get("config")
        except ValueError:
            continue
        if isinstance(config, dict):
            facts = {name: value for name, value in config.items() if name != "checksum"}
            if json_checksum(facts) == config.get("checksum"):
                return config, step
    return None, None


def _first_whole(
    directory: str | os.PathLike, step: int | None, read: Callable[[Any], Result], say: Say
) -> tuple[Result, int]:
    """What `read` returns for a step, and the step; arguments and errors as in `restore`."""
    if step is not None:
        return read(_path_of(directory, step)), step
    candidates = saved_steps(directory)
    if not candidates:
        _path_of(directory, None)  # raises
    damaged: dict[int, Damaged] = {}
    for step in reversed(candidates):
        try:
            result = read(paths.resolved(directory) / STEPS / str(step))
        except Damaged as error:
            if jax.process_count() == 1 and latest_step(directory) not in candidates:
                # A running training has saved newer steps, and has deleted this one meanwhile.
                return _first_whole(directory, None, read, say)
            damaged[step] = error
            continue
        for number, error in damaged.items():
            _set_aside(directory, number, error, step, say)
        return result, step
    raise damaged[candidates[-1]]


def _set_aside(
    directory: str | os.PathLike, step: int, error: Damaged, used: int, say: Say
) -> None:
    """Rename a damaged step on process 0. A line says what became of it, and which step is used."""

    def rename():
        if jax.process_index():
            return
        path = paths.path_of(directory) / STEPS / str(step)
        names = (f"{step}{DAMAGED}{n}" for n in ("", *(f"-{i}" for i in range(2, 1000))))
        target = next(t for t in map(path.with_name, names) if not t.exists())
        try:
            if workdir_lock.is_held(directory):
                path.rename(target)
            else:  # a training that runs there must not lose a directory
                with workdir_lock.hold_alone(directory):
                    path.rename(target)
            what = f"its directory is now {target.name}"
        except Exception as reason:
            if not (paths.is_fault(reason) or isinstance(reason, file_lock.InUse)):
                raise
            what = f"it cannot be renamed and is skipped ({reason})"
        say(f"warning: {error.what}; {what}. Step {used} is used")

    together(rename)  # no process lists the steps before the renaming


def _path_of(directory: str | os.PathLike, step: int | None) -> Any:
    """The directory of a step; FileNotFoundError if it is not there."""
    path = paths.resolved(directory) / STEPS / str(step)
    if step is None or not path.is_dir():
        there = ", ".join(map(str, saved_steps(directory))) if step is not None else ""
        raise FileNotFoundError(
            f"no saved step {'' if step is None else step} in {paths.path_of(directory) / STEPS}; "
            + (
                f"there are {there}"
                if there
                else "a run that was interrupted before its first save has to start again"
            )
        )
    return path


def _metadata(path: Any) -> tuple[dict[str, Any], Any]:
    """What was saved beside the arrays of a step, and Orbax's description of the arrays."""
    from orbax.checkpoint import v1 as ocp

    try:
        with quiet_orbax():
            found = ocp.checkpointables_metadata(str(path))
        metadata = found.custom_metadata or {}
        kept = [metadata.get(name) for name in ("checksums", "progress")]
        if not all(isinstance(part, dict) for part in kept):
            raise Undecodable("its metadata holds no checksums")
    except Exception as error:  # orbax and tensorstore raise many kinds
        if isinstance(error, ValueError | TypeError | KeyError):  # JSON, but not of a checkpoint
            wrapped = Undecodable(f"its metadata is not what Orbax writes: {error}")
            wrapped.__cause__, error = error, wrapped
        raise explain(path, error) from error
    # The oldest checkpoints have neither checksum, older ones only that of the progress.
    checks = {"progress": (metadata["progress"], metadata["checksums"].get("progress"))}
    kept = {name: value for name, value in metadata.items() if name != "checksum"}
    checks["metadata"] = kept, metadata.get("checksum")
    for name, (data, expected) in checks.items():
        if expected is not None and json_checksum(data) != expected:
            raise Damaged(f"checkpoint {path} is corrupt: checksums differ for ['{name}']")
    return metadata, found.metadata


def _arrays(
    path: Any, metadata: Mapping[str, Any], stored: Any, abstract: Mapping[str, Any]
) -> dict[str, Any]:
    """The arrays of a step, verified, then converted to the dtypes of `abstract`."""
    from orbax.checkpoint import v1 as ocp

    abstract, expected = dict(abstract), metadata["checksums"]
    names = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(abstract)]
    roots = tuple(f"['{root}']" for root in abstract)
    strange = set(names) ^ {name for name in expected if name.startswith(roots)}
    suspicion = "of another model" if "checksum" in metadata else "damaged or of another model"
    if strange:
        raise ValueError(
            f"checkpoint {path} is {suspicion}: {min(strange)} is "
            f"{'missing there' if min(strange) in names else 'not expected'}"
        )
    shapes = {_names(p): x for p, x in jax.tree_util.tree_leaves_with_path(stored)}

    def as_stored(where, x):
        there = shapes.get(_names(where))
        shape, dtype = getattr(there, "shape", None), getattr(there, "dtype", None)
        if shape is not None and tuple(shape) != x.shape:
            raise ValueError(
                f"checkpoint {path} is {suspicion}: {jax.tree_util.keystr(where)} has shape "
                f"{tuple(shape)}, expected {x.shape}"
            )
        # The checksum is of the stored bits, so nothing is converted while it is read.
        dtype = x.dtype if dtype is None else dtype
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=getattr(x, "sharding", None))

    wanted = jax.tree_util.tree_map_with_path(as_stored, abstract)
    try:
        with quiet_orbax():
            arrays = ocp.load_checkpointables(str(path), wanted)
    except Exception as error:  # orbax and tensorstore raise many kinds
        raise explain(path, error) from error
    broken = [name for name, value in checksums(arrays).items() if expected.get(name) != value]
    if broken:
        more = " …" if len(broken) > 3 else ""
        raise Damaged(f"checkpoint {path} is corrupt: checksums differ for {broken[:3]}{more}")
    return jax.tree.map(lambda x, want: x.astype(want.dtype), arrays, abstract)


def _names(where: tuple[Any, ...]) -> tuple[str, ...]:
    """A path in a tree as words. Orbax describes named tuples as dicts or lists."""
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in where)
