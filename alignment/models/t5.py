"""T5, an encoder-decoder, as a Flax Linen module and pure functions.

The encoder reads the prompt in both directions; the decoder writes the completion, and each of its
layers looks at the encoder's states too. It starts from a token of its own (`start_id`, the padding
id in all published models). The distance between two tokens, in buckets that grow with it, adds a
learned number to the score of each head; there are no other positions, and scores are not divided
by the root of the head's size. T5 v1.1 and FLAN-T5 have a gated feed-forward layer and an output
head of their own; the first T5 has a plain one and the embedding as its head. Parameters are a
plain dict; the layers are stacked on axis 0:

  embed/embedding                                               [V, D]
  {encoder,decoder}/position_bias/embedding                     [buckets, heads]
  {encoder,decoder}/layers/attention_norm/scale                 [L, D]
  {encoder,decoder}/layers/attention/{query,key,value}/kernel   [L, D, heads * head_dim]
  {encoder,decoder}/layers/attention/output/kernel              [L, heads * head_dim, D]
  decoder/layers/cross_attention_norm/scale                     as attention_norm
  decoder/layers/cross_attention/...                            as attention
  {encoder,decoder}/layers/mlp_norm/scale                       [L, D]
  {encoder,decoder}/layers/mlp/{gate,up}/kernel                 [L, D, F]  ("relu": no gate)
  {encoder,decoder}/layers/mlp/down/kernel                      [L, F, D]
  {encoder,decoder}/final_norm/scale                            [D]
  head/kernel                                                   [D, V]     unless `tied_head`

The arithmetic runs in `config.dtype`; norms, softmax and logits always in float32. There is no
dropout. The completions of one prompt share the encoder's pass, and the keys and values of it.

References: Raffel et al. 2020, https://arxiv.org/abs/1910.10683 (T5); Shazeer 2020,
https://arxiv.org/abs/2002.05202 (gated layers, v1.1); Chung et al. 2022,
https://arxiv.org/abs/2210.11416 (FLAN-T5).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from alignment import chunked_likelihood, sequences
from alignment.models import attention, decoder_config, decoder_layers, transformer
from sharding import checks

Params = transformer.Params

SHARDING_RULES = (
  (r"position_bias/embedding", PartitionSpec()),
  *transformer.SHARDING_RULES,
)

# Feed-forward layers by their names in config.json; gated ones multiply by a second product.
_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "gated-gelu": functools.partial(jax.nn.gelu, approximate=True),  # the tanh form
  "gated-silu": jax.nn.silu,
  "relu": jax.nn.relu,
}
MLPS = tuple(_ACTIVATIONS)


@dataclasses.dataclass(frozen=True)
class T5Config:
  """Shape of an encoder-decoder. Hashable, so it can be a static argument of `jax.jit`.

  Attributes:
    vocab_size: V, number of token ids.
    num_layers: layers of the encoder.
    num_decoder_layers: layers of the decoder.
    width: D, size of the residual stream.
    num_heads: attention heads, of queries and of keys.
    head_dim: features of a head (`num_heads * head_dim` need not equal `width`).
    mlp_width: F, hidden features of the feed-forward layer.
    num_buckets: buckets of distances: half of them for each direction in the encoder.
    max_distance: the tokens from which on all distances share a bucket.
    mlp: "gated-gelu" (v1.1 and FLAN-T5), "gated-silu" or "relu" (the first T5).
    norm_epsilon: added to the mean square in RMSNorm.
    tied_head: logits are products with the embedding itself, divided by the root of D (the first
      T5); False is a head of its own, without a division.
    start_id: the token before each completion.
    dtype: of the matrix products, "float32" or "bfloat16".
    param_dtype: of the parameters made by `init_params`.
    remat: recompute each layer whole in the backward pass; see `transformer.TransformerConfig`.
    scan_layers: compile one layer and loop over it; see `transformer.TransformerConfig`.
  """

  vocab_size: int
  num_layers: int
  num_decoder_layers: int
  width: int
  num_heads: int
  head_dim: int
  mlp_width: int
  num_buckets: int = 32
  max_distance: int = 128
  mlp: Literal["gated-gelu", "gated-silu", "relu"] = "gated-gelu"
  norm_epsilon: float = 1e-6
  tied_head: bool = False
  start_id: int = 0
  dtype: Literal["float32", "bfloat16"] = "float32"
  param_dtype: Literal["float32", "bfloat16"] = "float32"
  remat: bool = False
  scan_layers: bool = True
  norm: ClassVar[str] = "rms"  # what `decoder_layers.Norm` asks for

  def __post_init__(self):
    names = "vocab_size num_layers num_decoder_layers width num_heads head_dim mlp_width"
    for name in names.split():
      checks.count(name, getattr(self, name))
    for name in ("num_layers", "num_decoder_layers"):
      checks.count(name, getattr(self, name), most=decoder_config.MAX_LAYERS)
    checks.count("num_buckets", self.num_buckets, least=4)
    if self.num_buckets % 4:
      raise ValueError(
        f"num_buckets must be a multiple of 4, got {self.num_buckets}: two directions, each with "
        "near and far distances"
      )
    if self.max_distance <= self.num_buckets // 2:
      raise ValueError(
        f"max_distance must exceed num_buckets / 2 ({self.num_buckets // 2}), got "
        f"{self.max_distance}: nearer distances have a bucket each"
      )
    checks.choice("mlp", self.mlp, MLPS)
    if not 0 <= self.start_id < self.vocab_size:
      raise ValueError(f"start_id must lie below vocab_size, got {self.start_id}")
    for name in ("dtype", "param_dtype"):
      checks.choice(name, getattr(self, name), ("float32", "bfloat16", "float64"))

  @property
  def max_length(self) -> int:
    """The longest context: none is too long, because positions are distances."""
    return 2**31 - 1


def relative_buckets(
  differences: np.ndarray, *, num_buckets: int, max_distance: int, two_sided: bool
) -> np.ndarray:
  """Returns the bucket of each difference (key's position minus query's).

  Half of the buckets are for single distances, the other half grow geometrically up to
  `max_distance`. The last one holds everything beyond it.

  Args:
    differences: integers of any shape.
    num_buckets: buckets in all.
    max_distance: in tokens.
    two_sided: keys before and after a query have buckets of their own, half of them each;
      otherwise all keys behind a query share the bucket of distance 0.

  Example:
    >>> relative_buckets(np.arange(-3, 4), num_buckets=32, max_distance=128, two_sided=True)
    array([ 3,  2,  1,  0, 17, 18, 19])
    >>> relative_buckets(np.array([-15, -16, -50, -500]), num_buckets=32, max_distance=128,
    ...                  two_sided=False)
    array([15, 16, 24, 31])
  """
  first: Any = 0
  if two_sided:
    num_buckets //= 2
    first = num_buckets * (differences > 0)
    distances = np.abs(differences)
  else:
    distances = np.maximum(-differences, 0)
  exact = num_buckets // 2
  growth = np.log(np.maximum(distances, exact) / exact) / math.log(max_distance / exact)
  far = exact + (growth * (num_buckets - exact)).astype(distances.dtype)
  return first + np.where(distances < exact, distances, np.minimum(far, num_buckets - 1))


class Mlp(nn.Module):
  """down(activation(gate(x)) * up(x)), or down(activation(up(x)))."""

  config: T5Config

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    config: Any = self.config
    hidden = decoder_layers.Dense(config.mlp_width, config, name="up")(x)
    activation = _ACTIVATIONS[config.mlp]
    if config.mlp.startswith("gated"):
      hidden *= activation(decoder_layers.Dense(config.mlp_width, config, name="gate")(x))
    else:
      hidden = activation(hidden)
    return decoder_layers.Dense(config.width, config, name="down")(hidden)


class Attention(nn.Module):
  """Attention without scaling; the keys and values are an argument, from `keys_values`."""

  config: T5Config

  def setup(self):
    config: Any = self.config
    dense = functools.partial(decoder_layers.Dense, config.num_heads * config.head_dim, config)
    self.query, self.key, self.value = dense(), dense(), dense()
    self.output = decoder_layers.Dense(config.width, config)

  def keys_values(self, x: jax.Array) -> attention.KeysValues:
    """Returns keys and values `[B, heads, S, head_dim]` of `[B, S, D]`."""
    shape = (*x.shape[:2], self.config.num_heads, self.config.head_dim)
    return self.key(x).reshape(shape).swapaxes(1, 2), self.value(x).reshape(shape).swapaxes(1, 2)

  def __call__(
    self, x: jax.Array, keys_values: attention.KeysValues, *biases: jax.Array | None
  ) -> jax.Array:
    """Returns `[B, T, D]`; `biases` broadcast to the scores `[B, heads, T, S]`.

    They are added here one by one, so that the sum of positions and mask is no array of its own.
    """
    keys, values = keys_values
    queries = self.query(x).reshape(*x.shape[:2], *keys.shape[1::2])
    scores = jnp.einsum("bthd,bhsd->bhts", queries, keys)
    scores = scores.astype(attention.accumulator(scores.dtype))
    for bias in biases:
      scores = scores if bias is None else scores + bias
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    out = jnp.einsum("bhts,bhsd->bthd", weights, values)
    return self.output(out.reshape(*x.shape[:2], -1))


class Block(nn.Module):
  """One layer of the encoder, or of the decoder with its attention to the encoder's states."""

  config: T5Config
  is_decoder: bool

  def setup(self):
    config: Any = self.config
    self.attention_norm, self.attention = decoder_layers.Norm(config), Attention(config)
    if self.is_decoder:
      self.cross_attention_norm = decoder_layers.Norm(config)
      self.cross_attention = Attention(config)
    self.mlp_norm, self.mlp = decoder_layers.Norm(config), Mlp(config)

  def __call__(self, x, positions, padding, states=None, states_padding=None):
    """Returns `(x, None)`, as `nn.scan` wants it; arguments as those of `Stack`."""
    normed = self.attention_norm(x)
    x = x + self.attention(normed, self.attention.keys_values(normed), positions, padding)
    source = None if states is None else (self.prompt_keys_values(states), states_padding)
    return self._rest(x, source), None

  def prompt_keys_values(self, states: jax.Array) -> attention.KeysValues:
    """Returns what the layer reads of the encoder's states `[N, P, D]`."""
    return self.cross_attention.keys_values(states)

  def step(self, x, positions, slot, cache, prompt):
    """One token a row, `[B, 1, D]`: returns the next `x`, and the keys and values with its own."""
    normed = self.attention_norm(x)
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=2)
    cache = jax.tree.map(write, cache, self.attention.keys_values(normed))
    x = x + self.attention(normed, cache, positions)
    return self._rest(x, prompt), cache

  def _rest(self, x, prompt):
    """What follows the attention of a sequence to itself."""
    if prompt is not None:
      keys_values, padding = prompt
      # The K rows of a prompt are one row of K T queries: nothing of the prompt is copied.
      rows = self.cross_attention_norm(x).reshape(len(keys_values[0]), -1, x.shape[-1])
      x = x + self.cross_attention(rows, keys_values, padding).reshape(x.shape)
    return x + self.mlp(self.mlp_norm(x))


