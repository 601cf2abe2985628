"""What a resumed run must have started from: nothing that has not changed is refused."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import tiny_smoke
from recursive_jax import load, start
from recursive_jax.model import Model
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.parameters import init_params
from recursive_jax.weights import checkpoint
from recursive_jax.weights.source import ASSETS
from recursive_jax.weights.stored import ArrayWeights


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    place = tmp_path_factory.mktemp("start") / "model"
    shutil.copytree(ASSETS / "tiny", place)
    return place


def config_of(source, **model):
    config = tiny_smoke.get_config()
    config.source = str(source)
    for name, value in model.items():
        config.model[name] = value
    return config


def recipe_of(config):
    return start.make_recipe(config, load(config.source))


@pytest.fixture
def workdir(source, tmp_path):
    """A run with the recipe of `config_of(source)`, as `fit` writes it."""
    model = load(source)
    checkpoint.create(
        tmp_path / "run", model.cfg, model.tokenizer, recipe=recipe_of(config_of(source))
    )
    return tmp_path / "run"


def test_a_source_may_move(source, workdir, tmp_path):
    """What is compared is the content. The path alone would refuse all three of these."""
    began_with = recipe_of(config_of(source))
    moved = shutil.copytree(source, tmp_path / "elsewhere")
    for spec in (f"{source}/", moved, f"{moved}/."):
        recipe = recipe_of(config_of(spec))
        assert recipe["source"] != began_with["source"]
        assert recipe["source_content"] == began_with["source_content"]
        start.check_recipe(workdir, recipe)  # raises for a run of another model


def test_another_content_under_the_same_path_is_another_model(source, workdir, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(source, other)
    before = recipe_of(config_of(other))
    file = next(other.glob("*.safetensors"))
    tensors = load_file(file)
    tensors = {name: np.asarray(x + np.asarray(0.5, x.dtype)) for name, x in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"source was .*{source}.*, now .*other"):
        start.check_recipe(workdir, recipe_of(config_of(other)))
    model = load(source)
    checkpoint.create(tmp_path / "run of other", model.cfg, model.tokenizer, recipe=before)
    start.check_recipe(tmp_path / "run of other", before)
    with pytest.raises(ValueError, match="source_content was .*, now "):
        start.check_recipe(tmp_path / "run of other", recipe_of(config_of(other)))


def test_a_record_of_an_older_version_is_understood(source, workdir):
    """It had '' for None, -1 for 'full', no fingerprint and fewer keys."""
    record = json.loads((workdir / checkpoint.CONFIG).read_text())
    record["recipe"] = {
        "source": str(source), "init_from": "", "scratch": {},
        "model": {"num_loops": 2, "method": "", "lora_init": "", "lora_rank": -1,
                  "norms": "per_loop", "rounding": "even", "reduced_baseline": False},
    }  # fmt: skip
    del record["checksum"]  # the oldest checkpoints have none
    (workdir / checkpoint.CONFIG).write_text(json.dumps(record))
    for lora_init in (None, "svd"):  # its default was svd
        same = config_of(source, lora_rank="full", lora_init=lora_init, calibrate="docstrings:3")
        start.check_recipe(workdir, recipe_of(same))
    with pytest.raises(ValueError, match="model was .*'full'.*, now .*'lora_rank': 4"):
        start.check_recipe(workdir, recipe_of(config_of(source, lora_rank=4)))
    with pytest.raises(ValueError, match="lora_init.* 'svd'.*, now .*'lora_init': 'joint'"):
        other = config_of(source, lora_rank="full", lora_init="joint")
        start.check_recipe(workdir, recipe_of(other))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_loops": 3}, "model was {'num_loops': 2}, now {'num_loops': 3}"),
        ({"norms": "tied"}, "model was {'norms': 'per_loop'}, now {'norms': 'tied'}"),
        ({"reduced_baseline": True}, "'reduced_baseline': True"),
    ],
)
def test_another_recipe_is_refused_with_both_values(source, workdir, changes, message):
    with pytest.raises(ValueError, match=message):
        start.check_recipe(workdir, recipe_of(config_of(source, **changes)))


# A run that starts from a checkpoint


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A checkpoint to start from."""
    place = tmp_path_factory.mktemp("first") / "run"
    Model(CFG, load("tiny").tokenizer, ArrayWeights(random_params(0)), "first").save(place)
    return place


CFG = DecoderConfig("llama", 4096, 32, 64, num_heads=2, num_kv_heads=2, head_dim=16, num_layers=2)


def random_params(seed):
    return init_params(CFG, jax.random.key(seed))


def recipe_from(checkpoint_directory):
    config = tiny_smoke.get_config()
    config.source, config.init_from = "", str(checkpoint_directory)
    return start.make_recipe(config, None)


def test_a_checkpoint_to_start_from_may_move(first, tmp_path, monkeypatch):
    run = tmp_path / "run"
    checkpoint.create(run, CFG, recipe=recipe_from(first))
    monkeypatch.chdir(first.parent)
    for spec in (f"{first}/", "run", shutil.copytree(first, tmp_path / "elsewhere")):
        recipe = recipe_from(spec)
        assert recipe["init_from_content"] == recipe_from(first)["init_from_content"] is not None
        start.check_recipe(run, recipe)  # raises for a run of another model
    moved = recipe_from(first.rename(tmp_path / "moved"))
    gone = recipe_from(first)
    (tmp_path / "moved").rename(first)
    assert moved["init_from"] != gone["init_from"] and gone["init_from_content"] is None
    start.check_recipe(run, moved)
    start.check_recipe(run, gone)  # the run has its own weights


def test_a_checkpoint_of_other_content_is_refused(first, tmp_path):
    place, run = tmp_path / "first", tmp_path / "run"
    checkpoint.create(run, CFG, recipe=recipe_from(shutil.copytree(first, place)))
    older = recipe_from(place)
    older.pop("init_from_content", None)  # an older version did not record it
    checkpoint.create(tmp_path / "older", CFG, recipe=older)
    shutil.rmtree(place)
    Model(CFG, load("tiny").tokenizer, ArrayWeights(random_params(1)), "other").save(place)
    with pytest.raises(ValueError, match="init_from_content was .*, now "):
        start.check_recipe(run, recipe_from(place))
    start.check_recipe(tmp_path / "older", recipe_from(place))
    shutil.move(place, tmp_path / "other")
    with pytest.raises(ValueError, match="init_from was '.*first', now '.*other'"):
        start.check_recipe(run, recipe_from(tmp_path / "other"))
