"""Checks of arguments: each error names the argument, its value and what to give instead.

Shapes are always checked, before anything is computed. Values are checked where they are already
on the host: Python numbers, lists of them and NumPy arrays. Three kinds of value pass unseen:

* a traced value, which nobody can look at;
* a JAX array, since looking at it waits for the device. Functions that are called rarely, such as
  evaluations, pass `fetch=True` to look at JAX arrays too;
* what is not an array at all. JAX rebuilds a registered dataclass with `object()`, None, shardings
  or shapes in place of its numbers, and runs the dataclass's checks on them.
"""

import dataclasses
import functools
import inspect
import numbers
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Function = TypeVar("Function", bound=Callable[..., Any])


def is_integer(value: Any) -> bool:
  """Returns whether `value` is a Python or NumPy integer; a bool is not one.

  Example:
    >>> is_integer(3), is_integer(np.int32(3)), is_integer(True), is_integer(3.0)
    (True, True, False, False)
  """
  return isinstance(value, int | np.integer) and not isinstance(value, bool)


# --- numbers --------------------------------------------------------------------------------------


def positive(name: str, value: Any, *, fetch: bool = False) -> None:
  """Raises `ValueError` unless every entry of `value` is positive and finite.

  Example:
    >>> positive("tau", 0.1)
    >>> positive("tau", 0)
    Traceback (most recent call last):
      ...
    ValueError: tau must be positive and finite, got 0
  """
  _require(name, value, fetch, lambda x: (x > 0) & (x < np.inf), "be positive and finite")


def not_negative(name: str, value: Any, *, fetch: bool = False) -> None:
  """Raises `ValueError` unless every entry of `value` is finite and at least 0."""
  _require(name, value, fetch, lambda x: (x >= 0) & (x < np.inf), "be finite and not negative")


def probabilities(name: str, value: Any, *, fetch: bool = False) -> None:
  """Raises `ValueError` unless every entry of `value` lies in [0, 1]."""
  _require(name, value, fetch, lambda x: (x >= 0) & (x <= 1), "lie in [0, 1]")


def fractions(name: str, value: Any, *, fetch: bool = False) -> None:
  """Raises `ValueError` unless every entry of `value` lies strictly between 0 and 1."""
  _require(name, value, fetch, lambda x: (x > 0) & (x < 1), "lie strictly between 0 and 1")


def finite(name: str, value: Any, *, fetch: bool = False) -> None:
  """Raises `ValueError` if `value` holds NaN or an infinity."""
  _require_entries(name, value, fetch, np.isfinite, "be finite")


def not_nan(name: str, value: Any, *, fetch: bool = False) -> None:
  """Raises `ValueError` if `value` holds NaN; infinities pass."""
  _require_entries(name, value, fetch, lambda x: ~np.isnan(x), "be numbers")


def distribution(name: str, value: Any, *, fetch: bool = False) -> None:
  """Raises `ValueError` unless `value` holds probabilities that sum to 1 over the last axis."""
  probabilities(name, value, fetch=fetch)
  array = _numbers(name, value, fetch)
  # 1e-4: inputs are often rounded to float32 or to a few digits.
  if array is not None and not np.allclose(array.sum(-1), 1, atol=1e-4):
    raise ValueError(f"{name} must sum to 1 over the last axis, got {array}")


def preference_matrix(preferences: Any, *, fetch: bool = False, **per_action: Any) -> None:
  """Raises `ValueError` unless `preferences` says of each two actions how often one wins.

  Args:
    preferences: `[..., A, A]`, entry i, j is P(i beats j), and P(i beats j) + P(j beats i) = 1.
    fetch: look at JAX arrays too.
    **per_action: named arrays `[..., A]` that must have the same number of actions.
  """
  shapes = {"preferences": _shape("preferences", preferences)}
  shapes |= {name: _shape(name, array) for name, array in per_action.items()}
  num_actions = shapes["preferences"][-1:]
  square = len(shapes["preferences"]) >= 2 and shapes["preferences"][-2:-1] == num_actions
  if not square or any(found[-1:] != num_actions for found in shapes.values()):
    wanted = ["preferences [..., A, A]", *(f"{name} [..., A]" for name in per_action)]
    found = [f"{name} {list(found)}" for name, found in shapes.items()]
    raise ValueError(f"the shapes must be {', '.join(wanted)}, got {', '.join(found)}")
  probabilities("preferences", preferences, fetch=fetch)
  array = _numbers("preferences", preferences, fetch)
  # 1e-4: inputs are often rounded to float32 or to a few digits.
  if array is not None and not np.allclose(array + np.swapaxes(array, -1, -2), 1, atol=1e-4):
    raise ValueError(
      "preferences must be antisymmetric, P(i beats j) + P(j beats i) = 1 with 1/2 on the "
      f"diagonal, got {array}"
    )


