"""Tests of loop.run_folder: which run owns a folder, and that other files are not touched."""

import pathlib
import re

import fake_paper
import ml_collections
import pytest

from experiments.loop import run_folder


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
