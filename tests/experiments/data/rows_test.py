"""Rows by name: files, published formats, and doubles of the two libraries, without a network."""

import gzip
import json
import sys
import types

import pytest

from experiments.data import rows, text

PAIR = {"prompt": "p", "chosen": " a", "rejected": " b"}
ANSWERS = {f"prediction {i}": f"answer {i}" for i in range(1, 5)}
FEEDBACK = {"question": "Why?", **ANSWERS, "preference": [0, 1, 2, 1, 0, 2], "passages": [["t"]]}
PAPER = {"source": ["One.", "Two."], "target": ["Short.", "Shorter."], "title": "T"}


def _jsonl(path, *found):
  path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
  return path


@pytest.fixture
def library(monkeypatch):
  """Replaces `tensorflow_datasets` or `datasets` by a double, which records its calls."""
  asked = []

  def install(name, function, examples):
    def load(*args, **kwargs):
      asked.append((args, kwargs))
      if isinstance(examples, Exception):
        raise examples
      return examples

    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**{function: load}))
    return asked

  return install


def test_gzipped_lines_are_read_and_a_damaged_file_is_named(tmp_path):
  path = tmp_path / "pairs.jsonl.gz"
  path.write_bytes(gzip.compress(json.dumps(PAIR).encode()))
  assert text.load_preferences(path) == [text.Preference("p", " a", " b")]
  assert text.load_prompts(path) == ["p"]
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(ValueError, match=r"pairs\.jsonl\.gz is damaged"):
    text.load_preferences(path)


def test_tfds_is_read_by_random_access_and_bytes_become_text(library):
  asked = library("tensorflow_datasets", "data_source", [{"q": b"p", "good": " a", "bad": b" b"}])
  fields = ("q", "good", "bad")
  found = text.load_preferences("tfds:pairs/long:1.0.0#train[:9]", fields)
  assert found == [text.Preference("p", " a", " b")]
  assert asked == [(("pairs/long:1.0.0",), {"split": "train[:9]"})]


@pytest.mark.parametrize(
  ("source", "want"),
  [
    ("hf:org/pairs", ("org/pairs", None, "train")),
    ("hf:org/pairs/long#test", ("org/pairs", "long", "test")),
  ],
)
def test_hugging_face_data_by_name_configuration_and_split(library, source, want):
  asked = library("datasets", "load_dataset", [PAIR])
  assert len(text.load_preferences(source)) == 1
  ((args, kwargs),) = asked
  assert (*args, kwargs["split"]) == want


@pytest.mark.parametrize(
  ("source", "name", "function"),
  [
    ("tfds:x", "tensorflow_datasets", "data_source"),
    ("hf:x", "datasets", "load_dataset"),
  ],
)
def test_what_is_wrong_in_a_library_is_named(library, monkeypatch, source, name, function):
  library(name, function, [PAIR, {**PAIR, "chosen": ""}])
  with pytest.raises(ValueError, match=f"{source}, row 1: chosen is empty"):
    text.load_preferences(source)
  library(name, function, [{**PAIR, "chosen": b"\xff"}])
  with pytest.raises(ValueError, match=f"{source}, row 0: not UTF-8"):
    text.load_preferences(source)
  library(name, function, ["p"])
  with pytest.raises(ValueError, match=f"{source}, row 0: expected fields by name, found str"):
    text.load_preferences(source)
  library(name, function, RuntimeError("no such data set\nand a long trace"))
  with pytest.raises(ValueError, match=f"{source}: no such data set. Check the name"):
    text.load_preferences(source)
  monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
  with pytest.raises(ModuleNotFoundError, match=f"{source} needs {name}: pip install"):
    text.load_preferences(source)


