"""RLOO (arXiv:2402.14740), the baseline of CoPG's paper: the online language-model run."""

import pathlib
from typing import Any

import jax

from alignment import sequences
from alignment.baselines import rloo
from experiments import online_language_model, training


def build(config: Any, workdir: pathlib.Path) -> training.Experiment:
  """Returns the experiment of one preset."""
  return online_language_model.build(
    config, workdir, algorithm=rloo, collect=collect, min_samples=2
  )


def collect(
  learner: rloo.State,
  prompts: sequences.Prompts,
  key: jax.Array,
  this_round: online_language_model.Round,
) -> rloo.Batch:
  """Draws K completions of each prompt and has them scored."""
  rows = rloo.sample(learner, prompts, key, sample_fn=this_round.sample_fn())
  shape = (len(prompts.tokens), sequences.rows_per_prompt(rows))
  return rloo.Batch(
    tokens=rows.tokens.reshape(*shape, -1),
    mask=rows.mask.reshape(*shape, -1),
    ref_logps=this_round.ref_logps(rows).reshape(shape),
    rewards=this_round.rewards(rows).reshape(shape),
    prompt_tokens=prompts.tokens,
    prompt_mask=prompts.mask,
  )
