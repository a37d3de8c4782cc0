"""Figures of runs on images: collapse, views, nearest neighbours and a map of the features."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from experiments.data import images as image_data
from experiments.report import plots, results
from experiments.tasks import image_runs
from representation import image_augmentations

NUM_IMAGES, NUM_VIEWS = 6, 4  # rows and columns of the picture of views, of each kind


def draw(
  config: Any, data: image_data.Images, history: Any, result: results.Result
) -> list[results.Figure]:
  """Returns all figures of a run."""
  return [
    _training(history),
    views(config, data),
    neighbours(data, result),
    feature_map(data, result),
  ]


def _training(history: Any) -> results.Figure:
  """Draws the traces in which a collapse would show, and the classifier beside them."""
  figure, axes = plots.subplots(2, 2)
  steps = [row["step"] for row in history]
  for axis, (name, label) in zip(
    axes.flat,
    (
      ("byol/prediction_loss", "prediction loss"),
      ("collapse/mean_cosine", "mean cosine of projections"),
      ("collapse/spread", "spread of projections"),
      ("byol/accuracy", "accuracy of the online classifier"),
    ),
    strict=True,
  ):
    axis.plot(steps, [row[name] for row in history], label=label)
    axis.set(xlabel="step", ylabel=label)
    axis.set_ylim(bottom=0)
  norms = [row["collapse/mean_norm"] for row in history]
  axes[1][0].plot(steps, norms, linestyle=":", color="0.5", label="mean length")
  axes[1][0].legend(fontsize=8)
  if history.evals:
    last = axes[1][1]
    last.plot(
      [row["step"] for row in history.evals],
      [row["knn_accuracy"] for row in history.evals],
      marker="o", ms=3, label="k-NN, test images",
    )  # fmt: skip
    last.legend(fontsize=8)
  caption = (
    "After a collapse the prediction loss is near 0, the mean cosine near 1, and the spread much "
    "smaller than the mean length. The classifier sees one augmented view of training images."
  )
  return results.Figure("collapse", caption, figure)


def views(config: Any, data: image_data.Images) -> results.Figure:
  """Draws images beside random views of both kinds, as a step sees them."""
  rows = np.linspace(0, len(data.images) - 1, NUM_IMAGES).astype(int)
  images = data.images[rows]
  both = image_runs.make_views(config)
  columns: list[Any] = [images]
  for view, augmentation in enumerate((both.first, both.second)):
    # Pictures are cropped here, also where the host crops in training.
    augmentation = dataclasses.replace(augmentation, crop=True)
    augment = jax.jit(functools.partial(image_augmentations.augment, augmentation=augmentation))
    for index in range(NUM_VIEWS):
      columns.append(augment(images, jax.random.fold_in(jax.random.key(view), index)))
  titles = ["image"] + [f"{view} {k + 1}" for view in ("first", "second") for k in range(NUM_VIEWS)]
  grid = [[column[row] for column in columns] for row in range(len(images))]
  caption = (
    "Images of the training set, and random views of each. BYOL predicts the target's "
    "projection of a second view from a first view, and the other way round."
  )
  return results.Figure("views", caption, _grid(grid, titles))


def neighbours(data: image_data.Images, result: results.Result) -> results.Figure:
  """Draws test images beside the training images with the closest features."""
  queries, rows = result.arrays["queries"], result.arrays["neighbours"]
  shown, found = data.test_images[queries], data.images[rows.reshape(-1)]
  found = found.reshape(*rows.shape, *found.shape[1:])
  grid = [[query, *others] for query, others in zip(shown, found, strict=True)]
  right = [[None, *row] for row in data.labels[rows] == data.test_labels[queries][:, None]]
  titles = ["test image", *(f"{rank + 1}" for rank in range(rows.shape[1]))]
  caption = (
    "Random test images, and the training images whose features have the largest cosine with "
    "theirs. A green frame means the same class, a red frame another one."
  )
  return results.Figure("neighbours", caption, _grid(grid, titles, right))


def feature_map(data: image_data.Images, result: results.Result) -> results.Figure:
  """Draws the features of test images along their two main directions."""
  points, labels = result.arrays["points"], result.arrays["point_labels"]
  figure, axes = plots.subplots(1, 1, size=(4.6, 4.6))
  axis = axes[0][0]
  num_classes = len(data.class_names)
  for label in range(min(num_classes, 10)):
    chosen = points[labels == label]
    axis.scatter(*chosen.T, s=5, linewidths=0, color=f"C{label}", label=data.class_names[label])
  axis.set(xticks=[], yticks=[], xlabel="first direction", ylabel="second direction")
  axis.legend(fontsize=8, markerscale=2.5, loc="center left", bbox_to_anchor=(1, 0.5))
  caption = (
    "Each point is a test image: its features, scaled to unit length and projected on the two main "
    "directions of all. Colours are classes, which training has not seen."
  )
  if num_classes > 10:
    caption += " Only the first ten classes are drawn."
  return results.Figure("features", caption, figure)


def _grid(images: Any, titles: Any, right: Any = None) -> Any:
  """Returns a figure of images `[rows][columns]`, framed by whether they are `right`."""
  figure, axes = plots.subplots(len(images), len(images[0]), size=(0.9, 0.9))
  for index, row in enumerate(images):
    for column, image in enumerate(row):
      axis = axes[index][column]
      axis.imshow(np.asarray(image), interpolation="nearest")
      axis.set(xticks=[], yticks=[])
      axis.grid(False)
      known = right is not None and right[index][column] is not None
      colour = ("#2a9d8f" if right[index][column] else "#c0392b") if known else "none"
      axis.spines[:].set(visible=True, color=colour, linewidth=2)
      if not index:
        axis.set_title(titles[column])
  return figure
