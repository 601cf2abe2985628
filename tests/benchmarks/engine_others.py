"""Full depth against others on the same weights: transformers' generate, llama.cpp.

    python tests/benchmarks/engine_others.py --model=DIR [--gguf=FILE]

DIR is a Hugging Face directory. --gguf adds llama.cpp (xllamacpp has to be installed) on that file
as it is, and on its weights as float32. The source itself runs, all layers in one loop, float32,
equal prompts and lengths, `--slots` at once. Prints JSON rows; rounds take turns, medians are
compared.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gc
import os
import pathlib
import statistics
import tempfile
import time

import numpy as np
from engine import make, parser, recursive, requests, row, serve

from recursive_jax.analysis import timing
from recursive_jax.decoding.requests import Request

FILE_TYPE = "general.file_type"


def against_torch(args):
    """Benchmark 3: the source itself, all layers, equal prompts and lengths."""
    import torch
    from transformers import AutoModelForCausalLM

    model, params = recursive(args.model, 1, 0)
    todo = requests(args.requests, args.prompt, args.new, model.cfg.vocab_size)
    engine = make(model, params, args)
    theirs = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    batches = torch.tensor([r.tokens for r in todo]).split(args.slots)
    options = dict(do_sample=False, min_new_tokens=args.new, max_new_tokens=args.new)

    def torch_rate():
        began = time.perf_counter()
        with torch.inference_mode():
            for ids in batches:
                out = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
                assert out.shape[1] == args.prompt + args.new
        return len(todo) * args.new / (time.perf_counter() - began)

    rates = {"ours": [], "torch": []}
    for _ in range(args.rounds + 1):
        ours, stats = serve(engine, todo)
        rates["ours"].append(ours)
        rates["torch"].append(torch_rate())
    rate = {w: round(statistics.median(r[1:]), 1) for w, r in rates.items()}  # the first warms up
    ratio = round(rate["ours"] / rate["torch"], 3)
    parts = timing.measure(engine).to_json() | {"ticks": stats.ticks}
    row(args, "engine against torch", rank=0, tokens_per_second=rate, ratio=ratio, parts=parts)


def against_llama_cpp(args):
    """Benchmark 3 against llama.cpp: --gguf as it is, and its weights as float32.

    One server after the other: an idle one still takes a processor.
    """
    model, params = recursive(args.gguf, 1, 0)
    equal = requests(args.requests, args.prompt, args.new, model.cfg.vocab_size)
    lengths = np.random.default_rng(4).integers(args.new // 4, 7 * args.new // 4, len(equal))
    mixed = [
        dataclasses.replace(r, max_new_tokens=int(n)) for r, n in zip(equal, lengths, strict=True)
    ]
    args.context = max(args.context, args.prompt + 2 * args.new)
    engine = make(model, params, args)
    with tempfile.TemporaryDirectory() as directory:
        exact = pathlib.Path(directory) / "f32.gguf"
        dequantised(args.gguf, exact)
        files = (("f32", exact), ("as it is", args.gguf))
        answers = (("equal", equal), ("mixed", mixed))
        serve(engine, equal[: args.slots])  # warms up
        cases = [(*file, *case) for file in files for case in answers]
        for name, path, length, todo in cases:
            rates = {"ours": [], "llama.cpp": []}
            for _ in range(args.rounds):
                rates["ours"].append(serve(engine, todo)[0])
                server = llama_server(path, args)
                llama_rate(server, todo[: args.slots])
                rates["llama.cpp"].append(llama_rate(server, todo))
                del server
                gc.collect()
            rate = {w: round(statistics.median(r), 1) for w, r in rates.items()}
            ratio = round(rate["ours"] / rate["llama.cpp"], 3)
            row(
                args,
                "engine against llama.cpp",
                rank=0,
                weights=name,
                lengths=length,
                tokens_per_second=rate,
                ratio=ratio,
            )


def dequantised(source: str, out: pathlib.Path) -> None:
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, reader.get_field("general.architecture").contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", FILE_TYPE):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, data.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_server(path, args):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel, params.n_ctx = args.slots, args.slots * args.context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count()
    params.verbosity = -1
    return xllamacpp.Server(params)


def llama_rate(server, todo: list[Request]) -> float:
    def answer(request):
        found = server.handle_completions(
            {
                "prompt": list(request.tokens),
                "n_predict": request.max_new_tokens,
                "temperature": 0.0,
                "ignore_eos": True,
                "cache_prompt": False,
            }
        )
        return found["usage"]["completion_tokens"]

    with concurrent.futures.ThreadPoolExecutor(len(todo)) as pool:
        began = time.perf_counter()
        counts = list(pool.map(answer, todo))
        seconds = time.perf_counter() - began
    assert counts == [r.max_new_tokens for r in todo], counts
    return sum(counts) / seconds


def main():
    options = parser(__doc__)
    options.add_argument("--gguf", help="a model for llama.cpp")
    args = options.parse_args()
    against_torch(args)
    if args.gguf:
        against_llama_cpp(args)


if __name__ == "__main__":
    main()
