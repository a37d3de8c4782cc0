"""A decoder-only transformer, as a Flax Linen module and pure functions.

By default a Llama: pre-norm blocks of RMSNorm, grouped-query attention with rotary positions and a
SwiGLU feed-forward layer; the output head is tied to the embedding or its own. Other families
(Mistral, Qwen, Gemma, GPT-2, Pythia and their like) are choices of `TransformerConfig`. Parameters
are a plain dict; the layers are stacked on axis 0:

  embed/embedding                             [V, D]
  layers/attention_norm/scale                 [L, D]
  layers/attention/{query,key,value}/kernel   [L, D, heads * head_dim]
  layers/attention/output/kernel              [L, heads * head_dim, D]
  layers/mlp_norm/scale                       [L, D]
  layers/mlp/{gate,up}/kernel                 [L, D, F]
  layers/mlp/down/kernel                      [L, F, D]
  final_norm/scale                            [D]
  head/kernel                                 [D, V]      only when `tied_head` is False

Some choices add a `bias` beside a `kernel` or a `scale`, `positions/embedding` `[max_length, D]`,
`layers/attention/{query,key}_norm/scale` `[L, head_dim]` and `layers/{attention,mlp}_post_norm`;
without `gated_mlp` there is no `mlp/gate`.

The arithmetic runs in `config.dtype`; norms, softmax and logits always in float32. Token positions
are counted by the mask, so that padding on either side changes no real token.

References: Touvron et al. 2023, https://arxiv.org/abs/2302.13971 (the family); Su et al. 2021,
https://arxiv.org/abs/2104.09864 (rotary positions); Ainslie et al. 2023,
https://arxiv.org/abs/2305.13245 (grouped queries).
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from alignment import chunked_likelihood, sequences
from alignment.models import attention, decoder_config, decoder_layers, fused_attention, rotary
from alignment.models.decoder_config import distinct
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
  (r"(query|key|value|gate|up)/bias", P(None, "tensor")),
  (r"(output|down)/bias", P()),
  (r"positions/embedding", P(None, "fsdp")),
  (r"norm/(scale|bias)", P()),
)


# Named here too, since users write them beside each other.
TransformerConfig = decoder_config.TransformerConfig
RopeScaling = rotary.RopeScaling


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
    if config.positions == "learned":
      self.positions = nn.Embed(
        config.max_length,
        config.width,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        embedding_init=nn.initializers.normal(0.02),
      )
    policies = jax.checkpoint_policies
    self.layers = nn.scan(
      nn.remat(
        decoder_layers.Block,
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
      in_axes=(nn.broadcast, nn.broadcast, 0),
      length=config.num_layers,
      unroll=1 if config.scan_layers else config.num_layers,
    )(config)
    self.final_norm = decoder_layers.Norm(config)
    if not config.tied_head:
      self.head = decoder_layers.Dense(config.vocab_size, config, wide=True)

  def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Logits `[B, T, V]` in float32; see `logits`."""
    hidden, _ = self.hidden_states(tokens, mask)
    if not self.config.tied_head:
      return attention.soft_cap(self.head(hidden), self.config.logit_softcap)
    flat = hidden.reshape(-1, hidden.shape[-1])
    out = output_logits(flat, self.embed.embedding, softcap=self.config.logit_softcap)
    return out.reshape(*hidden.shape[:-1], -1)

  def _has_kernel(self, length: int) -> bool:
    """Whether attention over rows of this length runs through a kernel; one token needs none."""
    config = self.config
    if length == 1 or config.fused_attention is False:
      return False
    kernel = fused_attention.kernel_for(config.dtype, config.head_dim)
    if kernel == "cudnn":
      return config.attention_softcap is None  # cuDNN's kernel has no caps
    return kernel is not None and config.fused_attention is True

  def _run_layers(
    self,
    tokens: jax.Array,
    positions: jax.Array,
    visible_of: Callable[[int | None], attention.Visible],
    context: int,
  ) -> tuple[jax.Array, attention.KeysValues]:
    """Returns what the layers make of tokens `[B, T]` at `positions`, before the final norm.

    `visible_of(window)` is what queries with that window see. Layers of one kind share one table of
    rotations and one mask. Where there are several kinds, their arrays are stacked, and each layer
    takes its own. A row has `context` tokens, see `rotary.LongScaling`.
    """
    config, length = self.config, tokens.shape[1]
    ropes, _ = distinct(config.layer_ropes())
    rope = _stack([rope_table(config, positions, kind, context) for kind in ropes])
    x = self.embed(tokens)
    if config.embedding_scale != 1:
      x = x * jnp.asarray(config.embedding_scale, x.dtype)
    if config.positions == "learned":
      x = x + self.positions(positions)
    windows, _ = distinct(config.layer_windows(length))
    visible = visible_of(windows[0])
    if isinstance(visible, jax.Array | attention.SharedPromptBias):
      visible = _stack([visible, *map(visible_of, windows[1:])])
    out: Any = self.layers(x, rope, visible, decoder_layers.layer_kinds(config, length))
    return out

  def hidden_states(
    self, tokens: jax.Array, mask: jax.Array, context: int | None = None
  ) -> tuple[jax.Array, attention.KeysValues]:
    """Hidden states `[B, T, D]`; keys and values stacked `[L, B, num_kv_heads, T, head_dim]`.

    `context` counts the tokens that rows will have in the end, where these are only the first.
    """
    length = tokens.shape[1]
    context = context or length
    if not self._has_kernel(length):
      visible_of = functools.partial(attention.attention_bias, mask)
      x, keys_values = self._run_layers(tokens, attention.positions_of(mask), visible_of, context)
      return self.final_norm(x), keys_values
    tokens, mask = fused_attention.pad_row(tokens), fused_attention.pad_row(mask)
    order = fused_attention.real_first(mask)
    tokens, mask = (fused_attention.reorder(x, order) for x in (tokens, mask))
    x, keys_values = self._run_layers(
      tokens, attention.positions_of(mask), lambda _: fused_attention.Rows(), context
    )
    places = order.inverse[None, :, None, :length, None]
    keys_values = jax.tree.map(
      lambda x: jnp.take_along_axis(x, places, axis=3, mode="promise_in_bounds"), keys_values
    )
    return fused_attention.reorder(self.final_norm(x), order.back())[:, :length], keys_values

  def completion_states(
    self,
    prompt: jax.Array,
    prompt_mask: jax.Array,
    tokens: jax.Array,
    mask: jax.Array,
    context: int | None = None,
  ) -> jax.Array:
    """Hidden states of K completions that share each prompt, which is read once.

    Args:
      prompt: `[N, P]`, right-justified; prompt n is that of rows n K to n K + K - 1.
      prompt_mask: `[N, P]`.
      tokens: `[N K, T]`.
      mask: `[N K, T]`.
      context: tokens of a row; None for P + T.

    Returns:
      `[N K, T + 1, D]`: from the last prompt token on, what `hidden_states` gives for rows of
      prompt and completion.
    """
    (num_prompts, prompt_length), (num_rows, length) = prompt.shape, tokens.shape
    group, context = num_rows // num_prompts, context or prompt_length + length
    row_mask = jnp.concatenate([jnp.repeat(prompt_mask, group, axis=0), mask], axis=1)
    kernel = self._has_kernel(prompt_length + length)
    if kernel and (prompt_length + length) % fused_attention.MULTIPLE:
      more = fused_attention.pad_row(row_mask).shape[1] - row_mask.shape[1]
      tokens, mask = (jnp.pad(x, [(0, 0), (0, more)]) for x in (tokens, mask))
      states = self.completion_states(prompt, prompt_mask, tokens, mask, context)
      return states[:, : length + 1]
    if kernel and 5 * (group - 1) * prompt_length < row_mask.size // num_prompts:
      # The kernel takes whole rows, so that packed ones are taken apart in every layer. That costs
      # more than it spares where less than a fifth of the tokens are copies.
      rows = jnp.concatenate([jnp.repeat(prompt, group, axis=0), tokens], axis=1)
      return self.hidden_states(rows, row_mask, context)[0][:, prompt_length - 1 :]

    def pack(of_prompts, of_rows):
      """`[N, P]` and `[N K, T]` as `[N, P + K T]`: one row a prompt, the completions behind it."""
      return jnp.concatenate([of_prompts, of_rows.reshape(num_prompts, group * length)], axis=1)

    positions = attention.positions_of(row_mask)
    positions = pack(positions[::group, :prompt_length], positions[:, prompt_length:])

    def visible_of(window) -> attention.Visible:
      if kernel:
        return fused_attention.shared_prompt_rows(row_mask, num_prompts, prompt_length)
      bias = attention.attention_bias(row_mask, window)
      return attention.SharedPromptBias(
        prompt=bias[::group, :prompt_length, :prompt_length], completion=bias[:, prompt_length:]
      )

    x, _ = self._run_layers(pack(prompt, tokens), positions, visible_of, context)
    last = jnp.repeat(x[:, prompt_length - 1 : prompt_length], group, axis=0)
    x = x[:, prompt_length:].reshape(num_rows, length, x.shape[-1])
    return self.final_norm(jnp.concatenate([last, x], axis=1))


