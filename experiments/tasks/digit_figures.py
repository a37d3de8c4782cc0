"""Figures of the comparison on the language of digits.

`everyone` is a list of players with `name` and `styles`, and `rates` the matrix of their win rates.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.data import digits
from experiments.report import plots, results
from experiments.tasks import digit_frontiers, digit_methods


def worst(
  player: Any, opponents: list[Any], row: list[results.Estimate]
) -> tuple[str, results.Estimate]:
  """Returns the opponent against which `player` wins least, and its win rate; it is none itself."""
  others = [i for i, opponent in enumerate(opponents) if opponent.name != player.name]
  index = min(others, key=lambda i: row[i].value)
  return opponents[index].name, row[index]


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
      shown = [name for name in config.methods if digit_methods.METHODS[name].family == family]
      for place, name in enumerate(shown):
        method = digit_methods.METHODS[name]
        points = [
          tuple(trained[name].metrics[f"{what}/{oracle}/{value:g}"].value for what in ("kl", key))
          for value in config.algorithm[name][method.knob]
        ]
        kls, heights = np.array(points).T
        grid = np.linspace(0, max(kls.max(), 0), 100)
        fitted = digit_frontiers.curve(kls, heights, first)
        style = "-" if place < len(plots.PALETTE) else "--"  # colours repeat
        (line,) = axis.plot(grid, fitted(grid), style, label=method.name)
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
  figure, axes = plots.subplots(
    len(digits.ORACLES), len(shown), size=(2.9, 2.4), sharex=True, sharey="row"
  )
  for judge, oracle in enumerate(digits.ORACLES):
    axes[judge][0].set_ylabel(f"{oracle}: win rate")
    for column, name in enumerate(shown):
      method, axis = digit_methods.METHODS[name], axes[judge][column]
      revised = np.asarray(trained[name].arrays["revised"])[judge].mean(1)
      for value, rates in zip(config.algorithm[name][method.knob], revised, strict=True):
        (line,) = axis.plot(rates, marker="o", ms=3)
        end = (len(rates) - 1, rates[-1])
        axis.annotate(
          f"{value:g}", end, (5, -3), textcoords="offset points", size=7, color=line.get_color()
        )
      if judge == 0:
        axis.set_title(f"{method.name} ({method.knob})")
      else:
        axis.set_xlabel("number of revisions")
  caption = (
    "Each policy revises its own answers. The lines show how often they then win against the "
    "reference's answers, with one row for each judge. A line is the mean over seeds of one "
    "setting of the regulariser, which stands at its end."
  )
  return [results.Figure("revisions", caption, figure)]


def exploited(everyone: list[Any], rates: Any, trained: Any = (), lost: Any = ()) -> results.Figure:
  """Draws the win rate of every policy against its worst opponents, and its styles.

  Args:
    everyone: the policies.
    rates: their win rates against each other.
    trained: opponents that were trained against one of them; may be empty.
    lost: the win rates of `everyone` against these.
  """
  figure, axes = plots.subplots(1, 2, size=(4.6, 0.28 * len(everyone) + 0.9), sharey=True)
  places = np.arange(len(everyone))[::-1]
  for index, (place, player) in enumerate(zip(places, everyone, strict=True)):
    found = [("in this figure", 0.0, *worst(player, everyone, rates[index]))]
    if trained:
      found.append(("trained against a policy", -0.28, *worst(player, trained, lost[index])))
    for color, (kind, shift, opponent, rate) in zip(plots.PALETTE, found, strict=False):
      low, high = np.array([rate.low, rate.high], float)
      axes[0][0].errorbar(
        rate.value, place + shift, xerr=[[rate.value - low], [high - rate.value]], fmt="o", ms=3,
        color=color, label=kind if place == 0 else None,
      )  # fmt: skip
      if not shift:
        axes[0][0].annotate(opponent, (high, place), (5, -1), textcoords="offset points", size=6)
    left = 0.0
    for style, letter in enumerate("abc"):
      share = float(np.mean(player.styles == style))
      label = f"style {letter}" if place == 0 else None
      axes[0][1].barh(place, share, left=left, color=plots.PALETTE[style], label=label)
      left += share
  axes[0][0].axvline(0.5, color="#8a8f98", linestyle=":", linewidth=1)
  axes[0][0].set(xlabel="win rate against the worst opponent", xlim=(None, 0.62))
  axes[0][0].set_yticks(places, [player.name for player in everyone], fontsize=8)
  axes[0][0].legend(fontsize=7, loc="lower right")
  axes[0][1].set(xlabel="share of styles", xlim=(0, 1))
  plots.legend_below(figure, axes[0][1])
  caption = (
    "The left panel shows each policy's win rate against its worst opponent under the intransitive "
    "judge: of this figure (named), and of the policies that were trained to beat one of it. At "
    "0.5 none beats it. Bars are 95 % intervals. The right panel shows how often each policy uses "
    "each style."
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
