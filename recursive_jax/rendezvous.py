"""How the processes of a job find each other: a roll call, then `jax.distributed.initialize`.

JAX ends a process without a name when another one does not come in time. The roll call is on the
coordinator's port before JAX takes it. It names who is missing, and finds two processes with the
same number. Process 0 listens; every other process sends one line and waits for the answer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import socket
import time
from collections.abc import Callable

import jax

from recursive_jax import hosts

RETRY = 0.3  # seconds between attempts to reach process 0
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among all: coordinator HOST:PORT, number of processes, own number from 0."""

    coordinator: str
    num_processes: int
    process_id: int


def detected_processes() -> int:
    """The number of processes that JAX finds in the environment: TPU pod, GKE, Slurm, Open MPI.

    1 where it finds no such environment.
    """
    from jax._src.clusters import ClusterEnv  # there is no public way to ask

    known = [env for env in ClusterEnv._cluster_types if not env.opt_in_only_method]
    try:
        found = next((env for env in known if env.is_env_present()), None)
        return 1 if found is None else int(found.get_process_count())
    except Exception:  # a metadata server, or Kubernetes, that does not answer
        return 1


def place_of(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> Place:
    """Where this process is; what is None is found as JAX does, in the environment.

    Raises:
      ValueError: names the flags that are needed, or a number that is out of range.
    """
    from jax._src.clusters import ClusterEnv

    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS") or None
    if None in (coordinator, num_processes, process_id):
        coordinator, num_processes, process_id, _ = ClusterEnv.auto_detect_unset_distributed_params(
            coordinator, num_processes, process_id, [0], None, timeout
        )
    values = {
        "coordinator": coordinator, "num_processes": num_processes, "process_id": process_id
    }  # fmt: skip
    missing = [f"--{name}" for name, value in values.items() if value is None]
    if missing:
        raise ValueError(
            "no TPU pod, GKE, Slurm or Open MPI job is found in the environment; for several "
            f"processes give {', '.join(missing)}, for one leave out --distributed"
        )
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdigit()):
        raise ValueError(f"--coordinator={coordinator}; expected HOST:PORT of process 0")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id={process_id} of --num_processes={num_processes}; expected 0 to "
            f"{num_processes - 1}"
        )
    return Place(coordinator, num_processes, process_id)


