"""T5 as policy and value: what padding, sharing, caches and meshes may not change.

That the numbers are T5's is checked against transformers in `t5_files_test.py`.
"""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sharding
from alignment import dro, ipo, nash_md, sequences
from alignment.models import architectures, attention, sampling, scalar_head, t5, t5_decoding

CONFIG = t5.T5Config(
  vocab_size=29,
  num_layers=2,
  num_decoder_layers=2,
  width=16,
  num_heads=2,
  head_dim=6,
  mlp_width=20,
  num_buckets=8,
  max_distance=10,
)
NEVER = -1  # an EOS id that no token has
# float32 sums of up to fifty terms in another order; logits of size 5
ROUNDING = 5e-5


def make_params(config, seed=0):
  """Random parameters, large enough that attention, positions and norms matter."""
  shapes = jax.eval_shape(lambda key: t5.init_params(config, key), jax.random.key(0))
  generator = np.random.default_rng(seed)

  def draw(path, leaf):
    noise = 0.25 * generator.standard_normal(leaf.shape)
    return jnp.asarray(noise + (path[-1].key == "scale"), leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def params():
  return make_params(CONFIG)


def make_batch(num_prompts=2, group=2, prompt_length=5, length=7):
  """K completions a prompt: prompts padded on the left, completions cut and empty."""
  keys = jax.random.split(jax.random.key(3), 2)
  shape = (num_prompts * group, length)
  lengths = np.array([7, 4, 1, 0] * num_prompts)[: shape[0], None]
  prompt_mask = np.ones((num_prompts, prompt_length))
  prompt_mask[1, :2] = 0
  return sequences.Sequences(
    jax.random.randint(keys[0], shape, 0, CONFIG.vocab_size),
    jnp.asarray(np.arange(length) < lengths, jnp.float32),
    jax.random.randint(keys[1], prompt_mask.shape, 0, CONFIG.vocab_size),
    jnp.asarray(prompt_mask),
  )


@functools.partial(jax.jit, static_argnames="config")
def weighted(params, batch, config=CONFIG):
  """Log-probabilities of real tokens, and the gradient of a sum with a weight for each of them."""
  apply_fn = t5.make_apply_fn(config, logps_chunk=8)

  def loss(params):
    logps = jnp.where(batch.mask > 0, apply_fn(params, batch), 0)
    return jnp.sum(logps[:, :7] * jnp.cos(jnp.arange(7.0) + logps.shape[0])), logps

  (_, logps), grads = jax.value_and_grad(loss, has_aux=True)(params)
  return logps, grads


def assert_equal(got, want):
  (got, got_grads), (want, want_grads) = got, want
  np.testing.assert_allclose(got[:, : want.shape[1]], want, atol=ROUNDING)
  for a, b in zip(jax.tree.leaves(got_grads), jax.tree.leaves(want_grads), strict=True):
    # sums of a few hundred terms, of which the largest may cancel
    assert np.abs(a - b).max() < 1e-4 * np.abs(b).max()


# --- positions ---


@pytest.mark.parametrize("two_sided", [True, False])
def test_buckets_grow_with_the_distance(two_sided):
  """Against the definition, distance by distance, with the paper's 32 buckets up to 128."""
  differences = np.arange(-300, 301)
  got = t5.relative_buckets(differences, num_buckets=32, max_distance=128, two_sided=two_sided)
  count = 16 if two_sided else 32
  for difference, bucket in zip(differences, got, strict=True):
    distance = int(abs(difference) if two_sided else max(-difference, 0))
    want = distance
    if distance >= count // 2:
      # The largest i with count/2 * ratio^(i / (count/2)) <= distance, in whole numbers.
      ratio = 128 // (count // 2)
      far = [i for i in range(count // 2) if (count // 2) ** (count // 2) * ratio**i
             <= distance ** (count // 2)]  # fmt: skip
      want = count // 2 + far[-1]
    assert bucket == want + (count if two_sided and difference > 0 else 0), difference


@pytest.mark.parametrize("is_decoder", [True, False])
def test_the_table_of_distances_holds_key_minus_query(is_decoder):
  stack = t5.Stack(CONFIG, is_decoder)
  table = jax.random.normal(jax.random.key(0), (CONFIG.num_buckets, CONFIG.num_heads))
  variables = {"params": {"position_bias": {"embedding": table}}}
  got = stack.apply(variables, 13, method="positions")
  places = np.arange(13)
  differences = places[None] - places[:, None]
  buckets = t5.relative_buckets(
    differences, num_buckets=8, max_distance=10, two_sided=not is_decoder
  )
  want = np.moveaxis(np.asarray(table)[buckets], -1, 0)
  if is_decoder:
    want = np.where(differences > 0, attention.HIDDEN, want)
  np.testing.assert_array_equal(got[0], want)


# --- log-probabilities ---


def test_apply_fn_equals_the_logits(params):
  """The start token predicts the first completion token: off by one is the classic mistake."""
  batch = make_batch()
  got = jax.jit(t5.make_apply_fn(CONFIG, logps_chunk=8))(params, batch)
  read = jnp.pad(batch.tokens[:, :-1], [(0, 0), (1, 0)], constant_values=CONFIG.start_id)
  rows = sequences.repeat_prompts(batch)
  logits = t5.logits(params, rows.prompt_tokens, rows.prompt_mask, read, config=CONFIG)
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(got, sequences.token_logps(logits, batch.tokens), atol=ROUNDING)


def test_apply_fn_is_one_object_for_equal_arguments():
  again = dataclasses.replace(CONFIG)
  assert architectures.make_apply_fn(CONFIG) is architectures.make_apply_fn(again)


def test_padding_on_either_side_changes_nothing(params):
  batch = make_batch()
  want = weighted(params, batch)
  for pad in ((3, 0), (0, 3)):
    prompts = (jnp.pad(x, [(0, 0), pad], constant_values=c)
               for x, c in ((batch.prompt_tokens, 11), (batch.prompt_mask, 0)))  # fmt: skip
    later = [(0, 0), (0, 2)]
    tokens = jnp.pad(batch.tokens, later, constant_values=9)
    padded = sequences.Sequences(tokens, jnp.pad(batch.mask, later), *prompts)
    assert_equal(weighted(params, padded), want)


def test_a_shared_prompt_is_read_once_with_the_same_result(params):
  batch = make_batch()
  rows = sequences.repeat_prompts(batch)
  assert_equal(weighted(params, batch), weighted(params, rows))
  flops = [weighted.lower(params, x).compile().cost_analysis()["flops"] for x in (batch, rows)]
  assert flops[0] < flops[1]


def test_a_row_sees_neither_other_rows_nor_the_future(params):
  batch = make_batch()
  want = weighted(params, batch)[0]
  changed = batch.tokens.at[0, 4:].add(1).at[1:].add(1) % CONFIG.vocab_size
  got = weighted(params, batch._replace(tokens=changed))[0]
  np.testing.assert_allclose(got[0, :4], want[0, :4], atol=1e-6)


def test_an_empty_prompt_is_one_start_token(params):
  batch = make_batch()
  empty = batch._replace(prompt_mask=batch.prompt_mask.at[0].set(0))
  one = batch._replace(prompt_mask=batch.prompt_mask.at[0, :-1].set(0))
  np.testing.assert_allclose(weighted(params, empty)[0], weighted(params, one)[0], atol=1e-6)


@pytest.mark.parametrize(
  "changes", [{"remat": True}, pytest.param({"scan_layers": False}, marks=pytest.mark.slow)]
)
def test_memory_and_loop_choices_change_no_number(params, changes):
  config = dataclasses.replace(CONFIG, **changes)
  batch = make_batch()
  assert_equal(weighted(params, batch, config), weighted(params, batch))


def test_neither_logits_of_all_positions_nor_copies_of_a_prompt_exist():
  config = dataclasses.replace(CONFIG, vocab_size=4096)
  batch = make_batch(group=4, prompt_length=40)
  params = jax.eval_shape(functools.partial(t5.init_params, config), jax.random.key(0))
  apply_fn = t5.make_apply_fn(config, logps_chunk=256)
  jaxpr = jax.make_jaxpr(jax.grad(lambda p: jnp.sum(apply_fn(p, batch))))(params)

  def has_equations(value):
    return hasattr(getattr(value, "jaxpr", value), "eqns")

  def shapes(jaxpr):
    for equation in jaxpr.eqns:
      yield from (variable.aval.shape for variable in equation.outvars)
      for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=has_equations):
        if has_equations(inner):
          yield from shapes(getattr(inner, "jaxpr", inner))

  found = set(shapes(jaxpr.jaxpr))
  of_vocabulary = [shape for shape in found if 4096 in shape and shape[-1] != config.width]
  assert max(map(math.prod, of_vocabulary), default=0) < batch.tokens.size * 4096 / 2
  # Scores of all rows on their prompts exist, but no keys or states of the prompts of all rows.
  features = (config.width, config.head_dim, config.num_heads * config.head_dim)
  copies = [shape for shape in found if 40 in shape and 8 in shape and shape[-1] in features]
  assert not copies


@pytest.mark.slow
@pytest.mark.parametrize("group", [1, 2])
def test_sharded_equals_one_device(group):
  config = dataclasses.replace(CONFIG, vocab_size=32, head_dim=8)
  params = make_params(config)
  batch = make_batch(num_prompts=16 // group, group=group)
  batch = batch._replace(mask=jnp.ones(batch.mask.shape))
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  shardings = sharding.infer_shardings(params, t5.SHARDING_RULES, mesh)
  for part in ("attention", "cross_attention"):
    leaf = shardings["decoder"]["layers"][part]["query"]["kernel"]
    assert leaf.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
  placed = jax.device_put(params, shardings)
  on_mesh = sharding.shard_batch(jax.tree.map(np.asarray, batch), mesh)
  got = jax.device_get(weighted(placed, on_mesh, config))
  assert_equal(got, jax.device_get(weighted(params, batch, config)))


def test_bad_input_is_named(params):
  batch = make_batch()
  apply_fn = t5.make_apply_fn(CONFIG)
  for changes, match in (
    ({"prompt_tokens": None}, "prompt_tokens is missing"),
    ({"mask": batch.mask[:, 1:]}, "mask"),
    ({"tokens": np.full(batch.tokens.shape, CONFIG.vocab_size)}, r"tokens must lie in \[0,"),
    ({"tokens": batch.tokens[:3], "mask": batch.mask[:3]}, "2 prompts do not divide 3"),
  ):
    with pytest.raises(ValueError, match=match):
      apply_fn(params, batch._replace(**changes))


@pytest.mark.parametrize(
  "changes",
  [
    {"num_decoder_layers": 0},
    {"num_buckets": 6},
    {"max_distance": 4},
    {"mlp": "gelu"},
    {"start_id": 29},
    {"dtype": "float16"},
  ],
)
def test_a_bad_config_names_the_field(changes):
  with pytest.raises(ValueError, match=next(iter(changes))):
    dataclasses.replace(CONFIG, **changes)


# --- sampling ---


def generate(params, prompts, config=CONFIG, **settings):
  settings = {"max_new_tokens": 7, "eos_id": NEVER, "pad_id": 2, **settings}
  return sampling.generate(params, *prompts, jax.random.key(0), config=config, **settings)


@pytest.mark.parametrize(
  ("changes", "settings"),
  [
    ({}, {"temperature": 0.7, "top_k": 20, "num_samples": 2}),
    ({"tied_head": True, "mlp": "relu", "start_id": 4}, {"temperature": 0.0}),
  ],
)
def test_cached_generation_equals_teacher_forcing(changes, settings):
  config = dataclasses.replace(CONFIG, **changes)
  params, prompts = make_params(config), make_batch()[2:]
  samples = generate(params, prompts, config, **settings)
  rows = sequences.Sequences(samples.tokens, samples.mask, *prompts)
  want = weighted(params, rows, config)[0]
  assert np.abs(want).max() > 0.1
  np.testing.assert_allclose(samples.logps, want, atol=ROUNDING)
  if settings["temperature"] == 0:
    read = jnp.pad(samples.tokens[:, :-1], [(0, 0), (1, 0)], constant_values=config.start_id)
    logits = t5.logits(params, *prompts, read, config=config)
    np.testing.assert_array_equal(samples.tokens, jnp.argmax(logits, axis=-1))


def test_generation_does_not_depend_on_padding_or_neighbours_and_ends(params):
  prompts = make_batch()[2:]
  want = generate(params, prompts)
  # The padding of the second prompt on its other side, and another first prompt.
  other = [x.at[1].set(jnp.roll(x[1], -2)).at[0, 0].set(1) for x in prompts]
  np.testing.assert_array_equal(generate(params, other).tokens[1], want.tokens[1])
  eos_id = int(want.tokens[0, 2])
  ended = generate(params, prompts, eos_id=eos_id)
  np.testing.assert_array_equal(ended.mask, sequences.completion_mask(want.tokens, eos_id))


@pytest.mark.slow  # two models in one loop, which `sampling` joins alike for both architectures
def test_a_mixture_of_two_models_is_drawn_as_it_is_defined(params):
  prompts = make_batch()[2:]
  ref_params = make_params(CONFIG, seed=5)
  mixture = {"mixture_fn": nash_md.geometric_mixture_logits, "beta": 0.3}
  samples = generate(params, prompts, ref_params=ref_params, **mixture)
  read = jnp.pad(samples.tokens[:, :-1], [(0, 0), (1, 0)])
  logits = [t5.logits(p, *prompts, read, config=CONFIG) for p in (params, ref_params)]
  joined = nash_md.geometric_mixture_logits(*logits, beta=0.3)
  want = sequences.token_logps(joined, samples.tokens)
  np.testing.assert_allclose(samples.logps, want, atol=ROUNDING)


def test_bfloat16_has_logits_in_float32_and_logps_of_the_training_pass(params):
  config = dataclasses.replace(CONFIG, dtype="bfloat16")
  prompts = make_batch()[2:]
  samples = generate(params, prompts, config, num_samples=2)
  rows = sequences.Sequences(samples.tokens, samples.mask, *prompts)
  got = jax.jit(t5.make_apply_fn(config))(params, rows)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(samples.logps, got, atol=1e-5)  # the same products
  exact = weighted(params, rows)[0]
  # eight bits of mantissa (0.4 %) through four layers, log-probabilities of size 5
  np.testing.assert_allclose(got, exact, atol=0.3)
  assert np.abs(got - exact).max() > 1e-4  # really another precision
  start = functools.partial(t5_decoding.start, config=config, max_new_tokens=2)
  logits = jax.eval_shape(start, params, *prompts)[1]
  assert logits.dtype == jnp.float32


# --- values and updates ---


def test_a_value_starts_at_zero_and_reads_the_state_of_the_start_token(params):
  batch = make_batch()
  value = scalar_head.from_decoder(params)
  assert "head" not in value
  apply_fn = jax.jit(scalar_head.make_policy_and_value_fn(CONFIG))
  logps, values = apply_fn(dro.Params(params, value), batch)
  np.testing.assert_array_equal(values, np.zeros(4))
  logps = jnp.where(batch.mask > 0, logps, 0)
  np.testing.assert_allclose(logps, weighted(params, batch)[0], atol=ROUNDING)
  # With a column of the output head as its kernel, the value is a logit.
  head = {"kernel": params["head"]["kernel"][:, 3], "bias": jnp.ones(())}
  values = apply_fn(dro.Params(params, value | {"scalar_head": head}), batch)[1]
  logits = t5.logits(params, *batch[2:], jnp.zeros((2, 1), int), config=CONFIG)
  np.testing.assert_allclose(values, jnp.repeat(logits[:, 0, 3] + 1, 2), atol=ROUNDING)


def _pairs(batch):
  sides = [(batch.tokens[i::2], batch.mask[i::2], jnp.array([-9.0, -8.0])) for i in (0, 1)]
  return sequences.PreferenceBatch(*sides[0], *sides[1], 1.0, *batch[2:])


def _update(name, params):
  batch = make_batch()
  batch = batch._replace(mask=batch.mask.at[:, 0].set(1))
  optimizer, apply_fn = optax.sgd(0.1), t5.make_apply_fn(CONFIG)
  rows = sequences.repeat_prompts(batch)
  if name == "ipo":
    module, config, batch = ipo, ipo.Config(), _pairs(batch)
  elif name == "nash_md":
    module, config = nash_md, nash_md.Config()
    ref = jnp.zeros(rows.tokens.shape)
    batch = nash_md.Batch(rows.tokens, rows.mask, ref, jnp.array([1.0, 0, 0.3, 0.8]), *rows[2:])
  else:
    module, config = dro, dro.Config()
    batch = dro.Batch(*rows[:2], -jnp.arange(4.0), jnp.array([1.0, -1, 0.5, 0]), *rows[2:])
    params = dro.Params(params, scalar_head.from_decoder(params))
    apply_fn = scalar_head.make_policy_and_value_fn(CONFIG)
  state = module.init(params, optimizer=optimizer, config=config)
  step = functools.partial(module.update, apply_fn=apply_fn, optimizer=optimizer, config=config)
  return params, *jax.jit(step)(state, batch, jax.random.key(0))


@pytest.mark.parametrize("name", ["ipo", "nash_md", "dro"])
def test_updates_move_every_parameter_by_a_finite_gradient(params, name):
  before, after, metrics = _update(name, params)
  chex.assert_tree_all_finite((after.params, metrics))
  moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, after.params)
  # DRO's value starts with a head of zeros, through which its body gets no gradient yet.
  moved = moved.policy if name == "dro" else moved
  assert min(jax.tree.leaves(moved)) > 0
