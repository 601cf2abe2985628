"""The scheduler fed with recorded exits and measured times. Standard library only.

The paper's throughput figures are such a simulation (§3.8, Appendix K), with the time of the block
alone; embedding, head and the cache rows of skipped loops can be charged here as well.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

from recursive_jax.decoding.scheduler import Chunk, Scheduler


@dataclasses.dataclass(frozen=True)
class Recording:
    """One request, as it ran before.

    Attributes:
      exit_loops: loops executed, 1 … num_loops, for each token that ran in a decode lane. A token
        that came straight out of the prompt's last chunk is not among them.
      prompt_length: tokens that ran in chunks.
      arrival: when it was submitted, in the unit of tick times.
    """

    exit_loops: Sequence[int]
    prompt_length: int = 0
    arrival: float = 0.0


@dataclasses.dataclass(frozen=True)
class SimulatedTick:
    """What one pass of the block ran.

    Attributes:
      start: when, in the unit of tick times.
      lanes: `{request: loop}`, requests counted as in the list of recordings.
      exits: requests whose token left.
      skipped: loops that these tokens did not run, together.
      chunk: the prompt chunk beside them.
    """

    start: float
    lanes: dict[int, int]
    exits: tuple[int, ...]
    skipped: int
    chunk: Chunk | None


def no_time(rows: int) -> float:
    return 0.0


@dataclasses.dataclass(frozen=True)
class TickTime:
    """How long a tick takes, from times measured alone; functions take a number of rows.

    Attributes:
      block: one pass over all lanes, however many are in use.
      chunk: what a prompt chunk adds to it.
      embed: embedding the tokens that start.
      head: the vocabulary head on the tokens that leave, and sampling.
      fill: the cache rows that leaving tokens lack, one for every loop they skip.
    """

    block: float
    chunk: float = 0.0
    embed: Callable[[int], float] = no_time
    head: Callable[[int], float] = no_time
    fill: Callable[[int], float] = no_time

    def __call__(self, tick: SimulatedTick) -> float:
        starts = sum(loop == 0 for loop in tick.lanes.values())
        time = self.block + (self.chunk if tick.chunk else 0.0)
        return time + self.embed(starts) + self.head(len(tick.exits)) + self.fill(tick.skipped)


def replay(
    scheduler: Scheduler,
    recordings: Sequence[Recording],
    tick_time: Callable[[SimulatedTick], float] = TickTime(block=1.0),
    max_ticks: int = 1,
) -> Iterator[SimulatedTick]:
    """Run the requests again, with the exits they had.

    Args:
      scheduler: an idle one; which slots there are, and how they are filled.
      recordings: requests; those that arrive together are served in this order.
      tick_time: time of a tick. An idle device waits for the next arrival.
      max_ticks: ticks between two looks at the queue.

    Raises:
      ValueError: a recording that this scheduler cannot follow.
    """
    for i, recording in enumerate(recordings):
        bad = [n for n in recording.exit_loops if not 1 <= n <= scheduler.num_loops]
        if bad or not (recording.exit_loops or recording.prompt_length):
            raise ValueError(
                f"recordings[{i}] has {f'exit_loops {bad}' if bad else 'nothing to run'}; "
                f"expected tokens that ran 1..{scheduler.num_loops} loops"
            )
    arrivals = collections.deque(
        sorted(range(len(recordings)), key=lambda i: recordings[i].arrival)
    )
    num_exits = [0] * len(recordings)
    now = 0.0
    while arrivals or not scheduler.idle:
        if scheduler.idle:
            now = max(now, recordings[arrivals[0]].arrival)
        while arrivals and recordings[arrivals[0]].arrival <= now:
            scheduler.submit(arrivals[0], recordings[arrivals.popleft()].prompt_length)
        scheduler.admit()
        for _ in range(max_ticks):
            requests, lanes, (chunk,) = scheduler.slots, scheduler.lanes(), scheduler.chunks()
            exited, finished = [], []
            for slot, loop in lanes.items():
                i = requests[slot]
                if recordings[i].exit_loops[num_exits[i]] == loop + 1:
                    exited.append(slot)
                    num_exits[i] += 1
                    if num_exits[i] == len(recordings[i].exit_loops):
                        finished.append(slot)
            if chunk and chunk.ends_prompt and not recordings[requests[chunk.slot]].exit_loops:
                finished.append(chunk.slot)
            scheduler.record(exited, finished)
            tick = SimulatedTick(
                now,
                {requests[slot]: loop for slot, loop in lanes.items()},
                tuple(requests[slot] for slot in exited),
                sum(scheduler.num_loops - 1 - lanes[slot] for slot in exited),
                chunk,
            )
            yield tick
            now += tick_time(tick)
            if not any(request is not None for request in scheduler.slots):
                break


@dataclasses.dataclass(frozen=True)
class Totals:
    """A replay in four numbers.

    Attributes:
      ticks: passes of the block.
      passes: of single tokens; the sum of all exit loops.
      tokens: that left a lane.
      time: when the last tick ended, in the unit of tick times.
    """

    ticks: int
    passes: int
    tokens: int
    time: float

    @classmethod
    def of(
        cls, ticks: Iterable[SimulatedTick], tick_time: Callable[[SimulatedTick], float]
    ) -> Totals:
        count, passes, tokens, time = 0, 0, 0, 0.0
        for tick in ticks:
            count += 1
            passes += len(tick.lanes)
            tokens += len(tick.exits)
            time = tick.start + tick_time(tick)
        return cls(count, passes, tokens, time)

    @property
    def throughput(self) -> float:
        """Tokens per unit of time."""
        return self.tokens / self.time
