"""Peak memory and seconds of converting a full-size model, random weights in its shapes.

    python tests/benchmarks/convert_full_size.py --scratch=DIR [--preset=gemma_2b] [--layers=N] \
        [-- --lora_rank=64 …]

Arguments behind `--` go to convert. --layers keeps fewer layers: the shapes stay, the time falls.
Writes DIR/source (safetensors in bf16, kept for the next time), converts it to DIR/converted as a
user would, and removes the result. Prints one JSON row. `peak_gib` is the most memory the process
had of its own; `peak_resident_gib` counts the source's file pages too, which the system maps while
it reads and takes back when somebody needs them. `allowed_gib` is the converted model in float32
plus one stack of a projection in float32, what a conversion without a calibration may need at most.
`stated_gb` is what convert's table said before it began. Linux only.
"""

import argparse
import collections.abc
import json
import math
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import time

import jax
import ml_dtypes
import numpy as np

from recursive_jax.weights import hf, hf_config, names
from recursive_jax.weights.source import ASSETS


class RandomParams(collections.abc.Mapping):
    """Params made when asked for, a stack at a time."""

    def __init__(self, cfg):
        self._shapes = names.leaf_shapes(cfg)

    def __getitem__(self, path):
        shape = self._shapes[path]
        rng = np.random.default_rng(len(path))
        out = np.empty(shape, ml_dtypes.bfloat16)
        for row in out if out.ndim > 1 else out[None]:
            row[...] = rng.standard_normal(row.shape, np.float32) * 0.02
        return out

    def __iter__(self):
        return iter(self._shapes)

    def __len__(self):
        return len(self._shapes)


def watch(process: subprocess.Popen) -> int:
    """Wait for the process; the most bytes of anonymous memory it had."""
    peak, status = 0, pathlib.Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
        peak = max(peak, int(found[1]) * 1024 if found else 0)
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(process.returncode)
    return peak


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scratch", type=pathlib.Path, required=True)
    parser.add_argument("--preset", default="gemma_2b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("options", nargs="*", default=["--lora_rank=64"])
    args = parser.parse_args()
    cfg, source = hf_config.preset(args.preset), args.scratch / "source"
    if args.layers is not None:
        cfg = cfg.replace(num_layers=args.layers)
    if not source.exists():
        hf.save_params(RandomParams(cfg), cfg, source)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ASSETS / "tiny" / name, source)
    out = args.scratch / "converted"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "recursive_jax.convert", f"--source={source}", f"--out={out}"]
    command += args.options
    began = time.time()
    log = args.scratch / "log"
    with open(log, "w") as file:
        peak = watch(subprocess.Popen(command, stdout=file))
    stated = re.search(r"memory +at most ([0-9.]+) GB", log.read_text())
    seconds = time.time() - began
    certificate = json.loads((out / "certificate.json").read_text())
    stack = max(math.prod(s) for p, s in names.leaf_shapes(cfg).items() if p.startswith("block/"))
    total = certificate["parameters"]["total"]
    resident = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    shutil.rmtree(out)
    print(
        json.dumps(
            {
                "benchmark": "convert_full_size",
                "preset": args.preset,
                "layers": cfg.num_layers,
                "options": args.options,
                "jax": jax.__version__,
                "seconds": round(seconds),
                "peak_gib": round(peak / 2**30, 2),
                "peak_resident_gib": round(resident / 2**30, 2),
                "stated_gb": float(stated[1]),
                "peak_gb": round(peak / 1e9, 2),
                "allowed_gib": round(4 * (total + stack) / 2**30, 2),
                "parameters": certificate["parameters"],
                "full_rank_identity": certificate["full_rank_identity"],
            }
        )
    )


if __name__ == "__main__":
    main()
