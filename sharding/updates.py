"""One gradient step: what every `update` does after its own loss."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from sharding import batches, checks


def gradient_step(
  loss: Callable[..., Any],
  state: Any,
  batch: Any,
  key: Any,
  *,
  apply_fn: Any,
  optimizer: optax.GradientTransformation,
  config: Any,
) -> tuple[Any, dict[str, jax.Array]]:
  """Returns the state after one optimiser step on a loss, and the metrics of that loss.

  Args:
    loss: `loss(params, state, batch, key, *, apply_fn, config) -> (scalar, (metrics,
      network_state))`; differentiated in `params`.
    state: a `NamedTuple` with `params`, `opt_state` and `step`. A field `network_state` is replaced
      as well where there is one; all other fields are left to the caller.
    batch: for the loss.
    key: for the loss.
    apply_fn: the network, for the loss.
    optimizer: the one that made `state.opt_state`. A line search, which evaluates the loss itself,
      does not work here.
    config: for the loss. Its field `num_microbatches`, where it has one, says into how many parts
      the batch is split (see `accumulate_grads`).

  Returns:
    The new state, and the metrics with `grad_norm`, the global norm of the gradient.

  Raises:
    ValueError: a field of the config is None though its default is not; otherwise as the loss.

  Example:
    >>> import collections, jax.numpy as jnp
    >>> State = collections.namedtuple("State", "params opt_state step")
    >>> def loss(params, state, batch, key, *, apply_fn, config):
    ...   value = (apply_fn(params) - batch) ** 2
    ...   return value, ({"loss": value}, ())
    >>> optimizer = optax.sgd(0.25)
    >>> state = State(jnp.float32(3.0), optimizer.init(3.0), 0)
    >>> state, metrics = gradient_step(
    ...   loss, state, 1.0, None, apply_fn=lambda x: x, optimizer=optimizer, config=None)
    >>> print(state.params, state.step, metrics["grad_norm"])
    2.0 1 4.0
  """
  checks.given(config)
  grad_fn = batches.accumulate_grads(loss, getattr(config, "num_microbatches", 1))
  (_, (metrics, network_state)), grads = grad_fn(
    state.params, state, batch, key, apply_fn=apply_fn, config=config
  )
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  changed = {
    "params": optax.apply_updates(state.params, updates),
    "opt_state": opt_state,
    "step": state.step + 1,
  }
  if hasattr(state, "network_state"):
    changed["network_state"] = network_state
  return state._replace(**changed), {**metrics, "grad_norm": optax.global_norm(grads)}
