"""MLP: its formula in NumPy, its activation, its initial biases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from representation.networks import mlp


@pytest.mark.parametrize("activation", [None, jax.nn.elu], ids=["prelu", "elu"])
def test_output_equals_the_formula(activation):
  rows = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
  module = mlp.MLP(5, 2, activation)
  params = module.init(jax.random.key(0), rows)["params"]
  first, second = params["Dense_0"], params["Dense_1"]
  hidden = rows @ first["kernel"] + first["bias"]
  negative = np.expm1(hidden) if activation else 0.25 * hidden
  expected = np.where(hidden > 0, hidden, negative) @ second["kernel"] + second["bias"]
  # 1e-5: float32 sums in another order.
  np.testing.assert_allclose(module.apply({"params": params}, rows), expected, atol=1e-5)


def test_biases_start_like_those_of_pytorch():
  params = mlp.MLP(900, 400).init(jax.random.key(0), jnp.zeros((1, 4)))["params"]
  for layer, bound in (("Dense_0", 1 / 2), ("Dense_1", 1 / 30)):
    # All of 400 or more uniform draws lie below 0.95 of the bound with probability below 1e-8.
    assert 0.95 * bound < jnp.abs(params[layer]["bias"]).max() <= bound
