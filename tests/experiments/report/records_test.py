"""Tests of report.records, files and loop.writers."""

import io
import json
import math
import sys
import types

import numpy as np
import pytest

from experiments import files
from experiments.loop import writers
from experiments.report import records


def _train(step, **scalars):
  return {"kind": "train", "step": step, **scalars}


def test_records_come_back_and_json_stays_strict(tmp_path):
  lines = records.JsonLines(tmp_path / "metrics.jsonl")
  lines.append(_train(0, loss=1.5))
  lines.append(_train(1, loss=math.nan))
  lines.append({"kind": "eval", "step": 2, "rate": math.inf})

  def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")

  for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
    json.loads(line, parse_constant=refuse)
  history = lines.read()
  assert [r["step"] for r in history] == [0, 1]
  assert math.isnan(history[1]["loss"])
  assert [r["step"] for r in history.evals] == [2]


def test_truncate_drops_what_will_be_repeated(tmp_path):
  path = tmp_path / "metrics.jsonl"
  lines = records.JsonLines(path)
  for step in range(6):
    lines.append(_train(step, loss=float(step)))
    if step in (1, 3):
      lines.append({"kind": "eval", "step": step + 1, "rate": 0.5})
  path.write_text(path.read_text() + '{"kind": "train", "st')  # a kill in the middle of a line
  kept = lines.truncate(4)
  assert [r["step"] for r in kept] == [0, 1, 2, 3]
  assert [r["step"] for r in kept.evals] == [2, 4]
  order = [(r["kind"], r["step"]) for r in map(json.loads, path.read_text().splitlines())]
  assert order == [
    ("train", 0), ("train", 1), ("eval", 2), ("train", 2), ("train", 3), ("eval", 4)
  ]  # fmt: skip
  lines.append(_train(4))
  assert len(lines.read()) == 5
  assert [r["step"] for r in lines.truncate(4, keep_eval=False).evals] == [2]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "config.json"
  files.write_file(path, "old")

  def fail(self, data):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(files.pathlib.Path, "write_bytes", fail)
  with pytest.raises(OSError, match=r"config\.json: No space left .*untouched"):
    files.write_file(path, "new")
  assert path.read_text() == "old"
  assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_a_record_that_cannot_be_written_names_the_file(tmp_path):
  lines = records.JsonLines(tmp_path / "gone" / "metrics.jsonl")
  with pytest.raises(OSError, match=r"cannot write .*metrics\.jsonl: No such file.*untouched"):
    lines.append(_train(0))
  lines.close()


def test_plain_lines_without_a_terminal(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(writers.time, "monotonic", lambda: now[0])
  stream = io.StringIO()
  progress = writers.Progress(0, 100, "reward", stream)
  for step in range(1, 101):
    now[0] += 1.0 if step > 1 else 30.0  # the first one compiles
    progress.update(step, {"loss": 1 / step, "reward": step / 100, "other": 7})
  lines = stream.getvalue().splitlines()
  assert lines[0] == "step 1/100  loss 1  reward 0.01"
  assert lines[1] == "step 6/100  loss 0.1667  reward 0.06  1 steps/s  1:34 left"
  assert lines[-1] == "step 100/100  loss 0.01  reward 1  1 steps/s  0:00 left"
  assert len(lines) == 21  # the first, one every five seconds, the last


def test_a_bar_on_a_terminal():
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  stream = Terminal()
  progress = writers.Progress(40, 100, "reward", stream)
  progress.update(41, {"loss": 0.5, "reward": 0.25})
  progress.say("saved")
  progress.update(100, {"loss": 0.5, "reward": 0.75})
  progress.close()
  text = stream.getvalue()
  assert "saved" in text
  assert "100/100" in text
  assert "reward=0.75" in text


def test_many_ids_become_a_hash():
  assert records.id_record(np.array([3, 1, 2])) == [3, 1, 2]
  many = np.arange(1000)
  assert records.id_record(many).startswith("sha256:")
  assert records.id_record(many) != records.id_record(many[::-1])


def test_wandb_is_imported_only_when_asked_for_and_continues_its_run(tmp_path, monkeypatch):
  assert "wandb" not in sys.modules
  calls = []

  class Run:
    def log(self, values, step):
      calls.append((values, step))

    def finish(self):
      calls.append("finish")

  fake = types.SimpleNamespace(init=lambda **options: (calls.append(options), Run())[1])
  monkeypatch.setitem(sys.modules, "wandb", fake)
  for _ in range(2):
    writer = writers.Wandb("project", {"seed": 0}, tmp_path)
    writer.write(3, "train", {"loss": 0.5})
    writer.close()
  assert calls[0] == calls[3]
  assert calls[0]["resume"] == "allow"
  assert calls[1:3] == [({"train/loss": 0.5}, 3), "finish"]
