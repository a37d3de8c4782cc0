"""Configs of runs: presets found by name, overrides from the command line, and checks.

A config module defines `get_config(preset) -> ConfigDict` and `PRESETS`, a dictionary from the name
of a preset to (description, expected time, expected result). The modules of `experiments/configs`
are found by the name of their paper. A file of the user's own needs only `get_config`. Importing
this module does not import JAX, so that `--help` and `--list` answer at once.
"""

import ast
import difflib
import importlib
import importlib.util
import inspect
import pathlib
import pkgutil
import re
import sys
from collections.abc import Iterable
from typing import Any

import ml_collections

from experiments import configs, files
from experiments.loop import run_folder

# Fields that are True or False in every section that has them.
_SWITCHES = (
  "antialias", "baselines", "binarise", "decay_all", "double", "from_files", "frozen", "remat",
  "rescale", "scan_layers", "standardise_weights", "truncate", "validate", "zero_scale",
)  # fmt: skip
# The least value of the integer fields that the loop reads. An interval of 0 steps means never.
_LEAST = {
  "train.num_steps": 1,
  "train.log_every": 1,
  "eval.every": 0,
  "checkpoint.every": 0,
  "checkpoint.keep": 1,
}
# Fields that name a file or a folder, or may do so.
_PATHS = (
  "cache", "demonstrations", "directory", "folders", "game", "init_from", "judges", "model",
  "preference", "preferences", "prompts", "reward", "scored", "source", "tasks",
)  # fmt: skip
# Sources whose libraries bring file systems of their own.
_LIBRARIES = ("tfds:", "hf:")
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def papers() -> dict[str, Any]:
  """Returns the modules of `experiments/configs` that have presets, by the name of their paper."""
  found = {}
  for info in pkgutil.iter_modules(configs.__path__):
    module = importlib.import_module(f"{configs.__name__}.{info.name}")
    if hasattr(module, "PRESETS"):
      found[info.name] = module
  return found


def listing() -> str:
  """Returns the text of `--list`."""
  rows = [("config", "time", "what it is", "expected result")]
  for paper, module in papers().items():
    for preset, (description, time, expected) in module.PRESETS.items():
      rows.append((f"{paper}:{preset}", time, description, expected))
  widths = [max(len(row[column]) for row in rows) for column in range(3)]
  lines = ["  ".join((*map(str.ljust, row[:3], widths), row[3])) for row in rows]
  return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def resolve(text: str) -> ml_collections.ConfigDict:
  """Returns the config that the value of `--config` names.

  Args:
    text: `paper`, `paper:preset`, `path.py` or `path.py:preset`.

  Raises:
    ValueError: the paper or preset is unknown (the message lists the known ones), or `get_config`
      does not return a config.
    FileNotFoundError: the file does not exist.
  """
  path, colon, preset = text.rpartition(":")
  # The drive of a Windows path is followed by a colon, which separates no preset.
  if not colon or preset.endswith(".py"):
    path, preset = text, ""
  if path.endswith(".py"):
    module = _load_file(files.local_path("--config", path))
  else:
    modules = papers()
    if path not in modules:
      raise ValueError(f"--config={text}: no paper {path!r}; {_choices(path, modules)}")
    module = modules[path]
  known = getattr(module, "PRESETS", None)
  if preset and known is not None and preset not in known:
    raise ValueError(f"--config={text}: no preset {preset!r} of {path}; {_choices(preset, known)}")
  if preset and not inspect.signature(module.get_config).parameters:
    raise ValueError(f"--config={text}: get_config() of {path} takes no preset")
  config = module.get_config(preset) if preset else module.get_config()
  if not isinstance(config, ml_collections.ConfigDict) or "paper" not in config:
    raise ValueError(
      f"--config={text}: get_config() must return an ml_collections.ConfigDict with a field `paper`"
    )
  return config


