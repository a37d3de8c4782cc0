"""What a run writes down while it trains: records, TensorBoard, progress, scores of its states."""

import io
import math
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.loop import writers
from experiments.report import records, results


class Recorder:
  """The records of one run, in `metrics.jsonl` and wherever else a user wants to see them.

  Of several processes only one writes; the others keep the history and the scores in memory.

  Attributes:
    history: the records of the steps before the next one.
    scores: step of a state -> headline metric; decides which checkpoint is best.
  """

  def __init__(self, folder: pathlib.Path, headline: str, *, primary: bool):
    self._folder, self._headline, self._primary = folder, headline, primary
    self._file = records.JsonLines(folder / "metrics.jsonl")
    self._writers: list[writers.Writer] = []
    self._progress: writers.Progress | None = None
    self._start_time = time.monotonic()
    self.history = records.History()
    self.scores: dict[int, float] = {}

  def read(self) -> records.History:
    """Reads the records of the folder, and the scores of its states."""
    self.history = self._file.read()
    self._load_scores()
    return self.history

  def start(self, step: int, num_steps: int, config: Any, wandb: str = "") -> None:
    """Drops the records that a run from `step` writes again, and opens everything.

    Args:
      step: updates that the restored state has seen.
      num_steps: updates of the whole run.
      config: the config of the run, for Weights & Biases.
      wandb: a Weights & Biases project to log to as well; empty for none.

    Raises:
      OSError: a file cannot be written.
    """
    # The final evaluation is done again, because the report needs its tables.
    self.history = self._file.truncate(step, keep_eval=step < num_steps, write=self._primary)
    self._load_scores()
    if self.history:  # the clock includes the time before an interruption
      self._start_time -= self.history[-1]["seconds"]
    if self._primary:
      self._writers.append(writers.TensorBoard(self._folder / "tensorboard", purge_step=step))
      if wandb:
        self._writers.append(writers.Wandb(wandb, config.to_dict(), self._folder))
    stream = None if self._primary else io.StringIO()  # only one host prints
    self._progress = writers.Progress(step, num_steps, self._headline, stream)

  def _load_scores(self) -> None:
    for rows, offset in ((self.history, 1), (self.history.evals, 0)):
      for record in rows:
        if self._headline in record and math.isfinite(record[self._headline]):
          self.scores[record["step"] + offset] = record[self._headline]

  def say(self, words: str) -> None:
    """Prints a line above the progress bar."""
    assert self._progress is not None
    self._progress.say(words)

  def train(self, step: int, ids: np.ndarray, scalars: Mapping[str, float]) -> None:
    """Records the metrics and the example ids of the step that follows `step` updates."""
    seconds = round(time.monotonic() - self._start_time, 3)
    record = {"kind": "train", "step": step, "seconds": seconds}
    record = {**record, "ids": records.id_record(ids), **scalars}
    self.history.append(record)
    self._write(record, scalars)

  def advance(self, step: int, scalars: Mapping[str, float]) -> None:
    """Moves the progress bar to `step` updates, and keeps the score of that state."""
    assert self._progress is not None
    if self._headline in scalars:
      self.scores[step] = scalars[self._headline]
    self._progress.update(step, scalars)

  def evaluation(self, step: int, result: results.Result) -> None:
    """Records the evaluation of the state after `step` updates."""
    assert self._progress is not None
    scalars = result.scalars()
    record = {"kind": "eval", "step": step, **scalars}
    self.history.evals.append(record)
    self._write(record, scalars)
    if self._headline in scalars:
      self.scores[step] = scalars[self._headline]
      self._progress.evaluated = scalars
    if self._primary:
      words = "  ".join(f"{name} {value}" for name, value in list(result.metrics.items())[:4])
      self.say(f"evaluation at step {step}: {words}")

  def _write(self, record: Mapping[str, Any], scalars: Mapping[str, float]) -> None:
    if self._primary:
      self._file.append(record)
    for writer in self._writers:
      writer.write(record["step"], record["kind"], scalars)

  def end(self) -> None:
    """Ends the progress bar."""
    if self._progress is not None:
      self._progress.close()

  def close(self) -> None:
    """Closes all files; an error in closing must not hide the error that ended the run."""
    failing = sys.exc_info()[0] is not None
    self.end()
    self._file.close()
    for writer in self._writers:
      try:
        writer.close()
      except OSError:
        if not failing:
          raise
