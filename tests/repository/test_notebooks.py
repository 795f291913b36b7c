"""Every notebook runs from top to bottom in a fresh kernel."""

import os
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
ONE_DEVICE = "simulate = len(devices) == 1"  # how a notebook asks


def execute(path, folder, monkeypatch, replace=None):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("NPROC", raising=False)  # a notebook sees to that by itself
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # it computes for long
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if replace and cell.cell_type == "code":
            cell.source = cell.source.replace(*replace)
    resources = {"metadata": {"path": str(folder)}}  # where the kernel starts
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    return notebook


def texts(notebook):
    outputs = [o for c in notebook.cells for o in c.get("outputs", [])]
    return "".join(o.text for o in outputs if o.output_type == "stream")


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda p: p.stem
)
def test_notebook_runs(path, tmp_path, monkeypatch):
    notebook = execute(path, tmp_path, monkeypatch)
    assert not list(tmp_path.iterdir()), "a notebook leaves no files behind"
    if kept := os.environ.get("EFOPT_NOTEBOOKS"):  # for the site, which shows outputs
        Path(kept).mkdir(exist_ok=True)
        nbformat.write(notebook, Path(kept, path.name))


@pytest.mark.slow
def test_quickstart_runs_as_on_one_accelerator(tmp_path, monkeypatch):
    path = NOTEBOOKS / "quickstart.ipynb"
    assert ONE_DEVICE in path.read_text()
    notebook = execute(path, tmp_path, monkeypatch, (ONE_DEVICE, "simulate = True"))
    assert "8 workers simulated by vmap" in texts(notebook)
    assert "all-gather" in texts(notebook)  # read from the program for eight devices


def test_notebooks_install_in_one_way():
    """From the checkout they lie in or from a wheel beside them: no index has efopt."""
    firsts = set()
    for path in NOTEBOOKS.glob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        firsts.add(next(c.source for c in cells if c.cell_type == "code"))
    (first,) = firsts
    assert "efopt-*.whl" in first and "os.pardir" in first


@pytest.mark.parametrize(
    "path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda p: p.stem
)
def test_notebook_is_stored_without_outputs(path):
    cells = nbformat.read(path, as_version=4).cells
    assert all(not c.outputs for c in cells if c.cell_type == "code")
