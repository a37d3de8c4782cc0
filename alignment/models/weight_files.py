"""The safetensors files of a Hugging Face folder: one, or several with an index."""

import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import safetensors


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
