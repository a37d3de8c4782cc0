"""Online IPO and IPO-MD (arXiv:2403.08635): pairs drawn as it trains, or the games."""

from typing import Any

import jax

from alignment import sequences
from alignment.baselines import online_ipo
from experiments.loop import training
from experiments.papers import online_ipo_bandit
from experiments.tasks import language_online


def build(config: Any) -> training.Experiment:
  """Returns the experiment of one preset."""
  if config.data.name == "online_ipo_bandit":
    return online_ipo_bandit.build(config)
  if config.data.num_samples != 2:
    raise ValueError(f"data.num_samples={config.data.num_samples}: a pair has 2 completions")
  return language_online.build(config, algorithm=online_ipo, collect=collect)


def collect(
  learner: online_ipo.State,
  prompts: sequences.Prompts,
  key: jax.Array,
  this_round: language_online.Round,
) -> online_ipo.Batch:
  """Draws two completions of each prompt, from the policy or a mixture, and has them compared."""
  sample_fn = this_round.sample_fn(this_round.task.config.data.mixture_beta)
  first, second = online_ipo.sample(learner, prompts, key, sample_fn=sample_fn)
  return online_ipo.Batch(
    first_tokens=first.tokens,
    first_mask=first.mask,
    first_ref_logps=this_round.ref_logps(first),
    second_tokens=second.tokens,
    second_mask=second.mask,
    second_ref_logps=this_round.ref_logps(second),
    preferences=this_round.preferences(first, second),
    prompt_tokens=prompts.tokens,
    prompt_mask=prompts.mask,
  )
