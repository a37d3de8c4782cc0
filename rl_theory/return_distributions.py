"""Laws of returns: distances between them, and the exact ones by fine dynamic programming."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rl_theory import markov
from sharding import checks


def wasserstein(
  first: Any,
  second: Any,
  *,
  first_probs: Any = None,
  second_probs: Any = None,
  order: float = 1,
) -> jax.Array:
  """Returns the Wasserstein distance between distributions with finitely many atoms.

  Args:
    first: `[..., M]` atoms, in any order, such as quantiles or sampled returns.
    second: `[..., N]` atoms of the other distribution. The leading axes of all four broadcast.
    first_probs: `[..., M]` probabilities; None for 1 / M each.
    second_probs: `[..., N]` probabilities; None for 1 / N each.
    order: at least 1; `math.inf` for the largest distance between quantiles.

  Returns:
    `[...]` distances, in O((M + N) log(M + N)).

  Raises:
    ValueError: if `order` is less than 1, there are no atoms, or probabilities have another number
      than their atoms.

  Example:
    >>> print(wasserstein(jnp.array([0.0, 1.0]), jnp.array([1.0, 3.0, 0.0, 0.0])))
    0.5
  """
  if isinstance(order, str) or not order >= 1:
    raise ValueError(f"order must be a number of at least 1, got {order!r}")
  sides = []
  for name, atoms, probs in (("first", first, first_probs), ("second", second, second_probs)):
    checks.not_nan(name, atoms)
    atoms = jnp.asarray(atoms, float)
    if not atoms.ndim or not atoms.shape[-1]:
      raise ValueError(f"{name} must have atoms on its last axis, got shape {list(atoms.shape)}")
    if probs is None:
      probs = jnp.full(atoms.shape[-1:], 1 / atoms.shape[-1], atoms.dtype)
    if jnp.shape(probs)[-1:] != atoms.shape[-1:]:
      raise ValueError(
        f"{name}_probs must have as many entries as {name}, {atoms.shape[-1:]}, on the last axis, "
        f"got shape {list(jnp.shape(probs))}"
      )
    checks.probabilities(f"{name}_probs", probs)
    sides += [atoms, jnp.asarray(probs, atoms.dtype)]
  batch = jnp.broadcast_shapes(*(side.shape[:-1] for side in sides))
  sides = [jnp.broadcast_to(side, (*batch, side.shape[-1])) for side in sides]
  return _distances(*sides, order=order)


@functools.partial(jax.jit, static_argnames="order")
def _distances(*sides: jax.Array, order: float) -> jax.Array:
  distance = functools.partial(_wasserstein, order=order)
  for _ in sides[0].shape[:-1]:
    distance = jax.vmap(distance)
  return distance(*sides)


def _wasserstein(x: Any, p: Any, y: Any, q: Any, *, order: float) -> jax.Array:
  atoms, levels = [], []
  for values, probs in ((x, p), (y, q)):
    rank = jnp.argsort(values)
    atoms.append(values[rank])
    levels.append(jnp.cumsum(probs[rank]) / jnp.sum(probs))
  # Between two levels of either distribution both quantile functions are constant.
  cuts = jnp.concatenate([jnp.zeros(1, x.dtype), jnp.sort(jnp.concatenate(levels))])
  widths, middles = jnp.diff(cuts), (cuts[1:] + cuts[:-1]) / 2
  quantiles = [
    values[jnp.minimum(jnp.searchsorted(level, middles), len(values) - 1)]
    for values, level in zip(atoms, levels, strict=True)
  ]
  gaps = jnp.abs(quantiles[0] - quantiles[1])
  # Sums of probabilities that should be equal differ by rounding; such levels have no width.
  gaps = jnp.where(widths > 16 * jnp.finfo(x.dtype).eps, gaps, 0)
  if math.isinf(order):
    return jnp.max(gaps)
  return jnp.sum(widths * gaps**order) ** (1 / order)


class ReturnDistribution(NamedTuple):
  """The law of the return from every state, on a grid.

  Attributes:
    atoms: `[N]`, ascending.
    probs: `[S, N]`.
    error: scalar, a bound on the Wasserstein distance (of order 1) to the true law, at every state.
  """

  atoms: jax.Array
  probs: jax.Array
  error: jax.Array


def return_distribution(
  mrp: markov.MarkovRewardProcess, *, num_atoms: int = 2001, num_steps: int | None = None
) -> ReturnDistribution:
  """Returns the law of the return by categorical dynamic programming on a fine grid.

  The grid covers all possible returns. One projection onto it moves a mass by at most half of its
  spacing on average, and neither it nor the mixing over next states increases the distance, so that
  the fixed point is at most spacing / (2 (1 - discount)) away. What the iteration still lacks after
  n steps is at most discount^n times the width of the grid.

  Args:
    mrp: a process with finitely many rewards. For continuous ones take `markov.sample_returns`.
    num_atoms: N, at least 2.
    num_steps: n; by default (if the discount is known) so many that its error is below 1 % of the
      grid's.

  Raises:
    ValueError: if the rewards are continuous, or a count is too small.

  Example:
    >>> process = markov.MarkovRewardProcess([[0.5, 0.5], [0.0, 1.0]], [1.0, 0.0], 0.5)
    >>> law = return_distribution(process, num_atoms=401)
    >>> print(f"{law.probs[0] @ law.atoms:.4f} {law.error:.4f}")
    1.3333 0.0050
  """
  checks.count("num_atoms", num_atoms, least=2)
  rewards = markov.reward_atoms(mrp)
  if rewards is None:
    raise ValueError(
      "rewards must have finitely many values, got continuous ones: use markov.sample_returns"
    )
  if num_steps is None:
    if isinstance(mrp.discount, jax.core.Tracer):
      raise ValueError("num_steps must be given where the discount is traced, got None")
    small = 0.005 / ((num_atoms - 1) * (1 - float(mrp.discount)))
    num_steps = markov.num_iterations(mrp.discount, small)
  checks.count("num_steps", num_steps)
  return _return_distribution(mrp, rewards, num_atoms, num_steps)


@functools.partial(jax.jit, static_argnames=("num_atoms", "num_steps"))
def _return_distribution(
  mrp: markov.MarkovRewardProcess, rewards: Any, num_atoms: int, num_steps: int
) -> ReturnDistribution:
  horizon = 1 - mrp.discount
  possible = rewards.probs > 0
  low = jnp.min(jnp.where(possible, rewards.values, jnp.inf)) / horizon
  high = jnp.max(jnp.where(possible, rewards.values, -jnp.inf)) / horizon
  high = jnp.where(high > low, high, low + 1)
  atoms = low + (high - low) * jnp.linspace(0, 1, num_atoms, dtype=low.dtype)
  spacing = (high - low) / (num_atoms - 1)
  targets = rewards.values[..., None] + mrp.discount * atoms
  places = jnp.clip((targets - low) / spacing, 0, num_atoms - 1)  # [S, K, N]
  below = jnp.minimum(places.astype(jnp.int32), num_atoms - 2)
  upper = places - below

  def project(mixed: jax.Array, probs: jax.Array, below: jax.Array, upper: jax.Array) -> jax.Array:
    mass = probs[:, None] * mixed
    zeros = jnp.zeros(num_atoms, mixed.dtype)
    return zeros.at[below].add(mass * (1 - upper)).at[below + 1].add(mass * upper)

  def step(_: Any, probs: jax.Array) -> jax.Array:
    return jax.vmap(project)(mrp.transitions @ probs, rewards.probs, below, upper)

  start = jnp.full((len(mrp.transitions), num_atoms), 1 / num_atoms, atoms.dtype)
  probs = jax.lax.fori_loop(0, num_steps, step, start)
  error = spacing / (2 * horizon) + mrp.discount**num_steps * (high - low)
  return ReturnDistribution(atoms, probs, error)
