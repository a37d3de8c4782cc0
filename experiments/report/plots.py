"""Figures: their common style, the learning curves of a run, and files in PNG and SVG.

Figures are made with `Figure()` and never with `pyplot`, which keeps global state.
"""

import io
import math
import pathlib
import re
from typing import Any

import matplotlib
import numpy as np
from matplotlib import figure as mpl_figure
from matplotlib import layout_engine

from experiments import files
from experiments.report import records, results

PALETTE = ("#3b6fd4", "#e07b39", "#2a9d8f", "#b5478a", "#7466e0", "#8a8f98")
_INK, _GRID = "#30343c", "#e6e8ec"
_MAX_POINTS, _MAX_PANELS = 1000, 6


def subplots(
  rows: int = 1, columns: int = 1, *, size: tuple[float, float] = (4.2, 2.9), **options: Any
) -> tuple[mpl_figure.Figure, np.ndarray]:
  """Returns a figure and its axes `[rows, columns]` in the style of the report.

  Args:
    rows: number of rows of panels.
    columns: number of columns of panels.
    size: width and height of a panel in inches. The panels of a single column are 1.5 times as
      wide.
    **options: arguments of `Figure.subplots`, such as `sharex=True`.
  """
  width = size[0] * columns * (1.5 if columns == 1 else 1)
  figure = mpl_figure.Figure(figsize=(width, size[1] * rows), layout=_layout())
  axes = figure.subplots(rows, columns, squeeze=False, **options)
  for axis in axes.flat:
    axis.set_prop_cycle(color=PALETTE)
    axis.grid(True, color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#b9bec7")
    axis.tick_params(colors=_INK, labelsize=9, length=3, color="#b9bec7")
    axis.tick_params(which="minor", length=2, color="#d3d7dd")
  return figure, axes


def legend_below(figure: mpl_figure.Figure, axis: Any, *, columns: int = 4) -> None:
  """Puts the legend of `axis` below all panels, where it covers no curve."""
  figure.legend(
    *axis.get_legend_handles_labels(),
    loc="outside lower center",
    ncols=columns,
    fontsize=9,
    frameon=False,
  )


def _layout() -> layout_engine.LayoutEngine:
  return layout_engine.ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.06)  # inches: room for titles


def learning_curves(history: records.History, headline: str) -> results.Figure | None:
  """Draws loss, headline and up to four other metrics over the steps; None without records.

  A curve of more than 40 points is drawn thin, with its running mean thick over it. Periodic
  evaluations of the headline have a panel of their own, with intervals where there are some. The
  caption describes only what is drawn.
  """
  panels = _panels(history, headline)
  if not panels:
    return None
  columns = min(3, len(panels))
  figure, axes = subplots(math.ceil(len(panels) / columns), columns, size=(3.7, 2.5))
  for axis in axes.flat[len(panels) :]:
    axis.set_visible(False)
  has_mean, has_bands = False, False
  for axis, (name, rows, kind) in zip(axes.flat, panels, strict=False):
    rows = [row for row in rows if name in row]
    kept = rows[:: max(1, math.ceil(len(rows) / _MAX_POINTS))]
    steps = np.array([record["step"] for record in kept]) + (kind == "train")
    values = np.array([record[name] for record in kept], float)
    dense = len(values) > 40
    (line,) = axis.plot(
      steps, values, alpha=0.35 if dense else 1, marker="o" if len(values) < 20 else None, ms=3
    )
    if dense:
      has_mean = True
      axis.plot(steps, _smooth(values), color=line.get_color(), linewidth=1.8)
    if kind == "eval" and f"{name}_low" in kept[0]:
      has_bands = True
      low, high = (np.array([r[f"{name}_{end}"] for r in kept]) for end in ("low", "high"))
      axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.18, linewidth=0)
    axis.set_title(f"{name} (held out)" if kind == "eval" else name)
    axis.set_xlabel("step")
  sentences = ["Each panel shows a metric over the training steps."]
  if has_mean:
    sentences.append("Thin lines show single records, thick lines their running mean.")
  if has_bands:
    sentences.append("Bands show 95 % confidence intervals.")
  return results.Figure("learning_curves", " ".join(sentences), figure)


def _panels(history: records.History, headline: str) -> list[tuple[str, list, str]]:
  """Returns (metric, records, "train" or "eval") of each panel."""
  skipped = {"kind", "step", "seconds", "ids"}
  names = [] if not history else [n for n in history[-1] if n not in skipped]
  order = {"loss": 0, headline: 1}
  # Spreads and intervals get no panel: the figures of a paper draw "x_sd" with its metric "x".
  names = [n for n in names if not n.endswith(("_sd", "_low", "_high"))]
  names.sort(key=lambda name: (order.get(name, 3 if "/" in name else 2), name == "grad_norm"))
  panels = [(name, list(history), "train") for name in names]
  if len(history.evals) > 1 and headline in history.evals[-1]:
    panels.insert(0, (headline, history.evals, "eval"))
  return panels[:_MAX_PANELS]


def _smooth(values: np.ndarray) -> np.ndarray:
  window = max(3, len(values) // 25)
  valid = np.isfinite(values)
  sums, counts = (
    np.convolve(x, np.ones(window), mode="same") for x in (np.where(valid, values, 0), valid)
  )
  return sums / np.maximum(counts, 1)


def save_figure(figure: results.Figure, folder: pathlib.Path) -> None:
  """Writes `<name>.png` and `<name>.svg`; raises `ValueError` for a name unfit for a file."""
  if not re.fullmatch(r"[\w\-]+", figure.name):
    raise ValueError(
      f"the name of a figure must consist of letters, digits, _ and -, got {figure.name!r}"
    )
  for axis in figure.figure.axes:
    axis.title.set(fontsize=10.5, color=_INK)
    for label in (axis.xaxis.label, axis.yaxis.label):
      label.set(fontsize=9.5, color=_INK)
    if (legend := axis.get_legend()) is not None:
      legend.set_frame_on(False)
      for text in legend.get_texts():
        text.set(fontsize=9, color=_INK)
  folder.mkdir(parents=True, exist_ok=True)
  # With a fixed salt and no date, equal data give equal files.
  with matplotlib.rc_context({"svg.hashsalt": "bootstrax"}):
    for kind, options in (("png", {"dpi": 200}), ("svg", {"metadata": {"Date": None}})):
      buffer = io.BytesIO()
      transparent = kind == "svg"  # so that the page sets the background
      figure.figure.savefig(buffer, format=kind, transparent=transparent, **options)
      files.write_file(folder / f"{figure.name}.{kind}", buffer.getvalue())
