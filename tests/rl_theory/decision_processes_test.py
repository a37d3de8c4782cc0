"""Decision processes: OpenSpiel's rules, known optimal values, exact returns against play."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_theory import decision_processes, openspiel, openspiel_mdp

pytest.importorskip("pyspiel", reason="OpenSpiel absent: pip install '.[games]' to test games")

CLIFF = "cliff_walking(height=3,width=4,horizon=9)"
GAMES = ["catch(rows=5,columns=3)", "deep_sea(size=4)", CLIFF, "pathfinding(horizon=6)"]


@functools.cache
def compiled(name):
  return openspiel_mdp.compile_process(name)


def random_policy(process, seed=0):
  weights = np.random.default_rng(seed).random(process.legal.shape) * np.asarray(process.legal)
  return jnp.asarray(weights / weights.sum(1, keepdims=True))


@pytest.mark.parametrize("name", GAMES)
def test_random_playouts_follow_openspiel(name):
  process, rng = compiled(name), np.random.default_rng(0)
  observations, legal = np.asarray(process.observations), np.asarray(process.legal)
  game = openspiel.load_game(name, needs_info_states=False)
  size = game.observation_tensor_size()

  def seen(state):
    return np.zeros(size) if state.is_terminal() else state.observation_tensor(0)

  for _ in range(30):
    state = openspiel.advance_chance(game.new_initial_state(), rng)
    (number,) = [
      s for s in np.flatnonzero(process.initial) if np.all(observations[s, :size] == seen(state))
    ]
    while not state.is_terminal():
      np.testing.assert_array_equal(np.flatnonzero(legal[number]), state.legal_actions())
      action, before = rng.choice(state.legal_actions()), state.returns()[0]
      state = openspiel.advance_chance(state.child(action), rng)
      following = np.asarray(process.next_states)[number, action]
      (outcome,) = [
        k
        for k in np.flatnonzero(process.probs[number, action])
        if np.all(observations[following[k], :size] == seen(state))
      ]
      # Rewards are float32 of numbers below 200.
      gained = state.returns()[0] - before
      np.testing.assert_allclose(process.rewards[number, action, outcome], gained, atol=1e-5)
      number = following[outcome]
      assert bool(process.terminal[number]) == state.is_terminal()


@pytest.mark.parametrize("name", GAMES)
def test_compiled_arrays_are_a_process(name):
  process = compiled(name)
  np.testing.assert_allclose(process.probs.sum(-1), 1, rtol=1e-6)
  np.testing.assert_allclose(process.initial.sum(), 1, rtol=1e-6)
  terminal = np.flatnonzero(process.terminal)
  assert terminal.tolist() == [process.num_states - 1]
  assert np.all(np.asarray(process.next_states)[terminal] == terminal)
  assert np.all(np.asarray(process.rewards)[terminal] == 0)
  observed = np.asarray(process.observations)[:-1]
  assert len(np.unique(observed, axis=0)) == len(observed)  # the agent sees the whole state


@pytest.mark.parametrize(
  ("name", "discount", "value"),
  [
    ("catch(rows=5,columns=3)", 1.0, 1.0),
    ("catch(rows=5,columns=3)", 0.5, 0.5**3),  # one reward, at the fourth and last move
    ("deep_sea(size=4)", 1.0, 1 - 0.01),  # a prize of 1 after four moves that cost 0.01 in all
    ("deep_sea(size=4)", 0.0, 0.0),  # to the left is free
    ("cliff_walking(height=3,width=4,horizon=9)", 1.0, -5.0),  # up, three to the right, down
    ("cliff_walking(height=3,width=4,horizon=4)", 1.0, -4.0),  # too short to arrive
  ],
)
def test_optimal_values_are_known(name, discount, value):
  process = compiled(name)
  found = decision_processes.optimum(process, discount)
  # Sums of ten float32 numbers.
  np.testing.assert_allclose(process.initial @ found.values, value, atol=1e-5)
  assert found.error <= 1e-6
  achieved = decision_processes.policy_values(process, found.policy, discount)
  np.testing.assert_allclose(achieved, found.values, atol=1e-5)


def test_hidden_time_becomes_part_of_the_state():
  process = compiled(CLIFF)
  clock = np.asarray(process.observations)[:-1, -1]
  np.testing.assert_allclose(np.unique(clock), np.arange(9) / 9, rtol=1e-6)
  assert compiled("catch(rows=5,columns=3)").observations.shape[1] == 15  # no clock: it sees time


def test_hidden_information_is_refused():
  with pytest.raises(ValueError, match="different things happen, other observations"):
    openspiel_mdp.compile_process("coop_to_1p(game=tiny_hanabi())")  # the partner's card


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("kuhn_poker", "must have one player"),
    ("morpion_solitaire", "no observation tensor"),
    ("cliff_walking", "more than max_states=50"),
    ("blackjack", "chance has more than max_states=50"),
    ("deep_see", "did you mean deep_sea"),
  ],
)
def test_other_games_are_refused(name, message):
  with pytest.raises(ValueError, match=message):
    openspiel_mdp.compile_process(name, max_states=50)


def test_the_process_of_a_policy_has_its_values_and_returns(x64):
  process = openspiel_mdp.compile_process("catch(rows=5,columns=3)", dtype=jnp.float64)
  process, policy = decision_processes.with_slips(process, 0.2), random_policy(process)
  transitions, rewards = decision_processes.under_policy(process, policy)
  np.testing.assert_allclose(transitions.sum(1), 1, atol=1e-12)
  values = decision_processes.policy_values(process, policy, 0.9)
  # No state comes back, so that the values solve their equation to the accuracy of float64.
  np.testing.assert_allclose(values, rewards + 0.9 * transitions @ values, atol=1e-12)
  exact = decision_processes.return_distribution(process, policy, 0.9)
  np.testing.assert_allclose(exact.values, [-(0.9**3), 0.9**3], atol=1e-9)  # rounded to 9 digits
  np.testing.assert_allclose(exact.probs.sum(), 1, atol=1e-12)
  np.testing.assert_allclose(exact.values @ exact.probs, process.initial @ values, atol=1e-8)


@pytest.mark.slow  # compiles play
def test_exact_returns_are_those_of_play():
  process = decision_processes.with_slips(compiled("deep_sea(size=4)"), 0.3)
  policy = decision_processes.optimum(process, 0.9).policy
  exact = decision_processes.return_distribution(process, policy, 0.9)
  num_episodes, actions = 4000, jnp.argmax(policy, axis=1)

  def move(carry, inputs):
    states, sums = carry
    key, weight = inputs
    rewards, states = decision_processes.step(process, states, actions[states], key)
    return (states, sums + weight * rewards), None

  keys = jax.random.split(jax.random.key(0), 5)
  states = decision_processes.first_states(process, keys[4], (num_episodes,))
  (states, sums), _ = jax.lax.scan(
    move, (states, jnp.zeros(num_episodes)), (keys[:4], 0.9 ** jnp.arange(4))
  )
  assert bool(jnp.all(process.terminal[states]))
  found = (np.abs(np.asarray(sums)[:, None] - exact.values) < 1e-5).mean(0)  # float32 play
  # Five standard errors of a frequency among 4,000 episodes.
  assert np.all(np.abs(found - exact.probs) < 5 * 0.5 / np.sqrt(num_episodes))
  assert found.sum() == pytest.approx(1)  # every return of play is one of the exact ones


def test_returns_worked_by_hand():
  process = decision_processes.with_slips(compiled("deep_sea(size=2)"), 1.0)  # a random walk
  exact = decision_processes.return_distribution(process, random_policy(process), 0.5)
  # Right costs 0.005, and right twice ends in the prize.
  np.testing.assert_allclose(exact.values, [-0.005, -0.0025, 0, 0.4925], atol=1e-7)
  np.testing.assert_allclose(exact.probs, 0.25, atol=1e-7)


def test_a_slip_plays_a_random_legal_action():
  process = compiled("pathfinding(horizon=6)")
  slippery = decision_processes.with_slips(process, 0.25)
  policy = random_policy(process)
  legal = np.asarray(process.legal)
  mixed = 0.75 * policy + 0.25 * legal / legal.sum(1, keepdims=True)
  for one, other in zip(
    decision_processes.under_policy(slippery, policy),
    decision_processes.under_policy(process, mixed),
    strict=True,
  ):
    np.testing.assert_allclose(one, other, atol=2e-5)  # float32 rewards of up to 200


def test_illegal_actions_are_never_best():
  process = compiled(CLIFF)
  tempting = dataclasses.replace(
    process,
    legal=process.legal.at[:-1, 0].set(False),
    rewards=process.rewards.at[:-1, 0].set(100.0),
  )
  found = decision_processes.optimum(tempting, 1.0)
  assert float(jnp.max(found.values)) <= 0
  assert np.all(np.asarray(found.policy)[:-1, 0] == 0)


def test_bad_arguments_name_themselves():
  process = compiled("deep_sea(size=2)")
  policy = random_policy(process)
  with pytest.raises(ValueError, match=r"discount must lie in \[0, 1\]"):
    decision_processes.optimum(process, 1.5)
  with pytest.raises(ValueError, match=r"policy must have shape \[S, A\]"):
    decision_processes.under_policy(process, policy[1:])
  hidden = dataclasses.replace(process, legal=process.legal.at[0, 1].set(False))
  with pytest.raises(ValueError, match="policy must be 0 at illegal actions, got"):
    decision_processes.policy_values(hidden, policy, 1.0)
  with pytest.raises(ValueError, match="policy must lie in"):
    decision_processes.return_distribution(process, policy.at[0].set(jnp.nan), 1.0)
  with pytest.raises(ValueError, match="probability must lie"):
    decision_processes.with_slips(process, 2)
  with pytest.raises(ValueError, match="num_steps must be at least the length"):
    decision_processes.return_distribution(process, policy, 1.0, num_steps=1)
  with pytest.raises(ValueError, match="max_atoms must be at least"):
    decision_processes.return_distribution(process, policy, 1.0, max_atoms=1)


_HAND_MADE = {
  "next_states": [[[0], [1]], [[1], [1]]], "probs": [[[1.0], [1.0]], [[1.0], [1.0]]],
  "rewards": [[[0.0], [1.0]], [[0.0], [0.0]]], "legal": [[True, True], [True, True]],
  "terminal": [False, True], "initial": [1.0, 0.0], "observations": [[1.0, 0.0], [0.0, 1.0]],
}  # fmt: skip


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"next_states": [[[0], [2]], [[1], [1]]]}, r"next_states must lie in \[0, 2\)"),
    ({"probs": [[[0.5], [1.0]], [[1.0], [1.0]]]}, "probs must sum to 1"),
    ({"rewards": [[[0.0], [np.nan]], [[0.0], [0.0]]]}, "rewards must be finite"),
    ({"rewards": [[0.0, 1.0], [0.0, 0.0]]}, r"rewards must have shape \[S, A, K\]"),
    ({"initial": [1.0, 1.0]}, "initial must sum to 1"),
    ({"terminal": [False]}, r"terminal must have shape \[S\]"),
    ({"observations": [[1.0]]}, r"observations must have shape \[S, D\]"),
    ({"legal": [[False, False], [True, True]]}, "at least one action in each state, got none in"),
  ],
)
def test_a_process_made_by_hand_is_checked(changes, message):
  good = decision_processes.DecisionProcess(**_HAND_MADE)
  assert good.num_states == good.num_actions == 2
  with pytest.raises(ValueError, match=message):
    decision_processes.DecisionProcess(**_HAND_MADE | changes)
