"""Games as arrays: equal to OpenSpiel's values, to a slow recursion and to hand-worked numbers."""

import dataclasses
import itertools
import sys

import compiled_games
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_games import pyspiel

from rl_theory import games, openspiel, policy_arrays, sequence_form

SMALL = [
  compiled_games.KUHN,
  compiled_games.KUHN3,
  compiled_games.HANABI,
  compiled_games.UNIVERSAL,
  compiled_games.DARK_HEX,
]
LARGE = [
  compiled_games.LEDUC,
  compiled_games.GOOFSPIEL,
  compiled_games.AUCTION,
  compiled_games.LIARS_DICE4,
  compiled_games.LIARS_DICE,
]


@pytest.mark.parametrize(
  "name", SMALL + [pytest.param(name, marks=pytest.mark.slow) for name in LARGE]
)
def test_values_equal_openspiel(x64, name):
  game = compiled_games.compile_game(name)
  theirs = openspiel.load_game(name)
  for seed, holes in [(0, False), (1, True)]:
    policy = compiled_games.random_policy(game, seed, holes)
    exported = policy_arrays.to_openspiel(game, policy)
    # OpenSpiel's own recursion in float64: only the order of sums differs.
    np.testing.assert_allclose(
      games.nash_conv(game, policy), pyspiel.nash_conv(theirs, exported), atol=1e-9
    )
    best = games.best_response_values(game, policy)
    for player in range(game.num_players):
      response = pyspiel.TabularBestResponse(theirs, player, exported)
      root = theirs.new_initial_state()
      np.testing.assert_allclose(best[player], response.value_from_state(root), atol=1e-9)
    np.testing.assert_allclose(
      games.expected_values(game, policy), _expected(theirs, exported), atol=1e-9
    )


def _expected(game, policy):
  table = policy.policy_table()

  def value(state):
    if state.is_terminal():
      return np.array(state.returns())
    if state.is_chance_node():
      moves = state.chance_outcomes()
    else:
      moves = table[state.information_state_string()]
    return sum(prob * value(state.child(action)) for action, prob in moves if prob > 0)

  return value(game.new_initial_state())


@pytest.mark.parametrize("name", [compiled_games.KUHN3, compiled_games.DARK_HEX])
def test_reach_and_counterfactual_values_equal_a_walk_over_histories(x64, name):
  game = compiled_games.compile_game(name)
  policy = compiled_games.random_policy(game, 2, holes=True)
  parents, actions = np.asarray(game.parents), np.asarray(game.actions)
  players, states = np.asarray(game.players), np.asarray(game.info_states)
  num_nodes, num_players = len(parents), game.num_players
  reach = np.ones((num_nodes, num_players + 1))
  for node in range(1, num_nodes):
    mover = players[parents[node]]
    reach[node] = reach[parents[node]]
    if mover == games.CHANCE:
      reach[node, -1] *= game.chance_probs[node]
    else:
      reach[node, mover] *= policy[states[parents[node]], actions[node]]
  np.testing.assert_allclose(games.reach_probabilities(game, policy), reach, atol=1e-12)
  terminal = players == games.TERMINAL
  np.testing.assert_allclose(reach[terminal].prod(1).sum(), 1, atol=1e-12)

  values = np.array(game.utilities)
  expected = np.zeros(policy.shape)
  for node in range(num_nodes - 1, 0, -1):
    parent = parents[node]
    mover, state = players[parent], states[parent]
    prob = game.chance_probs[node] if mover == games.CHANCE else policy[state, actions[node]]
    values[parent] += prob * values[node]
    if mover >= 0:
      others = np.delete(reach[parent], mover).prod()
      expected[state, actions[node]] += others * values[node, mover]
  np.testing.assert_allclose(games.counterfactual_values(game, policy), expected, atol=1e-12)
  np.testing.assert_allclose(games.expected_values(game, policy), values[0], atol=1e-12)