def count(name: str, value: Any, least: int = 1, most: int = 2**31 - 1) -> None:
  """Raises `ValueError` unless `value` is an integer from `least` to `most`, which int32 holds.

  Example:
    >>> count("num_steps", True)
    Traceback (most recent call last):
      ...
    ValueError: num_steps must be an integer >= 1, got True
  """
  if not is_integer(value) or value < least:
    raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
  if value > most:
    raise ValueError(f"{name} must be an integer <= {most}, got {value!r}")


def choice(name: str, value: Any, choices: Collection[Any]) -> None:
  """Raises `ValueError` unless `value` is one of `choices`."""
  if value not in choices:
    raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def given(config: Any) -> None:
  """Raises `ValueError` if a field of a dataclass is None though its default is something else.

  The checks of a config let None pass, because JAX puts it in place of numbers when it rebuilds a
  config. What computes with a config calls this.

  Example:
    >>> @dataclasses.dataclass
    ... class Config:
    ...   tau: float = 0.1
    >>> given(Config(tau=None))
    Traceback (most recent call last):
      ...
    ValueError: tau of Config must be given, got None: leave it out for 0.1
  """
  for field in dataclasses.fields(config) if dataclasses.is_dataclass(config) else ():
    default = field.default
    if getattr(config, field.name) is None and default is not None:
      hint = "" if default is dataclasses.MISSING else f": leave it out for {default}"
      raise ValueError(f"{field.name} of {type(config).__name__} must be given, got None{hint}")


# --- shapes ---------------------------------------------------------------------------------------


def same_shape(**arrays: Any) -> tuple[int, ...]:
  """Returns the one shape that all the named arrays have; raises `ValueError` if they differ."""
  shapes = {name: _shape(name, array) for name, array in arrays.items()}
  if len(set(shapes.values())) > 1:
    listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    raise ValueError(f"shapes must be equal, got {listed}")
  return next(iter(shapes.values()))


def shape(name: str, array: Any, expected: tuple[int, ...], meaning: str) -> None:
  """Raises `ValueError` unless `array` has the `expected` shape; `meaning` is e.g. '[B, T]'."""
  if _shape(name, array) != expected:
    raise ValueError(
      f"{name} must have shape {meaning} = {list(expected)}, got {list(np.shape(array))}"
    )


def not_empty(**arrays: Any) -> None:
  """Raises `ValueError` if one of the named arrays has no entries."""
  for name, array in arrays.items():
    if 0 in _shape(name, array):
      raise ValueError(f"{name} must not be empty, got shape {list(np.shape(array))}")


def vector(name: str, values: Any) -> None:
  """Raises `ValueError` unless `values` is a list of numbers."""
  if len(_shape(name, values)) != 1:
    raise ValueError(f"{name} must be a list of numbers, got {values!r}: give [{values!r}] for one")


def matrix(name: str, array: Any, num_rows: int | None = None) -> None:
  """Raises `ValueError` unless `array` is `[N, D]`, not empty, with `num_rows` rows if given."""
  found = _shape(name, array)
  if len(found) != 2 or 0 in found:
    raise ValueError(
      f"{name} must have shape [N, D] and must not be empty, got {list(found)}: fold further axes "
      "into N, or use vmap"
    )
  if num_rows is not None and found[0] != num_rows:
    raise ValueError(f"{name} must have one row for each label, {num_rows}, got {found[0]}")


def row_mask(mask: Any, num_rows: int) -> None:
  """Raises `ValueError` unless `mask` is `[num_rows]` of bool: other shapes would broadcast."""
  if _shape("mask", mask) != (num_rows,) or not np.issubdtype(_dtype(mask), np.bool_):
    raise ValueError(
      f"mask must have shape [{num_rows}], one bool for each row, got "
      f"{_dtype(mask)} {list(_shape('mask', mask))}"
    )


# --- all arguments of a function ---


