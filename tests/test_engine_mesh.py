"""The engine on meshes of eight fake devices: one request at a time decodes the same tokens."""

import dataclasses
import functools
import itertools
import re

import jax
import numpy as np
import pytest
from decode_models import make_engine
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_engine import CONTEXT, GEMMA, RELAXED, as_recorded, follows, params_of, requests_of, serve

from recursive_jax import sharding
from recursive_jax.decoding.exit_measures import Recorded
from recursive_jax.decoding.requests import Request
from recursive_jax.models.decoder import Decoder
from recursive_jax.models.parameters import logical_axes
from recursive_jax.models.scanned import ScannedModel

WIDE = RELAXED.replace(num_heads=8, num_kv_heads=4, vocab_size=64)
MODES = {
    "full_depth": {},
    "complete": dict(measure=Recorded()),
    "propagate": dict(measure=Recorded(), missing_kv="propagate"),
    "copy": dict(measure=Recorded(), missing_kv="copy"),
    "lossless": dict(measure=Recorded(), lossless=True),
}
COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast"
    r"|ragged-all-to-all|send|recv)(-start)?\("
)


@functools.lru_cache(maxsize=8)  # as `engine_of`
def engine_on(cfg, mode, data, tensor):
    """Eight slots on `data` x `tensor` devices."""
    mesh = sharding.make_mesh(data, 1, tensor, devices=jax.devices()[: data * tensor])
    rules = sharding.rules_for(mesh, cfg)
    where = sharding.shardings(logical_axes(cfg), mesh, rules)
    model = ScannedModel(Decoder(cfg))
    options = dict(chunk_length=4, mesh=mesh, rules=rules, **MODES[mode])
    return make_engine(model, sharding.put_global(params_of(cfg), where), 8, CONTEXT, **options)


