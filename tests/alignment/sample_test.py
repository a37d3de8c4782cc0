"""The `sample` of the online methods: who is drawn from, how often, and with which keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignment import nash_md, preference_games, sequences, srpo
from alignment.baselines import online_ipo, rloo, sft
from alignment.models import sampling

PROMPTS = sequences.Prompts(jnp.array([[0], [1]]), jnp.ones((2, 1)))


def _sample_fn(params, prompt_tokens, prompt_mask, key, *, num_samples=1, beta=None):
  """A bandit with a row of logits for each prompt; with `beta`, its mixture with uniform."""
  del prompt_mask
  logits = params[prompt_tokens[:, 0]]
  if beta is not None:
    logits = nash_md.geometric_mixture_logits(logits, jnp.zeros_like(logits), beta=beta)
  arms = jax.random.categorical(key, jnp.repeat(logits, num_samples, axis=0))[:, None]
  return sampling.Samples(arms, jnp.ones(arms.shape), jnp.zeros(arms.shape))


def _nash_state(ema_decay=0.0, ema_params=None):
  params = jnp.array([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]])
  config = nash_md.Config(ema_decay=ema_decay)
  return nash_md.init(params, optimizer=optax.sgd(1.0), config=config, ema_params=ema_params)


def _shares(rows, num_samples):
  arms = np.asarray(rows.tokens).reshape(-1, num_samples)
  return np.stack([(arms == arm).mean(1) for arm in range(3)], axis=1)


def test_nash_md_draws_the_opponent_from_the_average_and_through_its_mixture():
  average = jnp.array([[0.0, 3.0, 0.0], [0.0, 0.0, 3.0]])
  state = _nash_state(ema_params=average)
  draw = functools.partial(_sample_fn, num_samples=4000)
  first, second = jax.jit(
    functools.partial(nash_md.sample, sample_fn=draw, opponent_fn=functools.partial(draw, beta=0.5))
  )(state, PROMPTS, jax.random.key(0))
  # Four standard errors of a share of 4,000 draws: 0.032.
  np.testing.assert_allclose(_shares(first, 4000), jax.nn.softmax(state.params), atol=0.032)
  np.testing.assert_allclose(_shares(second, 4000), jax.nn.softmax(average / 2), atol=0.032)
  np.testing.assert_array_equal(first.prompt_tokens, PROMPTS.tokens)


def test_self_play_draws_two_different_samples():
  params = jnp.zeros((2, 3))
  state = nash_md.init(params, optimizer=optax.sgd(1.0), config=nash_md.Config())
  draw = functools.partial(_sample_fn, num_samples=50)
  first, second = nash_md.sample(state, PROMPTS, jax.random.key(0), sample_fn=draw)
  assert (first.tokens != second.tokens).any()


def test_sampled_nash_md_reaches_its_fixed_point():
  """sample, judge and update as one scan, against `nash_md_pg_fixed_point`."""
  preferences = np.array([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]])
  tau, beta = 0.3, 0.25
  ref_logps = np.log(np.ones(3) / 3)
  config, optimizer = nash_md.Config(tau=tau), optax.sgd(0.5)
  state = nash_md.init(jnp.zeros((1, 3)), optimizer=optimizer, config=config)
  prompts = sequences.Prompts(jnp.zeros((1, 1), int), jnp.ones((1, 1)))
  draw = functools.partial(_sample_fn, num_samples=1000)
  opponent = functools.partial(draw, beta=beta)

  def apply_fn(params, rows):
    return jax.nn.log_softmax(params[0])[rows.tokens]

  def step(state, key):
    first, second = nash_md.sample(state, prompts, key, sample_fn=draw, opponent_fn=opponent)
    wins = jnp.asarray(preferences)[first.tokens[:, 0], second.tokens[:, 0]]
    refs = jnp.asarray(ref_logps)[first.tokens]
    batch = nash_md.Batch(first.tokens, first.mask, refs, wins)
    state, _ = nash_md.update(
      state, batch, key, apply_fn=apply_fn, optimizer=optimizer, config=config
    )
    return state, jax.nn.softmax(state.params[0])

  _, probs = jax.lax.scan(step, state, jax.random.split(jax.random.key(1), 400))
  want = np.exp(preference_games.nash_md_pg_fixed_point(preferences, ref_logps, tau, beta))
  # Averaged over 200 steps of 1,000 samples: a Monte Carlo error below 0.005.
  np.testing.assert_allclose(probs[200:].mean(0), want, atol=0.01)


def test_online_ipo_splits_the_pairs_of_each_prompt():
  params = jnp.array([[99.0, 0.0, 0.0], [0.0, 99.0, 0.0]])
  state = online_ipo.init(params, optimizer=optax.sgd(1.0), config=online_ipo.Config())
  draw = functools.partial(_sample_fn, num_samples=2)
  first, second = online_ipo.sample(state, PROMPTS, jax.random.key(0), sample_fn=draw)
  for rows in (first, second):
    np.testing.assert_array_equal(rows.tokens, [[0], [1]])
  with pytest.raises(ValueError, match="drew 3 completions"):
    bad = functools.partial(_sample_fn, num_samples=3)
    online_ipo.sample(state, PROMPTS, jax.random.key(0), sample_fn=bad)


def test_rloo_keeps_the_samples_of_a_prompt_together():
  params = jnp.array([[99.0, 0.0, 0.0], [0.0, 99.0, 0.0]])
  state = rloo.init(params, optimizer=optax.sgd(1.0), config=rloo.Config())
  draw = functools.partial(_sample_fn, num_samples=3)
  rows = rloo.sample(state, PROMPTS, jax.random.key(0), sample_fn=draw)
  np.testing.assert_array_equal(rows.tokens[:, 0], [0, 0, 0, 1, 1, 1])


def test_srpo_shows_each_answer_to_its_revision():
  """A reviser that adds one to what it is shown: answers 0, 1, 2, 3 behind the plain prompts."""

  def sample_fn(params, tokens, mask, key):
    del params, mask, key
    return sampling.Samples(tokens[:, -1:], jnp.ones((len(tokens), 1)), None)

  def revision_fn(rows):
    tokens = jnp.concatenate([rows.prompt_tokens, rows.tokens + 1], axis=1)
    return sequences.Prompts(tokens, jnp.ones(tokens.shape))

  state = srpo.init(jnp.zeros(1), optimizer=optax.sgd(1.0), config=srpo.Config())
  options = {"sample_fn": sample_fn, "revision_fn": revision_fn}
  answers = srpo.sample(state, PROMPTS, jax.random.key(0), num_revisions=3, **options)
  np.testing.assert_array_equal(
    [rows.tokens[:, 0] for rows in answers], np.arange(4)[:, None] + [0, 1]
  )
  assert all(rows.prompt_tokens is PROMPTS.tokens for rows in answers)
  with pytest.raises(ValueError, match="num_revisions must be an integer >= 0, got -1"):
    srpo.sample(state, PROMPTS, jax.random.key(0), num_revisions=-1, **options)


def test_what_does_not_fit_raises():
  state = _nash_state()
  with pytest.raises(ValueError, match="2 completions and opponent_fn 4"):
    nash_md.sample(
      state, PROMPTS, jax.random.key(0), sample_fn=_sample_fn,
      opponent_fn=functools.partial(_sample_fn, num_samples=2),
    )  # fmt: skip
  one = sequences.Prompts(PROMPTS.tokens, jnp.ones((3, 1)))
  with pytest.raises(ValueError, match="prompt_mask"):
    sequences.sample(state.params, one, jax.random.key(0), sample_fn=_sample_fn)


def test_sft_matches_hand_numbers_and_reaches_the_data_distribution(x64):
  logps, mask = (
    jnp.array([[-1.0, -3.0, -9.0], [-2.0, -4.0, -6.0]]),
    jnp.array([[1, 1, 0], [1, 1, 1]]),
  )
  np.testing.assert_allclose(sft.sft_loss(logps, mask), [4, 12])
  np.testing.assert_allclose(sft.sft_loss(logps, mask, reduction="mean"), [2, 4])
  counts = np.array([3, 5, 2])  # the maximum-likelihood policy has these shares

  def apply_fn(params, rows):
    return jax.nn.log_softmax(params)[rows.tokens]

  tokens = np.repeat(np.arange(3), counts)[:, None]
  batch = sft.Batch(jnp.asarray(tokens), jnp.ones(tokens.shape))
  optimizer, config = optax.sgd(1.0), sft.Config()
  state = sft.init(jnp.zeros(3), optimizer=optimizer, config=config)
  step = functools.partial(sft.update, apply_fn=apply_fn, optimizer=optimizer, config=config)
  state, _ = jax.lax.scan(lambda s, _: step(s, batch, None), state, length=300)
  np.testing.assert_allclose(jax.nn.softmax(state.params), counts / 10, atol=1e-9)
