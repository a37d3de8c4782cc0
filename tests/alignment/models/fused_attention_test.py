"""Attention through a kernel gives the numbers of the written-out form, and holds no scores.

Most tests need no GPU: `jax.nn.dot_product_attention` runs its own written-out form in place of the
kernel, so what is tested is all that stands around it, and the program for a GPU is only lowered.
The kernel itself is tested where JAX finds a GPU:

  JAX_PLATFORMS=cuda,cpu python -m pytest tests/alignment/models/fused_attention_test.py
"""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import topologies

from alignment import sequences
from alignment.models import attention, fused_attention, sampling, transformer

CONFIG = transformer.TransformerConfig(
  vocab_size=37,
  num_layers=2,
  width=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_width=20,
  max_length=64,
  rope_theta=100.0,
  fused_attention=True,
)
WRITTEN_OUT = dataclasses.replace(CONFIG, fused_attention=False)


needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def _exact_products():
  """A GPU rounds the factors of float32 products to 11 bits unless told otherwise."""
  with jax.default_matmul_precision("highest"):
    yield


@pytest.fixture
def kernel(monkeypatch):
  """Takes the path of the kernel, with JAX's form for CPUs at its end."""
  plain = jax.nn.dot_product_attention

  def on_cpu(*args, implementation, **kwargs):
    assert implementation == "cudnn"
    return plain(*args, implementation="xla", **kwargs)

  monkeypatch.setattr(jax.nn, "dot_product_attention", on_cpu)
  monkeypatch.setattr(fused_attention, "kernel_for", lambda dtype, head_dim: "cudnn")
  # What is traced depends on the patches, and jit does not know them.
  jax.clear_caches()
  yield
  jax.clear_caches()


@functools.partial(jax.jit, static_argnames="seed")
def make_params(seed=0):
  """Parameters large enough that attention and the norms matter."""
  params = transformer.init_params(WRITTEN_OUT, jax.random.key(seed))
  keys = iter(jax.random.split(jax.random.key(seed + 1), 99))
  return jax.tree.map(
    lambda x: x + (0.3 if x.ndim > 1 else 0.2) * jax.random.normal(next(keys), x.shape), params
  )


def make_batch(group, length=6):
  """Prompts padded left, right, inside and whole; completions cut and empty."""
  prompt_mask = np.array([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]])
  rows = len(prompt_mask) * group
  mask = np.arange(length) < (np.arange(rows)[::-1, None] % (length + 1))
  keys = jax.random.split(jax.random.key(0))
  return sequences.Sequences(
    jax.random.randint(keys[0], (rows, length), 0, CONFIG.vocab_size),
    jnp.asarray(mask, jnp.float32),
    jax.random.randint(keys[1], prompt_mask.shape, 0, CONFIG.vocab_size),
    jnp.asarray(prompt_mask),
  )


# Windows of three tokens in all layers, and in the second only.
WINDOWS = {"sliding_window": 3}, {"sliding_window": 3, "window_layers": (False, True)}


@pytest.mark.parametrize(
  ("group", "changes"),
  [(2, WINDOWS[1])]
  + [pytest.param(group, {}, marks=pytest.mark.slow) for group in (1, 2, 3)]
  + [pytest.param(1, changes, marks=pytest.mark.slow) for changes in WINDOWS],
)
def test_log_probabilities_and_gradients_equal_the_written_out_form(kernel, group, changes):
  # Two completions of ten tokens spare too little: their prompts are repeated.
  params, batch = make_params(), make_batch(group, length=10 if group == 2 else 6)

  def run(config):
    apply_fn = transformer.make_apply_fn(config, logps_chunk=8)

    def loss(params):
      logps = apply_fn(params, batch) * batch.mask
      return jnp.sum(logps * jnp.cos(jnp.arange(logps.size).reshape(logps.shape))), logps

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

  configs = (dataclasses.replace(config, **changes) for config in (WRITTEN_OUT, CONFIG))
  ((_, want), want_grads), ((_, got), grads) = map(run, configs)
  np.testing.assert_allclose(got, want, atol=1e-5)  # the same float32 sums in another order
  chex.assert_trees_all_close(grads, want_grads, atol=2e-4, rtol=1e-4)  # and sums over all rows


def test_generation_reads_prompts_with_the_same_result(kernel):
  """Keys and values go back to the order of the prompts before the caches take them."""
  params, batch = make_params(), make_batch(1)
  want, got = (
    sampling.generate(
      params,
      batch.prompt_tokens,
      batch.prompt_mask,
      jax.random.key(0),
      config=config,
      max_new_tokens=5,
      eos_id=-1,
      pad_id=0,
    )
    for config in (WRITTEN_OUT, CONFIG)
  )
  np.testing.assert_array_equal(got.tokens, want.tokens)
  np.testing.assert_allclose(got.logps, want.logps, atol=1e-5)  # float32, another order of sums


