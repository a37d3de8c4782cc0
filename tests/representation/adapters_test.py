"""Adapters: modules with and without state as pure functions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from representation.networks import adapters, mlp


class _Stateless(nn.Module):
  @nn.compact
  def __call__(self, rows, *, train):
    del train
    return nn.Dense(3)(rows)


class _Normalised(nn.Module):
  @nn.compact
  def __call__(self, rows, *, train):
    return nn.BatchNorm(momentum=0.5, use_running_average=not train)(rows)


ROWS = np.random.default_rng(0).normal(2, 3, (6, 4)).astype(np.float32)


def test_an_encoder_without_state_returns_the_state_that_it_gets():
  encoder = adapters.Encoder(_Stateless())
  params, state = encoder.init(jax.random.key(0), ROWS)
  out, same = encoder(params, (), ROWS, train=True)  # `()` is the default of the algorithms
  assert same == ()
  np.testing.assert_array_equal(out, encoder(params, state, ROWS, train=True)[0])
  np.testing.assert_allclose(out, ROWS @ params["Dense_0"]["kernel"], rtol=1e-5)  # float32


def test_only_a_training_pass_changes_the_state():
  encoder = adapters.Encoder(_Normalised())
  params, state = encoder.init(jax.random.key(0), ROWS)
  out, trained = encoder(params, state, ROWS, train=True)
  np.testing.assert_allclose(out.mean(0), 0, atol=1e-5)  # float32
  # Half of the old mean, which is 0, and half of that of the rows.
  mean = trained["batch_stats"]["BatchNorm_0"]["mean"]
  np.testing.assert_allclose(mean, ROWS.mean(0) / 2, rtol=1e-5)
  _, same = encoder(params, trained, ROWS, train=False)
  assert same is trained


def test_adapters_of_equal_modules_are_equal_and_hash_alike():
  """Otherwise `jax.jit` would compile again for an adapter that was built again."""
  for one, other in (
    (adapters.Encoder(_Stateless()), adapters.Encoder(_Stateless())),
    (adapters.Predictor(mlp.MLP(5, 2)), adapters.Predictor(mlp.MLP(5, 2))),
  ):
    assert one == other and hash(one) == hash(other)
  assert adapters.Predictor(mlp.MLP(5, 2)) != adapters.Predictor(mlp.MLP(5, 3))


def test_a_predictor_applies_its_module():
  predictor = adapters.Predictor(mlp.MLP(5, 2))
  params = predictor.init(jax.random.key(0), jnp.zeros((1, 4)))
  expected = predictor.module.apply({"params": params}, ROWS)
  assert expected.shape == (6, 2)
  np.testing.assert_array_equal(predictor(params, ROWS), expected)
