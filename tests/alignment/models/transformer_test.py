"""The decoder against a slow NumPy restatement; what padding, layout and mesh may not change."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from alignment import sequences
from alignment.models import attention, transformer

CONFIG = transformer.TransformerConfig(
  vocab_size=37,
  num_layers=3,
  width=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  mlp_width=20,
  max_length=32,
  rope_theta=100.0,
)
SCALING = transformer.RopeScaling(
  factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_max_length=16
)


@functools.partial(jax.jit, static_argnames=("config", "seed"))
def make_params(config, seed=0):
  """Parameters large enough that attention and the norms matter."""
  params = transformer.init_params(config, jax.random.key(seed))
  keys = iter(jax.random.split(jax.random.key(seed + 1), 99))
  return jax.tree.map(
    lambda x: x + (0.3 if x.ndim > 1 else 0.2) * jax.random.normal(next(keys), x.shape), params
  )


logits_of = jax.jit(transformer.logits, static_argnames="config")


def numpy_logits(params, tokens, config):
  """One sequence, token by token and head by head, in float64, straight from the papers."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  half = config.head_dim // 2
  frequencies = [config.rope_theta ** (-2 * i / config.head_dim) for i in range(half)]
  if config.rope_scaling:
    s = config.rope_scaling
    for i, frequency in enumerate(frequencies):
      wavelength = 2 * math.pi / frequency
      if wavelength > s.original_max_length / s.low_frequency_factor:
        frequencies[i] = frequency / s.factor
      elif wavelength > s.original_max_length / s.high_frequency_factor:
        smooth = (s.original_max_length / wavelength - s.low_frequency_factor) / (
          s.high_frequency_factor - s.low_frequency_factor
        )
        frequencies[i] = (1 - smooth) * frequency / s.factor + smooth * frequency

  def norm(x, scale):
    return x / np.sqrt(np.mean(x * x) + config.norm_epsilon) * scale

  def rotate(x, position):
    out = np.empty_like(x)
    for i, frequency in enumerate(frequencies):
      a, b = (i, i + half) if config.rope_pairing == "half" else (2 * i, 2 * i + 1)
      c, s = math.cos(position * frequency), math.sin(position * frequency)
      out[a], out[b] = x[a] * c - x[b] * s, x[a] * s + x[b] * c
    return out

  xs = [params["embed"]["embedding"][token] for token in tokens]
  for i in range(config.num_layers):
    layer = jax.tree.map(lambda x, i=i: x[i], params["layers"])
    kernels = {name: value["kernel"] for name, value in layer["attention"].items()}
    keys, values = [], []
    for position, x in enumerate(xs):
      normed = norm(x, layer["attention_norm"]["scale"])
      query = (normed @ kernels["query"]).reshape(config.num_heads, -1)
      key = (normed @ kernels["key"]).reshape(config.num_kv_heads, -1)
      keys.append([rotate(head, position) for head in key])
      values.append((normed @ kernels["value"]).reshape(config.num_kv_heads, -1))
      outs = []
      for head in range(config.num_heads):
        shared = head // (config.num_heads // config.num_kv_heads)
        q = rotate(query[head], position)
        scores = np.array([q @ key[shared] for key in keys]) / math.sqrt(config.head_dim)
        weights = np.exp(scores - scores.max())
        outs.append(weights @ np.array([value[shared] for value in values]) / weights.sum())
      x = x + np.concatenate(outs) @ kernels["output"]
      normed = norm(x, layer["mlp_norm"]["scale"])
      gate = normed @ layer["mlp"]["gate"]["kernel"]
      up = normed @ layer["mlp"]["up"]["kernel"]
      xs[position] = x + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp"]["down"]["kernel"]
  hidden = np.array([norm(x, params["final_norm"]["scale"]) for x in xs])
  if config.tied_head:
    return hidden @ params["embed"]["embedding"].T
  return hidden @ params["head"]["kernel"]


