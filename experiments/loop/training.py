"""One loop for all papers, resumable to the bit.

The loop never waits for the device except where it must: the metrics of step n - 1 are fetched
after step n has been dispatched, and state is read only to save or to evaluate it. The key of a
step is `fold_in(run_key, state.step)`, drawn inside the compiled step, so a resumed run draws the
same numbers. A checkpoint is written only after the metrics of its own last step have been seen
and every leaf has been found finite.
"""

import base64
import dataclasses
import io
import math
import pathlib
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import sharding
from experiments import files
from experiments.loop import checkpointing, interruption, presets, run_folder, writers
from experiments.report import records, results


class RunError(RuntimeError):
  """A run that had to stop; the message says where, why and what to do."""


@dataclasses.dataclass(frozen=True)
class Experiment:
  """The seam between a paper and the loop: what `papers/<paper>.py` builds.

  Attributes:
    init: `init(key, *init_args) -> State`, pure; `State` has a field `step` that counts updates.
    update: `update(state, batch, key) -> (State, Metrics)`, everything else already bound.
    batches: makes the data iterator: `__next__` gives (ids `[B]`, batch of NumPy arrays),
      `get_state()` a JSON value or bytes, `set_state()` takes it back.
    headline: the metric on the progress bar, first in the report, and by which `best` is meant.
    maximise: whether more of it is better.
    rules: how the state is split over the mesh.
    init_args: arrays passed to `init`, such as pretrained weights.
    evaluate: `evaluate(state) -> Result`, every `eval.every` steps and at the end.
    sample: `sample(state) -> results.Table`, for `--mode=sample`.
    export: `export(state, folder)`, once at the end, into `workdir/model`.
    figures: `figures(history, result) -> list[results.Figure]`; `history.evals` holds the periodic
      evaluations.
  """

  init: Callable[..., Any]
  update: Callable[[Any, Any, jax.Array], tuple[Any, Any]]
  batches: Callable[[], Iterator[tuple[np.ndarray, Any]]]
  headline: str
  maximise: bool = True
  rules: sharding.Rules = sharding.REPLICATED
  init_args: tuple[Any, ...] = ()
  evaluate: Callable[[Any], results.Result] | None = None
  sample: Callable[[Any], results.Table] | None = None
  export: Callable[[Any, pathlib.Path], None] | None = None
  figures: Callable[[records.History, results.Result], list[results.Figure]] | None = None


class Outcome(NamedTuple):
  """How a call of `train` ended.

  status: `finished` or `interrupted`.  step: updates done.  history: training records.
  result: the final evaluation, None if interrupted.  signal: what interrupted the run, or 0.
  """

  status: str
  step: int
  history: records.History
  result: results.Result | None = None
  signal: int = 0


class _Pending(NamedTuple):
  step: int
  ids: np.ndarray
  metrics: Any


def train(
  experiment: Experiment, config: Any, workdir: pathlib.Path, *, wandb: str = ""
) -> Outcome:
  """Trains to `config.train.num_steps`, from the last checkpoint of `workdir` if there is one.

  Args:
    experiment: what to train.
    config: a `ConfigDict` with `seed` and the sections `train`, `eval`, `checkpoint`, `sharding`.
    workdir: the folder of the run; see `run_folder`.
    wandb: a Weights & Biases project to write to as well; empty for none.

  Returns:
    The outcome. A workdir that is finished already is not trained again: only its report is
    made anew.

  Raises:
    ValueError: if a setting is out of range, or `workdir` is not this run's.
    RunError: if a loss or a leaf is not finite, or the data ran out.
    CheckpointError: if a checkpoint cannot be written, or none can be read.
  """
  presets.check(config)
  workdir = run_folder.claim(config, workdir)
  run = _Run(experiment, config, workdir)
  done = files.read_json(workdir / "results.json")
  if done is not None and done["step"] == config.train.num_steps:
    history = run.records.read()
    result = results.Result.from_json(done["result"])
    print(f"{workdir} is finished: making its report again", file=sys.stderr)
    run.report(history, result)
    return Outcome("finished", done["step"], history, result)
  files.write_json(workdir / "environment.json", run_folder.environment())
  try:
    return run.train(wandb)
  except RunError as error:
    run.report(run.records.read(), results.Result(), warning=str(error))
    raise
  except jax.errors.JaxRuntimeError as error:
    reason = _failed_on_host(str(error))
    if reason is None:
      raise
    run.report(run.records.read(), results.Result(), warning=reason)
    raise RunError(reason) from error
  finally:
    run.close()


