"""A language small enough to train every method on: prompts of digits, a rule, and two judges.

A prompt is eight random digits. A completion opens with one of three style marks and goes on with
digits; people (`imitations`) copy the prompt or sort it, with slips. Two judges compare answers:

* "scalar": a reward, the share of the seven neighbouring places of a sorted answer that hold an
  ordered pair of digits of the prompt, minus 0.05 a token; preferences are Bradley-Terry in it.
* "intransitive": between different styles a cycle decides (a beats b beats c beats a, four times
  out of five), within one style the reward does. No reward explains it.

Everything is a pure function of arrays on the device. Token ids: padding, start, end and separator,
three marks, ten digits.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alignment import sequences

PAD, BOS, EOS, SEP = range(4)
FIRST_MARK, FIRST_DIGIT, VOCAB_SIZE = 4, 7, 17
NUM_STYLES, PROMPT_DIGITS = 3, 8
PROMPT_LENGTH = PROMPT_DIGITS + 2  # start, digits, separator
LENGTH = 12  # of a completion, end included
REVISION_LENGTH = PROMPT_LENGTH + LENGTH + 1
STYLE_SHARES = (0.5, 0.3, 0.2)  # of the people, and so of the reference
NO_STYLE = NUM_STYLES
LENGTH_COST, BRADLEY_TERRY_SCALE, CYCLE_PROB = 0.05, 0.1, 0.8
ORACLES = ("scalar", "intransitive")


class Quality(NamedTuple):
  """All that the judges look at.

  rewards: `[B]` the scalar reward.  styles: `[B]` 0, 1, 2, or `NO_STYLE` without a mark.
  """

  rewards: Any
  styles: Any


@functools.partial(jax.jit, static_argnums=1)
def prompts(key: jax.Array, count: int) -> sequences.Prompts:
  """Returns `count` random prompts, `[count, 10]`."""
  digits = FIRST_DIGIT + jax.random.randint(key, (count, PROMPT_DIGITS), 0, 10)
  ends = [jnp.full((count, 1), token) for token in (BOS, SEP)]
  tokens = jnp.concatenate([ends[0], digits, ends[1]], axis=1)
  return sequences.Prompts(tokens, jnp.ones(tokens.shape))


@jax.jit
def imitations(key: jax.Array, asked: sequences.Prompts) -> sequences.Sequences:
  """Returns what people answer: the digits copied (6 in 10) or sorted, with slips.

  Each digit is left out once in ten times and replaced by a random one once in ten.
  """
  count = len(asked.tokens)
  keys = jax.random.split(key, 5)
  digits = asked.tokens[:, 1:-1]
  is_sorted = jax.random.bernoulli(keys[0], 0.4, (count, 1))
  digits = jnp.where(is_sorted, jnp.sort(digits, axis=1), digits)
  wrong = FIRST_DIGIT + jax.random.randint(keys[1], digits.shape, 0, 10)
  digits = jnp.where(jax.random.bernoulli(keys[2], 0.1, digits.shape), wrong, digits)
  keep = jax.random.bernoulli(keys[3], 0.9, digits.shape)
  kept = jnp.take_along_axis(digits, jnp.argsort(~keep, axis=1, stable=True), axis=1)
  return _completions(_marks(keys[4], count), kept, keep.sum(1), asked)


@jax.jit
def edits(key: jax.Array, shown: sequences.Sequences) -> sequences.Sequences:
  """Returns how people revise an answer they are shown: mostly lightly, sometimes anew.

  Seven in ten keep the answer and swap two random neighbours, twice; of those one in five changes
  the mark. The others answer the prompt as if they had been shown nothing.
  """
  count = len(shown.tokens)
  keys = jax.random.split(key, 5)
  anew = imitations(keys[0], sequences.Prompts(shown.prompt_tokens, shown.prompt_mask))
  num_digits = _is_digit(shown).sum(1)
  tokens = shown.tokens
  rows, starts = jnp.arange(count), _has_mark(shown).astype(jnp.int32)
  for swap_key in keys[1:3]:
    left = starts + jax.random.randint(swap_key, (count,), 0, jnp.maximum(num_digits - 1, 1))
    right = jnp.where(num_digits > 1, left + 1, left)
    tokens = tokens.at[rows, left].set(tokens[rows, right]).at[rows, right].set(tokens[rows, left])
  remark = jax.random.bernoulli(keys[3], 0.2, (count,)) & _has_mark(shown)
  tokens = tokens.at[:, 0].set(jnp.where(remark, _marks(keys[4], count), tokens[:, 0]))
  light = jax.random.bernoulli(jax.random.fold_in(key, 1), 0.7, (count, 1))
  return shown._replace(
    tokens=jnp.where(light, tokens, anew.tokens), mask=jnp.where(light, shown.mask, anew.mask)
  )


@jax.jit
def revision_prompts(shown: sequences.Sequences) -> sequences.Prompts:
  """Returns prompts that show an answer: start, digits, separator, answer, separator `[B, 23]`."""
  rows = sequences.repeat_prompts(shown)
  end = jnp.ones((len(rows.tokens), 1), rows.tokens.dtype)
  return sequences.Prompts(
    jnp.concatenate([rows.prompt_tokens, rows.tokens, SEP * end], axis=1),
    jnp.concatenate([rows.prompt_mask, rows.mask, end.astype(rows.mask.dtype)], axis=1),
  )


@jax.jit
def judge(rows: sequences.Sequences) -> Quality:
  """Returns what the judges see in completions, one prompt a row or shared."""
  rows = sequences.repeat_prompts(rows)
  is_digit = _is_digit(rows)
  asked = jnp.any(rows.tokens[:, :, None] == rows.prompt_tokens[:, None, 1:-1], axis=-1)
  good = is_digit & asked
  ordered = good[:, :-1] & good[:, 1:] & (rows.tokens[:, :-1] <= rows.tokens[:, 1:])
  share = jnp.minimum(ordered.sum(1) / (PROMPT_DIGITS - 1), 1.0)
  styles = jnp.where(_has_mark(rows), rows.tokens[:, 0] - FIRST_MARK, NO_STYLE)
  return Quality(share - LENGTH_COST * (rows.mask > 0).sum(1), styles)


@jax.jit
def preferences(first: Quality, second: Quality, intransitive: jax.Array | bool) -> jax.Array:
  """Returns P(first beats second), `[B]`, of one of the two judges.

  Args:
    first: `[B]` completions.
    second: `[B]`.
    intransitive: which judge; may be traced.
  """
  by_reward = jax.nn.sigmoid((first.rewards - second.rewards) / BRADLEY_TERRY_SCALE)
  ahead = (second.styles - first.styles) % NUM_STYLES  # 1: first wins the cycle, 2: it loses
  by_cycle = jnp.where(ahead == 1, CYCLE_PROB, 1 - CYCLE_PROB)
  styled = (first.styles < NO_STYLE) & (second.styles < NO_STYLE)
  return jnp.where(intransitive & styled & (ahead > 0), by_cycle, by_reward)


def text(tokens: Any, mask: Any) -> list[str]:
  """Returns host rows as strings such as "b 1 3 5", up to their end."""
  names = ["", "<", "", "|", *"abc", *"0123456789"]
  return [
    " ".join(names[t] for t, m in zip(row, keep, strict=True) if m and names[t])
    for row, keep in zip(tokens, mask, strict=True)
  ]


def _marks(key: jax.Array, count: int) -> jax.Array:
  return FIRST_MARK + jax.random.categorical(key, jnp.log(jnp.array(STYLE_SHARES)), shape=(count,))


def _is_digit(rows: sequences.Sequences) -> jax.Array:
  return (rows.tokens >= FIRST_DIGIT) & (rows.mask > 0)


def _has_mark(rows: sequences.Sequences) -> jax.Array:
  first = rows.tokens[:, 0]
  return (first >= FIRST_MARK) & (first < FIRST_DIGIT)


def _completions(marks, digits, num_digits, asked) -> sequences.Sequences:
  """Joins marks `[B]` and the first `num_digits` `[B]` of `digits` `[B, 8]`, and ends them."""
  room = LENGTH - digits.shape[1] - 1
  body = jnp.concatenate([marks[:, None], jnp.pad(digits, [(0, 0), (0, room)])], axis=1)
  places, end = jnp.arange(LENGTH), 1 + num_digits[:, None]
  tokens = jnp.where(places < end, body, jnp.where(places == end, EOS, PAD))
  return sequences.Sequences(tokens, (places <= end).astype(jnp.float32), *asked)
