"""The pages keep their promises: links lead somewhere, commands parse, examples run."""

import importlib.util
import json
import pathlib
import re
import shlex

import pytest
from matplotlib import figure as mpl_figure

from experiments import main

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(
  r"^(?:PYTHONPATH=\S+ )?(?:bootstrax|python -m experiments\.main) (?=.*--config=)(.*)$",
  re.MULTILINE,
)
# `copg:tiny` in running text; `tfds:NAME` and the like are none.
PRESET = re.compile(r"`([a-z_]+:[a-z_0-9]+)`")
PAPERS = {path.stem for path in (ROOT / "experiments" / "configs").glob("*.py")}


def by_name(path):
  return str(path.relative_to(ROOT))


def text(page):
  return page.read_text(encoding="utf-8")


def anchors(page):
  """The names that GitHub gives to the headings of a page."""
  headings = re.findall(r"^#+ (.*)$", re.sub(r"(?ms)^```.*?^```", "", text(page)), re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_lead_to_files_and_headings(page):
  for target in LINK.findall(text(page)):
    if target.startswith(("http://", "https://")):
      continue
    path, _, anchor = target.partition("#")
    found = (page.parent / path).resolve() if path else page
    assert found.exists(), f"{by_name(page)} links to {target}, which does not exist"
    assert not anchor or anchor in anchors(found), f"{by_name(page)}: no heading for {target}"


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_paths_in_code_style_exist(page):
  folders = "alignment|rl_theory|representation|sharding|experiments|tests|benchmarks|colabs|docs"
  for path in re.findall(rf"`((?:{folders})/[\w/.]*\w)`", text(page)):
    assert (ROOT / path).exists(), f"{by_name(page)} names {path}, which does not exist"


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_commands_name_presets_and_settings_that_exist(page, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  content = text(page)
  for name, value in re.findall(r'^([A-Z]+)="?(.*?)"?$', content, re.MULTILINE):  # of the shell
    content = content.replace(f"${name}", value)
  known = [name for name in PRESET.findall(content) if name.partition(":")[0] in PAPERS]
  commands = [["--config=" + name] for name in known]
  for line in COMMAND.findall(content.replace("\\\n", " ")):
    commands.append(shlex.split(line, comments=True))
  for command in commands:
    assert main.run([*command, "--show"]) == 0, f"{command}: {capsys.readouterr().err}"


def test_examples_of_the_guide_run(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  blocks = re.findall(r"(?ms)^```python\n(.*?)^```", text(ROOT / "docs" / "guide.md"))
  assert len(blocks) == 5
  for block in blocks:
    exec(compile(block, "guide.md", "exec"), {"__name__": "guide"})


def test_the_figure_of_the_readme_can_still_be_drawn():
  """The panel that needs no run; the others read `metrics.jsonl` and `results.json`."""
  spec = importlib.util.spec_from_file_location("overview", ROOT / "docs" / "overview_figure.py")
  overview = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(overview)
  axis = mpl_figure.Figure().subplots()
  overview.draw_nash_md(axis)
  bound, distance = (line.get_ydata() for line in axis.get_lines())
  assert (distance < bound).all() and distance[-1] < 2e-8  # 1.08e-8 in docs/results/bandits.md


def test_the_example_of_an_own_algorithm_trains(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(ROOT / "docs")
  assert main.run([f"--config={ROOT}/docs/my_paper.py:small", f"--workdir={tmp_path}/run"]) == 0
  found = json.loads((tmp_path / "run" / "results.json").read_text())["result"]["metrics"]
  # The noise of 64 outputs, 0.1 each, moves a weight by 0.1 / sqrt(64); Adam starts a unit away.
  assert found["largest_error"]["value"] < 0.1
