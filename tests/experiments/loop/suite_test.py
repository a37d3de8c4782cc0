"""Tests of loop.suite: runs of runs, of papers here and of the user's own."""

import json
import os

import fake_paper
import pytest

from experiments.loop import presets, suite, training
from experiments.report import results

_OWN = fake_paper.__file__


def _whole():
  config = fake_paper.get_config()
  config.paper = "mine"
  return config


def _parts(*seeds):
  parts = {}
  for seed in seeds:
    parts[f"seed-{seed}"] = part = fake_paper.get_config()
    part.seed, part.train.num_steps, part.checkpoint.every = seed, 4, 2
  return parts


def _summarise(parts):
  rows = [
    [name, part.history[-1]["loss"], part.result.metrics["error"]] for name, part in parts.items()
  ]
  table = results.Table("All", ["part", "loss", "error"], rows)
  return suite.Summary(results.Result(metrics={"parts": len(rows)}, tables=[table]), "parts")


def test_parts_of_a_users_own_module_are_trained_once_and_their_raw_numbers_written(tmp_path):
  outcome = suite.run(_whole(), tmp_path, _parts(0, 1), _summarise)
  assert outcome.status == "finished" and outcome.result.metrics["parts"].value == 2
  before = (tmp_path / "seed-0" / "metrics.jsonl").read_bytes()
  written = json.loads((tmp_path / "results.json").read_text())
  assert written["step"] == 2
  (table,) = results.Result.from_json(written["result"]).tables
  for name, loss, error in table.rows:
    alone = json.loads((tmp_path / name / "results.json").read_text())["result"]
    assert error.value == alone["metrics"]["error"]["value"]  # an estimate, to the last digit
    lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
    assert loss == [line["loss"] for line in lines if line["kind"] == "train"][-1]
  assert "All" in (tmp_path / "report.html").read_text()
  # A third part is added: the other two are taken as they are.
  outcome = suite.run(_whole(), tmp_path, _parts(0, 1, 2), _summarise)
  assert outcome.result.metrics["parts"].value == 3
  assert (tmp_path / "seed-0" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("report_unfinished", [False, True])
def test_a_signal_stops_the_whole_and_the_same_call_goes_on(tmp_path, report_unfinished):
  def stopped(part, folder):
    experiment = presets.build(part, folder)
    if part.seed != 1:
      return experiment

    class Data(fake_paper.Data):
      def __next__(self):
        if self.position == 2:
          os.kill(os.getpid(), 15)
        return super().__next__()

    return training.dataclasses.replace(experiment, batches=lambda: Data(1, 16, -1))

  options = {"report_unfinished": report_unfinished}
  outcome = suite.run(_whole(), tmp_path, _parts(0, 1, 2), _summarise, build=stopped, **options)
  assert (outcome.status, outcome.result, outcome.signal) == ("interrupted", None, 15)
  assert not (tmp_path / "seed-2").exists()
  assert (tmp_path / "results.json").exists() == report_unfinished
  if report_unfinished:
    assert json.loads((tmp_path / "results.json").read_text())["step"] == 1
  outcome = suite.run(_whole(), tmp_path, _parts(0, 1, 2), _summarise, **options)
  assert outcome.result.metrics["parts"].value == 3


def test_a_part_whose_folder_holds_another_run_is_refused(tmp_path):
  suite.run(_whole(), tmp_path, _parts(0), _summarise)
  other = _parts(0)
  other["seed-0"].optimizer.learning_rate = 0.1
  with pytest.raises(ValueError, match=r"holds a run of a different config(.|\n)*learning_rate"):
    suite.run(_whole(), tmp_path, other, _summarise)


def test_entries_are_short_names_presets_or_files():
  known = {"ipo": "ipo:tiny", "dpo": "dpo:tiny"}
  found = suite.configs_of("config.methods", ["dpo", "kto:bandit", f"{_OWN}:tiny"], known)
  assert list(found) == ["dpo", "kto-bandit", "fake_paper-tiny"]
  assert [config.paper for config in found.values()] == ["dpo", "kto", "fake_paper"]
  for entries, match in (
    ([], "config.methods is empty: give one or more of ipo, dpo"),
    (["ppo"], "config.methods=.*'ppo' is not one of ipo, dpo: give one of these, a <paper>:<pres"),
    (["ipo", "ipo"], "give each run once, 'ipo' is there twice"),
    (["ipo:none"], "no preset 'none' of ipo"),
    (["ipo", "ipo:tiny"], "give each run once, 'ipo' is there twice"),
    (["frontier:tiny"], "'frontier:tiny' holds several runs, name one of them"),
    (["cfr:tiny"], "'cfr:tiny' does not fit, it has no reward"),
  ):
    with pytest.raises(ValueError, match=match):
      suite.configs_of("config.methods", entries, known, needs=["reward"])
