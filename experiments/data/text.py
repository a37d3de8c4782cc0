"""Text data: prompts, scored completions, preference pairs and demonstrations.

`rows.py` reads the rows of a file or another source. This module checks their fields; it ignores
fields that are not in the table.

| data                  | a row                                                                    |
|-----------------------|--------------------------------------------------------------------------|
| prompts               | `{"prompt": "The soup was"}`, used unchanged                             |
| prompts, a text file  | a line with the prompt; white space around it is removed                 |
| scored completions    | `{"prompt": ..., "completions": [K texts], "rewards": [K numbers]}`      |
| the same for K = 1    | `{"prompt": ..., "completion": ..., "reward": 0.7}`, or `"label": true`  |
| preference pairs      | `{"prompt": ..., "chosen": ..., "rejected": ..., "chosen_prob": 0.8}`    |
| demonstrations        | `{"prompt": ..., "completion": ..., "references": [texts]}`              |

Any of these texts may be a list of messages instead, and a row may hold `messages`: see `chats.py`.
The model reads them in the format of its chat template.

Two fields are optional. `references` are all good completions of the prompt, by default the
`completion` alone. `chosen_prob` is the probability that `chosen` wins, by default 1. A completion
follows its prompt without a separator, so it starts with a space of its own: `" was cold."`.

Errors name the file and line of a row, or its index.
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

from experiments.data import chats, rows

_Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Scored:
  """K completions of a prompt and their rewards."""

  prompt: str
  completions: tuple[str, ...]
  rewards: tuple[float, ...]
  where: str = dataclasses.field(default="", compare=False)  # file and line, for errors


@dataclasses.dataclass(frozen=True)
class Preference:
  """Two completions of a prompt; `chosen` wins with probability `chosen_prob`."""

  prompt: str
  chosen: str
  rejected: str
  chosen_prob: float = 1.0
  where: str = dataclasses.field(default="", compare=False)  # file and line, for errors


@dataclasses.dataclass(frozen=True)
class Demonstration:
  """A completion to imitate; `references` are all good ones and may not include it."""

  prompt: str
  completion: str
  references: tuple[str, ...]
  where: str = dataclasses.field(default="", compare=False)  # file and line, for errors


class Pairs(NamedTuple):
  """M pairs of completions, as indices into rewards `[N, K]`.

  example: `[M]` rows.  chosen: `[M]` columns with the higher reward.
  rejected: `[M]` columns with the lower reward.  num_ties: number of pairs that were left out
    because their rewards are equal.
  """

  example: np.ndarray
  chosen: np.ndarray
  rejected: np.ndarray
  num_ties: int


def load_prompts(path: _Path | None = None) -> list[str]:
  """Returns the prompts of a file or another source; None gives the packaged prompts.

  The packaged ones, over 500, were written for this project. They are unfinished sentences of 5 to
  10 words on everyday topics. Their sentiment is neutral, so that a continuation can be positive
  or negative.

  Raises:
    ValueError: the file cannot be read, is not UTF-8, holds no prompts, or holds a prompt twice,
      which could end up in both the training and the test split.
  """
  if path is None:
    packaged = importlib.resources.files("experiments.data").joinpath("prompts.txt")
    return packaged.read_text(encoding="utf-8").splitlines()
  seen: dict[str, str] = {}
  named = rows.split_name(path)[0] is not None
  if named or rows.holds_json(path):
    found = [(where, _prompt(row, where)) for where, row in rows.read(path)]
  else:
    found = [(where, line.strip()) for where, line in rows.lines(path)]
  for where, prompt in found:
    if prompt in seen and named:  # pairs and demonstrations share prompts
      continue
    if prompt in seen:
      raise ValueError(f"{where}: prompt {prompt!r} is also in {seen[prompt]}; remove one of them")
    seen[prompt] = where
  if not seen:
    raise ValueError(f"{path} holds no prompts; write one prompt on each line")
  return list(seen)


def _prompt(row: dict[str, Any], where: str) -> str:
  """Returns the prompt of a row: its `prompt`, or the beginning of its `messages`."""
  if "prompt" in row or "messages" not in row:
    return chats.read(rows.field(row, "prompt", where), "prompt", where)
  chat = chats.read(row["messages"], "messages", where)
  if isinstance(chat, chats.Chat) and chat.messages[-1]["role"] == "assistant":
    return chats.split(row, ["completion"], where)[0]
  return chat


def split_prompts(
  prompts: Sequence[str],
  *,
  test_fraction: float | None = None,
  num_test: int | None = None,
  seed: int = 0,
) -> tuple[list[str], list[str]]:
  """Splits prompts into (train, test), each in the order of `prompts`.

  The split depends on a hash of each text and `seed`, not on positions, so a file in another order
  gives the same split.

  Args:
    prompts: different texts.
    test_fraction: fraction of the prompts in the test split, between 0 and 1.
    num_test: number of prompts in the test split; give either this or `test_fraction`.
    seed: seed of the hash.

  Raises:
    ValueError: both or none of `test_fraction` and `num_test` are given, a split would be empty, or
      a prompt occurs twice.

  Example:
    >>> split_prompts(["a", "b", "c", "d"], num_test=1, seed=0)
    (['a', 'b', 'c'], ['d'])
  """
  if (test_fraction is None) == (num_test is None):
    raise ValueError("give either test_fraction or num_test, and not both")
  if test_fraction is not None:
    if not 0 < test_fraction < 1:
      raise ValueError(f"test_fraction is {test_fraction}; it must lie between 0 and 1")
    num_test = max(1, round(test_fraction * len(prompts)))
  assert num_test is not None
  if not 0 < num_test < len(prompts):
    raise ValueError(
      f"num_test is {num_test} of {len(prompts)} prompts; each split needs at least one"
    )
  repeated = [p for p, count in collections.Counter(prompts).items() if count > 1]
  if repeated:
    raise ValueError(f"prompts holds {repeated[0]!r} twice: remove one, or both splits may hold it")
  ranked = sorted(prompts, key=lambda p: hashlib.sha256(f"{seed}:{p}".encode()).digest())
  test = set(ranked[:num_test])
  return [p for p in prompts if p not in test], [p for p in prompts if p in test]


def load_scored(path: _Path, *, least: int = 1) -> list[Scored]:
  """Reads rows of {prompt, completions[K], rewards[K]}, with the same K in all rows.

  A row with one completion may be {prompt, completion, reward} or, for good and bad completions,
  {prompt, completion, label}; a label of true or 1 is the reward 1, false or 0 the reward 0.

  Args:
    path: a file or another source of `rows.read`.
    least: the fewest completions of a prompt that the method can learn from.

  Raises:
    ValueError: a row is invalid (the message names its file and line), or there are no rows.
  """
  scored: list[Scored] = []
  for where, row in rows.read(path):
    prompt = chats.read(rows.field(row, "prompt", where), "prompt", where)
    if "completion" in row:
      texts, rewards = [row["completion"]], [_reward(row, where)]
    else:
      texts, rewards = (rows.field(row, name, where) for name in ("completions", "rewards"))
    if not isinstance(texts, list) or not isinstance(rewards, list):
      raise ValueError(f"{where}: completions and rewards must be lists")
    if len(texts) != len(rewards):
      raise ValueError(f"{where}: {len(texts)} completions but {len(rewards)} rewards")
    if len(texts) < least:
      raise ValueError(
        f"{where}: {len(texts)} completions; the method compares completions of one prompt, so "
        f"give {least} or more, or train DRO or KTO, which take one"
      )
    if scored and len(texts) != len(scored[0].completions):
      raise ValueError(
        f"{where}: {len(texts)} completions, but the rows before have "
        f"{len(scored[0].completions)}; a batch is one array, so give all rows the same number"
      )
    read = [chats.read(text, f"completions[{i}]", where) for i, text in enumerate(texts)]
    prompt, read = chats.join(prompt, read, where)
    scored.append(
      Scored(
        prompt,
        tuple(read),
        tuple(rows.number(reward, f"rewards[{i}]", where) for i, reward in enumerate(rewards)),
        where,
      )
    )
  if not scored:
    raise ValueError(f"{path} holds no rows of {{prompt, completions, rewards}}")
  return scored


def _reward(row: dict[str, Any], where: str) -> Any:
  """Returns the reward of a row with one completion."""
  if ("reward" in row) == ("label" in row):
    raise ValueError(f"{where}: a row with one completion needs a reward or a label, and not both")
  if "reward" in row:
    return row["reward"]
  if row["label"] not in (0, 1):  # True and False are 1 and 0
    raise ValueError(f"{where}: label must be true or false, found {row['label']!r:.40}")
  return float(row["label"])


def load_preferences(
  path: _Path, fields: Sequence[str] = ("prompt", "chosen", "rejected")
) -> list[Preference]:
  """Reads rows of {prompt, chosen, rejected} and, optionally, chosen_prob in [0, 1].

  Rows with two equal texts are left out with a warning: their margin is zero for every policy.

  Args:
    path: a file or another source of `rows.read`.
    fields: the names of the fields for prompt, chosen and rejected text.

  Raises:
    ValueError: a row is invalid (the message names its file and line), or no rows are left.
  """
  if len(fields) != 3 or not all(fields):
    raise ValueError(f"fields is {fields!r}; name three, such as ('prompt', 'chosen', 'rejected')")
  preferences, identical = [], []
  for where, row in rows.read(path):
    prompt, (chosen, rejected) = chats.split(row, fields[1:], where, prompt=fields[0])
    chosen_prob = rows.number(row.get("chosen_prob", 1.0), "chosen_prob", where)
    if not 0 <= chosen_prob <= 1:
      raise ValueError(f"{where}: chosen_prob is {chosen_prob}; a probability lies in [0, 1]")
    if chosen == rejected:
      identical.append(where)
    else:
      preferences.append(Preference(prompt, chosen, rejected, chosen_prob, where))
  if identical:
    warnings.warn(
      f"{path}: {len(identical)} pairs are left out because chosen equals rejected, the first at "
      f"{identical[0]}",
      stacklevel=2,
    )
  if not preferences:
    raise ValueError(f"{path} holds no rows of {{{', '.join(fields)}}} that differ")
  return preferences


def load_demonstrations(path: _Path) -> list[Demonstration]:
  """Reads rows of {prompt, completion} and, optionally, a list of references.

  Raises:
    ValueError: a row is invalid (the message names its file and line), or there are no rows.
  """
  found = []
  for where, row in rows.read(path):
    prompt, (completion,) = chats.split(row, ["completion"], where)
    references = row.get("references", [completion])
    if not isinstance(references, list) or not references:
      raise ValueError(f"{where}: references must be a list of texts, found {references!r:.40}")
    texts = (chats.read(x, f"references[{i}]", where) for i, x in enumerate(references))
    found.append(Demonstration(prompt, completion, tuple(texts), where))
  if not found:
    raise ValueError(f"{path} holds no rows of {{prompt, completion}}")
  return found


def reward_pairs(rewards: np.ndarray, *, pairs: str = "extreme") -> Pairs:
  """Returns pairs of columns of rewards `[N, K]`; the one with the higher reward is chosen.

  Args:
    rewards: `[N, K]` finite numbers, K >= 2.
    pairs: "extreme" pairs the highest with the lowest reward of each row; "all" takes all pairs of
      columns.

  Raises:
    ValueError: the shape is not `[N, K]` with K >= 2, or `pairs` is unknown.

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
