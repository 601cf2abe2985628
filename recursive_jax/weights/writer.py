"""Writes steps into a checkpoint directory, in the background."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from recursive_jax import hosts
from recursive_jax.weights.integrity import checksums, json_checksum, quiet_orbax, storage_fault
from recursive_jax.weights.steps import CONFIG, STEPS, latest_step


class Writer:
    """Saves steps asynchronously and keeps the latest `keep` of them."""

    def __init__(self, directory: str | os.PathLike, keep: int = 2):
        from orbax.checkpoint import v1 as ocp

        self._directory = pathlib.Path(directory).resolve()
        self._manager = ocp.training.Checkpointer(
            str(self._directory / STEPS),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
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
    ) -> None:
        """Write a step; the arrays may be donated when this returns.

        Args:
          step: its number.
          params, opt_state: trees of arrays.
          progress: JSON.
          wait: return when the step is on disk.
          ema: averaged params; `load_params` then reads them in place of `params`.

        Raises:
          OSError: this step, or the one before it, could not be written.
        """
        self.wait()
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

    def wait(self) -> None:
        """Block until the pending save is on disk. Raises OSError if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except Exception as error:  # orbax and tensorstore raise many kinds
            with contextlib.suppress(Exception):  # the same error, once more for this thread
                self._manager.wait()
            raise self._not_saved(error) from error
        finally:
            self._quiet.close()

    def _not_saved(self, error: Exception) -> Exception:
        """The error to raise for a failed save."""
        fault = storage_fault(error)
        if fault is None:
            return error
        last = latest_step(self._directory)
        saved = "no step is" if last is None else f"step {last} is"
        return OSError(
            f"{fault}: step {self._pending_step} is not saved, {saved} "
            f"({self._directory / STEPS}). Make room, then run the same command again"
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
