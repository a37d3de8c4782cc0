"""Compares all methods on the language of digits at equal distance from the reference.

The methods cannot be compared at equal values of their regularisers, because each paper's symbol
enters its loss in a different place. So each method is trained at several values, which gives a
curve over sequence KL, and all methods are compared at the same KL.

The policy of a method at that KL is a mixture: for each prompt, a coin toss chooses between the two
neighbouring points of the curve (every curve starts at the reference). So its win rates are
interpolated win rates, and its comparisons are true binomial trials. The mean log-ratio of all
methods is then equal. The KL of such a mixture is a little smaller than this mean.
"""

import dataclasses
import math
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from alignment import sequences
from alignment.models import sampling
from experiments.data import digits
from experiments.loop import suite, training
from experiments.report import plots, results, statistics
from experiments.studies import digits as runs
from experiments.tasks import digit_language, digit_methods
from sharding import checks

_CYCLE = digits.ORACLES.index("intransitive")


@dataclasses.dataclass(frozen=True)
class Player:
  """A policy in the tournament, with one answer to each of N held-out prompts.

  name: its name in tables.  kl: its mean log-ratio, in nats.  rewards, styles: `[N]`.
  """

  name: str
  kl: float
  rewards: np.ndarray
  styles: np.ndarray


def run(config: Any, workdir: pathlib.Path) -> training.Outcome:
  """Trains reference, reward model and all methods, each in its own folder, and compares them."""
  for name in config.methods:
    checks.choice("config.methods", name, tuple(digit_methods.METHODS))
  if len(set(config.methods)) < len(config.methods):
    raise ValueError(f"config.methods={tuple(config.methods)}: give each method once")
  if not config.methods:
    raise ValueError(f"config.methods is empty: choose from {', '.join(digit_methods.METHODS)}")
  world = runs.World(config, workdir)

  def summarise(parts: Mapping[str, suite.Part]) -> suite.Summary:
    trained = {name: part.result for name, part in parts.items()}
    figures = [*_curves(config, trained), *_revisions(config, trained)]
    return suite.Summary(compare(config, trained, world), f"scalar/{config.methods[0]}", figures)

  return suite.run(
    config,
    workdir,
    {name: sub_config(config, name) for name in ("sft", "reward_model", *config.methods)},
    summarise,
    build=lambda part, folder: runs.build_in(part, folder, world),
  )


def sub_config(config: Any, name: str) -> ml_collections.ConfigDict:
  """Returns the config of one run. The run can be evaluated on its own, like any other."""
  sub = ml_collections.ConfigDict({"paper": "digits", "preset": name, "seed": config.seed})
  sub.method = name
  sub.algorithm = dict(config.algorithm.get(name, {}))
  for section in ("network", "data", "optimizer", "sharding", "train", "eval", "checkpoint"):
    sub[section] = config[section].to_dict()
  if name in ("sft", "reward_model"):
    sub.train.num_steps = config[name].num_steps
    sub.train.batch_size = config[name].batch_size
    sub.optimizer.learning_rate = config[name].learning_rate
  return sub


# --- players --------------------------------------------------------------------------------------


def players_at(
  config: Any, trained: Mapping[str, results.Result], judge: int, reference: Player
) -> list[Player]:
  """Returns every method at the KL `eval.kl`, or at its largest KL if that is smaller."""
  return [
    _at_kl(
      digit_methods.METHODS[name].name,
      {key: np.asarray(values)[judge] for key, values in trained[name].arrays.items()},
      reference,
      config.eval.kl,
    )
    for name in config.methods
  ]


def _at_kl(name: str, arrays: Mapping[str, np.ndarray], reference: Player, kl: float) -> Player:
  """Returns the mixture of the two points around `kl`; seeds answer the prompts in turn."""
  num_settings, num_seeds, count = arrays["rewards"].shape
  seeds, prompts = np.arange(count) % num_seeds, np.arange(count)
  points = [reference]
  for setting in range(num_settings):
    rewards, styles = (arrays[key][setting][seeds, prompts] for key in ("rewards", "styles"))
    points.append(Player(name, float(arrays["log_ratios"][setting].mean()), rewards, styles))
  points.sort(key=lambda point: point.kl)
  above = next((i for i, point in enumerate(points) if point.kl >= kl), None)
  if above is None or above == 0:
    return dataclasses.replace(points[-1 if above is None else 0], name=name)
  near, far = points[above - 1], points[above]
  weight = (kl - near.kl) / (far.kl - near.kl)
  toss = np.random.default_rng(zlib.crc32(name.encode())).random(count) < weight
  return Player(
    name,
    kl,
    np.where(toss, far.rewards, near.rewards),
    np.where(toss, far.styles, near.styles),
  )


