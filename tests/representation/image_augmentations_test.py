"""Augmentations of images: each operation beside a slow one, and how often and how far they act.

Colours agree with their references to 1e-5, resampling to 1e-3 or better; the reason for a wider
tolerance is beside it. "Four standard errors" are those of a mean of independent draws.
"""

import colorsys
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import sharding
from representation import image_augmentations

NOTHING = image_augmentations.Augmentation(
  12, min_area=1.0, max_aspect=1.0, flip_prob=0.0, jitter_prob=0.0, grey_prob=0.0, blur_prob=0.0
)
_augment = jax.jit(image_augmentations.augment, static_argnames="augmentation")
_centre_crop = jax.jit(image_augmentations.centre_crop, static_argnames=("size", "share"))


def _image(height=12, width=12, seed=0):
  return np.random.default_rng(seed).random((height, width, 3)).astype(np.float32)


def _pillow(image, box, size):
  """Pillow crops, then resizes with a bicubic kernel that widens where the crop shrinks."""
  top, left, height, width = box
  channels = [
    Image.fromarray(np.ascontiguousarray(image[..., channel]))
    .crop((left, top, left + width, top + height))
    .resize((size, size), Image.Resampling.BICUBIC)
    for channel in range(3)
  ]
  return np.clip(np.stack([np.asarray(channel) for channel in channels], axis=-1), 0, 1)


def _four_pixels(image, box, size):
  """Bicubic with four pixels along each axis, one output pixel at a time, as in TensorFlow."""

  def kernel(x):
    x = abs(x)
    if x < 1:
      return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

  def taps(length):
    for index in range(size):
      centre = (index + 0.5) * length / size - 0.5
      pixels = [p for p in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3)
                if 0 <= p < length]  # fmt: skip
      weights = np.array([kernel(p - centre) for p in pixels])
      yield pixels, weights / weights.sum()

  top, left, height, width = box
  crop = image[top : top + height, left : left + width].astype(np.float64)
  rows = np.stack([np.tensordot(w, crop[p], (0, 0)) for p, w in taps(height)])
  columns = [np.tensordot(w, rows[:, p], (0, 1)) for p, w in taps(width)]
  return np.clip(np.stack(columns, axis=1), 0, 1)


# --- resampling -----------------------------------------------------------------------------------

BOXES = [(0, 0, 12, 17), (3, 5, 4, 2), (11, 16, 1, 1), (2, 0, 9, 16)]


@pytest.mark.parametrize("size", [5, 8, 23])
def test_resized_crops_equal_pillow_with_antialiasing_and_four_pixels_without(size):
  image = _image(12, 17)
  crop = jax.jit(image_augmentations.resized_crop, static_argnames=("size", "antialias"))
  for box in BOXES:
    for antialias, reference in ((True, _pillow), (False, _four_pixels)):
      found = crop(image, tuple(map(jnp.int32, box)), size=size, antialias=antialias)
      np.testing.assert_allclose(found, reference(image, box, size), atol=1e-5, err_msg=f"{box}")
  # Where a crop shrinks the two are not the same; where it grows they are.
  whole = [crop(image, (0, 0, 12, 12), size=5, antialias=antialias) for antialias in (True, False)]
  assert np.abs(whole[0] - whole[1]).max() > 0.05
  grown = [crop(image, (0, 0, 4, 4), size=5, antialias=antialias) for antialias in (True, False)]
  np.testing.assert_array_equal(*grown)


def test_pixels_outside_the_crop_do_not_matter():
  image = _image(12, 17)
  other = _image(12, 17, seed=1)
  other[3:7, 5:7] = image[3:7, 5:7]
  one, two = (image_augmentations.resized_crop(x, (3, 5, 4, 2), size=6) for x in (image, other))
  np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
  ("height", "width", "box"),
  [(32, 32, (2, 2, 28, 28)), (20, 41, (2, 12, 17, 17)), (3, 2, (1, 1, 1, 1))],
)
def test_centre_crops_have_the_authors_box(height, width, box):
  """Side int(0.875 * shorter side), offset (length - side + 1) // 2."""
  images = np.stack([_image(height, width, seed) for seed in range(2)])
  found = _centre_crop(images, size=16)
  for image, crop in zip(images, found, strict=True):
    np.testing.assert_allclose(crop, _four_pixels(image, box, 16), atol=1e-5)
  whole = _centre_crop(images[:, :2, :2], size=2, share=1.0)
  np.testing.assert_allclose(whole, images[:, :2, :2], atol=1e-6)


