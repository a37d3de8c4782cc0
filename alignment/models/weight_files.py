"""The safetensors files of a Hugging Face folder: one, or several with an index."""

import contextlib
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

# Names of the files of a model that is cut into several.
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Returns a JSON object; raises `ValueError` if the file holds anything else."""
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"not JSON ({error}); is it cut short? Copy it again") from error
  if not isinstance(value, dict):
    raise ValueError(f"expected a JSON object, found {type(value).__name__}")
  return value


def open_tensors(folder: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, tuple[Any, Any]]:
  """Returns (path, open file) by tensor name; the files close with `stack`."""
  tensors = {}
  for path, wanted in _files(folder):
    try:
      file = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
    except (safetensors.SafetensorError, OSError) as error:
      raise ValueError(
        f"{path} ({path.stat().st_size} bytes) is truncated or not a safetensors file: {error}; "
        "copy it again"
      ) from error
    names = set(file.keys())
    if wanted is not None and not wanted <= names:
      raise ValueError(f"{path} lacks {sorted(wanted - names)[0]}, which the index places there")
    tensors.update({name: (path, file) for name in names})
  return tensors


def save_tensors(folder: pathlib.Path, tensors: Mapping[str, np.ndarray], shard_bytes: int) -> None:
  """Writes one file, or several of at most `shard_bytes` (or one tensor) with their index."""
  shards: list[dict[str, np.ndarray]] = [{}]
  room = shard_bytes
  for name, tensor in tensors.items():
    if shards[-1] and tensor.nbytes > room:
      shards.append({})
      room = shard_bytes
    shards[-1][name] = tensor
    room -= tensor.nbytes
  files = {"model.safetensors": shards[0]}
  if len(shards) > 1:
    files = {
      f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)
    }
    size = sum(tensor.nbytes for tensor in tensors.values())
    places = {name: file for file, shard in files.items() for name in shard}
    index = {"metadata": {"total_size": size}, "weight_map": places}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
  for file, shard in files.items():
    safetensors.numpy.save_file(shard, folder / file, metadata={"format": "pt"})


def _files(folder: pathlib.Path) -> Iterator[tuple[pathlib.Path, set[str] | None]]:
  """Yields each weight file with the names that an index promises in it (None without an index)."""
  single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
  if single.is_file():
    yield single, None
    return
  if not index.is_file():
    raise ValueError(
      f"{folder} has neither model.safetensors nor model.safetensors.index.json; write them with "
      "transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)"
    )
  try:
    places = read_json(index)["weight_map"].items()
  except (ValueError, KeyError, AttributeError) as error:
    raise ValueError(f"{index} has no readable weight_map: {error}; copy it again") from error
  shards: dict[str, set[str]] = {}
  for name, shard in places:
    shards.setdefault(shard, set()).add(name)
  for shard, names in shards.items():
    path = folder / shard
    if pathlib.Path(shard).name != shard or not path.is_file():
      raise ValueError(f"{index} names the file {shard!r}, which is not in {folder}: copy it again")
    yield path, names
