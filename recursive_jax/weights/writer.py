"""Writes steps into a checkpoint directory, in the background."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from recursive_jax import hosts, paths
from recursive_jax.weights import workdir_lock
from recursive_jax.weights.integrity import (
    checksums,
    json_checksum,
    quiet_orbax,
    storage_fault,
    together,
    write_fault,
)
from recursive_jax.weights.steps import CONFIG, STEPS, latest_step, saved_steps


@dataclasses.dataclass
class Best:
    """Which steps Orbax keeps: the `count` of them whose loss is the lowest.

    `losses`: by step; a step without one is not among them.
    """

    count: int
    losses: Mapping[int, float] = dataclasses.field(default_factory=dict)

    def ranked(self, steps: Sequence[int]) -> list[int]:
        """Those steps that have a loss, the lowest first."""
        return sorted((s for s in steps if s in self.losses), key=self.losses.__getitem__)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [saved.step for saved in checkpoints]
        best = self.ranked(steps)[: self.count]
        return [step in best for step in steps]


class Writer:
    """Saves steps asynchronously, and removes older ones.

    Args:
      directory: of the checkpoint.
      keep: the latest so many are kept.
      best: and so many whose validation loss is the lowest.
      every: and those whose number is a multiple of it; 0: none.
    """

    def __init__(self, directory: str | os.PathLike, keep: int = 2, best: int = 0, every: int = 0):
        from orbax.checkpoint import v1 as ocp

        self._directory = paths.resolved(directory)
        self._best = Best(best)
        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(keep), self._best]
        kept += [policies.EveryNSteps(every)] if every else []
        self._manager = ocp.training.Checkpointer(
            str(self._directory / STEPS),
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
            lightweight_initialize=True,  # an older step with damaged metadata is no obstacle
        )
        # zstd needs a copy of each array and shortens float32 weights by only a twelfth.
        self._context = ocp.Context()
        self._context.array.saving.use_compression = False
        self._pending, self._pending_step = None, None
        self._quiet = contextlib.ExitStack()  # while a save is pending
        self._config = {}
        with contextlib.suppress(FileNotFoundError):
            self._config = {"config": json.loads((self._directory / CONFIG).read_text())}

    def save(
        self,
        step: int,
        params: Any,
        opt_state: Any = None,
        progress: Mapping[str, Any] | None = None,
        wait: bool = False,
        ema: Any = None,
        losses: Mapping[int, float] | None = None,
    ) -> None:
        """Write a step; the arrays may be donated when this returns.

        Args:
          step: its number.
          params, opt_state: trees of arrays.
          progress: JSON.
          wait: return when the step is on disk.
          ema: averaged params; `load_params` then reads them in place of `params`.
          losses: validation losses by step, which decide what is best.

        Raises:
          OSError: this step, or the one before it, could not be written, or config.json is gone.
          ValueError: another run has taken over this directory of a bucket.
        """
        self.wait()
        config = self._directory / CONFIG
        if self._config and not config.exists():  # Orbax would begin an empty directory
            raise paths.StorageFault(
                f"{config} is gone: step {step} is not saved. Is --workdir still mounted? Mend "
                "that, then run the same command again"
            )
        if paths.is_remote(self._directory):
            together(lambda: workdir_lock.check(self._directory), f"the save of step {step}")
        self._best.losses = dict(losses or {})
        parts = {"params": params, "opt_state": opt_state, "ema": ema}
        arrays = {name: part for name, part in parts.items() if part is not None}
        if jax.default_backend() == "cpu" and not wait:
            # A host "copy" may alias the device buffer, which the next step donates.
            arrays = jax.tree.map(jnp.copy, arrays)
        progress = json.loads(json.dumps(dict(progress or {})))  # a copy: the caller's may change
        sums = checksums(arrays)
        _agree(sums, step)
        sums |= {"progress": json_checksum(progress)}
        metadata = {"checksums": sums, "progress": progress, **self._config}
        metadata["checksum"] = json_checksum(metadata)
        self._pending_step = step
        self._quiet.enter_context(quiet_orbax())
        try:
            with self._context:
                self._pending = self._manager.save_checkpointables_async(
                    step, arrays, force=True, overwrite=True, custom_metadata=metadata
                )
        except Exception as error:  # orbax and tensorstore raise many kinds
            self._quiet.close()
            raise self._not_saved(error) from error
        if wait:
            self.wait()

    def best(self) -> int | None:
        """The saved step whose validation loss is the lowest, the pending one included.

        None if no step has a loss, or steps are not kept by their loss.
        """
        if not self._best.count:
            return None
        steps = {*saved_steps(self._directory), self._pending_step}
        return next(iter(self._best.ranked(sorted(steps - {None}))), None)

    def check(self) -> None:
        """Raise OSError if the pending save has failed; does not wait for it."""
        if self._pending is not None:
            self._finish(timeout=0)

    def wait(self) -> None:
        """Block until the pending save is on disk. Raises OSError if it could not be written."""
        if self._pending is not None:
            self._finish(timeout=None)

    def _finish(self, timeout: float | None) -> None:
        pending, self._pending = self._pending, None
        try:
            pending.result(timeout)
        except Exception as error:  # orbax and tensorstore raise many kinds
            if timeout is not None and isinstance(error, TimeoutError):
                self._pending = pending  # not at its end yet
                return
            with contextlib.suppress(Exception):  # the same error, once more for this thread
                self._manager.wait()
            raise self._not_saved(error) from error
        finally:
            if self._pending is None:
                self._quiet.close()

    def _not_saved(self, error: Exception) -> Exception:
        """The error to raise for a failed save."""
        full = storage_fault(error)
        fault = full or write_fault(error)
        if fault is None:
            return error
        saved = "no step is"
        try:
            last = latest_step(self._directory)
            saved = saved if last is None else f"step {last} is"
        except Exception:  # each client of a bucket has its own kinds
            saved = "and the steps cannot be listed"
        advice = "Make room" if full else "Mend that"
        return paths.StorageFault(
            f"{fault}: step {self._pending_step} is not saved, {saved} "
            f"({self._directory / STEPS}). {advice}, then run the same command again"
        )

    def close(self) -> None:
        """Wait for the pending save, then release the directory."""
        try:
            self.wait()
        finally:
            self._manager.close()


def _agree(sums: Mapping[str, int], step: int) -> None:
    """Raise ValueError on every process if the arrays differ between the processes.

    Each process sums what its own devices hold. A replicated array has a sum per process, which is
    of all of the array. Of a sharded array the devices that together hold one copy add up their
    parts: copies on other devices are compared, shards without a copy cannot be.
    """
    try:
        hosts.agree(sums, f"the save of step {step}")
    except hosts.Differ as error:
        raise hosts.on_all_processes(
            ValueError(
                f"step {step} is not saved: the hosts' arrays have drifted apart (checksums: "
                f"{error.what}). They read different files, or the memory of one is damaged; start "
                "all of them again from the step before"
            )
        ) from None
