"""Games that several tests share, compiled once a process; trees are kept for this process only."""

import atexit
import functools
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_theory import games

pyspiel = pytest.importorskip(
  "pyspiel", reason="OpenSpiel absent: pip install '.[games]' to test games"
)

KUHN, KUHN3, LEDUC = "kuhn_poker", "kuhn_poker(players=3)", "leduc_poker"
DARK_HEX = "dark_hex(board_size=2)"
HANABI = "tiny_hanabi"
AUCTION = "first_sealed_auction(max_value=4)"
UNIVERSAL = (
  "universal_poker(betting=limit,numPlayers=2,numRounds=2,blind=1 1,raiseSize=2 4,"
  "firstPlayer=1 1,maxRaises=1 1,numSuits=1,numRanks=4,numHoleCards=1,numBoardCards=0 1,"
  "stack=20 20)"
)
GOOFSPIEL = "goofspiel(num_cards=4,imp_info=True,points_order=descending)"
# Exact ties: two symmetric players and a prize by chance.
TIES3, TIES4 = (f"goofspiel(num_cards={count},imp_info=True)" for count in (3, 4))
LIARS_DICE4, LIARS_DICE = "liars_dice(numdice=1,dice_sides=4)", "liars_dice"

CACHE = tempfile.mkdtemp(prefix="bootstrax-games-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)


def compile_game(name: str) -> games.Game:
  """Returns the game in float64 under the fixture `x64`, else in float32."""
  return _compile(name, bool(jax.config.jax_enable_x64))


@functools.cache
def _compile(name: str, double: bool) -> games.Game:
  return games.compile_game(name, dtype=jnp.float64 if double else jnp.float32, cache=CACHE)


def random_policy(game: games.Game, seed: int = 0, holes: bool = False) -> np.ndarray:
  """Returns a random policy `[S, A]`; with `holes` many actions are never played."""
  rng = np.random.default_rng(seed)
  legal = np.asarray(game.legal)
  weights = rng.random(legal.shape) ** 2 * legal
  if holes:
    best = weights == weights.max(1, keepdims=True)
    weights = np.where(best | (rng.random(legal.shape) < 0.3), weights, 0)
  return weights / weights.sum(1, keepdims=True)
