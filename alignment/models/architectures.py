"""Both kinds of language models behind one interface; the type of a config says which it is.

`transformer` is a decoder alone, `t5` an encoder-decoder. `sampling`, `scalar_head` and
`huggingface` take either config.
"""

from collections.abc import Callable
from typing import Any

import jax

from alignment import sequences
from alignment.models import rotary, t5, transformer

Config = transformer.TransformerConfig | t5.T5Config

# Those of `transformer`, and what `t5` adds to them.
SHARDING_RULES = t5.SHARDING_RULES


def make_apply_fn(
  config: Config, *, logps_chunk: int | None = None
) -> Callable[[Any, sequences.Sequences], jax.Array]:
  """Returns `apply_fn(params, Sequences) -> [B, T]`; see `transformer.make_apply_fn`."""
  if isinstance(config, t5.T5Config):
    return t5.make_apply_fn(config, logps_chunk=logps_chunk)
  return transformer.make_apply_fn(config, logps_chunk=logps_chunk)


def check_widths(config: Config, longest: int, remedy: str) -> None:
  """Checks that rows of several widths, up to `longest` tokens, are read by one function.

  Under LongRoPE the width of a row decides about its positions (`rotary.LongScaling`).

  Raises:
    ValueError: if some of the rows would be read as short ones and others as long ones. `remedy`
      ends the message.
  """
  border = _width_border(config)
  if border is not None and longest > border:
    raise ValueError(
      f"rows of up to {longest} tokens cross {border}, where this model changes its rotary "
      f"positions (rope_type 'longrope'): {remedy}"
    )


def reads_by_width(config: Config, longest: int) -> bool:
  """Returns whether the model reads rows of up to `longest` tokens otherwise than shorter ones."""
  border = _width_border(config)
  return border is not None and longest > border


def _width_border(config: Config) -> int | None:
  """Returns the width beyond which the model reads otherwise, or None."""
  scaling = None if isinstance(config, t5.T5Config) else config.rope_scaling
  return scaling.original_max_length if isinstance(scaling, rotary.LongScaling) else None


def last_states(params: Any, tokens: jax.Array, mask: jax.Array, *, config: Config) -> jax.Array:
  """Returns the state `[B, D]` from which the token after each row is predicted.

  Args:
    params: of the model; the output head is not used.
    tokens: `[B, T]` int ids.
    mask: `[B, T]` non-zero on real tokens; padding on the left, as `attention.justify_prompts`
      makes it.
    config: the shape of the model.
  """
  if isinstance(config, t5.T5Config):
    return t5.first_states(params, tokens, mask, config=config)
  return transformer.hidden_states(params, tokens, mask, config=config)[:, -1]
