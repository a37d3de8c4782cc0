"""Heat maps show the policy, state by state."""

import compiled_games
import numpy as np
import pytest

from experiments.tasks import game_figures
from rl_theory import policy_arrays


def test_rows_are_states_and_colours_probabilities(tmp_path):
  game = compiled_games.compile_game(compiled_games.KUHN)
  policy = compiled_games.random_policy(game)
  found = game_figures.policy_heat_map(game, policy, states=[5, 0, 7])
  first, second, _ = found.figure.axes
  np.testing.assert_array_equal(first.images[0].get_array(), policy[[5, 0]])
  np.testing.assert_array_equal(second.images[0].get_array(), policy[[7]])
  assert [label.get_text() for label in first.get_yticklabels()] == [
    game.state_strings[5],
    game.state_strings[0],
  ]
  assert [label.get_text() for label in first.get_xticklabels()] == ["Pass", "Bet"]
  assert len(game_figures.policy_heat_map(game, policy).figure.axes) == 3
  found.figure.savefig(tmp_path / "p.png")


def test_illegal_actions_are_blank_and_unclear_names_numbers():
  game = compiled_games.compile_game(compiled_games.TIES3)
  row = int(np.flatnonzero(np.asarray(game.legal).sum(1) == 2)[0])
  found = game_figures.policy_heat_map(game, policy_arrays.uniform(game), states=[row])
  shown = np.ma.masked_invalid(found.figure.axes[0].images[0].get_array())
  np.testing.assert_array_equal(np.ma.getmaskarray(shown)[0], ~np.asarray(game.legal)[row])


def test_bad_input_is_refused():
  game = compiled_games.compile_game(compiled_games.KUHN)
  policy = policy_arrays.uniform(game)
  for states in ([], [0.5], [[0]], "ab"):
    with pytest.raises(ValueError, match="states must be a list of row numbers"):
      game_figures.policy_heat_map(game, policy, states=states)
  with pytest.raises(ValueError, match=r"states must lie in \[0, 12\)"):
    game_figures.policy_heat_map(game, policy, states=[12])
  with pytest.raises(ValueError, match="states must be 60 at most"):
    game_figures.policy_heat_map(game, policy, states=[0] * 61)
  with pytest.raises(ValueError, match="policy must have shape"):
    game_figures.policy_heat_map(game, policy[:3])
