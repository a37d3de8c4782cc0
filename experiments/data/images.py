"""Images with labels by name, in memory or read from their files.

| source                          | images                                                         |
|---------------------------------|----------------------------------------------------------------|
| `digits`                        | scikit-learn's 1,797 digits of 8x8 pixels; needs no files      |
| `FILE.npz`                      | raw arrays or encoded images: see `image_archives`             |
| `FOLDER`                        | `train/CLASS/*.jpg`, and `test`, `val` or `validation` like it |
| `tfds:NAME[/CONFIG][:VERSION]`  | TensorFlow Datasets, prepared as array_record                  |

`image_formats` says more about each. A source without a test split gives a fifth of its images for
it. These are always the same ones, so that runs with different seeds are compared on the same
images.

To choose the settings of a probe, some training images validate: `validation_rows`. They are the
first 10,000 of `tfds:imagenet2012`, as in BYOL (https://arxiv.org/abs/2006.07733), and a random
tenth elsewhere. BYOL itself trains on all of them.

Random choices are fixed by `numpy.random.PCG64(numpy.random.SeedSequence([seed, purpose]))`, whose
raw integers are the same in every version of NumPy. They take the same share of each class.
"""

import concurrent.futures
import dataclasses
import hashlib
import os
from typing import Any

import numpy as np

from experiments.data import image_crops, image_formats, image_splits
from sharding import checks

_TEST_SHARE, _VALIDATION_SHARE = 0.2, 0.1
_SUBSET, _TEST, _VALIDATION = range(3)  # purposes of random choices
_CHUNK = 256  # images that a thread decodes in turn


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
  """Images in memory, or read when they are indexed (`open_crops`).

  Attributes:
    name: of the data set.
    images: `[N, H, W, 3]` uint8, for training.
    labels: `[N]` int32, classes of the training images.
    test_images: `[M, H, W, 3]` uint8.
    test_labels: `[M]` int32.
    class_names: a name for each of the C classes.
    validation_rows: sorted rows of the training images on which probes choose their settings.
    notes: source, counts and hash, for the report.
  """

  name: str
  images: Any
  labels: np.ndarray
  test_images: Any
  test_labels: np.ndarray
  class_names: tuple[str, ...]
  validation_rows: np.ndarray
  notes: dict[str, Any]

  @property
  def fit_rows(self) -> np.ndarray:
    """Sorted rows of the training images that do not validate."""
    return np.setdiff1d(np.arange(len(self.images)), self.validation_rows)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFiles:
  """Images that are read one at a time: `train.read(7)`, `train.labels`, `len(test)`.

  Attributes:
    name: of the data set.
    train: training images.
    test: test images.
    class_names: a name for each class.
    validation_rows: as in `Images`.
    notes: source and counts.
  """

  name: str
  train: image_splits.Split
  test: image_splits.Split
  class_names: tuple[str, ...]
  validation_rows: np.ndarray
  notes: dict[str, Any]


def load(
  source: str,
  *,
  directory: str | os.PathLike[str] = "",
  size: int = 0,
  num_images: int = 0,
  seed: int = 0,
  free_bytes: int | None = None,
) -> Images:
  """Returns a data set in memory.

  Args:
    source: see the docstring of the module.
    directory: where files are looked for.
    size: if positive, images are cut to their central square and resized to this height and width,
      bicubic with antialiasing (Pillow's). Images of different sizes need it.
    num_images: if positive, at least 2, the number of training images to keep: the same number of
      each class, as far as there are so many.
    seed: of the choice of these images and of the validation images.
    free_bytes: memory that the images may take; None for the physical memory of the host.

  Raises:
    ValueError: the source does not exist, is damaged, does not fit in memory, or has one class
      only; an image that is to blame is named.

  Example:
    >>> digits = load("digits", num_images=500)
    >>> digits.images.shape, digits.test_images.shape, len(digits.validation_rows)
    ((500, 8, 8, 3), (359, 8, 8, 3), 50)
  """
  checks.count("size", size, least=0)
  files = open_files(source, directory=directory, num_images=num_images, seed=seed)
  height, width = (size, size) if size else files.train.read(0).shape[:2]
  _require_memory(files, height, width, free_bytes)
  images, enlarged = _decode_all(files.train, height, width, size)
  test_images, test_enlarged = _decode_all(files.test, height, width, size)
  digests, test_digests = _digests(images), _digests(test_images)
  known = set(digests)
  return Images(
    name=files.name,
    images=images,
    labels=files.train.labels,
    test_images=test_images,
    test_labels=files.test.labels,
    class_names=files.class_names,
    validation_rows=files.validation_rows,
    notes={
      **files.notes,
      "height": height,
      "width": width,
      "enlarged_images": enlarged + test_enlarged,
      "test_images_among_training_images": sum(digest in known for digest in test_digests),
      "sha256": hashlib.sha256(
        b"".join(
          [*digests, *test_digests, files.train.labels.tobytes(), files.test.labels.tobytes()]
        )
      ).hexdigest(),
    },
  )


def open_crops(
  source: str,
  *,
  size: int,
  share: float = 224 / 256,
  directory: str | os.PathLike[str] = "",
  num_images: int = 0,
  seed: int = 0,
) -> Images:
  """Returns a data set that need not fit in memory: its images are `image_crops.CentreCrops`.

  The labels of `tfds:` are read here, which reads all records once.

  Args:
    source: see the docstring of the module.
    size: height and width of the images, after resizing.
    share: side of the central square that is resized, as a share of the shorter side, in (0, 1].
    directory: as in `load`.
    num_images: as in `load`.
    seed: as in `load`.

  Raises:
    ValueError: as `load`, for what is seen without decoding images; indexing names the others.

  Example:
    >>> digits = open_crops("digits", size=8, share=1.0)
    >>> len(digits.images), digits.images[:5].shape
    (1438, (5, 8, 8, 3))
  """
  files = open_files(source, directory=directory, num_images=num_images, seed=seed)
  return Images(
    name=files.name,
    images=image_crops.CentreCrops(files.train, size, share),
    labels=files.train.labels,
    test_images=image_crops.CentreCrops(files.test, size, share),
    test_labels=files.test.labels,
    class_names=files.class_names,
    validation_rows=files.validation_rows,
    notes={**files.notes, "height": size, "width": size},
  )


