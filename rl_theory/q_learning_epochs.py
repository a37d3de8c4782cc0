"""Q-learning on a decision process: play, a replay buffer and updates, in one compiled scan.

`qr_dqn` and `baselines.dqn` both learn here. The buffer holds the numbers of states, and batches
look their observations up. In each step E copies of the process make one move each, epsilon-greedy
for the learned action values, and one update follows. Map `epoch` over seeds with `jax.vmap`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rl_theory import buffers, decision_processes, qr_dqn
from sharding import checks

_COUNTS = ("num_envs", "batch_size", "learning_starts", "replay_capacity")
_REALS = ("discount", "epsilon_start", "epsilon_end", "epsilon_decay")


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=list(_REALS), meta_fields=list(_COUNTS)
)
@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of play and replay.

  Attributes:
    discount: gamma in [0, 1].
    epsilon_start, epsilon_end: in [0, 1], share of uniform moves.
    epsilon_decay: positive, moves of all copies during which epsilon falls linearly.
    num_envs: E, copies of the process that are played side by side.
    batch_size: transitions in an update.
    learning_starts: moves before the first update.
    replay_capacity: transitions in the buffer, the newest ones.
  """

  discount: Any = 0.99
  epsilon_start: Any = 1.0
  epsilon_end: Any = 0.01
  epsilon_decay: Any = 1e6
  num_envs: int = 8
  batch_size: int = 32
  learning_starts: int = 1000
  replay_capacity: int = 100_000

  def __post_init__(self):
    for name in ("discount", "epsilon_start", "epsilon_end"):
      checks.probabilities(name, getattr(self, name))
    checks.positive("epsilon_decay", self.epsilon_decay)
    for name in _COUNTS:
      checks.count(name, getattr(self, name))
    if self.learning_starts > self.replay_capacity:
      raise ValueError(
        f"learning_starts must not exceed replay_capacity={self.replay_capacity}, got "
        f"{self.learning_starts}: learning would never start"
      )


class Transitions(NamedTuple):
  """Moves: the numbers of two states, the action and the reward between them."""

  states: Any
  actions: Any
  rewards: Any
  next_states: Any


class State(NamedTuple):
  """Everything that changes in training.

  Attributes:
    learner: `qr_dqn.State`, of either algorithm.
    replay: `buffers.Buffer` of `Transitions`.
    states: `[E]` int, where each copy of the process is.
    env_steps: scalar int32, moves of all copies.
  """

  learner: qr_dqn.State
  replay: buffers.Buffer
  states: jax.Array
  env_steps: jax.Array


def init(
  learner: qr_dqn.State, process: decision_processes.DecisionProcess, key: Any, *, config: Config
) -> State:
  """Returns the state before the first epoch, with an empty buffer.

  Args:
    learner: from the algorithm's `init`.
    process: the process.
    key: typed PRNG key, for the first states.
    config: of play and replay.
  """
  items = Transitions(jnp.int32, jnp.int32, process.rewards.dtype, jnp.int32)
  return State(
    learner=learner,
    replay=buffers.empty(items, (config.replay_capacity,)),
    states=decision_processes.first_states(process, key, (config.num_envs,)),
    env_steps=jnp.zeros((), jnp.int32),
  )


@functools.partial(jax.jit, static_argnames=("algorithm", "apply_fn", "optimizer", "num_updates"))
def epoch(
  state: State,
  process: decision_processes.DecisionProcess,
  key: Any,
  *,
  algorithm: Any,
  apply_fn: Callable[..., Any],
  optimizer: optax.GradientTransformation,
  hyperparameters: Any,
  config: Config,
  num_updates: int,
) -> tuple[State, dict[str, jax.Array]]:
  """Returns the state after `num_updates` steps of E moves and one update.

  Args:
    state: not donated.
    process: the process.
    key: typed PRNG key.
    algorithm: `qr_dqn`, `baselines.dqn`, or a module with their `update` and `action_values`.
    apply_fn: the network.
    optimizer: the one that made the learner's state.
    hyperparameters: `algorithm.Config`.
    config: of play and replay.
    num_updates: steps of the scan.

  Returns:
    The new state, and the mean over the steps of each metric of `algorithm.update`. Before
    `config.learning_starts` moves nothing is learned, and the metrics are 0.
  """

  def step(state: State, key: Any) -> tuple[State, dict[str, jax.Array]]:
    play_key, draw_key = jax.random.split(key)
    state = play(state, process, play_key, algorithm=algorithm, apply_fn=apply_fn, config=config)
    batch = draw(state.replay, process, draw_key, config=config)
    learned, metrics = algorithm.update(
      state.learner, batch, None, apply_fn=apply_fn, optimizer=optimizer, config=hyperparameters
    )
    ready = state.replay.seen >= config.learning_starts
    learner = jax.tree.map(lambda new, old: jnp.where(ready, new, old), learned, state.learner)
    metrics = jax.tree.map(lambda value: jnp.where(ready, value, 0), metrics)
    return state._replace(learner=learner), metrics

  state, metrics = jax.lax.scan(step, state, jax.random.split(key, num_updates))
  return state, jax.tree.map(lambda values: jnp.mean(values, axis=0), metrics)


