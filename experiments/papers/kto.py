"""KTO (arXiv:2402.01306), a baseline: the language-model run on good and bad completions."""

import functools
import pathlib
from typing import Any

import numpy as np

from alignment.baselines import kto
from experiments import language_model, language_task, training


def build(config: Any, workdir: pathlib.Path) -> training.Experiment:
  """Returns the experiment of one preset."""
  task = language_task.make_task(config)
  return language_model.build(
    config,
    workdir,
    algorithm=kto,
    collate=functools.partial(labelled, task=task),
    min_samples=1,
    task=task,
  )


def labelled(samples: language_task.Samples, *, task: language_task.Task) -> kto.Batch:
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
  rows = language_model.single_rows(samples)
  other = language_model.single_rows(samples._replace(tokens=tokens, mask=mask))
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
