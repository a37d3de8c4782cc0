"""Reward and preference functions of completions, found by name.

A reward function takes two lists, N prompts and N completions, and returns N finite numbers; higher
is better. `--config.reward` names one:

* `module:function`: a function of the user's own; it needs no registration.
* `vader` or `vowels`: one of the two functions in this file.
* a folder: the reward model of a `reward_model` run (`learned_rewards.py`).
* `rouge_l:SOURCE`: similarity to the references of a data set (`similarity.py`).

A preference function takes N prompts and two lists of completions, and returns the probabilities
that the first completions win. `--config.preference` is `module:function`, or the folder of a
reward or preference model.

`vader` and `vowels` score the completion without its prompt. Completions that are compared share
their prompt, so its words would shift all scores alike, and in a normalised score such as VADER's
they would make the differences smaller.
"""

import dataclasses
import functools
import hashlib
import importlib
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments import files
from experiments.data import learned_rewards, similarity

_SHORT_NAMES = {
  "vader": "experiments.data.rewards:vader",
  "vowels": "experiments.data.rewards:vowels",
}


@dataclasses.dataclass(frozen=True)
class Reward:
  """A reward function with a check of its values on every call.

  Attributes:
    name: "module:function", a folder, or "rouge_l:SOURCE".
    function: of N prompts and N completions.
    describes: what it rewards, for readers of a report; may be empty.
    fingerprint: changes with the function: name and hash of the module's source, or of the files.
    learned: the model behind the function, which a compiled step can hold; None for host code.
  """

  name: str
  function: Callable[[list[str], list[str]], Any]
  describes: str
  fingerprint: str
  learned: learned_rewards.LearnedReward | None = None

  def __call__(self, prompts: list[str], completions: list[str]) -> np.ndarray:
    """Returns `[N]` float64 rewards.

    Raises:
      ValueError: the lists differ in length, or the function does not return N finite numbers.
    """
    if len(prompts) != len(completions):
      raise ValueError(
        f"{len(prompts)} prompts but {len(completions)} completions; give one prompt for each"
      )
    result = self.function(list(prompts), list(completions))
    try:
      values = np.asarray(result, np.float64)
    except (TypeError, ValueError) as error:
      raise ValueError(f"reward {self.name} must return numbers: {error}") from None
    if values.shape != (len(completions),):
      raise ValueError(
        f"reward {self.name} returned shape {values.shape} for {len(completions)} completions; "
        f"return one number for each, shape ({len(completions)},)"
      )
    if not np.isfinite(values).all():
      first = int(np.flatnonzero(~np.isfinite(values))[0])
      raise ValueError(
        f"reward {self.name} returned {values[first]} for completion {first} "
        f"({completions[first]!r}); rewards must be finite"
      )
    return values


@dataclasses.dataclass(frozen=True)
class Preference:
  """A function of prompts and pairs of completions that returns P(the first beats the second).

  Attributes:
    name: "module:function" or a folder.
    function: of N prompts, N first and N second completions.
    learned: the model behind the function, as in `Reward`.
  """

  name: str
  function: Callable[[list[str], list[str], list[str]], Any]
  learned: learned_rewards.LearnedReward | None = None

  def __call__(self, prompts: list[str], first: list[str], second: list[str]) -> np.ndarray:
    """Returns `[N]` float64 probabilities.

    Raises:
      ValueError: the function does not return N numbers in [0, 1].
    """
    values = np.asarray(self.function(list(prompts), list(first), list(second)), np.float64)
    if values.shape != (len(prompts),) or not np.all((values >= 0) & (values <= 1)):
      raise ValueError(
        f"preference {self.name} returned {values} for {len(prompts)} pairs; return for each the "
        "probability in [0, 1] that the first completion beats the second"
      )
    return values


def resolve(name: str) -> Reward:
  """Returns the reward of a name: "module:function", "vader", "vowels", "rouge_l:SOURCE", a folder.

  Raises:
    ValueError: the name has another form, the module or the function is not found, or the folder
      is absent or holds no reward model.

  Example:
    >>> resolve("vowels")(["The sky"], [" was ea"])
    array([0.6])
  """
  if name.startswith("rouge_l:"):
    return _similarity(name)
  if _is_folder(name):
    return _learned(name)
  full, module, function = _load("reward", name)
  source = getattr(module, "__file__", None)
  code = hashlib.sha256(pathlib.Path(source).read_bytes()).hexdigest()[:16] if source else "?"
  return Reward(full, function, getattr(function, "describes", ""), f"{full}@{code}")


def resolve_judges(names: str, reward: Reward | None = None) -> dict[str, Reward]:
  """Returns the rewards that `eval.judges` lists, by the short names of their metrics.

  The short name is that of the function, `rouge_l`, or the folder's, where a last part `model` does
  not count.

  Args:
    names: names as of `resolve`, parted by commas.
    reward: what the run optimises.

  Raises:
    ValueError: as `resolve`, and if a judge is the reward, or a short name is there twice or ends
      as the names of other metrics do.

  Example:
    >>> list(resolve_judges("vowels, experiments.data.rewards:vader"))
    ['vowels', 'vader']
  """
  found: dict[str, Reward] = {}
  where = f"eval.judges={names!r}"
  for entry in filter(None, map(str.strip, names.split(","))):
    short = entry.partition(":")[0] if entry.startswith("rouge_l:") else entry.rpartition(":")[2]
    parts = [part for part in pathlib.PurePath(short).parts if part != "model"]
    short = parts[-1] if parts else short
    if short in found:
      raise ValueError(f"{where}: two judges are called {short!r}: leave one out")
    if short.endswith(("_reference", "_win_rate")):
      raise ValueError(f"{where}: {short!r} is the name of another metric: rename the judge")
    try:
      found[short] = resolve(entry)
    except ValueError as error:
      raise ValueError(f"{where} (commas part the judges): {error}") from error
    if reward is not None and found[short].fingerprint == reward.fingerprint:
      raise ValueError(f"{where}: {entry} is the reward, which is measured anyway: leave it out")
  return found


