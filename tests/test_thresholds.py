"""thresholds.json: for the weights they were calibrated on, or refused."""

import json

import jax
import pytest

from recursive_jax import generation
from recursive_jax.decoding.config import EngineConfig
from recursive_jax.decoding.exit_measures import Cosine
from recursive_jax.decoding.thresholds import Thresholds
from recursive_jax.model import load
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.parameters import init_params
from recursive_jax.text import load_tokenizer
from recursive_jax.weights import checkpoint
from recursive_jax.weights.source import ASSETS

CFG = DecoderConfig(
    "llama", 4096, 8, 8, num_heads=2, num_kv_heads=1, head_dim=4, num_layers=1, num_loops=2
)
GOOD = Thresholds("cosine", (0.9, 0.8), 0.01, "docstrings", "2026-01-02", step=30, params=7)


def test_no_flipped_bit_goes_unseen(tmp_path):
    GOOD.save(tmp_path)
    path = tmp_path / Thresholds.FILE
    data = path.read_bytes()
    for place in range(len(data)):
        for bit in (0, 3, 6):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
            try:
                assert Thresholds.load(tmp_path) == GOOD  # white space
            except ValueError as error:
                assert "calibrate again" in str(error)


def test_a_file_that_names_no_weights_is_refused(tmp_path):
    GOOD.save(tmp_path)
    path = tmp_path / Thresholds.FILE
    record = json.loads(path.read_text())
    for name in ("step", "params", "checksum"):
        path.write_text(json.dumps({k: v for k, v in record.items() if k != name}))
        with pytest.raises(ValueError, match=f"{path}.*calibrate again"):
            Thresholds.load(tmp_path)


def test_thresholds_are_for_the_weights_they_were_calibrated_on(tmp_path):
    checkpoint.create(tmp_path, CFG, load_tokenizer(ASSETS / "tiny"))
    writer = checkpoint.Writer(tmp_path, keep=3)
    params = {seed: init_params(CFG, jax.random.key(seed)) for seed in (0, 1)}
    writer.save(10, params[0], wait=True)
    step, checksum = checkpoint.params_checksum(tmp_path)
    assert step == 10
    Thresholds("cosine", (0.9,), 0.01, "a text", "2026-01-02", step, checksum).save(tmp_path)
    model = load(tmp_path)
    model.thresholds.check_current()
    config = generation.with_thresholds(EngineConfig(measure=Cosine()), model)
    assert config.thresholds == (0.9,)
    own = EngineConfig(measure=Cosine(0.5))
    assert generation.with_thresholds(own, model) == own
    assert model.weights.step == 10
    writer.save(20, params[1], wait=True)
    writer.save(30, params[0], wait=True)
    writer.close()
    with pytest.raises(ValueError, match="on step 10, and step 20 has other weights; calibrate"):
        load(tmp_path, step=20).thresholds.check_current()
    with pytest.raises(ValueError, match="step 20 has other weights"):
        load(tmp_path, step=20).generate("a", exits=Cosine())
    for step in (10, 30):  # the same weights
        load(tmp_path, step).thresholds.check_current()
    assert load(tmp_path, 20).weights.step == 20
    with pytest.raises(FileNotFoundError, match="no saved step 15 in .*; there are 10, 20, 30"):
        load(tmp_path, 15)
    with pytest.raises(ValueError, match="step=3 of tiny, which is no checkpoint"):
        load("tiny", 3)