def reference_players(config: Any, world: runs.World) -> list[Player]:
  """Returns the reference, and the reference conditioned on each of the three marks."""
  network = digit_language.network_of(config)
  params = world.ref_params
  rows = digit_language.sample_rows(network, params, config, "reference")
  players = [_player("reference", 0.0, rows)]
  prompts = digit_language.test_prompts(config)
  for style, letter in enumerate("abc"):
    mark = np.full((len(prompts.tokens), 1), digits.FIRST_MARK + style)
    ones = np.ones(mark.shape, np.float32)
    opened: list[Any] = [
      np.concatenate(pair, axis=1) for pair in zip(prompts, (mark, ones), strict=True)
    ]
    rest = sampling.generate(
      params,
      opened[0],
      opened[1],
      jax.random.fold_in(jax.random.key(config.seed), style),
      config=network,
      max_new_tokens=digits.LENGTH - 1,
      eos_id=digits.EOS,
      pad_id=digits.PAD,
    )
    answer: list[Any] = [
      np.concatenate(pair, axis=1) for pair in ((mark, rest.tokens), (ones, rest.mask))
    ]
    share = float(np.mean(players[0].styles == style))
    kl = -math.log(share) if share else math.inf  # exact: the other tokens follow the reference
    players.append(
      _player(f"only {letter}", kl, sequences.Sequences(answer[0], answer[1], *prompts))
    )
  return players


def _player(name: str, kl: float, rows: sequences.Sequences) -> Player:
  quality = digits.quality(jax.tree.map(np.asarray, rows))
  return Player(name, kl, np.asarray(quality.rewards), np.asarray(quality.styles))


def tournament(players: list[Player], intransitive: bool) -> list[list[results.Estimate]]:
  """Returns win rates of row against column; each pair plays one drawn label for each prompt."""
  count = len(players[0].rewards)
  table = [[results.Estimate(0.5, 0.5, 0.5)] * len(players) for _ in players]
  rng = np.random.default_rng(0)
  for i, first in enumerate(players):
    for j, second in enumerate(players[:i]):
      one, two = (digits.Quality(player.rewards, player.styles) for player in (first, second))
      wins = int((rng.random(count) < np.asarray(digits.preferences(one, two, intransitive))).sum())
      table[i][j] = statistics.clopper_pearson(wins, count)
      table[j][i] = statistics.clopper_pearson(count - wins, count)
  return table


# --- tables ---------------------------------------------------------------------------------------


def compare(
  config: Any, trained: Mapping[str, results.Result], world: runs.World
) -> results.Result:
  """Plays the tournaments and returns their tables and figures."""
  reference, *marked = reference_players(config, world)
  tables, figures, found, checks_ = [], [], {}, []
  num_methods = len(config.methods)
  for judge, oracle in enumerate(digits.ORACLES):
    methods = players_at(config, trained, judge, reference)
    everyone = [*methods, reference, *(marked if judge == _CYCLE else [])]
    rates = tournament(everyone, judge == _CYCLE)
    tables.append(_summary(oracle, config, everyone, rates, num_methods))
    tables.append(_matrix(oracle, everyone, rates))
    figures.append(_heatmap(oracle, everyone, rates))
    if judge == _CYCLE:
      figures.append(_exploited(everyone, rates))
    versus = {p.name: row[num_methods] for p, row in zip(methods, rates, strict=False)}
    worst = {p.name: _worst(everyone, row)[1] for p, row in zip(methods, rates, strict=False)}
    for name in config.methods:
      label = digit_methods.METHODS[name].name
      found[f"{oracle}/{name}"] = versus[label]
    checks_ += _checks(oracle, methods, reference, versus, worst)
  tables.insert(0, results.checks_table("Expected before the run", checks_))
  tables.append(_curves_table(config, trained))
  return results.Result(metrics=found, tables=tables, figures=figures)


def _worst(everyone: list[Player], row: list[results.Estimate]) -> tuple[str, results.Estimate]:
  """Returns the opponent against which a player wins least, and the player's win rate."""
  index = min(range(len(row)), key=lambda i: row[i].value)
  return everyone[index].name, row[index]


