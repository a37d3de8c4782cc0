"""Image data sets by name: digits, archives, folders and TensorFlow Datasets."""

import functools
import io
import os
import shutil
import sys
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from experiments.data import image_formats, images

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (40, 6, 6, 3), dtype=np.uint8)
LABELS = np.arange(40) % 4
CONFIGS = ("tested", "untested")


def _encoded(pixels, kind="PNG", **options):
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, kind, **options)
  return buffer.getvalue()


def _save(path, pixels):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels).save(path)


def _archive(files, labels=LABELS, **others):
  """Returns the arrays of an archive of encoded images."""
  offsets = np.cumsum([0, *map(len, files)])
  return {
    "jpeg": np.frombuffer(b"".join(files), np.uint8), "offsets": offsets, "labels": labels, **others
  }  # fmt: skip


def test_digits_need_no_files_and_are_split_the_same_way_with_every_seed():
  first, second = images.load("digits"), images.load("digits", seed=1)
  assert first.images.shape == (1438, 8, 8, 3) and first.test_images.shape == (359, 8, 8, 3)
  assert first.images.dtype == np.uint8 and first.images.max() == 255
  assert first.notes["test_split"] == "359 of 1797 images held out here: the source has none"
  np.testing.assert_array_equal(first.test_images, second.test_images)
  assert not np.array_equal(first.validation_rows, second.validation_rows)
  assert len(first.validation_rows) == 144 and len(first.fit_rows) == 1438 - 144
  assert set(first.validation_rows).isdisjoint(first.fit_rows)
  # Each class gives a fifth to the test and a tenth of the rest to validation, up to rounding.
  all_labels = np.concatenate([first.labels, first.test_labels])
  for rows, known, share in (
    (first.test_labels, all_labels, 0.2),
    (first.labels[first.validation_rows], first.labels, 0.1),
  ):
    assert np.abs(np.bincount(rows) - share * np.bincount(known)).max() <= 1


def test_a_subset_has_as_many_images_of_each_class_as_there_are(tmp_path):
  labels = np.repeat([0, 1, 2], [30, 2, 8])
  np.savez(tmp_path / "a.npz", images=PIXELS, labels=labels, test_images=PIXELS, test_labels=labels)
  found = [images.load("a.npz", directory=tmp_path, num_images=12, seed=seed) for seed in (0, 0, 1)]
  assert [np.bincount(one.labels).tolist() for one in found] == [[5, 2, 5]] * 3
  np.testing.assert_array_equal(found[0].images, found[1].images)
  assert not np.array_equal(found[0].images, found[2].images)
  assert found[0].notes["sha256"] == found[1].notes["sha256"] != found[2].notes["sha256"]
  assert found[0].notes["test_images_among_training_images"] == 12


@pytest.mark.parametrize("keys", [
  ("images", "labels", "test_images", "test_labels"),
  ("train_images", "train_labels", "test_images", "test_labels"),
  ("x_train", "y_train", "x_test", "y_test"),
])  # fmt: skip
@pytest.mark.parametrize("change", [
  lambda pixels: pixels,
  lambda pixels: pixels.astype(np.int64),
  lambda pixels: pixels / np.float32(255),
])  # fmt: skip
def test_raw_arrays_are_read_under_their_usual_names(tmp_path, keys, change):
  arrays = (change(PIXELS[:30]), LABELS[:30, None], change(PIXELS[30:]), LABELS[30:] * 1.0)
  np.savez(tmp_path / "mine.npz", **dict(zip(keys, arrays, strict=True)), val_images=PIXELS)
  found = images.load("mine.npz", directory=tmp_path)
  assert found.name == "mine" and found.class_names == ("0", "1", "2", "3")
  assert found.notes["not_used"] == "val_images"
  np.testing.assert_array_equal(found.images, PIXELS[:30])
  np.testing.assert_array_equal(found.test_images, PIXELS[30:])
  np.testing.assert_array_equal(found.test_labels, LABELS[30:])


