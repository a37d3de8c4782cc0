"""Crops of the host beside those of the device, and their way through Grain."""

import concurrent.futures
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments.data import batching, image_crops, images
from representation import image_augmentations

HEIGHT, WIDTH = 30, 45
# Far from black and white, where Pillow would clip between the two axes.
PIXELS = np.random.default_rng(0).integers(64, 192, (20, HEIGHT, WIDTH, 3), dtype=np.uint8)
LAW = {"min_area": 0.08, "max_aspect": 4 / 3}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """Twenty images in two folders; PNG, so that the pixels are kept."""
  top = tmp_path_factory.mktemp("set")
  for i, pixels in enumerate(PIXELS):
    for split in ("train", "test"):
      path = top / split / "ab"[i // 10] / f"{i:02}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(pixels).save(path)
  return images.open_files(str(top))


def test_boxes_have_the_distribution_of_the_device():
  draws = np.random.default_rng(0).random((4000, 4))
  host = np.array([image_crops.random_box(draw, HEIGHT, WIDTH, **LAW) for draw in draws])
  box = functools.partial(image_augmentations.random_box, height=HEIGHT, width=WIDTH, **LAW)
  keys = jax.random.split(jax.random.key(0), 4000)
  device = np.stack(jax.jit(jax.vmap(box))(keys), axis=1)
  for name, of in {
    "area": lambda b: b[:, 2] * b[:, 3],
    "aspect": lambda b: b[:, 3] / b[:, 2],
    "top": lambda b: b[:, 0],
    "left": lambda b: b[:, 1],
    "bottom": lambda b: b[:, 0] + b[:, 2],
  }.items():
    values = np.sort(np.unique(np.concatenate([of(host), of(device)])))
    shares = [np.searchsorted(np.sort(of(b)), values, side="right") / 4000 for b in (host, device)]
    # Kolmogorov and Smirnov's distance of two samples of 4,000 exceeds 0.044 once in 1,000 times.
    assert np.abs(shares[0] - shares[1]).max() < 0.044, name
  assert (host[:, :2] >= 0).all() and (host[:, 2:] >= 1).all()
  assert (host[:, 0] + host[:, 2] <= HEIGHT).all() and (host[:, 1] + host[:, 3] <= WIDTH).all()


def test_crops_are_those_of_the_device_with_antialiasing(files):
  ids, size = np.array([3, 17]), 12
  crops = image_crops.random_crops(files.train, ids, np.random.default_rng(1), size=size)
  draws = np.random.default_rng(1).random((2, 2, 4))
  resize = jax.jit(functools.partial(image_augmentations.resized_crop, size=size, antialias=True))
  for view, made in enumerate((crops.first, crops.second)):
    for i, row in enumerate(ids):
      box = image_crops.random_box(draws[i, view], HEIGHT, WIDTH, **LAW)
      image = jnp.asarray(PIXELS[row], jnp.float32) / 255
      want = resize(image, box)
      # Pillow rounds to bytes after each of the two axes: half a byte, times up to 1.5, and half.
      np.testing.assert_allclose(made[i] / 255, want, atol=1.25 / 255, rtol=0)
  assert crops.labels.tolist() == [0, 1]


def test_a_process_makes_its_rows_of_the_batch_alone(files):
  """The crops are those of the whole batch: the random numbers belong to the rows."""
  ids, rows = np.array([3, 17, 9, 12]), np.array([1, 3])
  whole = image_crops.random_crops(files.train, ids, np.random.default_rng(1), size=8)
  some = image_crops.random_crops(files.train, ids, np.random.default_rng(1), size=8, rows=rows)
  for found, wanted in zip(some, whole, strict=True):
    np.testing.assert_array_equal(found[rows], wanted[rows])
    assert found.shape == wanted.shape and not found[[0, 2]].any() and wanted[rows].any()


def test_centre_crops_are_those_of_the_device_with_antialiasing(files):
  crops = image_crops.CentreCrops(files.test, 12)
  made = crops[:]
  assert made.shape == crops.shape == (20, 12, 12, 3) and made.dtype == crops.dtype
  crop = functools.partial(image_augmentations.centre_crop, size=12, antialias=True)
  np.testing.assert_allclose(made / 255, jax.jit(crop)(PIXELS), atol=1.25 / 255, rtol=0)
  np.testing.assert_array_equal(crops[np.array([7, 2])], made[[7, 2]])
  np.testing.assert_array_equal(crops[-1], made[19])


def test_batches_of_crops_do_not_depend_on_threads_and_resume(files):
  def epoch(pool, state=None):
    make = functools.partial(image_crops.random_crops, files.train, size=8, pool=pool)
    found = batching.batches(np.arange(20), batch_size=5, seed=3, num_epochs=1, make=make)
    if state is not None:
      found.set_state(state)
    return found

  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    threads = epoch(pool)
    first = next(threads)
    state = threads.get_state()
    rest = list(threads)
    again = list(epoch(pool, state))
  alone = list(epoch(None))
  jax.tree.map(np.testing.assert_array_equal, [first, *rest], alone)
  jax.tree.map(np.testing.assert_array_equal, rest, again)
  assert sorted(np.concatenate([ids for ids, _ in alone])) == list(range(20))
  for ids, crops in alone:
    np.testing.assert_array_equal(crops.labels, ids // 10)
    assert not np.array_equal(crops.first, crops.second)


def test_the_device_finishes_the_views_of_the_host(files):
  crops = image_crops.random_crops(files.train, np.arange(4), np.random.default_rng(0), size=8)
  plain = image_augmentations.Augmentation(
    8, flip_prob=0.0, jitter_prob=0.0, grey_prob=0.0, blur_prob=0.0, crop=False
  )
  views = image_augmentations.Views(plain, plain, mean=(0, 0, 0), std=(1, 1, 1))
  first, second = jax.jit(views)((crops.first, crops.second), jax.random.key(0))
  np.testing.assert_allclose(first, crops.first / 255, rtol=1e-6)
  np.testing.assert_allclose(second, crops.second / 255, rtol=1e-6)


def test_bad_arguments_and_images_are_refused(files, tmp_path):
  ids, rng = np.arange(4), np.random.default_rng(0)
  for options, message in [
    ({"size": 0}, "size must be an integer >= 1"),
    ({"size": 8, "min_area": 2.0}, "min_area"),
    ({"size": 8, "max_aspect": 0.5}, "max_aspect must be at least 1"),
    ({"size": 8, "num_views": 3}, "num_views must be one of 1, 2"),
  ]:
    with pytest.raises(ValueError, match=message):
      image_crops.random_crops(files.train, ids, rng, **options)
  with pytest.raises(ValueError, match=r"share must lie in \(0, 1\], got 0"):
    image_crops.CentreCrops(files.train, 8, share=0)
  buffer = io.BytesIO()
  Image.fromarray(PIXELS[0]).save(buffer, "JPEG")
  for name in "ab":
    (tmp_path / name).mkdir()
    for i in range(5):
      (tmp_path / name / f"{i}.jpg").write_bytes(buffer.getvalue()[: -400 if i == 3 else None])
  damaged = images.open_files(str(tmp_path))
  rows = np.arange(len(damaged.train))
  with pytest.raises(ValueError, match=r"image \d \(.*3.jpg\): cannot be decoded"):
    image_crops.random_crops(damaged.train, rows, rng, size=8, num_views=1)
