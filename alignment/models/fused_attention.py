"""Causal attention through a fused kernel, which never holds the scores `[B, heads, T, T]`.

On NVIDIA GPUs the kernel is cuDNN's, through `jax.nn.dot_product_attention`; on a TPU it is JAX's
splash attention, written in Pallas. A kernel knows "causal", but not the masks that
`attention.attention_bias` writes out. So the tokens of each row are put in another order first: the
real ones to the front, in their order, the padding behind them. A real token then sees the real
tokens up to itself under a causal mask alone, wherever the padding was.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

import sharding

# Rows are padded to a multiple of this many tokens: JAX refuses odd lengths when it differentiates
# through cuDNN's kernel.
MULTIPLE = 2

# The name under which splash attention marks its results; see `keep`.
_RESULTS = "fused_attention"


def kernel_for(dtype, head_dim: int) -> Literal["cudnn", "splash"] | None:
  """Returns which kernel the default device has for queries of this type and size, if any.

  cuDNN has one for bfloat16 and float16 from compute capability 8.0 on. Splash attention is used on
  a single TPU only: a Pallas kernel cannot be split over the devices of a mesh by the compiler.

  The choice is made when a program is traced, so a program for a CPU on a machine with a GPU needs
  `TransformerConfig.fused_attention=False`.
  """
  device = sharding.default_device()
  if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
    return None
  if device.platform == "gpu" and "cuda" in device.client.platform_version:
    capability = float(device.compute_capability)
    fits = head_dim % 8 == 0 and head_dim <= (256 if capability >= 9 else 128)
    return "cudnn" if capability >= 8 and fits else None
  if device.platform == "tpu" and len(jax.devices()) == 1:
    return "splash" if jnp.dtype(dtype) == jnp.bfloat16 and head_dim % 64 == 0 else None
  return None


def keep(primitive, *_, **params) -> bool:
  """A policy of `jax.checkpoint`: keep what a kernel returns, so that it runs forward once.

  These are the output and the log-sum-exp of the scores, `[B, T, H, head_dim]` and `[B, H, T]`.
  """
  if primitive.name == "name":
    return params["name"] == _RESULTS
  return "dot_product_attention_fwd" in primitive.name


def pad_row(x: jax.Array) -> jax.Array:
  """Pads tokens or a mask `[B, T]` with zeros at the end, to a length that the kernels take."""
  return jnp.pad(x, [(0, 0), (0, -x.shape[1] % MULTIPLE)])


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
  """Says that the real tokens of each row come first: all that the kernel has to know."""


class SharedPromptRows(NamedTuple):
  """The same where K completions of length T follow one prompt: packed rows of P + K T tokens.

  The kernel sees K rows of P + T tokens for each packed one, in the order of `real_first`.

  Attributes:
    apart: `[N, K (P + T)]` int32, where in the packed row each token of the K rows stands.
    pack: `[N, P + K T]` int32, where in the K rows each token of the packed row stands; the prompt
      in the first of them.
    prompt: `[N, K, P]` int32, where in the K rows their prompts stand.
  """

  apart: jax.Array
  pack: jax.Array
  prompt: jax.Array


def real_first(mask: jax.Array) -> Order:
  """Returns the order that moves the real tokens of `mask` `[B, T]` to the front of each row."""
  order = jnp.argsort(mask <= 0, axis=-1, stable=True).astype(jnp.int32)
  return Order(order, jnp.argsort(order, axis=-1).astype(jnp.int32))


def shared_prompt_rows(mask: jax.Array, num_prompts: int, prompt_length: int) -> SharedPromptRows:
  """Returns the rows for `mask` `[N K, P + T]`, prompt n before the completions n K to n K + K - 1.

  Args:
    mask: non-zero on real tokens, the prompt's K times.
    num_prompts: N.
    prompt_length: P.
  """
  (num_rows, span), order = mask.shape, real_first(mask)
  group, length = num_rows // num_prompts, span - prompt_length

  def split(x):
    return x.reshape(num_prompts, group, span)

  copy = jnp.arange(group, dtype=jnp.int32)[:, None]
  places = split(order.order)
  apart = jnp.where(places < prompt_length, places, places + copy * length)
  back = split(order.inverse) + copy * span
  prompt, own = back[..., :prompt_length], back[..., prompt_length:]
  pack = jnp.concatenate([prompt[:, 0], own.reshape(num_prompts, -1)], axis=1)
  return SharedPromptRows(apart.reshape(num_prompts, -1), pack, prompt)


def _take(x: jax.Array, places: jax.Array) -> jax.Array:
  """Returns `x[b, places[b, t]]` of `[B, T, ...]`."""
  places = places.reshape(*places.shape, *(1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, places, axis=1, mode="promise_in_bounds")


@jax.custom_vjp
def reorder(x: jax.Array, order: Order) -> jax.Array:
  """Returns `[B, T, ...]` in another order. Its gradient is a gather too, in place of a scatter."""
  return _take(x, order.order)


reorder.defvjp(
  lambda x, order: (_take(x, order.order), order),
  lambda order, cotangent: (_take(cotangent, order.inverse), None),
)


@jax.custom_vjp
def _apart(x: jax.Array, rows: SharedPromptRows) -> jax.Array:
  """Packed rows `[N, P + K T, ...]` as `[N, K (P + T), ...]`; gathers in both directions."""
  return _take(x, rows.apart)


def _apart_transpose(rows, cotangent):
  num_prompts, group, prompt_length = rows.prompt.shape
  of_prompts = _take(cotangent, rows.prompt.reshape(num_prompts, -1))
  of_prompts = of_prompts.reshape(num_prompts, group, prompt_length, *cotangent.shape[2:]).sum(1)
  own = _take(cotangent, rows.pack[:, prompt_length:])
  return jnp.concatenate([of_prompts, own], axis=1), None


_apart.defvjp(lambda x, rows: (_take(x, rows.apart), rows), _apart_transpose)


@jax.custom_vjp
def _pack(x: jax.Array, rows: SharedPromptRows) -> jax.Array:
  """Rows `[N, K (P + T), ...]` as packed ones; the prompt is that of the first row."""
  return _take(x, rows.pack)


def _pack_transpose(rows, cotangent):
  _, group, prompt_length = rows.prompt.shape
  first = jnp.arange(rows.apart.shape[1]) < rows.apart.shape[1] // group
  read = first | (rows.apart >= prompt_length)
  read = read.reshape(*read.shape, *(1,) * (cotangent.ndim - 2))
  return jnp.where(read, _take(cotangent, rows.apart), 0), None


_pack.defvjp(lambda x, rows: (_take(x, rows.pack), rows), _pack_transpose)


def attend(
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  rows: Rows | SharedPromptRows,
  *,
  scale: float,
  softcap: float | None = None,
  window: int | None = None,
) -> jax.Array:
  """Grouped-query attention; arguments as in `attention.attend` and `attention.attention_bias`."""
  keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)
  causal = functools.partial(_causal, scale=scale, softcap=softcap, window=window)
  if isinstance(rows, Rows):
    return causal(queries, keys, values)

  num_prompts, group, _ = rows.prompt.shape

  def apart(x):
    return _apart(x, rows).reshape(num_prompts * group, -1, *x.shape[2:])

  out = causal(apart(queries), apart(keys), apart(values))
  return _pack(out.reshape(*rows.apart.shape, *out.shape[2:]), rows)


def _causal(queries, keys, values, *, scale=None, softcap=None, window=None):
  """Attention of `[B, T, H, head_dim]` on `[B, T, KV, head_dim]`, real tokens first."""
  if kernel_for(queries.dtype, queries.shape[-1]) == "splash":
    return splash(queries, keys, values, scale=scale, softcap=softcap, window=window)
  if softcap is not None:
    raise ValueError(f"softcap={softcap} is not known to cuDNN's kernel: set fused_attention=False")
  return jax.nn.dot_product_attention(
    queries,
    keys,
    values,
    scale=scale,
    is_causal=True,
    local_window_size=None if window is None else (window - 1, 0),
    implementation="cudnn",
  )


def splash(
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  *,
  scale: float | None = None,
  softcap: float | None = None,
  window: int | None = None,
  interpret: bool = False,
) -> jax.Array:
  """Causal attention by JAX's kernel for TPUs; shapes as in `jax.nn.dot_product_attention`.

  Args:
    queries: `[B, T, H, head_dim]`.
    keys: `[B, T, KV, head_dim]`.
    values: `[B, T, KV, head_dim]`.
    scale: factor of the scores; None for `head_dim ** -0.5`.
    softcap: cap of the scores; None for none.
    window: tokens that each one sees, itself included; None for all before it.
    interpret: run the kernel step by step on any device, slowly.
  """
  # Imported here: no other device needs Pallas.
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
  )

  length, num_heads, head_dim = queries.shape[1:]
  lanes = 128  # the kernel takes blocks of that many tokens, or a multiple
  padded = -(-length // lanes) * lanes
  block = next(size for size in (512, 256, lanes) if padded % size == 0)
  sizes = splash_attention_kernel.BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_q_dq=block,
    block_kv_dq=block,
  )
  shape = (padded, padded)
  mask = (
    splash_attention_mask.CausalMask(shape)
    if window is None
    else splash_attention_mask.LocalMask(shape, window_size=(window - 1, 0), offset=0)
  )
  kernel = splash_attention_kernel.make_splash_mha_single_device(
    splash_attention_mask.MultiHeadMask([mask] * num_heads),
    block_sizes=sizes,
    attn_logits_soft_cap=softcap,
    residual_checkpoint_name=_RESULTS,
    interpret=interpret,
  )

  def heads_first(x):
    # Padding at the end: no causal query sees it.
    return jnp.pad(x, [(0, 0), (0, padded - length), (0, 0), (0, 0)]).swapaxes(1, 2)

  scale = head_dim**-0.5 if scale is None else scale
  scaled = queries * jnp.asarray(scale, queries.dtype)
  out = jax.vmap(kernel)(heads_first(scaled), heads_first(keys), heads_first(values))
  return out.swapaxes(1, 2)[:, :length]
