"""Where self-predictive learning goes: top subspaces of a chain, and which limits are stable.

`self_predictive_flow` has the dynamics. Their limits are spanned by eigenvectors of a symmetric
chain, or by pairs of singular vectors for the bidirectional dynamics. The tables here say which.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sharding import checks


def top_eigenvectors(transitions: Any, num_features: int) -> tuple[jax.Array, jax.Array]:
  """Returns the k eigenvalues of largest magnitude `[k]` and their eigenvectors `[S, k]`.

  Args:
    transitions: P, `[S, S]`, symmetric.
    num_features: k.

  Raises:
    ValueError: if P is not symmetric or k is not in [1, S].

  Example:
    >>> top_eigenvectors(jnp.diag(jnp.array([0.5, -0.9, 0.2])), 2)[0]
    Array([-0.9,  0.5], dtype=float32)
  """
  square(transitions)
  num_features_fit(num_features, np.shape(transitions)[0])
  if not isinstance(transitions, jax.core.Tracer) and not np.allclose(
    transitions, np.swapaxes(transitions, -1, -2), atol=1e-5
  ):
    raise ValueError(
      "transitions must be symmetric for an eigenspace, got a matrix that is not: use "
      "top_singular_vectors"
    )
  values, vectors = jnp.linalg.eigh(transitions)
  order = jnp.argsort(-jnp.abs(values))[:num_features]
  return values[order], vectors[:, order]


def top_singular_vectors(
  transitions: Any, num_features: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns left vectors `[S, k]`, the k largest singular values `[k]`, right vectors `[S, k]`.

  Args:
    transitions: P, `[S, S]`.
    num_features: k.

  Raises:
    ValueError: if P is not square or k is not in [1, S].
  """
  square(transitions)
  num_features_fit(num_features, np.shape(transitions)[0])
  left, values, right = jnp.linalg.svd(transitions)
  return left[:, :num_features], values[:num_features], right[:num_features].T


def stability_table(eigenvalues: Any, chosen: Any) -> np.ndarray:
  """Returns the growth rates of perturbations of a set of eigenvectors of a symmetric P.

  Args:
    eigenvalues: `[S]` of P.
    chosen: `[k]` int, the positions of the set.

  Returns:
    `[k, S - k]`, -lambda_j (lambda_j - lambda_i) for j in the set and i outside: how fast the part
    of feature j along eigenvector i grows. The set is a stable limit if and only if all are
    negative.

  Raises:
    ValueError: if positions lie outside of [0, S) or are repeated.

  Example:
    >>> stability_table([1.0, 0.5, -0.6], [0, 1]).round(2).tolist()
    [[-1.6], [-0.55]]
  """
  inside, outside = _split(eigenvalues, chosen)
  return -inside[:, None] * (inside[:, None] - outside)


def bidirectional_stability_table(singular_values: Any, chosen: Any) -> np.ndarray:
  """Returns the growth rates of perturbations of a set of pairs of singular vectors of P.

  Args:
    singular_values: `[S]` of P, not negative.
    chosen: `[k]` int, the positions of the set.

  Returns:
    `[2, k, S - k]`, -sigma_j (sigma_j - sigma_i) and -sigma_j (sigma_j + sigma_i). The first is
    negative throughout only for the k largest.

  Raises:
    ValueError: if positions lie outside of [0, S) or are repeated.
  """
  checks.not_negative("singular_values", singular_values, fetch=True)
  inside, outside = _split(singular_values, chosen)
  return np.stack([-inside[:, None] * (inside[:, None] - sign * outside) for sign in (1, -1)])


def stable_sets(eigenvalues: Any, num_features: int) -> list[tuple[int, ...]]:
  """Returns all sets of k eigenvectors at which the dynamics of a symmetric P can end.

  Each is the p largest positive eigenvalues with the k - p most negative ones.

  Args:
    eigenvalues: `[S]`, different from each other; zeros are in no set.
    num_features: k.

  Returns:
    Sorted positions in `eigenvalues`, for each possible p.

  Example:
    >>> stable_sets([1.0, 0.5, -0.2, -0.6], 2)
    [(2, 3), (0, 3), (0, 1)]
  """
  checks.vector("eigenvalues", eigenvalues)
  eigenvalues = np.asarray(eigenvalues)
  num_features_fit(num_features, len(eigenvalues))
  order = np.argsort(-eigenvalues)
  num_positive, num_negative = np.sum(eigenvalues > 0), np.sum(eigenvalues < 0)
  sets = []
  for size in range(num_features + 1):
    if size <= num_positive and num_features - size <= num_negative:
      chosen = [*order[:size], *order[len(order) - (num_features - size) :]]
      sets.append(tuple(sorted(int(position) for position in chosen)))
  return sets


def _split(values: Any, chosen: Any) -> tuple[np.ndarray, np.ndarray]:
  """Returns the chosen values and the others, on the host."""
  checks.vector("eigenvalues", values)
  checks.row_numbers("chosen", chosen, len(values), 1, fetch=True)
  values, chosen = np.asarray(values), np.asarray(chosen)
  if len(np.unique(chosen)) != len(chosen):
    raise ValueError(f"chosen must name each position once, got {chosen}")
  return values[chosen], np.delete(values, chosen)


def num_features_fit(num_features: int, num_states: int) -> None:
  """Raises `ValueError` unless 1 <= k <= S."""
  checks.count("num_features", num_features)
  if num_features > num_states:
    raise ValueError(
      f"num_features must be at most the number of states, {num_states}, got {num_features}"
    )


def square(transitions: Any) -> None:
  """Raises `ValueError` unless P is `[S, S]`."""
  checks.matrix("transitions", transitions)
  checks.shape("transitions", transitions, 2 * np.shape(transitions)[:1], "[S, S]")
