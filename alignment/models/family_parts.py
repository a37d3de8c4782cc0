"""Parts of a `config.json` that families share: what a few keys say, read and written."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from alignment.models.decoder_config import MAX_LAYERS, TransformerConfig
from sharding import checks

Fields = Mapping[str, Any]


class Part(NamedTuple):
  """Some keys of a `config.json`.

  Attributes:
    keys: those that `read` looks at.
    read: fields of a `config.json` -> fields of `TransformerConfig`.
    write: a `TransformerConfig` -> fields of a `config.json`.
  """

  keys: frozenset[str]
  read: Callable[[Fields], dict[str, Any]]
  write: Callable[[TransformerConfig], dict[str, Any]]


def number(name: str, value: Any) -> float:
  """Returns a positive number that float32 can hold; `ValueError` names any other value."""
  if not (checks.is_integer(value) or isinstance(value, float)) or not 1e-45 < value < 3.4e38:
    raise ValueError(f"{name}={value!r} must be a positive number that float32 holds")
  return float(value)


def counts(**names: str) -> Part:
  """Keys that hold a whole number, by the field they stand for."""

  def read(fields):
    for key in names:
      limit = {"most": MAX_LAYERS} if names[key] == "num_layers" else {}
      checks.count(key, fields.get(key), **limit)
    return {field: fields[key] for key, field in names.items()}

  return Part(
    frozenset(names),
    read,
    lambda config: {key: getattr(config, field) for key, field in names.items()},
  )


def numbers(optional: bool = False, /, **names: str) -> Part:
  """Keys that hold a positive number, or null if `optional`."""

  def read(fields):
    return {
      field: None if optional and fields.get(key) is None else number(key, fields.get(key))
      for key, field in names.items()
    }

  return Part(
    frozenset(names),
    read,
    lambda config: {key: getattr(config, field) for key, field in names.items()},
  )


def flag(name: str, value: Any) -> bool:
  """Returns true or false, which null is; `ValueError` names any other value, such as "false"."""
  if value not in (None, False, True):
    raise ValueError(f"{name}={value!r} must be true or false")
  return bool(value)


def flags(**names: str) -> Part:
  """Keys that are true or false, for one field or several (with spaces between them)."""

  def read(fields):
    return {
      field: flag(key, fields.get(key)) for key, those in names.items() for field in those.split()
    }

  return Part(
    frozenset(names),
    read,
    lambda config: {key: getattr(config, those.split()[0]) for key, those in names.items()},
  )


_ACTIVATIONS = {
  "silu": "silu",
  "swish": "silu",
  "gelu": "gelu",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_new": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
}


def activation(key: str, *names: str) -> Part:
  """The activation of the feed-forward layer; the first of `names` with its function is written."""

  def read(fields):
    if str(fields.get(key)) not in _ACTIVATIONS:
      raise ValueError(
        f"{key}={fields.get(key)!r} is not supported: the decoder has {', '.join(_ACTIVATIONS)}; "
        "choose another checkpoint"
      )
    return {"activation": _ACTIVATIONS[fields[key]]}

  def write(config):
    written = (*names, *_ACTIVATIONS)
    return {key: next(name for name in written if _ACTIVATIONS[name] == config.activation)}

  return Part(frozenset({key}), read, write)


def heads() -> Part:
  """Width and heads, of which all but the query heads have a default."""

  def read(fields):
    for key in ("hidden_size", "num_attention_heads"):
      checks.count(key, fields.get(key))
    width, num_heads = fields["hidden_size"], fields["num_attention_heads"]
    check_width(width, num_heads)
    for key in ("num_key_value_heads", "head_dim"):
      if fields.get(key) is not None:
        checks.count(key, fields[key])
    return {
      "width": width,
      "num_heads": num_heads,
      "num_kv_heads": fields.get("num_key_value_heads") or num_heads,
      "head_dim": fields.get("head_dim") or width // num_heads,
    }

  def write(config):
    check_width(config.width, config.num_heads)
    return {
      "hidden_size": config.width,
      "num_attention_heads": config.num_heads,
      "num_key_value_heads": config.num_kv_heads,
      "head_dim": config.head_dim,
    }

  return Part(
    frozenset({"hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"}),
    read,
    write,
  )


def check_width(width: int, num_heads: int) -> None:
  """Raises `ValueError` for a width that transformers refuses."""
  if width % num_heads:
    raise ValueError(
      f"hidden_size={width} is not divisible by num_attention_heads={num_heads}, which "
      "transformers refuses: a Hugging Face folder cannot hold this model"
    )


def whole_window() -> Part:
  """`sliding_window` of all layers; null for none."""

  def read(fields):
    if fields.get("sliding_window") is not None:
      checks.count("sliding_window", fields["sliding_window"])
    return {"sliding_window": fields.get("sliding_window")}

  return Part(
    frozenset({"sliding_window"}), read, lambda config: {"sliding_window": config.sliding_window}
  )


def typed_window(default: Callable[[Fields, int], bool], *keys: str, switch: bool = False) -> Part:
  """`sliding_window` of the layers that `layer_types` names.

  Args:
    default: `default(fields, i)`, whether layer i has the window where there is no `layer_types`.
    *keys: what `default` reads.
    switch: whether `use_sliding_window` must be true for any window.
  """

  def read(fields):
    num_layers = fields["num_hidden_layers"]
    types = fields.get("layer_types")
    known = ("full_attention", "sliding_attention")
    if types is not None and (
      not isinstance(types, list) or len(types) != num_layers or not set(types) <= set(known)
    ):
      raise ValueError(
        f"layer_types={str(types)[:80]} is not supported: it must name one of {', '.join(known)} "
        f"for each of the {num_layers} layers"
      )
    window = fields.get("sliding_window")
    if window is not None:
      checks.count("sliding_window", window)
    if switch and not flag("use_sliding_window", fields.get("use_sliding_window")):
      window = None
    layers = tuple(default(fields, i) for i in range(num_layers))
    if types is not None:
      layers = tuple(kind == "sliding_attention" for kind in types)
    return {"sliding_window": window, "window_layers": layers}

  def write(config):
    window = config.sliding_window
    layers = config.window_layers or (window is not None,) * config.num_layers
    kinds = ["sliding_attention" if has else "full_attention" for has in layers]
    extra = {"use_sliding_window": window is not None} if switch else {}
    return {"sliding_window": window, "layer_types": kinds, **extra}

  more = ("use_sliding_window",) if switch else ()
  return Part(frozenset({"sliding_window", "layer_types", *more, *keys}), read, write)


def gemma_scales() -> Part:
  """The scale of the scores, and that of the embeddings, which follows from the width."""

  def read(fields):
    scalar = number("query_pre_attn_scalar", fields.get("query_pre_attn_scalar"))
    return {
      "attention_scale": scalar**-0.5,
      "embedding_scale": math.sqrt(number("hidden_size", fields["hidden_size"])),
    }

  def write(config):
    scalar = config.score_scale**-2
    whole = round(scalar)  # what transformers expects, unless it is another number
    return {"query_pre_attn_scalar": whole if whole**-0.5 == config.score_scale else scalar}

  return Part(frozenset({"query_pre_attn_scalar"}), read, write)


def own_heads(width: str, heads: str) -> Part:
  """Width and heads by these keys, where each query head has a key head, of width / heads."""

  def read(fields):
    for key in (width, heads):
      checks.count(key, fields.get(key))
    check_width(fields[width], fields[heads])
    return {
      "width": fields[width],
      "num_heads": fields[heads],
      "num_kv_heads": fields[heads],
      "head_dim": fields[width] // fields[heads],
    }

  return Part(
    frozenset({width, heads}),
    read,
    lambda config: {width: config.width, heads: config.num_heads},
  )


def gpt2_scores() -> Part:
  return Part(
    frozenset({"scale_attn_weights"}),
    lambda fields: {
      "attention_scale": None if flag("scale_attn_weights", fields["scale_attn_weights"]) else 1.0
    },
    lambda config: {"scale_attn_weights": config.attention_scale is None},
  )


def gpt2_inner() -> Part:
  def read(fields):
    inner = fields.get("n_inner") or 4 * fields["n_embd"]
    checks.count("n_inner", inner)
    return {"mlp_width": inner}

  return Part(frozenset({"n_inner"}), read, lambda config: {"n_inner": config.mlp_width})


def parallel_residual() -> Part:
  return Part(
    frozenset({"use_parallel_residual"}),
    lambda fields: {
      "norm_placement": "parallel"
      if flag("use_parallel_residual", fields["use_parallel_residual"])
      else "pre"
    },
    lambda config: {"use_parallel_residual": config.norm_placement == "parallel"},
  )


DTYPE = Part(
  # transformers 5 writes `dtype`, older releases `torch_dtype`; half precision widens exactly.
  frozenset({"dtype", "torch_dtype"}),
  lambda fields: {
    "param_dtype": "bfloat16"
    if str(fields.get("dtype") or fields.get("torch_dtype")) == "bfloat16"
    else "float32"
  },
  lambda config: {"dtype": config.param_dtype, "torch_dtype": config.param_dtype},
)
