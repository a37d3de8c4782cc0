"""Preference games: the equilibria at which Nash-MD, online IPO and SRPO must end.

A preference P(i beats j), possibly cyclic, defines a game between two policies, and a KL penalty
towards a reference makes its equilibrium unique. The conventions are those of `oracles`.
`regularised_nash` and `nash_md_pg_fixed_point`, which calls it, run in NumPy and cannot be traced.
"""

from typing import Any

import numpy as np
import scipy.special

from alignment import oracles, tabular
from sharding import checks

Array = tabular.Array


def regularised_nash(
  preferences: Array, ref_logps: Array, tau: Any, *, solver: str = "newton"
) -> Array:
  """Returns the log-probabilities of the Nash equilibrium of the regularised preference game.

  Both players earn P(pi beats pi') - tau KL(pi || ref) + tau KL(pi' || ref). The equilibrium is
  unique and symmetric, and solves pi = ref exp(P(. beats pi) / tau), normalised. There are two
  independent solvers, which agree to 1e-10 down to tau = 0.01. "newton" starts at a large tau and
  follows the solution down to the one asked for. "mirror_prox" is the extragradient method; its
  error shrinks by about 1 - tau / 2 in each iteration. (Damped iteration of the equation stalls
  for small tau.)

  Args:
    preferences: `[..., A, A]`, entry i, j is P(i beats j); entry j, i must be 1 minus it.
    ref_logps: `[..., A]`; -inf outside the support of the reference, which is the equilibrium's
      support too.
    tau: positive.
    solver: "newton" or "mirror_prox".

  Returns:
    `[..., A]` normalised log-probabilities.

  Raises:
    ValueError: if the shapes do not fit, `preferences` is not a preference matrix, `tau` is not
      positive, `solver` is unknown, or the solver stops before it has converged.

  Example:
    >>> cycle = np.array([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]])
    >>> np.exp(regularised_nash(cycle, np.log([0.6, 0.3, 0.1]), 0.1)).round(4)
    array([0.4927, 0.1541, 0.3531])

  Reference: Munos et al. 2023, https://arxiv.org/abs/2312.00886, proposition 1.
  """
  checks.positive("tau", tau)
  checks.choice("solver", solver, _SOLVERS)
  xp, ref_logps = tabular.arrays(ref_logps=ref_logps)
  _check_game(xp, preferences, ref_logps)
  matrix, reference = np.asarray(preferences, float), np.asarray(ref_logps, float)
  batch_shape = np.broadcast_shapes(matrix.shape[:-2], reference.shape[:-1])
  tabular.per_problem(np, "tau", tau, batch_shape)  # refuses what does not fit
  batch_shape = np.broadcast_shapes(batch_shape, np.shape(tau))
  matrix = np.broadcast_to(matrix, (*batch_shape, *matrix.shape[-2:]))
  reference = np.broadcast_to(reference, (*batch_shape, reference.shape[-1]))
  temperatures = np.broadcast_to(np.asarray(tau, float), batch_shape)
  logps = np.full(reference.shape, -np.inf)
  for index in np.ndindex(*batch_shape):
    support = np.flatnonzero(reference[index] > -np.inf)
    game = (
      matrix[index][np.ix_(support, support)],
      reference[index][support],
      float(temperatures[index]),
    )
    solution = _SOLVERS[solver](*game)
    error = np.abs(_residual(solution, *game)[0]).max()
    # Both stop near 1e-13 of the largest log-probability.
    if not error < 1e-9 * max(1.0, np.abs(solution).max()):
      raise ValueError(
        f"the solver {solver!r} did not converge at tau {game[2]}: the fixed-point equation is "
        f"off by {error:.1e} in log-probability; choose the other solver or a larger tau, or leave "
        f"out actions that the reference almost never takes (least: {np.exp(game[1].min()):.1e})"
      )
    logps[index][support] = solution
  return xp.asarray(logps).astype(ref_logps.dtype)


