"""Networks of players: what they have seen to regrets, a mean policy, action values.

The layers are those that a re-implementation of ARMAC reports: doubled rectifiers
relu(concat(x, -x)), an encoder, and one residual block B under the heads. Sizes are arguments.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def crelu(x: jax.Array) -> jax.Array:
  """Returns relu(concat(x, -x)), `[..., 2 D]` from `[..., D]`: no unit can die."""
  return nn.relu(jnp.concatenate([x, -x], axis=-1))


class Block(nn.Module):
  """B(x): a linear map and a residual one on top, `[..., 2 width]`."""

  width: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    first = nn.Dense(self.width)(x)
    return crelu(first + nn.Dense(self.width)(crelu(first)))


class Encoder(nn.Module):
  """Encodes one player's observations.

  Attributes:
    width: of the linear layer and of the LSTM's state.
    recurrent: whether the observations are sequences `[..., L, O]`, read by an LSTM, the newest
      last; otherwise vectors `[..., O]`.
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


class Actor(nn.Module):
  """Observations of the mover to `(regrets, policy_logits)`, `[..., A]` each; regrets start at 0.

  Attributes:
    num_actions: A.
    width: of the encoder.
    block_width: of the block under the two heads.
    recurrent: as in `Encoder`.
  """

  num_actions: int
  width: int = 128
  block_width: int = 64
  recurrent: bool = False

  @nn.compact
  def __call__(self, observations: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = Block(self.block_width)(Encoder(self.width, self.recurrent)(observations))
    zeros: Any = nn.initializers.zeros
    regrets = nn.Dense(self.num_actions, kernel_init=zeros, name="regrets")(x)
    return regrets, nn.Dense(self.num_actions, kernel_init=zeros, name="policy")(x)


class Critic(nn.Module):
  """Observations of all players `[..., n, ...]` to what each gets after each action, `[..., n, A]`.

  All players share the encoder; each is then mixed with the sum of the others by two maps that
  they share too.

  Attributes:
    num_players: n.
    num_actions: A.
    width: of the encoder.
    block_width: of the mixing maps and the block under the heads.
    recurrent: as in `Encoder`.
  """

  num_players: int
  num_actions: int
  width: int = 128
  block_width: int = 64
  recurrent: bool = False

  @nn.compact
  def __call__(self, observations: jax.Array) -> jax.Array:
    encoded = Encoder(self.width, self.recurrent)(observations)
    others = jnp.sum(encoded, axis=-2, keepdims=True) - encoded
    mixed = nn.relu(
      nn.Dense(self.block_width, name="own")(encoded)
      + nn.Dense(self.block_width, use_bias=False, name="others")(others)
    )
    x = Block(self.block_width)(mixed.reshape(*mixed.shape[:-2], -1))
    values = nn.Dense(self.num_players * self.num_actions, name="values")(x)
    return values.reshape(*values.shape[:-1], self.num_players, self.num_actions)


class MLP(nn.Module):
  """Observations `[..., O]` to one number for each action, `[..., A]`, all 0 at the start.

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
