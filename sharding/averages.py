"""Exponential moving averages of parameters, kept in float32 or wider.

In bfloat16 an average with a decay of 0.999 stands still: a thousandth of the way is less than half
of what 8 bits resolve. So the average is wider than the parameters, and `like` narrows it for the
network that it is applied with.
"""

from typing import Any

import jax
import jax.numpy as jnp


def start(params: Any) -> Any:
  """Returns the first average: a copy of the parameters, in float32 or wider.

  Example:
    >>> start({"scale": jnp.ones(2, jnp.bfloat16)})
    {'scale': Array([1., 1.], dtype=float32)}
  """

  def wide(leaf: Any) -> jax.Array:
    copy = jnp.copy(leaf)
    if not jnp.issubdtype(copy.dtype, jnp.inexact):
      return copy
    return copy.astype(jnp.promote_types(copy.dtype, jnp.float32))

  return jax.tree.map(wide, params)


def move(average: Any, params: Any, decay: Any) -> Any:
  """Returns decay * average + (1 - decay) * params, in the dtypes of the average.

  A decay of 1 leaves the average as it is, and a decay of 0 copies the parameters.

  Example:
    >>> print(move(jnp.array([1.0, 2.0]), jnp.array([3.0, 2.0]), 0.75))
    [1.5 2. ]
  """
  return jax.tree.map(
    lambda old, new: (decay * old + (1 - decay) * new.astype(old.dtype)).astype(old.dtype),
    average,
    params,
  )


def like(average: Any, params: Any) -> Any:
  """Returns the average in the dtypes of the parameters, as the network wants it."""
  return jax.tree.map(lambda old, new: old.astype(new.dtype), average, params)
