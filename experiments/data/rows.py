"""Rows of a data set by name: dictionaries, each with its place for error messages.

| source                            | rows                                                        |
|-----------------------------------|-------------------------------------------------------------|
| `FILE`                            | JSON lines: an object on each line, UTF-8, or gzipped (.gz) |
| `tfds:NAME[/CONFIG][#SPLIT]`      | TensorFlow Datasets, by random access (`data_source`)       |
| `hf:NAME[#SPLIT]`                 | Hugging Face: `org/name`, `org/name/config` or a folder     |
| `made_up:vowels`                  | 512 pairs of random words; the one with more vowels wins    |
| `finegrained_rlhf:PLACE`          | the question-answering feedback of Wu et al. 2023, as pairs |
| `scitldr:PLACE`                   | SciTLDR (Cachola et al. 2020): abstracts and their TLDRs    |

SPLIT is `train` by default. PLACE is a file of JSON lines of that data set.

* `finegrained_rlhf` (https://arxiv.org/abs/2306.01693): each question has four answers, compared in
  six pairs. Each comparison becomes a row of `prompt` (the question and a line break), `chosen` and
  `rejected`. Comparisons without a difference are left out. The prompt does not contain the
  passages that the annotators saw, because most have over 600 tokens.
* `scitldr` (https://arxiv.org/abs/2004.15011): `prompt` is the abstract and "TL;DR:", `completion`
  the first human TLDR, and `references` all of them.

Errors name the file and line of the row, or its index.
"""

import csv
import gzip
import json
import math
import os
import pathlib
import random
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from experiments import files
from sharding import checks

_Path = str | os.PathLike[str]
_Row = dict[str, Any]

# The comparisons of four answers, in the order in which the file lists their outcomes.
_COMPARISONS = ((1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4))


def read(source: _Path) -> Iterator[tuple[str, _Row]]:
  """Yields (place, row) for all rows of a source; see the docstring of the module.

  Raises:
    ValueError: the source cannot be read, or a row does not have the format of the source.
    ModuleNotFoundError: the library of `tfds:` or `hf:` is missing; the message says how to install
      it.
  """
  kind, name = split_name(source)
  if kind is None:
    yield from _json_lines(source)
  elif kind in _LIBRARIES:
    yield from _LIBRARIES[kind](str(source), name)
  else:
    for where, row in _json_lines(name):
      yield from _FORMATS[kind](row, where)


def split_name(source: _Path) -> tuple[str | None, str]:
  """Splits a source into (kind, name); the kind of a file is None.

  Raises:
    ValueError: the name is empty.

  Example:
    >>> split_name("tfds:reddit_tifu/long#train"), split_name("mine.jsonl")
    (('tfds', 'reddit_tifu/long#train'), (None, 'mine.jsonl'))
  """
  kind, colon, name = str(source).partition(":")
  if colon and kind in {**_LIBRARIES, **_FORMATS}:
    if not name:
      raise ValueError(f"source {str(source)!r} names no data set: write {kind}:NAME")
    return kind, name
  return None, str(source)


# --- files ----------------------------------------------------------------------------------------


