"""Which request has which slot, and what every tick runs. Standard library only.

No clock, no randomness, no device: plain data in and out, so every host of a mesh decides alike.
A request is queued, gets a slot, runs its prompt in chunks, decodes token by token, and is gone;
all strictly first in, first out. A tick is one pass of the block (paper §2.4): the decode lanes,
each at its own loop, and at most one prompt chunk at one loop.

Between two looks at the queue a device may run several ticks by itself; one round is

    for slot, request_id in scheduler.admit(): ...       # write the request into the slot
    chunks = scheduler.chunks(max_ticks)                 # the prompt work of the coming ticks
    ...                                                  # run them, from number scheduler.tick on
    for exited, finished in ...: scheduler.record(exited, finished)  # once per tick that ran

The rule a device follows by itself is that of `lanes`: a token at a later loop always goes on; a
slot's next token starts at loop 0 in the first tick whose *gate* is open. The gate is
  - open in every tick, depth-wise;
  - open at ticks ≡ 0 mod num_loops, depth-wise when nothing can exit: tokens then end together, so
    the head runs once per token, and slots come free only where they can be filled at once;
  - open when no token is at a later loop, sequence-wise: slots advance together, and an exited
    token idles until its batch mates finish.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
from collections.abc import Collection, Hashable, Iterator
from typing import NamedTuple


class Chunk(NamedTuple):
    """Prompt tokens `[start, start + length)` of a slot at one loop.

    All loops of a chunk run before the next chunk starts, so one `[C, D]` state carries them.
    `ends_prompt`: the last loop of the last chunk; the slot decodes from the next tick on.
    """

    slot: int
    start: int
    length: int
    loop: int
    ends_prompt: bool


@dataclasses.dataclass
class _Occupant:
    """Where the request in a slot stands."""

    id: Hashable
    prompt_length: int
    passes: int = 0  # of the prompt, done: chunk passes // num_loops, loop passes % num_loops
    loop: int = 0  # the one that its newest token runs next


class Scheduler:
    """Hands `num_slots` slots to requests and says what the next ticks run.

    Args:
      num_slots: requests in flight at once.
      num_loops: passes of the block a token takes at most; prompt tokens take all of them.
      chunk_length: prompt tokens a tick takes at most.
      depthwise: False is sequence-wise continuous batching, the baseline: slots start their tokens
        together. Prompt chunks run beside them either way.
      can_exit: whether a token may leave before the last loop. When none can, prompts and tokens
        start at ticks ≡ 0 mod num_loops. May be set anew between rounds, as requests differ.

    Attributes:
      tick: number of the next tick.
    """

    def __init__(
        self,
        num_slots: int,
        num_loops: int,
        chunk_length: int = 1,
        *,
        depthwise: bool = True,
        can_exit: bool = True,
    ):
        sizes = {"num_slots": num_slots, "num_loops": num_loops, "chunk_length": chunk_length}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}={value}; expected at least 1")
        self.num_slots, self.num_loops, self.chunk_length = num_slots, num_loops, chunk_length
        self.depthwise, self.can_exit = depthwise, can_exit
        self.tick = 0
        self._queue: collections.OrderedDict[Hashable, int] = collections.OrderedDict()
        self._occupants: list[_Occupant | None] = [None] * num_slots
        self._slot_of: dict[Hashable, int] = {}
        self._free = list(range(num_slots))  # a heap: the lowest slot is filled first
        self._prompts: collections.deque[int] = collections.deque()  # slots, oldest request first

    @property
    def slots(self) -> tuple[Hashable | None, ...]:
        """The request in each slot, None where it is free."""
        return tuple(o and o.id for o in self._occupants)

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self._queue and not self._slot_of

    def submit(self, request_id: Hashable, prompt_length: int = 0) -> None:
        """Queue a request.

        Args:
          request_id: any name that no request in flight has.
          prompt_length: tokens to run in chunks; with 0 the request decodes at once.
        """
        if request_id is None or request_id in self._queue or request_id in self._slot_of:
            raise ValueError(f"request id {request_id!r} is None or in flight; expected a new one")
        if prompt_length < 0:
            raise ValueError(f"request {request_id!r}: prompt_length={prompt_length}; expected ≥ 0")
        self._queue[request_id] = prompt_length

    def cancel(self, request_id: Hashable) -> int | None:
        """Forget a request wherever it is; one that is gone already is no error.

        Returns:
          the slot it had, whose lanes and chunk end before the next tick; None if it had none.
        """
        self._queue.pop(request_id, None)
        slot = self._slot_of.get(request_id)
        if slot is not None:
            self.release(slot)
        return slot

    def release(self, slot: int) -> None:
        """Free a slot, whatever it is doing."""
        occupant = self._occupant(slot)
        self._occupants[slot] = None
        del self._slot_of[occupant.id]
        if slot in self._prompts:
            self._prompts.remove(slot)
        heapq.heappush(self._free, slot)

    def admit(self) -> list[tuple[int, Hashable]]:
        """Fill free slots from the queue, before every round: `(slot, request id)` of each."""
        admitted = []
        while self._free and self._queue:
            slot = heapq.heappop(self._free)
            request_id, prompt_length = self._queue.popitem(last=False)
            self._occupants[slot] = _Occupant(request_id, prompt_length)
            self._slot_of[request_id] = slot
            if prompt_length:
                self._prompts.append(slot)
            admitted.append((slot, request_id))
        midway = any(o and (o.loop or o.passes % self.num_loops) for o in self._occupants)
        if self._aligned and not midway:
            self.tick += -self.tick % self.num_loops  # nobody is there to wait for
        return admitted

    def chunks(self, num_ticks: int = 1) -> list[Chunk | None]:
        """The prompt chunk of each of the next ticks, None where there is none.

        It depends on nothing that happens in these ticks, but for slots given back in them
        before their prompt is through.
        """
        passes = self._passes()
        planned, chunk = [], next(passes, None)
        for tick in range(self.tick, self.tick + num_ticks):
            starts = chunk is not None and chunk.loop == 0
            if starts and self._aligned and tick % self.num_loops:
                planned.append(None)
            else:
                planned.append(chunk)
                chunk = next(passes, None)
        return planned

    def lanes(self) -> dict[int, int]:
        """`{slot: loop}` of what decodes in the next tick.

        The loop is that of the slot's newest token; what completes behind it needs no decision.
        """
        loops = {
            slot: o.loop
            for slot, o in enumerate(self._occupants)
            if o and o.passes == self._num_passes(o)
        }
        if self._aligned:
            gate = self.tick % self.num_loops == 0
        else:
            gate = self.depthwise or not any(loops.values())
        return {slot: loop for slot, loop in loops.items() if loop or gate}

    def record(self, exited: Collection[int] = (), finished: Collection[int] = ()) -> None:
        """One tick has run.

        Args:
          exited: slots whose newest token left in this tick, that is, which start another one
            from the next tick on. After the last loop that goes without saying.
          finished: slots given back, whatever they were doing.
        """
        lanes, (chunk,) = self.lanes(), self.chunks()
        for slot in exited:
            if slot not in lanes:
                raise ValueError(f"slot {slot} exited, but none of its tokens ran in this tick")
        for slot in finished:
            self._occupant(slot)
        for slot, loop in lanes.items():
            left = slot in exited or loop == self.num_loops - 1
            self._occupant(slot).loop = 0 if left else loop + 1
        if chunk is not None:
            self._occupant(chunk.slot).passes += 1
            if chunk.ends_prompt:
                self._prompts.popleft()
        for slot in finished:
            self.release(slot)
        self.tick += 1

    @property
    def _aligned(self) -> bool:
        return self.depthwise and not self.can_exit

    def _occupant(self, slot: int) -> _Occupant:
        occupant = self._occupants[slot] if 0 <= slot < self.num_slots else None
        if occupant is None:
            raise ValueError(f"no request has slot {slot} (of {self.num_slots})")
        return occupant

    def _num_passes(self, occupant: _Occupant) -> int:
        return -(-occupant.prompt_length // self.chunk_length) * self.num_loops

    def _passes(self) -> Iterator[Chunk]:
        """The prompt work that is left, in order."""
        for slot in self._prompts:
            occupant = self._occupant(slot)
            num_passes = self._num_passes(occupant)
            for i in range(occupant.passes, num_passes):
                start = i // self.num_loops * self.chunk_length
                length = min(self.chunk_length, occupant.prompt_length - start)
                yield Chunk(slot, start, length, i % self.num_loops, i == num_passes - 1)
