"""Looped against unrolled GGUF files of one model in llama.cpp: bytes, and tokens per second.

    python -m tests.benchmarks.gguf_looped --checkpoint=CKPT [--kinds=f32,q8_0] [--tokens=128] \\
        [--threads=1] [--rounds=5] [--prompt="The capital of France is"]

CKPT is a checkpoint that a looped file can hold: a Llama with rank 0 and tied norms (or a vanilla
model, of which there is only the one file). xllamacpp has to be installed. Prints a JSON row per
kind: sizes, whether both files give the same greedy text, and medians over the rounds of the tokens
per second that llama.cpp reports. The files take turns, one server after the other: an idle one
still takes a processor.
"""

import argparse
import gc
import json
import pathlib
import statistics
import tempfile

import xllamacpp

from recursive_jax.model import load
from recursive_jax.weights import gguf_writer


def answer(path: pathlib.Path, args: argparse.Namespace) -> tuple[str, float, float]:
    """Text, and tokens per second of the answer and of the prompt, from a server of its own."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel, params.n_ctx, params.n_gpu_layers = 1, args.context, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    params.verbosity = -1
    server = xllamacpp.Server(params)
    found = server.handle_completions(
        {
            "prompt": args.prompt,
            "n_predict": args.tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
    )
    assert found["usage"]["completion_tokens"] == args.tokens, found["usage"]
    timings = found["timings"]
    return (
        found["choices"][0]["text"],
        timings["predicted_per_second"],
        timings["prompt_per_second"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--kinds", default="f32,q8_0")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--prompt", default="The capital of France is")
    args = parser.parse_args()

    model = load(args.checkpoint)
    layouts = {"unrolled": model.untie() if model.cfg.num_loops > 1 else model}
    if model.cfg.num_loops > 1:
        layouts = {"looped": model, **layouts}
    for kind in args.kinds.split(","):
        with tempfile.TemporaryDirectory() as directory:
            paths = {name: pathlib.Path(directory) / f"{name}.gguf" for name in layouts}
            for name, path in paths.items():
                layout = layouts[name]
                gguf_writer.save(layout.params, layout.cfg, layout.tokenizer, path, kind=kind)
            texts, rates, prompts = {}, {n: [] for n in paths}, {n: [] for n in paths}
            for turn in range(args.rounds + 1):  # the first round reads the files from the disk
                for name, path in paths.items():
                    texts[name], rate, prompt = answer(path, args)
                    gc.collect()  # ends the server
                    if turn:
                        rates[name].append(rate)
                        prompts[name].append(prompt)
            sizes = {name: path.stat().st_size for name, path in paths.items()}
        row = {
            "result": "looped against unrolled GGUF",
            "checkpoint": args.checkpoint,
            "loops": model.cfg.num_loops,
            "kind": kind,
            "tokens": args.tokens,
            "threads": args.threads,
            "rounds": args.rounds,
            "bytes": sizes,
            "tokens_per_second": {n: round(statistics.median(r), 2) for n, r in rates.items()},
            "prompt_per_second": {n: round(statistics.median(r), 2) for n, r in prompts.items()},
            "xllamacpp": xllamacpp.__version__,
        }
        if "looped" in paths:
            speed = row["tokens_per_second"]
            row["same_text"] = texts["looped"] == texts["unrolled"]
            row["size_ratio"] = round(sizes["looped"] / sizes["unrolled"], 3)
            row["speed_ratio"] = round(speed["looped"] / speed["unrolled"], 3)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
