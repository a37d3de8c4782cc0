"""Reads and writes checkpoints as Hugging Face folders: `config.json` and safetensors.

`load` reads a local folder into the parameters of `transformer` or `t5`; `save` writes one that
`transformers.AutoModelForCausalLM.from_pretrained` opens (for T5 `AutoModelForSeq2SeqLM`).
`families` and `t5_files` have the families that they know. If a checkpoint needs something that the
model here does not compute (experts, quantised weights,
other rotary scalings), `load` raises an error that names it (`config_keys` has the table of keys):
a model that loads computes the function that its authors trained.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
import safetensors

from alignment.models import (
  config_keys,
  families,
  layout,
  t5,
  t5_files,
  transformer,
  weight_files,
)
from alignment.models import tokenizer as tokenizer_lib

_Path = str | os.PathLike[str]
_Dtype = Literal["float32", "bfloat16"]

_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$")
# `save` replaces a folder that holds nothing but these.
_OWN_FILES = {
  "config.json",
  "generation_config.json",
  "model.safetensors",
  "model.safetensors.index.json",
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
  name = fields.get("model_type")
  if fields.get("quantization_config"):
    raise ValueError(
      f"quantization_config={fields['quantization_config']!r} is not supported: the models here "
      "have float weights; choose a checkpoint without"
    )
  if name == t5_files.MODEL_TYPE:
    return t5_files.from_config_json(fields)
  if not isinstance(name, str) or name not in families.FAMILIES:
    raise ValueError(
      f"model_type {name!r} is not supported: choose a checkpoint of one of "
      f"{', '.join((*families.FAMILIES, t5_files.MODEL_TYPE))}"
    )
  family = families.FAMILIES[name]
  config_keys.check(fields, honoured=family.keys, inert=family.inert, neutral=family.neutral)
  return family.read(fields)


def to_config_json(
  config: layout.Config, *, tokenizer: tokenizer_lib.Tokenizer | None = None
) -> dict[str, Any]:
  """Returns the fields of a `config.json` for transformers 4 and 5; ids come from `tokenizer`.

  Raises:
    ValueError: no family of models has these choices, or an id lies outside `config.vocab_size`.
  """
  if isinstance(config, t5.T5Config):
    written = t5_files.to_config_json(config)
  else:
    name = families.family_of(config)
    family = families.FAMILIES[name]
    written = {"architectures": [family.architecture], "model_type": name, **family.write(config)}
  if tokenizer is not None:
    for index in (*tokenizer.eos_ids, tokenizer.pad_id, tokenizer.bos_id or 0):
      if index >= config.vocab_size:
        raise ValueError(
          f"tokenizer has the special id {index}, but the model {config.vocab_size} embeddings: "
          "they belong to different models"
        )
  return written | (tokenizer.ids() if tokenizer else dict.fromkeys(_TOKEN_IDS))


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
    fields = weight_files.read_json(folder / "config.json")
    config = from_config_json(fields)
  except ValueError as error:
    raise ValueError(f"{folder / 'config.json'}: {error}") from error
  stored = _tensors(config, fields)
  with contextlib.ExitStack() as stack:
    tensors = weight_files.open_tensors(folder, stack)
    # Old releases store these buffers, which follow from the config.
    tensors = {name: place for name, place in tensors.items() if not _BUFFERS.search(name)}
    prefix = stored.optional_prefix
    if any(name.startswith(prefix) for name in tensors):
      prefix = ""
    tensors = {prefix + name: place for name, place in tensors.items()}
    found = set(tensors) - _copies(config, stored, folder, tensors)
    layout.check_names(config, stored, found, folder)
    kinds = set()
    for name, shape in layout.stored_shapes(config, stored).items():
      path, file = tensors[name]
      view = file.get_slice(name.removeprefix(prefix))
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
        tensor = file.get_tensor(name.removeprefix(prefix))
      except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: cannot read tensor {name}: {error}; copy it again") from error
      layout.check_finite(name, tensor, path)
      return tensor

    return config, layout.stack(config, stored, read, jax.numpy.dtype(dtype))


def save(
  folder: _Path,
  config: layout.Config,
  params: transformer.Params,
  *,
  tokenizer: tokenizer_lib.Tokenizer | None = None,
  shard_bytes: int = 5 * 10**9,
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
    shard_bytes: weights are cut into files of at most that many bytes, with an index; a model that
      fits is one file.

  Raises:
    ValueError: `params` do not fit `config`, or `folder` holds files of another kind.
    OSError: the disk is full or read-only.
  """
  folder = pathlib.Path(folder).absolute()
  _check_replaceable(folder)
  dtype = _storage_dtype(params)
  fields = to_config_json(dataclasses.replace(config, param_dtype=dtype), tokenizer=tokenizer)
  layout.check_params(config, params)
  if isinstance(config, transformer.TransformerConfig):
    params = layout.with_half_pairs(config, params)
  stored = _tensors(config, fields)
  tensors = {
    name: tensor.astype(jax.numpy.dtype(dtype), copy=False)
    for name, tensor in layout.unstack(config, stored, params).items()
  }

  folder.parent.mkdir(parents=True, exist_ok=True)
  fresh = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
  try:
    weight_files.save_tensors(fresh, tensors, shard_bytes)
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


def _tensors(config: layout.Config, fields: Mapping[str, Any]) -> layout.Tensors:
  if isinstance(config, t5.T5Config):
    return layout.Tensors(t5_files.names(config))
  return families.FAMILIES[fields["model_type"]].tensors


def _copies(
  config: layout.Config,
  stored: layout.Tensors,
  folder: pathlib.Path,
  tensors: Mapping[str, tuple[Any, Any]],
) -> set[str]:
  """Returns the stored tensors that are not read, such as copies of the embedding."""
  embedding = stored.names["embed/embedding"]
  copies = {stored.names["head/kernel"]} if config.tied_head else set()
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
  names = {path.name for path in folder.iterdir()} if folder.exists() else set()
  others = sorted(name for name in names - _OWN_FILES if not weight_files.SHARD.fullmatch(name))
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
