"""What is expected of a sweep over one number of a graph method, and its figures."""

from typing import Any

import matplotlib
import numpy as np
from scipy import stats

from experiments.report import plots, results

# What may be varied, as an axis says it.
AXES = {
  "feature_mask_prob": "probability that a column is masked",
  "edge_drop_prob": "probability that an edge is dropped",
  "target_decay": "decay of the target, constant",
  "num_negatives": "negatives of a node",
  "signal": r"$\lambda^2 + \mu^2 / \gamma$",
  "predictor_norm": "batch normalisation in the predictor",
}
# Columns of the tables and, but for the last, lines of the figures.
ROWS = ("trained", "untrained", "features", "SGC-2", "no labels", "mean cosine")
_Rows = dict[str, np.ndarray]


def _all(words: str, held: np.ndarray) -> list[tuple[str, bool]]:
  """A criterion on some of the values; none where the sweep has no such value."""
  return [(words, bool(np.all(held)))] if len(held) else []


def _mask_criteria(values: np.ndarray, rows: _Rows) -> list[tuple[str, bool]]:
  gains = (rows["trained"] - rows["untrained"]).mean(1)
  usual = (values >= 0.1) & (values <= 0.5)
  return _all("probabilities of 0.1 to 0.5 gain over no training", gains[usual] > 0)


def _decay_criteria(values: np.ndarray, rows: _Rows) -> list[tuple[str, bool]]:
  gains, cosines = (rows["trained"] - rows["untrained"]).mean(1), rows["mean cosine"].max(1)
  slow = (values >= 0.9) & (values < 1)
  return [
    *_all("slow targets (0.9 to below 1) gain over no training", gains[slow] > 0),
    *_all("none collapses: mean cosine below 0.9", cosines < 0.9),
  ]


def _negative_criteria(values: np.ndarray, rows: _Rows) -> list[tuple[str, bool]]:
  order = np.argsort(np.where(values == 0, np.inf, values))
  means = rows["trained"].mean(1)[order]
  correlation = float(stats.spearmanr(np.arange(len(means)), means).statistic)
  return [
    ("most negatives better than fewest", bool(means[-1] > means[0])),
    (f"accuracy rises with them: rank correlation {correlation:.2f} > 0.7", correlation > 0.7),
  ]


def _signal_criteria(values: np.ndarray, rows: _Rows) -> list[tuple[str, bool]]:
  blind, none = rows["no labels"].mean(1), np.abs(rows["trained"][values == 0] - 0.5)
  return [
    *_all("no signal: within 0.05 of chance", none < 0.05),
    *_all("without labels, signals up to 0.5: within 0.1 of chance", blind[values <= 0.5] < 0.6),
    *_all("without labels, signals of 3 and more: above 0.75", blind[values >= 3] > 0.75),
  ]


def _predictor_criteria(values: np.ndarray, rows: _Rows) -> list[tuple[str, bool]]:
  cosines, scores = rows["mean cosine"].mean(1), rows["trained"].mean(1)
  with_it, without = values == 1, values == 0
  if not (with_it.any() and without.any()):
    return []
  return [
    (
      "normalised: mean cosine above that of the plain predictor",
      bool(cosines[with_it] > cosines[without]),
    ),
    (
      "normalised: accuracy below that of the plain predictor",
      bool(scores[with_it] < scores[without]),
    ),
  ]


CRITERIA = {
  "feature_mask_prob": _mask_criteria,
  "edge_drop_prob": _mask_criteria,
  "target_decay": _decay_criteria,
  "num_negatives": _negative_criteria,
  "signal": _signal_criteria,
  "predictor_norm": _predictor_criteria,
}


def accuracy_figure(config: Any, result: results.Result) -> results.Figure:
  """Draws the rows of a sweep against what is varied, a panel for each."""
  over, values = tuple(config.sweep.over), np.array(config.sweep.at, float)
  figure, axes = plots.subplots(1, len(over), sharey=True)
  for axis, one in zip(axes[0], over, strict=True):
    places = np.where(values == 0, config.data.num_nodes - 1, values)
    places = places if one == "num_negatives" else values
    if one == "target_decay":
      places = np.arange(len(values))
      axis.set_xticks(places, [f"{value:g}" for value in values])
    order = np.argsort(places)
    for row in ROWS[:-1]:
      if row == "no labels" and one != "signal":
        continue
      curve = result.arrays[f"{one}/{row}"][order]
      learned = row in ("trained", "no labels")
      (line,) = axis.plot(
        places[order], curve.mean(1), "-" if learned else "--", marker="o" if learned else None,
        ms=4, label=row,
      )  # fmt: skip
      axis.fill_between(
        places[order], curve.min(1), curve.max(1), color=line.get_color(), alpha=0.2, linewidth=0
      )
    if one == "num_negatives":
      axis.set_xscale("log", base=2)
    if one == "signal":
      axis.axvline(1, color="0.4", linestyle=":", label="recovery threshold")
    axis.set(xlabel=AXES[one])
  axes[0][0].set_ylabel("test accuracy")
  plots.legend_below(figure, axes[0][0])
  caption = (
    f"{config.method}, {config.data.num_nodes} nodes, {config.train.num_steps} steps; lines are "
    f"means of {config.sweep.num_seeds} seeds, bands from the least to the largest."
  )
  if "signal" in over:
    caption += (
      " No labels: two classes by the sign of the main direction of the trained embeddings."
    )
  return results.Figure("sweep", caption, figure)


def cosine_figure(config: Any, history: Any) -> results.Figure:
  """Draws the trace of each value in which a collapse would show, a panel for each field."""
  over, steps = tuple(config.sweep.over), [row["step"] for row in history]
  figure, axes = plots.subplots(1, len(over), sharey=True)
  shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(config.sweep.at)))
  for axis, one in zip(axes[0], over, strict=True):
    for value, shade in zip(config.sweep.at, shades, strict=True):
      trace = [row[f"collapse/mean_cosine/{one}={value:g}"] for row in history]
      axis.plot(steps, trace, color=shade, label=f"{value:g}")
    axis.set(xlabel="step", title=AXES[one], ylim=(0, 1))
  axes[0][0].set_ylabel("mean cosine, not centred")
  axes[0][-1].legend(fontsize=8, ncols=2)
  return results.Figure("cosine", "After a collapse the mean cosine is near 1.", figure)
