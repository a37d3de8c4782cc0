"""Random views of images, made on the device: every function is pure and has static shapes.

A view is a random crop, resized, then a random flip, changes of brightness, contrast, saturation
and hue in random order, grey, Gaussian blur and solarisation, each with a probability of its own.
`Views` makes the two views of BYOL from a batch; the other functions take one image `[H, W, 3]`
with values in [0, 1].

Resizing is bicubic with Keys's kernel (a = -0.5) and half-pixel centres. Pixels outside a crop
count nothing, and the weights of the others are scaled up to sum to 1. By default each output pixel
reads four pixels along each axis, as in TensorFlow and so in the authors' code. With `antialias`
the kernel widens where a crop shrinks, as in Pillow; where it grows, both are the same. Brightness
is added, not multiplied as in torchvision.

Reference: Grill et al. 2020, https://arxiv.org/abs/2006.07733, appendix B, and the authors' code.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from sharding import checks

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_GREY_WEIGHTS = (0.2989, 0.5870, 0.1140)


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """What happens to an image on its way to a view; the defaults are those of BYOL's first view.

  It is static: another one compiles again. A probability of 0 costs nothing.

  Attributes:
    size: height and width of the view.
    min_area: smallest area of a crop, as a share of the image; the largest is 1.
    max_aspect: at least 1. The logarithm of width / height is uniform between those of
      1 / max_aspect and max_aspect.
    flip_prob: probability of a reflection from left to right.
    jitter_prob: probability of the next four changes, which come together.
    brightness: largest number that is added or subtracted.
    contrast: largest change of the factor 1 on the distances from the mean colour.
    saturation: largest change of the factor 1 on the saturation.
    hue: largest change of the hue, whose circle has length 1.
    grey_prob: probability of losing all colour.
    blur_prob: probability of a blur. Its radius is a twentieth of `size`, rounded down: there is
      none below 20 pixels.
    blur_sigma: smallest and largest width of the blur in pixels.
    solarise_prob: probability that values of at least 0.5 are reflected.
    antialias: whether the kernel of resizing widens where a crop shrinks.
    crop: whether to crop at all. Without it the images must have `size`: the host cropped them.
  """

  size: int = 224
  min_area: float = 0.08
  max_aspect: float = 4 / 3
  flip_prob: float = 0.5
  jitter_prob: float = 0.8
  brightness: float = 0.4
  contrast: float = 0.4
  saturation: float = 0.2
  hue: float = 0.1
  grey_prob: float = 0.2
  blur_prob: float = 1.0
  blur_sigma: tuple[float, float] = (0.1, 2.0)
  solarise_prob: float = 0.0
  antialias: bool = False
  crop: bool = True

  def __post_init__(self):
    checks.count("size", self.size)
    checks.probabilities("min_area", self.min_area)
    checks.positive("max_aspect", self.max_aspect)
    if self.max_aspect is None or self.max_aspect < 1:
      raise ValueError(f"max_aspect must be at least 1, got {self.max_aspect}")
    shares = ("flip_prob", "jitter_prob", "grey_prob", "blur_prob", "solarise_prob")
    for name in (*shares, "brightness", "contrast", "saturation", "hue"):
      checks.probabilities(name, getattr(self, name))
    checks.positive("blur_sigma", self.blur_sigma)


def first_view(size: int = 224) -> Augmentation:
  """Returns T of the paper: always blurred, never solarised."""
  return Augmentation(size)


def second_view(size: int = 224) -> Augmentation:
  """Returns T' of the paper: rarely blurred, sometimes solarised."""
  return Augmentation(size, blur_prob=0.1, solarise_prob=0.2)


def crop_and_flip(size: int = 224) -> Augmentation:
  """Returns the augmentation under which a classifier on the features is trained."""
  return Augmentation(size, jitter_prob=0.0, grey_prob=0.0, blur_prob=0.0)


