"""Described games: Kuhn poker by hand and from a file is OpenSpiel's, and bad input is named."""

import dataclasses

import compiled_games
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_games import pyspiel

from rl_theory import (
  cfr,
  described_games,
  efg_files,
  games,
  policy_arrays,
  policy_files,
  sequence_form,
)

Chance, Decision = described_games.Chance, described_games.Decision


def _kuhn() -> Chance:
  """Kuhn poker as a reader would write it, with OpenSpiel's names of the states."""

  def play(mine: int, theirs: int) -> Decision:
    win = 1 if mine > theirs else -1
    answer = Decision(0, f"{mine}pb", {"Pass": -1, "Bet": 2 * win})
    checked = Decision(1, f"{theirs}p", {"Pass": win, "Bet": answer})
    raised = Decision(1, f"{theirs}b", {"Pass": 1, "Bet": 2 * win})
    return Decision(0, f"{mine}", {"Pass": checked, "Bet": raised})

  def deal(mine: int) -> Chance:
    return Chance({str(card): (1 / 2, play(mine, card)) for card in range(3) if card != mine})

  return Chance({str(card): (1 / 3, deal(card)) for card in range(3)})


def _kuhn_file(folder):
  gambit = pytest.importorskip("open_spiel.python.algorithms.gambit")
  path = folder / "kuhn.efg"
  path.write_text(gambit.export_gambit(pyspiel.load_game("kuhn_poker")))
  return path


@pytest.mark.parametrize("source", ["tree", "file"])
def test_kuhn_poker_is_openspiels(x64, source, tmp_path):
  theirs = compiled_games.compile_game(compiled_games.KUHN)
  ours = games.compile_game(
    _kuhn() if source == "tree" else str(_kuhn_file(tmp_path)), dtype=jnp.float64
  )
  # All arrays but the numbers of chance's actions, which are OpenSpiel's cards there.
  for name in ("parents", "players", "info_states", "legal", "children", "sequences"):
    np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
  for policy in (policy_arrays.uniform(ours), compiled_games.random_policy(theirs)):
    # The same sums in the same order; one probability may differ in its last bit.
    np.testing.assert_allclose(
      games.nash_conv(ours, policy), games.nash_conv(theirs, policy), atol=1e-12
    )
  solved = [cfr.solve(game, num_iterations=100).average_policy for game in (ours, theirs)]
  np.testing.assert_allclose(*solved, atol=1e-12)
  names = policy_arrays.action_names(theirs)
  assert policy_arrays.action_names(ours) == names and names[0] == {0: "Pass", 1: "Bet"}
  if source == "tree":
    assert ours.state_strings == theirs.state_strings


@pytest.mark.parametrize("name", ["get_kuhn_poker_efg_data", "get_sample_efg_data"])
def test_files_are_read_as_openspiel_reads_them(x64, name):
  text = getattr(pyspiel, name)()
  root, title = efg_files.parse_efg(text)
  ours = games.compile_game(root, name=title, dtype=jnp.float64)
  theirs = games.compile_game(pyspiel.load_efg_game(text), dtype=jnp.float64)
  assert ours.legal.shape == theirs.legal.shape and ours.layout.levels == theirs.layout.levels
  # Uniform play, because the two may order their states differently.
  for reduce in (games.nash_conv, games.expected_values, games.best_response_values):
    np.testing.assert_allclose(
      reduce(ours, policy_arrays.uniform(ours)),
      reduce(theirs, policy_arrays.uniform(theirs)),
      atol=1e-12,
    )


