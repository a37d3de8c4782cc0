"""Token arrays of prompts and completions, with masks and checks of the vocabulary."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.data import chats


def encode_prompts(
  tokenizer: Any,
  prompts: Sequence[str],
  *,
  max_length: int,
  multiple: int = 8,
  truncate: str | None = None,
  names: Sequence[str] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Tokenises prompts and pads them on the left, so that completions follow without a gap.

  Args:
    tokenizer: an `alignment.models.tokenizer.Tokenizer`, or anything with its `encode_prompt`,
      `encode_completion`, `bos_id`, `pad_id` and `vocab_size`.
    prompts: N texts; a `chats.Chat` is put into the format of the tokenizer's chat template.
    max_length: largest number of tokens of a prompt.
    multiple: the length P is rounded up to a multiple of it, but not beyond `max_length`, so that
      fewer shapes are compiled.
    truncate: None raises for a longer prompt; "left" drops its beginning, but not a start token.
    names: N names of the prompts for error messages, such as file and line. By default a name is
      the number and the beginning of the prompt.

  Returns:
    tokens `[N, P]` int32 and mask `[N, P]` float32.

  Raises:
    ValueError: a prompt is too long or has no tokens, or a token lies outside the vocabulary.
  """
  encoded = [
    list(tokenizer.encode_prompt(chats.prompt_text(tokenizer, prompt))) for prompt in prompts
  ]
  if truncate == "left":
    encoded = [_without_beginning(row, max_length, tokenizer.bos_id) for row in encoded]
  elif truncate is not None:
    raise ValueError(f"truncate is {truncate!r}; choose None or 'left'")
  return _pad(encoded, "prompt", _names("prompt", prompts, names), tokenizer, max_length, multiple)


def encode_completions(
  tokenizer: Any,
  texts: Sequence[str],
  *,
  prompts: Sequence[str] | None = None,
  max_length: int,
  multiple: int = 8,
  truncate: str | None = None,
  names: Sequence[str] | None = None,
  allow_empty: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
  """Tokenises completions with one end token and pads them on the right.

  Arguments and errors are those of `encode_prompts`, with three differences: `prompts` are the N
  texts before the completions; `max_length` includes the EOS; `truncate` is None or "right", which
  drops the end of a longer completion together with its EOS. With `allow_empty`, a text without
  tokens becomes EOS alone, as a model can sample it.

  Returns:
    tokens `[N, T]` int32 and mask `[N, T]` float32, which is 1 up to and including EOS.
  """
  before = [None] * len(texts) if prompts is None else prompts
  labels = _names("completion", texts, names)
  encoded = []
  for label, text, prompt in zip(labels, texts, before, strict=True):
    try:
      text = chats.completion_text(tokenizer, prompt, text)
      prompt = None if prompt is None else chats.prompt_text(tokenizer, prompt)
    except ValueError as error:
      raise ValueError(f"{label}: {error}") from error
    encoded.append(list(tokenizer.encode_completion(text, prompt=prompt)))
  for label, row in zip(labels, encoded, strict=True):
    if len(row) == 1 and not allow_empty:
      raise ValueError(f"{label} has no tokens; remove it")
  if truncate == "right":
    encoded = [row[:max_length] for row in encoded]
  elif truncate is not None:
    raise ValueError(f"truncate is {truncate!r}; choose None or 'right'")
  return _pad(encoded, "completion", labels, tokenizer, max_length, multiple)


def _without_beginning(row: list[int], max_length: int, bos_id: int | None) -> list[int]:
  """Returns the end of a row; a start token stays before it."""
  kept = 1 if row[:1] == [bos_id] else 0
  return row if len(row) <= max_length else [*row[:kept], *row[kept + len(row) - max_length :]]


def _names(what: str, texts: Sequence[str], names: Sequence[str] | None) -> list[str]:
  """Returns the names of texts for error messages."""
  if names is not None:
    return list(names)
  return [
    f"{what} {n} ({text if len(text) < 40 else text[:36] + '...'!r})"
    for n, text in enumerate(texts)
  ]


def _pad(
  rows: list[list[int]],
  what: str,
  names: Sequence[str],
  tokenizer: Any,
  max_length: int,
  multiple: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns tokens and mask `[N, length]`; prompts are padded on the left, others on the right."""
  left = what == "prompt"
  if max_length < 1 or multiple < 1:
    raise ValueError(f"max_length ({max_length}) and multiple ({multiple}) must be positive")
  if not rows:
    raise ValueError(f"there are no {what}s to tokenise; give a data set that is not empty")
  for name, row in zip(names, rows, strict=True):
    if not row:
      raise ValueError(f"{name} has no tokens; remove it")
    if len(row) > max_length:
      raise ValueError(
        f"{name} has {len(row)} tokens, more than max_length={max_length}; shorten it or raise "
        f"data.{what}_length (in Python also: truncate={'left' if left else 'right'!r})"
      )
    if min(row) < 0 or max(row) >= tokenizer.vocab_size:
      outside = next(i for i in row if not 0 <= i < tokenizer.vocab_size)
      raise ValueError(
        f"{name} has token {outside}, outside the vocabulary of {tokenizer.vocab_size}; "
        "the tokenizer belongs to another model"
      )
  width = min(max_length, -(-max(map(len, rows)) // multiple) * multiple)
  tokens = np.full((len(rows), width), tokenizer.pad_id, np.int32)
  mask = np.zeros((len(rows), width), np.float32)
  for n, row in enumerate(rows):
    span = slice(width - len(row), width) if left else slice(0, len(row))
    tokens[n, span], mask[n, span] = row, 1
  return tokens, mask
