"""Token arrays of `experiments.data.encoding`: padding, masks, truncation, errors."""

import numpy as np
import pytest

from experiments.data import encoding


class _Letters:
  """Tokens 1..26 are the letters, 0 pads and 27 ends; anything else has no token."""

  eos_id, pad_id, vocab_size = 27, 0, 28
  bos_id: int | None = None

  def encode_prompt(self, string):
    letters = [ord(c) - 96 for c in string if "a" <= c <= "z"]
    return letters if self.bos_id is None else [self.bos_id, *letters]

  def encode_completion(self, string, prompt=None):
    return [*(ord(c) - 96 for c in string if "a" <= c <= "z"), self.eos_id]


def test_encode_prompts_pads_on_the_left():
  tokens, mask = encoding.encode_prompts(_Letters(), ["abc", "z"], max_length=8, multiple=4)
  np.testing.assert_array_equal(tokens, [[0, 1, 2, 3], [0, 0, 0, 26]])
  np.testing.assert_array_equal(mask, [[0, 1, 1, 1], [0, 0, 0, 1]])
  assert tokens.dtype == np.int32 and mask.dtype == np.float32


def test_encode_completions_appends_eos_and_pads_on_the_right():
  tokens, mask = encoding.encode_completions(_Letters(), ["abc", "z"], max_length=8, multiple=4)
  np.testing.assert_array_equal(tokens, [[1, 2, 3, 27], [26, 27, 0, 0]])
  np.testing.assert_array_equal(mask, [[1, 1, 1, 1], [1, 1, 0, 0]])


def test_width_is_a_multiple_but_never_past_the_limit():
  def width(n, limit):
    return encoding.encode_prompts(_Letters(), ["a" * n], max_length=limit)[0].shape[1]

  assert [width(1, 20), width(8, 20), width(9, 20), width(17, 20)] == [8, 8, 16, 20]


def test_truncation_is_explicit():
  tokens, _ = encoding.encode_prompts(
    _Letters(), ["abcdef"], max_length=4, multiple=4, truncate="left"
  )
  np.testing.assert_array_equal(tokens, [[3, 4, 5, 6]])
  tokens, mask = encoding.encode_completions(
    _Letters(), ["abcdef"], max_length=4, multiple=4, truncate="right"
  )
  np.testing.assert_array_equal(tokens, [[1, 2, 3, 4]])
  assert mask.all()
  with pytest.raises(
    ValueError, match=r"prompt 1 \('abcdef'\) has 6 tokens, more than max_length=4.*'left'"
  ):
    encoding.encode_prompts(_Letters(), ["a", "abcdef"], max_length=4)
  # The end of sequence counts.
  with pytest.raises(
    ValueError, match=r"completion 0 .* has 5 tokens, more than max_length=4.*'right'"
  ):
    encoding.encode_completions(_Letters(), ["abcd"], max_length=4)


def test_bad_tokens():
  small = _Letters()
  small.vocab_size, small.eos_id = 10, 9
  with pytest.raises(ValueError, match=r"prompt 1 .* has token 11, outside the vocabulary of 10"):
    encoding.encode_prompts(small, ["a", "bk"], max_length=4)
  with pytest.raises(ValueError, match=r"prompt 0 .* has no tokens"):
    encoding.encode_prompts(small, ["123"], max_length=4)
  with pytest.raises(ValueError, match=r"completion 0 .*has no tokens"):
    encoding.encode_completions(small, ["123"], max_length=4)
  with pytest.raises(ValueError, match="no prompts to tokenise"):
    encoding.encode_prompts(small, [], max_length=4)
  with pytest.raises(ValueError, match="truncate is 'right'"):
    encoding.encode_prompts(small, ["a"], max_length=4, truncate="right")


def test_start_token_goes_before_prompts_and_never_before_completions():
  tokenizer = _Letters()
  tokenizer.bos_id = 26
  tokens, _ = encoding.encode_prompts(tokenizer, ["ab"], max_length=3, multiple=1)
  np.testing.assert_array_equal(tokens, [[26, 1, 2]])
  tokens, _ = encoding.encode_completions(tokenizer, ["ab"], max_length=3, multiple=1)
  np.testing.assert_array_equal(tokens, [[1, 2, 27]])


def test_truncation_keeps_the_start_token():
  tokenizer = _Letters()
  tokenizer.bos_id = 26
  for limit, expected in ((3, [26, 5, 6]), (1, [26]), (7, [26, 1, 2, 3, 4, 5, 6])):
    tokens, mask = encoding.encode_prompts(
      tokenizer, ["abcdef"], max_length=limit, multiple=1, truncate="left"
    )
    np.testing.assert_array_equal(tokens, [expected])
    assert mask.all()
