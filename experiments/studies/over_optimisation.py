"""Follows a learned reward until the judge that it learned from no longer agrees.

The parts are ordinary runs: supervised fine-tuning, a reward model of pairs that the judge has
labelled, and a policy that learns from the reward model alone. The judge scores the evaluations of
the policy (`eval.judges`).
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections

from experiments import files
from experiments.data import rewards, text
from experiments.loop import presets, suite, training
from experiments.report import results
from experiments.tasks import language, language_offline, language_report
from sharding import checks

PARTS = ("sft", "reward_model", "policy")
_SECTIONS = ("algorithm", "network", "optimizer", "data", "train", "eval", "checkpoint")


def run(config: Any, workdir: pathlib.Path) -> training.Outcome:
  """Trains the three parts, each in its own folder, and writes one report."""
  checks.count("config.data.num_pairs", config.data.num_pairs)
  for field in ("demonstrations", "prompts"):
    if config.judge == "rouge_l" and not config.data[field]:
      raise ValueError(
        f"config.data.{field} is empty, and config.judge='rouge_l' compares with references: name "
        "a source of {prompt, completion}, or give another judge"
      )
  parts = part_configs(config, workdir)
  for part in parts.values():
    language.check_batch_size(part, part.algorithm.num_microbatches)
  rewards.resolve(parts["sft"].reward)
  model = parts["reward_model"]
  num_prompts = min(config.data.num_pairs, len(_prompts_of_pairs(config)))
  if num_prompts < model.eval.num_prompts + model.train.batch_size:
    raise ValueError(
      f"config.data.num_pairs={config.data.num_pairs} gives the reward model {num_prompts} pairs: "
      f"config.reward_model.eval.num_prompts={model.eval.num_prompts} are held out, and a batch "
      f"has {model.train.batch_size}: give more demonstrations or hold out fewer"
    )

  def build(part, folder):
    if folder.name == "reward_model":
      write_pairs(config, parts, workdir)
    return presets.build(part, folder)

  judge = next(iter(rewards.resolve_judges(parts["policy"].eval.judges)))
  return suite.run(
    config, workdir, parts, lambda done: _summarise(done, f"judge/{judge}"), build=build
  )


def part_configs(config: Any, workdir: pathlib.Path) -> dict[str, ml_collections.ConfigDict]:
  """Returns the config of each part by its folder."""
  parts = {}
  for name in PARTS:
    part = presets.resolve(config.methods[name])
    part.seed = config.seed
    part.sharding.update(config.sharding)
    own = config if name == "policy" else config[name]
    for section in _SECTIONS:
      fields = own.get(section, {})
      part[section].update({name: fields[name] for name in fields if name in part[section]})
    parts[name] = part
  sft, policy = parts["sft"], parts["policy"]
  policy.data.update({name: sft.data[name] for name in ("prompt_length", "truncate")})
  policy.data.completion_length = sft.data.completion_length
  for part in (sft, policy):
    part.data.prompts = config.data.prompts
    part.eval.num_prompts = policy.eval.num_prompts  # the same are held out
  sft.data.demonstrations, policy.data.demonstrations = config.data.demonstrations, ""
  sft.reward = policy.eval.judges = judge_of(config, config.data.prompts)
  parts["reward_model"].data.update(
    {
      "preferences": str(_pairs_file(workdir)),
      "prompt_length": sft.data.prompt_length,
      "completion_length": sft.data.completion_length,
    }
  )
  policy.network.model = parts["reward_model"].network.model = str(workdir / "sft" / "model")
  policy.reward = str(workdir / "reward_model" / "model")
  return parts


def judge_of(config: Any, source: str) -> str:
  """Returns the judge's name; ROUGE-L reads the references of a source."""
  return f"rouge_l:{source}" if config.judge == "rouge_l" else config.judge


