"""The memory of one IPO step, beside TRL's DPOTrainer on torch.

Both sides train the same random Llama in float32 on a CPU: the pass of the reference, the gradient
of the policy and AdamW with clipping. One sweep is over the length of the sequences, one over the
vocabulary. Each point is one step in a process of its own, so that peaks do not mix. We measure its
growth: the highest resident size less that right before the step, when the policy, the reference
and the optimiser's moments are in place. Linux only.

TRL's IPO averages log-ratios over tokens, which is `reduction="mean"` here. Both sides must agree
on the loss, the margin and the norm of the gradient, or nothing is reported.

  python benchmarks/memory.py --torch-python other/bin/python --json memory.json
  python benchmarks/memory.py --json memory.json --figure docs/performance_memory.png   # redraws it
  python benchmarks/memory.py --lengths 2048 --vocabulary 8192 --vocabularies --json memory.json

Points that the file of `--json` has already are not measured again. `docs/performance.md` holds the
results.
"""

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import memory_steps
import sides

MEBIBYTE, GIBIBYTE = 2**20, 2**30
# What float32 may differ by, relative to the value.
TOLERANCES = {"loss": 1e-4, "margin": 1e-2, "grad_norm": 1e-3}
NAMES = {
  "jax": "bootstrax",
  "jax-remat": "bootstrax, remat",
  "trl": "TRL",
  "trl-checkpoint": "TRL, checkpointing",
}


def alone(function: Callable, *arguments: Any) -> Any:
  """Returns what a function returns in a process of its own, a copy of this one."""
  context = multiprocessing.get_context("fork")
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
    return pool.submit(function, *arguments).result()


def make_commands(library: str, folder: pathlib.Path, points: list[list[int]]) -> dict:
  """Returns what the process of a library does: a command for each side and point.

  It imports the library once and computes nothing itself, so that its copies are fresh.
  """
  if library == "jax":
    import optax  # noqa: F401

    from alignment import ipo  # noqa: F401
    from alignment.models import huggingface, transformer  # noqa: F401
  else:
    import datasets  # noqa: F401
    from trl import DPOTrainer  # noqa: F401
  sides_of = {
    "jax": (memory_steps.measure_jax, "jax-remat"),
    "torch": (memory_steps.measure_trl, "trl-checkpoint"),
  }
  function, less = sides_of[library]
  commands = {}
  for point in points:
    shape, models = memory_steps.make_shape(*point), folder / str(point[2])
    for side in (less.split("-")[0], less):
      commands[_command(side, point)] = functools.partial(
        alone, function, models, shape, side == less
      )
    commands[f"write {point[2]}"] = functools.partial(
      alone, memory_steps.write_models, models, shape
    )
  return commands


def _command(side: str, point: list[int]) -> str:
  return " ".join(map(str, (side, *point)))


def check(first: dict, other: dict) -> None:
  """Stops the benchmark unless both sides computed the same."""
  for name, tolerance in TOLERANCES.items():
    if abs(first[name] - other[name]) > tolerance * abs(other[name]):
      raise SystemExit(f"the sides compute different numbers: {first} and {other}")


def measure(args: argparse.Namespace, records: list[dict]) -> None:
  """Adds to the records those that they lack, and writes each to `args.json` at once."""
  done = {(record["side"], *record["point"]): record for record in records}
  points = [[args.pairs, length, args.vocabulary] for length in args.lengths]
  points += [[args.pairs, args.length, vocabulary] for vocabulary in args.vocabularies]
  points = [list(point) for point in dict.fromkeys(map(tuple, points))]
  points.sort(key=lambda point: point[1] * point[2])
  todo = [(s, point) for point in points for s in args.sides if (s, *point) not in done]
  if not todo:
    return
  with tempfile.TemporaryDirectory() as folder:
    workers = {}
    for library, python in (("jax", sys.executable), ("torch", args.torch_python)):
      if library == "jax" or any(side.startswith("trl") for side, _ in todo):
        options = ("--folder", folder, "--points", json.dumps(points))
        workers[library] = sides.Side(__file__, python, "--worker", library, *options)
    for side, point in todo:
      if not (pathlib.Path(folder) / str(point[2])).exists():
        workers["jax"].ask(f"write {point[2]}")
      answer = workers["jax" if side.startswith("jax") else "torch"].ask(_command(side, point))
      record = {"side": side, "point": point, **answer["result"]}
      for other in records:
        if other["point"] == point:
          check(other, record)
      records.append(record)
      growth = (record["peak"] - record["rest"]) / MEBIBYTE
      print(f"{side} {point}: {growth:,.0f} MiB", file=sys.stderr, flush=True)
      if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n")
    for worker in workers.values():
      worker.close()


