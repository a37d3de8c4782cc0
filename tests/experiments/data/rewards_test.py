"""Reward functions and their resolution by name."""

import builtins
import importlib
import sys

import numpy as np
import pytest

from experiments.data import rewards


@pytest.fixture
def module(tmp_path, monkeypatch):
  """Writes a module of reward functions to an importable folder."""
  monkeypatch.syspath_prepend(str(tmp_path))
  names = []

  def write(name, source):
    (tmp_path / f"{name}.py").write_text(source)
    importlib.invalidate_caches()
    names.append(name)

  yield write
  for name in names:
    sys.modules.pop(name, None)


def test_own_function_is_called_with_lists(module):
  module("own_reward", "def f(p, c):\n  assert type(c) is list\n  return [len(x) for x in c]\n")
  reward = rewards.resolve("own_reward:f")
  got = reward(("a", "b"), ("one", "three"))
  assert got.dtype == np.float64
  np.testing.assert_array_equal(got, [3, 5])
  assert (reward.name, reward.describes) == ("own_reward:f", "")


def test_fingerprint_follows_the_source(module, tmp_path):
  module("own_version", "def f(p, c): return [0.0] * len(c)\n")
  before = rewards.resolve("own_version:f").fingerprint
  assert before == rewards.resolve("own_version:f").fingerprint
  module("own_version", "def f(p, c): return [1.0] * len(c)\n")
  assert rewards.resolve("own_version:f").fingerprint != before


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("unknown", r"write module:function.*vader"),
    ("", "write module:function"),
    ("a:b:c", "write module:function"),
    (":f", "write module:function"),
    ("no_such_module_here:f", r"no module 'no_such_module_here'; .*PYTHONPATH"),
    ("experiments.data.no_such:f", r"no module 'experiments.data.no_such'"),
    (".relative:f", "cannot import"),
    ("experiments.data.rewards:vadr", r"has no 'vadr'; it has .*'vader'"),
    ("experiments.data.rewards:_SHORT_NAMES", "'_SHORT_NAMES' is a dict, not a function"),
  ],
)
def test_bad_name(name, message):
  with pytest.raises(ValueError, match=message):
    rewards.resolve(name)


def test_missing_dependency_of_the_module_is_told_apart(module):
  module("own_broken", "import no_such_dependency\n")
  with pytest.raises(ValueError, match=r"importing 'own_broken' failed: .*no_such_dependency"):
    rewards.resolve("own_broken:f")


@pytest.mark.parametrize(
  ("body", "message"),
  [
    ("return [1.0]", r"own_bad:f returned shape \(1,\) for 2 completions"),
    ("return 1.0", r"returned shape \(\) for 2"),
    ("return [[1.0], [2.0]]", r"returned shape \(2, 1\)"),
    ("return [0.0, float('nan')]", r"returned nan for completion 1 \(' bad'\)"),
    ("return [float('inf'), 0.0]", r"returned inf for completion 0 \(' good'\)"),
    ("return ['a', 'b']", "must return numbers"),
    ("return None", "returned shape"),
  ],
)
def test_bad_result(module, body, message):
  module("own_bad", f"def f(prompts, completions):\n  {body}\n")
  with pytest.raises(ValueError, match=message):
    rewards.resolve("own_bad:f")(["p", "p"], [" good", " bad"])


def test_lists_of_different_length():
  with pytest.raises(ValueError, match="1 prompts but 2 completions"):
    rewards.resolve("vowels")(["p"], ["a", "b"])


def test_no_completions_give_no_rewards():
  assert rewards.resolve("vowels")([], []).shape == (0,)


def test_vowels():
  got = rewards.resolve("vowels")(["p"] * 4, ["aei", "b c", "", "Ab!"])
  np.testing.assert_allclose(got, [1, 0, 0, 0.5])


def test_vader_scores_the_completion_alone():
  sentiment = pytest.importorskip("vaderSentiment.vaderSentiment")
  reward = rewards.resolve("vader")
  texts = [" was wonderful, and we loved it!", " was awful and cold.", " was on the table.", ""]
  got = reward(["The soup"] * 4, texts)
  assert got[0] > 0.5 and got[1] < -0.3 and got[2] == 0 and got[3] == 0
  np.testing.assert_array_equal(got, reward(["I hate the terrible soup, which"] * 4, texts))
  analyzer = sentiment.SentimentIntensityAnalyzer()
  np.testing.assert_array_equal(got, [analyzer.polarity_scores(t)["compound"] for t in texts])


def test_vader_description_is_true():
  sentiment = pytest.importorskip("vaderSentiment.vaderSentiment")
  reward = rewards.resolve("vader")
  assert "7,500 words" in reward.describes and "without writing better" in reward.describes
  lexicon = sentiment.SentimentIntensityAnalyzer().lexicon
  assert 7_400 <= len(lexicon) <= 7_600
  # The description says that the reward can be gamed: repeated praise scores higher.
  once, often = reward(["p", "p"], [" good", " good good good good"])
  assert often > once > 0


def test_vader_missing_names_the_extra(monkeypatch):
  real = builtins.__import__

  def without(name, *args, **kwargs):
    if name.startswith("vaderSentiment"):
      raise ModuleNotFoundError("No module named 'vaderSentiment'", name="vaderSentiment")
    return real(name, *args, **kwargs)

  rewards._vader_analyzer.cache_clear()
  monkeypatch.setattr(builtins, "__import__", without)
  with pytest.raises(ModuleNotFoundError, match=r"pip install '.\[lm\]'"):
    rewards.resolve("vader")(["p"], ["c"])
  monkeypatch.undo()
  rewards._vader_analyzer.cache_clear()
