"""Runs on games: they measure the exact NashConv, resume, export, and are compared."""

import importlib
import json

import compiled_games  # noqa: F401  skips without OpenSpiel
import jax
import numpy as np
import pytest

from experiments import main
from experiments.loop import presets
from experiments.papers import cfr as cfr_wiring
from experiments.tasks import game_runs
from rl_theory import cfr, games, policy_arrays, policy_files


def run(config, folder, *arguments):
  return main.run([f"--config={config}", f"--workdir={folder}", *arguments])


def _records(folder):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [record for record in map(json.loads, lines) if record["kind"] == "train"]


def test_a_run_of_cfr_is_cfr_and_exports_its_policy(tmp_path, capsys):
  folder = tmp_path / "run"
  assert run("cfr:tiny", folder) == 0
  game = games.compile_game("kuhn_poker")
  expected = cfr.solve(game, num_iterations=20).average_policy
  for ending in ("json", "csv"):
    found = policy_files.read_policy(folder / "model" / f"policy.{ending}", game)
    np.testing.assert_allclose(found, expected, atol=1e-6)
  records = _records(folder)
  assert [record["env_steps"] for record in records] == [48 * k for k in range(1, 21)]
  np.testing.assert_allclose(records[-1]["nash_conv"], games.nash_conv(game, expected), atol=1e-6)
  assert (folder / "figures" / "nash_conv.png").exists()
  assert (folder / "figures" / "policy.png").exists()
  capsys.readouterr()
  assert run("cfr:tiny", folder) == 0  # finished: only its report is made again
  assert main.run(["--mode=eval", f"--workdir={folder}"]) == 0
  assert main.run(["--mode=sample", f"--workdir={folder}"]) == 0
  assert "0pb" in capsys.readouterr().out


_PENNIES = """EFG 2 R "pennies" { "A" "B" }
  p "" 1 1 "first" { "heads" "tails" } 0
    p "" 2 1 "second" { "heads" "tails" } 0
      t "" 1 "" { 3 -3 }
      t "" 2 "" { -1 1 }
    p "" 2 1 "second" { "heads" "tails" } 0
      t "" 2
      t "" 3 "" { 1 -1 }
"""


@pytest.mark.parametrize(
  "paper",
  [
    "cfr",
    *(
      pytest.param(name, marks=pytest.mark.slow) for name in ("armac", "armac_sums", "nfsp", "ppo")
    ),
  ],
)
def test_a_game_of_your_own_is_played_from_its_file(paper, tmp_path, capsys):
  path, folder = tmp_path / "pennies.efg", tmp_path / "run"
  path.write_text(_PENNIES)
  assert run(f"{paper}:tiny", folder, f"--config.environment.game={path}") == 0
  game = games.compile_game(path)
  policy = policy_files.read_policy(folder / "model" / "policy.json", game)
  assert games.nash_conv(game, policy) < 4  # what a best response gains from a pure policy
  assert "heads" in (folder / "model" / "policy.csv").read_text()
  capsys.readouterr()
  report = (folder / "report.html").read_text()
  assert "not a two-player zero-sum game" not in report
  path.write_text(_PENNIES.replace("3 -3", "3 3"))
  assert run(f"{paper}:tiny", tmp_path / "general", f"--config.environment.game={path}") == 0
  assert "not a two-player zero-sum game" in (tmp_path / "general" / "report.html").read_text()
  path.write_text(_PENNIES.replace("3 -3", "3"))
  assert run(f"{paper}:tiny", tmp_path / "wrong", f"--config.environment.game={path}") == 2
  assert f"{path}, line 4: outcome 1 must have 2 utilities" in capsys.readouterr().err
  assert run(f"{paper}:tiny", tmp_path / "absent", "--config.environment.game=no.efg") == 2
  assert "no.efg" in capsys.readouterr().err


@pytest.mark.parametrize("paper", ["armac", "armac_sums"])
def test_a_game_without_others_is_refused(paper, tmp_path, capsys):
  path = tmp_path / "choice.efg"
  path.write_text(
    'EFG 2 R "a choice" { "one" }\n'
    'p "" 1 1 "only" { "a" "b" } 0\nt "" 1 "" { 1 }\nt "" 2 "" { 3 }\n'
  )
  assert run(f"{paper}:tiny", tmp_path / "run", f"--config.environment.game={path}") == 2
  error = capsys.readouterr().err
  assert "a choice has one player; use cfr:" in error and error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("paper", ["armac", "armac_sums", "nfsp", "ppo"])
def test_tiny_runs_learn_and_measure(paper, tmp_path):
  folder = tmp_path / "run"
  assert run(f"{paper}:tiny", folder) == 0
  records = _records(folder)
  game = games.compile_game("kuhn_poker")
  policy = policy_files.read_policy(folder / "model" / "policy.json", game)
  policy_arrays.check(game, np.asarray(policy))
  last = records[-1]
  assert last["nash_conv/low"] <= last["nash_conv"] <= last["nash_conv/high"]
  assert (
    last["nash_conv/low"] - 1e-4 < games.nash_conv(game, policy) < last["nash_conv/high"] + 1e-4
  )
  if paper.startswith("armac"):  # NFSP needs more than a tiny run
    assert last["nash_conv"] < 0.6 < 0.9 < records[0]["nash_conv"]
  if paper == "armac_sums":
    assert (folder / "figures" / "what_limits.png").exists()
    # Advantages of zero have 0.7.
    assert last["armac/advantage_error"] < 0.45 < records[0]["armac/advantage_error"]


