"""Two memories of fixed size: a circular replay buffer and a reservoir.

The replay buffer holds the newest items. The reservoir holds a uniform sample, without replacement,
of all items ever added (Vitter 1985, "Random sampling with a reservoir", algorithm R). The
functions that add work on one buffer; map them over several with `jax.vmap`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Buffer(NamedTuple):
  """A memory of capacity C.

  Attributes:
    items: leaves `[C]`; the first `min(seen, C)` places are in use.
    seen: scalar int32, the number of items ever added.
  """

  items: Any
  seen: jax.Array


def empty(dtypes: Any, shape: tuple[int, ...]) -> Buffer:
  """Returns empty buffers.

  Args:
    dtypes: the item, with a dtype in place of each array.
    shape: the capacity C, after the number of buffers if there are several: `(C,)` or `(n, C)`.

  Example:
    >>> empty({"action": jnp.int32}, (2, 3)).items["action"].shape
    (2, 3)
  """
  items = jax.tree.map(lambda dtype: jnp.zeros(shape, dtype), dtypes)
  return Buffer(items, jnp.zeros(shape[:-1], jnp.int32))


def add_to_replay(buffer: Buffer, items: Any, mask: jax.Array) -> Buffer:
  """Returns the circular buffer after adding items in turn, each in place of the oldest one.

  Args:
    buffer: leaves `[C]`.
    items: leaves `[M]`; M may exceed C.
    mask: `[M]` bool, which of them to add.

  Example:
    >>> buffer = empty(jnp.int32, (2,))
    >>> add_to_replay(buffer, jnp.array([5, 6, 7]), jnp.array([True, True, True])).items
    Array([7, 6], dtype=int32)
  """
  capacity, rank, count = _ranked(buffer, mask)
  kept = mask & (rank >= count - capacity)
  places = jnp.where(kept, (buffer.seen + rank) % capacity, capacity)
  return Buffer(_put(buffer.items, places, items), buffer.seen + count)


def add_to_reservoir(buffer: Buffer, items: Any, mask: jax.Array, key: Any) -> Buffer:
  """Returns the reservoir after adding items in turn.

  Every item ever seen is in the reservoir with the same probability: item number i (from 0) goes to
  place i while there is room. After that it goes to a place drawn uniformly from [0, i], and is
  dropped if the reservoir has no such place.

  Args:
    buffer: leaves `[C]`.
    items: leaves `[M]`; M may exceed C.
    mask: `[M]` bool, which of them to add.
    key: typed PRNG key.
  """
  capacity, rank, count = _ranked(buffer, mask)
  number = jnp.maximum(buffer.seen + rank, 0)
  drawn = jax.random.randint(key, mask.shape, 0, number + 1)
  places = jnp.where(number < capacity, number, drawn)
  places = jnp.where(mask & (places < capacity), places, capacity)
  # If several items go to one place, the last must stay; a scatter does not say which one wins.
  order = jnp.argsort(places, stable=True)
  places = places[order]
  last = jnp.append(places[1:] != places[:-1], True)
  items = jax.tree.map(lambda leaf: leaf[order], items)
  places = jnp.where(last, places, capacity)
  return Buffer(_put(buffer.items, places, items), buffer.seen + count)


def draw(buffers: Buffer, key: Any, num_items: int) -> Any:
  """Returns items drawn uniformly and with replacement from each of n buffers.

  Args:
    buffers: leaves `[n, C]`; none may be empty.
    key: typed PRNG key.
    num_items: B, from each buffer.

  Returns:
    The items, leaves `[B, n]`.
  """
  num_buffers, capacity = jax.tree.leaves(buffers.items)[0].shape
  held = jnp.minimum(buffers.seen, capacity)
  places = jax.random.randint(key, (num_items, num_buffers), 0, held)
  return jax.tree.map(lambda leaf: leaf[jnp.arange(num_buffers), places], buffers.items)


def _ranked(buffer: Buffer, mask: jax.Array) -> tuple[int, jax.Array, jax.Array]:
  """Returns the capacity, each item's number among the selected ones, and how many these are."""
  capacity = jax.tree.leaves(buffer.items)[0].shape[0]
  return capacity, jnp.cumsum(mask, dtype=jnp.int32) - 1, jnp.sum(mask, dtype=jnp.int32)


def _put(held: Any, places: jax.Array, items: Any) -> Any:
  """Returns the arrays with items written to their places; places beyond the end are dropped."""
  return jax.tree.map(lambda leaf, new: leaf.at[places].set(new, mode="drop"), held, items)
