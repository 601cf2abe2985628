"""Optional packages: where one is missing, one line says what, where and what to install."""

import ast
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from absl import flags

from recursive_jax import metrics, serve
from recursive_jax.text.documents import documents
from recursive_jax.weights import gguf
from recursive_jax.weights.source import open_source

ROOT = pathlib.Path(__file__).resolve().parents[1]
OPTIONAL = ["chex", "gguf", "matplotlib", "tensorboardX", "tensorflow_datasets", "zstandard"]


@pytest.fixture
def missing(monkeypatch):
    """missing(name): `import name` fails as where the package is not installed."""
    return lambda name: monkeypatch.setitem(sys.modules, name, None)


def one_line(error, *words):
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("open_", [gguf.load_config, gguf.load_tokenizer, open_source])
def test_a_gguf_file_without_gguf(open_, missing, tmp_path):
    path = tmp_path / "model.gguf"
    missing("gguf")
    with pytest.raises(FileNotFoundError, match="model.gguf"):
        open_(str(path))
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a GGUF file"):
        open_(str(path))
    path.write_bytes(b"GGUF and more")
    with pytest.raises(ValueError) as error:
        open_(str(path))
    one_line(error, str(path), "not installed", "pip install 'recursive_jax[gguf]'")


def test_compressed_text_without_zstandard(missing, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    missing("zstandard")
    assert [text for _, text in documents(str(tmp_path))] == ["text"]
    path = tmp_path / "b.jsonl.zst"
    path.write_bytes(b"")
    for source in (path, tmp_path):
        with pytest.raises(ValueError) as error:
            documents(str(source))  # before anything is read
        one_line(error, str(path), "not installed", "pip install 'recursive_jax[train]'")


def test_a_tfds_data_set_without_tfds(missing, tmp_path):
    missing("tensorflow_datasets")
    (tmp_path / "dataset_info.json").write_text("{}")
    for source in ("tfds:lm1b", str(tmp_path)):
        with pytest.raises(ValueError) as error:
            documents(source)
        one_line(error, source, "not installed", "pip install 'recursive_jax[tfds]'")


def test_without_tensorboardx_the_numbers_are_written_all_the_same(missing, tmp_path, caplog):
    missing("tensorboardX")
    writer = metrics.MetricWriter(tmp_path)
    writer.write(1, {"train/loss": 0.5})
    writer.write(2, {"train/loss": np.float32(0.25)})
    writer.close()
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [(r["step"], r["train/loss"]) for r in lines] == [(1, 0.5), (2, 0.25)]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    (record,) = caplog.records
    message = record.getMessage()
    assert "TensorBoard" in message and "pip install 'recursive_jax[train]'" in message
    assert record.levelname == "WARNING" and "\n" not in message


def test_the_jobs_need_no_optional_package():
    """Of a process in which none of them can be imported: the jobs load, and so does a model."""
    program = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({OPTIONAL}))\n"
        "import recursive_jax.train, recursive_jax.generate\n"
        "from recursive_jax.weights.source import open_source\n"
        "print(open_source('tiny').load_tokenizer().decode([5]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_extra_that_is_named_exists():
    """A hint, a skip reason, a script or the README may not name an extra that setup.py lacks."""
    named = {}
    for directory in ("recursive_jax", "tests", "launch"):
        for file in (ROOT / directory).rglob("*"):
            if file.suffix in (".py", ".sh"):
                for names in re.findall(r"recursive_jax\[([a-z0-9,]+)\]", file.read_text()):
                    named |= dict.fromkeys(names.split(","), file)
    readme = ROOT / "README.md"
    for group in re.findall(r"extras ((?:`\[[a-z0-9]+\]`,? ?)+)", readme.read_text()):
        named |= dict.fromkeys(re.findall(r"\[([a-z0-9]+)\]", group), readme)
    assert {"gguf", "train", "tfds", "plot", "hub"} <= set(named)
    setup = ast.walk(ast.parse((ROOT / "setup.py").read_text()))
    keys = [key for node in setup if isinstance(node, ast.Dict) for key in node.keys]
    offered = {key.value for key in keys if isinstance(key, ast.Constant)}
    for name, file in named.items():
        assert name in offered, f"{file} names [{name}]"


def test_an_installed_package_has_the_configs(tmp_path):
    """Built as a wheel is: configs/ goes into the package, and `--config=NAME` finds it there."""
    pytest.importorskip("setuptools", reason="pip install setuptools builds the package")
    files = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "configs", "recursive_jax")
    for name in files:
        place = ROOT / name
        copy = shutil.copytree if place.is_dir() else shutil.copy
        copy(place, tmp_path / name)
    built = tmp_path / "built"
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", f"--build-lib={built}"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (built / "recursive_jax" / "cpu" / "kernels" / "vectors.h").is_file()
    program = (
        "from recursive_jax.console import config_files\n"
        "(argument,) = config_files.resolve(['--config=gemma_rrt:paper'])\n"
        "file = argument.partition('=')[2].removesuffix(':paper')\n"
        "config_files.make_importable(file)\n"
        "import runpy; print(file, runpy.run_path(file)['get_config']('paper').tokens)\n"
    )
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "elsewhere", capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(built)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        str(built / "recursive_jax" / "configs" / "gemma_rrt.py"), "60000000000"
    ]  # fmt: skip


def test_serve_without_its_extra(missing, monkeypatch):
    for name in [n for n in sys.modules if n.startswith("recursive_jax.serving")]:
        monkeypatch.delitem(sys.modules, name)
    missing("starlette")
    missing("uvicorn")
    values = flags.FlagValues()
    serve.define_flags(values)
    values(["serve", "--checkpoint=tiny"])
    with pytest.raises(ValueError) as error:
        serve.run(values)
    one_line(error, "uvicorn", "not installed", "pip install 'recursive_jax[serve]'")