def test_matching_pennies_and_other_matrices(x64):
  pennies = games.compile_game(jnp.array([[1.0, -1.0], [-1.0, 1.0]]), dtype=jnp.float64)
  assert pennies.state_strings == ("player 0", "player 1")
  assert games.nash_conv(pennies, policy_arrays.uniform(pennies)) == 0
  heads = jnp.array([[1.0, 0.0], [0.5, 0.5]])
  np.testing.assert_allclose(games.nash_conv(pennies, heads), 1, atol=1e-12)
  payoffs = np.random.default_rng(0).normal(size=(3, 4))
  game = games.compile_game(payoffs, dtype=jnp.float64)
  x, y = np.array([0.2, 0.3, 0.5]), np.array([0.4, 0.3, 0.2, 0.1])
  policy = np.stack([np.append(x, 0), y])
  np.testing.assert_allclose(games.expected_values(game, policy)[0], x @ payoffs @ y, atol=1e-12)
  gain = (payoffs @ y).max() - (x @ payoffs).min()
  np.testing.assert_allclose(games.nash_conv(game, policy), gain, atol=1e-12)
  value, _ = sequence_form.solve_zero_sum(game)
  solved = cfr.solve(game, num_iterations=500, variant="cfr+").average_policy
  assert abs(games.expected_values(game, solved)[0] - value) <= games.nash_conv(game, solved)
  three = np.random.default_rng(1).normal(size=(3, 2, 2, 2))  # players, then their actions
  game = games.compile_game(three, dtype=jnp.float64)
  np.testing.assert_allclose(
    games.expected_values(game, policy_arrays.uniform(game)), three.mean((1, 2, 3)), atol=1e-12
  )
  np.testing.assert_array_equal(game.utilities[game.terminals].T.reshape(three.shape), three)


def test_a_player_without_decisions_and_outcomes_on_the_way(x64):
  text = """EFG 2 R "toll" { "A" "B" }
    p "" 1 1 "" { "stay" "go" } 0
    t "" 1 "" { 1, -1 }
    p "" 1 2 "" { "left" "right" } 1
    t "" 2 "" { 1/2, -.5 }
    t "" 0
  """
  root, title = efg_files.parse_efg(text)
  game = games.compile_game(root, name=title, dtype=jnp.float64)
  assert repr(game).startswith("Game('toll', players=2, histories=5")
  # The toll of 1 is added to both ends behind it.
  np.testing.assert_array_equal(game.utilities[game.terminals][:, 0], [1, 1.5, 1])
  np.testing.assert_allclose(
    games.best_response_values(game, policy_arrays.uniform(game)), [1.5, -1.125], atol=1e-12
  )
  policy = cfr.solve(game, num_iterations=50, variant="cfr+").average_policy
  np.testing.assert_allclose(games.expected_values(game, policy), [1.5, -1.5], atol=0.05)


def test_indicators_say_what_the_mover_knows_and_where_the_others_may_be():
  game = games.compile_game(_kuhn())
  seen = np.asarray(games.information_state_tensors(game))
  states, players = np.asarray(game.info_states), np.asarray(game.players)
  own = seen[np.arange(len(seen)), np.maximum(players, 0)]
  deciding = players >= 0
  rows = {(state, tuple(row)) for state, row in zip(states[deciding], own[deciding], strict=True)}
  assert len(rows) == len(game.legal)  # one row for each information state
  # All players' rows together tell all histories with decisions apart, which a critic needs.
  assert len(np.unique(seen[deciding].reshape(deciding.sum(), -1), axis=0)) == deciding.sum()
  assert not seen[~deciding].any()


def test_policies_of_described_games_are_written_and_read(tmp_path):
  game = games.compile_game(_kuhn(), name="my poker")
  policy = cfr.solve(game, num_iterations=10).average_policy
  policy_files.write_policy(tmp_path / "policy.csv", game, policy)
  assert ",Bet," in (tmp_path / "policy.csv").read_text()
  np.testing.assert_array_equal(policy_files.read_policy(tmp_path / "policy.csv", game), policy)
  np.testing.assert_allclose(
    policy_arrays.from_dict(game, policy_arrays.to_dict(game, policy)), policy
  )
  with pytest.raises(ValueError, match="my poker is not one of OpenSpiel's"):
    policy_arrays.to_openspiel(game, policy)