def regularised_exploitability(
  logps: Array, preferences: Array, ref_logps: Array, tau: Any
) -> Array:
  """Returns what the best opponent gains against a policy in the regularised preference game.

  It is max over pi' of P_tau(pi' beats pi) - 1/2 = tau log E_ref[exp(P(. beats pi) / tau)]
  + tau KL(pi || ref) - 1/2: zero at `regularised_nash` and positive elsewhere. No solver is needed.

  Args:
    logps: `[..., A]` log-probabilities of the policy.
    preferences: `[..., A, A]`.
    ref_logps: `[..., A]`.
    tau: positive.

  Returns:
    `[...]` in units of the preference.

  Raises:
    ValueError: if the shapes do not fit, `preferences` is not a preference matrix or `tau` is not
      positive.
  """
  checks.positive("tau", tau)
  divergence = oracles.kl(logps, ref_logps)
  xp, logps, ref_logps = tabular.arrays(logps=logps, ref_logps=ref_logps)
  _check_game(xp, preferences, ref_logps)
  wins = (xp.asarray(preferences) * xp.exp(logps)[..., None, :]).sum(-1)
  best = oracles.optimal_value(ref_logps, wins, tau)
  return (best + tau * divergence - 0.5).astype(logps.dtype)


def nash_md_pg_fixed_point(preferences: Array, ref_logps: Array, tau: Any, beta: float) -> Array:
  """Returns the log-probabilities where Nash-MD-PG stops: not the Nash equilibrium for beta > 0.

  The fixed point is pi = ref exp(P(. beats mixture) / tau), normalised. Its opponent is the mixture
  pi^(1 - beta) ref^beta, which is itself the Nash equilibrium for the temperature tau / (1 - beta).
  Tabular Nash-MD with the constant step eta = beta / tau stops there too. beta = 0 is self-play and
  gives `regularised_nash`; beta = 1 gives the best response to the reference.

  Args:
    preferences: `[..., A, A]`.
    ref_logps: `[..., A]`.
    tau: positive.
    beta: one number in [0, 1], the weight of the reference in the mixture.

  Returns:
    `[..., A]` normalised log-probabilities.

  Raises:
    ValueError: as `regularised_nash`, or if `beta` is not one number in [0, 1].
  """
  checks.positive("tau", tau)
  checks.shape("beta", beta, (), "[]")
  checks.probabilities("beta", beta)
  xp, ref_logps = tabular.arrays(ref_logps=ref_logps)
  opponent = ref_logps if beta == 1 else regularised_nash(preferences, ref_logps, tau / (1 - beta))
  wins = (xp.asarray(preferences) * xp.exp(opponent)[..., None, :]).sum(-1)
  return oracles.kl_regularised_optimum(ref_logps, wins, tau)


def srpo_optimum(
  preferences: Array, ref_logps: Array, revision_ref_logps: Array, beta: Any
) -> tuple[Array, Array]:
  """Returns SRPO's saddle point: log-probabilities of the answer and of its revision.

  pi'(y2 | y1) = ref'(y2 | y1) exp(P(y2 beats y1) / beta) / Z(y1), and pi = ref / Z, normalised.
  Neither depends on the policy that drew the data, nor on alpha.

  Args:
    preferences: `[..., A, A]`, entry i, j is P(i beats j); entry j, i must be 1 minus it.
    ref_logps: `[..., A]` of the reference that answers.
    revision_ref_logps: `[..., A, A]`, entry y1, y2 is log ref'(y2 | y1).
    beta: positive.

  Returns:
    `[..., A]` log pi and `[..., A, A]` log pi'; each row of pi' revises one answer.

  Raises:
    ValueError: if the shapes do not fit, `preferences` is not a preference matrix or `beta` is not
      positive.

  Example:
    >>> robust = np.array([[0.5, 0.99, 0.3], [0.01, 0.5, 0.25], [0.7, 0.75, 0.5]])
    >>> uniform = np.log(np.ones((3, 3)) / 3)
    >>> np.exp(srpo_optimum(robust, uniform[0], uniform, beta=0.1)[0]).round(3)
    array([0.126, 0.007, 0.867])

  Reference: Choi et al. 2024, https://arxiv.org/abs/2406.01660, section 3.
  """
  checks.positive("beta", beta)
  xp, ref_logps, revision_ref_logps = tabular.arrays(
    ref_logps=ref_logps, revision_ref_logps=revision_ref_logps
  )
  _check_game(xp, preferences, ref_logps)
  if revision_ref_logps.shape[-2:] != np.shape(preferences)[-2:]:
    raise ValueError(
      f"revision_ref_logps must have shape [..., A, A], got {list(revision_ref_logps.shape)}"
    )
  checks.distribution("exp(revision_ref_logps)", xp.exp(revision_ref_logps), fetch=True)
  batch_shape = np.broadcast_shapes(revision_ref_logps.shape[:-2], np.shape(preferences)[:-2])
  scale = tabular.per_problem(xp, "beta", beta, batch_shape, axes=2)
  improved = revision_ref_logps + xp.swapaxes(xp.asarray(preferences), -1, -2) / scale
  normaliser = tabular.logsumexp(xp, improved)
  revision = (improved - normaliser).astype(ref_logps.dtype)
  return tabular.normalise(xp, ref_logps - normaliser[..., 0], ref_logps.dtype), revision


