"""BYOL on several devices: a ResNet whose batch, and whose data set, lie over the devices."""

import functools

import compiled_programs
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sharding
from representation import byol
from representation import image_augmentations as augmentations
from representation.networks import adapters, mlp, resnet

IMAGES, BATCH, SIZE, CLASSES = 48, 16, 16, 3


def _networks(encoder, views, *, hidden, width, classes, dtype=None):
  return byol.Networks(
    adapters.Encoder(encoder),
    adapters.Encoder(mlp.BatchNormMLP(hidden, width, dtype=dtype)),
    adapters.Encoder(mlp.BatchNormMLP(hidden, width, dtype=dtype)),
    adapters.Predictor(nn.Dense(classes)),
    views,
  )


CROP = augmentations.crop_and_flip(SIZE)  # the rest of the augmentation compiles slowly
NETWORKS = _networks(
  resnet.ResNet((1,), False, width_multiplier=1 / 8, stem="cifar"),
  augmentations.Views(CROP, CROP),
  hidden=16, width=8, classes=CLASSES,
)  # fmt: skip
BOUND = {"apply_fn": NETWORKS, "optimizer": optax.sgd(1.0), "config": byol.Config()}


def _init(key, networks, optimizer, config):
  """Returns a state whose online and target networks are drawn independently."""

  def draw(key):
    inputs = jnp.zeros((1, SIZE, SIZE, 3))  # parameters do not depend on the resolution
    made, features = [], None
    for network, part_key in zip(networks[:3], jax.random.split(key, 3), strict=True):
      made.append(network.init(part_key, inputs))
      inputs, _ = network(*made[-1], inputs, train=False)
      features = inputs if features is None else features
    params, states = zip(*made, strict=True)
    return byol.Parts(*params), byol.Parts(*states), features

  params, online, features = draw(jax.random.fold_in(key, 0))
  target_params, target, _ = draw(jax.random.fold_in(key, 1))
  params = params._replace(classifier=networks.classifier.init(key, features))
  return byol.init(
    params,
    optimizer=optimizer,
    config=config,
    target_params=target_params._replace(predictor=()),
    network_state=byol.NetworkState(online, target._replace(predictor=())),
  )


def _data():
  """Returns images, labels and the rows of a batch, some of them twice."""
  rng = np.random.default_rng(0)
  images = rng.uniform(size=(IMAGES, SIZE, SIZE, 3))
  return images, rng.integers(0, CLASSES, IMAGES), rng.integers(0, IMAGES, BATCH)


def _step(state, batch, key, *, bound):
  """One step as the training loop takes it: the data set is an argument, the rows say which."""
  images, labels, rows = batch
  return byol.update(state, byol.Batch(images[rows], labels[rows]), key, **bound)


def test_a_resnet_on_eight_devices_equals_one(x64):
  """Two images on each device: statistics, gradients and metrics are those of all sixteen.

  With a learning rate of 1 the change of the parameters is the gradient.
  """
  init = jax.jit(_init, static_argnames=("networks", "optimizer"))
  state = init(jax.random.key(0), NETWORKS, BOUND["optimizer"], BOUND["config"])
  # Flax initialises in float32.
  state = jax.tree.map(lambda x: x.astype(float) if x.dtype == jnp.float32 else x, state)
  step, key = functools.partial(_step, bound=BOUND), jax.random.key(1)
  one = jax.jit(step)(state, jax.tree.map(jnp.asarray, _data()), key)
  mesh = sharding.make_mesh({"data": 8})
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  arguments = (
    sharding.place(state, mesh, sharding.REPLICATED),
    sharding.shard_batch(_data(), mesh),
    jax.device_put(key, whole),
  )
  compiled = jax.jit(step, out_shardings=whole).lower(*arguments).compile()
  many = compiled(*arguments)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), many, one)
  # Devices exchange the images of the batch, and not those of the data set. Each activation has
  # the two images of its device.
  text, image = compiled.as_text(), (SIZE, SIZE, 3)
  exchanged = compiled_programs.exchanged_shapes(text)
  assert (BATCH, *image) in exchanged and (IMAGES, *image) not in exchanged
  assert f"f64[{BATCH // 8},{SIZE},{SIZE},8]" in text
  assert f"f64[{BATCH},{SIZE},{SIZE},8]" not in text


@pytest.mark.parametrize(
  ("num_images", "batch_size", "message"),
  [
    (IMAGES, 12, r"leaf '2' has 12 rows.* over the 8 shards .*: choose a multiple of 8, or drop"),
    (50, BATCH, r"leaf '0' has 50 rows.* over the 8 shards .*: choose a multiple of 8, or drop"),
  ],
)
def test_a_batch_that_does_not_divide_is_refused(num_images, batch_size, message):
  step = sharding.jit_update(
    functools.partial(_step, bound=BOUND), sharding.make_mesh({"data": 8}), sharding.REPLICATED
  )
  images = np.zeros((num_images, SIZE, SIZE, 3))
  data = images, np.zeros(num_images, int), np.zeros(batch_size, int)
  with pytest.raises(ValueError, match=message):
    step(jnp.zeros(()), data, jax.random.key(0))
