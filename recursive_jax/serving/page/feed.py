"""What the engine does now, for pages that watch it. Nothing is counted while nobody watches."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from recursive_jax.decoding.engine import Tick


@dataclasses.dataclass
class Sums:
    """Sums over ticks.

    Attributes:
      ticks: passes of the block.
      busy: lanes in use, summed over ticks.
      exits: new tokens that ran 1, 2, … loops.
      grid: for slot s and loop n, at `s * num_loops + n`: ticks in which the newest token of the
        slot ran the loop.
    """

    ticks: int
    busy: int
    exits: list[int]
    grid: list[int]

    def copy(self) -> Sums:
        return Sums(self.ticks, self.busy, self.exits.copy(), self.grid.copy())

    def __sub__(self, other: Sums) -> Sums:
        exits, grid = (
            [now - before for now, before in zip(mine, old, strict=True)]
            for mine, old in ((self.exits, other.exits), (self.grid, other.grid))
        )
        return Sums(self.ticks - other.ticks, self.busy - other.busy, exits, grid)


class Feed:
    """News of one engine. An `engine_thread.Observer`.

    Args:
      num_slots, num_loops: of the engine.
    """

    def __init__(self, num_slots: int, num_loops: int):
        self._loops = num_loops
        self._sums = Sums(0, 0, [0] * num_loops, [0] * (num_slots * num_loops))
        self._running = self._waiting = 0
        self._lock = threading.Lock()
        self.num_watchers = 0

    def round_ended(self, ticks: Sequence[Tick], waiting: int, running: int) -> None:
        """Add the ticks of a round. Called in the engine's thread."""
        self._waiting, self._running = waiting, running
        if not self.num_watchers:
            return
        sums = self._sums
        with self._lock:
            sums.ticks += len(ticks)
            for tick in ticks:
                sums.busy += tick.busy
                for slot, loop in tick.lanes.items():
                    sums.grid[slot * self._loops + loop] += 1
                for token in tick.tokens.values():
                    sums.exits[token.exit_loops - 1] += 1

    async def watch(self, every: float, over: Callable[[], bool]) -> AsyncIterator[dict]:
        """News every so many seconds, until `over()`.

        Each is about the time since the one before: `seconds`, the fields of `Sums`, and now
        `running` and `waiting` requests.
        """
        self.num_watchers += 1
        try:
            before, then = self._read(), time.perf_counter()
            while not over():
                await asyncio.sleep(every)
                sums, now = self._read(), time.perf_counter()
                yield self._news(sums - before, now - then)
                before, then = sums, now
        finally:
            self.num_watchers -= 1

    def _read(self) -> Sums:
        with self._lock:
            return self._sums.copy()

    def _news(self, sums: Sums, seconds: float) -> dict[str, Any]:
        now = {"running": self._running, "waiting": self._waiting}
        return {"seconds": round(seconds, 3)} | now | dataclasses.asdict(sums)
