"""Random chains, and the invariants of every update of a linear representation.

`assert_gram_only_grows` takes an update as a function of the weights alone. It holds for each
method that regresses a target on linear embeddings with the optimal linear predictor and no
gradient into the target: self-predictive learning, and BYOL with a linear encoder, no projector and
no normalisation, where the next state is the other view.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rl_theory import transition_matrices

FAMILIES = {
  "symmetric": transition_matrices.symmetric_transitions,
  "doubly stochastic": transition_matrices.doubly_stochastic_transitions,
  "arbitrary": transition_matrices.dense_transitions,
}


@functools.cache
def _chains(family, num_states):
  keys = jax.random.split(jax.random.key(0), 34)
  return jax.jit(jax.vmap(lambda key: FAMILIES[family](key, num_states)))(keys)


def random_chains(family, num_chains, num_states=20):
  """Returns `[num_chains, S, S]`; at most 34, of which one program is compiled."""
  return _chains(family, num_states)[:num_chains]


def random_features(num_chains, num_features=2, num_states=20, seed=1, orthonormal=True):
  """Returns `[num_chains, S, k]`."""
  rng = np.random.default_rng(seed)
  features = rng.normal(size=(num_chains, num_states, num_features))
  return jnp.asarray(np.linalg.qr(features)[0] if orthonormal else features)


def random_distributions(num_chains, num_states=20, seed=2):
  """Returns `[num_chains, S]`."""
  return jnp.asarray(np.random.default_rng(seed).dirichlet(np.ones(num_states), num_chains))


def two_view_chain(key, num_items, num_views):
  """Returns the view-to-view expectation of a model of two views, and the distribution of a view.

  An item is drawn uniformly, then two views of it, independently: P(x'|x) = sum_z p(z|x) p(x'|z).
  """
  views = jax.random.dirichlet(key, jnp.full(num_views, 0.3), (num_items,))  # p(view | item)
  distribution = jnp.mean(views, axis=0)
  return (views / distribution).T @ views / num_items, distribution


def assert_gram_only_grows(update, weights, num_steps=50):
  """Asserts W+^T W+ = W^T W + (W+ - W)^T (W+ - W) for each step, so singular values never fall.

  Args:
    update: the weights `[D, k]` after one step of SGD, as a function of those before; in float64.
    weights: at the start.
    num_steps: how many.
  """
  scale = np.linalg.norm(weights)
  moved = 0.0
  for _ in range(num_steps):
    new = np.asarray(update(weights))
    step = new - weights
    # 1e-12: float64 rounding of sums over states, relative to the weights.
    np.testing.assert_allclose(
      new.T @ new, weights.T @ weights + step.T @ step, atol=1e-12 * scale**2
    )
    values, before = (np.linalg.svd(each, compute_uv=False) for each in (new, weights))
    assert np.all(values >= before - 1e-12 * scale)
    moved += np.linalg.norm(step)
    weights = new
  assert moved > 1e-2 * scale, "the update does nothing, so nothing was tested"
