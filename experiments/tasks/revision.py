"""SRPO on a language model: the model sees its own answer in the prompt and rewrites it.

The template `data.revision_template` combines a prompt and an answer into the prompt of the
rewriting policy. It works on text: an answer is decoded, filled in and encoded again.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from alignment import srpo
from experiments.data import chats, templates
from experiments.loop import training
from experiments.report import plots, results, statistics
from experiments.tasks import language, language_offline, language_report
from sharding import checks


class Reviser:
  """A task, and the same model and data with prompts that show an answer."""

  def __init__(self, task: language_offline.Task):
    """Checks the settings, before anything is sampled.

    Raises:
      ValueError: the template lacks a field, or the longest prompt with an answer does not fit into
        `data.revision_length` or the model's context.
    """
    data = task.config.data
    templates.check("data.revision_template", data.revision_template, "prompt", "answer")
    checks.count("data.revision_length", data.revision_length)
    if task.config.eval.num_revisions < 0:
      raise ValueError(
        f"eval.num_revisions={task.config.eval.num_revisions} must not be negative: give 0 for none"
      )
    longest = data.revision_length + data.completion_length
    if longest > task.network.max_length:
      raise ValueError(
        f"data.revision_length + data.completion_length = {longest} exceeds the context of "
        f"{task.config.network.model} ({task.network.max_length} tokens): shorten one of them"
      )
    self.task = task
    config = task.config.copy_and_resolve_references()
    config.data.update(prompt_template="{prompt}", prompt_length=data.revision_length)
    # The same model. Its prompts are filled in already and may be longer.
    self.rewriter = dataclasses.replace(task, config=config)
    needed = data.completion_length + max(
      len(self._encode(self._fill(prompt, ""))) for prompt in task.train_prompts + task.test_prompts
    )
    if needed > data.revision_length:
      raise ValueError(
        f"data.revision_length={data.revision_length}: data.revision_template with the longest "
        f"prompt and an answer of data.completion_length={data.completion_length} takes {needed} "
        "tokens; raise data.revision_length or shorten the template"
      )

  def prompts(self, prompts: list[str], answers: list[str]) -> list[str]:
    """Returns the filled-in templates, one for each prompt and answer.

    White space around an answer is removed. An answer that does not fit is cut at its end. This
    happens where its text has more tokens than were drawn, as broken characters do.
    """
    return [self._fitting(p, a.strip()) for p, a in zip(prompts, answers, strict=True)]

  def _fill(self, prompt: str, answer: str) -> str:
    filled = templates.fill(self.task.config.data.revision_template, prompt=prompt, answer=answer)
    chat = isinstance(prompt, chats.Chat)
    return chats.Chat([{"role": "user", "content": filled}]) if chat else filled

  def _encode(self, prompt: str) -> list[int]:
    tokenizer = self.task.model.tokenizer
    return tokenizer.encode_prompt(chats.prompt_text(tokenizer, prompt))

  def _fitting(self, prompt: str, answer: str) -> str:
    limit = self.task.config.data.revision_length
    while True:
      filled = self._fill(prompt, answer)
      excess = len(self._encode(filled)) - limit
      if excess <= 0:
        return filled
      if not answer:
        raise ValueError(
          f"data.revision_template with the prompt {prompt[:40]!r} has {excess} tokens more than "
          f"data.revision_length={limit}: raise it"
        )
      answer = answer[:-excess]

  def pairs(self, samples: language_offline.Samples) -> srpo.Batch:
    """Returns SRPO's batch: best and worst completion, and the prompts that show each of them."""
    task, found = self.task, language.extreme_pairs(samples)
    rows = found.example
    both = np.stack([found.chosen, found.rejected], axis=1)  # in the order of `srpo.SCORED`
    tokens, mask, ref_logps = (
      x[rows[:, None], both] for x in (samples.tokens, samples.mask, samples.ref_logps)
    )
    plain = [samples.prompts[row] for row in rows]

    def shown(which):
      return self.prompts(plain, task.decode(tokens[:, which], mask[:, which], plain))

    given_chosen, given_rejected = shown(0), shown(1)
    conditional = [
      self.rewriter.reference_logps(prompts, tokens, mask)
      for prompts in (given_rejected, given_chosen)
    ]
    chosen_prompts, rejected_prompts = (
      self.rewriter.encode_prompts(prompts) for prompts in (given_chosen, given_rejected)
    )
    return srpo.Batch(
      chosen_tokens=tokens[:, 0],
      chosen_mask=mask[:, 0],
      rejected_tokens=tokens[:, 1],
      rejected_mask=mask[:, 1],
      ref_logps=np.concatenate([ref_logps, *conditional], axis=1),
      prompt_tokens=samples.prompt_tokens[rows],
      prompt_mask=samples.prompt_mask[rows],
      given_chosen_tokens=chosen_prompts[0],
      given_chosen_mask=chosen_prompts[1],
      given_rejected_tokens=rejected_prompts[0],
      given_rejected_mask=rejected_prompts[1],
      chosen_probs=samples.best_probs[rows],
    )

  def evaluate(
    self,
    found: results.Result,
    comparison: language_offline.Comparison,
    params: Any,
    task: language_offline.Task,
  ) -> results.Result:
    """Adds the rewards and win rates after each of `eval.num_revisions` rewrites.

    The policy and the reference each rewrite their own answers, with the same template. Win rates
    compare with the reference's first answers.
    """
    prompts, seed = comparison.prompts, task.config.seed
    texts, ref_texts = comparison.texts, comparison.ref_texts
    rewards, ref_rewards = [comparison.rewards], [comparison.ref_rewards]
    for i in range(task.config.eval.num_revisions):
      shown, ref_shown = self.prompts(prompts, texts), self.prompts(prompts, ref_texts)
      key = jax.random.fold_in(jax.random.key(seed + 3), i)
      drawn = self.rewriter.generate(params, shown, key, 1)
      ref_drawn = self.rewriter.reference_samples(ref_shown, 1, seed + 4 + i)
      texts, ref_texts = (
        self.rewriter.decode(x["tokens"][:, 0], x["mask"][:, 0], before)
        for x, before in ((drawn, shown), (ref_drawn, ref_shown))
      )
      rewards.append(task.reward_fn(prompts, texts))
      ref_rewards.append(task.reward_fn(prompts, ref_texts))
      found.metrics = {
        **found.metrics,
        f"win_rate_revision_{i + 1}": language_report.win_rate(rewards[-1], ref_rewards[0]),
        f"reward_revision_{i + 1}": statistics.mean_interval(rewards[-1]),
        f"reward_reference_revision_{i + 1}": statistics.mean_interval(ref_rewards[-1]),
      }
    if len(rewards) > 1:
      found.figures = [*found.figures, _figure({"policy": rewards, "reference": ref_rewards})]
    return found


def _figure(curves: dict[str, list[np.ndarray]]) -> results.Figure:
  figure, axes = plots.subplots(1, 1)
  for label, rewards in curves.items():
    means = [statistics.mean_interval(values) for values in rewards]
    value = np.array([mean.value for mean in means])
    half = value - np.array([mean.low for mean in means], float)
    axes[0][0].errorbar(range(len(value)), value, yerr=half, marker="o", capsize=2, label=label)
  axes[0][0].set(xlabel="number of revisions", ylabel="mean reward on held-out prompts")
  axes[0][0].set_xticks(range(len(value)))
  axes[0][0].legend()
  caption = (
    "The curves show the reward after each revision, when each network rewrites its own answers. "
    "Bars are 95 % intervals."
  )
  return results.Figure(name="revisions", caption=caption, figure=figure)


def build(config: Any) -> training.Experiment:
  """Returns the experiment of SRPO on a language model."""
  reviser = Reviser(language_offline.make_task(config))
  return language.build(
    config,
    algorithm=srpo,
    collate=reviser.pairs,
    task=reviser.task,
    evaluate_more=reviser.evaluate,
  )
