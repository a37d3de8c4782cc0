"""Two independent solvers of l = log_softmax(ref + P softmax(l) / tau), for `oracles`.

The equation of the regularised preference game's equilibrium, on its support, in float64 NumPy.
Both take `preferences` `[A, A]`, finite `ref_logps` `[A]` and `tau`, and return l `[A]`.
"""

import numpy as np
import scipy.special


def newton(preferences: np.ndarray, ref_logps: np.ndarray, tau: float) -> np.ndarray:
  """Newton's method on the equation, followed down from a large tau."""
  logps = ref_logps - scipy.special.logsumexp(ref_logps)
  temperature = max(tau, 2.0)
  while True:
    for _ in range(50):
      residual, jacobian = _residual(logps, preferences, ref_logps, temperature)
      size = np.abs(residual).max()
      if size < 1e-13:
        break
      direction, rate = np.linalg.solve(jacobian, residual), 1.0
      while rate > 1e-4:
        trial = logps - rate * direction
        trial -= scipy.special.logsumexp(trial)
        if np.abs(_residual(trial, preferences, ref_logps, temperature)[0]).max() < size:
          break
        rate /= 2
      else:
        break  # rounding: no step makes the residual smaller
      logps = trial
    if temperature == tau:
      return logps
    temperature = max(tau, 0.7 * temperature)


def _residual(logps, preferences, ref_logps, tau):
  probs = np.exp(logps)
  logits = ref_logps + preferences @ probs / tau
  target = logits - scipy.special.logsumexp(logits)
  slope = preferences * probs - np.outer(preferences @ probs, probs)  # d (P softmax(l)) / d l
  return logps - target, np.eye(len(logps)) - (slope - np.exp(target) @ slope) / tau


def mirror_prox(preferences: np.ndarray, ref_logps: np.ndarray, tau: float) -> np.ndarray:
  """Extragradient in the logits: a step from where the first step has led."""
  ref_logps = ref_logps - scipy.special.logsumexp(ref_logps)
  rate = 1 / (2 * (0.5 + tau))
  logps = ref_logps

  def step(opponent):
    moved = (1 - rate * tau) * logps + rate * tau * ref_logps
    moved = moved + rate * (preferences @ np.exp(opponent))
    return moved - scipy.special.logsumexp(moved)

  for _ in range(1_000_000):
    new = step(step(logps))
    # The distance left is at most the last step divided by 1 - contraction.
    if np.abs(new - logps).max() < 1e-14 * max(1.0, np.abs(logps).max()):
      return new
    logps = new
  return logps
