"""What the tabular experiments share."""

import jax.numpy as jnp
import numpy as np

from alignment import ipo
from experiments import bandit


def test_a_sample_table_has_a_row_for_each_setting():
  logits = jnp.log(jnp.array([[0.98, 0.01, 0.01], [0.01, 0.98, 0.01]]))  # two settings
  params = jnp.broadcast_to(logits[:, None], (2, 5, 3))  # five seeds each
  sweep = bandit.Sweep({"ipo": ipo.State(params, (), jnp.zeros(()))}, jnp.zeros((), jnp.int32))
  table = bandit.sample_table(sweep, num_draws=30)
  assert [row[:2] for row in table.rows] == [["ipo", "0"], ["ipo", "1"]]
  for row, arm in zip(table.rows, "ab", strict=True):
    drawn = row[2].split()
    assert len(drawn) == 30 and np.mean([x == arm for x in drawn]) > 0.8
