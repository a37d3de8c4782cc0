"""Lets a `flax.nnx` module in where a pure function and a parameter pytree are wanted.

NNX keeps running statistics inside the module and loses them across a plain `jax.jit`; here they
are an argument and a result, like everything else that changes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def from_nnx(module: nnx.Module) -> tuple[Any, Any, Callable[..., tuple[Any, Any]]]:
  """Takes an NNX module apart into parameters, network state and a pure function.

  Args:
    module: any module; it is never changed. Its mode is frozen in: call `module.train()` or
      `module.eval()` before.

  Returns:
    `(params, network_state, apply)`: nested dicts of the `nnx.Param` arrays and of all others but
    the random streams, and `apply(params, network_state, *args, key=None, **kwargs) -> (output,
    network_state)`, which runs the module. Every random stream in it (one a dropout layer, say)
    starts from `key`, each its own way.

  Raises:
    ValueError: (`apply`) if the module has random streams and `key` is None: every call would
      draw the same numbers.
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
      raise ValueError("key is missing: the module has random streams, and draws need a new one")
    seeded = jax.tree.unflatten(structure, [fresh(i, leaf, key) for i, leaf in enumerate(leaves)])
    # A copy, because NNX refuses to write to variables made outside a `jax.grad`.
    merged = nnx.merge(graph, params, seeded, network_state, copy=True)
    output = merged(*args, **kwargs)
    rest = nnx.split(merged, nnx.Param, nnx.RngState, ...)[-1]
    return output, nnx.to_pure_dict(rest)

  return params, network_state, apply
