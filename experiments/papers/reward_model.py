"""Reward and preference models: trained on labelled pairs, judged on the pairs of other prompts.

The bandit run fits tables to random preferences with ever stronger cycles. Where there are none a
Bradley-Terry model gives back the rewards up to a constant; with cycles it stops above the entropy
of the labels, at a reward that depends on who wrote the pairs. A pairwise model reaches it.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sharding
from alignment import oracles, reward_model
from alignment.models import scalar_head
from experiments.data import learned_rewards, text
from experiments.loop import training
from experiments.report import results
from experiments.tasks import bandit_grid, bandits, language, preference_accuracy, preferences

_EVAL_PAIRS = 32  # read at once


def build(config: Any, workdir: pathlib.Path) -> training.Experiment:
  """Returns the experiment of one preset."""
  if config.data.name == "reward_model_bandit":
    return _bandit(config)
  del workdir
  algorithm = reward_model.Config(**config.algorithm)
  optimizer = language.make_optimizer(config.optimizer, config.train.num_steps)
  task = preferences.make_task(config)
  length_coefficient = preference_accuracy.fit_length(task.train_pairs)
  bound: dict[str, Any] = {"apply_fn": task.apply_fn, "config": algorithm}

  def init(key, params):
    del key
    return reward_model.init(params, optimizer=optimizer, config=algorithm)

  def batches():
    return text.batches(task.train_batch(), batch_size=config.train.batch_size, seed=config.seed)

  logits = jax.jit(functools.partial(reward_model.preference_logits, **bound))

  def log_odds(params):
    batch, size = task.test_batch(), _EVAL_PAIRS
    count = len(batch.chosen_probs)
    rows = [np.minimum(np.arange(i, i + size), count - 1) for i in range(0, count, size)]
    found = [logits(params, jax.tree.map(lambda x: x[n], batch)) for n in rows]  # noqa: B023
    return np.concatenate(found)[:count]

  def evaluate(state):
    found = log_odds(state.params)
    return preference_accuracy.judge(found, task.test_pairs, length_coefficient=length_coefficient)

  def export(state, folder):
    accuracy = evaluate(state).metrics["accuracy"]
    settings = dataclasses.replace(task.settings, describes=_describe(config, accuracy))
    params = task.full_params(state.params)
    tokenizer = task.model.tokenizer
    learned_rewards.save(folder, settings, task.network, params, tokenizer=tokenizer)

  return training.Experiment(
    init=init,
    init_args=(task.trained_params,),
    update=functools.partial(reward_model.update, optimizer=optimizer, **bound),
    batches=batches,
    headline="accuracy",
    rules=(*scalar_head.SHARDING_RULES, *sharding.REPLICATED),
    evaluate=evaluate,
    sample=lambda state: _table(log_odds(state.params), task.test_pairs),
    export=export,
    figures=preference_accuracy.figures,
  )


def _describe(config: Any, accuracy: results.Estimate) -> str:
  return (
    f"The reward is a {config.algorithm.kind} model learned from {config.data.preferences}, with "
    f"an accuracy of {accuracy} on held-out pairs (a coin: 0.5). It stands in for those who "
    "labelled the pairs and errs where they were not asked; a policy can raise it without pleasing "
    "them."
  )


def _table(log_odds: np.ndarray, pairs: list[text.Preference]) -> results.Table:
  rows = [
    [pair.prompt, pair.chosen, pair.rejected, f"{z:+.2f}"]
    for pair, z in zip(pairs, log_odds, strict=True)
  ]
  columns = ["prompt", "chosen", "rejected", "log-odds of chosen"]
  return results.Table("Held-out pairs", columns, rows)


def _bandit(config: Any) -> training.Experiment:
  cycles = tuple(float(cycle) for cycle in config.data.cycles)
  if not cycles or cycles[0] != 0 or not np.all(np.diff(cycles) > 0):
    raise ValueError(
      f"config.data.cycles={cycles}: give rising strengths that start at 0, such as (0.0, 1.0, 2.0)"
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
    read=lambda params: params - params.mean(-1, keepdims=True),  # the constant is free
  )
  methods = {
    "reward": rewards("Bradley-Terry", counts=uneven, exact=scores(uneven)),
    "even": rewards("Bradley-Terry, other pairs", counts=even, exact=scores(even)),
    "pairs": method(
      "pairwise",
      "pairwise",
      uneven,
      preferences,
      np.zeros(grid.cycles.shape),
      # f(y, y'): y ends the prompt, y' is the completion.
      lambda params, rows: params[rows.prompt_tokens[:, -1], rows.tokens[:, 0]],
      lambda params: jax.nn.sigmoid((params - jnp.swapaxes(params, -1, -2)) / 2),
    ),
  }

  def judge(sweep, ends):
    del sweep
    checks, rows = [], []
    truth = grid.rewards - grid.rewards.mean(1, keepdims=True)
    worst = max(np.abs(ends[name][0] - truth).max() for name in ("reward", "even"))
    checks.append(("no cycles: the rewards, up to a constant, within 1e-3", bool(worst < 1e-3)))
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
      checks.append((f"cycle {cycle}: pairwise within 1e-5 of the entropy of the labels", at_floor))
      if cycle:
        above = bool(at_floor and bandit_grid.interval(excess["reward"])[1] > 0.005)
        checks.append((f"cycle {cycle}: Bradley-Terry over 0.005 nats above the entropy", above))
        apart = bool(at_floor and sources.mean() > 0.05)
        checks.append((f"cycle {cycle}: other pairs, another reward (0.05 on average)", apart))
      rows.append([cycle, *(bandit_grid.by_bandit(x) for x in (*excess.values(), sources))])
    columns = ["cycle", "Bradley-Terry", "pairwise", "difference of rewards between two sources"]
    title = "Log-loss above the entropy of the labels, nats, mean over the problems"
    return checks, [results.Table(title, columns, rows)]

  return bandit_grid.build(
    config,
    methods,
    cycles,
    symbol="cycle",
    optimizer=bandits.cosine_adam(config),
    judge=judge,
    sample=lambda sweep: _fitted(sweep, methods, cycles, preferences),
  )


def _excess(preferences: np.ndarray, fitted: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Mean KL(true label || fitted label) over the pairs of each bandit, `[P]`."""
  labels = [(p, q) for p, q in ((preferences, fitted), (1 - preferences, 1 - fitted))]
  return (weights * sum(p * np.log(p / q) for p, q in labels)).sum((1, 2))


def _fitted(sweep, methods, cycles, preferences) -> results.Table:
  """What the models say of the pairs of the first bandit."""
  ends = {name: np.asarray(m.read(sweep.runs[name].params), float) for name, m in methods.items()}
  names, rows = bandits.arm_names(preferences.shape[-1]), []
  for i, cycle in enumerate(cycles):
    for first, second in zip(*np.triu_indices(len(names), 1), strict=True):
      gap = ends["reward"][i, 0, first] - ends["reward"][i, 0, second]
      probs = (preferences[i, 0, first, second], 1 / (1 + np.exp(-gap)))
      cells = (*probs, ends["pairs"][i, 0, first, second])
      rows.append([cycle, f"{names[first]} {names[second]}", *(f"{p:.3f}" for p in cells)])
  columns = ["cycle", "pair", "P(first beats second)", "Bradley-Terry", "pairwise"]
  return results.Table("Preferences of the first bandit, and what the models say", columns, rows)
