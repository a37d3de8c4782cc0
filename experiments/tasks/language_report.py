"""What a language-model run says of itself: numbers with intervals, samples, histograms."""

from typing import Any

import numpy as np

from experiments.report import plots, results, statistics
from experiments.tasks import language_offline


def sample_table(comparison: language_offline.Comparison, rows: int | None = None) -> results.Table:
  """Returns the first `rows` held-out prompts (all by default) with both completions."""
  shown = range(len(comparison.prompts))[:rows]
  return results.Table(
    title="Held-out prompts: reference and policy",
    columns=["prompt", "reference", "reward", "policy", "reward"],
    rows=[
      [
        comparison.prompts[i],
        comparison.ref_texts[i],
        float(comparison.ref_rewards[i]),
        comparison.texts[i],
        float(comparison.rewards[i]),
      ]
      for i in shown
    ],
  )


def win_rate(rewards: np.ndarray, ref_rewards: np.ndarray) -> results.Estimate:
  """Returns how often the policy's completion `[N]` has the higher reward of the two."""
  difference = rewards - ref_rewards
  wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
  return statistics.win_rate(wins, losses, len(difference) - wins - losses)


def result(comparison: language_offline.Comparison, task: language_offline.Task) -> results.Result:
  """Headline numbers with intervals, and the samples before and after."""
  lengths = np.array([len(ids) for ids in comparison.ids])
  ref_lengths = np.array([len(ids) for ids in comparison.ref_ids])
  metrics = {
    "win_rate": win_rate(comparison.rewards, comparison.ref_rewards),
    "reward": statistics.mean_interval(comparison.rewards),
    "reward_reference": statistics.mean_interval(comparison.ref_rewards),
    "kl": statistics.mean_interval(comparison.log_ratios),
    "length": statistics.mean_interval(lengths),
    "length_reference": statistics.mean_interval(ref_lengths),
  }
  for n in (1, 2):
    metrics[f"distinct_{n}"] = statistics.distinct_n(comparison.ids, n)
    metrics[f"distinct_{n}_reference"] = statistics.distinct_n(comparison.ref_ids, n)
  return results.Result(
    metrics=metrics,
    tables=[sample_table(comparison, rows=task.config.eval.num_table_rows)],
    notes=[task.reward_fn.describes],
    arrays={"reward": comparison.rewards, "reward_reference": comparison.ref_rewards},
  )


def figures(history: Any, found: results.Result) -> list[results.Figure]:
  """Returns the histograms of the rewards in a result."""
  del history
  figure, axes = plots.subplots(1, 1)
  rewards = {"reference": found.arrays["reward_reference"], "policy": found.arrays["reward"]}
  together = np.concatenate(list(rewards.values()))
  bins = np.linspace(together.min(), together.max() + 1e-6, 25)
  for label, values in rewards.items():
    axes[0][0].hist(values, bins=bins, alpha=0.6, label=label)
  axes[0][0].set(xlabel="reward of one completion", ylabel="held-out completions")
  axes[0][0].legend()
  caption = "Rewards of one completion a held-out prompt, before and after."
  return [results.Figure(name="rewards", caption=caption, figure=figure)]
