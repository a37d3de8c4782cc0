"""Bidirectional learning: against the dynamics, the invariants, and the singular vectors of P."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear_dynamics import random_chains, random_distributions, random_features

from representation import bidirectional, chain_spectrum, chains, collapse, self_predictive_flow

pytestmark = pytest.mark.usefixtures("x64")


def _table(table, states):
  return table[states]


NETWORKS = bidirectional.Networks(_table, _table)


def _start(phi, psi, config, optimizer, target_params=None):
  matrices = jnp.eye(phi.shape[1]), jnp.eye(phi.shape[1])
  params = bidirectional.Params(phi, psi, *matrices)
  return bidirectional.init(params, optimizer=optimizer, config=config, target_params=target_params)


def _step(state, batch, config, optimizer):
  return bidirectional.update(
    state, batch, None, apply_fn=NETWORKS, optimizer=optimizer, config=config
  )


def test_a_step_is_a_step_of_the_dynamics_and_both_gram_matrices_only_grow():
  (chain,), (distribution,) = random_chains("arbitrary", 1), random_distributions(1)
  (phi,), (psi,) = random_features(1, orthonormal=False), random_features(1, seed=2)
  config, optimizer = bidirectional.Config(), optax.sgd(0.5)
  state = _start(phi, psi, config, optimizer)
  new, _ = _step(state, chains.make_expectation(chain, distribution), config, optimizer)
  slope = jax.jit(self_predictive_flow.bidirectional_flow)(
    self_predictive_flow.Pair(phi, psi), chain, distribution
  )
  for before, after, rate in ((phi, new.params.forward, slope.forward),
                              (psi, new.params.backward, slope.backward)):  # fmt: skip
    step = after - before
    np.testing.assert_allclose(step, 0.5 * rate, atol=1e-13)
    np.testing.assert_allclose(after.T @ after, before.T @ before + step.T @ step, atol=1e-12)


def test_updates_reach_the_top_singular_subspaces_of_a_chain_that_is_not_symmetric():
  num_chains = 4
  doubly = random_chains("doubly stochastic", num_chains)
  starts = random_features(num_chains), random_features(num_chains, seed=2)
  config, optimizer = bidirectional.Config(), optax.sgd(20 * 0.2)  # D = I / 20

  def one(chain, phi, psi):
    batch = chains.Expectation(chain, jnp.full(20, 1 / 20))
    state = _start(phi, psi, config, optimizer)
    state, _ = jax.lax.scan(
      lambda state, _: (_step(state, batch, config, optimizer)[0], None), state, length=20_000
    )
    left, _, right = chain_spectrum.top_singular_vectors(chain, 2)
    return (
      collapse.subspace_angles(state.params.forward, left)[0],
      collapse.subspace_angles(state.params.backward, right)[0],
    )

  angles = jax.jit(jax.vmap(one))(doubly, *starts)
  assert np.max(angles) < 1e-4, angles


@pytest.mark.slow
def test_samples_give_the_expectation():
  counts = np.random.default_rng(0).multinomial(4, [0.2] * 5, size=5)
  states, next_states = np.nonzero(counts)
  repeats = counts[states, next_states]
  sampled = chains.Transitions(np.repeat(states, repeats), np.repeat(next_states, repeats))
  exact = chains.make_expectation(jnp.asarray(counts / 4))
  phi, psi = (random_features(1, num_states=5, seed=seed)[0] for seed in (1, 2))
  optimizer = optax.sgd(0.1)
  for config in (
    bidirectional.Config(stop_gradient=False),
    bidirectional.Config(predictor="gradient", num_inner_steps=2, target_decay=0.9),
  ):  # fmt: skip
    state = _start(phi, psi, config, optimizer)
    (first, metrics), (second, other) = (
      _step(state, batch, config, optimizer) for batch in (sampled, exact)
    )
    for one, another in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
      np.testing.assert_allclose(one, another, atol=1e-13)
    np.testing.assert_allclose(metrics["loss"], other["loss"], rtol=1e-12)


def test_a_chain_reversed_twice_is_the_chain_and_states_never_entered_do_not_count():
  (chain,), (distribution,) = random_chains("arbitrary", 1), random_distributions(1)
  twice = chains.reverse(chains.reverse(chains.Expectation(chain, distribution)))
  np.testing.assert_allclose(twice.transitions, chain, atol=1e-12)
  np.testing.assert_allclose(twice.distribution, distribution, atol=1e-12)
  left = chains.Expectation(jnp.array([[0.0, 1.0], [0.0, 1.0]]), jnp.array([0.5, 0.5]))
  reversed_chain = chains.reverse(left)
  np.testing.assert_allclose(reversed_chain.distribution, [0, 1])
  np.testing.assert_allclose(reversed_chain.transitions, [[0, 0], [0.5, 0.5]])


def test_the_loss_of_arrays_is_the_sum_of_both_directions():
  keys = jax.random.split(jax.random.key(0), 4)
  arrays = [jax.random.normal(key, (5, 3)) for key in keys]
  found = jax.jit(bidirectional.bidirectional_loss)(*arrays)
  distances = [np.sum((arrays[i] - arrays[i + 1]) ** 2, axis=1) for i in (0, 2)]
  np.testing.assert_allclose(found, (distances[0] + distances[1]) / 2, rtol=1e-12)
  total = lambda *given: jnp.sum(bidirectional.bidirectional_loss(*given))  # noqa: E731
  slopes = jax.jit(jax.grad(total, (0, 1, 2, 3)))(*arrays)
  assert np.all(slopes[1] == 0) and np.all(slopes[3] == 0) and np.any(slopes[0] != 0)


def test_objectives_with_actions_are_refused():
  config = bidirectional.Config(objective="action")
  with pytest.raises(ValueError, match="objective must be 'policy' for both directions"):
    _start(jnp.eye(3), jnp.eye(3), config, optax.sgd(0.1))
