"""Exact answers on tabular problems: where every loss of this package must end up.

All take hyper-parameters positionally or by name, are batched over leading axes, and return
arrays in the dtype of `ref_logps` (or of the first argument). NumPy inputs are computed with NumPy,
so float64 works without touching JAX's settings; JAX inputs with JAX, so all but
`ipo_dataset_optimum`, `bradley_terry_scores` and `regularised_nash` (and what is made from it) can
be traced. A sequence model is tabular too, once its completions are enumerated.

Why they are exact: max over pi of E_pi[f] - tau KL(pi || ref) has the one solution
ref exp(f / tau) / Z with value tau log Z, and the value lost by another policy is
tau KL(pi || solution).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse.csgraph
import scipy.special

from alignment import checks, nash_solvers

Array = Any  # a NumPy array in gives a NumPy array out, a JAX array a JAX array


def kl_regularised_optimum(ref_logps: Array, scores: Array, temperature: Any) -> Array:
  """Returns the log-probabilities of argmax_pi E_pi[score] - temperature KL(pi || ref).

  Args:
    ref_logps: `[..., A]` log-probabilities of the reference; -inf outside its support.
    scores: `[..., A]` what is maximised.
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
  xp, ref_logps, scores = _arrays(ref_logps=ref_logps, scores=scores)
  return _normalise(xp, ref_logps + scores / temperature, ref_logps.dtype)


def optimal_value(ref_logps: Array, scores: Array, temperature: Any) -> Array:
  """Returns J* `[...]` = temperature * log E_ref[exp(score / temperature)], the best objective."""
  checks.positive("temperature", temperature)
  xp, ref_logps, scores = _arrays(ref_logps=ref_logps, scores=scores)
  value = temperature * _logsumexp(xp, ref_logps + scores / temperature)[..., 0]
  return value.astype(ref_logps.dtype)


def identity(probs: Array) -> Array:
  """Returns its argument: the Psi of IPO."""
  return probs


def psi_po_optimum(
  preferences: Array,
  behaviour_probs: Array,
  ref_logps: Array,
  tau: Any,
  psi: Callable[[Array], Array] = identity,
) -> Array:
  """Returns the log-probabilities of the Psi-PO optimum, ref * exp(g / tau) normalised.

  g(y) = E_{y' ~ mu}[Psi(P(y beats y'))]; the default Psi is IPO's. The optimum depends on mu,
  except for two actions under the identity.

  Args:
    preferences: `[..., A, A]`, entry i, j is P(i beats j); entry j, i must be 1 minus it.
    behaviour_probs: `[..., A]` mu, sums to 1.
    ref_logps: `[..., A]`.
    tau: positive.
    psi: elementwise function on [0, 1].

  Returns:
    `[..., A]` normalised log-probabilities.

  Raises:
    ValueError: if the shapes do not fit, `tau` is not positive, or concrete `preferences` or
      `behaviour_probs` are not what they must be.

  Example:
    >>> preferences = np.array([[0.5, 1.0], [0.0, 0.5]])  # the first arm always wins
    >>> np.exp(psi_po_optimum(preferences, [0.5, 0.5], np.log([0.5, 0.5]), 0.5)).round(4)
    array([0.7311, 0.2689])

  Reference: Azar et al. 2023, https://arxiv.org/abs/2310.12036, section 4.
  """
  checks.positive("tau", tau)
  _check_preferences(preferences, behaviour_probs)
  xp, ref_logps, behaviour_probs = _arrays(ref_logps=ref_logps, behaviour_probs=behaviour_probs)
  opponents = behaviour_probs[..., None, :]
  with np.errstate(divide="ignore", invalid="ignore"):
    utilities = xp.asarray(psi(xp.asarray(preferences)))
    weighted = xp.where(opponents > 0, opponents * utilities, 0)
  return _normalise(xp, ref_logps + weighted.sum(-1) / tau, ref_logps.dtype)


