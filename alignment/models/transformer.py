"""A decoder-only transformer of the Llama family, as a Flax Linen module and pure functions.

Pre-norm blocks of RMSNorm, grouped-query attention with rotary positions and a SwiGLU feed-forward
layer; the output head is tied to the embedding or its own. Llama, Mistral, SmolLM and their like
are choices of `TransformerConfig`. Parameters are a plain dict; the layers are stacked on axis 0:

  embed/embedding                             [V, D]
  layers/attention_norm/scale                 [L, D]
  layers/attention/{query,key,value}/kernel   [L, D, heads * head_dim]
  layers/attention/output/kernel              [L, heads * head_dim, D]
  layers/mlp_norm/scale                       [L, D]
  layers/mlp/{gate,up}/kernel                 [L, D, F]
  layers/mlp/down/kernel                      [L, F, D]
  final_norm/scale                            [D]
  head/kernel                                 [D, V]      only when `tied_head` is False

The arithmetic runs in `config.dtype`; norms, softmax and logits always in float32. Token positions
are counted by the mask, so that padding on either side changes no real token.

References: Touvron et al. 2023, https://arxiv.org/abs/2302.13971 (the family); Su et al. 2021,
https://arxiv.org/abs/2104.09864 (rotary positions); Ainslie et al. 2023,
https://arxiv.org/abs/2305.13245 (grouped queries).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from alignment import chunked_likelihood, sequences
from alignment.models import attention, fused_attention
from sharding import checks

Params = dict[str, Any]

# Megatron-style: the first product of a pair is split by columns ("tensor"), the second by rows,
# and what is left of each matrix over "fsdp". Axis 0 of everything in `layers` counts the layers.
SHARDING_RULES = (
  (r"embed/embedding", P("tensor", "fsdp")),
  (r"head/kernel", P("fsdp", "tensor")),
  (r"attention/(query|key|value)/kernel", P(None, "fsdp", "tensor")),
  (r"attention/output/kernel", P(None, "tensor", "fsdp")),
  (r"mlp/(gate|up)/kernel", P(None, "fsdp", "tensor")),
  (r"mlp/down/kernel", P(None, "tensor", "fsdp")),
  (r"norm/scale", P()),
)


# Named here too, since users write it beside `TransformerConfig`.
RopeScaling = attention.RopeScaling


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Shape of a decoder. Hashable, so it can be a static argument of `jax.jit`.

  Attributes:
    vocab_size: V, number of token ids.
    num_layers: L.
    width: D, size of the residual stream.
    num_heads: query heads.
    num_kv_heads: key and value heads; divides `num_heads`.
    head_dim: features of a head; even (`num_heads * head_dim` need not equal `width`).
    mlp_width: F, hidden features of the feed-forward layer.
    max_length: the longest context, in tokens; a longer input raises.
    rope_theta: base of the rotary wavelengths.
    rope_pairing: features rotated together: "half" pairs i with i + head_dim / 2 (Hugging Face
      checkpoints), "adjacent" pairs 2i with 2i + 1 (Meta's and GGUF files). The wrong one loads and
      runs, and predicts badly.
    rope_scaling: None, or Llama 3's stretch.
    norm_epsilon: added to the mean square in RMSNorm.
    tied_head: logits are products with the embedding itself.
    dtype: of the matrix products, "float32" or "bfloat16".
    param_dtype: of the parameters made by `init_params`.
    remat: recompute each layer whole in the backward pass: activations of one layer in place of L,
      about a third more time. False keeps the products with weights of every layer and recomputes
      the rest (attention scores, norms, activations), which costs no time on a CPU: it spares the
      page faults of twice the memory.
    fused_attention: run attention in bfloat16 through a fused kernel: True wherever there is one
      (NVIDIA GPUs, a single TPU), False nowhere. None, the default, is True on NVIDIA GPUs alone:
      on a TPU the kernel has been compiled, but not yet run.
    scan_layers: compile one layer and loop over it, in place of L copies in a row. On a CPU the
      copies only take longer to compile. On a GPU they also run a tenth faster, since a loop copies
      what the backward pass reads into arrays of all layers.
  """

  vocab_size: int
  num_layers: int
  width: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_width: int
  max_length: int
  rope_theta: float = 1e4
  rope_pairing: Literal["half", "adjacent"] = "half"
  rope_scaling: RopeScaling | None = None
  norm_epsilon: float = 1e-5
  tied_head: bool = True
  dtype: Literal["float32", "bfloat16"] = "float32"
  param_dtype: Literal["float32", "bfloat16"] = "float32"
  remat: bool = False
  fused_attention: bool | None = None
  scan_layers: bool = True

  def __post_init__(self):
    for (
      name
    ) in "vocab_size num_layers width num_heads num_kv_heads head_dim mlp_width max_length".split():
      if getattr(self, name) < 1:
        raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_kv_heads ({self.num_kv_heads}) must divide num_heads ({self.num_heads})"
      )
    if self.head_dim % 2:
      raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
    if self.rope_pairing not in ("half", "adjacent"):
      raise ValueError(f"rope_pairing must be 'half' or 'adjacent', got {self.rope_pairing!r}")
    for name in ("dtype", "param_dtype"):
      if getattr(self, name) not in ("float32", "bfloat16", "float64"):
        raise ValueError(f"{name} must be 'float32' or 'bfloat16', got {getattr(self, name)!r}")


