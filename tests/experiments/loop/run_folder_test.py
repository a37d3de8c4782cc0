"""Tests of loop.run_folder: which run owns a folder, and that other files are not touched."""

import pathlib
import re

import fake_paper
import ml_collections
import pytest

from experiments.loop import presets, run_folder


def test_a_new_folder_gets_the_config_and_gives_it_back(tmp_path):
  folder = run_folder.claim(fake_paper.get_config(), tmp_path / "a" / "b")
  config = run_folder.read_config(folder)
  assert config.algorithm.noise == 0.01
  assert list(config.algorithm.taus) == [0.1, 1.0]
  run_folder.claim(fake_paper.get_config(), folder)  # tuples became lists: no difference


def test_a_file_is_no_folder(tmp_path):
  path = tmp_path / "file"
  path.write_text("precious")
  with pytest.raises(ValueError, match="is a file"):
    run_folder.claim(fake_paper.get_config(), path)
  assert path.read_text() == "precious"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError, match=r"cannot make --workdir=.*file/run: Not a directory"):
    run_folder.claim(fake_paper.get_config(), tmp_path / "file" / "run")


def test_fields_that_only_one_side_has_are_shown(tmp_path):
  folder = run_folder.claim(ml_collections.ConfigDict({"paper": "p", "old": 1}), tmp_path / "run")
  (folder / "metrics.jsonl").write_text("{}\n")
  with pytest.raises(ValueError) as caught:
    run_folder.claim(ml_collections.ConfigDict({"paper": "p", "new": {"x": 2}}), folder)
  assert "  new.x: '(absent)' -> 2\n  old: 1 -> '(absent)'\n" in str(caught.value)


def test_a_run_of_an_earlier_version_continues_with_what_it_did(tmp_path, capsys):
  config = presets.resolve("ipo:tiny")
  old = ml_collections.ConfigDict(config.to_dict())
  del old.optimizer.warmup_from, old.optimizer.decay_all, old.network.logps_chunk
  del old.network.scan_layers
  folder = run_folder.claim(old, tmp_path / "run")
  (folder / "metrics.jsonl").write_text("{}\n")
  with pytest.raises(ValueError) as caught:
    run_folder.claim(config, folder)
  message = str(caught.value)
  assert "  optimizer.warmup_from: 0 -> 1\n" in message
  assert "  optimizer.decay_all: True -> False\n" in message
  assert "That run is older than network.logps_chunk: finish it with the version" in message
  # What can be said in fields continues.
  old.network.logps_chunk = 0
  (folder / "metrics.jsonl").unlink()
  run_folder.claim(old, folder)
  (folder / "metrics.jsonl").write_text("{}\n")
  config.optimizer.update({"warmup_from": 0, "decay_all": True})
  run_folder.claim(config, folder)
  # An evaluation takes what is absent from the preset, and says so.
  del old.network.logps_chunk
  assert presets.completed(old).to_dict() == config.to_dict()
  words = capsys.readouterr().err
  assert "older than these fields of its preset" in words and "optimizer.warmup_from=0" in words
  assert presets.completed(config) is config
  assert presets.completed(fake_paper.get_config()).paper == "fake_paper"


def test_only_placement_may_differ(tmp_path):
  folder = run_folder.claim(fake_paper.get_config(), tmp_path / "run")
  (folder / "metrics.jsonl").write_text("{}\n")
  config = fake_paper.get_config()
  config.sharding.mesh.fsdp = 4
  run_folder.claim(config, folder)
  assert run_folder.read_config(folder).sharding.mesh.fsdp == 4
  config.checkpoint.every = 5
  with pytest.raises(ValueError, match=r"checkpoint\.every: 4 -> 5"):
    run_folder.claim(config, folder)


def test_a_broken_config_is_named(tmp_path):
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match=r"config\.json is damaged"):
    run_folder.read_config(tmp_path)


def test_the_environment_names_the_commit_of_a_checkout():
  root = pathlib.Path(run_folder.__file__).parents[2]
  if not (root / ".git").exists():
    pytest.skip("the source is no git checkout")
  commit = run_folder.environment()["commit"]
  assert re.fullmatch(r"[0-9a-f]{40}\+?", commit), commit
