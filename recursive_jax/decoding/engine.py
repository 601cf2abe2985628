"""Continuous depth-wise batching (paper §2.4): many requests, each at its own loop, one block.

The engine knows slots, the scheduler knows requests; `session.Session` stands between them. Verbs
of the engine: `admit` a request into a slot, `step` a few ticks, `release` a slot. What admit and
release change reaches the device with the next step, so there are two executables (ticks with and
without prompt work; a third wipes a slot that held NaN) and, after `compile`, nothing compiles
again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from recursive_jax.cpu import build
from recursive_jax.cpu import cache as cpu_cache
from recursive_jax.decoding import admission
from recursive_jax.decoding.exit_measures import Measure
from recursive_jax.decoding.placement import Placement
from recursive_jax.decoding.requests import Request, check_number
from recursive_jax.decoding.sampling import SamplingParams
from recursive_jax.decoding.scheduler import Chunk
from recursive_jax.decoding.state import MAX_TICKS, NO_TOKEN, Chunks, Found
from recursive_jax.decoding.tick import Ticks
from recursive_jax.models import tpu
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.kv_cache import Cache

MISSING_KV = ("complete", "propagate", "copy")


class NewToken(NamedTuple):
    """`exit_loops`: loops executed, 1 … num_loops, before its own successor could start."""

    token: int
    exit_loops: int
    logprob: float


class Tick(NamedTuple):
    """What one tick did; slots are keys.

    Attributes:
      lanes: loop that the newest token of each slot ran, as `Scheduler.lanes`.
      exited: slots whose next token starts from the next tick on.
      finished: slots whose request ended, with its last token.
      tokens: new ones, final; the stop token is one of them.
      busy: lanes in use, those of completing tokens too.
      head_rows: lanes that ran the vocabulary head.
      drafted: tokens of this tick whose own successor had been drafted (`lossless`).
      dropped: lanes given up because a draft was wrong.
    """

    lanes: dict[int, int]
    exited: list[int]
    finished: list[int]
    tokens: dict[int, NewToken]
    busy: int
    head_rows: int
    drafted: int
    dropped: int


class Engine:
    """Runs up to `num_slots` requests at once.

    Args:
      model: its dtype is also the cache's.
      params: on their devices; those of a CPU move to large pages.
      num_slots: S; on a mesh a multiple of the devices that share the batch.
      context_length: cache rows of a slot, or a few less: prompt and answer together fit.
      chunk_length: prompt tokens that run beside the lanes in a tick.
      num_stop: the most stop ids any request has.
      measure: says which tokens leave early; None runs all loops.
      thresholds: of the measure, after loop 1, 2, …; a number is for all; None: the measure's own.
      missing_kv: where keys and values of the loops that a token skipped come from. 'complete': it
        goes on through them beside its successors, so they are exact. 'propagate': projected from
        the state with which it left. 'copy': those of its last loop. The last prompt token counts
        as one that skips none.
      lossless: a token that leaves only drafts its successor; it is kept if the last loop chooses
        the same, so the tokens are those of full depth. Needs missing_kv='complete'.
      depthwise: False is the sequence-wise baseline: slots start their tokens together.
      mesh: the mesh `params` are sharded on; None for one device. Devices that share a batch have
        slots of their own, and run their own ticks without a word to each other.
      rules: logical axis rules of that mesh.

    Attributes:
      attention: how lanes attend, and if by XLA why.

    A mesh of devices that are only described (`jax.experimental.topologies`), with params that are
    `jax.ShapeDtypeStruct`s, makes an engine that can `compile` and tell its `memory`, no more.
    """

    def __init__(
        self,
        model: Decoder,
        params: Any,
        num_slots: int,
        context_length: int,
        *,
        chunk_length: int = 64,
        num_stop: int = 4,
        measure: Measure | None = None,
        thresholds: Sequence[float] | float | None = None,
        missing_kv: str = "complete",
        lossless: bool = False,
        depthwise: bool = True,
        mesh: Mesh | None = None,
        rules: Sequence[tuple[str, Any]] = (),
    ):
        sizes = {"num_slots": num_slots, "context_length": context_length}
        sizes |= {"chunk_length": chunk_length, "num_stop": num_stop}
        for name, value in sizes.items():
            check_number(name, value, True, 1, 2**31 - 1)
        if measure is not None and not isinstance(measure, Measure):
            raise ValueError(
                f"measure={measure!r}; expected one of decoding.early_exit, as make_measure(name) "
                "gives"
            )
        if missing_kv not in MISSING_KV:
            raise ValueError(f"missing_kv={missing_kv!r}; expected one of {', '.join(MISSING_KV)}")
        if lossless and (missing_kv != "complete" or measure is None or not measure.can_exit):
            raise ValueError(
                f"lossless with missing_kv={missing_kv!r} and measure={measure}; expected "
                "'complete' and a measure that drafts, such as Static(1)"
            )
        self.model, self.params, self.num_slots = model, params, num_slots
        self.context_length, self.chunk_length = context_length, min(chunk_length, context_length)
        self.num_stop, self.measure, self.depthwise = num_stop, measure, depthwise
        self._thresholds = admission.threshold_row(measure, thresholds, self.num_loops)
        self._placement = Placement(mesh, rules)
        shards = self._placement.shards
        if num_slots % shards:
            raise ValueError(
                f"num_slots={num_slots}; expected a multiple of the {shards} devices that share "
                "the batch"
            )
        if shards > 1 and not depthwise:
            raise ValueError(
                f"depthwise=False on {shards} devices that share the batch; each would wait for "
                "its own slots only. Measure the sequence-wise baseline on one of them"
            )
        self._attends, self.attention = self._choose_attention()
        if self._placement.platform == "cpu" and self._placement.devices == 1:
            build.use_huge_pages(jax.tree.leaves(params))
        self._ticks = Ticks(
            # it sees one shard's lanes
            model=model.clone(data_shards=1, attends=self._attends),
            num_slots=num_slots // shards,
            context_length=context_length,
            chunk_length=self.chunk_length,
            num_stop=num_stop,
            measure=measure,
            missing_kv=missing_kv,
            lossless=lossless and self.num_loops > 1,
            depthwise=depthwise,
        )
        self._run = jax.jit(
            self._placement.spread(self._ticks.run),
            donate_argnums=1,
            out_shardings=self._placement.outputs,
        )
        self._wipe_slot = jax.jit(Cache.wipe, donate_argnums=0, out_shardings=self._placement.cache)
        self._executables: dict[str, Any] = {}  # 'tick', 'chunk', 'wipe'
        self._cache: Cache | None = None
        self.reset()

    @property
    def num_loops(self) -> int:
        return self.model.cfg.num_loops

    @property
    def num_lanes(self) -> int:
        return self.num_slots * self._ticks.lanes_per_slot

    @property
    def can_exit(self) -> bool:
        """Whether a token may start before its predecessor has run all loops."""
        return self._ticks.can_exit

    @property
    def cache_bytes(self) -> int:
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(self._cache))

    def memory(self) -> dict[str, Any]:
        """The compiler's memory analysis of every executable."""
        return {name: e.memory_analysis() for name, e in self._executables.items()}

    def reset(self) -> None:
        """Forget all requests. Also mends an engine that failed in a step."""
        if self._cache is None:
            self._cache = self._placement.make(self._new_cache, self._placement.cache)
            self._tainted: set[int] = set()  # slots that hold NaN
        self._state = self._placement.put(self._ticks.state(self._placement.shards))
        self._orders = self._ticks.orders(self._placement.shards)
        self._sent: Any = None  # the orders on the device; None: there are newer ones

    def compile(self) -> None:
        """Make the executables; `step` does it when it was not done before."""
        if self._executables:
            return
        place, run, wipe = self._placement, self._run, self._wipe_slot
        numbers = np.bool_(False), np.int32(0), np.int32(0), np.bool_(False)
        fixed = place.put(self._orders.pack()), *place.everywhere(*numbers)
        for name, work in (("tick", None), ("chunk", place.put(self._chunk_arrays([])))):
            arguments = (self.params, self._cache, self._state, *fixed, work)
            self._executables[name] = place.compile(run, *arguments)
        self._executables["wipe"] = place.compile(wipe, self._cache, *place.everywhere(np.int32(0)))

    def check(self, request: Request) -> None:
        """Raises ValueError unless this engine can answer the request."""
        admission.check(request, self)

    def admit(self, slot: int, request: Request) -> None:
        """Put a request that passes `check` into a free slot.

        All prompt tokens but the last run in chunks (none if there is one token); that one is the
        first to decode.
        """
        if slot in self._tainted:
            # The mask gives stale rows a weight of zero, but zero times NaN is NaN.
            self.compile()
            cache, self._cache = self._cache, None
            number = self._placement.everywhere(np.int32(slot))
            self._cache = self._executables["wipe"](cache, *number)
            self._tainted.remove(slot)
        s, n = self._orders.settings, len(request.tokens)
        for name, value in SamplingParams.stack([request.sampling]).__dict__.items():
            getattr(s.sampling, name)[slot] = value[0]
        s.seeds[slot] = request.sampling.seed
        s.stop[slot] = NO_TOKEN
        s.stop[slot, : len(request.stop)] = request.stop
        s.first[slot], s.last[slot] = n, n + request.max_new_tokens - 1
        s.min_loops[slot] = request.min_loops
        s.max_loops[slot] = request.max_loops or self.num_loops
        s.thresholds[slot] = self._thresholds
        if request.exit_threshold is not None:
            s.thresholds[slot] = request.exit_threshold
        if s.recorded.size:
            s.recorded[slot, n - 1 : n - 1 + request.max_new_tokens] = request.recorded_loops
        self._change(slot, request.tokens[-1], n - 1, waiting=n == 1)
        self._orders.changes.text[slot, :n] = request.tokens

    def release(self, slot: int) -> None:
        """All lanes of the slot end; a request that finished has left its slot by itself."""
        self._change(slot, 0, 0, waiting=False)

    def step(
        self,
        chunks: Sequence[Chunk | None] = (None,) * MAX_TICKS,
        first_tick: int = 0,
        until_free: bool = False,
    ) -> list[Tick]:
        """Run some of the coming ticks on the device.

        Args:
          chunks: the prompt work of each tick; as many run as begin with the same kind (with or
            without), at most `MAX_TICKS`, and none once all slots are idle.
          first_tick: number of the first; at full depth tokens start at multiples of num_loops.
          until_free: also stop after a tick in which a request finished.

        Returns:
          what each tick did, in order.
        """
        with_chunk = bool(chunks) and chunks[0] is not None
        same = [(chunk is not None) == with_chunk for chunk in chunks[:MAX_TICKS]] + [False]
        num_ticks = same.index(False)
        self.compile()
        place = self._placement
        work = place.put(self._chunk_arrays(chunks[:num_ticks])) if with_chunk else None
        fresh = self._orders.changes.reset.any()
        if self._sent is None:
            self._sent = place.put(self._orders.pack())
        cache, self._cache = self._cache, None  # donated: gone, even when the call fails
        new_cache, self._state, found, count = self._executables["chunk" if with_chunk else "tick"](
            self.params,
            cache,
            self._state,
            self._sent,
            *place.everywhere(
                np.bool_(fresh),
                np.int32(first_tick),
                np.int32(num_ticks),
                # shards that stopped at different ticks could not go on together
                np.bool_(until_free and place.shards == 1),
            ),
            work,
        )
        self._orders.changes.reset[:] = False
        found, count = jax.device_get((found, count))  # here at the latest an error is known
        self._cache = new_cache
        # a shard that stopped earlier had nothing left to do
        return [self._read(tick) for tick in Found.unpack(found[:, : count.max()])]

    def _choose_attention(self) -> tuple[str, str]:
        """`Decoder.attends` of the lanes, and what to say about it."""
        model, place = self.model, self._placement
        sizes = model.cfg, model.dtype
        if place.platform == "tpu":
            way, name = "paged", "ragged paged attention"
            refusal = tpu.refusal(*sizes, self.context_length, place.head_shards)
        elif place.platform == "cpu":
            way, name = "few_queries", "decode_attention.cc"
            refusal = cpu_cache.refusal(*sizes, place.devices)
        else:
            return "xla", f"XLA (our kernels are for TPUs and CPUs, not {place.platform})"
        return (way, f"{name} kernel") if refusal is None else ("xla", f"XLA ({name}: {refusal})")

    def _change(self, slot: int, token: int, position: int, waiting: bool) -> None:
        changes, self._sent = self._orders.changes, None
        changes.reset[slot] = True
        slots = changes.slots
        slots.token[slot], slots.position[slot], slots.waiting[slot] = token, position, waiting

    def _read(self, found: Found) -> Tick:
        slots = lambda mask: [slot for slot, true in enumerate(mask) if true]  # noqa: E731
        new = zip(found.token, found.exit_loops, found.logprob, strict=True)
        self._tainted.update(slots(found.tainted))
        return Tick(
            lanes={slot: loop for slot, loop in enumerate(found.newest) if loop >= 0},
            exited=slots(found.exited),
            finished=slots(found.finished),
            tokens={slot: NewToken(*n) for slot, n in enumerate(new) if n[0] != NO_TOKEN},
            busy=sum(found.busy),
            head_rows=sum(found.head_rows),
            drafted=sum(found.drafted),
            dropped=sum(found.dropped),
        )

    def _new_cache(self) -> Cache:
        model, new = self.model, self._placement.cache_class.zeros
        return new(model.cfg, self.num_slots, self.context_length, model.dtype)

    def _chunk_arrays(self, chunks: Sequence[Chunk]) -> Chunks:
        """For every shard its own: the slot's shard runs a chunk, the others have none."""
        columns = np.zeros((5, self._placement.shards, MAX_TICKS), np.int32)
        for i, chunk in enumerate(chunks):
            shard, slot = divmod(chunk.slot, self._ticks.num_slots)
            columns[:, shard, i] = chunk._replace(slot=slot)
        *columns, ends_prompt = columns.reshape(5, -1)
        return Chunks(*columns, ends_prompt.astype(bool))