class RMSNorm(nn.Module):
  """Divides by the root mean square over the features, in float32, and scales."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    config = self.config
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:], config.param_dtype)
    wide = x.astype(attention.accumulator(x.dtype))
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + config.norm_epsilon)
    return (wide * scale.astype(wide.dtype)).astype(config.dtype)


class Dense(nn.Module):
  """A matrix product without bias, over flattened leading dimensions.

  Flattened, because the weight gradient of `[B, T, D] @ [D, F]` contracts two dimensions, which
  XLA runs 2.3 times slower on a CPU than the `[B * T, D]` form.
  """

  features: int
  config: TransformerConfig
  rotary_heads: int = 0  # > 0: the columns are that many heads, about to be rotated
  wide: bool = False  # the sums are returned as they are, in float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    config = self.config
    initializer = nn.initializers.normal(0.02)
    kernel = self.param("kernel", initializer, (x.shape[-1], self.features), config.param_dtype)
    kernel = kernel.astype(config.dtype)
    if self.rotary_heads:
      kernel = attention.rotary_columns(kernel, self.rotary_heads, config.rope_pairing)
    dtype = attention.accumulator(config.dtype) if self.wide else None
    y = jnp.dot(x.reshape(-1, x.shape[-1]), kernel, preferred_element_type=dtype)
    return y.reshape(*x.shape[:-1], self.features)


class Attention(nn.Module):
  """Self-attention with rotary positions; returns its keys and values too."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x, rope, visible) -> tuple[jax.Array, attention.KeysValues]:
    config = self.config
    batch, length = x.shape[:2]

    def heads(name, count, rotary):
      features = count * config.head_dim
      y = Dense(features, config, rotary_heads=count if rotary else 0, name=name)(x)
      y = y.reshape(batch, length, count, config.head_dim)
      return attention.rotate(y, rope) if rotary else y

    queries = heads("query", config.num_heads, True)
    keys = heads("key", config.num_kv_heads, True).swapaxes(1, 2)
    values = heads("value", config.num_kv_heads, False).swapaxes(1, 2)
    out = attention.attend(queries, keys, values, visible).reshape(batch, length, -1)
    return Dense(config.width, config, name="output")(out), (keys, values)


class Mlp(nn.Module):
  """SwiGLU: down(silu(gate(x)) * up(x))."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    config = self.config
    gate = Dense(config.mlp_width, config, name="gate")(x)
    up = Dense(config.mlp_width, config, name="up")(x)
    return Dense(config.width, config, name="down")(jax.nn.silu(gate) * up)


class Block(nn.Module):
  """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x, rope, visible) -> tuple[jax.Array, attention.KeysValues]:
    config = self.config
    normed = RMSNorm(config, name="attention_norm")(x)
    change, keys_values = Attention(config, name="attention")(normed, rope, visible)
    x = x + change
    x = x + Mlp(config, name="mlp")(RMSNorm(config, name="mlp_norm")(x))
    return x, keys_values


