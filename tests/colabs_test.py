"""The notebooks run from top to bottom, at a tiny size, and are kept without outputs."""

import ast
import os
import pathlib
import re

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).resolve().parent.parent / "colabs").glob("*.ipynb"))


# Ten seconds. The others run with the slow tests, in continuous integration too.
_ALWAYS = {"quickstart"}


def _code(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks():
  assert {path.stem for path in NOTEBOOKS} >= _ALWAYS


@pytest.mark.parametrize(
  "path",
  [
    pytest.param(path, id=path.stem, marks=() if path.stem in _ALWAYS else pytest.mark.slow)
    for path in NOTEBOOKS
  ],
)
def test_notebook_runs(path, monkeypatch, tmp_path):
  monkeypatch.setenv("BOOTSTRAX_NOTEBOOK_STEPS", "4")
  # The notebook finds the packages as a user's would; the test process has its own device flags.
  root = str(path.parent.parent)
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
  notebook = nbformat.read(path, as_version=4)
  client = nbclient.NotebookClient(
    notebook, timeout=300, resources={"metadata": {"path": tmp_path}}
  )
  client.execute()  # raises with the cell and its traceback
  assert all(cell.execution_count for cell in _code(notebook))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_kept_bare(path):
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  for cell in _code(notebook):
    assert not cell.outputs and cell.execution_count is None, "strip the outputs before committing"
    source = re.sub(r"(?m)^(\s*)%.*$", r"\1pass", cell.source)  # a magic is no Python
    for node in ast.walk(ast.parse(source)):
      if isinstance(node, ast.FunctionDef):
        assert node.end_lineno - node.lineno < 5, f"{node.name}: move long functions into a module"
