"""The NNX adapter: what changes inside a module is an argument and a result."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx

from alignment.models import nnx

MOMENTUM = 0.9


class Network(flax_nnx.Module):
  def __init__(self, rngs: flax_nnx.Rngs):
    self.first = flax_nnx.Linear(3, 8, rngs=rngs)
    self.norm = flax_nnx.BatchNorm(8, momentum=MOMENTUM, rngs=rngs)
    self.dropout = flax_nnx.Dropout(0.5, rngs=rngs)
    self.last = flax_nnx.Linear(8, 2, rngs=rngs)

  def __call__(self, x):
    return self.last(self.dropout(self.norm(self.first(x))))


@pytest.fixture
def x():
  return jax.random.normal(jax.random.key(1), (16, 3)) + 2.0


def test_equals_the_module_in_eval_mode(x):
  module = Network(flax_nnx.Rngs(0))
  module.eval()
  params, network_state, apply = nnx.from_nnx(module)
  output, after = apply(params, network_state, x, key=jax.random.key(0))
  np.testing.assert_array_equal(output, module(x))
  chex.assert_trees_all_equal(after, network_state)


def test_batch_statistics_come_out_of_jit_and_grad(x):
  """NNX BatchNorm statistics are silently lost across a plain jit."""
  module = Network(flax_nnx.Rngs(0))
  params, network_state, apply = nnx.from_nnx(module)

  def loss(params, network_state, key):
    output, network_state = apply(params, network_state, x, key=key)
    return jnp.sum(output**2), network_state

  step = jax.jit(jax.grad(loss, has_aux=True))
  grads, once = step(params, network_state, jax.random.key(0))
  _, twice = step(params, once, jax.random.key(1))
  mean = np.asarray(module.first(x)).mean(0)
  # float32 means of 16 numbers of size one
  np.testing.assert_allclose(once["norm"]["mean"], (1 - MOMENTUM) * mean, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(twice["norm"]["mean"], (1 - MOMENTUM**2) * mean, rtol=1e-5, atol=1e-6)
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads["last"]))
  chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)
  np.testing.assert_array_equal(module.norm.mean[...], np.zeros(8))  # the module itself is unmoved


def test_dropout_uses_the_key(x):
  params, network_state, apply = nnx.from_nnx(Network(flax_nnx.Rngs(0)))
  run = jax.jit(lambda key: apply(params, network_state, x, key=key)[0])
  np.testing.assert_array_equal(run(jax.random.key(1)), run(jax.random.key(1)))
  assert np.abs(run(jax.random.key(1)) - run(jax.random.key(2))).max() > 0.1


def test_two_dropouts_draw_differently():
  class Twice(flax_nnx.Module):
    def __init__(self, rngs):
      self.first, self.second = (flax_nnx.Dropout(0.5, rngs=rngs) for _ in range(2))

    def __call__(self, x):
      return self.first(x), self.second(x)

  _, _, apply = nnx.from_nnx(Twice(flax_nnx.Rngs(0)))
  (first, second), _ = apply({}, {}, jnp.ones(100), key=jax.random.key(0))
  assert 20 < np.sum(np.asarray(first) != np.asarray(second)) < 80


def test_a_missing_key_is_an_error(x):
  params, network_state, apply = nnx.from_nnx(Network(flax_nnx.Rngs(0)))
  with pytest.raises(ValueError, match="key is missing"):
    apply(params, network_state, x)
