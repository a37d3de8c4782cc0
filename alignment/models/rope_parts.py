"""Rotary positions in a `config.json`: bases, shares, stretches, and layers without."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from alignment.models import rotary
from alignment.models.family_parts import Fields, Part, number
from sharding import checks

_LLAMA3 = {
  "factor": "factor",
  "low_freq_factor": "low_frequency_factor",
  "high_freq_factor": "high_frequency_factor",
  "original_max_position_embeddings": "original_max_length",
}
_YARN_KEYS = {
  "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor",
  "mscale", "mscale_all_dim", "truncate",
}  # fmt: skip
_LONG_KEYS = {
  "short_factor", "long_factor", "factor", "original_max_position_embeddings", "attention_factor"
}  # fmt: skip


def read_scaling(name: str, rope: Fields, max_length: int) -> rotary.Scaling | None:
  """Returns the stretch that a `rope_scaling` or `rope_parameters` object names.

  Args:
    name: of the object, for messages.
    rope: the object.
    max_length: `max_position_embeddings`.

  Raises:
    ValueError: it is of an unknown kind, lacks a number, or has a key that its kind does not read.
  """
  kind = rope.get("rope_type", rope.get("type", "default"))
  read = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "llama3": set(_LLAMA3),
    "yarn": _YARN_KEYS,
    "longrope": _LONG_KEYS,
  }
  if kind not in read:
    raise ValueError(
      f"rope_type={kind!r} is not supported: the decoder knows {', '.join(read)}; choose another "
      "checkpoint (dropping the field would change the model)"
    )
  every = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
  for key, value in rope.items():
    if key not in read[kind] | every and value is not None:
      raise ValueError(f"{name}[{key!r}]={value!r} is not known to rope_type {kind!r}: remove it")

  def get(key):
    if rope.get(key) is None:
      raise ValueError(f"rope_type {kind!r} needs {key!r} in config.json")
    return number(f"{name}[{key!r}]", rope[key])

  if kind == "linear":
    return rotary.LinearScaling(get("factor"))
  if kind == "dynamic":
    return rotary.DynamicScaling(get("factor"))
  if kind == "llama3":
    numbers = {field: get(key) for key, field in _LLAMA3.items()}
    numbers["original_max_length"] = int(numbers["original_max_length"])
    return rotary.RopeScaling(**numbers)
  if kind == "yarn":
    return _read_yarn({**rope, "name": name}, get, max_length)
  if kind == "longrope":
    return _read_long(name, rope, get, max_length)
  return None


def _read_long(
  name: str, rope: Fields, get: Callable[[str], float], max_length: int
) -> rotary.LongScaling:
  def factors(key: str) -> tuple[float, ...]:
    if not isinstance(rope.get(key), list):
      raise ValueError(
        f"{name}[{key!r}]={rope.get(key)!r} must be a list of numbers for rope_type 'longrope', "
        "one for each pair of rotated features"
      )
    return tuple(number(f"{name}[{key!r}][{i}]", x) for i, x in enumerate(rope[key]))

  key = "original_max_position_embeddings"
  original = rope.get(key) or max_length
  checks.count(key, original, least=2)
  factor = get("factor") if rope.get("factor") is not None else max_length / original
  sharpness = 1.0
  if rope.get("attention_factor") is not None:
    sharpness = get("attention_factor")
  elif factor > 1:
    sharpness = math.sqrt(1 + math.log(factor) / math.log(original))
  return rotary.LongScaling(
    short_factors=factors("short_factor"),
    long_factors=factors("long_factor"),
    original_max_length=original,
    attention_factor=sharpness,
  )


def _read_yarn(rope: Fields, get: Callable[[str], float], max_length: int) -> rotary.YarnScaling:
  original = rope.get("original_max_position_embeddings") or max_length
  has_factor = rope.get("factor") is not None or original == max_length
  factor = get("factor") if has_factor else max_length / original

  def sharpened(mscale):
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

  if rope.get("attention_factor") is not None:
    sharpness = get("attention_factor")
  elif rope.get("mscale") and rope.get("mscale_all_dim"):
    sharpness = sharpened(get("mscale")) / sharpened(get("mscale_all_dim"))
  else:
    sharpness = sharpened(1.0)
  return rotary.YarnScaling(
    factor=factor,
    original_max_length=int(original),
    beta_fast=get("beta_fast") if rope.get("beta_fast") else 32.0,
    beta_slow=get("beta_slow") if rope.get("beta_slow") else 1.0,
    attention_factor=sharpness,
    truncate=bool(rope.get("truncate", True)),
  )


def write_scaling(scaling: rotary.Scaling | None) -> dict[str, Any]:
  """Returns the object that `read_scaling` reads."""
  match scaling:
    case rotary.RopeScaling():
      numbers = {key: getattr(scaling, field) for key, field in _LLAMA3.items()}
      return {"rope_type": "llama3", **numbers}
    case rotary.LinearScaling():
      return {"rope_type": "linear", "factor": scaling.factor}
    case rotary.DynamicScaling():
      return {"rope_type": "dynamic", "factor": scaling.factor}
    case rotary.YarnScaling():
      fields = dataclasses.asdict(scaling)
      fields["original_max_position_embeddings"] = fields.pop("original_max_length")
      return {"rope_type": "yarn", **fields}
    case rotary.LongScaling():
      return {
        "rope_type": "longrope",
        "short_factor": list(scaling.short_factors),
        "long_factor": list(scaling.long_factors),
        "original_max_position_embeddings": scaling.original_max_length,
        "attention_factor": scaling.attention_factor,
      }
  return {"rope_type": "default"}


def rope(
  theta: float = 1e4,
  share: float | None = None,
  *,
  theta_key: str = "rope_theta",
  share_key: str = "partial_rotary_factor",
) -> Part:
  """Rotary positions, in the format of transformers 4 or 5.

  A `config.json` of transformers 4 has `rope_theta` and `rope_scaling`, one of 5 has both in
  `rope_parameters`.

  Args:
    theta: the default base.
    share: the default share of features that are rotated; None for a family that rotates all.
    theta_key: name of the base in the format of transformers 4.
    share_key: name of the share there.
  """

  def read(fields):
    # In the order of transformers: `rope_scaling` hides `rope_parameters` whole.
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = _object(name, fields.get(name))
    base = rope.get("rope_theta", fields.get(theta_key, theta))
    part = rope.get("partial_rotary_factor", fields.get(share_key, share))
    result = {
      "rope_theta": number(theta_key, base),
      "rope_scaling": read_scaling(name, rope, fields["max_position_embeddings"]),
    }
    if part not in (None, 1):
      if share is None:
        raise ValueError(
          f"{share_key}={part} is not supported in this family of models: every feature of a head "
          "is rotated"
        )
      head_dim = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
      result["rotary_dims"] = int(head_dim * number(share_key, part))
    return result

  def write(config):
    scaling, rotated = write_scaling(config.rope_scaling), config.rotary_dims or config.head_dim
    part = None if share is None else rotated / config.head_dim
    return {
      "rope_parameters": {
        **scaling,
        "rope_theta": config.rope_theta,
        **({} if part is None else {"partial_rotary_factor": part}),
      },
      theta_key: config.rope_theta,
      "rope_scaling": None if config.rope_scaling is None else scaling,
      **({} if part is None else {share_key: part}),
    }

  keys = {theta_key, "rope_scaling", "rope_parameters", share_key}
  return Part(frozenset(keys), read, write)


def phi3_rope() -> Part:
  """Rotary positions of Phi-3, with the length before the stretch among the model's own keys.

  Its class knows no stretch but "longrope", which old files call "su" or "yarn".
  """
  plain, outer = rope(share=1.0), "original_max_position_embeddings"

  def read(fields):
    fields = dict(fields)
    checks.count(outer, fields[outer])
    for name in ("rope_scaling", "rope_parameters"):
      inner = dict(_object(name, fields.get(name)))
      kind = inner.get("rope_type", inner.get("type", "default"))
      if kind in ("su", "yarn", "longrope"):
        inner |= {"rope_type": "longrope", outer: fields[outer]}
      elif kind != "default":
        raise ValueError(
          f"{name} of rope_type={kind!r} is not supported in this family of models: it has "
          "'longrope' alone"
        )
      fields[name] = inner
    return plain.read(fields)

  def write(config):
    fields, scaling = plain.write(config), config.rope_scaling
    if isinstance(scaling, rotary.LongScaling):
      fields[outer] = scaling.original_max_length
    return fields

  return Part(plain.keys | {outer}, read, write)


def two_ropes(theta: float, local_theta: float) -> Part:
  """Rotary positions of layers without and with a window (Gemma 3), in both formats."""

  def read(fields):
    both = _object("rope_parameters", fields.get("rope_parameters"))
    known = ("full_attention", "sliding_attention")
    if not set(both) <= set(known):
      raise ValueError(f"rope_parameters={both!r} must hold {' and '.join(known)} only")
    full, local = (_object(f"rope_parameters[{key!r}]", both.get(key)) for key in known)
    full = {**full, **_object("rope_scaling", fields.get("rope_scaling"))}
    length = fields["max_position_embeddings"]
    if read_scaling("rope_parameters['sliding_attention']", local, length) is not None:
      raise ValueError(f"rope_parameters['sliding_attention']={local!r} must be of type 'default'")
    for rope in (full, local):
      if rope.get("partial_rotary_factor") not in (None, 1):
        raise ValueError("partial_rotary_factor is not supported in this family of models")
    bases = (
      full.get("rope_theta", fields.get("rope_theta", theta)),
      local.get("rope_theta", fields.get("rope_local_base_freq", local_theta)),
    )
    return {
      "rope_theta": number("rope_theta", bases[0]),
      "rope_scaling": read_scaling("rope_parameters['full_attention']", full, length),
      "local_rope_theta": number("rope_local_base_freq", bases[1]),
    }

  def write(config):
    scaling = write_scaling(config.rope_scaling)
    local = config.local_rope_theta or local_theta
    return {
      "rope_parameters": {
        "full_attention": {**scaling, "rope_theta": config.rope_theta},
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
      },
      "rope_theta": config.rope_theta,
      "rope_local_base_freq": local,
      "rope_scaling": None if config.rope_scaling is None else scaling,
    }

  keys = {"rope_theta", "rope_local_base_freq", "rope_scaling", "rope_parameters"}
  return Part(frozenset(keys), read, write)


def rotary_layers() -> Part:
  """`no_rope_layers` (SmolLM3), which has a 1 for each layer that does rotate."""

  def write(config):
    layers = config.rotary_layers or (True,) * config.num_layers
    return {"no_rope_layers": [int(rotates) for rotates in layers]}

  return Part(
    frozenset({"no_rope_layers", "no_rope_layer_interval"}),
    lambda fields: {"rotary_layers": rotates(fields)},
    write,
  )


def rotates(fields: Fields) -> tuple[bool, ...]:
  layers, num_layers = fields.get("no_rope_layers"), fields["num_hidden_layers"]
  interval = fields["no_rope_layer_interval"]
  checks.count("no_rope_layer_interval", interval)
  if layers is None:
    return tuple((i + 1) % interval != 0 for i in range(num_layers))
  if not isinstance(layers, list) or len(layers) != num_layers or not set(layers) <= {0, 1}:
    raise ValueError(
      f"no_rope_layers={str(layers)[:80]} must hold a 1 or 0 for each of the {num_layers} layers"
    )
  return tuple(map(bool, layers))


def _object(name: str, value: Any) -> Fields:
  if value and not isinstance(value, dict):
    raise ValueError(f"{name}={value!r} must be an object such as {{'rope_type': 'default'}}")
  return value or {}