def array_arguments(function: Function) -> Function:
  """Decorates a function on arrays: lists become NumPy arrays before its own checks see them.

  Refused with the name of the argument: None where there must be a value, a list of strings or of
  rows of unequal length, an array without entries, NaN, and a number for each row (such as `tau`)
  whose shape does not fit the first argument. Tracers and JAX arrays pass unchanged.

  Example:
    >>> @array_arguments
    ... def scaled(rewards, *, tau):
    ...   return rewards / tau
    >>> print(scaled([1, 2], tau=0.5))
    [2. 4.]
    >>> scaled([1, 2], tau=None)
    Traceback (most recent call last):
      ...
    ValueError: tau must be given to scaled, got None
  """
  signature = inspect.signature(function)

  @functools.wraps(function)
  def checked(*args: Any, **kwargs: Any) -> Any:
    bound = signature.bind(*args, **kwargs)
    first = None
    for name, value in bound.arguments.items():
      parameter = signature.parameters[name]
      if value is None and parameter.default is not None:
        raise ValueError(f"{name} must be given to {function.__name__}, got None")
      if isinstance(value, list | tuple):
        array = _numbers(name, value, fetch=False)
        bound.arguments[name] = value = jnp.asarray(value) if array is None else _narrow(array)
      if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        continue
      if 0 in value.shape:
        raise ValueError(f"{name} must not be empty, got shape {list(value.shape)}")
      if isinstance(value, np.ndarray | np.generic):
        not_nan(name, value)
      if first is None:
        first = name, value.shape
      elif (
        parameter.kind is parameter.KEYWORD_ONLY
        and value.ndim
        and jnp.issubdtype(value.dtype, np.floating)
        and name != "mask"
      ):
        try:
          np.broadcast_shapes(first[1], value.shape)
        except ValueError as error:
          raise ValueError(
            f"{name} must have shape [], or one that fits {first[0]} {list(first[1])}, got "
            f"{list(value.shape)}"
          ) from error
    return function(*bound.args, **bound.kwargs)

  return checked  # type: ignore[return-value]


# --- indices and labels ---------------------------------------------------------------------------


def token_ids(name: str, value: Any, size: int) -> None:
  """Raises `ValueError` if a NumPy or Python `value` has an id outside [0, size)."""
  ids = _on_host(value, fetch=False)
  if ids is not None and ids.size and not (ids.min() >= 0 and ids.max() < size):
    raise ValueError(
      f"{name} must lie in [0, {size}), got {ids.min()} to {ids.max()}: another model's tokenizer?"
    )


def labels(array: Any, num_classes: Any, *, fetch: bool = False) -> None:
  """Raises `ValueError` unless `array` is `[N]` of integers in [0, num_classes)."""
  count("num_classes", num_classes, least=2)
  if (
    len(_shape("labels", array)) != 1
    or 0 in np.shape(array)
    or not np.issubdtype(_dtype(array), np.integer)
  ):
    raise ValueError(
      f"labels must be integers of shape [N], not empty, got {_dtype(array)} "
      f"{list(np.shape(array))}"
    )
  known = _on_host(array, fetch)
  if known is not None and not (known.min() >= 0 and known.max() < num_classes):
    raise ValueError(
      f"labels must lie in [0, num_classes) = [0, {num_classes}), got {known.min()} to "
      f"{known.max()}: leave rows without a label out"
    )


def several_classes(labels: Any, *, fetch: bool = False) -> None:
  """Raises `ValueError` if all `labels` are equal: every classifier would then be right."""
  known = _on_host(labels, fetch)
  if known is not None and np.unique(known).size < 2:
    raise ValueError(
      f"labels must hold at least two classes, got {known.size} rows of class "
      f"{np.ravel(known)[0]} only: any classifier would score 1"
    )


def binary(name: str, array: Any, *, fetch: bool = False) -> None:
  """Raises `ValueError` unless `array` is `[N, L]`, not empty, of zeros and ones."""
  if len(_shape(name, array)) != 2 or 0 in np.shape(array):
    raise ValueError(f"{name} must have shape [N, L], not empty, got {list(np.shape(array))}")
  known = _on_host(array, fetch)
  if known is not None and not np.isin(known, (0, 1)).all():
    raise ValueError(
      f"{name} must be 0 or 1, got {known.min()} to {known.max()}: encode the labels one-hot"
    )


def row_numbers(name: str, array: Any, num_rows: int, ndim: int, *, fetch: bool = False) -> None:
  """Raises `ValueError` unless `array` has `ndim` axes, none empty, of row numbers."""
  if len(_shape(name, array)) != ndim or 0 in np.shape(array):
    raise ValueError(
      f"{name} must have {ndim} axes, none of them empty, got shape {list(np.shape(array))}"
    )
  known = _on_host(array, fetch)
  if known is None:
    return
  if not np.issubdtype(known.dtype, np.integer):
    raise ValueError(
      f"{name} must be row numbers, got {known.dtype}: turn a mask into np.flatnonzero(mask)"
    )
  if known.min() < 0 or known.max() >= num_rows:
    raise ValueError(f"{name} must lie in [0, {num_rows}), got {known.min()} to {known.max()}")


