"""Supervised networks on images: their labels, their start from BYOL, and the study of both."""

import contextlib
import json

import jax
import numpy as np
import pytest

from experiments import main
from experiments.data import images as image_data
from experiments.loop import checkpointing, presets, run_folder, suite
from experiments.papers import byol as byol_paper
from experiments.papers import supervised
from experiments.report import results
from experiments.studies import fine_tuning

# In one process: its tests share the run and the study.
pytestmark = pytest.mark.xdist_group("supervised_run")
DATA = image_data.load("digits")


def _config(preset="tiny", **fields):
  config = presets.resolve(f"supervised:{preset}")
  config.network.encoder = "resnet4"  # the smallest: tests wait for its compilation
  for name, value in fields.items():
    section, _, field = name.partition("__")
    config[section][field] = value
  return config


@pytest.fixture(scope="module")
def byol_run(tmp_path_factory):
  """The folder of a run of BYOL that has only just begun, and its state."""
  folder = tmp_path_factory.mktemp("byol")
  config = presets.resolve("byol:tiny")
  config.network.update({"encoder": "resnet4", "hidden": 8, "projection": 4})
  run_folder.claim(config, folder)
  state = jax.jit(byol_paper.build(config).init)(jax.random.key(0))
  with contextlib.closing(checkpointing.Checkpointer(folder / "checkpoints")) as checkpoints:
    checkpoints.save(1, state, {})
  return folder, state


@pytest.fixture(scope="module")
def study(byol_run, tmp_path_factory):
  """The folder of a study with one run from BYOL and one from scratch."""
  folder = tmp_path_factory.mktemp("study") / "run"
  command = [
    "--config=supervised:tiny_semi_supervised", f"--workdir={folder}", "--config.epochs=10",
    f"--config.init_from={byol_run[0]}", "--config.network.encoder=resnet4",
    "--config.learning_rates=0.1",
  ]  # fmt: skip
  assert main.run(command) == 0
  return folder


def _result(folder):
  return results.Result.from_json(json.loads((folder / "results.json").read_text())["result"])


# --- a run ----------------------------------------------------------------------------------------


def test_a_tiny_run_learns_the_digits(study):
  folder = study / "scratch-0.1-10-0.1"
  found = _result(folder)
  assert found.metrics["test_accuracy"].low > 0.2  # chance is 0.1; 40 steps on 129 images
  assert found.metrics["test_accuracy"].n == len(DATA.test_labels)
  assert found.metrics["validation_accuracy"].n == len(DATA.validation_rows)
  assert (folder / "figures" / "learning_curves.png").exists()


def test_labelled_images_are_balanced_nested_and_never_validate():
  small, large = (
    supervised.training_rows(_config(data__label_share=share, data__validate=True), DATA)
    for share in (0.05, 0.2)
  )
  assert len(small) == round(0.05 * len(DATA.fit_rows)) and set(small) < set(large)
  counts = np.bincount(DATA.labels[small])
  assert len(counts) == 10 and np.ptp(counts) <= 1
  assert not set(large) & set(DATA.validation_rows)
  other = _config(data__label_share=0.05, data__validate=True, data__label_seed=1)
  assert set(supervised.training_rows(other, DATA)) != set(small)
  np.testing.assert_array_equal(
    supervised.training_rows(_config(), DATA), np.arange(len(DATA.images))
  )
  for share in (0.0, 1.1, 0.005):
    with pytest.raises(ValueError, match=r"label_share=.* must lie in \(0, 1\] and leave an image"):
      supervised.training_rows(_config(data__label_share=share), DATA)


# --- the start ------------------------------------------------------------------------------------


def test_the_start_is_the_encoder_of_byol(byol_run):
  folder, state = byol_run
  config = _config(network__init_from=str(folder), algorithm__frozen=True)
  experiment = supervised.build(config, data=DATA)
  start = experiment.init(jax.random.key(0), *experiment.init_args)
  expected = state.params.encoder, state.network_state.online.encoder
  jax.tree.map(np.testing.assert_array_equal, (start.params.encoder, start.network_state), expected)


