"""KTO (arXiv:2402.01306), a baseline: good and bad single completions, or the bandit."""

import functools
from typing import Any

import numpy as np

from alignment.baselines import kto
from experiments.loop import training
from experiments.papers import kto_bandit
from experiments.tasks import language, language_offline


def build(config: Any) -> training.Experiment:
  """Returns the experiment of one preset."""
  if config.data.name == "kto_bandit":
    return kto_bandit.build(config)
  task = language_offline.make_task(config)
  return language.build(
    config,
    algorithm=kto,
    collate=functools.partial(labelled, task=task),
    min_samples=1,
    task=task,
  )


def labelled(samples: language_offline.Samples, *, task: language_offline.Task) -> kto.Batch:
  """KTO's batch: a completion is desirable where its reward exceeds the mean of the data.

  Beside each stands what the prompt before it was completed with, for the point of reference.
  """
  if len(samples.tokens) < 2:
    raise ValueError("the data hold one prompt: KTO needs completions of other prompts, give 2")
  labels = (samples.rewards > samples.rewards.mean()).astype(np.float32)
  if not labels.any():
    raise ValueError("all completions have the same reward: there is nothing to learn from")
  tokens, mask = (np.roll(x, 1, axis=0) for x in (samples.tokens, samples.mask))
  ref_logps = task.reference_logps(samples.prompts, tokens, mask)
  rows = language.single_rows(samples)
  other = language.single_rows(samples._replace(tokens=tokens, mask=mask))
  return kto.Batch(
    tokens=rows.tokens,
    mask=rows.mask,
    ref_logps=samples.ref_logps.reshape(-1),
    labels=labels.reshape(-1),
    mismatched_tokens=other.tokens,
    mismatched_mask=other.mask,
    mismatched_ref_logps=ref_logps.reshape(-1),
    prompt_tokens=rows.prompt_tokens,
    prompt_mask=rows.prompt_mask,
  )
