"""The schedule of the decay at its named points."""

import numpy as np

from representation import moving_targets


def test_decay_rises_by_half_a_cosine_and_stays_at_one(x64):
  found = [
    float(moving_targets.decay_schedule(k, target_decay=0.99, num_steps=12))
    for k in (0, 3, 4, 6, 12, 24)
  ]
  # 1 - 0.01 (1 + c) / 2, with c = cos(pi k / 12) = 1, sqrt(1/2), 1/2, 0, -1.
  expected = [0.99, 1 - 0.005 * (1 + 0.5**0.5), 0.9925, 0.995, 1, 1]
  np.testing.assert_allclose(found, expected, atol=1e-12)