def rope_table(
  config: TransformerConfig, positions: jax.Array, kind: str, context: int
) -> tuple[jax.Array, jax.Array] | None:
  """Returns the rotations of layers of one kind of `TransformerConfig.layer_ropes`.

  `positions` `[B, T]` are those of some tokens of rows that have `context`.
  """
  if kind == "none":
    if config.positions == "learned":
      return None
    positions = jnp.zeros_like(positions)  # a rotation by nothing, beside layers that rotate
  theta, scaling = config.rope_theta, config.rope_scaling
  if kind != "global":
    theta, scaling = config.local_rope_theta or theta, None
  rotary_dims = config.rotary_dims or config.head_dim
  return rotary.rope_table(positions, rotary_dims, theta, scaling, context)


def _stack(kinds: list[Any]) -> Any:
  return kinds[0] if len(kinds) == 1 else jax.tree.map(lambda *x: jnp.stack(x), *kinds)


@functools.partial(jax.jit, static_argnames="config")
def init_params(config: TransformerConfig, key: jax.Array) -> Params:
  """Returns fresh parameters: kernels and embeddings normal with deviation 0.02, scales neutral."""
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


def output_logits(
  hidden: jax.Array, embedding: jax.Array, *, softcap: float | None = None
) -> jax.Array:
  """Returns logits `[N, V]` of hidden states `[N, D]` by an output embedding `[V, D]`.

  The factors have the dtype of the hidden states, the sums are float32 or wider: what
  `chunked_likelihood.token_logps` does with slices of the vocabulary.
  """
  logits = jnp.dot(
    hidden,
    embedding.astype(hidden.dtype).T,
    preferred_element_type=attention.accumulator(hidden.dtype),
  )
  return attention.soft_cap(logits, softcap)


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
    return chunked_likelihood.token_logps(
      hidden, embedding, batch.tokens, chunk_size=logps_chunk, softcap=config.logit_softcap
    )

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