# --- colours --------------------------------------------------------------------------------------


def _through_hsv(image, change):
  def pixel(rgb):
    return colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*rgb)))

  return np.apply_along_axis(pixel, 2, image.astype(np.float64))


@pytest.mark.parametrize("amount", [-0.1, 0.0, 0.03, 0.45, 0.9])
def test_hue_and_saturation_equal_colorsys(amount):
  image = _image()
  image[0] = np.linspace(0, 1, 12)[:, None]  # greys
  image[1] = np.eye(3)[np.arange(12) % 3]  # pure colours
  image[2, :, 1] = image[2, :, 2]  # two equal channels
  found = image_augmentations.adjust_colour(image, hue=amount)
  expected = _through_hsv(image, lambda h, s, v: ((h + amount) % 1, s, v))
  np.testing.assert_allclose(found, expected, atol=1e-5)
  found = image_augmentations.adjust_colour(image, saturation=1 + amount)
  expected = _through_hsv(image, lambda h, s, v: (h, min(s * (1 + amount), 1), v))
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_contrast_grey_and_solarisation_in_numpy():
  image = _image(7, 9)
  mean = image.mean((0, 1))
  found = image_augmentations.adjust_contrast(image, 1.3)
  np.testing.assert_allclose(found, 1.3 * (image - mean) + mean, atol=1e-5)
  grey = np.asarray(image_augmentations.grey(image))
  weighed = image @ np.array([0.2989, 0.5870, 0.1140])
  np.testing.assert_allclose(grey, np.stack([weighed] * 3, axis=-1), atol=1e-5)
  image[0, 0] = 0.5, 0.49, 1.0
  solarised = np.asarray(image_augmentations.solarise(image))
  np.testing.assert_allclose(solarised, np.where(image < 0.5, image, 1 - image), atol=1e-6)
  np.testing.assert_allclose(solarised[0, 0], [0.5, 0.49, 0.0], atol=1e-6)


@pytest.mark.parametrize(("sigma", "radius"), [(0.1, 1), (0.7, 1), (2.0, 3), (1.3, 11)])
def test_blur_equals_a_sum_over_taps_with_black_outside(sigma, radius):
  image = _image(9, 7)
  taps = np.arange(-radius, radius + 1)
  weights = np.exp(-(taps**2) / (2 * sigma**2))
  weights /= weights.sum()
  expected = image.astype(np.float64)
  for axis in range(2):
    pads = [(radius, radius) if a == axis else (0, 0) for a in range(3)]
    padded = np.pad(expected, pads)
    expected = sum(
      w * np.take(padded, np.arange(image.shape[axis]) + i, axis) for i, w in enumerate(weights)
    )
  found = image_augmentations.gaussian_blur(image, sigma, radius=radius)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_jitter_is_four_changes_in_some_order():
  """Each jittered image equals the slow version under exactly the order that was drawn."""
  augmentation = image_augmentations.Augmentation(8)
  image = _image(8, 8)
  seen = set()
  for index in range(8):
    key = jax.random.key(index)
    order_key, draw_key = jax.random.split(key)
    order = np.asarray(jax.random.permutation(order_key, 4))
    amounts = np.asarray(jax.random.uniform(draw_key, (4,), minval=-1, maxval=1))
    brightness, contrast, saturation, hue = amounts * [0.4, 0.4, 0.2, 0.1]
    changes = [
      lambda x, b=brightness: x + b,
      lambda x, c=contrast: x.mean((0, 1)) + (1 + c) * (x - x.mean((0, 1))),
      lambda x, s=saturation: _through_hsv(x, lambda h, a, v: (h, min(a * (1 + s), 1), v)),
      lambda x, d=hue: _through_hsv(x, lambda h, a, v: ((h + d) % 1, a, v)),
    ]
    expected = image.astype(np.float64)
    for change in order:
      expected = np.clip(changes[change](expected), 0, 1)
    found = image_augmentations._jitter(jnp.asarray(image), key, augmentation)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    seen.add(tuple(order.tolist()))
  assert len(seen) > 4  # of 8 draws among 24 orders


# --- what is drawn --------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("height", "width", "options"))
def _boxes(keys, height, width, options):
  return jax.vmap(
    lambda key: jnp.stack(image_augmentations.random_box(key, height, width, **dict(options)))
  )(keys)


