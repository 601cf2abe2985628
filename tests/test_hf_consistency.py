"""The same weights give the same logits here and in transformers on torch, both ways."""

import json
import pathlib
import pydoc_data.topics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import cases
from golden.transformers_4 import write

from recursive_jax.models.decoder import Decoder
from recursive_jax.weights import hf

torch = pytest.importorskip("torch", reason="parity with transformers needs torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

# Of the logit scale, max |logit|; f32 noise is 1e-6, and gelu differs from its tanh form by 5e-5.
TOLERANCE = 1e-5


def torch_model(name, settings=None):
    """A tiny transformers model with the seeded weights of `cases`; `settings` instead of its."""
    kind, own = cases.CASES[name]
    settings = settings or own
    config = transformers.AutoConfig.for_model(kind, **settings)
    return seeded(
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    )


def seeded(model):
    kind = model.config.model_type
    with torch.no_grad():
        for key, value in model.named_parameters():
            value.copy_(torch.from_numpy(cases.weight(key, tuple(value.shape), kind)))
    return model.eval()


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(tokens))).logits.float().numpy()


def our_logits(path, tokens, cfg=None, dtype=jnp.float32):
    cfg = cfg or hf.load_config(path)
    model = Decoder(cfg, dtype)

    @jax.jit
    def run(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        hidden = model.apply({"params": params}, tokens, positions)
        return model.apply({"params": params}, hidden, method="unembed")

    return np.asarray(run(hf.load_params(path, cfg), jnp.asarray(tokens)))


def assert_close(ours, theirs, tolerance=TOLERANCE):
    difference, scale = np.abs(ours - theirs).max(), np.abs(theirs).max()
    assert difference <= tolerance * scale, f"max |Δlogit| {difference:.3e} of scale {scale:.3e}"
    return difference / scale


@pytest.mark.parametrize("name", cases.CASES)
def test_logits_equal_those_of_transformers(name, tmp_path):
    model = torch_model(name)
    tokens = cases.tokens(model.config.vocab_size, batch=2)
    model.save_pretrained(tmp_path)
    assert_close(our_logits(tmp_path, tokens), torch_logits(model, tokens))


@pytest.mark.parametrize("name", cases.CASES)
def test_what_we_write_loads_in_transformers(name, tmp_path):
    """HF -> ours -> HF: transformers finds every weight, unchanged, and computes the same."""
    model = torch_model(name)
    model.save_pretrained(tmp_path / "theirs")
    cfg = hf.load_config(tmp_path / "theirs")
    hf.save_params(hf.open_params(tmp_path / "theirs", cfg), cfg, tmp_path / "ours")
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    for key, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key
    tokens = cases.tokens(model.config.vocab_size)
    # not bitwise: the same activation may come back under its other name
    assert_close(torch_logits(back, tokens), torch_logits(model, tokens), tolerance=1e-6)


def log_probs(logits):
    return np.asarray(jax.nn.log_softmax(jnp.asarray(logits)))


_YARN = dict(rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=16)


@pytest.mark.parametrize(
    "name, rope",
    [
        ("llama_gqa_llama3_rope", _YARN),
        ("qwen2_last_layers_local", _YARN | {"mscale": 1.5, "mscale_all_dim": 0.5}),
        (
            "gpt_neox_parallel",
            _YARN
            | {"partial_rotary_factor": 0.5, "truncate": False}
            | {"attention_factor": 0.8, "beta_fast": 4, "beta_slow": 2},
        ),
    ],
)
def test_yarn_gives_the_log_probabilities_of_transformers(name, rope, tmp_path):
    kind, settings = cases.CASES[name]
    model = torch_model(name, settings | {"rope_parameters": dict(rope)})
    model.save_pretrained(tmp_path)
    tokens = cases.tokens(model.config.vocab_size)
    theirs = torch_logits(model, tokens)
    np.testing.assert_allclose(
        log_probs(our_logits(tmp_path, tokens)), log_probs(theirs), rtol=0, atol=1e-4
    )
    plain = torch_model(name, settings | {"rope_parameters": {**rope, "rope_type": "default"}})
    assert np.abs(torch_logits(plain, tokens) - theirs).max() > 0.01  # the scaling is felt


def test_gpt_neox_as_transformers_4_saved_it(tmp_path):
    """Its rope settings are there twice; transformers reads the same model in them as we do."""
    saved = json.loads((pathlib.Path(write.__file__).parent / "configs.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved["gpt_neox 4.57.6"]))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    model = seeded(transformers.AutoModelForCausalLM.from_config(config))
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(saved["gpt_neox 4.57.6"]))
    tokens = cases.tokens(config.vocab_size)
    np.testing.assert_allclose(
        log_probs(our_logits(tmp_path, tokens)),
        log_probs(torch_logits(model, tokens)),
        rtol=0,
        atol=1e-4,
    )


@pytest.mark.parametrize("name", ["llama_mqa_tied_biases", "gpt_neox_sequential"])
def test_a_model_saved_without_its_head(name, tmp_path):
    """AutoModel leaves out the prefix of its names; transformers reads both as one causal LM."""
    whole = torch_model(name)
    assert whole.config.tie_word_embeddings
    whole.base_model.save_pretrained(tmp_path)
    tokens = cases.tokens(whole.config.vocab_size)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    theirs = torch_logits(theirs.eval(), tokens)
    assert_close(theirs, torch_logits(whole, tokens))
    assert_close(our_logits(tmp_path, tokens), theirs)


def test_a_multimodal_model_saved_without_its_head(tmp_path):
    kind, settings = cases.CASES["gemma3_local_global"]
    model = torch_model("gemma3_local_global")
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    state = load_file(tmp_path / "model.safetensors")
    renamed = {f"language_{k}": v for k, v in state.items()}
    renamed = {k.replace("language_model.model.", "language_model."): v for k, v in renamed.items()}
    assert "language_model.norm.weight" in renamed
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tokens = cases.tokens(settings["vocab_size"])
    assert_close(our_logits(tmp_path, tokens), torch_logits(model, tokens))


@pytest.mark.parametrize("wrapped", ["save_pretrained", "nested names"])
def test_multimodal_gemma3_gives_its_text_model(wrapped, tmp_path):
    kind, settings = cases.CASES["gemma3_local_global"]
    vision = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config = transformers.Gemma3Config(
        text_config=settings | {"model_type": kind},
        vision_config=vision | dict(image_size=16, patch_size=8),
        mm_tokens_per_image=4,
    )
    config._attn_implementation = "eager"
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            value.copy_(torch.from_numpy(cases.weight(key, tuple(value.shape), kind)))
    model.save_pretrained(tmp_path)
    if wrapped == "nested names":  # the other spelling, of transformers 4.52 and later
        from safetensors.torch import save_file

        state = {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
        assert any(k.startswith("model.language_model.") for k in state)
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tokens = cases.tokens(settings["vocab_size"])
    assert hf.load_config(tmp_path).family == "gemma3"
    with torch.no_grad():
        ids = torch.from_numpy(tokens)
        theirs = model(ids, token_type_ids=torch.zeros_like(ids)).logits.numpy()
    assert_close(our_logits(tmp_path, tokens), theirs)


def test_half_precision_rounds_as_much_as_transformers_does(tmp_path):
    """bf16 compute: our distance from f32 is of the size of transformers' own."""
    model = torch_model("llama_gqa_llama3_rope")
    model.save_pretrained(tmp_path)
    tokens = cases.tokens(model.config.vocab_size, batch=2)
    exact = torch_logits(model, tokens)
    theirs = np.abs(torch_logits(model.to(torch.bfloat16), tokens) - exact).mean()
    ours = np.abs(our_logits(tmp_path, tokens, dtype=jnp.bfloat16) - exact).mean()
    assert 0 < ours < 2 * theirs


# Real models, where their packages are installed.

TOKENS = 1024


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_real_model_on_real_text(name, request, tmp_path, full_compilation):
    """Weights as transformers saves them, 1024 tokens at once, f32; longer than Gemma's window."""
    source = request.getfixturevalue(name)
    kwargs = dict(gguf_file=source.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, **kwargs)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source.parent, dtype=torch.float32, attn_implementation="eager", **kwargs
    ).eval()
    text = " ".join(pydoc_data.topics.topics[k] for k in ("assert", "class", "exprlists", "import"))
    tokens = np.asarray(tokenizer(text)["input_ids"])[None, :TOKENS]
    assert tokens.shape[1] == TOKENS
    theirs = torch_logits(model, tokens)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    plain = type(model)(model.config)  # a model that forgot it came from a quantised file
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    plain.save_pretrained(tmp_path / "hf")
    del model, plain

    ours = our_logits(tmp_path / "hf", tokens)
    relative = assert_close(ours, theirs, tolerance=1e-4)
    agreement = (ours.argmax(-1) == theirs.argmax(-1)).mean()
    print(f"max |Δlogit| {relative:.2e} of the logit scale, top-1 agreement {agreement:.4%}")
    assert agreement >= 0.999
