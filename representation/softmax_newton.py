"""Newton's method for the objective of `softmax_regression`.

Two changes of variables leave the optimum as it is and make the diagonal of the Hessian a good
preconditioner. Features are centred, which only moves the bias, and rotated onto the principal
axes, which keeps |W|. Directions are solved for by the conjugate gradients of `logistic_newton`.
Coefficients are `[C, F + 1]` in these coordinates, with the bias last. (The layout `[F + 1, C]`
would make XLA transpose the rows for each product on a CPU.)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from representation import logistic_newton


class Problem(NamedTuple):
  """Rows in coordinates that suit Newton's method.

  Attributes:
    rows: `[N, F + 1]`, the features minus `mean`, times `basis`, with a 1 appended.
    mean: `[F]`.
    basis: `[F, F]` orthogonal.
    targets: `[N, C]` one-hot.
    present: `[C]` bool, classes that have a row. The others are never predicted.
  """

  rows: jax.Array
  mean: jax.Array
  basis: jax.Array
  targets: jax.Array
  present: jax.Array


def make_problem(features: jax.Array, labels: jax.Array, num_classes: int) -> Problem:
  """Returns the problem for features `[N, F]` and labels `[N]`, in float32 or wider."""
  features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
  mean = jnp.mean(features, axis=0)
  centred = features - mean
  basis = jnp.linalg.eigh(centred.T @ centred)[1]
  rows = logistic_newton.with_ones(centred @ basis)
  targets = jax.nn.one_hot(labels, num_classes, dtype=rows.dtype)
  return Problem(rows, mean, basis, targets, jnp.any(targets > 0, axis=0))


def zeros(problem: Problem) -> jax.Array:
  """Returns the coefficients with which all classes are equally likely."""
  return jnp.zeros((problem.targets.shape[1], problem.rows.shape[1]), problem.rows.dtype)


def layer(problem: Problem, coefficients: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the weights `[F, C]` and the bias `[C]` for the features as they were given."""
  weights = problem.basis @ coefficients[:, :-1].T
  bias = coefficients[:, -1] - problem.mean @ weights
  return weights, jnp.where(problem.present, bias, -jnp.inf)


def minimise(
  problem: Problem, penalty: jax.Array, start: jax.Array, tolerance: Any, max_steps: int
) -> jax.Array:
  """Returns the coefficients of the optimum.

  Half of Newton's decrement estimates how far the objective is above the optimum. The method stops
  after the first step before which this gap was at most `tolerance` times the objective, or after
  `max_steps`.
  """
  rows, present = problem.rows, problem.present
  own = problem.targets > 0
  penalty = jnp.asarray(penalty, rows.dtype)
  penalties = jnp.full(start.shape[1], penalty).at[-1].set(0)
  squares = rows**2

  # Logits are measured from that of the label. Then the numbers that tell well-fitted rows apart,
  # the small probabilities of the other classes, are not lost beside a probability of almost 1.
  def read(coefficients: jax.Array) -> jax.Array:
    logits = rows @ coefficients.T
    return logits - jnp.sum(jnp.where(own, logits, 0), axis=-1, keepdims=True)

  def objective(coefficients: jax.Array, logits: jax.Array) -> jax.Array:
    top = jnp.max(jnp.where(present, logits, 0), axis=-1)
    others = jnp.sum(jnp.where(own | ~present, 0, jnp.exp(logits - top[:, None])), axis=-1)
    losses = jnp.where(top > 0, top + jnp.log(jnp.exp(-top) + others), jnp.log1p(others))
    return jnp.sum(losses) + 0.5 * jnp.sum(penalties * coefficients**2)

  def unfinished(carry: Any) -> jax.Array:
    _, _, value, gap, step = carry
    return (gap > tolerance * value) & (step < max_steps)

  def improve(carry: Any) -> Any:
    coefficients, logits, value, gap, step = carry
    probs = jax.nn.softmax(jnp.where(present, logits, -jnp.inf), axis=-1)
    missing = jnp.sum(jnp.where(own, 0, probs), axis=-1, keepdims=True)
    slope = penalties * coefficients + jnp.where(own, -missing, probs).T @ rows
    diagonal = penalties + (probs * jnp.where(own, missing, 1 - probs)).T @ squares
    # An absent class has no curvature in its bias, and no slope either.
    roots = jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1))

    def product(flat: jax.Array) -> jax.Array:
      direction = flat.reshape(start.shape) / roots
      change = read(direction)
      change = probs * (change - jnp.sum(probs * change, axis=-1, keepdims=True))
      return ((penalties * direction + change.T @ rows) / roots).reshape(flat.shape)

    # In units of the roots the Hessian is near the identity, so the residual tells how much of the
    # decrement is missed. Loosely far from the optimum, and ever more precisely near it.
    target = (-slope / roots).reshape(-1, 1)
    goal = jnp.clip(jnp.sqrt(gap / value), 1e-3, 0.1) * jnp.linalg.norm(target)
    direction = logistic_newton.conjugate_gradients(
      product, target, jnp.ones_like(target), goal, max_steps=start.shape[1]
    )
    direction = direction.reshape(start.shape) / roots
    # A constant for all classes changes no probability; rounding would let it drift.
    mean = jnp.sum(direction, axis=0) / jnp.sum(present)
    direction = jnp.where(present[:, None], direction - mean, 0)
    promised = jnp.sum(slope * direction)
    change = read(direction)
    # Differences below this are rounding errors.
    slack = 10 * jnp.finfo(rows.dtype).eps * value

    def too_long(size: jax.Array) -> jax.Array:
      gain = objective(coefficients + size * direction, logits + size * change) - value
      return (gain > 1e-4 * size * promised + slack) & (size > 1e-6)

    size = jax.lax.while_loop(too_long, lambda size: size / 2, jnp.ones_like(value))
    coefficients = coefficients + size * direction
    logits = read(coefficients)
    return coefficients, logits, objective(coefficients, logits), -promised / 2, step + 1

  logits = read(start)
  value = objective(start, logits)
  carry = (start, logits, value, jnp.full_like(value, jnp.inf), 0)
  return jax.lax.while_loop(unfinished, improve, carry)[0]
