"""What ablations of BYOL put in place of its parts: negative examples, the best linear predictor.

Reference: Grill et al. 2020, https://arxiv.org/abs/2006.07733, section 5 and its appendices.
"""

from typing import Any

import jax
import jax.numpy as jnp

from representation import chains, moving_targets
from sharding import checks


@checks.array_arguments
def negatives_loss(
  online_predictions: jax.Array,
  same_view_targets: jax.Array,
  other_view_targets: jax.Array,
  *,
  temperature: Any,
) -> jax.Array:
  """Returns the term of the negative examples for each prediction, in one direction.

  It is 2 alpha log(sum_{j != i} exp(cos(p_i, t_j) / alpha) + sum_j exp(cos(p_i, t'_j) / alpha)),
  where t is of the same view as p and t' of the other one. Added to `byol_loss` with weight 1,
  it gives SimCLR's loss (NT-Xent) times 2 alpha, plus 2. It stores `[B, 2B]` numbers.

  Args:
    online_predictions: `[B, K]`, from one view.
    same_view_targets: `[B, K]`, targets from that view.
    other_view_targets: `[B, K]`, targets from the other view.
    temperature: positive, alpha.

  Returns:
    `[B]`. All arguments get gradients.

  Raises:
    ValueError: if the shapes differ.
  """
  checks.positive("temperature", temperature)
  checks.same_shape(
    online_predictions=online_predictions,
    same_view_targets=same_view_targets,
    other_view_targets=other_view_targets,
  )
  predictions, same, other = map(
    moving_targets.normalise, (online_predictions, same_view_targets, other_view_targets)
  )
  num_rows = len(predictions)
  cosines = jnp.concatenate([predictions @ same.T, predictions @ other.T], axis=1)
  counted = jnp.arange(2 * num_rows) != jnp.arange(num_rows)[:, None]
  return 2 * temperature * jax.nn.logsumexp(cosines / temperature, axis=1, where=counted)


def least_squares_predictor(
  projections: jax.Array, targets: jax.Array, *, ridge: Any = 0.0
) -> jax.Array:
  """Returns the matrix W `[K, L]` that minimises |projections W - targets|^2.

  Args:
    projections: `[N, K]`.
    targets: `[N, L]`.
    ridge: not negative. The penalty on |W|^2 is this share of the mean diagonal entry of
      projections^T projections. Without it, W is not finite if the projections have no full rank.
  """
  diagonal = jnp.sum(projections**2) / projections.shape[1]  # the mean over its entries
  ones = jnp.ones(len(projections), projections.dtype)
  return chains.least_squares(projections, targets, ones, ridge=ridge * diagonal)
