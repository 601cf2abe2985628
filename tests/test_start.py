"""What a resumed run must have started from: nothing that has not changed is refused."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import tiny_smoke
from recursive_jax import load, start
from recursive_jax.weights import checkpoint
from recursive_jax.weights.source import ASSETS


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
    start.check_recipe(workdir, recipe_of(config_of(source, lora_rank="full")))
    with pytest.raises(ValueError, match="model was .*'full'.*, now .*'lora_rank': 4"):
        start.check_recipe(workdir, recipe_of(config_of(source, lora_rank=4)))


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