def _prompts_of_pairs(config: Any) -> list[str]:
  """Returns the demonstrations' prompts, without those on which the policy is evaluated."""
  found = text.load_prompts(config.data.demonstrations or None)
  source = text.load_prompts(config.data.prompts or None)
  _, test = text.split_prompts(source, num_test=config.eval.num_prompts, seed=config.seed)
  held_out = set(test)
  return [prompt for prompt in found if prompt not in held_out]


def _pairs_file(workdir: pathlib.Path) -> pathlib.Path:
  return workdir / "pairs.jsonl"


def write_pairs(config: Any, parts: Mapping[str, Any], workdir: pathlib.Path) -> None:
  """Draws two completions of each demonstration's prompt, and writes which one the judge prefers.

  The pairs are drawn from the fine-tuned model, once. Ties are left out.
  """
  path = _pairs_file(workdir)
  if path.exists():
    return
  drawing = parts["policy"].copy_and_resolve_references()
  drawing.reward, drawing.eval.judges = judge_of(config, config.data.demonstrations), ""
  drawing.data.prompts, drawing.data.num_samples = config.data.demonstrations, 2
  drawing.data.num_prompts = drawing.eval.num_prompts = 1
  prompts = _prompts_of_pairs(config)[: config.data.num_pairs]
  task = dataclasses.replace(language_offline.make_task(drawing), train_prompts=prompts)
  samples = task.training_samples(2)
  found = language.extreme_pairs(samples)
  tokens, mask = (x.reshape(-1, x.shape[-1]) for x in (samples.tokens, samples.mask))
  texts, lines = task.decode(tokens, mask, samples.prompts), []
  for row, best, worst in zip(found.example, found.chosen, found.rejected, strict=True):
    prompt, chosen, rejected = samples.prompts[row], texts[2 * row + best], texts[2 * row + worst]
    if chosen.strip() and rejected.strip():  # nothing was said: no text to learn from
      lines.append(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}))
  files.write_file(path, "\n".join(lines) + "\n")


def _summarise(parts: Mapping[str, suite.Part], judge: str) -> suite.Summary:
  evaluations = parts["policy"].history.evals
  first, last = evaluations[0], evaluations[-1]
  peak = max(evaluations, key=lambda row: row[judge])
  start = language_report.estimate(first, f"{judge}_reference")
  reward, proxy = (
    language_report.estimate(last, "reward"),
    language_report.estimate(first, "reward_reference"),
  )
  criteria = [
    ("the learned reward rises", _apart(proxy, reward)),
    ("the judge rises at first", _apart(start, language_report.estimate(peak, judge))),
    (
      "the judge falls again",
      _apart(language_report.estimate(last, judge), language_report.estimate(peak, judge)),
    ),
  ]
  keys = ("kl", "reward", judge, f"{judge}_win_rate", "length")
  rows = [
    [0, "", proxy, start, "", language_report.estimate(first, "length_reference")],
    *([row["step"], *(language_report.estimate(row, key) for key in keys)] for row in evaluations),
  ]
  columns = ["step", "KL", "learned reward", "judge", "judge: wins against the start", "tokens"]
  tables = [
    results.checks_table("What over-optimisation looks like", criteria),
    results.Table(
      "Evaluations of the policy", columns, rows,
      caption="Brackets hold 95 % intervals over prompts. The policy learns from the learned "
      "reward alone; the judge has never been optimised.", digits=3,
    ),
  ]  # fmt: skip
  metrics = {
    judge: language_report.estimate(last, judge),
    f"{judge}_peak": language_report.estimate(peak, judge),
    "kl_peak": language_report.estimate(peak, "kl"),
    "kl": language_report.estimate(last, "kl"),
    "reward": reward,
    "reward_model_accuracy": parts["reward_model"].result.metrics["accuracy"],
  }
  figure = language_report.over_kl(evaluations)
  return suite.Summary(
    results.Result(metrics=metrics, tables=tables), judge, [figure] if figure else []
  )


def _apart(low: results.Estimate, high: results.Estimate) -> bool:
  """Returns whether the interval of `low` ends below that of `high`."""
  return bool(low.high is not None and high.low is not None and low.high < high.low)
