"""Low-rank adapters as files in the layout of PEFT: `adapter_config.json` and safetensors.

A folder that `save` writes loads with `PeftModel.from_pretrained(base, folder)`, where the base is
a Hugging Face folder. `load` reads what PEFT has written for such a base. A key
of `adapter_config.json` that would change the function and is not honoured here is an error that
names it. Factors are stored as torch stores linear layers, `[r, in]` and `[out, r]`:

  base_model.model.model.layers.N.self_attn.q_proj.lora_A.weight
  base_model.model.model.layers.N.self_attn.q_proj.lora_B.weight
"""

import json
import math
import os
import pathlib
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

import sharding
from alignment.models import (
  architectures,
  families,
  family_parts,
  layout,
  lora,
  t5,
  t5_files,
  weight_files,
)
from sharding import checks

CONFIG_FILE, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_LETTERS = {lora.A: "A", lora.B: "B"}
# Keys of `adapter_config.json` that are read. The tensors say which layers are adapted.
_READ = {"lora_alpha", "peft_type", "r", "target_modules", "use_rslora"}
# Keys that change nothing once the adapters are trained. Any other key must be empty or False.
_INERT = {
  "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "lora_dropout",
  "megatron_core", "peft_version", "qalora_group_size", "revision", "task_type",
}  # fmt: skip


