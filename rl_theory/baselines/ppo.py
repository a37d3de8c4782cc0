"""PPO with a magnet: clipped policy gradients of self-play, pulled towards uniform play.

Problem: an equilibrium of a game, learned by ordinary policy gradients. All players share one
policy network and play against themselves. Without a regulariser the policies cycle. A pull of size
alpha towards a magnet makes the equilibrium of the regularised game attract them: the policy
approaches a quantal response equilibrium (`mirror_descent`), and an equilibrium of the game as
alpha falls.

  min E[ -min(w A, clip(w, 1 - eps, 1 + eps) A) + alpha KL(pi(. | s), rho) + c (V(s) - G)^2 ],

with w = pi(a | s) / pi_old(a | s), advantages A and returns G of the play of pi_old, and rho
uniform over legal actions, so that KL is minus the entropy, up to a constant.

References: Sokota et al. 2023, https://arxiv.org/abs/2206.05825 (section 5: PPO as magnetic mirror
descent), Rudolph et al. 2025, https://arxiv.org/abs/2502.08938 (such methods beat specialised ones
in 7,000 runs), Schulman et al. 2017, https://arxiv.org/abs/1707.06347 (PPO), and 2016,
https://arxiv.org/abs/1506.02438 (advantages).

| paper | here |
|---|---|
| pi, V | `Networks.policy`, `Networks.values`, of the observations of the player who moves |
| alpha | `temperature`: from `temperature_start` to `temperature_end` |
| eps, c | `Config.clip`, `Config.value_weight` |
| lambda | `Config.trace_decay` |

Deviations: advantages are not divided by their standard deviation, so alpha has the unit of
utility. There is no penalty on the distance from the last policy beside the clipping. The
temperature decays exponentially with the decisions played. The ratio of the two policies ends at
e^14: no policy moves that far within an epoch, and products with huge advantages stay finite.
`ppo_epochs` plays and runs epochs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sharding
from rl_theory import policy_arrays
from sharding import checks

Metrics = dict[str, jax.Array]
_MAX_LOG_RATIO = 14.0
_COUNTS = ("num_episodes", "batch_size", "num_steps", "num_microbatches")


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=[
    "temperature_start", "temperature_end", "temperature_decay", "clip", "value_weight",
    "trace_decay",
  ],
  meta_fields=list(_COUNTS),
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters. They are our own; the papers tune theirs for each game.

  Attributes:
    temperature_start, temperature_end: alpha >= 0, in units of utility.
    temperature_decay: positive, decisions after which the difference between alpha and
      `temperature_end` has shrunk by a factor of e.
    clip: eps > 0.
    value_weight: c >= 0.
    trace_decay: lambda in [0, 1] of generalised advantage estimation: 1 are whole returns.
    num_episodes: episodes in an epoch, all played with the same network.
    batch_size: episodes in an optimisation step; must divide `num_episodes`.
    num_steps: optimisation steps in an epoch.
    num_microbatches: number of parts of a batch, to save memory; the result is the same.
  """

  temperature_start: Any = 0.2
  temperature_end: Any = 0.01
  temperature_decay: Any = 1e6
  clip: Any = 0.2
  value_weight: Any = 0.5
  trace_decay: Any = 0.95
  num_episodes: int = 1024
  batch_size: int = 256
  num_steps: int = 16
  num_microbatches: int = 1

  def __post_init__(self):
    for name in ("temperature_start", "temperature_end", "value_weight"):
      checks.not_negative(name, getattr(self, name))
    for name in ("temperature_decay", "clip"):
      checks.positive(name, getattr(self, name))
    checks.probabilities("trace_decay", self.trace_decay)
    for name in _COUNTS:
      checks.count(name, getattr(self, name))
    if self.num_episodes % self.batch_size:
      raise ValueError(
        f"batch_size must divide num_episodes={self.num_episodes}, got {self.batch_size}"
      )


class Params(NamedTuple):
  """Parameters of the two networks."""

  policy: Any
  values: Any


class Networks(NamedTuple):
  """The two networks: hashable functions, such as methods of a Flax module.

  Attributes:
    policy: `policy(params, observations [B, ...]) -> [B, A]` logits.
    values: `values(params, observations [B, ...]) -> [B, 1]` expected utility of the mover.
  """

  policy: Callable[..., Any]
  values: Callable[..., Any]


