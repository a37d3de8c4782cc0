"""KTO (arXiv:2402.01306), a baseline: its optimum on random bandits, and where training ends.

KTO has no closed form, but on a table its optimum can be computed. For a fixed reference point z,
the loss of a data set is a constant minus the sum over y of g(y) sigmoid(beta (r(y) - z)). Here
g(y) is how much more often y is good than bad, and r(y) is its log-ratio. At any beta, arms with
g < 0 get probability 0. Over the other arms the sum is concave for beta <= 1
(`population_optimum`). As beta goes to 0, their probabilities become proportional to g, whatever
the reference.

z is estimated from mismatched completions. If they come from the data, as in the language-model
run, z ends at zero wherever the data contain an arm that the policy gives up. If they come from the
policy, z is KL(pi || ref), as the paper defines it, and the optimum is a different one.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from alignment import oracles
from alignment.baselines import kto
from experiments.loop import training
from experiments.report import results, statistics
from experiments.tasks import bandit_grid, bandits


def population_optimum(
  gains: np.ndarray, ref_logps: np.ndarray, beta: Any, kl: np.ndarray
) -> np.ndarray:
  """Returns the policy with the least KTO loss on a table, for a fixed reference point.

  This is the argmax over pi of the sum over y of gains(y) sigmoid(beta (log pi(y) - log ref(y) -
  kl)). Where pi is positive it solves gains beta s (1 - s) / pi = lambda, where s is the sigmoid.
  An outer bisection finds lambda, an inner one the probability of each arm.

  Args:
    gains: `[..., A]` weight of an arm in the data times (rate of good labels - rate of bad labels);
      at least one must be positive.
    ref_logps: `[..., A]` log-probabilities of the reference.
    beta: `[...]` in (0, 1], where the sum is concave in pi.
    kl: `[...]` the reference point, not negative.

  Returns:
    `[..., A]` probabilities, float64, to about 1e-8.

  Raises:
    ValueError: if `beta` lies outside (0, 1], or no arm is good more often than bad.
  """
  beta, kl = np.asarray(beta)[..., None], np.asarray(kl)[..., None]
  if not np.all((beta > 0) & (beta <= 1)):
    raise ValueError(f"beta must lie in (0, 1], got {beta}: above 1 the loss has local optima")
  if not np.all(np.max(gains, axis=-1) > 0):
    raise ValueError(f"gains must have a positive entry, got {gains}: no arm is good more often")
  good, centres = np.asarray(gains) > 0, ref_logps + kl
  scales = np.log(np.where(good, gains, 1) * beta)
  shape = np.broadcast_shapes(scales.shape, centres.shape)

  def bisect(below, low, high, num_steps=40):
    for _ in range(num_steps):
      middle = (low + high) / 2
      here = below(middle)
      low, high = np.where(here, middle, low), np.where(here, high, middle)
    return (low + high) / 2

  def slopes(logps):  # log of gains beta s (1 - s) / pi, with s (1 - s) = exp(z) / (1 + exp(z))^2
    z = beta * (logps - centres)
    return scales + z - 2 * np.logaddexp(0, z) - logps

  def probs_at(multiplier):  # arms whose slope is below lambda at exp(-40) end there: about 0
    below = lambda logps: slopes(logps) > multiplier[..., None]  # noqa: E731
    return np.where(good, np.exp(bisect(below, np.full(shape, -40.0), np.zeros(shape))), 0)

  edge = np.full(shape[:-1], 100.0)
  probs = probs_at(bisect(lambda multiplier: probs_at(multiplier).sum(-1) > 1, -edge, edge))
  return probs / probs.sum(-1, keepdims=True)


def self_consistent_optimum(gains: np.ndarray, ref_logps: np.ndarray, beta: Any) -> np.ndarray:
  """Returns the optimum `[..., A]` whose reference point is its own KL(pi || ref)."""
  shape = np.broadcast_shapes(np.shape(beta), gains.shape[:-1])
  low, high = np.zeros(shape), np.broadcast_to(-ref_logps.min(-1), shape)
  for _ in range(25):
    middle = (low + high) / 2
    with np.errstate(divide="ignore"):
      logps = np.log(population_optimum(gains, ref_logps, beta, middle))
    above = oracles.kl(logps, np.broadcast_to(ref_logps, logps.shape)) > middle
    low, high = np.where(above, middle, low), np.where(above, high, middle)
  return population_optimum(gains, ref_logps, beta, (low + high) / 2)


def build(config: Any) -> training.Experiment:
  """Returns the experiment of the preset `bandit`."""
  bandits.check_counts(config, batch_size=1)
  betas, grid = bandits.positives(config, "algorithm.beta"), bandit_grid.random_bandits(config)
  ref_logps, counts = grid.ref_logps, grid.counts
  rates = _good_rates(config)
  gains = counts / counts.sum(1, keepdims=True) * (2 * rates - 1)
  rows = np.arange(len(counts))[:, None]

  def problems(repeats):  # each arm as often as it occurs in the data, all `repeats` times
    arms = np.stack([np.tile(np.repeat(np.arange(len(c)), c), repeats) for c in counts])
    return {
      "tokens": jnp.asarray(arms[..., None]),
      "labels": jnp.asarray(rates[rows, arms], jnp.float32),
      "ref_logps": jnp.asarray(ref_logps, jnp.float32),
    }

  def batch(problem, setting, params, key, *, on_policy):
    del setting
    tokens, ref_logps = problem["tokens"], problem["ref_logps"]
    other = jnp.roll(tokens, 1, axis=0)
    if on_policy:
      other = bandits.draw_arms(key, params, tokens.shape)
    ones = jnp.ones(tokens.shape)
    return kto.Batch(
      tokens=tokens,
      mask=ones,
      ref_logps=ref_logps[tokens[:, 0]],
      labels=problem["labels"],  # the rate of good labels: the loss is its exact mean over labels
      mismatched_tokens=other,
      mismatched_mask=ones,
      mismatched_ref_logps=ref_logps[other[:, 0]],
    )

  def method(label, on_policy, exact, tolerance):
    return bandit_grid.Method(
      label=label,
      algorithm=kto,
      config=lambda beta: kto.Config(beta=beta),
      batch=functools.partial(batch, on_policy=on_policy),
      # Draws from the policy are noisy, so their batch is larger.
      problems=problems(-(-config.data.batch_size // int(counts[0].sum())) if on_policy else 1),
      start=ref_logps,
      exact=exact,
      tolerance=tolerance,
    )

  each = np.array(betas)[:, None]
  no_kl, own_kl = (
    population_optimum(gains, ref_logps, each, np.zeros(len(gains))),
    self_consistent_optimum(gains, ref_logps, each),
  )
  methods = {
    "data": method("KTO, z from the data", False, no_kl, 1e-3),
    # z is a noisy mean over draws; only the decay of the step size averages it out.
    "policy": method("KTO, z = KL", True, own_kl, 0.02),
  }

  def findings(sweep, ends):
    del sweep
    checks, table = [], []
    least = -np.log(np.where(gains > 0, np.exp(ref_logps), 0).sum(1))
    shares = np.maximum(gains, 0) / np.maximum(gains, 0).sum(1, keepdims=True)
    for i, beta in enumerate(betas):
      found = ends["data"][i]
      kept = np.where(gains < 0, found, 0).sum(1)
      checks.append(
        (f"beta {beta}: bad arms keep a probability below 0.001", bool(kept.max() < 1e-3))
      )
      tilted = np.exp(oracles.kl_regularised_optimum(ref_logps, rates, beta))
      apart = np.abs(found - tilted).max(1)
      moved = np.abs(found - np.exp(ref_logps)).max(1).min() > 0.01
      checks.append(
        (f"beta {beta}: the policy is not ref exp(rate / beta)", bool(moved and apart.min() > 0.01))
      )
      between = np.abs(found - ends["policy"][i]).max(1)
      from_shares = np.abs(found - shares).max(1)
      if beta == max(betas):
        text = "the optimum depends on the reference point (mean difference above 0.01)"
        checks.append((f"beta {beta}: {text}", bool(between.mean() > 0.01)))
      if beta == min(betas) <= 0.1:
        text = "good arms have probabilities proportional to gains (within 0.05)"
        checks.append((f"beta {beta}: {text}", bool(from_shares.max() < 0.05)))
      with np.errstate(divide="ignore"):
        distance = oracles.kl(np.log(found), ref_logps)
      cells = (apart, from_shares, between, distance, least)
      table.append([beta, *(statistics.mean_interval(cell, method="log") for cell in cells)])
    columns = ["beta", "to ref exp(rate / beta)", "to gains", "to z = KL", "KL to ref"]
    title = (
      "KTO with z from the data: largest differences in probability and KL, mean over the problems"
    )
    return checks, [results.Table(title, [*columns, "least KL without bad arms"], table)]

  return bandit_grid.build(
    config, methods, betas, symbol="beta", optimizer=bandits.cosine_adam(config), findings=findings
  )


def _good_rates(config: Any) -> np.ndarray:
  """Returns the rates of good labels `[P, A]`: above 0.6 for half of the arms, else below 0.4."""
  rng = np.random.default_rng(config.seed + 1)
  shape = (config.data.num_bandits, config.data.num_arms)
  mostly = rng.permuted(np.tile(np.arange(shape[1]) % 2 == 0, (shape[0], 1)), axis=1)
  return np.where(mostly, rng.uniform(0.6, 0.9, shape), rng.uniform(0.1, 0.4, shape))
