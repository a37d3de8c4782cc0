"""Paths that a user gives; files that are replaced as a whole, so that none is half read; JSON."""

import contextlib
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

# An address such as gs://bucket/folder, alone or behind the kind of a source.
_ADDRESS = re.compile(r"(?:^|:)([A-Za-z][A-Za-z0-9+.-]+)://")


def local_path(option: str, value: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the path that an option names; `~` and `~NAME` are home folders.

  Every path of the command line, of a config and of an environment variable is read here.

  Args:
    option: its name, for errors, such as `--workdir`.
    value: what the user gave.

  Raises:
    ValueError: the value is an address such as `gs://bucket/folder`, or `~NAME` names nobody.

  Example:
    >>> local_path("--workdir", "~/runs") == pathlib.Path.home() / "runs"
    True
    >>> local_path("--workdir", "gs://bucket/run")
    Traceback (most recent call last):
      ...
    ValueError: --workdir=gs://bucket/run is an address of gs://, which is not read: mount it \
(gcsfuse, s3fs, rclone mount) or copy it, and give a path of this machine
  """
  check_local(option, os.fspath(value))
  try:
    return pathlib.Path(value).expanduser()
  except RuntimeError as error:
    raise ValueError(f"{option}={value}: {error} Give the whole path") from error


def check_local(option: str, value: str) -> None:
  """Raises `ValueError` if a path, or the file behind the kind of a source, is an address."""
  found = _ADDRESS.search(value)
  if found:
    raise ValueError(
      f"{option}={value} is an address of {found[1]}://, which is not read: mount it (gcsfuse, "
      "s3fs, rclone mount) or copy it, and give a path of this machine"
    )


def write_file(path: pathlib.Path, data: str | bytes) -> None:
  """Replaces a file as a whole: a full disk or a killed process leaves the old contents.

  Raises:
    OSError: the file cannot be written; the message names it and the remedy.
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
  """Returns an error whose message names the file that could not be written and the remedy."""
  return OSError(
    f"cannot write {path}: {error.strerror or error}. The earlier contents are untouched. Free "
    "some space or make the folder writable, then run the same command to continue."
  )


def write_json(path: pathlib.Path, data: Any) -> None:
  """Replaces a JSON file as a whole; errors are those of `write_file`."""
  write_file(path, json.dumps(data, indent=2) + "\n")


# What reading JSON of an unexpected shape can raise; deep nesting is a RecursionError.
DAMAGED = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)


def read_json(path: pathlib.Path, parse: Callable[[Any], Any], *, otherwise: str) -> Any:
  """Returns `parse(contents)` of a JSON file, or None if it is absent or damaged.

  A damaged file is named on stderr: one that is not JSON, or that `parse` does not understand.

  Args:
    path: the file.
    parse: turns the contents into what the caller needs; raises one of `DAMAGED` if they have
      another shape.
    otherwise: what happens without the file, to complete the message.
  """
  try:
    return parse(json.loads(path.read_text(encoding="utf-8")))
  except OSError:
    return None
  except DAMAGED as error:
    print(f"{path} is damaged ({type(error).__name__}: {error}): {otherwise}", file=sys.stderr)
    return None


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns the fields of a nested config under their dotted names.

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
