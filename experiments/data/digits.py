"""A toy language of digits on which every method can be trained, with two preference oracles.

A prompt is eight random digits. A completion starts with one of three style marks, followed by
digits. Simulated people (`imitations`) copy the prompt or sort it, with mistakes. Two oracles
compare completions:

* "scalar": Bradley-Terry preferences from a reward. The reward is the number of neighbouring digits
  that are in order and both occur in the prompt, divided by the seven of a sorted answer (at most
  1), minus 0.05 for each token.
* "intransitive": between two styles a cycle decides: a beats b, b beats c and c beats a, each with
  probability 0.8. Within a style the reward decides. No reward explains these preferences.

All functions are pure functions of arrays on the device. The token ids are padding, start, end and
separator, three marks, ten digits.
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
LENGTH = 12  # of a completion, with its end token
REVISION_LENGTH = PROMPT_LENGTH + LENGTH + 1
STYLE_SHARES = (0.5, 0.3, 0.2)  # how often people, and the reference trained on them, use a mark
NO_STYLE = NUM_STYLES
LENGTH_COST, BRADLEY_TERRY_SCALE, CYCLE_PROB = 0.05, 0.1, 0.8
ORACLES = ("scalar", "intransitive")


class Quality(NamedTuple):
  """The properties of completions that the oracles compare.

  rewards: `[B]` scalar rewards.  styles: `[B]` 0, 1 or 2, and `NO_STYLE` without a mark.
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
  """Returns completions of simulated people: the digits copied (60 %) or sorted, with mistakes.

  Each digit is left out with probability 0.1 and replaced by a random one with probability 0.1.

  Args:
    key: PRNG key.
    asked: B prompts.
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
def edits(
  key: jax.Array, shown: sequences.Sequences, kept: jax.Array | float = 0.0
) -> sequences.Sequences:
  """Returns revisions of completions by simulated people.

  With probability `kept` the completion stays as it is. Of the others, 70 % are changed by two
  swaps of random neighbours, and their mark is drawn again with probability 0.2. A new completion
  of `imitations` replaces the rest.

  Args:
    key: PRNG key.
    shown: B completions, each with a prompt row of its own.
    kept: probability in [0, 1]; may be traced.
  """
  count = len(shown.tokens)
  keys = jax.random.split(key, 5)
  fresh = imitations(keys[0], sequences.Prompts(shown.prompt_tokens, shown.prompt_mask))
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
  changed = shown._replace(
    tokens=jnp.where(light, tokens, fresh.tokens), mask=jnp.where(light, shown.mask, fresh.mask)
  )
  stays = jax.random.bernoulli(jax.random.fold_in(key, 2), kept, (count, 1))
  return shown._replace(
    tokens=jnp.where(stays, shown.tokens, changed.tokens),
    mask=jnp.where(stays, shown.mask, changed.mask),
  )


@jax.jit
def revision_prompts(shown: sequences.Sequences) -> sequences.Prompts:
  """Returns prompts `[B, 23]` that show a completion.

  A row is start, digits, separator, completion, separator.
  """
  rows = sequences.repeat_prompts(shown)
  end = jnp.ones((len(rows.tokens), 1), rows.tokens.dtype)
  return sequences.Prompts(
    jnp.concatenate([rows.prompt_tokens, rows.tokens, SEP * end], axis=1),
    jnp.concatenate([rows.prompt_mask, rows.mask, end.astype(rows.mask.dtype)], axis=1),
  )


@jax.jit
def quality(rows: sequences.Sequences) -> Quality:
  """Returns the reward and style of B completions; several may share a prompt."""
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
  """Returns `[B]` probabilities that `first` beats `second`.

  Args:
    first: qualities of B completions.
    second: qualities of B completions.
    intransitive: whether the intransitive oracle decides, rather than the scalar one; may be
      traced.
  """
  by_reward = jax.nn.sigmoid((first.rewards - second.rewards) / BRADLEY_TERRY_SCALE)
  ahead = (second.styles - first.styles) % NUM_STYLES  # 1: first wins the cycle, 2: it loses
  by_cycle = jnp.where(ahead == 1, CYCLE_PROB, 1 - CYCLE_PROB)
  styled = (first.styles < NO_STYLE) & (second.styles < NO_STYLE)
  return jnp.where(intransitive & styled & (ahead > 0), by_cycle, by_reward)


def against_one_style(styles: Any) -> tuple[float, str]:
  """Returns the win rate against the worst opponent of one style and equal reward, and its style.

  The opponent has the same rewards in every style as the policy. So the cycle decides between two
  styles, and within a style, or without one, each side wins half of the games. No run is needed.

  Args:
    styles: `[N]` of the policy's answers.
  """
  lead = (jnp.arange(NUM_STYLES)[:, None] - styles) % NUM_STYLES  # 1: policy wins
  wins = jnp.select([lead == 1, lead == 2], [CYCLE_PROB, 1 - CYCLE_PROB], 0.5)
  rates = jnp.where(styles == NO_STYLE, 0.5, wins).mean(1)
  return float(rates.min()), "abc"[int(rates.argmin())]


def text(tokens: Any, mask: Any) -> list[str]:
  """Returns NumPy rows of tokens `[B, T]` as strings such as "b 1 3 5", without the end token."""
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
  """Returns completions of marks `[B]` and the first `num_digits` `[B]` of `digits` `[B, 8]`."""
  room = LENGTH - digits.shape[1] - 1
  body = jnp.concatenate([marks[:, None], jnp.pad(digits, [(0, 0), (0, room)])], axis=1)
  places, end = jnp.arange(LENGTH), 1 + num_digits[:, None]
  tokens = jnp.where(places < end, body, jnp.where(places == end, EOS, PAD))
  return sequences.Sequences(tokens, (places <= end).astype(jnp.float32), *asked)
