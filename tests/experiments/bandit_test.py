"""What the tabular experiments share."""

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from alignment import ipo
from experiments import bandit, presets
from experiments.papers import nash_md


def test_a_sample_table_has_a_row_for_each_setting():
  logits = jnp.log(jnp.array([[0.98, 0.01, 0.01], [0.01, 0.98, 0.01]]))  # two settings
  params = jnp.broadcast_to(logits[:, None], (2, 5, 3))  # five seeds each
  sweep = bandit.Sweep({"ipo": ipo.State(params, (), jnp.zeros(()))}, jnp.zeros((), jnp.int32))
  table = bandit.sample_table(sweep, num_draws=30)
  assert [row[:2] for row in table.rows] == [["ipo", "0"], ["ipo", "1"]]
  for row, arm in zip(table.rows, "ab", strict=True):
    drawn = row[2].split()
    assert len(drawn) == 30 and np.mean([x == arm for x in drawn]) > 0.8


def test_settings_are_named_as_the_command_line_has_them():
  config = ml_collections.ConfigDict(
    {"algorithm": {"tau": (), "beta": -1.0}, "data": {"num_seeds": 1}, "train": {"inner_steps": 5}}
  )
  with pytest.raises(ValueError, match=r"config.algorithm.tau is empty"):
    bandit.positives(config, "algorithm.tau")
  with pytest.raises(ValueError, match=r"config.algorithm.beta must be positive"):
    bandit.positives(config, "algorithm.beta")
  with pytest.raises(ValueError, match=r"config.data.num_seeds=1: give an integer of at least 2"):
    bandit.check_counts(config, num_seeds=2)


def test_a_step_of_mirror_descent_that_is_too_large_is_refused_before_training():
  config = presets.resolve("nash_md:bandit")
  config.algorithm.tau = 0.5
  with pytest.raises(ValueError, match=r"config.algorithm.tau=0.5: give at most 0.2"):
    nash_md.build(config, None)
