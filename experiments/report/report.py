"""The report of a run: one HTML file that loads nothing, the figures as files, a model card."""

import pathlib
from collections.abc import Iterable
from typing import Any

from experiments import files
from experiments.report import model_card, page, plots, records, results


def write_run(
  folder: pathlib.Path,
  config: Any,
  result: results.Result,
  *,
  headline: str,
  figures: Iterable[results.Figure] = (),
  history: records.History | None = None,
  warning: str = "",
) -> pathlib.Path:
  """Writes `figures/` and `report.html` of a run; returns the path of the report.

  Beside the exported folder of a language model it also writes `model_card.md`.

  Args:
    folder: the folder of the run.
    config: the config of the run.
    result: the final evaluation. A result that was read from `results.json` has no figures; the
      report then shows those that an earlier call saved in `folder`.
    headline: the metric that comes first.
    figures: figures to show after those of `result`.
    history: training records and periodic evaluations, drawn as learning curves.
    warning: why the run had to stop; shown in red at the top.
  """
  history = records.History() if history is None else history
  curves = plots.learning_curves(history, headline)
  drawn = [*result.figures, *figures, *([curves] if curves else [])]
  for figure in drawn:
    plots.save_figure(figure, folder / "figures")
  index_path = folder / "figures" / "evaluation.json"
  index = [[figure.name, figure.caption] for figure in result.figures]
  if index:
    files.write_json(index_path, index)
  if not index:
    index = files.read_json(index_path, _index, otherwise="the report leaves those figures out")
  shown = (index or []) + [[figure.name, figure.caption] for figure in drawn[len(result.figures) :]]
  title = f"{config.paper}:{config.get('preset') or 'custom'}"
  settings = files.flatten(config.to_dict())
  html = page.render(
    title=title,
    result=result,
    headline=headline,
    history=history,
    figures=[
      (name, caption, (folder / "figures" / f"{name}.svg").read_bytes())
      for name, caption in shown
      if (folder / "figures" / f"{name}.svg").exists()
    ],
    config=settings,
    environment=files.read_json(
      folder / "environment.json", _environment, otherwise="the report leaves it out"
    )
    or {},
    warning=warning,
  )
  files.write_file(folder / "report.html", html)
  if (folder / "model").is_dir() and "network.model" in settings and not warning:
    card = model_card.render(
      title=title,
      base=settings["network.model"],
      result=result,
      headline=headline,
      config=settings,
    )
    files.write_file(folder / "model_card.md", card)
  return folder / "report.html"


def _index(data: Any) -> list[list[str]]:
  """Returns names and captions of figures; names are no paths out of the folder of figures."""
  index = [[str(name), str(caption)] for name, caption in data]
  if any(pathlib.PurePath(name).name != name for name, _ in index):
    raise ValueError(f"not names of figures: {index}")
  return index


def _environment(data: Any) -> dict[str, Any]:
  return {**data, "started": str(data["started"]), "devices": str(data["devices"])}
