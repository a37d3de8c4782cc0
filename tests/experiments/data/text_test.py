"""Prompts, JSON lines and pairs of `experiments.data.text`."""

import difflib
import json
import re

import numpy as np
import pytest

from experiments.data import text


def _write(path, *lines):
  path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
  return path


def _jsonl(path, *rows):
  return _write(path, *(json.dumps(row) for row in rows))


def _scored_row(**changes):
  return {"prompt": "p", "completions": [" a", " b"], "rewards": [0.5, -1], **changes}


def _preference_row(**changes):
  return {"prompt": "p", "chosen": " a", "rejected": " b", **changes}


# --- packaged prompts ---------------------------------------------------------------------------


def test_packaged_prompts_are_many_distinct_and_unfinished():
  prompts = text.load_prompts()
  assert len(prompts) >= 440
  assert len({p.lower() for p in prompts}) == len(prompts)
  for prompt in prompts:
    assert prompt == prompt.strip() and prompt.isascii()
    assert 5 <= len(prompt.split()) <= 10, prompt
    assert prompt[-1] not in ".!?;:,", prompt
  # Varied: no first four words twice, and no single opening word for more than half of them.
  starts = [" ".join(p.lower().split()[:4]) for p in prompts]
  assert len(set(starts)) == len(starts)
  assert max(sum(p.startswith(w + " ") for p in prompts) for w in ("The", "My", "I")) < 0.5 * len(
    prompts
  )


def test_packaged_prompts_have_no_near_duplicates():
  prompts = text.load_prompts()
  words = [frozenset(re.findall(r"[a-z']+", p.lower())) for p in prompts]
  for i, left in enumerate(words):
    for j in range(i):
      # Cheap test first; 0.8 of the characters in common is a mere change of a word.
      if len(left & words[j]) > 0.6 * len(left | words[j]):
        ratio = difflib.SequenceMatcher(None, prompts[i], prompts[j]).ratio()
        assert ratio < 0.8, (prompts[i], prompts[j])


def test_packaged_prompts_are_neutral():
  sentiment = pytest.importorskip("vaderSentiment.vaderSentiment")
  scores = sentiment.SentimentIntensityAnalyzer()
  compound = np.array([scores.polarity_scores(p)["compound"] for p in text.load_prompts()])
  assert np.abs(compound).max() < 0.3
  assert (compound == 0).mean() > 0.9


# --- prompt files -------------------------------------------------------------------------------


def test_text_prompts_skip_blank_lines_bom_and_carriage_returns(tmp_path):
  path = tmp_path / "p.txt"
  path.write_bytes("\ufeff  The soup was \r\n\r\n   \nZoë said\u2028that\n\n".encode())
  assert text.load_prompts(path) == ["The soup was", "Zoë said\u2028that"]


def test_jsonl_prompts_are_kept_as_they_are(tmp_path):
  path = _jsonl(tmp_path / "p.jsonl", {"prompt": "User: hi\nBot: ", "id": 3}, {"prompt": "b"})
  assert text.load_prompts(path) == ["User: hi\nBot: ", "b"]


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("p.txt", b"", r"p\.txt holds no prompts"),
    ("p.txt", b"\n \n", r"p\.txt holds no prompts"),
    ("p.txt", b"good\n\xff\xfe\n", r"p\.txt, line 2: not UTF-8"),
    ("p.txt", b"a\n\nb\na \n", r"p\.txt, line 4: prompt 'a' is also in .*line 1"),
    ("p.jsonl", b'{"prompt": "a"}\n{"prompt"\n', r"p\.jsonl, line 2: not JSON"),
    ("p.jsonl", b'["a"]\n', r"line 1: expected an object .* found list"),
    ("p.jsonl", b'{"text": "a"}\n', r"line 1: field 'prompt' is missing; found \['text'\]"),
    ("p.jsonl", b'{"prompt": 3}\n', r"line 1: prompt must be a text, found int"),
    ("p.jsonl", b'{"prompt": " "}\n', r"line 1: prompt is empty"),
    ("p.jsonl", b'{"prompt": "a\\ud800"}\n', r"line 1: prompt holds half of a surrogate"),
    ("p.jsonl", b"[" * 100_000, r"line 1: not JSON"),
    ("p.jsonl", b"9" * 5_000, r"line 1: not JSON"),
  ],
)
def test_bad_prompt_file(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    text.load_prompts(tmp_path / name)


def test_missing_prompt_file_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"cannot read .*absent\.txt: No such file"):
    text.load_prompts(tmp_path / "absent.txt")
  with pytest.raises(ValueError, match="cannot read"):
    text.load_prompts(tmp_path)