def _failed_on_host(text: str) -> str | None:
  """What host code under a compiled step (a reward, a judge) raised, out of JAX's tracebacks."""
  found = list(re.finditer(r"(?m)^[\w.]*(Error|Exception): ", text))
  if "allback" not in text or not found:
    return None
  reason = text[found[-1].start() :].split("\n-----")[0].strip()
  return f"a function on the host failed inside a step, {reason} (--debug shows where)"


def restore(
  experiment: Experiment, config: Any, workdir: pathlib.Path, which: str = "last"
) -> checkpointing.Restored:
  """Returns a saved state of a run on this machine's mesh, for evaluation; writes nothing.

  Args:
    experiment: the experiment that was trained.
    config: its config.
    workdir: its folder.
    which: `last`, `best` (by the headline metric) or a step.

  Raises:
    FileNotFoundError: if there is no such checkpoint.
    ValueError, CheckpointError: as `checkpointing.Checkpointer.restore`.
  """
  run = _Run(experiment, config, pathlib.Path(workdir), read_only=True)
  run.load_scores(run.records.read())
  steps = run.checkpoints.steps()
  if not steps:
    raise FileNotFoundError(f"--workdir={workdir} has no checkpoint yet: train it first")
  if which == "last":
    restored = run.checkpoints.restore_last(run.target())
    assert restored is not None
    return restored
  step = run.checkpoints.best_step() if which == "best" else int(which) if which.isdigit() else -1
  if step not in steps:
    raise FileNotFoundError(
      f"--checkpoint={which}: {workdir} has checkpoints of steps {', '.join(map(str, steps))}"
    )
  return run.checkpoints.restore(step, run.target())


def make_mesh(axes: Any) -> jax.sharding.Mesh:
  """Returns the mesh of a config; sizes that divide the devices without -1 use the first ones."""
  sizes = {name: int(size) for name, size in axes.items()}
  devices, wanted = jax.devices(), math.prod(sizes.values())
  if 0 < wanted < len(devices) and len(devices) % wanted == 0 and jax.process_count() == 1:
    devices = devices[:wanted]
  return sharding.make_mesh(sizes, devices)


