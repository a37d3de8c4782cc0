"""The report of a language-model run: numbers with intervals, samples, histograms."""

from typing import Any

import numpy as np

from experiments.report import plots, results, statistics
from experiments.tasks import language_offline


def sample_table(comparison: language_offline.Comparison, rows: int | None = None) -> results.Table:
  """Returns a table of the first `rows` held-out prompts (default: all) with both completions."""
  shown = range(len(comparison.prompts))[:rows]
  return results.Table(
    title="Held-out prompts: completions of reference and policy",
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
  """Returns how often the policy's completion has the higher reward; rewards are `[N]`."""
  difference = rewards - ref_rewards
  wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
  return statistics.win_rate(wins, losses, len(difference) - wins - losses)


def result(comparison: language_offline.Comparison, task: language_offline.Task) -> results.Result:
  """Returns the headline numbers with intervals, and samples before and after training."""
  lengths = np.array([len(ids) for ids in comparison.ids])
  ref_lengths = np.array([len(ids) for ids in comparison.ref_ids])
  metrics = {
    "win_rate": win_rate(comparison.rewards, comparison.ref_rewards),
    "reward": statistics.mean_interval(comparison.rewards),
    "reward_reference": statistics.mean_interval(comparison.ref_rewards),
    "kl": statistics.mean_interval(comparison.log_ratios),
    "length": statistics.mean_interval(lengths, method="log"),
    "length_reference": statistics.mean_interval(ref_lengths, method="log"),
  }
  for n in (1, 2):
    metrics[f"distinct_{n}"] = statistics.distinct_n(comparison.ids, n)
    metrics[f"distinct_{n}_reference"] = statistics.distinct_n(comparison.ref_ids, n)
  metrics |= {f"training_{name}": results.Estimate(value) for name, value in task.found.items()}
  return results.Result(
    metrics=metrics,
    tables=[sample_table(comparison, rows=task.config.eval.num_table_rows)],
    notes=[task.reward_fn.describes],
    arrays={"reward": comparison.rewards, "reward_reference": comparison.ref_rewards},
  )


def figures(history: Any, found: results.Result) -> list[results.Figure]:
  """Returns a histogram of the rewards in a result."""
  del history
  figure, axes = plots.subplots(1, 1)
  rewards = {"reference": found.arrays["reward_reference"], "policy": found.arrays["reward"]}
  together = np.concatenate(list(rewards.values()))
  bins = np.linspace(together.min(), together.max() + 1e-6, 25)
  for label, values in rewards.items():
    axes[0][0].hist(values, bins=bins, alpha=0.6, label=label)
  axes[0][0].set(xlabel="reward of one completion", ylabel="held-out completions")
  axes[0][0].legend()
  caption = (
    "The histograms show the rewards of one completion for each held-out prompt, drawn before "
    "(reference) and after training (policy)."
  )
  return [results.Figure(name="rewards", caption=caption, figure=figure)]