def test_encoded_images_are_split_by_their_mask_and_grey_ones_get_colour(tmp_path):
  files = [_encoded(one) for one in PIXELS[:38]]
  files.append(_encoded(PIXELS[38, ..., 0]))  # grey
  files.append(_encoded(np.dstack([PIXELS[39], np.full((6, 6), 255, np.uint8)])))  # opaque alpha
  arrays = _archive(files, is_test=np.arange(40) >= 30, class_names=np.array(list("abcd")))
  np.savez(tmp_path / "a.npz", **arrays)
  found = images.load(str(tmp_path / "a.npz"))
  assert found.class_names == ("a", "b", "c", "d")
  np.testing.assert_array_equal(found.images, PIXELS[:30])
  np.testing.assert_array_equal(found.test_images[:8], PIXELS[30:38])
  np.testing.assert_array_equal(found.test_images[8], np.dstack([PIXELS[38, ..., 0]] * 3))
  np.testing.assert_array_equal(found.test_images[9], PIXELS[39])
  np.testing.assert_array_equal(found.test_labels, LABELS[30:])


@pytest.fixture
def folder(tmp_path):
  for i, pixels in enumerate(PIXELS):
    _save(tmp_path / "set" / "train" / "cb"[i % 2] / f"{i:02}.png", pixels)
  (tmp_path / "set" / "train" / "b" / "notes.txt").write_text("not an image")
  _save(tmp_path / "set" / "test" / "c" / "x.PNG", PIXELS[0, :, ::-1])
  return tmp_path / "set"


def test_a_folder_is_read_in_the_order_of_its_names(folder):
  found = images.load("set", directory=folder.parent)
  assert found.name == "set" and found.class_names == ("b", "c")
  np.testing.assert_array_equal(found.images, np.concatenate([PIXELS[1::2], PIXELS[::2]]))
  np.testing.assert_array_equal(found.labels, np.repeat([0, 1], 20))
  np.testing.assert_array_equal(found.test_images, PIXELS[:1, :, ::-1])
  assert found.test_labels.tolist() == [1]
  held_out = images.load(str(folder / "train"))  # classes at the top, no test
  assert len(held_out.images) == 32 and np.bincount(held_out.test_labels).tolist() == [4, 4]
  assert held_out.notes["test_split"].startswith("8 of 40 images held out")


