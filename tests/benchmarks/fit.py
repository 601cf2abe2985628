"""The joint fit of one layer of the block, its search in float32 and in float64.

    python tests/benchmarks/fit.py MODEL --calibrate=NOVELS [--calibration_tokens=32768] [--loops=2]
        [--rank=64] [--projections=q,up,down]

One JSON row: processor seconds and final objective by projection and dtype. The layer is the middle
one. Moments are taken from the cache, or measured.
"""

import argparse
import json
import sys
import time

import numpy as np

import recursive_jax as rj
from recursive_jax import calibration
from recursive_jax.models.parameters import leaves
from recursive_jax.weights import joint, names


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--calibrate", required=True)
    parser.add_argument("--calibration_tokens", type=int, default=32_768)
    parser.add_argument("--loops", type=int, default=2)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--projections", default="q,up,down")
    args = parser.parse_args()
    model = rj.load(args.model)
    cfg = model.cfg
    source = model.weights.as_source(cfg, model.tokenizer, model.facts)
    text = calibration.read(
        args.calibrate, args.calibration_tokens, model.tokenizer, cfg.vocab_size, cfg.max_length
    )
    found = calibration.measure(source, model.weights.content(), text, print, True)
    block = cfg.depth // args.loops
    depths = [block // 2 + loop * block for loop in range(args.loops)]
    _, params = source.layers(depths)
    params = names.flat(params)
    by_projection = {}
    for path, leaf in leaves(cfg).items():
        if not (leaf.kind == "weight" and leaf.projection in args.projections.split(",")):
            continue
        weights = list(np.asarray(params[path], np.float32))
        metrics = [found.metric(leaf.projection, depth, "fisher") for depth in depths]
        for dtype in (np.float32, np.float64):
            began = time.process_time()
            fit = joint.fit(weights, metrics, args.rank, np.random.default_rng(0), dtype=dtype)
            by_projection.setdefault(leaf.projection, {})[dtype.__name__] = {
                "processor_seconds": round(time.process_time() - began, 2),
                "objective": float(f"{fit.objective[-1]:.6g}"),
                "sweeps": len(fit.objective) - 1,
            }
    print(json.dumps({"result": "fit", "case": vars(args), "by_projection": by_projection}))


if __name__ == "__main__":
    sys.exit(main())
