"""Categorical TD against a slow projection, TD(0) and its fixed point."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_theory import markov, return_distributions
from rl_theory.baselines import categorical_td, td

pytestmark = pytest.mark.usefixtures("x64")


def _slow_target(probs, reward, discount, atoms):
  found, spacing = np.zeros(len(atoms)), atoms[1] - atoms[0]
  for prob, atom in zip(probs, atoms, strict=True):
    target = np.clip(reward + discount * atom, atoms[0], atoms[-1])
    found += prob * np.maximum(0, 1 - np.abs(target - atoms) / spacing)
  return found


def test_target_equals_a_slow_projection():
  rng = np.random.default_rng(0)
  probs, rewards = rng.dirichlet(np.ones(6), 4), rng.normal(size=4)
  found = categorical_td.categorical_target(probs, rewards, discount=0.7, low=-1.0, high=1.5)
  atoms = np.linspace(-1, 1.5, 6)
  for row in range(4):
    np.testing.assert_allclose(
      found[row], _slow_target(probs[row], rewards[row], 0.7, atoms), atol=1e-12
    )
  np.testing.assert_allclose(found.sum(1), 1)
  top = categorical_td.categorical_target(probs, np.full(4, 9.0), discount=0.7, low=-1, high=1.5)
  np.testing.assert_allclose(top[:, -1], 1)  # all of it leaves the grid


def _learn(module, params, config, mrp, *, rate, num_steps):
  optimizer, states = optax.sgd(rate), jnp.arange(len(mrp.transitions))

  def body(state, key):
    batch = module.Batch(states, *markov.sample_step(mrp, key))
    state, _ = module.update(
      state, batch, None, apply_fn=module.lookup, optimizer=optimizer, config=config
    )
    return state, state.params

  state = module.init(params, optimizer=optimizer, config=config)
  keys = jax.random.split(jax.random.key(0), num_steps)
  return jax.jit(lambda state: jax.lax.scan(body, state, keys)[1])(state)


def test_the_mean_follows_td_exactly_if_the_grid_covers_the_returns():
  mrp = markov.artefact()
  start = jnp.full((2, 31), 1 / 31)
  config = categorical_td.Config(discount=0.9, low=-10.0, high=20.0)
  laws = _learn(categorical_td, start, config, mrp, rate=0.1, num_steps=200)
  atoms = categorical_td.atoms(-10.0, 20.0, 31)
  values = _learn(td, start @ atoms, td.Config(discount=0.9), mrp, rate=0.1, num_steps=200)
  np.testing.assert_allclose(laws @ atoms, values, atol=1e-10)  # rounding
  np.testing.assert_allclose(laws.sum(-1), 1)


def test_fixed_point_spreads_mass_even_where_all_is_certain():
  """Which quantile TD does not: `qtd_test` has the same process, exact for every m."""
  mrp = markov.MarkovRewardProcess(markov.cycle_transitions(3), [1.0, -2.0, 0.5], 0.9)
  config = categorical_td.Config(discount=0.9, low=-20.0, high=10.0)
  laws = _learn(categorical_td, jnp.full((3, 31), 1 / 31), config, mrp, rate=1.0, num_steps=400)
  atoms = categorical_td.atoms(-20.0, 10.0, 31)
  values = markov.value(mrp)
  np.testing.assert_allclose(laws[-1] @ atoms, values, atol=1e-9)
  distance = return_distributions.wasserstein(values[:, None], atoms, second_probs=laws[-1])
  # The spacing is 1, so one projection costs at most 1/2 and all of them 1/2 / (1 - 0.9).
  assert (distance > 0.3).all() and (distance <= 5).all()


def test_bad_input_is_refused():
  for options in ({"discount": 1.0}, {"high": -10.0}, {"low": jnp.nan}, {"num_microbatches": 2}):
    with pytest.raises(ValueError, match=next(iter(options))):
      categorical_td.Config(**{k: float(v) if k != "num_microbatches" else v
                               for k, v in options.items()})  # fmt: skip
  with pytest.raises(ValueError, match="rewards must have shape"):
    categorical_td.categorical_target(np.ones((2, 3)) / 3, np.zeros(3), discount=0.5, low=0, high=1)