class _Run:
  """One run: the experiment, its folder, and the steps between them."""

  def __init__(
    self, experiment: Experiment, config: Any, folder: pathlib.Path, *, read_only: bool = False
  ):
    self.experiment, self.config, self.folder = experiment, config, folder
    self.mesh = make_mesh(config.sharding.mesh)
    self.key = jax.random.key(config.seed)
    self.records = records.JsonLines(folder / "metrics.jsonl")
    self.scores: dict[int, float] = {}  # step of a state -> headline metric
    self.checkpoints = checkpointing.Checkpointer(
      folder / "checkpoints",
      keep=config.checkpoint.keep,
      scores=self.scores,
      maximise=experiment.maximise,
      read_only=read_only,
    )
    self.primary = jax.process_index() == 0
    self.writers: list[writers.Writer] = []
    self.progress: Any = None
    self.start_time = time.monotonic()
    self.saved_step = -1
    self.iterator: Any = None

  # --- the loop -----------------------------------------------------------------------------------

  def train(self, wandb: str) -> Outcome:
    num_steps = self.config.train.num_steps
    self.iterator = self.experiment.batches()
    state, start = self._start()
    # The evaluation of the last step is repeated: the report needs its tables.
    history = self.records.truncate(start, keep_eval=start < num_steps, write=self.primary)
    self.load_scores(history)
    if history:  # the time before an interruption counts too
      self.start_time -= history[-1]["seconds"]
    if self.primary:
      self.writers.append(writers.TensorBoard(self.folder / "tensorboard", purge_step=start))
      if wandb:
        self.writers.append(writers.Wandb(wandb, self.config.to_dict(), self.folder))
    stream = None if self.primary else io.StringIO()  # one host speaks
    self.progress = writers.Progress(start, num_steps, self.experiment.headline, stream)
    if start:
      self.progress.say(f"resuming {self.folder} at step {start} of {num_steps}")
    step_fn = sharding.jit_update(
      _with_step_key(self.experiment.update), self.mesh, self.experiment.rules
    )
    step, pending = start, None
    with interruption.Listener() as signals:
      self._evaluate_if_due(state, step, history)  # a resumed run may owe one
      while step < num_steps and not signals.stop(step):
        ids, batch = self._next_batch(step)
        state, step_metrics = step_fn(state, batch, self.key)
        if pending is not None:
          self._log(pending, history)
        pending = _Pending(step, ids, step_metrics)
        step += 1
        if self._is_boundary(step):
          self._log(pending, history)
          pending = None
          if self._is_due("checkpoint", step) or step == num_steps:
            self._save(state, step)
          if not signals.received:
            self._evaluate_if_due(state, step, history)
      if pending is not None:
        self._log(pending, history)
      if signals.received:
        if step > start or start == 0:
          self._save(state, step)
        self.checkpoints.wait()
        self.progress.say(
          f"{signal.Signals(signals.received).name}: saved step {step} of {num_steps} in "
          f"{self.folder}. Run the same command to continue."
        )
        return Outcome("interrupted", step, history, signal=signals.received)
    self.checkpoints.wait()
    return Outcome("finished", step, history, self._finish(state, step, history))

  def _start(self) -> tuple[Any, int]:
    restored = self.checkpoints.restore_last(self.target())
    if restored is None:
      args = (self.key, *self.experiment.init_args)
      return sharding.init_sharded(self.experiment.init, self.mesh, self.experiment.rules, *args), 0
    record = restored.record
    if int(restored.state.step) != restored.step:
      raise RunError(f"checkpoint {restored.step} holds a state of step {restored.state.step}")
    self.key = jax.random.wrap_key_data(
      jnp.asarray(record["key"]["data"], jnp.uint32), impl=record["key"]["impl"]
    )
    self.iterator.set_state(_decode(record["data"]))
    self.saved_step = restored.step
    return restored.state, restored.step

  def target(self) -> Any:
    """Returns shapes, dtypes and shardings of the state."""
    shapes = jax.eval_shape(self.experiment.init, self.key, *self.experiment.init_args)
    shardings = sharding.infer_shardings(shapes, self.experiment.rules, self.mesh)
    return jax.tree.map(
      lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), shapes, shardings
    )

  def _next_batch(self, step: int) -> tuple[np.ndarray, Any]:
    try:
      return next(self.iterator)
    except StopIteration:
      raise RunError(
        f"the data ended after step {step} of train.num_steps={self.config.train.num_steps}: "
        "lower train.num_steps, or let the data repeat"
      ) from None

  def _is_due(self, section: str, step: int) -> bool:
    every = self.config[section].every
    return every > 0 and step > 0 and step % every == 0

  def _is_boundary(self, step: int) -> bool:
    last = step == self.config.train.num_steps
    return last or self._is_due("checkpoint", step) or self._is_due("eval", step)

  def _log(self, pending: _Pending, history: records.History) -> None:
    """Waits for the metrics of one step, checks and records them."""
    step = pending.step
    scalars = {name: float(x) for name, x in jax.device_get(pending.metrics).items()}
    bad = [name for name, x in scalars.items() if is_loss(name) and not math.isfinite(x)]
    last = step + 1 == self.config.train.num_steps
    if bad or last or step % self.config.train.log_every == 0:
      seconds = round(time.monotonic() - self.start_time, 3)
      ids = records.id_record(pending.ids)
      record = {"kind": "train", "step": step, "seconds": seconds, "ids": ids, **scalars}
      history.append(record)
      self._record(record, step, "train", scalars)
    if bad:
      raise RunError(
        f"{bad[0]} is {scalars[bad[0]]} at step {step}: stopped. {self._last_good()} A smaller "
        "learning rate or stronger clipping is the usual remedy; it needs a new --workdir."
      )
    if self.experiment.headline in scalars:
      self.scores[step + 1] = scalars[self.experiment.headline]
    self.progress.update(step + 1, scalars)

  def _save(self, state: Any, step: int) -> None:
    if step == self.saved_step:
      return
    record = {
      "data": _encode(self.iterator.get_state()),
      "key": {
        "impl": str(jax.random.key_impl(self.key)),
        "data": np.asarray(jax.random.key_data(self.key)).tolist(),
      },
      "config": self.config.to_dict(),
    }
    try:
      self.checkpoints.save(step, state, record)
    except checkpointing.NotFiniteError as error:
      raise RunError(
        f"the state is {error} after step {step - 1}: stopped. {self._last_good()} A smaller "
        "learning rate or stronger clipping is the usual remedy; it needs a new --workdir."
      ) from error
    self.saved_step = step

  def _last_good(self) -> str:
    self.checkpoints.wait()
    steps = self.checkpoints.steps()
    if not steps:
      return "No checkpoint had been written before."
    return f"The last good checkpoint is step {steps[-1]} in {self.folder / 'checkpoints'}."

  def _evaluate_if_due(self, state: Any, step: int, history: records.History) -> None:
    final = step == self.config.train.num_steps
    known = any(record["step"] == step for record in history.evals)
    if self.experiment.evaluate and self._is_due("eval", step) and not final and not known:
      self._evaluate(state, step, history)

  def _evaluate(self, state: Any, step: int, history: records.History) -> results.Result:
    if self.experiment.evaluate is None:
      return results.Result()
    result = self.experiment.evaluate(state)
    scalars = result.scalars()
    record = {"kind": "eval", "step": step, **scalars}
    history.evals.append(record)
    self._record(record, step, "eval", scalars)
    if self.experiment.headline in scalars:
      self.scores[step] = scalars[self.experiment.headline]
      self.progress.evaluated = scalars
    if self.primary:
      words = "  ".join(f"{name} {value}" for name, value in list(result.metrics.items())[:4])
      self.progress.say(f"evaluation at step {step}: {words}")
    return result

  def _record(self, record: dict[str, Any], step: int, kind: str, scalars: dict[str, float]):
    if self.primary:
      self.records.append(record)
    for writer in self.writers:
      writer.write(step, kind, scalars)

  # --- the end ------------------------------------------------------------------------------------

  def _finish(self, state: Any, step: int, history: records.History) -> results.Result:
    self.progress.close()
    result = self._evaluate(state, step, history)
    if self.experiment.export is not None:
      self.experiment.export(state, self.folder / "model")
    # The figures of an evaluation cannot be drawn again without it: files first, then the mark.
    self.report(history, result)
    if self.primary:
      files.write_json(self.folder / "results.json", {"step": step, "result": result.to_json()})
    return result

  def report(self, history: records.History, result: results.Result, warning: str = "") -> None:
    """Draws the figures and writes `report.html`."""
    if not self.primary:
      return
    from experiments.report import report  # imports Matplotlib, which a run needs only here

    draw = self.experiment.figures
    report.write_run(
      self.folder,
      self.config,
      result,
      headline=self.experiment.headline,
      figures=draw(history, result) if draw and not warning else (),
      history=history,
      warning=warning,
    )

  def load_scores(self, history: records.History) -> None:
    """Reads the headline metric of every state from the record."""
    name = self.experiment.headline
    for rows, offset in ((history, 1), (history.evals, 0)):
      for record in rows:
        if name in record and math.isfinite(record[name]):
          self.scores[record["step"] + offset] = record[name]

  def close(self) -> None:
    """Frees what the run holds; an error on the way out must not hide the first one."""
    failing = sys.exc_info()[0] is not None
    if self.progress is not None:
      self.progress.close()
    self.records.close()
    closers: list[Any] = [*self.writers, self.checkpoints]
    for thing in closers:
      try:
        thing.close()
      except OSError:
        if not failing:
          raise


def is_loss(name: str) -> bool:
  """Whether a metric is a loss, whose NaN or Inf stops the run: `loss`, `x/loss`, `x_loss`."""
  return name.rsplit("/", 1)[-1].endswith("loss")


def _with_step_key(update: Callable[..., Any]) -> Callable[..., Any]:
  def update_at_step(state, batch, key):
    return update(state, batch, jax.random.fold_in(key, state.step))

  return update_at_step


def _encode(state: Any) -> Any:
  return {"base64": base64.b64encode(state).decode()} if isinstance(state, bytes) else state


def _decode(state: Any) -> Any:
  if isinstance(state, dict) and state.keys() == {"base64"}:
    return base64.b64decode(state["base64"])
  return state
