"""Compares all methods on the language of digits at equal distance from the reference.

The methods cannot be compared at equal values of their regularisers, because each paper's symbol
enters its loss in a different place. So each method is trained at several values, which gives a
curve over sequence KL, and all methods are compared at the same KL.

What a method earns at that KL is read from a curve fitted to all its settings (`digit_frontiers`).
Games between methods need policies. These are mixtures: for each prompt, a coin toss chooses
between the two neighbouring points of the curve (every curve starts at the reference). So the
comparisons are true binomial trials. The mean log-ratio of all methods is then equal. The KL of
such a mixture is a little smaller than this mean, and it earns a little less than the fitted curve
says.

A policy that no method in the table beats may still be easy to beat. So an *exploiter* is trained
against each policy in `config.exploited`: a best response, with a small regulariser.
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
from experiments.report import results, statistics
from experiments.studies import digits as runs
from experiments.tasks import digit_figures, digit_frontiers, digit_language, digit_methods
from sharding import checks


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
  for name in config.exploited:
    checks.choice("config.exploited", name, tuple(digit_methods.METHODS))
  if len(config.algorithm.exploiter.tau) != 1:
    raise ValueError(f"config.algorithm.exploiter.tau={config.algorithm.exploiter.tau}: give one")
  checks.positive("config.eval.kl", config.eval.kl)
  checks.probabilities("config.data.kept_edits", config.data.kept_edits)
  world = runs.World(config, workdir)

  def summarise(parts: Mapping[str, suite.Part]) -> suite.Summary:
    trained = {name: part.result for name, part in parts.items()}
    figures = [*digit_figures.curves(config, trained), *digit_figures.revisions(config, trained)]
    return suite.Summary(compare(config, trained, world), f"scalar/{config.methods[0]}", figures)

  return suite.run(
    config,
    workdir,
    {
      name: sub_config(config, name)
      for name in ("sft", *runs.FITTED, *config.methods, *map(_folder, exploited(config)))
    },
    summarise,
    build=lambda part, folder: runs.build_in(part, folder, world),
  )


def exploited(config: Any) -> tuple[str, ...]:
  """Returns the methods that get an exploiter: those of `config.exploited` that are compared."""
  return tuple(name for name in config.exploited if name in config.methods)


def _folder(victim: str) -> str:
  return f"exploiter_of_{victim}"


def sub_config(config: Any, name: str) -> ml_collections.ConfigDict:
  """Returns the config of one run. The run can be evaluated on its own, like any other."""
  sub = ml_collections.ConfigDict({"paper": "digits", "preset": name, "seed": config.seed})
  sub.method = name
  if name.startswith(_folder("")):
    sub.method, sub.victim = "exploiter", name.removeprefix(_folder(""))
  sub.algorithm = dict(config.algorithm.get(sub.method, {}))
  for section in ("network", "data", "optimizer", "sharding", "train", "eval", "checkpoint"):
    sub[section] = config[section].to_dict()
  if name == "sft" or name in runs.FITTED:  # both models learn from the same labels, alike
    section = config["sft" if name == "sft" else "reward_model"]
    sub.train.num_steps = section.num_steps
    sub.train.batch_size = section.batch_size
    sub.optimizer.learning_rate = section.learning_rate
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
  kls = arrays["log_ratios"].mean((1, 2))
  near, far, weight = digit_methods.neighbours(kls, kl)
  ends = [reference if setting < 0 else _in_turn(name, arrays, setting) for setting in (near, far)]
  if near == far:
    return dataclasses.replace(ends[1], name=name)
  count = len(reference.rewards)
  toss = np.random.default_rng(zlib.crc32(name.encode())).random(count) < weight
  rewards, styles = (
    np.where(toss, getattr(ends[1], key), getattr(ends[0], key)) for key in ("rewards", "styles")
  )
  return Player(name, kl, rewards, styles)


def _in_turn(name: str, arrays: Mapping[str, np.ndarray], setting: int) -> Player:
  """Returns the policy of one setting; its seeds answer the prompts in turn."""
  num_seeds, count = arrays["rewards"].shape[1:]
  seeds, prompts = np.arange(count) % num_seeds, np.arange(count)
  rewards, styles = (arrays[key][setting][seeds, prompts] for key in ("rewards", "styles"))
  return Player(name, float(arrays["log_ratios"][setting].mean()), rewards, styles)


def exploiters(config: Any, trained: Mapping[str, results.Result]) -> list[Player]:
  """Returns the best responses that were trained against single policies."""
  return [
    _in_turn(
      f"exploiter of {digit_methods.METHODS[name].name}",
      {key: np.asarray(values)[0] for key, values in trained[_folder(name)].arrays.items()},
      0,
    )
    for name in exploited(config)
  ]


def fitted_values(
  config: Any, arrays: Mapping[str, np.ndarray], reference: Player, judge: int
) -> tuple[results.Estimate, results.Estimate]:
  """Returns reward and win rate against the reference at `eval.kl`, from the fitted frontier."""
  found = {key: np.asarray(values)[judge] for key, values in arrays.items()}
  start = digits.Quality(reference.rewards, reference.styles)
  wins = digits.preferences(
    digits.Quality(found["rewards"], found["styles"]), start, judge == runs.CYCLE
  )
  even = np.full(len(reference.rewards), 0.5)
  return (
    digit_frontiers.value_at(
      found["log_ratios"], found["rewards"], reference.rewards, config.eval.kl
    ),
    digit_frontiers.value_at(found["log_ratios"], np.asarray(wins), even, config.eval.kl),
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
    everyone = [*methods, reference, *(marked if judge == runs.CYCLE else [])]
    trained_against = exploiters(config, trained) if judge == runs.CYCLE else []
    rates = tournament([*everyone, *trained_against], judge == runs.CYCLE)
    if judge == runs.CYCLE:
      tables.append(_outsiders(everyone, trained_against, rates))
    if trained_against:
      checks_ += _exploiter_checks(everyone, rates)
    lost = [row[len(everyone) :] for row in rates]
    rates = [row[: len(everyone)] for row in rates[: len(everyone)]]
    fits = [
      fitted_values(config, trained[name].arrays, reference, judge) for name in config.methods
    ]
    tables.append(_summary(oracle, config, everyone, rates, fits))
    tables.append(_matrix(oracle, everyone, rates))
    figures.append(digit_figures.heatmap(oracle, everyone, rates))
    if judge == runs.CYCLE:
      figures.append(digit_figures.exploited(everyone, rates, trained_against, lost))
    versus = {p.name: row[num_methods] for p, row in zip(methods, rates, strict=False)}
    worst = {
      p.name: digit_figures.worst(p, everyone, row)[1]
      for p, row in zip(methods, rates, strict=False)
    }
    for name in config.methods:
      label = digit_methods.METHODS[name].name
      found[f"{oracle}/{name}"] = versus[label]
    checks_ += _checks(oracle, methods, reference, versus, worst)
  tables.insert(0, results.checks_table("Expected before the run", checks_))
  tables.append(_curves_table(config, trained))
  return results.Result(metrics=found, tables=tables, figures=figures)


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


def _outsiders(everyone, trained_against, rates) -> results.Table:
  """Returns each policy's win rates against its exploiter and against one style of equal reward."""
  rows: list[list[Any]] = []
  for player, row in zip(everyone, rates, strict=False):
    rows.append([player.name, *digits.against_one_style(player.styles)])
    if not trained_against:
      continue
    opponent, rate = digit_figures.worst(player, trained_against, row[len(everyone) :])
    found = next(each for each in trained_against if each.name == opponent)
    shares = [float(np.mean(found.styles == style)) for style in range(digits.NUM_STYLES)]
    rows[-1] += [rate, opponent, found.kl, float(found.rewards.mean()), *shares]
  columns = ["policy", "against one style of equal reward", "which"]
  if trained_against:
    columns += ["against worst trained opponent", "worst trained opponent", "its KL", "its reward"]
    columns += [f"its style {letter}" for letter in "abc"]
  return results.Table(
    "Judge: intransitive. Each policy against opponents that are not in the table above",
    columns,
    rows,
    digits=3,
  )


