"""Where prompts end and completions begin: start tokens, end tokens, spaces, chat templates.

The tokenizers are the three kinds of the Llama family: byte-level (GPT-2, Llama 3), Prepend (the
normalizer of the first Llama conversions) and Metaspace (newer ones, in its schemes).
"""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from alignment.models import chat_templates, tokenizer

_SPECIAL = ["<s>", "</s>", "<unk>", "[/INST]"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_WORDS = ["▁The", "▁soup", "▁was", "▁cold", "was", "▁", *"Thesoupwacld"]
KINDS = ["bytes", "prepend", "metaspace", "metaspace first", "metaspace never"]


def _merges(words, vocabulary):
  """Merges that build each word from the left."""
  found = []
  for word in words:
    for end in range(2, len(word) + 1):
      pair = (word[: end - 1], word[end - 1])
      if pair not in found:
        found.append(pair)
      vocabulary.setdefault(word[:end], len(vocabulary))
  return found


def _sentencepiece(kind):
  vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*_SPECIAL, *_BYTES]))}
  for word in _WORDS:
    for character in word:
      vocabulary.setdefault(character, len(vocabulary))
  merges = _merges(_WORDS, vocabulary)
  backend = tokenizers.Tokenizer(
    models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
  )
  if kind == "prepend":
    backend.normalizer = normalizers.Sequence(
      [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    ends = [decoders.Strip(" ", 1, 0)]
  else:
    scheme = {"metaspace": "always"}.get(kind, kind.removeprefix("metaspace "))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    ends = [] if scheme == "never" else [decoders.Strip(" ", 1, 0)]
  backend.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
  )
  return backend


def _byte_level():
  vocabulary = {token: i for i, token in enumerate(_SPECIAL)}
  for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
    vocabulary.setdefault(character, len(vocabulary))
  merges = _merges(["Ġsoup", "Ġwas", "was"], vocabulary)
  backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  return backend


def _make(kind, around=("<s>", None), **fields):
  """A tokenizer of a kind, with tokens around whole texts; `pad_id` is `eos_id`."""
  backend = _byte_level() if kind == "bytes" else _sentencepiece(kind)
  backend.add_special_tokens(_SPECIAL)
  start, end = around
  backend.post_processor = processors.TemplateProcessing(
    single=[*([start] if start else []), "$A", *([end] if end else [])],
    special_tokens=[(token, _SPECIAL.index(token)) for token in around if token],
  )
  return tokenizer.Tokenizer(backend, eos_id=1, pad_id=1, bos_id=0, **fields)


def _words(made, ids):
  return [made.backend.id_to_token(i) for i in ids]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("around", [("<s>", None), ("<s>", "</s>"), (None, "</s>"), (None, None)])
@pytest.mark.parametrize("text", ["The soup", "<s>The soup", "<s>", ""])
def test_prompt_starts_once_and_does_not_end(kind, around, text):
  made = _make(kind, around)
  ids = made.encode_prompt(text)
  assert ids.count(0) == (around[0] is not None or text.startswith("<s>"))
  assert 1 not in ids
  assert ids[ids.count(0) :] == made.encode(text.removeprefix("<s>")) or text.startswith("<s>")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["The soup", "The soup ", "The so", "日", None])
@pytest.mark.parametrize("text", [" was cold", "was cold", " ", "up", " 日本語", "\nwas", "  was"])
def test_decode_inverts_encode_in_context(kind, prompt, text):
  made = _make(kind, ("<s>", "</s>"))
  ids = made.encode_completion(text, prompt=prompt)
  assert made.decode_completion(ids, prompt=prompt) == text
  assert ids.count(1) == 1 and ids[-1] == 1 and 0 not in ids
  assert made.decode_completion(ids[:-1], prompt=prompt) == text
  if prompt is not None:
    # The model reads the two texts and nothing between them.
    assert made.decode([*made.encode_prompt(prompt), *ids]) == prompt + text


@pytest.mark.parametrize("kind", KINDS[1:])
def test_space_at_the_border_is_one_token_with_its_word(kind):
  made = _make(kind)
  for prompt in ("The soup", None):
    assert _words(made, made.encode_completion(" was", prompt=prompt)) == ["▁was", "</s>"]
    assert _words(made, made.encode_completion("was", prompt=prompt)) == ["was", "</s>"]


@pytest.mark.parametrize("kind", ["prepend", "metaspace"])
def test_space_that_a_tokenizer_puts_after_special_tokens(kind):
  # As Mistral's templates are read: `[/INST]` is a token, and each text after one is a beginning.
  made = _make(kind)
  ids = made.encode_completion("was", prompt="The[/INST]")
  assert _words(made, ids) == ["▁was", "</s>"]
  assert made.encode("The[/INST]was") == [*made.encode("The[/INST]"), *ids[:-1]]
  assert made.decode_completion(ids, prompt="The[/INST]") == "was"
  assert made.decode_completion(ids, prompt="The") == " was"


def test_decoder_that_takes_a_space_off_by_itself():
  made = _make("metaspace")
  made.backend.decoder = decoders.Metaspace(prepend_scheme="always")
  assert made.decode_completion(made.encode_completion(" was")) == " was"