class Transformer(nn.Module):
  """The decoder: token ids to hidden states, and hidden states to logits."""

  config: TransformerConfig

  def setup(self):
    config = self.config
    self.embed = nn.Embed(
      config.vocab_size,
      config.width,
      dtype=config.dtype,
      param_dtype=config.param_dtype,
      embedding_init=nn.initializers.normal(0.02),
    )
    policies = jax.checkpoint_policies
    self.layers = nn.scan(
      nn.remat(
        Block,
        prevent_cse=False,  # inside a scan nothing can be merged across the two passes
        policy=(
          policies.nothing_saveable
          if config.remat
          else policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, fused_attention.keep
          )
        ),
      ),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=config.num_layers,
      unroll=1 if config.scan_layers else config.num_layers,
    )(config)
    self.final_norm = RMSNorm(config)
    if not config.tied_head:
      self.head = Dense(config.vocab_size, config, wide=True)

  def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Logits `[B, T, V]` in float32; see `logits`."""
    hidden, _ = self.hidden_states(tokens, mask)
    if not self.config.tied_head:
      return self.head(hidden)
    flat = hidden.reshape(-1, hidden.shape[-1])
    out = output_logits(flat, self.embed.embedding)
    return out.reshape(*hidden.shape[:-1], -1)

  def _has_kernel(self, length: int) -> bool:
    """Whether attention over rows of this length runs through a kernel; one token needs none."""
    config = self.config
    if length == 1 or config.fused_attention is False:
      return False
    kernel = fused_attention.kernel_for(config.dtype, config.head_dim)
    return kernel == "cudnn" or (kernel is not None and config.fused_attention is True)

  def _rope_table(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    config = self.config
    return attention.rope_table(positions, config.head_dim, config.rope_theta, config.rope_scaling)

  def hidden_states(
    self, tokens: jax.Array, mask: jax.Array
  ) -> tuple[jax.Array, attention.KeysValues]:
    """Hidden states `[B, T, D]`; keys and values stacked `[L, B, num_kv_heads, T, head_dim]`."""
    if not self._has_kernel(tokens.shape[1]):
      rope = self._rope_table(attention.positions_of(mask))
      x, keys_values = self.layers(self.embed(tokens), rope, attention.attention_bias(mask))
      return self.final_norm(x), keys_values
    length = tokens.shape[1]
    tokens, mask = fused_attention.pad_row(tokens), fused_attention.pad_row(mask)
    order = fused_attention.real_first(mask)
    tokens, mask = (fused_attention.reorder(x, order) for x in (tokens, mask))
    rope = self._rope_table(attention.positions_of(mask))
    x, keys_values = self.layers(self.embed(tokens), rope, fused_attention.Rows())
    places = order.inverse[None, :, None, :length, None]
    keys_values = jax.tree.map(
      lambda x: jnp.take_along_axis(x, places, axis=3, mode="promise_in_bounds"), keys_values
    )
    return fused_attention.reorder(self.final_norm(x), order.back())[:, :length], keys_values

  def completion_states(
    self, prompt: jax.Array, prompt_mask: jax.Array, tokens: jax.Array, mask: jax.Array
  ) -> jax.Array:
    """Hidden states of K completions that share each prompt, which is read once.

    Args:
      prompt: `[N, P]`, right-justified; prompt n is that of rows n K to n K + K - 1.
      prompt_mask: `[N, P]`.
      tokens: `[N K, T]`.
      mask: `[N K, T]`.

    Returns:
      `[N K, T + 1, D]`: from the last prompt token on, what `hidden_states` gives for rows of
      prompt and completion.
    """
    (num_prompts, prompt_length), (num_rows, length) = prompt.shape, tokens.shape
    group = num_rows // num_prompts
    row_mask = jnp.concatenate([jnp.repeat(prompt_mask, group, axis=0), mask], axis=1)
    kernel = self._has_kernel(prompt_length + length)
    if kernel and (prompt_length + length) % fused_attention.MULTIPLE:
      more = fused_attention.pad_row(row_mask).shape[1] - row_mask.shape[1]
      tokens, mask = (jnp.pad(x, [(0, 0), (0, more)]) for x in (tokens, mask))
      states = self.completion_states(prompt, prompt_mask, tokens, mask)
      return states[:, : length + 1]
    if kernel and 5 * (group - 1) * prompt_length < row_mask.size // num_prompts:
      # The kernel takes whole rows, so that packed ones are taken apart in every layer. That costs
      # more than it spares where less than a fifth of the tokens are copies.
      rows = jnp.concatenate([jnp.repeat(prompt, group, axis=0), tokens], axis=1)
      return self.hidden_states(rows, row_mask)[0][:, prompt_length - 1 :]

    def pack(of_prompts, of_rows):
      """`[N, P]` and `[N K, T]` as `[N, P + K T]`: one row a prompt, the completions behind it."""
      return jnp.concatenate([of_prompts, of_rows.reshape(num_prompts, group * length)], axis=1)

    positions = attention.positions_of(row_mask)
    positions = pack(positions[::group, :prompt_length], positions[:, prompt_length:])
    visible: attention.Visible
    if kernel:
      visible = fused_attention.shared_prompt_rows(row_mask, num_prompts, prompt_length)
    else:
      bias = attention.attention_bias(row_mask)
      visible = attention.SharedPromptBias(
        prompt=bias[::group, :prompt_length, :prompt_length], completion=bias[:, prompt_length:]
      )
    rope = self._rope_table(positions)
    x, _ = self.layers(self.embed(pack(prompt, tokens)), rope, visible)
    last = jnp.repeat(x[:, prompt_length - 1 : prompt_length], group, axis=0)
    x = x[:, prompt_length:].reshape(num_rows, length, x.shape[-1])
    return self.final_norm(jnp.concatenate([last, x], axis=1))


@functools.partial(jax.jit, static_argnames="config")
def init_params(config: TransformerConfig, key: jax.Array) -> Params:
  """Returns fresh parameters (kernels and embedding normal with deviation 0.02, scales one)."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  return Transformer(config).init(key, tokens, jnp.ones((1, 1)))["params"]


