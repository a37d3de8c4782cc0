"""Supervised networks on images: from scratch, fine-tuned from BYOL, or linear layers on BYOL."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sharding
from experiments import files
from experiments.data import images as image_data
from experiments.loop import checkpointing, run_folder, training
from experiments.report import results, statistics
from experiments.tasks import image_runs
from representation import image_augmentations
from representation.baselines import supervised
from representation.networks import adapters, mlp
from sharding import checks

# What a checkpoint of BYOL holds of its encoder: parameters and running statistics.
_PARTS = ("params/encoder", "network_state/online/encoder")


@dataclasses.dataclass(frozen=True)
class Augment:
  """One random view of each image, standardised: `supervised.Networks.augment`.

  Attributes:
    augmentation: what happens to the images.
  """

  augmentation: image_augmentations.Augmentation

  def __call__(self, images: jax.Array, key: jax.Array) -> jax.Array:
    views = image_augmentations.augment(images, key, self.augmentation)
    return image_augmentations.standardise(views)


def build(
  config: Any, *, data: image_data.Images | None = None, start: tuple[Any, Any] | None = None
) -> training.Experiment:
  """Returns the experiment of one preset.

  Args:
    config: has the sections of `configs/supervised.py`.
    data: the data set of the config, where several runs share it.
    start: `read_encoder(config)`, where several runs share it.
  """
  if config.data.from_files:
    raise ValueError(
      "config.data.from_files=True is for BYOL: supervised runs need images that fit into memory"
    )
  data = image_runs.load(config) if data is None else data
  chosen = training_rows(config, data)
  trained_on = dataclasses.replace(data, images=data.images[chosen], labels=data.labels[chosen])
  algorithm = supervised.Config(**config.algorithm)
  encoder, optimizer = image_runs.make_encoder(config), make_optimizer(config)
  if start is None and config.network.init_from:
    start = read_encoder(config)
  view = image_augmentations.Augmentation(
    config.views.size, antialias=config.views.antialias, **config.views.first
  )
  num_classes = len(data.class_names)
  classifier = adapters.Predictor(nn.Dense(num_classes, kernel_init=mlp.TRUNCATED))
  apply_fn = supervised.Networks(encoder, classifier, Augment(view))

  def init(key, *start):
    encoder_key, classifier_key = jax.random.split(key)
    images = _example(config)
    params, network_state = start or encoder.init(encoder_key, images)
    features = jax.eval_shape(lambda: encoder(params, network_state, images, train=False)[0])
    features = jnp.zeros(features.shape, features.dtype)
    params = supervised.Params(params, classifier.init(classifier_key, features))
    return supervised.init(
      params, optimizer=optimizer, config=algorithm, network_state=network_state
    )

  def update(state, batch, key):
    return supervised.update(
      state,
      supervised.Batch(*image_runs.take(batch)),
      key,
      apply_fn=apply_fn,
      optimizer=optimizer,
      config=algorithm,
    )

  embed = image_runs.Embedder(config, encoder)

  def accuracy(state, images, labels):
    features = embed(state.params.encoder, state.network_state, images)
    logits = classifier(state.params.classifier, jnp.asarray(features))
    found = np.asarray(logits).argmax(-1)
    return statistics.clopper_pearson(int((found == labels).sum()), len(labels))

  def evaluate(state):
    metrics = {"test_accuracy": accuracy(state, data.test_images, data.test_labels)}
    if config.data.validate:
      rows = data.validation_rows
      metrics["validation_accuracy"] = accuracy(state, data.images[rows], data.labels[rows])
    notes = [["images with a label in training", len(chosen)], *map(list, data.notes.items())]
    return results.Result(
      metrics=metrics, tables=[results.Table("Data", ["what", "value"], notes)]
    )  # fmt: skip

  return training.Experiment(
    init=init,
    init_args=start or (),
    update=update,
    batches=image_runs.make_batches(config, trained_on),
    headline="test_accuracy",
    evaluate=evaluate,
  )


def training_rows(config: Any, data: image_data.Images) -> np.ndarray:
  """Returns the sorted rows of the images that are trained on, equally many of each class.

  They depend on the data set, the share and `label_seed` alone, and are the same for all methods.
  Those of a smaller share are among those of a larger one.

  Raises:
    ValueError: the share is not in (0, 1], or gives fewer images than classes.
  """
  section, num_classes = config.data, len(data.class_names)
  rows = data.fit_rows if section.validate else np.arange(len(data.images))
  share = section.label_share
  count = round(share * len(rows)) if 0 < share <= 1 else 0
  if count < num_classes:
    raise ValueError(
      f"config.data.label_share={share} must lie in (0, 1] and leave an image of each of the "
      f"{num_classes} classes, got {count} of {len(rows)} images: give at least "
      f"{num_classes / len(rows):.3g}"
    )
  if share == 1:
    return rows
  return rows[image_data.balanced_rows(data.labels[rows], count, section.label_seed)]


def make_optimizer(config: Any) -> optax.GradientTransformation:
  """Returns SGD with Nesterov momentum and a cosine decay to 0, without a warm-up."""
  section = config.optimizer
  checks.fractions("config.optimizer.momentum", section.momentum)
  return optax.chain(
    optax.add_decayed_weights(section.weight_decay, mask=sharding.decay_mask),
    optax.sgd(
      optax.cosine_decay_schedule(section.learning_rate, config.train.num_steps),
      momentum=section.momentum,
      nesterov=True,
    ),
  )


def read_encoder(config: Any) -> tuple[Any, Any]:
  """Returns parameters and running statistics of the encoder in a work directory of BYOL.

  Raises:
    ValueError: the folder of `network.init_from` holds no run of BYOL or no checkpoint, or its
      encoder is another one than that of the config.
    CheckpointError: the checkpoint cannot be read.
  """
  name = "config.network.init_from"
  folder = files.local_path(name, config.network.init_from)
  try:
    saved = run_folder.read_config(folder)
  except FileNotFoundError as error:
    raise ValueError(
      f"{name}={folder} holds no run: give the --workdir of a BYOL run"
    ) from error  # fmt: skip
  if saved.paper != "byol":
    raise ValueError(f"{name}={folder} is a run of {saved.paper!r}: give one of BYOL")
  checkpoints = checkpointing.Checkpointer(folder / "checkpoints", read_only=True)
  if not checkpoints.steps():
    raise ValueError(f"{name}={folder} has no checkpoint yet: train that run first")
  encoder, mesh = image_runs.make_encoder(config), training.make_mesh(config.sharding.mesh)
  shapes = jax.eval_shape(encoder.init, jax.random.key(0), _example(config))
  shardings = sharding.infer_shardings(shapes, sharding.REPLICATED, mesh)
  target = jax.tree.map(
    lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), shapes, shardings
  )
  try:
    found = checkpoints.restore_parts(
      checkpoints.steps()[-1], dict(zip(_PARTS, target, strict=True))
    )
  except ValueError as error:
    fields = "encoder", "width_multiplier", "stem"
    here, there = (
      ", ".join(f"{field} {section.get(field)}" for field in fields)
      for section in (config.network, saved.network)
    )
    raise ValueError(
      f"{name}={folder} has another encoder ({there}) than this run ({here}): set config.network "
      f"to its values. {error}"
    ) from error
  finally:
    checkpoints.close()
  params, network_state = (found[part] for part in _PARTS)
  return params, network_state


def _example(config: Any) -> jax.Array:
  return jnp.zeros((2, config.views.size, config.views.size, 3))
