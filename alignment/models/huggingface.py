"""Reads and writes Llama and T5 checkpoints as Hugging Face folders: `config.json` and safetensors.

`load` reads a local folder into the parameters of `transformer` or `t5`; `save` writes one that
`transformers.AutoModelForCausalLM.from_pretrained` opens (for T5 `AutoModelForSeq2SeqLM`). If a
checkpoint needs something that the model here does not compute (biases, sliding windows, other
rotary scalings, quantised weights), `load` raises an error that names it (`config_keys` has the
table of keys): a model that loads computes the function that its authors trained.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
import safetensors
import safetensors.numpy

from alignment.models import config_keys, layout, t5, t5_files, transformer, weight_files
from alignment.models import tokenizer as tokenizer_lib
from sharding import checks

_Path = str | os.PathLike[str]
_Dtype = Literal["float32", "bfloat16"]

_NAMES = {
  "embed/embedding": "model.embed_tokens.weight",
  "layers/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
  "layers/attention/query/kernel": "model.layers.{}.self_attn.q_proj.weight",
  "layers/attention/key/kernel": "model.layers.{}.self_attn.k_proj.weight",
  "layers/attention/value/kernel": "model.layers.{}.self_attn.v_proj.weight",
  "layers/attention/output/kernel": "model.layers.{}.self_attn.o_proj.weight",
  "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
  "layers/mlp/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
  "layers/mlp/up/kernel": "model.layers.{}.mlp.up_proj.weight",
  "layers/mlp/down/kernel": "model.layers.{}.mlp.down_proj.weight",
  "final_norm/scale": "model.norm.weight",
  "head/kernel": "lm_head.weight",
}

# Defaults of transformers for fields that a config.json leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
  "llama": {"max_position_embeddings": 2048},
  "mistral": {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
  },
}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# `save` replaces a folder that holds nothing but these.
_OWN_FILES = {
  "config.json",
  "generation_config.json",
  "model.safetensors",
  "tokenizer.json",
  "tokenizer_config.json",
}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def from_config_json(fields: Mapping[str, Any]) -> layout.Config:
  """Returns the config of a model from the fields of a `config.json`.

  Args:
    fields: in the format of transformers 4 (`rope_theta`, `rope_scaling`) or 5
      (`rope_parameters`).

  Raises:
    ValueError: a field is missing, or needs a computation that `transformer` does not do.

  Example:
    >>> from_config_json({
    ...   "model_type": "llama", "vocab_size": 32, "hidden_size": 8, "intermediate_size": 16,
    ...   "num_hidden_layers": 2, "num_attention_heads": 2, "rope_theta": 5e5,
    ... }).rope_theta
    500000.0
  """
  model_type = fields.get("model_type")
  if model_type == t5_files.MODEL_TYPE:
    return t5_files.from_config_json(fields)
  if model_type not in _DEFAULTS:
    raise ValueError(
      f"model_type {model_type!r} is not supported: choose a checkpoint of one of "
      f"{', '.join((*_DEFAULTS, t5_files.MODEL_TYPE))}"
    )
  config_keys.check(fields)
  fields = {**_DEFAULTS[model_type], **fields}

  def integer(name: str) -> int:
    value: Any = fields.get(name)
    checks.count(name, value)
    return value

  num_heads, width = integer("num_attention_heads"), integer("hidden_size")
  _check_width(width, num_heads)
  length, window = integer("max_position_embeddings"), fields.get("sliding_window")
  for name in ("attention_bias", "mlp_bias", "quantization_config"):
    if fields.get(name):
      raise ValueError(
        f"{name}={fields[name]!r} is not supported: the decoder has no biases and float weights; "
        "choose a checkpoint without"
      )
  if fields.get("hidden_act", "silu") not in ("silu", "swish"):
    raise ValueError(
      f"hidden_act={fields['hidden_act']!r} is not supported: the decoder has 'silu' only"
    )
  if window is not None:
    checks.count("sliding_window", window)
  if window is not None and window < length:
    raise ValueError(
      f"sliding_window={window} is not supported: set it to null and max_position_embeddings to "
      f"{window} in config.json, which is exact for contexts of that length"
    )
  theta, scaling = _rope(fields)
  # transformers 5 writes `dtype`, older releases `torch_dtype`; half precision widens exactly.
  stored = str(fields.get("dtype") or fields.get("torch_dtype") or "float32")
  return transformer.TransformerConfig(
    vocab_size=integer("vocab_size"),
    num_layers=integer("num_hidden_layers"),
    width=width,
    num_heads=num_heads,
    num_kv_heads=num_heads
    if fields.get("num_key_value_heads") is None
    else integer("num_key_value_heads"),
    head_dim=width // num_heads if fields.get("head_dim") is None else integer("head_dim"),
    mlp_width=integer("intermediate_size"),
    max_length=length,
    rope_theta=theta,
    rope_scaling=scaling,
    norm_epsilon=_number("rms_norm_eps", fields.get("rms_norm_eps", 1e-6)),
    tied_head=bool(fields.get("tie_word_embeddings", False)),
    param_dtype="bfloat16" if stored == "bfloat16" else "float32",
  )


def to_config_json(
  config: layout.Config, *, tokenizer: tokenizer_lib.Tokenizer | None = None
) -> dict[str, Any]:
  """Returns the fields of a `config.json` for transformers 4 and 5; ids come from `tokenizer`.

  Raises:
    ValueError: transformers would refuse the file, or an id lies outside `config.vocab_size`.
  """
  if isinstance(config, transformer.TransformerConfig):
    _check_width(config.width, config.num_heads)
  if tokenizer is not None:
    for index in (*tokenizer.eos_ids, tokenizer.pad_id, tokenizer.bos_id or 0):
      if index >= config.vocab_size:
        raise ValueError(
          f"tokenizer has the special id {index}, but the model {config.vocab_size} embeddings: "
          "they belong to different models"
        )
  ids = tokenizer.ids() if tokenizer else dict.fromkeys(_TOKEN_IDS)
  if isinstance(config, t5.T5Config):
    return t5_files.to_config_json(config) | ids
  rope: dict[str, Any] = {"rope_type": "default"}
  if config.rope_scaling is not None:
    rope = {
      "rope_type": "llama3",
      "factor": config.rope_scaling.factor,
      "low_freq_factor": config.rope_scaling.low_frequency_factor,
      "high_freq_factor": config.rope_scaling.high_frequency_factor,
      "original_max_position_embeddings": config.rope_scaling.original_max_length,
    }
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "intermediate_size": config.mlp_width,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "max_position_embeddings": config.max_length,
    "rope_parameters": {**rope, "rope_theta": config.rope_theta},
    "rope_theta": config.rope_theta,
    "rope_scaling": None if config.rope_scaling is None else rope,
    "rms_norm_eps": config.norm_epsilon,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": config.tied_head,
    "dtype": config.param_dtype,
    "torch_dtype": config.param_dtype,
    **ids,
  }


def load(folder: _Path) -> tuple[layout.Config, transformer.Params]:
  """Reads a folder of `config.json` and `model.safetensors` (or shards with their index).

  Args:
    folder: a local folder.

  Returns:
    The config and the parameters as NumPy arrays on the host, in the stored type
    (`config.param_dtype`). Float16 or a mixture of types is widened to float32, which is exact.

  Raises:
    ValueError: the message names the file, the field or the tensor, and says what to do.
  """
  folder = pathlib.Path(folder)
  if (folder / "adapter_config.json").is_file():
    raise ValueError(
      f"{folder} holds an adapter (adapter_config.json), which transformers adds to the weights: "
      "merge it with peft: model.merge_and_unload().save_pretrained(another folder)"
    )
  if not (folder / "config.json").is_file():
    raise ValueError(f"{folder} has no config.json: give the folder of a Hugging Face checkpoint")
  try:
    config = from_config_json(weight_files.read_json(folder / "config.json"))
  except ValueError as error:
    raise ValueError(f"{folder / 'config.json'}: {error}") from error
  with contextlib.ExitStack() as stack:
    tensors = weight_files.open_tensors(folder, stack)
    # Old releases store these buffers, which follow from the config.
    found = {name for name in tensors if not name.endswith("rotary_emb.inv_freq")}
    found -= _copies(config, folder, tensors)
    names = _names(config)
    layout.check_names(config, names, found, folder)
    kinds = set()
    for name, shape in layout.stored_shapes(config, names).items():
      path, file = tensors[name]
      view = file.get_slice(name)
      layout.check_shape(name, tuple(view.get_shape()), shape, path)
      if view.get_dtype() not in _SAFETENSORS_DTYPES:
        raise ValueError(
          f"{path}: tensor {name} is stored as {view.get_dtype()}, not as a float of "
          f"{', '.join(_SAFETENSORS_DTYPES)}: choose a checkpoint that is not quantised"
        )
      kinds.add(_SAFETENSORS_DTYPES[view.get_dtype()])
    dtype: _Dtype = "bfloat16" if kinds == {"bfloat16"} else "float32"
    config = dataclasses.replace(config, param_dtype=dtype)

    def read(name: str) -> np.ndarray:
      path, file = tensors[name]
      try:
        tensor = file.get_tensor(name)
      except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: cannot read tensor {name}: {error}; copy it again") from error
      layout.check_finite(name, tensor, path)
      return tensor

    return config, layout.stack(config, names, read, jax.numpy.dtype(dtype))


def save(
  folder: _Path,
  config: layout.Config,
  params: transformer.Params,
  *,
  tokenizer: tokenizer_lib.Tokenizer | None = None,
) -> None:
  """Writes a folder that `load` and transformers read.

  All files are written to a folder beside it first and moved into place at the end, so that an
  interrupted or failed save leaves the earlier checkpoint. Parameters with "adjacent" rotary pairs
  are reordered to the "half" pairs of the format; the model stays the same function.

  Args:
    folder: absent, empty, or an earlier checkpoint, which is replaced.
    config: the config of `params`.
    params: float32 or bfloat16, fully addressable from this process; stored bit by bit.
    tokenizer: saved beside the weights; its end, start and padding ids go into `config.json`.

  Raises:
    ValueError: `params` do not fit `config`, or `folder` holds files of another kind.
    OSError: the disk is full or read-only.
  """
  folder = pathlib.Path(folder).absolute()
  _check_replaceable(folder)
  dtype = _storage_dtype(params)
  tensors = layout.unstack(config, _names(config), params)
  for name, tensor in tensors.items():
    adjacent = getattr(config, "rope_pairing", None) == "adjacent"
    if adjacent and name.endswith(("q_proj.weight", "k_proj.weight")):
      tensor = np.ascontiguousarray(layout.adjacent_to_half(tensor.T, config.head_dim).T)
    tensors[name] = tensor.astype(jax.numpy.dtype(dtype), copy=False)
  fields = to_config_json(dataclasses.replace(config, param_dtype=dtype), tokenizer=tokenizer)

  folder.parent.mkdir(parents=True, exist_ok=True)
  fresh = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
  try:
    safetensors.numpy.save_file(tensors, fresh / "model.safetensors", metadata={"format": "pt"})
    (fresh / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
      tokenizer.save(fresh)
    # Temporary folders and safetensors files are private; others may read a checkpoint.
    fresh.chmod(0o755)
    for path in fresh.iterdir():
      path.chmod(0o644)
      _sync(path)
    _replace_folder(fresh, folder)
  except safetensors.SafetensorError as error:
    raise OSError(f"cannot write {folder}: {error}; is the disk full?") from error
  finally:
    shutil.rmtree(fresh, ignore_errors=True)


def _storage_dtype(params: transformer.Params) -> _Dtype:
  match layout.common_dtype(params).name:
    case "float32":
      return "float32"
    case "bfloat16":
      return "bfloat16"
    case other:
      raise ValueError(f"params are {other}: convert them to float32 or bfloat16 before saving")


def _check_width(width: int, num_heads: int) -> None:
  if width % num_heads:
    raise ValueError(
      f"hidden_size={width} is not divisible by num_attention_heads={num_heads}, which "
      "transformers refuses: a Hugging Face folder cannot hold this model"
    )


def _number(name: str, value: Any) -> float:
  if not (checks.is_integer(value) or isinstance(value, float)) or not 0 < value < math.inf:
    raise ValueError(f"{name}={value!r} must be a positive number")
  return float(value)


def _rope(fields: Mapping[str, Any]) -> tuple[float, transformer.RopeScaling | None]:
  # In the order of transformers: `rope_scaling` hides `rope_parameters` whole.
  name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
  rope = fields.get(name) or {}
  if not isinstance(rope, dict):
    raise ValueError(f"{name}={rope!r} must be an object such as {{'rope_type': 'default'}}")
  theta = _number("rope_theta", rope.get("rope_theta", fields.get("rope_theta", 1e4)))
  partial = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor"))
  if partial not in (None, 1):
    raise ValueError(
      f"partial_rotary_factor={partial} is not supported: every feature of a head is rotated"
    )
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind == "default":
    return theta, None
  if kind != "llama3":
    raise ValueError(
      f"rope_type={kind!r} is not supported: the decoder knows 'default' and 'llama3'; choose "
      "another checkpoint (dropping the field would change the model)"
    )
  for key in _LLAMA3:
    if key not in rope:
      raise ValueError(f"rope_type 'llama3' needs {key!r} in config.json")
  numbers = {key: _number(f"{name}[{key!r}]", rope[key]) for key in _LLAMA3}
  return theta, transformer.RopeScaling(
    factor=numbers["factor"],
    low_frequency_factor=numbers["low_freq_factor"],
    high_frequency_factor=numbers["high_freq_factor"],
    original_max_length=int(numbers["original_max_position_embeddings"]),
  )


def _names(config: layout.Config) -> layout.Names:
  return t5_files.names(config) if isinstance(config, t5.T5Config) else _NAMES


def _copies(
  config: layout.Config, folder: pathlib.Path, tensors: Mapping[str, tuple[Any, Any]]
) -> set[str]:
  """Returns the stored tensors that are not read, such as copies of the embedding."""
  names = _names(config)
  embedding = names["embed/embedding"]
  copies = {names["head/kernel"]} if config.tied_head else set()
  is_t5 = isinstance(config, t5.T5Config)
  copies.update(t5_files.EMBEDDING_COPIES if is_t5 else ())
  for name in copies & tensors.keys() if embedding in tensors else ():
    copy, original = (tensors[x][1].get_tensor(x) for x in (name, embedding))
    if not np.array_equal(copy, original):
      raise ValueError(
        f"{folder}: config.json makes {name} a copy of {embedding}, from which it differs: if it "
        "is meant, set tie_word_embeddings to false"
      )
  return copies.union(t5_files.UNUSED if is_t5 else ())


def _check_replaceable(folder: pathlib.Path) -> None:
  if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
    raise ValueError(f"{folder} is not a plain folder: choose another place for the checkpoint")
  others = sorted({path.name for path in folder.iterdir()} - _OWN_FILES) if folder.exists() else []
  if others:
    raise ValueError(
      f"{folder} holds other files ({', '.join(others[:3])}), which a save would remove: choose an "
      "empty or new folder"
    )


def _sync(path: pathlib.Path) -> None:
  with open(path, "rb+") as file:  # Windows refuses to sync a file that is open for reading
    os.fsync(file.fileno())


def _replace_folder(fresh: pathlib.Path, folder: pathlib.Path) -> None:
  if not folder.exists():
    fresh.rename(folder)
    return
  # A folder with contents cannot be replaced in one step: move it aside, and back on an error.
  aside = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
  folder.rename(aside / folder.name)
  try:
    fresh.rename(folder)
  except OSError:
    (aside / folder.name).rename(folder)
    raise
  finally:
    shutil.rmtree(aside, ignore_errors=True)
