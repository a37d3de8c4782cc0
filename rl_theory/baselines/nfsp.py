"""NFSP, Neural Fictitious Self-Play: deep Q-learning against the others' average play.

Problem: an equilibrium of a game by fictitious play. Each player answers the others' average policy
with a best response, and in two-player zero-sum games the averages converge to an equilibrium. Here
a Q-network gives the best response and a policy network imitates the average of past best
responses. At the start of each episode every player decides on its own to play its best response
(with probability eta) or its average policy. All data is therefore play against near-averages, and
best responses are seen often enough to imitate them.

  Q: min E_replay[(r + max_a' Q_target(s', a') - Q(s, a))^2],   s' the player's own next decision
  Pi: min E_reservoir[-log Pi(a | s)]

Every decision goes into its player's replay buffer. Decisions of a best response also go into the
reservoir, a uniform sample of all of them so far (`buffers`). `nfsp_epochs` plays and runs epochs.

Reference: Heinrich and Silver 2016, https://arxiv.org/abs/1603.01121. Defaults are those of
OpenSpiel's examples for Kuhn and Leduc poker (one hidden layer of 128, `optax.sgd(0.01)`), except
`reservoir_capacity`, which is 2e6 there.

| paper | here |
|---|---|
| Q(s, a; theta^Q), Pi(s, a; theta^Pi) | `Networks.values`, `Networks.policy` |
| theta^Q, theta^Pi; theta^Q' | `State.params`; `State.target_params`: leaves `[n, ...]` |
| M_RL, M_SL | `State.replay` (circular), `State.reservoir` |
| eta | `Config.anticipatory` |
| epsilon | `epsilon`: from `epsilon_start` to `epsilon_end` |
| 2 updates of 128 examples every 128 steps | `Config.learn_every` 64, `batch_size` |
| target network refitted every 300 updates | `Config.target_period` |

Deviations: epsilon decays exponentially, as in OpenSpiel, instead of with the inverse square root.
`num_episodes` episodes are played at a time, and their updates follow. Both networks wait until
both buffers of every player hold `learning_starts` items. Buffers hold the numbers of information
states, and an epoch evaluates the networks once at all states, so that play is only look-ups.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sharding
from rl_theory import buffers, policy_arrays, regret_matching
from sharding import checks

Metrics = dict[str, jax.Array]
_COUNTS = (
  "num_episodes", "batch_size", "learn_every", "learning_starts", "target_period",
  "replay_capacity", "reservoir_capacity", "num_microbatches",
)  # fmt: skip


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["anticipatory", "epsilon_start", "epsilon_end", "epsilon_decay"],
  meta_fields=list(_COUNTS),
)
@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters.

  Attributes:
    anticipatory: eta in (0, 1], the probability that a player plays its best response in an
      episode; at 0 the average policy would have nothing to imitate.
    epsilon_start, epsilon_end: in [0, 1], share of uniform play in the best response.
    epsilon_decay: positive, decisions of all players after which the difference between epsilon
      and `epsilon_end` has shrunk by a factor of e.
    num_episodes: episodes in an epoch, all played with the same networks.
    batch_size: examples from each player and buffer in one update.
    learn_every: decisions of all players for each update.
    learning_starts: items that each buffer must hold before the first update.
    target_period: updates between copies of the Q-network into the target network.
    replay_capacity, reservoir_capacity: of each player.
    num_microbatches: number of parts of a batch, to save memory; the result is the same.
  """

  anticipatory: Any = 0.1
  epsilon_start: Any = 0.06
  epsilon_end: Any = 0.001
  epsilon_decay: Any = 3e6
  num_episodes: int = 128
  batch_size: int = 128
  learn_every: int = 64
  learning_starts: int = 1000
  target_period: int = 300
  replay_capacity: int = 200_000
  reservoir_capacity: int = 200_000
  num_microbatches: int = 1

  def __post_init__(self):
    for name in ("anticipatory", "epsilon_decay"):
      checks.positive(name, getattr(self, name))
    for name in ("anticipatory", "epsilon_start", "epsilon_end"):
      checks.probabilities(name, getattr(self, name))
    for name in _COUNTS:
      checks.count(name, getattr(self, name))
    if self.learning_starts > min(self.replay_capacity, self.reservoir_capacity):
      raise ValueError(
        f"learning_starts must not exceed replay_capacity={self.replay_capacity} and "
        f"reservoir_capacity={self.reservoir_capacity}, got {self.learning_starts}: learning would "
        "never start"
      )


