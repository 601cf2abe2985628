"""Continuous depth-wise batching (paper §2.4): many requests, each at its own loop, one block.

The engine has slots, the scheduler has requests; `session.Session` connects them. An engine can
`admit` a request into a slot, `step` a few ticks and `release` a slot. Admissions and releases
reach the device with the next step. There are two executables: ticks with and without prompt work.
A third one wipes a slot that held NaN. After `compile`, nothing compiles again.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from recursive_jax.decoding.config import EngineConfig
from recursive_jax.decoding.donation import copies
from recursive_jax.decoding.exit_measures import Recorded, Static
from recursive_jax.decoding.limits import Limits
from recursive_jax.decoding.placement import Placement
from recursive_jax.decoding.requests import Request, check_number, shown
from recursive_jax.decoding.sampling import SamplingParams
from recursive_jax.decoding.scheduler import Chunk
from recursive_jax.decoding.state import MAX_TICKS, NO_TOKEN, Chunks, TickOutputs
from recursive_jax.decoding.tick import DecodeLoop
from recursive_jax.models.interface import Cache, DecodeModel


class NewToken(NamedTuple):
    """`exit_loops`: loops executed, 1 … num_loops, before its own successor could start."""

    token: int
    exit_loops: int
    logprob: float


class Tick(NamedTuple):
    """The events of one tick; slots are keys.

    Attributes:
      lanes: loop that the newest token of each slot ran, as `Scheduler.lanes`.
      exited: slots whose next token starts in the next tick.
      finished: slots whose request ended, with its last token.
      tokens: new ones, final; the stop token is one of them.
      busy: lanes in use, those of completing tokens too.
      head_rows: lanes that ran the vocabulary head.
      drafted: tokens of this tick whose next token was drafted before this one was verified.
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
    """Runs up to `config.num_slots` requests at once.

    Args:
      model: the network and its cache.
      params: on their devices, as `model.prepare` returns them. They are only read.
      config: slots, context and exits.
      mesh: the mesh `params` are sharded on; None for one device. Each data shard has its own slots
        and runs its own ticks. There are no collectives over `data`.
      rules: logical axis rules of that mesh.

    Attributes:
      config: with the sizes that this model and `thresholds` have.
      loop: the compiled decode loop of one shard.
      limits: the requests that it accepts.
      resets: how often `reset` has run; a session ends with the next one.
      executables: 'tick', 'chunk' (a tick with prompt work) and 'wipe', after `compile`.

    With a mesh of devices that are only described (`jax.experimental.topologies`) and params that
    are `jax.ShapeDtypeStruct`s, an engine can `compile` and report its `memory`, nothing else.
    """

    def __init__(
        self,
        model: DecodeModel,
        params: Any,
        config: EngineConfig,
        mesh: Mesh | None = None,
        rules: Sequence[tuple[str, Any]] = (),
    ):
        if not isinstance(config, EngineConfig):
            raise ValueError(f"config={shown(config)}; expected an EngineConfig")
        self.model, self.params, self.config = model, params, config.for_model(model.cfg)
        self._placement = Placement(mesh, rules)
        shards = self._placement.shards
        if self.num_slots % shards:
            raise ValueError(
                f"num_slots={self.num_slots}; expected a multiple of the {shards} devices that "
                "share the batch"
            )
        if shards > 1 and not config.depthwise:
            raise ValueError(
                f"depthwise=False on {shards} devices that share the batch; each would wait for "
                "its own slots only. Measure the sequence-wise baseline on one of them"
            )
        shard = dataclasses.replace(
            self.config, num_slots=self.num_slots // shards, thresholds=None
        )
        self.loop = DecodeLoop(model, shard)
        # A request's own bounds need no measure: the engine's is then the last loop.
        measure = self.config.measure
        decides = self.can_exit and measure != Static(self.num_loops)
        self.limits = Limits(
            context_length=self.config.context_length,
            vocab_size=model.cfg.vocab_size,
            num_loops=self.num_loops,
            num_stop=self.config.num_stop,
            can_exit=self.can_exit,
            check_threshold=measure.check_threshold if decides else None,
            needs_recorded_loops=isinstance(measure, Recorded),
        )
        abstract = jax.eval_shape(self._new_cache)
        self._cache_formats = self._placement.cache_formats(abstract)
        self._run = jax.jit(
            self._placement.spread(self.loop.run),
            donate_argnums=1,
            out_shardings=self._placement.outputs(self._cache_formats),
        )
        self._wipe_slot = jax.jit(
            type(abstract).wipe, donate_argnums=0, out_shardings=self._cache_formats
        )
        self.executables: dict[str, Any] = {}
        self._cache: Cache | None = None
        self.resets = 0
        self.reset()

    @property
    def thresholds(self) -> tuple[float, ...] | None:
        """Exit thresholds of the requests that are admitted from now on.

        They can be set to what `EngineConfig.thresholds` takes. Nothing is compiled anew.
        """
        return self.config.thresholds

    @thresholds.setter
    def thresholds(self, thresholds: Sequence[float] | float | None) -> None:
        config = dataclasses.replace(self.config, thresholds=thresholds)
        config.check_loops(self.num_loops)
        self.config = config

    @property
    def num_slots(self) -> int:
        return self.config.num_slots

    @property
    def num_loops(self) -> int:
        return self.model.cfg.num_loops

    @property
    def num_lanes(self) -> int:
        return self.num_slots * self.loop.lanes_per_slot

    @property
    def can_exit(self) -> bool:
        """Whether a token may start before its predecessor has run all loops."""
        return self.loop.can_exit

    @property
    def cache(self) -> Cache | None:
        """Keys and values; None while they are lent, and after a step that failed."""
        return self._cache

    @property
    def cache_bytes(self) -> int:
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(self._cache))

    def memory(self) -> dict[str, Any]:
        """The compiler's memory analysis of every executable."""
        return {name: e.memory_analysis() for name, e in self.executables.items()}

    def reset(self) -> None:
        """Forget all requests. An engine that failed in a step works again afterwards."""
        self.resets += 1
        if self._cache is None:
            self._cache = self._placement.make(self._new_cache, self._cache_formats)
            self._tainted: set[int] = set()  # slots that hold NaN
        self._state = self._placement.put(self.loop.state(self._placement.shards))
        self._inputs = self.loop.inputs(self._placement.shards)
        self._sent: Any = None  # the inputs on the device; None: there are newer ones

    def lend_cache(self) -> Cache:
        """Return the cache and forget all requests; `reset` makes a new cache.

        For measurements: two caches may not fit into memory.
        """
        cache, self._cache = self._cache, None
        return cache

    def compile(self) -> None:
        """Compile the executables; the first `step` does it otherwise."""
        if self.executables:
            return
        place, run, wipe = self._placement, self._run, self._wipe_slot
        numbers = np.bool_(False), np.int32(0), np.int32(0), np.bool_(False)
        fixed = place.put(self._inputs.pack()), *place.everywhere(*numbers)
        for name, work in (("tick", None), ("chunk", place.put(self._chunk_arrays([])))):
            arguments = (self.params, self._cache, self._state, *fixed, work)
            self.executables[name] = place.compile(run, *arguments)
        self.executables["wipe"] = place.compile(wipe, self._cache, *place.everywhere(np.int32(0)))
        for name, executable in self.executables.items():
            for copied in copies(executable, self._cache):
                logging.warning(
                    "the program %r does not update the cache in place (%s): it needs a second "
                    "cache, and time to copy it",
                    name,
                    copied,
                )

    def check(self, request: Request) -> None:
        """Raises ValueError unless this engine can answer the request."""
        self.limits.check(request)

    def admit(self, slot: int, request: Request) -> None:
        """Put a request that passes `check` into a free slot.

        All prompt tokens but the last run in chunks (none if there is one token); that one is the
        first to decode.

        Raises:
          ValueError: there is no such slot.
        """
        check_number("slot", slot, True, 0, self.num_slots - 1)
        if slot in self._tainted:
            # The mask gives stale rows a weight of zero, but zero times NaN is NaN.
            self.compile()
            cache, self._cache = self._cache, None
            number = self._placement.everywhere(np.int32(slot))
            self._cache = self.executables["wipe"](cache, *number)
            self._tainted.remove(slot)
        s, n = self._inputs.settings, len(request.tokens)
        for name, value in SamplingParams.stack([request.sampling]).__dict__.items():
            getattr(s.sampling, name)[slot] = value[0]
        s.seeds[slot] = request.sampling.seed
        s.stop[slot] = NO_TOKEN
        s.stop[slot, : len(request.stop)] = request.stop
        s.first[slot], s.last[slot] = n, n + request.max_new_tokens - 1
        s.min_loops[slot] = request.min_loops
        s.max_loops[slot] = request.max_loops or self.num_loops
        s.thresholds[slot] = self.config.threshold_row(self.num_loops)
        if request.exit_threshold is not None:
            s.thresholds[slot] = request.exit_threshold
        if s.recorded.size:
            s.recorded[slot, n - 1 : n - 1 + request.max_new_tokens] = request.recorded_loops
        self._update(slot, request.tokens[-1], n - 1, waiting=n == 1)
        self._inputs.updates.text[slot, :n] = request.tokens

    def release(self, slot: int) -> None:
        """All lanes of the slot end; a request that finished has left its slot by itself.

        Raises:
          ValueError: there is no such slot.
        """
        check_number("slot", slot, True, 0, self.num_slots - 1)
        self._update(slot, 0, 0, waiting=False)

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
        fresh = self._inputs.updates.reset.any()
        if self._sent is None:
            self._sent = place.put(self._inputs.pack())
        cache, self._cache = self._cache, None  # donated: gone, even when the call fails
        new_cache, self._state, outputs, count = self.executables[
            "chunk" if with_chunk else "tick"
        ](
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
        self._inputs.updates.reset[:] = False
        outputs, count = jax.device_get((outputs, count))  # here at the latest an error is known
        self._cache = new_cache
        # a shard that stopped earlier had nothing left to do
        return [self._read(tick) for tick in TickOutputs.unpack(outputs[:, : count.max()])]

    def _update(self, slot: int, token: int, position: int, waiting: bool) -> None:
        updates, self._sent = self._inputs.updates, None
        updates.reset[slot] = True
        slots = updates.slots
        slots.token[slot], slots.position[slot], slots.waiting[slot] = token, position, waiting

    def _read(self, outputs: TickOutputs) -> Tick:
        new = zip(outputs.token, outputs.exit_loops, outputs.logprob, strict=True)
        self._tainted.update(_true(outputs.tainted))
        return Tick(
            lanes={slot: loop for slot, loop in enumerate(outputs.newest) if loop >= 0},
            exited=_true(outputs.exited),
            finished=_true(outputs.finished),
            tokens={slot: NewToken(*n) for slot, n in enumerate(new) if n[0] != NO_TOKEN},
            busy=sum(outputs.busy),
            head_rows=sum(outputs.head_rows),
            drafted=sum(outputs.drafted),
            dropped=sum(outputs.dropped),
        )

    def _new_cache(self) -> Cache:
        return self.model.new_cache(self.num_slots, self.config.context_length)

    def _chunk_arrays(self, chunks: Sequence[Chunk]) -> Chunks:
        """Chunks by shard: the slot's shard runs a chunk, the others have none."""
        columns = np.zeros((5, self._placement.shards, MAX_TICKS), np.int32)
        for i, chunk in enumerate(chunks):
            shard, slot = divmod(chunk.slot, self.loop.num_slots)
            columns[:, shard, i] = chunk._replace(slot=slot)
        *columns, ends_prompt = columns.reshape(5, -1)
        return Chunks(*columns, ends_prompt.astype(bool))


def _true(mask: Sequence[int]) -> list[int]:
    """The slots where `mask` is not zero."""
    return [slot for slot, value in enumerate(mask) if value]
