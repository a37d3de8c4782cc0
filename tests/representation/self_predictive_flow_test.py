"""The dynamics in continuous time: what they conserve, where they go, what limits are stable."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_dynamics import FAMILIES, random_chains, random_distributions, random_features

from representation import chain_spectrum, collapse, self_predictive_flow
from rl_theory import transition_matrices

pytestmark = pytest.mark.usefixtures("x64")

flow, integrate = self_predictive_flow.flow, self_predictive_flow.integrate
Variables, Pair = self_predictive_flow.Variables, self_predictive_flow.Pair
trace_objective = self_predictive_flow.trace_objective


def _gram(phi):
  return jnp.swapaxes(phi, -1, -2) @ phi


def _solve(start, chains, distributions=None, *, step, num_steps, **options):
  """Integrates many chains at once; returns their ends."""

  def one(start, chain, distribution):
    slope = functools.partial(flow, transitions=chain, distribution=distribution, **options)
    return integrate(slope, start, step=step, num_steps=num_steps, save_every=num_steps)[0]

  axes = (0, 0, None if distributions is None else 0)
  return jax.jit(jax.vmap(one, axes))(start, chains, distributions)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", [False, True], ids=["no target network", "target network"])
def test_the_gram_matrix_is_constant(family, target):
  """Theorem of non-collapse: for any chain, distribution, start and target."""
  chains, distributions = random_chains(family, 10), random_distributions(10)
  phi = random_features(10, orthonormal=False)
  start = Variables(phi, target=random_features(10, seed=5) if target else None)
  rate = {"target_rate": 0.1} if target else {}
  end = _solve(start, chains, distributions, step=0.2, num_steps=1500, **rate).representation
  # 1e-8: the error of the solver, of order step^4.
  np.testing.assert_allclose(_gram(end), _gram(phi), atol=1e-8)
  assert np.abs(end - phi).max() > 0.1


@pytest.mark.parametrize("target", [False, True], ids=["no target network", "target network"])
def test_a_slow_predictor_conserves_the_difference_of_two_gram_matrices(target):
  """Phi^T Phi - M M^T / ratio is constant, with a target network too: it repairs nothing."""
  chains, ratios = random_chains("arbitrary", 4), jnp.array([0.1, 1.0, 10.0, 100.0])
  distributions = random_distributions(4)
  phi = random_features(4, orthonormal=False) / 4
  matrix = jax.random.normal(jax.random.key(3), (4, 2, 2))
  start = Variables(phi, matrix, random_features(4, seed=5) if target else None)

  def one(start, chain, distribution, ratio):
    slope = functools.partial(
      flow, transitions=chain, distribution=distribution, ratio=ratio,
      target_rate=0.5 if target else None,
    )  # fmt: skip
    return integrate(slope, start, step=0.01, num_steps=1000, save_every=1000)[0]

  end = jax.jit(jax.vmap(one))(start, chains, distributions, ratios)

  def conserved(variables):
    transposed = jnp.swapaxes(variables.predictor, 1, 2)
    return _gram(variables.representation) - _gram(transposed) / ratios[:, None, None]

  np.testing.assert_allclose(conserved(end), conserved(start), atol=1e-8)  # the solver's error
  assert np.abs(_gram(end.representation) - _gram(phi)).max() > 0.01


def test_the_trace_objective_of_symmetric_chains_grows_at_the_rate_of_the_paper():
  chains, phis = random_chains("symmetric", 10), random_features(10, num_features=3)

  def both(chain, phi):
    slope = flow(Variables(phi), chain).representation
    _, rate = jax.jvp(lambda x: trace_objective(x, chain), (phi,), (slope,))
    return rate, 4 * jnp.sum(slope**2)

  rates, expected = jax.jit(jax.vmap(both))(chains, phis)
  np.testing.assert_allclose(rates, expected, rtol=1e-10)
  others, expected = jax.jit(jax.vmap(both))(random_chains("arbitrary", 10), phis)
  assert np.abs(others / expected - 1).min() > 1e-3, "symmetry is needed"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bidirectional_trace_objective_grows_at_the_rate_of_the_paper(family):
  def both(chain, phi, psi):
    pair = Pair(phi, psi)
    slope = self_predictive_flow.bidirectional_flow(pair, chain)
    _, rate = jax.jvp(lambda x: trace_objective(x.forward, chain, x.backward), (pair,), (slope,))
    return rate, 2 * (jnp.sum(slope.forward**2) + jnp.sum(slope.backward**2))

  features = random_features(10, 3), random_features(10, 3, seed=2)
  rates, expected = jax.jit(jax.vmap(both))(random_chains(family, 10), *features)
  np.testing.assert_allclose(rates, expected, rtol=1e-10)


def test_the_trace_objective_is_what_the_subspaces_explain():
  (chain,), (left,), (right,) = (
    random_chains("arbitrary", 1), random_features(1, 3), random_features(1, 3, seed=2)
  )  # fmt: skip
  chain, left, right = map(np.asarray, (chain, left, right))
  projected = left @ (left.T @ chain @ right) @ right.T
  explained = np.sum(chain**2) - np.sum((chain - projected) ** 2)
  np.testing.assert_allclose(explained, trace_objective(left, chain, right), rtol=1e-12)


def test_the_trace_objective_is_monotone_for_symmetric_chains_alone():
  def least_rise(chain, phi):
    slope = functools.partial(flow, transitions=chain)
    measure = lambda x: trace_objective(x.representation, chain)  # noqa: E731
    _, values = integrate(slope, Variables(phi), step=0.2, num_steps=1500, measure=measure)
    return jnp.min(jnp.diff(values))

  phis = random_features(20)
  falls = {
    family: np.asarray(jax.jit(jax.vmap(least_rise))(random_chains(family, 20), phis))
    for family in FAMILIES
  }
  assert falls["symmetric"].min() > -1e-10  # rounding, once it has converged
  assert np.mean(falls["doubly stochastic"] < -1e-6) > 0.8
  assert np.mean(falls["arbitrary"] < -1e-6) > 0.8


# --- which limits are stable ---

SPECTRUM = np.array([1, 0.9, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0, -0.2, -0.6])


def _with_spectrum(values, seed=0):
  """Returns a symmetric matrix whose rows sum to values[0] = 1, and its eigenvectors."""
  square = np.random.default_rng(seed).normal(size=(len(values), len(values)))
  square[:, 0] = 1
  vectors = np.linalg.qr(square)[0]
  return jnp.asarray(vectors @ np.diag(values) @ vectors.T), jnp.asarray(vectors)


@pytest.mark.parametrize(
  "chosen, largest",
  [((0, 1, 2), -0.14), ((0, 1, 11), -0.18), ((0, 10, 11), -0.04), ((0, 1, 10), 0.08),
   ((0, 1, 3), 0.10)],
)  # fmt: skip
def test_the_stability_table_is_the_jacobian(chosen, largest):
  """Spectrum of 12 numbers, of which three sets are stable and two are not."""
  matrix, vectors = _with_spectrum(SPECTRUM)
  table = chain_spectrum.stability_table(SPECTRUM, chosen)
  np.testing.assert_allclose(table.max(), largest, atol=1e-12)
  assert (table.max() < 0) == (tuple(sorted(chosen)) in chain_spectrum.stable_sets(SPECTRUM, 3))

  def coordinates(parts):  # Phi and its slope, in the basis of eigenvectors
    return vectors.T @ flow(Variables(vectors @ parts), matrix).representation

  chosen = np.array(chosen)
  start = jnp.eye(12)[:, chosen]
  jacobian = np.asarray(jax.jit(jax.jacfwd(coordinates))(start))
  # Each part along an eigenvector outside grows on its own; parts inside the span do not move.
  expected = np.zeros((12, 3, 12, 3))
  for column in range(3):
    for row, rate in zip(np.setdiff1d(np.arange(12), chosen), table[column], strict=True):
      expected[row, column, row, column] = rate
  np.testing.assert_allclose(jacobian, expected, atol=1e-10)


def test_the_bidirectional_table_is_the_jacobian():
  values = np.array([1, 0.8, 0.5, 0.3, 0.1])
  rng = np.random.default_rng(1)
  left, right = (
    np.linalg.qr(np.concatenate([np.ones((5, 1)), rng.normal(size=(5, 4))], axis=1))[0]
    for _ in range(2)
  )
  right *= np.sign(left[0, 0] * right[0, 0]) if left[0, 0] * right[0, 0] < 0 else 1
  matrix = jnp.asarray(left @ np.diag(values) @ right.T)

  def coordinates(parts):
    slope = self_predictive_flow.bidirectional_flow(Pair(left @ parts[0], right @ parts[1]), matrix)
    return jnp.stack([left.T @ slope.forward, right.T @ slope.backward])

  for chosen in ([0, 1], [0, 2], [1, 4]):
    start = jnp.stack(2 * [jnp.eye(5)[:, chosen]])
    jacobian = jax.jit(jax.jacfwd(coordinates))(start).reshape(20, 20)
    found = np.linalg.eigvals(np.asarray(jacobian))
    table = chain_spectrum.bidirectional_stability_table(values, chosen)
    # 2 k^2 directions stay in the two spans. 1e-10: the Jacobian is symmetric but for them.
    expected = np.concatenate([table.ravel(), np.zeros(8)])
    np.testing.assert_allclose(np.sort(found.real), np.sort(expected), atol=1e-10)
    np.testing.assert_allclose(found.imag, 0, atol=1e-10)
    assert (table.max() < 0) == (chosen == [0, 1])


@functools.cache
def _ends(family, weight, step, num_chains=30):
  """Returns chains and where the dynamics are after 3000 steps."""
  chains = jax.vmap(lambda chain: transition_matrices.lazy(chain, weight))(
    random_chains(family, num_chains)
  )
  # Long steps: the solver is stable for step * rate < 2.7, and limits do not depend on it.
  ends = _solve(Variables(random_features(num_chains)), chains, step=step, num_steps=3000)
  return chains, ends.representation


def test_positive_semi_definite_chains_reach_the_top_eigenspace():
  chains, ends = _ends("symmetric", 0.6, step=3.0)
  targets = jnp.stack([chain_spectrum.top_eigenvectors(chain, 2)[1] for chain in chains])
  angles = jax.vmap(collapse.subspace_angles)(ends, targets)[:, 0]
  assert np.sum(angles < 1e-4) == 30, angles


def test_indefinite_chains_reach_a_set_that_the_table_allows():
  chains, ends = _ends("symmetric", 0.0, step=1.25)
  converged, best = 0, 0
  for chain, end in zip(chains, ends, strict=True):
    values, vectors = np.linalg.eigh(chain)
    shares = np.sum((vectors.T @ np.linalg.qr(end)[0]) ** 2, axis=1)  # of each eigenvector
    chosen = np.sort(np.argsort(-shares)[:2])
    if shares[chosen].min() < 1 - 1e-6:
      continue  # rates down to 1e-4 need longer
    converged += 1
    assert tuple(chosen) in chain_spectrum.stable_sets(values, 2)
    best += set(chosen) == set(np.argsort(-np.abs(values))[:2])
  assert converged >= 24
  assert 0 < best < converged, "the limit depends on the start"


def test_bidirectional_dynamics_reach_the_top_singular_subspaces_of_any_chain():
  chains = jnp.concatenate(
    [random_chains(family, 10) for family in ("doubly stochastic", "arbitrary")]
  )

  def one(chain, *start):
    slope = functools.partial(self_predictive_flow.bidirectional_flow, transitions=chain)
    measure = lambda x: trace_objective(x.forward, chain, x.backward)  # noqa: E731
    return integrate(
      slope, Pair(*start), step=1.25, num_steps=5000, save_every=100, measure=measure
    )

  starts = random_features(20), random_features(20, seed=2)
  ends, objective = jax.jit(jax.vmap(one))(chains, *starts)
  assert np.diff(objective).min() > -1e-10  # rounding
  for end, target in ((ends.forward, 0), (ends.backward, 2)):
    vectors = jnp.stack([chain_spectrum.top_singular_vectors(chain, 2)[target] for chain in chains])
    angles = jax.vmap(collapse.subspace_angles)(end, vectors)[:, 0]
    assert np.sum(angles < 1e-4) == 20, angles


# --- the ablation ---


@pytest.mark.parametrize("gradient, step", [("full", 0.01), ("full_of_means", 0.2)])
def test_without_stop_gradient_singular_values_only_shrink(gradient, step):
  chains, phis = random_chains("symmetric", 10), random_features(10)

  def one(chain, phi):
    slope = functools.partial(flow, transitions=chain, gradient=gradient)
    return integrate(
      slope, Variables(phi), step=step, num_steps=500, save_every=50,
      measure=lambda x: collapse.singular_values(x.representation),
    )[1]  # fmt: skip

  values = np.asarray(jax.jit(jax.vmap(one))(chains, phis))
  assert np.diff(values, axis=1).max() < 0
  if gradient == "full":  # at time 5 the second feature has gone; what is left is constant
    assert values[:, -1, 1].max() < 0.02
  else:  # slower, and it may stop at any invariant subspace
    assert values[:, -1].max() < 0.95


def test_the_full_gradients_are_those_of_the_losses():
  (chain,), (phi,) = random_chains("arbitrary", 1), random_features(1, orthonormal=False)
  (distribution,) = random_distributions(1)
  predictor = jax.jit(self_predictive_flow.optimal_predictor)(phi, chain, distribution)

  def sampled(phi):
    distances = jnp.sum(((phi @ predictor)[:, None] - phi) ** 2, axis=-1)
    return jnp.sum(distribution[:, None] * chain * distances) / 2

  def of_means(phi):
    return jnp.sum(distribution[:, None] * (phi @ predictor - chain @ phi) ** 2) / 2

  for gradient, loss in (("full", sampled), ("full_of_means", of_means)):
    slope = functools.partial(flow, transitions=chain, distribution=distribution, gradient=gradient)
    found = jax.jit(slope)(Variables(phi)).representation
    np.testing.assert_allclose(found, -jax.jit(jax.grad(loss))(phi), atol=1e-14)


# --- the solver and bad input ---


def test_the_solver_has_order_four():
  def error(num_steps):
    end, _ = integrate(
      lambda x: jnp.stack([x[1], -x[0]]), jnp.array([1.0, 0.0]),
      step=4 / num_steps, num_steps=num_steps,
    )  # fmt: skip
    return np.abs(end - np.array([np.cos(4), -np.sin(4)])).max()

  assert 15 < error(40) / error(80) < 17  # 2^4


def test_saved_values_are_those_of_their_times():
  _, saved = integrate(
    lambda x: -x, jnp.float64(2), step=0.1, num_steps=6, save_every=3, measure=lambda x: 3 * x
  )
  np.testing.assert_allclose(saved, 6 * np.exp(-np.array([0, 0.3, 0.6])), rtol=1e-5)


def test_lists_stand_for_arrays():
  chain, phi = np.array([[0.25, 0.75], [0.5, 0.5]]), np.array([[1.0], [2.0]])
  for function in (
    self_predictive_flow.optimal_predictor,
    lambda phi, chain: flow(Variables(phi), chain).representation,
    lambda phi, chain: self_predictive_flow.bidirectional_flow(Pair(phi, phi), chain).forward,
    lambda phi, chain: self_predictive_flow.trace_objective(phi, chain),
  ):
    np.testing.assert_allclose(function(phi.tolist(), chain.tolist()), function(phi, chain))


CHAIN = np.full((3, 3), 1 / 3)
PHI = np.eye(3)[:, :2]


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: flow(Variables(PHI), 0.9 * CHAIN), "transitions must have rows that sum to 1"),
    (lambda: flow(Variables(PHI), CHAIN[:2]), r"transitions must have shape \[S, S\]"),
    (lambda: flow(Variables(PHI[:2]), CHAIN), r"representation must have shape \[S, k\]"),
    (lambda: flow(Variables(np.ones((3, 4))), CHAIN), "num_features must be at most .* 3, got 4"),
    (lambda: flow(Variables(PHI), CHAIN, np.ones(3) / 2), "distribution must sum to 1"),
    (lambda: flow(Variables(PHI), CHAIN, np.ones(2) / 2), r"distribution must have shape \[S\]"),
    (lambda: flow(Variables(PHI), CHAIN, gradient="half"), "gradient must be one of"),
    (lambda: flow(Variables(PHI), CHAIN, ratio=1.0), "ratio must be given if and only if"),
    (lambda: flow(Variables(PHI, np.eye(2)), CHAIN), "ratio must be given if and only if"),
    (lambda: flow(Variables(PHI, np.eye(2)), CHAIN, ratio=0.0), "ratio must be positive"),
    (lambda: flow(Variables(PHI, np.eye(3)), CHAIN, ratio=1.0), r"predictor must have shape \[k"),
    (lambda: flow(Variables(PHI, target=PHI), CHAIN), "target_rate must be given"),
    (
      lambda: flow(Variables(PHI, target=PHI), CHAIN, target_rate=1.0, gradient="full"),
      "gradient must be 'semi' with a target",
    ),
    (
      lambda: flow(Variables(PHI, target=PHI[:, :1]), CHAIN, target_rate=1.0),
      "shapes must be equal",
    ),
    (lambda: self_predictive_flow.bidirectional_flow(Pair(PHI, PHI), 2 * CHAIN), "sum to 1"),
    (
      lambda: self_predictive_flow.bidirectional_flow(Pair(PHI, PHI), CHAIN, ridge=-1.0),
      "ridge must be finite and not negative",
    ),
    (lambda: integrate(lambda x: x, 1.0, step=0, num_steps=2), "step must be positive"),
    (lambda: integrate(lambda x: x, 1.0, step=1, num_steps=0), "num_steps must be an integer"),
    (
      lambda: integrate(lambda x: x, 1.0, step=1, num_steps=5, save_every=2),
      "save_every must divide num_steps = 5, got 2",
    ),
    (lambda: chain_spectrum.top_eigenvectors(np.eye(3)[[1, 2, 0]], 1), "must be symmetric"),
    (lambda: chain_spectrum.top_eigenvectors(CHAIN, 4), "num_features must be at most"),
    (lambda: chain_spectrum.top_singular_vectors(CHAIN, 0), "num_features must be an integer"),
    (lambda: chain_spectrum.stability_table([1.0, 0.5], [0, 0]), "name each position once"),
    (lambda: chain_spectrum.stability_table([1.0, 0.5], [2]), "chosen must lie in"),
    (lambda: chain_spectrum.bidirectional_stability_table([1.0, -1], [0]), "not negative"),
  ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
