"""Finite Markov decision processes as arrays: play on the device, optimal values, exact returns.

In state s an agent takes a legal action a. One of K outcomes follows: with probability
`probs[s, a, k]` it receives `rewards[s, a, k]` and moves to `next_states[s, a, k]`. Terminal states
keep the agent for ever without reward, and every action is legal there. `openspiel_mdp` compiles
games of one player into this form.

  optimal values: V(s) = max_a E_k[rewards[s, a, k] + gamma V(next_states[s, a, k])]

Reference: Puterman 1994, "Markov decision processes", chapters 4 to 7.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rl_theory import regret_matching
from sharding import checks

_FIELDS = ("next_states", "probs", "rewards", "legal", "terminal", "initial", "observations")


@functools.partial(jax.tree_util.register_dataclass, data_fields=list(_FIELDS), meta_fields=[])
@dataclasses.dataclass(frozen=True)
class DecisionProcess:
  """S states, A actions, K outcomes of an action. A pytree: it passes through `jit` and `vmap`.

  Attributes:
    next_states: `[S, A, K]` int.
    probs: `[S, A, K]`, sums to 1 over K, also at illegal actions.
    rewards: `[S, A, K]`.
    legal: `[S, A]` bool, at least one action in each state; all of them in terminal states.
    terminal: `[S]` bool.
    initial: `[S]` probabilities of the first state.
    observations: `[S, D]`, what a network sees. Put others in with `dataclasses.replace` to hide
      something from the agent.
  """

  next_states: Any
  probs: Any
  rewards: Any
  legal: Any
  terminal: Any
  initial: Any
  observations: Any

  def __post_init__(self):
    for name, value in vars(self).items():
      if isinstance(value, list | tuple):
        object.__setattr__(self, name, np.asarray(value))
    # JAX rebuilds the class around shapes and other placeholders, which pass.
    if not all(isinstance(value, np.ndarray | jax.Array) for value in vars(self).values()):
      return
    if np.ndim(self.legal) != 2:
      return  # under vmap there is one process for each leading entry
    states, actions = np.shape(self.legal)
    checks.not_empty(legal=self.legal)
    outcomes = np.shape(self.probs)[-1:]
    for name in ("next_states", "probs", "rewards"):
      checks.shape(name, getattr(self, name), (states, actions, *outcomes), "[S, A, K]")
    for name in ("terminal", "initial"):
      checks.shape(name, getattr(self, name), (states,), "[S]")
    if np.ndim(self.observations) != 2 or len(self.observations) != states:
      raise ValueError(
        f"observations must have shape [S, D] with S = {states}, got "
        f"{list(np.shape(self.observations))}"
      )
    checks.distribution("probs", self.probs)
    checks.distribution("initial", self.initial)
    checks.finite("rewards", self.rewards)
    checks.row_numbers("next_states", self.next_states, states, 3)
    legal = self.legal
    if isinstance(legal, np.ndarray) and not legal.any(axis=1).all():
      raise ValueError(
        f"legal must have at least one action in each state, got none in state "
        f"{int(np.argmin(legal.any(axis=1)))}: a terminal state has all of them"
      )

  @property
  def num_states(self) -> int:
    """S."""
    return self.legal.shape[0]

  @property
  def num_actions(self) -> int:
    """A."""
    return self.legal.shape[1]


class Optimum(NamedTuple):
  """The best that a policy can do.

  Attributes:
    values: `[S]` expected discounted return.
    action_values: `[S, A]`, -inf at illegal actions.
    policy: `[S, A]`, all on the first best action.
    error: scalar, the last change of a value.
  """

  values: jax.Array
  action_values: jax.Array
  policy: jax.Array
  error: jax.Array


class Returns(NamedTuple):
  """A finite distribution of returns: `values [N]`, increasing, with probabilities `probs [N]`."""

  values: np.ndarray
  probs: np.ndarray


# --- play ---


def first_states(process: DecisionProcess, key: Any, shape: tuple[int, ...] = ()) -> jax.Array:
  """Returns states drawn from the initial distribution, int32 of the shape `shape`."""
  return _draw(jax.random.uniform(key, shape, process.initial.dtype), process.initial)


def step(
  process: DecisionProcess, states: jax.Array, actions: jax.Array, key: Any
) -> tuple[jax.Array, jax.Array]:
  """Returns the rewards and the next states after one action in each state; terminal states stay.

  Args:
    process: the process.
    states: `[...]` int.
    actions: `[...]` int, legal ones: nothing is said about what others do.
    key: typed PRNG key.
  """
  probs = process.probs[states, actions]
  outcomes = _draw(jax.random.uniform(key, states.shape, probs.dtype), probs)
  chosen = (states, actions, outcomes)
  return process.rewards[chosen], process.next_states[chosen]


def _draw(uniform: jax.Array, probs: jax.Array) -> jax.Array:
  """Returns an index `[...]` drawn with probabilities `[..., K]`; never one of probability 0."""
  sums = jnp.cumsum(probs, axis=-1)
  return jnp.argmax((sums > uniform[..., None] * sums[..., -1:]) & (probs > 0), axis=-1).astype(
    jnp.int32
  )


def with_slips(process: DecisionProcess, probability: Any) -> DecisionProcess:
  """Returns the process in which the agent slips: a random legal action replaces its own.

  Args:
    process: with K outcomes; the result has A K.
    probability: of a slip, in [0, 1]. The random action is uniform and may equal the agent's own.
  """
  checks.probabilities("probability", probability)
  num_states, num_actions, width = process.probs.shape
  uniform = regret_matching.normalise(jnp.zeros(process.legal.shape), process.legal)
  played = (1 - probability) * jnp.eye(num_actions) + probability * uniform[:, None]  # [S, A, A]
  shape = (num_states, num_actions, num_actions * width)

  def spread(array: jax.Array) -> jax.Array:
    return jnp.broadcast_to(array.reshape(num_states, 1, -1), shape)

  return dataclasses.replace(
    process,
    next_states=spread(process.next_states),
    rewards=spread(process.rewards),
    probs=(played[..., None] * process.probs[:, None]).reshape(shape).astype(process.probs.dtype),
  )


# --- values ---


def action_values(process: DecisionProcess, values: jax.Array, discount: Any) -> jax.Array:
  """Returns the expected reward and discounted next value of each action, `[S, A]`."""
  checks.probabilities("discount", discount)
  following = process.rewards + discount * values[process.next_states]
  return jnp.sum(process.probs * following, axis=-1)


def optimum(
  process: DecisionProcess, discount: Any, *, tolerance: float = 1e-6, max_sweeps: int = 100_000
) -> Optimum:
  """Returns optimal values and a greedy policy by value iteration.

  Args:
    process: the process.
    discount: gamma in [0, 1]. With 1, values are finite only if every episode can end.
    tolerance: iteration stops when no value changes by more.
    max_sweeps: or after so many sweeps; then `error` is larger than `tolerance`.

  Example:
    >>> chain = DecisionProcess(  # stay for 0, or leave for 1
    ...   next_states=jnp.array([[[0], [1]], [[1], [1]]]), probs=jnp.ones((2, 2, 1)),
    ...   rewards=jnp.array([[[0.0], [1.0]], [[0.0], [0.0]]]), legal=jnp.ones((2, 2), bool),
    ...   terminal=jnp.array([False, True]), initial=jnp.array([1.0, 0.0]), observations=jnp.eye(2))
    >>> found = optimum(chain, 0.5)
    >>> print(found.values, found.policy[0])
    [1. 0.] [0. 1.]
  """
  checks.probabilities("discount", discount)

  def backed_up(values: jax.Array) -> jax.Array:
    return jnp.where(process.legal, action_values(process, values, discount), -jnp.inf)

  values, error = _fixed_point(
    process, lambda values: jnp.max(backed_up(values), axis=-1), tolerance, max_sweeps
  )
  found = backed_up(values)
  policy = jax.nn.one_hot(jnp.argmax(found, axis=-1), process.num_actions, dtype=values.dtype)
  return Optimum(values, found, policy, error)


def _fixed_point(
  process: DecisionProcess,
  backup: Callable[[jax.Array], jax.Array],
  tolerance: float,
  max_sweeps: int,
) -> tuple[jax.Array, jax.Array]:
  """Returns the values `[S]` that a backup leaves as they are, and the last change of a value."""
  checks.positive("tolerance", tolerance)
  checks.count("max_sweeps", max_sweeps)

  def sweep(carry: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
    values, _, count = carry
    improved = backup(values)
    return improved, jnp.max(jnp.abs(improved - values)), count + 1

  def goes_on(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    return (carry[1] > tolerance) & (carry[2] < max_sweeps)

  start = jnp.zeros(process.num_states, process.rewards.dtype)
  infinite = jnp.asarray(jnp.inf, start.dtype)
  values, error, _ = jax.lax.while_loop(goes_on, sweep, (start, infinite, jnp.zeros((), int)))
  return values, error


def under_policy(process: DecisionProcess, policy: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the Markov reward process of a policy: transitions `[S, S]` and mean rewards `[S]`.

  Args:
    process: the process.
    policy: `[S, A]` probabilities, 0 at illegal actions.
  """
  _check_policy(process, policy)
  weights = policy[..., None] * process.probs
  rows = jnp.broadcast_to(jnp.arange(process.num_states)[:, None, None], weights.shape)
  shape = (process.num_states, process.num_states)
  transitions = jnp.zeros(shape, weights.dtype).at[rows, process.next_states].add(weights)
  return transitions, jnp.sum(weights * process.rewards, axis=(1, 2))


