"""Finite Markov reward processes: exact quantities, samplers, and the processes of the papers.

A process is a Markov chain under a fixed policy with a reward on leaving each state and a discount.
The return from x is G = R_0 + discount R_1 + ...; its mean is the value, its law the return
distribution. Everything is arrays: samplers run on the device, and `jax.vmap` maps over keys,
over processes of one size and over discounts.

Terminal states are absorbing with reward 0 (`terminal_states`). Rewards depend on the state that is
left, not on the next one.

References: Rowland et al. 2023, https://arxiv.org/abs/2301.04462 (the examples) and
https://arxiv.org/abs/2305.18388 (Garnets, cycles and heavy-tailed rewards).
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rl_theory import markov_rewards, transition_matrices
from sharding import checks

# One import brings the chains, the rewards and the processes.
FiniteRewards = markov_rewards.FiniteRewards
NoisyRewards = markov_rewards.NoisyRewards
SampledRewards = markov_rewards.SampledRewards
cycle_transitions = transition_matrices.cycle_transitions
dense_transitions = transition_matrices.dense_transitions
doubly_stochastic_transitions = transition_matrices.doubly_stochastic_transitions
lazy = transition_matrices.lazy
sparse_transitions = transition_matrices.sparse_transitions
stationary_distribution = transition_matrices.stationary_distribution
symmetric_transitions = transition_matrices.symmetric_transitions


@markov_rewards.register("transitions", "rewards", "discount")
@dataclasses.dataclass(frozen=True)
class MarkovRewardProcess:
  """A Markov chain with rewards, under a fixed policy.

  Attributes:
    transitions: `[S, S]`, row x is the distribution of the next state; it sums to 1.
    rewards: `[S]` numbers, received on leaving a state, or `FiniteRewards`, `NoisyRewards` or
      `SampledRewards` of S states.
    discount: in [0, 1).

  Raises:
    ValueError: if a row does not sum to 1, the discount lies outside [0, 1), or the rewards are not
      those of S states.

  Example:
    >>> process = MarkovRewardProcess([[0.5, 0.5], [0.0, 1.0]], [1.0, 0.0], 0.8)
    >>> value(process)
    Array([1.6666666, 0.       ], dtype=float32)
  """

  transitions: Any
  rewards: Any
  discount: Any = 0.9

  def __post_init__(self):
    transition_matrices.check_transitions(self.transitions)
    checks.probabilities("discount", self.discount, fetch=True)
    if jnp.ndim(self.discount):
      raise ValueError(f"discount must be one number, got {self.discount}: map with jax.vmap")
    if self.discount is None:
      raise ValueError("discount must be one number in [0, 1), got None")
    if not isinstance(self.discount, jax.core.Tracer) and self.discount >= 1:
      raise ValueError(f"discount must lie in [0, 1), got {self.discount}")
    markov_rewards.as_arrays(self, "transitions")
    if not isinstance(self.rewards, FiniteRewards | NoisyRewards | SampledRewards):
      checks.finite("rewards", self.rewards, fetch=True)
      markov_rewards.as_arrays(self, "rewards")
    arrays = {"rewards": self.rewards}
    if isinstance(self.rewards, FiniteRewards):
      arrays = {"rewards.values": self.rewards.values[:, 0]}
    elif not isinstance(self.rewards, jax.Array):
      arrays = {"rewards.means": self.rewards.means}
    for name, array in arrays.items():
      checks.shape(name, array, (len(self.transitions),), "[S], one for each row of transitions,")


class Transitions(NamedTuple):
  """Steps of a process.

  Attributes:
    states: `[T]` int32.
    rewards: `[T]`, received on leaving them.
    next_states: `[T]` int32.
  """

  states: jax.Array
  rewards: jax.Array
  next_states: jax.Array


# --- exact quantities -----------------------------------------------------------------------------


def reward_means(mrp: MarkovRewardProcess) -> jax.Array:
  """Returns the expected reward of each state, `[S]`."""
  if isinstance(mrp.rewards, FiniteRewards):
    return jnp.sum(mrp.rewards.values * mrp.rewards.probs, axis=-1)
  return mrp.rewards if isinstance(mrp.rewards, jax.Array) else mrp.rewards.means


def reward_atoms(mrp: MarkovRewardProcess) -> FiniteRewards | None:
  """Returns the rewards as values and probabilities `[S, K]`; None if they are continuous."""
  if isinstance(mrp.rewards, jax.Array):
    return FiniteRewards(mrp.rewards[:, None], jnp.ones_like(mrp.rewards)[:, None])
  return mrp.rewards if isinstance(mrp.rewards, FiniteRewards) else None


def reward_cdf(
  mrp: MarkovRewardProcess, values: Any, states: Any, *, left: bool = False
) -> jax.Array:
  """Returns the probability that the reward of a state is at most a value.

  Args:
    mrp: the process. `SampledRewards` need their `cdf`.
    values: any shape that broadcasts with `states`.
    states: integers.
    left: whether the probability of the value itself is left out.

  Example:
    >>> process = MarkovRewardProcess([[1.0]], FiniteRewards([[0.0, 1.0]], [[0.25, 0.75]]), 0.5)
    >>> print(reward_cdf(process, 0.0, 0), reward_cdf(process, 0.0, 0, left=True))
    0.25 0.0
  """
  rewards = reward_atoms(mrp) or mrp.rewards
  return rewards.cdf_at(jnp.asarray(values), jnp.asarray(states), left=left)


def value(mrp: MarkovRewardProcess) -> jax.Array:
  """Returns the expected return from each state, `[S]`: (I - discount P)^-1 r."""
  matrix = jnp.eye(len(mrp.transitions), dtype=mrp.transitions.dtype)
  return jnp.linalg.solve(matrix - mrp.discount * mrp.transitions, reward_means(mrp))


def terminal_states(mrp: MarkovRewardProcess) -> jax.Array:
  """Returns a mask `[S]` of the absorbing states whose reward is surely 0."""
  states = jnp.arange(len(mrp.transitions))
  zeros = jnp.zeros(len(states))
  if isinstance(mrp.rewards, SampledRewards):
    certain = jnp.zeros(len(states), bool)
  else:
    mass = reward_cdf(mrp, zeros, states) - reward_cdf(mrp, zeros, states, left=True)
    certain = mass == 1
  return (jnp.diag(mrp.transitions) == 1) & certain


# --- samplers -------------------------------------------------------------------------------------


def sample_rewards(mrp: MarkovRewardProcess, key: Any, states: jax.Array) -> jax.Array:
  """Returns one reward for each of the `states`, whatever their shape."""
  return (
    mrp.rewards[states] if isinstance(mrp.rewards, jax.Array) else mrp.rewards.sample(key, states)
  )


def sample_next_states(mrp: MarkovRewardProcess, key: Any, states: jax.Array) -> jax.Array:
  """Returns one next state, int32, for each of the `states`, whatever their shape."""
  return markov_rewards.draw(markov_rewards.cumulative(mrp.transitions), key, states)


def sample_step(mrp: MarkovRewardProcess, key: Any) -> tuple[jax.Array, jax.Array]:
  """Returns one independent transition from every state: rewards `[S]` and next states `[S]`.

  Example:
    >>> process = MarkovRewardProcess(cycle_transitions(3), [1.0, 2.0, 3.0], 0.5)
    >>> sample_step(process, jax.random.key(0))
    (Array([1., 2., 3.], dtype=float32), Array([1, 2, 0], dtype=int32))
  """
  reward_key, state_key = jax.random.split(key)
  states = jnp.arange(len(mrp.transitions), dtype=jnp.int32)
  return sample_rewards(mrp, reward_key, states), sample_next_states(mrp, state_key, states)


def sample_trajectory(mrp: MarkovRewardProcess, key: Any, start: Any, length: int) -> Transitions:
  """Returns the first steps of one trajectory.

  Args:
    mrp: the process.
    key: PRNG key.
    start: the first state, an integer in [0, S).
    length: T, number of steps.

  Raises:
    ValueError: if there is no such state, or the length is less than 1.

  Example:
    >>> process = MarkovRewardProcess(cycle_transitions(3), [1.0, 2.0, 3.0], 0.5)
    >>> sample_trajectory(process, jax.random.key(0), 1, 4).states
    Array([1, 2, 0, 1], dtype=int32)
  """
  checks.count("length", length)
  if jnp.ndim(start) or not jnp.issubdtype(jnp.asarray(start).dtype, jnp.integer):
    raise ValueError(f"start must be one integer, got {start!r}: map with jax.vmap")
  checks.row_numbers("start", start, len(mrp.transitions), 0, fetch=True)
  reward_key, state_key = jax.random.split(key)
  cumulative = markov_rewards.cumulative(mrp.transitions)

  def move(state: jax.Array, key: Any) -> tuple[jax.Array, jax.Array]:
    return markov_rewards.draw(cumulative, key, state), state

  start = jnp.asarray(start, jnp.int32)
  last, states = jax.lax.scan(move, start, jax.random.split(state_key, length))
  rewards = sample_rewards(mrp, reward_key, states)
  return Transitions(states, rewards, jnp.append(states[1:], last))


def sample_returns(
  mrp: MarkovRewardProcess, key: Any, num_samples: int, *, horizon: int | None = None
) -> jax.Array:
  """Returns returns of independent roll-outs from every state, `[S, num_samples]`.

  Args:
    mrp: the process.
    key: PRNG key.
    num_samples: roll-outs from each state.
    horizon: number of rewards that a roll-out sums. The default, for a discount that can be seen,
      leaves out less than 10^-4 of a constant reward's return.
  """
  checks.count("num_samples", num_samples)
  if horizon is None:
    horizon = num_iterations(mrp.discount, 1e-4)
  checks.count("horizon", horizon)
  cumulative = markov_rewards.cumulative(mrp.transitions)

  def step(carry: Any, key: Any) -> tuple[Any, None]:
    states, returns, weight = carry
    reward_key, state_key = jax.random.split(key)
    returns = returns + weight * sample_rewards(mrp, reward_key, states)
    return (
      markov_rewards.draw(cumulative, state_key, states),
      returns,
      weight * mrp.discount,
    ), None

  dtype = mrp.transitions.dtype
  states = jnp.arange(len(mrp.transitions), dtype=jnp.int32)
  states = jnp.broadcast_to(states[:, None], (len(states), num_samples))
  start = states, jnp.zeros(states.shape, dtype), jnp.ones((), dtype)
  (_, returns, _), _ = jax.lax.scan(step, start, jax.random.split(key, horizon))
  return returns


def num_iterations(discount: Any, accuracy: float) -> int:
  """Returns the least n >= 1 with discount^n <= accuracy; the discount must be a known number."""
  if isinstance(discount, jax.core.Tracer):
    raise ValueError(f"give the number of steps where the discount is traced, got {discount}")
  if float(discount) <= accuracy:
    return 1
  return math.ceil(math.log(accuracy) / math.log(float(discount)))


# --- the processes of the papers ------------------------------------------------------------------


def chain(*, means: Any = (0.0, 1.0, -1.0, 2.0), scale: Any = 1.0, discount: Any = 0.9) -> Any:
  """Returns a chain x0 -> x1 -> ... -> end with Gaussian rewards; the last state is terminal.

  The first figure of https://arxiv.org/abs/2301.04462 is such a chain of four states; it does not
  print the rewards' parameters, so the defaults are ours. The return from state i is Gaussian, with
  mean sum_j discount^j means[i + j] and variance sum_j (discount^j scale)^2.
  """
  checks.vector("means", means)
  size = len(means) + 1
  transitions = jnp.eye(size, k=1).at[-1, -1].set(1)
  scales = jnp.full(size, scale, float).at[-1].set(0)
  rewards = NoisyRewards(jnp.append(jnp.asarray(means, float), 0), scales)
  return MarkovRewardProcess(transitions, rewards, discount)


def two_states(kind: str = "gaussian", *, discount: Any = 0.5) -> MarkovRewardProcess:
  """Returns a process of two states with mean rewards 2 and -1, one of three kinds.

  | kind | rewards | transitions |
  |---|---|---|
  | "gaussian" | N(2, 1), N(-1, 1) | (.6, .4), (.3, .7) |
  | "dirac" | 2, -1 | (.6, .4), (.3, .7) |
  | "mixing" | 2, -1 | (.5, .5), (.5, .5) |

  With one quantile the fixed points of "mixing" fill a quadrilateral; the other two have one fixed
  point. The paper, https://arxiv.org/abs/2301.04462, draws the transitions of the first two without
  their numbers.
  """
  checks.choice("kind", kind, ("gaussian", "dirac", "mixing"))
  transitions = jnp.full((2, 2), 0.5) if kind == "mixing" else jnp.array([[0.6, 0.4], [0.3, 0.7]])
  means = jnp.array([2.0, -1.0])
  return MarkovRewardProcess(
    transitions, NoisyRewards(means, 1.0) if kind == "gaussian" else means, discount
  )


def artefact(
  transitions: Any = ((0.6, 0.4), (0.6, 0.4)), *, discount: Any = 0.9
) -> MarkovRewardProcess:
  """Returns two states with rewards 2 and -1 whose fixed points with few quantiles are poor.

  At the first state the largest quantile bootstraps from itself, so it sits at the largest possible
  return. See https://arxiv.org/abs/2301.04462; the transitions are ours.
  """
  return MarkovRewardProcess(transitions, [2.0, -1.0], discount)


def garnet(
  key: Any, num_states: int, branching: int, *, discount: Any = 0.9, noise: str = "none"
) -> MarkovRewardProcess:
  """Returns a Garnet: sparse random transitions and mean rewards from N(0, 1).

  Args:
    key: PRNG key.
    num_states: S.
    branching: number of next states of each state.
    discount: in [0, 1).
    noise: "none", or that of `NoisyRewards` with scale 1.
  """
  checks.choice("noise", noise, ("none", *markov_rewards.NOISES))
  checks.count("num_states", num_states)
  first, second = jax.random.split(key)
  means = jax.random.normal(second, (num_states,))
  rewards = means if noise == "none" else NoisyRewards(means, 1.0, noise)
  transitions = sparse_transitions(first, num_states, branching=branching)
  return MarkovRewardProcess(transitions, rewards, discount)


def gridworld(
  num_rows: int = 5, num_columns: int = 5, *, discount: Any = 0.95
) -> MarkovRewardProcess:
  """Returns a random walk on a grid: one of four moves, each with probability 1/4, costs 1.

  A move off the grid stays where it is. The last cell is terminal. State r * num_columns + c is row
  r, column c.
  """
  checks.count("num_rows", num_rows)
  checks.count("num_columns", num_columns)
  moves = _grid_moves(num_rows, num_columns)
  size = num_rows * num_columns
  transitions = jax.nn.one_hot(moves, size, dtype=float).mean(1)
  transitions = transitions.at[-1].set(jnp.eye(size)[-1])
  return MarkovRewardProcess(transitions, jnp.full(size, -1.0).at[-1].set(0), discount)


def cliff(
  num_rows: int = 4, num_columns: int = 12, *, slip: Any = 0.1, discount: Any = 0.95
) -> MarkovRewardProcess:
  """Returns the cliff walk under a policy that walks along the edge and slips at times.

  The walk starts in the first cell of the last row and ends in the last cell of that row; the cells
  between are the cliff. The policy goes up from the start, right along the row above the cliff, and
  down into the end; from elsewhere it goes down to that row. With probability `slip` it moves in a
  random direction instead. A step costs 1. Leaving a cell of the cliff costs 100 and leads to the
  start. States are numbered as in `gridworld`.

  Args:
    num_rows: at least 2.
    num_columns: at least 3.
    slip: in [0, 1].
    discount: in [0, 1).
  """
  checks.count("num_rows", num_rows, least=2)
  checks.count("num_columns", num_columns, least=3)
  checks.probabilities("slip", slip)
  moves = _grid_moves(num_rows, num_columns)
  size, start, edge = num_rows * num_columns, (num_rows - 1) * num_columns, num_rows - 2
  rows, columns = jnp.divmod(jnp.arange(size), num_columns)
  up, down, right = 0, 1, 3
  chosen = jnp.where(rows < edge, down, jnp.where(columns < num_columns - 1, right, down))
  chosen = jnp.where(rows > edge, up, chosen)
  followed = jax.nn.one_hot(moves[jnp.arange(size), chosen], size, dtype=float)
  transitions = (1 - slip) * followed + slip * jax.nn.one_hot(moves, size, dtype=float).mean(1)
  fallen = (rows == num_rows - 1) & (columns > 0) & (columns < num_columns - 1)
  transitions = jnp.where(fallen[:, None], jnp.eye(size)[start], transitions)
  transitions = transitions.at[-1].set(jnp.eye(size)[-1])
  rewards = jnp.where(fallen, -100.0, -1.0).at[-1].set(0)
  return MarkovRewardProcess(transitions, rewards, discount)


def _grid_moves(num_rows: int, num_columns: int) -> jax.Array:
  """Returns the cells `[S, 4]` that up, down, left and right lead to."""
  rows, columns = jnp.divmod(jnp.arange(num_rows * num_columns), num_columns)
  above, below = jnp.maximum(rows - 1, 0), jnp.minimum(rows + 1, num_rows - 1)
  left, right = jnp.maximum(columns - 1, 0), jnp.minimum(columns + 1, num_columns - 1)
  pairs = ((above, columns), (below, columns), (rows, left), (rows, right))
  return jnp.stack([row * num_columns + column for row, column in pairs], axis=1)
