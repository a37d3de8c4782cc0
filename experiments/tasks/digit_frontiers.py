"""Frontiers of methods on the language of digits: what they earn at a distance from the reference.

Settings of different methods end at different KLs, so methods are compared on a curve through their
settings. A chord between two settings lies below a concave frontier. So the curve is smooth: a
cubic through the settings, in the square root of the KL, that has no extremum between two of them
(Fritsch and Butland 1984, https://doi.org/10.1137/0905021). It starts at the reference. A setting
that diverged changes the curve only beside itself.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import interpolate

from experiments.report import results
from sharding import checks

_TIE = 1e-6  # settings whose KLs differ by less, in nats, are one point


def curve(kls: np.ndarray, values: np.ndarray, start: float) -> Callable[[Any], Any]:
  """Returns the value as a function of the KL in nats.

  Beyond the largest KL of the settings the function stays at its last value.

  Args:
    kls: `[S]` mean log-ratios of the settings, in any order; those below zero count as zero.
    values: `[S]` what they earn.
    start: the same for the reference.

  Raises:
    ValueError: if the shapes differ.
  """
  checks.same_shape(kls=kls, values=values)
  places, heights = [0.0], [float(start)]
  for place, height in sorted(zip(np.maximum(kls, 0), values, strict=True)):
    if place > places[-1] + _TIE:
      places.append(float(place))
      heights.append(float(height))
  if len(places) == 1:
    return lambda kl: np.full(np.shape(kl), heights[0])
  cubic = interpolate.PchipInterpolator(np.sqrt(places), heights)
  return lambda kl: cubic(np.sqrt(np.minimum(kl, places[-1])))


def value_at(
  log_ratios: np.ndarray,
  values: np.ndarray,
  start: np.ndarray,
  kl: float,
  *,
  num_resamples: int = 300,
) -> results.Estimate:
  """Returns the value of the curve at one KL, or at the method's largest KL if that is smaller.

  The curve goes through the means over seeds and prompts. The 95 % interval is that of a bootstrap
  over both. It covers both choices, as far as three seeds can tell, but not the form of the curve.

  Args:
    log_ratios: `[S, K, N]` of the answers of S settings and K seeds to N prompts, in nats.
    values: `[S, K, N]` rewards or win probabilities of the answers.
    start: `[N]` the same for the reference.
    kl: where to read the curve, positive.
    num_resamples: number of bootstrap samples; their seed is fixed.

  Raises:
    ValueError: if the shapes differ or `kl` is not positive.
  """
  checks.same_shape(log_ratios=log_ratios, values=values)
  checks.positive("kl", kl)
  num_seeds, count = values.shape[1:]
  checks.shape("start", start, (count,), "[N]")
  rng = np.random.default_rng(0)
  prompts = rng.multinomial(count, np.full(count, 1 / count), num_resamples)
  seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), num_resamples)
  # The first row is the estimate itself.
  prompts = np.concatenate([np.ones((1, count)), prompts]) / count
  seeds = np.concatenate([np.ones((1, num_seeds)), seeds]) / num_seeds

  def means(array):  # [R, S]
    by_seed = np.tensordot(prompts, array, (1, 2))  # [R, S, K]
    return np.einsum("rsk,rk->rs", by_seed, seeds)

  rows = zip(means(log_ratios), means(values), prompts @ start, strict=True)
  value, *resampled = (float(curve(*row)(kl)) for row in rows)
  low, high = np.quantile(resampled, [0.025, 0.975])
  return results.Estimate(value, float(low), float(high), count)
