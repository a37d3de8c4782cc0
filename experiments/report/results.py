"""What an evaluation returns: numbers with intervals, tables, figures, notes.

A `Result` survives a round trip through JSON, so that a report can be made again without the model.
Tables hold raw numbers. They are rounded only where they are shown, so that a later report can read
them from `results.json`.
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
    title: what it shows.
    columns: their names.
    rows: cells: text, numbers, an `Estimate` with its interval, or "pass" and "fail".
    caption: one or two sentences above the table.
    digits: decimals of the numbers that are shown; None chooses by their size.
  """

  title: str
  columns: Sequence[str]
  rows: Sequence[Sequence[Any]]
  caption: str = ""
  digits: int | None = None

  def text(self, cell: Any) -> str:
    """Returns a cell as the report shows it."""
    if isinstance(cell, Estimate):
      value = number(cell.value, self.digits)
      if cell.low is None or cell.high is None:
        return value
      return f"{value} [{number(cell.low, self.digits)}, {number(cell.high, self.digits)}]"
    return number(cell, self.digits) if isinstance(cell, float) else str(cell)

  @classmethod
  def from_json(cls, data: Mapping[str, Any]) -> "Table":
    """Returns the table that `Result.to_json` wrote; estimates in its cells become estimates."""
    rows = [
      [Estimate(**cell) if isinstance(cell, Mapping) else cell for cell in row]
      for row in data["rows"]
    ]
    return cls(**{**data, "rows": rows})


@dataclasses.dataclass
class Figure:
  """A figure of the report.

  Attributes:
    name: its file name: letters, digits, `_` and `-`.
    caption: what it shows.
    figure: a `matplotlib.figure.Figure`; not its type, so that results load without Matplotlib.
  """

  name: str
  caption: str
  figure: Any


CHECKS = ["criterion", "result"]  # the columns of a table of pass criteria


def checks_table(title: str, checks: Sequence[tuple[str, bool]]) -> Table:
  """Returns criteria as a table of pass and fail."""
  return Table(title, CHECKS, [[n, "pass" if ok else "fail"] for n, ok in checks])


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A number and how well it is known.

  Attributes:
    value: the point estimate.
    low: lower end of the confidence interval; None where there is none.
    high: upper end.
    n: observations behind the value; None where the word means nothing.
    note: a few words shown beside the number, such as a count of ties.
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
  """What one evaluation found.

  Attributes:
    metrics: name to `Estimate` (a plain number becomes one), the most important first.
    tables: tables: samples, pass criteria.
    figures: those that only the evaluation can draw.
    notes: paragraphs that the report prints above the numbers.
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
    """Returns the metrics as flat numbers, `name`, `name_low` and `name_high`."""
    flat = {}
    for name, estimate in self.metrics.items():
      flat[name] = estimate.value
      if estimate.low is not None and estimate.high is not None:
        flat[f"{name}_low"], flat[f"{name}_high"] = estimate.low, estimate.high
    return flat

  def to_json(self) -> dict[str, Any]:
    """Returns plain JSON; figures are left out, they live as files."""
    return {
      "metrics": {name: dataclasses.asdict(value) for name, value in self.metrics.items()},
      "tables": [dataclasses.asdict(table) for table in self.tables],
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


def number(value: float, digits: int | None = None) -> str:
  """Returns a number as people write it, with so many decimals or as many as its size asks for.

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
  """Returns a table for a terminal: one block a row, so that long texts stay readable."""
  blocks = [
    "\n".join(
      f"{column}: {table.text(value)}" for column, value in zip(table.columns, row, strict=True)
    )
    for row in table.rows
  ]
  return "\n\n".join([table.title, *blocks])