def _check_game(xp: Any, preferences: Any, ref_logps: Array) -> None:
  checks.preference_matrix(preferences, fetch=True, ref_logps=ref_logps)
  checks.distribution("exp(ref_logps)", xp.exp(ref_logps), fetch=True)


# --- solvers --------------------------------------------------------------------------------------

# Both solve l = log_softmax(ref + P softmax(l) / tau) on the support of the reference, in float64
# NumPy. They take `preferences` `[A, A]`, finite `ref_logps` `[A]` and `tau`, and return l `[A]`.


def _newton(preferences: np.ndarray, ref_logps: np.ndarray, tau: float) -> np.ndarray:
  """Newton's method on the equation, followed down from a large tau.

  Where the solution at one tau is too far from that at the next, the steps in tau get smaller.
  """
  game = preferences, ref_logps
  temperature = max(tau, 2.0)
  logps, _ = _newton_at(ref_logps - scipy.special.logsumexp(ref_logps), *game, temperature)
  factor = 0.7
  while temperature > tau:
    lower = max(tau, factor * temperature)
    trial, error = _newton_at(logps, *game, lower)
    if error < 1e-10 * max(1.0, np.abs(trial).max()) or factor > 0.999:
      temperature, logps, factor = lower, trial, max(0.7, factor**2)
    else:
      factor = factor**0.5
  return logps


def _newton_at(logps, preferences, ref_logps, tau):
  """Returns the solution that damped Newton steps reach from `logps`, and its residual."""
  for _ in range(50):
    residual, jacobian = _residual(logps, preferences, ref_logps, tau)
    size = np.abs(residual).max()
    if size < 1e-13:
      break
    direction, rate = np.linalg.solve(jacobian, residual), 1.0
    while rate > 1e-4:
      trial = logps - rate * direction
      trial -= scipy.special.logsumexp(trial)
      if np.abs(_residual(trial, preferences, ref_logps, tau)[0]).max() < size:
        break
      rate /= 2
    else:
      break  # rounding: no step makes the residual smaller
    logps = trial
  return logps, size


def _residual(logps, preferences, ref_logps, tau):
  probs = np.exp(logps)
  logits = ref_logps + preferences @ probs / tau
  target = logits - scipy.special.logsumexp(logits)
  slope = preferences * probs - np.outer(preferences @ probs, probs)  # d (P softmax(l)) / d l
  return logps - target, np.eye(len(logps)) - (slope - np.exp(target) @ slope) / tau


def _mirror_prox(preferences: np.ndarray, ref_logps: np.ndarray, tau: float) -> np.ndarray:
  """Extragradient in the logits: the step is taken from the policy that a first step reaches."""
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


_SOLVERS = {"newton": _newton, "mirror_prox": _mirror_prox}
