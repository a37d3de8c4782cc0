"""Tests of the figures of self-predictive learning: their criteria, errors and stable sets."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import main
from experiments.loop import presets
from experiments.papers import self_predictive, self_predictive_flows, self_predictive_values
from experiments.tasks import traced_runs

SMALL = {"data.num_states": 6, "data.num_chains": 2, "train.num_steps": 8, "train.inner_steps": 3}


def config_of(preset, **changes):
  changes = SMALL | {name.replace("__", "."): value for name, value in changes.items()}
  config = presets.resolve(f"self_predictive:{preset}")
  return presets.override(config, [(name, str(value)) for name, value in changes.items()])


def test_measurements_begin_with_every_step_and_end_at_the_last():
  for num_steps, inner_steps in ((1, 5), (8, 3), (80, 100)):
    found = traced_runs.times(
      config_of("trace", train__num_steps=num_steps, train__inner_steps=inner_steps)
    )
    assert found[0] == 0 and found[-1] == num_steps * inner_steps
    assert len(found) == num_steps + 1 and np.all(np.diff(found) > 0)


def test_untrained_features_fail_criteria_and_a_resumed_run_is_the_same():
  experiment = self_predictive.build(config_of("collapse"))
  update = jax.jit(experiment.update)
  state = jax.jit(experiment.init)(jax.random.key(0))
  assert "fail" in {passed for _, passed in experiment.evaluate(state).tables[0].rows}
  for _ in range(4):
    state, _ = update(state, (), jax.random.key(0))
  # What a checkpoint holds is all that the rest of the run needs.
  saved = jax.tree.map(np.asarray, state)
  for _ in range(4):
    state, metrics = update(state, (), jax.random.key(1))
    saved, _ = update(saved, (), jax.random.key(2))  # nothing is random after the start
  jax.tree.map(np.testing.assert_array_equal, state, saved)
  (value,) = metrics.values()
  trace = state.traces[experiment.headline]
  assert float(value) == pytest.approx(float(trace[-1].mean())) and np.all(trace[1:] != 0)


@pytest.mark.slow
def test_float32_is_enough_for_the_figures():
  experiment = self_predictive.build(
    config_of("trace", algorithm__num_features="(2,)", train__num_steps=20, train__inner_steps=30)
  )
  start = jax.jit(experiment.init)(jax.random.key(0))
  assert "fail" in {passed for _, passed in experiment.evaluate(start).tables[0].rows}

  def ratios(state):
    for _ in range(20):
      state, _ = update(state, (), jax.random.key(0))
    return np.asarray(state.traces["objective/forward/2"])

  update = jax.jit(experiment.update)
  single = ratios(start)
  with jax.enable_x64(True):
    wide = jax.tree.map(
      lambda x: np.asarray(x, np.float64 if x.dtype == np.float32 else x.dtype), start
    )
    update = jax.jit(experiment.update)
    double = ratios(wide)
  assert double.dtype == np.float64
  # Rounding of 1e-7 in each of 600 steps; a figure shows no difference below 1e-2.
  np.testing.assert_allclose(single, double, atol=1e-3)


def test_the_error_of_values_is_that_of_regressions_on_drawn_rewards():
  rng = np.random.default_rng(0)
  transitions = rng.dirichlet(np.ones(6), 6)
  resolvent = np.linalg.inv(np.eye(6) - 0.9 * transitions)
  features = rng.normal(size=(6, 2))
  values = resolvent @ rng.normal(size=(6, 20_000))

  def squares(columns):
    weights = np.linalg.lstsq(columns, values, rcond=None)[0]
    return np.sum((values - columns @ weights) ** 2)

  found = self_predictive_values.regression_error(features, resolvent)
  # 20,000 draws of six rewards: a relative error of about 1 / sqrt(20,000).
  assert found == pytest.approx(squares(features) / squares(np.ones((6, 1))), rel=0.03)
  single = self_predictive_values.regression_error(
    jnp.asarray(features, jnp.float32), jnp.asarray(resolvent, jnp.float32)
  )
  assert float(single) == pytest.approx(found, rel=1e-4)


def test_oracles_span_invariant_and_best_subspaces():
  rng = np.random.default_rng(1)
  transitions = rng.dirichlet(np.full(6, 0.3), (4, 6)).reshape(4, 6, 6)
  resolvent = np.linalg.inv(np.eye(6) - 0.9 * transitions)
  found = self_predictive_values.oracle_features(transitions, resolvent)
  eigen, singular, best = (found[name] for name in self_predictive_values.ORACLES)
  for chain, features in zip(transitions, eigen, strict=True):
    eigenvalues = np.linalg.eigvals(chain)
    sizes = np.sort(np.abs(eigenvalues))[::-1]
    for width in range(1, 6):
      if np.isclose(sizes[width - 1], sizes[width]):
        continue  # the width splits a pair
      basis = np.linalg.qr(features[:, :width])[0]
      moved = chain @ basis
      np.testing.assert_allclose(moved, basis @ (basis.T @ moved), atol=1e-8)
  for width in (1, 3):
    least = self_predictive_values.regression_error(best[..., :width], resolvent)
    for other in (eigen, singular, rng.normal(size=eigen.shape)):
      errors = self_predictive_values.regression_error(other[..., :width], resolvent)
      assert np.all(least <= errors + 1e-12)


def test_chains_are_sorted_by_the_stable_set_in_which_they_end():
  basis = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
  chain = basis @ np.diag([1.0, 0.5, -0.2, -0.6]) @ basis.T
  ends = [[0, 1], [0, 3], [3, 2], [0, 2]]  # the last one is a saddle
  features = np.stack([basis[:, end] for end in ends])
  shares, negatives = self_predictive_flows.stable_ends(np.stack([chain] * 4), features)
  np.testing.assert_allclose(shares, [1, 1, 1, 0.5], atol=1e-12)
  np.testing.assert_array_equal(negatives[:3], [0, 1, 2])


@pytest.mark.parametrize(
  ("preset", "changes", "match"),
  [
    ("trace", {"data.families": "symetric"}, "config.data.families"),
    ("trace", {"algorithm.num_features": "(2, 7)"}, "config.algorithm.num_features=.2, 7."),
    ("trace", {"algorithm.step": "0"}, "config.algorithm.step must be positive"),
    ("bidirectional", {"algorithm.directions": "()"}, "config.algorithm.directions is empty"),
    ("values", {"data.discount": "1"}, r"config.data.discount=1.0 must lie in \[0, 1\)"),
    ("ratio", {"algorithm.predictor_ratio": "(1, 0)"}, "config.algorithm.predictor_ratio"),
    ("ema", {"algorithm.target_decay": "(2,)"}, "config.algorithm.target_decay"),
    ("collapse", {"algorithm.num_features": "1"}, "config.algorithm.num_features"),
    ("collapse", {"algorithm.num_features": "7"}, "config.algorithm.num_features=7 must be at"),
  ],
)
def test_bad_settings_are_named(preset, changes, match):
  with pytest.raises(ValueError, match=match):
    self_predictive.build(config_of(preset, **changes))


@pytest.mark.slow
def test_the_study_draws_every_figure_in_one_report(tmp_path):
  arguments = ["--config=self_predictive:paper", f"--workdir={tmp_path}/run"]
  arguments += ["--config.data.figures=tiny"]
  assert main.run([*arguments, "--config.data.num_states=6", "--config.data.num_chains=2"]) == 0
  found = json.loads((tmp_path / "run" / "results.json").read_text())["result"]
  criteria, *tables = found["tables"]
  assert all(row[0].startswith("tiny: ") for row in criteria["rows"]) and len(tables) == 2
  assert (tmp_path / "run" / "figures" / "self_predictive_trace.svg").exists()
  assert (tmp_path / "run" / "tiny" / "report.html").exists()


@pytest.mark.slow  # a minute
@pytest.mark.parametrize("preset", ["collapse", "ratio", "ema"])
def test_figures_meet_their_criteria(preset, tmp_path):
  assert main.run([f"--config=self_predictive:{preset}", f"--workdir={tmp_path}/run"]) == 0
  found = json.loads((tmp_path / "run" / "results.json").read_text())["result"]
  assert found["metrics"]["criteria_passed"]["value"] == 1.0
