"""Tests of alignment.models.lora: the base stays, the adapters learn, and neither costs more."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sharding
from alignment import dro, ipo, nash_md, sequences
from alignment.models import huggingface, lora, sampling, scalar_head, t5, transformer
from tests import contract_test, tiny_checkpoints
from tests.alignment.models import make_golden

METHODS = (
  "copg", "dpo", "dro", "ipo", "kto", "nash_md", "online_ipo", "reward_model", "rloo", "sft", "srpo"
)  # fmt: skip
# Two networks, and an average; the others have a part of this.
_ALWAYS = {"dro", "nash_md"}
CONFIG = lora.Config(rank=3, alpha=6.0)
TOKENS = np.arange(10, dtype=np.int32).reshape(2, 5)
DECODER = transformer.TransformerConfig(
  vocab_size=8, num_layers=2, width=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_width=16,
  max_length=32,
)  # fmt: skip


def random_adapters(params, config=CONFIG, *, scale=0.3):
  """Adapters as they are after training: B is not zero."""
  adapters = lora.init(params, jax.random.key(1), config=config)
  leaves, treedef = jax.tree.flatten(adapters)
  keys = jax.random.split(jax.random.key(2), len(leaves))
  noise = [scale * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
  return jax.tree.unflatten(treedef, noise)


def num_bytes(tree):
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


# --- every method ---------------------------------------------------------------------------------


def language_case(name):
  """The problem of the contract, with a decoder in place of its network."""
  case = contract_test.BUILDERS[name]()
  base = tiny_checkpoints.make_params(DECODER)
  scalar = scalar_head.from_decoder(base)
  scalar["scalar_head"] = {"kernel": jnp.linspace(-1, 1, 8) / 4, "bias": jnp.float32(0.1)}
  apply_fn, params = transformer.make_apply_fn(DECODER), base
  if name == "dro":
    apply_fn = scalar_head.make_policy_and_value_fn(DECODER)
    params = dro.Params(policy=base, value=scalar)
  if name == "reward_model":
    apply_fn, params = scalar_head.make_apply_fn(DECODER), scalar
  return dataclasses.replace(case, params=params, apply_fn=apply_fn, trees={})


def loss_of(case, params, apply_fn):
  state = case.module.init(params, optimizer=optax.sgd(0.1), config=case.config)
  loss = functools.partial(case.module.loss, apply_fn=apply_fn, config=case.config)
  return loss(params, state, case.batch, jax.random.key(0))[0]


@pytest.mark.parametrize("name", METHODS)
def test_new_adapters_give_the_loss_of_the_base(name):
  case = language_case(name)

  @jax.jit
  def losses(params, adapters):
    bound = lora.bind(case.apply_fn, params, config=CONFIG)
    return loss_of(case, params, case.apply_fn), loss_of(case, adapters, bound)

  fresh = lora.init(case.params, jax.random.key(1), config=CONFIG)
  base, adapted = losses(case.params, fresh)
  np.testing.assert_allclose(adapted, base, rtol=1e-6, atol=1e-6)
  _, moved = losses(case.params, random_adapters(case.params))
  assert abs(moved - base) > 1e-3  # the adapters are not ignored


@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=() if n in _ALWAYS else pytest.mark.slow) for n in METHODS]
)
def test_an_update_trains_every_factor_and_nothing_of_the_base(name):
  case, optimizer = language_case(name), optax.adam(1e-2)
  adapters = lora.init(case.params, jax.random.key(1), config=CONFIG)
  state = case.module.init(adapters, optimizer=optimizer, config=case.config)

  @jax.jit
  def step(state, base, batch, key):
    bound = lora.bind(case.apply_fn, base, config=CONFIG)
    return case.module.update(
      state, batch, key, apply_fn=bound, optimizer=optimizer, config=case.config
    )

  before = jax.tree.map(np.array, case.params)
  for index in range(2):  # the gradient of A is zero while B is
    state, metrics = step(state, case.params, case.batch, jax.random.key(index))
  assert np.isfinite(metrics["loss"])
  jax.tree.map(np.testing.assert_array_equal, case.params, before)
  for path, old, new in zip(
    sharding.tree_paths(adapters),
    jax.tree.leaves(adapters),
    jax.tree.leaves(state.params),
    strict=True,
  ):
    assert np.abs(new - old).max() > 1e-4 or path.endswith("bias"), path
  # Moments and averages are of the adapters alone.
  assert num_bytes(state) < 4.1 * num_bytes(adapters)


def test_the_value_of_dro_has_its_own_adapters_and_a_head_that_is_trained_in_full():
  case = language_case("dro")
  adapters = lora.init(case.params, jax.random.key(1), config=CONFIG)
  assert set(adapters.policy) == {"layers"}
  assert set(adapters.value) == {"layers", "scalar_head"}
  assert adapters.value["scalar_head"]["kernel"] is case.params.value["scalar_head"]["kernel"]


# --- memory ---------------------------------------------------------------------------------------

WIDE = transformer.TransformerConfig(
  vocab_size=4096, num_layers=8, width=128, num_heads=4, num_kv_heads=2, head_dim=32,
  mlp_width=512, max_length=64,
)  # fmt: skip


def produced_shapes(jaxpr):
  """Shapes of all arrays that the equations of a program make, inner programs included."""
  shapes = set()
  for equation in jaxpr.eqns:
    inner = [
      getattr(value, "jaxpr", value)
      for parameter in equation.params.values()
      for value in (parameter if isinstance(parameter, tuple | list) else [parameter])
      if hasattr(getattr(value, "jaxpr", value), "eqns")
    ]
    for program in inner:
      shapes |= produced_shapes(program)
    if not inner:
      shapes |= {variable.aval.shape for variable in equation.outvars}
  return shapes


def wide_step():
  """An IPO step that reads the reference pass from the same base, and its arguments."""
  apply_fn, optimizer = transformer.make_apply_fn(WIDE), optax.adam(1e-3)
  base = transformer.init_params(WIDE, jax.random.key(0))
  config = lora.Config(rank=4)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, WIDE.vocab_size, (3, 2, 4))
  ones = np.ones((2, 4), np.float32)
  batch = ipo.Batch(
    tokens[0], ones, None, tokens[1], ones, None, np.ones(2, np.float32), tokens[2], ones
  )

  def ref_logps(base, tokens, mask, batch):
    rows = sequences.Sequences(tokens, mask, batch.prompt_tokens, batch.prompt_mask)
    return sequences.sequence_logps(apply_fn(base, rows), mask, reduction="sum")

  def step(state, base, batch, key):
    batch = batch._replace(
      chosen_ref_logps=ref_logps(base, batch.chosen_tokens, batch.chosen_mask, batch),
      rejected_ref_logps=ref_logps(base, batch.rejected_tokens, batch.rejected_mask, batch),
    )
    return ipo.update(
      state, batch, key, apply_fn=lora.bind(apply_fn, base, config=config), optimizer=optimizer,
      config=ipo.Config(),
    )  # fmt: skip

  adapters = lora.init(base, jax.random.key(1), config=config)
  state = ipo.init(adapters, optimizer=optimizer, config=ipo.Config())
  return step, (state, base, batch, jax.random.key(0))


def test_a_step_holds_the_base_once_and_makes_no_array_of_its_size():
  step, arguments = wide_step()
  state, base, batch, _ = arguments
  plan = jax.jit(step, donate_argnums=0).lower(*arguments).compile().memory_analysis()
  small = num_bytes(state) + num_bytes(batch)
  # Policy and reference together: one base, and what the key and alignment take.
  assert plan.argument_size_in_bytes < num_bytes(base) + small + 10_000
  # No gradient, no moment, no merged copy; a layer's slice of the base is an eighth of the layers.
  assert plan.output_size_in_bytes < small + 10_000
  assert plan.temp_size_in_bytes < num_bytes(base) / 2


def test_no_equation_of_the_gradient_has_the_shape_of_a_kernel():
  step, arguments = wide_step()
  kernels = {leaf.shape for leaf in jax.tree.leaves(arguments[1]) if leaf.ndim == 3}
  kernels |= {shape[1:] for shape in kernels}

  # Unused results, such as the embedding's gradient that a rule makes anyway, are not computed.
  def live(function, *arguments):
    closed = jax.make_jaxpr(function)(*arguments)
    used = [True] * len(closed.jaxpr.outvars)
    return jax.interpreters.partial_eval.dce_jaxpr(closed.jaxpr, used)[0]

  assert not kernels & produced_shapes(live(step, *arguments))
  _, base, batch, key = arguments
  whole = functools.partial(
    ipo.update, apply_fn=transformer.make_apply_fn(WIDE), optimizer=optax.sgd(1.0),
    config=ipo.Config(),
  )  # fmt: skip
  state = ipo.init(base, optimizer=optax.sgd(1.0), config=ipo.Config())
  zeros = np.zeros(2, np.float32)
  batch = batch._replace(chosen_ref_logps=zeros, rejected_ref_logps=zeros)
  assert kernels <= produced_shapes(live(whole, state, batch, key))  # the test can see them


# --- joining and merging --------------------------------------------------------------------------


@pytest.mark.parametrize("pairing", ["half", "adjacent"])
def test_merged_weights_are_the_same_function(pairing):
  config = tiny_checkpoints.make_config(rope_pairing=pairing)
  base = tiny_checkpoints.make_params(config)
  joined = lora.join(base, random_adapters(base), config=CONFIG)
  merged = lora.merge(joined)
  assert jax.tree.structure(merged) == jax.tree.structure(base)
  expected = tiny_checkpoints.logits(joined, config)
  assert np.abs(expected - tiny_checkpoints.logits(base, config)).max() > 0.1
  # Logits of size ten, in float32.
  np.testing.assert_allclose(tiny_checkpoints.logits(merged, config), expected, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "phi3", "pythia", "qwen2", "qwen3"])
def test_adapters_fit_every_family(family):
  config, base = huggingface.load(make_golden.FOLDER / family)
  joined = lora.join(base, random_adapters(base), config=CONFIG)
  merged = tiny_checkpoints.logits(lora.merge(joined), config, TOKENS)
  adapted = tiny_checkpoints.logits(joined, config, TOKENS)
  assert np.abs(adapted - tiny_checkpoints.logits(base, config, TOKENS)).max() > 0.1
  np.testing.assert_allclose(merged, adapted, atol=1e-4)  # float32


def test_joining_shares_the_base_and_merging_leaves_a_plain_tree_alone():
  base = transformer.init_params(DECODER, jax.random.key(0))
  joined = lora.join(base, random_adapters(base), config=CONFIG)
  assert joined["layers"]["mlp"]["up"]["kernel"] is base["layers"]["mlp"]["up"]["kernel"]
  assert joined["embed"] is base["embed"]
  plain = lora.merge(base)
  assert jax.tree.structure(plain) == jax.tree.structure(base)
  assert all(a is b for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(base), strict=True))


def test_merging_is_the_formula_of_the_paper():
  base = tiny_checkpoints.make_params(DECODER)
  config = lora.Config(rank=2, alpha=5.0, targets=("value",))
  adapters = random_adapters(base, config)
  assert set(adapters["layers"]["attention"]) == {"value"} and set(adapters["layers"]) == {
    "attention"
  }
  factors = adapters["layers"]["attention"]["value"]
  merged = lora.merge(lora.join(base, adapters, config=config))
  change = 5.0 / 2 * np.einsum("lir,lro->lio", factors["lora_a"], factors["lora_b"])
  expected = base["layers"]["attention"]["value"]["kernel"] + change
  np.testing.assert_allclose(
    merged["layers"]["attention"]["value"]["kernel"], expected, atol=1e-6
  )  # float32
  np.testing.assert_array_equal(
    merged["layers"]["attention"]["query"]["kernel"], base["layers"]["attention"]["query"]["kernel"]
  )


def test_sampling_with_adapters_is_sampling_with_merged_weights():
  base = tiny_checkpoints.make_params(DECODER, scale=1.0)
  joined = lora.join(base, random_adapters(base, scale=1.0), config=CONFIG)
  prompts = np.arange(6, dtype=np.int32).reshape(2, 3) % 8
  ones = np.ones((2, 3), np.float32)
  generate = functools.partial(
    sampling.generate, config=DECODER, max_new_tokens=6, num_samples=4, eos_id=-1, pad_id=0
  )
  drawn = generate(joined, prompts, ones, jax.random.key(0))
  merged = generate(lora.merge(joined), prompts, ones, jax.random.key(0))
  np.testing.assert_array_equal(drawn.tokens, merged.tokens)
  plain = generate(base, prompts, ones, jax.random.key(0))  # compiled with `merged`
  assert np.any(drawn.tokens != plain.tokens)
  # The merged weights of the sampler and the factors of the training pass: sums in another order.
  rows = sequences.Sequences(drawn.tokens, drawn.mask, prompts, ones)
  logps = jax.jit(transformer.make_apply_fn(DECODER))(joined, rows)
  np.testing.assert_allclose(drawn.logps, logps, atol=1e-4)


@pytest.mark.slow  # compiles another sampler
def test_an_encoder_decoder_is_adapted_and_sampled_like_a_decoder():
  config = t5.T5Config(
    vocab_size=8, num_layers=1, num_decoder_layers=1, width=8, num_heads=2, head_dim=4, mlp_width=16
  )
  base = jax.tree.map(lambda x: 5 * x, t5.init_params(config, jax.random.key(0)))
  adapters = random_adapters(base)
  assert set(adapters["decoder"]["layers"]) == {"attention", "cross_attention", "mlp"}
  joined = lora.join(base, adapters, config=CONFIG)
  prompts, ones = np.arange(6, dtype=np.int32).reshape(2, 3), np.ones((2, 3), np.float32)
  drawn = sampling.generate(
    joined, prompts, ones, jax.random.key(0), config=config, max_new_tokens=4, eos_id=-1, pad_id=0
  )
  rows = sequences.Sequences(drawn.tokens, drawn.mask, prompts, ones)
  apply_fn = jax.jit(t5.make_apply_fn(config))
  logps = apply_fn(joined, rows)
  np.testing.assert_allclose(drawn.logps, logps, atol=1e-4)  # float32 sums in another order
  np.testing.assert_allclose(apply_fn(lora.merge(joined), rows), logps, atol=1e-4)
  assert np.abs(apply_fn(base, rows) - logps).max() > 0.1


# --- meshes ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sharded_step_equals_that_of_one_device():
  config = dataclasses.replace(DECODER, width=16, mlp_width=32, num_kv_heads=2)
  apply_fn, optimizer = transformer.make_apply_fn(config), optax.sgd(0.1)
  base = tiny_checkpoints.make_params(config)
  batch = contract_test.BUILDERS["nash_md"]().batch

  def update(state, batch, key):
    learner, base = state
    learner, metrics = nash_md.update(
      learner, batch, key, apply_fn=lora.bind(apply_fn, base, config=CONFIG), optimizer=optimizer,
      config=nash_md.Config(tau=0.1),
    )  # fmt: skip
    return (learner, base), metrics

  adapters = random_adapters(base)
  learner = nash_md.init(adapters, optimizer=optimizer, config=nash_md.Config(tau=0.1))
  (expected, _), metrics = jax.jit(update)((learner, base), batch, jax.random.key(0))
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  rules = (*lora.SHARDING_RULES, *transformer.SHARDING_RULES, ("step|opt_state", jax.P()))
  step = sharding.jit_update(update, mesh, rules)
  (found, new_base), sharded_metrics = step((learner, base), batch, jax.random.key(0))
  # Float32 sums in another order, of quantities of size one.
  np.testing.assert_allclose(sharded_metrics["loss"], metrics["loss"], atol=1e-5)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, expected)
  jax.tree.map(np.testing.assert_array_equal, new_base, base)
  up = found.ema_params["layers"]["mlp"]["up"]
  assert up["lora_a"].addressable_shards[0].data.shape == (2, 8, 3)
  assert up["lora_b"].addressable_shards[0].data.shape == (2, 3, 16)
  down = found.params["layers"]["mlp"]["down"]
  assert down["lora_a"].addressable_shards[0].data.shape == (2, 16, 3)
  assert down["lora_b"].addressable_shards[0].data.shape == (2, 3, 8)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"rank": 0}, "rank must be an integer >= 1, got 0"),
    ({"rank": 5}, "rank=5 exceeds the smaller side of layers/attention/key, 8 x 4"),
    ({"alpha": 0.0}, "alpha must be positive"),
    ({"targets": ()}, "targets is empty"),
    ({"targets": ("query", "q_proj")}, r"\['q_proj'\].*are down, gate, key, output, query, up"),
    ({"targets": ("embed",)}, r"\['embed'\]"),
  ],
)
def test_bad_input_is_named(changes, match):
  base = transformer.init_params(DECODER, jax.random.key(0))
  with pytest.raises(ValueError, match=match):
    lora.init(base, jax.random.key(0), config=dataclasses.replace(CONFIG, **changes))


def test_adapters_of_another_base_are_named():
  base = transformer.init_params(DECODER, jax.random.key(0))
  adapters = random_adapters(base)
  for changes in ({"mlp_width": 24}, {"num_layers": 3}):
    other = transformer.init_params(dataclasses.replace(DECODER, **changes), jax.random.key(0))
    with pytest.raises(ValueError, match="made for another base"):
      lora.join(other, adapters, config=CONFIG)
  with pytest.raises(ValueError, match="another base or rank"):
    lora.join(base, adapters, config=lora.Config(rank=2))
  with pytest.raises(ValueError, match="params has no value"):
    lora.join(base, {"value": adapters}, config=CONFIG)