def policy_values(
  process: DecisionProcess,
  policy: jax.Array,
  discount: Any,
  *,
  tolerance: float = 1e-6,
  max_sweeps: int = 100_000,
) -> jax.Array:
  """Returns a policy's expected discounted return from each state, `[S]`, by sweeps.

  Where no state can come back, the sweeps end with the exact values after the longest episode. A
  linear solve would do as well, but several batched ones at once can block XLA's threads on a CPU.

  Args:
    process: the process.
    policy: `[S, A]` probabilities, 0 at illegal actions.
    discount: gamma in [0, 1]. With 1, values are finite only if the policy ends every episode.
    tolerance: sweeps stop when no value changes by more.
    max_sweeps: or after so many.
  """
  _check_policy(process, policy)

  def backup(values: jax.Array) -> jax.Array:
    return jnp.sum(policy * action_values(process, values, discount), axis=-1)

  return _fixed_point(process, backup, tolerance, max_sweeps)[0]


def return_distribution(
  process: DecisionProcess,
  policy: Any,
  discount: float,
  *,
  start: Any = None,
  num_steps: int = 10_000,
  max_atoms: int = 1_000_000,
) -> Returns:
  """Returns the exact distribution of a policy's discounted return, by following every path.

  Paths that meet in one state with the same return so far go on as one. The work is done in float64
  on the host.

  Args:
    process: the process.
    policy: `[S, A]` probabilities, 0 at illegal actions.
    discount: gamma in [0, 1].
    start: `[S]` probabilities of the first state; None for `process.initial`.
    num_steps: steps within which every episode must end.
    max_atoms: pairs of state and return that are followed at most.

  Raises:
    ValueError: if an episode goes on for longer, or there are more pairs.
  """
  _check_policy(process, policy)
  checks.probabilities("discount", discount, fetch=True)
  first = np.asarray(process.initial if start is None else start, float)
  checks.shape("start", first, (process.num_states,), "[S]")
  checks.distribution("start", first)
  # As numbers of states, returns so far, and probabilities.
  states = np.flatnonzero(first)
  sums, probs = np.zeros(len(states)), first[states] / first.sum()
  ended: list[tuple[np.ndarray, np.ndarray]] = []
  terminal, following = np.asarray(process.terminal), np.asarray(process.next_states)
  weights = np.asarray(policy, float)[..., None] * np.asarray(process.probs, float)
  weights /= weights.sum((1, 2), keepdims=True)  # float32 probabilities sum to 1 within 1e-7
  gains = np.asarray(process.rewards, float)
  for time in range(num_steps + 1):
    over = terminal[states]
    ended.append((sums[over], probs[over]))
    states, sums, probs = states[~over], sums[~over], probs[~over]
    if not len(states):
      merged = _merge(*(np.concatenate(part) for part in zip(*ended, strict=True)))
      return Returns(merged[0][:, 0], merged[1])
    sums = (sums[:, None, None] + discount**time * gains[states]).ravel()
    probs = (probs[:, None, None] * weights[states]).ravel()
    kept = probs > 0
    keys, probs = _merge(np.stack([following[states].ravel(), sums])[:, kept].T, probs[kept])
    states, sums = keys[:, 0].astype(int), keys[:, 1]
    if len(states) > max_atoms:
      raise ValueError(
        f"max_atoms must be at least the number of pairs of state and return, got {max_atoms}, but "
        f"there are {len(states)} after {time + 1} steps: increase it, or draw returns with `step`"
      )
  raise ValueError(
    f"num_steps must be at least the length of an episode, got {num_steps}, but with probability "
    f"{probs.sum():.3g} the episode still goes on: increase it, or use a policy that ends"
  )


def _merge(keys: np.ndarray, probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the distinct rows `[N, ...]` of keys, in order, and the sum of their probabilities."""
  keys = np.round(keys.reshape(len(probs), -1), 9)  # float64 sums of equal rewards differ by 1e-15
  distinct, places = np.unique(keys, axis=0, return_inverse=True)
  return distinct, np.bincount(places.ravel(), probs, len(distinct))


def _check_policy(process: DecisionProcess, policy: Any) -> None:
  checks.shape("policy", policy, process.legal.shape, "[S, A]")
  checks.distribution("policy", policy, fetch=True)
  if any(isinstance(array, jax.core.Tracer) for array in (policy, process.legal)):
    return
  forbidden = np.argwhere((np.asarray(policy) > 0) & ~np.asarray(process.legal))
  if len(forbidden):
    state, action = forbidden[0].tolist()
    raise ValueError(
      f"policy must be 0 at illegal actions, got {np.asarray(policy)[state, action]} for action "
      f"{action} in state {state}"
    )
