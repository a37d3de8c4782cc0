"""Causal attention through a fused kernel, which never holds the scores `[B, heads, T, T]`.

On NVIDIA GPUs the kernel is cuDNN's, through `jax.nn.dot_product_attention`. A kernel knows
"causal", but not the masks that `attention.attention_bias` writes out. So the tokens of each row
are put in another order first: the real ones to the front, in their order, the padding behind them.
A real token then sees the real tokens up to itself under a causal mask alone, wherever the padding
was.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


def has_kernel(dtype, head_dim: int) -> bool:
  """Returns whether the default device has a kernel for queries of this type and size.

  cuDNN has one for bfloat16 and float16 from compute capability 8.0 on. A program is made for the
  default device when it is traced; set `TransformerConfig.fused_attention=False` in order to
  compile for a CPU on a machine with a GPU.
  """
  device = jax.config.jax_default_device or jax.devices()[0]
  if isinstance(device, str):
    device = jax.devices(device)[0]
  if device.platform != "gpu" or "cuda" not in device.client.platform_version:
    return False
  capability = float(device.compute_capability)
  largest = 256 if capability >= 9 else 128
  narrow = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
  return capability >= 8 and narrow and head_dim % 8 == 0 and head_dim <= largest


def keep(primitive, *_, **__) -> bool:
  """A policy of `jax.checkpoint`: keep what the kernel returns, so that it runs forward once.

  These are the output and the log-sum-exp of the scores, `[B, T, H, head_dim]` and `[B, H, T]`.
  """
  return "dot_product_attention_fwd" in primitive.name


class Order(NamedTuple):
  """A reordering of the tokens of each row: place t takes what stood at `order[b, t]`.

  Attributes:
    order: `[B, T]` int32, a permutation in each row.
    inverse: `[B, T]` int32, the permutation that undoes it.
  """

  order: jax.Array
  inverse: jax.Array

  def back(self) -> "Order":
    return Order(self.inverse, self.order)


class Rows(NamedTuple):
  """What the kernel has to know of rows whose real tokens come first.

  Attributes:
    real: `[B, T]` bool, in the new order.
  """

  real: jax.Array


class SharedPromptRows(NamedTuple):
  """The same where K completions of length T follow one prompt: rows of P + K T tokens.

  Attributes:
    prompt_mask: `[N, P]`.
    order: of the `N K` rows of P + T tokens, a prompt and one completion each.
    real: `[N K, P + T]` bool, in the new order.
  """

  prompt_mask: jax.Array
  order: Order
  real: jax.Array


def real_first(mask: jax.Array) -> Order:
  """Returns the order that moves the real tokens of `mask` `[B, T]` to the front of each row."""
  order = jnp.argsort(mask <= 0, axis=-1, stable=True).astype(jnp.int32)
  return Order(order, jnp.argsort(order, axis=-1).astype(jnp.int32))


@jax.custom_vjp
def reorder(x: jax.Array, order: Order) -> jax.Array:
  """Returns `[B, T, ...]` in another order. Its gradient is a gather too, in place of a scatter."""
  indices = order.order.reshape(*order.order.shape, *(1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, indices, axis=1, mode="promise_in_bounds")


reorder.defvjp(
  lambda x, order: (reorder(x, order), order),
  lambda order, cotangent: (reorder(cotangent, order.back()), None),
)


def attend(
  queries: jax.Array, keys: jax.Array, values: jax.Array, rows: Rows | SharedPromptRows
) -> jax.Array:
  """Grouped-query attention; shapes as in `attention.attend`."""
  keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)
  if isinstance(rows, Rows):
    return _causal(queries, keys, values, rows.real)
  num_prompts, prompt_length = rows.prompt_mask.shape
  num_rows, span = rows.real.shape
  group, length = num_rows // num_prompts, span - prompt_length

  def apart(x):
    """`[N, P + K T, ...]` as `[N K, P + T, ...]`: the prompt is copied, for this layer only."""
    prompts = jnp.repeat(x[:, :prompt_length], group, axis=0)
    own = x[:, prompt_length:].reshape(num_rows, length, *x.shape[2:])
    return reorder(jnp.concatenate([prompts, own], axis=1), rows.order)

  out = _causal(apart(queries), apart(keys), apart(values), rows.real)
  out = reorder(out, rows.order.back())
  of_completion = out[:, prompt_length:].reshape(num_prompts, group * length, *out.shape[2:])
  return jnp.concatenate([out[::group, :prompt_length], of_completion], axis=1)


def _causal(queries, keys, values, real):
  """Attention of `[B, T, H, head_dim]` on `[B, T, KV, head_dim]`, real tokens first."""
  out = jax.nn.dot_product_attention(queries, keys, values, is_causal=True, implementation="cudnn")
  # The start token of an empty prompt counts as padding and is read all the same: by the contract
  # of `attention_bias` it sees only itself.
  own = jnp.repeat(values, queries.shape[2] // values.shape[2], axis=2)
  return jnp.where(real[..., None, None], out, own)