def test_boxes_lie_inside_and_have_the_area_and_aspect_that_were_asked_for():
  draws = 4000
  keys = jax.random.split(jax.random.key(0), draws)
  options = (("min_area", 0.08), ("max_aspect", 4 / 3))
  for height, width in ((32, 32), (5, 11), (1, 1)):
    top, left, box_height, box_width = np.asarray(_boxes(keys, height, width, options)).T
    assert np.all((top >= 0) & (box_height >= 1) & (top + box_height <= height))
    assert np.all((left >= 0) & (box_width >= 1) & (left + box_width <= width))
  # In a large image rounding does not matter. Areas up to 1 / (4/3) always fit.
  _, _, box_height, box_width = np.asarray(_boxes(keys, 4000, 4000, options)).T
  share = box_height * box_width / 4000**2
  fits = share < 0.7
  aspect = np.log(box_width / box_height)[fits] / np.log(4 / 3)
  assert abs(aspect.mean()) < 4 * (1 / 3 / fits.sum()) ** 0.5
  assert abs((aspect**2).mean() - 1 / 3) < 4 * (4 / 45 / fits.sum()) ** 0.5
  expected = (0.7 - 0.08) / (1 - 0.08)  # the area is uniform
  assert abs(fits.mean() - expected) < 4 * (expected * (1 - expected) / draws) ** 0.5
  assert abs(share[fits].mean() - 0.39) < 4 * (0.62**2 / 12 / fits.sum()) ** 0.5
  assert 0.08 < share.min() < 0.09 and 0.9 < share.max() <= 1


def test_offsets_reach_both_ends():
  keys = jax.random.split(jax.random.key(0), 500)
  options = (("min_area", 0.08), ("max_aspect", 4 / 3))
  top, left, box_height, box_width = np.asarray(_boxes(keys, 6, 9, options)).T
  assert top.min() == 0 and np.any((top > 0) & (top + box_height == 6))
  assert left.min() == 0 and np.any((left > 0) & (left + box_width == 9))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "operation"),
  [
    ("flip_prob", lambda image: image[:, ::-1]),
    ("grey_prob", image_augmentations.grey),
    ("solarise_prob", image_augmentations.solarise),
    ("jitter_prob", None),
    ("blur_prob", None),
  ],
)
def test_operations_act_as_often_as_they_should_and_change_nothing_else(name, operation):
  draws, size = 1000, 20  # at 20 pixels the blur has its first radius
  image = jnp.asarray(_image(size, size))
  images = jnp.broadcast_to(image, (draws, size, size, 3))
  augmentation = dataclasses.replace(NOTHING, size=size, **{name: 0.3})
  views = np.asarray(_augment(images, jax.random.key(1), augmentation))
  # 1e-6: the crop of the whole image is a product with the identity, in float32.
  changed = np.abs(views - np.asarray(image)).max((1, 2, 3)) > 1e-6
  assert abs(changed.mean() - 0.3) < 4 * (0.3 * 0.7 / draws) ** 0.5
  if operation is not None:
    expected = np.broadcast_to(operation(image), views[changed].shape)
    np.testing.assert_allclose(views[changed], expected, atol=1e-5)
  else:
    different = np.unique(views[changed].reshape(changed.sum(), -1), axis=0)
    assert len(different) == changed.sum()  # each image by itself
  always = dataclasses.replace(augmentation, **{name: 1.0})
  views = np.asarray(_augment(images[:16], jax.random.key(1), always))
  assert np.all(np.abs(views - np.asarray(image)).max((1, 2, 3)) > 1e-6)


def test_the_views_of_the_paper_have_its_numbers():
  first, second = image_augmentations.first_view(), image_augmentations.second_view()
  assert (first.blur_prob, first.solarise_prob) == (1.0, 0.0)
  assert (second.blur_prob, second.solarise_prob) == (0.1, 0.2)
  shared = {"blur_prob": 0.0, "solarise_prob": 0.0}
  assert dataclasses.replace(first, **shared) == dataclasses.replace(second, **shared)
  # Radius 11 at 224 pixels, so 23 taps: a point of light reaches 11 pixels and no more.
  point = jnp.zeros((1, 224, 224, 3)).at[0, 112, 112].set(1.0)
  blurred = dataclasses.replace(
    NOTHING, size=224, blur_prob=1.0, blur_sigma=(2.0, 2.0000001)
  )  # fmt: skip
  lit = np.asarray(_augment(point, jax.random.key(0), blurred))[0, 112, :, 0] > 0
  assert np.flatnonzero(lit)[[0, -1]].tolist() == [101, 123]


