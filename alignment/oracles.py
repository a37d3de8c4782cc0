"""Closed forms on tabular problems: the optimum at which each loss of this package must end.

A sequence model is tabular too, once its completions are enumerated. The equilibria of preference
games are in `preference_games`.

All functions take hyper-parameters positionally or by name and are batched over leading axes, which
temperatures may have too: `tau` `[T, 1]` with `ref_logps` `[B, A]` gives `[T, B, A]`. They return
arrays in the dtype of `ref_logps` (or of the first argument). NumPy inputs are computed with
NumPy, so float64 works whatever JAX's settings are. JAX inputs are computed with JAX and can be
traced, except by `ipo_dataset_optimum` and `bradley_terry_scores`.

The maximum over pi of E_pi[f] - tau KL(pi || ref) has one solution, ref exp(f / tau) / Z. Its value
is tau log Z, and any other policy loses tau KL(pi || solution).
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import scipy.sparse.csgraph
import scipy.special

from alignment import tabular
from sharding import checks

Array = tabular.Array


def kl_regularised_optimum(ref_logps: Array, scores: Array, temperature: Any) -> Array:
  """Returns the log-probabilities of argmax_pi E_pi[score] - temperature KL(pi || ref).

  Args:
    ref_logps: `[..., A]` log-probabilities of the reference; -inf outside its support.
    scores: `[..., A]` of each action; their expectation is maximised.
    temperature: positive strength of the regulariser, in units of the score per nat.

  Returns:
    `[..., A]` normalised log-probabilities.

  Raises:
    ValueError: if the shapes do not fit, `temperature` is not positive, or `ref_logps` has NaN.

  Example:
    >>> np.exp(kl_regularised_optimum(np.log([0.5, 0.5]), np.array([1.0, 0.0]), 0.5)).round(4)
    array([0.8808, 0.1192])
  """
  checks.positive("temperature", temperature)
  xp, ref_logps, scores = tabular.arrays(ref_logps=ref_logps, scores=scores)
  logits = _tilted(xp, ref_logps, scores, "temperature", temperature)
  return tabular.normalise(xp, logits, ref_logps.dtype)


def optimal_value(ref_logps: Array, scores: Array, temperature: Any) -> Array:
  """Returns J* `[...]` = temperature * log E_ref[exp(score / temperature)], the best objective.

  Args:
    ref_logps: `[..., A]`, normalised: the value depends on its scale.
    scores: `[..., A]`.
    temperature: positive.

  Raises:
    ValueError: if the shapes do not fit, `temperature` is not positive, or the probabilities of the
      reference do not sum to one.
  """
  checks.positive("temperature", temperature)
  xp, ref_logps, scores = tabular.arrays(ref_logps=ref_logps, scores=scores)
  checks.distribution("exp(ref_logps)", xp.exp(ref_logps), fetch=True)
  logits = _tilted(xp, ref_logps, scores, "temperature", temperature)
  value = xp.asarray(temperature) * tabular.logsumexp(xp, logits)[..., 0]
  return value.astype(ref_logps.dtype)


def _tilted(xp: Any, ref_logps: Array, scores: Array, name: str, temperature: Any) -> Array:
  """Returns ref_logps + scores / temperature, `[..., A]`; `name` is the temperature's."""
  batch_shape = np.broadcast_shapes(ref_logps.shape[:-1], scores.shape[:-1])
  logits = ref_logps + scores / tabular.per_problem(xp, name, temperature, batch_shape)
  # What the reference never does stays out, also where its score is infinite.
  return xp.where(ref_logps > -np.inf, logits, -np.inf)