@dataclasses.dataclass(frozen=True)
class Views:
  """The function from images to two views that `byol.Networks` takes.

  Attributes:
    first: of the first view.
    second: of the second view.
    mean: of each colour, subtracted at the end.
    std: of each colour, divided by at the end.

  Example:
    >>> views = Views(first_view(8), second_view(8))
    >>> first, second = views(jnp.zeros((2, 12, 16, 3), jnp.uint8), jax.random.key(0))
    >>> first.shape, second.shape
    ((2, 8, 8, 3), (2, 8, 8, 3))
  """

  first: Augmentation
  second: Augmentation
  mean: tuple[float, float, float] = IMAGENET_MEAN
  std: tuple[float, float, float] = IMAGENET_STD

  def __call__(self, images: Any, key: jax.Array) -> list[jax.Array]:
    """Returns two arrays `[B, size, size, 3]`, standardised.

    Args:
      images: `[B, H, W, 3]`, bytes or floating-point numbers in [0, 1]. A tuple or list of two such
        arrays holds what each view is made from: crops of the host.
      key: typed PRNG key; each image gets keys of its own.

    Raises:
      ValueError: as `augment`.
    """
    pair = images if isinstance(images, tuple | list) else (images, images)
    return [
      standardise(augment(one, view_key, augmentation), mean=self.mean, std=self.std)
      for one, view_key, augmentation in zip(
        pair, jax.random.split(key), (self.first, self.second), strict=True
      )
    ]


def augment(images: jax.Array, key: jax.Array, augmentation: Augmentation) -> jax.Array:
  """Returns one random view of each image, with values in [0, 1] and not standardised.

  Args:
    images: `[B, H, W, 3]`, bytes or floating-point numbers in [0, 1].
    key: typed PRNG key; each image gets a key of its own.
    augmentation: what happens to them.

  Returns:
    `[B, size, size, 3]`.

  Raises:
    ValueError: if `images` have another shape, or integers other than bytes.
  """
  checks.given(augmentation)
  images = _in_unit_range(images)
  size = augmentation.size
  if not augmentation.crop and images.shape[1:3] != (size, size):
    raise ValueError(
      f"images must be [B, {size}, {size}, 3] where crop is False, got {list(images.shape)}: crop "
      "them before, or set crop=True"
    )
  keys = jax.random.split(key, len(images))
  return jax.vmap(lambda image, key: _augment_one(image, key, augmentation))(images, keys)


def centre_crop(
  images: jax.Array, *, size: int, share: float = 224 / 256, antialias: bool = False
) -> jax.Array:
  """Returns the central square of each image, resized, for evaluation; not standardised.

  Args:
    images: `[B, H, W, 3]`, bytes or floating-point numbers in [0, 1].
    size: height and width of the result.
    share: side of the square, as a share of the shorter side of the image, in (0, 1].
    antialias: whether the kernel of resizing widens where a crop shrinks.

  Raises:
    ValueError: if `images` have another shape, or integers other than bytes.
  """
  images = _in_unit_range(images)
  checks.count("size", size)
  if not 0 < share <= 1:
    raise ValueError(f"share must lie in (0, 1], got {share}")
  height, width = images.shape[1:3]
  side = max(int(share * min(height, width)), 1)
  box = (height - side + 1) // 2, (width - side + 1) // 2, side, side
  return jax.vmap(lambda image: resized_crop(image, box, size=size, antialias=antialias))(images)


def standardise(
  images: jax.Array, *, mean: Any = IMAGENET_MEAN, std: Any = IMAGENET_STD
) -> jax.Array:
  """Returns (images - mean) / std for each colour of `[..., 3]`."""
  return (images - jnp.array(mean, images.dtype)) / jnp.array(std, images.dtype)


def _in_unit_range(images: jax.Array) -> jax.Array:
  shape = jnp.shape(images)
  if len(shape) != 4 or shape[-1] != 3:
    raise ValueError(
      f"images must have shape [B, H, W, 3], got {list(shape)}: repeat the channel of grey images "
      "three times, and give a single image as a batch of one"
    )
  images = jnp.asarray(images)
  if images.dtype == jnp.uint8:
    return images.astype(jnp.float32) / 255
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(
      f"images must be bytes (uint8) or floating-point numbers in [0, 1], got {images.dtype}"
    )
  return images.astype(jnp.promote_types(images.dtype, jnp.float32))


# --- one image ------------------------------------------------------------------------------------


