"""Random crops on the host, for images that do not fit in memory.

A batch is read, decoded, cropped and resized by threads. The device does the rest of the
augmentation: `image_augmentations.Views` of two `Augmentation(crop=False)` takes the pair of crops.
The crops obey the law of `image_augmentations.random_box`, and Pillow resizes them, which the
device does with `antialias=True`.

`CentreCrops` is what evaluation sees of such images: an array that is read when it is indexed.

Example of a data pipeline with Grain:

    data = images.open_crops("tfds:imagenet2012", directory="data", size=224)
    for ids, crops in batching.batches(
      np.arange(len(data.images)), batch_size=4096, seed=0, make=data.images.random_crops
    ):
      ...
"""

import concurrent.futures
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from experiments.data import image_splits
from sharding import checks


class Crops(NamedTuple):
  """Views of a batch.

  first: `[B, size, size, 3]` uint8.  second: the same images, cropped elsewhere; None for one view.
  labels: `[B]` int32.
  """

  first: np.ndarray
  second: np.ndarray | None
  labels: np.ndarray


def random_crops(
  split: image_splits.Split,
  ids: np.ndarray,
  rng: np.random.Generator,
  *,
  size: int,
  min_area: float = 0.08,
  max_aspect: float = 4 / 3,
  num_views: int = 2,
  rows: np.ndarray | None = None,
  pool: concurrent.futures.Executor | None = None,
) -> Crops:
  """Returns random crops of images, resized; each image is read and decoded once.

  Args:
    split: the images.
    ids: `[B]` their numbers.
    rng: of the crops; equal ones give equal crops, whatever the number of threads.
    size: height and width of the crops.
    min_area: smallest area of a crop as a share of the image's.
    max_aspect: largest width / height, and largest height / width, of a crop.
    num_views: crops of each image, 1 or 2.
    rows: rows of the batch that this process needs (`sharding.local_rows`); the others are zeros
      and are not read. None for all.
    pool: threads for the images of a batch; None for the thread that calls.

  Raises:
    ValueError: an argument is out of range, or an image is damaged; the message names it.
  """
  checks.count("size", size)
  checks.probabilities("min_area", min_area)
  if not max_aspect >= 1:
    raise ValueError(f"max_aspect must be at least 1, got {max_aspect}")
  checks.choice("num_views", num_views, (1, 2))
  # All draws come before the threads, whose order is not fixed.
  draws = rng.random((len(ids), num_views, 4))

  def views(i: int, image: np.ndarray) -> list[np.ndarray]:
    boxes = [
      random_box(draw, *image.shape[:2], min_area=min_area, max_aspect=max_aspect)
      for draw in draws[i]
    ]
    return [image_splits.resized_crop(image, box, size) for box in boxes]

  made, labels = _each(split, ids, size, num_views, views, pool, rows)
  return Crops(made[0], made[1] if num_views == 2 else None, labels)


class CentreCrops:
  """The central squares of images, an array `[N, size, size, 3]` of bytes that is not in memory.

  Rows are read, decoded, cropped and resized when they are indexed: `crops[7]`, `crops[:100]`,
  `crops[np.array([3, 1])]`.

  Attributes:
    split: the images.
    size: height and width of the squares, after resizing.
    share: side of the square, as a share of the shorter side of the image, in (0, 1].
    pool: threads for the images of a batch.
    shape, ndim, dtype: of the array.

  Raises:
    ValueError: an argument is out of range; when indexed, an image is damaged.
  """

  def __init__(self, split: image_splits.Split, size: int, share: float = 224 / 256):
    checks.count("size", size)
    if not 0 < share <= 1:
      raise ValueError(f"share must lie in (0, 1], got {share}")
    self.split, self.size, self.share = split, size, share
    self.pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    self.shape, self.ndim, self.dtype = (len(split), size, size, 3), 4, np.dtype(np.uint8)

  def __len__(self) -> int:
    return len(self.split)

  def __getitem__(self, rows: Any) -> np.ndarray:
    def square(i: int, image: np.ndarray) -> list[np.ndarray]:
      del i
      return [image_splits.central_square(image, self.size, share=self.share)]

    ids = np.arange(len(self))[rows]
    (made,), _ = _each(self.split, np.atleast_1d(ids), self.size, 1, square, self.pool)
    return made if np.ndim(ids) else made[0]

  def random_crops(
    self, ids: np.ndarray, rng: np.random.Generator, *, size: int = 0, **options: Any
  ) -> Crops:
    """Returns `random_crops` of these images by these threads; `size` is by default the array's."""
    return random_crops(self.split, ids, rng, size=size or self.size, pool=self.pool, **options)


def random_box(
  draw: np.ndarray, height: int, width: int, *, min_area: float, max_aspect: float
) -> tuple[int, int, int, int]:
  """Returns top, left, height and width of a random crop, in whole pixels.

  It has the distribution of `image_augmentations.random_box`.

  Args:
    draw: `[4]`, uniform in [0, 1).
    height: of the image.
    width: of the image.
    min_area: smallest area as a share of the image's.
    max_aspect: largest width / height, and largest height / width.
  """
  area = height * width * (min_area + (1 - min_area) * draw[0])
  aspect = math.exp(math.log(max_aspect) * (2 * draw[1] - 1))
  box_height = min(max(round(math.sqrt(area / aspect)), 1), height)
  box_width = min(max(round(math.sqrt(area * aspect)), 1), width)
  top = int(draw[2] * (height - box_height + 1))
  left = int(draw[3] * (width - box_width + 1))
  return top, left, box_height, box_width


def _each(
  split: image_splits.Split,
  ids: np.ndarray,
  size: int,
  num_views: int,
  views: Callable[[int, np.ndarray], list[np.ndarray]],
  pool: concurrent.futures.Executor | None,
  rows: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns `[num_views, B, size, size, 3]` and labels `[B]`: `views` of each image in `rows`."""
  made = np.zeros((num_views, len(ids), size, size, 3), np.uint8)
  labels = np.zeros(len(ids), np.int32)

  def one(i: int) -> None:
    image, labels[i] = split.example(int(ids[i]))
    made[:, i] = views(i, image)

  each: Any = map if pool is None else pool.map
  for _ in each(one, range(len(ids)) if rows is None else rows):
    pass
  return made, labels
