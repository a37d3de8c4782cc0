"""Self-predictive learning: a representation that predicts its own next value through a matrix.

A state x has an embedding phi(x) in R^k, for finitely many states a row of Phi `[S, k]`. A k x k
matrix M predicts the embedding of the next state y:

  L(Phi, M) = E_{x ~ d, y ~ P(.|x)} |M^T phi(x) - sg(phi(y))|^2 / 2,  sg = no gradient.

The loss is 0 for an embedding that is constant, and yet gradient descent need not collapse. If M is
optimal for the current Phi, the step of Phi is orthogonal to Phi: Phi^T D (P Phi - Phi M) = 0. Then
Phi^T Phi stays constant in continuous time and only grows in discrete steps, for any chain P and
any target in place of sg(phi(y)). A slow predictor, or a gradient through the target, breaks this.

`Config` has the variants of the paper as options that combine: the optimal predictor in closed
form, k inner steps of the predictor, a ratio of step sizes, a target that is a moving average. The
gradient through the target is an ablation. `self_predictive_flow` has the dynamics in continuous
time, `bidirectional` the pair of representations that finds singular vectors.

With actions there is one predictor M_a for each action (`objective="action"`). At the optimal
predictors, for any policy and distribution,

  loss of "action" = loss of "policy" - E |(M_a - M)^T phi(x)|^2 / 2.

So the objective (the negative loss up to a term that M and the semi-gradient do not see) is that of
the policy's chain plus a variance of the predictions over actions. `objective="variance"` learns
from that term alone.

Reference: Tang et al. 2022, https://arxiv.org/abs/2212.03319; for actions Khetarpal et al. 2024,
https://arxiv.org/abs/2406.02035.

| paper | here |
|---|---|
| Phi, P (latent transition) | `Params.representation`, `Params.predictor` (M above) |
| P^pi, d | `Expectation.transitions`, `Expectation.distribution` |
| P_a (latent) | `Params.predictor` of shape `[A, k, k]` |
| sg(Phi) or a target network | `State.target_params`, from `Config.target_decay` |

Deviations: the loss has a factor 1/2, so that a step of SGD is a step of the paper's dynamics.
"""

import dataclasses
import functools
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sharding
from representation import chains, collapse
from sharding import averages, checks

Metrics = dict[str, jax.Array]