def batch_of(config, seed=0, batch=3, prompt=4, length=6):
  keys = jax.random.split(jax.random.key(seed), 2)
  prompt_tokens = jax.random.randint(keys[0], (batch, prompt), 0, config.vocab_size)
  tokens = jax.random.randint(keys[1], (batch, length), 0, config.vocab_size)
  return sequences.Sequences(
    tokens, jnp.ones(tokens.shape), prompt_tokens, jnp.ones(prompt_tokens.shape)
  )


@pytest.mark.parametrize("pairing", ["half", "adjacent"])
@pytest.mark.parametrize("scaling", [None, SCALING])
@pytest.mark.parametrize("tied", [True, False])
def test_equals_numpy(pairing, scaling, tied):
  config = dataclasses.replace(CONFIG, rope_pairing=pairing, rope_scaling=scaling, tied_head=tied)
  params = make_params(config)
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 9))
  got = logits_of(params, tokens, np.ones(tokens.shape), config=config)
  want = np.stack([numpy_logits(params, row, config) for row in tokens])
  assert got.dtype == jnp.float32
  # float32 sums over 20 features, three layers, logits of size 5
  np.testing.assert_allclose(got, want, atol=5e-5)


def test_the_wrong_pairing_is_another_model():
  params = make_params(CONFIG)
  other = dataclasses.replace(CONFIG, rope_pairing="adjacent")
  tokens = jnp.arange(9)[None]
  a, b = (logits_of(params, tokens, tokens >= 0, config=c) for c in (CONFIG, other))
  assert np.abs(a - b).max() > 0.1


def test_params_layout():
  config = dataclasses.replace(CONFIG, tied_head=False)
  params = transformer.init_params(config, jax.random.key(0))
  assert type(params) is dict
  layers, width, mlp_width = config.num_layers, config.width, config.mlp_width
  queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
  assert jax.tree.map(jnp.shape, params) == {
    "embed": {"embedding": (config.vocab_size, width)},
    "layers": {
      "attention_norm": {"scale": (layers, width)},
      "attention": {
        "query": {"kernel": (layers, width, queries)},
        "key": {"kernel": (layers, width, keys)},
        "value": {"kernel": (layers, width, keys)},
        "output": {"kernel": (layers, queries, width)},
      },
      "mlp_norm": {"scale": (layers, width)},
      "mlp": {
        "gate": {"kernel": (layers, width, mlp_width)},
        "up": {"kernel": (layers, width, mlp_width)},
        "down": {"kernel": (layers, mlp_width, width)},
      },
    },
    "final_norm": {"scale": (width,)},
    "head": {"kernel": (width, config.vocab_size)},
  }
  assert "head" not in transformer.init_params(CONFIG, jax.random.key(0))


def test_layers_start_different():
  kernel = transformer.init_params(CONFIG, jax.random.key(0))["layers"]["mlp"]["up"]["kernel"]
  assert np.abs(kernel[0] - kernel[1]).max() > 0.01


def test_apply_fn_equals_the_logits():
  """Position P - 1 predicts the first completion token: off by one is the classic mistake."""
  params, batch = make_params(CONFIG), batch_of(CONFIG)
  got = transformer.make_apply_fn(CONFIG, logps_chunk=8)(params, batch)
  tokens = jnp.concatenate([batch.prompt_tokens, batch.tokens], axis=1)
  logits = logits_of(params, tokens, jnp.ones(tokens.shape), config=CONFIG)
  want = sequences.token_logps(logits[:, 3:-1], batch.tokens)
  np.testing.assert_allclose(got, want, atol=1e-5)  # the same float32 numbers, in chunks


