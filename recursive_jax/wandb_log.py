"""Metrics of a run on Weights & Biases, beside the files of `metrics`."""

from __future__ import annotations

import importlib.util
import json
import os
import uuid
from collections.abc import Mapping
from typing import Any

import jax

from recursive_jax import paths

RUN = "wandb.json"  # in the workdir: the id, under which a resumed run goes on


def check(project: str) -> None:
    """Raise ValueError if metrics are to go to a project, and wandb cannot take them.

    It is not installed, or process 0 cannot log in; offline it need not.
    """
    if not project:
        return
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"wandb={project!r}, but the package wandb is not installed: pip install wandb, or "
            "leave it out"
        )
    if jax.process_index():
        return
    import wandb

    if wandb.setup().settings.mode not in ("offline", "dryrun", "disabled"):
        try:
            wandb.login(verify=True)
        except wandb.Error as error:
            raise _refused(error) from error


def _refused(error: Exception) -> ValueError:
    reason = str(error).rstrip(".")
    return ValueError(
        f"wandb: {reason}. Log in with `wandb login`, set WANDB_MODE=offline, or leave out "
        "--config.wandb"
    )


class WandbWriter:
    """Writes what a `metrics.MetricWriter` writes; only process 0 does.

    Args:
      workdir: of the training. The run's id is kept there.
      project: of wandb.
      config: of the training, as JSON.
      quiet: print nothing.

    Raises:
      ValueError: wandb cannot begin the run, e.g. without a login.
    """

    def __init__(
        self, workdir: str | os.PathLike, project: str, config: Mapping[str, Any], quiet: bool
    ):
        self._run = None
        if jax.process_index():
            return
        import wandb

        file = paths.path_of(workdir) / RUN
        known = json.loads(file.read_text()) if file.exists() else {"id": uuid.uuid4().hex[:12]}
        settings = wandb.Settings(silent=quiet, console="off")  # our lines are ours
        try:
            self._run = wandb.init(
                project=project,
                id=known["id"],
                resume="allow",
                dir=None if paths.is_remote(workdir) else os.fspath(workdir),
                config=dict(config),
                settings=settings,
            )
        except wandb.Error as error:
            raise _refused(error) from error
        paths.write_whole(file, json.dumps(known) + "\n")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """As `MetricWriter.write`. wandb has values that are not finite.

        Steps that are repeated after a crash are there twice: a run of wandb cannot go back.
        """
        if self._run is not None:
            self._run.log({"step": step, **values})

    def upload(self) -> None:
        """Nothing: wandb sends what is written by itself."""

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
