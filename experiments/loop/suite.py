"""Studies that start several runs, each in a folder of its own, and write one report of all.

A study names the configs of its parts and summarises their results (`Summary`). Parts that
are finished are not trained again, and an interrupted one continues where it stopped.
"""

import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from experiments import files
from experiments.loop import presets, run_folder, training
from experiments.report import records, report, results

Build = Callable[[Any, pathlib.Path], training.Experiment]


class Part(NamedTuple):
  """A part that is finished: its config, its final evaluation and its records."""

  config: ml_collections.ConfigDict
  result: results.Result
  history: records.History


class Summary(NamedTuple):
  """The summary of all parts: numbers, the metric that stands first, and figures of the whole."""

  result: results.Result
  headline: str
  figures: Sequence[results.Figure] = ()


def run(
  config: Any,
  workdir: pathlib.Path,
  parts: Mapping[str, ml_collections.ConfigDict],
  summarise: Callable[[dict[str, Part]], Summary],
  *,
  build: Build | None = None,
  report_unfinished: bool = False,
) -> training.Outcome:
  """Trains each part in `workdir/<name>`, one after the other, then reports on all of them.

  Args:
    config: of the whole.
    workdir: its folder.
    parts: config of each part by the name of its folder, in the order of training.
    summarise: from the finished parts to their summary.
    build: makes the experiment of a part; by default the module that the part's config names does.
    report_unfinished: whether to report on the finished parts when a signal stops the run.

  Returns:
    The outcome of the part that a signal stopped, or the last one's with the result of the whole.
  """
  finished: dict[str, Part] = {}
  for name, part in parts.items():
    folder = workdir / name
    run_folder.claim(part, folder)
    make = build or presets.build
    outcome = training.train(make(part, folder), part, folder)
    if outcome.result is None:
      break
    # Read back from its file, so that a part trained just now and one trained earlier are alike.
    history = records.JsonLines(folder / "metrics.jsonl").read()
    finished[name] = Part(part, outcome.result, history)
  if finished and (len(finished) == len(parts) or report_unfinished):
    summary = summarise(finished)
    write(config, workdir, summary, step=len(finished))
    if len(finished) == len(parts):
      outcome = outcome._replace(result=summary.result)
  return outcome


def write(config: Any, workdir: pathlib.Path, summary: Summary, *, step: int = 0) -> None:
  """Writes `results.json`, with raw numbers, and the report of a whole; `step` counts its parts."""
  report.write_run(
    workdir, config, summary.result, headline=summary.headline, figures=summary.figures
  )
  files.write_json(workdir / "results.json", {"step": step, "result": summary.result.to_json()})


def configs_of(
  field: str, entries: Iterable[str], known: Mapping[str, str], *, needs: Iterable[str] = ()
) -> dict[str, ml_collections.ConfigDict]:
  """Returns the config of each entry of a field that lists runs, by the name of its folder.

  Args:
    field: its name, for errors.
    entries: keys of `known`, or anything that `--config` takes: `<paper>:<preset>` of a paper here
      or `path.py:preset` of the user's own.
    known: `<paper>:<preset>` by short name.
    needs: fields that a config must have to fit the study, such as `environment.game`.

  Raises:
    ValueError: if there are no entries, one is unknown, holds several runs or does not fit, or two
      are the same run.
  """
  entries = tuple(entries)
  short = {text: name for name, text in known.items()}
  found: dict[str, ml_collections.ConfigDict] = {}
  for entry in entries:
    if entry not in known and ":" not in entry and not entry.endswith(".py"):
      raise ValueError(
        f"{field}={entries}: {entry!r} is not one of {', '.join(known)}: give one of these, a "
        "<paper>:<preset> or a config file"
      )
    entry = short.get(entry, entry)
    config = presets.resolve(known.get(entry, entry))
    presets.check(config)
    if hasattr(presets.module_of(config), "run"):
      raise ValueError(f"{field}={entries}: {entry!r} holds several runs, name one of them")
    fields = files.flatten(config.to_dict())
    if missing := [need for need in needs if need not in fields]:
      raise ValueError(f"{field}={entries}: {entry!r} does not fit, it has no {missing[0]}")
    name = entry if entry in known else f"{config.paper}-{config.get('preset') or 'custom'}"
    if name in found:
      raise ValueError(f"{field}={entries}: give each run once, {name!r} is there twice")
    found[name] = config
  if not found:
    raise ValueError(f"{field} is empty: give one or more of {', '.join(known)}")
  return found
