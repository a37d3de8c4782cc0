"""Conversations as prompts and completions, in every format of rows and up to token ids."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_checkpoints

from experiments.data import chats, encoding, learned_rewards, text

_SYSTEM = {"role": "system", "content": "Be brief."}
_USER = {"role": "user", "content": "Is the soup hot?"}
_YES = {"role": "assistant", "content": "yes"}
_NO = {"role": "assistant", "content": [{"type": "text", "text": "no"}]}


def _write(folder, *rows):
  path = folder / "data.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def _messages(chat):
  assert isinstance(chat, chats.Chat)
  return chat.messages


@pytest.mark.parametrize(
  ("row", "prompt"),
  [
    ({"prompt": [_SYSTEM, _USER], "chosen": [_YES], "rejected": [_NO]}, [_SYSTEM, _USER]),
    ({"prompt": [_USER], "chosen": [_USER, _YES], "rejected": [_USER, _NO]}, [_USER]),
    ({"prompt": [_USER], "chosen": "yes", "rejected": [_NO]}, [_USER]),
    ({"chosen": [_SYSTEM, _USER, _YES], "rejected": [_SYSTEM, _USER, _NO]}, [_SYSTEM, _USER]),
    ({"prompt": "Is the soup hot?", "chosen": [_YES], "rejected": [_NO]}, [_USER]),
    ({"prompt": "x", "chosen": [_USER, _YES], "rejected": [_USER, _NO]}, [_USER]),
  ],
)
def test_preferences(tmp_path, row, prompt):
  (found,) = text.load_preferences(_write(tmp_path, row))
  assert _messages(found.prompt) == prompt
  assert (found.chosen, found.rejected) == ("yes", "no")  # as judges and tables read them
  assert isinstance(found.chosen, chats.Chat) or row["chosen"] == "yes"


def test_preferences_with_fields_of_other_names(tmp_path):
  path = _write(tmp_path, {"q": [_USER], "good": [_YES], "bad": [_NO]})
  (found,) = text.load_preferences(path, ["q", "good", "bad"])
  assert _messages(found.prompt) == [_USER]


def test_scored_completions(tmp_path):
  row = {"prompt": [_USER], "completions": [[_YES], [_NO], "hm"], "rewards": [1, 0, 0.5]}
  (found,) = text.load_scored(_write(tmp_path, row))
  assert _messages(found.prompt) == [_USER] and found.completions == ("yes", "no", "hm")
  (found,) = text.load_scored(
    _write(tmp_path, {"prompt": "Hi", "completion": [_YES], "label": True})
  )
  assert _messages(found.prompt) == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
  "row", [{"messages": [_USER, _YES]}, {"prompt": [_USER], "completion": [_YES]}]
)
def test_demonstrations_and_prompts(tmp_path, row):
  path = _write(tmp_path, row)
  (found,) = text.load_demonstrations(path)
  assert _messages(found.prompt) == [_USER] and found.references == ("yes",)
  (prompt,) = text.load_prompts(path)
  assert _messages(prompt) == [_USER] and prompt == found.prompt == "Is the soup hot?"


def test_prompts_alone(tmp_path):
  path = _write(tmp_path, {"messages": [_SYSTEM, _USER]}, {"prompt": [_USER]}, {"prompt": "Hi"})
  first, second, third = text.load_prompts(path)
  assert _messages(first) == [_SYSTEM, _USER] and _messages(second) == [_USER]
  assert not isinstance(third, chats.Chat)
  assert first == "system: Be brief.\nuser: Is the soup hot?"


@pytest.mark.parametrize(
  ("row", "match"),
  [
    ({"prompt": [{"role": "user"}], "completion": [_YES]}, r"prompt\[0\] has a content"),
    ({"prompt": ["Hi", _USER], "completion": [_YES]}, r"prompt\[0\] must be a message"),
    ({"prompt": [], "completion": [_YES]}, "prompt must be a text, found list"),
    ({"prompt": [_USER], "completion": [_USER]}, "must be the assistant's turn"),
    ({"prompt": [_USER], "completion": []}, "completion must be a text, found list"),
    ({"completion": "yes"}, "'prompt' is missing"),
    ({"completion": [_YES]}, "'prompt' is missing"),
  ],
)
def test_bad_messages_are_named(tmp_path, row, match):
  with pytest.raises(ValueError, match=rf"line 1: .*{match}"):
    text.load_demonstrations(_write(tmp_path, row))


def _ids(words, prompt, completion):
  tokens, mask = encoding.encode_prompts(words, [prompt], max_length=80)
  after, after_mask = encoding.encode_completions(
    words, [completion], prompts=[prompt], max_length=80
  )
  return tokens[mask > 0].tolist(), after[after_mask > 0].tolist()


def test_model_reads_its_own_format():
  words = tiny_checkpoints.make_tokenizer()
  prompt, completion = chats.Chat([_USER]), chats.Chat([_YES])
  before, after = _ids(words, prompt, completion)
  assert words.decode(before, skip_special_tokens=False) == words.apply_chat([_USER])
  # The end token of the template is the end of the completion; its line break is not sampled.
  assert words.decode(after, skip_special_tokens=False) == "yes<|im_end|>"
  assert after == words.encode_completion("yes")
  # An answer that a model has drawn is text, and means the same.
  assert _ids(words, prompt, "yes") == (before, after)


def test_template_that_rewrites_the_prompt_is_refused():
  source = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
  words = tiny_checkpoints.make_tokenizer(source)
  with pytest.raises(ValueError, match=r"^completion 0 .*writes the prompt differently"):
    _ids(words, chats.Chat([_USER]), chats.Chat([_YES]))


def test_model_without_a_template_says_so():
  words = dataclasses.replace(tiny_checkpoints.make_tokenizer(), chat_template=None)
  with pytest.raises(ValueError, match="no chat template"):
    encoding.encode_prompts(words, [chats.Chat([_USER])], max_length=80)


def test_learned_reward_reads_the_conversation_in_its_own_format():
  words = tiny_checkpoints.make_tokenizer()
  settings = learned_rewards.Settings("bradley_terry", 80, 16)
  chat = chats.Chat([_USER])
  ours = learned_rewards.encode(words, settings, [chat], ["yes"])
  plain = learned_rewards.encode(words, settings, [words.apply_chat([_USER])], ["yes"])
  for a, b in zip(ours, plain, strict=True):
    np.testing.assert_array_equal(a, b)
