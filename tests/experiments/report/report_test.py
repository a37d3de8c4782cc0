"""Tests of report.report, page and plots: complete, escaped, self-contained."""

import math
import random
import re

import fake_paper
import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot

from experiments import files
from experiments.loop import run_folder
from experiments.report import page, plots, records, report, results


def _history(num_steps=50):
  steps = [
    {"kind": "train", "step": s, "seconds": 2.0 * s, "ids": [s], "loss": 1 / (s + 1), "aux": 1.0}
    for s in range(num_steps)
  ]
  evals = [
    {"kind": "eval", "step": s, "error": 0.5, "error_low": 0.4, "error_high": 0.6}
    for s in (10, 20, 30)
  ]
  return records.History(steps, evals)


def _result():
  figure, axes = plots.subplots()
  axes[0][0].plot([1, 2, 3])
  return results.Result(
    metrics={"size": 3, "error": results.Estimate(0.5, 0.4, 0.6, 64, "2 <ties>")},
    tables=[
      results.Table("Samples & <i>", ["prompt", "score"], [["<script>alert(1)</script>", "+0.93"]]),
      results.checks_table("Criteria", [("one", True), ("two", False)]),
    ],
    figures=[results.Figure("fit", 'Quotes " and <', figure)],
    notes=["gameable <b>"],
    arrays={"errors": np.zeros(fake_paper.SIZE)},
  )


def _write(folder, config, history, result):
  experiment = fake_paper.build(config)
  report.write_run(
    folder,
    config,
    result,
    headline=experiment.headline,
    figures=experiment.figures(history, result),
    history=history,
  )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  files.write_json(folder / "environment.json", run_folder.environment())
  config = fake_paper.get_config()
  _write(folder, config, _history(), _result())
  return folder


def test_the_report_holds_everything_a_reader_needs(folder):
  html = (folder / "report.html").read_text()
  for text in (
    "fake_paper:tiny", "0.500", "0.400 to 0.600", "n = 64", "optimizer.learning_rate",
    "versions.jax", "The loss.", "a metric over the training steps", "50 steps in 1:38", "gameable",
  ):  # fmt: skip
    assert text in html, text
  assert html.count("data:image/svg+xml;base64,") == 3
  assert 'class="pill pass">pass' in html and 'class="pill fail">fail' in html
  # The headline comes first, though the evaluation put it second.
  assert html.index(">error</h3>") < html.index(">size</h3>")


def test_the_report_loads_nothing_and_escapes_everything(folder):
  html = (folder / "report.html").read_text()
  sources = re.findall(r"\b(?:src|href)\s*=\s*(.{0,6})", html)
  assert sources == ['"data:'] * 3
  assert "url(" not in html and "@import" not in html and "<script" not in html
  for text in ("<ties>", "<b>", "Samples & <i>"):
    assert text not in html.split("<body>")[1], text
  assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
  assert 'alt="Quotes &quot; and &lt;"' in html


def test_figures_are_saved_as_png_and_svg(folder):
  names = {path.name for path in (folder / "figures").iterdir()}
  for name in ("fit", "loss", "learning_curves"):
    assert {f"{name}.png", f"{name}.svg"} <= names
  assert (folder / "figures" / "fit.png").read_bytes().startswith(b"\x89PNG")


def test_a_result_from_json_shows_the_figures_saved_before(folder):
  before = (folder / "report.html").read_text()
  again = results.Result.from_json(_result().to_json())
  config = fake_paper.get_config()
  _write(folder, config, _history(), again)
  assert (folder / "report.html").read_text() == before


def test_drawing_leaves_no_global_state(tmp_path):
  def draw():
    figure, axes = plots.subplots(1, 2)
    axes[0][0].plot([1, 2, 3], label="line")
    plots.save_figure(results.Figure("drawn", "A caption.", figure), tmp_path)
    return (tmp_path / "drawn.svg").read_bytes()

  settings, random_state = dict(matplotlib.rcParams), random.getstate()
  first = draw()
  assert dict(matplotlib.rcParams) == settings
  assert random.getstate() == random_state
  assert pyplot.get_fignums() == []  # nothing stays in memory for the next run in this process
  assert draw() == first  # no date, no random ids


def test_subplots_always_has_two_dimensions():
  assert plots.subplots()[1].shape == (1, 1)
  figure, axes = plots.subplots(2, 3, sharex=True)
  assert axes.shape == (2, 3)
  assert axes[0][0].get_shared_x_axes().joined(axes[0][0], axes[1][2])
  assert figure.get_figwidth() > 10


