"""The records of a run in `metrics.jsonl`; reports and figures are made from them.

A training record is `{"kind": "train", "step": n, "ids": ..., "seconds": ..., metric: value, ...}`,
where n is the number of updates before this one. An evaluation record has the kind `eval`, and n is
the number of updates that the evaluated state has seen.
"""

import contextlib
import hashlib
import json
import math
import pathlib
import sys
from collections.abc import Mapping
from typing import Any, TextIO

import numpy as np

from experiments import files

_MAX_IDS = 256


class History(list):
  """The training records of a run, oldest first; `evals` are its periodic evaluations."""

  def __init__(self, records=(), evals=()):
    super().__init__(records)
    self.evals = list(evals)


class JsonLines:
  """The file `metrics.jsonl`. Each line is one record and is flushed at once."""

  def __init__(self, path: pathlib.Path):
    self._path = pathlib.Path(path)
    self._file: TextIO | None = None

  def append(self, record: Mapping[str, Any]) -> None:
    """Writes one record; NaN and Inf become null, because JSON has neither."""
    try:
      if self._file is None:
        self._file = self._path.open("a", encoding="utf-8")
      self._file.write(json.dumps(_plain(record), allow_nan=False) + "\n")
      self._file.flush()
    except OSError as error:
      raise files.write_error(self._path, error) from error

  def read(self) -> History:
    """Returns all records; skips lines that are none, as a killed process may leave one."""
    if not self._path.exists():
      return History()
    records = []
    lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
      try:
        record = json.loads(line)
        record = {k: math.nan if v is None else v for k, v in record.items()}
        if record["kind"] not in ("train", "eval") or not isinstance(record["step"], int):
          raise ValueError(f"no record of a step: {line[:80]}")
      except files.DAMAGED as error:
        if number < len(lines):  # an incomplete last line is what a killed process leaves
          print(f"{self._path}, line {number} is damaged ({error}): skipped", file=sys.stderr)
        continue
      records.append(record)
    return History(
      [record for record in records if record["kind"] == "train"],
      [record for record in records if record["kind"] == "eval"],
    )

  def truncate(self, step: int, *, keep_eval: bool = True, write: bool = True) -> History:
    """Drops the records that a run resumed at `step` will write again; returns the others.

    Args:
      step: updates that the restored state has seen.
      keep_eval: whether to keep an evaluation of the restored state.
      write: whether to change the file; only one process of a run does.

    Raises:
      OSError: the file cannot be replaced; the old one is untouched.
    """
    history = self.read()
    kept = History(
      [record for record in history if record["step"] < step],
      [record for record in history.evals if record["step"] < step + keep_eval],
    )
    if write and self._path.exists():
      self.close()
      merged = sorted([*kept, *kept.evals], key=lambda r: (r["step"], r["kind"] == "train"))
      text = "".join(json.dumps(_plain(r), allow_nan=False) + "\n" for r in merged)
      files.write_file(self._path, text)
    return kept

  def close(self) -> None:
    """Closes the file; `append` opens it again."""
    file, self._file = self._file, None
    if file is not None:
      with contextlib.suppress(OSError):  # `append` has already raised the error of a full disk
        file.close()


def clock(seconds: float) -> str:
  """Returns a duration as h:mm:ss, or m:ss below an hour.

  Example:
    >>> clock(59.6), clock(192), clock(7384)
    ('1:00', '3:12', '2:03:04')
  """
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def id_record(ids: np.ndarray) -> Any:
  """Returns the example ids of a batch as JSON: a list, or a hash of more than 256 ids."""
  ids = np.asarray(ids)
  if ids.size <= _MAX_IDS:
    return ids.tolist()
  return "sha256:" + hashlib.sha256(np.ascontiguousarray(ids).tobytes()).hexdigest()[:32]


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
  return {
    name: None if isinstance(value, float) and not math.isfinite(value) else value
    for name, value in record.items()
  }