@pytest.mark.parametrize(
  ("root", "message"),
  [
    (Decision(0, "s", {"a": 1, "b": "x"}), "at 'b': must be a Decision, a Chance.*got 'x'"),
    (Decision(0, "s", {"a": Decision(1, "t", {})}), "at 'a': moves must be a dictionary"),
    (Decision(-1, "s", {"a": 1}), "at its root: player must be 0, 1, ..., got -1"),
    (Decision(2, "s", {"a": 1}), "player 2 moves at state 's', but the ends have.* 2 players"),
    (Decision(0, "s", {"a": (1, 2), "b": (1, 2, 3)}), "at 'b': must have utilities of 2 players"),
    (Decision(0, "s", {"a": float("nan")}), "at 'a': must be a Decision.*got nan"),
    (Chance({"h": (0.5, 1), "t": (0.4, 1)}), r"at its root: probabilities.*\[0.5, 0.4\]"),
    (Chance({"h": 0.5}), r"outcome 'h' must be \(probability, node\), got 0.5"),
    (Chance({"h": (1, 1)}), "must have a decision"),
    (
      Decision(0, "s", {"a": Decision(1, "t", {"c": 1}), "b": Decision(1, "t", {"d": 1})}),
      r"at 'b': player 1 has the moves \['d'\] at state 't' and \['c'\] elsewhere",
    ),
    (
      Decision(0, "s", {m: Decision(0, "t", {"c": 1, "d": 0}) for m in "ab"}),
      "imperfect recall: at information state 't'",
    ),
    (Decision(0, "s", {"a": 10**400}), "game mine at 'a': must be a Decision"),
  ],
)
def test_a_wrong_tree_is_refused_by_its_node(root, message):
  with pytest.raises(ValueError, match=message):
    games.compile_game(root, name="mine")


@pytest.mark.parametrize(
  ("body", "message"),
  [
    ('EFG 1 R "g" { "A" "B" }', "line 1: the file starts with EFG 2 R: expected 2, got '1'"),
    ('EFG 2 R "g { "A" }', 'line 1: the text that starts with " has no end'),
    ('EFG 2 R "g" { "A" "B" }\nx "" 1', "line 2: expected a node: c, p or t, got 'x'"),
    ('EFG 2 R "g" { "A" }\np "" 2 1 "" { "a" } 0', "line 2: the player must be one of 1 to 1"),
    ('EFG 2 R "g" { "A" }\np "" 1 1 "" { "a" } 0', "line 2: expected a node.*got 'the end of"),
    ('EFG 2 R "g" { "A" }\n\nt "" 1 "" { 1 2 }', "line 3: outcome 1 must have 1 utilities, got 2"),
    ('EFG 2 R "g" { "A" }\nt "" 1 "" { 1/0 }', "line 2: expected a utility, a number.*got '1/0'"),
    ('EFG 2 R "g" { "A" }\nt "" 1 "" { 1e400 }', "line 2: expected a utility.*got '1e400'"),
    ('EFG 2 R "g" { "A" }\nt "" 1 "" { 1e999999999 }', "line 2: expected a utility"),
    (f'EFG 2 R "g" {{ "A" }}\nt "" 1 "" {{ 1{"0" * 400}/3 }}', "line 2: expected a utility"),
    ('EFG 2 R "g" { "A" }\nt "" 0 "" { 5 }', "line 2: outcome 0 is worth nothing"),
    ('EFG 2 R "g" { "A" }\nt "" 7', "line 2: outcome 7 needs its utilities"),
    ('EFG 2 R "g" { "A" }\np "" 1 1 "" 0', "line 2: information set 1 needs its moves"),
    ('EFG 2 R "g" { "A" }\nc "" 1 "" { "h" .5 "t" .4 } 0', "line 2: probabilities must be pos"),
    ('EFG 2 R "g" { "A" }\np "" 1 1 "" { "a" "a" } 0', "line 2: two moves of information set 1"),
    ('EFG 2 R "g" { "A" }\nt "" 0\nt "" 0', "line 3: the tree is complete.*got 't'"),
  ],
)
def test_a_wrong_file_is_refused_by_its_line(body, message, tmp_path):
  path = tmp_path / "wrong.efg"
  path.write_text(body)
  with pytest.raises(ValueError, match=message) as raised:
    games.compile_game(path)
  assert str(raised.value).startswith(str(path))