class Batch(NamedTuple):
  """Episodes with their decisions and what came of them.

  Attributes:
    observations: `[B, T, ...]` of the player who moves.
    legal: `[B, T, A]` bool.
    actions: `[B, T]` int, the action played.
    mask: `[B, T]` bool, true at decisions.
    policies: `[B, T, A]` the policy that played.
    advantages: `[B, T]` of the actions played, see `advantages`.
    returns: `[B, T]` what the values should be.
  """

  observations: Any
  legal: Any
  actions: Any
  mask: Any
  policies: Any
  advantages: Any
  returns: Any


class State(NamedTuple):
  """Everything that changes in training.

  Attributes:
    params: of both networks.
    opt_state: of their optimiser.
    step: scalar int32, updates done.
    env_steps: scalar int32, decisions played.
  """

  params: Any
  opt_state: Any
  step: jax.Array
  env_steps: jax.Array


# --- losses on arrays ---


@checks.array_arguments
def clipped_policy_loss(
  logits: jax.Array,
  policies: jax.Array,
  actions: jax.Array,
  advantages: jax.Array,
  *,
  legal: jax.Array,
  clip: Any,
) -> jax.Array:
  """Returns minus the clipped objective of the action played.

  Args:
    logits: `[..., A]` of the policy that learns.
    policies: `[..., A]` the policy that played.
    actions: `[...]` int.
    advantages: `[...]`.
    legal: `[..., A]` bool.
    clip: eps > 0.

  Returns:
    `[...]`; no gradient flows through the policy that played and the advantages.

  Example:
    >>> clipped_policy_loss(
    ...   jnp.zeros(2), jnp.array([0.25, 0.75]), jnp.array(0), jnp.array(1.0),
    ...   legal=jnp.array([True, True]), clip=0.2)
    Array(-1.2, dtype=float32)
  """
  policies, advantages = jax.lax.stop_gradient((policies, advantages))
  played = jax.nn.one_hot(actions, logits.shape[-1], dtype=logits.dtype)
  logp = jnp.sum(played * policy_arrays.log_softmax(logits, legal), axis=-1)
  before = jnp.sum(played * policies, axis=-1)
  # An action that was played had a positive probability; padding may have none. In logarithms, so
  # that the gradient has no large factor that a zero follows.
  log_ratio = logp - jnp.log(jnp.where(before > 0, before, 1))
  ratio = jnp.exp(jnp.minimum(log_ratio, _MAX_LOG_RATIO))
  return -jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * advantages)


@checks.array_arguments
def magnet_loss(logits: jax.Array, *, legal: jax.Array) -> jax.Array:
  """Returns KL(pi, rho) of the policy from uniform play over legal actions.

  Args:
    logits: `[..., A]`.
    legal: `[..., A]` bool.

  Returns:
    `[...]` nats, from 0 (uniform) to log of the number of legal actions.

  Example:
    >>> magnet_loss(jnp.array([0.0, 100.0, 0.0]), legal=jnp.array([True, True, False]))
    Array(0.6931472, dtype=float32)
  """
  logps = policy_arrays.log_softmax(logits, legal)
  count = jnp.maximum(jnp.sum(legal, axis=-1), 1).astype(logits.dtype)
  probs = policy_arrays.softmax(logits, legal)
  # The product is 0 where a probability is, even if its logarithm is infinite.
  return jnp.log(count) + jnp.sum(jnp.where(probs > 0, probs * logps, 0), axis=-1)


