"""Figures of the comparison on the language of digits.

`everyone` is a list of players with `name` and `styles`, and `rates` the matrix of their win rates.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.data import digits
from experiments.report import plots, results
from experiments.tasks import digit_frontiers, digit_methods


def worst(everyone: list[Any], row: list[results.Estimate]) -> tuple[str, results.Estimate]:
  """Returns the opponent against which a player wins least, and the player's win rate."""
  index = min(range(len(row)), key=lambda i: row[i].value)
  return everyone[index].name, row[index]


def curves(config: Any, trained: Mapping[str, results.Result]) -> list[results.Figure]:
  """Draws reward and win rate against KL, with one panel for each family of methods."""
  start = trained["sft"].metrics["reward"].value
  families = list(dict.fromkeys(digit_methods.METHODS[name].family for name in config.methods))
  panels = [("scalar", "reward", start), *((oracle, "win_rate", 0.5) for oracle in digits.ORACLES)]
  figure, axes = plots.subplots(len(panels), len(families), sharex=True, sharey="row")
  words = {"reward": "mean reward", "win_rate": "win rate against the reference"}
  for row, (oracle, key, first) in enumerate(panels):
    for column, family in enumerate(families):
      axis = axes[row][column]
      for name in config.methods:
        if digit_methods.METHODS[name].family == family:
          values = config.algorithm[name][digit_methods.METHODS[name].knob]
          found = trained[name].metrics
          points = [
            tuple(found[f"{what}/{oracle}/{value:g}"].value for what in ("kl", key))
            for value in values
          ]
          kls, heights = np.array(points).T
          grid = np.linspace(0, max(kls.max(), 0), 100)
          fitted = digit_frontiers.curve(kls, heights, first)
          label = digit_methods.METHODS[name].name
          (line,) = axis.plot(grid, fitted(grid), label=label)
          axis.plot(kls, heights, marker="o", ms=3, linestyle="", color=line.get_color())
      axis.axvline(config.eval.kl, color="#8a8f98", linestyle=":", linewidth=1)
      axis.set_title(f"{oracle}: {family}")
      if row == len(panels) - 1:
        axis.set_xlabel("sequence KL, nats")
      axis.legend(fontsize=8)
    axes[row][0].set_ylabel(words[key])
  caption = (
    "Each point shows one value of a method's regulariser, as a mean over seeds. Each curve goes "
    "through these points and starts at the reference. The dotted line marks the KL of the "
    "comparison."
  )
  return [results.Figure("kl_curves", caption, figure)]


def revisions(config: Any, trained: Mapping[str, results.Result]) -> list[results.Figure]:
  """Draws the win rate against the reference's answers after each revision."""
  shown = [name for name in digit_methods.REVISED if name in config.methods]
  if not shown or not config.eval.num_revisions:
    return []
  figure, axes = plots.subplots(1, len(digits.ORACLES), sharey=True)
  for judge, oracle in enumerate(digits.ORACLES):
    axis = axes[0][judge]
    for name in shown:
      method = digit_methods.METHODS[name]
      values = config.algorithm[name][method.knob]
      revised = np.asarray(trained[name].arrays["revised"])[judge].mean(1)
      for value, rates, style in zip(values, revised, ("-", "--", ":", "-."), strict=False):
        color = plots.PALETTE[shown.index(name)]
        label = f"{method.name}, {method.knob} = {value:g}"
        axis.plot(rates, linestyle=style, color=color, marker="o", ms=3, label=label)
    axis.set(title=f"judge: {oracle}", xlabel="number of revisions")
  axes[0][0].set_ylabel("win rate against the reference")
  plots.legend_below(figure, axes[0][0])
  caption = (
    "The lines show the win rate against the reference's answers when each policy revises its own "
    "answers. Each line is a mean over seeds."
  )
  return [results.Figure("revisions", caption, figure)]


def exploited(everyone: list[Any], rates: Any) -> results.Figure:
  """Draws the win rate of every policy against its worst opponent, and its styles."""
  figure, axes = plots.subplots(1, 2, size=(4.6, 0.28 * len(everyone) + 0.9), sharey=True)
  places = np.arange(len(everyone))[::-1]
  for place, player, row in zip(places, everyone, rates, strict=True):
    opponent, rate = worst(everyone, row)
    low, high = np.array([rate.low, rate.high], float)
    error = [[rate.value - low], [high - rate.value]]
    axes[0][0].errorbar(rate.value, place, xerr=error, fmt="o", ms=4, color=plots.PALETTE[0])
    axes[0][0].annotate(opponent, (high, place), (5, -3), textcoords="offset points", size=7)
    left = 0.0
    for style, letter in enumerate("abc"):
      share = float(np.mean(player.styles == style))
      label = letter if place == 0 else None
      axes[0][1].barh(place, share, left=left, color=plots.PALETTE[style], label=label)
      left += share
  axes[0][0].axvline(0.5, color="#8a8f98", linestyle=":", linewidth=1)
  axes[0][0].set(xlabel="win rate against the worst opponent (named)", xlim=(None, 0.62))
  axes[0][0].set_yticks(places, [player.name for player in everyone], fontsize=8)
  axes[0][1].set(xlabel="share of styles", xlim=(0, 1))
  plots.legend_below(figure, axes[0][1])
  caption = (
    "The left panel shows each policy's win rate against its worst opponent under the intransitive "
    "judge. At 0.5 no policy beats it. Bars are 95 % intervals. The right panel shows how often "
    "each policy uses each style."
  )
  return results.Figure("worst_opponent", caption, figure)


def heatmap(oracle: str, everyone: list[Any], rates: Any) -> results.Figure:
  size = 0.42 * len(everyone) + 1.6
  figure, axes = plots.subplots(1, 1, size=(size / 1.5, size * 0.86))
  axis = axes[0][0]
  values = np.array([[rate.value for rate in row] for row in rates])
  axis.imshow(values, cmap="RdBu", vmin=0.0, vmax=1.0)
  for i, j in np.ndindex(*values.shape):
    if i != j:
      dark = abs(values[i, j] - 0.5) > 0.3
      text = f"{100 * values[i, j]:.0f}"
      axis.text(
        j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else "black"
      )
  names = [player.name for player in everyone]
  axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
  axis.set_yticks(range(len(names)), names, fontsize=8)
  axis.grid(False)
  caption = f"Each cell shows on how many percent of prompts row beats column. Judge: {oracle}."
  return results.Figure(f"tournament_{oracle}", caption, figure)