PREDICTORS = ("optimal", "gradient")
OBJECTIVES = ("policy", "action", "variance")


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["ridge", "inner_step_size", "predictor_ratio", "target_decay"],
  meta_fields=["predictor", "num_inner_steps", "objective", "stop_gradient", "num_microbatches"],
)
@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters; the defaults are the idealised algorithm of the paper.

  Attributes:
    predictor: "optimal" (least squares on each batch; `Params.predictor` is not used and does not
      change) or "gradient" (`Params.predictor` is trained beside the representation).
    ridge: not negative, added to the diagonal of Phi^T D Phi in the optimal predictor. With a
      positive one Phi^T Phi is no longer conserved exactly.
    num_inner_steps: steps of gradient descent of the predictor before each step of the optimiser.
    inner_step_size: positive, their size.
    predictor_ratio: positive, a factor on the predictor's gradient. With SGD it is the ratio of the
      step sizes; Adam would divide it out.
    target_decay: in [0, 1], of the target's moving average. 0: the target is the representation
      itself, without a gradient.
    objective: "policy" (one predictor), "action" (one for each action) or "variance" (the
      difference of both losses, which needs the optimal predictor).
    stop_gradient: whether targets get no gradient. False is the ablation that collapses.
    num_microbatches: must be 1, because a predictor and the measures of collapse need the batch.
  """

  predictor: str = "optimal"
  ridge: Any = 0.0
  num_inner_steps: int = 0
  inner_step_size: Any = 0.1
  predictor_ratio: Any = 1.0
  target_decay: Any = 0.0
  objective: str = "policy"
  stop_gradient: bool = True
  num_microbatches: int = 1

  def __post_init__(self):
    checks.choice("predictor", self.predictor, PREDICTORS)
    checks.not_negative("ridge", self.ridge)
    checks.count("num_inner_steps", self.num_inner_steps, least=0)
    checks.positive("inner_step_size", self.inner_step_size)
    checks.positive("predictor_ratio", self.predictor_ratio)
    checks.probabilities("target_decay", self.target_decay)
    checks.choice("objective", self.objective, OBJECTIVES)
    if self.predictor == "optimal" and self.num_inner_steps:
      raise ValueError(
        f"num_inner_steps must be 0 with predictor='optimal', got {self.num_inner_steps}: inner "
        "steps train the predictor of predictor='gradient'"
      )
    if self.objective == "variance" and self.predictor != "optimal":
      raise ValueError(
        f"predictor must be 'optimal' with objective='variance', got {self.predictor!r}"
      )
    if not self.stop_gradient and isinstance(self.target_decay, numbers.Real) and self.target_decay:
      raise ValueError(
        f"target_decay must be 0 with stop_gradient=False, got {self.target_decay}: a gradient "
        "can only go through the representation itself"
      )
    if self.num_microbatches != 1:
      raise ValueError(
        f"num_microbatches must be 1, got {self.num_microbatches}: the optimal predictor and the "
        "measures of collapse are those of the whole batch"
      )


# What chains offer stands under this name too, so that a user imports one module.
Transitions = chains.Transitions
Expectation = chains.Expectation
make_expectation = chains.make_expectation
Batch = Transitions  # or Expectation


class Params(NamedTuple):
  """The parameters that are trained by gradients.

  Attributes:
    representation: of `apply_fn`; a table is `[S, k]`.
    predictor: `[k, k]`, or `[A, k, k]` for an objective with actions. Also where it is computed in
      closed form, it tells the number of actions.
  """

  representation: Any
  predictor: Any


class State(NamedTuple):
  """Everything that changes in training.

  Attributes:
    params: the representation and the predictor.
    target_params: of the target's representation, in float32 or wider.
    opt_state: of the optimiser.
    step: scalar int32, the number of updates so far.
  """

  params: Params
  target_params: Any
  opt_state: Any
  step: jax.Array


@checks.array_arguments
def self_predictive_loss(
  predictions: jax.Array, targets: jax.Array, *, stop_gradient: bool = True
) -> jax.Array:
  """Returns half the squared distance of each prediction and its target.

  Args:
    predictions: `[..., k]`.
    targets: `[..., k]`, the embeddings of the next states.
    stop_gradient: whether the targets get no gradient.

  Returns:
    `[...]`, not negative.

  Raises:
    ValueError: if the shapes differ.

  Example:
    >>> self_predictive_loss(jnp.array([[3.0, 4.0]]), jnp.zeros((1, 2)))
    Array([12.5], dtype=float32)

  Reference: https://arxiv.org/abs/2212.03319, eq. 1 (with a factor 1/2).
  """
  checks.same_shape(predictions=predictions, targets=targets)
  targets = jax.lax.stop_gradient(targets) if stop_gradient else targets
  return jnp.sum((predictions - targets) ** 2, axis=-1) / 2


def loss_of_embeddings(
  embeddings: jax.Array, targets: jax.Array, predictor: jax.Array, batch: Any, *, config: Config
) -> jax.Array:
  """Returns the loss of a batch, given the embeddings of its states; what `loss` differentiates.

  Args:
    embeddings: `[B, k]` of `Transitions.states`, or `[S, k]` of all states.
    targets: `[B, k]` of `Transitions.next_states`, or `[S, k]` of all states.
    predictor: `[k, k]`, or `[A, k, k]` for an objective with actions.
    batch: `Transitions` or `Expectation`. The mean of the loss over samples is its expectation.
    config: hyper-parameters.

  Returns:
    A scalar. Targets get a gradient only without `config.stop_gradient`.

  Raises:
    ValueError: if shapes do not fit, or there are fewer states than features.
  """
  _check(batch, embeddings, predictor, config)
  checks.same_shape(embeddings=embeddings, targets=targets)
  if config.stop_gradient:
    targets = jax.lax.stop_gradient(targets)
  if config.objective == "variance":
    by_action, by_policy = (
      _regression_loss(embeddings, targets, predictor, batch, config, each)
      for each in (True, False)
    )
    return by_action - by_policy
  return _regression_loss(
    embeddings, targets, predictor, batch, config, config.objective == "action"
  )


def _regression_loss(embeddings, targets, predictor, batch, config, by_action):
  means, weights, variances = chains.regression(
    batch, targets, num_actions=len(predictor) if by_action else None
  )
  if config.predictor == "optimal":
    # A constant: the loss has no slope in an optimal predictor, so this is the whole gradient.
    predictor = jax.lax.stop_gradient(
      chains.least_squares(embeddings, means, weights, ridge=config.ridge)
    )
  else:
    constant = jax.lax.stop_gradient(predictor)
    predictor = constant + config.predictor_ratio * (predictor - constant)
  predictions = jnp.matmul(embeddings, predictor, precision="highest")
  means = jnp.broadcast_to(means, predictions.shape)
  losses = self_predictive_loss(predictions, means, stop_gradient=False) + variances / 2
  return jnp.sum(weights * losses)


def init(
  params: Params,
  *,
  optimizer: optax.GradientTransformation,
  config: Config,
  target_params: Any = None,
) -> State:
  """Returns the state before the first step.

  Args:
    params: the representation and the predictor.
    optimizer: the one that `update` will get. `optax.sgd` makes an update a step of the paper.
    target_params: of the target's representation; the default is a copy of the representation's.
  """
  del config
  target_params = averages.start(params.representation if target_params is None else target_params)
  return State(params, target_params, optimizer.init(params), jnp.zeros((), jnp.int32))


def loss(
  params: Params,
  state: State,
  batch: Any,
  key: Any,
  *,
  apply_fn: Callable[..., jax.Array],
  config: Config,
) -> tuple[jax.Array, tuple[Metrics, Any]]:
  """Returns the mean loss of sampled transitions, or its exact expectation.

  Args:
    params: the only argument to differentiate in.
    state: gives the target's parameters.
    batch: `Transitions` or `Expectation`.
    key: not used.
    apply_fn: `apply_fn(params.representation, states) -> [B, k]`, a hashable function. For a table
      it is `lambda table, states: table[states]`.
    config: hyper-parameters.

  Returns:
    The scalar loss, and `(metrics, ())`. The metrics are `loss` and those of `collapse.metrics` for
    the embeddings.

  Raises:
    ValueError: if shapes do not fit, or there are fewer states than features.
  """
  del key
  states, next_states = chains.ends(batch)
  embeddings = apply_fn(params.representation, states)
  target_params = params.representation
  if config.stop_gradient:
    target_params = averages.like(state.target_params, target_params)
  targets = apply_fn(target_params, next_states)
  value = loss_of_embeddings(embeddings, targets, params.predictor, batch, config=config)
  embeddings = jax.lax.stop_gradient(embeddings)
  return value, ({"loss": value, **collapse.metrics(embeddings, spectrum=True)}, ())


@functools.partial(jax.jit, static_argnames=("apply_fn", "optimizer"))
def update(
  state: State,
  batch: Any,
  key: Any,
  *,
  apply_fn: Callable[..., jax.Array],
  optimizer: optax.GradientTransformation,
  config: Config,
) -> tuple[State, Metrics]:
  """Returns the state after inner steps of the predictor, a gradient step and one of the target.

  Args:
    state: not donated.
    batch: `Transitions` or `Expectation`.
    key: not used.
    apply_fn: see `loss`.
    optimizer: an optax transformation. Build it once: a new one compiles the step again.
    config: hyper-parameters.

  Returns:
    The new state, and the metrics of `loss` with `grad_norm`.
  """
  if config.num_inner_steps:
    states, next_states = chains.ends(batch)
    predictor = inner_steps(
      state.params.predictor,
      apply_fn(state.params.representation, states),
      apply_fn(averages.like(state.target_params, state.params.representation), next_states),
      batch,
      config=config,
    )
    state = state._replace(params=state.params._replace(predictor=predictor))
  stepped, metrics = sharding.gradient_step(
    loss, state, batch, key, apply_fn=apply_fn, optimizer=optimizer, config=config
  )
  target_params = averages.move(
    state.target_params, stepped.params.representation, config.target_decay
  )
  return stepped._replace(target_params=target_params), metrics


def inner_steps(
  predictor: jax.Array, embeddings: jax.Array, targets: jax.Array, batch: Any, *, config: Config
) -> jax.Array:
  """Returns the predictor after `config.num_inner_steps` steps of gradient descent."""
  descent = dataclasses.replace(config, predictor_ratio=1.0)

  def body(_, predictor):
    slope = jax.grad(loss_of_embeddings, argnums=2)(
      embeddings, targets, predictor, batch, config=descent
    )
    return predictor - config.inner_step_size * slope

  return jax.lax.fori_loop(0, config.num_inner_steps, body, predictor)


def _check(batch: Any, embeddings: Any, predictor: Any, config: Config) -> None:
  """Raises `ValueError` unless the shapes of all arguments fit; looks at no value."""
  chains.check_shapes(batch)
  checks.matrix("embeddings", embeddings)
  num_rows, num_features = np.shape(embeddings)
  if isinstance(batch, chains.Expectation) and num_features > num_rows:
    raise ValueError(
      f"the representation must have at most as many features as there are states, {num_rows}, got "
      f"{num_features}: its columns cannot be independent"
    )
  if config.predictor == "optimal" and num_features > num_rows:
    raise ValueError(
      f"the optimal predictor needs at least as many transitions as features, {num_features}, got "
      f"{num_rows}: give a larger batch, or predictor='gradient'"
    )
  if config.objective == "policy":
    checks.shape("predictor", predictor, (num_features, num_features), "[k, k]")
    return
  given = batch.actions if isinstance(batch, chains.Transitions) else batch.policy
  if given is None:
    name = "actions" if isinstance(batch, chains.Transitions) else "policy"
    raise ValueError(f"{name} must be given with objective={config.objective!r}, got None")
  num_actions = np.shape(predictor)[0] if np.ndim(predictor) else 0
  if isinstance(batch, chains.Transitions):
    checks.shape("actions", given, (num_rows,), "[B]")
  else:
    num_actions = np.shape(given)[1]
  checks.shape("predictor", predictor, (num_actions, num_features, num_features), "[A, k, k]")
