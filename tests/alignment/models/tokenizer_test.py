"""Tests of alignment.models.tokenizer."""

import json

import pytest
import tiny_checkpoints

from alignment.models import tokenizer

TEXTS = ["the soup", "Le café, 2024!\n\n\tx", "日本語 🙂", "", " lead and trail ", "it's <b>"]
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("text", TEXTS)
def test_decode_inverts_encode(text):
  tiny = tiny_checkpoints.make_tokenizer()
  assert tiny.decode(tiny.encode(text)) == text


def test_merges_apply_and_digits_stay_apart():
  tiny = tiny_checkpoints.make_tokenizer()
  words = [tiny.backend.id_to_token(i) for i in tiny.encode(" the soup 24")]
  assert words == ["Ġthe", "Ġsoup", "Ġ", "2", "4"]


def test_special_tokens_are_single_ids_and_left_out_of_text():
  tiny = tiny_checkpoints.make_tokenizer()
  ids = tiny.encode("in<|im_end|>")
  assert ids[-1] == tiny.eos_id == 2 and len(ids) == 2
  assert tiny.decode(ids) == "in"
  assert tiny.decode(ids, skip_special_tokens=False) == "in<|im_end|>"


def test_chat_template_is_rendered():
  tiny = tiny_checkpoints.make_tokenizer()
  assert tiny.apply_chat(MESSAGES) == ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
  assert tiny.apply_chat(MESSAGES, add_generation_prompt=False).endswith("Hi<|im_end|>\n")


@pytest.mark.parametrize(
  ("template", "match"),
  [
    (None, "no chat template"),
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{{ messages.append(1) }}", "refuses"),  # sandboxed: a template changes nothing
    ("{{ ''.__class__.__mro__ }}", "refuses"),
  ],
)
def test_chat_template_errors(template, match):
  with pytest.raises(ValueError, match=match):
    tiny_checkpoints.make_tokenizer(template).apply_chat(MESSAGES)


def test_saved_folder_loads_the_same(tmp_path):
  tiny = tiny_checkpoints.make_tokenizer()
  tiny.save(tmp_path)
  loaded = tokenizer.load(tmp_path)
  assert loaded.fingerprint == tiny.fingerprint
  assert (loaded.eos_id, loaded.pad_id, loaded.bos_id) == (2, 2, 1)
  assert loaded.vocab_size == tiny.vocab_size == len(tiny_checkpoints.VOCABULARY)
  for text in TEXTS:
    assert loaded.encode(text) == tiny.encode(text)


def test_saved_folder_loads_in_transformers(tmp_path):
  transformers = pytest.importorskip("transformers")
  tiny = tiny_checkpoints.make_tokenizer()
  tiny.save(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for text in TEXTS:
    assert theirs(text, add_special_tokens=False)["input_ids"] == tiny.encode(text)
    assert theirs.decode(tiny.encode(text)) == text
  assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (2, 2, 1)
  chat = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
  assert chat == tiny.apply_chat(MESSAGES)


def test_fingerprint_tells_tokenizers_apart():
  first, second = tiny_checkpoints.make_tokenizer(), tiny_checkpoints.make_tokenizer("{{ 1 }}")
  assert first.fingerprint != second.fingerprint


def test_stored_truncation_is_switched_off(tmp_path):
  tiny = tiny_checkpoints.make_tokenizer()
  tiny.backend.enable_truncation(2)
  tiny.backend.enable_padding(length=8)
  tiny.save(tmp_path)
  assert len(tokenizer.load(tmp_path).encode("xyzw")) == 4


def test_ids_come_from_config_json_where_the_tokenizer_is_silent(tmp_path):
  tiny_checkpoints.make_tokenizer().save(tmp_path)
  (tmp_path / "tokenizer_config.json").write_text("{}")
  (tmp_path / "config.json").write_text('{"eos_token_id": [2, 0]}')
  loaded = tokenizer.load(tmp_path)
  assert (loaded.eos_id, loaded.pad_id, loaded.bos_id) == (2, 2, None)


def test_token_as_object_and_template_file(tmp_path):
  tiny_checkpoints.make_tokenizer().save(tmp_path)
  settings = {"eos_token": {"content": "<|endoftext|>"}, "chat_template": "old"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
  (tmp_path / "chat_template.jinja").write_text("new")
  loaded = tokenizer.load(tmp_path)
  assert loaded.eos_id == 0 and loaded.chat_template == "new"


def _break(folder, problem):
  if problem == "absent":
    (folder / "tokenizer.json").unlink()
  elif problem == "cut":
    whole = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(whole[: len(whole) // 2])
  elif problem == "settings cut":
    (folder / "tokenizer_config.json").write_text('{"eos_to')
  elif problem == "no eos":
    (folder / "tokenizer_config.json").write_text("{}")
  elif problem == "unknown eos":
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
  elif problem == "eos outside":
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "config.json").write_text('{"eos_token_id": 999}')


@pytest.mark.parametrize(
  ("problem", "match"),
  [
    ("absent", "has no tokenizer.json"),
    ("cut", "cannot read .*tokenizer.json"),
    ("settings cut", "cannot read .*tokenizer_config.json"),
    ("no eos", "no end-of-text token"),
    ("unknown eos", "'</s>'"),
    ("eos outside", "eos_id=999"),
  ],
)
def test_bad_folder_is_refused(tmp_path, problem, match):
  tiny_checkpoints.make_tokenizer().save(tmp_path)
  _break(tmp_path, problem)
  with pytest.raises(ValueError, match=match):
    tokenizer.load(tmp_path)
