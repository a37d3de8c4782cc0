"""The layers of a decoder as Flax modules: norms, matrix products, attention, feed-forward.

What each computes is chosen by `TransformerConfig`. The arithmetic runs in `config.dtype`; norms
and softmax always in float32.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from alignment.models import attention, fused_attention, int8_base, rotary
from alignment.models.decoder_config import TransformerConfig, distinct

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "silu": jax.nn.silu,
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class LayerKind(NamedTuple):
  """What one layer has of its own, where layers differ: places in what all layers share.

  Attributes:
    rope: `[]` int32, which rotary table; None where all layers have the same.
    window: `[]` int32, which window; None likewise.
  """

  rope: jax.Array | None
  window: jax.Array | None


def layer_kinds(config: TransformerConfig, length: int) -> LayerKind:
  """Returns the kinds of all layers, `[L]` each, for rows of `length` tokens."""

  def places(values):
    kinds, which = distinct(values)
    return None if len(kinds) == 1 else jnp.asarray(which, jnp.int32)

  return LayerKind(places(config.layer_ropes()), places(config.layer_windows(length)))


def choose(shared: Any, which: jax.Array | None) -> Any:
  """Returns what a layer takes of arrays that are stacked over kinds; all if there is one kind."""
  return shared if which is None else jax.tree.map(lambda x: x[which], shared)


def normalise(
  x: jax.Array, weights: dict[str, jax.Array], config: TransformerConfig, *, axis: int = -1
) -> jax.Array:
  """Returns `x` normed over an axis, in float32, and rounded to `config.dtype`.

  Args:
    x: of any shape, or `[D, B]` for axis 0.
    weights: "scale" and, for LayerNorm, "bias"; of the size of that axis.
    config: the kind of norm and its epsilon.
    axis: 0 or -1.
  """
  wide = x.astype(attention.accumulator(x.dtype))

  def along(name):
    leaf = weights[name] if axis == -1 else weights[name][:, None]
    return leaf.astype(wide.dtype)

  if config.norm == "layer":
    wide -= jnp.mean(wide, axis=axis, keepdims=True)
  mean_square = jnp.mean(wide * wide, axis=axis, keepdims=True)
  wide *= jax.lax.rsqrt(mean_square + config.norm_epsilon)
  if config.norm == "layer":
    return (wide * along("scale") + along("bias")).astype(config.dtype)
  scale = along("scale") + 1 if config.norm == "rms_plus_one" else along("scale")
  return (wide * scale).astype(config.dtype)


class Norm(nn.Module):
  """Normalises the features; `config.norm` says how."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    config = self.config
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    start = zeros if config.norm == "rms_plus_one" else ones
    weights = {"scale": self.param("scale", start, x.shape[-1:], config.param_dtype)}
    if config.norm == "layer":
      weights["bias"] = self.param("bias", zeros, x.shape[-1:], config.param_dtype)
    return normalise(x, weights, config)


class Dense(nn.Module):
  """A matrix product over flattened leading dimensions.

  Flattened, because the weight gradient of `[B, T, D] @ [D, F]` contracts two dimensions, which
  XLA runs 2.3 times slower on a CPU than the `[B * T, D]` form.
  """

  features: int
  config: TransformerConfig
  bias: bool = False
  rotary_heads: int = 0  # > 0: the columns are that many heads, about to be rotated
  wide: bool = False  # the sums are returned as they are, in float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    config = self.config

    def columns(weights):
      weights = weights.astype(config.dtype)
      if self.rotary_heads:
        weights = rotary.rotary_columns(weights, self.rotary_heads, config.rope_pairing)
      return weights

    initializer = nn.initializers.normal(0.02)
    kernel = self.param("kernel", initializer, (x.shape[-1], self.features), config.param_dtype)
    if self.has_variable("params", int8_base.SCALE):  # one layer in full, while it is used
      kernel = int8_base.dequantise(kernel, self.get_variable("params", int8_base.SCALE))
    kernel = columns(kernel)
    dtype = attention.accumulator(config.dtype) if self.wide else None
    y = jnp.dot(x.reshape(-1, x.shape[-1]), kernel, preferred_element_type=dtype)
    if self.has_variable("params", "lora_b"):  # see `lora`
      factors: Any = self.variables["params"]
      a, b = factors["lora_a"].astype(config.dtype), columns(factors["lora_b"])
      # As one batch, so that the policy of `remat` keeps the thin product and not the wide one.
      y += jax.lax.batch_matmul((x.reshape(-1, x.shape[-1]) @ a)[None], b[None])[0]
    if self.bias:
      zeros = nn.initializers.zeros
      y += columns(self.param("bias", zeros, (self.features,), config.param_dtype))
    return y.reshape(*x.shape[:-1], self.features)