def test_known_numbers(x64):
  kuhn = compiled_games.compile_game(compiled_games.KUHN)
  uniform = policy_arrays.uniform(kuhn)
  np.testing.assert_allclose(games.nash_conv(kuhn, uniform), 11 / 12, atol=1e-12)
  np.testing.assert_allclose(games.exploitability(kuhn, uniform), 11 / 24, atol=1e-12)
  np.testing.assert_allclose(games.expected_values(kuhn, uniform), [0.125, -0.125], atol=1e-12)
  assert kuhn.legal.shape == (12, 2) and len(kuhn.parents) == 58
  leduc = compiled_games.compile_game(compiled_games.LEDUC)
  uniform = policy_arrays.uniform(leduc)
  assert leduc.legal.shape == (936, 3) and len(leduc.parents) == 9457
  np.testing.assert_allclose(games.nash_conv(leduc, uniform), 4.747222, atol=1e-6)  # six digits
  np.testing.assert_allclose(games.expected_values(leduc, uniform)[0], -0.078125, atol=1e-12)


def test_nash_conv_is_zero_at_an_equilibrium_and_positive_beside_it(x64):
  game = compiled_games.compile_game(compiled_games.KUHN)
  value, policy = sequence_form.solve_zero_sum(game)
  np.testing.assert_allclose(value, -1 / 18, atol=1e-9)  # the solver's tolerance
  np.testing.assert_allclose(games.nash_conv(game, policy), 0, atol=1e-8)
  mixed = 0.99 * policy + 0.01 * policy_arrays.uniform(game)
  assert games.nash_conv(game, mixed) > 1e-4


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    (compiled_games.UNIVERSAL, None),
    (compiled_games.DARK_HEX, 1.0),
    pytest.param(compiled_games.LEDUC, -0.0856064, marks=pytest.mark.slow),
  ],
)
def test_linear_program_finds_equilibria(x64, name, expected):
  game = compiled_games.compile_game(name)
  value, policy = sequence_form.solve_zero_sum(game)
  np.testing.assert_allclose(games.nash_conv(game, policy), 0, atol=1e-7)
  np.testing.assert_allclose(games.expected_values(game, policy)[0], value, atol=1e-7)
  if expected is not None:
    np.testing.assert_allclose(value, expected, atol=1e-6)  # seven digits


def test_one_player_without_chance_is_told_by_its_moves(tmp_path):
  """Deep sea has no information states of its own; one way of 2^3 brings 1, less its cost."""
  game = games.compile_game("deep_sea(size=3)", max_nodes=100, cache=tmp_path)
  assert len(game.parents) == 15 and len(game.legal) == len(set(game.state_strings)) == 7
  best = games.best_response_values(game, policy_arrays.uniform(game))[0]
  np.testing.assert_allclose(best, 0.99, atol=1e-6)
  root = openspiel.load_game("deep_sea(size=3)").new_initial_state()
  np.testing.assert_allclose(
    games.expected_values(game, policy_arrays.uniform(game))[0], _mean_return(root), atol=1e-6
  )
  with pytest.raises(ValueError, match="no information state strings"):
    openspiel.load_game("catch")  # chance places the ball


def _mean_return(state):
  if state.is_terminal():
    return state.returns()[0]
  return np.mean([_mean_return(state.child(action)) for action in state.legal_actions()])


def test_linear_program_refuses_general_sums():
  with pytest.raises(ValueError, match="sum to zero"):
    sequence_form.solve_zero_sum(compiled_games.compile_game(compiled_games.HANABI))


UNSEEN = """EFG 2 R "unseen" { "one" "two" } ""
c "" 1 "" { "a" 1/4 "b" 3/4 } 0
p "" 2 1 "" { "l" "r" } 0
p "" 1 1 "" { "x" "y" } 0
t "" 1 "" { 4 0 }
p "" 1 2 "" { "u" "v" } 0
t "" 2 "" { 0 1 }
t "" 3 "" { 2 3 }
p "" 1 1 "" { "x" "y" } 0
t "" 4 "" { 8 -4 }
p "" 1 2 "" { "u" "v" } 0
t "" 5 "" { 6 0 }
t "" 6 "" { -2 5 }
p "" 1 1 "" { "x" "y" } 0
t "" 7 "" { -1 0 }
p "" 1 2 "" { "u" "v" } 0
t "" 8 "" { 1 2 }
t "" 9 "" { 0 4 }
"""


