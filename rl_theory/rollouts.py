"""Random play of compiled games, one move at a time."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rl_theory import game_tree, openspiel


class Moves(NamedTuple):
  """The moves at a history: its children `[W]`, their actions, and which of the W exist."""

  children: jax.Array
  actions: jax.Array
  legal: jax.Array


def moves(game: game_tree.Game, nodes: jax.Array) -> Moves:
  """Returns the moves `[..., W]` at histories `[...]`."""
  slots = jnp.arange(game.layout.max_children, dtype=jnp.int32)
  legal = slots < game.num_children[nodes][..., None]
  children = jnp.minimum(game.first_children[nodes][..., None] + slots, len(game.parents) - 1)
  return Moves(children, game.actions[children], legal)


def move_probs(
  game: game_tree.Game, nodes: jax.Array, found: Moves, policy: jax.Array
) -> jax.Array:
  """Returns each move's probability `[..., W]`: that of chance, or of a policy `[..., A]`."""
  columns = jnp.clip(found.actions, 0, game.layout.num_actions - 1)
  chosen = jnp.take_along_axis(policy, columns, axis=-1)
  by_chance = (game.players[nodes] == openspiel.CHANCE)[..., None]
  probs = jnp.where(by_chance, game.chance_probs[found.children], chosen)
  return jnp.where(found.legal, probs, 0)


def draw(uniform: jax.Array, probs: jax.Array) -> jax.Array:
  """Returns an index drawn with probabilities `[..., W]`, from a uniform number in [0, 1).

  An entry of probability 0 is never drawn, and the probabilities need not sum to 1.
  """
  sums = jnp.cumsum(probs, axis=-1)
  return jnp.argmax((sums > uniform[..., None] * sums[..., -1:]) & (probs > 0), axis=-1)


def advance(
  game: game_tree.Game, nodes: jax.Array, policies: jax.Array, key: Any
) -> tuple[jax.Array, jax.Array]:
  """Returns the histories `[...]` after one move, and the actions; terminal histories stay.

  Args:
    game: the game.
    nodes: `[...]` histories.
    policies: `[..., A]` the policy of the player who moves there.
    key: typed PRNG key.
  """
  found = moves(game, nodes)
  probs = move_probs(game, nodes, found, policies)
  slots = draw(jax.random.uniform(key, nodes.shape, probs.dtype), probs)[..., None]
  following = jnp.take_along_axis(found.children, slots, axis=-1)[..., 0]
  actions = jnp.take_along_axis(found.actions, slots, axis=-1)[..., 0]
  over = game.players[nodes] == openspiel.TERMINAL
  return jnp.where(over, nodes, following), jnp.where(over, 0, jnp.maximum(actions, 0))
