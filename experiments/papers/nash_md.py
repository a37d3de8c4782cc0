"""Nash-MD-PG (arXiv:2312.00886): a language model that plays its own mixture, or the games."""

from typing import Any

import jax

from alignment import nash_md, sequences
from experiments.loop import training
from experiments.papers import nash_md_bandit
from experiments.tasks import language_online


def build(config: Any) -> training.Experiment:
  """Returns the experiment of one preset."""
  if config.data.name == "cyclic_games":
    return nash_md_bandit.build(config)
  return language_online.build(config, algorithm=nash_md, collect=collect)


def collect(
  learner: nash_md.State,
  prompts: sequences.Prompts,
  key: jax.Array,
  this_round: language_online.Round,
) -> nash_md.Batch:
  """Draws completions of the policy and of its opponent, the mixture, and has them compared."""
  first, second = nash_md.sample(
    learner,
    prompts,
    key,
    sample_fn=this_round.sample_fn(),
    opponent_fn=this_round.sample_fn(this_round.task.config.data.mixture_beta),
  )
  ref_token_logps = this_round.ref_token_logps(first)
  rows = sequences.repeat_prompts(first)  # one example each, for micro-batches
  return nash_md.Batch(
    tokens=rows.tokens,
    mask=rows.mask,
    ref_token_logps=ref_token_logps,
    preferences=this_round.preferences(first, second),
    prompt_tokens=rows.prompt_tokens,
    prompt_mask=rows.prompt_mask,
  )
