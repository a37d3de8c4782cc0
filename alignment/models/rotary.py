"""Rotary positions: frequencies, the ways to stretch them over longer contexts, and the rotation.

References: Su et al. 2021, https://arxiv.org/abs/2104.09864 (rotary positions); Chen et al. 2023,
https://arxiv.org/abs/2306.15595 (linear stretch); Peng et al. 2023,
https://arxiv.org/abs/2309.00071 (YaRN); Ding et al. 2024,
https://arxiv.org/abs/2402.13753 (LongRoPE).
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3's stretch of the rotary wavelengths (the numbers of a `rope_type: llama3` config).

  Frequencies whose wavelength exceeds `original_max_length / low_frequency_factor` are divided by
  `factor`, those below `original_max_length / high_frequency_factor` are kept, with a linear blend
  in between.
  """

  factor: float
  low_frequency_factor: float
  high_frequency_factor: float
  original_max_length: int


@dataclasses.dataclass(frozen=True)
class LinearScaling:
  """All frequencies divided by `factor`."""

  factor: float


@dataclasses.dataclass(frozen=True)
class DynamicScaling:
  """A stretch that begins beyond `TransformerConfig.max_length` tokens, where this decoder stops.

  So it changes no number here. It is kept so that a saved folder says what the loaded one said.
  """

  factor: float


@dataclasses.dataclass(frozen=True)
class YarnScaling:
  """YaRN (Peng et al. 2023): slow features are stretched, fast ones kept, and scores sharpened.

  Attributes:
    factor: the stretch.
    original_max_length: tokens of the context before it.
    beta_fast: features that turn more often than this within that context are kept.
    beta_slow: those that turn less often are divided by `factor`, with a linear blend in between.
    attention_factor: of the rotated queries and of the keys; the paper has 0.1 log(factor) + 1.
    truncate: the borders of the blend are rounded to whole features.
  """

  factor: float
  original_max_length: int
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float = 1.0
  truncate: bool = True


@dataclasses.dataclass(frozen=True)
class LongScaling:
  """LongRoPE (Ding et al. 2024): each feature has a stretch of its own, and longer rows another.

  The width of a row decides, padding included, as in the forward pass of transformers: all tokens
  of a row have the same factors, and the shape of a call says which. A generation takes those of
  its longest completion from its first token on, so that its log-probabilities are those of
  teacher forcing. (transformers begins with the short factors there, and reads all tokens again
  with the long ones when a row passes the border.)

  Attributes:
    short_factors: of rows of up to `original_max_length` tokens; the frequency of each pair of
      features is divided by one, so there are rotary_dims / 2.
    long_factors: of longer rows.
    original_max_length: tokens of the context before the stretch.
    attention_factor: of the rotated queries and of the keys, in rows of any length.
  """

  short_factors: tuple[float, ...]
  long_factors: tuple[float, ...]
  original_max_length: int
  attention_factor: float = 1.0

  def factors(self, length: int) -> tuple[float, ...]:
    """Returns the factors of rows of `length` tokens."""
    return self.long_factors if length > self.original_max_length else self.short_factors


Scaling = RopeScaling | LinearScaling | DynamicScaling | YarnScaling | LongScaling


def rope_frequencies(
  rotary_dims: int, theta: float, scaling: Scaling | None, length: int
) -> jax.Array:
  """Returns the `[rotary_dims / 2]` frequencies, radians per token, of rows of `length` tokens."""
  exponents = jnp.arange(0, rotary_dims, 2, dtype=jnp.float32) / rotary_dims
  frequencies = theta**-exponents
  match scaling:
    case LinearScaling():
      return frequencies / scaling.factor
    case LongScaling():
      return frequencies / jnp.asarray(scaling.factors(length), jnp.float32)
    case YarnScaling():
      keep = 1 - _yarn_ramp(rotary_dims, theta, scaling)
    case RopeScaling():
      turns = scaling.original_max_length * frequencies / (2 * math.pi)
      keep = (turns - scaling.low_frequency_factor) / (
        scaling.high_frequency_factor - scaling.low_frequency_factor
      )
      keep = jnp.clip(keep, 0.0, 1.0)
    case _:
      return frequencies
  return frequencies * (keep + (1 - keep) / scaling.factor)


def _yarn_ramp(rotary_dims: int, theta: float, scaling: YarnScaling) -> jax.Array:
  """Returns `[rotary_dims / 2]`: 0 for features that are kept, 1 for those that are stretched."""

  def feature(turns: float) -> float:
    """The feature pair that turns that often within the original context."""
    wavelength = scaling.original_max_length / (turns * 2 * math.pi)
    return rotary_dims * math.log(wavelength) / (2 * math.log(theta))

  low, high = feature(scaling.beta_fast), feature(scaling.beta_slow)
  if scaling.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, rotary_dims - 1)
  places = jnp.arange(rotary_dims // 2, dtype=jnp.float32)
  return jnp.clip((places - low) / (high - low or 0.001), 0.0, 1.0)


def rope_table(
  positions: jax.Array, rotary_dims: int, theta: float, scaling: Scaling | None, length: int
) -> tuple[jax.Array, jax.Array]:
  """Returns cosines and sines `[B, T, 1, rotary_dims / 2]` for integer `positions` `[B, T]`.

  `length` counts the tokens of a whole row, of which these may be a part.
  """
  frequencies = rope_frequencies(rotary_dims, theta, scaling, length)
  angles = positions[..., None, None].astype(jnp.float32) * frequencies
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  if isinstance(scaling, YarnScaling | LongScaling):
    cos, sin = cos * scaling.attention_factor, sin * scaling.attention_factor
  return cos, sin


def rotary_columns(
  weights: jax.Array, num_heads: int, pairing: Literal["half", "adjacent"]
) -> jax.Array:
  """Returns query or key weights `[..., num_heads * head_dim]` in "half" order.

  Queries and keys reordered alike have the same products, and a matrix is often smaller than the
  activations: so "adjacent" becomes "half" here, and `rotate` knows only one kind.
  """
  if pairing == "half":
    return weights
  pairs = weights.reshape(*weights.shape[:-1], num_heads, -1, 2)
  return pairs.swapaxes(-1, -2).reshape(weights.shape)


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotates `[B, T, heads, head_dim]`, feature i paired with i + rotary_dims / 2.

  Features from `rotary_dims` (twice the last axis of `rope`) on are left as they are.
  """
  cos, sin = rope
  rotary_dims = 2 * cos.shape[-1]
  x, rest = (x, None) if rotary_dims == x.shape[-1] else jnp.split(x, [rotary_dims], axis=-1)
  first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  rotated = rotated.astype(x.dtype)
  return rotated if rest is None else jnp.concatenate([rotated, rest], axis=-1)
