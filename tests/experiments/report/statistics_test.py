"""Tests of report.statistics and results: intervals against their definitions, edges, JSON."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from experiments.report import results, statistics


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (196, 256), (1, 1)])
@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_clopper_pearson_ends_are_where_the_binomial_tails_are(k, n, confidence):
  found = statistics.clopper_pearson(k, n, confidence)
  tail = (1 - confidence) / 2
  # The ends are defined by P(X >= k | low) = P(X <= k | high) = tail.
  if k > 0:
    assert stats.binom.sf(k - 1, n, found.low) == pytest.approx(tail, rel=1e-9)
  else:
    assert found.low == 0
  if k < n:
    assert stats.binom.cdf(k, n, found.high) == pytest.approx(tail, rel=1e-9)
  else:
    assert found.high == 1
  assert found.value == k / n and found.n == n


def test_clopper_pearson_covers_at_least_as_often_as_it_says():
  n = 20
  intervals = [statistics.clopper_pearson(k, n) for k in range(n + 1)]
  for p in (0.02, 0.3, 0.5, 0.9):
    covered = sum(stats.binom.pmf(k, n, p) for k, i in enumerate(intervals) if i.low <= p <= i.high)
    assert covered >= 0.95


def test_no_trials_know_nothing():
  assert statistics.clopper_pearson(0, 0) == results.Estimate(0.5, 0.0, 1.0, 0)


@pytest.mark.parametrize(("k", "n"), [(-1, 5), (6, 5)])
def test_impossible_counts_are_refused(k, n):
  with pytest.raises(ValueError, match=f"k={k} successes of n={n}"):
    statistics.clopper_pearson(k, n)


def test_ties_are_counted_in_the_note_and_left_out_of_the_rate():
  found = statistics.win_rate(30, 10, ties=60)
  assert (found.value, found.n, found.note) == (0.75, 40, "60 ties")
  assert found == statistics.dataclasses.replace(statistics.clopper_pearson(30, 40), note="60 ties")
  with pytest.raises(ValueError, match="losses must not be negative, got -1"):
    statistics.win_rate(1, -1)


def test_the_t_interval_is_scipys():
  values = np.random.default_rng(0).normal(3, 2, 17)
  found = statistics.mean_interval(values, 0.9)
  low, high = stats.t.interval(0.9, 16, loc=values.mean(), scale=stats.sem(values))
  # Both are float64 formulas: rounding only.
  np.testing.assert_allclose([found.low, found.high], [low, high], rtol=1e-12)


def test_the_log_interval_is_positive_and_agrees_with_t_where_the_spread_is_small():
  values = np.array([0.0, 0.0, 0.0, 4.0])  # t gives [-2.2, 4.2]
  found = statistics.mean_interval(values, method="log")
  # The standard error equals the mean, so the ends are e^t times nearer and farther.
  ratio = np.exp(stats.t.ppf(0.975, 3))
  np.testing.assert_allclose([found.low, found.high], [1 / ratio, ratio], rtol=1e-12)
  assert statistics.mean_interval([0.0, 0.0], method="log") == results.Estimate(0.0, 0.0, 0.0, 2)
  rounded = statistics.mean_interval([-1e-7, 2.0], method="log")
  assert rounded == statistics.mean_interval([0.0, 2.0], method="log")
  values = np.random.default_rng(2).normal(100, 1, 30)
  found, t = statistics.mean_interval(values, method="log"), statistics.mean_interval(values)
  # exp(x) - 1 - x is x^2 / 2, and x is 0.004 here.
  np.testing.assert_allclose([found.low, found.high], [t.low, t.high], atol=1e-3)
  with pytest.raises(ValueError, match=r"values has -1\.0: method=.log. needs"):
    statistics.mean_interval([-1.0, 2.0], method="log")


def test_the_logit_interval_is_a_share_and_agrees_with_t_where_the_spread_is_small():
  values = np.array([1.0, 1.0, 1.0, 0.5])  # t reaches 1.27
  found = statistics.mean_interval(values, method="logit")
  # The mean is 7/8 with a standard error of 1/8, so its log-odds have one of 8/7.
  ends = stats.t.ppf(0.975, 3) * 8 / 7 * np.array([-1, 1]) + np.log(7)
  np.testing.assert_allclose([found.low, found.high], 1 / (1 + np.exp(-ends)), rtol=1e-12)
  assert statistics.mean_interval([1.0, 1.0], method="logit") == results.Estimate(1.0, 1.0, 1.0, 2)
  values = np.random.default_rng(2).normal(0.5, 0.01, 30)
  found, t = statistics.mean_interval(values, method="logit"), statistics.mean_interval(values)
  # The log-odds at 1/2 are straight up to the third order: 16/3 of the cube of 0.004.
  np.testing.assert_allclose([found.low, found.high], [t.low, t.high], atol=1e-5)
  with pytest.raises(ValueError, match=r"values has 0\.5 to 1\.5: method=.logit. needs"):
    statistics.mean_interval([0.5, 1.5], method="logit")
  rounded = statistics.mean_interval([1 + 1e-7, 0.5], method="logit")
  assert rounded == statistics.mean_interval([1.0, 0.5], method="logit")
  for value in np.random.default_rng(0).uniform(size=200) ** 9:
    found = statistics.mean_interval([value] * 5, method="logit")
    assert found.low <= found.value <= found.high


def test_the_log_interval_covers_skewed_means_more_often_than_t():
  draws = np.random.default_rng(3).exponential(size=(2000, 8))
  covered = {
    method: np.mean([
      found.low <= 1 <= found.high
      for found in (statistics.mean_interval(row, method=method) for row in draws)
    ])
    for method in ("t", "log")
  }  # fmt: skip
  # 0.886 and 0.924 of 4,000 draws; their paired difference has a standard error of 0.005.
  assert covered["log"] > covered["t"] + 0.01


def test_the_half_width_is_that_of_the_t_interval():
  found = statistics.half_width(np.array([1.0, 2.0]), 5)
  np.testing.assert_allclose(found, stats.t.ppf(0.975, 4) * np.array([1, 2]) / 5**0.5, rtol=1e-12)
  with pytest.raises(ValueError, match="n must be an integer >= 2, got 1"):
    statistics.half_width(1.0, 1)


def test_the_bootstrap_agrees_with_t_on_normal_values_and_repeats_itself():
  values = np.random.default_rng(1).normal(size=200)
  t = statistics.mean_interval(values)
  found = statistics.mean_interval(values, method="bootstrap")
  assert found == statistics.mean_interval(values, method="bootstrap")
  # Half-widths are 0.13; the Monte Carlo error of a 2.5 % quantile of 2000 means is about 0.004.
  np.testing.assert_allclose([found.low, found.high], [t.low, t.high], atol=0.02)


def test_the_interquartile_mean_leaves_out_a_quarter_at_each_end():
  values = np.arange(10.0)
  values[[0, 9]] = -1e6, 1e6  # outliers at both ends: two values go on either side
  found = statistics.interquartile_mean(values[::-1])
  assert (found.value, found.n) == (np.mean(np.arange(2, 8)), 10)
  assert statistics.interquartile_mean(values[::-1]) == found
  normal = np.random.default_rng(1).normal(size=400)
  found = statistics.interquartile_mean(normal)
  # The standard error of this mean on normal values is 1.09 / sqrt(n); 2000 resamples of 400 values
  # give it within a tenth.
  half = 1.96 * 1.09 / 400**0.5
  np.testing.assert_allclose((found.high - found.low) / 2, half, rtol=0.1)
  assert statistics.interquartile_mean([3.0]).low is None
  with pytest.raises(ValueError, match="values is empty"):
    statistics.interquartile_mean([])


def test_one_observation_has_no_interval_and_none_is_an_error():
  assert statistics.mean_interval([2.0]) == results.Estimate(2.0, n=1)
  with pytest.raises(ValueError, match="values is empty"):
    statistics.mean_interval([])
  with pytest.raises(ValueError, match="'bootstrap', got 'magic'"):
    statistics.mean_interval([1.0, 2.0], method="magic")
  with pytest.raises(ValueError, match=r"between 0 and 1, such as 0\.95, got 95"):
    statistics.mean_interval([1.0, 2.0], 95)


def test_distinct_n_counts_over_the_set_and_not_across_texts():
  texts = [[1, 2, 3], [1, 2], [7]]
  assert statistics.distinct_n(texts, 1).value == pytest.approx(4 / 6)
  assert statistics.distinct_n(texts, 2) == results.Estimate(2 / 3, n=3)
  assert statistics.distinct_n(texts, 4) == results.Estimate(0.0, n=0)
  with pytest.raises(ValueError, match="n must be at least 1, got 0"):
    statistics.distinct_n(texts, 0)


@pytest.mark.parametrize(("confidences", "found"), [([0.4, 0.9], "0.4 to 0.9"), ([], "none")])
def test_calibration_takes_probabilities_of_the_choices_made(confidences, found):
  with pytest.raises(ValueError, match=rf"in \[0.5, 1\], got {found}"):
    statistics.calibration_error(confidences, [True] * len(confidences))


def test_fraction_passed():
  found = statistics.fraction_passed([("a", True), ("b", False), ("c", np.True_)])
  assert found.value == pytest.approx(2 / 3)
  assert found.note == "2 of 3"
  with pytest.raises(ValueError, match="criteria is empty"):
    statistics.fraction_passed([])


def test_a_result_survives_json():
  result = results.Result(
    metrics={"rate": statistics.win_rate(3, 1, 2), "plain": np.float32(0.5)},
    tables=[results.Table("t", ["a", "b"], [["x", 1.5], ["y", 2]])],
    notes=["n"],
    arrays={"values": np.arange(6, dtype=np.float32).reshape(2, 3)},
  )
  again = results.Result.from_json(json.loads(json.dumps(result.to_json())))
  assert again.metrics == result.metrics
  assert again.metrics["plain"] == results.Estimate(0.5)
  assert again.tables == result.tables
  assert again.notes == result.notes
  np.testing.assert_array_equal(again.arrays["values"], result.arrays["values"])
  assert again.arrays["values"].dtype == np.float32


def test_scalars_carry_the_interval():
  result = results.Result(metrics={"a": results.Estimate(1.0, 0.5, 1.5), "b": 2})
  assert result.scalars() == {"a": 1.0, "a_low": 0.5, "a_high": 1.5, "b": 2.0}


def test_tables_and_estimates_of_numpy_and_jax_numbers_survive_json():
  numbers = [np.float32(0.25), np.int64(3), np.bool_(True), jnp.float32(0.5), jnp.bfloat16(0.5)]
  table = results.Table(
    "t",
    ["a", "b", "c"],
    [[number, [number, 1.5], results.Estimate(number, n=np.int64(2))] for number in numbers]
    + [["nan", [results.Estimate(1.0, 0.5, 1.5)], np.array([0.25, 0.5])]],
    digits=2,
  )
  found = results.Result(metrics={"x": results.Estimate(np.float32(0.5))}, tables=[table])
  again = results.Result.from_json(json.loads(json.dumps(found.to_json())))
  assert again.metrics["x"].value == 0.5
  shown = [[again.tables[0].text(cell) for cell in row] for row in again.tables[0].rows]
  assert [row[0] for row in shown] == ["0.25", "3", "True", "0.50", "0.50", "nan"]
  assert shown[0][1] == "0.25  1.50" and shown[0][2] == "0.25"
  assert shown[-1][1] == "1.00 [0.50, 1.50]" and shown[-1][2] == "0.25  0.50"
  assert [table.text(cell) for cell in table.rows[0]] == shown[0]
