"""Regret matching: play actions in proportion to how much they are regretted."""

import jax
import jax.numpy as jnp


def regret_matching(regrets: jax.Array, legal: jax.Array) -> jax.Array:
  """Returns the policy that plays legal actions in proportion to their positive regrets.

  Where no legal action has a positive regret it is uniform over the legal ones.

  Args:
    regrets: `[..., A]` of any positive scale; what illegal actions have is ignored.
    legal: `[..., A]` bool.

  Returns:
    `[..., A]` probabilities; zero throughout for a row without legal actions.

  Raises:
    ValueError: if the shapes differ.

  Example:
    >>> regret_matching(jnp.array([3.0, -1.0, 1.0, 9.0]), jnp.array([True, True, True, False]))
    Array([0.75, 0.  , 0.25, 0.  ], dtype=float32)

  Reference: Zinkevich et al. 2007, "Regret minimization in games with incomplete information",
  eq. 8; Hart and Mas-Colell 2000.
  """
  if jnp.shape(regrets) != jnp.shape(legal):
    raise ValueError(
      f"regrets and legal must have one shape [..., A], got {list(jnp.shape(regrets))} and "
      f"{list(jnp.shape(legal))}"
    )
  return normalise(jnp.maximum(regrets, 0), legal)


def normalise(weights: jax.Array, legal: jax.Array) -> jax.Array:
  """Returns weights `[..., A]` >= 0 over their sum, uniform over legal actions if that is 0."""
  kept = jnp.where(legal, weights, 0)
  total = jnp.sum(kept, axis=-1, keepdims=True)
  count = jnp.sum(legal, axis=-1, keepdims=True)
  uniform = legal / jnp.maximum(count, 1).astype(kept.dtype)
  return jnp.where(total > 0, kept / jnp.where(total > 0, total, 1), uniform)
