"""Readers of image data sets: one for each kind of source.

| source       | what it is                                                                     |
|--------------|--------------------------------------------------------------------------------|
| `digits`     | scikit-learn's 1,797 digits of 8x8 pixels, grey repeated to three channels      |
| `FILE.npz`   | raw arrays or encoded images                                                   |

An `.npz` of raw arrays has `images [N, H, W, 3]` and `labels [N]`, and for the test `test_images`
and `test_labels`, or `is_test [N]`. `train_images`, `x_train`, `y_train`, `x_test` and `y_test` are
understood too. Floating-point numbers in [0, 1] become bytes.

An `.npz` of encoded images has `jpeg` (the bytes of all files joined, JPEG or PNG), `offsets
[N + 1]`, `labels [N]` and `is_test [N]`. Both may have `class_names`. Pickled objects are refused.

Pillow decodes the files. Those in grey, CMYK or a palette become RGB. Refused are those with pixels
that are transparent, whose colour nobody sees, and those with more than 8 bits a channel, which
Pillow would clip.
"""

import dataclasses
import functools
import io
import os
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_READ_ERRORS = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error)
# Pillow knows more formats; some of them run other programs.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
_TRAIN_KEYS = ("images", "train_images", "x_train", "X_train")
_TEST_KEYS = ("test_images", "x_test", "X_test")
_TRAIN_LABEL_KEYS = ("labels", "train_labels", "y_train")
_TEST_LABEL_KEYS = ("test_labels", "y_test")
_ENCODED_KEYS = ("jpeg", "png", "encoded")
_CHUNK = 1024  # images that are checked together: bounds the memory of temporary arrays


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
  """Images of one split, read one at a time, from any thread.

  Attributes:
    num_images: their number N.
    fetch: from a number below N to the bytes of an image file, or to an array `[h, w, 3]` of bytes.
    read_labels: returns the labels `[N]`; it may have to read all records.
    where: from a number to what error messages call the image.
  """

  num_images: int
  fetch: Callable[[int], Any]
  read_labels: Callable[[], np.ndarray]
  where: Callable[[int], str]

  def __len__(self) -> int:
    return self.num_images

  @functools.cached_property
  def labels(self) -> np.ndarray:
    """Class of each image, `[N]` int32."""
    return self.read_labels().astype(np.int32)

  def read(self, index: int) -> np.ndarray:
    """Returns one image, `[h, w, 3]` uint8.

    Raises:
      ValueError: the image is damaged, transparent, or has more than 8 bits a channel; the message
        names it.
    """
    found = self.fetch(index)
    return found if isinstance(found, np.ndarray) else np.asarray(decode(found, self.where(index)))

  def take(self, rows: np.ndarray) -> "Split":
    """Returns the split of these rows; messages keep the numbers of this one."""
    return Split(
      len(rows),
      lambda index: self.fetch(rows[index]),
      lambda: self.labels[rows],
      lambda index: self.where(rows[index]),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Raw:
  """A data set as its source has it.

  Attributes:
    name: of the data set.
    train: training images.
    test: test images, or None if the source has none.
    class_names: a name for each class.
    notes: what a reader of results should know.
    first_validate: number of first training images that validate by convention, or 0.
  """

  name: str
  train: Split
  test: Split | None
  class_names: tuple[str, ...]
  notes: dict[str, Any] = dataclasses.field(default_factory=dict)
  first_validate: int = 0


def decode(encoded: bytes, where: str) -> Any:
  """Returns an image file as a Pillow image in RGB.

  Raises:
    ValueError: it is damaged, transparent, or has more than 8 bits a channel.
  """
  from PIL import Image

  try:
    image = Image.open(io.BytesIO(encoded), formats=_FORMATS)
    image.load()
  except Exception as error:  # damage makes Pillow raise errors of many kinds
    raise ValueError(
      f"{where}: cannot be decoded ({error}); copy it again or leave it out"
    ) from error
  if image.mode == "RGB":
    return image
  if image.mode[0] in "IF":
    raise ValueError(
      f"{where}: has more than 8 bits a channel (mode {image.mode}); save it with 8 bits"
    )
  if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
    raise ValueError(f"{where}: has transparent pixels; save it on a background, without alpha")
  return image.convert("RGB")


def read(source: str, directory: str | os.PathLike[str] = "") -> Raw:
  """Opens a source; see the docstring of the module.

  Args:
    source: its name.
    directory: where files and folders are looked for.

  Raises:
    ValueError: there is no such source, or it is damaged.
  """
  if source == "digits":
    return _digits()
  path = pathlib.Path(directory, source)
  if source and path.is_file() and path.suffix == ".npz":
    return _npz(path)
  found = "exists but is no .npz" if source and path.is_file() else "does not exist"
  raise ValueError(f"no image data set {source!r} ({path} {found}): give digits or FILE.npz")


def _digits() -> Raw:
  from sklearn import datasets

  digits = datasets.load_digits()
  images = np.round(digits.images * (255 / 16)).astype(np.uint8)  # stored as 0 to 16
  split = _array_split(np.repeat(images[..., None], 3, axis=-1), digits.target, "digits")
  return Raw("digits", split, None, tuple("0123456789"))


# --- .npz -----------------------------------------------------------------------------------------


def _npz(path: pathlib.Path) -> Raw:
  try:
    archive = np.load(path, allow_pickle=False)
  except _READ_ERRORS as error:
    raise ValueError(f"cannot read {path} ({error}); save arrays with numpy.savez") from error
  if not isinstance(archive, np.lib.npyio.NpzFile):
    raise ValueError(f"{path} is a single array, not an archive; save arrays with numpy.savez")
  with archive:
    keys = archive.files

    def get(names: Sequence[str]) -> Any:
      name = next((name for name in names if name in keys), None)
      try:
        return None if name is None else archive[name]
      except _READ_ERRORS as error:
        raise ValueError(
          f"{path}: cannot read {name} ({error}); copy the file again, and save plain arrays "
          "without pickled objects"
        ) from error

    labels = get(_TRAIN_LABEL_KEYS)
    encoded = get(_ENCODED_KEYS)
    images = get(_TRAIN_KEYS) if encoded is None else None
    if labels is None or (encoded is None and images is None):
      raise ValueError(
        f"{path}: needs {_TRAIN_KEYS[0]} (or jpeg and offsets) and {_TRAIN_LABEL_KEYS[0]}, found "
        f"{keys}"
      )
    offsets, is_test = get(("offsets",)), get(("is_test",))
    test_images, test_labels = get(_TEST_KEYS), get(_TEST_LABEL_KEYS)
    names = get(("class_names",))
  if encoded is not None:
    whole = _encoded_split(encoded, offsets, labels, str(path))
  else:
    whole = _array_split(images, labels, str(path))
  train, test = whole, None
  if is_test is not None:
    if is_test.shape != (len(whole),) or not np.isin(is_test, (0, 1)).all():
      raise ValueError(
        f"{path}: is_test must be {len(whole)} truth values, got {is_test.dtype} "
        f"{list(is_test.shape)}"
      )
    train, test = (whole.take(np.flatnonzero(is_test == value)) for value in (0, 1))
  elif test_images is not None:
    if test_labels is None:
      raise ValueError(f"{path}: has test images but none of {list(_TEST_LABEL_KEYS)}")
    test = _array_split(test_images, test_labels, f"{path}, test")
  if names is None:
    names = [str(i) for i in range(max(int(whole.labels.max(initial=0)) + 1, 2))]
  notes = {}
  if ignored := sorted(set(keys) & {"val_images", "x_val", "X_val"}):
    notes["not used"] = ", ".join(ignored)
  return Raw(path.stem, train, test, tuple(map(_text, names)), notes)


def _text(name: Any) -> str:
  return name.decode() if isinstance(name, bytes) else str(name)


def _array_split(images: np.ndarray, labels: Any, where: str) -> Split:
  pixels = _as_bytes(images, where)
  found = _labels(labels, len(pixels), where)
  return Split(len(pixels), pixels.__getitem__, lambda: found, _numbered(where))


def _encoded_split(encoded: np.ndarray, offsets: Any, labels: Any, where: str) -> Split:
  if encoded.ndim != 1 or encoded.dtype != np.uint8:
    raise ValueError(
      f"{where}: the encoded images must be one array of bytes, the files joined, got "
      f"{encoded.dtype} {list(encoded.shape)}"
    )
  if offsets is None or offsets.ndim != 1 or offsets.dtype.kind not in "iu":
    raise ValueError(f"{where}: needs offsets [N + 1], integers, where each encoded image starts")
  offsets = offsets.astype(np.int64)
  if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(encoded):
    raise ValueError(
      f"{where}: offsets must go from 0 to {len(encoded)}, the number of bytes, got "
      f"{offsets[:1].tolist()} to {offsets[-1:].tolist()}"
    )
  if (empty := np.flatnonzero(np.diff(offsets) <= 0)).size:
    i = int(empty[0])
    raise ValueError(
      f"{where}: offsets must increase, got {offsets[i]} and then {offsets[i + 1]} at image {i}"
    )
  found = _labels(labels, len(offsets) - 1, where)
  return Split(
    len(found),
    lambda index: encoded[offsets[index] : offsets[index + 1]].tobytes(),
    lambda: found,
    _numbered(where),
  )


def _numbered(where: str) -> Callable[[int], str]:
  return lambda index: f"{where}, image {index}"


def _as_bytes(images: np.ndarray, where: str) -> np.ndarray:
  """Returns images `[N, H, W, 3]` as bytes, after checks of their shape and pixels."""
  shape = list(images.shape)
  if len(shape) == 3 or (len(shape) == 4 and shape[-1] == 1):
    raise ValueError(
      f"{where}: images are grey, {shape}; repeat the channel: numpy.repeat(images.reshape("
      f"{[*shape[:3], 1]}), 3, axis=-1)"
    )
  if len(shape) == 4 and shape[-1] != 3 and shape[1] in (1, 3):
    raise ValueError(
      f"{where}: images are {shape}, channels first; give images.transpose(0, 2, 3, 1)"
    )
  if len(shape) == 4 and shape[-1] == 4:
    raise ValueError(f"{where}: images are {shape}, with alpha; give images[..., :3]")
  if len(shape) != 4 or shape[-1] != 3 or 0 in shape[1:]:
    raise ValueError(f"{where}: images must have shape [N, H, W, 3], got {shape}")
  if images.dtype == np.uint8:
    return images
  if images.dtype.kind not in "iuf":
    raise ValueError(
      f"{where}: images must be bytes (uint8) or floating-point numbers in [0, 1], got "
      f"{images.dtype}"
    )
  is_float = images.dtype.kind == "f"
  largest = 1 if is_float else 255
  result = np.empty(images.shape, np.uint8)
  for start in range(0, len(images), _CHUNK):
    chunk = images[start : start + _CHUNK]
    wrong = ~((chunk >= 0) & (chunk <= largest))  # true of NaN too
    if wrong.any():
      at = tuple(np.argwhere(wrong)[0])
      remedy = "divide them by 255" if is_float else "scale images of 16 bits to bytes"
      if is_float and not np.isfinite(chunk[at]):
        remedy = "leave the image out or repair it"
      raise ValueError(
        f"{where}, image {start + int(at[0])}: pixels must lie in [0, {largest}] for "
        f"{images.dtype}, got {chunk[at]}; {remedy}"
      )
    result[start : start + _CHUNK] = np.round(chunk * 255) if is_float else chunk
  return result


def _labels(labels: Any, num_images: int, where: str) -> np.ndarray:
  """Returns `[N]` int32, after checks that need no number of classes."""
  labels = np.asarray(labels)
  if labels.ndim == 2 and labels.shape[1] == 1:
    labels = labels[:, 0]
  if labels.ndim == 2:
    raise ValueError(
      f"{where}: labels are {list(labels.shape)}; give one class for each image, for example "
      "labels.argmax(1) of one-hot rows"
    )
  if labels.shape != (num_images,):
    raise ValueError(f"{where}: {num_images} images have labels of shape {list(labels.shape)}")
  if labels.dtype.kind not in "iu":
    whole = labels.dtype.kind == "f" and np.isfinite(labels) & (labels == np.round(labels))
    if not np.all(whole):
      i = int(np.argmin(whole)) if np.ndim(whole) else 0
      raise ValueError(
        f"{where}, image {i}: labels must be integers that count classes from 0, got {labels[i]!r}"
      )
  if num_images and (labels.min() < 0 or labels.max() >= 2**31):
    i = int(np.argmin(labels) if labels.min() < 0 else np.argmax(labels))
    raise ValueError(
      f"{where}, image {i}: labels must count classes from 0, got {labels[i]}; leave images "
      "without a label out"
    )
  return labels.astype(np.int32)
