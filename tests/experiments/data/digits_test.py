"""The language of digits: oracles worked by hand, and statistics of the simulated people."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignment import sequences
from experiments.data import digits


def _row(text):
  """Returns tokens and mask of a completion such as "b 1 3 5", with its end token."""
  ids = ["abc".find(c) + 4 if c in "abc" else int(c) + digits.FIRST_DIGIT for c in text.split()]
  ids.append(digits.EOS)
  pad = digits.LENGTH - len(ids)
  return ids + [digits.PAD] * pad, [1.0] * len(ids) + [0.0] * pad


def _rows(prompt, *answers):
  asked = [digits.BOS, *(int(c) + digits.FIRST_DIGIT for c in prompt), digits.SEP]
  tokens, mask = zip(*map(_row, answers), strict=True)
  one = sequences.Prompts(jnp.array([asked]), jnp.ones((1, len(asked))))
  return sequences.Sequences(jnp.array(tokens), jnp.array(mask), *one)


def test_rewards_by_hand():
  rows = _rows(
    "31415926",
    "a 1 1 2 3 4 5 6 9",  # all seven places, ten tokens
    "a 9 6 5 4 3 2 1 1",  # one ordered pair: 1 1
    "b 7 8",  # ordered, but not in the prompt
    "1 2",  # no mark
    "c 1 a 2",  # a mark between them parts the pair
  )
  quality = digits.quality(rows)
  want = [7 / 7 - 0.5, 1 / 7 - 0.5, -0.2, 1 / 7 - 0.15, -0.25]
  np.testing.assert_allclose(quality.rewards, want, atol=1e-6)  # float32
  np.testing.assert_array_equal(quality.styles, [0, 0, 1, digits.NO_STYLE, 2])


def test_padding_is_not_looked_at():
  rows = _rows("31415926", "a 1 1 2")
  dirty = jnp.where(rows.mask > 0, rows.tokens, digits.FIRST_DIGIT + 3)
  for got, want in zip(
    digits.quality(rows._replace(tokens=dirty)), digits.quality(rows), strict=True
  ):
    np.testing.assert_array_equal(got, want)


def test_the_intransitive_judge_is_a_cycle_between_styles_and_a_reward_within():
  quality = digits.Quality(jnp.array([0.1, 0.3, 0.2, 0.0]), jnp.array([0, 1, 2, digits.NO_STYLE]))
  first, second = jnp.indices((4, 4)).reshape(2, -1)
  pick = [digits.Quality(*(x[i] for x in quality)) for i in (first, second)]
  table = digits.preferences(*pick, True).reshape(4, 4)
  np.testing.assert_allclose(table + table.T, 1, atol=1e-6)
  np.testing.assert_allclose([table[0, 1], table[1, 2], table[2, 0]], 0.8, atol=1e-6)
  by_reward = jax.nn.sigmoid((pick[0].rewards - pick[1].rewards) / 0.1).reshape(4, 4)
  np.testing.assert_allclose(table[3], by_reward[3])  # without a mark there is no cycle
  np.testing.assert_allclose(digits.preferences(*pick, False).reshape(4, 4), by_reward)
  same = (
    digits.Quality(jnp.array([0.1]), jnp.array([1])),
    digits.Quality(jnp.array([0.0]), jnp.array([1])),
  )
  np.testing.assert_allclose(digits.preferences(*same, True), jax.nn.sigmoid(1.0), rtol=1e-6)


@pytest.fixture(scope="module")
def people():
  prompts = digits.prompts(jax.random.key(0), 4000)
  return digits.imitations(jax.random.key(1), prompts)


def _check_shape_of_answers(rows):
  tokens, mask = np.asarray(rows.tokens), np.asarray(rows.mask) > 0
  lengths = mask.sum(1)
  assert (np.diff(mask.astype(int), axis=1) <= 0).all(), "no token after the end"
  np.testing.assert_array_equal(tokens[np.arange(len(tokens)), lengths - 1], digits.EOS)
  assert ((tokens[:, 0] >= digits.FIRST_MARK) & (tokens[:, 0] < digits.FIRST_DIGIT)).all()
  body = mask & (np.arange(digits.LENGTH) > 0) & (np.arange(digits.LENGTH) < lengths[:, None] - 1)
  assert (tokens[body] >= digits.FIRST_DIGIT).all() and (tokens[~mask] == digits.PAD).all()


def test_people_answer_in_form_and_in_their_styles(people):
  _check_shape_of_answers(people)
  shares = [np.mean(digits.quality(people).styles == style) for style in range(3)]
  np.testing.assert_allclose(shares, digits.STYLE_SHARES, atol=0.03)  # four standard errors
  digits_kept = np.asarray(people.mask).sum(1) - 2
  np.testing.assert_allclose(digits_kept.mean(), 0.9 * 8, atol=0.06)


def test_edits_keep_what_they_are_told_to_keep(people):
  kept = digits.edits(jax.random.key(2), people, 1.0)
  np.testing.assert_array_equal(kept.tokens, people.tokens)
  np.testing.assert_array_equal(kept.mask, people.mask)
  never, third = (digits.edits(jax.random.key(2), people, share) for share in (0.0, 1 / 3))
  # The draws are the same, so each row is the edit or what was shown.
  is_edit = np.all(np.asarray(third.tokens == never.tokens), axis=1)
  is_shown = np.all(np.asarray(third.tokens == people.tokens), axis=1)
  assert np.all(is_edit | is_shown)
  moved = np.any(np.asarray(never.tokens != people.tokens), axis=1)
  share = np.mean(is_shown[moved])
  assert abs(share - 1 / 3) < 5 * np.sqrt(2 / 9 / moved.sum())  # five standard errors


def test_edits_are_light_or_new(people):
  revised = digits.edits(jax.random.key(2), people)
  _check_shape_of_answers(revised)
  same_digits = np.array(
    [
      sorted(a[a >= digits.FIRST_DIGIT]) == sorted(b[b >= digits.FIRST_DIGIT])
      for a, b in zip(np.asarray(people.tokens), np.asarray(revised.tokens), strict=True)
    ]
  )
  # 7 in 10 are light; some new answers happen to have the same digits.
  assert 0.66 < same_digits.mean() < 0.85
  assert (np.asarray(revised.tokens) != np.asarray(people.tokens)).any(1).mean() > 0.8


def test_a_revision_prompt_shows_the_answer():
  rows = _rows("31415926", "b 1 2")
  tokens, mask = digits.revision_prompts(rows)
  assert tokens.shape == (1, digits.REVISION_LENGTH)
  real = np.asarray(tokens)[np.asarray(mask) > 0]
  np.testing.assert_array_equal(
    real, [*np.asarray(rows.prompt_tokens)[0], *np.asarray(rows.tokens)[0, :4], digits.SEP]
  )


def test_text():
  rows = _rows("31415926", "b 1 2")
  assert digits.text(np.asarray(rows.tokens), np.asarray(rows.mask)) == ["b 1 2"]
  assert digits.text(np.asarray(rows.prompt_tokens), np.asarray(rows.prompt_mask)) == [
    "< 3 1 4 1 5 9 2 6 |"
  ]