# --- split --------------------------------------------------------------------------------------


def test_split_is_disjoint_complete_and_independent_of_order():
  prompts = text.load_prompts()
  train, test = text.split_prompts(prompts, num_test=256, seed=0)
  assert len(test) == 256 and not set(train) & set(test)
  assert sorted(train + test) == sorted(prompts)
  backwards_train, backwards_test = text.split_prompts(prompts[::-1], num_test=256, seed=0)
  assert backwards_train == train[::-1] and backwards_test == test[::-1]
  assert text.split_prompts(prompts, num_test=256, seed=1)[1] != test


def test_split_by_fraction():
  train, test = text.split_prompts([str(i) for i in range(10)], test_fraction=0.3)
  assert (len(train), len(test)) == (7, 3)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({}, "either test_fraction or num_test"),
    ({"num_test": 1, "test_fraction": 0.5}, "either test_fraction or num_test"),
    ({"test_fraction": 1.0}, "test_fraction is 1.0"),
    ({"num_test": 0}, "num_test is 0 of 3"),
    ({"num_test": 3}, "num_test is 3 of 3"),
  ],
)
def test_bad_split(settings, message):
  with pytest.raises(ValueError, match=message):
    text.split_prompts(["a", "b", "c"], **settings)


def test_split_refuses_duplicates():
  with pytest.raises(ValueError, match="'a' twice"):
    text.split_prompts(["a", "b", "a"], num_test=1)


# --- scored completions and preferences ---------------------------------------------------------


def test_load_scored(tmp_path):
  path = _jsonl(tmp_path / "s.jsonl", _scored_row(extra={"ignored": 1}), _scored_row(prompt="q"))
  assert text.load_scored(path) == [
    text.Scored("p", (" a", " b"), (0.5, -1.0)),
    text.Scored("q", (" a", " b"), (0.5, -1.0)),
  ]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"rewards": [1.0]}, "2 completions but 1 rewards"),
    ({"completions": [" a"], "rewards": [1.0]}, "1 completions; the method compares"),
    (
      {"completions": ["a", "b", "c"], "rewards": [1, 2, 3]},
      "3 completions, but the rows before have 2",
    ),
    ({"completions": "ab"}, "must be lists"),
    ({"completions": [" a", ""]}, r"completions\[1\] is empty"),
    ({"completions": [" a", None]}, r"completions\[1\] must be a text, found NoneType"),
    ({"rewards": [1, "2"]}, r"rewards\[1\] must be a number, found str"),
    ({"rewards": [True, 2]}, r"rewards\[0\] must be a number, found bool"),
    ({"rewards": [1, float("nan")]}, r"rewards\[1\] is nan"),
    ({"rewards": [float("-inf"), 1]}, r"rewards\[0\] is -inf"),
    ({"rewards": [10**400, 1]}, r"rewards\[0\] is inf"),
  ],
)
def test_bad_scored_row(tmp_path, changes, message):
  path = _jsonl(tmp_path / "s.jsonl", _scored_row(), _scored_row(**changes))
  with pytest.raises(ValueError, match=r"s\.jsonl, line 2: .*" + message):
    text.load_scored(path, least=2)


def test_one_completion_with_a_reward_or_a_label(tmp_path):
  path = _jsonl(
    tmp_path / "s.jsonl",
    {"prompt": "p", "completion": " a", "reward": 0.7},
    {"prompt": "p", "completion": " b", "label": True},
    {"prompt": "p", "completion": " c", "label": 0},
    {"prompt": "p", "completions": [" d"], "rewards": [2]},
  )
  assert [(row.completions, row.rewards) for row in text.load_scored(path)] == [
    ((" a",), (0.7,)), ((" b",), (1.0,)), ((" c",), (0.0,)), ((" d",), (2.0,))
  ]  # fmt: skip
  for row, words in (
    ({"label": 2}, "label must be true or false, found 2"),
    ({"label": "yes"}, "label must be true or false, found 'yes'"),
    ({}, "needs a reward or a label"),
    ({"reward": 1, "label": 1}, "and not both"),
    ({"reward": None}, "rewards"),
  ):
    bad = _jsonl(tmp_path / "bad.jsonl", {"prompt": "p", "completion": " a", **row})
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 1: .*{words}"):
      text.load_scored(bad)


