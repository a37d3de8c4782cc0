"""Argument checks that name the argument, its value and the remedy, before anything is computed.

Shapes are always checked, values unless they are traced. Evaluations are rare, so values on the
device are fetched.
"""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def positive(name: str, value: Any) -> None:
  """Raises `ValueError` unless all of `value`, at least one number, is positive and finite."""
  if isinstance(value, str):
    raise ValueError(f"{name} must be a number, got the string {value!r}")
  array = _concrete(value)
  if array is not None and not (array.size and np.all((array > 0) & np.isfinite(array))):
    raise ValueError(f"{name} must be positive and finite, got {value}")


def not_negative(name: str, value: Any) -> None:
  """Raises `ValueError` unless all of `value`, at least one number, is finite and >= 0."""
  array = _concrete(value)
  if array is not None and not (array.size and np.all((array >= 0) & np.isfinite(array))):
    raise ValueError(f"{name} must be finite and not negative, got {value}")


def candidates(name: str, values: Any) -> None:
  """Raises `ValueError` unless `values` is a list of numbers."""
  if jnp.ndim(values) != 1:
    raise ValueError(f"{name} must be a list of numbers, got {values!r}: give [{values!r}] for one")


def probability(name: str, value: Any) -> None:
  """Raises `ValueError` unless `value`, where it is a Python or NumPy number, lies in [0, 1]."""
  if isinstance(value, str) or (isinstance(value, numbers.Real) and not 0 <= float(value) <= 1):
    raise ValueError(f"{name} must lie in [0, 1], got {value!r}")


def count(name: str, value: Any, least: int = 1) -> None:
  """Raises `ValueError` unless `value` is an integer of at least `least`."""
  if isinstance(value, bool) or not isinstance(value, int) or value < least:
    raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


def same_shape(**arrays: Any) -> None:
  """Raises `ValueError` unless the named arrays have one shape, not empty."""
  shapes = {name: jnp.shape(array) for name, array in arrays.items()}
  if len(set(shapes.values())) > 1 or 0 in next(iter(shapes.values())):
    listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    raise ValueError(f"shapes must be equal and not empty, got {listed}")


def matrix(name: str, array: Any, num_rows: int | None = None) -> None:
  """Raises `ValueError` unless `array` is `[N, D]`, neither of them 0, with `num_rows` if given."""
  shape = jnp.shape(array)
  if len(shape) != 2 or 0 in shape:
    raise ValueError(
      f"{name} must have shape [N, D], neither of them 0, got {list(shape)}: put further axes "
      "into N, or vmap"
    )
  if num_rows is not None and shape[0] != num_rows:
    raise ValueError(f"{name} must have as many rows as labels, {num_rows}, got {shape[0]}")


def row_mask(mask: Any, num_rows: int) -> None:
  """Raises `ValueError` unless `mask` is `[num_rows]` of truths: others would broadcast."""
  if jnp.shape(mask) != (num_rows,) or jnp.asarray(mask).dtype != bool:
    raise ValueError(
      f"mask must have shape [{num_rows}], one bool for each row, got "
      f"{jnp.asarray(mask).dtype} {list(jnp.shape(mask))}"
    )


def labels(array: Any, num_classes: Any) -> None:
  """Raises `ValueError` unless `array` is `[N]` of integers in [0, num_classes)."""
  count("num_classes", num_classes, least=2)
  dtype = jnp.asarray(array).dtype
  if jnp.ndim(array) != 1 or not len(array) or not jnp.issubdtype(dtype, jnp.integer):
    raise ValueError(
      f"labels must be integers of shape [N], not empty, got {dtype} {list(jnp.shape(array))}"
    )
  known = _concrete(array)
  if known is not None and not (known.min() >= 0 and known.max() < num_classes):
    raise ValueError(
      f"labels must lie in [0, num_classes) = [0, {num_classes}), got {known.min()} to "
      f"{known.max()}: leave rows without a label out"
    )


def binary(name: str, array: Any) -> None:
  """Raises `ValueError` unless `array` is `[N, L]`, not empty, of zeros and ones."""
  known = _concrete(array)
  if jnp.ndim(array) != 2 or 0 in jnp.shape(array):
    raise ValueError(f"{name} must have shape [N, L], not empty, got {list(jnp.shape(array))}")
  if known is not None and not np.isin(known, (0, 1)).all():
    raise ValueError(f"{name} must be 0 or 1, got {known.min()} to {known.max()}: one-hot them")


def row_numbers(name: str, array: Any, num_rows: int, ndim: int) -> None:
  """Raises `ValueError` unless `array` has `ndim` axes, none empty, of row numbers."""
  if np.ndim(array) != ndim or 0 in np.shape(array):
    raise ValueError(
      f"{name} must have {ndim} axes, none of them empty, got shape {list(np.shape(array))}"
    )
  known = _concrete(array)
  if known is None:
    return
  if not np.issubdtype(known.dtype, np.integer):
    raise ValueError(
      f"{name} must be row numbers, got {known.dtype}: turn a mask into np.flatnonzero(mask)"
    )
  if known.min() < 0 or known.max() >= num_rows:
    raise ValueError(f"{name} must lie in [0, {num_rows}), got {known.min()} to {known.max()}")


def disjoint(name: str, array: Any, other_name: str, other: Any) -> None:
  """Raises `ValueError` if a row along the last axis is one of `other`, leading axes alike."""
  first, second = _concrete(array), _concrete(other)
  if first is None or second is None:
    return
  for index in np.ndindex(first.shape[:-1]):
    common = np.intersect1d(first[index], second[index])
    if common.size:
      raise ValueError(
        f"{name} must have no row of {other_name}, got {common.size} at {list(index)}, for example "
        f"row {common[0]}: nothing may be judged by what it was fitted or chosen on"
      )


def _concrete(value: Any) -> np.ndarray | None:
  """The value as a NumPy array, or None where it is traced or one of JAX's placeholders."""
  array = None if isinstance(value, jax.core.Tracer) else np.asarray(value)
  return None if array is None or array.dtype == object else array