def test_reorder_and_its_gradient_are_permutations():
  mask = jnp.array([[0, 1, 0, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
  order = fused_attention.real_first(mask)
  np.testing.assert_array_equal(order.order, [[1, 3, 4, 0, 2], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]])
  x = jax.random.normal(jax.random.key(0), (3, 5, 2))
  np.testing.assert_array_equal(
    fused_attention.reorder(fused_attention.reorder(x, order), order.back()), x
  )
  weights = jnp.arange(30.0).reshape(x.shape)
  got = jax.grad(lambda x: jnp.sum(weights * fused_attention.reorder(x, order)))(x)
  places = order.order[..., None]
  want = jax.grad(lambda x: jnp.sum(weights * jnp.take_along_axis(x, places, axis=1)))(x)
  np.testing.assert_array_equal(got, want)


def relative_error(got, want):
  """The norm of the difference of two trees over that of the second."""
  got, want = (jax.tree.map(lambda x: x.astype(jnp.float32), tree) for tree in (got, want))
  return float(optax.global_norm(jax.tree.map(jnp.subtract, got, want)) / optax.global_norm(want))


@needs_gpu
# bfloat16 keeps 8 bits and float16 11: one rounding of an entry is up to 4e-3 and 5e-4 of it.
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 1e-2), ("float16", 2e-3)])
@pytest.mark.parametrize(
  ("length", "num_heads", "num_kv_heads", "head_dim"),
  [(1024, 9, 3, 64), (130, 4, 4, 128), (2, 4, 1, 8), (258, 8, 2, 256)],
)
def test_the_kernel_of_a_gpu(dtype, tolerance, length, num_heads, num_kv_heads, head_dim):
  keys = jax.random.split(jax.random.key(length), 4)
  shapes = (num_heads, num_kv_heads, num_kv_heads, num_heads)
  *arrays, weights = (
    jax.random.normal(key, (2, length, heads, head_dim)).astype(dtype)
    for key, heads in zip(keys, shapes, strict=True)
  )

  def run(attend, dtype):
    def loss(*arrays):
      out = attend(*arrays)
      return jnp.sum((out * weights).astype(jnp.float32)), out

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    return run(*(x.astype(dtype) for x in arrays))

  assert fused_attention.kernel_for(dtype, head_dim) == "cudnn"
  got = run(fused_attention._causal, dtype)
  want = run(functools.partial(jax.nn.dot_product_attention, is_causal=True), jnp.float32)
  for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert relative_error(ours, theirs) < tolerance


@needs_gpu
@pytest.mark.parametrize(("group", "length"), [(1, 6), (2, 11), (3, 6)])
def test_a_gpu_loses_no_more_to_bfloat16_than_the_written_out_form(group, length):
  batch = make_batch(group, length)

  def make(**changes):
    config = dataclasses.replace(CONFIG, **changes)
    apply_fn = transformer.make_apply_fn(config, logps_chunk=8)

    def loss(params):
      logps = apply_fn(params, batch) * batch.mask
      return jnp.sum(logps * jnp.cos(jnp.arange(logps.size).reshape(logps.shape))), logps

    return jax.jit(jax.grad(loss, has_aux=True))

  exact = make(dtype="float32")  # float32 has no kernel
  ours, theirs = make(dtype="bfloat16"), make(dtype="bfloat16", fused_attention=False)
  errors = np.zeros((2, 2))  # squares; of ours and theirs, in gradients and values
  for seed in range(3):
    params = make_params(seed)
    want = exact(params)
    for row, run in enumerate((ours, theirs)):
      errors[row] += [relative_error(*pair) ** 2 for pair in zip(run(params), want, strict=True)]
  # Both round at random: for one seed the ratio of the two errors lies between 0.5 and 1.9. If a
  # start token sees other tokens it is 9 or more (groups 2 and 3), without the causal mask 48.
  assert np.all(errors[0] < 9 * errors[1])


def test_a_tpu_takes_its_kernel_when_asked_alone(monkeypatch):
  for kernel, by_default in (("splash", False), ("cudnn", True), (None, False)):
    monkeypatch.setattr(fused_attention, "kernel_for", lambda dtype, head_dim, k=kernel: k)
    chosen = {
      asked: transformer.Transformer(dataclasses.replace(CONFIG, fused_attention=asked))
      for asked in (None, True, False)
    }
    found = [model._has_kernel(5) for model in chosen.values()]
    assert found == [by_default, kernel is not None, False]


def test_a_cpu_and_float32_have_no_kernel():
  with jax.default_device(jax.devices("cpu")[0]):
    assert fused_attention.kernel_for("bfloat16", 64) is None
  assert fused_attention.kernel_for("float32", 64) is None


def test_caps_are_written_out_where_the_kernel_has_none(monkeypatch):
  config = dataclasses.replace(CONFIG, attention_softcap=5.0)
  for kernel, expected in (("cudnn", False), ("splash", True)):
    monkeypatch.setattr(fused_attention, "kernel_for", lambda dtype, head_dim, k=kernel: k)
    assert transformer.Transformer(config)._has_kernel(5) == expected
  monkeypatch.setattr(fused_attention, "kernel_for", lambda dtype, head_dim: "cudnn")
  with pytest.raises(ValueError, match=r"softcap=5.0.*fused_attention=False"):
    fused_attention._causal(*(jnp.zeros((1, 2, 1, 8)),) * 3, softcap=5.0)


