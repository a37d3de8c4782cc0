"""Reward and preference models end to end: split, frozen features, export, use as a reward."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignment import reward_model
from alignment.models import scalar_head, transformer
from experiments import main
from experiments.data import learned_rewards, rewards
from experiments.loop import presets
from experiments.tasks import language, language_offline, preferences

SHORT = (
  "--config.train.num_steps=4",
  "--config.eval.num_prompts=32",
  "--config.checkpoint.every=2",
)


def _pairs_file(path, num_prompts=48):
  """Three pairs a prompt; the one with more vowels wins."""
  rows = [
    {"prompt": f"prompt {n}", "chosen": f" a{'e' * k}", "rejected": f" bc{'d' * k}"}
    for n in range(num_prompts)
    for k in range(3)
  ]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def _config(**changes):
  return presets.override(presets.resolve("reward_model:tiny"), list(changes.items()))


def _run(workdir, *arguments):
  return main.run(["--config=reward_model:tiny", f"--workdir={workdir}", *SHORT, *arguments])


def test_a_run_leaves_a_report_and_a_reward(tmp_path):
  folder = tmp_path / "rm"
  assert _run(folder, f"--config.data.preferences={_pairs_file(tmp_path / 'p.jsonl')}") == 0
  results = json.loads((folder / "results.json").read_text())["result"]
  names = {"accuracy", "accuracy_longer_wins", "accuracy_length_fit", "accuracy_coin"}
  assert names <= set(results["metrics"])
  assert results["metrics"]["accuracy"]["n"] == 96  # all three pairs of 32 prompts
  assert (folder / "report.html").stat().st_size > 10_000
  reward = rewards.resolve(str(folder / "model"))
  assert "p.jsonl" in reward.describes
  scores = reward(["prompt 1", "prompt 1"], [" aee", ""])  # a policy may say nothing at all
  assert scores.shape == (2,) and scores[0] != scores[1]


@pytest.mark.slow  # three more runs
def test_a_reward_of_enough_training_predicts_and_steers(tmp_path, capsys):
  folder = tmp_path / "rm"
  assert main.run(["--config=reward_model:tiny", f"--workdir={folder}"]) == 0
  metrics = json.loads((folder / "results.json").read_text())["result"]["metrics"]
  assert metrics["accuracy"]["low"] > 0.75 > metrics["accuracy_length_fit"]["value"]
  capsys.readouterr()
  assert main.run(["--mode=sample", f"--workdir={folder}"]) == 0
  assert "log-odds of chosen" in capsys.readouterr().out
  aligned = tmp_path / "copg"
  command = ["--config=copg:tiny", f"--workdir={aligned}", f"--config.reward={folder / 'model'}"]
  assert main.run(command) == 0
  found = json.loads((aligned / "results.json").read_text())["result"]["metrics"]
  assert found["win_rate"]["low"] > 0.5


@pytest.mark.parametrize("kind", reward_model.KINDS)
@pytest.mark.parametrize("train", ["all", "head"])
def test_the_export_judges_as_the_evaluation_did(kind, train, tmp_path):
  config = _config(**{"algorithm.kind": kind, "network.train": train, "network.num_layers": "1"})
  task = preferences.make_task(config)
  noise = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: x + 0.1 * noise.normal(size=x.shape).astype(np.float32), task.trained_params
  )
  batch = jax.tree.map(lambda x: x[:6], task.test_batch())
  algorithm = reward_model.Config(kind=kind)
  want = reward_model.preference_probs(params, batch, apply_fn=task.apply_fn, config=algorithm)
  tokenizer, full = task.model.tokenizer, task.full_params(params)
  learned_rewards.save(tmp_path / "m", task.settings, task.network, full, tokenizer=tokenizer)
  judge = learned_rewards.load(tmp_path / "m")
  resolved = rewards.resolve_preference(str(tmp_path / "m"))  # what Nash-MD asks
  one = (["a"], [" b"], [" ou"])
  np.testing.assert_array_equal(resolved(*one), judge.preference_probs(*one))
  pairs = task.test_pairs[:6]
  texts = [[getattr(p, name) for p in pairs] for name in ("prompt", "chosen", "rejected")]
  got = judge.preference_probs(*texts)
  assert np.ptp(got) > 1e-3
  # Other paddings, and features that hardly differ are divided by small numbers: float32 is felt.
  np.testing.assert_allclose(got, want, atol=2e-4)
  swapped = judge.preference_probs(texts[0], texts[2], texts[1])
  np.testing.assert_allclose(swapped, 1 - got, atol=1e-5)
  if kind == "bradley_terry":
    gap = judge.rewards(texts[0], texts[1]) - judge.rewards(texts[0], texts[2])
    np.testing.assert_allclose(jax.nn.sigmoid(gap), got, atol=1e-5)
  else:
    with pytest.raises(ValueError, match=r"kind=bradley_terry"):
      rewards.resolve(str(tmp_path / "m"))


def test_no_prompt_is_on_both_sides_and_none_is_lost(tmp_path):
  path = _pairs_file(tmp_path / "p.jsonl")
  task = preferences.make_task(_config(**{"data.preferences": str(path), "eval.num_prompts": "10"}))
  train, test = ({p.prompt for p in pairs} for pairs in (task.train_pairs, task.test_pairs))
  assert not train & test and len(train) == 38 and len(test) == 10
  assert len(task.train_pairs) + len(task.test_pairs) == 144


def test_features_are_read_once_and_labels_are_kept(tmp_path, monkeypatch):
  rows = [
    {"prompt": f"p{n}", "chosen": " a", "rejected": " b", "chosen_prob": 0.75} for n in range(64)
  ]
  path = tmp_path / "soft.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  changes = {"data.preferences": str(path), "network.train": "head", "eval.num_prompts": "8"}
  first = preferences.make_task(_config(**changes)).train_batch()
  np.testing.assert_array_equal(first.chosen_probs, np.full(56, 0.75, np.float32))
  monkeypatch.setattr(scalar_head, "features", None)  # a second task finds them
  again = preferences.make_task(_config(**changes)).train_batch()
  np.testing.assert_array_equal(first.chosen_tokens, again.chosen_tokens)


def test_own_preferences_with_other_field_names_reach_an_alignment_run(tmp_path):
  path = tmp_path / "p.jsonl"
  path.write_text(json.dumps({"q": "one", "good": "aa", "bad": "b"}) + "\n")
  changes = {"data.preferences": str(path), "data.preference_fields": "q,good,bad"}
  config = presets.override(presets.resolve("dpo:tiny"), list(changes.items()))
  samples = language_offline.make_task(config).training_samples()
  assert samples.tokens.shape[:2] == (1, 2)


def test_rows_of_any_padding_are_joined_and_equal_ones_computed_once():
  rows = reward_model.sequences.Sequences(
    tokens=np.array([[5, 6, 0], [7, 0, 0], [5, 6, 0]]),
    mask=np.array([[1, 1, 0], [1, 0, 0], [1, 1, 0]]),
    prompt_tokens=np.array([[0, 3], [3, 4], [0, 3]]),
    prompt_mask=np.array([[0, 1], [1, 1], [0, 1]]),
  )
  seen = []

  def function(tokens, mask):
    seen.append(np.unique(np.where(mask > 0, tokens, 0), axis=0))
    return (tokens * mask).sum(1)

  np.testing.assert_array_equal(learned_rewards.by_length(function, rows), [14, 14, 14])
  assert len(seen) == 1 and seen[0].shape == (2, 32)


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"data.preferences": ""}, "data.preferences=FILE"),
    ({"data.preferences": "nowhere.jsonl"}, "cannot read nowhere.jsonl"),
    ({"eval.num_prompts": "100000"}, "eval.num_prompts=100000"),
    ({"network.train": "heads"}, "network.train"),
    ({"network.num_layers": "3"}, "network.num_layers=3: tiny-random has 2"),
    ({"algorithm.kind": "elo"}, "kind"),
    ({"data.completion_length": "250"}, "context of tiny-random"),
    ({"data.prompt_length": "0"}, "data.prompt_length"),
    ({"train.batch_size": "8000"}, "train.batch_size=8000 exceeds"),
    ({"train.batch_size": "12"}, "does not divide over the 8 shards"),
    ({"data.preference_fields": "a,b"}, "name three"),
  ],
)
def test_bad_input_is_named_before_any_training(changes, match, tmp_path, capsys):
  if "data.preference_fields" in changes:
    changes = {**changes, "data.preferences": str(_pairs_file(tmp_path / "p.jsonl"))}
  arguments = [f"--config.{name}={value}" for name, value in changes.items()]
  assert main.run(["--config=reward_model:tiny", f"--workdir={tmp_path / 'r'}", *arguments]) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: ") and match in error


def test_a_bad_folder_is_named_with_the_remedy(tmp_path):
  for name in (str(tmp_path), str(tmp_path / "absent")):
    with pytest.raises(ValueError, match=r"give the folder `model` of a finished"):
      rewards.resolve(name)
  config = _config(**{"network.num_layers": "1"})
  task = preferences.make_task(config)
  folder, words = tmp_path / "m", task.model.tokenizer

  def fresh():
    learned_rewards.save(folder, task.settings, task.network, task.params, tokenizer=words)

  fresh()
  before = learned_rewards.load(folder).fingerprint
  assert before == learned_rewards.load(folder).fingerprint
  (folder / "scalar_head.safetensors").unlink()
  with pytest.raises(ValueError, match=r"no scalar_head.safetensors"):
    rewards.resolve(str(folder))
  (folder / "scalar_head.safetensors").write_bytes(b"cut")
  with pytest.raises(ValueError, match="is damaged"):
    rewards.resolve(str(folder))
  fresh()
  (folder / "reward_model.json").write_text('{"kind": "elo", "prompt_length": 1}')
  with pytest.raises(ValueError, match=r"reward_model\.json is damaged"):
    rewards.resolve(str(folder))
  wide = {"kernel": jnp.zeros(9), "bias": jnp.zeros(())}
  other = dataclasses.replace(task, params=task.params | {"scalar_head": wide})
  learned_rewards.save(folder, task.settings, task.network, other.params, tokenizer=words)
  with pytest.raises(ValueError, match="different models"):
    rewards.resolve(str(folder))


@pytest.mark.parametrize("kind", reward_model.KINDS)
def test_paper_preset_traces_at_full_size(kind):
  """The 7B run: shapes only, nothing is allocated."""
  config = presets.resolve("reward_model:paper")
  config.algorithm.kind = kind
  network = transformer.TransformerConfig(
    vocab_size=32_000,
    num_layers=32,
    width=4096,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    mlp_width=11_008,
    max_length=4096,
    dtype="bfloat16",
    remat=True,
  )
  algorithm = reward_model.Config(**config.algorithm)
  optimizer = language.make_optimizer(config.optimizer, config.train.num_steps)

  def init(key):
    params = scalar_head.from_decoder(transformer.init_params(network, key))
    return reward_model.init(params, optimizer=optimizer, config=algorithm)

  state = jax.eval_shape(init, jax.random.key(0))
  size, data = config.train.batch_size, config.data
  tokens = jax.ShapeDtypeStruct((size, data.completion_length), jnp.int32)
  prompt = jax.ShapeDtypeStruct((size, data.prompt_length), jnp.int32)
  ones = jax.ShapeDtypeStruct((size,), jnp.float32)
  batch = reward_model.Batch(tokens, tokens, tokens, tokens, prompt, prompt, ones)
  apply_fn = scalar_head.make_apply_fn(network)
  bound = {"apply_fn": apply_fn, "optimizer": optimizer, "config": algorithm}
  update = functools.partial(reward_model.update, **bound)
  new_state, metrics = jax.eval_shape(update, state, batch, jax.random.key(0))
  assert jax.tree.structure(new_state) == jax.tree.structure(state)
  assert metrics["loss"].shape == ()
