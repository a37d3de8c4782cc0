"""Masked worlds: what is hidden, what is left, and the agents that play them."""

import functools
import json

import compiled_games  # noqa: F401  skips without OpenSpiel
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from experiments import main
from experiments.configs import latent_prediction as configs
from experiments.tasks import masked_worlds, memory_agents
from representation import latent_prediction
from rl_theory import decision_processes, openspiel_mdp


def _environment(preset):
  return configs.get_config(preset).environment


def test_catch_hides_the_ball_in_the_named_rows_and_nothing_else():
  world = masked_worlds.make(_environment("screen"))
  whole = np.asarray(openspiel_mdp.compile_process("catch(rows=10,columns=7)").observations)
  whole, seen = (
    np.asarray(x).reshape(-1, 10, 7) for x in (whole, world.process.observations)
  )  # fmt: skip
  np.testing.assert_array_equal(seen[:, [0, 1, 8, 9]], whole[:, [0, 1, 8, 9]])
  np.testing.assert_array_equal(seen[:, 2:8], 0)
  hidden = np.flatnonzero(world.probed)
  assert len(hidden) > 100
  for state in hidden:
    row, column = (world.labels[f"{name} of the hidden ball"][state] for name in ("row", "column"))
    assert whole[state, row, column] == 1 and 2 <= row <= 7
  # Hiding changes nothing of the game: who sees everything always catches.
  best = decision_processes.optimum(world.process, 1.0).values
  np.testing.assert_allclose(world.process.initial @ best, 1, atol=1e-6)


def test_rooms_start_anywhere_and_show_the_cells_around():
  world = masked_worlds.make(_environment("rooms"))
  lines = masked_worlds.ROOMS.split("\n")
  started = np.flatnonzero(np.asarray(world.process.initial))
  cells = world.labels["cell"][started]
  free = [7 * i + j for i in range(7) for j in range(7) if lines[i][j] in ".a"]
  assert sorted(cells) == free and len(set(np.asarray(world.process.initial)[started])) == 1
  for state, cell in zip(started, cells, strict=True):
    walls, goal = np.asarray(world.process.observations)[state].reshape(2, 3, 3)
    for i, j in np.ndindex(3, 3):
      row, column = cell // 7 + i - 1, cell % 7 + j - 1
      inside = 0 <= row < 7 and 0 <= column < 7
      mark = lines[row][column] if inside else "*"
      assert (walls[i, j], goal[i, j]) == (mark == "*", mark == "A")
  # No episode outlasts the world: a random walk has ended after `length` steps.
  process = world.process

  def walk(states, key):
    actions = jax.random.categorical(key, jnp.where(process.legal, 0, -jnp.inf)[states])
    return decision_processes.step(process, states, actions, key)[1], None

  keys = jax.random.split(jax.random.key(0), world.length)
  states, _ = jax.lax.scan(walk, jnp.asarray(started), keys)
  assert np.all(np.asarray(process.terminal)[states])


def test_bad_environments_name_the_field():
  environment = _environment("catch")
  for name, value, message in (
    ("world", "maze", "config.environment.world must be one of 'catch', 'rooms', got 'maze'"),
    ("hidden_rows", (0, 8), "hidden_rows must be two of the rows 1 to 8"),
    ("hidden_rows", (2, 9), "hidden_rows must be two of the rows 1 to 8"),
  ):
    broken = ml_collections.ConfigDict(environment.to_dict() | {name: value})
    with pytest.raises(ValueError, match=message):
      masked_worlds.make(broken)


@functools.cache
def _agent():
  config = configs.get_config("tiny")
  world = masked_worlds.make(config.environment)
  apply_fn, optimizer = memory_agents.networks(config, world), optax.sgd(0.1)
  learner = memory_agents.init(jax.random.key(0), apply_fn, world, optimizer)
  # The policy's head starts at 0: move it, so that policies depend on what was read.
  rng = np.random.default_rng(0)
  heads = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), learner.params.heads
  )
  return world, apply_fn, optimizer, learner._replace(params=learner.params._replace(heads=heads))


def _config(forward=0.0, backward=0.0):
  latent = latent_prediction.Config(forward, backward, horizon=2)
  return memory_agents.Config(
    latent, discount=0.9, trace_decay=0.8, value_weight=0.5, entropy_weight=0.0
  )


def _play(params, key=0, num_episodes=64):
  world, apply_fn, *_ = _agent()
  return memory_agents.play(
    params, jax.random.key(key), apply_fn=apply_fn, world=world, num_episodes=num_episodes
  )


