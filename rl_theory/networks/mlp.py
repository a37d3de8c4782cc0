"""Multilayer perceptrons with one output, or several quantiles, for each action."""

from typing import Any

import flax.linen as nn
import jax


class MLP(nn.Module):
  """Maps observations `[..., O]` to one number for each action, `[..., A]`, 0 at initialisation.

  Attributes:
    num_actions: A.
    widths: of the hidden layers, with plain rectifiers.
  """

  num_actions: int
  widths: tuple[int, ...] = (128,)

  @nn.compact
  def __call__(self, observations: jax.Array) -> jax.Array:
    x = observations
    for width in self.widths:
      x = nn.relu(nn.Dense(width)(x))
    zeros: Any = nn.initializers.zeros
    return nn.Dense(self.num_actions, kernel_init=zeros, name="head")(x)


class QuantileMLP(nn.Module):
  """Maps observations `[..., O]` to N quantiles of each action, `[..., A, N]`, 0 at initialisation.

  Attributes:
    num_actions: A.
    num_quantiles: N.
    widths: of the hidden layers, which are those of `MLP`.
  """

  num_actions: int
  num_quantiles: int
  widths: tuple[int, ...] = (128,)

  @nn.compact
  def __call__(self, observations: jax.Array) -> jax.Array:
    flat = MLP(self.num_actions * self.num_quantiles, self.widths)(observations)
    return flat.reshape(*flat.shape[:-1], self.num_actions, self.num_quantiles)
