"""What a run tells beside its losses: Weights & Biases, traces, and the cache of programs."""

import json
import os
import sys

import jax
import pytest

from recursive_jax import wandb_log
from recursive_jax.console import compile_cache
from recursive_jax.training.profile import Profile, profile_steps


def test_metrics_on_wandb_go_on_under_one_id(tmp_path, monkeypatch):
    """Offline, with the real package; its files are read back."""
    wandb = pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for step in (1, 2):
        writer = wandb_log.WandbWriter(tmp_path, "demo", {"seed": 3}, quiet=True)
        ids.append(wandb.run.id)
        assert wandb.run.project == "demo" and wandb.run.config["seed"] == 3
        writer.write(step, {"train/loss": 0.5 * step})
        assert wandb.run.summary["train/loss"] == 0.5 * step
        writer.close()
    assert ids == [json.loads((tmp_path / wandb_log.RUN).read_text())["id"]] * 2
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{ids[0]}"))) == 2


def test_wandb_that_is_not_installed_is_told(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    wandb_log.check("")
    with pytest.raises(ValueError, match="wandb='demo', but .* not installed: pip install wandb"):
        wandb_log.check("demo")


def test_a_login_that_fails_is_told_at_the_start(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="pip install wandb")
    wandb.teardown()  # it keeps the mode of the test before
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no netrc
    monkeypatch.setattr(sys, "stdin", open(os.devnull))
    with pytest.raises(ValueError, match="wandb: No API key configured.* WANDB_MODE=offline"):
        wandb_log.check("demo")


def test_a_trace_of_chosen_steps(tmp_path):
    said, x = [], jax.numpy.ones(4)
    profile = Profile((2, 3), str(tmp_path / "profile"), x.block_until_ready, said.append)
    for step in range(1, 6):
        profile.before_step(step)
        x = x + 1
        profile.on_step(step)
        assert len(said) == (step >= 3)
    profile.close()
    assert said[0].startswith(f"trace of steps 2 to 3: {tmp_path}/profile\n")
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1


def test_a_run_that_ends_within_a_trace_closes_it(tmp_path):
    profile = Profile((1, 9), str(tmp_path), lambda: None, print)
    profile.before_step(1)
    profile.close()
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1
    # JAX refuses a second trace while one runs.
    again = Profile((2, 2), str(tmp_path / "again"), lambda: None, print)
    again.before_step(2)
    again.close()
    assert len(list((tmp_path / "again").rglob("*.xplane.pb"))) == 1


@pytest.mark.parametrize("text", ["", "5", "5:", "a:b", "0:3", "4:3", "3:31", "1:2:3", "-1:2"])
def test_steps_that_cannot_be_traced_are_refused(text):
    assert profile_steps("5:5", 30) == (5, 5) and profile_steps("1:30", 30) == (1, 30)
    with pytest.raises(ValueError, match=f"--profile={text}; expected START:STOP.*from 1 to 30"):
        profile_steps(text, 30)


@pytest.fixture
def no_cache(monkeypatch):
    """As where nobody has chosen a cache; JAX's settings are put back."""
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()


def test_where_compiled_programs_are_kept(no_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kind = compile_cache.cpu_kind()
    if kind is None:
        pytest.skip("this system has no /proc/cpuinfo")
    assert compile_cache.use("auto") == f"{tmp_path}/recursive_jax/compiled/{kind}"
    assert compile_cache.use("auto", "/run/compiled") == f"/run/compiled/{kind}"
    assert compile_cache.use("/mine") == "/mine"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/theirs")
    jax.config.update("jax_compilation_cache_dir", "/theirs")  # JAX reads it when it is imported
    assert compile_cache.use("auto") == "/theirs"
    assert compile_cache.use("off") is None and not jax.config.jax_enable_compilation_cache


def test_the_users_cache_has_a_limit(no_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compile_cache, "MAX_BYTES", 250)
    directory = compile_cache.user_cache() / "kind"
    directory.mkdir(parents=True)
    for age in range(4):
        file = directory / f"{age}-cache"
        file.write_bytes(b"x" * 100)
        os.utime(file, (1000 - age, 1000 - age))
    compile_cache.use("auto")
    assert sorted(file.name for file in directory.iterdir()) == ["0-cache", "1-cache"]
