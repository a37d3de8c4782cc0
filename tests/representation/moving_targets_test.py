"""The schedule of the decay at its named points, and the target at both ends of it."""

import jax.numpy as jnp
import numpy as np
import pytest

from representation import moving_targets


def test_decay_rises_by_half_a_cosine_and_stays_at_one(x64):
  found = [
    float(moving_targets.decay_schedule(k, target_decay=0.99, num_steps=12))
    for k in (0, 3, 4, 6, 12, 24)
  ]
  # 1 - 0.01 (1 + c) / 2, with c = cos(pi k / 12) = 1, sqrt(1/2), 1/2, 0, -1.
  expected = [0.99, 1 - 0.005 * (1 + 0.5**0.5), 0.9925, 0.995, 1, 1]
  np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_decay_of_one_freezes_and_of_zero_copies(dtype):
  rng = np.random.default_rng(0)
  target, online = (
    {"kernel": jnp.asarray(rng.normal(size=(3, 4)), dtype), "bias": jnp.asarray(0.3 + i, dtype)}
    for i in range(2)
  )
  for decay, expected in ((1, target), (0, online)):
    moved = moving_targets.move(target, online, jnp.float32(decay))
    for name in expected:
      np.testing.assert_array_equal(moved[name], expected[name])
      assert moved[name].dtype == dtype
