"""BYOL on several devices: a ResNet whose batch, and whose data set, lie over the devices."""

import functools

import compiled_programs
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import topologies

import sharding
from experiments.tasks import image_runs
from representation import byol, byol_recipes, lars
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


def _data(num_images=IMAGES, batch_size=BATCH):
  """Returns a batch of the training loop: the data set and the rows of a step, some twice."""
  rng = np.random.default_rng(0)
  return image_runs.Resident(
    rng.uniform(size=(num_images, SIZE * SIZE * 3)),
    rng.integers(0, CLASSES, num_images),
    rng.integers(0, num_images, batch_size),
    (SIZE, SIZE, 3),
  )


def _step(state, batch, key):
  """One step as the training loop takes it: the data set is an argument, the rows say which."""
  return byol.update(state, byol.Batch(*image_runs.take(batch)), key, **BOUND)


@pytest.mark.slow
def test_a_resnet_on_eight_devices_equals_one(x64):
  """Two images on each device: statistics, gradients and metrics are those of all sixteen.

  With a learning rate of 1 the change of the parameters is the gradient.
  """
  init = jax.jit(_init, static_argnames=("networks", "optimizer"))
  state = init(jax.random.key(0), NETWORKS, BOUND["optimizer"], BOUND["config"])
  # Flax initialises in float32.
  state = jax.tree.map(lambda x: x.astype(float) if x.dtype == jnp.float32 else x, state)
  key = jax.random.key(1)
  one = jax.jit(_step)(state, _data(), key)
  mesh = sharding.make_mesh({"data": 8})
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  arguments = (
    sharding.place(state, mesh, sharding.REPLICATED),
    sharding.shard_batch(_data(), mesh),
    jax.device_put(key, whole),
  )
  compiled = jax.jit(_step, out_shardings=whole).lower(*arguments).compile()
  many = compiled(*arguments)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), many, one)
  # Devices exchange the images of the batch, and not those of the data set. Each activation has
  # the two images of its device.
  text = compiled.as_text()
  exchanged = compiled_programs.exchanged_shapes(text)
  assert (BATCH, SIZE * SIZE * 3) in exchanged and (IMAGES, SIZE * SIZE * 3) not in exchanged
  assert f"f64[{BATCH // 8},{SIZE},{SIZE},8]" in text
  assert f"f64[{BATCH},{SIZE},{SIZE},8]" not in text


@pytest.mark.parametrize(
  ("num_images", "batch_size", "message"),
  [(IMAGES, 12, "'rows' has 12 rows"), (50, BATCH, "'images' has 50 rows")],
)
def test_a_batch_that_does_not_divide_is_refused(num_images, batch_size, message):
  message += ", which do not divide over the 8 shards .*: choose a multiple of 8, or drop"
  step = sharding.jit_update(_step, sharding.make_mesh({"data": 8}), sharding.REPLICATED)
  with pytest.raises(ValueError, match=message):
    step(jnp.zeros(()), _data(num_images, batch_size), jax.random.key(0))


def _lower_imagenet_step(devices, batch_size):
  """Lowers the paper's step on ImageNet: ResNet-50 at 224 pixels in bfloat16, LARS, T and T'.

  The images come with 256 pixels a side.
  """
  networks = _networks(
    resnet.ResNet50(dtype=jnp.bfloat16),
    augmentations.Views(augmentations.first_view(), augmentations.second_view()),
    hidden=4096, width=256, classes=1000, dtype=jnp.bfloat16,
  )  # fmt: skip
  recipe = byol_recipes.PRESETS[1000]
  rate = byol_recipes.learning_rate_schedule(
    recipe.base_learning_rate, num_epochs=1000, batch_size=batch_size
  )
  optimizer = lars.lars(rate, weight_decay=recipe.weight_decay)
  config = byol.Config(target_decay=recipe.target_decay)
  mesh = sharding.make_mesh({"data": len(devices)}, devices)
  whole, split = (
    jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in ((), ("data",))
  )

  def placed(shapes, to):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), shapes)

  key = jax.eval_shape(jax.random.key, 0)
  state = jax.eval_shape(lambda key: _init(key, networks, optimizer, config), key)
  batch = byol.Batch(
    jax.ShapeDtypeStruct((batch_size, 256, 256, 3), jnp.uint8),
    jax.ShapeDtypeStruct((batch_size,), jnp.int32),
  )
  step = functools.partial(byol.update, apply_fn=networks, optimizer=optimizer, config=config)
  return (
    jax.jit(step, donate_argnums=0, out_shardings=whole)
    .trace(placed(state, whole), placed(batch, split), placed(key, whole))
    .lower(lowering_platforms=(devices[0].platform,))
  )


@pytest.mark.slow
def test_the_imagenet_preset_compiles_for_eight_devices():
  """At batch 4096; each device has the activations of its own 512 images."""
  text = _lower_imagenet_step(jax.devices(), 4096).compile().as_text()
  assert "bf16[512,56,56,256]" in text and "[4096,56,56,256]" not in text
  # Sums, gradients and the rows of the collapse metrics are exchanged, and no image.
  assert not [shape for shape in compiled_programs.exchanged_shapes(text) if 224 in shape]


@pytest.fixture
def tpu_devices(monkeypatch):
  """Returns a function from a topology to its devices, without a TPU; needs the package libtpu."""
  pytest.importorskip("libtpu")
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # do not look for a TPU on the network
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  return lambda name: topologies.get_topology_desc(platform="tpu", topology_name=name).devices


@pytest.mark.slow
def test_the_imagenet_preset_compiles_for_tpus(tpu_devices):
  """At batch 4096, for 16 TPU v5e with 16 GiB each; compiling fails where memory ends."""
  before = jax.config.jax_exec_time_optimization_effort
  jax.config.update("jax_exec_time_optimization_effort", -1.0)  # else it takes over ten minutes
  try:
    memory = _lower_imagenet_step(tpu_devices("v5e:4x4"), 4096).compile().memory_analysis()
  finally:
    jax.config.update("jax_exec_time_optimization_effort", before)
  assert memory.temp_size_in_bytes + memory.argument_size_in_bytes < 16 * 2**30


@pytest.mark.slow
def test_a_tpu_takes_a_batch_without_a_copy_of_the_data_set(tpu_devices):
  """The images are stored flat; `[N, 32, 32, 3]` would be copied to another layout in each step."""
  mesh = sharding.make_mesh({"data": 4}, tpu_devices("v5e:2x2"))
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  temporary = []
  for shape in ((3072,), (32, 32, 3)):
    batch = image_runs.Resident(
      jax.ShapeDtypeStruct((50_000, *shape), jnp.uint8, sharding=split),
      jax.ShapeDtypeStruct((50_000,), jnp.int32, sharding=split),
      jax.ShapeDtypeStruct((512,), jnp.int32, sharding=split),
      (32, 32, 3),
    )
    lowered = jax.jit(image_runs.take).trace(batch).lower(lowering_platforms=("tpu",))
    temporary.append(lowered.compile().memory_analysis().temp_size_in_bytes)
  flat, square = temporary
  assert flat < 8 * 2**20 < 12_500 * 3072 < square  # the share of one device: 37 MB