def resolve_preference(name: str) -> Preference:
  """Returns the preference of a name: "module:function", or the folder of a learned model.

  Errors are those of `resolve`.
  """
  if _is_folder(name):
    model = learned_rewards.load(name)
    return Preference(name, model.preference_probs, model)
  full, _, function = _load("preference", name)
  return Preference(full, function)


def _load(kind: str, name: str) -> tuple[str, Any, Callable[..., Any]]:
  """Returns full name, module and function; `kind` is "reward" or "preference", for messages."""
  full = _SHORT_NAMES.get(name, name) if kind == "reward" else name
  module_name, colon, function_name = full.partition(":")
  if not (colon and module_name and function_name.isidentifier()):
    others = f", the folder of a reward model, or one of {', '.join(_SHORT_NAMES)}"
    raise ValueError(
      f"{kind} is {name!r}; write module:function, such as my_{kind}s:politeness"
      + (others if kind == "reward" else "")
    )
  try:
    module = importlib.import_module(module_name)
  except ModuleNotFoundError as error:
    # Whether the module itself is missing or something that it imports calls for another remedy.
    if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
      raise ValueError(
        f"{kind} {name!r}: there is no module {error.name!r}; install it, or add its folder to "
        "PYTHONPATH"
      ) from None
    raise ValueError(
      f"{kind} {name!r}: importing {module_name!r} failed: {error}; install what it needs"
    ) from error
  except (TypeError, ValueError) as error:  # a relative name such as ".rewards"
    raise ValueError(f"{kind} {name!r}: cannot import {module_name!r}: {error}") from error
  function = getattr(module, function_name, None)
  if function is None:
    callables = sorted(k for k, v in vars(module).items() if callable(v) and k[0] != "_")
    raise ValueError(
      f"{kind} {name!r}: module {module_name!r} has no {function_name!r}; it has {callables[:20]}"
    )
  if not callable(function):
    raise ValueError(
      f"{kind} {name!r}: {function_name!r} is a {type(function).__name__}, not a function"
    )
  return full, module, function


def _is_folder(name: str) -> bool:
  separated = any(separator in name for separator in "/\\")
  return separated or files.local_path("config.reward", name or "?").is_dir()


def _similarity(name: str) -> Reward:
  function = similarity.Similarity(name.partition(":")[2])
  return Reward(name, function, similarity.DESCRIPTION, function.fingerprint)


def _learned(folder: str) -> Reward:
  judge = learned_rewards.load(folder)
  judge.rewards([], [])  # refuses a pairwise model
  return Reward(folder, judge.rewards, judge.settings.describes, judge.fingerprint, judge)


def describes(text: str) -> Callable[[Any], Any]:
  """Decorates a reward function with a description, which the report shows."""

  def mark(function: Any) -> Any:
    function.describes = text
    return function

  return mark


@describes(
  "The reward is VADER's compound score of the completion, between -1 and 1 (Hutto and Gilbert "
  "2014). VADER looks up each word in a list of about 7,500 words and emoticons with hand-rated "
  "sentiment, applies a few rules (negation, intensifiers, capitals, exclamation marks) and "
  "squashes the sum. It does not read the text: praise out of place or the same praise repeated "
  "scores high, and more words of praise score higher. A policy can therefore raise this reward "
  "without writing better; look at the samples and at the KL as well as at the number."
)
def vader(prompts: list[str], completions: list[str]) -> np.ndarray:
  """Returns `[N]` VADER compound scores in [-1, 1] of the completions alone.

  Raises:
    ModuleNotFoundError: the package vaderSentiment is missing; the message says how to install it.

  Reference: Hutto and Gilbert 2014, https://ojs.aaai.org/index.php/ICWSM/article/view/14550.
  """
  del prompts
  analyzer = _vader_analyzer()
  return np.array([analyzer.polarity_scores(text)["compound"] for text in completions], np.float64)


@functools.cache
def _vader_analyzer() -> Any:
  try:
    from vaderSentiment import vaderSentiment
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      f"the reward 'vader' needs {error.name}: pip install '.[lm]'", name=error.name
    ) from error
  return vaderSentiment.SentimentIntensityAnalyzer()


@describes("The reward is the share of vowels among the letters: a toy for runs without weights.")
def vowels(prompts: list[str], completions: list[str]) -> np.ndarray:
  """Returns `[N]` shares of vowels among the letters of each completion; 0 without letters."""
  del prompts
  letters = [[c for c in text.lower() if c.isalpha()] for text in completions]
  return np.array([sum(c in "aeiou" for c in row) / max(1, len(row)) for row in letters])
