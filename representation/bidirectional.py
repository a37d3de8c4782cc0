"""Bidirectional self-predictive learning: two representations that predict each other in time.

The forward representation phi predicts the backward one of the next state, and psi predicts the
forward one of the state before:

  L = E_{x ~ d, y ~ P(.|x)} (|M^T phi(x) - sg(psi(y))|^2 + |N^T psi(y) - sg(phi(x))|^2) / 2.

With optimal predictors neither collapses. With a uniform distribution and a doubly stochastic P the
two converge to the k largest left and right singular vectors of P, symmetric or not. One
representation alone (`self_predictive`) finds eigenvectors, and only of a symmetric P.

Reference: Tang et al. 2022, https://arxiv.org/abs/2212.03319, section 5.

| paper | here |
|---|---|
| Phi, Phi~ | `Params.forward`, `Params.backward` |
| P, P~ (latent transitions) | `Params.forward_predictor`, `Params.backward_predictor` |

Deviations: the loss has a factor 1/2, as in `self_predictive`. The paper's backward loss takes a
doubly stochastic P; here the backward step is that of the chain as it runs, so the distribution of
y is P^T d.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sharding
from representation import chains, collapse, self_predictive
from sharding import averages, checks

Metrics = dict[str, jax.Array]
Config = self_predictive.Config  # the options apply to both directions
Batch = chains.Transitions  # or chains.Expectation


class Params(NamedTuple):
  """The parameters that are trained by gradients.

  Attributes:
    forward: of phi; a table is `[S, k]`.
    backward: of psi.
    forward_predictor: M, `[k, k]`.
    backward_predictor: N, `[k, k]`.
  """

  forward: Any
  backward: Any
  forward_predictor: Any
  backward_predictor: Any


class Targets(NamedTuple):
  """The parameters of the target representations."""

  forward: Any
  backward: Any


class Networks(NamedTuple):
  """The two representations, as hashable functions of parameters and states: `[B, k]`."""

  forward: Callable[..., jax.Array]
  backward: Callable[..., jax.Array]


class State(NamedTuple):
  """Everything that changes in training.

  Attributes:
    params: the representations and the predictors.
    target_params: `Targets`, in float32 or wider.
    opt_state: of the optimiser.
    step: scalar int32, the number of updates so far.
  """

  params: Params
  target_params: Targets
  opt_state: Any
  step: jax.Array


@checks.array_arguments
def bidirectional_loss(
  forward_predictions: jax.Array,
  backward_embeddings: jax.Array,
  backward_predictions: jax.Array,
  forward_embeddings: jax.Array,
  *,
  stop_gradient: bool = True,
) -> jax.Array:
  """Returns the sum of both losses of each transition.

  Args:
    forward_predictions: `[..., k]`, M^T phi(x).
    backward_embeddings: `[..., k]`, the targets psi(y).
    backward_predictions: `[..., k]`, N^T psi(y).
    forward_embeddings: `[..., k]`, the targets phi(x).
    stop_gradient: whether the targets get no gradient.

  Returns:
    `[...]`, not negative.

  Raises:
    ValueError: if the shapes differ.
  """
  pairs = (
    (forward_predictions, backward_embeddings),
    (backward_predictions, forward_embeddings),
  )
  forward, backward = (
    self_predictive.self_predictive_loss(*pair, stop_gradient=stop_gradient) for pair in pairs
  )
  return forward + backward


def init(
  params: Params,
  *,
  optimizer: optax.GradientTransformation,
  config: Config,
  target_params: Targets | None = None,
) -> State:
  """Returns the state before the first step.

  Args:
    params: the representations and the predictors.
    optimizer: the one that `update` will get.
    target_params: of both targets; the default is a copy of the representations'.

  Raises:
    ValueError: if the objective of `config` is not that of the policy.
  """
  _check(config)
  target_params = averages.start(Targets(*params[:2]) if target_params is None else target_params)
  return State(params, target_params, optimizer.init(params), jnp.zeros((), jnp.int32))


def loss(
  params: Params, state: State, batch: Any, key: Any, *, apply_fn: Networks, config: Config
) -> tuple[jax.Array, tuple[Metrics, Any]]:
  """Returns the mean loss of sampled transitions, or its exact expectation.

  Args:
    params: the only argument to differentiate in.
    state: gives the targets' parameters.
    batch: `Transitions` or `Expectation`.
    key: not used.
    apply_fn: the two representations.
    config: hyper-parameters.

  Returns:
    The scalar loss, and `(metrics, ())`. The metrics are `loss`, both of its parts, those of
    `collapse.metrics` for the forward embeddings, and the effective rank of the backward ones.

  Raises:
    ValueError: if shapes do not fit, or there are fewer states than features.
  """
  del key
  _check(config)
  sides = _sides(params, state, batch, apply_fn, config)
  forward, backward = (self_predictive.loss_of_embeddings(*side, config=config) for side in sides)
  phi, psi = jax.lax.stop_gradient([embeddings for embeddings, *_ in sides])
  metrics = {
    "loss": forward + backward,
    "bidirectional/forward_loss": forward,
    "bidirectional/backward_loss": backward,
    "bidirectional/backward_effective_rank": collapse.effective_rank(psi),
    **collapse.metrics(phi, spectrum=True),
  }
  return forward + backward, (metrics, ())


@functools.partial(jax.jit, static_argnames=("apply_fn", "optimizer"))
def update(
  state: State,
  batch: Any,
  key: Any,
  *,
  apply_fn: Networks,
  optimizer: optax.GradientTransformation,
  config: Config,
) -> tuple[State, Metrics]:
  """Returns the state after inner steps of the predictors, a gradient step and one of the targets.

  Args:
    state: not donated.
    batch: `Transitions` or `Expectation`.
    key: not used.
    apply_fn: the two representations.
    optimizer: an optax transformation. Build it once: a new one compiles the step again.
    config: hyper-parameters.

  Returns:
    The new state, and the metrics of `loss` with `grad_norm`.
  """
  if config.num_inner_steps:
    forward, backward = (
      self_predictive.inner_steps(predictor, embeddings, targets, each, config=config)
      for embeddings, targets, predictor, each in _sides(
        state.params, state, batch, apply_fn, config
      )
    )
    params = state.params._replace(forward_predictor=forward, backward_predictor=backward)
    state = state._replace(params=params)
  stepped, metrics = sharding.gradient_step(
    loss, state, batch, key, apply_fn=apply_fn, optimizer=optimizer, config=config
  )
  target_params = averages.move(
    state.target_params, Targets(*stepped.params[:2]), config.target_decay
  )
  return stepped._replace(target_params=target_params), metrics


def _sides(
  params: Params, state: State, batch: Any, apply_fn: Networks, config: Config
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
  """Returns the arguments of `self_predictive.loss_of_embeddings` for each direction."""
  states, next_states = chains.ends(batch)
  own = Targets(params.forward, params.backward)
  sources = averages.like(state.target_params, own) if config.stop_gradient else own
  forward = (
    apply_fn.forward(params.forward, states),
    apply_fn.backward(sources.backward, next_states),
    params.forward_predictor,
    batch,
  )
  backward = (
    apply_fn.backward(params.backward, next_states),
    apply_fn.forward(sources.forward, states),
    params.backward_predictor,
    chains.reverse(batch),
  )
  return forward, backward


def _check(config: Config) -> None:
  if config.objective != "policy":
    raise ValueError(f"objective must be 'policy' for both directions, got {config.objective!r}")
