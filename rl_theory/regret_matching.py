"""Regret matching: play actions in proportion to their positive regrets."""

import jax
import jax.numpy as jnp

from sharding import checks


@checks.array_arguments
def regret_matching(regrets: jax.Array, legal: jax.Array) -> jax.Array:
  """Returns the policy that plays legal actions in proportion to their positive regrets.

  If no legal action has a positive regret, it plays all legal actions with the same probability.

  Args:
    regrets: `[..., A]`; a positive factor changes nothing, and illegal actions are ignored.
    legal: `[..., A]` bool.

  Returns:
    `[..., A]` probabilities; all 0 in a row without legal actions.

  Raises:
    ValueError: if the shapes differ.

  Example:
    >>> regret_matching(jnp.array([3.0, -1.0, 1.0, 9.0]), jnp.array([True, True, True, False]))
    Array([0.75, 0.  , 0.25, 0.  ], dtype=float32)

  Reference: Zinkevich et al. 2007, "Regret minimization in games with incomplete information",
  eq. 8; Hart and Mas-Colell 2000.
  """
  checks.same_shape(regrets=regrets, legal=legal)
  return normalise(jnp.maximum(regrets, 0), legal)


@checks.array_arguments
def normalise(weights: jax.Array, legal: jax.Array) -> jax.Array:
  """Returns weights `[..., A]` >= 0 divided by their sum; uniform over legal actions if it is 0."""
  kept = jnp.where(legal, weights, 0)
  total = jnp.sum(kept, axis=-1, keepdims=True)
  count = jnp.sum(legal, axis=-1, keepdims=True)
  uniform = legal / jnp.maximum(count, 1).astype(kept.dtype)
  return jnp.where(total > 0, kept / jnp.where(total > 0, total, 1), uniform)
