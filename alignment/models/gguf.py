"""Llama and Qwen in GGUF files (llama.cpp's format): config, dequantised weights and tokenizer.

We read the header ourselves: `gguf.GGUFReader` takes seconds for the 10^5 strings of a vocabulary
and does not notice a truncated file. The gguf package does the dequantisation.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import mmap
import os
import pathlib
import struct
from typing import Any, NamedTuple

import gguf
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from alignment.models import config_keys, layout, transformer
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
  "mlp_norm": "ffn_norm",
  "mlp/gate": "ffn_gate",
  "mlp/up": "ffn_up",
  "mlp/down": "ffn_down",
}
_TENSORS = layout.Tensors(
  layout.names(_LAYER, "blk.{}.", embed="token_embd", final_norm="output_norm", head="output")
)
# Fields of `TransformerConfig` that all models of an architecture have. llama.cpp's converter
# reorders the rotary pairs of "llama" alone.
_ARCHITECTURES: dict[str, dict[str, Any]] = {
  "llama": {"rope_pairing": "adjacent"},
  "qwen2": {"qkv_bias": True},
  "qwen3": {"head_norms": True},
}

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
_CONTROL, _USER_DEFINED = 3, 4  # token types
_BYTES_AT_ONCE = 2**20  # of quantised weights, dequantised through temporaries


def _split(digits: str) -> str:
  return (
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
  )


# Digits go together by up to three, or alone.
_SPLITS = {"llama-bpe": _split("{1,3}"), "qwen2": _split("")}


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
    path: a `.gguf` file of architecture "llama", "qwen2" or "qwen3" with a byte-level BPE
      vocabulary.

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
  tokenizer = _tokenizer(path, metadata)

  def read(name: str) -> np.ndarray:
    tensor = _dequantize(path, name, tensors[name], buffer)
    layout.check_finite(name, tensor, path)
    return tensor

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
    config_keys.check_gguf(metadata, architecture)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None
  # llama.cpp scales linearly where a file has a factor and names no type.
  factor = find("rope.scaling.factor", find("rope.scale_linear", 0))
  scaling = find("rope.scaling.type", "none" if factor in (0, 1) else "linear")
  if scaling != "none" or "rope_freqs.weight" in tensors:
    kind = f"{scaling}, factor {factor:g}" if scaling != "none" else "rope_freqs.weight"
    raise ValueError(
      f"{path} scales its rotary frequencies ({kind}), which this reader does not support: load "
      "the model's Hugging Face folder, whose config.json has the scaling"
    )
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
    norm_epsilon=_shortest(get("attention.layer_norm_rms_epsilon")),
    tied_head=_TENSORS.names["head/kernel"] not in tensors,
    **_ARCHITECTURES[architecture],
  )


def _shortest(value: float) -> float:
  """Returns the decimal number that was rounded to float32: 1e-05, not 9.999999747378752e-06."""
  return float(str(np.float32(value)))


def _tokenizer(path: pathlib.Path, metadata: dict[str, Any]) -> tokenizer_lib.Tokenizer:
  def get(name: str) -> Any:
    if f"tokenizer.ggml.{name}" not in metadata:
      raise ValueError(f"{path} lacks the field tokenizer.ggml.{name}: convert the model again")
    return metadata[f"tokenizer.ggml.{name}"]

  if get("model") != "gpt2":
    raise ValueError(
      f"{path} has a vocabulary of kind {get('model')!r}: only 'gpt2' (byte-level BPE) is "
      "supported; load the model's Hugging Face folder"
    )
  tokens, eos_id = get("tokens"), get("eos_token_id")
  kind = metadata.get("tokenizer.ggml.pre", "gpt-2")
  backend = tokenizers.Tokenizer(_bpe(path, tokens, get("merges"), kind))
  backend.pre_tokenizer = _pre_tokenizer(path, kind)
  backend.decoder = decoders.ByteLevel()
  types = metadata.get("tokenizer.ggml.token_type", [])
  for code, special in ((_CONTROL, True), (_USER_DEFINED, False)):
    added = [t for t, c in zip(tokens, types, strict=False) if c == code]
    backend.add_tokens(
      [tokenizers.AddedToken(token, special=special, normalized=False) for token in added]
    )
  bos_id = metadata.get("tokenizer.ggml.bos_token_id")
  # llama.cpp adds a start token to texts of this scheme unless the file says otherwise.
  adds_bos = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama-bpe")
  adds_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
  around = bos_id if adds_bos else None, eos_id if adds_eos else None
  if around != (None, None):
    tokenizer_lib.add_around(backend, *around)
  ends = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
  return tokenizer_lib.Tokenizer(
    backend=backend,
    eos_id=eos_id,
    pad_id=metadata.get("tokenizer.ggml.padding_token_id", eos_id),
    bos_id=bos_id,
    chat_template=metadata.get("tokenizer.chat_template"),
    eos_ids=tuple(index for index in ends if index is not None),
  )


def _bpe(path: pathlib.Path, tokens: list[str], merges: list[str], kind: str) -> models.BPE:
  vocabulary = {token: index for index, token in enumerate(tokens)}
  pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
  whole = kind == "llama-bpe"  # Llama 3 keeps a word that is itself a token, whatever the merges
  try:
    return models.BPE(vocab=vocabulary, merges=pairs, fuse_unk=False, ignore_merges=whole)
  except Exception as error:  # the library raises bare Exception
    raise ValueError(
      f"{path}: vocabulary and merges do not fit ({error}); is it corrupt? Copy it again"
    ) from error


def _pre_tokenizer(path: pathlib.Path, kind: str) -> pre_tokenizers.PreTokenizer:
  """Returns the word splitter that llama.cpp uses for a scheme of this name."""
  if kind in ("gpt-2", "default"):
    return pre_tokenizers.ByteLevel(add_prefix_space=False)
  if kind in ("smollm", "starcoder", "refact"):
    return pre_tokenizers.Sequence(
      [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
      ]
    )
  if kind in _SPLITS:
    return pre_tokenizers.Sequence(
      [
        pre_tokenizers.Split(tokenizers.Regex(_SPLITS[kind]), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
      ]
    )
  raise ValueError(
    f"{path} splits words by the scheme {kind!r}; supported are gpt-2, smollm, starcoder, refact, "
    "llama-bpe, qwen2: load the model's Hugging Face folder, whose tokenizer.json has the scheme"
  )