class Stack(nn.Module):
  """The layers of the encoder or of the decoder, with their table of distances and last norm."""

  config: T5Config
  is_decoder: bool

  def setup(self):
    config: Any = self.config
    length = config.num_decoder_layers if self.is_decoder else config.num_layers
    self.position_bias = nn.Embed(
      config.num_buckets, config.num_heads, param_dtype=config.param_dtype
    )
    policies = jax.checkpoint_policies
    self.layers = nn.scan(
      nn.remat(
        Block,
        prevent_cse=False,  # inside a scan nothing can be merged across the two passes
        policy=(
          policies.nothing_saveable if config.remat else policies.dots_with_no_batch_dims_saveable
        ),
      ),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=length,
      unroll=1 if config.scan_layers else length,
    )(config, self.is_decoder)
    self.final_norm = decoder_layers.Norm(config)

  def __call__(self, x, padding=None, states=None, states_padding=None) -> jax.Array:
    """Hidden states `[B, T, D]`.

    Args:
      x: `[B, T, D]` embeddings.
      padding: `[B, 1, 1, T]` what is added to the scores: 0, or very negative for hidden tokens.
      states: `[N, P, D]` of the encoder, each for B / N successive rows.
      states_padding: `[N, 1, 1, P]`.
    """
    positions = self.positions(x.shape[1])
    x, _ = self.layers(x, positions, padding, states, states_padding)
    return self.final_norm(x)

  def positions(self, length: int) -> jax.Array:
    """What distances add to the scores, `[1, heads, T, T]`; in the decoder later keys are hidden.

    A table of differences s - t modulo 2 T, repeated T times and cut into rows one shorter than
    itself, has the difference s - t at place (t, s). So the gradient is a sum, not a scatter.
    """
    config = self.config
    differences = np.r_[:length, -length:0]
    buckets = relative_buckets(
      differences,
      num_buckets=config.num_buckets,
      max_distance=config.max_distance,
      two_sided=not self.is_decoder,
    )
    table = self.position_bias.embedding
    values = table.astype(attention.accumulator(table.dtype))[buckets].T
    if self.is_decoder:
      values = jnp.where(differences > 0, attention.HIDDEN, values)
    rows = jnp.tile(values, (1, length))[:, : length * (2 * length - 1)]
    return rows.reshape(1, -1, length, 2 * length - 1)[..., :length]


