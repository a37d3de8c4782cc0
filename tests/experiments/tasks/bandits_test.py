"""What the tabular experiments share."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from alignment import ipo
from experiments.loop import presets
from experiments.papers import nash_md
from experiments.tasks import bandit_grid, bandits


def test_a_sample_table_has_a_row_for_each_setting():
  logits = jnp.log(jnp.array([[0.98, 0.01, 0.01], [0.01, 0.98, 0.01]]))  # two settings
  params = jnp.broadcast_to(logits[:, None], (2, 5, 3))  # five seeds each
  sweep = bandits.Sweep({"ipo": ipo.State(params, (), jnp.zeros(()))}, jnp.zeros((), jnp.int32))
  table = bandits.sample_table(sweep, num_draws=30)
  assert [row[:2] for row in table.rows] == [["ipo", "0"], ["ipo", "1"]]
  for row, arm in zip(table.rows, "ab", strict=True):
    drawn = row[2].split()
    assert len(drawn) == 30 and np.mean([x == arm for x in drawn]) > 0.8


def test_arms_are_drawn_as_often_as_the_policy_says():
  probs = np.array([0.5, 0.2, 0.3])
  arms = bandits.draw_arms(jax.random.key(0), jnp.log(probs), (100, 100))
  # Three standard deviations of 10,000 draws.
  np.testing.assert_allclose(np.bincount(np.ravel(arms), minlength=3) / 1e4, probs, atol=0.015)


def test_a_grid_has_every_pair_as_often_as_its_writers_wrote_it():
  first, second = bandit_grid.pair_arms(np.array([[1, 2, 3], [3, 1, 2]]))
  pairs = [
    list(zip(*rows, strict=True)) for rows in zip(first.tolist(), second.tolist(), strict=True)
  ]
  assert pairs[0] == [(0, 1)] * 2 + [(0, 2)] * 3 + [(1, 2)] * 6
  assert pairs[1] == [(0, 1)] * 3 + [(0, 2)] * 6 + [(1, 2)] * 2
  grid = bandit_grid.random_bandits(presets.resolve("dpo:bandit"))
  for cycle in (0.0, 1.0):
    preferences = grid.preferences(cycle)
    np.testing.assert_allclose(preferences + np.swapaxes(preferences, 1, 2), 1, atol=1e-12)
    log_odds = np.log(preferences / (1 - preferences))
    loops = log_odds[:, 0, 1] + log_odds[:, 1, 2] + log_odds[:, 2, 0]
    assert (np.abs(loops).max() < 1e-12) == (cycle == 0)  # rewards add up to nothing round a loop


def test_settings_are_named_as_the_command_line_has_them():
  config = ml_collections.ConfigDict(
    {"algorithm": {"tau": (), "beta": -1.0}, "data": {"num_seeds": 1}, "train": {"inner_steps": 5}}
  )
  with pytest.raises(ValueError, match=r"config.algorithm.tau is empty"):
    bandits.positives(config, "algorithm.tau")
  with pytest.raises(ValueError, match=r"config.algorithm.beta must be positive"):
    bandits.positives(config, "algorithm.beta")
  with pytest.raises(ValueError, match=r"config.data.num_seeds must be an integer >= 2, got 1"):
    bandits.check_counts(config, num_seeds=2)


def test_a_step_of_mirror_descent_that_is_too_large_is_refused_before_training():
  config = presets.resolve("nash_md:bandit")
  config.algorithm.tau = 0.5
  with pytest.raises(ValueError, match=r"config.algorithm.tau=0.5: give at most 0.2"):
    nash_md.build(config)
