"""Reward and preference models: trained on labelled pairs, tested on pairs of other prompts."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

import sharding
from alignment import reward_model
from alignment.models import lora, scalar_head
from experiments.data import learned_rewards, text
from experiments.loop import training
from experiments.papers import reward_model_bandit
from experiments.report import results
from experiments.tasks import language, preference_accuracy, preferences

SCALAR = language.Network(rules=scalar_head.SHARDING_RULES)
_EVAL_PAIRS = 32  # pairs in one evaluation batch


def build(config: Any) -> training.Experiment:
  """Returns the experiment of one preset."""
  if config.data.name == "reward_model_bandit":
    return reward_model_bandit.build(config)
  algorithm = reward_model.Config(**config.algorithm)
  network = language.with_adapters(SCALAR, config.network)
  task = preferences.make_task(config)
  language.check_adapters(network, task.trained_params)
  length_coefficient = preference_accuracy.fit_length(task.train_pairs)
  bound: dict[str, Any] = {"apply_fn": task.apply_fn, "config": algorithm}
  init, update, trained = language.learner(
    reward_model,
    optimizer=language.make_optimizer(config.optimizer, config.train.num_steps),
    network=network,
    **bound,
  )

  def params_of(state):
    return network.join(trained(state), getattr(state, "ref_params", None))

  logits = jax.jit(functools.partial(reward_model.preference_logits, **bound))

  def log_odds(params):
    batch, size = task.test_batch(), _EVAL_PAIRS
    count = len(batch.chosen_probs)
    rows = [np.minimum(np.arange(i, i + size), count - 1) for i in range(0, count, size)]
    found = [logits(params, jax.tree.map(lambda x: x[n], batch)) for n in rows]  # noqa: B023
    return np.concatenate(found)[:count]

  def evaluate(state):
    found = log_odds(params_of(state))
    return preference_accuracy.evaluate(
      found, task.test_pairs, length_coefficient=length_coefficient
    )

  def export(state, folder):
    accuracy = evaluate(state).metrics["accuracy"]
    settings = dataclasses.replace(task.settings, describes=_describe(config, accuracy))
    params = task.full_params(lora.merge(params_of(state)))
    tokenizer = task.model.tokenizer
    learned_rewards.save(folder, settings, task.network, params, tokenizer=tokenizer)

  return training.Experiment(
    init=init,
    init_args=(task.trained_params,),
    update=update,
    batches=lambda: language.batches(config, task.train_batch()),
    headline="accuracy",
    rules=(*network.rules, *sharding.REPLICATED),
    evaluate=evaluate,
    sample=lambda state: _table(log_odds(params_of(state)), task.test_pairs),
    export=export,
    figures=preference_accuracy.figures,
  )


def _describe(config: Any, accuracy: results.Estimate) -> str:
  return (
    f"The reward is a {config.algorithm.kind} model trained on {config.data.preferences}. Its "
    f"accuracy on held-out pairs is {accuracy} (a coin has 0.5). It approximates the people who "
    "labelled the pairs and can be wrong on other text, so a policy can raise this reward without "
    "pleasing them."
  )


def _table(log_odds: np.ndarray, pairs: list[text.Preference]) -> results.Table:
  rows = [
    [pair.prompt, pair.chosen, pair.rejected, float(z)]
    for pair, z in zip(pairs, log_odds, strict=True)
  ]
  columns = ["prompt", "chosen", "rejected", "log-odds of chosen"]
  return results.Table("Held-out pairs", columns, rows)
