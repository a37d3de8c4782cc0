"""Online IPO and IPO-MD (arXiv:2403.08635), beside Nash-MD: where they stop, and the LM run.

The problems are random games with cycles. Pairs are drawn at every step from pi^(1 - beta)
ref^beta. With beta 0 this is online IPO, which ends at the Nash equilibrium of the regularised
game. With a beta in between it is IPO-MD, which ends where Nash-MD-PG with the same mixture does.
With beta 1 it is IPO on pairs of the reference, which ends at the best response to it.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from alignment import nash_md, preference_games
from alignment.baselines import online_ipo
from experiments.loop import training
from experiments.report import results, statistics
from experiments.tasks import bandit_grid, bandits

CYCLE = 1.0  # the log-odds that no reward explains are as large as those that one does


def build(config: Any) -> training.Experiment:
  """Returns the experiment of the preset `bandit`."""
  bandits.check_counts(config, batch_size=1)
  taus, batch_size = bandits.positives(config, "algorithm.tau"), config.data.batch_size
  mixture_beta = config.data.mixture_beta
  if not 0 < mixture_beta < 1:
    raise ValueError(
      f"config.data.mixture_beta={mixture_beta}: give a number between 0 and 1; both ends are run "
      "beside it"
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
      tolerance=0.01,  # the pairs are draws, whose noise the step size averages out
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
      # A drawn gradient leaves 1e-5 or less.
      rising = bool(means[0] < 1e-4 and means[0] < means[1] < means[2])
      checks.append((f"tau {tau}: exploitability below 1e-4 online, then rising", rising))
      start = preference_games.regularised_exploitability(ref_logps, preferences, ref_logps, tau)
      rows.append([tau, *(statistics.mean_interval(x) for x in (*exploited, start))])
    columns = ["tau", *(method.label for method in methods.values()), "reference"]
    return checks, [results.Table("Exploitability, mean over the problems", columns, rows)]

  return bandit_grid.build(
    config, methods, taus, symbol="tau", optimizer=bandits.cosine_adam(config), findings=findings
  )
