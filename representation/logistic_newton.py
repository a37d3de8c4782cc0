"""Newton's method with conjugate gradients for the logistic regressions of `representation.probes`.

With a 1 appended to each row x and targets y in {0, 1}, the objective of one class is

  1/2 |w|^2 + C sum_i s_i (softplus(w x_i) - y_i w x_i).

All classes are solved at once, so the work is products of two matrices. Rows are first rotated onto
the principal axes of the data. This leaves |w| unchanged and makes the diagonal of the Hessian a
good preconditioner. The objective is 1-strongly convex, so the norm of the gradient bounds the
distance to the optimum.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Problem(NamedTuple):
  """One-vs-rest logistic regressions on rotated rows.

  Attributes:
    rows: `[N, P]`, the features with a 1 appended (P = D + 1), times `basis`.
    basis: `[P, P]` orthogonal.
    targets: `[N, num_classes]`, 0 or 1.
    sample_weights: `[N, 1]`.
  """

  rows: jax.Array
  basis: jax.Array
  targets: jax.Array
  sample_weights: jax.Array


def make_problem(
  features: jax.Array, labels: jax.Array, sample_weights: Any, num_classes: int
) -> Problem:
  """Returns the problem for features `[N, D]`, labels `[N]` and weights `[N]`; None means ones."""
  rows = with_ones(features)
  targets = jax.nn.one_hot(labels, num_classes, dtype=rows.dtype)
  weights = jnp.ones(len(rows)) if sample_weights is None else jnp.asarray(sample_weights)
  weights = weights.astype(rows.dtype)[:, None]
  basis = jnp.linalg.eigh(rows.T @ (weights * rows))[1]
  return Problem(rows @ basis, basis, targets, weights)


def minimise(
  problem: Problem, C: jax.Array, start: jax.Array, tolerance: Any, max_steps: int
) -> jax.Array:
  """Returns the optimum `[P, num_classes]` in rotated coordinates; multiply it by `basis`.

  A class stops once the norm of its gradient is at most `tolerance` times that at 0, and all stop
  after `max_steps`. `start` is `[P, num_classes]`, in rotated coordinates too.
  """
  rows, targets = problem.rows, problem.targets
  strengths = C.astype(rows.dtype) * problem.sample_weights
  squares = rows**2

  def gradient(solution: jax.Array, logits: jax.Array) -> jax.Array:
    return solution + rows.T @ (strengths * (jax.nn.sigmoid(logits) - targets))

  at_zero = _norms(gradient(jnp.zeros_like(start), jnp.zeros_like(targets)))

  def unfinished(carry: Any) -> jax.Array:
    _, _, slope, step = carry
    return jnp.any(_norms(slope) > tolerance * at_zero) & (step < max_steps)

  def improve(carry: Any) -> Any:
    solution, logits, slope, step = carry
    probs = jax.nn.sigmoid(logits)
    curvature = strengths * probs * (1 - probs)
    norms = _norms(slope)
    # Solve for the direction loosely far from the optimum, where precision is wasted, and ever more
    # precisely near it, so that convergence is superlinear. Finished classes get an infinite goal
    # and do not move.
    forcing = jnp.minimum(0.1, jnp.sqrt(norms / jnp.where(at_zero > 0, at_zero, 1)))
    goal = jnp.where(norms > tolerance * at_zero, forcing * norms, jnp.inf)
    direction = conjugate_gradients(
      lambda v: v + rows.T @ (curvature * (rows @ v)), -slope, 1 + squares.T @ curvature, goal,
      max_steps=len(start),
    )  # fmt: skip
    change = rows @ direction
    sizes = _step_sizes(solution, direction, logits, change, targets, strengths, slope)
    solution = solution + sizes * direction
    logits = rows @ solution
    return solution, logits, gradient(solution, logits), step + 1

  logits = rows @ start
  return jax.lax.while_loop(unfinished, improve, (start, logits, gradient(start, logits), 0))[0]


def conjugate_gradients(
  product: Callable[[jax.Array], jax.Array],
  target: jax.Array,
  diagonal: jax.Array,
  goal: jax.Array,
  max_steps: int,
) -> jax.Array:
  """Solves product(v) = target for all columns, until each residual norm is at most `goal`.

  Args:
    product: a symmetric positive definite matrix for each column, applied to `[P, K]`.
    target: `[P, K]`.
    diagonal: `[P, K]` positive, the preconditioner; about the diagonals of the matrices.
    goal: `[K]` or `[]`.
    max_steps: the most products.
  """

  def unfinished(carry: Any) -> jax.Array:
    _, residual, _, _, step = carry
    return jnp.any(_norms(residual) > goal) & (step < max_steps)

  def improve(carry: Any) -> Any:
    solution, residual, direction, product_rz, step = carry
    active = _norms(residual) > goal
    image = product(direction)
    curvature = jnp.sum(direction * image, 0)
    size = jnp.where(active & (curvature > 0), product_rz / jnp.where(active, curvature, 1), 0)
    solution, residual = solution + size * direction, residual - size * image
    preconditioned = residual / diagonal
    new = jnp.sum(residual * preconditioned, 0)
    momentum = jnp.where(active, new / jnp.where(product_rz > 0, product_rz, 1), 0)
    return solution, residual, preconditioned + momentum * direction, new, step + 1

  first = target / diagonal
  carry = (jnp.zeros_like(target), target, first, jnp.sum(target * first, 0), 0)
  return jax.lax.while_loop(unfinished, improve, carry)[0]


def _step_sizes(
  solution: Any, direction: Any, logits: Any, change: Any, targets: Any, strengths: Any, slope: Any
) -> jax.Array:
  """Halves the step of each class until its loss decreases sufficiently (the Armijo rule)."""
  now = jax.nn.softplus(logits)
  promised = jnp.sum(slope * direction, 0)
  cross, square = jnp.sum(solution * direction, 0), jnp.sum(direction**2, 0)
  # Differences below this are rounding errors.
  slack = 10 * jnp.finfo(logits.dtype).eps * jnp.sum(strengths * now, 0)

  def too_long(sizes: jax.Array) -> jax.Array:
    losses = jax.nn.softplus(logits + sizes * change) - now - sizes * targets * change
    moved = sizes * cross + 0.5 * sizes**2 * square + jnp.sum(strengths * losses, 0)
    return (moved > 1e-4 * sizes * promised + slack) & (sizes > 1e-6)

  def halve(carry: Any) -> Any:
    sizes, rejected = carry
    sizes = jnp.where(rejected, sizes / 2, sizes)
    return sizes, too_long(sizes)

  whole = jnp.ones_like(promised)
  carry = (whole, too_long(whole))
  return jax.lax.while_loop(lambda carry: jnp.any(carry[1]), halve, carry)[0]


def with_ones(features: jax.Array) -> jax.Array:
  """Returns `[N, D + 1]`, the features with a 1 appended, in float32 or wider."""
  features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
  return jnp.concatenate([features, jnp.ones((features.shape[0], 1), features.dtype)], axis=1)


def _norms(columns: jax.Array) -> jax.Array:
  return jnp.linalg.norm(columns, axis=0)
