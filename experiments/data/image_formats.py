"""Image data sets as their sources have them.

| source                          | images                                                         |
|---------------------------------|----------------------------------------------------------------|
| `digits`                        | scikit-learn's 1,797 digits of 8x8 pixels; needs no files      |
| `FILE.npz`                      | raw arrays or encoded images: see `image_archives`             |
| `FOLDER`                        | `train/CLASS/*.jpg`, and `test`, `val` or `validation` like it |
| `tfds:NAME[/CONFIG][:VERSION]`  | TensorFlow Datasets, prepared as array_record                  |

Grey digits are repeated to three channels. A folder may have its classes at the top and no test.
Files are sorted by class and name. The test images of `tfds:` are its split `test`, or `validation`
where there is none, and in `imagenet2012`, whose test images have no labels. TensorFlow is not
imported.

Files in grey, CMYK or a palette become RGB. Refused are files with transparent pixels, whose colour
nobody sees, and those with more than 8 bits a channel, which Pillow would clip.
"""

import os
import pathlib
from typing import Any

import numpy as np

from experiments import files
from experiments.data import image_archives
from experiments.data.image_splits import Raw, Split

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp")
_CHUNK = 256  # records that are read together
_TEST_FOLDERS = ("test", "val", "validation")
_TFDS_TEST = {"imagenet2012": "validation"}
# The authors of BYOL validate on the first training images of this data set.
_FIRST_VALIDATE = {"imagenet2012": 10_000}


def read(source: str, directory: str | os.PathLike[str] = "") -> Raw:
  """Opens a source; see the docstring of the module.

  Args:
    source: its name.
    directory: where files and folders are looked for; the `data_dir` of `tfds:`.

  Raises:
    ValueError: there is no such source, or it is damaged.
    ModuleNotFoundError: the library of the source is missing; the message says how to install it.
  """
  if source == "digits":
    return _digits()
  if source.startswith("tfds:"):
    return _tfds(source, os.path.expanduser(directory))  # TFDS reads gs:// itself
  path = files.local_path("config.data.directory", directory)
  path /= files.local_path("config.data.source", source)
  if source and path.is_dir():
    return _folder(path)
  if source and path.is_file() and path.suffix == ".npz":
    return image_archives.read(path)
  found = "is no .npz" if source and path.is_file() else "does not exist"
  raise ValueError(
    f"no image data set {source!r} ({path} {found}): give digits, FILE.npz, a folder with "
    "train/CLASS/*.jpg, or tfds:NAME"
  )


def _digits() -> Raw:
  try:
    from sklearn import datasets
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      "digits needs scikit-learn: pip install '.[experiments]'", name=error.name
    ) from error
  digits = datasets.load_digits()
  images = np.round(digits.images * (255 / 16)).astype(np.uint8)  # stored as 0 to 16
  colour = np.repeat(images[..., None], 3, axis=-1)
  class_names = tuple("0123456789")
  return Raw(
    "digits",
    image_archives.array_split(colour, digits.target, class_names, "digits"),
    None,
    class_names,
  )


# --- folders --------------------------------------------------------------------------------------


def _folder(path: pathlib.Path) -> Raw:
  top = path / "train" if (path / "train").is_dir() else path
  class_names = _classes(top)
  if not class_names:
    raise ValueError(
      f"{top}: has no folders of classes; put the images into {path}/train/CLASS/, one folder for "
      "each class"
    )
  if len(class_names) == 1:
    raise ValueError(
      f"{top}: has one class only, {class_names[0]}; give two or more, because probes tell classes "
      "apart"
    )
  test_folders = [path / name for name in _TEST_FOLDERS if _classes(path / name)]
  if top == path:  # these would be classes
    test_folders = []
  notes: dict[str, Any] = {}
  if len(test_folders) > 1:
    notes["not_used"] = ", ".join(folder.name for folder in test_folders[1:])
  test = _folder_split(test_folders[0], class_names, False) if test_folders else None
  return Raw(path.resolve().name, _folder_split(top, class_names, True), test, class_names, notes)


def _classes(top: pathlib.Path) -> tuple[str, ...]:
  if not top.is_dir():
    return ()
  return tuple(sorted(p.name for p in top.iterdir() if p.is_dir() and not p.name.startswith(".")))


