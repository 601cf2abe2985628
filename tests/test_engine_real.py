"""The engine on real weights and real text: SmolLM2-135M folded, at full rank, so that its full
depth is the source's."""

import functools
import pydoc_data.topics

import jax
import numpy as np
import pytest
from decode_models import make_engine
from test_engine import as_recorded, follows, serve

from recursive_jax.cpu.decoder import CpuModel
from recursive_jax.decoding.exit_measures import Recorded
from recursive_jax.decoding.requests import Request, Sampling
from recursive_jax.weights import tying
from recursive_jax.weights.source import open_source
from recursive_jax.weights.tie_config import TieConfig

pytestmark = pytest.mark.slow
CONTEXT, PROMPTS = 64, ("assert", "class", "exprlists", "import", "lambda", "while")


@functools.cache
def folded(path):
    source = open_source(path)
    params, cfg = tying.tie(source.params, source.cfg, TieConfig(2, "average", "svd", "full"))
    return jax.device_put(params), cfg, source.load_tokenizer()


def requests_on(tokenizer, cfg, count, recorded=False):
    """The beginnings of texts, 2 to 17 tokens long; every third answer is sampled."""
    rng = np.random.default_rng(0)
    requests = []
    for i, name in enumerate(PROMPTS):
        text = pydoc_data.topics.topics[name].split("\n", 3)[3].strip()
        tokens = tokenizer(text)["input_ids"][: 2 + 3 * i]
        loops = rng.integers(1, cfg.num_loops + 1, count).tolist() if recorded else ()
        sampling = Sampling(temperature=0.7 * (i % 3 == 2), top_k=20, seed=i)
        requests.append(Request(i, tokens, count, sampling=sampling, recorded_loops=loops))
    return requests


def engine_on(path, num_slots=4, **options):
    """As `generate` makes it for a long job on one CPU: the CPU model."""
    params, cfg, _ = folded(path)
    model = CpuModel(cfg)
    return make_engine(model, model.prepare(params), num_slots, CONTEXT, chunk_length=8, **options)


def test_full_depth_answers_as_transformers_does(smollm2):
    """Greedy, beside each other, against torch alone; no line of ours is in the reference."""
    torch = pytest.importorskip("torch", reason="transformers needs torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    ).eval()
    _, cfg, tokenizer = folded(smollm2)
    requests = [r for r in requests_on(tokenizer, cfg, 24) if not r.sampling.temperature]
    ours, _ = serve(engine_on(smollm2), requests, seed=1)
    for mine, request in zip(ours, requests, strict=True):
        prompt = torch.tensor([list(request.tokens)])
        with torch.no_grad():
            theirs = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                max_new_tokens=24, min_new_tokens=24, eos_token_id=None,
            )  # fmt: skip
        assert mine.tokens == theirs[0, prompt.shape[1] :].tolist()
        print(repr(tokenizer.decode([*request.tokens, *mine.tokens])))


@pytest.mark.parametrize("policy", ["complete", "propagate", "copy", "lossless"])
def test_exits_equal_one_request_at_a_time(smollm2, policy):
    params, cfg, tokenizer = folded(smollm2)
    lossless = policy == "lossless"
    missing_kv = "complete" if lossless else policy
    options = dict(measure=Recorded(), missing_kv=missing_kv, lossless=lossless)
    requests = requests_on(tokenizer, cfg, 12, recorded=True)
    ours, ticks = serve(engine_on(smollm2, **options), requests, seed=2)
    told = [mine.exit_loops for mine in ours]
    if lossless:  # a token's loops are those of its draft, if that was right
        assert sum(tick.drafted for tick in ticks) > 0 and sum(tick.dropped for tick in ticks) > 0
        for mine in ours:
            mine.exit_loops = [cfg.num_loops] * len(mine.tokens)
    leaves_of = (lambda request: lambda look: False) if lossless else as_recorded
    loops = follows(cfg, ours, requests, leaves_of, missing_kv, params, CONTEXT)
    assert lossless or set(loops) == {1, 2}
    print(f"{policy}: {len(loops)} tokens in {len(ticks)} ticks", told)