@functools.partial(jax.jit, static_argnames="config")
def hidden_states(
  params: Params, tokens: jax.Array, mask: jax.Array, *, config: TransformerConfig
) -> jax.Array:
  """Returns the hidden state at each token, after the final norm.

  Args:
    params: as in the module docstring.
    tokens: `[B, T]` int ids.
    mask: `[B, T]` non-zero on real tokens; padding may be on either side.
    config: the shape of the model.

  Returns:
    `[B, T, D]` in `config.dtype`; finite but meaningless on padding.

  Raises:
    ValueError: if shapes differ or T exceeds `config.max_length`.
  """
  _check_length(tokens, mask, config)
  return Transformer(config).apply({"params": params}, tokens, mask, method="hidden_states")[0]


@functools.partial(jax.jit, static_argnames="config")
def logits(
  params: Params, tokens: jax.Array, mask: jax.Array, *, config: TransformerConfig
) -> jax.Array:
  """Returns next-token logits `[B, T, V]` in float32; arguments as `hidden_states`."""
  _check_length(tokens, mask, config)
  out: Any = Transformer(config).apply({"params": params}, tokens, mask)
  return out


def output_embedding(params: Params) -> jax.Array:
  """Returns the `[V, D]` matrix whose products with hidden states are the logits."""
  return params["head"]["kernel"].T if "head" in params else params["embed"]["embedding"]


def output_logits(hidden: jax.Array, embedding: jax.Array) -> jax.Array:
  """Returns logits `[N, V]` of hidden states `[N, D]` by an output embedding `[V, D]`.

  The factors have the dtype of the hidden states, the sums are float32 or wider: what
  `chunked_likelihood.token_logps` does with slices of the vocabulary.
  """
  return jnp.dot(
    hidden,
    embedding.astype(hidden.dtype).T,
    preferred_element_type=attention.accumulator(hidden.dtype),
  )


