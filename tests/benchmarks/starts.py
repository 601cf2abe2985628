"""What a conversion keeps, by start, untrained: one row for each start, rank and number of loops.

    python -m tests.benchmarks.starts MODEL OUT.jsonl --calibrate=NOVELS --text=NOVELS_HELD_OUT \\
        [--loops=2,3] [--ranks=0,64,128] [--starts=svd,split,activations,fisher] \\
        [--calibration_tokens=32768] [--max_block=2048]

A row has perplexity, KL and agreement on 2,048 tokens of two texts, seconds and peak memory, and
the processor time of the whole process, which other jobs do not change much. Every row is a process
of its own. A row that OUT.jsonl has is not run again. The moments are measured
once, by the first row that needs them, and cached.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

STARTS = {
    "stepwise": {"method": "stepwise", "lora_init": None},
    "svd": {"method": "average", "lora_init": "svd"},
    "split": {"method": "average", "lora_init": "split"},
    "activations": {"lora_init": "joint", "metric": "activations"},
    "fisher": {"lora_init": "joint", "metric": "fisher"},
}
MEASURED = ("source_nll", "nll", "kl", "top1_agreement")


def measure(case: dict) -> dict:
    import recursive_jax as rj
    from recursive_jax.evaluation import moments
    from recursive_jax.evaluation.certificate import Reference
    from recursive_jax.models.decoder import Decoder

    moments.MAX_BLOCK = case.get("max_block", moments.MAX_BLOCK)
    source = rj.load(case["model"])
    began = time.time()
    how = dict(
        num_loops=case["loops"], lora_rank=case["rank"], calibrate=case["calibrate"],
        calibration_tokens=case["calibration_tokens"], **STARTS[case["start"]],
    )  # fmt: skip
    model = source.convert(**how, text=case["text"])
    row = {"seconds": round(time.time() - began, 1)}
    sizes = model.certificate["parameters"]
    row |= {"parameters": sizes["total"], "of_layers": sizes["block_ratio_to_source"]}
    with tempfile.TemporaryDirectory() as scratch:
        windows = source.windows("docstrings:1", 2048, 512)
        opened = source.weights.as_source(source.cfg, source.tokenizer, source.facts)
        reference = Reference(pathlib.Path(scratch) / "rows.f32", opened, windows)
        other = reference.compare(Decoder(model.cfg), model.params)
    for name, found in (("text", model.certificate), ("docstrings", other)):
        row[name] = {key: found[key] for key in MEASURED}
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--calibrate", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--loops", default="2,3")
    parser.add_argument("--ranks", default="0,64,128")
    parser.add_argument("--starts", default=",".join(STARTS))
    parser.add_argument("--calibration_tokens", type=int, default=32_768)
    parser.add_argument("--max_block", type=int, help="wider moments are kept in blocks")
    args = parser.parse_args()
    more = {} if args.max_block is None else {"max_block": args.max_block}
    done = args.out.read_text().splitlines() if args.out.exists() else []
    done = [json.loads(line)["case"] for line in done]
    for loops in map(int, args.loops.split(",")):
        for rank in map(int, args.ranks.split(",")):
            for start in args.starts.split(","):
                if (start == "stepwise") != (rank == 0) and start not in ("activations", "fisher"):
                    continue  # the paper's start at this rank is the other one
                case = dict(
                    model=args.model, loops=loops, rank=rank, start=start, text=args.text,
                    calibrate=args.calibrate, calibration_tokens=args.calibration_tokens, **more,
                )  # fmt: skip
                if case not in done:
                    run(case, args.out)


def run(case: dict, out: pathlib.Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.starts", "--case", json.dumps(case)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    row = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        print(f"failed: {case}", file=sys.stderr)
        return
    row = {"result": "start", "case": case, **json.loads(row.splitlines()[-1])}
    row["peak_gb"] = round(usage.ru_maxrss / 1e6, 2)
    row["processor_seconds"] = round(usage.ru_utime + usage.ru_stime, 1)
    with open(out, "a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--case"]:
        print(json.dumps(measure(json.loads(sys.argv[2]))))
    else:
        main()
