"""Uploads the exported model of a finished run to the Hugging Face hub.

One commit holds the files of `model/`, the model card as README.md, and the adapters, if there are
any, under `adapter/`. A repository that does not exist yet is made, and is private.
"""

import os
import pathlib
import re
from typing import Any

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def check(config: Any) -> None:
  """Raises `ValueError` before any work if `config.export.hub` cannot be uploaded to."""
  name = _repository(config)
  if not name:
    return
  if not _NAME.fullmatch(name) or ".." in name:
    raise ValueError(f"export.hub={name!r} must be organisation/model, such as 'me/my-model'")
  import huggingface_hub  # takes half a second, and most runs do not need it
  from huggingface_hub import constants

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

  operations = [
    huggingface_hub.CommitOperationAdd(path_in_repo=place, path_or_fileobj=path)
    for place, path in sorted(_files(workdir).items())
  ]
  api = huggingface_hub.HfApi()
  try:
    address = str(api.create_repo(name, private=True, exist_ok=True))
    api.create_commit(name, operations, commit_message="Upload a model trained with bootstrax")
  except Exception as error:  # network, authorisation and quota each have their own classes
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    raise OSError(
      f"the run is finished in {workdir}, but the hub did not take {name!r}: {reason}; repeat the "
      "command to upload again"
    ) from error
  return address


def _repository(config: Any) -> str:
  return str(config.get("export", {}).get("hub", ""))


def _files(workdir: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns the files to upload by their place in the repository."""
  found = {}
  for folder, prefix in (("model", ""), ("adapter", "adapter/")):
    for parent, _, names in os.walk(workdir / folder):
      for path in (pathlib.Path(parent) / name for name in names):
        found[prefix + path.relative_to(workdir / folder).as_posix()] = path
  card = workdir / "model_card.md"
  return found | ({"README.md": card} if card.is_file() else {})