def _folder_split(top: pathlib.Path, class_names: tuple[str, ...], is_train: bool) -> Split:
  if unknown := sorted(set(_classes(top)) - set(class_names)):
    raise ValueError(f"{top}: class {unknown[0]} has no training images; add or remove it")
  paths: list[str] = []
  counts = []
  for name in class_names:
    found = sorted(
      os.path.join(folder, file)
      for folder, _, names in os.walk(top / name, followlinks=True)
      for file in names
      if file.lower().endswith(_SUFFIXES) and not file.startswith(".")
    )
    if not found and is_train:
      raise ValueError(f"{top / name}: holds no images ({', '.join(_SUFFIXES)}); add or remove it")
    paths += found
    counts.append(len(found))
  labels = np.repeat(np.arange(len(class_names), dtype=np.int32), counts)

  def fetch(index: int) -> tuple[bytes, int]:
    return pathlib.Path(paths[index]).read_bytes(), int(labels[index])

  return Split(
    len(paths), fetch, lambda: labels, lambda index: f"{top}, image {index} ({paths[index]})"
  )


# --- TensorFlow Datasets --------------------------------------------------------------------------


def _tfds(source: str, directory: str) -> Raw:
  try:
    import tensorflow_datasets as tfds
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      f"{source} needs {error.name}: pip install '.[experiments]'", name=error.name
    ) from error
  name = source.removeprefix("tfds:")
  if not name:
    raise ValueError(f"source {source!r} names no data set: write tfds:NAME")
  where = f" --data_dir={directory}" if directory else ""
  prepare = (
    f"Prepare it as array_record where TensorFlow is installed: tfds build {name} "
    f"--file_format=array_record{where}"
  )
  try:
    builder = tfds.builder(name, data_dir=directory or None)
    features = builder.info.features
    splits = dict(builder.info.splits)
  except Exception as error:  # the library has an error class for each kind of absence
    raise ValueError(f"{source}: {_first_line(error)}. Check the name. {prepare}") from error
  if not splits:
    raise ValueError(f"{source} is not under {builder.data_dir}. {prepare}")
  image_key = _feature(features, "image", tfds.features.Image, source)
  label_key = _feature(features, "label", tfds.features.ClassLabel, source)
  test_name = _TFDS_TEST.get(builder.name, "test" if "test" in splits else "validation")
  if "train" not in splits:
    raise ValueError(f"{source}: has no split train, only {', '.join(splits)}")
  try:
    opened = {
      split: builder.as_data_source(split, decoders={image_key: tfds.decode.SkipDecoding()})
      for split in ("train", test_name)
      if split in splits
    }
  except Exception as error:
    raise ValueError(f"{source}: {_first_line(error)}. {prepare}") from error

  def split_of(split: str) -> Split:
    records = opened[split]

    def fetch(index: int) -> tuple[bytes, int]:
      record = records[index]
      return record[image_key], int(record[label_key])

    def labels() -> np.ndarray:
      chunks = (range(i, min(i + _CHUNK, len(records))) for i in range(0, len(records), _CHUNK))
      # `__getitems__` reads the records of a chunk in parallel.
      found = np.array([r[label_key] for c in chunks for r in records.__getitems__(c)], np.int32)
      if (found < 0).any():
        raise ValueError(
          f"{source}, {split} image {found.argmin()}: has no label ({found.min()}); this split "
          "cannot be used"
        )
      return found

    return Split(len(records), fetch, labels, lambda index: f"{source}, {split} image {index}")

  label_feature = features[label_key]
  class_names = label_feature.names or map(str, range(label_feature.num_classes))
  return Raw(
    name.partition(":")[0],
    split_of("train"),
    split_of(test_name) if test_name in opened else None,
    tuple(class_names),
    {"version": str(builder.version)} | ({"test_split": test_name} if test_name in opened else {}),
    first_validate=_FIRST_VALIDATE.get(builder.name, 0),
  )


def _feature(features: Any, name: str, kind: Any, source: str) -> str:
  """Returns the key of the feature of a kind: `name`, or the only one."""
  found = [key for key, feature in features.items() if isinstance(feature, kind)]
  if name in found:
    return name
  if len(found) != 1:
    raise ValueError(
      f"{source}: needs a feature {name} ({kind.__name__}), found {', '.join(features)}"
    )
  return found[0]


def _first_line(error: Exception) -> str:
  return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".:")
