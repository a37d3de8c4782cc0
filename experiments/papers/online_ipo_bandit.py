"""Online IPO and IPO-MD (arXiv:2403.08635): their fixed points on random games with cycles.

Every step draws pairs from pi^(1 - beta) ref^beta. At beta 0 this is online IPO, which ends at the
Nash equilibrium of the regularised game. At a beta in between it is IPO-MD, which ends at the fixed
point of Nash-MD-PG with the same mixture. At beta 1 it is IPO on pairs of the reference, which ends
at the best response to the reference.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from alignment import nash_md, preference_games
from alignment.baselines import online_ipo
from experiments.loop import training
from experiments.report import results, statistics
from experiments.tasks import bandit_grid, bandits

CYCLE = 1.0  # the cyclic part of the log-odds has the same scale as the part that rewards explain


def build(config: Any) -> training.Experiment:
  """Returns the experiment of the preset `bandit`."""
  bandits.check_counts(config, batch_size=1)
  taus, batch_size = bandits.positives(config, "algorithm.tau"), config.data.batch_size
  mixture_beta = config.data.mixture_beta
  if not 0 < mixture_beta < 1:
    raise ValueError(
      f"config.data.mixture_beta={mixture_beta} must lie strictly between 0 and 1: both ends run "
      "anyway"
    )
  grid = bandit_grid.random_bandits(config)
  preferences, ref_logps = grid.preferences(CYCLE), grid.ref_logps

  def method(label, beta):
    def batch(problem, setting, params, key):
      del setting
      preferences, ref_logps = problem
      drawn_from = nash_md.geometric_mixture_logits(params, ref_logps, beta=beta)
      arms = bandits.draw_arms(key, drawn_from, (batch_size, 2))
      ones = jnp.ones((batch_size, 1))
      return online_ipo.Batch(
        first_tokens=arms[:, :1],
        first_mask=ones,
        first_ref_logps=ref_logps[arms[:, 0]],
        second_tokens=arms[:, 1:],
        second_mask=ones,
        second_ref_logps=ref_logps[arms[:, 1]],
        preferences=preferences[arms[:, 0], arms[:, 1]],
      )

    def end(index, tau):
      return preference_games.nash_md_pg_fixed_point(
        preferences[index], ref_logps[index], tau, beta
      )

    places = range(len(ref_logps))
    return bandit_grid.Method(
      label=label,
      algorithm=online_ipo,
      config=lambda tau: online_ipo.Config(tau=tau),
      batch=batch,
      problems=(jnp.asarray(preferences, jnp.float32), jnp.asarray(ref_logps, jnp.float32)),
      start=ref_logps,
      exact=np.exp([[end(index, tau) for index in places] for tau in taus]),
      tolerance=0.01,  # the pairs are random; the decay of the step size averages out most noise
    )

  methods = {
    "online": method("online IPO", 0.0),
    "mixture": method(f"IPO-MD, beta {mixture_beta}", mixture_beta),
    "offline": method("IPO on the reference's pairs", 1.0),
  }

  def findings(sweep, ends):
    del sweep
    checks, rows = [], []
    for i, tau in enumerate(taus):
      exploited = [
        preference_games.regularised_exploitability(
          np.log(ends[name][i]), preferences, ref_logps, tau
        )
        for name in methods
      ]
      means = [x.mean() for x in exploited]
      # The noise of drawn pairs leaves 1e-5 or less.
      rising = bool(means[0] < 1e-4 and means[0] < means[1] < means[2])
      checks.append(
        (f"tau {tau}: exploitability is below 1e-4 for online IPO and rises with beta", rising)
      )
      start = preference_games.regularised_exploitability(ref_logps, preferences, ref_logps, tau)
      cells = (*exploited, start)
      rows.append([tau, *(statistics.mean_interval(x, method="log") for x in cells)])
    columns = ["tau", *(method.label for method in methods.values()), "reference"]
    return checks, [results.Table("Exploitability, mean over the problems", columns, rows)]

  return bandit_grid.build(
    config, methods, taus, symbol="tau", optimizer=bandits.cosine_adam(config), findings=findings
  )
