"""Text data: prompts, scored completions, preference pairs and their token arrays.

Three kinds of file, all UTF-8; blank lines are skipped, fields that are not listed are ignored:

| file                  | one line each                                                            |
|-----------------------|--------------------------------------------------------------------------|
| prompts, text         | the prompt itself; white space around it is removed                      |
| prompts, `.jsonl`     | `{"prompt": "The soup was"}`, kept as it is                              |
| scored completions    | `{"prompt": ..., "completions": [K texts], "rewards": [K numbers]}`      |
| preference pairs      | `{"prompt": ..., "chosen": ..., "rejected": ..., "chosen_prob": 0.8}`    |

`chosen_prob` is optional: the probability that `chosen` wins, 1 by default. A completion follows
its prompt without a separator, so it brings its own leading space: `" was cold."`.

Every error names the file and the line. `batches` and `SampleCache`, which do not depend on text,
live in `batching.py` and `sample_cache.py` and bear their names here too.
"""

import collections
import dataclasses
import hashlib
import importlib.resources
import json
import math
import os
import pathlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.data import batching, sample_cache

batches = batching.batches
cache_key = sample_cache.cache_key
SampleCache = sample_cache.SampleCache

_Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Scored:
  """K >= 2 completions of one prompt and their rewards."""

  prompt: str
  completions: tuple[str, ...]
  rewards: tuple[float, ...]
  where: str = dataclasses.field(default="", compare=False)  # file and line, for errors


@dataclasses.dataclass(frozen=True)
class Preference:
  """Two completions of one prompt; `chosen` wins with probability `chosen_prob`."""

  prompt: str
  chosen: str
  rejected: str
  chosen_prob: float = 1.0
  where: str = dataclasses.field(default="", compare=False)  # file and line, for errors


class Pairs(NamedTuple):
  """M pairs out of `[N, K]` rewards, as indices into that array."""

  example: np.ndarray  # [M] row n
  chosen: np.ndarray  # [M] column with the higher reward
  rejected: np.ndarray  # [M] column with the lower reward
  num_ties: int  # candidate pairs left out because both rewards are equal


