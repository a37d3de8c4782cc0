"""A recurrent actor-critic that plays a masked world on the device, with auxiliary losses.

The agent is a small advantage actor-critic: whole episodes on the policy, lambda-returns, one step
of Adam for each batch of episodes. The losses of `latent_prediction` are added to its own.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import sharding
from experiments.tasks import masked_worlds
from representation import latent_prediction
from representation.networks import adapters, recurrent
from rl_theory import decision_processes, returns
from sharding import averages, checks


class Heads(nn.Module):
  """Linear heads: logits `[..., A]`, 0 at initialisation, and values `[...]` of a state."""

  num_actions: int

  @nn.compact
  def __call__(self, states: jax.Array) -> tuple[jax.Array, jax.Array]:
    zeros: Any = nn.initializers.zeros
    logits = nn.Dense(self.num_actions, kernel_init=zeros, name="policy")(states)
    return logits, nn.Dense(1, name="value")(states)[..., 0]


class Networks(NamedTuple):
  """The networks of an agent: of `latent_prediction`, and its heads."""

  latent: latent_prediction.Networks
  heads: adapters.Predictor


class Params(NamedTuple):
  """Their parameters."""

  latent: latent_prediction.Params
  heads: Any


class Learner(NamedTuple):
  """The state of one agent: as `latent_prediction.State`."""

  params: Params
  target_params: Any
  opt_state: Any
  step: jax.Array


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["latent", "discount", "trace_decay", "value_weight", "entropy_weight"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters of the agent and, in `latent`, of its auxiliary losses."""

  latent: latent_prediction.Config
  discount: Any
  trace_decay: Any
  value_weight: Any
  entropy_weight: Any

  def __post_init__(self):
    checks.probabilities("discount", self.discount)
    checks.probabilities("trace_decay", self.trace_decay)
    checks.not_negative("value_weight", self.value_weight)
    checks.not_negative("entropy_weight", self.entropy_weight)


class Episodes(NamedTuple):
  """Episodes from their first step, `[B, T]`; rewards are 0 where `mask` is false.

  `mask` is true at the steps where an action was taken; `legal` is `[B, T, A]`.
  """

  states: jax.Array
  observations: jax.Array
  legal: jax.Array
  actions: jax.Array
  rewards: jax.Array
  mask: jax.Array


def networks(config: Any, world: masked_worlds.World) -> Networks:
  """Returns the networks of the sizes in a config."""
  num_actions = world.process.num_actions
  return Networks(
    recurrent.networks(config.network.width, num_actions), adapters.Predictor(Heads(num_actions))
  )


def init(
  key: jax.Array,
  apply_fn: Networks,
  world: masked_worlds.World,
  optimizer: optax.GradientTransformation,
) -> Learner:
  """Returns an agent before its first step. The target starts as a copy."""
  keys = jax.random.split(key)
  latent = recurrent.init(keys[0], apply_fn.latent, world.process.observations[:1])
  agent: Any = apply_fn.latent.agent
  params = Params(latent, apply_fn.heads.init(keys[1], agent.start(1)))
  target = jax.tree.map(jnp.copy, latent.agent)
  return Learner(params, target, optimizer.init(params), jnp.zeros((), jnp.int32))


def play(
  params: Params,
  key: jax.Array,
  *,
  apply_fn: Networks,
  world: masked_worlds.World,
  num_episodes: int,
  uniform: bool = False,
) -> Episodes:
  """Returns episodes that the agent plays, or that a uniform policy plays in its place."""
  process = world.process
  agent: Any = apply_fn.latent.agent  # a `recurrent.Agent`
  first_key, key = jax.random.split(key)

  def body(carry: Any, key: jax.Array) -> Any:
    states, hidden, before = carry
    observations, legal = process.observations[states], process.legal[states]
    hidden = agent.step(params.latent.agent, hidden, observations, before)
    logits = apply_fn.heads(params.heads, hidden)[0]
    logits = jnp.where(legal, 0 if uniform else logits, -jnp.inf)
    action_key, step_key = jax.random.split(key)
    actions = jax.random.categorical(action_key, logits)
    rewards, following = decision_processes.step(process, states, actions, step_key)
    step = (states, observations, legal, actions, rewards, ~process.terminal[states])
    return (following, hidden, actions), step

  start = (
    decision_processes.first_states(process, first_key, (num_episodes,)),
    agent.start(num_episodes),
    jnp.full(num_episodes, -1),
  )
  _, steps = jax.lax.scan(body, start, jax.random.split(key, world.length))
  return Episodes(*(jnp.swapaxes(leaf, 0, 1) for leaf in steps))


def loss(
  params: Params,
  learner: Learner,
  episodes: Episodes,
  key: Any,
  *,
  apply_fn: Networks,
  config: Config,
) -> tuple[jax.Array, tuple[dict[str, jax.Array], tuple[()]]]:
  """Returns the actor's, the critic's and the auxiliary losses; arguments as in every algorithm."""
  del key
  observations, actions, mask = episodes.observations, episodes.actions, episodes.mask
  online = apply_fn.latent.agent(params.latent.agent, observations, actions)
  logits, values = apply_fn.heads(params.heads, online.states)
  logps = jax.nn.log_softmax(jnp.where(episodes.legal, logits, -jnp.inf))
  logps = jnp.where(episodes.legal, logps, 0)
  # With a single action of probability 1, Tree-Backup's targets are lambda-returns.
  targets = returns.tree_backup_targets(
    jax.lax.stop_gradient(values)[..., None], jnp.ones((*values.shape, 1)),
    jnp.zeros_like(actions), episodes.rewards, mask,
    trace_decay=config.trace_decay, discount=config.discount,
  )  # fmt: skip
  taken = jnp.take_along_axis(logps, actions[..., None], -1)[..., 0]
  advantages = targets - jax.lax.stop_gradient(values)
  entropy = -jnp.sum(jnp.where(episodes.legal, jnp.exp(logps) * logps, 0), -1)

  def mean(array: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(mask, array, 0)) / jnp.sum(mask)

  target_params = averages.like(learner.target_params, params.latent.agent)
  target = apply_fn.latent.agent(target_params, observations, actions)
  forward, backward = latent_prediction.losses(
    params.latent, online, target, actions, mask, apply_fn=apply_fn.latent,
    horizon=config.latent.horizon,
  )  # fmt: skip
  value = (
    -mean(advantages * taken)
    + config.value_weight * mean((targets - values) ** 2)
    - config.entropy_weight * mean(entropy)
    + config.latent.forward_weight * forward
    + config.latent.backward_weight * backward
  )
  return value, (
    {"loss": value, "entropy": mean(entropy), "forward_loss": forward, "backward_loss": backward},
    (),
  )


def update(
  learner: Learner,
  key: jax.Array,
  *,
  apply_fn: Networks,
  world: masked_worlds.World,
  optimizer: optax.GradientTransformation,
  config: Config,
  num_episodes: int,
) -> tuple[Learner, dict[str, jax.Array]]:
  """Returns the agent after a batch of episodes, and metrics with the `return` of the batch."""
  episodes = play(learner.params, key, apply_fn=apply_fn, world=world, num_episodes=num_episodes)
  stepped, metrics = sharding.gradient_step(
    loss, learner, episodes, None, apply_fn=apply_fn, optimizer=optimizer, config=config
  )
  target = averages.move(
    learner.target_params, stepped.params.latent.agent, config.latent.target_decay
  )
  metrics["return"] = jnp.mean(jnp.sum(episodes.rewards, axis=1))
  return stepped._replace(target_params=target), metrics
