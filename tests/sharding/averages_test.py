"""Averages move in every dtype of the parameters, and the two ends of the decay are exact."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignment import nash_md
from sharding import averages


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_decay_of_one_freezes_and_of_zero_copies(dtype):
  rng = np.random.default_rng(0)
  start, params = (
    {"kernel": jnp.asarray(rng.normal(size=(3, 4)), dtype), "bias": jnp.asarray(0.3 + i, dtype)}
    for i in range(2)
  )
  average = averages.start(start)
  for decay, expected in ((1, start), (0, params)):
    moved = averages.move(average, params, jnp.float32(decay))
    for name, leaf in averages.like(moved, params).items():
      np.testing.assert_array_equal(leaf, expected[name])
      assert leaf.dtype == dtype and moved[name].dtype == jnp.float32


def test_wide_parameters_stay_wide_and_the_copy_is_a_copy(x64):
  params = {"scale": jnp.ones(3), "steps": jnp.arange(3)}
  average = averages.start(params)
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(average)} == {"float64", "int64"}
  assert average["scale"].unsafe_buffer_pointer() != params["scale"].unsafe_buffer_pointer()


def test_an_average_in_bfloat16_with_decay_0_999_moves():
  params, target = jnp.zeros(4, jnp.bfloat16), jnp.ones(4, jnp.bfloat16)
  average, decay = averages.start(params), 0.999
  move = jax.jit(averages.move)
  for _ in range(100):
    average = move(average, target, decay)
  # 1e-4: 1 - 0.999 in float32 is 4e-5 of itself off.
  np.testing.assert_allclose(average, 1 - decay**100, rtol=1e-4)
  average = averages.start(target)  # and from 1, where bfloat16 does not move at all
  for _ in range(100):
    average = move(average, params, decay)
  np.testing.assert_allclose(average, decay**100, rtol=1e-4)


def test_the_opponent_of_nash_ema_pg_moves_in_bfloat16():
  """The state's dtypes are the same before and after, so that checkpoints of both fit."""
  params = jnp.ones(2, jnp.bfloat16)
  config, optimizer = nash_md.Config(ema_decay=0.999), optax.sgd(1.0)
  state = nash_md.init(params, optimizer=optimizer, config=config)
  batch = nash_md.Batch(
    tokens=jnp.zeros((2, 1), int),
    mask=jnp.ones((2, 1)),
    ref_token_logps=jnp.zeros((2, 1)),
    preferences=jnp.ones(2),
  )

  def apply_fn(params, rows):
    del rows
    return params[:, None]

  after, _ = nash_md.update(
    state, batch, None, apply_fn=apply_fn, optimizer=optimizer, config=config
  )
  assert jax.tree.map(jnp.dtype, after) == jax.tree.map(jnp.dtype, state)
  assert state.ema_params.dtype == jnp.float32
  moved = np.asarray(after.params, np.float32)
  assert np.all(moved != 1)
  # 2e-5: XLA may add the new parameters before it rounds them to 8 bits, 0.004 of a thousandth.
  np.testing.assert_allclose(after.ema_params, 0.999 + 0.001 * moved, rtol=2e-5)
  assert np.all(after.ema_params != 1)