class T5(nn.Module):
  """The encoder-decoder: prompt and completion to hidden states and logits."""

  config: T5Config

  def setup(self):
    config: Any = self.config
    self.embed = nn.Embed(
      config.vocab_size,
      config.width,
      dtype=config.dtype,
      param_dtype=config.param_dtype,
      embedding_init=nn.initializers.normal(0.02),
    )
    self.encoder, self.decoder = Stack(config, False), Stack(config, True)
    if not config.tied_head:
      self.head = decoder_layers.Dense(config.vocab_size, config, wide=True)

  def __call__(self, prompt: jax.Array, prompt_mask: jax.Array, tokens: jax.Array) -> jax.Array:
    """Logits `[B, T, V]` in float32; see `logits`."""
    hidden = self.hidden_states(prompt, prompt_mask, tokens)
    if not self.config.tied_head:
      return self.head(hidden)
    flat = output_states(hidden, self.config).reshape(-1, hidden.shape[-1])
    out = transformer.output_logits(flat, self.embed.embedding)
    return out.reshape(*hidden.shape[:-1], -1)

  def encode(self, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The encoder's states `[N, P, D]`, and `[N, 1, 1, P]` which hides its padding."""
    padding = jnp.where(mask > 0, 0.0, attention.HIDDEN)[:, None, None]
    return self.encoder(self.embed(tokens), padding), padding

  def hidden_states(
    self, prompt: jax.Array, prompt_mask: jax.Array, tokens: jax.Array
  ) -> jax.Array:
    """Hidden states `[B, T, D]` of the decoder, which reads `tokens` `[B, T]`; see `logits`."""
    return self.decoder(self.embed(tokens), None, *self.encode(prompt, prompt_mask))


@functools.partial(jax.jit, static_argnames="config")
def init_params(config: T5Config, key: jax.Array) -> Params:
  """Returns fresh parameters (kernels and embedding normal with deviation 0.02, scales one)."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  return T5(config).init(key, tokens, jnp.ones((1, 1)), tokens)["params"]


@functools.partial(jax.jit, static_argnames="config")
def logits(
  params: Params,
  prompt_tokens: jax.Array,
  prompt_mask: jax.Array,
  tokens: jax.Array,
  *,
  config: T5Config,
) -> jax.Array:
  """Returns the logits `[B, T, V]` in float32 of what follows each token that the decoder reads.

  Args:
    params: as in the module docstring.
    prompt_tokens: `[N, P]` int ids; prompt n belongs to the B / N rows from n B / N on.
    prompt_mask: `[N, P]` non-zero on real tokens; padding may be anywhere.
    tokens: `[B, T]` int ids, which begin with `config.start_id`. Padding behind them needs no mask:
      no real token sees it.
    config: the shape of the model.
  """
  prompt = attention.justify_prompts(prompt_tokens, prompt_mask)
  out: Any = T5(config).apply({"params": params}, *prompt, tokens)
  return out


@functools.partial(jax.jit, static_argnames="config")
def first_states(
  params: Params, tokens: jax.Array, mask: jax.Array, *, config: T5Config
) -> jax.Array:
  """Returns the decoder's states `[B, D]` at its start token, which predict the first token.

  Args:
    params: as in the module docstring; the output head is not used.
    tokens: `[B, P]` int ids, read by the encoder.
    mask: `[B, P]` non-zero on real tokens; padding may be anywhere.
    config: the shape of the model.
  """
  starts = jnp.full((len(tokens), 1), config.start_id)
  prompt = attention.justify_prompts(tokens, mask)
  hidden: Any = T5(config).apply({"params": params}, *prompt, starts, method="hidden_states")
  return hidden[:, 0]


def output_states(hidden: jax.Array, config: T5Config) -> jax.Array:
  """Returns the hidden states whose products with the output embedding are the logits."""
  return hidden * config.width**-0.5 if config.tied_head else hidden


@functools.cache
def make_apply_fn(
  config: T5Config, *, logps_chunk: int | None = None
) -> Callable[[Params, sequences.Sequences], jax.Array]:
  """Returns `apply_fn(params, Sequences) -> [B, T]`, the log-probability of each completion token.

  Arguments, results and errors are those of `transformer.make_apply_fn`. The encoder reads each
  prompt once, however many rows share it, and prompts and completions may have any length.
  """

  def apply_fn(params: Params, batch: sequences.Sequences) -> jax.Array:
    transformer.check_sequences(batch, config.vocab_size)
    sequences.rows_per_prompt(batch)
    prompt = attention.justify_prompts(batch.prompt_tokens, batch.prompt_mask)
    tokens = jnp.asarray(batch.tokens)
    # The last token of a completion predicts nothing.
    tokens = jnp.pad(tokens[:, :-1], [(0, 0), (1, 0)], constant_values=config.start_id)
    hidden: Any = T5(config).apply({"params": params}, *prompt, tokens, method="hidden_states")
    return chunked_likelihood.token_logps(
      output_states(hidden, config),
      transformer.output_embedding(params),
      batch.tokens,
      chunk_size=logps_chunk,
    )

  return apply_fn
