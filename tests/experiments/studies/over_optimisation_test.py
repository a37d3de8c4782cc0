"""Tests of the study of over-optimisation: who sees what, and the whole on random words."""

import json

import pytest

from experiments import main
from experiments.data import rewards, text
from experiments.loop import presets
from experiments.studies import over_optimisation


def test_the_policy_sees_the_learned_reward_alone_and_the_same_prompts_are_held_out(tmp_path):
  config = presets.resolve("over_optimisation:summaries")
  config.data.update({"demonstrations": "scitldr:train.jsonl", "prompts": "scitldr:dev.jsonl"})
  parts = over_optimisation.part_configs(config, tmp_path)
  sft, model, policy = (parts[name] for name in over_optimisation.PARTS)
  assert policy.reward == str(tmp_path / "reward_model" / "model")
  assert policy.eval.judges == sft.reward == "rouge_l:scitldr:dev.jsonl"
  assert policy.network.model == model.network.model == str(tmp_path / "sft" / "model")
  assert sft.data.prompts == policy.data.prompts and sft.seed == policy.seed
  assert sft.eval.num_prompts == policy.eval.num_prompts == 256
  assert sft.data.demonstrations == "scitldr:train.jsonl" and not policy.data.demonstrations
  assert policy.data.num_samples == 4 and policy.network.lora_rank == 16


def test_references_are_asked_for_before_anything_is_trained(tmp_path, capsys):
  arguments = ["--config=over_optimisation:summaries", f"--workdir={tmp_path / 'run'}"]
  assert main.run(arguments) == 2
  assert "config.data.demonstrations is empty" in capsys.readouterr().err
  arguments.append("--config.data.demonstrations=made_up:vowels")
  assert main.run(arguments) == 2
  assert "config.data.prompts is empty" in capsys.readouterr().err
  tiny = ["--config=over_optimisation:tiny", f"--workdir={tmp_path / 'tiny'}"]
  assert main.run([*tiny, "--config.train.batch_size=3"]) == 2
  assert "train.batch_size=3 must be a multiple of the 8 data shards" in capsys.readouterr().err
  assert main.run([*tiny, "--config.data.num_pairs=40"]) == 2
  assert "config.data.num_pairs=40 gives the reward model 40 pairs" in capsys.readouterr().err
  assert not (tmp_path / "tiny" / "sft").exists()


@pytest.mark.slow
def test_a_tiny_study_labels_pairs_trains_and_reports(tmp_path, capsys):
  folder = tmp_path / "run"
  arguments = ["--config=over_optimisation:tiny", f"--workdir={folder}"]
  assert main.run(arguments) == 0
  judge = rewards.resolve("vowels")
  pairs = text.load_preferences(folder / "pairs.jsonl")
  chosen, rejected = (
    judge([pair.prompt for pair in pairs], [getattr(pair, side) for pair in pairs])
    for side in ("chosen", "rejected")
  )
  assert len(pairs) > 50 and (chosen > rejected).all()
  result = json.loads((folder / "results.json").read_text())["result"]
  assert {"judge/vowels", "judge/vowels_peak", "kl", "reward"} <= result["metrics"].keys()
  assert [len(table["rows"]) for table in result["tables"]] == [3, 3]  # start and two evaluations
  assert (folder / "figures" / "over_kl.png").exists()
  capsys.readouterr()
  assert main.run(arguments) == 0  # everything is finished
  err = capsys.readouterr().err
  assert all(f"{name} is finished" in err for name in over_optimisation.PARTS)