def psi_po_optimum(
  preferences: Array,
  behaviour_probs: Array,
  ref_logps: Array,
  tau: Any,
  psi: Callable[[Array], Array] | None = None,
) -> Array:
  """Returns the log-probabilities of the Psi-PO optimum, ref * exp(g / tau) normalised.

  g(y) = E_{y' ~ mu}[Psi(P(y beats y'))]. The optimum depends on mu, except for two actions under
  the identity.

  Args:
    preferences: `[..., A, A]`, entry i, j is P(i beats j); entry j, i must be 1 minus it.
    behaviour_probs: `[..., A]` mu, sums to 1.
    ref_logps: `[..., A]`.
    tau: positive.
    psi: elementwise function on [0, 1]; None is the identity, IPO's. It may be infinite at 0 and 1.

  Returns:
    `[..., A]` normalised log-probabilities. If g is +inf for one action, that action has
    probability 1: this is the limit of preferences that approach 0 and 1. Where g is -inf, the
    probability is 0.

  Raises:
    ValueError: if the shapes do not fit, `tau` is not positive, `preferences` is not a preference
      matrix, `behaviour_probs` is not a distribution, or g has no limit: it is inf - inf for an
      action, or +inf for several. Traced values pass.

  Example:
    >>> preferences = np.array([[0.5, 1.0], [0.0, 0.5]])  # the first arm always wins
    >>> np.exp(psi_po_optimum(preferences, [0.5, 0.5], np.log([0.5, 0.5]), 0.5)).round(4)
    array([0.7311, 0.2689])

  Reference: Azar et al. 2023, https://arxiv.org/abs/2310.12036, section 4.
  """
  checks.positive("tau", tau)
  checks.preference_matrix(preferences, fetch=True, behaviour_probs=behaviour_probs)
  checks.distribution("behaviour_probs", behaviour_probs, fetch=True)
  xp, ref_logps, behaviour_probs = tabular.arrays(
    ref_logps=ref_logps, behaviour_probs=behaviour_probs
  )
  opponents = behaviour_probs[..., None, :]
  with np.errstate(divide="ignore", invalid="ignore"):
    matrix = xp.asarray(preferences)
    utilities = matrix if psi is None else xp.asarray(psi(matrix))
    # Left out before and after Psi, whose gradient is infinite too.
    absent = (opponents == 0) & ~xp.isfinite(utilities)
    if psi is not None:
      utilities = xp.where(absent, 0, xp.asarray(psi(xp.where(absent, 0.5, matrix))))
    gains = (opponents * utilities).sum(-1)
  # An action outside the reference's support is never taken, whatever it gains.
  gains = xp.where(ref_logps > -np.inf, gains, -np.inf)
  unbounded = gains == np.inf
  if not isinstance(gains, jax.core.Tracer) and (
    np.isnan(gains).any() or (np.sum(unbounded, axis=-1) > 1).any()
  ):
    raise ValueError(
      "psi is infinite at preferences of 0 and 1, and the optimum depends on how fast they are "
      f"approached: E_mu[psi] is {np.asarray(gains)}; clip preferences to [eps, 1 - eps], got "
      f"{np.asarray(matrix)}"
    )
  # The limit where one action gains infinitely much: nothing else keeps any probability.
  certain = unbounded.any(-1)[..., None]
  gains = xp.where(certain, xp.where(unbounded, 0, -np.inf), gains)
  return tabular.normalise(xp, _tilted(xp, ref_logps, gains, "tau", tau), ref_logps.dtype)


def ipo_dataset_optimum(
  chosen_ids: Array, rejected_ids: Array, ref_logps: Array, tau: Any
) -> Array:
  """Returns the exact minimiser of the IPO loss on a finite data set of hard-labelled pairs.

  With u = logits - log ref, c = 1 / (2 tau), the Laplacian L of the graph of observed pairs and
  b = wins - losses, the loss is least where L u = c b. The data determine u up to a constant on
  each connected component of the graph. Here the mean of u is zero on each component: gradient
  descent from the reference ends there, and actions that are never seen keep u = 0.

  Args:
    chosen_ids: `[..., N]` int in [0, A), the winners.
    rejected_ids: `[..., N]` int, the losers; an action paired with itself carries no information.
    ref_logps: `[..., A]`.
    tau: positive.

  Returns:
    `[..., A]` normalised log-probabilities.

  Raises:
    ValueError: if the shapes do not fit, ids lie outside [0, A), or `tau` is not positive.

  Example:
    >>> uniform = np.log(np.ones(3) / 3)
    >>> np.exp(ipo_dataset_optimum([0, 1, 0], [1, 2, 2], uniform, 0.5)).round(4)
    array([0.5627, 0.2889, 0.1483])
  """
  checks.positive("tau", tau)
  xp, ref_logps = tabular.arrays(ref_logps=ref_logps)
  ids = [np.asarray(chosen_ids), np.asarray(rejected_ids)]
  checks.same_shape(chosen_ids=ids[0], rejected_ids=ids[1])
  num_actions = ref_logps.shape[-1]
  for name, array in zip(("chosen_ids", "rejected_ids"), ids, strict=True):
    if array.ndim == 0 or (array.size and not np.issubdtype(array.dtype, np.integer)):
      raise ValueError(
        f"{name} must be integers of shape [..., N], got {array.dtype} {array.shape}"
      )
    if array.size and not (0 <= array.min() and array.max() < num_actions):
      raise ValueError(f"{name} must lie in [0, {num_actions}), got {array.min()} to {array.max()}")
  batch_shape = np.broadcast_shapes(ids[0].shape[:-1], ref_logps.shape[:-1])
  tau = tabular.per_problem(xp, "tau", tau, batch_shape)
  chosen, rejected = (
    np.broadcast_to(array.astype(np.intp), batch_shape + array.shape[-1:]) for array in ids
  )
  shifts = np.zeros((*batch_shape, num_actions))
  for index in np.ndindex(*batch_shape):
    shifts[index] = _laplacian_solve(chosen[index], rejected[index], num_actions)
  return tabular.normalise(xp, ref_logps + xp.asarray(shifts) / (2 * tau), ref_logps.dtype)