def test_one_information_state_at_different_depths(x64):
  # Player one never sees whether player two moved, so its states lie at depths 1 and 2, and 2
  # and 3: a best response ordered by depth of the tree decides twice at one state.
  game = games.compile_game(pyspiel.load_efg_game(UNSEEN), dtype=jnp.float64)
  depth = np.concatenate([np.full(b - a, k) for k, (a, b) in enumerate(game.layout.levels)])
  states = np.asarray(game.info_states)
  spans = [np.ptp(depth[states == state]) for state in range(len(game.state_strings))]
  assert sorted(spans) == [0, 1, 1] and game.layout.state_levels == (((0, 1), (1, 2)), ((2, 3),))
  policy = np.zeros(game.legal.shape)
  policy[np.asarray(game.legal)] = [0.5, 0.5, 0.2, 0.8, 0.75, 0.25]  # x, y; u, v; l, r
  # Worked by hand, two plays l with 3/4. x: (3/4 4 + 1/4 8)/4 - 3/4 = 1/2; y then
  # u: (3/4 0 + 1/4 6)/4 + 3/4 = 9/8, v: (3/4 2 - 1/4 2)/4 = 1/4. So one plays y, u.
  # Two: l: 1/2 0 + 1/2 (0.2 1 + 0.8 3) = 1.3; r: 1/2 -4 + 1/2 (0.2 0 + 0.8 5) = 0, so l, and
  # where it does not move 1/2 (0.2 2 + 0.8 4) = 1.8: in all 1.3/4 + 3 1.8/4.
  np.testing.assert_allclose(games.best_response_values(game, policy), [9 / 8, 1.675], atol=1e-12)
  own = 0.5 * 0.5 + 0.5 * (0.2 * 9 / 8 + 0.8 / 4)
  theirs = 0.75 * 1.3 / 4 + 3 * 1.8 / 4
  np.testing.assert_allclose(games.expected_values(game, policy), [own, theirs], atol=1e-12)


def test_float32_is_close():
  game = compiled_games.compile_game(compiled_games.LEDUC)
  assert game.utilities.dtype == jnp.float32
  # Sums over 5,520 terminal histories of utilities up to 13 in float32.
  np.testing.assert_allclose(
    games.nash_conv(game, policy_arrays.uniform(game)), 4.747222, atol=1e-4
  )


def test_maps_over_policies_and_payoffs_and_compiles_once(x64):
  game = compiled_games.compile_game(compiled_games.KUHN)
  policies = np.stack([compiled_games.random_policy(game, seed) for seed in range(3)])
  mapped = jax.vmap(lambda policy: games.nash_conv(game, policy))(jnp.asarray(policies))
  single = [games.nash_conv(game, policy) for policy in policies]
  np.testing.assert_allclose(mapped, single, atol=1e-12)

  scales = jnp.array([1.0, -2.0, 0.5])
  utilities = scales[:, None, None] * game.utilities

  @jax.jit
  def measure(utilities, policy):
    return games.nash_conv(dataclasses.replace(game, utilities=utilities), policy)

  mapped = jax.vmap(measure, in_axes=(0, None))(utilities, jnp.asarray(policies[0]))
  single = [
    games.nash_conv(dataclasses.replace(game, utilities=payoff), policies[0])
    for payoff in utilities
  ]
  np.testing.assert_allclose(mapped, single, atol=1e-12)
  np.testing.assert_allclose(mapped[0] / mapped[2], 2, atol=1e-9)

  axes = dataclasses.replace(jax.tree.map(lambda _: None, game), utilities=0)
  batched = dataclasses.replace(game, utilities=utilities)
  mapped = jax.vmap(games.nash_conv, in_axes=(axes, None))(batched, jnp.asarray(policies[0]))
  np.testing.assert_allclose(mapped, single, atol=1e-12)

  again = games.compile_game(
    compiled_games.KUHN, dtype=jnp.float64, cache=compiled_games.CACHE
  )  # equal, not the same
  before = games._nash_conv._cache_size()
  games.nash_conv(again, policies[1])
  assert games._nash_conv._cache_size() == before


def test_values_are_differentiable(x64):
  game = compiled_games.compile_game(compiled_games.KUHN)
  policy = jnp.asarray(compiled_games.random_policy(game, 3))
  direction = jnp.asarray(compiled_games.random_policy(game, 4)) - policy

  def value(size):
    return games.expected_values(game, policy + size * direction)[0]

  numeric = (value(1e-5) - value(-1e-5)) / 2e-5
  np.testing.assert_allclose(jax.grad(value)(0.0), numeric, rtol=1e-6)  # error of differences


