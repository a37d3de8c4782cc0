"""TD(0) and TD(lambda) against the rules written out, and at their fixed point."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_theory import markov
from rl_theory.baselines import td

pytestmark = pytest.mark.usefixtures("x64")


def _learn(config, values, transitions, *, rate, traces=None):
  optimizer = optax.sgd(rate)
  state = td.init(values, optimizer=optimizer, config=config, traces=traces)

  def body(state, row):
    batch = jax.tree.map(lambda leaf: leaf[None], row)
    state, _ = td.update(state, batch, None, apply_fn=td.lookup, optimizer=optimizer, config=config)
    return state, state.params

  return jax.jit(lambda state: jax.lax.scan(body, state, td.Batch(*transitions)))(state)


@pytest.mark.parametrize("decay", [None, 0.0, 0.6, 1.0])
def test_updates_are_the_rules_with_accumulating_traces(decay):
  mrp = markov.garnet(jax.random.key(0), 5, 2, noise="gaussian", discount=0.8)
  path = markov.sample_trajectory(mrp, jax.random.key(1), 0, 40)
  values, trace = np.zeros(5), np.zeros(5)
  for state, reward, after in zip(*map(np.asarray, path), strict=True):
    error = reward + 0.8 * values[after] - values[state]
    trace = 0.8 * (decay or 0.0) * trace
    trace[state] += 1
    values = values + 0.1 * error * trace
  config = td.Config(discount=0.8, trace_decay=decay or 0.0)
  traces = None if decay is None else jnp.zeros((1, 5))
  state, _ = _learn(config, jnp.zeros(5), path, rate=0.1, traces=traces)
  np.testing.assert_allclose(state.params, values, atol=1e-12)  # rounding of 40 steps
  if decay is not None:
    np.testing.assert_allclose(state.traces[0], trace, atol=1e-12)


def test_several_trajectories_have_traces_of_their_own():
  config, optimizer = td.Config(discount=0.5, trace_decay=0.5), optax.sgd(1.0)
  state = td.init(jnp.zeros(3), optimizer=optimizer, config=config, traces=jnp.zeros((2, 3)))
  for states, rewards, after in (([0, 1], [1.0, 0.0], [2, 2]), ([2, 2], [4.0, 8.0], [2, 2])):
    batch = td.Batch(jnp.array(states), jnp.array(rewards), jnp.array(after))
    state, _ = td.update(state, batch, None, apply_fn=td.lookup, optimizer=optimizer, config=config)
  # First V = (1, 0, 0); then the errors 4 and 8 move state 2 fully, states 0 and 1 by a quarter.
  np.testing.assert_allclose(state.params, [2.0, 2.0, 12.0])


def test_synchronous_updates_on_certain_rewards_reach_the_value():
  mrp = markov.MarkovRewardProcess(markov.cycle_transitions(3), [1.0, -2.0, 0.5], 0.9)
  config, optimizer = td.Config(discount=0.9), optax.sgd(1.0)
  batch = td.Batch(jnp.arange(3), *markov.sample_step(mrp, jax.random.key(0)))
  state = td.init(jnp.zeros(3), optimizer=optimizer, config=config)

  def body(state, _):
    return td.update(state, batch, None, apply_fn=td.lookup, optimizer=optimizer, config=config)

  state, metrics = jax.lax.scan(body, state, length=300)
  np.testing.assert_allclose(state.params, markov.value(mrp), atol=1e-11)  # 0.9^300 is 2e-14
  assert (jnp.diff(metrics["loss"])[:20] < 0).all()


def test_bad_input_is_refused():
  for options in ({"discount": 1.0}, {"trace_decay": 1.5}, {"num_microbatches": 2}):
    with pytest.raises(ValueError, match=next(iter(options))):
      td.Config(**options)
  with pytest.raises(ValueError, match="shapes must be equal"):
    td.td_error(np.zeros(2), np.zeros(3), np.zeros(2), discount=0.5)
  config, optimizer = td.Config(), optax.sgd(1.0)
  state, empty = td.init(jnp.zeros(2), optimizer=optimizer, config=config), jnp.zeros(0)
  batch = td.Batch(empty.astype(int), empty, empty.astype(int))
  with pytest.raises(ValueError, match="states must not be empty"):
    td.update(state, batch, None, apply_fn=td.lookup, optimizer=optimizer, config=config)
