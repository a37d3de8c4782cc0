"""Returns of a trajectory, as targets for the values of another policy."""

from typing import Any

import jax
import jax.numpy as jnp


def tree_backup_targets(
  action_values: jax.Array,
  policies: jax.Array,
  actions: jax.Array,
  rewards: jax.Array,
  mask: jax.Array,
  *,
  trace_decay: Any,
  discount: Any = 1.0,
) -> jax.Array:
  """Returns the Tree-Backup(lambda) target of each step's action value.

  With v = sum_b pi(b) q(b), backwards from the end, after which everything is 0,

    G_k = r_k + discount (v_{k+1} + lambda pi(a_{k+1}) (G_{k+1} - q(a_{k+1}))).

  The policy that is evaluated need not be the one that acted, and no ratio of the two appears.

  Args:
    action_values: `[..., T, A]`, the estimates q.
    policies: `[..., T, A]`, the policy pi to be evaluated; 0 for illegal actions.
    actions: `[..., T]` int, what was done.
    rewards: `[..., T]`, what came after it.
    mask: `[..., T]`, non-zero at the steps; others are passed over, wherever they lie.
    trace_decay: lambda in [0, 1]: 0 looks one step ahead, 1 as far as pi would have gone along.
    discount: in [0, 1].

  Returns:
    `[..., T]`, 0 where masked out. No gradient is stopped.

  Raises:
    ValueError: if the shapes differ.

  Example:
    >>> q, pi = jnp.zeros((2, 2)), jnp.full((2, 2), 0.5)
    >>> steps, rewards = jnp.zeros(2, int), jnp.array([0.0, 1.0])
    >>> tree_backup_targets(q, pi, steps, rewards, jnp.ones(2), trace_decay=1.0)
    Array([0.5, 1. ], dtype=float32)

  Reference: Precup, Sutton and Singh 2000, "Eligibility traces for off-policy policy evaluation".
  """
  shape = jnp.shape(actions)
  for name, array in (("rewards", rewards), ("mask", mask)):
    if jnp.shape(array) != shape:
      raise ValueError(f"{name} must have the shape of actions {list(shape)}, got {array.shape}")
  for name, array in (("action_values", action_values), ("policies", policies)):
    if jnp.shape(array)[:-1] != shape:
      raise ValueError(
        f"{name} must have the shape of actions and an axis A, {[*shape, 'A']}, got {array.shape}"
      )
  values = jnp.sum(policies * action_values, axis=-1)
  taken = jnp.take_along_axis(action_values, actions[..., None], -1)[..., 0]
  probs = jnp.take_along_axis(policies, actions[..., None], -1)[..., 0]

  def back(following: jax.Array, step: Any) -> tuple[jax.Array, jax.Array]:
    value, taken, prob, reward, real = step
    target = jnp.where(real, reward + discount * following, 0)
    here = value + trace_decay * prob * (target - taken)
    return jnp.where(real, here, following), target

  steps = (values, taken, probs, rewards, mask != 0)
  steps = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), steps)
  _, targets = jax.lax.scan(back, jnp.zeros(shape[:-1], values.dtype), steps, reverse=True)
  return jnp.moveaxis(targets, 0, -1)
