"""Argument checks that name the argument, its value and the remedy, before anything is computed.

Shapes are always checked. Values are checked only where they are concrete (Python or NumPy
numbers): a traced or on-device value would cost a synchronisation or cannot be looked at.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np


def positive(name: str, value: Any) -> None:
  """Raises `ValueError` unless a concrete `value` is positive and finite (arrays: every entry).

  Tracers, device arrays and the placeholders that JAX puts into a pytree pass unseen.

  Example:
    >>> positive("tau", 0.1)
    >>> positive("tau", 0)
    Traceback (most recent call last):
      ...
    ValueError: tau must be positive and finite, got 0
  """
  if isinstance(value, str):
    raise ValueError(f"{name} must be a number, got the string {value!r}")
  if isinstance(value, numbers.Real):
    valid = 0 < float(value) < math.inf
  elif isinstance(value, np.ndarray | np.generic):
    array = np.asarray(value)
    valid = bool(np.all((array > 0) & np.isfinite(array)))
  else:
    return
  if not valid:
    raise ValueError(f"{name} must be positive and finite, got {value}")


def probabilities(name: str, value: Any) -> None:
  """Raises `ValueError` unless every entry of a concrete `value` lies in [0, 1]."""
  if isinstance(value, str):
    raise ValueError(f"{name} must be a number, got the string {value!r}")
  if isinstance(value, numbers.Real | np.ndarray | np.generic):
    array = np.asarray(value)
    if not np.all((array >= 0) & (array <= 1)):  # also false for NaN
      raise ValueError(f"{name} must be probabilities in [0, 1], got {value}")


def finite(name: str, value: Any) -> None:
  """Raises `ValueError` if a concrete `value` holds NaN or an infinity."""
  if isinstance(value, numbers.Real | np.ndarray | np.generic):
    flat = np.asarray(value, float).ravel()
    bad = np.flatnonzero(~np.isfinite(flat))
    if bad.size:
      raise ValueError(
        f"{name} must be finite, got {flat[bad[0]]} at place {bad[0]}: leave the row out"
      )


def antisymmetric(name: str, value: Any) -> None:
  """Raises `ValueError` unless concrete preferences `[..., A, A]` have P(i, j) + P(j, i) = 1."""
  probabilities(name, value)
  # 1e-4: float32 inputs, rounded by whoever made them.
  if isinstance(value, np.ndarray) and not np.allclose(
    value + np.swapaxes(value, -1, -2), 1, atol=1e-4
  ):
    raise ValueError(
      f"{name} must be antisymmetric, P(i beats j) + P(j beats i) = 1 with 1/2 on the diagonal, "
      f"got {value}"
    )


def choice(name: str, value: Any, choices: Sequence[Any]) -> None:
  """Raises `ValueError` unless `value` is one of `choices`."""
  if value not in choices:
    raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def count(name: str, value: Any) -> None:
  """Raises `ValueError` unless `value` is an integer of at least 1."""
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def token_ids(name: str, value: Any, size: int) -> None:
  """Raises if NumPy or Python `value` has an id outside [0, size); JAX arrays are not fetched."""
  if isinstance(value, jax.Array):
    return
  ids = np.asarray(value)
  if ids.size and not (ids.min() >= 0 and ids.max() < size):
    raise ValueError(
      f"{name} must lie in [0, {size}), got {ids.min()} to {ids.max()}: another model's tokenizer?"
    )


def same_shape(**arrays: Any) -> tuple[int, ...]:
  """Returns the one shape that all the named arrays have; raises `ValueError` if they differ."""
  shapes = {name: np.shape(array) for name, array in arrays.items()}
  if len(set(shapes.values())) > 1:
    listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    raise ValueError(f"shapes must be equal, got {listed}")
  return next(iter(shapes.values()))


def shape(name: str, array: Any, expected: tuple[int, ...], meaning: str) -> None:
  """Raises `ValueError` unless `array` has the `expected` shape; `meaning` is e.g. '[B, T]'."""
  if np.shape(array) != expected:
    raise ValueError(
      f"{name} must have shape {meaning} = {list(expected)}, got {list(np.shape(array))}"
    )
