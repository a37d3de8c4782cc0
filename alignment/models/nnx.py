"""Turns a `flax.nnx` module into a pure function and pytrees of parameters and state.

NNX keeps running statistics inside the module, and a plain `jax.jit` loses them. Here they are an
argument and a result, as all other state is.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def from_nnx(module: nnx.Module) -> tuple[Any, Any, Callable[..., tuple[Any, Any]]]:
  """Splits an NNX module into parameters, network state and a pure function.

  Args:
    module: any module; it is never changed. The function keeps its mode: call `module.train()` or
      `module.eval()` first.

  Returns:
    `(params, network_state, apply)`. `params` is a nested dict of the `nnx.Param` arrays,
    `network_state` one of all other arrays except the random streams.
    `apply(params, network_state, *args, key=None, **kwargs) -> (output, network_state)` runs the
    module. `key` seeds each of its random streams (one for each dropout layer, say) differently.

  Raises:
    ValueError: `apply` raises it if the module has random streams and `key` is None: every call
      would draw the same numbers.
  """
  graph, *states = nnx.split(module, nnx.Param, nnx.RngState, ...)
  params, streams, network_state = (nnx.to_pure_dict(state) for state in states)
  leaves = jax.tree.leaves(streams)
  structure = jax.tree.structure(streams)

  def fresh(index, leaf, key):
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return leaf  # the count of draws
    key = jax.random.fold_in(key, index)
    return jax.random.split(key, leaf.shape) if leaf.shape else key

  def apply(params, network_state, *args, key: jax.Array | None = None, **kwargs):
    if leaves and key is None:
      raise ValueError(
        "key is missing: the module has random streams, so pass a new key to each call"
      )
    seeded = jax.tree.unflatten(structure, [fresh(i, leaf, key) for i, leaf in enumerate(leaves)])
    # A copy, because NNX refuses to write to variables made outside a `jax.grad`.
    merged = nnx.merge(graph, params, seeded, network_state, copy=True)
    output = merged(*args, **kwargs)
    rest = nnx.split(merged, nnx.Param, nnx.RngState, ...)[-1]
    return output, nnx.to_pure_dict(rest)

  return params, network_state, apply