def _checks(oracle, methods, reference, versus, worst) -> list[tuple[str, bool]]:
  by_name = {player.name: player for player in methods}
  checks_ = []
  if oracle == "scalar":
    for name in by_name:
      checks_.append((f"{oracle}: {name} beats the reference", versus[name].low > 0.5))
    for name in ("CoPG", "DRO-V", "RLOO"):
      if name in by_name:
        raised = by_name[name].rewards.mean() > reference.rewards.mean()
        checks_.append((f"{oracle}: {name} raises the mean reward", bool(raised)))
  elif "RLOO" in by_name:
    for name in by_name:
      if name.startswith(("Nash", "self-play")):
        # Intervals apart: the exploited reward model is a claim about policies, not about a draw.
        apart = worst["RLOO"].high < worst[name].low
        text = f"{oracle}: {name} does better than RLOO against its worst opponent"
        checks_.append((text, bool(apart)))
  return checks_


def _summary(oracle, config, everyone, rates, num_methods) -> results.Table:
  rows = []
  for player, row in zip(everyone, rates, strict=True):
    opponent, rate = _worst(everyone, row)
    shares = [float(np.mean(player.styles == style)) for style in range(digits.NUM_STYLES)]
    rows.append(
      [
        player.name,
        player.kl,
        float(player.rewards.mean()),
        row[num_methods] if player.name != "reference" else "",
        rate,
        opponent,
        *shares,
      ]
    )
  return results.Table(
    f"Judge: {oracle}. Methods at a sequence KL of {config.eval.kl:g} nats, or at their largest",
    [
      "policy",
      "KL",
      "reward",
      "beats reference",
      "against worst opponent",
      "worst opponent",
      *(f"style {letter}" for letter in "abc"),
    ],
    rows,
    digits=3,
  )


def _matrix(oracle, everyone, rates) -> results.Table:
  names = [player.name for player in everyone]
  rows = [
    [name, *("" if i == j else rate for j, rate in enumerate(row))]
    for i, (name, row) in enumerate(zip(names, rates, strict=True))
  ]
  title = f"Judge: {oracle}. Win rate of row against column, with 95 % Clopper-Pearson intervals"
  return results.Table(title, ["", *names], rows, digits=3)


def _curves_table(config, trained) -> results.Table:
  rows = []
  for name in config.methods:
    method = digit_methods.METHODS[name]
    for oracle in digits.ORACLES:
      for value in config.algorithm[name][method.knob]:
        tag = f"{oracle}/{value:g}"
        cells = (trained[name].metrics[f"{key}/{tag}"].value for key in _CURVES)
        rows.append([method.name, oracle, method.knob, float(value), *cells])
  columns = ["method", "judge", "regulariser", "value", "KL", "reward", "beats reference"]
  return results.Table("Every setting, mean over seeds", columns, rows, digits=3)


_CURVES = ("kl", "reward", "win_rate")


# --- figures --------------------------------------------------------------------------------------


def _curves(config: Any, trained: Mapping[str, results.Result]) -> list[results.Figure]:
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
          kls, heights = zip((0.0, first), *sorted(points), strict=True)
          axis.plot(kls, heights, marker="o", ms=3, label=digit_methods.METHODS[name].name)
      axis.axvline(config.eval.kl, color="#8a8f98", linestyle=":", linewidth=1)
      axis.set_title(f"{oracle}: {family}")
      if row == len(panels) - 1:
        axis.set_xlabel("sequence KL, nats")
      axis.legend(fontsize=8)
    axes[row][0].set_ylabel(words[key])
  caption = (
    "Each curve shows one method and each point one value of its regulariser, as a mean over "
    "seeds. Every curve starts at the reference. The dotted line marks the KL of the tournament."
  )
  return [results.Figure("kl_curves", caption, figure)]


def _revisions(config: Any, trained: Mapping[str, results.Result]) -> list[results.Figure]:
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


def _exploited(everyone: list[Player], rates: Any) -> results.Figure:
  """Draws the win rate of every policy against its worst opponent, and its styles."""
  figure, axes = plots.subplots(1, 2, size=(4.6, 0.28 * len(everyone) + 0.9), sharey=True)
  places = np.arange(len(everyone))[::-1]
  for place, player, row in zip(places, everyone, rates, strict=True):
    opponent, rate = _worst(everyone, row)
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


def _heatmap(oracle: str, everyone: list[Player], rates: Any) -> results.Figure:
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
