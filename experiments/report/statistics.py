"""Estimates with confidence intervals, from plain counts or NumPy arrays."""

import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from scipy import special

from experiments.report import results


def clopper_pearson(k: int, n: int, confidence: float = 0.95) -> results.Estimate:
  """Returns k/n with its exact binomial interval, which never covers less than `confidence`.

  Args:
    k: successes, 0 to n.
    n: trials. With none the value is 0.5 and the interval is all of [0, 1].
    confidence: two-sided, between 0 and 1.

  Raises:
    ValueError: if k is outside 0..n or `confidence` outside (0, 1).

  Example:
    >>> print(clopper_pearson(8, 10))
    0.8 [0.4439, 0.9748] n=10

  Reference: Clopper and Pearson 1934, Biometrika 26(4).
  """
  _check_confidence(confidence)
  if not 0 <= k <= n:
    raise ValueError(f"k={k} successes of n={n} trials: k must lie in 0..n")
  if n == 0:
    return results.Estimate(0.5, 0.0, 1.0, 0)
  tail = (1 - confidence) / 2
  low = 0.0 if k == 0 else float(special.betaincinv(k, n - k + 1, tail))
  high = 1.0 if k == n else float(special.betaincinv(k + 1, n - k, 1 - tail))
  return results.Estimate(k / n, low, high, n)


def win_rate(wins: int, losses: int, ties: int = 0, confidence: float = 0.95) -> results.Estimate:
  """Returns wins / (wins + losses) with its Clopper-Pearson interval.

  Ties decide nothing and stand beside the interval, in `note`; `n` counts decided comparisons.
  Where ties are common, report `win_rate_half_ties` too.

  Example:
    >>> print(win_rate(150, 50, ties=56))
    0.75 [0.684, 0.8084] n=200 (56 ties)
  """
  for name, count in (("wins", wins), ("losses", losses), ("ties", ties)):
    if count < 0:
      raise ValueError(f"{name}={count}: counts are not negative")
  rate = clopper_pearson(wins, wins + losses, confidence)
  return dataclasses.replace(rate, note=f"{ties} tie{'' if ties == 1 else 's'}")


def win_rate_half_ties(
  wins: int, losses: int, ties: int, confidence: float = 0.95
) -> results.Estimate:
  """Returns (wins + ties / 2) / n with a t interval over the scores 1, 1/2 and 0."""
  scores = np.repeat([1.0, 0.0, 0.5], [wins, losses, ties])
  return dataclasses.replace(mean_interval(scores, confidence), note="a tie counts as half")


def mean_interval(
  values: Any, confidence: float = 0.95, *, method: str = "t", num_resamples: int = 2000
) -> results.Estimate:
  """Returns the mean of independent observations with its interval.

  Args:
    values: `[N]` numbers.
    confidence: two-sided, between 0 and 1.
    method: `"t"` (Student) or `"bootstrap"` (percentile; for skewed values).
    num_resamples: of the bootstrap, which is seeded: same values, same interval.

  Returns:
    The estimate; a single observation has no interval.

  Raises:
    ValueError: if there are no values, or `method` is unknown.

  Example:
    >>> print(mean_interval([1.0, 2.0, 3.0]))
    2 [-0.4841, 4.484] n=3
  """
  _check_confidence(confidence)
  values = np.asarray(values, np.float64).ravel()
  if not values.size:
    raise ValueError("values is empty: a mean needs at least one observation")
  if method not in ("t", "bootstrap"):
    raise ValueError(f"method={method!r}: choose 't' or 'bootstrap'")
  mean, n = float(values.mean()), values.size
  if n == 1:
    return results.Estimate(mean, n=1)
  tail = (1 - confidence) / 2
  if method == "t":
    half = float(special.stdtrit(n - 1, 1 - tail)) * float(values.std(ddof=1)) / math.sqrt(n)
    return results.Estimate(mean, mean - half, mean + half, n)
  rng = np.random.default_rng(0)
  means = [values[rng.integers(0, n, n)].mean() for _ in range(num_resamples)]
  low, high = np.quantile(means, [tail, 1 - tail])
  return results.Estimate(mean, float(low), float(high), n)


def distinct_n(token_lists: Sequence[Sequence[Hashable]], n: int) -> results.Estimate:
  """Returns the share of distinct n-grams among all n-grams of a set of texts.

  Compare only sets of equally many, equally long texts: the share falls as text grows.

  Args:
    token_lists: one list of tokens a text, padding removed.
    n: length of the n-grams, at least 1.

  Returns:
    Distinct over total; `n` is the total; 0 where no text has n tokens.

  Example:
    >>> print(distinct_n([[1, 2, 1, 2]], 2))
    0.6667 n=3

  Reference: Li et al. 2016, https://arxiv.org/abs/1510.03055.
  """
  if n < 1:
    raise ValueError(f"n={n}: n-grams have at least one token")
  grams = [tuple(tokens[i : i + n]) for tokens in token_lists for i in range(len(tokens) - n + 1)]
  return results.Estimate(len(set(grams)) / len(grams) if grams else 0.0, n=len(grams))


def calibration_error(confidences: Any, correct: Any, *, num_bins: int = 10) -> results.Estimate:
  """Returns the expected calibration error of choices between two.

  Choices are sorted into bins of equal width by the probability that was given to them; the error
  is the mean of |share of right choices - mean probability| over bins, weighted by their size. It
  is biased upwards by about 1 / sqrt(n / num_bins), so compare it only at equal n.

  Args:
    confidences: `[N]` probabilities of the choices made, in [0.5, 1].
    correct: `[N]` whether each was right.
    num_bins: between 0.5 and 1.

  Raises:
    ValueError: if there are no choices or a probability is outside [0.5, 1].

  Example:
    >>> print(calibration_error([0.9, 0.9, 0.6, 0.6], [True, True, True, False]))
    0.1 n=4

  Reference: Guo et al. 2017, https://arxiv.org/abs/1706.04599.
  """
  confidences, correct = np.asarray(confidences, np.float64), np.asarray(correct, bool)
  if not confidences.size or confidences.min() < 0.5 or confidences.max() > 1:
    raise ValueError(
      f"confidences has {confidences.size} values; give probabilities of choices, in [0.5, 1]"
    )
  bins = np.minimum(((confidences - 0.5) * 2 * num_bins).astype(int), num_bins - 1)
  gaps = np.bincount(bins, correct - confidences, minlength=num_bins)
  return results.Estimate(float(np.abs(gaps).sum() / confidences.size), n=confidences.size)


def fraction_passed(checks: Sequence[tuple[str, bool]]) -> results.Estimate:
  """Returns the share of criteria that hold; `n` counts the criteria."""
  if not checks:
    raise ValueError("checks is empty: nothing was checked")
  passed = sum(bool(ok) for _, ok in checks)
  return results.Estimate(passed / len(checks), n=len(checks), note=f"{passed} of {len(checks)}")


def _check_confidence(confidence: float) -> None:
  if not 0 < confidence < 1:
    raise ValueError(f"confidence={confidence}: give a number between 0 and 1, such as 0.95")