def save(
  folder: str | os.PathLike[str],
  config: architectures.Config,
  adapters: Any,
  *,
  adapter_config: lora.Config,
  base: str,
  fingerprint: str = "",
) -> None:
  """Writes adapters for PEFT; an earlier adapter in the folder is replaced.

  Args:
    folder: created if it is absent.
    config: of the base. Adapters of "adjacent" rotary pairs are reordered to the "half" pairs of
      the format, as `huggingface.save` reorders the base.
    adapters: of the model, from `lora.init`, fully addressable from this process.
    adapter_config: the one that `lora.init` got.
    base: name or folder of the base, by which PEFT finds it.
    fingerprint: of the weights of the base, which `load` compares.

  Raises:
    ValueError: the layout has no place for a matrix, or the adapters have another shape.
    OSError: the disk is full or read-only.
  """
  stems, found = _stems(config), {}
  for path, leaf in zip(sharding.tree_paths(adapters), jax.tree.leaves(adapters), strict=True):
    module, _, factor = path.rpartition("/")
    if module not in stems:
      raise ValueError(f"PEFT's layout of this base has no place for {path}: use merged weights")
    found[module, factor] = np.asarray(leaf, np.float32)
  modules = sorted({module for module, _ in found})
  tensors = {}
  for module, factor, shape in _factors(config, adapter_config.rank, modules):
    array = found[module, factor]
    layout.check_shape(f"{module}/{factor}", array.shape, shape, "adapters")
    if _is_reordered(config, module, factor):
      array = layout.adjacent_to_half(array, config.head_dim)
    for layer in range(shape[0]):
      tensors[_name(stems[module], layer, factor)] = np.ascontiguousarray(array[layer].T)
  fields = {
    "peft_type": "LORA",
    "task_type": "SEQ_2_SEQ_LM" if isinstance(config, t5.T5Config) else "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": adapter_config.rank,
    "lora_alpha": adapter_config.alpha,
    "lora_dropout": 0.0,
    "target_modules": sorted(stems[module].rpartition(".")[2] for module in modules),
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "modules_to_save": None,
    "use_dora": False,
    "use_rslora": False,
  }
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  # Remove the config first: an interrupted save then leaves no adapter rather than a mixed one.
  (folder / CONFIG_FILE).unlink(missing_ok=True)
  partial = folder / f".{_WEIGHTS}.tmp"
  try:
    metadata = {"format": "pt", "base_fingerprint": fingerprint}
    safetensors.numpy.save_file(tensors, partial, metadata=metadata)
  except safetensors.SafetensorError as error:
    raise OSError(f"cannot write {folder}: {error}; is the disk full?") from error
  partial.chmod(0o644)  # the library makes it private; others may read a model
  os.replace(partial, folder / _WEIGHTS)
  (folder / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def load(
  folder: str | os.PathLike[str],
  config: architectures.Config,
  *,
  fingerprint: str = "",
) -> tuple[lora.Config, Any]:
  """Reads adapters: their config, and the tree that `lora.join` takes, on the host.

  Args:
    folder: written by `save` or by PEFT.
    config: of the base.
    fingerprint: of the weights of the base; empty to compare names and shapes alone.

  Raises:
    ValueError: a file is missing or damaged, a key asks for what is not computed here, or the
      adapters were made for another base.
  """
  folder = pathlib.Path(folder)
  rank, alpha = _read_config(folder)
  path = folder / _WEIGHTS
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      trained_on = (file.metadata() or {}).get("base_fingerprint", "")
      tensors = {name: file.get_tensor(name) for name in file.keys()}
  except (safetensors.SafetensorError, OSError, TypeError) as error:
    raise ValueError(f"{path} is missing or damaged ({error}): copy it again") from error
  if fingerprint and trained_on and fingerprint != trained_on:
    raise ValueError(
      f"{folder} is an adapter of another base: its weights had the fingerprint "
      f"{trained_on[:12]}, and these have {fingerprint[:12]}"
    )
  stems = _stems(config)
  module_of = {
    _name(stem, layer, factor): module
    for module, stem in stems.items()
    for factor in _LETTERS
    for layer in range(layout.shapes(config)[f"{module}/kernel"][0])
  }
  unknown = sorted(tensors.keys() - module_of.keys())
  if unknown:
    raise ValueError(
      f"{path} has the tensor {unknown[0]}, which this base of {config.num_layers} layers does not "
      "take: it is an adapter of another base, or of a kind that is not supported"
    )
  modules = sorted({module_of[name] for name in tensors})
  adapters: dict[str, Any] = {}
  for module, factor, shape in _factors(config, rank, modules):
    array = np.empty(shape, np.float32)
    for layer in range(shape[0]):
      name = _name(stems[module], layer, factor)
      if name not in tensors:
        raise ValueError(f"{path} lacks {name}: each layer needs its own, so it is incomplete")
      layout.check_shape(name, tensors[name].shape, shape[:0:-1], path)
      layout.check_finite(name, tensors[name], path)
      array[layer] = tensors[name].T
    if _is_reordered(config, module, factor):
      order = layout.adjacent_to_half(np.arange(shape[-1]), config.head_dim)
      array = array[..., np.argsort(order)]
    place = adapters
    for part in module.split("/"):
      place = place.setdefault(part, {})
    place[factor] = array
  targets = tuple(sorted({module.rpartition("/")[2] for module in modules}))
  return lora.Config(rank=rank, alpha=alpha, targets=targets), adapters


def base_of(folder: str | os.PathLike[str]) -> str:
  """Returns the name or folder of the base for which an adapter was made."""
  path = pathlib.Path(folder) / CONFIG_FILE
  try:
    base = weight_files.read_json(path).get("base_model_name_or_path")
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  if not isinstance(base, str) or not base:
    raise ValueError(f"{folder}: {CONFIG_FILE} names no base_model_name_or_path: write it there")
  return base


def _read_config(folder: pathlib.Path) -> tuple[int, float]:
  """Returns rank and alpha."""
  path = folder / CONFIG_FILE
  if not path.is_file():
    raise ValueError(f"{folder} has no {CONFIG_FILE}: give the folder of an adapter")
  try:
    fields = weight_files.read_json(path)
    if fields.get("peft_type") != "LORA":
      raise ValueError(f"peft_type={fields.get('peft_type')!r} is not supported: it must be 'LORA'")
    for key, value in fields.items():
      plain = value in (None, False, "none", [], {})
      if key == "init_lora_weights":  # the others change the base as well
        plain = value in (True, False, "gaussian")
      if not plain and key not in _READ | _INERT:
        raise ValueError(f"{key}={value!r} is not supported: merge the adapter with peft")
    rank: Any = fields.get("r")
    alpha = fields.get("lora_alpha", 8)  # PEFT's default
    checks.count("r", rank)
    alpha = family_parts.number("lora_alpha", alpha)
    by_root = family_parts.flag("use_rslora", fields.get("use_rslora"))
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  return rank, alpha * (math.sqrt(rank) if by_root else 1.0)


def _stems(config: architectures.Config) -> dict[str, str]:
  """Returns what the matrices of the layers are called in a checkpoint, by our name.

  Without those that share a tensor with others, or stand the other way round: an adapter of ours
  is none of theirs.
  """
  if isinstance(config, t5.T5Config):
    tensors = layout.Tensors(t5_files.names(config))
  else:
    tensors = families.FAMILIES[families.family_of(config)].tensors
  if not tensors.transposed:
    return {}
  shapes = layout.shapes(config)
  stored = [tensors.names[path] for path in shapes if path.endswith("/kernel")]
  return {
    path.removesuffix("/kernel"): name.removesuffix(".weight")
    for path, name in tensors.names.items()
    if path in shapes and "layers/" in path and path.endswith("/kernel") and stored.count(name) == 1
  }


def _name(stem: str, layer: int, factor: str) -> str:
  return f"base_model.model.{stem.format(layer)}.lora_{_LETTERS[factor]}.weight"


def _factors(
  config: architectures.Config, rank: int, modules: list[str]
) -> list[tuple[str, str, tuple[int, ...]]]:
  """Returns (module, factor, shape) of all factors of the modules."""
  found: list[tuple[str, str, tuple[int, ...]]] = []
  for module in modules:
    layers, rows, columns = layout.shapes(config)[f"{module}/kernel"]
    found.append((module, lora.A, (layers, rows, rank)))
    found.append((module, lora.B, (layers, rank, columns)))
  return found


def _is_reordered(config: architectures.Config, module: str, factor: str) -> bool:
  """Whether the columns of a factor are those of rotated heads in another order than stored."""
  rotated = module.endswith(("attention/query", "attention/key")) and factor == lora.B
  return rotated and getattr(config, "rope_pairing", "half") == "adjacent"