def disjoint(name: str, array: Any, other_name: str, other: Any, *, fetch: bool = False) -> None:
  """Raises `ValueError` if `array` and `other` share a row; compared along the last axis."""
  _shape(name, array), _shape(other_name, other)
  first, second = _on_host(array, fetch), _on_host(other, fetch)
  if first is None or second is None:
    return
  for index in np.ndindex(first.shape[:-1]):
    common = np.intersect1d(first[index], second[index])
    if common.size:
      raise ValueError(
        f"{name} must share no row with {other_name}, got {common.size} at {list(index)}, for "
        f"example row {common[0]}: a row that was used to fit or choose cannot judge"
      )


def _require(
  name: str, value: Any, fetch: bool, holds: Callable[[Any], Any], requirement: str
) -> None:
  """Raises `ValueError` unless `holds` is true of every entry; NaN makes each comparison false."""
  # These run at every trace: most values are one Python number, which needs no array.
  array = value if type(value) in (float, int) else _numbers(name, value, fetch)
  if array is not None and not np.all(holds(array)):
    raise ValueError(f"{name} must {requirement}, got {array}")


def _require_entries(
  name: str, value: Any, fetch: bool, holds: Callable[[Any], Any], requirement: str
) -> None:
  """As `_require`; names the first entry for which `holds` is false, and its position."""
  array = _numbers(name, value, fetch)
  if array is None or np.all(held := holds(array)):
    return
  index = tuple(map(int, np.argwhere(~held)[0]))
  where = f" at position {index[0] if len(index) == 1 else index}" if index else ""
  raise ValueError(f"{name} must {requirement}, got {array[index]}{where}: leave the row out")


def _shape(name: str, value: Any) -> tuple[int, ...]:
  """Returns the shape of an array or a list; raises `ValueError` for rows of unequal length."""
  try:
    return np.shape(value)
  except ValueError as error:
    raise ValueError(f"{name} must have rows of equal length, got {value!r}") from error


def _numbers(name: str, value: Any, fetch: bool) -> np.ndarray | None:
  """Returns the value as an array of numbers, None where it cannot be seen; refuses anything else.

  Types that NumPy does not know, such as bfloat16, are widened.
  """
  if isinstance(value, str):
    raise ValueError(f"{name} must be a number, got the string {value!r}")
  if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
    raise ValueError(f"{name} must hold real numbers, got a PRNG key")
  try:
    array = _on_host(value, fetch)
  except ValueError as error:  # a ragged list
    raise ValueError(f"{name} must hold numbers in rows of equal length, got {value!r}") from error
  if array is None or array.dtype.kind in "biuf":
    return array
  if jnp.issubdtype(array.dtype, np.integer) or jnp.issubdtype(array.dtype, np.floating):
    return array.astype(float)
  raise ValueError(f"{name} must hold real numbers, got {value!r}")


def _on_host(value: Any, fetch: bool) -> np.ndarray | None:
  """Returns the value as an array; None where it passes unseen (see the module's text)."""
  if isinstance(value, jax.Array):
    if isinstance(value, jax.core.Tracer) or not fetch or not value.is_fully_addressable:
      return None
  elif isinstance(value, list | tuple):
    leaves = [leaf for leaf in jax.tree.leaves(value) if isinstance(leaf, jax.Array)]
    if any(_on_host(leaf, fetch) is None for leaf in leaves):
      return None
  elif not isinstance(value, numbers.Number) and not hasattr(value, "__array__"):
    return None
  array = np.asarray(value)
  if array.dtype == object:  # a fraction, a huge integer, or a list of JAX's placeholders
    if not isinstance(value, numbers.Real):
      return None
    try:
      return np.asarray(float(value))
    except OverflowError:  # an integer beyond the largest float
      return np.asarray(np.inf)
  return array


def _narrow(array: np.ndarray) -> np.ndarray:
  """Returns an array that was a list in the dtype that JAX gives lists."""
  return array.astype(jax.dtypes.canonicalize_dtype(array.dtype))


def _dtype(array: Any) -> Any:
  return getattr(array, "dtype", None) or np.asarray(array).dtype
