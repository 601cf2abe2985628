"""Compare our scores with those of lm-eval's own `hf` model, on the same items of local tasks.

    python tests/benchmarks/harness_parity.py MODEL_DIR TASK_DIR --limit=1000 [--tasks=all]

MODEL_DIR is a Hugging Face directory. A GGUF is made one first: `hf.save_params`. Prints a JSON row
for every task: on how many items both make the same choice, and the largest difference of a
log-likelihood, in nats. A choice is the likeliest of several, or whether a single continuation is
greedy. Needs torch and accelerate. We compute in float32, and so does `hf`; with --dtype=float64
the difference is our own error.
"""

import argparse
import json
import time

import numpy as np

from recursive_jax.evaluation import harness, tasks
from recursive_jax.model import load
from recursive_jax.placed import Placed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir")
    parser.add_argument("task_dir")
    parser.add_argument("--tasks", default="all")
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--dtype", default="float32", help="of hf")
    options = parser.parse_args()
    loaded = tasks.load_tasks(options.tasks, options.task_dir)
    theirs = hf_model(options.model_dir, options.batch_size, options.dtype)
    ours = our_model(options.model_dir, options.batch_size)
    facts = {
        "benchmark": "harness_parity",
        "model": options.model_dir,
        "hf_dtype": options.dtype,
        "max_length": [ours.max_length, theirs.max_length],
        "prefix": [ours.prefix_token_id, theirs.prefix_token_id],
    }
    for name, task in loaded.items():
        found, seconds = [], []
        for model in (ours, theirs):
            start = time.perf_counter()
            found.append(harness.answers(model, {name: task}, options.limit)[name])
            seconds.append(round(time.perf_counter() - start, 1))
        print(json.dumps(facts | {"task": name, **compare(*found), "seconds": seconds}), flush=True)


def our_model(directory, batch_size):
    model = load(directory)
    longest = model.cfg.max_length
    scorer = Placed(model, "float32").likelihoods(longest, batch_size)
    return harness.RecursiveLM(model.tokenizer, model.cfg.vocab_size, longest, scorer)


def hf_model(directory, batch_size, dtype):
    from lm_eval.models.huggingface import HFLM

    return HFLM(directory, device="cpu", dtype=dtype, batch_size=batch_size)


def compare(ours, theirs):
    """Equal choices of all items, and the largest difference; both: `(value, greedy)` by item."""
    same = sum(choice(a) == choice(b) for a, b in zip(ours, theirs, strict=True))
    differences = [
        abs(x - y)
        for a, b in zip(ours, theirs, strict=True)
        for (x, _), (y, _) in zip(a, b, strict=True)
    ]
    return {
        "items": len(ours),
        "same_choice": same,
        "max_difference": float(np.max(differences)),
        "mean_difference": float(np.mean(differences)),
    }


def choice(answers):
    if len(answers) == 1:
        return bool(answers[0][1])
    return int(np.argmax([value for value, _ in answers]))


if __name__ == "__main__":
    main()