@pytest.mark.slow
def test_episodes_follow_the_process_and_the_policy():
  world, apply_fn, _, learner = _agent()
  episodes = _play(learner.params, num_episodes=2000)
  process = jax.tree.map(np.asarray, world.process)
  states, actions = np.asarray(episodes.states), np.asarray(episodes.actions)
  np.testing.assert_array_equal(  # catch is deterministic
    process.next_states[states[:, :-1], actions[:, :-1], 0], states[:, 1:]
  )
  np.testing.assert_array_equal(process.rewards[states, actions, 0], episodes.rewards)
  np.testing.assert_array_equal(process.observations[states], episodes.observations)
  assert np.all(episodes.mask)
  # Actions are drawn from the policy that reading the same episodes again gives: the sum of
  # (taken - probability) over 10,000 draws has a deviation of at most 50.
  encoded = apply_fn.latent.agent(
    learner.params.latent.agent, episodes.observations, episodes.actions
  )
  probs = jax.nn.softmax(apply_fn.heads(learner.params.heads, encoded.states)[0])
  excess = np.sum(np.eye(3)[actions] - np.asarray(probs), axis=(0, 1))
  assert np.all(np.abs(excess) < 250)
  assert np.ptp(np.asarray(probs), axis=(0, 1)).max() > 0.01  # and the policy does depend on them


def test_the_loss_is_that_of_an_actor_critic_with_lambda_returns():
  world, apply_fn, _, learner = _agent()
  episodes, params, config = _play(learner.params), learner.params, _config()
  value, _ = jax.jit(functools.partial(memory_agents.loss, apply_fn=apply_fn, config=config))(
    params, learner, episodes, None
  )
  encoded = apply_fn.latent.agent(params.latent.agent, episodes.observations, episodes.actions)
  logits, values = map(np.asarray, apply_fn.heads(params.heads, encoded.states))
  logps = np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
  taken = np.take_along_axis(logps, np.asarray(episodes.actions)[..., None], -1)[..., 0]
  rewards, targets = np.asarray(episodes.rewards), np.zeros_like(values)
  following = np.zeros((len(values), 2))  # lambda-return and value of the next step
  for t in reversed(range(world.length)):
    targets[:, t] = rewards[:, t] + 0.9 * (0.2 * following[:, 1] + 0.8 * following[:, 0])
    following = np.stack([targets[:, t], values[:, t]], 1)
  advantages = targets - values
  expected = -np.mean(advantages * taken) + 0.5 * np.mean(advantages**2)
  np.testing.assert_allclose(value, expected, rtol=1e-4)  # float32


@pytest.mark.slow  # three updates compile
def test_an_agent_without_the_losses_does_not_know_of_them():
  """Heads that are not used do not move, and each loss adds its own gradient."""
  _, apply_fn, optimizer, learner = _agent()
  world = _agent()[0]

  def step(forward, backward):
    return memory_agents.update(
      learner, jax.random.key(1), apply_fn=apply_fn, world=world, optimizer=optimizer,
      config=_config(forward, backward), num_episodes=16,
    )  # fmt: skip

  def change(stepped):
    return jax.tree.map(lambda new, old: np.asarray(new - old), stepped.params, learner.params)

  runs = jax.jit(lambda: [step(*weights)[0] for weights in ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0))])()
  none, forward, both = map(change, runs)
  for part in (none.latent.dynamics, none.latent.forward, none.latent.backward):
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(part))
  assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(none.latent.agent))
  assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(forward.latent.backward))
  assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(forward.latent.dynamics))
  assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(both.latent.backward))


@pytest.mark.slow  # the whole program of a run compiles: half a minute
def test_a_tiny_run_reports_returns_probes_and_collapse(tmp_path):
  folder = tmp_path / "run"
  assert main.run(["--config=latent_prediction:tiny", f"--workdir={folder}"]) == 0
  result = json.loads((folder / "results.json").read_text())["result"]
  assert {"return/none", "return/forward", "return/bidirectional"} <= set(result["metrics"])
  titles = [table["title"] for table in result["tables"]]
  assert titles[1:] == [
    "Return", "What a linear probe reads from the agent's state",
    "The agent's states on these episodes",
  ]  # fmt: skip
  assert [row[1] for row in result["tables"][0]["rows"]] == ["pass", "pass"]
  assert (folder / "figures" / "latent_prediction.png").exists()


@pytest.mark.parametrize(
  "setting",
  ["algorithm.discount=1.5", "algorithm.trace_decay=2.0", "algorithm.entropy_weight=-1.0",
   "algorithm.weight=-1.0", "optimizer.learning_rate=-1.0"],
)  # fmt: skip
def test_bad_settings_are_named(tmp_path, capsys, setting):
  command = ["--config=latent_prediction:tiny", f"--workdir={tmp_path / 'run'}"]
  assert main.run([*command, f"--config.{setting}"]) == 2
  assert f"{setting.split('=')[0].split('.')[1]} must" in capsys.readouterr().err
