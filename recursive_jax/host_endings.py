"""How the failure of one process ends all processes of a job.

    with ending_together(tell): ...

A collective cannot be interrupted: a process that stays in one would wait for ever.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

import jax

from recursive_jax import hosts, paths
from recursive_jax.hosts import Say

ALIVE = f"{hosts.PREFIX}/alive/"
DONE = "done"  # the last beat of a process that leaves as it should


@contextlib.contextmanager
def ending_together(tell: Say, advice: Callable[[], str] = str) -> Iterator[None]:
    """A context in which the failure of one process ends all of them.

    A process that fails publishes its error and exits, without JAX's barrier at exit, at which it
    would wait for the others. The exit code is 2 after a user's mistake on any process,
    `hosts.AGAIN` where a process is missing or dead or the storage fails, 1 after other errors. The
    others look for such errors every second. They also end, with its name, when a process gives no
    sign of life for `hosts.heartbeat()` seconds. An error that all processes raise, and every error
    of a job of one process, leaves the context as usual.

    Args:
      tell: shows an error line on this process.
      advice: the end of the line about a host that is gone, such as how to go on.
    """
    if jax.process_count() == 1 or hosts.service() is None:
        yield
        return
    others = _Others(tell, advice)
    try:
        yield
    except Exception as error:
        others.done.set()
        if getattr(error, "on_all_processes", False):
            raise
        _fail(error, tell, advice)
    finally:
        others.close()


class _Others:
    """What is heard of the other processes, and the end of this one when another is failed or gone.

    A collective cannot be interrupted, and a call to a coordinator that is stopped does not return:
    one thread listens, another one watches.
    """

    def __init__(self, tell: Say, advice: Callable[[], str]):
        self._tell, self._advice = tell, advice
        self._heard = dict.fromkeys(range(jax.process_count()), time.monotonic())
        self._failure, self._code = "", 2
        self.done = threading.Event()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        threading.Thread(target=self._watch, daemon=True).start()

    def close(self) -> None:
        self.done.set()
        self._listener.join(hosts.GRACE)

    def _listen(self) -> None:
        beats, before, next_beat = itertools.count(), {}, 0.0
        while not self.done.wait(min(hosts.POLL, hosts.heartbeat() / 10)):
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                if not self._failure and (found := hosts.failure_of_another()):
                    self._code = hosts.failure_code()
                    self._failure = found
                if time.monotonic() < next_beat:
                    continue
                next_beat = time.monotonic() + hosts.heartbeat() / 10
                _show_life(str(next(beats)))
                found = dict(hosts.service().key_value_dir_get(ALIVE))
                for key, beat in found.items():
                    if beat == DONE or beat != before.get(key):
                        self._heard[int(key.rpartition("/")[2])] = time.monotonic()
                before = found
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _show_life(DONE)

    def _watch(self) -> None:
        seen, me, limit = 0, jax.process_index(), hosts.heartbeat()
        while not self.done.wait(hosts.POLL):
            seen += bool(self._failure)
            if seen > 2 and not self.done.is_set():  # the main thread had time to raise it
                self._tell(self._failure)
                _leave(self._code)
            now = time.monotonic()
            silent = [p for p, when in self._heard.items() if now - when > limit and p != me]
            if silent and not self.done.is_set():
                lost = 0 in silent  # the coordinator: nobody else can be heard either
                names = hosts.name_of(0, ask=False) if lost else hosts.names_of(silent)
                self._tell(f"no sign of life from {names} for {limit:.0f} s{self._advice()}")
                if lost:
                    os._exit(hosts.AGAIN)
                _leave(hosts.AGAIN, silent)


def _show_life(beat: str) -> None:
    hosts.service().key_value_set(f"{ALIVE}{jax.process_index()}", beat, allow_overwrite=True)


def _fail(error: Exception, tell: Say, advice: Callable[[], str]) -> None:
    """Publish an error of this process, tell it, and exit."""
    collective = _is_collective(error)
    if collective and not _coordinator_answers():  # JAX is about to abort this process
        tell(f"{hosts.name_of(0, ask=False)} is gone{advice()}")
        os._exit(hosts.AGAIN)
    lost = collective or isinstance(error, hosts.MissingHosts | hosts.OtherHostFailed)
    user = isinstance(error, ValueError | OSError | FloatingPointError)
    message = str(error) if user else f"{type(error).__name__}: {str(error).splitlines()[0]}"
    gone: list[int] = []
    again = paths.may_pass(error)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        record = json.dumps({"lost": lost, "message": message, "again": again})
        key = f"{hosts.PREFIX}/failed/{jax.process_index()}"
        hosts.service().key_value_set(key, record, allow_overwrite=True)
        if collective:
            found, gone = _who_is_gone()
            are = "is" if len(gone) == 1 else "are"
            message = f"{hosts.names_of(gone)} {are} gone{advice()}" if gone else found or message
        if lost:
            again = again or hosts.failure_code() == hosts.AGAIN
    if not (user or lost):
        traceback.print_exc()
    tell(message)
    again = again or bool(gone)
    _leave(hosts.AGAIN if again else 2 if user or lost else 1, gone)


def _is_collective(error: Exception) -> bool:
    """Whether a failed collective is the reason; JAX raises some of them as a ValueError."""
    return isinstance(error, jax.errors.JaxRuntimeError) or " failed: [external/gloo" in str(error)


def _coordinator_answers() -> bool:
    """Whether the port of the coordination service takes connections."""
    from jax._src import distributed

    host, _, port = distributed.global_state.coordinator_address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), hosts.GRACE).close()
    except OSError:
        return False
    return True


def _who_is_gone() -> tuple[str, list[int]]:
    """After a failed collective: the error that another process published, or who publishes none.

    Every process that is there publishes something, as it has lost the collective as well.
    """
    deadline, there = time.monotonic() + hosts.GRACE, {}
    while time.monotonic() < deadline and len(there) < jax.process_count():
        time.sleep(0.2)
        failure, there = hosts.failure_of_another(), hosts.failures()
        if failure:
            return failure, []
    return "", [process for process in range(jax.process_count()) if process not in there]


def _leave(code: int, gone: Sequence[int] = ()) -> None:
    """Exit without JAX's barrier at exit. Process 0 stays a little, as it serves the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        me = jax.process_index()
        hosts.service().key_value_set(f"{hosts.PREFIX}/left/{me}", "", allow_overwrite=True)
        deadline, expected = time.monotonic() + hosts.GRACE, jax.process_count() - len(gone)
        while me == 0 and expected > 1 and time.monotonic() < deadline:
            if len(hosts.service().key_value_dir_get(f"{hosts.PREFIX}/left/")) >= expected:
                time.sleep(0.2)  # until the last answer has left
                break
            time.sleep(0.1)
    os._exit(code)
