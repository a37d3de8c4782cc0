"""What methods share that predict the output of a slowly moving copy of their own network.

`byol` and `bgrl` compare directions, so they normalise predictions and targets.
"""

from typing import Any

import jax
import jax.numpy as jnp


def normalise(rows: jax.Array) -> jax.Array:
  """Returns rows `[..., K]` divided by their L2 norms.

  Rows shorter than 1e-12 are returned unchanged: zeros stay zeros, and gradients stay finite in
  float32 too.
  """
  square = jnp.sum(rows**2, axis=-1, keepdims=True)
  return rows * jax.lax.rsqrt(jnp.where(square > 1e-24, square, 1))


def decay_schedule(step: Any, *, target_decay: Any, num_steps: Any) -> jax.Array:
  """Returns tau(k) = 1 - (1 - tau_0) (1 + cos(pi k / K)) / 2.

  It rises from `target_decay` at step 0 to 1 at `num_steps`, and stays there.

  Example:
    >>> print(decay_schedule(5000, target_decay=0.99, num_steps=10_000))
    0.995

  Reference: https://arxiv.org/abs/2006.07733, section 3.2.
  """
  progress = jnp.minimum(step / num_steps, 1)
  return 1 - (1 - target_decay) * (1 + jnp.cos(jnp.pi * progress)) / 2


def move(target: Any, online: Any, decay: Any) -> Any:
  """Returns decay * target + (1 - decay) * online, for each leaf of two equal trees.

  A decay of 1 leaves the target as it is, and a decay of 0 copies the online parameters.

  Example:
    >>> print(move(jnp.array([1.0, 2.0]), jnp.array([3.0, 2.0]), 0.75))
    [1.5 2. ]
  """
  # The decay is float32, so the mean of narrower parameters is float32 until it is cast back.
  return jax.tree.map(
    lambda old, new: (decay * old + (1 - decay) * new).astype(old.dtype), target, online
  )
