"""Self-predictive learning in continuous time: the dynamics, what they conserve, where they go.

With E = P Phi' - Phi M, where Phi' is the target (Phi itself without a target network) and D the
weights of the states, the dynamics are

  dPhi/dt = D E M^T,  M = (Phi^T D Phi)^-1 Phi^T D P Phi'   or   dM/dt = ratio Phi^T D E,
  dPhi'/dt = rate (Phi - Phi').

* Phi^T Phi is constant with the optimal M, for any P, D and target.
* Phi^T Phi - M M^T / ratio is constant with the slow M, for any P, D and target.
* For symmetric P, D = I and orthonormal Phi, f = |Phi^T P Phi|^2 grows at 4 |dPhi/dt|^2. A set of
  eigenvectors is a stable limit if and only if lambda_j (lambda_j - lambda_i) > 0 for all j in the
  set and i outside (`chain_spectrum.stability_table`). For positive semi-definite P this is the set
  of the k largest. With negative eigenvalues there are more (`chain_spectrum.stable_sets`).
* The bidirectional dynamics have f = |Phi^T P Psi|^2, which grows at 2 (|dPhi/dt|^2 +
  |dPsi/dt|^2). Only the k largest singular values are stable, for any P.

A person with a chain starts here:

>>> chain = jnp.array([[0.7, 0.2, 0.1], [0.2, 0.6, 0.2], [0.1, 0.2, 0.7]])
>>> start = Variables(jnp.eye(3)[:, :2])
>>> end, _ = integrate(lambda x: flow(x, transitions=chain), start, step=0.2, num_steps=2000)
>>> print(f"{trace_objective(end.representation, chain):.3f}")  # 1 ** 2 + 0.6 ** 2
1.360

Without `distribution` D is the identity, the time scale in which the paper states its theorems. It
is S times faster than a uniform distribution. Float32 drifts by 1e-4 in the conserved quantities;
use `jax.enable_x64`.

Reference: Tang et al. 2022, https://arxiv.org/abs/2212.03319, sections 3 to 5. The conservation law
of the slow predictor and the two stability tables are derived here.

| paper | here |
|---|---|
| Phi_t, P_t (latent) | `Variables.representation`, `Variables.predictor` |
| P^pi, D | `transitions`, `distribution` |
| Phi_t, Phi~_t | `Pair.forward`, `Pair.backward` |
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from representation import chain_spectrum, chains
from sharding import checks

GRADIENTS = ("semi", "full", "full_of_means")


class Variables(NamedTuple):
  """What moves. A field that is None is not a variable of the dynamics.

  Attributes:
    representation: Phi, `[S, k]`.
    predictor: M, `[k, k]`. None: the optimal one at every time.
    target: Phi', `[S, k]`. None: Phi itself.
  """

  representation: Any
  predictor: Any = None
  target: Any = None


class Pair(NamedTuple):
  """The two representations of the bidirectional dynamics, `[S, k]` each.

  Attributes:
    forward: Phi, which predicts the `backward` embedding of the next state.
    backward: Psi, which predicts the `forward` embedding of the state before.
  """

  forward: Any
  backward: Any


def optimal_predictor(
  representation: Any,
  transitions: Any,
  distribution: Any = None,
  *,
  target: Any = None,
  ridge: Any = 0.0,
) -> jax.Array:
  """Returns M* = (Phi^T D Phi + ridge I)^-1 Phi^T D P Phi', `[k, k]`.

  Args:
    representation: Phi, `[S, k]`, of rank k unless `ridge` is positive.
    transitions: P, `[S, S]`.
    distribution: `[S]`, the diagonal of D; None for the identity.
    target: Phi', `[S, k]`; the default is Phi.
    ridge: not negative.

  Raises:
    ValueError: if shapes do not fit, k > S, or rows of P do not sum to 1.

  Example:
    >>> optimal_predictor(jnp.eye(2), jnp.array([[0.25, 0.75], [0.5, 0.5]]))
    Array([[0.25, 0.75],
           [0.5 , 0.5 ]], dtype=float32)
  """
  weights = _check(transitions, distribution, representation=representation, target=target)
  checks.not_negative("ridge", ridge, fetch=True)
  representation, transitions = jnp.asarray(representation), jnp.asarray(transitions)
  target = representation if target is None else jnp.asarray(target)
  return chains.least_squares(representation, transitions @ target, weights, ridge=ridge)


def flow(
  variables: Variables,
  transitions: Any,
  distribution: Any = None,
  *,
  ratio: Any = None,
  target_rate: Any = None,
  gradient: str = "semi",
  ridge: Any = 0.0,
) -> Variables:
  """Returns the time derivative of the variables.

  Args:
    variables: the representation; a predictor and a target where they move on their own.
    transitions: P, `[S, S]`; rows sum to 1.
    distribution: `[S]`, the diagonal of D; None for the identity.
    ratio: positive, how many times faster than the representation the predictor moves; given if and
      only if `variables.predictor` is.
    target_rate: not negative, how fast the target follows; given if and only if `variables.target`
      is. A moving average with decay a in steps of size h has the rate (1 - a) / h.
    gradient: "semi" (targets are constants), or as an ablation the whole gradient of the loss:
      "full" of the loss with a sampled next state, E |M^T phi(x) - phi(y)|^2 / 2; "full_of_means"
      of the loss with its expected embedding, E |M^T phi(x) - E phi(y)|^2 / 2. The semi-gradients
      of the two are equal, the whole ones are not.
    ridge: not negative, for the optimal predictor.

  Returns:
    The derivatives, with the fields that `variables` has.

  Raises:
    ValueError: for arguments that do not fit together, k > S, rows of P that do not sum to 1, or
      `ratio` <= 0.
  """
  variables = Variables(*(None if part is None else jnp.asarray(part) for part in variables))
  phi, predictor, target = variables
  weights = _check(transitions, distribution, representation=phi, target=target)
  checks.choice("gradient", gradient, GRADIENTS)
  for name, part in zip(variables._fields, variables, strict=True):
    if part is not None:
      checks.finite(name, part, fetch=True)
  for name, option, moving in (
    ("ratio", ratio, "predictor"),
    ("target_rate", target_rate, "target"),
  ):
    if (option is None) != (getattr(variables, moving) is None):
      raise ValueError(
        f"{name} must be given if and only if variables.{moving} is, got {name}={option!r}"
      )
  if gradient != "semi" and target is not None:
    raise ValueError(f"gradient must be 'semi' with a target, got {gradient!r}")
  source = phi if target is None else target
  if predictor is None:
    predictor = optimal_predictor(phi, transitions, distribution, target=target, ridge=ridge)
  else:
    checks.positive("ratio", ratio, fetch=True)
    checks.shape("predictor", predictor, 2 * np.shape(phi)[1:], "[k, k]")
  transitions = jnp.asarray(transitions)
  error = transitions @ source - phi @ predictor
  weighted = weights[:, None] * error
  slope = weighted @ predictor.T
  if gradient == "full":
    arriving = transitions.T @ weights
    slope += transitions.T @ (weights[:, None] * (phi @ predictor)) - arriving[:, None] * phi
  elif gradient == "full_of_means":
    slope -= transitions.T @ weighted
  predictor_slope = target_slope = None
  if variables.predictor is not None:
    predictor_slope = ratio * (phi.T @ weighted)
  if target is not None:
    checks.not_negative("target_rate", target_rate, fetch=True)
    target_slope = target_rate * (phi - target)
  return Variables(slope, predictor_slope, target_slope)


def bidirectional_flow(
  pair: Pair, transitions: Any, distribution: Any = None, *, ridge: Any = 0.0
) -> Pair:
  """Returns the time derivative of both representations, each with its optimal predictor.

  With D the weights of the states and D' those of the next states,

    dPhi/dt = (D P Psi - D Phi M) M^T,    M = (Phi^T D Phi)^-1 Phi^T D P Psi,
    dPsi/dt = ((D P)^T Phi - D' Psi N) N^T,  N = (Psi^T D' Psi)^-1 Psi^T (D P)^T Phi.

  Args:
    pair: Phi and Psi.
    transitions: P, `[S, S]`; rows sum to 1.
    distribution: `[S]`, the diagonal of D; D' is then P^T d. None: both are the identity, which is
      the uniform distribution of a doubly stochastic P up to the time scale.
    ridge: not negative, for both predictors.

  Raises:
    ValueError: if shapes do not fit, k > S, or rows of P do not sum to 1.

  Reference: https://arxiv.org/abs/2212.03319, section 5.
  """
  phi, psi = pair
  weights = _check(transitions, distribution, forward=phi, backward=psi)
  checks.not_negative("ridge", ridge, fetch=True)
  phi, psi, transitions = jnp.asarray(phi), jnp.asarray(psi), jnp.asarray(transitions)
  joint = weights[:, None] * transitions
  arriving = weights if distribution is None else jnp.sum(joint, axis=0)

  def slope(own, other, weights, joint):
    moments = joint @ other
    gram = own.T @ (weights[:, None] * own)
    gram = gram + ridge * jnp.eye(own.shape[1], dtype=gram.dtype)
    predictor = jnp.linalg.solve(gram, own.T @ moments)
    return (moments - weights[:, None] * (own @ predictor)) @ predictor.T

  return Pair(slope(phi, psi, weights, joint), slope(psi, phi, arriving, joint.T))


def integrate(
  flow: Callable[[Any], Any],
  init: Any,
  *,
  step: Any,
  num_steps: int,
  save_every: int = 1,
  measure: Callable[[Any], Any] = lambda variables: variables,
) -> tuple[Any, Any]:
  """Returns the solution of d variables/dt = flow(variables), by the classical Runge-Kutta method.

  Args:
    flow: maps a tree of arrays to its derivative, a tree of the same structure.
    init: the tree at time 0. Its dtype is that of the solution.
    step: positive, the time step; the error of the solution is of order step^4.
    num_steps: how many of them.
    save_every: after how many steps to measure; it must divide `num_steps`.
    measure: what to save of the variables; the default is all of them.

  Returns:
    The variables at the end, and the measurements `[1 + num_steps / save_every, ...]`, from time 0
    on.

  Raises:
    ValueError: if `step` is not positive or `save_every` does not divide `num_steps`.

  Example:
    >>> end, _ = integrate(lambda x: -x, jnp.float32(1), step=0.1, num_steps=10)
    >>> print(f"{end:.4f}")  # exp(-1)
    0.3679
  """
  checks.positive("step", step, fetch=True)
  checks.count("num_steps", num_steps)
  checks.count("save_every", save_every)
  if num_steps % save_every:
    raise ValueError(f"save_every must divide num_steps = {num_steps}, got {save_every}")

  def shifted(variables, slopes, size):
    return jax.tree.map(lambda x, slope: x + size * slope, variables, slopes)

  def advance(variables, _):
    first = flow(variables)
    second = flow(shifted(variables, first, step / 2))
    third = flow(shifted(variables, second, step / 2))
    fourth = flow(shifted(variables, third, step))
    mean = jax.tree.map(lambda a, b, c, d: (a + 2 * (b + c) + d) / 6, first, second, third, fourth)
    return shifted(variables, mean, step), None

  def period(variables, _):
    variables, _ = jax.lax.scan(advance, variables, length=save_every)
    return variables, measure(variables)

  end, measured = jax.lax.scan(period, init, length=num_steps // save_every)
  start = measure(init)
  return end, jax.tree.map(
    lambda first, rest: jnp.concatenate([first[None], rest]), start, measured
  )


def trace_objective(left: Any, transitions: Any, right: Any = None) -> jax.Array:
  """Returns f = |Phi^T P Psi|_F^2, for one representation Phi = Psi.

  Args:
    left: Phi, `[S, k]` with orthonormal columns.
    transitions: P, `[S, S]`.
    right: Psi, `[S, k]`; the default is Phi.

  Returns:
    A scalar. Its largest value over orthonormal Phi and Psi is the sum of the k largest squared
    singular values of P; |P - Phi Phi^T P Psi Psi^T|^2 = |P|^2 - f.
  """
  left, transitions = jnp.asarray(left), jnp.asarray(transitions)
  right = left if right is None else jnp.asarray(right)
  return jnp.sum((left.T @ transitions @ right) ** 2)


def _check(transitions: Any, distribution: Any, **representations: Any) -> jax.Array:
  """Checks shapes and probabilities; returns the diagonal of D, `[S]`."""
  chain_spectrum.square(transitions)
  num_states = np.shape(transitions)[0]
  known = {name: each for name, each in representations.items() if each is not None}
  checks.same_shape(**known)
  for name, each in known.items():
    checks.matrix(name, each)
    checks.shape(name, each, (num_states, np.shape(each)[1]), "[S, k]")
    chain_spectrum.num_features_fit(np.shape(each)[1], num_states)
  # Only the sums of the rows: the theorems hold for negative entries as well.
  if not isinstance(transitions, jax.core.Tracer):
    sums = np.asarray(transitions).sum(-1)
    if not np.allclose(sums, 1, atol=1e-4):
      raise ValueError(f"transitions must have rows that sum to 1, got sums {sums}")
  if distribution is None:
    return jnp.ones(num_states, jnp.asarray(transitions).dtype)
  checks.shape("distribution", distribution, (num_states,), "[S]")
  checks.distribution("distribution", distribution, fetch=True)
  return jnp.asarray(distribution)
