"""The actor and the critic of ARMAC: an encoder, one residual block, linear heads."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rl_theory.networks import layers


class Actor(nn.Module):
  """Maps the mover's observations to `(regrets, policy_logits)`, `[..., A]` each.

  Both heads are 0 at initialisation, so that the first policies are uniform.

  Attributes:
    num_actions: A.
    width: of the encoder.
    block_width: of the block under the two heads.
    recurrent: as in `layers.Encoder`.
  """

  num_actions: int
  width: int = 128
  block_width: int = 64
  recurrent: bool = False

  @nn.compact
  def __call__(self, observations: jax.Array) -> tuple[jax.Array, jax.Array]:
    encoded = layers.Encoder(self.width, self.recurrent)(observations)
    x = layers.Block(self.block_width)(encoded)
    zeros: Any = nn.initializers.zeros
    regrets = nn.Dense(self.num_actions, kernel_init=zeros, name="regrets")(x)
    return regrets, nn.Dense(self.num_actions, kernel_init=zeros, name="policy")(x)


class Critic(nn.Module):
  """Maps all players' observations `[..., n, ...]` to each player's action values `[..., n, A]`.

  All players share the encoder. Two linear layers, also shared, then mix each player's encoding
  with the sum of the others'.

  Attributes:
    num_players: n.
    num_actions: A.
    width: of the encoder.
    block_width: of the mixing layers and the block under the heads.
    recurrent: as in `layers.Encoder`.
  """

  num_players: int
  num_actions: int
  width: int = 128
  block_width: int = 64
  recurrent: bool = False

  @nn.compact
  def __call__(self, observations: jax.Array) -> jax.Array:
    encoded = layers.Encoder(self.width, self.recurrent)(observations)
    others = jnp.sum(encoded, axis=-2, keepdims=True) - encoded
    mixed = nn.relu(
      nn.Dense(self.block_width, name="own")(encoded)
      + nn.Dense(self.block_width, use_bias=False, name="others")(others)
    )
    x = layers.Block(self.block_width)(mixed.reshape(*mixed.shape[:-2], -1))
    values = nn.Dense(self.num_players * self.num_actions, name="values")(x)
    return values.reshape(*values.shape[:-1], self.num_players, self.num_actions)
