"""What methods share that predict the output of a slowly moving copy of their own network.

`byol` and `bgrl` compare directions, so they normalise predictions and targets. The copy itself is
moved by `sharding.averages`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from sharding import checks


@checks.array_arguments
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
