"""A tokenizer with its special ids and chat template, read from a folder or a GGUF file.

A model reads `encode_prompt(x) + encode_completion(y, prompt=x)`: one start token, the prompt, the
completion, one end token. `decode_completion` is the way back.

It wraps a `tokenizers.Tokenizer`. `transformers` is not needed (its import takes more than a
second), but it can read the folders that `save` writes.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import processors

from alignment.models import chat_templates
from sharding import checks

_Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """Text to token ids and back.

  Attributes:
    backend: the tokenizer itself.
    eos_id: the token that ends a completion; it is appended to texts that lack one.
    pad_id: the token that fills rows. It often equals `eos_id`, so masks say what is padding, not
      ids.
    bos_id: the token that starts a text, for models that were trained with one.
    chat_template: Jinja source, or None for a model without a chat format.
    eos_ids: all tokens that end a completion, `eos_id` first; a chat model often has several.
    special_tokens: further special tokens by name, such as `unk_token`, for chat templates.
    generation: the fields of `generation_config.json`, kept for `save`, or None.
    ends_prompts: an encoder reads the prompts: they end with `eos_id`, and a completion is a text
      of its own.
  """

  backend: tokenizers.Tokenizer
  eos_id: int
  pad_id: int
  bos_id: int | None = None
  chat_template: str | None = None
  eos_ids: tuple[int, ...] = ()
  special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
  generation: Mapping[str, Any] | None = None
  ends_prompts: bool = False

  def __post_init__(self):
    object.__setattr__(self, "eos_ids", tuple(dict.fromkeys((self.eos_id, *self.eos_ids))))
    named = {"eos_id": self.eos_id, "pad_id": self.pad_id, "bos_id": self.bos_id}
    others = {f"eos_ids[{i}]": value for i, value in enumerate(self.eos_ids)}
    for name, value in {**named, **others}.items():
      if value is not None and self.backend.id_to_token(value) is None:
        raise ValueError(
          f"{name}={value} is not in the vocabulary of {self.vocab_size} tokens: the tokenizer "
          "and its settings belong to different models"
        )

  @property
  def vocab_size(self) -> int:
    """Number of tokens, special ones included. A model's embedding may have more, unused rows."""
    return self.backend.get_vocab_size()

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of the tokenizer as JSON, the special ids and the chat template."""
    settings: list[Any] = [self.backend.to_str(), self.eos_id, self.pad_id, self.bos_id]
    settings.append(self.chat_template)
    if len(self.eos_ids) > 1:
      settings.append(self.eos_ids)
    if self.special_tokens:
      settings.append(dict(self.special_tokens))
    if self.ends_prompts:
      settings.append("ends_prompts")
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

  def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Returns the ids of a whole text; special tokens spelled out in it become their ids.

    Args:
      text: any string.
      add_special_tokens: add the tokens that the tokenizer puts around a whole text. Prompts and
        completions have functions of their own.
    """
    return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

  def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """Returns the text of `ids`; invalid UTF-8 becomes replacement characters."""
    return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

  def encode_prompt(self, text: str) -> list[int]:
    """Returns the ids of a text that goes on: start token once, no end token that is not in it.

    For an encoder (`ends_prompts`) it ends with one end token.

    The start token is there if the tokenizer puts one before texts, or if `text` spells it out, as
    the output of `apply_chat` may; it is there once if both are so.
    """
    ids, start = self.encode(text), self._start_ids
    ids = ids if ids[: len(start)] == start else [*start, *ids]
    return [*ids, self.eos_id] if self.ends_prompts and ids[-1:] != [self.eos_id] else ids

  def encode_completion(self, text: str, *, prompt: str | None = None) -> list[int]:
    """Returns the ids of a text that follows a prompt, with one end token.

    The ids are those of the two texts together, where the prompt is a whole number of tokens in
    them. Elsewhere (a word is cut in two), and without a prompt, they are those of a text that
    follows another: a tokenizer that puts a space before texts puts none here.

    Args:
      text: the completion. If it spells out an end token, only white space may follow it, which is
        dropped, and no other is added.
      prompt: the text before it.
    """
    ids = self._following(text, prompt)
    last = max((i for i, token in enumerate(ids) if token in self.eos_ids), default=None)
    if last is None or self.decode(ids[last + 1 :], skip_special_tokens=False).strip():
      return [*ids, self.eos_id]
    while last and ids[last - 1] in self.eos_ids:
      last -= 1
    return ids[: last + 1]

  def decode_completion(self, ids: Sequence[int], *, prompt: str | None = None) -> str:
    """Returns the text of the ids of a completion: the inverse of `encode_completion`.

    A space at the beginning is kept, since it parts the completion from its prompt. Characters of
    which only some bytes are there become replacement characters. Special tokens are left out.

    Args:
      ids: of a completion, with or without end tokens.
      prompt: the text before it. It matters only after a special token, where some tokenizers put
        a space of their own.
    """
    kept = [int(i) for i in ids]
    while kept and kept[-1] in self.eos_ids:  # not every model marks them as special
      kept.pop()
    backend = self.backend if self._starts_afresh(prompt) else self._continuation
    return backend.decode(kept, skip_special_tokens=True)

  @functools.cached_property
  def _start_ids(self) -> list[int]:
    """What the tokenizer puts before a whole text."""
    plain, whole = self.encode("a"), self.encode("a", add_special_tokens=True)
    starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[: next(starts, 0)]

  @functools.cached_property
  def _continuation(self) -> tokenizers.Tokenizer:
    """The same tokenizer without the space that it puts before, or takes from, whole texts."""
    stored = json.loads(self.backend.to_str())
    changed = _without_prefix(stored)
    return self.backend if changed == stored else tokenizers.Tokenizer.from_str(json.dumps(changed))

  def _following(self, text: str, prompt: str | None) -> list[int]:
    if self.ends_prompts:
      return self.encode(text)
    if prompt is not None:
      before, both = self.encode(prompt), self.encode(prompt + text)
      if both[: len(before)] == before:
        return both[len(before) :]
    return self._continuation.encode(text, add_special_tokens=False).ids

  def _starts_afresh(self, prompt: str | None) -> bool:
    """Whether a text after the prompt is encoded as at the beginning, with a space before it."""
    if self.ends_prompts:
      return True
    if prompt is None or self._continuation is self.backend:
      return False
    return self._following("a", prompt) != self._following("a", None)

  def apply_chat(
    self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
  ) -> str:
    """Returns a conversation in the text format that the model was trained on.

    Args:
      messages: `{"role": "user", "content": "Hello"}` and so on. Contents that are lists of parts,
        `[{"type": "text", "text": "Hello"}]`, are for templates that read such.
      add_generation_prompt: end with the opening of the assistant's turn.

    Returns:
      Text for `encode`, special tokens spelled out.

    Raises:
      ValueError: there is no chat template, or it refuses the messages.
    """
    if self.chat_template is None:
      raise ValueError(
        "this tokenizer has no chat template (a base model?): pass the prompt as plain text"
      )
    return chat_templates.render(
      self.chat_template,
      messages,
      add_generation_prompt=add_generation_prompt,
      **self._named_tokens(),
    )

  def save(self, folder: _Path) -> None:
    """Writes the files that `load` and transformers read.

    They are `tokenizer.json`, `tokenizer_config.json` and, if several tokens end a completion or
    there was one before, `generation_config.json`.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "clean_up_tokenization_spaces": False,
      **self._named_tokens(),
      "chat_template": self.chat_template,
    }
    settings = {key: value for key, value in settings.items() if value is not None}
    self.backend.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", settings)
    if self.generation is not None or len(self.eos_ids) > 1:
      _write_json(folder / "generation_config.json", {**(self.generation or {}), **self.ids()})

  def ids(self) -> dict[str, Any]:
    """Returns the special ids as `config.json` and `generation_config.json` hold them."""
    return {
      "bos_token_id": self.bos_id,
      "eos_token_id": self.eos_id if len(self.eos_ids) == 1 else list(self.eos_ids),
      "pad_token_id": self.pad_id,
    }

  def _named_tokens(self) -> dict[str, str]:
    ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
    tokens = {n: self.backend.id_to_token(i) for n, i in ids.items() if i is not None}
    return {**self.special_tokens, **{n: token for n, token in tokens.items() if token}}


def load(folder: _Path) -> Tokenizer:
  """Reads the tokenizer of a Hugging Face folder.

  Args:
    folder: holds `tokenizer.json`, which says what goes around texts (as in transformers, the flags
      `add_bos_token` and `add_eos_token` beside it do not), and the special tokens in
      `tokenizer_config.json` (as text), `config.json` or `generation_config.json` (as ids). Without
      a padding token the end-of-text token serves as padding. Every end token that a file names
      ends a completion. `is_encoder_decoder` in `config.json` sets `ends_prompts`.

  Raises:
    ValueError: a file is absent or unreadable, or no file names the end-of-text token.
  """
  folder = pathlib.Path(folder)
  path = folder / "tokenizer.json"
  if not path.is_file():
    raise ValueError(
      f"{folder} has no tokenizer.json; write one with transformers: "
      "AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
    )
  try:
    backend = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises bare Exception
    raise ValueError(f"cannot read {path}: {error}; is it cut short? Copy it again") from error
  # A stored truncation or padding would silently cut or lengthen every text.
  backend.no_truncation()
  backend.no_padding()
  settings, model, generation = (
    _read_json(folder / name)
    for name in ("tokenizer_config.json", "config.json", "generation_config.json")
  )

  def special(name: str) -> list[int]:
    token = _content(settings.get(f"{name}_token"))
    found: list[int] = []
    if token is not None:
      index = backend.token_to_id(token)
      if index is None:
        raise ValueError(
          f"{folder}: {name}_token {token!r} of tokenizer_config.json is not in tokenizer.json"
        )
      found.append(index)
    for file, fields in (("config.json", model), ("generation_config.json", generation)):
      value = fields.get(f"{name}_token_id")
      for index in value if isinstance(value, list) else [value]:
        if not (index is None or checks.is_integer(index)):
          raise ValueError(
            f"{folder / file}: {name}_token_id={value!r} must be a whole number, or a list of them"
          )
        # -1 stands for "none" in some files.
        found += [index] if index is not None and index >= 0 else []
    return found

  eos_ids = special("eos")
  if not eos_ids:
    raise ValueError(
      f"{folder} names no end-of-text token: add eos_token to tokenizer_config.json or "
      "eos_token_id to config.json"
    )
  bos_id, pad_id = (next(iter(special(name)), None) for name in ("bos", "pad"))
  template = settings.get("chat_template")
  if isinstance(template, list):  # several templates by name
    template = {entry["name"]: entry["template"] for entry in template}.get("default")
  if (folder / "chat_template.jinja").is_file():
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
  # Models add names of their own, at the top or in a group: templates may use any of them.
  group = settings.get("extra_special_tokens")
  named = {name: token for name, token in settings.items() if name.endswith("_token")}
  tokens = {**named, **(group if isinstance(group, dict) else {})}
  tokens = {name: _content(token) for name, token in tokens.items()}
  return Tokenizer(
    backend=backend,
    eos_id=eos_ids[0],
    pad_id=eos_ids[0] if pad_id is None else pad_id,
    bos_id=bos_id,
    chat_template=template,
    eos_ids=tuple(eos_ids),
    special_tokens={
      name: token
      for name, token in tokens.items()
      if isinstance(token, str) and name not in ("bos_token", "eos_token", "pad_token")
    },
    generation=generation or None,
    ends_prompts=bool(model.get("is_encoder_decoder")),
  )


def add_around(backend: tokenizers.Tokenizer, start: int | None, end: int | None) -> None:
  """Makes a tokenizer put these tokens around whole texts, and no others."""
  names = {f"{i}": i for i in (start, end) if i is not None}
  special = [(backend.id_to_token(i), i) for i in names.values()]
  before = [] if start is None else [backend.id_to_token(start)]
  after = [] if end is None else [backend.id_to_token(end)]
  backend.post_processor = processors.TemplateProcessing(
    single=[*before, "$A", *after], special_tokens=special
  )


def _content(token: Any) -> str | None:
  return token.get("content") if isinstance(token, dict) else token


def _without_prefix(part: Any) -> Any:
  """Returns a stored tokenizer without the space that it adds to, or removes from, a beginning."""
  if isinstance(part, list):
    parts = (_without_prefix(x) for x in part)
    return [x for x in parts if not (isinstance(x, dict) and x.get("type") == "Prepend")]
  if not isinstance(part, dict):
    return part
  if "model" in part:  # the whole tokenizer; its vocabulary may be large
    stages = {name: _without_prefix(part[name]) for name in ("normalizer", "pre_tokenizer")}
    if (stages["normalizer"] or {}).get("type") == "Prepend":
      stages["normalizer"] = None
    decoder = part["decoder"] or {}
    if decoder.get("type") != "ByteLevel":  # which takes nothing off, whatever its flag says
      stages["decoder"] = _without_prefix(part["decoder"])
    return {**part, **stages}
  changed = {name: _without_prefix(value) for name, value in part.items()}
  match changed.get("type"):
    case "Metaspace":
      changed["prepend_scheme"] = "never"
    case "ByteLevel":
      changed["add_prefix_space"] = False
    case "Strip" if changed.get("content") == " ":
      changed["start"] = 0
  return changed


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    return {}
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"cannot read {path}: {error}; is it cut short? Copy it again") from error
  if not isinstance(value, dict):
    raise ValueError(f"{path} must hold a JSON object, found {type(value).__name__}")
  return value


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  text = json.dumps(value, indent=2, ensure_ascii=False)
  path.write_text(text + "\n", encoding="utf-8")