def test_sets_stay_apart_whatever_their_names():
  # Sets 5, 3 and 4, of which the first two have the name that the third, or its number, would give.
  root, _ = efg_files.parse_efg(
    'EFG 2 R "g" { "A" } c "" 1 "" { "x" 1/3 "y" 1/3 "z" 1/3 } 0 '
    'p "" 1 5 "#3" { "a" } 0 t "" 0 p "" 1 3 "" { "b" } 0 t "" 0 p "" 1 4 "#3" { "c" } 0 t "" 0'
  )
  states = [node.state for _, node in root.moves.values()]
  assert len(set(states)) == 3
  assert len(games.compile_game(root, name="g").legal) == 3


def test_other_arguments_are_checked(tmp_path):
  with pytest.raises(ValueError, match="cannot be read: No such file"):
    games.compile_game(str(tmp_path / "absent.efg"))
  with pytest.raises(ValueError, match=r"payoffs must be \[A, B\] or .*, got shape \[3\]"):
    games.compile_game([1, 2, 3])
  for payoffs in ([[1, 2], [3]], [[1j]], [["a"]], [[None]], [[10**400]]):
    with pytest.raises(ValueError, match="payoffs must be real numbers in rows of one length"):
      described_games.matrix_game(payoffs)
  with pytest.raises(ValueError, match="payoffs must be finite"):
    games.compile_game(np.full((2, 2), np.inf))
  with pytest.raises(ValueError, match=r"utility of size 1e\+39, too large for float32"):
    games.compile_game([[1e39, 1], [0, 2]])
  with pytest.raises(ValueError, match="name must be left out for a game of OpenSpiel"):
    games.compile_game("kuhn_poker", name="mine")
  with pytest.raises(ValueError, match="at least 58 nodes, more than max_nodes=57"):
    games.compile_game(_kuhn(), max_nodes=57)


def test_payoffs_change_under_vmap():
  pennies = games.compile_game([[1, -1], [-1, 1]])

  def value(stake):
    payoffs = jnp.stack([jnp.array([stake, -1.0, -1.0, 1.0])] * 2, 1) * jnp.array([1.0, -1.0])
    utilities = pennies.utilities.at[pennies.terminals].set(payoffs)
    game = dataclasses.replace(pennies, utilities=utilities)
    policy = cfr.solve(game, num_iterations=2000, variant="cfr+").average_policy
    return games.expected_values(game, policy)[0]

  found = jax.jit(jax.vmap(value))(jnp.array([1.0, 3.0]))
  # A 2 by 2 game without a saddle: (ad - bc) / (a + d - b - c); CFR+ is within 1e-3 of it.
  np.testing.assert_allclose(found, [0.0, 2 / 6], atol=1e-3)


def test_which_games_have_a_constant_sum():
  chicken = np.array([[0.0, -1.0], [1.0, -10.0]])
  constant = np.array([[1.0, 0.0], [0.0, 1.0]])
  for scale in (1.0, 1e-7, 1e6):
    assert games.is_constant_sum(games.compile_game(scale * chicken))  # zero-sum
    assert games.is_constant_sum(games.compile_game(scale * np.stack([constant, 1 - constant])))
    assert not games.is_constant_sum(games.compile_game(scale * np.stack([chicken, chicken])))
  three = np.stack([np.ones((2, 2, 2)), -np.ones((2, 2, 2)), np.zeros((2, 2, 2))])
  assert not games.is_constant_sum(games.compile_game(three))