def _exploiter_checks(everyone, rates) -> list[tuple[str, bool]]:
  worst = {
    player.name: min(row[len(everyone) :], key=lambda rate: rate.value)
    for player, row in zip(everyone, rates, strict=False)
  }
  return [
    (
      f"intransitive: {name} does better than RLOO against its worst trained opponent",
      bool(worst["RLOO"].high < rate.low),
    )
    for name, rate in worst.items()
    if "RLOO" in worst and name.startswith("Nash-MD")
  ]


def _summary(oracle, config, everyone, rates, fits) -> results.Table:
  rows, num_methods = [], len(fits)
  fitted = [*fits, *([("", "")] * (len(everyone) - num_methods))]
  for player, row, fit in zip(everyone, rates, fitted, strict=True):
    opponent, rate = digit_figures.worst(player, everyone, row)
    shares = [float(np.mean(player.styles == style)) for style in range(digits.NUM_STYLES)]
    rows.append(
      [
        player.name,
        player.kl,
        float(player.rewards.mean()),
        row[num_methods] if player.name != "reference" else "",
        *fit,
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
      "reward, fitted",
      "beats reference, fitted",
      "against worst opponent",
      "worst opponent",
      *(f"style {letter}" for letter in "abc"),
    ],
    rows,
    caption="A mixture of the two neighbouring settings plays the games; its intervals are over "
    "prompts alone. The fitted columns read a curve through all settings at this KL; their "
    "intervals are over prompts and seeds (bootstrap).",
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
