"""Keys, damage and interruption of `experiments.data.sample_cache`."""

import errno
import json
import os

import numpy as np
import pytest

from experiments.data import sample_cache

_SETTINGS = {"model": "abc", "prompts": ["The soup", "Zoë"], "temperature": 1.0}


class _Make:
  """Counts how often the samples are computed."""

  def __init__(self):
    self.calls = 0

  def __call__(self):
    self.calls += 1
    return {
      "tokens": np.arange(12, dtype=np.int32).reshape(2, 2, 3),
      "logps": np.linspace(-3, 0, 4, dtype=np.float32).reshape(2, 2),
      "texts": np.array([[" was cold", " é"], ["", " said so"]]),
    }


def _assert_equal(left, right):
  assert left.keys() == right.keys()
  for name in left:
    assert left[name].dtype == right[name].dtype
    np.testing.assert_array_equal(left[name], right[name])


def test_key_depends_on_every_setting_and_on_no_order():
  key = sample_cache.cache_key(**_SETTINGS)
  assert len(key) == 64
  assert key == sample_cache.cache_key(**dict(reversed(_SETTINGS.items())))
  changes = (
    {"model": "abd"},
    {"temperature": 0.9},
    {"prompts": ["Zoë", "The soup"]},
    {"prompts": ["The soup"]},
    {"new": None},
  )
  assert len({key, *(sample_cache.cache_key(**{**_SETTINGS, **c}) for c in changes)}) == 6


def test_key_takes_numpy_numbers_and_tuples_as_plain_ones():
  plain = sample_cache.cache_key(k=2, prompts=["a"])
  assert plain == sample_cache.cache_key(k=np.int64(2), prompts=("a",))


@pytest.mark.parametrize("value", [object(), float("nan"), {"a": {1, 2}}])
def test_key_refuses_what_it_cannot_write_down(value):
  with pytest.raises(ValueError, match="setting 'odd'"):
    sample_cache.cache_key(odd=value)


def test_made_once_then_read(tmp_path):
  make = _Make()
  first = sample_cache.SampleCache(tmp_path / "new" / "folder").get(_SETTINGS, make)
  second = sample_cache.SampleCache(tmp_path / "new" / "folder").get(_SETTINGS, make)
  assert make.calls == 1
  _assert_equal(first, second)
  key = sample_cache.cache_key(**_SETTINGS)
  names = sorted(os.listdir(tmp_path / "new" / "folder"))
  assert names == [f"{key}.json", f"{key}.npz"]
  written = json.loads((tmp_path / "new" / "folder" / f"{key}.json").read_text("utf-8"))
  assert written["settings"] == _SETTINGS


def test_other_settings_have_their_own_entry(tmp_path):
  cache, make = sample_cache.SampleCache(tmp_path), _Make()
  cache.get(_SETTINGS, make)
  cache.get({**_SETTINGS, "temperature": 0.5}, make)
  assert make.calls == 2


def _truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path):
  """Changes one token, or one digit of the checksum, and leaves a readable file."""
  data = bytearray(path.read_bytes())
  known = np.arange(12, dtype=np.int32).tobytes() if path.suffix == ".npz" else b'"checksum": "'
  data[data.index(known) + len(known) - (4 if path.suffix == ".npz" else 0)] ^= 1
  path.write_bytes(bytes(data))


def _empty(path):
  path.write_bytes(b"")


def _remove(path):
  path.unlink()


def _not_ours(path):
  path.write_bytes(b"[1, 2]")


@pytest.mark.parametrize("suffix", [".npz", ".json"])
@pytest.mark.parametrize("damage", [_truncate, _flip, _empty, _remove, _not_ours])
def test_damage_is_announced_and_repaired(tmp_path, suffix, damage):
  cache, make = sample_cache.SampleCache(tmp_path), _Make()
  first = cache.get(_SETTINGS, make)
  path = tmp_path / (sample_cache.cache_key(**_SETTINGS) + suffix)
  damage(path)
  with pytest.warns(RuntimeWarning, match="incomplete or damaged"):
    _assert_equal(cache.get(_SETTINGS, make), first)
  assert make.calls == 2
  cache.get(_SETTINGS, make)
  assert make.calls == 2


def test_arrays_of_another_entry_are_not_taken(tmp_path):
  cache, make = sample_cache.SampleCache(tmp_path), _Make()
  other = {**_SETTINGS, "model": "other"}
  cache.get(_SETTINGS, make)
  cache.get(other, lambda: {"tokens": np.zeros(3)})
  key, other_key = (sample_cache.cache_key(**s) for s in (_SETTINGS, other))
  (tmp_path / f"{other_key}.npz").replace(tmp_path / f"{key}.npz")
  with pytest.warns(RuntimeWarning, match="checksum differs"):
    cache.get(_SETTINGS, make)


def test_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
  cache = sample_cache.SampleCache(tmp_path)

  def fail(file, **arrays):
    file.write(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(np, "savez", fail)
  with pytest.raises(OSError, match=r"No space left on device; free some space or choose another"):
    cache.get(_SETTINGS, _Make())
  assert os.listdir(tmp_path) == []


def test_interruption_between_the_two_files_is_noticed(tmp_path, monkeypatch):
  cache, replace = sample_cache.SampleCache(tmp_path), os.replace

  def interrupt(source, target):
    if str(target).endswith(".json"):
      raise KeyboardInterrupt
    replace(source, target)

  monkeypatch.setattr(os, "replace", interrupt)
  with pytest.raises(KeyboardInterrupt):
    cache.get(_SETTINGS, _Make())
  monkeypatch.undo()
  assert [name for name in os.listdir(tmp_path) if name.endswith(".tmp")] == []
  make = _Make()
  with pytest.warns(RuntimeWarning, match="incomplete"):
    cache.get(_SETTINGS, make)
  assert make.calls == 1


def test_folder_that_is_a_file_is_refused_at_once(tmp_path):
  (tmp_path / "file").write_text("x")
  with pytest.raises(OSError, match=r"cannot write samples to .*file.*data\.cache"):
    sample_cache.SampleCache(tmp_path / "file")


def test_default_folder(tmp_path, monkeypatch):
  monkeypatch.setenv("BOOTSTRAX_CACHE", str(tmp_path / "everything"))
  monkeypatch.setenv("BOOTSTRAX_SAMPLE_CACHE", str(tmp_path / "own"))
  assert sample_cache.SampleCache().folder == tmp_path / "own"
  monkeypatch.delenv("BOOTSTRAX_SAMPLE_CACHE")
  assert sample_cache.SampleCache().folder == tmp_path / "everything" / "samples"


def test_objects_are_refused(tmp_path):
  with pytest.raises(ValueError, match="array 'odd' holds Python objects"):
    sample_cache.SampleCache(tmp_path).get(_SETTINGS, lambda: {"odd": np.array([{}, None])})
  assert os.listdir(tmp_path) == []


def test_rewards_are_kept_apart_from_samples(tmp_path):
  cache, make = sample_cache.SampleCache(tmp_path), _Make()
  samples = cache.get(_SETTINGS, make)
  calls = []

  def score():
    calls.append(1)
    return np.full((2, 2), float(len(calls)))

  assert cache.rewards(samples, "m:f@1", score)[0, 0] == 1
  assert cache.rewards(samples, "m:f@1", score)[0, 0] == 1
  assert cache.rewards(samples, "m:f@2", score)[0, 0] == 2
  changed = {**samples, "tokens": samples["tokens"] + 1}
  assert cache.rewards(changed, "m:f@1", score)[0, 0] == 3
  cache.get(_SETTINGS, make)
  assert make.calls == 1
