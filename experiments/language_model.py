"""The wiring that the language-model runs of IPO, DPO and CoPG share.

A paper says which algorithm and how scored completions become its batch (`pairs` or `groups`);
the model, its data and its comparison with the reference are a `language_task.Task`.
"""

import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import optax

import sharding
from alignment import copg, sequences
from alignment.baselines import sft
from alignment.models import huggingface, transformer
from experiments import evaluation, language_task, report, training
from experiments.data import text


def groups(samples: language_task.Samples) -> copg.Batch:
  """CoPG's batch: all K completions of a prompt."""
  return copg.Batch(
    tokens=samples.tokens,
    mask=samples.mask,
    ref_logps=samples.ref_logps,
    # A soft label shrinks the contrast; scored completions have best_probs = 1.
    rewards=samples.rewards * (2 * samples.best_probs - 1)[:, None],
    prompt_tokens=samples.prompt_tokens,
    prompt_mask=samples.prompt_mask,
  )


def demonstrations(samples: language_task.Samples) -> sft.Batch:
  """SFT's batch: the one completion of each prompt."""
  return sft.Batch(
    tokens=samples.tokens[:, 0],
    mask=samples.mask[:, 0],
    prompt_tokens=samples.prompt_tokens,
    prompt_mask=samples.prompt_mask,
  )


def pairs(samples: language_task.Samples) -> sequences.PreferenceBatch:
  """IPO's and DPO's batch: the best against the worst completion; prompts without one drop out."""
  found = text.reward_pairs(samples.rewards)
  rows = found.example
  if not rows.size:
    raise ValueError(
      "every prompt's completions have equal rewards: there is no pair to learn from"
    )
  if found.num_ties:
    print(f"{found.num_ties} prompts whose completions tie are left out: {rows.size} pairs")

  return sequences.PreferenceBatch(
    chosen_tokens=samples.tokens[rows, found.chosen],
    chosen_mask=samples.mask[rows, found.chosen],
    chosen_ref_logps=samples.ref_logps[rows, found.chosen],
    rejected_tokens=samples.tokens[rows, found.rejected],
    rejected_mask=samples.mask[rows, found.rejected],
    rejected_ref_logps=samples.ref_logps[rows, found.rejected],
    chosen_probs=samples.best_probs[rows],
    prompt_tokens=samples.prompt_tokens[rows],
    prompt_mask=samples.prompt_mask[rows],
  )


def make_optimizer(config: Any, num_steps: int) -> optax.GradientTransformation:
  """Adam(W) with global-norm clipping, linear warm-up and a cosine to `final_scale`."""
  schedule = optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=config.warmup_steps,
    decay_steps=max(num_steps, config.warmup_steps + 1),
    end_value=config.learning_rate * config.final_scale,
  )
  adam = optax.adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay)
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), adam)


def build(
  config: Any,
  workdir: pathlib.Path,
  *,
  algorithm: Any,
  collate: Callable[[language_task.Samples], Any],
) -> training.Experiment:
  """Returns the experiment of one alignment algorithm.

  Args:
    config: an `experiments.configs.base.language_model` config.
    workdir: unused here; part of every paper's `build`.
    algorithm: a module in the one shape (`ipo`, `dpo`, `copg`).
    collate: `Samples -> algorithm.Batch` with a leading axis of training examples.
  """
  del workdir
  algorithm_config = algorithm.Config(**config.algorithm)
  _check_sizes(config, algorithm_config.num_microbatches)
  optimizer = make_optimizer(config.optimizer, config.train.num_steps)
  task = language_task.make_task(config)

  def init(key, params):
    del key
    return algorithm.init(params, optimizer=optimizer, config=algorithm_config)

  def batches():
    arrays = collate(task.training_samples())
    return text.batches(arrays, batch_size=config.train.batch_size, seed=config.seed)

  def evaluate(state):
    return _result(task.compare(state.params), task)

  def export(state, folder):
    huggingface.save(folder, task.network, state.params, tokenizer=task.model.tokenizer)

  return training.Experiment(
    init=init,
    init_args=(task.model.params,),
    update=functools.partial(
      algorithm.update, apply_fn=task.apply_fn, optimizer=optimizer, config=algorithm_config
    ),
    batches=batches,
    headline="win_rate",
    rules=(*transformer.SHARDING_RULES, *sharding.REPLICATED),
    evaluate=evaluate,
    sample=lambda state: _sample_table(task.compare(state.params), rows=None),
    export=export,
    figures=lambda history, result: _figures(history, result),
  )


