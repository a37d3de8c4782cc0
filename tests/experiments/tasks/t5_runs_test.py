"""Runs of the launcher on a T5: its folder in place of a decoder's, everything else as it is."""

import json

import jax
import numpy as np
import pytest
import tiny_t5

from alignment.models import huggingface, t5, tokenizer
from experiments import main
from experiments.loop import presets
from experiments.tasks import harness, language_offline


def test_sampled_completions_have_the_log_probabilities_of_a_pass_over_them(tmp_path):
  folder = tiny_t5.write_folder(tmp_path / "t5")
  config = presets.override(presets.resolve("ipo:tiny"), [("network.model", str(folder))])
  task = language_offline.make_task(config)
  prompts = task.train_prompts[:3]
  tokens, mask = task.encode_prompts(prompts)
  np.testing.assert_array_equal(tokens[:, -1], task.model.tokenizer.eos_id)
  assert mask[:, -1].all()
  drawn = task.generate(task.model.params, prompts, jax.random.key(0), 2, plain=True)
  scored = task.logps(task.model.params, prompts, drawn["tokens"], drawn["mask"])
  # float32 sums of up to a dozen log-probabilities of about four nats
  np.testing.assert_allclose(drawn["logps"], scored, atol=1e-4)


def test_tasks_of_the_harness_are_refused_before_a_run_starts(tmp_path):
  config = presets.resolve("ipo:tiny")
  harness.check(config, tiny_t5.make_config())
  config = presets.override(config, [("eval.tasks", "arc_easy")])
  with pytest.raises(ValueError, match=r"eval\.tasks=arc_easy needs a decoder"):
    harness.check(config, tiny_t5.make_config())
  source, folder = tiny_t5.write_folder(tmp_path / "t5"), tmp_path / "run"
  arguments = [f"--config.network.model={source}", "--config.eval.tasks=arc_easy"]
  assert main.run(["--config=ipo:tiny", f"--workdir={folder}", *arguments]) != 0
  assert not (folder / "checkpoints").exists()


@pytest.mark.slow  # a run each, with sampling, training, evaluation and report
@pytest.mark.parametrize("paper", ["ipo", "nash_md", "dro"])
def test_a_tiny_run_trains_and_exports_a_t5(paper, tmp_path, capsys):
  source, folder = tiny_t5.write_folder(tmp_path / "t5"), tmp_path / "run"
  arguments = ["--config.train.num_steps=4", "--config.eval.num_prompts=16"]
  arguments += [f"--config.network.model={source}", f"--workdir={folder}"]
  assert main.run([f"--config={paper}:tiny", *arguments]) == 0
  results = json.loads((folder / "results.json").read_text())
  assert {"win_rate", "reward", "kl"} <= set(results["result"]["metrics"])
  config, params = huggingface.load(folder / "model")
  assert isinstance(config, t5.T5Config)
  moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), params, huggingface.load(source)[1])
  assert max(jax.tree.leaves(moved)) > 1e-4
  assert tokenizer.load(folder / "model").ends_prompts
  capsys.readouterr()
  assert main.run(["--mode=eval", f"--workdir={folder}"]) == 0
  assert "win_rate" in capsys.readouterr().out


@pytest.mark.slow  # a reward model and what it says of a pair
def test_a_t5_learns_to_be_a_reward_model(tmp_path):
  source, folder = tiny_t5.write_folder(tmp_path / "t5"), tmp_path / "run"
  arguments = [f"--config.network.model={source}", f"--workdir={folder}"]
  arguments += ["--config.train.num_steps=4"]
  assert main.run(["--config=reward_model:tiny", *arguments]) == 0