def play(
  state: State,
  process: decision_processes.DecisionProcess,
  key: Any,
  *,
  algorithm: Any,
  apply_fn: Callable[..., Any],
  config: Config,
) -> State:
  """Returns the state after one move of each copy, which is remembered; ended episodes restart.

  Args:
    state: its learner plays.
    process: the process.
    key: typed PRNG key.
    algorithm: its `action_values` reads the network.
    apply_fn: the network.
    config: of play and replay.
  """
  checks.given(config)
  explore_key, move_key, start_key = jax.random.split(key, 3)
  states, legal = state.states, process.legal[state.states]
  values = algorithm.action_values(apply_fn(state.learner.params, process.observations[states]))
  actions = epsilon_greedy(explore_key, values, legal, epsilon(state.env_steps, config))
  rewards, following = decision_processes.step(process, states, actions, move_key)
  moves = Transitions(states, actions, rewards, following)
  restarts = decision_processes.first_states(process, start_key, states.shape)
  return state._replace(
    replay=buffers.add_to_replay(state.replay, moves, jnp.ones(states.shape, bool)),
    states=jnp.where(process.terminal[following], restarts, following),
    env_steps=state.env_steps + len(states),
  )


def draw(
  replay: buffers.Buffer, process: decision_processes.DecisionProcess, key: Any, *, config: Config
) -> qr_dqn.Batch:
  """Returns transitions drawn uniformly from the buffer, with their observations."""
  several = jax.tree.map(lambda leaf: leaf[None], replay)
  moves = jax.tree.map(lambda x: x[:, 0], buffers.draw(several, key, config.batch_size))
  return qr_dqn.Batch(
    observations=process.observations[moves.states],
    actions=moves.actions,
    rewards=moves.rewards,
    next_observations=process.observations[moves.next_states],
    discounts=jnp.where(process.terminal[moves.next_states], 0, config.discount),
    next_legal=process.legal[moves.next_states],
  )


def epsilon(env_steps: jax.Array, config: Config) -> jax.Array:
  """Returns the share of uniform moves after a number of moves."""
  left = jnp.maximum(1 - env_steps / config.epsilon_decay, 0)
  return config.epsilon_end + (config.epsilon_start - config.epsilon_end) * left


def epsilon_greedy(key: Any, values: jax.Array, legal: jax.Array, share: Any) -> jax.Array:
  """Returns actions `[...]` for `values [..., A]`: greedy, or uniform with probability `share`."""
  explore_key, action_key = jax.random.split(key)
  logits = jnp.where(legal, 0.0, -jnp.inf)
  random = jax.random.categorical(action_key, logits, axis=-1)
  explores = jax.random.bernoulli(explore_key, share, random.shape)
  return jnp.where(explores, random, qr_dqn.next_actions(values, legal)).astype(jnp.int32)


def greedy_policy(
  params: Any,
  process: decision_processes.DecisionProcess,
  *,
  algorithm: Any,
  apply_fn: Callable[..., Any],
) -> jax.Array:
  """Returns the policy `[S, A]` that is greedy for the learned action values in every state."""
  values = algorithm.action_values(apply_fn(params, process.observations))
  best = qr_dqn.next_actions(values, process.legal)
  return jax.nn.one_hot(best, process.num_actions, dtype=process.probs.dtype)