def test_apply_fn_is_one_object_for_equal_arguments():
  again = dataclasses.replace(CONFIG)
  assert transformer.make_apply_fn(CONFIG) is transformer.make_apply_fn(again)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
  params, batch = make_params(CONFIG), batch_of(CONFIG)
  apply_fn = transformer.make_apply_fn(CONFIG, logps_chunk=8)
  pad = [(0, 0), (5, 0) if side == "left" else (0, 5)]
  padded = sequences.Sequences(
    jnp.pad(batch.tokens, [(0, 0), (0, 2)], constant_values=9),
    jnp.pad(batch.mask, [(0, 0), (0, 2)]),
    jnp.pad(batch.prompt_tokens, pad, constant_values=11),
    jnp.pad(batch.prompt_mask, pad),
  )

  def loss(params, batch):
    logps = apply_fn(params, batch)
    return jnp.sum(sequences.sequence_logps(logps, batch.mask, reduction="sum")), logps

  step = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (_, want), want_grads = step(params, batch)
  (_, got), grads = step(params, padded)
  assert np.isfinite(got).all()
  np.testing.assert_allclose(got[:, : want.shape[1]], want, atol=1e-5)
  # float32 sums of 18 terms of size up to 10 in another order
  chex.assert_trees_all_close(grads, want_grads, atol=2e-4, rtol=1e-4)


def test_a_row_does_not_see_the_other_rows_or_the_future():
  params, batch = make_params(CONFIG), batch_of(CONFIG)
  apply_fn = jax.jit(transformer.make_apply_fn(CONFIG, logps_chunk=8))
  want = apply_fn(params, batch)
  changed = batch._replace(tokens=batch.tokens.at[0, 3:].add(1).at[1:].add(1) % CONFIG.vocab_size)
  np.testing.assert_allclose(apply_fn(params, changed)[0, :3], want[0, :3], atol=1e-6)


def test_fully_padded_rows_are_finite_with_finite_gradients():
  params, batch = make_params(CONFIG), batch_of(CONFIG)
  apply_fn = transformer.make_apply_fn(CONFIG, logps_chunk=8)
  empty = batch._replace(mask=batch.mask.at[0].set(0), prompt_mask=batch.prompt_mask.at[:2].set(0))
  logps, gradient = jax.jit(jax.value_and_grad(lambda p: jnp.sum(apply_fn(p, empty))))(params)
  assert np.isfinite(logps)
  chex.assert_tree_all_finite(gradient)


@pytest.mark.parametrize("changes", [{"remat": True}, {"scan_layers": False}])
def test_memory_and_loop_choices_change_no_number(changes):
  params, batch = make_params(CONFIG), batch_of(CONFIG)

  def run(config):
    apply_fn = transformer.make_apply_fn(config, logps_chunk=8)
    return jax.jit(jax.value_and_grad(lambda p: jnp.sum(apply_fn(p, batch))))(params)

  # the same float32 sums, fused differently
  chex.assert_trees_all_close(
    run(dataclasses.replace(CONFIG, **changes)), run(CONFIG), atol=2e-4, rtol=1e-4
  )


def test_bfloat16_is_close_and_keeps_logps_in_float32():
  params, batch = make_params(CONFIG), batch_of(CONFIG)
  want = transformer.make_apply_fn(CONFIG)(params, batch)
  got = transformer.make_apply_fn(dataclasses.replace(CONFIG, dtype="bfloat16"))(params, batch)
  assert got.dtype == jnp.float32
  # eight bits of mantissa (0.4%) through three layers, log-probabilities of size 5
  np.testing.assert_allclose(got, want, atol=0.25)
  assert np.abs(got - want).max() > 1e-4  # really another precision


def test_logits_of_all_positions_never_exist():
  config = dataclasses.replace(CONFIG, vocab_size=4096)
  params, batch = transformer.init_params(config, jax.random.key(0)), batch_of(config)
  apply_fn = transformer.make_apply_fn(config, logps_chunk=256)
  jaxpr = jax.make_jaxpr(jax.grad(lambda p: jnp.sum(apply_fn(p, batch))))(params)

  def has_equations(value):
    return hasattr(getattr(value, "jaxpr", value), "eqns")

  def sizes(jaxpr):
    for equation in jaxpr.eqns:
      for variable in equation.outvars:
        if variable.aval.shape[-1:] != (config.width,):  # the embedding and its gradient
          yield math.prod(variable.aval.shape)
      for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=has_equations):
        if has_equations(inner):
          yield from sizes(getattr(inner, "jaxpr", inner))

  assert max(sizes(jaxpr.jaxpr)) < batch.tokens.size * config.vocab_size / 2


