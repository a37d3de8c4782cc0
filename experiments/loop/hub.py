"""Uploads the exported model of a finished run to the Hugging Face hub.

One commit holds the files of `model/`, the model card as README.md, and the adapters, if there are
any, under `adapter/`. A repository that does not exist yet is made, and is private.
"""

import os
import pathlib
from typing import Any

from experiments import files


def check(config: Any, num_hosts: int = 1) -> None:
  """Raises `ValueError` before any work if `config.export.hub` cannot be uploaded to."""
  name = _repository(config)
  if not name:
    return
  if num_hosts > 1:
    raise ValueError(
      f"export.hub={name!r} uploads from one host, and this run has {num_hosts}: leave it out, and "
      f"upload with `hf upload {name} WORKDIR/model`"
    )
  import huggingface_hub  # takes half a second, and most runs do not need it
  from huggingface_hub import constants, utils

  try:
    utils.validate_repo_id(name)
    valid = name.count("/") == 1
  except utils.HFValidationError:
    valid = False
  if not valid:
    raise ValueError(
      f"export.hub={name!r} must be organisation/model, such as 'me/my-model': letters, digits, "
      "'-', '_' and '.', at most 96 of them"
    )
  if constants.HF_HUB_OFFLINE:
    raise ValueError(
      f"export.hub={name!r} needs the network, and HF_HUB_OFFLINE is set: leave one of them out"
    )
  if huggingface_hub.get_token() is None:
    raise ValueError(
      f"export.hub={name!r} needs an account that may write there: run `hf auth login`, or set "
      "HF_TOKEN"
    )


def upload(config: Any, workdir: pathlib.Path) -> str:
  """Uploads what a finished run exported; returns the address, or "" where none is asked for.

  Raises:
    OSError: the hub did not take it. The run is finished all the same, and the same command tries
      again.
  """
  name = _repository(config)
  if not name:
    return ""
  import huggingface_hub

  found = _files(workdir)
  if "config.json" not in found:
    raise OSError(f"{workdir / 'model'} has no config.json, so nothing was uploaded to {name!r}")
  api = huggingface_hub.HfApi()
  try:
    operations = [
      huggingface_hub.CommitOperationAdd(path_in_repo=place, path_or_fileobj=path)
      for place, path in sorted(found.items())
    ]
    address = str(api.create_repo(name, private=True, exist_ok=True))
    api.create_commit(name, operations, commit_message="Upload a model trained with bootstrax")
  except Exception as error:  # network, authorisation and quota each have their own classes
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    raise OSError(
      f"the run is finished in {workdir}, but the hub did not take {name!r}: {reason}; repeat the "
      "command to upload again"
    ) from error
  return address


def _repository(config: Any) -> str:
  return str(files.flatten(config.to_dict()).get("export.hub") or "")


def _files(workdir: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns the files to upload by their place in the repository."""
  found = {}
  for folder, prefix in (("model", ""), ("adapter", "adapter/")):
    for parent, _, names in os.walk(workdir / folder, followlinks=True):
      for path in (pathlib.Path(parent) / name for name in names):
        found[prefix + path.relative_to(workdir / folder).as_posix()] = path
  card = workdir / "model_card.md"
  return found | ({"README.md": card} if card.is_file() else {})
