"""Tables that learn from a Markov reward process: an independent transition from every state."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rl_theory import markov, qtd, quantile_dynamics


def synchronous(mrp: markov.MarkovRewardProcess, **bound: Any) -> Callable[..., Any]:
  """Returns `step(learner, key)`, an update of quantile TD in all states of a process at once.

  Args:
    mrp: the process.
    **bound: the arguments `optimizer` and `config` of `qtd.update`.
  """
  states = jnp.arange(jnp.shape(mrp.transitions)[0])

  def step(learner, key):
    rewards, next_states = markov.sample_step(mrp, key)
    batch = qtd.Batch(states, rewards, next_states)
    return qtd.update(learner, batch, key, apply_fn=qtd.lookup, **bound)[0]

  return step


def fixed_point(
  make: Callable[[], markov.MarkovRewardProcess], *, num_quantiles: int, lam: Any = 0.0
) -> np.ndarray:
  """Returns the fixed point `[S, m]` of the process that `make()` returns, found in float64.

  Levels that meet an atom exactly are decided by rounding, which float32 has too much of.
  """
  with jax.enable_x64(True):
    found = quantile_dynamics.fixed_point(make(), num_quantiles=num_quantiles, lam=lam)
    return np.asarray(found)
