"""Arithmetic on tables of log-probabilities, in NumPy or in jax.numpy, as the arguments are.

NumPy arguments are computed with NumPy, in float64 if they are float64, whatever JAX's settings
are. If one argument is a JAX array, the computation is JAX's and can be traced.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

Array = Any  # NumPy arrays in give NumPy arrays out, JAX arrays give JAX arrays


def arrays(**named: Any) -> tuple[Any, ...]:
  """Returns the array module, `numpy` or `jax.numpy`, and the arguments as its floating arrays.

  Args:
    **named: arrays or lists `[..., A]`.

  Raises:
    ValueError: if an argument is a scalar or has NaN, or the last axes differ.
  """
  xp = jnp if any(isinstance(array, jax.Array) for array in named.values()) else np
  result = []
  for name, value in named.items():
    array = xp.asarray(value)
    array = array if xp.issubdtype(array.dtype, xp.floating) else array.astype(float)
    if array.ndim == 0:
      raise ValueError(f"{name} must have shape [..., A], got a scalar")
    if not isinstance(array, jax.core.Tracer) and np.isnan(array).any():
      raise ValueError(f"{name} must not contain NaN, got {array}")
    result.append(array)
  if len({array.shape[-1] for array in result}) > 1:
    shapes = ", ".join(f"{name} {list(np.shape(value))}" for name, value in named.items())
    raise ValueError(f"the last axes must be equal (actions), got {shapes}")
  return (xp, *result)


def per_problem(
  xp: Any, name: str, value: Any, batch_shape: tuple[int, ...], axes: int = 1
) -> Array:
  """Returns a number, or one number `[...]` for each problem of a batch, with `axes` axes added.

  Args:
    xp: the array module.
    name: of the argument, for the error.
    value: a number or an array `[...]`.
    batch_shape: the leading axes of the tables that it meets.
    axes: how many axes of a table to broadcast over.

  Raises:
    ValueError: if the shape of `value` does not broadcast with `batch_shape`.
  """
  shape = np.shape(value)
  try:
    np.broadcast_shapes(shape, batch_shape)
  except ValueError as error:
    raise ValueError(
      f"{name} must be one number, or have one for each problem of the leading axes "
      f"{list(batch_shape)}, got shape {list(shape)}"
    ) from error
  return xp.reshape(xp.asarray(value), shape + (1,) * axes) if shape else value


def logsumexp(xp: Any, logits: Array) -> Array:
  """Returns log sum exp over the last axis, which is kept with size 1."""
  function = scipy.special.logsumexp if xp is np else jax.nn.logsumexp
  return function(logits, axis=-1, keepdims=True)


def normalise(xp: Any, logits: Array, dtype: Any) -> Array:
  """Returns the log-probabilities `[..., A]` of logits, in `dtype`."""
  return (logits - logsumexp(xp, logits)).astype(dtype)
