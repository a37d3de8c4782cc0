"""Layers of the players' networks: concatenated rectifier, residual block, observation encoder.

They follow a public re-implementation of ARMAC (arXiv:2008.12234); sizes are arguments.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def crelu(x: jax.Array) -> jax.Array:
  """Returns relu(concat(x, -x)), `[..., 2 D]` from `[..., D]`; no unit can die.

  Reference: Shang et al. 2016, arXiv:1603.05201.
  """
  return nn.relu(jnp.concatenate([x, -x], axis=-1))


class Block(nn.Module):
  """A linear layer and a residual one on top of it, `[..., 2 width]`."""

  width: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    first = nn.Dense(self.width)(x)
    return crelu(first + nn.Dense(self.width)(crelu(first)))


class Encoder(nn.Module):
  """Encodes one player's observations as `[..., 2 width]`, or `[..., width]` with an LSTM.

  Attributes:
    width: of the linear layer and of the LSTM's state.
    recurrent: whether the observations are sequences `[..., L, O]`, newest last, which an LSTM
      reads; otherwise they are vectors `[..., O]`.
  """

  width: int
  recurrent: bool = False

  @nn.compact
  def __call__(self, observations: jax.Array) -> jax.Array:
    x = crelu(nn.Dense(self.width)(observations))
    if not self.recurrent:
      return x
    read: Any = nn.RNN(nn.OptimizedLSTMCell(self.width))(x)
    return read[..., -1, :]