def summarise(records: list[dict]) -> str:
  """Returns a table in MiB: growth (absolute peak) of each side, and our plan."""
  names = list(dict.fromkeys(record["side"] for record in records))
  cells: dict = {}
  for record in records:
    cell = f"{(record['peak'] - record['rest']) / MEBIBYTE:,.0f} ({record['peak'] / MEBIBYTE:,.0f})"
    if "plan" in record:
      cell += f" plan {max(record['plan'].values()) / MEBIBYTE:,.0f}"
    cells.setdefault(tuple(record["point"]), {})[record["side"]] = cell
  lines = [f"{'length':>8}{'vocabulary':>12}" + "".join(f"{name:>28}" for name in names)]
  for (_, length, vocabulary), row in sorted(cells.items()):
    row_cells = "".join(f"{row.get(name, ''):>28}" for name in names)
    lines.append(f"{length:>8}{vocabulary:>12}{row_cells}")
  return "\n".join(lines)


def draw(records: list[dict], path: pathlib.Path, length: int, vocabulary: int) -> None:
  """Draws the growth over the length (left) and over the vocabulary (right)."""
  from experiments.report import plots

  figure, axes = plots.subplots(1, 2, size=(4.6, 3.2), sharey=True)
  panels = (
    (1, "tokens in a sequence", 2, f"{vocabulary:,} entries of the vocabulary"),
    (2, "entries of the vocabulary", 1, f"{length:,} tokens in a sequence"),
  )
  for axis, (name, label, other, title) in zip(axes.flat, panels, strict=True):
    fixed = (0, length, vocabulary)[other]
    for side in dict.fromkeys(record["side"] for record in records):
      rows = [r for r in records if r["side"] == side and r["point"][other] == fixed]
      rows.sort(key=lambda row: row["point"])
      values = [row["point"][name] for row in rows]
      color = plots.PALETTE[0 if side.startswith("jax") else 1]
      line = "-" if side in ("jax", "trl") else "--"
      growth = [(row["peak"] - row["rest"]) / GIBIBYTE for row in rows]
      axis.plot(values, growth, line, color=color, marker="o", markersize=4, label=NAMES[side])
      if side == "jax":
        plan = [max(row["plan"].values()) / GIBIBYTE for row in rows]
        axis.plot(values, plan, "x", color="#30343c", markersize=6, label="its compiler's plan")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    ticks = sorted({r["point"][name] for r in records if r["point"][other] == fixed})
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.set_xlabel(label)
    axis.set_title(title, fontsize=10)
  axes[0, 0].yaxis.set_major_formatter("{x:g}")
  axes[0, 0].set_ylabel("memory that a step adds, GiB")
  plots.legend_below(figure, axes[0, 0], columns=5)
  figure.savefig(path, dpi=150, metadata={"Software": None})


def has_trl(python: str) -> bool:
  """Whether an interpreter can import TRL's trainer."""
  found = subprocess.run([python, "-c", "from trl import DPOTrainer"], capture_output=True)
  return found.returncode == 0


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--lengths", type=int, nargs="*", default=[256, 512, 1024, 2048])
  parser.add_argument("--vocabularies", type=int, nargs="*", default=[8192, 32768, 131072, 262144])
  parser.add_argument("--length", type=int, default=256, help="of the sweep over vocabularies")
  parser.add_argument("--vocabulary", type=int, default=32768, help="of the sweep over lengths")
  parser.add_argument("--pairs", type=int, default=2)
  parser.add_argument("--sides", nargs="+", choices=NAMES, default=list(NAMES))
  parser.add_argument("--torch-python", default=sys.executable, help="interpreter with TRL")
  parser.add_argument("--json", type=pathlib.Path, help="file of every number; it is added to")
  parser.add_argument("--figure", type=pathlib.Path, help="PNG to write")
  parser.add_argument("--worker", help=argparse.SUPPRESS)
  parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
  parser.add_argument("--points", type=json.loads, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.worker:
    sides.serve(lambda: make_commands(args.worker, args.folder, args.points))
    return
  records = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
  if any(side.startswith("trl") for side in args.sides) and not has_trl(args.torch_python):
    print(f"{args.torch_python} has no TRL: our side alone is measured", file=sys.stderr)
    args.sides = [side for side in args.sides if side.startswith("jax")]
  measure(args, records)
  print(summarise(records))
  if args.figure:
    draw(records, args.figure, args.length, args.vocabulary)


if __name__ == "__main__":
  main()