def _lines(path: _Path) -> Iterator[tuple[str, str]]:
  """Yields ("file, line 3", text) of every line that is not blank."""
  try:
    data = pathlib.Path(path).read_bytes()
  except OSError as error:
    raise ValueError(f"cannot read {path}: {error.strerror}; give an existing file") from error
  # Not str.splitlines: it would also break lines at characters that JSON strings may hold.
  for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
    where = f"{path}, line {number}"
    try:
      text = line.decode("utf-8")
    except UnicodeDecodeError as error:
      raise ValueError(f"{where}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    if text.strip():
      yield where, text.removesuffix("\r")


def _rows(path: _Path) -> Iterator[tuple[str, dict[str, Any]]]:
  for where, line in _lines(path):
    try:
      row = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise ValueError(f"{where}: not JSON ({error}); write one object a line") from None
    if not isinstance(row, dict):
      raise ValueError(f"{where}: expected an object {{...}}, found {type(row).__name__}")
    yield where, row


def _field(row: dict[str, Any], name: str, where: str) -> Any:
  if name not in row:
    raise ValueError(f"{where}: field {name!r} is missing; found {sorted(row)}")
  return row[name]


def _text(value: Any, name: str, where: str) -> str:
  if not isinstance(value, str):
    raise ValueError(f"{where}: {name} must be a text, found {type(value).__name__}")
  if not value.strip():
    raise ValueError(f"{where}: {name} is empty; remove the row or write a text")
  if any("\ud800" <= c <= "\udfff" for c in value):  # JSON may escape what no text can hold
    raise ValueError(f"{where}: {name} holds half of a surrogate pair (\\ud800 to \\udfff)")
  return value


def _number(value: Any, name: str, where: str) -> float:
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise ValueError(f"{where}: {name} must be a number, found {type(value).__name__}")
  try:
    number = float(value)
  except OverflowError:
    number = math.inf
  if not math.isfinite(number):
    raise ValueError(f"{where}: {name} is {number}; it must be finite")
  return number


def load_prompts(path: _Path | None = None) -> list[str]:
  """Returns the prompts of a file, or our own (over 500) when `path` is None.

  Ours are unfinished sentences of 5 to 10 words on everyday topics, written for this project and
  neutral in themselves, so that a continuation may turn out well or badly.

  Raises:
    ValueError: file unreadable, not UTF-8, without prompts, or a prompt that occurs twice (it
      could land in the training and in the test split).
  """
  if path is None:
    packaged = importlib.resources.files("experiments.data").joinpath("prompts.txt")
    return packaged.read_text(encoding="utf-8").splitlines()
  seen: dict[str, str] = {}
  if pathlib.Path(path).suffix in (".jsonl", ".json"):
    rows = _rows(path)
    found = [(where, _text(_field(row, "prompt", where), "prompt", where)) for where, row in rows]
  else:
    found = [(where, line.strip()) for where, line in _lines(path)]
  for where, prompt in found:
    if prompt in seen:
      raise ValueError(f"{where}: prompt {prompt!r} already stands in {seen[prompt]}; remove one")
    seen[prompt] = where
  if not seen:
    raise ValueError(f"{path} holds no prompts; write one a line")
  return list(seen)


def split_prompts(
  prompts: Sequence[str],
  *,
  test_fraction: float | None = None,
  num_test: int | None = None,
  seed: int = 0,
) -> tuple[list[str], list[str]]:
  """Returns (train, test), disjoint, each in the order of `prompts`.

  Which side a prompt falls on depends on a hash of its text and `seed`, not on its position: a
  reordered file gives the same split.

  Raises:
    ValueError: both or none of `test_fraction`, `num_test` given; a side would be empty;
      `prompts` holds a prompt twice.

  Example:
    >>> split_prompts(["a", "b", "c", "d"], num_test=1, seed=0)
    (['a', 'b', 'c'], ['d'])
  """
  if (test_fraction is None) == (num_test is None):
    raise ValueError("give either test_fraction or num_test")
  if test_fraction is not None:
    if not 0 < test_fraction < 1:
      raise ValueError(f"test_fraction is {test_fraction}; it must lie between 0 and 1")
    num_test = max(1, round(test_fraction * len(prompts)))
  assert num_test is not None
  if not 0 < num_test < len(prompts):
    raise ValueError(
      f"num_test is {num_test} of {len(prompts)} prompts; both sides need at least one"
    )
  repeated = [p for p, count in collections.Counter(prompts).items() if count > 1]
  if repeated:
    raise ValueError(f"prompts holds {repeated[0]!r} twice: it could fall on both sides")
  ranked = sorted(prompts, key=lambda p: hashlib.sha256(f"{seed}:{p}".encode()).digest())
  test = set(ranked[:num_test])
  return [p for p in prompts if p not in test], [p for p in prompts if p in test]


def load_scored(path: _Path) -> list[Scored]:
  """Reads JSON lines of {prompt, completions[K], rewards[K]}; every row has the same K >= 2.

  Raises:
    ValueError: naming file and line, on a row that does not fit; on a file without rows.
  """
  scored: list[Scored] = []
  for where, row in _rows(path):
    prompt = _text(_field(row, "prompt", where), "prompt", where)
    texts, rewards = (_field(row, name, where) for name in ("completions", "rewards"))
    if not isinstance(texts, list) or not isinstance(rewards, list):
      raise ValueError(f"{where}: completions and rewards must be lists")
    if len(texts) != len(rewards):
      raise ValueError(f"{where}: {len(texts)} completions but {len(rewards)} rewards")
    if len(texts) < 2:
      raise ValueError(
        f"{where}: {len(texts)} completions; rewards are compared, so give 2 or more"
      )
    if scored and len(texts) != len(scored[0].completions):
      raise ValueError(
        f"{where}: {len(texts)} completions, but the rows before have "
        f"{len(scored[0].completions)}; one batch array holds them all, so give every row the same"
      )
    scored.append(
      Scored(
        prompt,
        tuple(_text(text, f"completions[{i}]", where) for i, text in enumerate(texts)),
        tuple(_number(reward, f"rewards[{i}]", where) for i, reward in enumerate(rewards)),
        where,
      )
    )
  if not scored:
    raise ValueError(f"{path} holds no rows of {{prompt, completions, rewards}}")
  return scored


def load_preferences(path: _Path) -> list[Preference]:
  """Reads JSON lines of {prompt, chosen, rejected} and, optionally, chosen_prob in [0, 1].

  A row whose two texts are the same is left out with a warning: its margin is zero whatever the
  policy, so it teaches nothing.

  Raises:
    ValueError: naming file and line, on a row that does not fit; on a file without (such) rows.
  """
  preferences, identical = [], []
  for where, row in _rows(path):
    prompt, chosen, rejected = (
      _text(_field(row, name, where), name, where) for name in ("prompt", "chosen", "rejected")
    )
    chosen_prob = _number(row.get("chosen_prob", 1.0), "chosen_prob", where)
    if not 0 <= chosen_prob <= 1:
      raise ValueError(f"{where}: chosen_prob is {chosen_prob}; a probability lies in [0, 1]")
    if chosen == rejected:
      identical.append(where.rpartition(" ")[2])
    else:
      preferences.append(Preference(prompt, chosen, rejected, chosen_prob, where))
  if identical:
    more = ", ..." if len(identical) > 10 else ""
    warnings.warn(
      f"{path}: {len(identical)} pairs left out because chosen equals rejected "
      f"(line {', '.join(identical[:10])}{more})",
      stacklevel=2,
    )
  if not preferences:
    raise ValueError(f"{path} holds no rows of {{prompt, chosen, rejected}} that differ")
  return preferences


def reward_pairs(rewards: np.ndarray, *, pairs: str = "extreme") -> Pairs:
  """Turns rewards `[N, K]` into pairs of columns; the higher reward is chosen.

  Args:
    rewards: `[N, K]` finite numbers, K >= 2.
    pairs: "extreme" takes the highest against the lowest of each row, "all" every two columns.

  Example:
    >>> found = reward_pairs(np.array([[0.0, 2.0, 1.0], [5.0, 5.0, 5.0]]))
    >>> found.chosen, found.rejected, found.num_ties
    (array([1]), array([0]), 1)
  """
  rewards = np.asarray(rewards)
  if rewards.ndim != 2 or rewards.shape[1] < 2:
    raise ValueError(f"rewards must be [N, K] with K >= 2, found {rewards.shape}")
  num, k = rewards.shape
  if pairs == "extreme":
    example, left, right = np.arange(num), rewards.argmax(1), rewards.argmin(1)
  elif pairs == "all":
    upper = np.triu_indices(k, 1)
    example = np.repeat(np.arange(num), len(upper[0]))
    left, right = np.tile(upper[0], num), np.tile(upper[1], num)
  else:
    raise ValueError(f"pairs is {pairs!r}; choose 'extreme' or 'all'")
  gap = rewards[example, left] - rewards[example, right]
  keep = gap != 0
  chosen, rejected = np.where(gap > 0, left, right), np.where(gap > 0, right, left)
  return Pairs(example[keep], chosen[keep], rejected[keep], int((~keep).sum()))


def pairs_from_scored(
  scored: Sequence[Scored], *, pairs: str = "extreme"
) -> tuple[list[Preference], int]:
  """Returns (preferences, number of ties left out); see `reward_pairs`.

  Pairs of equal text are ties too. To keep the tokens a model has sampled, use `reward_pairs` on
  its arrays instead: text that is tokenised anew need not give the same tokens.
  """
  found = reward_pairs(np.array([row.rewards for row in scored]), pairs=pairs)
  preferences = [
    Preference(scored[n].prompt, scored[n].completions[i], scored[n].completions[j])
    for n, i, j in zip(found.example, found.chosen, found.rejected, strict=True)
    if scored[n].completions[i] != scored[n].completions[j]
  ]
  return preferences, found.num_ties + len(found.example) - len(preferences)


def encode_prompts(
  tokenizer: Any,
  prompts: Sequence[str],
  *,
  max_length: int,
  multiple: int = 8,
  truncate: str | None = None,
  names: Sequence[str] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Tokenises prompts, padded on the left so that their ends meet the completions.

  Args:
    tokenizer: an `alignment.models.tokenizer.Tokenizer`, or anything with
      `encode(text, add_special_tokens=)`, `eos_id`, `pad_id` and `vocab_size`.
    prompts: N texts.
    max_length: largest number of tokens of a prompt.
    multiple: P is rounded up to it (never past `max_length`): fewer shapes to compile for.
    truncate: None refuses a longer prompt; "left" drops its beginning.
    names: N words for the prompts in errors, such as file and line; by default their place and
      how they begin.

  Returns:
    tokens `[N, P]` int32 and mask `[N, P]` float32.

  Raises:
    ValueError: a prompt that is too long or has no tokens; a token outside the vocabulary.
  """
  # A prompt begins the sequence: models trained with a start token get theirs.
  rows = [list(tokenizer.encode(prompt, add_special_tokens=True)) for prompt in prompts]
  if truncate == "left":
    rows = [row[-max_length:] for row in rows]
  elif truncate is not None:
    raise ValueError(f"truncate is {truncate!r}; choose None or 'left'")
  return _pad(rows, "prompt", _names("prompt", prompts, names), tokenizer, max_length, multiple)


def encode_completions(
  tokenizer: Any,
  texts: Sequence[str],
  *,
  max_length: int,
  multiple: int = 8,
  truncate: str | None = None,
  names: Sequence[str] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Tokenises completions, each ended by EOS and padded on the right.

  Args and errors are those of `encode_prompts`; `max_length` counts the EOS, and
  `truncate="right"` drops the end of a longer completion (and with it the EOS).

  Returns:
    tokens `[N, T]` int32 and mask `[N, T]` float32, 1 up to and including EOS.
  """
  rows = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
  labels = _names("completion", texts, names)
  for label, row in zip(labels, rows, strict=True):
    if len(row) == 1:
      raise ValueError(f"{label} has no tokens; remove it")
  if truncate == "right":
    rows = [row[:max_length] for row in rows]
  elif truncate is not None:
    raise ValueError(f"truncate is {truncate!r}; choose None or 'right'")
  return _pad(rows, "completion", labels, tokenizer, max_length, multiple)


def _names(what: str, texts: Sequence[str], names: Sequence[str] | None) -> list[str]:
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
  left = what == "prompt"
  if max_length < 1 or multiple < 1:
    raise ValueError(f"max_length ({max_length}) and multiple ({multiple}) must be positive")
  if not rows:
    raise ValueError(f"no {what}s to tokenise: the data set is empty")
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
