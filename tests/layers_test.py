"""The import contracts of pyproject.toml cover files that do not exist yet."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("alignment", "rl_theory", "representation", "sharding", "experiments")

# A new file, what it imports, and the module that the contract must name.
FORBIDDEN = {
  "alignment/new_paper.py": ("import flax.linen", "flax"),
  "alignment/baselines/new_method.py": ("import orbax.checkpoint", "orbax"),
  "rl_theory/new_solver.py": ("from rl_theory import networks", "rl_theory.networks"),
  "rl_theory/baselines/new_learner.py": ("from absl import flags", "absl"),
  "representation/new_paper.py": (
    "from representation.networks import gcn",
    "representation.networks.gcn",
  ),
  "representation/new_folder/new_loss.py": ("import matplotlib.pyplot", "matplotlib"),
  "sharding/new_step.py": ("import flax", "flax"),
}
# What the other contracts must refuse, and a line that their answer must hold.
REFUSED = {
  "experiments/report/new_page.py": (
    "from experiments.tasks import language",
    "experiments.report is not allowed to import experiments.tasks:",
  ),
  "experiments/tasks/new_task.py": (
    "from experiments.papers import ipo",
    "experiments.tasks is not allowed to import experiments.papers:",
  ),
  "experiments/new_room.py": ("", "experiments.new_room"),
  "alignment/new_circle.py": (
    "from alignment import new_paper",
    "No cycles are allowed in alignment.",
  ),
  "alignment/new_paper.py": (
    "from alignment import new_circle",
    "No cycles are allowed in alignment.",
  ),
}
ALLOWED = {
  "alignment/new_closed_form.py": "import scipy.special\nfrom alignment import sequences",
  "alignment/models/new_decoder.py": "import flax.linen\nimport safetensors",
  "representation/networks/new_encoder.py": "import flax.linen\nfrom representation import graphs",
}


def _lint(folder):
  code = "from importlinter import cli; cli.lint_imports_command()"
  return subprocess.run(
    [sys.executable, "-c", code, "--no-cache"], cwd=folder, capture_output=True, text=True
  )


@pytest.fixture
def tree(tmp_path):
  """A copy of the packages and their contracts."""
  for package in PACKAGES:
    shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.pyc"))
  shutil.copy(ROOT / "pyproject.toml", tmp_path)
  return tmp_path


def test_rooms_stay_open_to_what_belongs_there(tree):
  for name, source in ALLOWED.items():
    (tree / name).write_text(source + "\n")
  process = _lint(tree)
  assert process.returncode == 0, process.stdout + process.stderr


def test_new_algorithms_may_import_no_networks_and_no_files(tree):
  for name, (source, _) in FORBIDDEN.items():
    (tree / name).parent.mkdir(exist_ok=True)
    (tree / name).parent.joinpath("__init__.py").touch()
    (tree / name).write_text(source + "\n")
  process = _lint(tree)
  assert process.returncode == 1, process.stdout + process.stderr
  broken = process.stdout.partition("Broken contracts")[2]
  found = set(re.findall(r"^-\s+(\S+) -> (\S+) \(l\.1\)$", broken, re.MULTILINE))
  wanted = {
    (name.removesuffix(".py").replace("/", "."), imported)
    for name, (_, imported) in FORBIDDEN.items()
  }
  assert found == wanted


def test_arrows_that_run_back_up_and_circles_are_refused(tree):
  for name, (source, _) in REFUSED.items():
    (tree / name).write_text(source + "\n")
  process = _lint(tree)
  assert process.returncode == 1, process.stdout + process.stderr
  broken = process.stdout.partition("Broken contracts")[2]
  for name, (_, line) in REFUSED.items():
    assert line in broken, name
