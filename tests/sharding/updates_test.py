"""One gradient step: what it changes, what it leaves, and how it treats micro-batches."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sharding


@dataclasses.dataclass(frozen=True)
class Config:
  num_microbatches: int = 1


class Plain(NamedTuple):
  params: Any
  opt_state: Any
  step: Any


class Full(NamedTuple):
  step: Any
  target: Any
  network_state: Any
  opt_state: Any
  params: Any


OPTIMIZER = optax.chain(optax.trace(0.9), optax.scale(-0.1))  # momentum: it has a state


def loss(params, state, batch, key, *, apply_fn, config):
  """Mean squared error; counts its examples, and its calls in the network state if there is one."""
  del key, config
  errors = apply_fn(params, batch["x"]) - batch["y"]
  network_state = jax.tree.map(lambda calls: calls + 1, getattr(state, "network_state", ()))
  value = jnp.mean(errors**2)
  return value, ({"loss": value, "rows": jnp.int32(len(batch["x"]))}, network_state)


def linear(params, x):
  return x @ params["kernel"] + params["bias"]


def problem():
  rng = np.random.default_rng(0)
  batch = {"x": jnp.asarray(rng.normal(size=(8, 3))), "y": jnp.asarray(rng.normal(size=8))}
  return batch, {"kernel": jnp.asarray(rng.normal(size=3)), "bias": jnp.ones(())}


def step(state, batch, config, loss=loss):
  return sharding.gradient_step(
    loss, state, batch, None, apply_fn=linear, optimizer=OPTIMIZER, config=config
  )


def test_two_steps_by_hand(x64):
  batch, params = problem()
  x, y = np.asarray(batch["x"]), np.asarray(batch["y"])
  state = Plain(params, OPTIMIZER.init(params), 0)
  kernel, bias, momentum = np.asarray(params["kernel"]), 1.0, np.zeros(4)
  for number in (1, 2):
    errors = x @ kernel + bias - y
    gradient = np.append(2 * errors @ x / 8, 2 * errors.mean())
    momentum = gradient + 0.9 * momentum
    kernel, bias = kernel - 0.1 * momentum[:3], bias - 0.1 * momentum[3]
    state, metrics = step(state, batch, Config())
    # Float64: the same dozen operations in another order.
    np.testing.assert_allclose(state.params["kernel"], kernel, rtol=1e-12)
    np.testing.assert_allclose(state.params["bias"], bias, rtol=1e-12)
    np.testing.assert_allclose(metrics["loss"], np.mean(errors**2), rtol=1e-12)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-12)
    assert state.step == number
  assert set(metrics) == {"loss", "rows", "grad_norm"} and type(state) is Plain


@pytest.mark.parametrize("config", [Config(), Config(4), None])
def test_the_network_state_is_replaced_and_other_fields_are_left(config):
  batch, params = problem()
  target = {"kernel": jnp.arange(3.0)}
  state = Full(jnp.int32(5), target, {"calls": jnp.int32(0)}, OPTIMIZER.init(params), params)
  after, _ = step(state, batch, config)
  assert after.target is target and after.step == 6
  # Micro-batches thread the network state: each starts from the one before it.
  assert after.network_state["calls"] == getattr(config, "num_microbatches", 1)
  assert np.abs(after.params["kernel"] - params["kernel"]).max() > 0
  assert np.abs(jax.tree.leaves(after.opt_state)[0]).max() > 0
  assert state.network_state["calls"] == 0  # the argument is left as it was


def test_micro_batches_give_the_same_step(x64):
  batch, params = problem()
  sizes = []

  def watched(params, state, batch, key, **kwargs):
    sizes.append(len(batch["x"]))
    return loss(params, state, batch, key, **kwargs)

  state = Plain(params, OPTIMIZER.init(params), 0)
  whole, split = (step(state, batch, Config(k), watched) for k in (1, 4))
  assert set(sizes) == {8, 2}, "num_microbatches was not respected"
  for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(split), strict=True):
    # Float64: a mean of four means instead of one mean. Counts are summed: eight rows either way.
    np.testing.assert_allclose(one, other, rtol=1e-12)
  with pytest.raises(ValueError, match="num_microbatches is 3, which does not divide the 8 rows"):
    step(state, batch, Config(3))


def test_a_step_can_be_jitted_scanned_and_vmapped(x64):
  batch, params = problem()
  state = Plain(params, OPTIMIZER.init(params), jnp.zeros((), jnp.int32))
  plain = state
  for _ in range(3):
    plain, _ = step(plain, batch, Config())
  scanned, _ = jax.lax.scan(lambda s, _: step(s, batch, Config()), state, None, length=3)

  def scaled(scale):
    return step(state, {**batch, "y": scale * batch["y"]}, Config())[1]["loss"]

  batched = jax.jit(jax.vmap(scaled))(jnp.array([1.0, 2.0]))
  for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(scanned), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-12)  # float64, another order of fused sums
  np.testing.assert_allclose(batched[0], step(state, batch, Config())[1]["loss"], rtol=1e-12)
