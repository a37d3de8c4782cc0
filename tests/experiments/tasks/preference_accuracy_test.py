"""Accuracy, calibration and the rules that read no word."""

import numpy as np
import pytest

from experiments.data import text
from experiments.report import results, statistics
from experiments.tasks import preference_accuracy


def _pair(chosen, rejected, prompt="p", chosen_prob=1.0):
  return text.Preference(prompt, "a" * chosen, "b" * rejected, chosen_prob)


def test_hand_numbers():
  pairs = [_pair(3, 1), _pair(1, 3), _pair(2, 2), _pair(1, 2, "q", 0.25), _pair(1, 2, "q", 0.5)]
  z = np.array([2.0, -1.0, 0.5, -0.5, 3.0])
  found = preference_accuracy.evaluate(z, pairs, length_coefficient=100.0)
  values = found.metrics
  # Right, wrong, right, right (the label says that rejected wins); the last label is a tie.
  assert (values["accuracy"].value, values["accuracy"].n) == (3 / 4, 4)
  assert values["accuracy"].note == "1 tie"
  # Prompt p: 2 of 3; prompt q: one right and a tie, 3/4.
  np.testing.assert_allclose(values["accuracy_by_prompt"].value, (2 / 3 + 3 / 4) / 2)
  assert (values["accuracy_longer_wins"].value, values["accuracy_longer_wins"].n) == (2 / 3, 3)
  sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
  p, q = sigmoid(z), np.array([1, 1, 1, 0.25, 0.5])
  want = -(q * np.log(p) + (1 - q) * np.log(1 - p)).mean()
  np.testing.assert_allclose(values["log_loss"].value, want)
  np.testing.assert_allclose(values["brier"].value, ((p - q) ** 2).mean())


def test_length_is_fitted_with_its_sign_and_stays_finite():
  shorter = [_pair(100, 250)] * 30 + [_pair(250, 100)] * 10
  coefficient = preference_accuracy.fit_length(shorter)
  np.testing.assert_allclose(coefficient, -np.log(3) / 1.5, rtol=1e-3)  # P(shorter) = 3/4
  found = preference_accuracy.evaluate(np.ones(40), shorter, length_coefficient=coefficient).metrics
  assert found["accuracy_longer_wins"].value == 0.25
  assert found["accuracy_length_fit"].value == 0.75
  assert np.isfinite(preference_accuracy.fit_length([_pair(9, 1)]))
  assert np.isfinite(preference_accuracy.fit_length([_pair(2, 2)]))


def test_calibration_is_zero_for_a_model_that_knows_how_often_it_is_right():
  right = statistics.calibration_error([0.75] * 4, [True, True, True, False])
  assert right.value == 0
  assert statistics.calibration_error([1.0, 1.0], [False, False]).value == 1
  for bad in ([], [0.3], [1.1]):
    with pytest.raises(ValueError, match=r"in \[0.5, 1\]"):
      statistics.calibration_error(bad, [True] * len(bad))


def test_the_figure_is_drawn_from_what_json_keeps():
  pairs = [_pair(3, 1), _pair(1, 3)] * 30
  z = np.linspace(-2, 2, 60)
  found = preference_accuracy.evaluate(z, pairs, length_coefficient=0.0)
  again = results.Result.from_json(found.to_json())
  (drawn,) = preference_accuracy.figures(None, again)
  # 60 pairs in groups of at least 25: two points with their bars.
  points = [bars[0].get_xydata()[0] for bars in drawn.figure.axes[0].containers]
  confidence = np.sort(1 / (1 + np.exp(-np.abs(z))))
  np.testing.assert_allclose([x for x, _ in points], confidence.reshape(2, 30).mean(1))
  ties = preference_accuracy.evaluate(np.zeros(60), pairs, length_coefficient=0.0)
  assert "calibration_error" not in ties.metrics
  (drawn,) = preference_accuracy.figures(None, ties)
  assert not drawn.figure.axes[0].containers  # no choices, no points
