"""Images that are read one at a time, and the decoding of image files."""

import dataclasses
import functools
import io
from collections.abc import Callable
from typing import Any

import numpy as np

# Pillow knows more formats; some of them run other programs.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
  """Images of one split; any thread may read them.

  Attributes:
    num_images: their number N.
    fetch: from a number below N to (the bytes of an image file or an array `[h, w, 3]` of bytes,
      label).
    read_labels: returns the labels `[N]`; it may have to read all records.
    where: from a number to what error messages call the image.
  """

  num_images: int
  fetch: Callable[[int], tuple[Any, int]]
  read_labels: Callable[[], np.ndarray]
  where: Callable[[int], str]

  def __len__(self) -> int:
    return self.num_images

  @functools.cached_property
  def labels(self) -> np.ndarray:
    """Class of each image, `[N]` int32."""
    return self.read_labels().astype(np.int32)

  def read(self, index: int) -> np.ndarray:
    """Returns one image, `[h, w, 3]` uint8; errors are those of `example`."""
    return self.example(index)[0]

  def example(self, index: int) -> tuple[np.ndarray, int]:
    """Returns one image, `[h, w, 3]` uint8, and its label.

    Raises:
      ValueError: the image cannot be read, is damaged or transparent, or has more than 8 bits a
        channel; the message names it.
    """
    try:
      found, label = self.fetch(index)
    except OSError as error:
      raise ValueError(f"{self.where(index)}: cannot be read ({error.strerror})") from error
    if not isinstance(found, np.ndarray):
      found = np.asarray(_decode(found, self.where(index)))
    return found, label

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


def central_square(image: np.ndarray, size: int, *, share: float = 1.0) -> np.ndarray:
  """Returns the central square of an image, resized to `[size, size, 3]`.

  Args:
    image: `[h, w, 3]` uint8.
    size: height and width of the result.
    share: side of the square, as a share of the shorter side of the image, in (0, 1].
  """
  height, width = image.shape[:2]
  side = max(int(share * min(height, width)), 1)
  return resized_crop(image, ((height - side + 1) // 2, (width - side + 1) // 2, side, side), size)


def resized_crop(image: np.ndarray, box: tuple[int, int, int, int], size: int) -> np.ndarray:
  """Returns a crop, resized to `[size, size, 3]` by Pillow: bicubic, with antialiasing.

  Args:
    image: `[h, w, 3]` uint8.
    box: top, left, height and width in whole pixels, inside the image.
    size: height and width of the result.
  """
  from PIL import Image

  top, left, height, width = box
  crop = image[top : top + height, left : left + width]
  if height == width == size:
    return crop
  # Pillow's argument `box` would let pixels outside it contribute.
  return np.asarray(Image.fromarray(crop).resize((size, size), Image.Resampling.BICUBIC))


def _decode(encoded: bytes, where: str) -> Any:
  """Returns an image file as a Pillow image in RGB."""
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
  if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
    raise ValueError(f"{where}: has transparent pixels; save it on a background, without alpha")
  return image.convert("RGB")
