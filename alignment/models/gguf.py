"""Llama, Qwen and Gemma in GGUF files (llama.cpp's format): config and dequantised weights.

We read the header ourselves: `gguf.GGUFReader` takes seconds for the 10^5 strings of a vocabulary
and does not notice a truncated file. The gguf package does the dequantisation, `gguf_words` reads
the tokenizer.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import mmap
import os
import pathlib
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import gguf
import numpy as np

from alignment.models import config_keys, gguf_words, layout, rotary, transformer
from alignment.models import tokenizer as tokenizer_lib

_Path = str | os.PathLike[str]

_LAYER = {
  "attention_norm": "attn_norm",
  "attention/query": "attn_q",
  "attention/key": "attn_k",
  "attention/value": "attn_v",
  "attention/output": "attn_output",
  "attention/query_norm": "attn_q_norm",
  "attention/key_norm": "attn_k_norm",
  "attention_post_norm": "post_attention_norm",
  "mlp_norm": "ffn_norm",
  "mlp_post_norm": "post_ffw_norm",
  "mlp/gate": "ffn_gate",
  "mlp/up": "ffn_up",
  "mlp/down": "ffn_down",
}
_TENSORS = layout.Tensors(
  layout.names(_LAYER, "blk.{}.", embed="token_embd", final_norm="output_norm", head="output")
)
# Fields of `TransformerConfig` that all models of an architecture have. llama.cpp's converter
# reorders the rotary pairs of "llama" alone.
_GEMMA = {"norm": "rms_plus_one", "norm_placement": "pre_and_post", "activation": "gelu_tanh"}
_ARCHITECTURES: dict[str, dict[str, Any]] = {
  "llama": {"rope_pairing": "adjacent"},
  "qwen2": {"qkv_bias": True},
  "qwen3": {"head_norms": True},
  "gemma2": _GEMMA,
  "gemma3": {**_GEMMA, "head_norms": True},
}
# Keys that only they have, and what llama.cpp assumes where one is absent: bases and caps, and of
# how many layers in a row the last has no window.
_OWN_KEYS: dict[str, dict[str, Any]] = {
  "gemma2": {
    "attention.sliding_window": 4096,
    "attention.sliding_window_pattern": 2,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
  },
  "gemma3": {
    "attention.sliding_window": 0,
    "attention.sliding_window_pattern": 6,
    "final_logit_softcapping": 0.0,
    "rope.freq_base_swa": 1e4,
  },
}
# The header of a Gemma does not say the scale of its scores. llama.cpp knows that of 27B, where the
# heads are narrower than their share of the width, by the number of layers.
_WIDE_SCORES = {("gemma2", 46), ("gemma3", 62)}

# Codes of the format's value types.
_SCALARS = {
  0: "B",
  1: "b",
  2: "H",
  3: "h",
  4: "I",
  5: "i",
  6: "f",
  7: "?",
  10: "Q",
  11: "q",
  12: "d",
}
_STRING, _ARRAY = 8, 9
_BYTES_AT_ONCE = 2**20  # of quantised weights, dequantised through temporaries


class _Tensor(NamedTuple):
  shape: tuple[int, ...]  # of the weights, NumPy order
  kind: gguf.GGMLQuantizationType
  start: int  # byte in the file
  num_bytes: int


def load(
  path: _Path,
) -> tuple[transformer.TransformerConfig, transformer.Params, tokenizer_lib.Tokenizer]:
  """Reads a model and its tokenizer.

  Args:
    path: a `.gguf` file of architecture "llama", "qwen2", "qwen3", "gemma2" or "gemma3" (its text
      part) with a vocabulary that `gguf_words` reads.

  Returns:
    The config (rotary pairs "adjacent" for "llama", as the format stores them), the parameters as
    float32 NumPy arrays on the host, and the tokenizer.

  Raises:
    ValueError: the file is absent, truncated, not GGUF, or of a kind that `transformer` does not
      compute. The message names the path and the field or tensor.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f"{path} is not a file: give the path of a .gguf file")
  with open(path, "rb") as file:
    if path.stat().st_size < 24:
      raise ValueError(
        f"{path} has {path.stat().st_size} bytes, so it is truncated or not GGUF: copy it again"
      )
    # The garbage collector closes it: closing it here would fail while views of it exist.
    buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  metadata, tensors = _read_header(path, buffer)
  config = _config(path, metadata, tensors)
  layout.check_names(config, _TENSORS, set(tensors), path)
  for name, shape in layout.stored_shapes(config, _TENSORS).items():
    layout.check_shape(name, tensors[name].shape, shape, path)
  tokenizer = gguf_words.read(path, metadata)

  def read(name: str) -> np.ndarray:
    tensor = _dequantize(path, name, tensors[name], buffer)
    layout.check_finite(name, tensor, path)
    # llama.cpp's converter adds the 1 to the scales that Gemma's norms would add.
    is_shifted = config.norm == "rms_plus_one" and name.endswith("norm.weight")
    return tensor - 1 if is_shifted else tensor

  return config, layout.stack(config, _TENSORS, read, np.float32), tokenizer


