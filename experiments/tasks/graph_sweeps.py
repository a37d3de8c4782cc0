"""Criteria and figures of a sweep over one hyper-parameter of a graph method."""

from typing import Any

import matplotlib
import numpy as np
from scipy import stats

from experiments.report import plots, results

# The hyper-parameters that a sweep can vary, with their axis labels.
AXES = {
  "feature_mask_prob": "probability that a column is masked",
  "edge_drop_prob": "probability that an edge is dropped",
  "target_decay": "constant decay of the target",
  "num_negatives": "negatives per node",
  "signal": r"$\lambda^2 + \mu^2 / \gamma$",
  "predictor_norm": "batch normalisation in the predictor",
}
# Columns of the tables. All but the last are also lines of the figures.
ROWS = ("trained", "untrained", "features", "SGC-2", "no labels", "mean cosine")
_Rows = dict[str, np.ndarray]


def _all(words: str, held: np.ndarray) -> list[tuple[str, bool]]:
  """Returns a criterion on some of the values, or none if the sweep has no such value."""
  return [(words, bool(np.all(held)))] if len(held) else []


def _mask_criteria(values: np.ndarray, rows: _Rows) -> list[tuple[str, bool]]:
  gains = (rows["trained"] - rows["untrained"]).mean(1)
  usual = (values >= 0.1) & (values <= 0.5)
  return _all("training helps at probabilities of 0.1 to 0.5", gains[usual] > 0)


def _decay_criteria(values: np.ndarray, rows: _Rows) -> list[tuple[str, bool]]:
  gains, cosines = (rows["trained"] - rows["untrained"]).mean(1), rows["mean cosine"].max(1)
  slow = (values >= 0.9) & (values < 1)
  return [
    *_all("training helps with slow targets (decay of 0.9 to below 1)", gains[slow] > 0),
    *_all("no run collapses: the mean cosine is below 0.9", cosines < 0.9),
  ]


def _negative_criteria(values: np.ndarray, rows: _Rows) -> list[tuple[str, bool]]:
  order = np.argsort(np.where(values == 0, np.inf, values))
  means = rows["trained"].mean(1)[order]
  correlation = float(stats.spearmanr(np.arange(len(means)), means).statistic)
  return [
    ("the most negatives are better than the fewest", bool(means[-1] > means[0])),
    (f"accuracy rises with negatives: rank correlation {correlation:.2f} > 0.7", correlation > 0.7),
  ]


def _signal_criteria(values: np.ndarray, rows: _Rows) -> list[tuple[str, bool]]:
  blind, none = rows["no labels"].mean(1), np.abs(rows["trained"][values == 0] - 0.5)
  return [
    *_all("without signal, accuracy is within 0.05 of chance", none < 0.05),
    *_all("no labels, signals up to 0.5: within 0.1 of chance", blind[values <= 0.5] < 0.6),
    *_all("no labels, signals of 3 and more: above 0.75", blind[values >= 3] > 0.75),
  ]


def _predictor_criteria(values: np.ndarray, rows: _Rows) -> list[tuple[str, bool]]:
  cosines, scores = rows["mean cosine"].mean(1), rows["trained"].mean(1)
  with_it, without = values == 1, values == 0
  if not (with_it.any() and without.any()):
    return []
  return [
    (
      "batch normalisation raises the mean cosine",
      bool(cosines[with_it] > cosines[without]),
    ),
    (
      "batch normalisation lowers the accuracy",
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
  """Draws test accuracy against each varied number, in a panel of its own."""
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
    f"The panels show {config.method} on {config.data.num_nodes} nodes after "
    f"{config.train.num_steps} steps. Lines are means of {config.sweep.num_seeds} seeds. Bands "
    "reach from the lowest to the highest."
  )
  if "num_negatives" in over and 0 in values:
    caption += f" At the last point all {config.data.num_nodes - 1} other nodes are negatives."
  if "signal" in over:
    caption += (
      ' "No labels" splits the nodes into two classes by the sign of the main direction of the '
      "trained embeddings."
    )
  return results.Figure("sweep", caption, figure)


def cosine_figure(config: Any, history: Any) -> results.Figure:
  """Draws the mean cosine over training, with one panel for each field and one line per value."""
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
  caption = "The lines show the mean cosine during training. After a collapse it is near 1."
  return results.Figure("cosine", caption, figure)
