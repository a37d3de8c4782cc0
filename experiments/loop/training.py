"""The training loop of all papers. A resumed run equals an uninterrupted one bit for bit.

The loop waits for the device as little as possible: it dispatches step n, then fetches the metrics
of step n - 1, and it reads the state only to save or evaluate it. The key of a step is
`fold_in(run_key, state.step)`, computed inside the compiled step, so a resumed run draws the same
random numbers. Before a checkpoint is written, the loss of its last step and all leaves of the
state are checked to be finite.
"""

import base64
import dataclasses
import math
import pathlib
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import sharding
from experiments import files
from experiments.loop import checkpointing, interruption, memory, presets, recorder, run_folder
from experiments.report import records, results

# Settings by which a step needs less memory.
_MEMORY_SETTINGS = ("train.batch_size", "algorithm.num_microbatches", "network.remat")


class RunError(RuntimeError):
  """The run had to stop; the message gives the step, the reason and the remedy."""


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What the loop needs to train a paper; `build` in `papers/<paper>.py` returns one.

  Attributes:
    init: `init(key, *init_args) -> State`, pure. `State` has a field `step` that counts its steps.
    update: `update(state, batch, key) -> (State, Metrics)`, pure, with all other arguments bound.
    batches: returns a new data iterator. `__next__` returns (ids `[B]`, batch of NumPy arrays),
      `get_state()` a JSON value or bytes, and `set_state()` accepts that value. Each process of a
      run over several hosts gets the whole batch; only its `sharding.local_rows` are read.
    headline: the main metric. The progress bar shows it, the report puts it first, and it decides
      which checkpoint is best.
    maximise: whether a higher headline is better.
    rules: how the state is sharded over the mesh.
    init_args: arrays passed to `init`, such as pretrained weights.
    saved: the part of a state that a checkpoint holds, where the rest is found elsewhere. It has
      `step` too. What is restored for an evaluation is this part.
    rebuilt: makes the state of it again.
    steps_per_update: how many steps one `update` takes, where it scans over several.
    evaluate: `evaluate(state) -> Result`, called every `eval.every` steps and at the end.
    sample: `sample(state) -> results.Table`, for `--mode=sample`.
    export: `export(state, folder)`, called once at the end with `workdir/model`.
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
  saved: Callable[[Any], Any] = lambda state: state
  rebuilt: Callable[[Any], Any] = lambda saved: saved
  steps_per_update: int = 1
  evaluate: Callable[[Any], results.Result] | None = None
  sample: Callable[[Any], results.Table] | None = None
  export: Callable[[Any, pathlib.Path], None] | None = None
  figures: Callable[[records.History, results.Result], list[results.Figure]] | None = None


class Outcome(NamedTuple):
  """The outcome of `train`.

  status: "finished" or "interrupted".  step: number of updates done.  history: training records.
  result: the final evaluation; None if the run was interrupted.
  signal: number of the signal that interrupted the run; 0 if none did.
  """

  status: str
  step: int
  history: records.History
  result: results.Result | None = None
  signal: int = 0


class _Pending(NamedTuple):
  """A step that was dispatched and whose metrics were not fetched yet."""

  step: int
  ids: np.ndarray
  metrics: Any


def train(
  experiment: Experiment, config: Any, workdir: pathlib.Path, *, wandb: str = ""
) -> Outcome:
  """Trains up to step `config.train.num_steps`, starting from the last checkpoint if there is one.

  Args:
    experiment: the paper's functions.
    config: a `ConfigDict` with `seed` and the sections `train`, `eval`, `checkpoint`, `sharding`.
    workdir: the folder of the run; see `run_folder`.
    wandb: a Weights & Biases project to log to as well; empty for none.

  Returns:
    The outcome. A finished run is not trained again; only its report is rewritten.

  Raises:
    ValueError: a setting is out of range, or `workdir` belongs to another run.
    RunError: a loss or a leaf of the state is not finite, or the data ended.
    CheckpointError: a checkpoint cannot be written, or none can be read.
  """
  presets.check(config)
  workdir = run_folder.claim(config, workdir)
  run = _Run(experiment, config, workdir)
  done = files.read_json(
    workdir / "results.json",
    lambda data: (data["step"], results.Result.from_json(data["result"])),
    otherwise="the last checkpoint is evaluated again",
  )
  if done is not None and done[0] == config.train.num_steps:
    run.recorder.read()
    print(f"{workdir} is finished: rewriting its report", file=sys.stderr)
    run.report(done[1])
    return Outcome("finished", done[0], run.recorder.history, done[1])
  files.write_json(workdir / "environment.json", run_folder.environment())
  warmup, num_steps = config.get("optimizer", {}).get("warmup_steps", 0), config.train.num_steps
  if warmup >= num_steps and run.primary:
    print(
      f"config.optimizer.warmup_steps={warmup} is not shorter than the run of {num_steps} steps: "
      "the learning rate rises to its end",
      file=sys.stderr,
    )
  try:
    return run.train(wandb)
  except RunError as error:
    run.recorder.read()
    run.report(results.Result(), warning=str(error))
    raise
  except jax.errors.JaxRuntimeError as error:
    reason = _failed_on_host(str(error))
    if reason is None:
      raise
    run.recorder.read()
    run.report(results.Result(), warning=reason)
    raise RunError(reason) from error
  finally:
    run.close()