def copg_optimum(ref_logps: Array, rewards: Array, beta: Any) -> Array:
  """Returns the log-probabilities of CoPG's optimum, ref * exp(R / beta) normalised.

  It does not depend on the policy that drew the data, and is also the exact minimiser on every
  finite data set whose pairs connect all actions.

  Args:
    ref_logps: `[..., A]`.
    rewards: `[..., A]` expected rewards.
    beta: positive.

  Returns:
    `[..., A]` normalised log-probabilities.

  Raises:
    ValueError: if the shapes do not fit or `beta` is not positive.

  Example:
    >>> uniform = np.log(np.ones(3) / 3)
    >>> np.exp(copg_optimum(uniform, np.array([2.5, 2.0, 1.0]), beta=0.5)).round(4)
    array([0.7054, 0.2595, 0.0351])

  Reference: Flet-Berliac et al. 2024, https://arxiv.org/abs/2406.19185, theorem 1.
  """
  checks.positive("beta", beta)
  return kl_regularised_optimum(ref_logps, rewards, beta)


def dro_optimum(ref_logps: Array, rewards: Array, tau: Any) -> tuple[Array, Array]:
  """Returns DRO's optimal log-probabilities `[..., A]` and value `[...]`.

  The value is tau log E_ref[exp(r / tau)]. Both are unique where the data cover the support of the
  reference, whichever policy drew the data.

  Args:
    ref_logps: `[..., A]`.
    rewards: `[..., A]` expected rewards.
    tau: positive.

  Raises:
    ValueError: if the shapes do not fit, `tau` is not positive, or the probabilities of the
      reference do not sum to one.

  Example:
    >>> logps, value = dro_optimum(np.log(np.ones(3) / 3), np.array([1.0, 0.0, -1.0]), tau=1.0)
    >>> np.exp(logps).round(4), value.round(4)
    (array([0.6652, 0.2447, 0.09  ]), np.float64(0.309))

  Reference: Richemond et al. 2024, https://arxiv.org/abs/2405.19107, theorem 1.
  """
  checks.positive("tau", tau)
  value = optimal_value(ref_logps, rewards, tau)
  return kl_regularised_optimum(ref_logps, rewards, tau), value


def bradley_terry_scores(preferences: Array, weights: Array) -> Array:
  """Returns the rewards whose Bradley-Terry model has the least log-loss on labelled pairs.

  The scores s minimise the sum over i, j of weights_ij H(P(i beats j), sigmoid(s_i - s_j)), where H
  is the cross-entropy. If the preferences are Bradley-Terry, s are the rewards up to a constant; if
  not, s are a projection that depends on which pairs were compared. DPO ends at
  ref * exp(scores / beta), normalised. The method is Zermelo's iteration, which converges from any
  start.

  Args:
    preferences: `[..., A, A]`, entry i, j is P(i beats j); entry j, i must be 1 minus it.
    weights: `[..., A, A]` how often i and j are compared, non-negative. Entries i, j and j, i are
      added, and the diagonal is ignored.

  Returns:
    `[..., A]` scores with mean zero, a NumPy array.

  Raises:
    ValueError: if the shapes do not fit, an argument is out of range, or no finite scores exist:
      some actions never lose to the others, or are never compared with them.

  Example:
    >>> rewards = np.array([1.0, 0.0, -1.0])
    >>> preferences = 1 / (1 + np.exp(rewards[None, :] - rewards[:, None]))
    >>> bradley_terry_scores(preferences, np.ones((3, 3))).round(6)
    array([ 1.,  0., -1.])

  Reference: Zermelo 1929; Hunter 2004, https://doi.org/10.1214/aos/1079120141, section 2.
  """
  preferences, weights = np.asarray(preferences, float), np.asarray(weights, float)
  checks.preference_matrix(preferences)
  num_actions = preferences.shape[-1]
  if weights.ndim < 2 or weights.shape[-2:] != preferences.shape[-2:] or not np.all(weights >= 0):
    raise ValueError(
      f"weights must be non-negative of shape [..., {num_actions}, {num_actions}], as preferences, "
      f"got {weights}"
    )
  counts = (weights + np.swapaxes(weights, -1, -2)) * (1 - np.eye(num_actions))
  wins = counts * preferences
  batch_shape = np.broadcast_shapes(counts.shape[:-2], preferences.shape[:-2])
  for index in np.ndindex(*batch_shape):
    graph = np.broadcast_to(wins, (*batch_shape, num_actions, num_actions))[index] > 0
    if scipy.sparse.csgraph.connected_components(graph, connection="strong")[0] > 1:
      raise ValueError(
        "preferences and weights have no finite scores: every action must have a positive "
        "probability of beating every other action, directly or through a chain of actions; got "
        f"wins {wins}"
      )
  scores = np.zeros((*batch_shape, num_actions))
  for _ in range(100_000):
    strengths = np.exp(scores)
    rates = counts / (strengths[..., :, None] + strengths[..., None, :])
    new = np.log(wins.sum(-1) / rates.sum(-1))
    new -= new.mean(-1, keepdims=True)
    moved, scores = np.abs(new - scores).max(initial=0), new
    if moved < 1e-13:
      return scores
  raise ValueError(
    f"the scores still change by {moved:.0e} after 100,000 iterations: preferences are too close "
    f"to 0 or 1, or weights differ too much, got {preferences} and {weights}"
  )