def open_files(
  source: str,
  *,
  directory: str | os.PathLike[str] = "",
  num_images: int = 0,
  seed: int = 0,
) -> ImageFiles:
  """Opens a data set whose images are read one at a time, because they do not fit in memory.

  Args:
    source: see the docstring of the module.
    directory: where files are looked for.
    num_images: as in `load`.
    seed: as in `load`.

  Raises:
    ValueError: as `load`, for what is seen without decoding images.
  """
  checks.count("seed", seed, least=0, most=2**32 - 1)
  checks.count("num_images", num_images, least=0)
  raw = image_formats.read(source, directory)
  notes = {"source": source, **raw.notes}
  train, test = raw.train, raw.test
  if len(train) < 2:
    raise ValueError(f"{source}: holds {len(train)} training images; give at least two")
  if test is None:
    rows = _stratified(train.labels, _TEST_SHARE, (0, _TEST))
    notes["test_split"] = f"{len(rows)} of {len(train)} images held out here: the source has none"
    test, train = train.take(rows), train.take(np.setdiff1d(np.arange(len(train)), rows))
  if not len(test):
    raise ValueError(f"{source}: its test split is empty; leave it out to hold a fifth out")
  first_validate = raw.first_validate
  if num_images == 1 or num_images > len(train):
    raise ValueError(
      f"num_images must be 0 (all) or lie in [2, {len(train)}], the training images of {source}, "
      f"got {num_images}"
    )
  if num_images and num_images < len(train):
    notes["subset"] = f"{num_images} of {len(train)} training images"
    train = train.take(balanced_rows(train.labels, num_images, seed))
    first_validate = 0  # few of the first images are left
  if 0 < first_validate < len(train):
    validation_rows = np.arange(first_validate)
  else:
    validation_rows = _stratified(train.labels, _VALIDATION_SHARE, (seed, _VALIDATION))
  notes |= {
    "training_images": len(train),
    "validation_images_among_them": len(validation_rows),
    "test_images": len(test),
    "classes": len(raw.class_names),
  }
  return ImageFiles(raw.name, train, test, raw.class_names, validation_rows, notes)


# --- random choices -------------------------------------------------------------------------------


def _ranks(labels: np.ndarray, seed: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
  """Returns a random place of each row among those of its class, and a random number of each."""
  draws = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(len(labels))
  order = np.lexsort((draws, labels))
  starts = np.searchsorted(labels[order], labels[order])
  ranks = np.empty(len(labels), np.int64)
  ranks[order] = np.arange(len(labels)) - starts
  return ranks, draws


def balanced_rows(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
  """Returns `count` sorted rows, the same number of each class as far as there are so many.

  With the same seed, those of a smaller count are among those of a larger one.
  """
  checks.count("seed", seed, least=0, most=2**32 - 1)
  ranks, draws = _ranks(labels, (seed, _SUBSET))
  return np.sort(np.lexsort((draws, ranks))[:count])


def _stratified(labels: np.ndarray, share: float, seed: tuple[int, int]) -> np.ndarray:
  """Returns a share of the rows, sorted: at least one, and about that share of each class."""
  ranks, draws = _ranks(labels, seed)
  places = (ranks + 0.5) / np.bincount(labels)[labels]
  return np.sort(np.lexsort((draws, places))[: max(round(share * len(labels)), 1)])


# --- pixels ---------------------------------------------------------------------------------------


def _require_memory(files: ImageFiles, height: int, width: int, free_bytes: int | None) -> None:
  needed = (len(files.train) + len(files.test)) * height * width * 3
  if free_bytes is None:
    free_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  if needed > free_bytes:
    raise ValueError(
      f"{files.notes['source']}: {len(files.train)} + {len(files.test)} images of {height}x{width} "
      f"need {needed / 2**30:.1f} GiB, and {free_bytes / 2**30:.1f} GiB are free; choose a smaller "
      "size or num_images, or decode them in each step (config.data.from_files, images.open_crops)"
    )


def _decode_all(
  split: image_splits.Split, height: int, width: int, size: int
) -> tuple[np.ndarray, int]:
  """Returns all images `[N, height, width, 3]` and how many of them were enlarged."""
  result = np.empty((len(split), height, width, 3), np.uint8)

  def decode(start: int) -> int:
    enlarged = 0
    for i in range(start, min(start + _CHUNK, len(split))):
      image = split.read(i)
      if size:
        enlarged += min(image.shape[:2]) < size
        image = image_splits.central_square(image, size)
      elif image.shape != (height, width, 3):
        raise ValueError(
          f"{split.where(i)}: has {image.shape[0]}x{image.shape[1]} pixels where the first image "
          f"has {height}x{width}; give a size, to which all are cut and resized"
        )
      result[i] = image
    return enlarged

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    # The first image that is to blame raises; the chunks that have not begun are left.
    try:
      starts = range(0, len(split), _CHUNK)
      return result, sum(done.result() for done in [pool.submit(decode, i) for i in starts])
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise


def _digests(images: np.ndarray) -> list[bytes]:
  return [hashlib.blake2b(image, digest_size=16).digest() for image in images]
