"""DPO (arXiv:2305.18290), a baseline: its solution on random bandits with and without cycles.

On Bradley-Terry preferences DPO converges to ref exp(r / beta), whatever the distribution of the
pairs. With cycles it converges to the policy of the rewards with the least log-loss. These rewards
depend on the distribution of the pairs, and no tau brings IPO's optima to the same policy.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from alignment import ipo, oracles, sequences
from alignment.baselines import dpo
from experiments.loop import training
from experiments.report import results, statistics
from experiments.tasks import bandit_grid, bandits

CYCLE = 1.0  # the cyclic part of the log-odds has the same scale as the part that rewards explain


def build(config: Any) -> training.Experiment:
  """Returns the experiment of the preset `bandit`."""
  betas = bandits.positives(config, "algorithm.beta")
  grid = bandit_grid.random_bandits(config)
  straight, cyclic = grid.preferences(0.0), grid.preferences(CYCLE)
  even, uneven = np.ones_like(grid.counts), grid.counts

  def projection(preferences, counts):
    weights = counts[:, :, None] * counts[:, None, :]
    return oracles.bradley_terry_scores(preferences, weights)

  def method(label, algorithm, field, preferences, counts, ends):
    return bandit_grid.Method(
      label=label,
      algorithm=algorithm,
      config=lambda value: algorithm.Config(**{field: value}),
      batch=lambda problem, setting, params, key: problem,  # all pairs, with their probabilities
      problems=_pairs(grid.ref_logps, preferences, counts),
      start=grid.ref_logps,
      exact=np.exp(np.stack([ends(value) for value in betas])),
      tolerance=1e-3,
    )

  def tilted(scores):
    return lambda beta: oracles.kl_regularised_optimum(grid.ref_logps, scores, beta)

  def ipo_ends(tau):
    writers = uneven / uneven.sum(1, keepdims=True)
    return oracles.psi_po_optimum(cyclic, writers, grid.ref_logps, tau)

  make = functools.partial(method, algorithm=dpo, field="beta")
  methods = {
    "straight": make(
      "DPO, Bradley-Terry", preferences=straight, counts=uneven, ends=tilted(grid.rewards)
    ),
    "uneven": make(
      "DPO, cycles", preferences=cyclic, counts=uneven, ends=tilted(projection(cyclic, uneven))
    ),
    "even": make(
      "DPO, cycles, even pairs",
      preferences=cyclic,
      counts=even,
      ends=tilted(projection(cyclic, even)),
    ),
    "ipo": method("IPO, cycles", ipo, "tau", cyclic, uneven, ipo_ends),
  }

  def findings(sweep, ends):
    del sweep
    checks, rows = [], []
    reachable = np.exp([ipo_ends(tau) for tau in np.geomspace(1e-3, 1e3, 400)])
    for beta, found, other in zip(betas, ends["uneven"], ends["even"], strict=True):
      moved = np.abs(found - np.exp(grid.ref_logps)).max() > 0.01
      gaps = np.abs(reachable - found).max(-1)  # [tau, P]
      common, writer = gaps[gaps.mean(1).argmin()], np.abs(found - other).max(-1)
      for text, distance in (
        ("no tau brings IPO's optima to DPO's", common),
        ("the policy depends on the distribution of pairs", writer),
      ):
        passed = bool(moved and distance.mean() > 0.005)
        checks.append((f"cycles, beta {beta}: {text} (mean difference above 0.005)", passed))
      cells = (common, gaps.min(0), writer)
      rows.append([beta, *(statistics.mean_interval(x, method="log") for x in cells)])
    title = "Cycles: largest difference in probability from DPO's policy, mean over the problems"
    columns = ["beta", "IPO, nearest tau", "IPO, nearest tau of each bandit", "DPO on even pairs"]
    return checks, [results.Table(title, columns, rows)]

  return bandit_grid.build(
    config, methods, betas, symbol="beta", optimizer=bandits.cosine_adam(config), findings=findings
  )


def _pairs(ref_logps: np.ndarray, preferences: np.ndarray, counts: np.ndarray) -> dpo.Batch:
  """Returns every pair of arms as often as it occurs in the data, leaves `[P, N, ...]`."""
  first, second = bandit_grid.pair_arms(counts)
  rows = np.arange(len(counts))[:, None]
  ones = np.ones((*first.shape, 1))
  batch = sequences.PreferenceBatch(
    chosen_tokens=first[..., None],
    chosen_mask=ones,
    chosen_ref_logps=ref_logps[rows, first],
    rejected_tokens=second[..., None],
    rejected_mask=ones,
    rejected_ref_logps=ref_logps[rows, second],
    chosen_probs=preferences[rows, first, second],
  )
  return sequences.PreferenceBatch(*(None if x is None else jnp.asarray(x) for x in batch))