def join(
    place: Place, initialization_timeout: int, heartbeat_timeout: int, tell: Say, notice: float = 60
) -> None:
    """Initialize JAX for several processes, once all of them are there.

    Args:
      place: of this process.
      initialization_timeout: seconds to wait for the others.
      heartbeat_timeout: seconds without a sign of life after which a process counts as dead.
      tell: shows a line on this process.
      notice: seconds between lines about processes that are missing.

    Raises:
      hosts.MissingHosts: names the processes that have not come.
      ValueError: two processes have the same number, or expect different numbers of processes.
      OSError: the port is in use.
    """
    if place.num_processes > 1:
        call = _Call(place, initialization_timeout, min(notice, initialization_timeout / 2), tell)
        call.lead() if place.process_id == 0 else call.answer()
    jax.distributed.initialize(
        place.coordinator,
        place.num_processes,
        place.process_id,
        initialization_timeout=initialization_timeout,
        # JAX aborts without a name; `host_endings` comes first.
        heartbeat_timeout_seconds=heartbeat_timeout + max(10, heartbeat_timeout // 5),
    )


class _Call:
    """The roll call."""

    def __init__(self, place: Place, timeout: float, notice: float, tell: Say):
        self.place, self.timeout, self.tell = place, timeout, tell
        host, _, port = place.coordinator.rpartition(":")
        self.host, self.port = host.strip("[]"), int(port)
        self.begin, self.notice, self.every = time.monotonic(), notice, notice

    @property
    def left(self) -> float:
        return self.begin + self.timeout - time.monotonic()

    def notify(self, text: Callable[[], str]) -> None:
        """Show a line if it is time for one."""
        waited = time.monotonic() - self.begin
        if waited >= self.notice:
            self.tell(f"{text()} after {waited:.0f} of {self.timeout:.0f} s")
            self.notice += self.every

    # Process 0

    def lead(self) -> None:
        here: dict[int, tuple[socket.socket, str]] = {}
        problem, late = "", False
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(self.listen())
            while len(here) < self.place.num_processes - 1 and not problem:
                if self.left <= 0:
                    late, problem = (
                        True,
                        (
                            f"{self.arrived(here)} within --initialization_timeout="
                            f"{self.timeout:.0f} s. Look at their logs; start all processes again"
                        ),
                    )
                    break
                self.notify(lambda: self.arrived(here))
                with contextlib.suppress(TimeoutError):
                    server.settimeout(min(1.0, max(self.left, 0.01)))
                    connection, _ = server.accept()
                    stack.callback(connection.close)
                    problem = self.register(connection, here)
            for connection, _ in here.values():
                with contextlib.suppress(OSError):
                    connection.sendall(_answer(problem, late))
        if problem:
            raise (hosts.MissingHosts if late else ValueError)(problem)

    def listen(self) -> socket.socket:
        """The listening socket, as soon as the port is free."""
        while True:
            try:
                if socket.has_dualstack_ipv6():
                    family = {"family": socket.AF_INET6, "dualstack_ipv6": True}
                    return socket.create_server(("", self.port), **family)
                return socket.create_server(("", self.port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE or self.left <= 0:
                    raise OSError(
                        error.errno,
                        f"port {self.port} of --coordinator={self.place.coordinator} cannot be "
                        f"opened on {socket.gethostname()}: {os.strerror(error.errno or 0)}",
                    ) from None
                time.sleep(RETRY)  # a process of the run before is ending

    def register(self, connection: socket.socket, here: dict) -> str:
        """Take up a process; returns what is wrong with it, or ''."""
        connection.settimeout(5)
        try:
            with connection.makefile("rb") as stream:
                record = json.loads(stream.readline(4096))
            number, count, host = (record[k] for k in ("process_id", "num_processes", "host"))
        except (OSError, ValueError, KeyError, TypeError):
            return ""  # something else that connects to this port
        old = here.get(number)
        here[number] = connection, host
        if count != self.place.num_processes:
            return (
                f"process {number} on {host} is started with --num_processes={count}, process 0 "
                f"with {self.place.num_processes}"
            )
        if number == 0 or (old is not None and _is_open(old[0])):
            if old is not None:
                with contextlib.suppress(OSError):
                    old[0].sendall(_answer(f"another process has --process_id={number}"))
            other = socket.gethostname() if old is None else old[1]
            return f"two processes have --process_id={number}: on {other} and on {host}"
        return ""

    def arrived(self, here: dict) -> str:
        everyone = range(self.place.num_processes)
        missing = [p for p in everyone if p and p not in here]
        few = ", ".join(map(str, missing[:8])) + (" …" if len(missing) > 8 else "")
        there = [(0, socket.gethostname()), *((p, host) for p, (_, host) in sorted(here.items()))]
        names = ", ".join(f"{p} ({host})" for p, host in there[:8])
        names += " …" if len(there) > 8 else ""
        count = self.place.num_processes - len(missing)
        return f"{count} of {len(everyone)} processes have arrived: {names}; missing: process {few}"

    # The others

    def answer(self) -> None:
        line = json.dumps(dataclasses.asdict(self.place) | {"host": socket.gethostname()})
        reached, reason = False, ""
        while True:
            try:
                limit = min(5, max(self.left, 0.1))
                with socket.create_connection((self.host, self.port), limit) as peer:
                    reached = True
                    peer.sendall(line.encode() + b"\n")
                    answer = self.read_line(peer)
                    if answer:
                        break
            except OSError as error:
                reason = f" ({error.strerror or error})"
            self.check(reached, reason)
            time.sleep(RETRY)
        answer = json.loads(answer)
        if answer["problem"]:
            kind = hosts.MissingHosts if answer["late"] else ValueError
            raise kind(f"process 0: {answer['problem']}")

    def read_line(self, peer: socket.socket) -> bytes:
        """The answer of process 0; b'' if it ends the connection."""
        found = b""
        while not found.endswith(b"\n"):
            peer.settimeout(1)
            try:
                piece = peer.recv(4096)
            except TimeoutError:
                self.check(True)
                continue
            if not piece:
                return b""
            found += piece
        return found

    def check(self, reached: bool, reason: str = "") -> None:
        """Raise `MissingHosts` when the time is over; `reason`: why process 0 is not reached."""
        where = f"process 0 at {self.place.coordinator}"
        state = f"{where} waits for others" if reached else f"{where} does not answer{reason}"
        self.notify(lambda: f"process {self.place.process_id}: {state}")
        # If it is there, process 0 ends the waiting, with the names of those who are missing.
        if self.left + (10 if reached else 0) <= 0:
            raise hosts.MissingHosts(
                f"process {self.place.process_id}: {state} within --initialization_timeout="
                f"{self.timeout:.0f} s. Is it running, and does a firewall let port {self.port} "
                "through?"
            )


def _answer(problem: str, late: bool = False) -> bytes:
    """What process 0 sends: what is wrong, or '' if all are there; whether it may do next time."""
    return json.dumps({"problem": problem, "late": late}).encode() + b"\n"


def _is_open(connection: socket.socket) -> bool:
    """Whether the other side still holds a connection on which it sends nothing."""
    connection.setblocking(False)
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
