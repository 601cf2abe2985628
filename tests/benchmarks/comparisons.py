"""Which start and recipe recover best: comparisons on the embedded model.

    python -m tests.benchmarks.comparisons --workdir=runs/comparisons [--tokens=524288] [ROW ...]

By default the starts of the paper (App. F and G). `--recipes` names the rows of another question:
the paper's start, `split` and the joint fit, each with and without labels. `--loops`, `--rank`,
`--seed` and `--rate` hold for all rows.

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
RECIPES = {
    f"{start}, {how}": {"model.lora_init": start, "objective.kd": 1.0, "objective.ce": ce}
    for start in ("svd", "split", "joint")
    for how, ce in (("labels and source", 1.0), ("source alone", 0.0))
}
ROWS |= RECIPES


def run(name: str, workdir: pathlib.Path, args: argparse.Namespace) -> dict:
    directory = workdir / name.replace(", ", "-").replace(" ", "_")
    summary = directory / "summary.json"
    if not summary.exists():
        recipe = f"paper,loops={args.loops},rank={args.rank},tokens={args.tokens}"
        config = quickstart.get_config(recipe)
        config.near.kl = 0.0  # every row as it says
        config.seed = args.seed
        config.optimizer.learning_rate = args.rate
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
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(ROWS)}; default the paper's")
    parser.add_argument("--recipes", action="store_true", help="the rows of start and recipe")
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--tokens", type=int, default=524_288)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--loops", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate, its peak")
    args = parser.parse_args()
    rows = args.rows or (RECIPES if args.recipes else [n for n in ROWS if n not in RECIPES])
    results = {n: run(n, args.workdir, args) for n in rows}
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
    settings = {name: getattr(args, name) for name in ("tokens", "loops", "rank", "seed", "rate")}
    print(json.dumps({"result": "comparisons", **settings, "rows": shown}))


if __name__ == "__main__":
    main()