def objective(logps: Array, ref_logps: Array, rewards: Array, temperature: Any) -> Array:
  """Returns J `[...]` = E_pi[R] - temperature KL(pi || ref).

  Args:
    logps: `[..., A]` log-probabilities of the policy; -inf for actions that it never takes.
    ref_logps: `[..., A]`.
    rewards: `[..., A]`.
    temperature: positive.

  Returns:
    `[...]` values; -inf for a policy that leaves the support of the reference.

  Raises:
    ValueError: if the shapes do not fit or `temperature` is not positive.
  """
  checks.positive("temperature", temperature)
  divergence = kl(logps, ref_logps)
  xp, logps, rewards = tabular.arrays(logps=logps, rewards=rewards)
  return ((xp.exp(logps) * rewards).sum(-1) - temperature * divergence).astype(logps.dtype)


def regret(logps: Array, ref_logps: Array, rewards: Array, temperature: Any) -> Array:
  """Returns J* - J(pi) `[...]`, never negative.

  It is computed as temperature * KL(pi || pi*), which is equal and keeps its precision near the
  optimum.

  Args:
    logps: `[..., A]` log-probabilities of the policy.
    ref_logps: `[..., A]`.
    rewards: `[..., A]`.
    temperature: positive.

  Raises:
    ValueError: if the shapes do not fit or `temperature` is not positive.

  Example:
    >>> uniform = np.log(np.ones(3) / 3)
    >>> print(regret(uniform, uniform, np.array([2.5, 2.0, 1.0]), 0.5).round(6))
    0.291867
  """
  optimum = kl_regularised_optimum(ref_logps, rewards, temperature)
  return temperature * kl(logps, optimum)


def kl(logps: Array, other_logps: Array) -> Array:
  """Returns KL(pi || other) `[...]` in nats from log-probabilities `[..., A]`.

  Actions that pi never takes contribute nothing. The KL is infinite where pi leaves the support of
  the other policy.

  Raises:
    ValueError: if the shapes do not fit.

  Example:
    >>> print(kl(np.log([0.5, 0.5]), np.log([0.25, 0.75])).round(4))
    0.1438
  """
  xp, logps, other_logps = tabular.arrays(logps=logps, other_logps=other_logps)
  taken = logps > -np.inf
  safe = xp.where(taken, logps, 0)
  other = xp.where(taken, other_logps, 0)
  return xp.where(taken, xp.exp(safe) * (safe - other), 0).sum(-1).astype(logps.dtype)


def _laplacian_solve(chosen: np.ndarray, rejected: np.ndarray, num_actions: int) -> np.ndarray:
  """Returns u `[A]` with L u = wins - losses and mean zero on each connected component."""
  counts = np.zeros((num_actions, num_actions))
  np.add.at(counts, (chosen, rejected), 1)
  np.fill_diagonal(counts, 0)
  balance = counts.sum(1) - counts.sum(0)
  pairs = counts + counts.T
  laplacian = np.diag(pairs.sum(1)) - pairs
  shifts = np.zeros(num_actions)
  num_components, labels = scipy.sparse.csgraph.connected_components(pairs, directed=False)
  for component in range(num_components):
    members = np.flatnonzero(labels == component)
    # Adding the constant matrix makes the block regular and picks the solution of mean zero.
    block = laplacian[np.ix_(members, members)] + 1 / len(members)
    shifts[members] = np.linalg.solve(block, balance[members])
  return shifts
