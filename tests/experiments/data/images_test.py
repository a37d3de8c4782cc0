"""Image data sets by name: digits and archives."""

import numpy as np
import pytest

from experiments.data import images

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (40, 6, 6, 3), dtype=np.uint8)
LABELS = np.arange(40) % 4


def test_digits_need_no_files_and_are_split_the_same_way_with_every_seed():
  first, second = images.load("digits"), images.load("digits", seed=1)
  assert first.images.shape == (1438, 8, 8, 3) and first.test_images.shape == (359, 8, 8, 3)
  assert first.images.dtype == np.uint8 and first.images.max() == 255
  np.testing.assert_array_equal(first.test_images, second.test_images)
  assert not np.array_equal(first.validation_rows, second.validation_rows)
  assert len(first.validation_rows) == 144 and len(first.fit_rows) == 1438 - 144
  assert set(first.validation_rows).isdisjoint(first.fit_rows)


@pytest.mark.parametrize(
  "keys",
  [
    ("images", "labels", "test_images", "test_labels"),
    ("x_train", "y_train", "x_test", "y_test"),
  ],
)
def test_raw_arrays_are_read_under_their_usual_names(tmp_path, keys):
  path = tmp_path / "mine.npz"
  np.savez(path, **dict(zip(keys, (PIXELS[:30], LABELS[:30], PIXELS[30:], LABELS[30:]))))
  found = images.load("mine.npz", directory=tmp_path)
  assert found.name == "mine" and found.class_names == ("0", "1", "2", "3")
  np.testing.assert_array_equal(found.images, PIXELS[:30])
  np.testing.assert_array_equal(found.test_labels, LABELS[30:])
