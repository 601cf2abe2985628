"""Which start recovers best: the paper's comparisons (App. F and G) on the embedded model.

    python -m tests.benchmarks.comparisons --workdir=runs/comparisons [--tokens=524288] [ROW ...]

Every row is the quickstart's `paper` variant with a few values changed and the same budget, data
and seed. A row that has ended is not run again. Prints a table, and one JSON row for
docs/results.jsonl.
"""

import argparse
import json
import pathlib

from configs import quickstart
from recursive_jax.console import output, tables
from recursive_jax.train import train
from recursive_jax.weights.source import open_source
from recursive_jax.weights.tie_config import TieConfig, tied_config

ROWS = {
    "stepwise": {"model.method": "stepwise", "model.lora_rank": 0},
    "average": {"model.method": "average", "model.lora_rank": 0},
    "lower": {"model.method": "lower", "model.lora_rank": 0},
    "random": {  # layers; embeddings are kept
        "model.method": "random",
        "model.lora_init": "none",
        "model.lora_rank": 0,
    },
    "looped, from scratch": {"source": "", "tokenizer": "tiny"},  # embeddings random as well
    "reduced": {"model.reduced_baseline": True},  # random, half the layers, no loop
    "average, zero LoRA": {"model.method": "average", "model.lora_init": "zero"},
    "average, SVD LoRA": {"model.method": "average", "model.lora_init": "svd"},
    "average, SVD LoRA, distilled": {"model.method": "average", "objective.kd": 1.0},
    "average, SVD LoRA, distilled, all decayed": {  # LoRA factors and embeddings as well
        "model.method": "average",
        "objective.kd": 1.0,
        "optimizer.decay_on": "matrices",
    },
}


def run(name: str, workdir: pathlib.Path, tokens: int, rank: int) -> dict:
    directory = workdir / name.replace(", ", "-").replace(" ", "_")
    summary = directory / "summary.json"
    if not summary.exists():
        config = quickstart.get_config(f"paper,rank={rank},tokens={tokens}")
        config.objective.kd = 0.0
        config.update_from_flattened_dict(ROWS[name])
        if not config.source:
            vanilla = open_source("tiny").cfg
            config.scratch = tied_config(vanilla, TieConfig(config.model.num_loops)).to_json()
        output.say(f"\n== {name}")
        train(config, directory)
    return json.loads(summary.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(ROWS)}; default all")
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--tokens", type=int, default=524_288)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    results = {n: run(n, args.workdir, args.tokens, args.rank) for n in args.rows or ROWS}
    shown = {
        name: {
            "layer_parameters": s["parameters"]["shared"] + s["parameters"]["lora"],
            "before": s["before"]["nll"],
            "after": s["after"]["nll"],
        }
        for name, s in results.items()
    }
    rows = [
        (n, f"{r['layer_parameters']:,}", f"{r['before']:.4f}", f"{r['after']:.4f}")
        for n, r in shown.items()
    ]
    output.say("\n" + tables.table(rows, ("start", "layers' parameters", "nll before", "after")))
    print(json.dumps({"result": "comparisons", "tokens": args.tokens, "rows": shown}))


if __name__ == "__main__":
    main()
