"""RLOO (arXiv:2402.14740), a baseline: completions drawn and scored as it trains, or the bandit."""

from typing import Any

import jax

from alignment import sequences
from alignment.baselines import rloo
from experiments.loop import training
from experiments.papers import rloo_bandit
from experiments.tasks import language_online


def build(config: Any) -> training.Experiment:
  """Returns the experiment of one preset."""
  if config.data.name == "rloo_bandit":
    return rloo_bandit.build(config)
  return language_online.build(config, algorithm=rloo, collect=collect, min_samples=2)


def collect(
  learner: rloo.State,
  prompts: sequences.Prompts,
  key: jax.Array,
  this_round: language_online.Round,
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
