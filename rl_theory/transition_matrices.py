"""Random and structured transition matrices `[S, S]`: each row holds next-state probabilities.

The families of the papers on quantile TD (https://arxiv.org/abs/2301.04462,
https://arxiv.org/abs/2305.18388) and on self-predictive learning (https://arxiv.org/abs/2212.03319):
dense rows, sparse rows (Garnet), symmetric and doubly stochastic matrices, the cycle, lazy walks.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

from sharding import checks


def dense_transitions(key: Any, num_states: int, *, concentration: Any = 1.0) -> jax.Array:
  """Returns `[S, S]` whose rows are drawn from a symmetric Dirichlet distribution.

  Args:
    key: PRNG key.
    num_states: S, at least 1.
    concentration: positive; small values give rows with few likely next states.

  Example:
    >>> dense_transitions(jax.random.key(0), 4).shape
    (4, 4)
  """
  checks.count("num_states", num_states)
  checks.positive("concentration", concentration)
  return jax.random.dirichlet(key, jnp.full(num_states, concentration, float), (num_states,))


def sparse_transitions(key: Any, num_states: int, *, branching: int) -> jax.Array:
  """Returns `[S, S]` of a Garnet: each row has `branching` random next states.

  The next states of a row are different, and their probabilities are the gaps between uniform cuts
  of [0, 1].

  Args:
    key: PRNG key.
    num_states: S, at least 1.
    branching: number of next states of each state, between 1 and S.

  Example:
    >>> (sparse_transitions(jax.random.key(0), 9, branching=3) > 0).sum(1)
    Array([3, 3, 3, 3, 3, 3, 3, 3, 3], dtype=int32)
  """
  checks.count("num_states", num_states)
  checks.count("branching", branching)
  if branching > num_states:
    raise ValueError(f"branching must be at most num_states = {num_states}, got {branching}")
  which, weights = jax.random.split(key)
  order = jnp.argsort(jax.random.uniform(which, (num_states, num_states)), axis=1)[:, :branching]
  probs = jax.random.dirichlet(weights, jnp.ones(branching), (num_states,))
  return jnp.zeros((num_states, num_states)).at[jnp.arange(num_states)[:, None], order].set(probs)


def symmetric_transitions(key: Any, num_states: int, *, num_sweeps: int = 2000) -> jax.Array:
  """Returns a random symmetric `[S, S]`: cubes of uniform numbers, balanced by Sinkhorn's sweeps.

  Args:
    key: PRNG key.
    num_states: S, at least 1.
    num_sweeps: of A <- diag(A1)^(-1/2) A diag(A1)^(-1/2); 2000 balance to rounding.

  Example:
    >>> found = symmetric_transitions(jax.random.key(0), 5)
    >>> bool(jnp.allclose(found, found.T)), bool(jnp.allclose(found.sum(1), 1, atol=1e-6))
    (True, True)
  """
  checks.count("num_states", num_states)
  checks.count("num_sweeps", num_sweeps)
  cubes = jax.random.uniform(key, (num_states, num_states)) ** 3

  def sweep(_: Any, matrix: jax.Array) -> jax.Array:
    scales = jax.lax.rsqrt(matrix.sum(1))
    return scales[:, None] * matrix * scales

  return jax.lax.fori_loop(0, num_sweeps, sweep, (cubes + cubes.T) / 2)


def doubly_stochastic_transitions(
  key: Any, num_states: int, *, num_permutations: int = 6
) -> jax.Array:
  """Returns `[S, S]` whose rows and columns sum to 1: a Dirichlet mixture of permutations.

  Args:
    key: PRNG key.
    num_states: S, at least 1.
    num_permutations: random permutations in the mixture, at least 1.

  Example:
    >>> found = doubly_stochastic_transitions(jax.random.key(0), 5)
    >>> bool(jnp.allclose(found.sum(0), 1)), bool(jnp.allclose(found.sum(1), 1))
    (True, True)
  """
  checks.count("num_states", num_states)
  checks.count("num_permutations", num_permutations)
  which, weights = jax.random.split(key)
  permutations = jax.vmap(lambda key: jax.random.permutation(key, num_states))(
    jax.random.split(which, num_permutations)
  )
  mixture = jax.random.dirichlet(weights, jnp.ones(num_permutations))
  return jnp.einsum("n,nij->ij", mixture, jax.nn.one_hot(permutations, num_states))


def cycle_transitions(num_states: int) -> jax.Array:
  """Returns `[S, S]` that moves from each state to the next one, and from the last to the first.

  Example:
    >>> cycle_transitions(3).argmax(1)
    Array([1, 2, 0], dtype=int32)
  """
  checks.count("num_states", num_states)
  return jnp.roll(jnp.eye(num_states), 1, axis=1)


def lazy(transitions: Any, weight: Any) -> jax.Array:
  """Returns (1 - weight) P + weight I: with probability `weight` the walk stays where it is.

  With `weight` of at least 1/2 a symmetric P becomes positive semi-definite.

  Args:
    transitions: `[S, S]` P.
    weight: in [0, 1].

  Example:
    >>> lazy(cycle_transitions(2), 0.75)
    Array([[0.75, 0.25],
           [0.25, 0.75]], dtype=float32)
  """
  check_transitions(transitions)
  checks.probabilities("weight", weight, fetch=True)
  if jnp.ndim(weight):
    raise ValueError(f"weight must be one number, got {weight}: map with jax.vmap")
  transitions = jnp.asarray(transitions, float)
  return (1 - weight) * transitions + weight * jnp.eye(len(transitions), dtype=transitions.dtype)


def check_transitions(transitions: Any) -> None:
  """Raises `ValueError` unless `transitions` is `[S, S]` with rows that are probabilities.

  Arrays on the device are looked at too; tracers pass.
  """
  checks.matrix("transitions", transitions)
  size = jnp.shape(transitions)[0]
  checks.shape("transitions", transitions, (size, size), "[S, S]")
  checks.distribution("transitions", transitions, fetch=True)


def stationary_distribution(transitions: Any) -> jax.Array:
  """Returns the stationary distribution `[S]`: d = d P.

  Args:
    transitions: `[S, S]` with one recurrent class; it may be periodic.

  Raises:
    ValueError: if the rows are not probabilities, or there are several recurrent classes, so that
      many distributions are stationary (only where the values can be seen, not under `jit`).

  Example:
    >>> stationary_distribution([[0.5, 0.5], [0.25, 0.75]]).round(4)
    Array([0.3333, 0.6667], dtype=float32)
  """
  check_transitions(transitions)
  transitions = jnp.asarray(transitions, float)
  size = len(transitions)
  balance = transitions.T - jnp.eye(size, dtype=transitions.dtype)
  if not isinstance(transitions, jax.core.Tracer):
    count = _num_recurrent_classes(np.asarray(transitions))
    if count > 1:
      raise ValueError(
        f"transitions must have one recurrent class, got {count}: the stationary distribution is "
        "not unique; take the states of one class"
      )
  # The equations sum to zero, so the last one is free for the normalisation.
  found = jnp.linalg.solve(balance.at[-1].set(1), jnp.zeros(size, balance.dtype).at[-1].set(1))
  return jnp.maximum(found, 0) / jnp.maximum(found, 0).sum()


def _num_recurrent_classes(transitions: np.ndarray) -> int:
  """Returns how many sets of states reach each other and cannot be left."""
  graph = scipy.sparse.csr_matrix(transitions > 0)
  count, classes = scipy.sparse.csgraph.connected_components(graph, connection="strong")
  rows, columns = graph.nonzero()
  left = classes[rows] != classes[columns]
  return count - len(np.unique(classes[rows[left]]))