def _load_file(path: pathlib.Path) -> Any:
  if not path.is_file():
    raise FileNotFoundError(f"--config={path}: the file does not exist")
  spec = importlib.util.spec_from_file_location(f"bootstrax_config_{path.stem}", path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise ValueError(f"--config={path}: the file defines no get_config(preset)")
  return module


def from_workdir(folder: str) -> ml_collections.ConfigDict:
  """Returns the config of the run in `folder`; errors are those of `run_folder.read_config`."""
  return run_folder.read_config(files.local_path("--workdir", folder))


def completed(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Returns the config of an old run with the fields that its preset has got since, for evaluation.

  They are named on stderr. A config whose preset is not known is returned as it is.
  """
  try:
    full = files.flatten(resolve(f"{config.paper}:{config.get('preset')}").to_dict())
  except ValueError:
    return config
  saved = files.flatten(config.to_dict())
  missing = {
    name: run_folder.ADDED.get(name, value) for name, value in full.items() if name not in saved
  }
  if not missing:
    return config
  listed = [
    f"{name}={value}"
    for name, value in missing.items()
    if not name.startswith(run_folder.CHANGEABLE)
  ]
  if listed:
    print(f"the run is older than these fields of its preset: {', '.join(listed)}", file=sys.stderr)
  data = config.to_dict()
  for name, value in missing.items():
    *sections, last = name.split(".")
    section = data
    for part in sections:
      section = section.setdefault(part, {})
    section[last] = value
  return ml_collections.ConfigDict(data)


def module_of(config: Any) -> Any:
  """Returns the module that runs a config: a packaged paper or study, or one of the user's own.

  It is named by `config.paper`; a preset that is a study of its paper names the study in
  `config.runner`.

  Raises:
    ValueError: if there is no such module.
  """
  name = config.get("runner") or config.paper
  full = name
  for package in ("experiments.papers", "experiments.studies"):
    if importlib.util.find_spec(f"{package}.{name.partition('.')[0]}") is not None:
      full = f"{package}.{name}"
  try:
    return importlib.import_module(full)
  except ModuleNotFoundError as error:
    if error.name is None or not f"{full}.".startswith(f"{error.name}."):
      raise  # a module that this one imports
    raise ValueError(
      f"config.paper={name!r} is neither in experiments/papers or experiments/studies nor a module "
      "that can be imported: correct it, or add the folder of the module to PYTHONPATH"
    ) from error


def build(config: Any, workdir: pathlib.Path) -> Any:
  """Returns the `training.Experiment` of a config.

  Its module defines `build(config)`. A module whose runs read other runs beside their own folder
  defines `build_in(config, workdir)` instead.
  """
  module = module_of(config)
  if hasattr(module, "build_in"):
    return module.build_in(config, workdir)
  if not hasattr(module, "build"):
    raise ValueError(f"the module of config.paper={config.paper!r} has no function build(config)")
  required = [
    name
    for name, parameter in inspect.signature(module.build).parameters.items()
    if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
  ]
  if len(required) > 1:
    raise ValueError(
      f"the module of config.paper={config.paper!r} has build({', '.join(required)}), but build "
      "gets the config alone: drop the other arguments, or call it build_in(config, workdir)"
    )
  return module.build(config)


def check(config: Any) -> None:
  """Raises `ValueError` if a field that every run needs is missing or out of range."""
  from sharding import checks  # imports JAX, which --help and --list must not

  fields = files.flatten(config.to_dict())
  required = ["seed", *_LEAST]
  missing = [name for name in required if name not in fields]
  if missing or not any(name.startswith("sharding.mesh.") for name in fields):
    raise ValueError(
      f"the config lacks {', '.join(missing or ['sharding.mesh'])}: every config needs seed, "
      f"sharding.mesh and {', '.join(_LEAST)}"
    )
  for name, least in _LEAST.items():
    checks.count(f"config.{name}", fields[name], least)
  checks.count("config.seed", fields["seed"], 0, most=2**32 - 1)  # the bits that JAX keeps
  # The fields of an optimiser mean the same in every section that has them.
  for name, value in fields.items():
    last, name = name.rpartition(".")[2], f"config.{name}"
    if last.endswith("learning_rate") or last == "clip_norm":
      checks.positive(name, value)
    elif last == "weight_decay":
      checks.not_negative(name, value)
    elif last == "final_scale":
      checks.probabilities(name, value)
    elif last in ("b1", "b2"):
      checks.probabilities(name, value)
      if value == 1:
        raise ValueError(f"{name} must be below 1, got {value}: a mean that never moves")
    elif last == "warmup_steps":
      checks.count(name, value, 0)
    elif last in _SWITCHES and not isinstance(value, bool):
      # A config file may give any type, and "false" is as true as every text.
      raise ValueError(f"{name} must be True or False, got {value!r}")
    elif last in _PATHS and isinstance(value, str) and not value.startswith(_LIBRARIES):
      if last != "directory" or "tfds:" not in str(fields.get("data.source", "")):
        files.check_local(name, value)
    elif last == "warmup_from":
      checks.choice(name, value, (0, 1))


def as_arguments(config: ml_collections.ConfigDict) -> str:
  """Returns one line `--config.x.y=VALUE` for each field of the config."""
  fields = files.flatten(config.to_dict())
  return "\n".join(f"--config.{name}={value}" for name, value in fields.items())


def split_overrides(argv: Iterable[str]) -> tuple[list[tuple[str, str]], list[str]]:
  """Splits arguments into overrides (field, value) and all others; both keep their order.

  Raises:
    ValueError: the value of an override is missing.

  Example:
    >>> split_overrides(["--config=a:b", "--config.seed=1", "--config.train.num_steps", "5"])
    ([('seed', '1'), ('train.num_steps', '5')], ['--config=a:b'])
  """
  overrides, rest = [], []
  arguments = iter(argv)
  for argument in arguments:
    if not argument.startswith("--config."):
      rest.append(argument)
      continue
    name, equals, value = argument.removeprefix("--config.").partition("=")
    if not equals:
      following = next(arguments, None)
      if following is None:
        raise ValueError(f"--config.{name} needs a value: --config.{name}=VALUE")
      value = following
    overrides.append((name, value))
  return overrides, rest


def override(
  config: ml_collections.ConfigDict, overrides: Iterable[tuple[str, str]]
) -> ml_collections.ConfigDict:
  """Returns a copy of the config with fields replaced; each value takes the old value's type.

  Args:
    config: the config, which stays as it is.
    overrides: pairs (dotted name of a field, text of its value).

  Raises:
    ValueError: a field does not exist (the message names the closest one), is a section, or does
      not accept the value.
  """
  config = config.copy_and_resolve_references()
  fields = files.flatten(config.to_dict())
  for name, text in overrides:
    if name not in fields:
      raise ValueError(_unknown_field(name, fields))
    *sections, last = name.split(".")
    section = config
    for part in sections:
      section = section[part]
    with section.ignore_type():
      section[last] = _parse(name, text, fields[name])
  return config


def _unknown_field(name: str, fields: dict[str, Any]) -> str:
  children = [field for field in fields if field.startswith(name + ".")]
  if children:
    return f"--config.{name} is a section: set one of its fields, {', '.join(children)}"
  by_last_part = [field for field in fields if field.rpartition(".")[2] == name.rpartition(".")[2]]
  close = by_last_part[:1] or difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
  hint = f"did you mean --config.{close[0]}?" if close else f"its fields are {', '.join(fields)}"
  return f"--config.{name}: the config has no such field; {hint}"


def _parse(name: str, text: str, old: Any) -> Any:
  try:
    return _cast(text, old)
  except (ValueError, SyntaxError):
    kind = f"a tuple like {old!r}" if isinstance(old, (tuple, list)) else type(old).__name__
    raise ValueError(f"--config.{name}={text}: expected {kind}") from None


def _cast(text: str, old: Any) -> Any:
  """Returns the text as a value of the type of `old`; raises `ValueError` if it is none."""
  if isinstance(old, bool):
    if text.lower() not in _TRUE + _FALSE:
      raise ValueError(text)
    return text.lower() in _TRUE
  if isinstance(old, int):
    try:
      return int(text)
    except ValueError:
      if not float(text).is_integer():  # 1e6 is accepted as an integer; inf and 0.5 are not
        raise
      return int(float(text))
  if isinstance(old, float):
    return float(text)
  if isinstance(old, (tuple, list)):
    first = old[0] if old else None
    if isinstance(first, str) and re.fullmatch(r"[\w.:/, -]+", text):  # words without quotes
      return type(old)(word.strip() for word in text.split(",") if word.strip())
    value = ast.literal_eval(text if text.startswith(("(", "[")) else f"({text.rstrip(', ')},)")
    if not isinstance(value, (tuple, list)):
      value = (value,)
    if isinstance(first, (int, float, str)) and not isinstance(first, bool):
      value = [_cast(str(item), first) for item in value]
    return type(old)(value)
  if old is None:
    try:
      return ast.literal_eval(text)
    except (ValueError, SyntaxError):
      return text
  return text


def _choices(wrong: str, known: Iterable[str]) -> str:
  known = list(known)
  close = difflib.get_close_matches(wrong, known, n=1, cutoff=0.5)
  hint = f"did you mean {close[0]!r}? " if close else ""
  return f"{hint}the choices are {', '.join(known)}"
