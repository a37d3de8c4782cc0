"""Properties of the leaves of a state, by which a checkpoint is verified.

Paths are those of `sharding.tree_paths`, such as `params/Dense_0/kernel`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sharding


def layout(tree: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
  """Returns dtype and shape of each leaf by path."""
  paths, leaves = sharding.tree_paths(tree), jax.tree.leaves(tree)
  return {
    path: (str(leaf.dtype), tuple(leaf.shape)) for path, leaf in zip(paths, leaves, strict=True)
  }


def describe(state: Any) -> dict[str, dict[str, Any]]:
  """Returns dtype, shape, checksum and finiteness of each leaf by path."""
  checks = jax.device_get(_inspect(jax.tree.leaves(state)))
  return {
    path: {
      "dtype": dtype,
      "shape": list(shape),
      "checksum": int(checksum),
      "finite": bool(finite),
    }
    for (path, (dtype, shape)), (checksum, finite) in zip(
      layout(state).items(), checks, strict=True
    )
  }


@jax.jit
def _inspect(leaves: list[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
  """Returns (checksum, whether all entries are finite) of each leaf.

  The checksum is the sum of the entries' bits as unsigned integers, modulo 2^32. Integer addition
  is exact in any order, so the checksum is the same for every sharding.
  """
  return [(_checksum(leaf), _is_finite(leaf)) for leaf in leaves]


def _is_finite(leaf: jax.Array) -> jax.Array:
  if jnp.issubdtype(leaf.dtype, jnp.inexact):
    return jnp.isfinite(leaf).all()
  return jnp.array(True)


def _checksum(leaf: jax.Array) -> jax.Array:
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
    return _checksum(leaf.real) + 3 * _checksum(leaf.imag)
  if leaf.dtype == jnp.bool_:
    leaf = leaf.astype(jnp.uint8)
  size = np.dtype(leaf.dtype).itemsize
  unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32)  # 8 bytes become two words
  bits = jax.lax.bitcast_convert_type(leaf, unsigned)
  return jnp.sum(bits, dtype=jnp.uint32)
