"""Run one command as several processes on this machine, which find each other on loopback.

    python launch/local_multiprocess.py 2 -m recursive_jax.train --config=FILE --workdir=DIR

The first argument is the number of processes, the rest goes to Python. Each process has its share
of nothing but itself: one CPU device, or what the environment gives it. Output of process 0 is
shown as it is; lines of the others begin with their number. Ctrl-C and SIGTERM go to all.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def places(count: int, port: int | None = None) -> list[list[str]]:
    """For every process the flags by which `count` processes on this machine find each other."""
    port = port or free_port()
    shared = [f"--coordinator=localhost:{port}", f"--num_processes={count}"]
    return [[*shared, f"--process_id={number}"] for number in range(count)]


def start(
    count: int,
    arguments: Sequence[str],
    own: Mapping[int, Sequence[str]] | None = None,
    only: Sequence[int] | None = None,
    **options: Any,
) -> list[subprocess.Popen]:
    """Start `python ARGUMENTS` as `count` processes that find each other.

    Args:
      count: of processes.
      arguments: of Python, for all processes.
      own: further arguments of single processes.
      only: the processes to start; None: all.
      options: of `subprocess.Popen`.
    """
    started = []
    for number, flags in enumerate(places(count)):
        if only is None or number in only:
            command = [sys.executable, *arguments, *flags, *(own or {}).get(number, ())]
            started.append(subprocess.Popen(command, **options))
    return started


def _show(process: subprocess.Popen, number: int) -> None:
    for line in process.stdout:
        print(line if not number else f"[{number}] {line}", end="", flush=True)


def main(argv: Sequence[str]) -> int:
    """The gravest exit code of the processes."""
    if len(argv) < 2 or not argv[0].isdigit() or not int(argv[0]):
        print(__doc__, file=sys.stderr)
        return 2
    processes = start(
        int(argv[0]), argv[1:], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )

    def pass_on(number, frame):
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    readers = [threading.Thread(target=_show, args=(p, n)) for n, p in enumerate(processes)]
    for reader in readers:
        reader.start()
    codes = [process.wait() for process in processes]
    for reader in readers:
        reader.join()
    for number, code in enumerate(codes):
        if code < 0:
            print(f"process {number} ended by {signal.Signals(-code).name}", file=sys.stderr)
    return max((128 - code if code < 0 else code) for code in codes)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main(sys.argv[1:]))