@pytest.mark.parametrize("name", ["prompt", "completions", "rewards"])
def test_scored_field_missing(tmp_path, name):
  row = _scored_row()
  del row[name]
  with pytest.raises(ValueError, match=f"line 1: field '{name}' is missing"):
    text.load_scored(_jsonl(tmp_path / "s.jsonl", row))


def test_empty_data_sets(tmp_path):
  path = _write(tmp_path / "empty.jsonl", "", "  ")
  for load in (text.load_scored, text.load_preferences):
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no rows"):
      load(path)


def test_load_preferences(tmp_path):
  path = _jsonl(tmp_path / "p.jsonl", _preference_row(), _preference_row(chosen_prob=0.75, x=1))
  assert text.load_preferences(path) == [
    text.Preference("p", " a", " b", 1.0),
    text.Preference("p", " a", " b", 0.75),
  ]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"chosen": "  "}, "chosen is empty"),
    ({"rejected": ["b"]}, "rejected must be a text, found list"),
    ({"chosen_prob": 1.5}, "chosen_prob is 1.5"),
    ({"chosen_prob": None}, "chosen_prob must be a number, found NoneType"),
  ],
)
def test_bad_preference_row(tmp_path, changes, message):
  path = _jsonl(tmp_path / "p.jsonl", _preference_row(), _preference_row(**changes))
  with pytest.raises(ValueError, match=r"p\.jsonl, line 2: " + message):
    text.load_preferences(path)


def test_identical_pairs_are_left_out_with_a_warning(tmp_path):
  same = _preference_row(rejected=" a")
  path = _jsonl(tmp_path / "p.jsonl", same, _preference_row(), same)
  with pytest.warns(UserWarning, match=r"2 pairs are left out .*line 1$"):
    assert len(text.load_preferences(path)) == 1
  with pytest.warns(UserWarning), pytest.raises(ValueError, match="no rows"):
    text.load_preferences(_jsonl(path, same))


# --- pairs --------------------------------------------------------------------------------------


def test_reward_pairs_all_counts_ties_and_puts_the_higher_reward_first():
  rewards = np.array([[1.0, 3.0, 1.0], [2.0, 2.0, 2.0]])
  found = text.reward_pairs(rewards, pairs="all")
  assert found.num_ties == 1 + 3
  got = list(
    zip(found.example.tolist(), found.chosen.tolist(), found.rejected.tolist(), strict=True)
  )
  assert got == [(0, 1, 0), (0, 1, 2)]


def test_bad_pairs():
  with pytest.raises(ValueError, match="'best'"):
    text.reward_pairs(np.zeros((2, 2)), pairs="best")
  with pytest.raises(ValueError, match=r"\[N, K\]"):
    text.reward_pairs(np.zeros((2, 1)))


@pytest.mark.parametrize("name", ["prompts", "prompts.txt", "prompts.ndjson", "prompts.JSONL"])
def test_json_lines_are_read_as_such_under_any_name(tmp_path, name):
  path = tmp_path / name
  path.write_text('{"prompt": "The soup was"}\n{"prompt": "The sea"}\n')
  assert text.load_prompts(path) == ["The soup was", "The sea"]


@pytest.mark.parametrize(
  ("name", "content", "match"),
  [
    ("prompts.txt", "id,prompt\n1,The soup was\n", r"is a table \(CSV\)(.|\n)*DictReader"),
    ("prompts.txt", '"prompt"\tanswer\nThe soup\twas\n', "is a table"),
    ("prompts.txt", 'id,question\n1,"The soup, hot"\n2,The sea\n', "is a table"),
    ("prompts.csv", "The soup was\n", "is a table"),
    ("prompts.TSV", "a\tb\n", "is a table"),
    ("prompts.txt", '[\n{"prompt": "The soup was"}\n]\n', "is a JSON array"),
    ("prompts.txt", '["The soup was", "The sea"]\n', "is a JSON array"),
  ],
)
def test_other_formats_are_not_read_as_lines(tmp_path, name, content, match):
  path = tmp_path / name
  path.write_text(content)
  with pytest.raises(ValueError, match=match):
    text.load_prompts(path)


def test_lines_that_look_alike_are_prompts(tmp_path):
  path = tmp_path / "prompts.txt"
  path.write_text("[sighs] The soup, prompt as ever, was\n{braces}\n42\n")
  assert len(text.load_prompts(path)) == 3
  path.write_text("Well, the soup was\nNo, the sea was\n")  # a comma in each line
  assert len(text.load_prompts(path)) == 2
