"""Splits the rows of a batch over the devices of a mesh, and over micro-batches in time."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sharding import checks
from sharding import rules as sharding_rules

# The mesh axes that split a batch; along any other axis each device has the whole batch.
DATA_AXES = ("data", "fsdp")


def num_shards(mesh: jax.sharding.Mesh, axes: Sequence[str] = DATA_AXES) -> int:
  """Returns into how many parts `shard_batch` splits a batch; axes that the mesh lacks count as 1.

  Example:
    >>> import sharding
    >>> num_shards(sharding.make_mesh({"data": 1, "tensor": 1}, jax.devices()[:1]))
    1
  """
  return math.prod(mesh.shape.get(axis, 1) for axis in axes)


def local_rows(
  mesh: jax.sharding.Mesh, num_rows: int, axes: Sequence[str] = DATA_AXES
) -> np.ndarray:
  """Returns the rows of a whole batch that the devices of this process hold, in ascending order.

  Args:
    mesh: the devices.
    num_rows: rows of the whole batch.
    axes: as in `shard_batch`.

  Raises:
    ValueError: the rows do not divide over the shards.

  Example:
    >>> import sharding
    >>> local_rows(sharding.make_mesh({"data": -1}), 2 * jax.device_count())[:2]
    array([0, 1])
  """
  axes = _present(mesh, axes)
  _check_rows({"rows": np.empty(num_rows, bool)}, 0, (num_rows,), axes, mesh.shape)
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(axes))
  held = np.zeros(num_rows, bool)
  for index in split.addressable_devices_indices_map((num_rows,)).values():
    held[index] = True
  return np.flatnonzero(held)


def shard_batch(
  batch: Any,
  mesh: jax.sharding.Mesh,
  axes: Sequence[str] = DATA_AXES,
  *,
  whole: bool = False,
) -> Any:
  """Returns a host batch as global arrays, leading axis split over the data axes.

  Args:
    batch: arrays whose leading axis is the examples. Each process passes its own rows
      (`local_rows`); processes that hold the same data shard, as when `tensor` spans hosts, pass
      the same rows. Arrays without an axis are replicated; Python numbers and None stay as they
      are.
    mesh: the devices.
    axes: mesh axes to split over; `()` replicates everything. The default skips axes that the mesh
      lacks.
    whole: whether each process passes all rows, of which its devices take their own.

  Returns:
    The same tree; leaves that are already placed so are returned as they are.

  Raises:
    ValueError: if the mesh lacks an axis, or the rows of a leaf do not divide over the shards.

  Example:
    >>> import sharding
    >>> mesh = sharding.make_mesh({"data": 1}, devices=jax.devices()[:1])
    >>> batch = shard_batch({"tokens": np.zeros((4, 7)), "weight": 0.5}, mesh)
    >>> batch["tokens"].addressable_shards[0].data.shape, batch["weight"]
    ((4, 7), 0.5)
  """
  axes = _present(mesh, axes)
  replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(axes)) if axes else replicated
  leaves, treedef = jax.tree.flatten(batch)
  placed: list[Any] = []
  for index, leaf in enumerate(leaves):
    sharding = split if np.ndim(leaf) else replicated
    is_array = isinstance(leaf, jax.Array)
    is_global = is_array and (jax.process_count() == 1 or not leaf.is_fully_addressable)
    if not isinstance(leaf, bool | int | float | complex):
      all_rows = is_global or whole
      sizes = mesh.shape if all_rows else mesh.local_mesh.shape
      _check_rows(batch, index, np.shape(leaf), axes, sizes)
      if is_global:
        leaf = jax.device_put(leaf, sharding)
      else:
        leaf = np.asarray(leaf)
        shape = leaf.shape if whole else None
        leaf = jax.make_array_from_process_local_data(sharding, leaf, shape)
    placed.append(leaf)
  return jax.tree.unflatten(treedef, placed)


def accumulate_grads(loss: Callable[..., Any], num_microbatches: int) -> Callable[..., Any]:
  """Returns a drop-in for `jax.value_and_grad(loss, has_aux=True)` that needs less memory.

  With one micro-batch it *is* `jax.value_and_grad(loss, has_aux=True)`. With k of them every leaf
  of the batch is split into k parts along axis 0, and a scan computes one part after another. So
  memory holds the activations of one part only:

  - the loss, the gradients and floating-point metrics are averaged. The sum is in float32 or wider,
    the result in the dtype of the loss. Integer metrics are counts, so they are summed (booleans:
    any);
  - if `state` has a field `network_state`, each part starts from the one that the part before it
    returned; the last one is returned;
  - part i gets `jax.random.fold_in(key, i)`; leaves without an axis (a soft label given as one
    float) and None go to each part unchanged.

  The result equals that of one large batch if the loss is a mean over examples. It differs if the
  loss couples them (batch statistics, a mean over the tokens of examples of unequal length). Such
  an algorithm must refuse k > 1.

  Part i holds examples i, i + k, i + 2k, ... So each device splits its own rows, and a batch that
  is sharded along axis 0 does not move.

  Args:
    loss: `loss(params, state, batch, key, **kwargs) -> (scalar, (metrics, network_state))`.
    num_microbatches: k, a positive integer that divides the batch size.

  Returns:
    `grad_fn(params, state, batch, key, **kwargs) -> ((loss, (metrics, network_state)), grads)`.
    It raises `ValueError` if the leading axes of the batch's leaves differ, or k does not divide
    them.

  Raises:
    ValueError: if `num_microbatches` is not a positive integer.

  Example:
    >>> def loss(params, state, batch, key):
    ...   value = jnp.mean((params * batch["x"] - batch["y"]) ** 2)
    ...   return value, ({"loss": value}, ())
    >>> batch = {"x": jnp.array([1.0, 2.0, 3.0, 4.0]), "y": jnp.ones(4)}
    >>> (value, _), grads = accumulate_grads(loss, 2)(2.0, (), batch, jax.random.key(0))
    >>> print(value, grads)  # the mean of 1, 9, 25, 49, and its slope
    21.0 25.0
  """
  checks.count("num_microbatches", num_microbatches)
  value_and_grad = jax.value_and_grad(loss, has_aux=True)
  if num_microbatches == 1:
    return value_and_grad

  def grad_fn(params: Any, state: Any, batch: Any, key: Any, **kwargs: Any) -> Any:
    split, join = _split(batch, num_microbatches)

    def run(network_state, index, part):
      current = state
      if hasattr(state, "network_state"):
        current = state._replace(network_state=network_state)
      part_key = None if key is None else jax.random.fold_in(key, index)
      (value, (metrics, network_state)), grads = value_and_grad(
        params, current, join(part), part_key, **kwargs
      )
      return (value, metrics, grads), network_state

    start = getattr(state, "network_state", ())
    first = [leaf[0] for leaf in split]
    means, last = jax.eval_shape(run, start, 0, first)
    if not hasattr(state, "network_state"):  # the scan still carries the last one out
      start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), last)
    sums = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, _wide(leaf.dtype)), means)

    def body(carry, scanned):
      sums, network_state = carry
      values, network_state = run(network_state, *scanned)
      return (jax.tree.map(jnp.add, sums, values), network_state), None

    (sums, network_state), _ = jax.lax.scan(
      body, (sums, start), (jnp.arange(num_microbatches), split)
    )
    value, metrics, grads = jax.tree.map(
      lambda total, leaf: _mean(total, num_microbatches, leaf.dtype), sums, means
    )
    return (value, (metrics, network_state)), grads

  return grad_fn


def _present(mesh: jax.sharding.Mesh, axes: Sequence[str]) -> tuple[str, ...]:
  """Returns the axes that the mesh has; raises `ValueError` for one that is not a data axis."""
  unknown = [axis for axis in axes if axis not in mesh.shape and axis not in DATA_AXES]
  if unknown:
    raise ValueError(f"axes {unknown} are not in the mesh, which has {dict(mesh.shape)}.")
  return tuple(axis for axis in axes if axis in mesh.shape)


def _check_rows(
  batch: Any, index: int, shape: tuple[int, ...], axes: tuple[str, ...], sizes: Any
) -> None:
  """Raises `ValueError` if the rows of leaf `index` do not divide over axes of these sizes."""
  shards = math.prod(sizes[axis] for axis in axes)
  if shape and shape[0] % shards:
    path = sharding_rules.tree_paths(batch)[index]
    split = " x ".join(f"{axis!r} of {sizes[axis]}" for axis in axes)
    raise ValueError(
      f"batch leaf {path!r} has {shape[0]} rows, which do not divide over the {shards} "
      f"shards of mesh axes {split}: choose a multiple of {shards}, or drop the remainder."
    )


def _split(batch: Any, num_parts: int) -> tuple[list[Any], Callable[[list[Any]], Any]]:
  """Returns the splittable leaves as `[k, B / k, ...]`, and what rebuilds a batch from a part."""
  leaves, treedef = jax.tree.flatten(batch)
  rows = {
    path: np.shape(leaf)[0]
    for path, leaf in zip(sharding_rules.tree_paths(batch), leaves, strict=True)
    if np.ndim(leaf) > 0
  }
  if not rows:
    raise ValueError("batch has no leaf with a leading axis, so there is nothing to split.")
  path, size = next(iter(rows.items()))
  for other in rows:
    if rows[other] != size:
      raise ValueError(
        f"batch leaves {path!r} and {other!r} have {size} and {rows[other]} rows, so they cannot "
        f"be split into {num_parts} micro-batches: give each leaf the same leading axis, or none."
      )
  if size % num_parts:
    raise ValueError(
      f"num_microbatches is {num_parts}, which does not divide the {size} rows of batch leaf "
      f"{path!r}: choose a divisor of {size}, or another batch size."
    )

  # Strided parts keep rows on their device: the reshape to [B / k, k] keeps axis 0 sharded.
  def cut(leaf):
    return jnp.swapaxes(jnp.reshape(leaf, (size // num_parts, num_parts, *leaf.shape[1:])), 0, 1)

  def join(part):
    parts = iter(part)
    return jax.tree.unflatten(treedef, [next(parts) if np.ndim(leaf) else leaf for leaf in leaves])

  return [cut(leaf) for leaf in leaves if np.ndim(leaf)], join


def _wide(dtype: Any) -> Any:
  """Returns the dtype to sum in: at least float32 for floating-point numbers."""
  return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.inexact) else dtype


def _mean(total: jax.Array, count: int, dtype: Any) -> jax.Array:
  """Returns the mean in `dtype` of a floating-point sum; a sum of counts as it is."""
  return (total / count).astype(dtype) if jnp.issubdtype(dtype, jnp.inexact) else total
