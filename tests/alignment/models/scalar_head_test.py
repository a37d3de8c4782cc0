"""The scalar head reads where it should, and fits a decoder, DRO and the reward model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import sharding
from alignment import dro, sequences
from alignment.models import scalar_head, tokenizer, transformer

CONFIG = transformer.TransformerConfig(
  vocab_size=23,
  num_layers=2,
  width=12,
  num_heads=2,
  num_kv_heads=1,
  head_dim=6,
  mlp_width=16,
  max_length=16,
)


@pytest.fixture(scope="module")
def params():
  @jax.jit
  def noisy(key):
    fresh = scalar_head.from_decoder(transformer.init_params(CONFIG, key))
    keys = iter(jax.random.split(key, 99))
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), fresh)

  return noisy(jax.random.key(0))


def test_reads_the_last_real_token_after_the_final_norm(params):
  tokens, mask = jnp.array([[3, 4, 5, 0, 0]]), jnp.array([[1, 1, 1, 0, 0]])
  body = {name: value for name, value in params.items() if name != "scalar_head"}
  hidden = transformer.hidden_states(body, tokens, mask, config=CONFIG)
  want = hidden[0, 2] @ params["scalar_head"]["kernel"] + params["scalar_head"]["bias"]
  got = scalar_head.scalars(params, tokens, mask, config=CONFIG)
  np.testing.assert_allclose(got, [want], atol=1e-5)


def test_padding_anywhere_changes_nothing(params):
  rows = jnp.array([[3, 4, 5, 9, 9], [9, 9, 3, 4, 5], [9, 3, 4, 9, 5]])
  masks = jnp.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 1, 0, 1]])
  values = scalar_head.scalars(params, rows, masks, config=CONFIG)
  np.testing.assert_allclose(values, values[0], atol=1e-5)
  other = scalar_head.scalars(params, rows.at[:, 0].set(7), masks, config=CONFIG)
  assert abs(other[0] - values[0]) > 1e-3  # a real token counts
  np.testing.assert_allclose(other[1:], values[1:], atol=1e-5)  # a padded one does not


def test_starts_at_zero_from_a_tied_or_untied_decoder():
  for tied in (True, False):
    config = dataclasses.replace(CONFIG, tied_head=tied)
    fresh = scalar_head.from_decoder(transformer.init_params(config, jax.random.key(0)))
    assert "head" not in fresh
    tokens = jnp.array([[1, 2, 3]])
    value = scalar_head.scalars(fresh, tokens, jnp.ones_like(tokens), config=config)
    np.testing.assert_array_equal(value, [0])


def test_a_reward_reads_the_completion_and_a_value_only_the_prompt(params):
  policy = transformer.init_params(CONFIG, jax.random.key(2))
  prompt, prompt_mask = jnp.array([[0, 5], [6, 7]]), jnp.array([[0, 1], [1, 1]])
  tokens, mask = jnp.array([[3, 2, 0], [4, 2, 0], [5, 8, 2], [6, 1, 2]]), jnp.ones((4, 3))
  mask = mask.at[:2, 2].set(0)
  rows = sequences.Sequences(tokens, mask, prompt, prompt_mask)
  rewards = scalar_head.make_apply_fn(CONFIG)(params, rows)
  assert rewards.shape == (4,) and np.ptp(rewards) > 1e-3
  apply_fn = scalar_head.make_policy_and_value_fn(CONFIG)
  logps, values = apply_fn(dro.Params(policy, params), rows)
  np.testing.assert_allclose(logps, transformer.make_apply_fn(CONFIG)(policy, rows), atol=1e-6)
  want = scalar_head.scalars(params, prompt, prompt_mask, config=CONFIG)
  np.testing.assert_allclose(values, jnp.repeat(want, 2), atol=1e-6)
  other = apply_fn(dro.Params(policy, params), rows._replace(tokens=tokens + 1))[1]
  np.testing.assert_array_equal(other, values)


def test_a_saved_model_says_the_same_numbers(params, tmp_path):
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "a": 1}, unk_token="a"))
  words = tokenizer.Tokenizer(backend=backend, eos_id=0, pad_id=0)
  tokens = jnp.array([[3, 4, 5], [6, 7, 8]])
  for pairing in ("half", "adjacent"):  # the file knows the first one only
    config = dataclasses.replace(CONFIG, rope_pairing=pairing, tied_head=False)
    scalar_head.save(tmp_path / "m", config, params, tokenizer=words)
    found_config, found, _ = scalar_head.load(tmp_path / "m")
    want = scalar_head.scalars(params, tokens, jnp.ones_like(tokens), config=config)
    got = scalar_head.scalars(found, tokens, jnp.ones_like(tokens), config=found_config)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"tokens": np.array([[99]])}, "tokens must lie"),
    ({"prompt_tokens": np.array([[-1]])}, "prompt_tokens must lie"),
    ({"mask": np.ones((1, 2))}, "mask"),
    ({"prompt_mask": np.ones((1, 3))}, "prompt_mask"),
  ],
)
def test_bad_input_is_named(params, changes, match):
  one = np.array([[1]])
  rows = sequences.Sequences(one, np.ones((1, 1)), one, np.ones((1, 1)))._replace(**changes)
  with pytest.raises(ValueError, match=match):
    scalar_head.make_apply_fn(CONFIG)(params, rows)
  with pytest.raises(ValueError, match=r"must both be \[B, T\]"):
    scalar_head.scalars(params, jnp.ones((2, 5), int), jnp.ones((2, 3)), config=CONFIG)


def test_the_rules_of_the_decoder_know_the_head(params):
  mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
  sharding.infer_shardings(params, scalar_head.SHARDING_RULES, mesh)


def test_an_empty_prompt_is_one_start_token(params):
  def reward(prompt, real):
    mask = jnp.array([[0, real]])
    rows = sequences.Sequences(jnp.array([[3, 2, 0]]), jnp.ones((1, 3)), jnp.array([prompt]), mask)
    return scalar_head.make_apply_fn(CONFIG)(params, rows)

  np.testing.assert_allclose(reward([6, 7], 0), reward([6, 7], 1), atol=1e-6)
  assert abs(reward([6, 8], 0) - reward([6, 7], 0)) > 1e-4  # the completion sees it
