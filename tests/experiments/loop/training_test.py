"""Tests of loop.training: one loop, no needless waiting, resumable to the bit."""

import dataclasses
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading

import fake_paper
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

import sharding
from experiments.loop import checkpointing, training, writers
from experiments.report import plots, records


def _config(**fields):
  config = fake_paper.get_config()
  for name, value in fields.items():
    *sections, last = name.split("__")
    section = config
    for part in sections:
      section = section[part]
    section[last] = value
  return config


def _train(folder, config=None, experiment=None):
  config = _config() if config is None else config
  experiment = fake_paper.build(config) if experiment is None else experiment
  return training.train(experiment, config, folder)


def _bits(folder, config=None):
  config = _config() if config is None else config
  restored = training.restore(fake_paper.build(config), config, folder)

  def to_numpy(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)

  return restored.step, [
    (x.dtype, x.tobytes()) for x in map(to_numpy, jax.tree.leaves(restored.state))
  ]


def _records(folder):
  records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  for record in records:
    record.pop("seconds", None)
  return records


def _interrupting(config, at, action):
  """The experiment, with `action` called while the batch of step `at` is fetched."""
  experiment = fake_paper.build(config)

  class Data(fake_paper.Data):
    def __next__(self):
      if self.position == at:
        action()
      return super().__next__()

  def batches():
    return Data(config.seed, config.data.batch_size, config.data.stop)

  return training.dataclasses.replace(experiment, batches=batches)


class Crash(Exception):
  """Stands for the process being killed: nothing of ours handles it."""


def _crash():
  raise Crash


@pytest.fixture(scope="module", autouse=True)
def _no_drawing():
  """Matplotlib would take most of the time; report_test draws."""
  before = plots.save_figure

  def save(figure, folder):
    folder.mkdir(exist_ok=True)
    (folder / f"{figure.name}.svg").write_text("<svg/>")

  plots.save_figure = save
  yield
  plots.save_figure = before


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  """A run from start to end, evaluated on the way; made once."""
  folder = tmp_path_factory.mktemp("uninterrupted") / "run"
  _train(folder, _config(eval__every=3))
  return folder


