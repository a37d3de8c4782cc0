"""The import contracts of pyproject.toml cover files that do not exist yet."""

import pathlib
import re
import shutil
import subprocess
import sys

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


def test_new_files_are_covered(tmp_path):
  for package in PACKAGES:
    shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.pyc"))
  shutil.copy(ROOT / "pyproject.toml", tmp_path)
  for name, source in ALLOWED.items():
    (tmp_path / name).write_text(source + "\n")
  process = _lint(tmp_path)
  assert process.returncode == 0, process.stdout + process.stderr

  for name, (source, _) in FORBIDDEN.items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).parent.joinpath("__init__.py").touch()
    (tmp_path / name).write_text(source + "\n")
  process = _lint(tmp_path)
  assert process.returncode == 1, process.stdout + process.stderr
  broken = process.stdout.partition("Broken contracts")[2]
  found = set(re.findall(r"^-\s+(\S+) -> (\S+) \(l\.1\)$", broken, re.MULTILINE))
  wanted = {
    (name.removesuffix(".py").replace("/", "."), imported)
    for name, (_, imported) in FORBIDDEN.items()
  }
  assert found == wanted
