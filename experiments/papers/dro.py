"""DRO (arXiv:2405.19107): a policy and a value that learn from single rewards, or the bandit."""

from typing import Any

from alignment import dro
from alignment.models import scalar_head
from experiments.loop import training
from experiments.papers import dro_bandit
from experiments.tasks import language, language_offline

# DRO-V's two networks start from the same body and share nothing afterwards.
POLICY_AND_VALUE = language.Network(
  make_apply_fn=scalar_head.make_policy_and_value_fn,
  make_params=lambda params: dro.Params(policy=params, value=scalar_head.from_decoder(params)),
  policy_of=lambda params: params.policy,
  make_optimizer=lambda optimizer: dro.make_optimizer(optimizer, optimizer),
  rules=scalar_head.SHARDING_RULES,
)


def build(config: Any) -> training.Experiment:
  """Returns the experiment of one preset."""
  if config.data.name == "three_prompts":
    return dro_bandit.build(config)
  return language.build(
    config, algorithm=dro, collate=triples, network=POLICY_AND_VALUE, min_samples=1
  )


def triples(samples: language_offline.Samples) -> dro.Batch:
  """DRO's batch: every completion is an example of its own, rewards standardised over all."""
  spread = samples.rewards.std()
  if not spread:
    raise ValueError("all completions have the same reward: there is nothing to learn from")
  rows = language.single_rows(samples)
  rewards = (samples.rewards - samples.rewards.mean()) / spread
  return dro.Batch(
    rows.tokens,
    rows.mask,
    samples.ref_logps.reshape(-1),
    rewards.reshape(-1),
    rows.prompt_tokens,
    rows.prompt_mask,
  )