class Params(NamedTuple):
  """Parameters of the two networks of all players: leaves `[n, ...]`."""

  values: Any
  policy: Any


class Networks(NamedTuple):
  """One player's two networks: hashable functions, such as methods of a Flax module.

  Attributes:
    values: `values(params, observations [B, ...]) -> [B, A]` action values.
    policy: `policy(params, observations [B, ...]) -> [B, A]` logits.
  """

  values: Callable[..., Any]
  policy: Callable[..., Any]


class Batch(NamedTuple):
  """B examples from each player's replay buffer and B from its reservoir.

  Attributes:
    observations: `[B, n, ...]` the player's observation at one of its decisions.
    actions: `[B, n]` int, the action played there.
    rewards: `[B, n]` the player's reward until its next decision.
    next_observations: `[B, n, ...]` at the player's next decision; anything if there is none.
    next_legal: `[B, n, A]` bool, the legal actions there; all false if there is none.
    imitated_observations: `[B, n, ...]` at a decision that a best response took.
    imitated_legal: `[B, n, A]` bool.
    imitated_actions: `[B, n]` int.
  """

  observations: Any
  actions: Any
  rewards: Any
  next_observations: Any
  next_legal: Any
  imitated_observations: Any
  imitated_legal: Any
  imitated_actions: Any


class Transitions(NamedTuple):
  """Decisions: information state, action, reward and the player's next state, -1 for none."""

  states: Any
  actions: Any
  rewards: Any
  next_states: Any


class Choices(NamedTuple):
  """Actions of best responses: information state and action."""

  states: Any
  actions: Any


class State(NamedTuple):
  """Everything that changes in training.

  Attributes:
    params: of all players' networks.
    target_params: like `params.values`.
    opt_state: of the optimiser of both networks.
    step: scalar int32, updates done.
    env_steps: scalar int32, decisions played.
    replay: `buffers.Buffer` of `Transitions`, leaves `[n, ...]`.
    reservoir: `buffers.Buffer` of `Choices`, leaves `[n, ...]`.
  """

  params: Any
  target_params: Any
  opt_state: Any
  step: jax.Array
  env_steps: jax.Array
  replay: Any
  reservoir: Any


# --- losses and policies on arrays ---


@checks.array_arguments
def best_response_loss(
  values: jax.Array,
  actions: jax.Array,
  rewards: jax.Array,
  next_values: jax.Array,
  *,
  next_legal: jax.Array,
) -> jax.Array:
  """Returns the squared error of the played action's value to its Q-learning target.

  Args:
    values: `[..., A]`.
    actions: `[...]` int.
    rewards: `[...]`.
    next_values: `[..., A]` of the target network.
    next_legal: `[..., A]` bool; a row that is all false is the end of the episode.

  Returns:
    `[...]`; no gradient flows through the target.

  Example:
    >>> best_response_loss(
    ...   jnp.array([1.0, 0.0]), jnp.array(0), jnp.array(0.5), jnp.array([9.0, 2.0]),
    ...   next_legal=jnp.array([False, True]))
    Array(2.25, dtype=float32)
  """
  best = jnp.max(jnp.where(next_legal, next_values, -jnp.inf), axis=-1)
  best = jnp.where(jnp.any(next_legal, axis=-1), best, 0)
  taken = jnp.take_along_axis(values, actions[..., None], -1)[..., 0]
  return (taken - jax.lax.stop_gradient(rewards + best)) ** 2


@checks.array_arguments
def average_policy_loss(logits: jax.Array, actions: jax.Array, *, legal: jax.Array) -> jax.Array:
  """Returns the negative log-probability of the played action under the average policy.

  Args:
    logits: `[..., A]`.
    actions: `[...]` int.
    legal: `[..., A]` bool.

  Returns:
    `[...]` nats.

  Example:
    >>> average_policy_loss(jnp.zeros(3), jnp.array(0), legal=jnp.array([True, True, False]))
    Array(0.6931472, dtype=float32)
  """
  played = jax.nn.one_hot(actions, logits.shape[-1], dtype=logits.dtype)
  return -jnp.sum(played * policy_arrays.log_softmax(logits, legal), axis=-1)


