"""What all processes of a job decide together, through JAX's coordination service.

Process 0 collects a value from every process, decides, and publishes the outcome. Every process
returns the same outcome, or raises the same error. The messages are small texts over TCP, not
collectives: a process that is missing, has failed, or stands elsewhere is named after a timeout.

    agree({"config": config.to_json()}, "the start")

Every package may import this file. `host_endings` ends all processes when one of them fails.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import logging
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

NOTICE = 60.0  # seconds between lines about hosts that are still missing
GRACE = 5.0  # seconds for a new file, or a failure, to be seen by all
POLL = 1.0  # seconds between looks at the failures of other processes
MOST = 4  # facts that an error names
SHOWN = 60  # characters of a value in an error message
PREFIX = "recursive_jax"
AGAIN = 75  # exit code where the same command goes on: EX_TEMPFAIL of sysexits.h

Say = Callable[[str], None]


class MissingHosts(TimeoutError):
    """Some processes have not come to a point in time."""


class OtherHostFailed(ValueError):
    """Another process has failed; the message names it and has its error."""


class Differ(ValueError):
    """Processes give different facts; `what` names them, without advice."""

    def __init__(self, what: str):
        super().__init__(
            f"the hosts differ: {what}. Start all of them with the same command, on the same files"
        )
        self.what = what


class _Settings:
    timeout = 1800.0  # seconds that hosts may be apart, e.g. while one of them reads text
    heartbeat = 100.0  # seconds without a sign of life after which a process is gone
    say: Say = staticmethod(logging.warning)
    rounds = itertools.count()


def configure(timeout: float, say: Say, heartbeat: float = 100.0) -> None:
    """Set how long a process waits for the others, in seconds, and what shows a line.

    `heartbeat`: seconds without a sign of life after which a process is gone.
    """
    _Settings.timeout, _Settings.say, _Settings.heartbeat = timeout, say, heartbeat
    client = service()
    if client is not None:
        client.key_value_set(f"{PREFIX}/host/{jax.process_index()}", socket.gethostname())


def heartbeat() -> float:
    """Seconds without a sign of life after which a process is gone."""
    return _Settings.heartbeat


def service() -> Any:
    """The client of the coordination service; None where several processes do not share one."""
    from jax._src import distributed  # there is no public way to its key-value store

    return distributed.global_state.client


def name_of(process: int, ask: bool = True) -> str:
    """Such as 'process 3 of 4 (HOST)'; without the host if the coordinator is not to be asked."""
    count = jax.process_count()
    if not ask:
        return f"process {process} of {count}"
    with contextlib.suppress(jax.errors.JaxRuntimeError, AttributeError):
        host = service().key_value_try_get(f"{PREFIX}/host/{process}")
        return f"process {process} of {count} ({host})"
    return f"process {process} of {count}"


def names_of(processes: Sequence[int]) -> str:
    """The same for several processes; of many, the first ones and their number."""
    if len(processes) == 1:
        return name_of(processes[0])
    few = ", ".join(map(str, processes[:8]))
    more = f" … ({len(processes)} of {jax.process_count()})" if len(processes) > 8 else ""
    return f"processes {few}{more}"


def decide(
    where: str,
    value: Any,
    decision: Callable[[list[Any]], Any],
    timeout: float | None = None,
) -> Any:
    """What `decision` makes of the values of all processes: the same result on every process.

    Args:
      where: the point in the program, in words. All processes come to the same points in order.
      value: of this process, JSON.
      decision: runs on process 0. Gets the values in the order of processes; returns JSON.
      timeout: seconds to wait for the others; None: as configured.

    Raises:
      MissingHosts: names the processes that have not come.
      OtherHostFailed: names a process that ended by an error of its own.
      ValueError: the processes stand at different points, or `decision` raised it.
    """
    if jax.process_count() == 1:
        return decision([value])
    client = service()
    if client is None:
        raise ValueError(
            f"this is one of {jax.process_count()} processes, and jax.distributed is not "
            "initialized: start every process with --distributed"
        )
    timeout = _Settings.timeout if timeout is None else timeout
    number = next(_Settings.rounds)
    key, me = f"{PREFIX}/round/{number}", jax.process_index()
    client.key_value_set(f"{key}/{me}", json.dumps([where, value]))
    if me:
        # Twice as long: process 0 itself waits for the slowest process.
        (text,) = _wait(client, [f"{key}/decided"], [0], where, 2 * timeout)
        verdict = json.loads(text)
    else:
        verdict = _lead(client, key, where, decision, timeout)
        client.key_value_set(f"{key}/decided", json.dumps(verdict))
        if number:  # every process has left the round before
            client.key_value_delete(f"{PREFIX}/round/{number - 1}")
    if verdict["missing"]:
        raise MissingHosts(verdict["error"])
    if verdict["failed"]:
        raise OtherHostFailed(verdict["error"])
    if verdict["error"]:
        raise on_all_processes(ValueError(verdict["error"]))
    return verdict["result"]


def _lead(client, key, where, decision, timeout) -> dict[str, Any]:
    """The verdict of process 0."""
    verdict = {"result": None, "error": "", "missing": False, "failed": False}
    try:
        everyone = range(jax.process_count())
        keys = [f"{key}/{process}" for process in everyone]
        found = [json.loads(x) for x in _wait(client, keys, everyone, where, timeout)]
        places = [place for place, _ in found]
        if len(set(places)) > 1:
            raise ValueError(f"the processes stand at different points: {_differences(places)}")
        verdict["result"] = decision([value for _, value in found])
    except (MissingHosts, OtherHostFailed) as error:
        verdict["missing"] = isinstance(error, MissingHosts)
        verdict["failed"], verdict["error"] = not verdict["missing"], str(error)
    except (ValueError, OSError) as error:
        verdict["error"] = str(error)
    return verdict


def _wait(client, keys, processes, where, timeout) -> list[str]:
    """The values of keys, each of which one of `processes` writes.

    Raises:
      MissingHosts, OtherHostFailed: as `decide`.
    """
    begin, notice, found = time.monotonic(), min(NOTICE, timeout / 2), []
    for key in keys:
        while True:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                found.append(client.blocking_key_value_get(key, int(1000 * POLL)))
                break
            failure = failure_of_another()
            if failure:
                raise OtherHostFailed(failure)
            waited = time.monotonic() - begin
            if waited < min(notice, timeout):
                continue
            absent = [p for p, k in zip(processes, keys, strict=True) if not _is_set(client, k)]
            if not absent:
                continue
            arrived = (
                f"{len(keys) - len(absent)} of {jax.process_count()} processes have arrived at "
                f"{where} after {waited:.0f} s; missing: {names_of(absent)}"
                if len(keys) > 1
                else f"no word from {names_of(absent)} at {where} for {waited:.0f} s"
            )
            if waited >= timeout:
                raise MissingHosts(
                    f"{arrived}. Look at its log; where a host is only slow, raise --host_timeout"
                )
            _Settings.say(arrived)
            notice += NOTICE
    return found


def _is_set(client, key) -> bool:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.key_value_try_get(key)
        return True
    return False


def agree(facts: Mapping[str, Any], where: str, timeout: float | None = None) -> None:
    """Return if all processes give the same facts.

    Args:
      facts: by name, JSON; values of nested mappings are compared one by one.
      where: the point in the program, in words.
      timeout: seconds to wait for the others; None: as configured.

    Raises:
      Differ: on every process; names the facts that differ, the processes and their values.
      MissingHosts, OtherHostFailed: as `decide`.
    """
    what = decide(where, flatten(facts), _what_differs, timeout)
    if what:
        raise on_all_processes(Differ(what))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings, by dotted names."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _what_differs(found: list[dict[str, Any]]) -> str:
    """The facts that differ, with their values; '' where none does."""
    there = [collections.defaultdict(lambda: "not there", facts) for facts in found]
    names = dict.fromkeys(name for facts in found for name in facts)
    names = [n for n in names if any(facts[n] != there[0][n] for facts in there)]
    more = [f"{len(names) - MOST} more"] if len(names) > MOST else []
    lines = [f"{name} is {_differences([f[name] for f in there])}" for name in names[:MOST]]
    return "; ".join(lines + more)


def _differences(values: Sequence[Any]) -> str:
    """Such as '1 on process 0 of 2 (a) and 2 on process 1 of 2 (b)'."""
    groups: dict[str, list[int]] = {}
    for process, value in enumerate(values):
        groups.setdefault(json.dumps(value), []).append(process)
    parts = [f"{_shown(json.loads(v))} on {names_of(who)}" for v, who in list(groups.items())[:4]]
    return " and ".join(parts) + (" …" if len(groups) > 4 else "")


def _shown(value: Any) -> str:
    text = str(value) if value != "" else "''"
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"


def barrier(where: str, timeout: float | None = None) -> None:
    """Return when all processes have come here; errors as `decide`."""
    decide(where, None, lambda found: None, timeout)


def see_one_directory(directory: Any, timeout: float | None = None) -> None:
    """Return if all processes see the same directory, in which process 0 may write.

    Process 0 writes a file with a random name, which the others must find.

    Args:
      directory: an `etils.epath.Path` or `pathlib.Path` that process 0 has made.
      timeout: seconds to wait for the others; None: as configured.

    Raises:
      ValueError: on every process; names those that see another directory.
      MissingHosts, OtherHostFailed: as `decide`.
    """
    if jax.process_count() == 1:
        return
    first, problem = jax.process_index() == 0, ""
    offer = [secrets.token_hex(8), str(directory)]
    name, place = decide("the workdir", offer, lambda found: found[0], timeout)
    mark = directory / f".seen-by-all-{name}"
    try:
        if first:
            try:
                mark.write_text(name)
            except OSError as error:
                problem = f"cannot write to {directory}: {error}"
        decide("the workdir, written", problem, _no_problem, timeout)
        deadline = time.monotonic() + GRACE  # network file systems show a new file late
        while not mark.exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        if not mark.exists():
            problem = f"has {directory}, which is not the {place} of process 0"
        decide("the workdir, read", problem, _no_problem, timeout)
    finally:
        if first:
            with contextlib.suppress(OSError):
                mark.unlink()


def _no_problem(found: list[str]) -> None:
    bad = [process for process, problem in enumerate(found) if problem]
    if bad:
        raise ValueError(
            f"--workdir: {names_of(bad)} {found[bad[0]]}. All hosts need one directory that all of "
            "them see"
        )


# Failures of single processes


def on_all_processes(error: Exception) -> Exception:
    """The error, marked as one that every process raises at the same point."""
    error.on_all_processes = True
    return error


def failures() -> dict[int, dict[str, Any]]:
    """By process, how it said that it fails."""
    prefix = f"{PREFIX}/failed/"
    entries = service().key_value_dir_get(prefix)
    return {int(key.rpartition("/")[2]): json.loads(value) for key, value in entries}


def failure_code() -> int:
    """The exit code after the failure of another process: `AGAIN` if that may pass, else 2."""
    found = [failure for failure in failures().values() if not failure["lost"]]
    return AGAIN if found and all(failure.get("again") for failure in found) else 2


def failure_of_another() -> str:
    """The error of another process with its name; '' if none has failed by itself."""
    for process, failure in sorted(failures().items()):
        if process != jax.process_index() and not failure["lost"]:
            return f"{name_of(process)} failed: {failure['message']}"
    return ""
