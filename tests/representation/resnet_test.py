"""ResNets: published numbers of parameters, a slow NumPy version, and the types of all numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from representation.networks import adapters, resnet


def _shapes(module, size=32):
  return jax.eval_shape(
    adapters.Encoder(module).init, jax.random.key(0), jnp.zeros((1, size, size, 3))
  )


def _num_params(module):
  return sum(leaf.size for leaf in jax.tree.leaves(_shapes(module)[0]))


@pytest.mark.parametrize(
  ("make", "features", "published"),
  [
    (resnet.ResNet18, 512, 11_689_512),
    (resnet.ResNet34, 512, 21_797_672),
    (resnet.ResNet50, 2048, 25_557_032),
    (resnet.ResNet101, 2048, 44_549_160),
    (resnet.ResNet152, 2048, 60_192_808),
  ],
)
def test_parameters_are_as_many_as_published(make, features, published):
  """Those of torchvision, which has a linear layer to 1000 classes behind the features."""
  assert _num_params(make()) + features * 1000 + 1000 == published


@pytest.mark.parametrize(
  ("make", "multiplier", "millions"),
  [(resnet.ResNet50, 2, 94), (resnet.ResNet50, 4, 375), (resnet.ResNet200, 2, 250)],
)
def test_wide_networks_have_the_size_that_the_paper_names(make, multiplier, millions):
  assert abs(_num_params(make(width_multiplier=multiplier)) / 1e6 - millions) < 1


def test_the_small_stem_has_a_smaller_first_convolution():
  params, _ = _shapes(resnet.ResNet18(stem="cifar"))
  assert params["Conv_0"]["kernel"].shape == (3, 3, 3, 64)
  assert _num_params(resnet.ResNet18()) - _num_params(resnet.ResNet18(stem="cifar")) == 40 * 3 * 64


def _same(images, size, stride, fill=0.0):
  """Yields for each place of the output its position and window, padded as SAME does."""
  counts = [-(-n // stride) for n in images.shape[1:3]]
  totals = [max((c - 1) * stride + size - n, 0) for c, n in zip(counts, images.shape[1:3])]  # noqa: B905
  pads = [(0, 0), *((t // 2, t - t // 2) for t in totals), (0, 0)]
  padded = np.pad(images, pads, constant_values=fill)
  for y in range(counts[0]):
    for x in range(counts[1]):
      yield y, x, padded[:, y * stride : y * stride + size, x * stride : x * stride + size]


def _convolve(images, kernel, stride=1):
  out = {(y, x): np.einsum("bhwi,hwio->bo", window, kernel)
         for y, x, window in _same(images, len(kernel), stride)}  # fmt: skip
  height, width = (max(place[axis] for place in out) + 1 for axis in range(2))
  return np.stack([np.stack([out[y, x] for x in range(width)], 1) for y in range(height)], 1)


def _pool(images):
  out = {(y, x): window.max((1, 2)) for y, x, window in _same(images, 3, 2, -np.inf)}
  height, width = (max(place[axis] for place in out) + 1 for axis in range(2))
  return np.stack([np.stack([out[y, x] for x in range(width)], 1) for y in range(height)], 1)


def _slow_resnet(params, statistics, images, *, block_sizes, bottleneck, stem):
  """Evaluation mode, one window at a time."""

  def norm(layers, stats, index, hidden):
    layer, running = layers[f"BatchNorm_{index}"], stats[f"BatchNorm_{index}"]
    scaled = (hidden - running["mean"]) / np.sqrt(running["var"] + 1e-5)
    return scaled * layer["scale"] + layer["bias"]

  def relu(hidden):
    return np.maximum(hidden, 0)

  hidden = _convolve(images, params["Conv_0"]["kernel"], 2 if stem == "imagenet" else 1)
  hidden = relu(norm(params, statistics, 0, hidden))
  if stem == "imagenet":
    hidden = _pool(hidden)
  number = 0
  for group, size in enumerate(block_sizes):
    for index in range(size):
      layers, stats = params[f"Block_{number}"], statistics[f"Block_{number}"]
      number, stride, inner = number + 1, 2 if group and index == 0 else 1, hidden
      strides = (1, stride, 1) if bottleneck else (stride, 1)
      for position, step in enumerate(strides):
        inner = _convolve(inner, layers[f"Conv_{position}"]["kernel"], step)
        inner = norm(layers, stats, position, inner)
        inner = inner if position == len(strides) - 1 else relu(inner)
      last = len(strides)
      if f"Conv_{last}" in layers:
        hidden = norm(
          layers, stats, last, _convolve(hidden, layers[f"Conv_{last}"]["kernel"], stride)
        )
      hidden = relu(inner + hidden)
  return hidden.mean((1, 2))


@pytest.mark.parametrize(
  ("bottleneck", "stem", "size"), [(False, "cifar", 5), (True, "cifar", 6), (True, "imagenet", 15)]
)
def test_equals_a_slow_version_in_numpy(x64, bottleneck, stem, size):
  options = {"block_sizes": (1, 2), "bottleneck": bottleneck, "stem": stem}
  encoder = adapters.Encoder(resnet.ResNet(**options, width_multiplier=1 / 16))
  rng = np.random.default_rng(0)
  images = rng.normal(size=(2, size, size + 1, 3))
  # Random scales and statistics too; 0.5 keeps variances positive.
  params, state = jax.tree.map(
    lambda leaf: jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape) * rng.choice([-1, 1], leaf.shape)),
    jax.eval_shape(encoder.init, jax.random.key(0), jnp.asarray(images)),
  )
  state = jax.tree.map(jnp.abs, state)
  found, _ = jax.jit(functools.partial(encoder, train=False))(params, state, images)
  slow = _slow_resnet(
    *jax.tree.map(np.asarray, (params, state["batch_stats"])), images, **options
  )  # fmt: skip
  np.testing.assert_allclose(found, slow, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_narrow_computation_keeps_wide_parameters_statistics_and_features():
  images = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 3)), jnp.float32)
  make = functools.partial(resnet.ResNet, (1, 1), False, width_multiplier=1 / 8, stem="cifar")
  found = {}
  for dtype in ("float32", "bfloat16"):
    encoder = adapters.Encoder(make(dtype=jnp.dtype(dtype)))
    params, state = encoder.init(jax.random.key(0), images)
    found[dtype] = jax.jit(functools.partial(encoder, train=True))(params, state, images)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, found[dtype]))} == {
      jnp.dtype("float32")
    }
  # bfloat16 keeps 8 bits: 1 part in 256 at each of five layers, of features of size one.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=0.05), found["bfloat16"], found["float32"]
  )
  # The computation was in bfloat16, or the two would agree to 1e-6.
  assert np.abs(found["bfloat16"][0] - found["float32"][0]).max() > 1e-4


def test_training_uses_the_statistics_of_the_batch_and_keeps_a_tenth():
  images = jnp.asarray(np.random.default_rng(0).normal(1, 2, (16, 4, 4, 3)), jnp.float32)
  encoder = adapters.Encoder(resnet.ResNet((1,), False, width_multiplier=1 / 16, stem="cifar"))
  params, state = encoder.init(jax.random.key(0), images)
  _, after = encoder(params, state, images, train=True)
  seen = np.asarray(_convolve(np.asarray(images), np.asarray(params["Conv_0"]["kernel"])))
  # Running statistics start at mean 0 and variance 1; 1e-4: float32.
  running = after["batch_stats"]["BatchNorm_0"]
  np.testing.assert_allclose(running["mean"], 0.1 * seen.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(running["var"], 0.9 + 0.1 * seen.var((0, 1, 2)), rtol=1e-4)


def test_blocks_with_zero_scale_start_as_their_shortcuts():
  images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 3)), jnp.float32)
  make = functools.partial(resnet.ResNet, bottleneck=False, width_multiplier=1 / 16, stem="cifar")
  outs = []
  for block_sizes in ((), (3,)):
    encoder = adapters.Encoder(make(block_sizes, zero_scale=True))
    params, state = encoder.init(jax.random.key(0), images)
    outs.append(encoder(params, state, images, train=False)[0])
  np.testing.assert_array_equal(*outs)


@pytest.mark.parametrize(
  ("options", "shape", "message"),
  [
    ({"stem": "mnist"}, (1, 8, 8, 3), "stem must be one of 'imagenet', 'cifar', got 'mnist'"),
    ({"width_multiplier": 0.3}, (1, 8, 8, 3), "width_multiplier must be a positive multiple of"),
    ({"width_multiplier": 0}, (1, 8, 8, 3), "width_multiplier must be a positive multiple of"),
    ({}, (8, 8, 3), r"images must have shape \[B, H, W, C\], got \[8, 8, 3\]"),
  ],
)
def test_bad_arguments_are_refused(options, shape, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(
      adapters.Encoder(resnet.ResNet18(**options)).init, jax.random.key(0), jnp.zeros(shape)
    )