def groups_of(line: str) -> list[list[int]]:
    """Devices that exchange something in one line of compiled text."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return [[int(n) for n in re.findall(r"\d+", pair)] for pair in pairs[1].split("},{")]
    if groups := re.search(r"replica_groups=\{\{(.*?)\}\}", line):
        return [[int(n) for n in group.split(",")] for group in groups[1].split("},{")]

    def numbers(text):
        return [int(n) for n in re.findall(r"\d+", text or "")]

    iota = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"

    def devices(source, order):
        ids = np.arange(np.prod(source)).reshape(source)
        return ids.transpose(order) if order else ids

    if listed := re.search(rf"replica_groups=\[([\d,]+)\]<={iota}", line):
        shape, source, order = map(numbers, listed.groups())
        return devices(source, order).reshape(shape).tolist()
    mesh = re.search(
        rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({iota}\))? \{{([^}}]*)\}}", line
    )
    assert mesh, f"collective among unknown devices: {line}"
    axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
    # (axis, place, size); 'tensor':(4)2 of 8 devices: those of 2 x 4 that differ in the last place
    over = [
        (name, int(place or 1), int(size or axes[name]))
        for name, place, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", mesh[4])
    ]
    assert over, f"collective among unknown devices: {line}"
    digits = []
    for name, size in axes.items():
        cuts = {n for axis, a, b in over if axis == name for n in (a, a * b)} | {1, size}
        pairs = list(itertools.pairwise(sorted(cuts))) or [(1, 1)]
        digits += [(name, a, b // a) for a, b in pairs]
    sizes, last = [size for _, _, size in digits], [digits.index(digit) for digit in over]
    ids = devices(numbers(mesh[2]) or list(axes.values()), numbers(mesh[3])).reshape(sizes)
    ids = np.moveaxis(ids, last, range(-len(last), 0))
    return ids.reshape(-1, np.prod([sizes[i] for i in last])).tolist()


def collectives(text: str, tensor: int) -> tuple[int, int]:
    """(all collectives, those between data shards) in the text of a data x tensor program."""
    lines = [line for line in text.splitlines() if COLLECTIVE.search(line)]
    crossing = [
        line for line in lines if any(len({n // tensor for n in g}) > 1 for g in groups_of(line))
    ]
    return len(lines), len(crossing)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("mode", "data", "tensor"),
    [
        pytest.param("full_depth", 1, 8, marks=slow),  # kv heads do not divide: replicated
        ("full_depth", 2, 4),
        pytest.param("complete", 4, 2, marks=slow),
        ("propagate", 4, 2),
        pytest.param("propagate", 8, 1, marks=slow),
        pytest.param("copy", 4, 2, marks=slow),
        ("lossless", 4, 2),
    ],
)
def test_any_mesh_decodes_like_one_request_at_a_time(mode, data, tensor):
    """Token for token, and no data shard ever hears of another."""
    engine = engine_on(WIDE, mode, data, tensor)
    requests = requests_of(WIDE, 14, seed=1, recorded="measure" in MODES[mode])
    ours, ticks = serve(engine, requests, seed=2)
    leaves_of, policy = as_recorded, MODES[mode].get("missing_kv", "complete")
    if mode in ("full_depth", "lossless"):

        def leaves_of(request):
            return lambda look: False

    if mode == "lossless":
        assert sum(tick.dropped for tick in ticks) > 0
        whole = [[WIDE.num_loops] * len(mine.tokens) for mine in ours]
        ours = [
            dataclasses.replace(mine, exit_loops=n) for mine, n in zip(ours, whole, strict=True)
        ]
    loops = follows(WIDE, ours, requests, leaves_of, policy)
    if mode == "full_depth":
        assert sum(tick.busy for tick in ticks) == len(loops) * WIDE.num_loops
        assert sum(tick.head_rows for tick in ticks) == len(loops)

    for name in ("tick", "chunk", "wipe"):
        count, crossing = collectives(engine.executables[name].as_text(), tensor)
        assert crossing == 0
        assert (count > 0) == (tensor > 1 and name != "wipe")
    shard = engine.cache.keys.addressable_shards[0].data.shape
    shard = dict(zip(engine.cache.AXES["keys"], shard, strict=True))
    split = 1 if WIDE.num_kv_heads % tensor else tensor
    assert (shard["slot"], shard["kv_heads"]) == (8 // data, WIDE.num_kv_heads // split)
    memory = engine.memory()["tick"]  # of one device
    assert memory.alias_size_in_bytes >= engine.cache_bytes // (data * split)


def test_slots_of_several_shards_are_not_batched_by_tokens():
    mesh = sharding.make_mesh(2, 1, 1, devices=jax.devices()[:2])
    rules = sharding.rules_for(mesh, WIDE)
    with pytest.raises(ValueError, match="depthwise=False on 2 devices"):
        model = ScannedModel(Decoder(WIDE))
        make_engine(model, None, 8, CONTEXT, depthwise=False, mesh=mesh, rules=rules)


@pytest.mark.slow
def test_windows_and_one_kv_head_on_a_mesh():
    cfg = GEMMA.replace(vocab_size=68)
    engine = engine_on(cfg, "complete", 4, 2)
    requests = requests_of(cfg, 10, seed=3, recorded=True)
    ours, _ = serve(engine, requests, seed=4)
    assert set(follows(cfg, ours, requests, as_recorded)) == {1, 2}


def test_a_slot_that_held_nan_is_wiped_on_its_shard():
    engine = engine_on(WIDE, "propagate", 4, 2)
    requests = requests_of(WIDE, 8, seed=5, recorded=True)
    expected, _ = serve(engine, requests, seed=6)
    # Token 5 has no embedding: its request leaves NaN in the cache of every slot.
    whole, bad = (
        engine.params,
        [Request(i, (1, 5, 2), 4, recorded_loops=(2,) * 4) for i in range(8)],
    )
    embedding = np.array(whole["embedding"])
    embedding[5] = np.nan
    broken = jax.device_put(embedding, whole["embedding"].sharding)
    engine.params = {**whole, "embedding": broken}
    ended, _ = serve(engine, bad, seed=6)
    assert all(c.finish_reason == "error" for c in ended)
    engine.params = whole
    ours, _ = serve(engine, requests, seed=6)
    assert [c.tokens for c in ours] == [c.tokens for c in expected]
    assert all(c.finish_reason == "length" for c in ours)


def test_a_collective_between_data_shards_would_be_seen():
    mesh = sharding.make_mesh(4, 1, 2)

    def text(function, spec):
        x = jax.device_put(np.ones((8, 8), np.float32), NamedSharding(mesh, spec))
        return jax.jit(function, out_shardings=NamedSharding(mesh, P())).lower(x).compile()

    def total(x):
        return x.sum()

    assert collectives(text(total, P("tensor")).as_text(), 2) == (1, 0)
    count, crossing = collectives(text(total, P("data")).as_text(), 2)
    assert count == crossing > 0
    permute = "%p = f32[2] collective-permute(%x), source_target_pairs={{0,1},{2,3}}"
    assert collectives(permute, 2) == (1, 0) and collectives(permute, 1) == (1, 1)
    listed = "%a = f32[2] all-reduce-start(%x), replica_groups={{0,2},{1,3}}, to_apply=%add"
    assert collectives(listed, 2) == (1, 1) and collectives(listed, 4) == (1, 0)
    assert groups_of("replica_groups=[2,4]<=[4,2]T(1,0)") == [[0, 2, 4, 6], [1, 3, 5, 7]]
    named = "replica_groups=mesh['x'=2,'y'=1,'z'=4]"
    assert groups_of(named + " {'z'}") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups_of(named + " {'z':(2)2}") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert groups_of(named + " {'z':(1)2}") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert groups_of(named + " {'y'}") == [[n] for n in range(8)]
    transposed = named + ", device_ids=([4,2]T(1,0)) {'x'}"
    assert groups_of(transposed) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_meshes_that_cannot_be_are_refused():
    mesh = sharding.make_mesh(4, 1, 2)

    def build(slots, mesh):
        rules = sharding.rules_for(mesh, WIDE)
        return make_engine(ScannedModel(Decoder(WIDE)), {}, slots, CONTEXT, mesh=mesh, rules=rules)

    with pytest.raises(ValueError, match="num_slots=6; expected a multiple of the 4 devices"):
        build(6, mesh)
    with pytest.raises(ValueError, match=r"fsdp=2 splits both slots and weights \(embed\)"):
        build(8, sharding.make_mesh(2, 2, 2))
