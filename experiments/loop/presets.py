"""From `--config=<paper>:<preset>` and `--config.x.y=VALUE` to a checked `ConfigDict`.

A config module has `PRESETS`, name to (description, expected time, expected result), and
`get_config(preset) -> ConfigDict`. Packaged ones lie in `experiments/configs`; a file elsewhere
needs only `get_config`. Nothing here imports JAX.
"""

import ast
import difflib
import importlib
import importlib.util
import inspect
import pathlib
import pkgutil
from collections.abc import Iterable
from typing import Any

import ml_collections

from experiments import configs, files
from experiments.loop import run_folder

# Fields that the loop reads, with the least value; 0 for an interval means never.
_LEAST = {
  "train.num_steps": 1,
  "train.log_every": 1,
  "eval.every": 0,
  "checkpoint.every": 0,
  "checkpoint.keep": 1,
}
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def papers() -> dict[str, Any]:
  """Returns the packaged config modules by paper."""
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
  """Returns the config that `--config` names.

  Args:
    text: `paper`, `paper:preset`, `path.py` or `path.py:preset`.

  Raises:
    ValueError: if there is no such paper or preset; the message names those there are.
    FileNotFoundError: if there is no such file.
  """
  path, colon, preset = text.rpartition(":")
  # A Windows path has a colon too, after its drive.
  if not colon or preset.endswith(".py"):
    path, preset = text, ""
  if path.endswith(".py"):
    module = _load_file(pathlib.Path(path))
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
    raise FileNotFoundError(f"--config={path}: there is no such file")
  spec = importlib.util.spec_from_file_location(f"bootstrax_config_{path.stem}", path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise ValueError(f"--config={path}: the file defines no get_config(preset)")
  return module


def from_workdir(folder: str) -> ml_collections.ConfigDict:
  """Returns the config of an earlier run."""
  return run_folder.read_config(pathlib.Path(folder))


def module_of(config: Any) -> Any:
  """Returns the module that runs a config: a packaged paper or study, or one of the user's own.

  It is named by `config.paper`; a preset that is a study of its paper names the study in
  `config.runner`.

  Raises:
    ValueError: if there is no such module.
  """
  name = config.get("runner") or config.paper
  top = name.partition(".")[0]
  for package in ("experiments.papers", "experiments.studies"):
    if importlib.util.find_spec(f"{package}.{top}") is not None:
      return importlib.import_module(f"{package}.{name}")
  if importlib.util.find_spec(top) is None:
    raise ValueError(
      f"config.paper={name!r} is neither in experiments/papers or experiments/studies nor a module "
      "that can be imported: correct it, or add the folder of the module to PYTHONPATH"
    )
  return importlib.import_module(name)


def check(config: Any) -> None:
  """Raises ValueError for what every run needs and this config lacks, or has out of range."""
  fields = files.flatten(config.to_dict())
  required = ["seed", *_LEAST]
  missing = [name for name in required if name not in fields]
  if missing or not any(name.startswith("sharding.mesh.") for name in fields):
    raise ValueError(
      f"the config lacks {', '.join(missing or ['sharding.mesh'])}: every config has seed, "
      f"sharding.mesh and {', '.join(_LEAST)}"
    )
  for name, least in _LEAST.items():
    value = fields[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
      raise ValueError(f"config.{name}={value!r}: give an integer of at least {least}")


def as_arguments(config: ml_collections.ConfigDict) -> str:
  """Returns every field as the argument that would set it."""
  fields = files.flatten(config.to_dict())
  return "\n".join(f"--config.{name}={value}" for name, value in fields.items())


def split_overrides(argv: Iterable[str]) -> tuple[list[tuple[str, str]], list[str]]:
  """Splits arguments into overrides `(x.y, VALUE)` and the rest, in order.

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
  """Returns the config with fields replaced; each value gets the type of the one it replaces.

  Raises:
    ValueError: if a field does not exist (the closest one is named), is a section, or cannot hold
      the value.
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
    return f"--config.{name} is a section; its fields are {', '.join(children)}"
  by_last_part = [field for field in fields if field.rpartition(".")[2] == name.rpartition(".")[2]]
  close = by_last_part[:1] or difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
  hint = f"did you mean --config.{close[0]}?" if close else f"there are {', '.join(fields)}"
  return f"--config.{name}: the config has no such field; {hint}"


def _parse(name: str, text: str, old: Any) -> Any:
  try:
    return _cast(text, old)
  except (ValueError, SyntaxError):
    kind = f"a tuple like {old!r}" if isinstance(old, (tuple, list)) else type(old).__name__
    raise ValueError(f"--config.{name}={text}: expected {kind}") from None


def _cast(text: str, old: Any) -> Any:
  """Returns the text as a value of the type of `old`; raises ValueError."""
  if isinstance(old, bool):
    if text.lower() not in _TRUE + _FALSE:
      raise ValueError(text)
    return text.lower() in _TRUE
  if isinstance(old, int):
    try:
      return int(text)
    except ValueError:
      if not float(text).is_integer():  # 1e6 is a fine number of steps; inf and 0.5 are not
        raise
      return int(float(text))
  if isinstance(old, float):
    return float(text)
  if isinstance(old, (tuple, list)):
    value = ast.literal_eval(text if text.startswith(("(", "[")) else f"({text},)")
    if not isinstance(value, (tuple, list)):
      value = (value,)
    first = old[0] if old else None
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
  return f"{hint}there are {', '.join(known)}"