def lines(path: _Path) -> Iterator[tuple[str, str]]:
  """Yields ("file, line 3", text) for all lines that are not blank; unpacks a `.gz` file.

  Raises:
    ValueError: the file cannot be read, is damaged, or is not UTF-8.
  """
  try:
    data = files.local_path("data source", path).read_bytes()
  except OSError as error:
    raise ValueError(f"cannot read {path}: {error.strerror}; give an existing file") from error
  if str(path).endswith(".gz"):
    try:
      data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
      raise ValueError(f"{path} is damaged or not gzipped ({error}); copy it again") from error
  # str.splitlines would also split at other characters, which JSON strings may contain.
  for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
    where = f"{path}, line {number}"
    try:
      string = line.decode("utf-8")
    except UnicodeDecodeError as error:
      raise ValueError(f"{where}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    if string.strip():
      yield where, string.removesuffix("\r")


def holds_json(path: _Path) -> bool:
  """Whether a file of prompts holds JSON lines, by its name or its first line.

  Raises:
    ValueError: the file cannot be read, or holds a table or a JSON array, whose lines are no
      prompts.
  """
  name = str(path).lower().removesuffix(".gz")
  if name.endswith((".jsonl", ".json", ".ndjson")):
    return True
  found = [line.strip() for _, line in lines(path)]
  first = found[0] if found else ""
  try:
    if isinstance(json.loads(first), dict):
      return True
  except (ValueError, RecursionError):
    pass
  cells = {cell.strip().strip('"').lower() for cell in re.split(r"[,;\t]", first)}
  if name.endswith((".csv", ".tsv")) or "prompt" in cells or _looks_like_a_table(found):
    raise ValueError(
      f"{path} is a table (CSV), whose lines are no prompts; make JSON lines of it:\n"
      "python -c 'import csv, json, sys; [print(json.dumps(row)) for row in csv.DictReader("
      f"sys.stdin)]' < {path} > prompts.jsonl"
    )
  if first == "[" or re.match(r'\[\s*[{"]', first):
    raise ValueError(
      f"{path} is a JSON array, whose lines are no prompts; write one object on each line"
    )
  return False


def _looks_like_a_table(found: list[str]) -> bool:
  """Whether lines have equally many cells, and the first ones are names of columns."""
  for separator in ",;\t":
    names = [cell.strip('"') for cell in found[0].split(separator)] if found else []
    if len(names) > 1 and all(re.fullmatch(r"[A-Za-z_]\w*", name) for name in names):
      counts = {len(row) for row in csv.reader(found, delimiter=separator)}
      if len(found) > 1 and counts == {len(names)}:
        return True
  return False


def _json_lines(path: _Path) -> Iterator[tuple[str, _Row]]:
  for where, line in lines(path):
    try:
      row = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise ValueError(f"{where}: not JSON ({error}); write one object on each line") from None
    if not isinstance(row, dict):
      raise ValueError(f"{where}: expected an object {{...}}, found {type(row).__name__}")
    yield where, row


# --- libraries ------------------------------------------------------------------------------------


def _tfds(source: str, name: str) -> Iterator[tuple[str, _Row]]:
  try:
    import tensorflow_datasets as tfds
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      f"{source} needs {error.name}: pip install '.[experiments]'", name=error.name
    ) from error
  name, _, split = name.partition("#")
  try:
    examples = tfds.data_source(name, split=split or "train")
  except Exception as error:  # the library has an error class for each kind of absence
    raise ValueError(_absent(source, error, "prepare it on a machine with one")) from error
  yield from _numbered(source, examples)


def _huggingface(source: str, name: str) -> Iterator[tuple[str, _Row]]:
  try:
    import datasets
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      f"{source} needs {error.name}: pip install '.[huggingface]'", name=error.name
    ) from error
  name, _, split = name.partition("#")
  parts = name.split("/")
  if name.startswith("~"):
    parts = [str(files.local_path("data source", name))]
  config = parts.pop() if len(parts) == 3 and not pathlib.Path(name).exists() else None
  try:
    name = "/".join(parts)
    examples = datasets.load_dataset(name, config, split=split or "train")
  except Exception as error:
    raise ValueError(_absent(source, error, "give a local folder after hf:")) from error
  yield from _numbered(source, examples)


def _absent(source: str, error: Exception, remedy: str) -> str:
  """Returns the message of a data set that cannot be loaded."""
  reason = next(iter(str(error).splitlines()), type(error).__name__)
  reason = reason.rstrip(".")
  return f"{source}: {reason}. Check the name, configuration and #SPLIT; without a network {remedy}"


def _numbered(source: str, examples: Any) -> Iterator[tuple[str, _Row]]:
  for i in range(len(examples)):
    where, row = f"{source}, row {i}", examples[i]
    if not isinstance(row, Mapping):
      raise ValueError(f"{where}: expected fields by name, found {type(row).__name__}")
    try:
      yield where, {k: v.decode("utf-8") if isinstance(v, bytes) else v for k, v in row.items()}
    except UnicodeDecodeError as error:
      raise ValueError(f"{where}: not UTF-8 ({error.reason})") from None


