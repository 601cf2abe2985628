"""Flags of a job that runs as several processes, and what they do."""

from __future__ import annotations

import jax
from absl import flags

from recursive_jax import hosts, rendezvous
from recursive_jax.console import output


def define(values: flags.FlagValues) -> None:
    """Define the flags of the processes of a job."""
    flags.DEFINE_bool(
        "distributed", None,
        "several processes (hosts) train together; by default where a TPU pod, GKE, Slurm or "
        "Open MPI job is found",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "of the job", 1, flag_values=values)
    flags.DEFINE_integer("process_id", None, "of this process, from 0", 0, flag_values=values)
    flags.DEFINE_integer(
        "initialization_timeout", 300, "seconds to wait for all processes to start", 1,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "heartbeat_timeout", 100, "seconds without a sign of life after which a process is dead",
        5, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "host_timeout", 1800, "seconds that one host may be behind another, e.g. to read text", 1,
        flag_values=values,
    )  # fmt: skip


def connect(options: flags.FlagValues) -> None:
    """Initialize JAX for several processes if there are several.

    Raises:
      ValueError: flags that contradict each other, or several processes that are not connected.
      OSError: a process has not come in time.
    """
    named = [options.coordinator, options.num_processes, options.process_id]
    given = any(value is not None for value in named)
    if options.distributed is False and given:
        raise ValueError(
            "--nodistributed contradicts --coordinator, --num_processes and --process_id; leave "
            "out one or the other"
        )
    wanted = options.distributed or given
    if options.distributed is None and not given:
        wanted = rendezvous.detected_processes() > 1
    if wanted and not jax.distributed.is_initialized():  # a launcher, such as Ray, may have done it
        place = rendezvous.place_of(*named, options.initialization_timeout)
        rendezvous.join(
            place, options.initialization_timeout, options.heartbeat_timeout, output.tell
        )
    if jax.process_count() > 1:
        if not jax.distributed.is_initialized():
            advice = (
                "leave out --nodistributed"
                if options.distributed is False
                else "start all of them with --distributed"
            )
            raise ValueError(
                f"JAX sees {jax.process_count()} processes, which are not connected; {advice}"
            )
        hosts.configure(options.host_timeout, output.note, options.heartbeat_timeout)