@pytest.mark.slow
def test_what_is_no_start_is_refused(byol_run, study, tmp_path):
  folder = str(byol_run[0])
  for fields, message in (
    ({"network__init_from": str(tmp_path)}, "init_from=.* holds no run: give the --workdir"),
    ({"network__init_from": str(study / "scratch-0.1-10-0.1")}, "is a run of 'supervised'"),
    (
      {"network__init_from": folder, "network__width_multiplier": 0.25},
      r"another encoder .*resnet4, width_multiplier 0.125.*than this run .*width_multiplier 0.25"
      r".*float32\[8\] in the checkpoint and float32\[16\] here",
    ),
    (
      {"network__init_from": folder, "network__encoder": "resnet6"},
      "another encoder .*Block_1.* is absent in the checkpoint",
    ),
    ({"data__from_files": True}, "from_files=True is for BYOL"),
  ):
    with pytest.raises(ValueError, match=message):
      supervised.build(_config(**fields), data=DATA)
  run_folder.claim(run_folder.read_config(byol_run[0]), tmp_path / "new")
  with pytest.raises(ValueError, match="has no checkpoint yet: train that run first"):
    supervised.build(_config(network__init_from=str(tmp_path / "new")), data=DATA)


# --- the study ------------------------------------------------------------------------------------


def test_both_starts_see_the_same_labels(byol_run, study):
  runs = [f"{start}-0.1-10-0.1" for start in fine_tuning.STARTS]
  first, second = (run_folder.read_config(study / name) for name in runs)
  assert (first.network.init_from, second.network.init_from) == (str(byol_run[0]), "")
  rows = [supervised.training_rows(config, DATA) for config in (first, second)]
  np.testing.assert_array_equal(*rows)
  found = _result(study)
  for start, name in zip(fine_tuning.STARTS.values(), runs, strict=True):
    alone = _result(study / name).metrics["test_accuracy"]
    assert found.metrics[f"test_accuracy/{start}, 10 %"] == alone
  assert (study / "figures" / "sweep.png").exists()


@pytest.mark.slow  # BYOL, four runs and a run of its own
def test_a_study_trains_byol_first_and_is_not_trained_again(tmp_path):
  folder = tmp_path / "run"
  command = ["--config=supervised:tiny_semi_supervised", f"--workdir={folder}"]
  assert main.run(command) == 0
  assert {path.name for path in folder.iterdir() if (path / "config.json").exists()} == {
    "byol", *(f"{start}-0.1-4-{rate}" for start in fine_tuning.STARTS for rate in (0.05, 0.1))
  }  # fmt: skip
  before = {path: path.read_bytes() for path in folder.glob("*/metrics.jsonl")}
  assert main.run(command) == 0
  assert before == {path: path.read_bytes() for path in folder.glob("*/metrics.jsonl")}
  # The preset of its own, with all labels.
  assert main.run(["--config=supervised:tiny", f"--workdir={tmp_path}/alone"]) == 0
  found = _result(tmp_path / "alone").metrics
  assert found["test_accuracy"].low > 0.5 and "validation_accuracy" not in found


def test_validation_images_choose_the_run():
  finished = {}
  for rate, validation, test in ((0.1, 0.5, 0.4), (0.2, 0.6, 0.3)):
    for start in fine_tuning.STARTS:
      config = _config(optimizer__learning_rate=rate, data__label_share=0.01)
      scores = {"validation_accuracy": validation, "test_accuracy": test}
      finished[f"{start}-{rate}"] = suite.Part(config, results.Result(metrics=scores), None)
  summary = fine_tuning._summarise(finished)
  assert {estimate.value for estimate in summary.result.metrics.values()} == {0.3}
  assert [row[3] for row in summary.result.tables[0].rows] == [0.2, 0.2]


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("epochs", (30, 30), r"config.epochs=\(30, 30\) must have entries, each of them once"),
    ("epochs", (0,), "config.epochs must be an integer >= 1, got 0"),
    ("learning_rates", (), r"config.learning_rates=\(\) must have entries"),
    ("learning_rates", (-0.1,), "config.learning_rates must be positive"),
    ("label_shares", (0.001,), "config.data.label_share=0.001 must lie in"),
    ("init_from", "nowhere", "config.network.init_from=nowhere holds no run"),
  ],
)
def test_a_study_that_cannot_run_is_refused_before_training(field, value, message, tmp_path):
  config = presets.resolve("supervised:tiny_semi_supervised")
  config[field] = value
  with pytest.raises(ValueError, match=message):
    fine_tuning.run(config, tmp_path)
  assert not list(tmp_path.iterdir())
