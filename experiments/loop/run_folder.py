"""The folder of a run: which config owns it, and on which machine it ran.

config.json        the config, written first        checkpoints/   states, written by Orbax
environment.json   versions, devices, command       results.json   final numbers of a finished run
metrics.jsonl      all records of the run           figures/, report.html, model/, tensorboard/
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import ml_collections

from experiments import files

try:
  import fcntl
except ImportError:  # Windows
  fcntl = None  # type: ignore[assignment]

# A later command may change these fields: where arrays and the finished model go changes no result.
CHANGEABLE = ("export.", "sharding.")

# Fields that were added later, with the value that does what runs without the field did.
ADDED: dict[str, Any] = {
  "data.features": "file",
  "data.length_buckets": 1,
  "eval.judges": "",
  "eval.num_fewshot": 0,
  "eval.task_limit": 0,
  "eval.tasks": "",
  "export.hub": "",
  "network.lora_alpha": 32.0,
  "network.lora_base": "full",
  "network.lora_rank": 0,
  "network.lora_targets": "all",
  "network.scan_layers": True,
  "optimizer.decay_all": True,
  "optimizer.warmup_from": 0,
}

_PACKAGES = (
  "bootstrax", "jax", "jaxlib", "flax", "optax", "chex", "orbax-checkpoint", "numpy", "grain",
  "open-spiel", "transformers", "tokenizers",
)  # fmt: skip


def claim(config: ml_collections.ConfigDict, folder: pathlib.Path) -> pathlib.Path:
  """Claims a folder for the run of a config.

  A new folder is made and gets `config.json`. A folder with the same config is used as it is. If
  its config differs but no step was recorded yet, nothing can be lost, and the new config replaces
  the old one.

  Returns:
    The folder.

  Raises:
    ValueError: the folder holds a run of a different config (the message lists the differences), or
      files that do not belong to a run.
    OSError: the folder cannot be written.
  """
  folder = pathlib.Path(folder)
  path = folder / "config.json"
  text = json.dumps(config.to_dict(), indent=2, default=list) + "\n"
  if folder.exists() and not folder.is_dir():
    raise ValueError(f"--workdir={folder} is a file: name a folder")
  if not path.exists():
    if folder.exists() and any(folder.iterdir()):
      raise ValueError(
        f"--workdir={folder} is not empty and holds no run (no config.json): name a new or empty "
        "folder. Nothing was changed."
      )
    try:
      folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise OSError(
        f"cannot make --workdir={folder}: {error.strerror or error}. Name a folder that you may "
        "write, on a disk with free space."
      ) from error
    files.write_file(path, text)
    return folder
  old, new = files.flatten(read_config(folder).to_dict()), files.flatten(json.loads(text))
  saved, old = old, {**{name: value for name, value in ADDED.items() if name in new}, **old}
  differences = [
    f"  {name}: {old.get(name, '(absent)')!r} -> {new.get(name, '(absent)')!r}"
    for name in sorted(old.keys() | new.keys())
    if old.get(name) != new.get(name) and not name.startswith(CHANGEABLE)
  ]
  if differences and (_holds(folder, "metrics.jsonl") or _holds(folder, "checkpoints")):
    added = [name for name in new if name not in old]
    raise ValueError(
      f"--workdir={folder} holds a run of a different config (its value -> yours):\n"
      + "\n".join(differences)
      + (
        f"\nThat run is older than {', '.join(added)}: finish it with the version that "
        "environment.json names."
        if added
        else ""
      )
      + "\nTo continue that run, repeat its command. To start another, name a new folder. "
      "Nothing was changed."
    )
  if saved != new:
    files.write_file(path, text)
  return folder


@contextlib.contextmanager
def hold(config: ml_collections.ConfigDict, folder: pathlib.Path) -> Iterator[None]:
  """Claims a folder, and keeps other processes of this machine from training in it meanwhile.

  The system releases the folder when the process ends, however it ends. File systems and platforms
  without locks (Windows) are used without one.

  Raises:
    ValueError: another process trains in the folder; otherwise as `claim`.
    OSError: as `claim`.
  """
  folder = pathlib.Path(folder)
  with contextlib.ExitStack() as stack:
    existed = folder.is_dir()
    if existed:
      _lock(folder, stack)
    claim(config, folder)
    if not existed:
      _lock(folder, stack)
    yield


def _lock(folder: pathlib.Path, stack: contextlib.ExitStack) -> None:
  if fcntl is None:
    return
  handle = os.open(folder, os.O_RDONLY)
  stack.callback(os.close, handle)
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    raise ValueError(
      f"--workdir={folder} is in use: another process trains in it. Wait for that process or stop "
      "it, or name another folder. Nothing was changed."
    ) from error
  except OSError:
    pass  # a network file system that knows no locks


def read_config(folder: pathlib.Path) -> ml_collections.ConfigDict:
  """Returns the config of the run in a folder.

  Raises:
    FileNotFoundError: the folder holds no run.
    ValueError: the file is not JSON, or not a config.
  """
  path = pathlib.Path(folder) / "config.json"
  if not path.exists():
    raise FileNotFoundError(f"--workdir={folder} holds no run: there is no {path}")
  try:
    config = ml_collections.ConfigDict(json.loads(path.read_text(encoding="utf-8")))
    if not isinstance(config.paper, str):
      raise TypeError(f"paper must be a name, got {config.paper!r}")
  except files.DAMAGED as error:
    raise ValueError(
      f"{path} is damaged ({type(error).__name__}: {error}): restore it from a backup, or start a "
      "new run in another folder"
    ) from error
  return config


def environment() -> dict[str, Any]:
  """Returns time, command, versions, devices, host and commit, so that a run can be repeated."""
  import jax

  versions = {"python": platform.python_version()}
  for name in _PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  devices = jax.devices()
  return {
    "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "command": shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]),
    "versions": versions,
    "devices": f"{len(devices)} x {devices[0].device_kind}",
    "processes": jax.process_count(),
    "host_cores": len(os.sched_getaffinity(0))
    if hasattr(os, "sched_getaffinity")
    else (os.cpu_count()),
    "host": f"{platform.system()} {platform.machine()}",
    "commit": _commit(),
  }


def _commit() -> str:
  """Returns the git commit of the source, followed by `+` if files differ; empty if unknown."""
  root = pathlib.Path(__file__).resolve().parents[2]
  if not (root / ".git").exists():
    return ""  # an installed wheel, which may lie inside another project's repository
  commands = (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
  try:
    head, changes = (
      subprocess.run(
        ["git", "-C", str(root), *command], capture_output=True, text=True, timeout=10, check=True
      ).stdout.strip()
      for command in commands
    )
  except (OSError, subprocess.SubprocessError):
    return ""
  return head + ("+" if changes else "")


def _holds(folder: pathlib.Path, name: str) -> bool:
  path = folder / name
  return any(path.iterdir()) if path.is_dir() else path.exists() and path.stat().st_size > 0
