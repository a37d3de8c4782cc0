"""Reward and preference models: hand numbers, symmetry, and what each can and cannot represent."""

import autoregressive as ar
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignment import reward_model, sequences

CYCLE = np.array([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]])


def arm_rewards(params, rows):
  """A reward of each arm: params `[A]`."""
  return params[jnp.asarray(rows.tokens)[:, 0]]


def arm_pairs(params, rows):
  """f(y, y') of two arms: params `[A, A]`; y is the last prompt token, y' the completion."""
  return params[jnp.asarray(rows.prompt_tokens)[:, -1], jnp.asarray(rows.tokens)[:, 0]]


def every_pair(preferences, counts):
  first, second = ar.pair_indices(counts)
  ones, zeros = np.ones((len(first), 1), np.float32), np.zeros((len(first), 1), np.int32)
  return reward_model.Batch(
    first[:, None], ones, second[:, None], ones, zeros, ones, preferences[first, second]
  )


def fit(batch, params, apply_fn, config, num_steps=3000):
  optimizer = optax.adam(optax.exponential_decay(0.05, num_steps // 9, 0.5, staircase=True))
  step = lambda state, _: reward_model.update(  # noqa: E731
    state, batch, None, apply_fn=apply_fn, optimizer=optimizer, config=config
  )
  state = reward_model.init(params, optimizer=optimizer, config=config)
  return jax.lax.scan(step, state, None, length=num_steps)[0].params


def test_hand_values():
  losses = reward_model.preference_loss(jnp.array([1.0, -2.0]), chosen_probs=jnp.array([1.0, 0.25]))
  np.testing.assert_allclose(losses, [0.313262, 0.25 * 2.126928 + 0.75 * 0.126928], rtol=1e-5)
  np.testing.assert_allclose(
    reward_model.antisymmetric_logits(jnp.array([3.0]), jnp.array([1.0])), [1.0]
  )


def test_far_logits_do_not_overflow():
  losses, gradient = jax.value_and_grad(lambda z: reward_model.preference_loss(z).sum())(
    jnp.array([-1e4, 1e4])
  )
  np.testing.assert_allclose(losses, 1e4)
  np.testing.assert_allclose(gradient, [-1, 0])


def test_bradley_terry_data_give_back_the_rewards_up_to_a_constant(x64):
  rewards = np.random.default_rng(0).normal(size=4)
  batch = every_pair(ar.bradley_terry(rewards), np.array([1, 2, 1, 3]))
  config = reward_model.Config()
  fitted = fit(batch, jnp.zeros(4), arm_rewards, config)
  np.testing.assert_allclose(fitted - fitted.mean(), rewards - rewards.mean(), atol=1e-7)
  # The constant is free; centring settles it without moving a difference... by much.
  shifted = fit(batch, jnp.full(4, 5.0), arm_rewards, config)
  np.testing.assert_allclose(shifted - shifted.mean(), rewards - rewards.mean(), atol=1e-6)
  assert abs(shifted.mean() - fitted.mean()) > 1
  centred = fit(batch, jnp.full(4, 5.0), arm_rewards, reward_model.Config(centring=1e-3))
  assert abs(centred.mean()) < 0.5


def test_a_cycle_is_beyond_rewards_but_not_beyond_pairs(x64):
  config = reward_model.Config(kind="pairwise")
  pairs = fit(every_pair(CYCLE, np.ones(3, int)), jnp.zeros((3, 3)), arm_pairs, config)
  batch = every_pair(CYCLE, np.ones(3, int))
  probs = reward_model.preference_probs(pairs, batch, apply_fn=arm_pairs, config=config)
  np.testing.assert_allclose(probs, batch.chosen_probs, atol=1e-6)
  fits = [
    fit(every_pair(CYCLE, np.array(counts)), jnp.zeros(3), arm_rewards, reward_model.Config())
    for counts in ((1, 1, 1), (5, 1, 1))
  ]
  first, second = (x - x.mean() for x in fits)
  assert np.abs(first - second).max() > 0.1  # what the reward is depends on who wrote the pairs


@pytest.mark.parametrize("kind", reward_model.KINDS)
def test_exchanging_the_answers_exchanges_the_probability(kind):
  rng = np.random.default_rng(1)
  tokens, masks = rng.integers(0, 5, (2, 6, 4)), np.ones((2, 6, 4), np.float32)
  prompt = (rng.integers(0, 5, (6, 2)), np.ones((6, 2), np.float32))

  def apply_fn(params, rows):  # sees the order of everything
    rows = sequences.repeat_prompts(rows)
    text = jnp.concatenate([rows.prompt_tokens, rows.tokens], axis=1)
    return jnp.sin(text @ params[: text.shape[1]])

  params, config = jnp.asarray(rng.normal(size=10)), reward_model.Config(kind=kind)
  probs = [
    reward_model.preference_probs(
      params,
      reward_model.Batch(tokens[i], masks[i], tokens[1 - i], masks[1 - i], *prompt),
      apply_fn=apply_fn,
      config=config,
    )
    for i in (0, 1)
  ]
  np.testing.assert_allclose(probs[0] + probs[1], 1, atol=1e-6)
  assert np.ptp(probs[0]) > 0.1


def test_bad_input_is_named():
  with pytest.raises(ValueError, match="kind must be one of"):
    reward_model.Config(kind="elo")
  with pytest.raises(ValueError, match="centring must be finite and not negative"):
    reward_model.Config(centring=-1.0)
  with pytest.raises(ValueError, match="centring must be 0 for kind='pairwise'"):
    reward_model.Config(kind="pairwise", centring=0.1)
  good = every_pair(np.full((2, 2), 0.5), np.ones(2, int))
  for kind in reward_model.KINDS:
    for field in ("chosen_mask", "rejected_tokens", "prompt_mask"):
      with pytest.raises(ValueError, match=field):
        reward_model.loss(
          jnp.zeros(2), None, good._replace(**{field: np.ones((4, 3), int)}), None,
          apply_fn=arm_rewards, config=reward_model.Config(kind=kind),
        )  # fmt: skip
  with pytest.raises(ValueError, match="chosen_probs"):
    reward_model.preference_loss(np.zeros(2), chosen_probs=np.array([0.5, 1.5]))
  with pytest.raises(ValueError, match=r"apply_fn\(params, sequences\)"):
    reward_model.loss(
      jnp.zeros(2), None, every_pair(np.full((2, 2), 0.5), np.ones(2, int)), None,
      apply_fn=lambda params, rows: jnp.zeros((3, 1)), config=reward_model.Config(),
    )  # fmt: skip
