"""A model that is loaded from a run stays at its step, whatever a training does there meanwhile."""

import gc

import jax
import jax.numpy as jnp
import pytest
from checkpoints import flip

from recursive_jax import load
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.parameters import abstract_params
from recursive_jax.text import load_tokenizer
from recursive_jax.weights import checkpoint
from recursive_jax.weights.source import ASSETS
from recursive_jax.weights.stored import on_one_device

pytestmark = [  # Orbax leaves coroutines behind when it fails
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
CFG = DecoderConfig("llama", 4096, 8, 8, num_heads=2, num_kv_heads=1, head_dim=4, num_layers=1)


def save(run, step, keep=2):
    """One more step of a training; all its weights have the value of its number."""
    writer = checkpoint.Writer(run, keep=keep)
    writer.save(
        step, jax.tree.map(lambda x: jnp.full(x.shape, step, x.dtype), abstract_params(CFG))
    )
    writer.close()


def value_of(model):
    params = model.weights.load(on_one_device(CFG), jnp.float32)
    values = {float(x) for leaf in jax.tree.leaves(params) for x in (leaf.min(), leaf.max())}
    assert len(values) == 1
    return values.pop()


@pytest.fixture
def run(tmp_path):
    """A checkpoint with steps 1 and 2."""
    checkpoint.create(tmp_path / "run", CFG, load_tokenizer(ASSETS / "tiny"))
    for step in (1, 2):
        save(tmp_path / "run", step)
    return tmp_path / "run"


def test_every_use_reads_one_step(run):
    model = load(run)
    before = model.weights.content()
    save(run, 3, keep=3)
    assert value_of(load(run)) == 3 and value_of(model) == 2
    assert model.weights.content() == before != load(run).weights.content()


def test_a_step_that_a_training_has_removed(run):
    model, older = load(run), load(run, step=1)
    for step in (3, 4):
        save(run, step)
    words = "step 2 of .*run was the newest when the model was loaded.* newest step is 4 now"
    for use in (value_of, lambda model: model.weights.content()):
        with pytest.raises(FileNotFoundError, match=words):
            use(model)
    with pytest.raises(FileNotFoundError, match="no saved step 1 in .*; there are 3, 4"):
        value_of(older)


def test_a_damaged_step(run, capfd):
    """The step before it is used, also later, when a training has saved the damaged one again."""
    file = max((run / "checkpoints/2/params/d").iterdir(), key=lambda p: p.stat().st_size)
    file.write_bytes(flip(file.read_bytes()))
    model, exact = load(run), load(run, step=2)
    with pytest.raises(ValueError, match="checkpoints/2 is (corrupt|damaged)"):
        value_of(exact)
    assert value_of(model) == 1
    assert "its directory is now 2.damaged. Step 1 is used" in capfd.readouterr().err
    save(run, 2)
    assert value_of(model) == 1 and value_of(load(run)) == 2
    gc.collect()  # while their warnings are ignored