def _augment_one(image: jax.Array, key: jax.Array, augmentation: Augmentation) -> jax.Array:
  box_key, flip_key, jitter_key, grey_key, blur_key, solarise_key = jax.random.split(key, 6)
  if augmentation.crop:
    box = random_box(
      box_key, *image.shape[:2], min_area=augmentation.min_area, max_aspect=augmentation.max_aspect
    )
    image = resized_crop(image, box, size=augmentation.size, antialias=augmentation.antialias)

  def maybe(key, prob, change):
    if prob == 0:
      return image
    apply_key, key = jax.random.split(key)
    return jnp.where(jax.random.bernoulli(apply_key, prob), change(image, key), image)

  def jitter(image, key):
    return _jitter(image, key, augmentation)

  def blur(image, key):
    low, high = augmentation.blur_sigma
    sigma = jax.random.uniform(key, (), image.dtype, low, high)
    return gaussian_blur(image, sigma, radius=augmentation.size // 20)

  image = maybe(flip_key, augmentation.flip_prob, lambda image, _: image[:, ::-1])
  image = maybe(jitter_key, augmentation.jitter_prob, jitter)
  image = maybe(grey_key, augmentation.grey_prob, lambda image, _: grey(image))
  image = maybe(blur_key, augmentation.blur_prob, blur)
  image = maybe(solarise_key, augmentation.solarise_prob, lambda image, _: solarise(image))
  return jnp.clip(image, 0, 1)


def random_box(
  key: jax.Array, height: int, width: int, *, min_area: float, max_aspect: float
) -> tuple[jax.Array, ...]:
  """Returns top, left, height and width of a random crop of an image, in whole pixels.

  Area and aspect are drawn once. Sides that are longer than the image's are cut to them.

  Args:
    key: typed PRNG key.
    height: of the image.
    width: of the image.
    min_area: smallest area as a share of the image's.
    max_aspect: largest width / height, and largest height / width.
  """
  area_key, aspect_key, top_key, left_key = jax.random.split(key, 4)
  area = height * width * jax.random.uniform(area_key, (), jnp.float32, min_area, 1)
  limit = math.log(max_aspect)
  aspect = jnp.exp(jax.random.uniform(aspect_key, (), jnp.float32, -limit, limit))

  def side(square, longest):
    return jnp.clip(jnp.round(jnp.sqrt(square)), 1, longest).astype(jnp.int32)

  box_height, box_width = side(area / aspect, height), side(area * aspect, width)
  top = jax.random.randint(top_key, (), 0, height - box_height + 1)
  left = jax.random.randint(left_key, (), 0, width - box_width + 1)
  return top, left, box_height, box_width


def resized_crop(image: jax.Array, box: Any, *, size: int, antialias: bool = False) -> jax.Array:
  """Returns a crop of an image, resized to `[size, size, 3]` and clipped to [0, 1].

  The crop may be traced: the shapes of all arrays are the image's and the view's.

  Args:
    image: `[H, W, 3]`.
    box: top, left, height and width in whole pixels, inside the image.
    size: height and width of the result.
    antialias: whether the kernel widens where the crop shrinks.
  """
  top, left, height, width = box
  rows = _resize_weights(image.shape[0], top, height, size, antialias, image.dtype)
  columns = _resize_weights(image.shape[1], left, width, size, antialias, image.dtype)
  return jnp.clip(_resample(image, rows, columns), 0, 1)


def _resample(image: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
  """Returns `[Y, X, 3]`, weighted sums of the pixels by `rows` `[Y, H]` and `columns` `[X, W]`.

  Matrix products, for all their zeros: XLA would compute the image again for each shift of it.
  """
  # Products of numbers that are rounded to 10 bits, a GPU's default, would be visible.
  image = jnp.einsum("yh,hwc->ywc", rows, image, precision="highest")
  return jnp.einsum("xw,ywc->yxc", columns, image, precision="highest")


def _resize_weights(
  length: int, start: Any, crop: Any, size: int, antialias: bool, dtype: Any
) -> jax.Array:
  """Returns `[size, length]`, what each pixel of the image gives to each pixel of the result."""
  scale = jnp.asarray(crop, dtype) / size
  centres = start + (jnp.arange(size, dtype=dtype) + 0.5) * scale - 0.5
  pixels = jnp.arange(length)
  distance = jnp.abs(pixels - centres[:, None]) / (jnp.maximum(scale, 1) if antialias else 1)
  near = (1.5 * distance - 2.5) * distance**2 + 1
  far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
  weights = jnp.where(distance < 1, near, jnp.where(distance < 2, far, 0))
  weights = jnp.where((pixels >= start) & (pixels < start + crop), weights, 0)
  return weights / jnp.sum(weights, axis=1, keepdims=True)


def _jitter(image: jax.Array, key: jax.Array, augmentation: Augmentation) -> jax.Array:
  """Returns the image after four random changes in random order, clipped after each."""
  order_key, draw_key = jax.random.split(key)
  names = ("brightness", "contrast", "saturation", "hue")
  ranges = jnp.array([getattr(augmentation, name) for name in names], image.dtype)
  brightness, contrast, saturation, hue = ranges * jax.random.uniform(
    draw_key, (4,), image.dtype, -1, 1
  )
  # Under `vmap` each place in the order computes all branches. Two stand for four: brightness and
  # contrast are one linear map, saturation and hue one change of colour.
  for change in jax.random.permutation(order_key, 4):
    linear = adjust_contrast(image, 1 + jnp.where(change == 1, contrast, 0))
    linear += jnp.where(change == 0, brightness, 0)
    coloured = adjust_colour(
      image,
      hue=jnp.where(change == 3, hue, 0),
      saturation=1 + jnp.where(change == 2, saturation, 0),
    )
    image = jnp.clip(jnp.where(change < 2, linear, coloured), 0, 1)
  return image


def adjust_contrast(image: jax.Array, factor: Any) -> jax.Array:
  """Returns mean + factor (image - mean), where the mean is that of each colour over the image."""
  mean = jnp.mean(image, axis=(0, 1))
  return mean + factor * (image - mean)


def adjust_colour(image: jax.Array, *, hue: Any = 0.0, saturation: Any = 1.0) -> jax.Array:
  """Returns the image with another hue and saturation, in the sense of HSV.

  Args:
    image: `[H, W, 3]` with values in [0, 1].
    hue: added to the hue, whose circle has length 1.
    saturation: factor on the saturation, which then is at most 1.

  Example:
    >>> red = jnp.array([[[1.0, 0.0, 0.0]]])
    >>> print(adjust_colour(red, hue=1 / 3).round(3), adjust_colour(red, saturation=0.25))
    [[[0. 1. 0.]]] [[[1.   0.75 0.75]]]
  """
  red, green, blue = image[..., 0], image[..., 1], image[..., 2]
  value = jnp.maximum(jnp.maximum(red, green), blue)
  chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
  divisor = jnp.where(chroma > 0, chroma, 1)
  # The hue times 6, up to whole turns; where there is no colour it does not matter.
  sextant = jnp.where(
    value == red,
    (green - blue) / divisor,
    jnp.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
  )
  # Saturation is chroma / value, so its clip at 1 is a clip of the chroma at the value.
  chroma = jnp.minimum(saturation * chroma, value)

  def channel(offset):
    place = sextant + 6 * hue + offset
    place -= 6 * jnp.floor(place / 6)  # several times faster than % on a CPU
    return value - chroma * jnp.clip(jnp.minimum(place, 4 - place), 0, 1)

  return jnp.stack([channel(5), channel(3), channel(1)], axis=-1)


def grey(image: jax.Array) -> jax.Array:
  """Returns 0.2989 red + 0.5870 green + 0.1140 blue in all three channels."""
  red, green, blue = (weight * image[..., i] for i, weight in enumerate(_GREY_WEIGHTS))
  return jnp.broadcast_to((red + green + blue)[..., None], image.shape)


def gaussian_blur(image: jax.Array, sigma: Any, *, radius: int) -> jax.Array:
  """Returns the image blurred along both axes; outside the image there is black.

  Args:
    image: `[H, W, 3]`.
    sigma: positive, width of the blur in pixels.
    radius: the kernel is cut off beyond it and scaled to sum to 1; static.
  """
  if radius == 0:
    return image

  def weights(length: int) -> jax.Array:
    offsets = jnp.arange(length) - jnp.arange(length)[:, None]
    taps = jnp.arange(-radius, radius + 1, dtype=image.dtype)
    total = jnp.sum(jnp.exp(-(taps**2) / (2 * sigma**2)))
    kernel = jnp.exp(-(offsets.astype(image.dtype) ** 2) / (2 * sigma**2)) / total
    return jnp.where(jnp.abs(offsets) <= radius, kernel, 0)

  return _resample(image, weights(image.shape[0]), weights(image.shape[1]))


def solarise(image: jax.Array, threshold: float = 0.5) -> jax.Array:
  """Returns 1 - x where x is at least the threshold, and x elsewhere."""
  return jnp.where(image < threshold, image, 1 - image)
