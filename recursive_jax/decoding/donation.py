"""Whether a compiled program updates its donated cache in place, read from the program's text.

A program that does not is right, but it needs a second cache, and time to copy it. Neither the
caller nor a kernel sees it: where an array is needed after it was overwritten, XLA copies it first,
and gives the kernel a buffer that is argument and result in any case.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np

NAMES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "float64": "f64"}  # in HLO


def copies(executable: Any, cache: Any) -> list[str]:
    """What a program copies of its donated cache, in words; nothing if it is updated in place.

    Args:
      executable: a compiled function (`jax.stages.Compiled`). Its first results are the cache.
      cache: arrays, or their shapes and shardings.
    """
    text = executable.as_text()
    if not text:
        return []
    # {0}: (7, {}, may-alias) in the first line: result 0 is the buffer of argument 7
    head = text.partition("\n")[0]
    aliased = set(re.findall(r"\{(\d*)\}: \(\d+, \{\}, (?:may|must)-alias\)", head))
    found = []
    for number, array in enumerate(jax.tree.leaves(cache)):
        if str(number) not in aliased and "" not in aliased:  # "": the only result
            found.append(f"result {number} is not the donated buffer")
        shape = array.sharding.shard_shape(array.shape) if array.sharding else array.shape
        kind = f"{NAMES[np.dtype(array.dtype).name]}[{','.join(map(str, shape))}]"
        if re.search(rf"= {re.escape(kind)}\S* copy\(", text):
            found.append(f"a copy of {kind}")
    return list(dict.fromkeys(found))
