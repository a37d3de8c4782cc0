"""Similarity to human references: the reward `rouge_l:SOURCE` of summaries and translations.

SOURCE is a data set of demonstrations ({prompt, completion, references}, see `text.py`). The reward
of a completion is the highest score over the references of its prompt.
"""

import hashlib
import re
from collections.abc import Sequence

import numpy as np

from experiments.data import text

DESCRIPTION = (
  "The reward is ROUGE-L F1 (Lin 2004) with the nearest human reference, between 0 and 1: the "
  "longest common subsequence of words, lower case, without stemming. It counts words in order and "
  "does not read: a true summary in other words scores low, a false one in the reference's words "
  "high."
)


class Similarity:
  """A reward function: ROUGE-L F1 with the nearest reference of the prompt.

  Attributes:
    fingerprint: hash of the description and the references.
  """

  def __init__(self, source: str):
    """Reads the references of a source; errors are those of `text.load_demonstrations`."""
    self._source = source
    self._references: dict[str, list[list[str]]] = {}
    digest = hashlib.sha256(DESCRIPTION.encode())
    for row in text.load_demonstrations(source):
      self._references.setdefault(row.prompt, []).extend(map(words, row.references))
      digest.update("\0".join((row.prompt, *row.references)).encode())
    self.fingerprint = f"rouge_l@{digest.hexdigest()}"

  def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
    """Returns `[N]` scores; raises `ValueError` for a prompt without references."""
    scores = []
    for prompt, completion in zip(prompts, completions, strict=True):
      if prompt not in self._references:
        raise ValueError(
          f"reward rouge_l:{self._source} has no reference for the prompt {prompt[:60]!r}...: take "
          "data.prompts from the same source"
        )
      found = words(completion)
      scores.append(max(rouge_l(reference, found) for reference in self._references[prompt]))
    return np.array(scores, np.float64)


def words(string: str) -> list[str]:
  """Returns the words of a text in lower case; words are runs of ASCII letters and digits."""
  return re.findall(r"[a-z0-9]+", string.lower())


def rouge_l(reference: Sequence[str], candidate: Sequence[str]) -> float:
  """Returns the ROUGE-L F1 of two lists of words; 0 if either is empty.

  Example:
    >>> rouge_l("the cat sat down".split(), "the dog sat".split())
    0.5714285714285714

  Reference: Lin 2004, https://aclanthology.org/W04-1013.
  """
  if not reference or not candidate:
    return 0.0
  # Longest common subsequence by dynamic programming; only one row of the table is kept.
  row = [0] * (len(candidate) + 1)
  for word in reference:
    diagonal = 0
    for j, other in enumerate(candidate, start=1):
      above = row[j]
      row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
      diagonal = above
  return 2 * row[-1] / (len(reference) + len(candidate))
