"""QR-DQN's runs: exact returns of the greedy policies, resuming bit for bit, and the report."""

import json

import numpy as np
import pytest

from experiments import main
from experiments.loop import interruption

pytest.importorskip("pyspiel", reason="OpenSpiel absent: pip install '.[games]' to test games")


def _run(folder, *arguments):
  return main.run(["--config=qr_dqn:tiny", f"--workdir={folder}", *arguments])


def _records(folder):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [record for record in map(json.loads, lines) if record["kind"] == "train"]


@pytest.mark.slow  # four methods
def test_a_tiny_run_reports_and_answers(tmp_path, capsys):
  folder = tmp_path / "run"
  assert _run(folder, "--config.environment.slip=0.0") == 0
  result = json.loads((folder / "results.json").read_text())["result"]
  metrics = {name: found["value"] for name, found in result["metrics"].items()}
  # Without slips the best return of three rows is 1 less the price of the moves.
  np.testing.assert_allclose(metrics["return/optimal"], 0.99, atol=1e-6)
  last = _records(folder)[-1]
  for name in ("qr_dqn", "pinball", "dqn", "squared"):
    assert last[f"return/{name}_low"] <= last[f"return/{name}"] <= last[f"return/{name}_high"]
    np.testing.assert_allclose(metrics[f"return/{name}"], last[f"return/{name}"], atol=1e-6)
  assert all((folder / "figures" / f"{name}.png").exists() for name in ("returns", "distributions"))
  # Every policy has one return, so that exact quantiles of it are at no distance.
  assert all(row[-1]["value"] < 1e-9 for row in result["tables"][1]["rows"])
  capsys.readouterr()
  assert main.run(["--mode=sample", f"--workdir={folder}"]) == 0
  assert "QR-DQN, kappa 0" in capsys.readouterr().out


@pytest.mark.slow  # three runs
def test_an_interrupted_run_goes_on_to_the_bit(tmp_path, monkeypatch):
  assert _run(tmp_path / "whole") == 0
  with monkeypatch.context() as patched:
    # Stop as a signal before step 7 would.
    stop = interruption.Listener.stop

    def early(listener, step):
      if step == 7:
        listener.received = 15
      return stop(listener, step)

    patched.setattr(interruption.Listener, "stop", early)
    assert _run(tmp_path / "parts") == 128 + 15
  assert _run(tmp_path / "parts") == 0
  whole, parts = (
    [{k: v for k, v in record.items() if k != "seconds"} for record in _records(tmp_path / name)]
    for name in ("whole", "parts")
  )
  assert whole == parts and len(whole) == 10


@pytest.mark.parametrize(
  "setting",
  [
    "network.num_quantiles=0",
    "network.widths=(8, 0)",
    "optimizer.learning_rate=-1.0",
    "environment.num_seeds=0",
  ],
)
def test_bad_settings_are_named(tmp_path, capsys, setting):
  assert _run(tmp_path / "run", f"--config.{setting}") == 2
  assert f"config.{setting.split('=')[0]} must be" in capsys.readouterr().err
