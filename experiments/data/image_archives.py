"""Archives of images, `.npz`: raw arrays or encoded images.

Raw arrays are `images [N, H, W, 3]` and `labels [N]`, and for the test `test_images` and
`test_labels`, or `is_test [N]`. `train_images`, `x_train`, `y_train`, `x_test` and `y_test` are
understood too. Floating-point numbers in [0, 1] become bytes.

Encoded images are `jpeg` (the bytes of all files joined, JPEG or PNG), `offsets [N + 1]`, `labels
[N]` and perhaps `is_test [N]`.

Both may have `class_names`. Pickled objects are refused.
"""

import pathlib
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.data.image_splits import Raw, Split

_READ_ERRORS = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error)
_TRAIN_KEYS = ("images", "train_images", "x_train", "X_train")
_TEST_KEYS = ("test_images", "x_test", "X_test")
_TRAIN_LABEL_KEYS = ("labels", "train_labels", "y_train")
_TEST_LABEL_KEYS = ("test_labels", "y_test")
_ENCODED_KEYS = ("jpeg", "png", "encoded")
_CHUNK = 1024  # images that are checked together: bounds the memory of temporary arrays


def read(path: pathlib.Path) -> Raw:
  """Reads an archive; see the docstring of the module.

  Raises:
    ValueError: a key is missing, or the archive is damaged or holds pickled objects.
  """
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
  labels = _whole_numbers(labels, str(path))
  if names is None:
    class_names = tuple(map(str, range(int(labels.max(initial=0)) + 1)))
  else:
    class_names = tuple(map(_text, names))
  if encoded is not None:
    whole = _encoded_split(encoded, offsets, labels, class_names, str(path))
  else:
    whole = array_split(images, labels, class_names, str(path))
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
    where = f"{path}, test"
    test = array_split(test_images, _whole_numbers(test_labels, where), class_names, where)
  if len(train) and train.labels.min() == train.labels.max():
    raise ValueError(
      f"{path}: all training images have label {train.labels[0]}; give images of two or more "
      "classes, because probes tell classes apart"
    )
  notes = {}
  if ignored := sorted(set(keys) & {"val_images", "x_val", "X_val"}):
    notes["not_used"] = ", ".join(ignored)
  return Raw(path.stem, train, test, class_names, notes)


def array_split(images: Any, labels: np.ndarray, class_names: Sequence[str], where: str) -> Split:
  """Returns the split of images `[N, H, W, 3]` and their labels `[N]`.

  Raises:
    ValueError: the images have another shape, pixels out of range or NaN, or labels that name no
      class.
  """
  pixels = _as_bytes(images, where)
  _check_labels(labels, len(pixels), class_names, where)
  return Split(
    len(pixels),
    lambda index: (pixels[index], int(labels[index])),
    lambda: labels,
    _numbered(where),
  )


def _text(name: Any) -> str:
  return name.decode() if isinstance(name, bytes) else str(name)


def _encoded_split(
  encoded: np.ndarray, offsets: Any, labels: np.ndarray, class_names: Sequence[str], where: str
) -> Split:
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
  _check_labels(labels, len(offsets) - 1, class_names, where)
  return Split(
    len(labels),
    lambda index: (encoded[offsets[index] : offsets[index + 1]].tobytes(), int(labels[index])),
    lambda: labels,
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


def _whole_numbers(labels: np.ndarray, where: str) -> np.ndarray:
  """Returns labels `[N]` as integers."""
  if labels.ndim == 2 and labels.shape[1] == 1:
    labels = labels[:, 0]
  if labels.ndim != 1:
    raise ValueError(
      f"{where}: labels are {list(labels.shape)}; give one class for each image, for example "
      "labels.argmax(1) of one-hot rows"
    )
  if labels.dtype.kind == "f":
    wrong = np.flatnonzero(~(np.abs(labels) < 2**31) | (labels != np.round(labels)))
  else:
    wrong = np.arange(len(labels) if labels.dtype.kind not in "iu" else 0)
  if wrong.size:
    raise ValueError(
      f"{where}, image {wrong[0]}: labels must be integers that count classes from 0, got "
      f"{labels[wrong[0]]!r}"
    )
  return labels.astype(np.int64)


def _check_labels(
  labels: np.ndarray, num_images: int, class_names: Sequence[str], where: str
) -> None:
  if len(labels) != num_images:
    raise ValueError(f"{where}: {num_images} images have {len(labels)} labels")
  wrong = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
  if wrong.size:
    raise ValueError(
      f"{where}, image {wrong[0]}: labels must lie in [0, {len(class_names)}), the classes "
      f"{', '.join(class_names[:10])}{', ...' if len(class_names) > 10 else ''}, got "
      f"{labels[wrong[0]]}; leave images without a label out"
    )