def lower_step(kernel, platform, group, prompt, monkeypatch, sharding=None, span=196, changes=None):
  """Lowers the gradient of a model without running it; returns the program and its scores.

  Rows have `span` tokens, a number that no other axis has.
  """
  length = span + 1 - prompt
  config = dataclasses.replace(CONFIG, dtype="bfloat16", head_dim=64, max_length=256)
  config = dataclasses.replace(config, **(changes or {}))
  monkeypatch.setattr(fused_attention, "kernel_for", lambda dtype, head_dim: kernel)
  # The only thing that JAX asks of a GPU while it traces.
  monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
  shaped = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
  params = jax.eval_shape(lambda: transformer.init_params(config, jax.random.key(0)))
  params = jax.tree.map(lambda x: shaped(x.shape, x.dtype), params)
  completions, prompts = (4, length), (4 // group, prompt)
  shapes = (completions, completions, prompts, prompts)
  batch = sequences.Sequences(*(shaped(shape, jnp.int32) for shape in shapes))
  apply_fn = transformer.make_apply_fn(config, logps_chunk=8)
  step = jax.jit(jax.value_and_grad(lambda params, batch: jnp.sum(apply_fn(params, batch))))
  lowered = step.trace(params, batch).lower(lowering_platforms=(platform,))
  # Two axes as long as the keys (or their blocks), or as the queries of a completion and the keys.
  pairs = rf"({length - 1}|{span})[x,]{span}|256[x,]256"
  return lowered, re.compile(rf"(tensor<|\[)(\d+[x,])*({pairs})(x|\])")


# Rows of one prompt, prompts that are repeated because they are short, prompts that are read once.
ROWS = [(1, 16), (2, 16), (2, 150)]


@pytest.mark.parametrize("span", [196, 195])
@pytest.mark.parametrize(("group", "prompt"), ROWS)
def test_a_gpu_program_of_a_training_step_holds_no_scores(monkeypatch, group, prompt, span):
  """Lowered for CUDA, without a GPU."""
  lowered, scores = lower_step(None, "cuda", group, prompt, monkeypatch, span=span)
  assert scores.search(lowered.as_text())
  lowered, _ = lower_step("cudnn", "cuda", group, prompt, monkeypatch, span=span)
  _, padded = lower_step(None, "cuda", group, prompt, monkeypatch, span=span + span % 2)
  text = lowered.as_text()
  assert not scores.search(text) and not padded.search(text)
  # What the kernel returns is kept: in the loop over layers it runs once forward, once backward.
  calls = re.findall(r"stablehlo.custom_call @(__cudnn\$\w+)", text)
  assert sorted(calls) == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]


def test_a_gpu_program_of_layers_with_and_without_windows_holds_no_scores(monkeypatch):
  """Each layer chooses between two kernels; both run once forward, once backward."""
  lowered, scores = lower_step("cudnn", "cuda", 1, 16, monkeypatch, changes=WINDOWS[1])
  text = lowered.as_text()
  assert not scores.search(text)
  calls = re.findall(r"stablehlo.custom_call @(__cudnn\$\w+)", text)
  assert sorted(calls) == ["__cudnn$fmhaSoftmax"] * 2 + ["__cudnn$fmhaSoftmaxBackward"] * 2


@pytest.mark.parametrize(("group", "prompt"), ROWS)
def test_a_tpu_program_of_a_training_step_holds_no_scores(monkeypatch, group, prompt):
  """Compiled for a TPU v5e, without one; needs the package libtpu."""
  pytest.importorskip("libtpu")
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # do not look for a TPU on the network
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
  one = jax.sharding.SingleDeviceSharding(topology.devices[0])
  lowered, scores = lower_step("splash", "tpu", group, prompt, monkeypatch, one)
  text = lowered.compile().as_text()
  assert not scores.search(text)
  # Forward, gradient of the queries, gradient of keys and values: each once in the loop.
  assert text.count('custom_call_target="tpu_custom_call"') == 3


@pytest.mark.parametrize("settings", [{}, {"window": 5, "softcap": 2.0, "scale": 0.3}])
def test_splash_attention_equals_the_form_for_cpus(settings):
  keys = jax.random.split(jax.random.key(0), 3)
  queries = jax.random.normal(keys[0], (2, 130, 4, 64))
  pairs = tuple(jax.random.normal(key, (2, 130, 2, 64)) for key in keys[1:])

  def run(attend):
    def loss(*arrays):
      out = attend(*arrays)
      return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(queries, *pairs)

  def written_out(queries, keys, values, *, scale=64**-0.5, softcap=None, window=None):
    bias = attention.attention_bias(jnp.ones((2, 130)), window)
    pairs = keys.swapaxes(1, 2), values.swapaxes(1, 2)
    return attention.attend(queries, *pairs, bias, scale=scale, softcap=softcap)

  got = run(functools.partial(fused_attention.splash, interpret=True, **settings))
  want = run(functools.partial(written_out, **settings))
  # float32 sums of up to 130 terms in another order, and the kernel's own exponentials
  chex.assert_trees_all_close(got, want, atol=2e-4, rtol=1e-4)
