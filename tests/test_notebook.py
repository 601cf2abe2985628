"""The notebook runs from top to bottom."""

import os
import pathlib

import commands
import pytest
from evaluated import write_tasks

NOTEBOOK = pathlib.Path(__file__).parents[1] / "launch" / "colab.ipynb"
TINY = {
    "RJ_SOURCE": "tiny", "RJ_TEXT": "docstrings:1", "RJ_TOKENS": "8192",
    "RJ_CALIBRATION": "512", "RJ_TASK": "arc_easy", "RJ_ITEMS": "2",
}  # fmt: skip


@pytest.fixture
def notebook():
    nbformat = pytest.importorskip("nbformat", reason="pip install nbclient ipykernel")
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_stored_without_outputs(notebook):
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_every_cell_runs(notebook, tmp_path, monkeypatch):
    """On the embedded model, a few steps, and a task from a file."""
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    for package in ("ipykernel", "matplotlib", "lm_eval"):
        pytest.importorskip(package)
    root = NOTEBOOK.parents[1]
    paths = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    settings = TINY | {"RJ_TASK_DIR": str(write_tasks(tmp_path / "tasks"))}
    for name, value in (
        commands.environment() | settings | {"TMPDIR": str(tmp_path), "PYTHONPATH": paths}
    ).items():
        monkeypatch.setenv(name, value)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute(cwd=tmp_path)
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 2, "what sharing loses, and the loss"
    for words in ("rank 16", "perplexity", "depth-wise", "sequence-wise", "arc_easy", "model.zip"):
        assert words in printed
    assert (next(tmp_path.glob("recursive-*")) / "hf" / "config.json").exists()
