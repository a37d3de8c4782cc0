"""Latent prediction: its losses against loops, who gets gradients, and what it learns.

Tolerances of 1e-8 and below allow for rounding in float64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from representation import latent_prediction
from representation.networks import recurrent

B, T, A, WIDTH = 3, 6, 2, 4


def _problem(lengths=(6, 4, 1), seed=0):
  """Returns networks, parameters and a batch in the default float dtype."""
  rng = np.random.default_rng(seed)
  batch = latent_prediction.Batch(
    jnp.asarray(rng.normal(size=(B, T, 5))),
    jnp.asarray(rng.integers(0, A, (B, T))),
    jnp.arange(T) < jnp.array(lengths)[:, None],
  )
  apply_fn = recurrent.networks(WIDTH, A)
  params = recurrent.init(jax.random.key(seed), apply_fn, batch.observations[:, 0])
  wide = jax.tree.map(lambda leaf: leaf.astype(jnp.result_type(float)), params)
  return apply_fn, wide, batch


def _losses(apply_fn, params, target_params, batch, horizon):
  online, target = (
    apply_fn.agent(p, batch.observations, batch.actions) for p in (params.agent, target_params)
  )
  return latent_prediction.losses(
    params, online, target, batch.actions, batch.mask, apply_fn=apply_fn, horizon=horizon
  )


def test_losses_equal_loops_over_pairs_of_steps(x64):
  horizon = 3
  apply_fn, params, batch = _problem()
  target_params = jax.tree.map(lambda leaf: leaf + 0.1, params.agent)
  online, target = (
    apply_fn.agent(p, batch.observations, batch.actions) for p in (params.agent, target_params)
  )

  def distance(prediction, aim):
    units = [np.asarray(x) / np.linalg.norm(x) for x in (prediction, aim)]
    return np.sum((units[0] - units[1]) ** 2)

  dynamics, predict, look_back = map(
    jax.jit, (apply_fn.dynamics, apply_fn.forward, apply_fn.backward)
  )
  forward, backward = [], []
  for b in range(B):
    for t in range(T):
      hidden = online.states[b, t]
      for i in range(1, horizon + 1):
        if t + i >= T or not batch.mask[b, t + i]:
          break
        hidden = dynamics(params.dynamics, hidden, batch.actions[b, t + i - 1])
        predicted = predict(params.forward, hidden)
        forward.append(distance(predicted, target.embeddings[b, t + i]))
        if i == horizon:
          predicted = look_back(params.backward, online.embeddings[b, t + i])
          backward.append(distance(predicted, target.states[b, t]))
  found = _losses(apply_fn, params, target_params, batch, horizon)
  np.testing.assert_allclose(found, [np.mean(forward), np.mean(backward)], atol=1e-12)


def test_the_agent_reads_the_past_alone_and_steps_equal_the_unrolled_reading(x64):
  apply_fn, params, batch = _problem()
  agent = apply_fn.agent
  states = agent(params.agent, batch.observations, batch.actions).states
  changed = agent(
    params.agent, batch.observations.at[:, 3].add(1), batch.actions.at[:, 3].set(0)
  ).states
  np.testing.assert_array_equal(changed[:, :3], states[:, :3])
  assert np.abs(changed[:, 3:] - states[:, 3:]).min(axis=(0, 2)).max() > 1e-6
  state, before = agent.start(B), jnp.full(B, -1)
  for t in range(T):
    state = agent.step(params.agent, state, batch.observations[:, t], before)
    np.testing.assert_allclose(state, states[:, t], atol=1e-12)
    before = batch.actions[:, t]


@pytest.mark.slow
def test_what_is_under_the_mask_teaches_nothing(x64):
  apply_fn, params, batch = _problem()
  padding = ~batch.mask
  noisy = batch._replace(
    observations=jnp.where(padding[..., None], 9.0, batch.observations),
    actions=jnp.where(padding, 1 - batch.actions, batch.actions),
  )

  def total(params, batch):
    return sum(_losses(apply_fn, params, params.agent, batch, 2))

  found = jax.jit(jax.value_and_grad(total))
  for ours, theirs in zip(
    *(jax.tree.leaves(found(params, each)) for each in (batch, noisy)), strict=True
  ):
    np.testing.assert_allclose(ours, theirs, atol=1e-12)
  empty = batch._replace(mask=jnp.zeros_like(batch.mask))
  np.testing.assert_array_equal(_losses(apply_fn, params, params.agent, empty, 2), 0)


def test_each_loss_trains_its_own_half_of_the_agent(x64):
  """The forward loss trains states, and the backward loss embeddings: each predicts the other."""
  apply_fn, params, batch = _problem()
  target = apply_fn.agent(params.agent, batch.observations, batch.actions)

  def one(index, params, online, target):
    return latent_prediction.losses(
      params, online, target, batch.actions, batch.mask, apply_fn=apply_fn, horizon=2
    )[index]

  forward, backward = (
    jax.grad(functools.partial(one, index), (0, 1, 2))(params, target, target) for index in (0, 1)
  )

  def moved(tree):
    return any(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(tree))

  heads, encoded, targets = forward
  assert moved(heads.dynamics) and moved(heads.forward) and not moved(heads.backward)
  assert moved(encoded.states) and not moved(encoded.embeddings) and not moved(targets)
  heads, encoded, targets = backward
  assert moved(heads.backward) and not moved((heads.dynamics, heads.forward))
  assert moved(encoded.embeddings) and not moved(encoded.states) and not moved(targets)


def test_the_target_follows_slowly_and_weights_are_weights(x64):
  apply_fn, params, batch = _problem()
  optimizer = optax.sgd(0.1)
  config = latent_prediction.Config(horizon=2, target_decay=0.75, forward_weight=0.5)
  state = latent_prediction.init(params, optimizer=optimizer, config=config)
  after, metrics = latent_prediction.update(
    state, batch, None, apply_fn=apply_fn, optimizer=optimizer, config=config
  )
  expected = jax.tree.map(
    lambda old, new: 0.75 * old + 0.25 * new, state.target_params, after.params.agent
  )
  for ours, theirs in zip(
    jax.tree.leaves(after.target_params), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(ours, theirs, atol=1e-12)
  parts = (
    metrics["latent_prediction/forward_loss"], metrics["latent_prediction/backward_loss"]
  )  # fmt: skip
  np.testing.assert_allclose(metrics["loss"], 0.5 * parts[0] + parts[1], atol=1e-12)


@pytest.mark.slow  # three hundred steps through a recurrent network
def test_it_learns_what_actions_do_and_does_not_collapse():
  """On a ring of six cells an action moves left or right, so actions decide what comes next.

  The target is slow. With a decay of 0.9 and both losses the embeddings grow so alike here that
  wrong actions cost nothing: a target of that speed does not hold off a partial collapse.
  """
  cells, length = 6, 8
  apply_fn, optimizer = recurrent.networks(16, 2), optax.adam(1e-2)
  config = latent_prediction.Config(horizon=3)

  def draw(key):
    first, moves = jax.random.split(key)
    actions = jax.random.randint(moves, (16, length), 0, 2)
    steps = jnp.cumsum(2 * actions - 1, axis=1) - (2 * actions - 1)
    places = (jax.random.randint(first, (16, 1), 0, cells) + steps) % cells
    return latent_prediction.Batch(
      jax.nn.one_hot(places, cells), actions, jnp.ones((16, length), bool)
    )

  def body(state, key):
    return latent_prediction.update(
      state, draw(key), None, apply_fn=apply_fn, optimizer=optimizer, config=config
    )

  params = recurrent.init(jax.random.key(0), apply_fn, jnp.zeros((1, cells)))
  state = latent_prediction.init(params, optimizer=optimizer, config=config)
  keys = jax.random.split(jax.random.key(1), 300)
  state, metrics = jax.jit(lambda state: jax.lax.scan(body, state, keys))(state)
  loss = metrics["latent_prediction/forward_loss"]
  assert loss[-1] < 0.1 < 1 < loss[0]
  batch = draw(jax.random.key(2))
  wrong = batch._replace(actions=1 - batch.actions)  # told of the opposite moves
  assert _losses(apply_fn, state.params, state.target_params, wrong, 3)[0] > 3 * loss[-1]
  assert metrics["collapse/effective_rank"][-1] > 2
  assert metrics["collapse/mean_cosine"][-1] < 0.9


def test_bad_arguments_name_the_remedy():
  apply_fn, params, batch = _problem()
  with pytest.raises(ValueError, match="horizon must be below the number of steps T = 6, got 6"):
    _losses(apply_fn, params, params.agent, batch, 6)
  with pytest.raises(ValueError, match="shapes must be equal"):
    _losses(apply_fn, params, params.agent, batch._replace(mask=batch.mask[:, 1:]), 2)
  with pytest.raises(ValueError, match="horizon must be an integer >= 1"):
    latent_prediction.Config(horizon=0)
  with pytest.raises(ValueError, match="num_microbatches must be 1"):
    latent_prediction.Config(num_microbatches=2)
  with pytest.raises(ValueError, match="target_decay must lie in"):
    latent_prediction.Config(target_decay=1.5)
  with pytest.raises(ValueError, match="backward_weight must be finite and not negative"):
    latent_prediction.Config(backward_weight=-1)