@pytest.mark.parametrize("rows_per_prompt", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_sharded_equals_one_device(rows_per_prompt):
  config = dataclasses.replace(CONFIG, vocab_size=40, head_dim=8, mlp_width=24, tied_head=False)
  params, batch = make_params(config), batch_of(config, batch=16)
  num_prompts = 16 // rows_per_prompt
  batch = batch._replace(
    prompt_tokens=batch.prompt_tokens[:num_prompts], prompt_mask=batch.prompt_mask[:num_prompts]
  )
  apply_fn = transformer.make_apply_fn(config, logps_chunk=8)

  def value_and_grad(params, batch):
    return jax.value_and_grad(lambda p: jnp.mean(apply_fn(p, batch)))(params)

  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  shardings = sharding.infer_shardings(params, transformer.SHARDING_RULES, mesh)
  assert not shardings["layers"]["mlp"]["up"]["kernel"].is_fully_replicated
  placed = jax.device_put(params, shardings)
  on_mesh = sharding.shard_batch(jax.tree.map(np.asarray, batch), mesh)
  want = jax.jit(value_and_grad)(params, batch)
  got = jax.jit(value_and_grad)(placed, on_mesh)
  chex.assert_trees_all_close(jax.device_get(got), jax.device_get(want), atol=1e-5)


def shared_batch(num_prompts=3, group=4, length=5):
  """K completions a prompt: prompts padded on either side, completions cut and empty."""
  batch = batch_of(CONFIG, batch=num_prompts, prompt=4, length=length)
  shape = (num_prompts * group, length)
  lengths = np.arange(shape[0])[::-1, None] % (length + 1)
  return sequences.Sequences(
    tokens=jax.random.randint(jax.random.key(5), shape, 0, CONFIG.vocab_size),
    mask=jnp.asarray(np.arange(length) < lengths, jnp.float32),
    prompt_tokens=batch.prompt_tokens,
    prompt_mask=batch.prompt_mask.at[1, :2].set(0).at[2, 3:].set(0),
  )


@pytest.mark.parametrize(("pairing", "group"), [("half", 4), ("adjacent", 2)])
def test_a_shared_prompt_is_read_once_with_the_same_result(pairing, group):
  config = dataclasses.replace(CONFIG, rope_pairing=pairing)
  params, batch = make_params(config), shared_batch(group=group)
  apply_fn = transformer.make_apply_fn(config, logps_chunk=8)

  def run(batch):
    def loss(params):
      logps = apply_fn(params, batch) * batch.mask
      return jnp.sum(logps * jnp.cos(jnp.arange(logps.size).reshape(logps.shape))), logps

    step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params).compile()
    return step(params), step.cost_analysis()["flops"]

  ((_, want), want_grads), want_flops = run(sequences.repeat_prompts(batch))
  ((_, got), grads), flops = run(batch)
  np.testing.assert_allclose(got, want, atol=1e-5)
  # float32 sums of about fifty terms in another order
  chex.assert_trees_all_close(grads, want_grads, atol=2e-4, rtol=1e-4)
  assert flops < want_flops


def test_a_shared_prompt_with_completions_of_one_token():
  params, batch = make_params(CONFIG), shared_batch(length=1)
  apply_fn = jax.jit(transformer.make_apply_fn(CONFIG))
  want = apply_fn(params, sequences.repeat_prompts(batch))
  np.testing.assert_allclose(apply_fn(params, batch), want, atol=1e-5)


def test_prompts_that_do_not_divide_the_rows_are_an_error():
  params, batch = make_params(CONFIG), shared_batch()
  uneven = batch._replace(tokens=batch.tokens[:11], mask=batch.mask[:11])
  with pytest.raises(ValueError, match="3 prompts do not divide 11 completions"):
    transformer.make_apply_fn(CONFIG)(params, uneven)


