"""The record of a run: JSON lines first, then TensorBoard, Weights & Biases, a progress bar.

`metrics.jsonl` is what reports and figures are made from; everything else is a view. A training
record is `{"kind": "train", "step": n, "ids": ..., "seconds": ..., metric: value, ...}` with n the
number of updates before this one; an evaluation record has kind `eval` and n the updates
that the evaluated state has seen.
"""

import contextlib
import hashlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol, TextIO

import numpy as np

_MAX_IDS = 256


class History(list):
  """The training records of a run, oldest first; `evals` are its periodic evaluations."""

  def __init__(self, records=(), evals=()):
    super().__init__(records)
    self.evals = list(evals)


class Writer(Protocol):
  """Where records go besides `metrics.jsonl`."""

  def write(self, step: int, kind: str, scalars: Mapping[str, float]) -> None: ...

  def close(self) -> None: ...


class JsonLines:
  """`metrics.jsonl`: one record a line, flushed at once."""

  def __init__(self, path: pathlib.Path):
    self._path = pathlib.Path(path)
    self._file: TextIO | None = None

  def append(self, record: Mapping[str, Any]) -> None:
    """Writes one record; NaN and Inf, which JSON lacks, become null."""
    try:
      if self._file is None:
        self._file = self._path.open("a", encoding="utf-8")
      self._file.write(json.dumps(_plain(record), allow_nan=False) + "\n")
      self._file.flush()
    except OSError as error:
      raise _write_error(self._path, error) from error

  def read(self) -> History:
    """Returns all records; a line that a killed process left unfinished is skipped."""
    if not self._path.exists():
      return History()
    records = []
    for line in self._path.read_text(encoding="utf-8").splitlines():
      try:
        record = json.loads(line)
      except ValueError:
        continue
      records.append({k: math.nan if v is None else v for k, v in record.items()})
    return History(
      [record for record in records if record["kind"] == "train"],
      [record for record in records if record["kind"] == "eval"],
    )

  def truncate(self, step: int, *, keep_eval: bool = True, write: bool = True) -> History:
    """Drops the records of a future that a run resumed at `step` will repeat; returns the rest.

    Args:
      step: updates that the restored state has seen.
      keep_eval: whether an evaluation of that very state stays.
      write: False leaves the file to the process that owns it.

    The file is replaced as a whole: a full disk leaves the old one as it was.
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
      write_file(self._path, text)
    return kept

  def close(self) -> None:
    file, self._file = self._file, None
    if file is not None:
      with contextlib.suppress(OSError):  # what a full disk refused before, it refuses again
        file.close()


class TensorBoard:
  """Event files for TensorBoard; `purge_step` hides events of a future that is repeated."""

  def __init__(self, directory: pathlib.Path, purge_step: int = 0):
    import tensorboardX

    self._writer = tensorboardX.SummaryWriter(str(directory), purge_step=purge_step or None)

  def write(self, step: int, kind: str, scalars: Mapping[str, float]) -> None:
    for name, value in scalars.items():
      if math.isfinite(value):  # tensorboardX warns about others on every step
        self._writer.add_scalar(f"{kind}/{name}", value, step)

  def close(self) -> None:
    self._writer.close()


class Wandb:
  """Weights & Biases; needs `pip install wandb` and is imported only here."""

  def __init__(self, project: str, config: Mapping[str, Any], workdir: pathlib.Path):
    import wandb

    # The same id for the same folder, so that a resumed run continues its own charts.
    name = hashlib.sha256(str(pathlib.Path(workdir).absolute()).encode()).hexdigest()[:12]
    self._run = wandb.init(
      project=project, config=dict(config), dir=str(workdir), id=name, resume="allow"
    )

  def write(self, step: int, kind: str, scalars: Mapping[str, float]) -> None:
    self._run.log({f"{kind}/{name}": value for name, value in scalars.items()}, step=step)

  def close(self) -> None:
    self._run.finish()


class Progress:
  """A bar with rate, time left and the headline metric; plain lines where there is no terminal."""

  def __init__(self, start: int, total: int, headline: str, stream: TextIO | None = None):
    self._stream = sys.stderr if stream is None else stream
    self._total, self._headline, self._done = total, headline, start
    self.evaluated: Mapping[str, float] = {}  # where the headline is found if not in training
    self._first: tuple[int, float] | None = None  # after the compile, which would spoil the rate
    self._last_print = -math.inf
    self._bar: Any = None
    if self._stream.isatty():
      import tqdm

      self._bar = tqdm.tqdm(
        total=total, initial=start, file=self._stream, dynamic_ncols=True, unit="step"
      )

  def update(self, done: int, scalars: Mapping[str, float]) -> None:
    """Shows that `done` steps are complete, with the metrics of the last."""
    known = {**self.evaluated, **scalars}
    shown = {name: known[name] for name in ("loss", self._headline) if name in known}
    if self._bar is not None:
      self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
      self._bar.update(done - self._done)
      self._done = done
      return
    now = time.monotonic()
    self._done = done
    if self._first is None:
      self._first = (done, now)
    elif now - self._last_print < 5 and done < self._total:
      return
    self._last_print = now
    words = [f"step {done}/{self._total}", *(f"{k} {v:.4g}" for k, v in shown.items())]
    first_done, first_time = self._first
    if done > first_done:
      rate = (done - first_done) / max(now - first_time, 1e-9)
      words += [f"{rate:.3g} steps/s", f"{clock((self._total - done) / rate)} left"]
    self.say("  ".join(words))

  def say(self, text: str) -> None:
    """Prints a line without breaking the bar."""
    if self._bar is not None:
      self._bar.write(text, file=self._stream)
    else:
      print(text, file=self._stream, flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()


def clock(seconds: float) -> str:
  """Returns a duration as people write it.

  Example:
    >>> clock(59.6), clock(192), clock(7384)
    ('1:00', '3:12', '2:03:04')
  """
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def id_record(ids: np.ndarray) -> Any:
  """Returns the sample ids of a batch for the record: all of them, or a hash of many."""
  ids = np.asarray(ids)
  if ids.size <= _MAX_IDS:
    return ids.tolist()
  return "sha256:" + hashlib.sha256(np.ascontiguousarray(ids).tobytes()).hexdigest()[:32]


def write_file(path: pathlib.Path, data: str | bytes) -> None:
  """Writes a file whole or not at all: a full disk or a kill leaves the old one.

  Raises:
    OSError: if it cannot be written; the message names the file and the remedy.
  """
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    os.replace(temporary, path)
  except OSError as error:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    raise _write_error(path, error) from error


def _write_error(path: pathlib.Path, error: OSError) -> OSError:
  return OSError(
    f"cannot write {path}: {error.strerror or error}. What was there before is untouched: free "
    "some space or make the folder writable, then run the same command to continue."
  )


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
  return {
    name: None if isinstance(value, float) and not math.isfinite(value) else value
    for name, value in record.items()
  }
