"""The report of a language-model run: numbers with intervals, samples, figures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.report import plots, records, results, statistics
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
  for name, (scores, ref_scores) in comparison.judged.items():
    metrics[f"judge/{name}"] = statistics.mean_interval(scores)
    metrics[f"judge/{name}_reference"] = statistics.mean_interval(ref_scores)
    metrics[f"judge/{name}_win_rate"] = win_rate(scores, ref_scores)
  for n in (1, 2):
    metrics[f"distinct_{n}"] = statistics.distinct_n(comparison.ids, n)
    metrics[f"distinct_{n}_reference"] = statistics.distinct_n(comparison.ref_ids, n)
  metrics |= {f"training_{name}": results.Estimate(value) for name, value in task.found.items()}
  return results.Result(
    metrics=metrics,
    tables=[sample_table(comparison, rows=task.config.eval.num_table_rows)],
    notes=[task.reward_fn.describes, *_about(task)],
    arrays={"reward": comparison.rewards, "reward_reference": comparison.ref_rewards},
  )


def estimate(row: Mapping[str, Any], key: str) -> results.Estimate:
  """Returns a metric of an evaluation's record, with its interval if it has one."""
  return results.Estimate(row[key], row.get(f"{key}_low"), row.get(f"{key}_high"))


def path_over_kl(evaluations: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, ...]:
  """Returns KL and a metric of E evaluations, from the reference on.

  Returns:
    `[E + 1]` KL, which starts at 0, and `[E + 1]` values of the metric, which start at that of the
    reference, and `[2, E + 1]` how far their intervals reach below and above.
  """
  start = evaluations[0][f"{key}_reference"]
  kl = np.array([0.0, *(row["kl"] for row in evaluations)])
  value, low, high = (
    np.array([start, *(row.get(f"{key}{end}", row[key]) for row in evaluations)])
    for end in ("", "_low", "_high")
  )
  return kl, value, np.stack([value - low, high - value])


def _about(task: language_offline.Task) -> list[str]:
  return [
    f"Nothing learned from the judge {name}. {judge.describes}".strip()
    for name, judge in task.judges.items()
  ]


def figures(history: records.History, found: results.Result) -> list[results.Figure]:
  """Returns a histogram of the rewards, and the paths of reward and judges over KL."""
  path = over_kl(history.evals)
  return [_histogram(found), *([path] if path else [])]


def over_kl(evaluations: Sequence[Mapping[str, float]]) -> results.Figure | None:
  """Draws the mean reward and judges on held-out prompts over KL; None for fewer than two points.

  Args:
    evaluations: records of a run, oldest first.
  """
  if len(evaluations) < 2:
    return None
  first = evaluations[0]
  names = ["reward"]
  names += [key for key in first if key.startswith("judge/") and f"{key}_reference" in first]
  figure, axes = plots.subplots(1, len(names), size=(3.6, 2.8))
  for axis, name in zip(axes[0], names, strict=True):
    kl, value, reach = path_over_kl(evaluations, name)
    axis.errorbar(kl, value, yerr=reach, marker="o", ms=4, capsize=2)
    axis.set(xlabel="sequence KL to the reference, nats", title=name.removeprefix("judge/"))
  caption = (
    "Mean scores of the held-out prompts over the sequence KL, from the reference (KL 0) through "
    "the evaluations in order. Bars are 95 % intervals over prompts."
  )
  if len(names) > 1:
    caption += " Only the reward is optimised."
  return results.Figure(name="over_kl", caption=caption, figure=figure)


def _histogram(found: results.Result) -> results.Figure:
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
  return results.Figure(name="rewards", caption=caption, figure=figure)
