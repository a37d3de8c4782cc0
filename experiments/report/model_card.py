"""The model card of an exported model: where it comes from, what was measured, and what was not."""

from collections.abc import Mapping
from typing import Any

from experiments.report import results

_EXAMPLES, _LONGEST = 3, 300  # rows of the first table, characters of a cell


def render(
  *, title: str, base: str, result: results.Result, headline: str, config: Mapping[str, Any]
) -> str:
  """Returns a card in Markdown, in the form of the Hugging Face hub.

  Args:
    title: paper and preset.
    base: the model that the run started from, by name or folder.
    result: the final evaluation.
    headline: the metric that comes first.
    config: all settings by dotted name.
  """
  names = sorted(result.metrics, key=lambda name: name != headline)
  metrics = [(name, str(result.metrics[name])) for name in names]
  parts = [
    f"---\nlibrary_name: transformers\ntags: [bootstrax, {config['paper']}]\n---",
    f"# {title}, from {_cell(base)}",
    f"This is {_cell(base)} after {config['train.num_steps']} steps of training with bootstrax.",
    "## Evaluation",
    _table(["metric", "value [95 % interval]"], metrics),
    *result.notes,
  ]
  if result.tables:
    table = result.tables[0]
    rows = [[table.text(cell) for cell in row] for row in table.rows[:_EXAMPLES]]
    parts += [f"## {table.title}", _table(table.columns, rows)]
  parts += [
    "## Limits",
    "The numbers are those of this run's own held-out data and of the reward that it was trained "
    "with. Truth, safety and other tasks were not measured. A reward can rise while the texts get "
    "worse: read some. The licence of the first model and of the data applies.",
    "## Settings",
    _table(["setting", "value"], [[name, str(value)] for name, value in config.items()]),
  ]
  return "\n\n".join(parts) + "\n"


def _table(columns: Any, rows: Any) -> str:
  lines = [columns, ["---"] * len(columns), *rows]
  return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
  """Returns one line, cut, in which no character ends the cell or starts a tag."""
  text = " ".join(text.split())
  text = text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
  return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