def check_batch_size(config: Any, num_microbatches: int) -> None:
  """Raises ValueError where `train.batch_size` does not split over micro-batches and devices."""
  size = config.train.batch_size
  if size % num_microbatches:
    raise ValueError(
      f"algorithm.num_microbatches={num_microbatches} does not divide train.batch_size={size}: "
      "choose a divisor"
    )
  mesh = training.make_mesh(config.sharding.mesh)
  shards = math.prod(mesh.shape.get(axis, 1) for axis in sharding.DATA_AXES)
  if size % shards:
    raise ValueError(
      f"train.batch_size={size} does not divide over the {shards} shards of sharding.mesh "
      f"{dict(mesh.shape)}: choose a multiple"
    )


def _check_sizes(config: Any, num_microbatches: int) -> None:
  """Raises before minutes of sampling what the first step would find."""
  check_batch_size(config, num_microbatches)
  size, data = config.train.batch_size, config.data
  if language_task.has_own_data(data):
    return
  if data.num_samples < 2:
    raise ValueError(
      f"data.num_samples={data.num_samples}: completions of a prompt are compared, draw 2 or more"
    )
  if size > data.num_prompts:
    raise ValueError(
      f"train.batch_size={size} exceeds data.num_prompts={data.num_prompts}: lower the first or "
      "raise the second"
    )


def _sample_table(comparison: language_task.Comparison, rows: int | None) -> report.Table:
  shown = range(len(comparison.prompts))[:rows]
  return report.Table(
    title="Held-out prompts: reference and policy",
    columns=["prompt", "reference", "reward", "policy", "reward"],
    rows=[
      [
        comparison.prompts[i],
        comparison.ref_texts[i],
        f"{comparison.ref_rewards[i]:+.2f}",
        comparison.texts[i],
        f"{comparison.rewards[i]:+.2f}",
      ]
      for i in shown
    ],
  )


def _result(comparison: language_task.Comparison, task: language_task.Task) -> evaluation.Result:
  """Headline numbers with intervals, and the samples before and after."""
  difference = comparison.rewards - comparison.ref_rewards
  wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
  ties = len(difference) - wins - losses
  lengths = np.array([len(ids) for ids in comparison.ids])
  ref_lengths = np.array([len(ids) for ids in comparison.ref_ids])
  metrics = {
    "win_rate": evaluation.win_rate(wins, losses, ties),
    "reward": evaluation.mean_interval(comparison.rewards),
    "reward_reference": evaluation.mean_interval(comparison.ref_rewards),
    "kl": evaluation.mean_interval(comparison.log_ratios),
    "length": evaluation.mean_interval(lengths),
    "length_reference": evaluation.mean_interval(ref_lengths),
  }
  for n in (1, 2):
    metrics[f"distinct_{n}"] = evaluation.distinct_n(comparison.ids, n)
    metrics[f"distinct_{n}_reference"] = evaluation.distinct_n(comparison.ref_ids, n)
  return evaluation.Result(
    metrics=metrics,
    tables=[_sample_table(comparison, rows=task.config.eval.num_table_rows)],
    notes=[task.reward_fn.describes],
    arrays={"reward": comparison.rewards, "reward_reference": comparison.ref_rewards},
  )


def _figures(history, result) -> list[report.Figure]:
  figure, axes = report.subplots(1, 1)
  bins = np.linspace(
    min(result.arrays["reward"].min(), result.arrays["reward_reference"].min()),
    max(result.arrays["reward"].max(), result.arrays["reward_reference"].max()) + 1e-6,
    25,
  )
  for name, label in (("reward_reference", "reference"), ("reward", "policy")):
    axes[0][0].hist(result.arrays[name], bins=bins, alpha=0.6, label=label)
  axes[0][0].set(xlabel="reward of one completion", ylabel="held-out completions")
  axes[0][0].legend()
  caption = "Rewards of one completion a held-out prompt, before and after."
  return [report.Figure(name="rewards", caption=caption, figure=figure)]
