"""Text data: prompts, scored completions, preference pairs and their token arrays.

Where rows come from (files, TensorFlow Datasets, Hugging Face, published formats) is the business
of `rows.py`; here is what they must hold. Fields that are not listed are ignored:

| data                  | one row each                                                             |
|-----------------------|--------------------------------------------------------------------------|
| prompts               | `{"prompt": "The soup was"}`, kept as it is                              |
| prompts, a text file  | the prompt itself; white space around it is removed                      |
| scored completions    | `{"prompt": ..., "completions": [K texts], "rewards": [K numbers]}`      |
| preference pairs      | `{"prompt": ..., "chosen": ..., "rejected": ..., "chosen_prob": 0.8}`    |
| demonstrations        | `{"prompt": ..., "completion": ..., "references": [texts]}`              |

`references`, optional, are all good completions of the prompt; `completion` alone by default.
`chosen_prob` is optional: the probability that `chosen` wins, 1 by default. A completion follows
its prompt without a separator, so it brings its own leading space: `" was cold."`.

Every error names the file and the line (or the row's index). `batches` and `SampleCache`, which do
not depend on text, live in `batching.py` and `sample_cache.py` and bear their names here too.
"""

import collections
import dataclasses
import hashlib
import importlib.resources
import os
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.data import batching, rows, sample_cache

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


@dataclasses.dataclass(frozen=True)
class Demonstration:
  """A completion to imitate; `references` are all good ones, this one among them or not."""

  prompt: str
  completion: str
  references: tuple[str, ...]
  where: str = dataclasses.field(default="", compare=False)  # file and line, for errors


class Pairs(NamedTuple):
  """M pairs out of `[N, K]` rewards, as indices into that array."""

  example: np.ndarray  # [M] row n
  chosen: np.ndarray  # [M] column with the higher reward
  rejected: np.ndarray  # [M] column with the lower reward
  num_ties: int  # candidate pairs left out because both rewards are equal


def load_prompts(path: _Path | None = None) -> list[str]:
  """Returns the prompts of a file or other source, or our own (over 500) when `path` is None.

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
  named = rows.split_name(path)[0] is not None
  if named or str(path).removesuffix(".gz").endswith((".jsonl", ".json")):
    found = [
      (where, rows.text(rows.field(row, "prompt", where), "prompt", where))
      for where, row in rows.read(path)
    ]
  else:
    found = [(where, line.strip()) for where, line in rows.lines(path)]
  for where, prompt in found:
    if prompt in seen and named:  # pairs and demonstrations share prompts
      continue
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
  for where, row in rows.read(path):
    prompt = rows.text(rows.field(row, "prompt", where), "prompt", where)
    texts, rewards = (rows.field(row, name, where) for name in ("completions", "rewards"))
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
        tuple(rows.text(text, f"completions[{i}]", where) for i, text in enumerate(texts)),
        tuple(rows.number(reward, f"rewards[{i}]", where) for i, reward in enumerate(rewards)),
        where,
      )
    )
  if not scored:
    raise ValueError(f"{path} holds no rows of {{prompt, completions, rewards}}")
  return scored


def load_preferences(
  path: _Path, fields: Sequence[str] = ("prompt", "chosen", "rejected")
) -> list[Preference]:
  """Reads rows of {prompt, chosen, rejected} and, optionally, chosen_prob in [0, 1].

  A row whose two texts are the same is left out with a warning: its margin is zero whatever the
  policy, so it teaches nothing.

  Args:
    path: a file or another source of `rows.read`.
    fields: what the data set calls its prompt, chosen and rejected texts.

  Raises:
    ValueError: naming file and line, on a row that does not fit; on a file without (such) rows.
  """
  if len(fields) != 3 or not all(fields):
    raise ValueError(f"fields is {fields!r}; name three, such as ('prompt', 'chosen', 'rejected')")
  preferences, identical = [], []
  for where, row in rows.read(path):
    prompt, chosen, rejected = (
      rows.text(rows.field(row, name, where), name, where) for name in fields
    )
    chosen_prob = rows.number(row.get("chosen_prob", 1.0), "chosen_prob", where)
    if not 0 <= chosen_prob <= 1:
      raise ValueError(f"{where}: chosen_prob is {chosen_prob}; a probability lies in [0, 1]")
    if chosen == rejected:
      identical.append(where)
    else:
      preferences.append(Preference(prompt, chosen, rejected, chosen_prob, where))
  if identical:
    warnings.warn(
      f"{path}: {len(identical)} pairs left out because chosen equals rejected, the first one at "
      f"{identical[0]}",
      stacklevel=2,
    )
  if not preferences:
    raise ValueError(f"{path} holds no rows of {{{', '.join(fields)}}} that differ")
  return preferences


def load_demonstrations(path: _Path) -> list[Demonstration]:
  """Reads rows of {prompt, completion} and, optionally, a list of references.

  Raises:
    ValueError: naming file and line, on a row that does not fit; on a source without rows.
  """
  found = []
  for where, row in rows.read(path):
    prompt, completion = (
      rows.text(rows.field(row, name, where), name, where) for name in ("prompt", "completion")
    )
    references = row.get("references", [completion])
    if not isinstance(references, list) or not references:
      raise ValueError(f"{where}: references must be a list of texts, found {references!r:.40}")
    texts = (rows.text(x, f"references[{i}]", where) for i, x in enumerate(references))
    found.append(Demonstration(prompt, completion, tuple(texts), where))
  if not found:
    raise ValueError(f"{path} holds no rows of {{prompt, completion}}")
  return found


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
  encoded = [list(tokenizer.encode(prompt, add_special_tokens=True)) for prompt in prompts]
  if truncate == "left":
    encoded = [row[-max_length:] for row in encoded]
  elif truncate is not None:
    raise ValueError(f"truncate is {truncate!r}; choose None or 'left'")
  return _pad(encoded, "prompt", _names("prompt", prompts, names), tokenizer, max_length, multiple)


def encode_completions(
  tokenizer: Any,
  texts: Sequence[str],
  *,
  max_length: int,
  multiple: int = 8,
  truncate: str | None = None,
  names: Sequence[str] | None = None,
  allow_empty: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
  """Tokenises completions, each ended by EOS and padded on the right.

  Args and errors are those of `encode_prompts`; `max_length` counts the EOS, and
  `truncate="right"` drops the end of a longer completion (and with it the EOS). With
  `allow_empty` a text without tokens is EOS alone, as a model may well have sampled it.

  Returns:
    tokens `[N, T]` int32 and mask `[N, T]` float32, 1 up to and including EOS.
  """
  encoded = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
  labels = _names("completion", texts, names)
  for label, row in zip(labels, encoded, strict=True):
    if len(row) == 1 and not allow_empty:
      raise ValueError(f"{label} has no tokens; remove it")
  if truncate == "right":
    encoded = [row[:max_length] for row in encoded]
  elif truncate is not None:
    raise ValueError(f"truncate is {truncate!r}; choose None or 'right'")
  return _pad(encoded, "completion", labels, tokenizer, max_length, multiple)


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
