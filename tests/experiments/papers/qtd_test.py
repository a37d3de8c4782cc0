"""Tests of the figures of quantile TD: geometry, back-ups, and categorical TD beside TD."""

import json

import jax
import numpy as np
import pytest

from experiments import main
from experiments.loop import presets
from experiments.papers import qtd, qtd_artefact, qtd_portraits, qtd_statistics
from experiments.tasks import markov_runs
from rl_theory import markov


def small(preset, **changes):
  changes = {name.replace("__", "."): str(value) for name, value in changes.items()}
  return presets.override(presets.resolve(f"qtd:{preset}"), list(changes.items()))


@pytest.mark.slow  # the figures of the paper at full length are slow, too
def test_tiny_run_leaves_a_report_with_criteria(tmp_path, capsys):
  folder = tmp_path / "run"
  assert main.run(["--config=qtd:tiny", f"--workdir={folder}"]) == 0
  assert "within 0.05 of the fixed point" in capsys.readouterr().out
  found = json.loads((folder / "results.json").read_text())["result"]
  assert np.shape(found["arrays"]["theta"]["values"]) == (11, 5, 5)
  assert (folder / "figures" / "qtd_chain.svg").exists()


def test_distance_to_the_quadrilateral():
  corners = qtd_portraits.fixed_points("mixing")
  np.testing.assert_allclose(corners, [(1, -2), (2, 0), (4, 1), (4, -2)], atol=1e-9)
  points = np.array([(3.0, -1.0), (4.0, 0.0), (6.0, -1.0), (3.0, -5.0), (0.0, -4.0)])
  # Inside, on an edge, and outside: beside an edge, below one, and beyond the corner (1, -2).
  expected = [0, 0, 2, 3, np.sqrt(5)]
  np.testing.assert_allclose(qtd_portraits.distance(points, corners), expected, atol=1e-9)
  # A single fixed point is a polygon of four equal corners.
  point = qtd_portraits.fixed_points("dirac")
  np.testing.assert_allclose(qtd_portraits.distance(point + np.array([3, 4]), point), 5, atol=1e-9)


def test_the_mean_update_vanishes_on_the_set_of_fixed_points_alone():
  corners = qtd_portraits.fixed_points("mixing")
  inside = 0.9 * corners + 0.1 * corners.mean(0)
  outside = 1.1 * corners - 0.1 * corners.mean(0)
  process = markov.two_states("mixing")
  assert np.abs(qtd_portraits.mean_update(process, inside)).max() == 0
  assert np.abs(qtd_portraits.mean_update(process, outside)).max(-1).min() > 0.2


def test_the_largest_quantile_bootstraps_from_itself():
  table = markov_runs.fixed_point(markov.artefact, num_quantiles=5)
  edges = qtd_artefact.backups(markov.artefact(), table)
  assert (0, 4, 0, 4) in edges
  assert len({edge[:2] for edge in edges}) == len(edges) == 10  # one for each quantile
  followed = dict(zip([e[:2] for e in edges], [e[2:] for e in edges], strict=True))
  for start in followed:  # every chain of back-ups ends at the largest quantile
    for _ in range(10):
      start = followed[start]
    assert start == (0, 4)


@pytest.mark.slow
def test_categorical_td_follows_td_while_nothing_leaves_its_support():
  config = small(
    "statistics", data__num_seeds=10, train__inner_steps=2, train__num_steps=2,
    algorithm__num_quantiles="(2,)", algorithm__num_atoms="(32,)", data__discounts="(0.5,)",
  )  # fmt: skip
  experiment = qtd_statistics.build(config)
  state = jax.jit(experiment.init)(jax.random.key(0))
  update = jax.jit(experiment.update)
  for _ in range(2):
    state, _ = update(state, (), jax.random.key(0))
  tables = state.learners["tables"]
  reach = qtd_statistics.REACH / (1 - np.asarray(state.problem["discounts"]))
  atoms = np.linspace(-1, 1, 32) * reach[:, None]
  means = np.einsum("lgrnsa,ga->lgrns", tables["categorical TD 32"], atoms)
  # Rewards without noise. Float32 masses of atoms up to 30 round by a few 1e-6.
  np.testing.assert_allclose(means[0], tables["TD"][0], atol=1e-4)
  assert np.abs(tables["TD"][0]).max() > 0.5


@pytest.mark.parametrize(
  ("preset", "changes", "match"),
  [
    ("chain", {"data__name": "figure"}, "config.data.name must be one of 'chain'"),
    ("chain", {"data__num_seeds": 1}, "config.data.num_seeds must be an integer >= 2, got 1"),
    ("artefact", {"algorithm__num_quantiles": "(5, 2)"}, "two or more counts, ascending"),
    ("portraits", {"optimizer__decay": 0}, "config.optimizer.decay must lie strictly between"),
    ("statistics", {"data__discounts": "(0.9,)"}, "must not repeat 0.9"),
    ("statistics", {"algorithm__num_atoms": "(1,)"}, "config.algorithm.num_atoms"),
  ],
)
def test_bad_settings_are_named(preset, changes, match):
  with pytest.raises(ValueError, match=match):
    qtd.build(small(preset, **changes))


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["chain", "portraits", "artefact"])
def test_figures_meet_their_criteria(preset, tmp_path):
  assert main.run([f"--config=qtd:{preset}", f"--workdir={tmp_path}/run"]) == 0
  found = json.loads((tmp_path / "run" / "results.json").read_text())["result"]["metrics"]
  assert found["criteria_passed"]["value"] == 1
