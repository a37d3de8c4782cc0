"""The results of an evaluation: numbers with confidence intervals, tables, figures and notes.

A `Result` can be saved as JSON and read back, so that a report can be rewritten without the model.
Tables hold raw numbers, which are rounded only for display: a later report can read them from
`results.json`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass
class Table:
  """A table of the report.

  Attributes:
    title: the heading.
    columns: names of the columns.
    rows: rows of cells. A cell is a text, a number, a list of numbers, an `Estimate`, "pass" or
      "fail".
    caption: one or two sentences above the table.
    digits: number of decimals to show; None chooses it by the size of each number.
  """

  title: str
  columns: Sequence[str]
  rows: Sequence[Sequence[Any]]
  caption: str = ""
  digits: int | None = None

  def text(self, cell: Any) -> str:
    """Returns the text that the report shows for a cell."""
    if isinstance(cell, Estimate):
      value = number(cell.value, self.digits)
      if cell.low is None or cell.high is None:
        return value
      return f"{value} [{number(cell.low, self.digits)}, {number(cell.high, self.digits)}]"
    if isinstance(cell, list | tuple):
      return "  ".join(map(self.text, cell))
    cell = _plain(cell)
    return number(cell, self.digits) if isinstance(cell, float) else str(cell)

  @classmethod
  def from_json(cls, data: Mapping[str, Any]) -> "Table":
    """Returns the table that `Result.to_json` wrote, with the estimates in its cells."""

    def cell(value: Any) -> Any:
      if isinstance(value, list):
        return [cell(part) for part in value]
      return Estimate(**value) if isinstance(value, Mapping) else value

    return cls(**{**data, "rows": [[cell(value) for value in row] for row in data["rows"]]})


@dataclasses.dataclass
class Figure:
  """A figure of the report.

  Attributes:
    name: the name of its files: letters, digits, `_` and `-`.
    caption: a sentence or two on what it shows.
    figure: a `matplotlib.figure.Figure`. It is typed `Any` so that this module loads without
      Matplotlib.
  """

  name: str
  caption: str
  figure: Any


CHECKS = ["criterion", "result"]  # the columns of a table of pass criteria


def checks_table(title: str, checks: Sequence[tuple[str, bool]]) -> Table:
  """Returns a table of criteria; each has the result "pass" or "fail"."""
  return Table(title, CHECKS, [[n, "pass" if ok else "fail"] for n, ok in checks])


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A number with its confidence interval.

  Attributes:
    value: the point estimate.
    low: lower end of the confidence interval; None without an interval.
    high: upper end of the confidence interval; None without an interval.
    n: number of observations; None where it has no meaning.
    note: a few words to show with the number, such as the number of ties.
  """

  value: float
  low: float | None = None
  high: float | None = None
  n: int | None = None
  note: str = ""

  def __str__(self) -> str:
    text = f"{self.value:.4g}"
    if self.low is not None and self.high is not None:
      text += f" [{self.low:.4g}, {self.high:.4g}]"
    if self.n is not None:
      text += f" n={self.n}"
    return text + (f" ({self.note})" if self.note else "")


@dataclasses.dataclass
class Result:
  """The result of one evaluation.

  Attributes:
    metrics: name to `Estimate`, the most important first. A plain number becomes an `Estimate`.
    tables: tables, such as samples or pass criteria.
    figures: figures that only the evaluation can draw.
    notes: paragraphs that the report shows below the numbers.
    arrays: name to array, kept for `Experiment.figures`; thousands of numbers, not millions.
  """

  metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  tables: Sequence[Table] = ()
  figures: Sequence[Figure] = ()
  notes: Sequence[str] = ()
  arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    self.metrics = {
      name: value if isinstance(value, Estimate) else Estimate(float(value))
      for name, value in self.metrics.items()
    }

  def __str__(self) -> str:
    return "\n".join(f"{name:24} {estimate}" for name, estimate in self.metrics.items())

  def scalars(self) -> dict[str, float]:
    """Returns the metrics as plain numbers: `name`, and `name_low`, `name_high` with intervals."""
    flat = {}
    for name, estimate in self.metrics.items():
      flat[name] = estimate.value
      if estimate.low is not None and estimate.high is not None:
        flat[f"{name}_low"], flat[f"{name}_high"] = estimate.low, estimate.high
    return flat

  def to_json(self) -> dict[str, Any]:
    """Returns JSON values; figures are left out, because they are saved as files."""
    return {
      "metrics": {name: _plain(value) for name, value in self.metrics.items()},
      "tables": [_plain(table) for table in self.tables],
      "notes": list(self.notes),
      "arrays": {
        name: {"dtype": str(np.asarray(value).dtype), "values": np.asarray(value).tolist()}
        for name, value in self.arrays.items()
      },
    }

  @classmethod
  def from_json(cls, data: Mapping[str, Any]) -> "Result":
    """Returns the result that `to_json` wrote, without its figures."""
    return cls(
      metrics={name: Estimate(**value) for name, value in data["metrics"].items()},
      tables=[Table.from_json(table) for table in data["tables"]],
      notes=data["notes"],
      arrays={
        name: np.asarray(item["values"], item["dtype"]) for name, item in data["arrays"].items()
      },
    )


def _plain(value: Any) -> Any:
  """Returns the value as JSON has it: NumPy and JAX numbers and arrays, and what holds them."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    fields = dataclasses.fields(value)
    return {field.name: _plain(getattr(value, field.name)) for field in fields}
  if isinstance(value, Mapping):
    return {str(name): _plain(part) for name, part in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(part) for part in value]
  if hasattr(value, "tolist"):  # bfloat16 scalars give themselves back
    value = value.tolist()
    return float(value) if hasattr(value, "tolist") else value
  return value


def percent(estimate: Estimate) -> Estimate:
  """Returns a share and its interval in percent."""
  low, high = (None if end is None else 100 * end for end in (estimate.low, estimate.high))
  return Estimate(100 * estimate.value, low, high, estimate.n, estimate.note)


def number(value: float, digits: int | None = None) -> str:
  """Returns the text of a number with `digits` decimals; None chooses them by its size.

  Example:
    >>> number(0.79668), number(1234.5678), number(2e-5), number(20.0), number(93.2687, 2)
    ('0.797', '1,234.6', '2.00e-05', '20', '93.27')
  """
  if not math.isfinite(value):
    return str(value)
  if digits is not None:
    return f"{value:,.{digits}f}"
  if value != 0 and not 1e-3 <= abs(value) < 1e5:
    return f"{value:.2e}"
  decimals = 4 if abs(value) < 0.1 else 3 if abs(value) < 100 else 1
  text = f"{value:,.{decimals}f}"
  return text.rstrip("0").rstrip(".") if value == round(value) else text


def as_text(table: Table) -> str:
  """Returns a table as text for a terminal: a block of lines for each row, for long texts."""
  blocks = [
    "\n".join(
      f"{column}: {table.text(value)}" for column, value in zip(table.columns, row, strict=True)
    )
    for row in table.rows
  ]
  return "\n\n".join([table.title, *blocks])
