"""A training run on the TPU hosts of a Ray cluster, one worker per host.

    ray job submit -- python launch/ray_trainer.py --workers=4 --topology=4x4 \
        --accelerator=TPU-V6E --config=gemma_rrt:paper --workdir=/mnt/run …

Other arguments go to `python -m recursive_jax.train`. Ray connects the JAX processes. It starts the
workers again when one of them fails, but not after a mistake in the command, which all of them see.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any


def worker(settings: dict[str, Any]) -> None:
    """The training run of one host; a mistake is reported, other errors are raised."""
    import ray.train
    from absl import flags

    from recursive_jax import paths
    from recursive_jax.console import app

    try:
        _run(settings["argv"])
    except (flags.Error, *app.MISTAKES) as error:
        if paths.may_pass(error):
            raise
        ray.train.report({"error": str(error)})


def _run(argv: list[str]) -> None:
    from absl import flags

    from recursive_jax import train
    from recursive_jax.console import compile_cache, config_files, host_flags

    values = flags.FlagValues()
    train.define_flags(values)
    sys.argv = config_files.resolve(["train", *argv])  # config_flags reads it there
    values(sys.argv)
    host_flags.connect(values)
    compile_cache.use(values.compilation_cache)
    end = train.train(
        values.config,
        values.workdir,
        profile=values.profile,
        cache=values.compilation_cache,
        strict=values.strict,
    )
    if end.stopped:
        raise RuntimeError("stopped and saved; Ray starts the workers again")  # it counts failures


def main() -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.jax import JaxTrainer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, required=True, help="hosts of the slice")
    parser.add_argument("--topology", required=True, help="such as 4x4")
    parser.add_argument("--accelerator", required=True, help="such as TPU-V6E")
    options, argv = parser.parse_known_args()
    ray.init()
    trainer = JaxTrainer(
        worker,
        train_loop_config={"argv": argv},
        scaling_config=ScalingConfig(
            use_tpu=True,
            num_workers=options.workers,
            topology=options.topology,
            accelerator_type=options.accelerator,
        ),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=100)),
    )
    if error := (trainer.fit().metrics or {}).get("error"):
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
