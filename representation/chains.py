"""Transitions of a Markov chain as a batch: sampled ones, or the exact expectation over all states.

Both kinds stand for the same weighted regression of next embeddings on embeddings (`regression`).
So a loss that is written once is right for both, and its mean over samples is its expectation.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sharding import checks


class Transitions(NamedTuple):
  """Sampled transitions.

  Attributes:
    states: `[B, ...]`, whatever `apply_fn` reads: row numbers or observations.
    next_states: `[B, ...]`.
    actions: `[B]` int, for an objective with actions.
  """

  states: Any
  next_states: Any
  actions: Any = None


class Expectation(NamedTuple):
  """A finite chain, for exact expectations; `make_expectation` checks one.

  Attributes:
    transitions: `[S, S]`, or `[A, S, S]` with a policy.
    distribution: `[S]`, d.
    policy: `[S, A]`, the probabilities of the actions, or None without actions.
    states: `[S, ...]`, what `apply_fn` reads for each state; None stands for the row numbers.
  """

  transitions: Any
  distribution: Any
  policy: Any = None
  states: Any = None


def make_expectation(
  transitions: Any, distribution: Any = None, *, policy: Any = None, states: Any = None
) -> Expectation:
  """Returns a checked `Expectation`.

  Args:
    transitions: `[S, S]`, or `[A, S, S]` with a policy; rows sum to 1.
    distribution: `[S]`; the default is uniform.
    policy: `[S, A]`, for transitions by action.
    states: `[S, ...]`, what `apply_fn` reads.

  Raises:
    ValueError: if shapes do not fit or probabilities do not sum to 1.

  Example:
    >>> make_expectation(jnp.array([[0.5, 0.5], [1.0, 0.0]])).distribution
    Array([0.5, 0.5], dtype=float32)
  """
  num_states = np.shape(transitions)[-1] if np.ndim(transitions) else 0
  if distribution is None:
    dtype = jnp.result_type(jnp.asarray(transitions), jnp.float32)
    distribution = jnp.full(num_states, 1 / max(num_states, 1), dtype)
  batch = Expectation(transitions, distribution, policy, states)
  check_shapes(batch)
  checks.distribution("transitions", transitions, fetch=True)
  checks.distribution("distribution", distribution, fetch=True)
  if policy is not None:
    checks.distribution("policy", policy, fetch=True)
  arrays = (None if part is None else jnp.asarray(part) for part in batch)
  return Expectation(*arrays)


def ends(batch: Any) -> tuple[Any, Any]:
  """Returns what `apply_fn` reads on both sides of a transition; all states for `Expectation`.

  Raises:
    ValueError: if the shapes of the batch do not fit each other.
  """
  check_shapes(batch)
  if isinstance(batch, Transitions):
    return batch.states, batch.next_states
  states = jnp.arange(len(batch.distribution)) if batch.states is None else batch.states
  return states, states


def regression(
  batch: Any, targets: jax.Array, *, num_actions: int | None = None
) -> tuple[Any, Any, Any]:
  """Returns the weighted regression on embeddings that a batch stands for.

  Args:
    batch: `Transitions` or `Expectation`.
    targets: `[B, k]`, embeddings of the next states, or `[S, k]` of all states.
    num_actions: A, for one regression for each action. None: one for the chain of the policy.

  Returns:
    The mean target of each row `[(A,) N, k]`, its weight `[(A,) N]`, and the variance of the target
    around its mean `[(A,) N]`. Only the gradient through the target sees the last.
  """
  if isinstance(batch, Transitions):
    weights = jnp.full(len(targets), 1 / len(targets), targets.dtype)
    if num_actions is not None:
      weights = weights * (batch.actions == jnp.arange(num_actions)[:, None])
    return targets, weights, 0
  transitions, weights = batch.transitions, batch.distribution
  if num_actions is None:
    transitions = policy_transitions(batch)
  else:
    weights = weights * batch.policy.T
  means = jnp.matmul(transitions, targets, precision="highest")
  squares = jnp.matmul(transitions, jnp.sum(targets**2, axis=-1), precision="highest")
  return means, weights, squares - jnp.sum(means**2, axis=-1)


def reverse(batch: Any) -> Any:
  """Returns the batch of the reversed chain, in which each state predicts the one before it.

  For `Expectation` this is P'(x | y) = d(x) P(y | x) / d'(y) with d' = P^T d. A state that is never
  entered has weight 0. Actions are left out.
  """
  if isinstance(batch, Transitions):
    return Transitions(batch.next_states, batch.states)
  joint = batch.distribution[:, None] * policy_transitions(batch)
  arriving = jnp.sum(joint, axis=0)
  backward = joint / jnp.where(arriving > 0, arriving, 1)
  return Expectation(backward.T, arriving, states=batch.states)


def policy_transitions(batch: Expectation) -> jax.Array:
  """Returns the chain `[S, S]` of the policy."""
  if batch.policy is None:
    return batch.transitions
  return jnp.einsum("sa,ast->st", batch.policy, batch.transitions, precision="highest")


def least_squares(embeddings: Any, targets: Any, weights: Any, *, ridge: Any = 0.0) -> jax.Array:
  """Returns the predictor M that minimises sum_n w_n |M^T phi_n - target_n|^2 + ridge |M|^2.

  Args:
    embeddings: `[..., N, k]`, of rank k unless `ridge` is positive; the result is NaN or inf
      otherwise. Where all weights are 0 it is 0.
    targets: `[..., N, l]`, or their conditional means, which give the same predictor.
    weights: `[..., N]`, not negative.
    ridge: not negative.

  Returns:
    `[..., k, l]`, (Phi^T W Phi + ridge I)^-1 Phi^T W targets.

  Example:
    >>> phi = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    >>> least_squares(phi, phi @ jnp.array([[0.0, 1.0], [3.0, 0.0]]), jnp.ones(2)).round(4)
    Array([[0., 1.],
           [3., 0.]], dtype=float32)
  """
  weighted = jnp.swapaxes(embeddings * weights[..., None], -1, -2)
  gram = jnp.matmul(weighted, embeddings, precision="highest")
  unused = jnp.sum(weights, axis=-1) == 0  # an action that is in no row of the batch
  diagonal = jnp.where(unused, 1, ridge)[..., None, None]
  gram = gram + diagonal * jnp.eye(gram.shape[-1], dtype=gram.dtype)
  return jnp.linalg.solve(gram, jnp.matmul(weighted, targets, precision="highest"))


def check_shapes(batch: Any) -> None:
  """Raises `ValueError` unless the shapes of a batch fit each other; looks at no value."""
  if isinstance(batch, Expectation):
    num_rows = np.shape(batch.transitions)[-1] if np.ndim(batch.transitions) else 0
    actions = np.shape(batch.policy)[-1:] if batch.policy is not None else ()
    meaning = "[A, S, S], by action of the policy," if actions else "[S, S]"
    checks.shape("transitions", batch.transitions, (*actions, num_rows, num_rows), meaning)
    checks.shape("distribution", batch.distribution, (num_rows,), "[S]")
    if actions:
      checks.shape("policy", batch.policy, (num_rows, *actions), "[S, A]")
    if batch.states is not None and np.shape(batch.states)[:1] != (num_rows,):
      raise ValueError(
        f"states must have one row for each of the {num_rows} states, got shape "
        f"{list(np.shape(batch.states))}"
      )
