"""`TransformerConfig`: the choices that make a decoder one of the families of language models."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from alignment.models import rotary
from sharding import checks

MAX_LAYERS = 10_000  # beyond, a file is damaged, and reading on would never end

_CHOICES = {
  "rope_pairing": ("half", "adjacent"),
  "norm": ("rms", "rms_plus_one", "layer"),
  "norm_placement": ("pre", "pre_and_post", "parallel"),
  "activation": ("silu", "gelu", "gelu_tanh"),
  "positions": ("rotary", "learned"),
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Shape of a decoder. Hashable, so it can be a static argument of `jax.jit`.

  The defaults after `max_length` are Llama's; `families` has the choices of the others. Choices
  that mean the same, such as a window in no layer and no window, are stored alike.

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
    rope_scaling: None, or a stretch of the wavelengths: `rotary.RopeScaling` (Llama 3's),
      `LinearScaling`, `DynamicScaling`, `YarnScaling` or `LongScaling`.
    norm_epsilon: added to the mean square, or the variance, in norms.
    tied_head: logits are products with the embedding itself.
    dtype: of the matrix products, "float32" or "bfloat16".
    param_dtype: of the parameters made by `init_params`.
    remat: recompute each layer whole in the backward pass: activations of one layer in place of L,
      about a third more time. False keeps the products with weights of every layer and recomputes
      the rest (attention scores, norms, activations), which costs no time on a CPU: it spares the
      page faults of twice the memory.
    fused_attention: run attention in bfloat16 through a fused kernel: True wherever there is one
      (NVIDIA GPUs, a single TPU), False nowhere. None, the default, is True on NVIDIA GPUs alone:
      on a TPU the kernel has been compiled, but not yet run. Models with `attention_softcap` have
      no kernel on GPUs and take the written-out form.
    scan_layers: compile one layer and loop over it, in place of L copies in a row. On a CPU the
      copies only take longer to compile. On a GPU they also run a tenth faster, since a loop copies
      what the backward pass reads into arrays of all layers.
    norm: "rms" divides by the root mean square and multiplies by a scale; "rms_plus_one" multiplies
      by 1 + scale (Gemma); "layer" is LayerNorm with a bias (GPT-2, Pythia).
    norm_placement: "pre" norms what attention and feed-forward layer read; "pre_and_post" also what
      they return (Gemma 2 and 3); "parallel" is "pre", with both reading the input of the layer
      (Pythia).
    head_norms: RMSNorm of each head's queries and keys before the rotation (Qwen3, Gemma 3).
    qkv_bias: biases of queries, keys and values.
    output_bias: bias of attention's output.
    mlp_bias: biases of the feed-forward layer.
    activation: of the feed-forward layer; "gelu_tanh" is the approximation by a tanh.
    gated_mlp: down(activation(gate(x)) * up(x)); False: down(activation(up(x))).
    attention_scale: factor of the scores; None for `head_dim ** -0.5`.
    attention_softcap: c, scores become c tanh(scores / c); None for no cap.
    logit_softcap: the same for the logits.
    embedding_scale: factor of the embeddings on their way in, rounded to `dtype`.
    positions: "rotary", or "learned": an embedding of each position, added to that of its token.
    rotary_dims: the first features of a head that are rotated; None for all.
    sliding_window: w, a token sees itself and the w - 1 before it; None for all before it.
    window_layers: for each layer, whether it has the window; None for all layers.
    rotary_layers: for each layer, whether it rotates; None for all layers (SmolLM3 leaves out every
      fourth).
    local_rope_theta: the base, unscaled, of layers with a window (Gemma 3); None for `rope_theta`.
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
  rope_scaling: rotary.Scaling | None = None
  norm_epsilon: float = 1e-5
  tied_head: bool = True
  dtype: Literal["float32", "bfloat16"] = "float32"
  param_dtype: Literal["float32", "bfloat16"] = "float32"
  remat: bool = False
  fused_attention: bool | None = None
  scan_layers: bool = True
  norm: Literal["rms", "rms_plus_one", "layer"] = "rms"
  norm_placement: Literal["pre", "pre_and_post", "parallel"] = "pre"
  head_norms: bool = False
  qkv_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
  gated_mlp: bool = True
  attention_scale: float | None = None
  attention_softcap: float | None = None
  logit_softcap: float | None = None
  embedding_scale: float = 1.0
  positions: Literal["rotary", "learned"] = "rotary"
  rotary_dims: int | None = None
  sliding_window: int | None = None
  window_layers: tuple[bool, ...] | None = None
  rotary_layers: tuple[bool, ...] | None = None
  local_rope_theta: float | None = None

  def __post_init__(self):
    sizes = "vocab_size num_layers width num_heads num_kv_heads head_dim mlp_width max_length"
    for name in (*sizes.split(), "sliding_window", "rotary_dims"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    checks.count("num_layers", self.num_layers, most=MAX_LAYERS)
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_kv_heads ({self.num_kv_heads}) must divide num_heads ({self.num_heads})"
      )
    if self.head_dim % 2 and self.positions == "rotary":
      raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
    if self.rotary_dims is not None and (self.rotary_dims % 2 or self.rotary_dims > self.head_dim):
      raise ValueError(
        f"rotary_dims must be even and at most head_dim ({self.head_dim}), got {self.rotary_dims}"
      )
    if self.rotary_dims not in (None, self.head_dim) and self.rope_pairing == "adjacent":
      raise ValueError(
        f"rope_pairing='adjacent' rotates whole heads, but rotary_dims is {self.rotary_dims}: "
        "reorder the weights to 'half' pairs"
      )
    if isinstance(self.rope_scaling, rotary.LongScaling):
      pairs = (self.rotary_dims or self.head_dim) // 2
      for name in ("short_factors", "long_factors"):
        factors = getattr(self.rope_scaling, name)
        if len(factors) != pairs:
          raise ValueError(
            f"rope_scaling has {len(factors)} {name}, but {2 * pairs} features of a head are "
            f"rotated: give {pairs}"
          )
    for name, choices in _CHOICES.items():
      checks.choice(name, getattr(self, name), choices)
    for name in ("dtype", "param_dtype"):
      if getattr(self, name) not in ("float32", "bfloat16", "float64"):
        raise ValueError(f"{name} must be 'float32' or 'bfloat16', got {getattr(self, name)!r}")
    for name in ("window_layers", "rotary_layers"):
      layers = getattr(self, name)
      if layers is not None and len(layers) != self.num_layers:
        raise ValueError(
          f"{name} must have an entry for each of the {self.num_layers} layers, got {len(layers)}"
        )
      if layers is not None:  # a list would have no hash
        object.__setattr__(self, name, tuple(map(bool, layers)))
    self._simplify()
    for name in ("attention_scale", "attention_softcap", "logit_softcap", "local_rope_theta"):
      value = getattr(self, name)
      if value is not None and not value > 0:
        raise ValueError(f"{name} must be positive, or None, got {value}")

  def _simplify(self) -> None:
    changes: dict[str, Any] = {}
    if self.attention_scale == self.head_dim**-0.5:
      changes["attention_scale"] = None
    if self.rotary_dims == self.head_dim:
      changes["rotary_dims"] = None
    if self.window_layers is not None and not any(self.window_layers):
      changes["sliding_window"] = None
    for name in ("window_layers", "rotary_layers"):
      if all(getattr(self, name) or ()):
        changes[name] = None
    if changes.get("sliding_window", self.sliding_window) is None:
      changes |= {"sliding_window": None, "window_layers": None, "local_rope_theta": None}
    for name, value in changes.items():
      object.__setattr__(self, name, value)

  @property
  def score_scale(self) -> float:
    """The factor of the attention scores."""
    return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

  def layer_windows(self, length: int) -> tuple[int | None, ...]:
    """Returns the window of each layer, None where it holds a row of `length` tokens whole."""
    has_window = self.window_layers or (True,) * self.num_layers
    window = self.sliding_window
    if window is None or window >= length:
      return (None,) * self.num_layers
    return tuple(window if has else None for has in has_window)

  def layer_ropes(self) -> tuple[str, ...]:
    """Returns the rotation of each layer: "global" for `rope_theta`'s, "local" or "none"."""
    if self.positions == "learned":
      return ("none",) * self.num_layers
    rotates = self.rotary_layers or (True,) * self.num_layers
    local = [False] * self.num_layers
    if self.local_rope_theta is not None and self.sliding_window is not None:
      local = list(self.window_layers or (True,) * self.num_layers)
    return tuple(
      ("local" if is_local else "global") if rotate else "none"
      for rotate, is_local in zip(rotates, local, strict=True)
    )


def distinct(values: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[int, ...]]:
  """Returns the different values in order of appearance, and which of them each place has.

  Example:
    >>> distinct([8, 8, None, 8])
    ((8, None), (0, 0, 1, 0))
  """
  kinds = tuple(dict.fromkeys(values))
  return kinds, tuple(kinds.index(value) for value in values)