def _failed_on_host(text: str) -> str | None:
  """Extracts the error of a reward or judge on the host from the text of JAX's error, or None."""
  found = list(re.finditer(r"(?m)^[\w.]*(Error|Exception): ", text))
  if "allback" not in text or not found:
    return None
  reason = text[found[-1].start() :].split("\n-----")[0].strip()
  return f"a function on the host failed inside a step: {reason} (--debug shows the traceback)"


def restore(
  experiment: Experiment, config: Any, workdir: pathlib.Path, which: str = "last"
) -> checkpointing.Restored:
  """Reads a saved state of a run onto this machine's mesh, for evaluation; writes nothing.

  Args:
    experiment: the experiment that was trained.
    config: the config of the run.
    workdir: the folder of the run.
    which: "last", "best" (by the headline metric) or a step.

  Raises:
    FileNotFoundError: the checkpoint does not exist.
    ValueError, CheckpointError: as `checkpointing.Checkpointer.restore`.
  """
  run = _Run(experiment, config, pathlib.Path(workdir), read_only=True)
  run.recorder.read()
  steps = run.checkpoints.steps()
  if not steps:
    raise FileNotFoundError(f"--workdir={workdir} has no checkpoint yet: train the run first")
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
  """Returns the mesh of a config.

  Where the sizes multiply to a proper divisor of the number of devices, the mesh uses the first
  devices and leaves the others idle.

  Raises:
    ValueError: the devices cannot form a mesh of these sizes.
  """
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
    self.primary = jax.process_index() == 0
    self.recorder = recorder.Recorder(folder, experiment.headline, primary=self.primary)
    self.checkpoints = checkpointing.Checkpointer(
      folder / "checkpoints",
      keep=config.checkpoint.keep,
      scores=self.recorder.scores,
      maximise=experiment.maximise,
      read_only=read_only,
    )
    self.saved_step = -1
    self.iterator: Any = None

  # --- the loop -----------------------------------------------------------------------------------

  def train(self, wandb: str) -> Outcome:
    """Runs the loop from the last checkpoint to the last step, or until a signal."""
    num_steps = self.config.train.num_steps
    self.iterator = self.experiment.batches()
    state, start = self._start()
    self.recorder.start(start, num_steps, self.config, wandb)
    if start:
      self.recorder.say(f"resuming {self.folder} at step {start} of {num_steps}")
    step_fn = sharding.jit_update(
      _with_step_key(self.experiment.update), self.mesh, self.experiment.rules
    )
    step, pending = start, None
    with interruption.Listener() as signals:
      # A run that was interrupted before an evaluation does it now.
      self._evaluate_if_due(state, step)
      while step < num_steps and not signals.stop(step):
        ids, batch = self._next_batch(step)
        # Each process has the whole batch and places the rows of its own devices.
        batch = sharding.shard_batch(batch, self.mesh, whole=True)
        if step == start:
          self._say_memory(step_fn.lower(state, batch, self.key))
        state, step_metrics = step_fn(state, batch, self.key)
        if pending is not None:
          self._log(pending)
        pending = _Pending(step, ids, step_metrics)
        step += 1
        if self._is_boundary(step):
          self._log(pending)
          pending = None
          if self._is_due("checkpoint", step) or step == num_steps:
            self._save(state, step)
          if not signals.received:
            self._evaluate_if_due(state, step)
      if pending is not None:
        self._log(pending)
      if signals.received:
        if step > start or start == 0:
          self._save(state, step)
        self.checkpoints.wait()
        self.recorder.say(
          f"{signal.Signals(signals.received).name}: saved step {step} of {num_steps} in "
          f"{self.folder}. Run the same command to continue."
        )
        return Outcome("interrupted", step, self.recorder.history, signal=signals.received)
    self.checkpoints.wait()
    result = self._finish(state, step)
    return Outcome("finished", step, self.recorder.history, result)

  def _start(self) -> tuple[Any, int]:
    restored = self.checkpoints.restore_last(self.target())
    if restored is None:
      args = (self.key, *self.experiment.init_args)
      return sharding.init_sharded(self.experiment.init, self.mesh, self.experiment.rules, *args), 0
    record = restored.record
    if int(restored.state.step) != restored.step * self.experiment.steps_per_update:
      raise RunError(
        f"checkpoint {restored.step} holds a state of step {restored.state.step}: restore the "
        "folder from a backup, or start again in a new --workdir"
      )
    self.key = jax.random.wrap_key_data(
      jnp.asarray(record["key"]["data"], jnp.uint32), impl=record["key"]["impl"]
    )
    self.iterator.set_state(_decode(record["data"]))
    self.saved_step = restored.step
    return self.experiment.rebuilt(restored.state), restored.step

  def target(self) -> Any:
    """Returns what a checkpoint holds as a pytree of `jax.ShapeDtypeStruct` with shardings."""
    shapes = jax.eval_shape(
      lambda *args: self.experiment.saved(self.experiment.init(*args)),
      *(self.key, *self.experiment.init_args),
    )
    shardings = sharding.infer_shardings(shapes, self.experiment.rules, self.mesh)
    return jax.tree.map(
      lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), shapes, shardings
    )

  def _say_memory(self, program: jax.stages.Lowered) -> None:
    fields = files.flatten(self.config.to_dict())
    levers = [name for name in _MEMORY_SETTINGS if name in fields]
    if words := memory.of_step(program, self.mesh.local_devices, levers):
      self.recorder.say(words)

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

  def _log(self, pending: _Pending) -> None:
    """Waits for the metrics of one step, checks that the loss is finite, and records them."""
    step = pending.step
    scalars = {name: float(x) for name, x in jax.device_get(pending.metrics).items()}
    bad = [name for name, x in scalars.items() if is_loss(name) and not math.isfinite(x)]
    last = step + 1 == self.config.train.num_steps
    if bad or last or step % self.config.train.log_every == 0:
      self.recorder.train(step, pending.ids, scalars)
    if bad:
      raise RunError(
        f"{bad[0]} is {scalars[bad[0]]} at step {step}: stopped. {self._last_good()} A smaller "
        "learning rate or stronger clipping is the usual remedy; it needs a new --workdir."
      )
    self.recorder.advance(step + 1, scalars)

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
      self.checkpoints.save(step, self.experiment.saved(state), record)
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
      return "No checkpoint was written before."
    return f"The last good checkpoint is step {steps[-1]} in {self.folder / 'checkpoints'}."

  def _evaluate_if_due(self, state: Any, step: int) -> None:
    final = step == self.config.train.num_steps
    known = any(record["step"] == step for record in self.recorder.history.evals)
    if self.experiment.evaluate and self._is_due("eval", step) and not final and not known:
      self._evaluate(state, step)

  def _evaluate(self, state: Any, step: int) -> results.Result:
    if self.experiment.evaluate is None:
      return results.Result()
    result = self.experiment.evaluate(state)
    self.recorder.evaluation(step, result)
    return result

  # --- the end ------------------------------------------------------------------------------------

  def _finish(self, state: Any, step: int) -> results.Result:
    self.recorder.end()
    result = self._evaluate(state, step)
    if self.experiment.export is not None and self.primary:
      self.experiment.export(state, self.folder / "model")
    elif self.experiment.export is not None:
      # What it computes needs all processes, what it writes only one.
      with tempfile.TemporaryDirectory() as scratch:
        self.experiment.export(state, pathlib.Path(scratch) / "model")
    # `results.json` marks the run as finished, so it is written last: the figures of an evaluation
    # cannot be drawn without the evaluation.
    self.report(result)
    if self.primary:
      files.write_json(self.folder / "results.json", {"step": step, "result": result.to_json()})
    return result

  def report(self, result: results.Result, warning: str = "") -> None:
    """Draws the figures and writes `report.html`; `warning` says why the run had to stop."""
    if not self.primary:
      return
    from experiments.report import report  # imports Matplotlib, which only reports need

    draw, history = self.experiment.figures, self.recorder.history
    report.write_run(
      self.folder,
      self.config,
      result,
      headline=self.experiment.headline,
      figures=draw(history, result) if draw and not warning else (),
      history=history,
      warning=warning,
    )

  def close(self) -> None:
    """Closes all files; an error in closing must not hide the error that ended the run."""
    failing = sys.exc_info()[0] is not None
    for thing in (self.recorder, self.checkpoints):
      try:
        thing.close()
      except OSError:
        if not failing:
          raise


def is_loss(name: str) -> bool:
  """Returns whether a metric is a loss (`loss`, `x/loss`, `x_loss`), which must stay finite."""
  return name.rsplit("/", 1)[-1].endswith("loss")


def _with_step_key(update: Callable[..., Any]) -> Callable[..., Any]:
  """Returns `update` with the key of the run folded with the step."""

  def update_at_step(state, batch, key):
    return update(state, batch, jax.random.fold_in(key, state.step))

  return update_at_step


def _encode(state: Any) -> Any:
  """Returns the position of a data iterator as a JSON value."""
  return {"base64": base64.b64encode(state).decode()} if isinstance(state, bytes) else state


def _decode(state: Any) -> Any:
  if isinstance(state, dict) and state.keys() == {"base64"}:
    return base64.b64decode(state["base64"])
  return state
