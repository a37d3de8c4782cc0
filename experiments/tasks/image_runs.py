"""Code shared by methods that learn from images, from the data to the features.

A data set that fits lives on the device. A batch of the loop is then all images, all labels and the
rows of the step, which gathers its images itself (`take`). With `config.data.from_files` a batch
holds both random crops of each image, which the host has made, and the device does the rest.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sharding
from experiments.data import batching, image_crops
from experiments.data import images as image_data
from experiments.loop import memory, training
from representation import image_augmentations, lars
from representation.networks import adapters, resnet
from sharding import checks

# Number of blocks in each group, and whether they are bottlenecks. The number in a name counts the
# layers with weights, as is usual; the small ones are for CPUs and tests.
ENCODERS = {
  "resnet4": ((1,), False),
  "resnet6": ((1, 1), False),
  "resnet8": ((1, 1, 1), False),
  "resnet10": ((1, 1, 1, 1), False),
  "resnet18": ((2, 2, 2, 2), False),
  "resnet34": ((3, 4, 6, 3), False),
  "resnet50": ((3, 4, 6, 3), True),
  "resnet101": ((3, 4, 23, 3), True),
  "resnet152": ((3, 8, 36, 3), True),
  "resnet200": ((3, 24, 36, 3), True),
}
OPTIMISERS = ("lars", "sgd", "adamw")
_CALIBRATION_PASSES = 50  # 0.9^50 = 0.5 % of the initial statistics is left


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["images", "labels", "rows"], meta_fields=["shape"]
)
@dataclasses.dataclass(frozen=True)
class Resident:
  """The images on the device, and the rows of one step.

  images: `[N, H * W * 3]` bytes. A TPU lays out `[N, H, W, 3]` by pixels, and a step that takes
  images from it would first copy all of them.  labels: `[N]`.  rows: `[B]`.  shape: (H, W, 3).
  """

  images: Any
  labels: Any
  rows: Any
  shape: tuple[int, ...]


def load(config: Any) -> image_data.Images:
  """Returns the data set of a config, in the memory of the host or read from its files."""
  section = config.data
  if section.from_files:
    if section.size:
      raise ValueError(
        f"config.data.size={section.size} has no meaning with config.data.from_files: crops are "
        "cut from whole images; leave it 0"
      )
    return image_data.open_crops(
      section.source,
      directory=section.directory,
      size=config.eval.size or config.views.size,
      share=config.eval.crop_share,
      num_images=section.num_images,
    )
  return image_data.load(
    section.source,
    directory=section.directory,
    size=section.size,
    num_images=section.num_images,
    free_bytes=memory.available(training.make_mesh(config.sharding.mesh).devices.flat),
  )


def make_encoder(config: Any) -> adapters.Encoder:
  """Returns the ResNet of a config, from standardised images to features."""
  section = config.network
  checks.choice("config.network.encoder", section.encoder, tuple(ENCODERS))
  checks.choice("config.network.dtype", section.dtype, ("float32", "bfloat16"))
  block_sizes, bottleneck = ENCODERS[section.encoder]
  module = resnet.ResNet(
    block_sizes,
    bottleneck,
    width_multiplier=section.width_multiplier,
    stem=section.stem,
    zero_scale=section.zero_scale,
    dtype=compute_dtype(config),
  )
  return adapters.Encoder(module)


def compute_dtype(config: Any) -> Any:
  """Returns the dtype of the networks' computation; None is that of the images, float32."""
  return None if config.network.dtype == "float32" else jnp.dtype(config.network.dtype)


def make_views(config: Any) -> image_augmentations.Views:
  """Returns the function from images to the two views of a config."""
  section = config.views
  first, second = (
    image_augmentations.Augmentation(
      section.size, antialias=section.antialias, crop=not config.data.from_files, **view
    )
    for view in (section.first, section.second)
  )
  return image_augmentations.Views(first, second)


def make_optimizer(config: Any) -> optax.GradientTransformation:
  """Returns the optimiser of a config, with a linear warm-up from 0 and a cosine decay to 0."""
  section, num_steps = config.optimizer, config.train.num_steps
  checks.choice("config.optimizer.name", section.name, OPTIMISERS)
  peak = section.learning_rate * config.train.batch_size / 256
  warmup = min(section.warmup_steps, num_steps - 1)
  schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, num_steps)
  if section.name == "lars":
    return lars.lars(schedule, weight_decay=section.weight_decay)
  # Biases and scales are not decayed either, so that the three differ in the step alone.
  decay = optax.add_decayed_weights(section.weight_decay, mask=sharding.decay_mask)
  if section.name == "sgd":
    return optax.chain(decay, optax.sgd(schedule, momentum=0.9))
  return optax.adamw(schedule, weight_decay=section.weight_decay, mask=sharding.decay_mask)


