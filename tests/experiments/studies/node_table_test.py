"""The table of a paper: which runs it is made of, what it makes of them."""

import json

import numpy as np
import pytest

from experiments import main
from experiments.loop import presets
from experiments.studies import node_table


def test_runs_of_the_table_are_ordinary_runs():
  config = presets.resolve("bgrl:paper")
  config.data.directory = "somewhere"
  runs = node_table.parts(config)
  assert len(runs) == 15 and list(runs)[5] == "wikics-1"
  alone = presets.override(
    presets.resolve("bgrl:amazon_photo"), [("seed", "2"), ("data.directory", "somewhere")]
  )
  assert runs["amazon_photo-2"].to_dict() == alone.to_dict()
  assert set(config.data.names) == set(node_table.PUBLISHED)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("names", (), r"config.data.names=\(\), config.data.num_seeds=3: give one"),
    ("folders", "{name}", r"config.data.folders='{name}' gives two runs one folder"),
    ("directory", "nowhere", "no graph data set 'wikics' under nowhere(.|\n)*'coauthor_physics'"),
  ],
)
def test_what_cannot_become_a_table_is_refused_before_training(field, value, message, tmp_path):
  config = presets.resolve("bgrl:paper")
  config.data[field] = value
  with pytest.raises(ValueError, match=message):
    node_table.run(config, tmp_path)
  assert not list(tmp_path.iterdir())


def test_deviations_of_runs_pool_to_that_of_all_splits():
  scores = np.random.default_rng(0).normal(size=(3, 20))
  found = node_table.pooled([(row.mean(), row.std()) for row in scores])
  np.testing.assert_allclose(found, (scores.mean(), scores.std()), rtol=1e-12)


@pytest.mark.slow  # two tiny runs
def test_the_table_takes_up_runs_that_are_there(tmp_path):
  assert main.run(["--config=bgrl:tiny", "--config.seed=1", f"--workdir={tmp_path}/tiny-1"]) == 0
  before = (tmp_path / "tiny-1" / "metrics.jsonl").read_bytes()
  arguments = [
    "--config=bgrl:paper", f"--workdir={tmp_path}/table", "--config.data.names=('tiny',)",
    "--config.data.num_seeds=2", f"--config.data.folders={tmp_path}/{{name}}-{{seed}}",
    "--config.train.num_steps=30", "--config.train.log_every=1", "--config.checkpoint.every=10",
    "--config.eval.num_splits=2",
  ]  # fmt: skip
  assert main.run(arguments) == 0
  assert (tmp_path / "tiny-1" / "metrics.jsonl").read_bytes() == before
  result = json.loads((tmp_path / "table" / "results.json").read_text())["result"]
  (row,), (cost,) = (table["rows"] for table in result["tables"])
  trained = []
  for seed in (0, 1):
    alone = json.loads((tmp_path / f"tiny-{seed}" / "results.json").read_text())["result"]
    trained.append(alone["metrics"]["accuracy"]["value"])
  assert row[0] == "tiny" and row[-1] == ""  # nothing is published for it
  np.testing.assert_allclose(row[7], 100 * np.mean(trained), rtol=1e-12)
  assert cost[:3] == ["tiny", 2, 30]
  assert (tmp_path / "table" / "figures" / "table.png").exists()
  # A larger table takes the smaller one's place.
  assert main.run([*arguments, "--config.data.num_seeds=1"]) == 0