def ipo_dataset_optimum(
  chosen_ids: Array, rejected_ids: Array, ref_logps: Array, tau: Any
) -> Array:
  """Returns the exact minimiser of the IPO loss on a finite data set of hard-labelled pairs.

  With u = logits - log ref, c = 1 / (2 tau), the Laplacian L of the graph of observed pairs and
  b = wins - losses, the loss is least where L u = c b. The data fix u only up to a constant on
  each connected component of the graph: here the mean of u is zero on each, which is where
  gradient descent ends that starts from the reference (actions never seen keep u = 0).

  Args:
    chosen_ids: `[..., N]` int in [0, A), the winners.
    rejected_ids: `[..., N]` int, the losers; a pair of twice the same action says nothing.
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
  xp, ref_logps = _arrays(ref_logps=ref_logps)
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
  chosen, rejected = (
    np.broadcast_to(array.astype(np.intp), batch_shape + array.shape[-1:]) for array in ids
  )
  shifts = np.zeros((*batch_shape, num_actions))
  for index in np.ndindex(*batch_shape):
    shifts[index] = _laplacian_solve(chosen[index], rejected[index], num_actions)
  return _normalise(xp, ref_logps + xp.asarray(shifts / (2 * tau)), ref_logps.dtype)


def copg_optimum(ref_logps: Array, rewards: Array, beta: Any) -> Array:
  """Returns the log-probabilities of CoPG's optimum, ref * exp(R / beta) normalised.

  Whatever the data were drawn from: it is also the exact minimiser on every finite data set
  whose pairs connect all actions.

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

  The value is tau log E_ref[exp(r / tau)]. Both are unique where the data cover the
  support of the reference, whatever they were drawn from.

  Args:
    ref_logps: `[..., A]`.
    rewards: `[..., A]` expected rewards.
    tau: positive.

  Raises:
    ValueError: if the shapes do not fit or `tau` is not positive.

  Example:
    >>> logps, value = dro_optimum(np.log(np.ones(3) / 3), np.array([1.0, 0.0, -1.0]), tau=1.0)
    >>> np.exp(logps).round(4), value.round(4)
    (array([0.6652, 0.2447, 0.09  ]), np.float64(0.309))

  Reference: Richemond et al. 2024, https://arxiv.org/abs/2405.19107, theorem 1.
  """
  checks.positive("tau", tau)
  return kl_regularised_optimum(ref_logps, rewards, tau), optimal_value(ref_logps, rewards, tau)


def srpo_optimum(
  preferences: Array, ref_logps: Array, revision_ref_logps: Array, beta: Any
) -> tuple[Array, Array]:
  """Returns SRPO's saddle point: log-probabilities of the answer and of its rewrite.

  pi'(y2 | y1) = ref'(y2 | y1) exp(P(y2 beats y1) / beta) / Z(y1), and pi = ref / Z, normalised.
  What the data were drawn from appears nowhere, and neither does alpha.

  Args:
    preferences: `[..., A, A]`, entry i, j is P(i beats j); entry j, i must be 1 minus it.
    ref_logps: `[..., A]` of the reference that answers.
    revision_ref_logps: `[..., A, A]`, entry y1, y2 is log ref'(y2 | y1).
    beta: positive.

  Returns:
    `[..., A]` log pi and `[..., A, A]` log pi', the row being what is rewritten.

  Raises:
    ValueError: if the shapes do not fit, `preferences` are no preferences or `beta` is not
      positive.

  Example:
    >>> robust = np.array([[0.5, 0.99, 0.3], [0.01, 0.5, 0.25], [0.7, 0.75, 0.5]])
    >>> uniform = np.log(np.ones((3, 3)) / 3)
    >>> np.exp(srpo_optimum(robust, uniform[0], uniform, beta=0.1)[0]).round(3)
    array([0.126, 0.007, 0.867])

  Reference: Choi et al. 2024, https://arxiv.org/abs/2406.01660, section 3.
  """
  checks.positive("beta", beta)
  xp, ref_logps, revision_ref_logps = _arrays(
    ref_logps=ref_logps, revision_ref_logps=revision_ref_logps
  )
  _check_preferences(preferences, xp.exp(ref_logps), name="exp(ref_logps)")
  if revision_ref_logps.shape[-2:] != np.shape(preferences)[-2:]:
    raise ValueError(
      f"revision_ref_logps must have shape [..., A, A], got {list(revision_ref_logps.shape)}"
    )
  if not isinstance(revision_ref_logps, jax.core.Tracer):
    sums = np.exp(revision_ref_logps).sum(-1)
    if not np.allclose(sums, 1, atol=1e-4):  # float32 inputs, rounded by whoever made them
      raise ValueError(
        "revision_ref_logps must be normalised over its last axis, the rewrite (rows are what is "
        f"rewritten); exp sums to {sums}"
      )
  improved = revision_ref_logps + xp.swapaxes(xp.asarray(preferences), -1, -2) / beta
  normaliser = _logsumexp(xp, improved)
  rewrite = (improved - normaliser).astype(ref_logps.dtype)
  return _normalise(xp, ref_logps - normaliser[..., 0], ref_logps.dtype), rewrite


def regularised_nash(
  preferences: Array, ref_logps: Array, tau: Any, *, solver: str = "newton"
) -> Array:
  """Returns the log-probabilities of the Nash equilibrium of the regularised preference game.

  Both players earn P(pi beats pi') - tau KL(pi || ref) + tau KL(pi' || ref); the one equilibrium
  is symmetric and solves pi = ref exp(P(. beats pi) / tau), normalised. The two solvers share
  nothing but that equation and agree to 1e-10, down to tau = 0.01: "newton" follows the solution
  from a large tau down, "mirror_prox" is the extragradient method, whose error shrinks by about
  1 - tau / 2 an iteration. (Damped iteration of the equation stalls for small tau.)

  Args:
    preferences: `[..., A, A]`, entry i, j is P(i beats j); entry j, i must be 1 minus it.
    ref_logps: `[..., A]`; -inf outside the support, where the equilibrium never goes.
    tau: positive.
    solver: "newton" or "mirror_prox".

  Returns:
    `[..., A]` normalised log-probabilities.

  Raises:
    ValueError: if the shapes do not fit, `preferences` are no preferences, `tau` is not positive
      or `solver` is unknown.

  Example:
    >>> cycle = np.array([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]])
    >>> np.exp(regularised_nash(cycle, np.log([0.6, 0.3, 0.1]), 0.1)).round(4)
    array([0.4927, 0.1541, 0.3531])

  Reference: Munos et al. 2023, https://arxiv.org/abs/2312.00886, proposition 1.
  """
  checks.positive("tau", tau)
  checks.choice("solver", solver, ("newton", "mirror_prox"))
  xp, ref_logps = _arrays(ref_logps=ref_logps)
  _check_preferences(preferences, np.exp(ref_logps), name="exp(ref_logps)")
  matrix, reference = np.asarray(preferences, float), np.asarray(ref_logps, float)
  batch_shape = np.broadcast_shapes(matrix.shape[:-2], reference.shape[:-1])
  matrix = np.broadcast_to(matrix, (*batch_shape, *matrix.shape[-2:]))
  reference = np.broadcast_to(reference, (*batch_shape, reference.shape[-1]))
  temperatures = np.broadcast_to(np.asarray(tau, float), batch_shape)
  solve = {"newton": nash_solvers.newton, "mirror_prox": nash_solvers.mirror_prox}[solver]
  logps = np.full(reference.shape, -np.inf)
  for index in np.ndindex(*batch_shape):
    support = np.flatnonzero(reference[index] > -np.inf)
    logps[index][support] = solve(
      matrix[index][np.ix_(support, support)], reference[index][support], float(temperatures[index])
    )
  return xp.asarray(logps).astype(ref_logps.dtype)


def bradley_terry_scores(preferences: Array, weights: Array) -> Array:
  """Returns the rewards whose Bradley-Terry model has the least log-loss on labelled pairs.

  argmin over s of sum over i, j of weights_ij H(P(i beats j), sigmoid(s_i - s_j)), H the
  cross-entropy: the rewards themselves, up to a constant, where preferences are Bradley-Terry; a
  projection that depends on who wrote the pairs where they are not. DPO ends at
  ref * exp(scores / beta), normalised. Zermelo's iteration, which converges from everywhere.

  Args:
    preferences: `[..., A, A]`, entry i, j is P(i beats j); entry j, i must be 1 minus it.
    weights: `[..., A, A]` how often i and j are compared, non-negative; counts i, j and j, i are
      added, the diagonal says nothing.

  Returns:
    `[..., A]` scores with mean zero, a NumPy array.

  Raises:
    ValueError: if the shapes do not fit, an argument is out of range, or scores grow for ever: some
      actions never lose to (or are never compared with) the others.

  Example:
    >>> rewards = np.array([1.0, 0.0, -1.0])
    >>> preferences = 1 / (1 + np.exp(rewards[None, :] - rewards[:, None]))
    >>> bradley_terry_scores(preferences, np.ones((3, 3))).round(6)
    array([ 1.,  0., -1.])

  Reference: Zermelo 1929; Hunter 2004, https://doi.org/10.1214/aos/1079120141, section 2.
  """
  preferences, weights = np.asarray(preferences, float), np.asarray(weights, float)
  num_actions = np.shape(preferences)[-1] if np.ndim(preferences) else 0
  _check_preferences(preferences, np.full(num_actions, 1 / max(num_actions, 1)), name="actions")
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
        "preferences and weights have no finite scores: every action must beat, directly or over "
        f"others, every other one with a positive probability, got wins {wins}"
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
    f"the scores still move by {moved:.0e} after 100,000 iterations: preferences lie too near 0 or "
    f"1, or weights differ by too much, got {preferences} and {weights}"
  )


def regularised_exploitability(
  logps: Array, preferences: Array, ref_logps: Array, tau: Any
) -> Array:
  """Returns what the best opponent gains against a policy in the regularised preference game.

  max over pi' of P_tau(pi' beats pi) - 1/2 = tau log E_ref[exp(P(. beats pi) / tau)]
  + tau KL(pi || ref) - 1/2: zero at `regularised_nash` and positive elsewhere. It needs no solver.

  Args:
    logps: `[..., A]` log-probabilities of the policy.
    preferences: `[..., A, A]`.
    ref_logps: `[..., A]`.
    tau: positive.

  Returns:
    `[...]` in units of the preference.

  Raises:
    ValueError: if the shapes do not fit or `tau` is not positive.
  """
  checks.positive("tau", tau)
  divergence = kl(logps, ref_logps)
  xp, logps, ref_logps = _arrays(logps=logps, ref_logps=ref_logps)
  _check_preferences(preferences, xp.exp(ref_logps), name="exp(ref_logps)")
  wins = (xp.asarray(preferences) * xp.exp(logps)[..., None, :]).sum(-1)
  best = optimal_value(ref_logps, wins, tau)
  return (best + tau * divergence - 0.5).astype(logps.dtype)


def nash_md_pg_fixed_point(preferences: Array, ref_logps: Array, tau: Any, beta: float) -> Array:
  """Returns the log-probabilities where Nash-MD-PG stops: not the Nash equilibrium for beta > 0.

  pi = ref exp(P(. beats mixture) / tau), normalised, against the mixture pi^(1 - beta) ref^beta,
  which itself is the Nash equilibrium at the temperature tau / (1 - beta). Tabular Nash-MD with
  the constant step eta = beta / tau stops there too. beta = 0 is self-play and gives
  `regularised_nash`; beta = 1 the best response to the reference.

  Args:
    preferences: `[..., A, A]`.
    ref_logps: `[..., A]`.
    tau: positive.
    beta: in [0, 1], weight of the reference in the mixture.

  Returns:
    `[..., A]` normalised log-probabilities.

  Raises:
    ValueError: as `regularised_nash`, or if `beta` lies outside [0, 1].
  """
  checks.positive("tau", tau)
  checks.probabilities("beta", beta)
  xp, ref_logps = _arrays(ref_logps=ref_logps)
  opponent = ref_logps if beta == 1 else regularised_nash(preferences, ref_logps, tau / (1 - beta))
  wins = (xp.asarray(preferences) * xp.exp(opponent)[..., None, :]).sum(-1)
  return kl_regularised_optimum(ref_logps, wins, tau)


def objective(logps: Array, ref_logps: Array, rewards: Array, temperature: Any) -> Array:
  """Returns J `[...]` = E_pi[R] - temperature KL(pi || ref).

  Args:
    logps: `[..., A]` log-probabilities of the policy; -inf where it never goes.
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
  xp, logps, rewards = _arrays(logps=logps, rewards=rewards)
  return ((xp.exp(logps) * rewards).sum(-1) - temperature * divergence).astype(logps.dtype)