class HeadNorm(nn.Module):
  """RMSNorm of each head `[..., heads, head_dim]`, all with the same scale."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    config = self.config
    start = nn.initializers.zeros if config.norm == "rms_plus_one" else nn.initializers.ones
    scale = self.param("scale", start, x.shape[-1:], config.param_dtype)
    # The heads are in "half" order already.
    scale = rotary.rotary_columns(scale, 1, config.rope_pairing)
    return normalise(x, {"scale": scale}, config)


class Attention(nn.Module):
  """Self-attention; returns its keys and values too."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x, rope, visible, kind) -> tuple[jax.Array, attention.KeysValues]:
    config = self.config
    batch, length = x.shape[:2]
    rope = choose(rope, kind.rope)

    def heads(name, count, rotates):
      features = count * config.head_dim
      pairs = count if rotates else 0
      y = Dense(features, config, bias=config.qkv_bias, rotary_heads=pairs, name=name)(x)
      y = y.reshape(batch, length, count, config.head_dim)
      if rotates and config.head_norms:
        y = HeadNorm(config, name=f"{name}_norm")(y)
      return y if rope is None or not rotates else rotary.rotate(y, rope)

    queries = heads("query", config.num_heads, True)
    keys = heads("key", config.num_kv_heads, True).swapaxes(1, 2)
    values = heads("value", config.num_kv_heads, False).swapaxes(1, 2)
    out = attend(queries, keys, values, visible, kind.window, config).reshape(batch, length, -1)
    out = Dense(config.width, config, bias=config.output_bias, name="output")(out)
    return out, (keys, values)


def attend(queries, keys, values, visible, which, config: TransformerConfig) -> jax.Array:
  """Attention of one layer, written out or by a kernel, as the kind of `visible` says.

  The written-out form finds its windows in `visible`. A kernel takes a window as a constant, so
  layers with different ones choose between kernels.
  """
  settings: Any = dict(scale=config.score_scale, softcap=config.attention_softcap)
  if not isinstance(visible, fused_attention.Rows | fused_attention.SharedPromptRows):
    return attention.attend(queries, keys, values, choose(visible, which), **settings)
  windows, _ = distinct(config.layer_windows(queries.shape[1]))
  kernels: list[Callable[..., jax.Array]] = [
    functools.partial(fused_attention.attend, window=window, **settings) for window in windows
  ]
  if which is None:
    return kernels[0](queries, keys, values, visible)
  return jax.lax.switch(which, kernels, queries, keys, values, visible)


class Mlp(nn.Module):
  """down(activation(gate(x)) * up(x)), or without a gate down(activation(up(x)))."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    config = self.config
    activation = ACTIVATIONS[config.activation]

    def dense(features, name):
      return Dense(features, config, bias=config.mlp_bias, name=name)

    if config.gated_mlp:
      gate = dense(config.mlp_width, "gate")(x)
      up = dense(config.mlp_width, "up")(x)
      return dense(config.width, "down")(activation(gate) * up)
    return dense(config.width, "down")(activation(dense(config.mlp_width, "up")(x)))


class Block(nn.Module):
  """One layer: x + attention(norm(x)), then x + mlp(norm(x)); or as `norm_placement` says."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x, rope, visible, kind) -> tuple[jax.Array, attention.KeysValues]:
    config = self.config
    normed = Norm(config, name="attention_norm")(x)
    change, keys_values = Attention(config, name="attention")(normed, rope, visible, kind)
    if config.norm_placement == "parallel":
      return x + change + Mlp(config, name="mlp")(Norm(config, name="mlp_norm")(x)), keys_values
    if config.norm_placement == "pre_and_post":
      change = Norm(config, name="attention_post_norm")(change)
    x = x + change
    change = Mlp(config, name="mlp")(Norm(config, name="mlp_norm")(x))
    if config.norm_placement == "pre_and_post":
      change = Norm(config, name="mlp_post_norm")(change)
    return x + change, keys_values