def _made_up(source: str, name: str) -> Iterator[tuple[str, _Row]]:
  """Yields pairs for runs without data; `random.Random` makes them equal on all machines."""
  if name != "vowels":
    raise ValueError(f"source {source!r} is unknown; the only one is made_up:vowels")
  draw = random.Random(0)

  def word():
    return "".join(draw.choices("aeioubcdfglmnrst", k=draw.randint(4, 15)))

  def vowels(string):
    return sum(letter in "aeiou" for letter in string) / len(string)

  for i in range(512):
    prompt, first, second = f"{word()} {word()}", word(), word()
    while vowels(first) == vowels(second):
      second = word()
    good, bad = (f" {string}" for string in sorted((first, second), key=vowels, reverse=True))
    row = {"prompt": prompt, "chosen": good, "rejected": bad, "completion": good}
    yield f"{source}, row {i}", row


# --- formats of published files -------------------------------------------------------------------


def _finegrained_rlhf(row: _Row, where: str) -> Iterator[tuple[str, _Row]]:
  question = text(field(row, "question", where), "question", where)
  names = [f"prediction {i}" for i in range(1, 5)]
  answers = [text(field(row, name, where), name, where) for name in names]
  outcomes = field(row, "preference", where)
  if not isinstance(outcomes, list) or len(outcomes) != len(_COMPARISONS):
    raise ValueError(f"{where}: preference must list {len(_COMPARISONS)} outcomes")
  for (i, j), outcome in zip(_COMPARISONS, outcomes, strict=True):
    if outcome not in (0, 1, 2):
      raise ValueError(
        f"{where}: preference of answers {i} and {j} is {outcome!r}; it must be 0 (equal), 1 or 2"
      )
    if outcome:
      first, second = answers[i - 1], answers[j - 1]
      chosen, rejected = (first, second) if outcome == 1 else (second, first)
      pair = {"prompt": f"{question}\n", "chosen": chosen, "rejected": rejected}
      yield f"{where}, answers {i} and {j}", pair


def _scitldr(row: _Row, where: str) -> Iterator[tuple[str, _Row]]:
  sentences, targets = field(row, "source", where), field(row, "target", where)
  for name, value in (("source", sentences), ("target", targets)):
    if not isinstance(value, list) or not value:
      raise ValueError(f"{where}: {name} must be a list of texts, found {value!r:.40}")
  # One abstract contains a blank sentence, an error of the data set. Only a blank abstract is bad.
  kept = [value for value in sentences if not (isinstance(value, str) and not value.strip())]
  abstract = " ".join(text(value, "source", where) for value in kept or sentences)
  references = [text(value, "target", where) for value in targets]
  yield (
    where,
    {
      "prompt": f"{abstract}\nTL;DR:",
      "completion": f" {references[0]}",
      "references": references,
    },
  )


_LIBRARIES: dict[str, Callable[[str, str], Iterator[tuple[str, _Row]]]] = {
  "tfds": _tfds,
  "hf": _huggingface,
  "made_up": _made_up,
}
_FORMATS: dict[str, Callable[[_Row, str], Iterator[tuple[str, _Row]]]] = {
  "finegrained_rlhf": _finegrained_rlhf,
  "scitldr": _scitldr,
}

# --- fields ---------------------------------------------------------------------------------------


def field(row: _Row, name: str, where: str) -> Any:
  """Returns a field of a row; raises `ValueError` with the place and the fields of the row."""
  if name not in row:
    raise ValueError(f"{where}: field {name!r} is missing; found {sorted(row)}")
  return row[name]


def text(value: Any, name: str, where: str) -> str:
  """Returns a text that is not blank; raises `ValueError` with its name and place otherwise."""
  if not isinstance(value, str):
    raise ValueError(f"{where}: {name} must be a text, found {type(value).__name__}")
  if not value.strip():
    raise ValueError(f"{where}: {name} is empty; remove the row or write a text")
  if any("\ud800" <= c <= "\udfff" for c in value):  # escapes in JSON that UTF-8 cannot encode
    raise ValueError(f"{where}: {name} holds half of a surrogate pair (\\ud800 to \\udfff)")
  return value


def number(value: Any, name: str, where: str) -> float:
  """Returns a finite number; raises `ValueError` with its name and place otherwise."""
  if not (checks.is_integer(value) or isinstance(value, float)):
    raise ValueError(f"{where}: {name} must be a number, found {type(value).__name__}")
  try:
    found = float(value)
  except OverflowError:
    found = math.inf
  if not math.isfinite(found):
    raise ValueError(f"{where}: {name} is {found}; it must be finite")
  return found