@pytest.mark.slow
def test_a_single_agent_keeps_what_it_has_found(tmp_path, capsys):
  """Compares the replayed past with the newest policy alone, on the same seas and seeds."""
  folder = tmp_path / "run"
  assert run("exploration:tiny", folder) == 0
  results = json.loads((folder / "results.json").read_text())["result"]["metrics"]
  assert results["criteria_passed"]["value"] == 1
  records = _records(folder)
  for size in (2, 3):
    whole, newest = (
      np.mean([record[f"return/{size}/recency {recency}"] for record in records])
      for recency in ("0", "1e+06")
    )
    np.testing.assert_allclose(whole - newest, results[f"gain/{size}"]["value"], atol=1e-4)
  assert (folder / "figures" / "exploration.png").exists()
  capsys.readouterr()
  other = tmp_path / "other"
  assert run("exploration:tiny", other, "--config.environment.sizes=(2,0)") == 2
  assert run("exploration:tiny", other, "--config.algorithm.recency=(1.0,)") == 2
  errors = capsys.readouterr().err
  assert "sizes must be an integer >= 1" in errors and "must be two numbers" in errors


@pytest.mark.slow
def test_an_lstm_reads_the_way_to_a_history(tmp_path):
  arguments = ["--config.network.encoder=lstm", "--config.train.num_steps=2"]
  assert run("armac:tiny", tmp_path / "run", *arguments) == 0
  game = games.compile_game("kuhn_poker")
  observations = games.information_state_tensors(game)
  ways = games.observation_histories(game, observations)
  assert ways.shape == (58, 2, 3, 11)  # at most three decisions
  np.testing.assert_array_equal(ways[:, :, -1][game.players >= 0], observations[game.players >= 0])
  third = int(np.flatnonzero(np.asarray(game.info_states) == len(game.legal) - 1)[0])
  parent = int(game.parents[third])
  np.testing.assert_array_equal(ways[third, :, 1], observations[parent])


@pytest.mark.slow
@pytest.mark.parametrize("paper", ["armac", "armac_sums", "nfsp"])
def test_paper_presets_trace(paper):
  config = presets.resolve(f"{paper}:paper")
  experiment = importlib.import_module(f"experiments.papers.{paper}").build(config)
  runs = jax.eval_shape(experiment.init, jax.random.key(0))
  new_runs, metrics = jax.eval_shape(experiment.update, runs, (), jax.random.key(0))
  assert jax.tree.structure(new_runs) == jax.tree.structure(runs)
  assert metrics["nash_conv"].shape == ()


@pytest.mark.slow
def test_solvers_stand_beside_each_other_and_are_not_run_twice(tmp_path, monkeypatch):
  monkeypatch.setattr(presets, "resolve", _short(presets.resolve))
  folder = tmp_path / "run"
  arguments = ["--config.methods=('mccfr','cfr')"]
  assert run("solvers:kuhn", folder, *arguments) == 0
  results = json.loads((folder / "cfr" / "results.json").read_text())
  report = (folder / "report.html").read_text()
  assert "NashConv after as many decisions as the shortest run has" in report
  assert run("solvers:kuhn", folder, *arguments) == 0
  assert json.loads((folder / "cfr" / "results.json").read_text()) == results
  (tmp_path / "pennies.efg").write_text(_PENNIES)
  folder = tmp_path / "own"
  assert run("solvers:kuhn", folder, f"--config.game={tmp_path}/pennies.efg", *arguments) == 0
  assert "information state of pennies" in (folder / "cfr" / "report.html").read_text()


def _short(resolve):
  def resolve_short(text):
    config = resolve(text)
    config.train.num_steps = min(config.train.num_steps, 5)
    return config

  return resolve_short


@pytest.mark.parametrize(
  ("config", "argument", "message"),
  [
    ("armac:kuhn", "--config.environment.game=khun_poker", "did you mean kuhn_poker"),
    ("armac:kuhn", "--config.environment.num_seeds=0", "num_seeds must be an integer >= 1, got 0"),
    ("armac:kuhn", "--config.network.encoder=gru", "encoder must be one of 'mlp', 'lstm'"),
    ("armac:kuhn", "--config.algorithm.num_groups=7", "num_groups must divide"),
    ("cfr:kuhn", "--config.algorithm.variant=crf", "variant must be one of 'cfr', 'cfr+'"),
    ("solvers:kuhn", "--config.methods=('dqn',)", "is not one of armac"),
  ],
)
def test_bad_settings_are_named(config, argument, message, tmp_path, capsys):
  assert run(config, tmp_path / "run", argument) == 2
  assert message in capsys.readouterr().err


def test_seeds_differ_and_one_seed_is_reproducible():
  config = presets.override(presets.resolve("cfr:kuhn_sampled"), [("train.inner_steps", "5")])
  game = games.compile_game("kuhn_poker")
  experiment = game_runs.build(config, game, cfr_wiring.solver(config, game))
  keys = [jax.random.key(k) for k in (0, 0, 1)]
  runs = [experiment.update(experiment.init(key), None, key)[0] for key in keys]
  sums = [np.asarray(r.learners.inner.policy_sums) for r in runs]
  np.testing.assert_array_equal(sums[0], sums[1])
  assert not np.array_equal(sums[0], sums[2]) and not np.array_equal(sums[0][0], sums[0][1])
