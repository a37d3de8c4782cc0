"""Flax modules as the pure functions that the algorithms take; they hash, as `jax.jit` needs."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax


@dataclasses.dataclass(frozen=True)
class Encoder:
  """A module as `encoder(params, network_state, inputs, *, train) -> (embeddings, network_state)`.

  The network state holds all collections other than the parameters, such as running statistics.

  Attributes:
    module: a module that takes `(inputs, *, train)`, for example one of `gcn`.
  """

  module: nn.Module

  def __call__(
    self, params: Any, network_state: Any, inputs: Any, *, train: bool
  ) -> tuple[Any, Any]:
    variables = {"params": params, **dict(network_state)}  # `()` or `{}` where there is no state
    if not (train and network_state):
      return self.module.apply(variables, inputs, train=train), network_state
    out, new_state = self.module.apply(variables, inputs, train=True, mutable=list(network_state))
    return out, new_state

  def init(self, key: jax.Array, inputs: Any) -> tuple[Any, Any]:
    """Returns parameters and network state."""
    variables = self.module.init(key, inputs, train=False)
    return variables.pop("params"), variables


@dataclasses.dataclass(frozen=True)
class Predictor:
  """A module without state as `predictor(params, *inputs) -> predictions`.

  Attributes:
    module: a module that takes `inputs`, for example `mlp.MLP`, which takes embeddings.
  """

  module: nn.Module

  def __call__(self, params: Any, *inputs: jax.Array) -> Any:
    return self.module.apply({"params": params}, *inputs)

  def init(self, key: jax.Array, *inputs: Any) -> Any:
    """Returns parameters."""
    return self.module.init(key, *inputs)["params"]
