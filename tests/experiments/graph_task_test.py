"""Runs on one graph: BGRL and GRACE are wired alike, and their memory grows as it should."""

import json

import pytest

from experiments import graph_task, main, presets
from experiments.papers import bgrl, grace, graph_memory


def test_grace_runs_as_bgrl_does_but_for_the_loss():
  first, second = (presets.resolve(f"{paper}:amazon_photo") for paper in ("bgrl", "grace"))
  assert second.algorithm.edge_drop_probs == first.algorithm.edge_drop_probs == (0.4, 0.1)
  assert graph_task.make_encoder(first) == graph_task.make_encoder(second)
  for section in ("data", "optimizer", "train", "eval"):
    assert first[section] == second[section]


def test_an_unknown_encoder_is_refused(tmp_path):
  for paper, module in (("bgrl", bgrl), ("grace", grace)):
    config = presets.resolve(f"{paper}:tiny")
    config.network.encoder = "cnn"
    with pytest.raises(ValueError, match=r"config.network.encoder='cnn': give one of 'gcn'"):
      module.build(config, tmp_path)


def test_sizes_of_a_memory_curve_must_grow(tmp_path):
  config = presets.resolve("graph_memory:tiny")
  config.data.num_nodes = (100, 50)
  with pytest.raises(ValueError, match="two or more growing numbers"):
    graph_memory.run(config, tmp_path)


@pytest.mark.slow  # 20 seconds a run: updates, encoders and the judge are compiled
@pytest.mark.parametrize("paper", ["bgrl", "grace"])
def test_tiny_run_ends_with_its_rows_and_figures(paper, tmp_path):
  folder = tmp_path / "run"
  assert main.run([f"--config={paper}:tiny", f"--workdir={folder}"]) == 0
  result = json.loads((folder / "results.json").read_text())["result"]
  rows = {row[0] for row in result["tables"][0]["rows"]}
  assert rows == {"features", "SGC-2", "encoder, untrained", "encoder, trained"}
  assert result["metrics"]["gain"]["value"] > -0.05
  for name in ("collapse", "embeddings"):
    assert (folder / "figures" / f"{name}.png").exists()
  assert main.run(["--mode=eval", f"--workdir={folder}"]) == 0


@pytest.mark.slow  # nine compiled updates
def test_memory_of_grace_is_quadratic_and_that_of_bgrl_is_not(tmp_path):
  config = presets.resolve("graph_memory:tiny")
  (tmp_path / "run").mkdir()
  result = graph_memory.run(config, tmp_path / "run").result
  assert result.metrics["criteria_passed"].value == 1, result.tables[0]
  # Two arrays of [2N, 2N] float32: the logits, and what the gradient makes of them.
  size, linear, quadratic, _ = result.tables[1].rows[-1]
  ratio = (float(quadratic) - float(linear)) * 2**20 / (4 * (2 * size) ** 2)
  assert 1.5 < ratio < 2.5
  assert (tmp_path / "run" / "figures" / "memory.png").exists()