def test_images_of_other_sizes_are_cut_to_their_central_square(folder):
  wide = RNG.integers(0, 256, (12, 21, 3), dtype=np.uint8)
  _save(folder / "train" / "b" / "00.png", wide)
  with pytest.raises(ValueError, match=r"image 1 \(.*01.png\): has 6x6 pixels where the first ima"):
    images.load(str(folder))
  found = images.load(str(folder), size=8)
  want = Image.fromarray(wide[:, 5:17]).resize((8, 8), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(found.images[0], np.asarray(want))
  assert found.images.shape == (41, 8, 8, 3) and found.notes["enlarged_images"] == 41


# --- TensorFlow Datasets --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tfds_directory(tmp_path_factory):
  """Two data sets of TFDS, written by the library itself; one has the name of ImageNet."""
  import tensorflow_datasets as tfds

  class Imagenet2012(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("9.0.0")

    def _info(self):
      features = {
        "file_name": tfds.features.Text(),
        "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
        "label": tfds.features.ClassLabel(names=["cat", "dog"]),
      }
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
      del manager
      rows = {"train": range(20), "validation": range(20, 30), "test": range(30, 40)}
      return {split: self._generate_examples(split, rows[split]) for split in rows}

    def _generate_examples(self, split, rows):
      for i in rows:
        label = -1 if split == "test" else i % 2  # as in the real one, without labels
        image = io.BytesIO(_encoded(PIXELS[i]))
        yield i, {"file_name": str(i), "image": image, "label": label}

  class GreyPictures(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name=n) for n in CONFIGS]

    def _info(self):
      features = {
        "picture": tfds.features.Image(shape=(6, 6, 1), encoding_format="png"),
        "class": tfds.features.ClassLabel(num_classes=4),
      }
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
      del manager
      splits = {"train": range(20), "validation": range(30, 40), "test": range(20, 30)}
      names = {"tested": splits, "untested": ("train",)}[self.builder_config.name]
      return {name: self._generate_examples(splits[name]) for name in names}

    def _generate_examples(self, rows):
      for i in rows:
        yield i, {"picture": io.BytesIO(_encoded(PIXELS[i, ..., 0])), "class": i % 4}

  directory = tmp_path_factory.mktemp("tfds")
  for builder in (Imagenet2012, *(functools.partial(GreyPictures, config=n) for n in CONFIGS)):
    builder(data_dir=directory, file_format="array_record").download_and_prepare()
  return directory


def test_tensorflow_datasets_are_read_without_tensorflow(tfds_directory):
  found = images.load("tfds:imagenet2012:9.0.0", directory=tfds_directory)
  assert "tensorflow" not in sys.modules
  assert found.name == "imagenet2012" and found.class_names == ("cat", "dog")
  assert found.notes["test_split"] == "validation" and found.notes["version"] == "9.0.0"
  # TFDS shuffles what it writes.
  for stored, labels, rows in (
    (found.images, found.labels, range(20)),
    (found.test_images, found.test_labels, range(20, 30)),
  ):
    places = [int(np.argmax((PIXELS == image).all((1, 2, 3)))) for image in stored]
    assert sorted(places) == list(rows)
    np.testing.assert_array_equal(labels, np.array(places) % 2)


def test_a_configuration_is_read_and_its_test_split_is_found(tfds_directory):
  tested = images.load("tfds:grey_pictures/tested", directory=tfds_directory)
  assert tested.name == "grey_pictures/tested" and tested.class_names == ("0", "1", "2", "3")
  assert tested.images.shape == (20, 6, 6, 3) and tested.notes["test_split"] == "test"
  want = sorted(PIXELS[20:30, 0, 0, 0])
  assert all(sorted(tested.test_images[:, 0, 0, channel]) == want for channel in range(3))
  untested = images.load("tfds:grey_pictures/untested:1.0.0", directory=tfds_directory)
  assert len(untested.images) == 16 and untested.notes["test_split"].startswith("4 of 20 images")


def test_the_first_images_of_imagenet_validate(tfds_directory, monkeypatch):
  monkeypatch.setitem(image_formats._FIRST_VALIDATE, "imagenet2012", 4)
  source = "tfds:imagenet2012:9.0.0"
  files = images.open_files(source, directory=tfds_directory)
  assert files.validation_rows.tolist() == [0, 1, 2, 3]
  assert "labels" not in vars(files.train)  # reading them would read all records
  image, label = files.train.example(3)
  np.testing.assert_array_equal(image, files.train.read(3))
  assert label == files.train.labels[3]
  few = images.open_files(source, directory=tfds_directory, num_images=10)
  assert len(few.validation_rows) == 1


@pytest.mark.parametrize(
  ("source", "message"),
  [
    ("tfds:cifar10", r"tfds build cifar10 --file_format=array_record --data_dir=.*"),
    ("tfds:nothing_of_that_name", "nothing_of_that_name.*tfds build nothing_of_that_name"),
    ("tfds:", "names no data set: write tfds:NAME"),
  ],
)
def test_a_set_that_is_not_prepared_names_the_command(tfds_directory, source, message):
  with pytest.raises(ValueError, match=message):
    images.load(source, directory=tfds_directory)


def test_a_set_in_another_format_names_the_command(tfds_directory, tmp_path):
  shutil.copytree(tfds_directory, tmp_path, dirs_exist_ok=True)
  info = tmp_path / "imagenet2012" / "9.0.0" / "dataset_info.json"
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  message = r"format .*TFRECORD is not supported.*: tfds build imagenet2012:9.0.0 --file_format=arr"
  with pytest.raises(ValueError, match=message):
    images.load("tfds:imagenet2012:9.0.0", directory=tmp_path)


def test_labels_that_a_split_lacks_are_refused(tfds_directory, monkeypatch):
  monkeypatch.setitem(image_formats._TFDS_TEST, "imagenet2012", "test")
  with pytest.raises(ValueError, match=r"test image 0: has no label \(-1\)"):
    images.load("tfds:imagenet2012:9.0.0", directory=tfds_directory)


@pytest.mark.parametrize(
  ("source", "module", "message"),
  [
    ("digits", "sklearn", "digits needs scikit-learn: pip install"),
    ("tfds:x", "tensorflow_datasets", "tfds:x needs tensorflow_datasets: pip install"),
  ],
)
def test_a_library_that_is_missing_is_named(monkeypatch, source, module, message):
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(ModuleNotFoundError, match=message):
    images.load(source)


# --- bad input ------------------------------------------------------------------------------------


def _with(array, index, value):
  changed = np.array(array, float if isinstance(value, float) else None)
  changed[index] = value
  return changed


@pytest.mark.parametrize(
  ("arrays", "message"),
  [
    ({"images": PIXELS[..., 0]}, r"images are grey, \[40, 6, 6\]; repeat the channel"),
    ({"images": PIXELS[..., :1]}, r"images are grey, \[40, 6, 6, 1\]; repeat the channel"),
    ({"images": PIXELS.transpose(0, 3, 1, 2)}, r"channels first; give images.transpose\(0, 2, 3,"),
    ({"images": PIXELS[..., [0, 1, 2, 0]]}, r"with alpha; give images\[..., :3\]"),
    ({"images": PIXELS[0]}, r"labels|grey"),
    ({"images": PIXELS > 9}, "must be bytes .* got bool"),
    ({"images": _with(PIXELS / 255, (7, 2, 3), np.nan)}, "image 7: .* got nan; leave the image"),
    ({"images": PIXELS / 1.0}, r"image 0: pixels must lie in \[0, 1\] for float64.*divide them by"),
    ({"images": _with(PIXELS.astype(np.uint16), (9, 0, 0, 0), 4095)}, "image 9: .*16 bits"),
    ({"images": PIXELS[:0], "labels": LABELS[:0]}, "holds 0 training images"),
    ({"labels": _with(LABELS, 5, -1)}, r"image 5: labels must lie in \[0, 4\).* got -1"),
    ({"labels": _with(LABELS, 6, 9), "class_names": list("abcd")}, "image 6: .* a, b, c, d, got 9"),
    ({"labels": _with(LABELS, 3, 0.5)}, "image 3: labels must be integers"),
    ({"labels": _with(LABELS, 4, np.nan)}, "image 4: labels must be integers"),
    ({"labels": np.array(list("abcd") * 10)}, "image 0: labels must be integers"),
    ({"labels": np.eye(40)}, r"labels are \[40, 40\]; give one class for each image"),
    ({"labels": LABELS[:39]}, "40 images have 39 labels"),
    ({"labels": LABELS * 0}, "all training images have label 0; give images of two or more"),
    ({"test_images": PIXELS}, r"has test images but none of \['test_labels', 'y_test'\]"),
    ({"test_images": PIXELS[:0], "test_labels": LABELS[:0]}, "its test split is empty"),
    ({"test_images": PIXELS, "test_labels": LABELS + 1}, r"test, image 3: .*\[0, 4\).* got 4"),
    ({"is_test": LABELS[:39] == 0}, "is_test must be 40 truth values"),
    ({"images": np.array([None] * 40)}, "cannot read images .*without pickled objects"),
  ],
)  # fmt: skip
def test_bad_raw_arrays_are_refused(tmp_path, arrays, message):
  np.savez(tmp_path / "a.npz", **{"images": PIXELS, "labels": LABELS, **arrays})
  with pytest.raises(ValueError, match=message) as error:
    images.load("a.npz", directory=tmp_path)
  assert "a.npz" in str(error.value)


def test_bad_archives_are_refused(tmp_path):
  files = [_encoded(one, "JPEG") for one in PIXELS]
  good = _archive(files)
  short = _archive([*files[:17], files[17][:-9], *files[18:]])
  offsets = good["offsets"]
  for arrays, message in [
    (short, r"a.npz, image 17: cannot be decoded \(image file is truncated"),
    (_archive([b"no image", *files[1:]]), "image 0: cannot be decoded"),
    (
      {**good, "offsets": _with(offsets, 3, 0)},
      "offsets must increase, got .* and then 0 at image",
    ),
    ({**good, "offsets": offsets[:-1]}, "offsets must go from 0 to "),
    ({**good, "offsets": offsets * 1.0}, "needs offsets"),
    ({**good, "labels": LABELS[:9]}, "40 images have 9 labels"),
    ({"jpeg": good["jpeg"], "labels": LABELS}, "needs offsets"),
    ({"pixels": PIXELS, "labels": LABELS}, r"found \['pixels', 'labels'\]"),
  ]:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
      images.load("a.npz", directory=tmp_path)
  (tmp_path / "a.npz").write_bytes(b"\x80\x04pickle")
  with pytest.raises(ValueError, match=r"cannot read .*a.npz"):
    images.load("a.npz", directory=tmp_path)


def test_bad_files_are_named(folder):
  path = folder / "train" / "b" / "03.png"
  for content, message in [
    (_encoded(PIXELS[3].astype(np.uint16)[..., 0] * 99), "more than 8 bits"),
    (_encoded(PIXELS[3, ..., [0, 1, 2, 0]].transpose(1, 2, 0)), "transparent pixels"),
    (_encoded(PIXELS[3])[:-30], "cannot be decoded"),
    (b"", "cannot be decoded"),
  ]:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"train, image 1 \(.*03.png\): .*{message}"):
      images.load(str(folder))
  path.unlink()
  os.symlink("nowhere", path)
  with pytest.raises(ValueError, match=r"image 1 \(.*03.png\): cannot be read"):
    images.load(str(folder))