@pytest.mark.parametrize("name", [compiled_games.KUHN3, compiled_games.GOOFSPIEL])
def test_policies_go_to_openspiel_and_back(x64, name):
  game = compiled_games.compile_game(name)
  policy = compiled_games.random_policy(game, 5)
  rows = policy_arrays.to_dict(game, policy)
  assert len(rows) == len(game.state_strings)  # of every player
  np.testing.assert_array_equal(policy_arrays.from_dict(game, rows), policy)
  exported = policy_arrays.to_openspiel(game, policy)
  np.testing.assert_array_equal(policy_arrays.from_openspiel(game, exported), policy)
  assert exported.policy_table().keys() == rows.keys()


def test_python_policies_are_read(x64):
  open_spiel_policy = pytest.importorskip("open_spiel.python.policy")
  game = compiled_games.compile_game(compiled_games.KUHN)
  theirs = open_spiel_policy.TabularPolicy(pyspiel.load_game(compiled_games.KUHN))
  np.testing.assert_array_equal(
    policy_arrays.from_openspiel(game, theirs), policy_arrays.uniform(game)
  )


def test_information_states_are_numbered_by_player_and_own_moves():
  game = compiled_games.compile_game(compiled_games.LEDUC)
  assert np.all(np.diff(np.asarray(game.state_players)) >= 0)
  for player in range(2):
    levels = game.layout.state_levels[player]
    assert all(a[1] == b[0] for a, b in itertools.pairwise(levels))
    rows = game.layout.player_slice(player)
    assert set(np.asarray(game.state_players)[rows]) == {player}
  # Breadth first: children of one history are adjacent, and listed under their actions.
  parents, first = np.asarray(game.parents), np.asarray(game.first_children)
  counts, children = np.asarray(game.num_children), np.asarray(game.children)
  for node in (0, 5, 100, 2000):
    kids = np.flatnonzero(parents == node)
    np.testing.assert_array_equal(kids, first[node] + np.arange(counts[node]))
    if game.players[node] >= 0:
      np.testing.assert_array_equal(children[node][children[node] >= 0], kids)


# --- bad input ---


@pytest.mark.parametrize("name", [compiled_games.GOOFSPIEL, compiled_games.KUHN, "matrix_rps"])
def test_all_observations_tell_histories_apart_but_a_players_own_do_not(name):
  """A critic must know a bid that is still hidden; the player who bids next must not."""
  game = games.compile_game(name)
  seen = np.asarray(games.information_state_tensors(game))
  players, states = np.asarray(game.players), np.asarray(game.info_states)
  deciding = np.flatnonzero(players >= 0)
  rows = np.column_stack([players[deciding], seen[deciding].reshape(len(deciding), -1)])
  assert len(np.unique(rows, axis=0)) == len(rows)
  own = np.column_stack([players[deciding], seen[deciding, players[deciding]]])
  for s in range(len(game.legal)):
    assert len(np.unique(own[states[deciding] == s], axis=0)) == 1
  assert len(np.unique(own, axis=0)) == len(game.legal)


def test_bad_games_are_refused(x64, tmp_path):
  with pytest.raises(ValueError, match=r"got 'khun_poker'.*kuhn_poker"):
    games.compile_game("khun_poker")
  with pytest.raises(ValueError, match="OpenSpiel cannot load the game"):
    games.compile_game("kuhn_poker(wheels=3)")
  with pytest.raises(ValueError, match=r"at least .* more than max_nodes=100"):
    games.compile_game("leduc_poker", max_nodes=100, cache=tmp_path)
  with pytest.raises(ValueError, match=r"max_nodes must be an integer >= 1, got 0"):
    games.compile_game("kuhn_poker", max_nodes=0)
  with pytest.raises(ValueError, match="must be a string or a game of OpenSpiel, got int"):
    games.compile_game(3)
  with pytest.raises(ValueError, match="dtype must be a floating-point type"):
    games.compile_game("kuhn_poker", dtype=jnp.int32)


def test_float64_needs_x64():
  with pytest.raises(ValueError, match="jax_enable_x64"):
    games.compile_game("kuhn_poker", dtype="float64")


