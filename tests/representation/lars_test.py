"""LARS on numbers worked by hand, beside a slow NumPy version, and where optax's own differs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sharding
from representation import lars

GRADS = {"kernel": np.array([[0.6, 0.8]]), "bias": np.array([0.5])}
OPTIONS = {"weight_decay": 0.01, "trust_coefficient": 1e-3}


def _run(optimizer, num_steps, grads=GRADS):
  params = {"kernel": np.array([[3.0, 4.0]]), "bias": np.array([1.0])}
  params, grads = jax.tree.map(jnp.asarray, (params, grads))
  state = optimizer.init(params)
  for _ in range(num_steps):
    updates, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params


def test_two_steps_by_hand(x64):
  """u = g + 0.01 w is parallel to w, so each step's u has the norm 1e-3 |w|, w / 1000."""
  found = _run(lars.lars(0.1, **OPTIONS), 2)
  once = 1 - 0.1 * 1e-3
  twice = once - 0.1 * (0.9 * 1e-3 + 1e-3 * once)
  np.testing.assert_allclose(found["kernel"], [[3 * twice, 4 * twice]], rtol=1e-12)
  np.testing.assert_allclose(found["kernel"], [[2.99913003, 3.99884004]], atol=1e-8)
  # The bias is neither decayed nor scaled: 1 - 0.1 * (0.5 + (0.45 + 0.5)).
  np.testing.assert_allclose(found["bias"], [0.855], rtol=1e-12)


def test_five_steps_against_numpy_with_a_changing_rate(x64):
  rng = np.random.default_rng(0)
  params = {"block": {"kernel": rng.normal(size=(3, 3, 2, 4)), "scale": rng.normal(size=4)}}
  grads = [jax.tree.map(lambda x: rng.normal(size=x.shape), params) for _ in range(5)]
  rates = [0.0, 0.2, 0.4, 0.3, 0.1]
  optimizer = lars.lars(lambda step: jnp.asarray(rates)[step], **OPTIONS)
  found, state = jax.tree.map(jnp.asarray, params), optimizer.init(params)
  kernel, scale = params["block"]["kernel"], params["block"]["scale"]
  momentum = [0, 0]
  for rate, grad in zip(rates, grads, strict=True):
    updates, state = optimizer.update(grad, state, found)
    found = optax.apply_updates(found, updates)
    step = grad["block"]["kernel"] + 0.01 * kernel
    step = step * 1e-3 * np.linalg.norm(kernel) / np.linalg.norm(step)
    momentum = [0.9 * momentum[0] + step, 0.9 * momentum[1] + grad["block"]["scale"]]
    kernel, scale = kernel - rate * momentum[0], scale - rate * momentum[1]
  np.testing.assert_allclose(found["block"]["kernel"], kernel, rtol=1e-10)
  np.testing.assert_allclose(found["block"]["scale"], scale, rtol=1e-10)


def test_optax_differs_when_the_rate_changes_and_only_then(x64):
  """Its momentum holds steps that are already multiplied by the rates of their time."""
  masks = {"weight_decay_mask": sharding.decay_mask, "trust_ratio_mask": sharding.decay_mask}
  constant = _run(optax.lars(0.1, **OPTIONS, **masks), 2)
  np.testing.assert_allclose(
    constant["kernel"], _run(lars.lars(0.1, **OPTIONS), 2)["kernel"], rtol=1e-12
  )

  def rise(step):
    return 0.1 * step

  # The rates are 0 and 0.1; the first step is in our momentum, but not in optax's.
  np.testing.assert_allclose(_run(lars.lars(rise, **OPTIONS), 2)["bias"], [1 - 0.1 * 0.95])
  theirs = _run(optax.lars(rise, **OPTIONS, **masks), 2)
  np.testing.assert_allclose(theirs["bias"], [1 - 0.1 * 0.5])


def test_zero_gradients_and_zero_kernels_stay_finite():
  zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), GRADS)
  found = _run(lars.lars(0.1, weight_decay=0.0), 2, zero)
  np.testing.assert_array_equal(found["kernel"], [[3.0, 4.0]])
  optimizer = lars.lars(0.1, weight_decay=0.0)
  updates, _ = optimizer.update(GRADS, optimizer.init(zero), zero)
  np.testing.assert_allclose(
    updates["kernel"], -0.1 * GRADS["kernel"], rtol=1e-6
  )  # the ratio counts as 1


def test_biases_and_normalisation_layers_are_left_out():
  params = {
    "Conv_0": {"kernel": 0},
    "BatchNorm_0": {"scale": 0, "bias": 0},
    "Dense_0": {"kernel": 0, "bias": 0},
  }
  assert sharding.decay_mask((params, {"bias_free": 0})) == (
    {
      "Conv_0": {"kernel": True},
      "BatchNorm_0": {"scale": False, "bias": False},
      "Dense_0": {"kernel": True, "bias": False},
    },
    {"bias_free": True},
  )


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"weight_decay": -1.0}, "weight_decay must be finite and not negative"),
    ({"trust_coefficient": 0.0}, "trust_coefficient must be positive"),
    ({"momentum": 1.5}, "momentum must lie in"),
  ],
)
def test_bad_hyperparameters_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    lars.lars(0.1, **options)