@pytest.mark.parametrize(
  ("at", "how"),
  [
    (0, signal.SIGTERM),
    (2, signal.SIGTERM),  # an evaluation is due after the step
    (3, signal.SIGTERM),  # a checkpoint is due after the step
    (5, signal.SIGINT),
    (11, signal.SIGTERM),  # the last step
    (2, "crash"),  # before the first checkpoint
    (6, "crash"),
  ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, uninterrupted, at, how):
  config, folder = _config(eval__every=3), tmp_path / "run"
  if how == "crash":
    with pytest.raises(Crash):
      _train(folder, config, _interrupting(config, at, _crash))
  else:
    stop = _interrupting(config, at, lambda: os.kill(os.getpid(), how))
    outcome = _train(folder, config, stop)
    assert (outcome.status, outcome.signal) == ("interrupted", how)
    assert outcome.step == at + 1  # the step under way was finished
    assert not (folder / "results.json").exists()
    assert _bits(folder, config)[0] == at + 1

  outcome = _train(folder, config)

  assert outcome.status == "finished"
  assert _bits(folder, config) == _bits(uninterrupted, config)
  assert _records(folder) == _records(uninterrupted)  # sample ids, losses, evaluations, each once
  assert [r["step"] for r in _records(folder) if r["kind"] == "train"] == list(range(12))
  assert [r["step"] for r in _records(folder) if r["kind"] == "eval"] == [3, 6, 9, 12]
  history = records.JsonLines(folder / "metrics.jsonl").read()
  seconds = [record["seconds"] for record in history]
  assert seconds == sorted(seconds)  # the clock goes on where it stood


def test_the_signal_handlers_are_put_back(tmp_path):
  before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  config = _config()
  _train(tmp_path / "run", config, _interrupting(config, 2, lambda: os.kill(os.getpid(), 15)))
  assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_the_loop_runs_the_plain_update_with_keys_folded_by_step(tmp_path, uninterrupted):
  config = _config()
  experiment = fake_paper.build(config)
  key = jax.random.key(config.seed)
  state, data = experiment.init(key), experiment.batches()
  losses = []
  for _ in range(config.train.num_steps):
    _, batch = next(data)
    state, step_metrics = jax.jit(experiment.update)(
      state, batch, jax.random.fold_in(key, state.step)
    )
    losses.append(float(step_metrics["loss"]))
  recorded = [r["loss"] for r in _records(uninterrupted) if r["kind"] == "train"]
  # Eight devices add up the batch in another order: float32 rounding over twelve steps.
  np.testing.assert_allclose(recorded, losses, rtol=1e-5)


def test_metrics_are_fetched_one_step_late_and_nothing_else_waits(tmp_path, monkeypatch):
  events = []

  class Lazy:
    def __init__(self, step):
      self.step = step

    def __array__(self, dtype=None, copy=None):
      events.append(("fetch", self.step))
      return np.float32(1.0)

  def jit_update(update, mesh, rules):
    step = sharding.placement.jit_update(update, mesh, rules)
    count = iter(range(100))

    def counting(state, batch, key):
      number = next(count)
      events.append(("dispatch", number))
      return step(state, batch, key)[0], {"loss": Lazy(number)}

    counting.lower = step.lower
    return counting

  monkeypatch.setattr(sharding, "jit_update", jit_update)
  fetched = []
  real = jax.device_get
  monkeypatch.setattr(jax, "device_get", lambda tree: (fetched.append(tree), real(tree))[1])
  _train(tmp_path / "run", _config(train__num_steps=4, checkpoint__every=0))
  assert events[:7] == [
    ("dispatch", 0),
    ("dispatch", 1),
    ("fetch", 0),
    ("dispatch", 2),
    ("fetch", 1),
    ("dispatch", 3),
    ("fetch", 2),
  ]
  # One fetch a step, and one for the only checkpoint.
  assert len(fetched) == 5


def test_log_every_thins_the_record_and_keeps_the_last(tmp_path):
  _train(tmp_path / "run", _config(train__log_every=5))
  steps = [r["step"] for r in _records(tmp_path / "run") if r["kind"] == "train"]
  assert steps == [0, 5, 10, 11]


def test_a_finished_run_is_not_trained_again_but_reported(tmp_path, uninterrupted, monkeypatch):
  config = _config(eval__every=3)
  page = uninterrupted / "report.html"
  before = _records(uninterrupted), page.read_text()
  page.unlink()
  monkeypatch.setattr(sharding, "jit_update", None)  # would raise
  outcome = _train(uninterrupted, config)
  assert outcome.status == "finished"
  assert outcome.result.metrics["error"].n == fake_paper.SIZE
  assert (_records(uninterrupted), page.read_text()) == before


_WRONG_SHAPES = {
  "cut": '{"step"', "list": "[1, 2]", "number": "3", "null": "null", "empty": "{}",
  "deep": "[" * 5000 + "]" * 5000, "fields": '{"step": 12, "started": 1, "result": {"metrics": 5}}',
}  # fmt: skip


@pytest.mark.parametrize("shape", _WRONG_SHAPES)
@pytest.mark.parametrize("name", ["results.json", "environment.json", "figures/evaluation.json"])
def test_a_damaged_file_is_named_and_made_again_or_left_out(
  tmp_path, capsys, uninterrupted, name, shape
):
  folder = tmp_path / "run"
  shutil.copytree(uninterrupted, folder)
  (folder / "figures").mkdir(exist_ok=True)
  before = json.loads((folder / "results.json").read_text())
  (folder / name).write_text(_WRONG_SHAPES[shape])
  outcome = _train(folder, _config(eval__every=3))
  assert outcome.status == "finished"
  assert json.loads((folder / "results.json").read_text()) == before
  assert _records(folder) == _records(uninterrupted)
  if not (name.startswith("figures") and shape == "empty"):  # {} holds no figures, as [] does
    assert f"{folder / name} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("shape", _WRONG_SHAPES)
def test_a_damaged_config_is_refused_and_damaged_records_are_skipped(
  tmp_path, capsys, uninterrupted, shape
):
  folder = tmp_path / "run"
  shutil.copytree(uninterrupted, folder)
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  (folder / "metrics.jsonl").write_text("\n".join([lines[0], _WRONG_SHAPES[shape], *lines[1:]]))
  outcome = _train(folder, _config(eval__every=3))
  assert [r["step"] for r in outcome.history] == list(range(12))
  assert "metrics.jsonl, line 2 is damaged" in capsys.readouterr().err
  (folder / "config.json").write_text(_WRONG_SHAPES[shape])
  with pytest.raises(ValueError, match=r"config\.json is damaged .*: restore it from a backup"):
    _train(folder, _config(eval__every=3))


def test_a_workdir_of_another_config_is_refused_with_the_difference(uninterrupted):
  before = _records(uninterrupted), (uninterrupted / "config.json").read_text()
  config = _config(eval__every=3, optimizer__learning_rate=0.1, train__num_steps=20)
  with pytest.raises(ValueError, match=r"different config") as caught:
    _train(uninterrupted, config)
  assert "optimizer.learning_rate: 0.05 -> 0.1" in str(caught.value)
  assert "train.num_steps: 12 -> 20" in str(caught.value)
  assert "seed" not in str(caught.value)
  assert (_records(uninterrupted), (uninterrupted / "config.json").read_text()) == before


def test_the_mesh_may_change_on_resume(tmp_path):
  config = _config()
  _train(tmp_path / "run", config, _interrupting(config, 5, lambda: os.kill(os.getpid(), 15)))
  config.sharding.mesh = {"data": 1, "fsdp": 2, "tensor": 1}
  outcome = _train(tmp_path / "run", config)
  assert outcome.step == 12
  assert [r["step"] for r in outcome.history] == list(range(12))


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
  (tmp_path / "thesis.txt").write_text("precious")
  with pytest.raises(ValueError, match=r"not empty and holds no run"):
    _train(tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_run_that_never_took_a_step_may_change_its_config(tmp_path):
  folder = tmp_path / "run"
  with pytest.raises(training.RunError, match="data ended after step 0"):
    _train(folder, _config(data__stop=0))
  assert _train(folder, _config()).status == "finished"


@pytest.mark.parametrize("at", [3, 6, 11])
def test_nan_in_the_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path, at):
  folder, config = tmp_path / "run", _config(algorithm__nan_at=at)
  with pytest.raises(training.RunError, match=rf"loss is nan at step {at}: stopped") as caught:
    _train(folder, config)
  checkpoints = checkpointing.Checkpointer(folder / "checkpoints")
  # Step 3's own metrics are those of checkpoint 4: it must not have been written.
  assert checkpoints.steps() == ([] if at == 3 else [4] if at == 6 else [8])
  assert ("No checkpoint" if at == 3 else "last good checkpoint is step") in str(caught.value)
  assert _records(folder)[-1] == {**_records(folder)[-1], "step": at, "loss": None}
  assert "loss is nan" in (folder / "report.html").read_text()


def test_a_leaf_that_is_not_finite_is_found_before_it_is_saved(tmp_path):
  # Inf enters the bias in the last update before checkpoint 8: that step's loss is still finite.
  with pytest.raises(training.RunError, match=r"params/bias after step 7.*checkpoint is step 4"):
    _train(tmp_path / "run", _config(algorithm__bad_at=7))
  assert checkpointing.Checkpointer(tmp_path / "run" / "checkpoints").steps() == [4]


def test_what_a_judge_on_the_host_complains_of_is_the_error(tmp_path):
  """JAX buries it in tracebacks, and a run that asks a judge in its steps ends with the reason."""

  def judge(values):
    raise ValueError("reward own:f returned nan; rewards must be finite")

  config = _config(sharding__mesh__data=1)  # others would wait for the device that failed
  experiment = fake_paper.build(config)

  def update(state, batch, key):
    judged = jax.pure_callback(judge, jax.ShapeDtypeStruct((), jnp.float32), batch["y"])
    state, metrics = experiment.update(state, batch, key)
    return state, metrics | {"judged": judged}

  with pytest.raises(training.RunError, match=r"inside a step: ValueError: reward own:f .*finite"):
    _train(tmp_path / "run", config, dataclasses.replace(experiment, update=update))
  assert "reward own:f" in (tmp_path / "run" / "report.html").read_text()


def test_data_that_end_are_an_error_that_says_so(tmp_path):
  with pytest.raises(training.RunError, match=r"data ended after step 5 of train.num_steps=12"):
    _train(tmp_path / "run", _config(data__stop=5))


def test_a_failed_checkpoint_stops_the_run(tmp_path, monkeypatch):
  def fail(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(checkpointing.ocp.CheckpointManager, "save", fail)
  with pytest.raises(checkpointing.CheckpointError, match=r"step 4 .*No space left"):
    _train(tmp_path / "run")


def test_restore_finds_the_best_and_names_what_there_is(tmp_path):
  folder, config = tmp_path / "run", _config(eval__every=4, algorithm__noise=0.0)
  # The error shrinks, so where more is better the best is the first.
  experiment = dataclasses.replace(fake_paper.build(config), maximise=True)
  _train(folder, config, experiment)
  assert training.restore(experiment, config, folder).step == 12
  assert training.restore(experiment, config, folder, "best").step == 4
  assert training.restore(experiment, config, folder, "4").step == 4
  with pytest.raises(FileNotFoundError, match="steps 4, 12"):
    training.restore(experiment, config, folder, "5")


def test_restore_without_a_checkpoint_says_so(tmp_path):
  with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
    training.restore(fake_paper.build(_config()), _config(), tmp_path)


@pytest.mark.parametrize(
  ("field", "value"),
  [("train__num_steps", 0), ("train__log_every", 0), ("eval__every", -1), ("checkpoint__keep", 0)],
)
def test_lengths_out_of_range_are_refused(tmp_path, field, value):
  name = field.replace("__", ".")
  with pytest.raises(ValueError, match=rf"config\.{name} must .* got {value}"):
    _train(tmp_path / "run", _config(**{field: value}))
  assert not (tmp_path / "run").exists()


def test_a_mesh_that_does_not_divide_the_devices_is_refused(tmp_path):
  config = _config(sharding__mesh={"data": 3, "fsdp": 1, "tensor": 1})
  with pytest.raises(ValueError, match="need 3 devices"):
    _train(tmp_path / "run", config)


def test_a_smaller_mesh_uses_the_first_devices():
  mesh = training.make_mesh({"data": 2, "fsdp": 1})
  assert list(mesh.devices.flat) == jax.devices()[:2]


def test_what_counts_as_a_loss():
  names = ["loss", "ipo/loss", "value_loss", "grad_norm", "lossless", "loss/scale"]
  assert [name for name in names if training.is_loss(name)] == ["loss", "ipo/loss", "value_loss"]


def test_the_environment_is_recorded(uninterrupted):
  found = json.loads((uninterrupted / "environment.json").read_text())
  assert found["versions"]["jax"] == jax.__version__
  assert found["devices"].startswith(f"{jax.device_count()} x ")
  assert {"command", "commit", "host_cores", "started"} <= found.keys()


def test_tensorboard_events_are_written(uninterrupted):
  written = {}
  for path in (uninterrupted / "tensorboard").glob("events*"):
    data = path.read_bytes()
    while data:  # eight bytes of length, a checksum, the event, a checksum
      size = int.from_bytes(data[:8], "little")
      event = event_pb2.Event.FromString(data[12 : 12 + size])
      written |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
      data = data[16 + size :]
  for record in _records(uninterrupted):
    name = "loss" if record["kind"] == "train" else "error"
    found = written[f"{record['kind']}/{name}", record["step"]]
    assert found == np.float32(record[name])  # TensorBoard keeps single precision


def test_a_warm_up_as_long_as_the_run_is_noted(tmp_path, capsys):
  for warmup in (1, 2):
    _train(tmp_path / f"{warmup}", _config(train__num_steps=2, optimizer__warmup_steps=warmup))
    noted = "warmup_steps=2 is not shorter than the run of 2 steps" in capsys.readouterr().err
    assert noted == (warmup == 2)


def test_the_memory_of_a_step_is_said_before_the_first(tmp_path, capsys):
  _train(tmp_path / "run", _config(train__num_steps=2))
  words = r"memory of a step on each device: .* for the state, .* for the batch, .* while it runs"
  assert len(re.findall(words, capsys.readouterr().err)) == 1


def test_a_full_disk_ends_the_event_file_with_a_message(tmp_path):
  """A limit on file size stands for the full disk. No thread is left that could print or wait."""
  threads = threading.active_count()
  events = writers.TensorBoard(tmp_path / "tensorboard")
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))
  try:
    for failing in (lambda: events.write(1, "train", {"loss": 1.0}), events.close):
      with pytest.raises(OSError, match=r"cannot write .*tfevents.*File too large.*Free"):
        failing()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert threading.active_count() == threads


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_and_resume(tmp_path):
  """SIGTERM reaches one of two hosts; both save the same step, and one of them writes."""
  script = f"""
import dataclasses, os, pathlib, sys
import sharding
sharding.initialize_multihost("127.0.0.1:" + sys.argv[1], 2, int(sys.argv[2]))
import fake_paper
from experiments.loop import training
config, folder = fake_paper.get_config(), pathlib.Path({str(tmp_path / "run")!r})
config.train.num_steps, config.train.delay = 30, 0.1
class Data(fake_paper.Data):
  def __next__(self):
    if self.position == 3 and sys.argv[2] == "1":
      os.kill(os.getpid(), 15)
    return super().__next__()
experiment = fake_paper.build(config)
experiment = dataclasses.replace(experiment, batches=lambda: Data(0, 16, -1, 0.1))
outcome = training.train(experiment, config, folder)
print("DONE", outcome.status, outcome.step, len(outcome.history))
"""
  root = str(pathlib.Path(training.__file__).resolve().parent.parent)
  path = os.pathsep.join([root, str(pathlib.Path(fake_paper.__file__).parent)])
  flags = "--xla_force_host_platform_device_count=2"
  environment = {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": flags}
  lines = []
  for _ in range(2):
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      port = str(free.getsockname()[1])
    processes = [
      subprocess.Popen(
        [sys.executable, "-c", script, port, str(index)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
      for index in range(2)
    ]
    outputs = [process.communicate(timeout=150) for process in processes]
    done = [
      [line for line in output.splitlines() if line.startswith("DONE")] for output, _ in outputs
    ]
    assert done[0] and done[0] == done[1], outputs
    lines.append(done[0][0].split())
  assert lines[0][1] == "interrupted" and 3 < int(lines[0][2]) < 30
  assert lines[1] == ["DONE", "finished", "30", "30"]
  records = [r["step"] for r in _records(tmp_path / "run") if r["kind"] == "train"]
  assert records == list(range(30))
