"""Runs that learn from messages: JSON lines, the model's chat template, training and export."""

import json
import math

import numpy as np
import pytest
import tiny_checkpoints

from alignment.models import huggingface, tokenizer
from experiments import main
from experiments.data import chats, text
from experiments.loop import presets
from experiments.tasks import language_offline

# As ChatML; contents are texts or lists of parts.
_TEMPLATE = (
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
  "{% if message['content'] is string %}{{ message['content'] }}"
  "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
  "{{ '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SYSTEM = {"role": "system", "content": "Be brief."}
_FOODS = ("soup", "tea", "rice", "bread", "fish", "milk", "corn", "egg", "jam", "pie", "nut", "fig")


def _turn(role, content):
  return {"role": role, "content": content}


@pytest.fixture
def files(tmp_path):
  """A model with a chat template, pairs of messages, and their prompts."""
  config = tiny_checkpoints.make_config()
  words = tiny_checkpoints.make_tokenizer(_TEMPLATE)
  params = tiny_checkpoints.make_params(config)
  huggingface.save(tmp_path / "chat_model", config, params, tokenizer=words)
  questions = [[_SYSTEM, _turn("user", f"Is the {food} hot?")] for food in _FOODS]
  pairs = [
    {
      "prompt": question,
      "chosen": [_turn("assistant", "oui, aie")],
      # Content as parts, and the whole conversation, as data sets have them.
      "rejected": [*question, _turn("assistant", [{"type": "text", "text": "hm"}])],
    }
    for question in questions
  ]
  for name, rows in (("pairs", pairs), ("prompts", [{"prompt": row} for row in questions])):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / f"{name}.jsonl").write_text(lines)
  return tmp_path


def _command(files, config, *arguments):
  return [
    f"--config={config}",
    f"--config.network.model={files / 'chat_model'}",
    f"--config.data.prompts={files / 'prompts.jsonl'}",
    "--config.data.num_prompts=8",
    "--config.data.prompt_length=96",
    "--config.data.completion_length=16",
    "--config.eval.num_prompts=4",
    "--config.train.batch_size=8",
    "--config.train.num_steps=3",
    *arguments,
  ]


def _config(command):
  overrides, (name,) = presets.split_overrides(command)
  return presets.override(presets.resolve(name.partition("=")[2]), overrides)


@pytest.mark.slow  # two runs: 40 seconds
@pytest.mark.parametrize(
  ("config", "arguments"),
  [("dpo:tiny", ["--config.data.preferences={}/pairs.jsonl"]), ("rloo:tiny", [])],
)
def test_a_run_from_messages(files, capsys, config, arguments):
  folder = files / "run"
  arguments = [argument.format(files) for argument in arguments]
  command = [*_command(files, config, *arguments), f"--workdir={folder}"]
  assert main.run(command) == 0, capsys.readouterr().err
  records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  losses = [record["loss"] for record in records if record["kind"] == "train"]
  assert len(losses) == 3 and all(map(math.isfinite, losses))
  # What was learned reads messages as the model before it did.
  exported = tokenizer.load(folder / "model")
  assert exported.chat_template == _TEMPLATE
  assert exported.eos_ids == tokenizer.load(files / "chat_model").eos_ids
  assert main.run(["--mode=sample", f"--workdir={folder}"]) == 0
  assert "user: Is the" in capsys.readouterr().out


def test_messages_are_tokens_of_the_chat_template(files):
  command = _command(files, "dpo:tiny", f"--config.data.preferences={files / 'pairs.jsonl'}")
  task = language_offline.make_task(_config(command))
  samples = task.training_samples(2)
  assert len(samples.prompts) == len(_FOODS) - 4  # the others are held out
  backend, end = task.model.tokenizer.backend, task.model.tokenizer.eos_id
  for row, prompt in enumerate(samples.prompts):
    assert isinstance(prompt, chats.Chat)
    start, question = "<|im_start|>", prompt.messages[1]["content"]
    ids = samples.prompt_tokens[row][samples.prompt_mask[row] > 0]
    assert backend.decode(list(ids), skip_special_tokens=False) == (
      f"{start}system\nBe brief.<|im_end|>\n{start}user\n{question}<|im_end|>\n{start}assistant\n"
    )
    for tokens, mask, words in zip(
      samples.tokens[row], samples.mask[row], ("oui, aie", "hm"), strict=True
    ):
      kept = tokens[mask > 0]
      assert list(kept).count(end) == 1 and kept[-1] == end
      assert backend.decode(list(kept), skip_special_tokens=True) == words
  assert set(task.test_prompts).isdisjoint(samples.prompts)
  assert len(text.load_prompts(files / "prompts.jsonl")) == len(_FOODS)
  assert np.isfinite(samples.ref_logps).all()