# --- batches --------------------------------------------------------------------------------------


def test_views_are_pure_and_each_image_has_its_own():
  views = image_augmentations.Views(
    image_augmentations.first_view(10), image_augmentations.second_view(10)
  )
  assert hash(views) == hash(dataclasses.replace(views))
  images = np.random.default_rng(0).integers(0, 256, (4, 16, 12, 3)).astype(np.uint8)
  images[1] = images[0]
  run = jax.jit(views)
  one, again = run(images, jax.random.key(0)), run(images, jax.random.key(0))
  other = run(images, jax.random.key(1))
  for index in range(2):
    np.testing.assert_array_equal(one[index], again[index])
    assert one[index].shape == (4, 10, 10, 3) and one[index].dtype == jnp.float32
    assert np.abs(one[index] - other[index]).max() > 0.1
    assert np.abs(one[index][0] - one[index][1]).max() > 0.1  # the same image, another view
  assert np.abs(one[0] - one[1]).max() > 0.1
  # Standardised values of [0, 1]; bytes and numbers in [0, 1] are the same images.
  low = -np.divide(image_augmentations.IMAGENET_MEAN, image_augmentations.IMAGENET_STD)
  high = low + 1 / np.array(image_augmentations.IMAGENET_STD)
  assert np.all(one[0] >= low - 1e-5) and np.all(one[0] <= high + 1e-5)
  floats = run(images.astype(np.float32) / 255, jax.random.key(0))
  np.testing.assert_allclose(floats[0], one[0], atol=1e-5)


def test_crops_of_the_host_get_the_rest_of_the_augmentation():
  crops = [np.random.default_rng(i).random((4, 20, 20, 3)).astype(np.float32) for i in range(2)]
  whole = image_augmentations.Augmentation(20, min_area=1.0, max_aspect=1.0)  # crops nothing
  rest = dataclasses.replace(whole, crop=False)
  want, found = (
    jax.jit(image_augmentations.Views(one, one))(crops, jax.random.key(0)) for one in (whole, rest)
  )
  np.testing.assert_allclose(found, want, atol=1e-5)  # the weights of `whole` are 1 up to rounding
  with pytest.raises(
    ValueError, match=r"must be \[B, 20, 20, 3\] where crop is False, got \[4, 24,"
  ):
    image_augmentations.augment(np.zeros((4, 24, 20, 3)), jax.random.key(0), rest)


def test_views_on_eight_devices_equal_those_on_one():
  augmentation = image_augmentations.crop_and_flip(8)
  images = np.random.default_rng(0).random((16, 8, 8, 3)).astype(np.float32)
  one = _augment(images, jax.random.key(0), augmentation)
  batch = sharding.shard_batch(images, sharding.make_mesh({"data": 8}))
  many = _augment(batch, jax.random.key(0), augmentation)
  assert not many.sharding.is_fully_replicated
  np.testing.assert_allclose(many, one, atol=1e-6)


@pytest.mark.parametrize(
  ("images", "message"),
  [
    (np.zeros((2, 8, 8, 1)), r"must have shape \[B, H, W, 3\], got \[2, 8, 8, 1\]: repeat the"),
    (np.zeros((8, 8, 3)), r"must have shape \[B, H, W, 3\], got \[8, 8, 3\]"),
    (np.zeros((2, 8, 8, 3), int), r"must be bytes \(uint8\) or floating-point numbers"),
  ],
)
def test_bad_images_are_refused(images, message):
  with pytest.raises(ValueError, match=message):
    image_augmentations.augment(images, jax.random.key(0), NOTHING)
  with pytest.raises(ValueError, match=message):
    image_augmentations.centre_crop(images, size=8)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"size": 0}, "size must be an integer >= 1, got 0"),
    ({"min_area": 1.2}, "min_area must lie in"),
    ({"max_aspect": 0.5}, "max_aspect must be at least 1, got 0.5"),
    ({"grey_prob": -0.1}, "grey_prob must lie in"),
    ({"hue": 2.0}, "hue must lie in"),
    ({"blur_sigma": (0.0, 2.0)}, "blur_sigma must be positive"),
  ],
)
def test_bad_augmentations_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    image_augmentations.Augmentation(**options)
  with pytest.raises(ValueError, match="share must lie in"):
    image_augmentations.centre_crop(np.zeros((1, 8, 8, 3)), size=8, share=1.5)