def _dequantize(path: pathlib.Path, name: str, tensor: _Tensor, buffer: mmap.mmap) -> np.ndarray:
  stored = np.frombuffer(buffer, np.uint8, tensor.num_bytes, tensor.start)
  block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.kind]
  # A few thousand blocks at a time: single rows are too short, the embedding is too long.
  step = max(1, _BYTES_AT_ONCE // block_bytes)
  result = np.empty(math.prod(tensor.shape), np.float32)
  try:
    for first in range(0, tensor.num_bytes // block_bytes, step):
      part = stored[first * block_bytes : (first + step) * block_bytes]
      result[first * block : (first + step) * block] = gguf.quants.dequantize(
        part[None], tensor.kind
      )
  except NotImplementedError:
    raise ValueError(
      f"{path}: tensor {name} is quantised as {tensor.kind.name}, which the gguf package cannot "
      "read: use another quantisation of the model (Q8_0, Q4_1, F16, ...)"
    ) from None
  return result.reshape(tensor.shape)


class _Cursor:
  """Reads little-endian values one after another and notices the end of the file."""

  def __init__(self, path: pathlib.Path, buffer: mmap.mmap):
    self.path, self.buffer, self.offset = path, buffer, 0

  def _advance(self, size: int) -> int:
    start, self.offset = self.offset, self.offset + size
    if self.offset > len(self.buffer):
      raise ValueError(
        f"{self.path} is truncated: it ends at byte {len(self.buffer)}, inside its header of at "
        f"least {self.offset} bytes; copy or download it again"
      )
    return start

  def scalar(self, form: str) -> Any:
    form = "<" + form
    return struct.unpack_from(form, self.buffer, self._advance(struct.calcsize(form)))[0]

  def string(self) -> str:
    size = self.scalar("Q")
    start = self._advance(size)
    return self.buffer[start : start + size].decode("utf-8", errors="replace")

  def value(self, kind: int) -> Any:
    if kind in _SCALARS:
      return self.scalar(_SCALARS[kind])
    if kind == _STRING:
      return self.string()
    if kind != _ARRAY:
      raise ValueError(
        f"{self.path} has a value of unknown type {kind}; is it corrupt? Copy it again"
      )
    kind, count = self.scalar("I"), self.scalar("Q")
    if kind in _SCALARS:
      form = np.dtype(_SCALARS[kind]).newbyteorder("<")
      start = self._advance(count * form.itemsize)
      return np.frombuffer(self.buffer, form, count, start).tolist()
    return [self.value(kind) for _ in range(count)]


def _read_header(
  path: pathlib.Path, buffer: mmap.mmap
) -> tuple[dict[str, Any], dict[str, _Tensor]]:
  if buffer[:4] != b"GGUF":
    raise ValueError(
      f"{path} is not a GGUF file (it starts with {buffer[:4]!r}): give another path"
    )
  cursor = _Cursor(path, buffer)
  cursor.scalar("I")
  version = cursor.scalar("I")
  if version not in (2, 3):
    raise ValueError(
      f"{path} is GGUF version {version}, or big-endian. Only little-endian versions 2 and 3 are "
      "supported: convert it again with a current llama.cpp"
    )
  num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
  metadata = {}
  for _ in range(num_values):
    key = cursor.string()
    metadata[key] = cursor.value(cursor.scalar("I"))
  tensors = {}
  for _ in range(num_tensors):
    name = cursor.string()
    shape = tuple(cursor.scalar("Q") for _ in range(cursor.scalar("I")))[::-1]
    code, start = cursor.scalar("I"), cursor.scalar("Q")
    try:
      kind = gguf.GGMLQuantizationType(code)
    except ValueError:
      raise ValueError(
        f"{path}: tensor {name} has the unknown type {code}: update the gguf package, or use "
        "another quantisation of the model"
      ) from None
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % block:
      raise ValueError(
        f"{path}: tensor {name} of shape {list(shape)} does not divide into {kind.name} blocks of "
        f"{block}; is it corrupt? Copy it again"
      )
    tensors[name] = _Tensor(shape, kind, start, math.prod(shape) // block * block_bytes)
  alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
  begin = -(-cursor.offset // alignment) * alignment
  tensors = {name: t._replace(start=begin + t.start) for name, t in tensors.items()}
  size = max((t.start + t.num_bytes for t in tensors.values()), default=begin)
  if len(buffer) < size:
    raise ValueError(
      f"{path} is truncated: it has {len(buffer)} bytes, and its header announces {size}; copy or "
      "download it again"
    )
  return metadata, tensors


def _config(
  path: pathlib.Path, metadata: dict[str, Any], tensors: dict[str, _Tensor]
) -> transformer.TransformerConfig:
  architecture = metadata.get("general.architecture")
  if architecture not in _ARCHITECTURES:
    raise ValueError(
      f"{path} has architecture {architecture!r}: only {', '.join(_ARCHITECTURES)} are supported; "
      "load the model's Hugging Face folder"
    )

  def find(name: str, default: Any = None) -> Any:
    return metadata.get(f"{architecture}.{name}", default)

  def get(name: str) -> Any:
    if find(name) is None:
      raise ValueError(f"{path} lacks the field {architecture}.{name}: convert the model again")
    return find(name)

  try:
    config_keys.check_gguf(metadata, architecture, own=_OWN_KEYS.get(architecture, ()))
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None
  # llama.cpp scales linearly where a file has a factor and names no type.
  factor = find("rope.scaling.factor", find("rope.scale_linear", 0))
  scaling = find("rope.scaling.type", "linear")
  if scaling not in ("none", "linear") or "rope_freqs.weight" in tensors:
    known = scaling in ("none", "linear")
    kind = "rope_freqs.weight" if known else f"{scaling}, factor {factor:g}"
    raise ValueError(
      f"{path} scales its rotary frequencies ({kind}), which this reader does not support: load "
      "the model's Hugging Face folder, whose config.json has the scaling"
    )
  stretched = scaling == "linear" and factor not in (0, 1)
  if find("expert_count", 0):
    raise ValueError(
      f"{path} is a mixture of experts, which is not supported: choose a dense model"
    )
  if metadata.get("split.count", 1) > 1:
    raise ValueError(f"{path} is one of several parts: merge them with llama-gguf-split first")
  width, num_heads = get("embedding_length"), get("attention.head_count")
  head_dim = find("attention.key_length", width // num_heads)
  rotated = find("rope.dimension_count", head_dim)
  if rotated != head_dim:
    raise ValueError(
      f"{path} rotates {rotated} of {head_dim} features of a head, which is not supported: choose "
      "another model"
    )
  values = find("attention.value_length", head_dim)
  if values != head_dim:
    raise ValueError(
      f"{path} has values of {values} and keys of {head_dim} features, which is not supported: "
      "choose another model"
    )
  embedding = tensors.get(_TENSORS.names["embed/embedding"])
  return transformer.TransformerConfig(
    vocab_size=embedding.shape[0] if embedding else get("vocab_size"),
    num_layers=get("block_count"),
    width=width,
    num_heads=num_heads,
    num_kv_heads=find("attention.head_count_kv", num_heads),
    head_dim=head_dim,
    mlp_width=get("feed_forward_length"),
    max_length=get("context_length"),
    rope_theta=float(find("rope.freq_base", 1e4)),
    rope_scaling=rotary.LinearScaling(_shortest(factor)) if stretched else None,
    norm_epsilon=_shortest(get("attention.layer_norm_rms_epsilon")),
    tied_head=_TENSORS.names["head/kernel"] not in tensors,
    **_ARCHITECTURES[architecture],
    **_gemma_fields(path, architecture, find, head_dim),
  )


def _gemma_fields(
  path: pathlib.Path, architecture: str, find: Callable[..., Any], head_dim: int
) -> dict[str, Any]:
  """Returns the fields of `TransformerConfig` by which a Gemma differs from its next relatives."""
  if architecture not in _OWN_KEYS:
    return {}
  own = {key: find(key, default) for key, default in _OWN_KEYS[architecture].items()}
  num_layers, width = find("block_count"), find("embedding_length")
  pattern = own["attention.sliding_window_pattern"]
  if isinstance(pattern, list):
    layers = tuple(map(bool, pattern[:num_layers]))
  else:
    layers = tuple(pattern == 0 or i % pattern < pattern - 1 for i in range(num_layers))
  if len(layers) != num_layers:
    raise ValueError(
      f"{path}: {architecture}.attention.sliding_window_pattern has {len(layers)} entries for "
      f"{num_layers} layers; is it corrupt? Convert the model again"
    )
  score_dim = head_dim
  if (architecture, num_layers) in _WIDE_SCORES:
    score_dim = width // find("attention.head_count")
  return {
    "embedding_scale": math.sqrt(width),
    "attention_scale": score_dim**-0.5,
    "attention_softcap": own.get("attn_logit_softcapping") or None,
    "logit_softcap": own["final_logit_softcapping"] or None,
    "sliding_window": own["attention.sliding_window"] or None,
    "window_layers": layers,
    "local_rope_theta": own.get("rope.freq_base_swa"),
  }


def _shortest(value: float) -> float:
  """Returns the decimal number that was rounded to float32: 1e-05, not 9.999999747378752e-06."""
  return float(str(np.float32(value)))
