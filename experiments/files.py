"""Files that are written whole or not at all, and the JSON in them."""

import contextlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any


def write_file(path: pathlib.Path, data: str | bytes) -> None:
  """Writes a file whole or not at all: a full disk or a kill leaves the old one.

  Raises:
    OSError: if it cannot be written; the message names the file and the remedy.
  """
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    os.replace(temporary, path)
  except OSError as error:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    raise write_error(path, error) from error


def write_error(path: pathlib.Path, error: OSError) -> OSError:
  """Returns the error that says which file could not be written, and what to do."""
  return OSError(
    f"cannot write {path}: {error.strerror or error}. What was there before is untouched: free "
    "some space or make the folder writable, then run the same command to continue."
  )


def write_json(path: pathlib.Path, data: Any) -> None:
  """Writes JSON whole or not at all."""
  write_file(path, json.dumps(data, indent=2) + "\n")


def read_json(path: pathlib.Path) -> Any:
  """Returns the JSON in a file, or None where there is none or it cannot be read."""
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return None


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns the fields of a nested config by dotted name.

  Example:
    >>> flatten({"seed": 0, "train": {"num_steps": 5}})
    {'seed': 0, 'train.num_steps': 5}
  """
  flat: dict[str, Any] = {}
  for name, value in config.items():
    if isinstance(value, Mapping) and value:
      flat.update(flatten(value, f"{prefix}{name}."))
    else:
      flat[prefix + name] = value
  return flat