@checks.array_arguments
def best_response(values: jax.Array, legal: jax.Array, epsilon: Any) -> jax.Array:
  """Returns the probabilities `[..., A]` of epsilon-greedy play among legal actions."""
  greedy = jnp.argmax(jnp.where(legal, values, -jnp.inf), axis=-1)
  greedy = jax.nn.one_hot(greedy, values.shape[-1], dtype=values.dtype)
  uniform = regret_matching.normalise(jnp.zeros_like(values), legal)
  return epsilon * uniform + (1 - epsilon) * greedy


def epsilon(env_steps: jax.Array, config: Config) -> jax.Array:
  """Returns the share of uniform play after a number of decisions."""
  left = jnp.exp(-env_steps / config.epsilon_decay)
  return config.epsilon_end + (config.epsilon_start - config.epsilon_end) * left


# --- one optimisation step ---


def init(params: Params, *, optimizer: optax.GradientTransformation, config: Config) -> State:
  """Returns the state before the first epoch, with empty buffers.

  Args:
    params: leaves `[n, ...]` for n players, from `jax.vmap` of a network's initialiser over n keys.
    optimizer: the one that `update` will get. For two learning rates use
      `optax.multi_transform({"values": ..., "policy": ...}, Params("values", "policy"))`.
    config: only the capacities are used.
  """
  num_players = len(jax.tree.leaves(params)[0])
  transition = Transitions(jnp.int32, jnp.int32, jnp.float32, jnp.int32)
  choice = Choices(jnp.int32, jnp.int32)
  return State(
    params=params,
    target_params=jax.tree.map(jnp.copy, params.values),
    opt_state=optimizer.init(params),
    step=jnp.zeros((), jnp.int32),
    env_steps=jnp.zeros((), jnp.int32),
    replay=buffers.empty(transition, (num_players, config.replay_capacity)),
    reservoir=buffers.empty(choice, (num_players, config.reservoir_capacity)),
  )


def loss(
  params: Params, state: Any, batch: Batch, key: Any, *, apply_fn: Networks, config: Config
) -> tuple[jax.Array, tuple[Metrics, Any]]:
  """Returns the sum of both networks' losses, which share no parameters, and `(metrics, ())`.

  It is a mean over examples of sums over players, so each player learns as if it were alone.

  Args:
    params: the only input to differentiate.
    state: only its target network is used.
    batch: B examples.
    apply_fn: the networks.
  """
  del key, config
  values, logits = (jax.vmap(f, in_axes=(0, 1), out_axes=1) for f in apply_fn)
  responses = best_response_loss(
    values(params.values, batch.observations),
    batch.actions,
    batch.rewards,
    values(state.target_params, batch.next_observations),
    next_legal=batch.next_legal,
  )
  averages = average_policy_loss(
    logits(params.policy, batch.imitated_observations),
    batch.imitated_actions,
    legal=batch.imitated_legal,
  )
  response, average = (jnp.mean(jnp.sum(losses, axis=1)) for losses in (responses, averages))
  value = response + average
  metrics = {"nfsp/best_response_loss": response, "nfsp/average_policy_loss": average}
  return value, ({"loss": value, **metrics}, ())


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
  """Returns the state after one step of all players' networks; the buffers stay as they are.

  Args:
    state: not donated.
    batch: B examples, from `nfsp_epochs.draw`; `config.num_microbatches` must divide B.
    apply_fn: the networks.
    optimizer: any optax transformation; build it once, since a new one compiles again.
    config: hyper-parameters.

  Returns:
    The new state; metrics `loss`, `grad_norm`, `nfsp/best_response_loss` (squared utility) and
    `nfsp/average_policy_loss` (nats), both summed over players.
  """
  targets = state.target_params
  state, metrics = sharding.gradient_step(
    loss, state, batch, key, apply_fn=apply_fn, optimizer=optimizer, config=config
  )
  copied = state.step % config.target_period == 0
  targets = jax.tree.map(lambda new, old: jnp.where(copied, new, old), state.params.values, targets)
  return state._replace(target_params=targets), metrics