def make_batches(
  config: Any, data: image_data.Images
) -> Callable[[], Iterator[tuple[np.ndarray, Any]]]:
  """Returns the function that makes the iterator of a run."""
  mesh = training.make_mesh(config.sharding.mesh)
  size, batch_size = len(data.images), config.train.batch_size
  checks.count("config.train.batch_size", batch_size)
  shards = sharding.num_shards(mesh)
  if batch_size % shards:
    raise ValueError(
      f"config.train.batch_size={batch_size} must be a multiple of the {shards} data shards of "
      f"config.sharding.mesh {dict(mesh.shape)}"
    )
  if config.data.from_files:
    return functools.partial(
      batching.batches,
      np.arange(size, dtype=np.int32),
      batch_size=batch_size,
      seed=config.seed,
      make=functools.partial(
        data.images.random_crops,
        rows=sharding.local_rows(mesh, batch_size),
        **_crop_options(config),
      ),
    )
  if min(data.images.shape[1:3]) < config.views.size:
    height, width = data.images.shape[1:3]
    raise ValueError(
      f"config.views.size={config.views.size} is larger than the images of {height}x{width}: lower "
      "it, or enlarge them with config.data.size"
    )
  # Rows of zeros, which no step takes, make the images divide over the devices.
  filled = [
    np.pad(leaf, [(0, -size % shards)] + [(0, 0)] * (leaf.ndim - 1))
    for leaf in (data.images.reshape(size, -1), data.labels)
  ]
  images, labels = sharding.shard_batch(filled, mesh, whole=True)
  return functools.partial(
    batching.batches,
    np.arange(size, dtype=np.int32),
    batch_size=batch_size,
    seed=config.seed,
    make=lambda rows, rng: Resident(images, labels, rows, data.images.shape[1:]),
  )


def _crop_options(config: Any) -> dict[str, Any]:
  """Returns what crops of the host need to know; both views share it."""
  first, second = config.views.first, config.views.second
  options = {"size": config.views.size}
  for name in ("min_area", "max_aspect"):
    if first[name] != second[name]:
      raise ValueError(
        f"config.views.first.{name}={first[name]} must equal config.views.second.{name}="
        f"{second[name]} with config.data.from_files"
      )
    options[name] = first[name]
  return options


def take(batch: Any) -> tuple[Any, Any]:
  """Returns the images of a step, or the pair of crops that the host made, and the labels."""
  if isinstance(batch, image_crops.Crops):
    return (batch.first, batch.second), batch.labels
  return batch.images[batch.rows].reshape(-1, *batch.shape), batch.labels[batch.rows]


class Embedder:
  """Computes the features of all images of a data set, without random views.

  Attributes:
    mesh: the devices.
  """

  def __init__(self, config: Any, encoder: adapters.Encoder):
    self.mesh = training.make_mesh(config.sharding.mesh)
    self._encoder, self._seed = encoder, config.seed + 1
    self._batch_size = config.eval.batch_size
    checks.count("config.eval.batch_size", self._batch_size)
    self._batch_size += -self._batch_size % sharding.num_shards(self.mesh)
    size = config.eval.size or config.views.size
    share = 1.0 if config.data.from_files else config.eval.crop_share  # the host has cut these

    def embed(params, network_state, images, *, train=False):
      images = image_augmentations.centre_crop(images, size=size, share=share, antialias=True)
      images = image_augmentations.standardise(images)
      return encoder(params, network_state, images, train=train)

    # Each process of a run over several hosts needs all features.
    replicated = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
    self._embed = jax.jit(lambda *args: embed(*args)[0], out_shardings=replicated)
    self._observe = jax.jit(lambda *args: embed(*args, train=True)[1])
    self._shrink = jax.jit(
      lambda images: image_augmentations.centre_crop(
        images, size=min(size, 32), share=share, antialias=True
      ),
      out_shardings=replicated,
    )
    self._example = jnp.zeros((2, size, size, 3))

  def __call__(self, params: Any, network_state: Any, images: Any) -> np.ndarray:
    """Returns the features `[N, F]` of images `[N, H, W, 3]`, by an encoder in evaluation mode."""
    return self._map(lambda batch: self._embed(params, network_state, batch), images)

  def pixels(self, images: Any) -> np.ndarray:
    """Returns the pixels of images as rows, of at most 32x32 pixels."""
    return self._map(self._shrink, images).reshape(len(images), -1)

  def _map(self, function: Callable[[jax.Array], jax.Array], images: Any) -> np.ndarray:
    """Applies a function of a batch to all images."""
    found = []
    for start in range(0, len(images), self._batch_size):
      rows = images[start : start + self._batch_size]
      short = self._batch_size - len(rows)  # the last batch is filled up: one shape compiles once
      filled = np.concatenate([rows, np.zeros((short, *rows.shape[1:]), rows.dtype)])
      outputs = function(sharding.shard_batch(filled, self.mesh, whole=True))
      found.append(np.asarray(outputs)[: len(rows)])
    return np.concatenate(found)

  def untrained(self, images: Any) -> tuple[Any, Any]:
    """Returns parameters and state of an encoder of another seed that has only seen `images`.

    Its running statistics are those of the images, which the first ones, 0 and 1, are not.
    """
    params, state = self._encoder.init(jax.random.key(self._seed), self._example)
    size = min(self._batch_size, len(images))
    rng = np.random.default_rng(0)
    for _ in range(_CALIBRATION_PASSES):
      rows = np.sort(rng.choice(len(images), size, replace=False))
      state = self._observe(params, state, images[rows])
    return params, state
