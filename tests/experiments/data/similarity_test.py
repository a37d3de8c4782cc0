"""ROUGE-L against numbers worked by hand, and the reward over the nearest reference."""

import json

import numpy as np
import pytest

from experiments.data import rewards, similarity


@pytest.mark.parametrize(
  ("reference", "candidate", "score"),
  [
    ("police killed the gunman", "police kill the gunman", 3 / 4),  # Lin 2004, section 3.1
    ("police killed the gunman", "the gunman kill police", 2 / 4),
    ("a b c d", "a b", 2 * 1 * 0.5 / 1.5),  # precision 1, recall 1/2
    ("a b c", "c b a", 1 / 3),
    ("a b c", "", 0.0),
    ("", "a", 0.0),
    ("The GAN's 2-D toy.", "the gan s 2 d toy", 1.0),
  ],
)
def test_hand_numbers(reference, candidate, score):
  got = similarity.rouge_l(similarity.words(reference), similarity.words(candidate))
  np.testing.assert_allclose(got, score)


def test_the_nearest_reference_counts_and_others_are_refused(tmp_path):
  path = tmp_path / "d.jsonl"

  def write(*references):
    row = {"prompt": "p", "completion": " a b", "references": list(references)}
    path.write_text(json.dumps(row) + "\n")

  write("a b", "x y")
  reward = rewards.resolve(f"rouge_l:{path}")
  np.testing.assert_allclose(reward(["p", "p", "p"], [" a b", " y", " z"]), [1, 2 / 3, 0])
  assert "ROUGE-L" in reward.describes
  with pytest.raises(ValueError, match=r"no reference for the prompt 'q'"):
    reward(["q"], ["a"])
  assert reward.fingerprint == rewards.resolve(f"rouge_l:{path}").fingerprint
  write("a b", "x z")
  assert reward.fingerprint != rewards.resolve(f"rouge_l:{path}").fingerprint
  with pytest.raises(ValueError, match="cannot read nowhere"):
    rewards.resolve("rouge_l:nowhere")