def regret(logps: Array, ref_logps: Array, rewards: Array, temperature: Any) -> Array:
  """Returns J* - J(pi) `[...]`, never negative.

  Computed as temperature * KL(pi || pi*), which is the same and does not cancel near the optimum.

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

  Actions that pi never takes count nothing; infinite where pi leaves the support of the other.

  Raises:
    ValueError: if the shapes do not fit.

  Example:
    >>> print(kl(np.log([0.5, 0.5]), np.log([0.25, 0.75])).round(4))
    0.1438
  """
  xp, logps, other_logps = _arrays(logps=logps, other_logps=other_logps)
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


def _arrays(**named: Any) -> tuple[Any, ...]:
  """Returns NumPy or jax.numpy, and the arguments as its arrays with equal last axes, floating."""
  xp = jnp if any(isinstance(array, jax.Array) for array in named.values()) else np
  arrays = []
  for name, value in named.items():
    array = xp.asarray(value)
    array = array if xp.issubdtype(array.dtype, xp.floating) else array.astype(float)
    if array.ndim == 0:
      raise ValueError(f"{name} must have shape [..., A], got a scalar")
    if not isinstance(array, jax.core.Tracer) and np.isnan(array).any():
      raise ValueError(f"{name} must not contain NaN, got {array}")
    arrays.append(array)
  if len({array.shape[-1] for array in arrays}) > 1:
    shapes = ", ".join(f"{name} {list(np.shape(value))}" for name, value in named.items())
    raise ValueError(f"the last axes must be equal (actions), got {shapes}")
  return (xp, *arrays)


