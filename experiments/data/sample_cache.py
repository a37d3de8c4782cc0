"""A cache on disk for arrays that take long to compute; the key is a hash of their settings.

The folder is the first of these that is set:
* the folder that a run names, `--config.data.cache=FOLDER`;
* `$BOOTSTRAX_SAMPLE_CACHE`;
* the folder `samples` in `$BOOTSTRAX_CACHE`, which also holds weights and games;
* `~/.cache/bootstrax/samples`.

Tests set `$BOOTSTRAX_SAMPLE_CACHE`, so they draw their own samples but use the weights and games
that are there.
"""

import hashlib
import json
import os
import pathlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments import files

# Version of the stored arrays, part of every key. Raise it when the meaning of the arrays changes.
_FORMAT = 2


def cache_key(**settings: Any) -> str:
  """Returns the hash of settings; their order does not matter.

  Args:
    **settings: strings, numbers, lists, dicts or None. Pass everything that the arrays depend on:
      fingerprints of model and tokenizer, sampling settings, seed, prompts.

  Returns:
    64 hexadecimal digits, the SHA-256 of the settings as canonical JSON.

  Raises:
    ValueError: JSON cannot represent a setting.

  Example:
    >>> cache_key(temperature=1.0, prompts=["a"]) == cache_key(prompts=["a"], temperature=1.0)
    True
  """
  return hashlib.sha256(_canonical({"format": _FORMAT, **settings}).encode()).hexdigest()


def _canonical(settings: Mapping[str, Any]) -> str:
  for name, value in settings.items():
    try:
      json.dumps(value, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
      raise ValueError(f"setting {name!r} cannot be part of a cache key: {error}") from None
  return json.dumps(settings, sort_keys=True, separators=(",", ":"), default=_plain)


def _plain(value: Any) -> Any:
  if isinstance(value, np.generic | np.ndarray):
    return value.tolist()
  raise TypeError(f"{type(value).__name__} is not a string, number, list, dict or None")


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
  digest = hashlib.sha256()
  for name, array in sorted(arrays.items()):
    digest.update(f"{name} {array.dtype.str} {array.shape};".encode())
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()


class SampleCache:
  """Arrays on disk: `<key>.npz` holds the arrays, `<key>.json` their settings and a checksum.

  Each file is written under a temporary name and then renamed, the JSON last, so an interrupted or
  a second process does no harm. If an entry is damaged, the cache warns and computes it again.
  """

  def __init__(self, folder: str | os.PathLike[str] | None = None):
    """Opens the cache in `folder`; None takes the default from the module's docstring.

    Raises:
      OSError: the folder cannot be made or written. This is checked here, before minutes of
        sampling.
    """
    if folder is None:
      root = os.environ.get("BOOTSTRAX_CACHE") or "~/.cache/bootstrax"
      folder = os.environ.get("BOOTSTRAX_SAMPLE_CACHE") or pathlib.Path(root) / "samples"
    self.folder = files.local_path("config.data.cache", folder)
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      probe = self.folder / f".probe.{os.getpid()}"
      probe.touch()
      probe.unlink()
    except OSError as error:
      raise self._explained(error) from error

  def get(
    self, settings: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]
  ) -> dict[str, np.ndarray]:
    """Returns the arrays of `settings`; computes and stores them if they are not in the cache.

    Args:
      settings: see `cache_key`.
      make: computes arrays of numbers or text by name, such as tokens and mask `[N, K, T]` and
        summed reference log-probabilities `[N, K]`. It must depend on `settings` alone.

    Raises:
      OSError: the disk is full or read-only, so the arrays cannot be stored. No partial file is
        left.
      ValueError: JSON cannot represent a setting, or an array holds Python objects.
    """
    key = cache_key(**settings)
    found = self._read(key)
    if found is not None:
      return found
    arrays: dict[str, Any] = {name: np.asarray(value) for name, value in make().items()}
    objects = [name for name, array in arrays.items() if array.dtype.hasobject]
    if objects:
      raise ValueError(f"array {objects[0]!r} holds Python objects; store numbers or text")
    description = {"checksum": _digest(arrays), "settings": json.loads(_canonical(settings))}
    text = json.dumps(description, indent=1, ensure_ascii=False)
    # The checksum covers the arrays, not the files: two processes may write equal arrays into
    # different files, and a read still notices files that do not belong together.
    self._write(key + ".npz", lambda file: np.savez(file, **arrays))
    self._write(key + ".json", lambda file: file.write(text.encode()))
    return arrays

  def rewards(
    self, samples: Mapping[str, np.ndarray], reward: str, score: Callable[[], np.ndarray]
  ) -> np.ndarray:
    """Returns the rewards `[N, K]` of `samples` from an entry of their own in the cache.

    Args:
      samples: the arrays to score; their contents are part of the key.
      reward: identifies the reward and its version, such as `rewards.Reward.fingerprint`.
      score: computes the rewards.
    """
    settings = {"rewards_of": _digest(samples), "reward": reward}
    return self.get(settings, lambda: {"rewards": score()})["rewards"]

  def _read(self, key: str) -> dict[str, np.ndarray] | None:
    arrays_path, text_path = (self.folder / f"{key}{suffix}" for suffix in (".npz", ".json"))
    if not arrays_path.exists() and not text_path.exists():
      return None
    try:
      with np.load(arrays_path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
      if json.loads(text_path.read_bytes())["checksum"] != _digest(arrays):
        raise ValueError("checksum differs")
      return arrays
    except Exception as error:  # on damaged files NumPy, zlib and json raise many kinds of error
      warnings.warn(
        f"cached samples {arrays_path} are incomplete or damaged ({error}); computing them again",
        RuntimeWarning,
        stacklevel=3,
      )
      return None

  def _write(self, name: str, write: Callable[[Any], Any]) -> None:
    temporary = self.folder / f".{name}.{os.getpid()}.tmp"
    try:
      try:
        with open(temporary, "wb") as file:
          write(file)
          file.flush()
          os.fsync(file.fileno())
        os.replace(temporary, self.folder / name)
      finally:
        temporary.unlink(missing_ok=True)
    except OSError as error:
      raise self._explained(error) from error

  def _explained(self, error: OSError) -> OSError:
    message = (
      f"cannot write samples to {self.folder}: {error.strerror or error}; free some space or "
      "choose another folder with --config.data.cache=FOLDER"
    )
    return OSError(error.errno, message)