def test_a_figure_name_is_a_file_name(tmp_path):
  figure, _ = plots.subplots()
  with pytest.raises(ValueError, match=r"'\.\./x'"):
    plots.save_figure(results.Figure("../x", "", figure), tmp_path)


def test_learning_curves_show_held_out_headline_then_loss():
  drawn = plots.learning_curves(_history(), "error")
  titles = [axis.get_title() for axis in drawn.figure.axes]
  assert titles[:3] == ["error (held out)", "loss", "aux"]
  assert len(drawn.figure.axes[0].collections) == 1  # the band
  assert plots.learning_curves(records.History(), "error") is None


@pytest.mark.parametrize(
  ("num_steps", "with_evals", "has_mean", "has_bands"),
  [
    (5, False, False, False),
    (5, True, False, True),
    (50, False, True, False),
    (50, True, True, True),
  ],
)
def test_the_caption_of_learning_curves_names_what_they_show(
  num_steps, with_evals, has_mean, has_bands
):
  history = _history(num_steps)
  if not with_evals:
    history.evals = []
  drawn = plots.learning_curves(history, "error")
  axes = drawn.figure.axes
  assert any(len(axis.lines) == 2 for axis in axes) == has_mean
  assert any(len(axis.collections) == 1 for axis in axes) == has_bands
  assert ("running mean" in drawn.caption) == has_mean
  assert ("confidence intervals" in drawn.caption) == has_bands


def test_learning_curves_stay_small_for_long_runs():
  drawn = plots.learning_curves(_history(20_000), "loss")
  points = max(len(line.get_xdata()) for axis in drawn.figure.axes for line in axis.lines)
  assert points <= 1000


def test_learning_curves_survive_nan_and_missing_metrics():
  history = _history(50)
  history[3]["loss"] = math.nan
  del history[5]["aux"]
  (line, smooth) = plots.learning_curves(history, "loss").figure.axes[0].lines
  assert np.isnan(line.get_ydata()[3])
  assert np.isfinite(smooth.get_ydata()).all()


def test_a_run_that_stopped_says_so_in_red(tmp_path):
  config = fake_paper.get_config()
  report.write_run(
    tmp_path,
    config,
    results.Result(),
    headline="error",
    history=_history(5),
    warning="loss is nan at step <4>",
  )
  html = (tmp_path / "report.html").read_text()
  assert "<p class=warning>loss is nan at step &lt;4&gt;</p>" in html
  assert ">loss</h3>" in html  # the last numbers stand in for an evaluation


def test_a_table_reads_well_in_a_terminal():
  table = results.Table("T", ["prompt", "reward"], [["a", 1], ["b", 2]])
  assert results.as_text(table) == "T\n\nprompt: a\nreward: 1\n\nprompt: b\nreward: 2"


def test_numbers_are_short():
  values = (0.0, 20.0, 0.7967, 0.0651, 1234.5678, 2e-5, 3.2e7, -0.5)
  texts = ["0", "20", "0.797", "0.0651", "1,234.6", "2.00e-05", "3.20e+07", "-0.500"]
  assert [results.number(value) for value in values] == texts
  assert results.number(math.inf) == "inf"


def test_a_model_card_stands_beside_an_exported_language_model(tmp_path):
  config = fake_paper.get_config()
  config.unlock()
  config.network = {"model": "some/base"}
  _write(tmp_path, config, _history(), _result())
  assert not (tmp_path / "model_card.md").exists()  # nothing was exported
  (tmp_path / "model").mkdir()
  _write(tmp_path, config, _history(), _result())
  card = (tmp_path / "model_card.md").read_text()
  assert "from some/base" in card and "| error | 0.5 [0.4, 0.6] n=64 (2 &lt;ties>) |" in card
  assert "| &lt;script>alert(1)&lt;/script> | +0.93 |" in card  # an example, escaped
  assert f"| train.num_steps | {config.train.num_steps} |" in card


def test_the_last_record_stands_in_for_a_headline_that_is_not_evaluated():
  html = page.render(
    title="t",
    result=results.Result(metrics={"criteria_passed": 1.0}),
    headline="loss",
    history=_history(4),
    figures=[],
    config={},
    environment={},
  )
  assert html.index(">loss</h3>") < html.index(">criteria passed</h3>")


def test_a_column_of_numbers_is_aligned_with_its_head():
  html = page._table(results.Table("t", ["name", "value"], [["a", 1.0], ["1", "-2.5"]]))
  assert "<th>name</th><th class=number>value</th>" in html
