"""The schedules of BYOL at steps whose values are known for ImageNet at batch 4096."""

import numpy as np
import pytest

from representation import byol_recipes, moving_targets


@pytest.mark.parametrize(
  ("num_epochs", "steps", "peak"),
  [(40, 12_511, 7.2), (100, 31_278, 7.2), (300, 93_835, 4.8), (1000, 312_784, 3.2)],
)
def test_presets_have_their_steps_and_their_peak(num_epochs, steps, peak):
  assert byol_recipes.num_steps(num_epochs, 4096) == steps
  schedule = byol_recipes.learning_rate_schedule(
    byol_recipes.PRESETS[num_epochs].base_learning_rate, num_epochs=num_epochs, batch_size=4096
  )
  np.testing.assert_allclose(schedule(3127), peak, rtol=1e-6)
  np.testing.assert_allclose(schedule(1564), peak * 1564 / 3127, rtol=1e-6)
  # 1e-6: half a cosine in float32 ends at its rounding.
  np.testing.assert_allclose([schedule(0), schedule(steps)], 0, atol=1e-6)


@pytest.mark.parametrize(
  ("num_epochs", "step", "rate", "decay"),
  [(1000, 156_392, 1.625379, 0.998), (300, 46_917, 2.529940, 0.9950)],
)
def test_schedules_at_half_time(x64, num_epochs, step, rate, decay):
  """The learning rate is above half its peak there, because of the rise at the start."""
  preset = byol_recipes.PRESETS[num_epochs]
  schedule = byol_recipes.learning_rate_schedule(
    preset.base_learning_rate, num_epochs=num_epochs, batch_size=4096
  )
  np.testing.assert_allclose(schedule(step), rate, atol=1e-6)  # six decimals are given
  found = moving_targets.decay_schedule(
    step, target_decay=preset.target_decay, num_steps=byol_recipes.num_steps(num_epochs, 4096)
  )
  np.testing.assert_allclose(found, decay, atol=1e-6)


def test_a_run_without_a_rise_starts_at_the_peak():
  schedule = byol_recipes.learning_rate_schedule(
    0.5, num_epochs=3, batch_size=128, num_images=256, num_warmup_epochs=0
  )
  np.testing.assert_allclose([schedule(0), schedule(3)], [0.25, 0.125], rtol=1e-6)


def test_bad_lengths_are_refused():
  with pytest.raises(ValueError, match="num_warmup_epochs must be less than num_epochs, 10"):
    byol_recipes.learning_rate_schedule(0.2, num_epochs=10, batch_size=4096)
  with pytest.raises(ValueError, match="batch_size must be an integer >= 1, got 0"):
    byol_recipes.num_steps(10, 0)