def test_arrays_that_do_not_fit_name_themselves():
  params, batch = make_params(CONFIG), batch_of(CONFIG)
  apply_fn = transformer.make_apply_fn(CONFIG)
  for changes, match in (
    ({"mask": batch.mask[:, 1:]}, "mask"),
    ({"prompt_mask": batch.prompt_mask[:2]}, "prompt_mask"),
    ({"tokens": np.full(batch.tokens.shape, CONFIG.vocab_size)}, r"tokens must lie in \[0,"),
    ({"prompt_tokens": np.full(batch.prompt_tokens.shape, -1)}, "prompt_tokens must lie in"),
  ):
    with pytest.raises(ValueError, match=match):
      apply_fn(params, batch._replace(**changes))


def test_a_prompt_is_needed():
  params, batch = make_params(CONFIG), batch_of(CONFIG)
  with pytest.raises(ValueError, match="prompt_tokens is missing"):
    transformer.make_apply_fn(CONFIG)(params, batch._replace(prompt_tokens=None))


def test_too_long_names_the_sizes():
  params = make_params(CONFIG)
  long = batch_of(CONFIG, prompt=20, length=13)
  with pytest.raises(ValueError, match=r"prompt \(20 tokens\) and completion \(13\).*\(32\)"):
    transformer.make_apply_fn(CONFIG)(params, long)
  tokens = jnp.zeros((1, 33), jnp.int32)
  with pytest.raises(ValueError, match=r"33 tokens a row.*\(32\)"):
    transformer.logits(params, tokens, tokens == 0, config=CONFIG)


def test_shapes_that_differ_are_an_error():
  with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
    transformer.logits({}, jnp.zeros((2, 3), int), jnp.zeros((2, 4)), config=CONFIG)


@pytest.mark.parametrize(
  "changes",
  [
    {"num_kv_heads": 3},
    {"head_dim": 5},
    {"width": 0},
    {"rope_pairing": "interleaved"},
    {"dtype": "float16"},
    {"norm": "batch"},
    {"norm_placement": "post"},
    {"activation": "relu"},
    {"positions": "sinusoidal"},
    {"rotary_dims": 5},
    {"rotary_dims": 8},
    {"sliding_window": 0},
    {"window_layers": (True,)},
    {"rotary_layers": [True] * 4},
    {"attention_softcap": -1.0},
    {"logit_softcap": 0.0},
  ],
)
def test_a_bad_config_names_the_field(changes):
  with pytest.raises(ValueError, match=next(iter(changes))):
    dataclasses.replace(CONFIG, **changes)


def test_choices_that_mean_the_same_are_the_same_config():
  """So that they compile once."""
  for changes in (
    {"attention_scale": CONFIG.head_dim**-0.5},
    {"rotary_dims": CONFIG.head_dim},
    {"sliding_window": 5, "window_layers": [False] * 3},
    {"rotary_layers": [True] * 3},
    {"local_rope_theta": 10.0},
  ):
    assert dataclasses.replace(CONFIG, **changes) == CONFIG
  alternating = dataclasses.replace(CONFIG, sliding_window=5, window_layers=[True, False, True])
  assert alternating.layer_windows(6) == (5, None, 5)
  assert alternating.layer_windows(5) == (None, None, None)
  assert hash(alternating) != hash(CONFIG)


def test_justify_right_keeps_the_order():
  tokens = jnp.array([[1, 2, 3, 9, 9], [9, 1, 9, 2, 9], [1, 2, 3, 4, 5]])
  mask = jnp.array([[1, 1, 1, 0, 0], [0, 1, 0, 1, 0], [1, 1, 1, 1, 1]])
  got, got_mask = attention.justify_right(tokens, mask)
  np.testing.assert_array_equal(got, [[9, 9, 1, 2, 3], [9, 9, 9, 1, 2], [1, 2, 3, 4, 5]])
  np.testing.assert_array_equal(got_mask, [[0, 0, 1, 1, 1], [0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
