"""Every option that names a file or a folder: `~` is the home folder, addresses are refused."""

import pathlib
import shutil

import fake_paper
import ml_collections
import numpy as np
import pytest

from experiments import files, main
from experiments.data import (
  graph_formats,
  image_formats,
  pretrained,
  rewards,
  rows,
  sample_cache,
  similarity,
)
from experiments.loop import presets
from experiments.papers import supervised
from experiments.studies import node_table


@pytest.fixture
def home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  (tmp_path / "home").mkdir()
  monkeypatch.chdir(tmp_path)  # a folder called "~" would be made here
  yield tmp_path / "home"
  assert not (tmp_path / "~").exists()


def test_config_and_workdir_may_lie_in_the_home_folder(home, capsys):
  shutil.copy(fake_paper.__file__, home / "fake_paper.py")
  command = ["--config=~/fake_paper.py", "--workdir=~/run", "--config.train.num_steps=1"]
  assert main.run(command) == 0
  assert (home / "run" / "results.json").exists()
  assert main.run(["--mode=eval", "--workdir=~/run"]) == 0
  assert main.run(["--mode=eval", "--workdir=~/run", "--show"]) == 0
  assert main.run(["--config=~/fake_paper.py", "--workdir=~nobody_here/run"]) == 2
  assert "--workdir=~nobody_here/run" in capsys.readouterr().err


def test_data_may_lie_in_the_home_folder(home):
  row = '{"prompt": "a", "completion": "b"}\n'
  (home / "rows.jsonl").write_text(row)
  assert [found["prompt"] for _, found in rows.read("~/rows.jsonl")] == ["a"]
  assert similarity.Similarity("~/rows.jsonl")(["a"], ["b"]) == 1
  np.savez(home / "graph.npz", node_features=0)
  for arguments in (("~/graph.npz",), ("graph", "~"), ("graph", str(home))):
    assert graph_formats.find(*arguments) == home / "graph.npz"
  for name in ("red", "blue"):
    (home / "images" / name).mkdir(parents=True)
    (home / "images" / name / "0.png").touch()
  for arguments in (("~/images",), ("images", "~")):
    assert image_formats.read(*arguments).class_names == ("blue", "red")
  assert sample_cache.SampleCache("~/cache").folder == home / "cache"


def test_environment_variables_may_name_the_home_folder(home, monkeypatch):
  monkeypatch.setenv("BOOTSTRAX_SAMPLE_CACHE", "~/samples")
  assert sample_cache.SampleCache().folder == home / "samples"
  monkeypatch.delenv("BOOTSTRAX_SAMPLE_CACHE")
  monkeypatch.setenv("BOOTSTRAX_CACHE", "~/cache")
  assert sample_cache.SampleCache().folder == home / "cache" / "samples"
  assert pretrained._smollm2_path(None).is_relative_to(home / "cache")


def test_models_and_runs_may_lie_in_the_home_folder(home):
  (home / "model").mkdir()
  assert pretrained._fetch("~/model", None) == home / "model"
  for resolve in (rewards.resolve, rewards.resolve_preference):
    with pytest.raises(ValueError, match=f"{home}/model has no reward_model.json"):
      resolve("~/model")
  config = ml_collections.ConfigDict({"network": {"init_from": "~/model"}})
  with pytest.raises(ValueError, match=f"init_from={home}/model holds no run"):
    supervised.read_encoder(config)
  config = presets.resolve("bgrl:paper")
  config.data.folders = "~/{name}-{seed}"
  assert all(folder.startswith(str(home)) for folder in node_table.parts(config))


@pytest.mark.parametrize(
  ("config", "option"),
  [
    (None, "--workdir=gs://bucket/run"),
    ("gs://bucket/mine.py", "--config.seed=1"),
    ("copg:tiny", "--config.network.model=gs://bucket/model"),
    ("copg:tiny", "--config.reward=s3://bucket/model"),
    ("copg:tiny", "--config.reward=rouge_l:gs://bucket/rows.jsonl"),
    ("copg:tiny", "--config.data.prompts=gs://bucket/prompts.txt"),
    ("copg:tiny", "--config.data.scored=https://host/rows.jsonl"),
    ("copg:tiny", "--config.data.cache=gs://bucket/cache"),
    ("ipo:tiny", "--config.data.preferences=finegrained_rlhf:gs://bucket/rows.jsonl"),
    ("sft:tiny", "--config.data.demonstrations=file:///rows.jsonl"),
    ("nash_md:tiny", "--config.preference=gs://bucket/model"),
    ("byol:tiny", "--config.data.source=gs://bucket/images"),
    ("byol:tiny", "--config.data.directory=gs://bucket/images"),
    ("supervised:tiny", "--config.network.init_from=gs://bucket/run"),
    ("bgrl:csbm", "--config.data.directory=gs://bucket/graphs"),
    ("bgrl:paper", "--config.data.folders=gs://bucket/{name}-{seed}"),
  ],
)
def test_an_address_is_refused_in_one_line_before_anything_is_made(
  tmp_path, capsys, monkeypatch, config, option
):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(pretrained, "load", None)  # would raise a TypeError
  assert main.run([f"--config={config or fake_paper.__file__}", option]) == 2
  error = capsys.readouterr().err
  assert "://, which is not read: mount it" in error and error.count("\n") == 1
  assert not list(pathlib.Path().iterdir())


def test_libraries_of_data_sets_bring_file_systems_of_their_own():
  config = presets.resolve("byol:cifar10")
  config.data.directory = "gs://bucket/tfds"
  presets.check(config)
  assert files.local_path("--workdir", "runs/a:b") == pathlib.Path("runs/a:b")