def _logsumexp(xp: Any, logits: Array) -> Array:
  function = scipy.special.logsumexp if xp is np else jax.nn.logsumexp
  return function(logits, axis=-1, keepdims=True)


def _normalise(xp: Any, logits: Array, dtype: Any) -> Array:
  return (logits - _logsumexp(xp, logits)).astype(dtype)


def _check_preferences(
  preferences: Any, behaviour_probs: Any, name: str = "behaviour_probs"
) -> None:
  num_actions = np.shape(behaviour_probs)[-1] if np.ndim(behaviour_probs) else 0
  if np.ndim(preferences) < 2 or np.shape(preferences)[-2:] != (num_actions, num_actions):
    raise ValueError(
      f"preferences and {name} must have shapes [..., A, A] and [..., A], got "
      f"{list(np.shape(preferences))} and {list(np.shape(behaviour_probs))}"
    )
  if isinstance(preferences, jax.core.Tracer) or isinstance(behaviour_probs, jax.core.Tracer):
    return
  matrix, probs = np.asarray(preferences, float), np.asarray(behaviour_probs, float)
  checks.antisymmetric("preferences", matrix)
  checks.probabilities(name, probs)
  if not np.allclose(probs.sum(-1), 1, atol=1e-4):
    raise ValueError(f"{name} must sum to 1, got {behaviour_probs}")
