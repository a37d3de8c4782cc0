"""Evaluates features of images by probes, and the same probes on two baselines.

The probes see frozen features of images without random views. They are fitted on the training
images and scored on the test images: the nearest neighbours, a linear layer trained by SGD whose
learning rate is chosen on validation images, and logistic regression whose penalty is chosen there.
The baselines are the pixels and an untrained encoder: training must beat both.
"""

import functools
import math
from typing import Any

import jax
import numpy as np

from experiments.data import images as image_data
from experiments.report import results, statistics
from experiments.tasks import image_runs
from representation import collapse, image_probes, probes, softmax_regression
from representation.networks import adapters
from sharding import checks

NUM_DIRECTIONS = 512  # pixels with more columns are projected on their main directions
NUM_POINTS = 2000  # in the map of features
NUM_QUERIES, NUM_SHOWN = 8, 6  # rows and columns of the picture of neighbours
PROBES = {
  "knn": "nearest neighbours",
  "linear": "linear layer, SGD",
  "logistic": "logistic regression, L2",
}


class Evaluator:
  """Scores the features of one data set. Baselines are computed once.

  Attributes:
    embed: computes features, an `image_runs.Embedder`.
  """

  def __init__(self, config: Any, data: image_data.Images, encoder: adapters.Encoder):
    checks.count("config.eval.num_neighbours", config.eval.num_neighbours)
    checks.count("config.eval.num_epochs", config.eval.num_epochs)
    for probe in config.eval.probes:
      checks.choice("an entry of config.eval.probes", probe, tuple(PROBES))
    if "knn" not in config.eval.probes:
      raise ValueError(
        f"config.eval.probes={tuple(config.eval.probes)} must contain 'knn', the headline"
      )
    self.embed = image_runs.Embedder(config, encoder)
    self._config, self._data = config, data
    self._num_classes = len(data.class_names)
    self._num_neighbours = min(config.eval.num_neighbours, len(data.images))

  def result(self, params: Any, network_state: Any, *, final: bool) -> results.Result:
    """Returns the scores of an encoder: of all probes at the end, and of k-NN before."""
    data = self._data
    train, test = self._embed_both(params, network_state)
    if not final:
      return results.Result(metrics={"knn_accuracy": self._knn(train, test)})
    trained = self._scores(train, test)
    scores = {"encoder, trained": trained}
    metrics: dict[str, Any] = {f"{probe}_accuracy": score for probe, score in trained.items()}
    if self._config.eval.baselines:
      scores = {**self.baselines, **scores}
      for name, row in self.baselines.items():
        end = "untrained" if name == "encoder, untrained" else "pixels"
        metrics |= {f"{probe}_accuracy_{end}": score for probe, score in row.items()}
    metrics |= {
      "effective_rank": float(collapse.effective_rank(test)),
      "mean_cosine": float(collapse.mean_cosine(test)),
    }
    table = results.Table(
      f"Test accuracy in percent, {len(data.test_images):,} images",
      ["of", *(PROBES[probe] for probe in trained)],
      [[name, *map(results.percent, row.values())] for name, row in scores.items()],
      caption="Brackets hold 95 % intervals over the test images. The untrained encoder has "
      "another seed; its batch normalisation has seen the training images.",
      digits=1,
    )
    notes = [[name.replace("_", " "), value] for name, value in data.notes.items()]
    # Files are often sorted by class, so what is drawn is chosen at random.
    shuffled = np.random.default_rng(0).permutation(len(test))
    points, queries = shuffled[:NUM_POINTS], shuffled[:NUM_QUERIES]
    neighbours, _ = image_probes.neighbour_rows(
      train, test[queries], num_neighbours=min(NUM_SHOWN, len(train))
    )
    return results.Result(
      metrics=metrics,
      tables=[table, results.Table("Data", ["what", "value"], notes)],
      arrays={
        "points": _main_directions(test[points], 2),
        "point_labels": data.test_labels[points],
        "queries": queries,
        "neighbours": np.asarray(neighbours),
      },
    )

  @functools.cached_property
  def baselines(self) -> dict[str, dict[str, results.Estimate]]:
    """The scores of pixels and of the untrained encoder."""
    train, test = (
      self.embed.pixels(images) for images in (self._data.images, self._data.test_images)
    )
    centre = train.mean(0)
    train, test = train - centre, test - centre
    note = ""
    if train.shape[1] > NUM_DIRECTIONS:
      directions = np.linalg.eigh(train.T @ train)[1][:, -NUM_DIRECTIONS:]
      train, test = train @ directions, test @ directions
      note = f", {NUM_DIRECTIONS} main directions"
    untrained = self._embed_both(*self.embed.untrained(self._data.images))
    return {
      f"pixels{note}": self._scores(train, test),
      "encoder, untrained": self._scores(*untrained),
    }

  def _embed_both(self, params: Any, network_state: Any) -> Any:
    """Returns the features of training and test images."""
    images = self._data.images, self._data.test_images
    return [self.embed(params, network_state, split) for split in images]

  def _scores(self, train: Any, test: Any) -> dict[str, results.Estimate]:
    """Returns the accuracy of each probe of the config."""
    ways = {"knn": self._knn, "linear": self._linear, "logistic": self._logistic}
    return {probe: ways[probe](train, test) for probe in self._config.eval.probes}

  def _knn(self, train: Any, test: Any) -> results.Estimate:
    labels: Any = self._data.labels
    scores = image_probes.nearest_neighbours(
      train,
      labels,
      test,
      num_classes=self._num_classes,
      num_neighbours=self._num_neighbours,
    )
    test_labels: Any = self._data.test_labels
    return _estimate(probes.top_accuracy(scores, test_labels), len(test))

  def _linear(self, train: Any, test: Any) -> results.Estimate:
    found = image_probes.evaluate_linear(
      jax.random.key(0),
      *self._split(train, test),
      num_classes=self._num_classes,
      num_epochs=self._config.eval.num_epochs,
    )
    return _estimate(found.score, len(test))

  def _logistic(self, train: Any, test: Any) -> results.Estimate:
    found = softmax_regression.evaluate_softmax_regression(
      *self._split(train, test), num_classes=self._num_classes
    )
    return _estimate(found.score, len(test))

  def _split(self, train: Any, test: Any) -> Any:
    data = self._data
    return train, data.labels, test, data.test_labels, data.validation_rows


def _estimate(accuracy: Any, count: int) -> results.Estimate:
  """Returns an accuracy on `count` images with its interval; NaN has none."""
  accuracy = float(accuracy)
  if not math.isfinite(accuracy):
    return results.Estimate(accuracy)
  return statistics.clopper_pearson(round(accuracy * count), count)


def _main_directions(features: Any, count: int) -> np.ndarray:
  """Returns unit features projected on their main directions, `[N, count]`."""
  rows = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
  _, _, directions = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
  return (rows - rows.mean(0)) @ directions[:count].T
