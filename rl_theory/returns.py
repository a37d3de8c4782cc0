"""Targets for the action values of one policy, from trajectories of another."""

from typing import Any

import jax
import jax.numpy as jnp

from sharding import checks


@checks.array_arguments
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

  With v = sum_b pi(b) q(b), and zeros after the end, the recursion runs backwards:

    G_k = r_k + discount (v_{k+1} + lambda pi(a_{k+1}) (G_{k+1} - q(a_{k+1}))).

  The evaluated policy pi need not be the one that acted, and no importance ratio appears.

  Args:
    action_values: `[..., T, A]`, the estimates q.
    policies: `[..., T, A]`, the policy pi to evaluate; 0 for illegal actions.
    actions: `[..., T]` int, the actions taken.
    rewards: `[..., T]`, received after them.
    mask: `[..., T]`, non-zero at real steps; the others are skipped, wherever they are.
    trace_decay: lambda in [0, 1]: 0 looks one step ahead, 1 cuts traces by pi alone.
    discount: in [0, 1].

  Returns:
    `[..., T]`, 0 where masked out. Gradients flow through the targets.

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
  checks.same_shape(actions=actions, rewards=rewards, mask=mask)
  table_shape = (*shape, *jnp.shape(action_values)[-1:])
  checks.shape("action_values", action_values, table_shape, "[..., T, A]")
  checks.shape("policies", policies, table_shape, "[..., T, A]")
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
