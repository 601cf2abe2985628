"""Whether calibrated exit thresholds keep their bound, on many resamplings of one text.

    python -m tests.benchmarks.exit_bounds CKPT TEXT [--windows=2400] [--sample=400] \\
        [--resamplings=40] [--bound=0.05] [--confidence=0.9] [--risk=disagreement]

Each time, `sample` windows are drawn to calibrate on; the others stand for all other text. Beside
Learn then Test stands the naive choice: the lowest threshold, the same for all loops, whose risk on
the sample is within the bound. The other windows may be of the same documents. Prints one JSON row.
"""

import argparse
import json

import numpy as np

import recursive_jax as rj
from recursive_jax import early_exits
from recursive_jax.decoding.exit_measures import TopProbability
from recursive_jax.evaluation import risk


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("text")
    parser.add_argument("--windows", type=int, default=2400)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--sample", type=int, default=400)
    parser.add_argument("--resamplings", type=int, default=40)
    parser.add_argument("--bound", type=float, default=0.05)
    parser.add_argument("--confidence", type=float, default=0.9)
    parser.add_argument("--risk", default="disagreement", choices=risk.RISKS)
    args = parser.parse_args()
    model = rj.load(args.checkpoint)
    tokens = args.windows * (args.context - 1)
    windows, documents = early_exits.read_windows(
        model, args.text, tokens, args.context, quiet=False
    )
    found = early_exits.Subject(model, windows, TopProbability()).trace()
    count, rng = len(windows.tokens), np.random.default_rng(0)

    def losses(thresholds, chosen):
        part = found.take(chosen)
        outcome = part.outcome(part.exit_loops(thresholds))
        return risk.window_losses(part, outcome, args.risk), float(outcome.exit_loops.mean())

    results = {"calibrated": [], "naive": []}
    for _ in range(args.resamplings):
        drawn = rng.permutation(count)[: args.sample]
        cut = round(args.sample * early_exits.PATH_SHARE)
        first, second = (np.isin(np.arange(count), part) for part in (drawn[:cut], drawn[cut:]))
        other = ~(first | second)

        def try_out(thresholds, chosen=second):
            return losses(thresholds, chosen)

        accepted, _ = risk.learn_then_test(
            risk.path(found, first), try_out, args.bound, args.confidence
        )
        mine = found.take(first | second)
        values = np.quantile(mine.score[:, 0].astype(np.float64), np.linspace(1, 0, 500))
        within = [
            (value,) for value in values if losses((value,), first | second)[0].risk <= args.bound
        ]
        for name, thresholds in (
            ("calibrated", accepted and accepted.thresholds), ("naive", within and within[-1]),
        ):  # fmt: skip
            if thresholds:
                found_losses, loops = losses(thresholds, other)
                results[name].append((found_losses.risk, loops))
    row = {"result": "exit bounds", **vars(args), "windows": count, "documents": documents}
    for name, pairs in results.items():
        risks, loops = np.array(pairs).reshape(-1, 2).T
        row[name] = {
            "accepted": len(pairs),
            "violated": float((risks > args.bound).mean()),
            "mean_risk": round(float(risks.mean()), 4),
            "largest_risk": round(float(risks.max()), 4),
            "mean_loops": round(float(loops.mean()), 3),
        }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