@functools.cache
def make_apply_fn(
  config: TransformerConfig, *, logps_chunk: int | None = None
) -> Callable[[Params, sequences.Sequences], jax.Array]:
  """Returns `apply_fn(params, Sequences) -> [B, T]`, the log-probability of each completion token.

  The same arguments give the same function object, so that a jitted `update` which holds it as a
  static argument compiles once. Only completion positions reach the head, and it
  takes `logps_chunk` entries of the vocabulary at a time.

  Args:
    config: the shape of the model.
    logps_chunk: vocabulary entries whose logits are held at once; None for what suits the device
      (`chunked_likelihood.chunk_size_for`).

  Returns:
    A function of `params` and `sequences.Sequences`. The prompt conditions the completion; its
    padding may be on either side. A prompt of several rows is read once.
    Entries where `mask` is 0 are finite and meaningless. A prompt
    row without any real token is one start token of id `prompt_tokens[b, -1]`.

  Raises:
    ValueError: (the returned function) without a prompt, where shapes do not fit, when prompt and
      completion together exceed `config.max_length`, when the number of prompts does not divide
      that of rows, or for a NumPy id outside the vocabulary.
  """

  def apply_fn(params: Params, batch: sequences.Sequences) -> jax.Array:
    check_sequences(batch, config.vocab_size)
    prompt, prompt_mask = attention.justify_prompts(batch.prompt_tokens, batch.prompt_mask)
    prompt_length, length = prompt.shape[1], batch.tokens.shape[1]
    if prompt_length + length > config.max_length:
      raise ValueError(
        f"prompt ({prompt_length} tokens) and completion ({length}) exceed max_length "
        f"({config.max_length}): shorten one of them"
      )
    # The last token of a completion predicts nothing.
    tokens, mask = batch.tokens[:, :-1], batch.mask[:, :-1] > 0
    model, variables = Transformer(config), {"params": params}
    hidden: Any
    if sequences.rows_per_prompt(batch) == 1:
      tokens = jnp.concatenate([prompt, tokens], axis=1)
      mask = jnp.concatenate([prompt_mask > 0, mask], axis=1)
      hidden, _ = model.apply(variables, tokens, mask, method="hidden_states")
      hidden = hidden[:, prompt_length - 1 :]
    else:
      hidden = model.apply(
        variables, prompt, prompt_mask > 0, tokens, mask, method="completion_states"
      )
    embedding = output_embedding(params)
    return chunked_likelihood.token_logps(hidden, embedding, batch.tokens, chunk_size=logps_chunk)

  return apply_fn


def check_sequences(batch: sequences.Sequences, vocab_size: int) -> None:
  """Raises `ValueError` for a batch without prompts, of unequal shapes, or with unknown ids."""
  if batch.prompt_tokens is None or batch.prompt_mask is None or not batch.prompt_tokens.shape[1]:
    raise ValueError(
      "prompt_tokens is missing: a language model predicts a token from those before it, so give "
      "at least one prompt token (the start or end-of-text id will do) with its prompt_mask"
    )
  checks.same_shape(tokens=batch.tokens, mask=batch.mask)
  checks.same_shape(prompt_tokens=batch.prompt_tokens, prompt_mask=batch.prompt_mask)
  for name in ("tokens", "prompt_tokens"):
    checks.token_ids(name, getattr(batch, name), vocab_size)


def _check_length(tokens: jax.Array, mask: jax.Array, config: TransformerConfig) -> None:
  if tokens.shape != mask.shape or tokens.ndim != 2:
    raise ValueError(
      f"tokens and mask must both be [B, T], got shapes {tokens.shape} and {mask.shape}"
    )
  if tokens.shape[1] > config.max_length:
    raise ValueError(
      f"tokens has {tokens.shape[1]} tokens a row, more than max_length ({config.max_length}): "
      "cut the prompt or the completion"
    )
