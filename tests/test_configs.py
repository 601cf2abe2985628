"""Configs load, say how they are run, and hold nothing the program would not understand."""

import ast
import pathlib
import runpy

import pytest

from configs import common
from recursive_jax.console import config_files
from recursive_jax.models.config import DecoderConfig
from recursive_jax.start import tie_config
from recursive_jax.training.config import DataConfig, TrainConfig
from recursive_jax.weights.tie_config import TieConfig

ROOT = pathlib.Path(__file__).resolve().parents[1]
NAMES = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem[0] != "_")
NAMES.remove("common")
ARGUMENTS = {  # what else their docstrings promise
    "gemma_rrt": ["paper", "gemma3_270m,loops=3,rank=full", "gemma2_2b,exits=0.1"],
    "llama_rrt": ["paper", "loops=11,rank=0"],
    "pythia_rrt": ["paper,exits=0.1"],
    "quickstart": ["loops=3,rank=8,tokens=1000", "paper"],
    "tiny_pretrain": ["tokens=1000"],
    "tiny_smoke": ["steps=5"],
}


def load(name, arg=None):
    """As config_flags does it: by path, with the argument as one string."""
    get_config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]
    return get_config() if arg is None else get_config(arg)


def keys(config, prefix=""):
    out = {}
    for key, value in config.items():
        if hasattr(value, "items") and f"{prefix}{key}" != "scratch":
            out |= keys(value, f"{prefix}{key}.")
        else:
            # a rank is a number, or full; what is None in the common config is a text elsewhere
            kind = str if value is None else type(value)
            out[f"{prefix}{key}"] = object if key == "lora_rank" else kind
    return out


CASES = [(name, arg) for name in NAMES for arg in (None, *ARGUMENTS.get(name, ()))]


@pytest.mark.parametrize(("name", "arg"), CASES)
def test_a_config_is_common_with_other_values(name, arg):
    """No key that `train` would not read, no type a flag could not set, no impossible value."""
    config = load(name, arg)
    assert keys(config) == keys(common.get_config())
    TrainConfig.from_mapping(config)
    if config.scratch:
        DecoderConfig.from_json(config.scratch.to_dict())
    tie_config(config)
    assert bool(config.source) != bool(config.scratch)
    assert not (config.objective.kd and config.scratch), "nothing to distil from"
    assert config.tokens >= config.data.batch_size * config.data.context_length or arg


@pytest.mark.parametrize("name", NAMES)
def test_a_config_opens_with_its_command(name):
    text = ast.get_docstring(ast.parse((ROOT / "configs" / f"{name}.py").read_text()))
    assert f"python -m recursive_jax.train --config=configs/{name}.py" in text
    assert "--workdir=" in text
    assert name in ARGUMENTS, "add the arguments of a new config to this test"


def test_defaults_are_those_of_the_dataclasses():
    """They are documented in both places and must not drift apart."""
    config = common.get_config().to_dict()
    assert TrainConfig.from_mapping(config) == TrainConfig()
    expected = TrainConfig().to_json()
    assert {name: config[name] for name in expected} == expected, "every setting is in configs/"
    model = config["model"]
    assert model.pop("reduced_baseline") is False
    assert model | {"seed": config["seed"]} == TieConfig().to_json()


def test_settings_are_changed_by_name():
    config = TrainConfig().with_changes(
        data=DataConfig(batch_size=4), context_length=32, learning_rate=1e-3, b1=0.8,
        **{"mesh.data": 2},
    )  # fmt: skip
    assert (config.data.batch_size, config.data.context_length) == (4, 32)
    assert (config.optimizer.learning_rate, config.optimizer.b1) == (1e-3, 0.8)
    assert (config.mesh.data, config.tokens_per_step) == (2, 128)
    assert config.objective == TrainConfig().objective
    with pytest.raises(ValueError, match="unknown training setting 'lr'; expected one of .*b1"):
        config.with_changes(lr=1)


@pytest.mark.parametrize("name", ["gemma_rrt", "llama_rrt", "pythia_rrt"])
def test_paper_settings(name):
    """Paper §3.6 and App. E: 60B tokens, 2M a step, lr 2e-4 with 800 steps of warm-up, CE + KL."""
    config = load(name, "paper,exits=0.1")
    assert config.tokens == 60_000_000_000
    assert config.data.context_length == 2048
    assert config.data.batch_size * config.data.context_length == 2**21
    assert (config.optimizer.learning_rate, config.optimizer.warmup_steps) == (2e-4, 800)
    assert (config.objective.ce, config.objective.kd) == (1.0, 1.0)
    assert config.objective.kd_loss == "forward_kl"
    assert config.objective.exit_coefficient == 0.1
    assert (config.model.num_loops, config.model.norms) == (2, "tied")


def test_arguments():
    defaults = {"paper": False, "loops": 2, "lr": 0.5, "name": "x"}

    def read(arg):
        return common.parse_arg(arg, **defaults).to_dict()

    assert read(None) == read("") == defaults
    assert read("paper") == defaults | {"paper": True}
    assert read("paper=false,loops=3,") == defaults | {"loops": 3}
    assert common.parse_arg("rank=full", rank=4).rank == "full"
    assert read("lr=1e-3,name=y") == defaults | {"lr": 1e-3, "name": "y"}
    with pytest.raises(ValueError, match="unknown config argument 'lops'; expected paper, loops"):
        read("lops=3")
    with pytest.raises(ValueError, match="config argument loops='three': expected int"):
        read("loops=three")
    with pytest.raises(ValueError, match="config argument paper='maybe': expected true or false"):
        read("paper=maybe")


def test_a_config_is_found_by_name_however_the_flag_is_written():
    path = str(ROOT / "configs" / "gemma_rrt.py")
    assert config_files.resolve(["train", "--config=gemma_rrt:paper"])[1:] == [
        f"--config={path}:paper"
    ]
    assert config_files.resolve(["train", "--config", "gemma_rrt"])[1:] == ["--config", path]
    for untouched in (["--config=elsewhere.py"], ["--config", "no_such"], ["--out", "gemma_rrt"]):
        assert config_files.resolve(["train", *untouched])[1:] == untouched


def test_an_unknown_setting_of_a_section_is_named():
    config = common.get_config()
    config.unlock()
    config.data.shuffel = 3
    with pytest.raises(ValueError, match=r"unknown settings \['shuffel'\] in data; expected some"):
        TrainConfig.from_mapping(config)