@checks.array_arguments
def advantages(
  values: jax.Array,
  players: jax.Array,
  mask: jax.Array,
  utilities: jax.Array,
  *,
  trace_decay: Any,
) -> jax.Array:
  """Returns generalised advantage estimates, each along the mover's own decisions.

  With s' the mover's own next decision, or its utility where there is none,

    A(s) = V(s') - V(s) + lambda A(s').

  Args:
    values: `[B, T]` V of the mover at each decision.
    players: `[B, T]` int, who moves.
    mask: `[B, T]` bool, true at decisions.
    utilities: `[B, n]` at the end.
    trace_decay: lambda in [0, 1].

  Returns:
    `[B, T]`, 0 where masked out.

  Example:
    >>> advantages(jnp.array([[1.0, 5.0, 2.0]]), jnp.array([[0, 1, 0]]), jnp.ones((1, 3), bool),
    ...   jnp.array([[4.0, 3.0]]), trace_decay=0.5)
    Array([[ 2., -2.,  2.]], dtype=float32)
  """
  real = jnp.asarray(mask, bool)

  def step(carry: Any, row: Any) -> tuple[Any, jax.Array]:
    next_values, next_advantages = carry
    value, player, deciding = row
    own = jax.nn.one_hot(player, utilities.shape[1], dtype=bool) & deciding[:, None]
    later = jnp.sum(jnp.where(own, next_values, 0), axis=1)
    trace = jnp.sum(jnp.where(own, next_advantages, 0), axis=1)
    found = jnp.where(deciding, later - value + trace_decay * trace, 0)
    carry = (
      jnp.where(own, value[:, None], next_values),
      jnp.where(own, found[:, None], next_advantages),
    )
    return carry, found

  utilities = jnp.asarray(utilities, values.dtype)
  start = utilities, jnp.zeros_like(utilities)
  return jax.lax.scan(step, start, (values.T, players.T, real.T), reverse=True)[1].T


def temperature(env_steps: jax.Array, config: Config) -> jax.Array:
  """Returns alpha after a number of decisions."""
  left = jnp.exp(-env_steps / config.temperature_decay)
  return config.temperature_end + (config.temperature_start - config.temperature_end) * left


# --- one optimisation step ---


def init(params: Params, *, optimizer: optax.GradientTransformation, config: Config) -> State:
  """Returns the state before the first epoch.

  Args:
    params: of both networks.
    optimizer: the one that `update` will get.
    config: not used.
  """
  del config
  return State(params, optimizer.init(params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def loss(
  params: Params, state: Any, batch: Batch, key: Any, *, apply_fn: Networks, config: Config
) -> tuple[jax.Array, tuple[Metrics, Any]]:
  """Returns the sum of the three losses and `(metrics, ())`.

  Each is a mean over episodes of sums over decisions.

  Args:
    params: the only input to differentiate.
    state: only `env_steps` is used, for the temperature.
    batch: B episodes.
    apply_fn: the networks.
  """
  del key
  mask = jnp.asarray(batch.mask, bool)
  flat = batch.observations.reshape(-1, *batch.observations.shape[2:])
  logits = apply_fn.policy(params.policy, flat).reshape(batch.legal.shape)
  values = apply_fn.values(params.values, flat).reshape(mask.shape)
  policy = clipped_policy_loss(
    logits, batch.policies, batch.actions, batch.advantages, legal=batch.legal, clip=config.clip
  )
  parts = policy, magnet_loss(logits, legal=batch.legal), (values - batch.returns) ** 2
  policy, magnet, value = (jnp.mean(jnp.sum(jnp.where(mask, x, 0), axis=1)) for x in parts)
  total = policy + temperature(state.env_steps, config) * magnet + config.value_weight * value
  metrics = {"ppo/policy_loss": policy, "ppo/magnet_loss": magnet, "ppo/value_loss": value}
  return total, ({"loss": total, **metrics}, ())


@functools.partial(jax.jit, static_argnames=("apply_fn", "optimizer"))
def update(
  state: State,
  batch: Batch,
  key: Any,
  *,
  apply_fn: Networks,
  optimizer: optax.GradientTransformation,
  config: Config,
) -> tuple[State, Metrics]:
  """Returns the state after one step of both networks.

  Args:
    state: not donated.
    batch: B episodes; `config.num_microbatches` must divide B.
    apply_fn: the networks.
    optimizer: any optax transformation; build it once, since a new one compiles again.
    config: hyper-parameters.

  Returns:
    The new state; metrics `loss`, `grad_norm`, `ppo/policy_loss` (utility), `ppo/magnet_loss`
    (nats) and `ppo/value_loss` (squared utility), each summed over the decisions of an episode.
  """
  return sharding.gradient_step(
    loss, state, batch, key, apply_fn=apply_fn, optimizer=optimizer, config=config
  )