def test_made_up_pairs_are_the_same_every_time_and_obey_their_rule():
  found = text.load_preferences("made_up:vowels")
  assert found == text.load_preferences("made_up:vowels") and len(found) == 512
  for pair in found:
    good, bad = ([c in "aeiou" for c in x.strip()] for x in (pair.chosen, pair.rejected))
    assert sum(good) / len(good) > sum(bad) / len(bad)
  assert len({pair.prompt for pair in found}) == 512
  with pytest.raises(ValueError, match="the only one is made_up:vowels"):
    text.load_preferences("made_up:consonants")


def test_a_source_without_a_name_and_a_file_with_a_colon():
  with pytest.raises(ValueError, match="'hf:' names no data set"):
    text.load_preferences("hf:")
  with pytest.raises(ValueError, match="cannot read other:file"):
    text.load_preferences("other:file")


def test_fields_have_three_names(tmp_path):
  with pytest.raises(ValueError, match="name three"):
    text.load_preferences(_jsonl(tmp_path / "p.jsonl", PAIR), ("prompt", "chosen"))


def test_finegrained_feedback_becomes_the_pairs_that_differ(tmp_path):
  path = _jsonl(tmp_path / "f.jsonl", FEEDBACK)
  found = text.load_preferences(f"finegrained_rlhf:{path}")
  # Outcomes 0 1 2 1 0 2 of (1,2) (1,3) (1,4) (2,3) (2,4) (3,4).
  assert [(row.chosen[-1], row.rejected[-1]) for row in found] == [
    ("1", "3"),
    ("4", "1"),
    ("2", "3"),
    ("4", "3"),
  ]
  assert {row.prompt for row in found} == {"Why?\n"}
  assert found[1].where == f"{path}, line 1, answers 1 and 4"
  assert text.load_prompts(f"finegrained_rlhf:{path}") == ["Why?\n"]


def test_scitldr_becomes_demonstrations(tmp_path):
  blank = {**PAPER, "source": [*PAPER["source"], "  "]}  # row 1538 of its training file has one
  path = _jsonl(tmp_path / "s.jsonl", blank)
  (found,) = text.load_demonstrations(f"scitldr:{path}")
  assert found.prompt == "One. Two.\nTL;DR:" and found.completion == " Short."
  assert found.references == ("Short.", "Shorter.")


@pytest.mark.parametrize(
  ("kind", "row", "message"),
  [
    ("finegrained_rlhf", {**FEEDBACK, "preference": [0] * 5}, "preference must list 6"),
    (
      "finegrained_rlhf",
      {**FEEDBACK, "preference": [0, 0, 3, 0, 0, 0]},
      "preference of answers 1 and 4 is 3",
    ),
    ("finegrained_rlhf", {**FEEDBACK, "prediction 2": None}, "prediction 2 must be a text"),
    ("scitldr", {**PAPER, "target": []}, "target must be a list"),
    ("scitldr", {**PAPER, "source": ["", " "]}, "source is empty"),
  ],
)
def test_a_bad_row_of_a_published_format_is_named_by_its_line(tmp_path, kind, row, message):
  good = FEEDBACK if kind == "finegrained_rlhf" else PAPER
  path = _jsonl(tmp_path / "x.jsonl", good, row)
  with pytest.raises(ValueError, match=rf"x\.jsonl, line 2: {message}"):
    list(rows.read(f"{kind}:{path}"))


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ({"prompt": "p"}, "'completion' is missing"),
    ({"prompt": "p", "completion": " c", "references": "c"}, "references must be a list"),
    ({"prompt": "p", "completion": " c", "references": [1]}, r"references\[0\] must be a text"),
  ],
)
def test_a_bad_demonstration_is_named_by_its_line(tmp_path, row, message):
  path = _jsonl(tmp_path / "d.jsonl", {"prompt": "p", "completion": " c"}, row)
  with pytest.raises(ValueError, match=rf"d\.jsonl, line 2: .*{message}"):
    text.load_demonstrations(path)
  with pytest.raises(ValueError, match="holds no rows"):
    text.load_demonstrations(_jsonl(tmp_path / "empty.jsonl"))