def test_bad_folders_are_refused(folder):
  _save(folder / "test" / "z" / "0.png", PIXELS[0])
  with pytest.raises(ValueError, match="class z has no training images"):
    images.load(str(folder))
  (folder / "train" / "empty").mkdir()
  with pytest.raises(ValueError, match="empty: holds no images"):
    images.load(str(folder / "train"))
  (folder / "test" / "z" / "0.png").unlink()
  (folder / "test" / "z").rmdir()
  with pytest.raises(ValueError, match="test: has one class only, c"):
    images.load(str(folder / "test"))
  with pytest.raises(ValueError, match="c: has no folders of classes"):
    images.load(str(folder / "test" / "c"))
  with pytest.raises(ValueError, match=r"no image data set 'cifar' .*: give digits, FILE.npz"):
    images.load("cifar")


def test_what_does_not_fit_is_refused_before_it_is_decoded(folder):
  (folder / "train" / "b" / "39.png").write_bytes(b"damaged")
  with pytest.raises(ValueError, match=r"40 \+ 1 images of 6x6 .*choose a smaller size or num_im"):
    images.load(str(folder), free_bytes=41 * 6 * 6 * 3 - 1)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"size": -1}, "size must be an integer >= 0"),
    ({"seed": -1}, "seed must be an integer >= 0"),
    ({"num_images": 1}, r"num_images must be 0 \(all\) or lie in \[2, 1438\]"),
    ({"num_images": 1439}, r"num_images must be 0 \(all\) or lie in \[2, 1438\]"),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    images.load("digits", **options)
