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


def test_illegal_actions_are_masked_and_ambiguous_names_become_numbers():
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
  with pytest.raises(ValueError, match="states must hold 60 rows at most"):
    game_figures.policy_heat_map(game, policy, states=[0] * 61)
  with pytest.raises(ValueError, match="policy must have shape"):
    game_figures.policy_heat_map(game, policy[:3])


def test_a_tree_is_drawn_without_crossings_and_a_policy_is_told():
  game = compiled_games.compile_game(compiled_games.KUHN)
  policy = np.asarray(policy_arrays.uniform(game)).copy()
  policy[0] = [0.75, 0.25]
  policy[1] = [1.0, 0.0]
  found = game_figures.draw_tree(game, policy)
  (axis,) = found.figure.axes
  texts = [text.get_text() for text in axis.texts]
  assert texts.count("Bet") == texts.count("Pass") == 24 and texts.count("1/3") == 3
  assert sorted({text for text in texts if text.lstrip("-").isdigit()}) == [
    "-1", "-2", "0", "1", "2",
  ]  # fmt: skip
  assert texts.count("0pb") == 2  # two histories, one information state
  heights, depths = game_figures._places(game)
  ends = np.asarray(game.terminals)
  assert len(set(heights[ends])) == len(ends) and depths.max() == 5
  for level in range(6):  # children are in the order of their parents
    at = np.flatnonzero((depths == level) & (np.asarray(game.parents) >= 0))
    order = at[np.argsort(-heights[at])]
    above = heights[np.asarray(game.parents)[order]]
    assert np.all(np.diff(above) <= 0)
  words = game_figures.policy_in_words(game, policy)
  assert words[0] == "Player 0 at '0': Pass 75% of the time and Bet 25% of the time."
  assert words[1] == "Player 0 at '1': always Pass." and len(words) == 12
  with pytest.raises(ValueError, match="game must have 60 ends at most"):
    game_figures.draw_tree(compiled_games.compile_game(compiled_games.LEDUC))
