"""A tokenizer with its special ids and chat template, read from a folder or a GGUF file.

It wraps a `tokenizers.Tokenizer`. `transformers` is not needed (its import takes more than a
second), but it can read the folders that `save` writes.
"""

import dataclasses
import datetime
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

_Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """Text to token ids and back.

  Attributes:
    backend: the tokenizer itself.
    eos_id: the token that ends a completion.
    pad_id: the token that fills rows. It often equals `eos_id`, so masks say what is padding, not
      ids.
    bos_id: the token that starts a text, for models that were trained with one.
    chat_template: Jinja source, or None for a model without a chat format.
  """

  backend: tokenizers.Tokenizer
  eos_id: int
  pad_id: int
  bos_id: int | None = None
  chat_template: str | None = None

  def __post_init__(self):
    for name in ("eos_id", "pad_id", "bos_id"):
      value = getattr(self, name)
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
    settings = [self.backend.to_str(), self.eos_id, self.pad_id, self.bos_id, self.chat_template]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

  def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Returns the ids of `text`; special tokens spelled out in it become their ids.

    Args:
      text: any string.
      add_special_tokens: add the tokens that the tokenizer puts around a text, such as a start
        token. Use it at the beginning of a prompt, but not for a completion or the output of
        `apply_chat`.
    """
    return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

  def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """Returns the text of `ids`; invalid UTF-8 becomes replacement characters."""
    return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

  def apply_chat(
    self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
  ) -> str:
    """Returns a conversation in the text format that the model was trained on.

    Args:
      messages: `{"role": "user", "content": "Hello"}` and so on.
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
    try:
      return _template(self.chat_template).render(
        messages=list(messages),
        add_generation_prompt=add_generation_prompt,
        bos_token=self._token(self.bos_id),
        eos_token=self._token(self.eos_id),
        pad_token=self._token(self.pad_id),
      )
    except jinja2.TemplateError as error:
      raise ValueError(f"the chat template refuses these messages: {error}") from error

  def save(self, folder: _Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, which transformers can read too."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "clean_up_tokenization_spaces": False,
      "bos_token": self._token(self.bos_id) or None,
      "eos_token": self._token(self.eos_id),
      "pad_token": self._token(self.pad_id),
      "chat_template": self.chat_template,
    }
    settings = {key: value for key, value in settings.items() if value is not None}
    self.backend.save(str(folder / "tokenizer.json"))
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

  def _token(self, index: int | None) -> str:
    return (index is not None and self.backend.id_to_token(index)) or ""


def load(folder: _Path) -> Tokenizer:
  """Reads the tokenizer of a Hugging Face folder.

  Args:
    folder: holds `tokenizer.json`, and the special tokens in `tokenizer_config.json` (as text) or
      `config.json` (as ids). Without a padding token the end-of-text token serves as padding.

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
  settings, model = _read_json(folder / "tokenizer_config.json"), _read_json(folder / "config.json")

  def special(name: str) -> int | None:
    token = settings.get(f"{name}_token")
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None:
      index = backend.token_to_id(token)
      if index is None:
        raise ValueError(
          f"{folder}: {name}_token {token!r} of tokenizer_config.json is not in tokenizer.json"
        )
      return index
    index = model.get(f"{name}_token_id")
    return index[0] if isinstance(index, list) else index

  eos_id = special("eos")
  if eos_id is None:
    raise ValueError(
      f"{folder} names no end-of-text token: add eos_token to tokenizer_config.json or "
      "eos_token_id to config.json"
    )
  pad_id = special("pad")
  template = settings.get("chat_template")
  if isinstance(template, list):  # several templates by name
    template = {entry["name"]: entry["template"] for entry in template}.get("default")
  if (folder / "chat_template.jinja").is_file():
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
  return Tokenizer(
    backend=backend,
    eos_id=eos_id,
    pad_id=eos_id if pad_id is None else pad_id,
    bos_id=special("bos"),
    chat_template=template,
  )


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


@functools.lru_cache(maxsize=16)
def _template(source: str) -> jinja2.Template:
  # Sandboxed: templates come with the weights, and anyone may have written them.
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
  )

  def raise_exception(message):
    raise jinja2.TemplateError(message)

  environment.globals["raise_exception"] = raise_exception
  environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
  environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
  return environment.from_string(source)
