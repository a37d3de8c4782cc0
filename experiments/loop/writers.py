"""Writers that show a run while it trains: TensorBoard, Weights & Biases, a progress bar."""

import contextlib
import hashlib
import math
import pathlib
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TextIO

from experiments import files
from experiments.report import records


class Writer(Protocol):
  """A second destination of the records, besides `metrics.jsonl`."""

  def write(self, step: int, kind: str, scalars: Mapping[str, float]) -> None:
    """Writes the metrics of a step; `kind` is "train" or "eval"."""

  def close(self) -> None:
    """Flushes and closes the destination."""


class TensorBoard:
  """Writes an event file; TensorBoard hides earlier events from `purge_step` on.

  Events are written by the thread that calls. The `SummaryWriter` of tensorboardX has a thread of
  its own, which a full disk ends with a traceback, and whose callers then wait for ever.

  Raises:
    OSError: the file cannot be written; the message names it and the remedy.
  """

  def __init__(self, directory: pathlib.Path, purge_step: int = 0):
    from tensorboardX import record_writer
    from tensorboardX.proto import event_pb2

    self._new_event = event_pb2.Event
    # In order of time, as TensorBoard reads them.
    self._path = directory / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
    self._flushed = -math.inf
    with self._named_errors():
      directory.mkdir(parents=True, exist_ok=True)
      self._file = record_writer.RecordWriter(str(self._path))
    self._add(file_version="brain.Event:2")
    if purge_step:
      start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._add(step=purge_step, session_log=start)

  def write(self, step: int, kind: str, scalars: Mapping[str, float]) -> None:
    from tensorboardX import summary

    for name, value in scalars.items():
      if math.isfinite(value):  # tensorboardX warns at every step about other values
        self._add(step=step, summary=summary.scalar(f"{kind}/{name}", value))
    if time.monotonic() - self._flushed > 10:  # a flush waits for the disk
      with self._named_errors():
        self._file.flush()
      self._flushed = time.monotonic()

  def _add(self, **fields: Any) -> None:
    with self._named_errors():
      self._file.write(self._new_event(wall_time=time.time(), **fields).SerializeToString())

  @contextlib.contextmanager
  def _named_errors(self) -> Iterator[None]:
    try:
      yield
    except OSError as error:
      raise files.write_error(self._path, error) from error

  def close(self) -> None:
    with self._named_errors():
      self._file.close()


class Wandb:
  """Logs to Weights & Biases; needs `pip install wandb`, which is imported only here."""

  def __init__(self, project: str, config: Mapping[str, Any], workdir: pathlib.Path):
    import wandb

    # The id is a hash of the folder, so that a resumed run continues its charts.
    name = hashlib.sha256(str(pathlib.Path(workdir).absolute()).encode()).hexdigest()[:12]
    self._run = wandb.init(
      project=project, config=dict(config), dir=str(workdir), id=name, resume="allow"
    )

  def write(self, step: int, kind: str, scalars: Mapping[str, float]) -> None:
    self._run.log({f"{kind}/{name}": value for name, value in scalars.items()}, step=step)

  def close(self) -> None:
    self._run.finish()


class Progress:
  """Shows rate, time left and headline metric: a bar in a terminal, plain lines elsewhere."""

  def __init__(self, start: int, total: int, headline: str, stream: TextIO | None = None):
    self._stream = sys.stderr if stream is None else stream
    self._total, self._headline, self._done = total, headline, start
    self.evaluated: Mapping[str, float] = {}  # metrics of the last evaluation
    self._first: tuple[int, float] | None = None  # the rate excludes compilation
    self._last_print = -math.inf
    self._bar: Any = None
    if self._stream.isatty():
      import tqdm

      self._bar = tqdm.tqdm(
        total=total, initial=start, file=self._stream, dynamic_ncols=True, unit="step"
      )

  def update(self, done: int, scalars: Mapping[str, float]) -> None:
    """Shows that `done` steps are complete, and the metrics of the last one."""
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
      words += [f"{rate:.3g} steps/s", f"{records.clock((self._total - done) / rate)} left"]
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