def test_imperfect_recall_is_refused(tmp_path):
  with pytest.raises(ValueError, match="imperfect recall"):
    games.compile_game("dark_hex_ir(board_size=2)", cache=tmp_path)


def test_bad_policies_are_refused():
  game = compiled_games.compile_game(compiled_games.UNIVERSAL)
  policy = np.array(policy_arrays.uniform(game))
  with pytest.raises(ValueError, match=r"shape \[S, A\] = \[160, 3\]"):
    games.nash_conv(game, policy[:-1])
  with pytest.raises(ValueError, match="must have shape"):  # also on a device
    games.nash_conv(game, jnp.asarray(policy[:, :2]))
  with pytest.raises(ValueError, match=r"sum to 1 in every row, got .* at row 3"):
    games.expected_values(game, np.where(np.arange(160)[:, None] == 3, policy / 2, policy))
  illegal = policy.copy()
  row = int(np.flatnonzero(~np.asarray(game.legal).all(1))[0])
  illegal[row] = 1 / 3
  with pytest.raises(ValueError, match="must be 0 for illegal actions"):
    games.best_response_values(game, illegal)
  for wrong in (np.nan, -0.5, np.inf):
    bad = policy.copy()
    bad[7, 0] = wrong
    with pytest.raises(ValueError, match=r"must hold probabilities, got .* at row 7"):
      games.nash_conv(game, bad)
  with pytest.raises(ValueError, match="must hold probabilities"):  # asked for, so looked at
    policy_arrays.check(game, jnp.asarray(bad))


def test_bad_dictionaries_are_refused():
  game = compiled_games.compile_game(compiled_games.KUHN)
  rows = policy_arrays.to_dict(game, policy_arrays.uniform(game))
  with pytest.raises(ValueError, match="1 unknown, such as 'king'"):
    policy_arrays.from_dict(game, rows | {"king": {0: 1.0}})
  del rows["0pb"]
  with pytest.raises(ValueError, match="1 missing, such as '0pb'"):
    policy_arrays.from_dict(game, rows)
  with pytest.raises(ValueError, match=r"action must lie in \[0, 2\) .* got 2 at '0pb'"):
    policy_arrays.from_dict(game, rows | {"0pb": {2: 1.0}})


def test_without_openspiel_the_remedy_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "pyspiel", None)
  with pytest.raises(ImportError, match=r"open-spiel"):
    games.compile_game("kuhn_poker")


# --- the cache ---


def test_trees_are_kept_and_broken_files_made_again(tmp_path, monkeypatch):
  read = openspiel.read_tree(compiled_games.KUHN3, max_nodes=1000, cache=tmp_path)
  (path,) = (tmp_path / "games").iterdir()  # whole, and nothing beside it
  walk = openspiel._walk

  def fail(*args):
    raise AssertionError("walked the tree again")

  monkeypatch.setattr(openspiel, "_walk", fail)
  again = openspiel.read_tree(compiled_games.KUHN3, max_nodes=1000, cache=tmp_path)
  for ours, theirs in zip(read, again, strict=True):
    np.testing.assert_array_equal(ours, theirs)
  with pytest.raises(ValueError, match="617 nodes, more than max_nodes=616"):
    openspiel.read_tree(compiled_games.KUHN3, max_nodes=616, cache=tmp_path)

  monkeypatch.setattr(openspiel, "_walk", walk)
  whole = path.read_bytes()
  flipped = bytearray(whole)
  flipped[len(whole) // 2] ^= 0xFF
  for broken in (b"", whole[: len(whole) // 2], bytes(flipped), b"not a file of arrays"):
    path.write_bytes(broken)
    again = openspiel.read_tree(compiled_games.KUHN3, max_nodes=1000, cache=tmp_path)
    np.testing.assert_array_equal(again.parents, read.parents)
    assert openspiel._load(path, read.name) is not None  # repaired


def test_an_unusable_cache_is_a_warning(tmp_path):
  blocked = tmp_path / "file"
  blocked.write_text("")
  with pytest.warns(UserWarning, match="could not be cached"):
    openspiel.read_tree(compiled_games.KUHN, max_nodes=100, cache=blocked)


def test_games_whose_rules_can_change_are_not_kept(tmp_path):
  openspiel.read_tree(pyspiel.load_game("kuhn_poker"), max_nodes=100, cache=tmp_path)
  assert not list(tmp_path.iterdir())
