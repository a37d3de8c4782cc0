"""Reward and preference models as tables, on random preferences with cycles of growing strength.

Without cycles a Bradley-Terry model recovers the rewards up to a constant. With cycles its loss
stays above the entropy of the labels, and its rewards depend on the distribution of the pairs. A
pairwise model reaches the entropy.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignment import oracles, reward_model
from experiments.loop import training
from experiments.report import results, statistics
from experiments.tasks import bandit_grid, bandits


def build(config: Any) -> training.Experiment:
  """Returns the experiment of the preset `bandit`."""
  cycles = tuple(float(cycle) for cycle in config.data.cycles)
  if not cycles or cycles[0] != 0 or not np.all(np.diff(cycles) > 0):
    raise ValueError(
      f"config.data.cycles={cycles} must start at 0 and rise: give for example (0.0, 1.0, 2.0)"
    )
  grid = bandit_grid.random_bandits(config)
  even, uneven = np.ones_like(grid.counts), grid.counts
  preferences = np.stack([grid.preferences(cycle) for cycle in cycles])  # [S, P, A, A]

  def method(label, kind, counts, exact, start, apply_fn, read):
    first, second = (jnp.asarray(arms[..., None]) for arms in bandit_grid.pair_arms(counts))

    def batch(problem, setting, params, key):
      del params, key
      first, second, rewards, skew = problem
      ones = jnp.ones(first.shape)
      pair = (first[:, 0], second[:, 0])
      log_odds = rewards[pair[0]] - rewards[pair[1]] + setting * skew[pair]
      return reward_model.Batch(
        chosen_tokens=first,
        chosen_mask=ones,
        rejected_tokens=second,
        rejected_mask=ones,
        prompt_tokens=jnp.zeros(first.shape, jnp.int32),
        prompt_mask=ones,
        chosen_probs=jax.nn.sigmoid(log_odds),
      )

    arrays = (jnp.asarray(x, jnp.float32) for x in (grid.rewards, grid.cycles))
    return bandit_grid.Method(
      label=label,
      algorithm=reward_model,
      config=lambda cycle: reward_model.Config(kind=kind),
      batch=batch,
      problems=(first, second, *arrays),
      start=start,
      exact=exact,
      tolerance=1e-3,
      apply_fn=apply_fn,
      read=read,
    )

  def scores(counts):
    weights = counts[:, :, None] * counts[:, None, :]
    return oracles.bradley_terry_scores(preferences, weights)

  rewards = functools.partial(
    method,
    kind="bradley_terry",
    start=np.zeros(grid.rewards.shape),
    apply_fn=lambda params, rows: params[rows.tokens[:, 0]],
    read=lambda params: params - params.mean(-1, keepdims=True),  # the loss ignores a constant
  )
  methods = {
    "reward": rewards("Bradley-Terry", counts=uneven, exact=scores(uneven)),
    "even": rewards("Bradley-Terry, even pairs", counts=even, exact=scores(even)),
    "pairs": method(
      "pairwise",
      "pairwise",
      uneven,
      preferences,
      np.zeros(grid.cycles.shape),
      # f(y, y'): y is the last token of the prompt, y' the completion.
      lambda params, rows: params[rows.prompt_tokens[:, -1], rows.tokens[:, 0]],
      lambda params: jax.nn.sigmoid((params - jnp.swapaxes(params, -1, -2)) / 2),
    ),
  }

  def findings(sweep, ends):
    del sweep
    checks, rows = [], []
    truth = grid.rewards - grid.rewards.mean(1, keepdims=True)
    worst = max(np.abs(ends[name][0] - truth).max() for name in ("reward", "even"))
    checks.append(("no cycles: rewards within 1e-3, up to a constant", bool(worst < 1e-3)))
    weights = np.triu(uneven[:, :, None] * uneven[:, None, :], 1)
    weights = weights / weights.sum((1, 2), keepdims=True)
    for i, cycle in enumerate(cycles):
      gap = ends["reward"][i][:, :, None] - ends["reward"][i][:, None, :]
      excess = {
        "reward": _excess(preferences[i], 1 / (1 + np.exp(-gap)), weights),
        "pairs": _excess(preferences[i], ends["pairs"][i], weights),
      }
      sources = np.abs(ends["reward"][i] - ends["even"][i]).max(1)
      at_floor = bool(excess["pairs"].max() < 1e-5)
      checks.append(
        (f"cycle {cycle}: pairwise is within 1e-5 of the entropy of the labels", at_floor)
      )
      if cycle:
        above = bool(at_floor and (statistics.mean_interval(excess["reward"]).low or 0) > 0.005)
        checks.append((f"cycle {cycle}: Bradley-Terry is over 0.005 nats above the entropy", above))
        apart = bool(at_floor and sources.mean() > 0.05)
        checks.append((f"cycle {cycle}: rewards depend on the pairs (mean over 0.05)", apart))
      cells = (*excess.values(), sources)
      rows.append([cycle, *(statistics.mean_interval(x, method="log") for x in cells)])
    columns = ["cycle", "Bradley-Terry", "pairwise", "reward difference of two pair distributions"]
    title = "Log-loss above the entropy of the labels, nats, mean over the problems"
    return checks, [results.Table(title, columns, rows)]

  return bandit_grid.build(
    config,
    methods,
    cycles,
    symbol="cycle",
    optimizer=bandits.cosine_adam(config),
    findings=findings,
    sample=lambda sweep: _fitted(sweep, methods, cycles, preferences),
  )


def _excess(preferences: np.ndarray, fitted: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Returns the mean KL(true label || fitted label) over the pairs of each bandit, `[P]`."""
  labels = [(p, q) for p, q in ((preferences, fitted), (1 - preferences, 1 - fitted))]
  return (weights * sum(p * np.log(p / q) for p, q in labels)).sum((1, 2))


def _fitted(sweep, methods, cycles, preferences) -> results.Table:
  """Returns a table of the models' predictions for the pairs of the first bandit."""
  ends = {name: np.asarray(m.read(sweep.runs[name].params), float) for name, m in methods.items()}
  names, rows = bandits.arm_names(preferences.shape[-1]), []
  for i, cycle in enumerate(cycles):
    for first, second in zip(*np.triu_indices(len(names), 1), strict=True):
      gap = ends["reward"][i, 0, first] - ends["reward"][i, 0, second]
      probs = (preferences[i, 0, first, second], 1 / (1 + np.exp(-gap)))
      cells = (*probs, ends["pairs"][i, 0, first, second])
      rows.append([cycle, f"{names[first]} {names[second]}", *map(float, cells)])
  columns = ["cycle", "pair", "P(first beats second)", "Bradley-Terry", "pairwise"]
  return results.Table(
    "Preferences of the first bandit and predictions of the models", columns, rows
  )