@pytest.mark.parametrize("kind", KINDS)
def test_character_cut_in_the_middle(kind):
  made = _make(kind)
  ids = made.encode_completion(" was 日", prompt="The")
  cut = ids[:-2]  # without the end and the last byte
  found = made.decode_completion(cut, prompt="The")
  assert found.startswith(" was ") and set(found.removeprefix(" was ")) == {"\ufffd"}
  # The rest of a character whose beginning is in the prompt.
  assert set(made.decode_completion(ids[-2:-1])) == {"\ufffd"}


@pytest.mark.parametrize("kind", KINDS)
def test_end_is_there_once(kind):
  made = _make(kind, eos_ids=(3,))  # [/INST] ends too
  plain = made.encode_completion(" was")
  for text in (" was</s>", " was</s>\n", " was</s></s>"):
    assert made.encode_completion(text) == plain
  assert made.encode_completion(" was[/INST]") == [*plain[:-1], 3]
  # A token that ends, and after it more words: the text is not over there.
  longer = made.encode_completion(" was</s> cold")
  assert longer.count(1) == 2 and longer[-1] == 1
  assert made.encode_completion("") == [1]


def test_end_tokens_are_the_union_of_the_files(tmp_path):
  _make("bytes").save(tmp_path)
  (tmp_path / "config.json").write_text('{"eos_token_id": [1, 2], "pad_token_id": -1}')
  settings = {"eos_token_id": [2, 3], "temperature": 0.6, "bos_token_id": 0}
  (tmp_path / "generation_config.json").write_text(json.dumps(settings))
  loaded = tokenizer.load(tmp_path)
  assert loaded.eos_id == 1 and loaded.eos_ids == (1, 2, 3)
  assert loaded.fingerprint != _make("bytes").fingerprint
  loaded.save(tmp_path / "again")
  kept = json.loads((tmp_path / "again" / "generation_config.json").read_text())
  assert kept == {**settings, "eos_token_id": [1, 2, 3], "pad_token_id": 1}
  again = tokenizer.load(tmp_path / "again")
  assert again.eos_ids == (1, 2, 3) and again.fingerprint == loaded.fingerprint


@pytest.mark.parametrize("value", ['"</s>"', "1.5", "[null, true]"])
def test_end_token_of_another_type_is_refused(tmp_path, value):
  _make("bytes").save(tmp_path)
  (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')
  with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id=.*whole number"):
    tokenizer.load(tmp_path)


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": False}, {"add_eos_token": True}])
def test_stored_post_processor_goes_before_flags(tmp_path, flags):
  transformers = pytest.importorskip("transformers")
  _make("bytes").save(tmp_path)
  path = tmp_path / "tokenizer_config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **flags}))
  loaded = tokenizer.load(tmp_path)
  expected = loaded.encode("x", add_special_tokens=True)
  assert expected == [0, *loaded.encode("x")]
  assert transformers.AutoTokenizer.from_pretrained(tmp_path)("x")["input_ids"] == expected


# --- chat templates -------------------------------------------------------------------------------

_USER = {"role": "user", "content": "Hi <b> é"}
_ASSISTANT = {"role": "assistant", "content": "Yes"}
_PARTS = {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image"}]}
_TEMPLATES = {
  "tools": "{% if tools is not none %}T{% endif %}{{ tools is defined }} {{ tools is none }}",
  "documents": "{{ documents is none }}{% if not documents %} none{% endif %}",
  "special tokens": "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token }}"
  "|{{ sep_token is defined }}|{{ image_token }}",
  "generation": "{% for m in messages %}{% if m.role == 'assistant' %}"
  "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
  "{% else %}{{ m.content }}{% endif %}{% endfor %}",
  "scopes": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
  "parts": "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
  "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% else %}<{{ p.type }}>"
  "{% endif %}{% endfor %}{% endif %}{% endfor %}",
  "loops": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
  "{{ m.role }}{% endfor %}",
  "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}"
  "{{ messages[0] | tojson(sort_keys=true, separators=(',', ':')) }}",
  "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
  "{% endfor %}{{ ns.n }}",
  "blocks": "  {% if true %}\n  a\n  {% endif %}\nb{% if add_generation_prompt %}!{% endif %}",
  "date": "{{ strftime_now('%Y') }}{% if date_string is not defined %}d{% endif %}",
}


@pytest.mark.parametrize("name", _TEMPLATES)
@pytest.mark.parametrize("opens", [True, False])
def test_template_equals_the_rendering_of_transformers(tmp_path, name, opens):
  transformers = pytest.importorskip("transformers")
  tokens = {"unk_token": "<unk>", "image_token": "[/INST]"}
  made = _make("bytes", chat_template=_TEMPLATES[name], special_tokens=tokens)
  made.save(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  messages = [_USER, _ASSISTANT, _PARTS] if name in ("parts", "json") else [_USER, _ASSISTANT]
  loaded = tokenizer.load(tmp_path)
  expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens)
  for words in (made, loaded):
    assert words.apply_chat(messages, add_generation_prompt=opens) == expected


@pytest.mark.parametrize("source", ["{{ messages[0].content + 'x' }}", "{{ messages[0][7].x }}"])
def test_template_that_cannot_read_parts(source):
  with pytest.raises(ValueError, match="refuses these messages"):
    chat_templates.render(source, [_PARTS], add_generation_prompt=True)
