"""The collectives of a compiled program: what they move, how often, and in which loops.

The compiler's own cost analysis counts the body of a loop once. Here the text of the program is
read, and every collective is counted as often as its loops run.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
ITEM_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4,
    "u32": 4, "f64": 8, "s64": 8, "u64": 8,
}  # fmt: skip
CALLS = re.compile(
    r"(?:calls|to_apply|called_computations|branch_computations|true_computation|"
    r"false_computation)=\{?((?:%?[\w.\-]+(?:, )?)+)"
)
NO_CALLS = ("reduce", "reduce-window", "scatter", "sort", "map", "select-and-scatter")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective.

    Attributes:
      kind: one of `KINDS`.
      arrays: that it moves; the compiler combines several.
      trips: iterations of the loops that it is in, the outermost first.
      group: devices that take part together.
      label: the operation of the source that it comes from.
      whole: bytes of the arrays that are not split over the group.
    """

    kind: str
    arrays: int
    trips: tuple[int, ...]
    group: int
    label: str
    whole: int

    @property
    def times(self) -> int:
        """How often it runs."""
        return math.prod(self.trips)

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device receives in one run, as a ring moves them."""
        if self.kind == "collective-permute":
            return self.whole
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.whole * (self.group - 1) / self.group


def wire_bytes(found: list[Collective]) -> float:
    """Bytes that a device receives in one run of the program."""
    return sum(c.wire_bytes * c.times for c in found)


def collectives(text: str, devices: int) -> list[Collective]:
    """Every collective of a program.

    Args:
      text: of the compiled program (`jax.stages.Compiled.as_text`).
      devices: that it runs on.
    """
    computations, entry = _computations(text)
    found: dict[object, Collective] = {}
    for key, collective in _walk(computations, entry, (), frozenset(), devices):
        # What runs beside an asynchronous collective names it again, in more loops.
        if key not in found or len(collective.trips) < len(found[key].trips):
            found[key] = collective
    return list(found.values())


def _walk(computations, name, trips, seen, devices) -> Iterator[tuple[object, Collective]]:
    if name not in computations or name in seen:
        return
    for number, line in enumerate(computations[name]):
        match = re.match(r"(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\(", line)
        if not match:
            continue
        result, op = match.groups()
        if op == "while":
            body, condition = (
                re.search(rf"{part}=%?([\w.\-]+)", line)[1] for part in ("body", "condition")
            )
            inner = (*trips, _trip_count(computations[condition], computations[body]))
            yield from _walk(computations, body, inner, seen | {name}, devices)
        elif (kind := op.removesuffix("-start")) in KINDS:
            # TPU's compiler writes a reduce-scatter as a fusion of this name.
            kind = "reduce-scatter" if "reduce-scatter" in name else kind
            key = (name, number) if kind == "collective-permute" else _key(line, name, number)
            yield key, _collective(kind, op, result, line, trips, devices)
        elif op not in NO_CALLS:
            for called in CALLS.findall(line):
                for other in re.findall(r"[\w.\-]+", called):
                    yield from _walk(computations, other, trips, seen | {name}, devices)


def _collective(kind, op, result, line, trips, devices) -> Collective:
    results, group = _shapes(result), _group(line, devices)
    if op.endswith("-start") and kind != "all-reduce":  # operands beside results
        half = len(results) // 2
        results = results[:1] if kind == "collective-permute" else results[half:]
    whole = _size(results) * (group if op.startswith("reduce-scatter") else 1)
    label = re.search(r'op_name="([^"]*)"', line)
    label = label[1] if label else ""
    return Collective(kind, len(results), trips, group, label, whole)


def _key(line: str, name: str, number: int) -> object:
    """Equal for the lines that name one collective."""
    channel = re.search(r"channel_id=(\d+)", line)
    if channel and channel[1] != "1":  # those of `shard_map` all have channel 1
        return channel[1]
    asynchronous = re.search(r'async_collective_name="([^"]*)"', line)
    return asynchronous[1] if asynchronous else (name, number)


def _group(line: str, devices: int) -> int:
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", match[2]))
    return devices


def _shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    return [
        (dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in re.findall(r"\b(\w+)\[([\d,]*)\]", text)
        if dtype in ITEM_BYTES
    ]


def _size(shapes) -> int:
    return sum(ITEM_BYTES[dtype] * math.prod(dims) for dtype, dims in shapes)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of every computation by its name, and the name of the entry."""
    found: dict[str, list[str]] = {}
    entry = name = None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) (?:\([^\n]*\)|\S+) -> .*\{$", line)
        if head and not line.startswith(" "):
            name = head[2]
            found[name] = []
            entry = name if head[1] else entry
        elif line == "}":  # a kernel's own text may begin with it, too
            name = None
        elif name is not None and " = " in line:
            found[name].append(line.strip())
    return found, entry


def _trip_count(condition: list[str], body: list[str]) -> int:
    """Of a loop that counts up from 0: the limit of its condition, by the step of its body."""
    text = "\n".join(condition)
    constants = dict(re.findall(r"%([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)", text))
    root = next(line for line in condition if line.startswith("ROOT"))
    named = [n for n in re.findall(r"%([\w.\-]+)", root) if n in constants]
    limit = int(constants[named[0]]) if named else max(map(int, constants.values()), default=1)
    compared = re.findall(r"%([\w.\-]+)", root.split("compare(")[-1]) if "compare(" in root else []
    index = None
    for line in condition:
        match = re.match(r"%([\w.\-]+) = .* get-tuple-element\(.*\), index=(\d+)", line)
        if match and (match[1] in compared or not compared):
            index = int(match[2])
    step, text = 1, "\n".join(body)
    out = re.search(r"ROOT %[\w.\-]+ = \(.*?\) tuple\((.*?)\)(?:,|$)", text, re.M)
    if index is not None and out:
        names = re.findall(r"%([\w.\-]+)", out[1])
        if index < len(names):
            match = re.search(rf"^%{re.escape(names[index])} = \S+ add\((.*?)\)", text, re.M)
            adds = dict(re.findall(r"%([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)", text))
            for operand in re.findall(r"%([\w.\-]+)", match[1]) if match else ():
                step = int(adds.get(operand, step))
    return -(-limit // max(step, 1))
