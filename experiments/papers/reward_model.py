"""Reward and preference models: trained on labelled pairs, tested on the pairs of other prompts."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

import sharding
from alignment import reward_model
from alignment.models import scalar_head
from experiments.data import batching, learned_rewards, text
from experiments.loop import training
from experiments.papers import reward_model_bandit
from experiments.report import results
from experiments.tasks import language, preference_accuracy, preferences

_EVAL_PAIRS = 32  # read at once


def build(config: Any) -> training.Experiment:
  """Returns the experiment of one preset."""
  if config.data.name == "reward_model_bandit":
    return reward_model_bandit.build(config)
  algorithm = reward_model.Config(**config.algorithm)
  optimizer = language.make_optimizer(config.optimizer, config.train.num_steps)
  task = preferences.make_task(config)
  length_coefficient = preference_accuracy.fit_length(task.train_pairs)
  bound: dict[str, Any] = {"apply_fn": task.apply_fn, "config": algorithm}

  def init(key, params):
    del key
    return reward_model.init(params, optimizer=optimizer, config=algorithm)

  def batches():
    return batching.batches(
      task.train_batch(), batch_size=config.train.batch_size, seed=config.seed
    )

  logits = jax.jit(functools.partial(reward_model.preference_logits, **bound))

  def log_odds(params):
    batch, size = task.test_batch(), _EVAL_PAIRS
    count = len(batch.chosen_probs)
    rows = [np.minimum(np.arange(i, i + size), count - 1) for i in range(0, count, size)]
    found = [logits(params, jax.tree.map(lambda x: x[n], batch)) for n in rows]  # noqa: B023
    return np.concatenate(found)[:count]

  def evaluate(state):
    found = log_odds(state.params)
    return preference_accuracy.evaluate(
      found, task.test_pairs, length_coefficient=length_coefficient
    )

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
    [pair.prompt, pair.chosen, pair.rejected, float(z)]
    for pair, z in zip(pairs, log_odds, strict=True)
  ]
  columns = ["prompt", "chosen", "rejected", "log-odds of chosen"]
  return results.Table("Held-out pairs", columns, rows)
