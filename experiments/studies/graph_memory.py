"""Memory of a step against the number of nodes: that of BGRL grows with it, GRACE's as its square.

Steps are compiled for shapes and never run: measured is the memory that the compiler plans for
what a step computes between its inputs and its outputs (`temp_size_in_bytes`), so that no size is
too large. The compiler is that of the device at hand; plans for others differ, not in their growth.
"""

import pathlib
import sys
from typing import Any

import jax
import numpy as np

from experiments.loop import presets, suite, training
from experiments.papers import bgrl, grace
from experiments.report import plots, records, results, statistics

_NUM_FITTED = 4  # the largest sizes: what does not grow with nodes counts in the smaller ones
_MEBIBYTE = 2**20


def run(config: Any, workdir: pathlib.Path) -> training.Outcome:
  """Compiles a step of each method for each of `data.num_nodes` and writes the report."""
  sizes = tuple(config.data.num_nodes)
  if len(sizes) < 2 or min(sizes) < 2 or list(sizes) != sorted(set(sizes)):
    raise ValueError(f"config.data.num_nodes={sizes}: give two or more growing numbers of nodes")
  negatives = config.algorithm.num_negatives
  # The slopes that are expected over the largest sizes.
  methods: dict[str, Any] = {
    "BGRL": (bgrl, {}, (0.85, 1.15)),
    "GRACE": (grace, {}, (1.8, 2.1)),
    f"GRACE, {negatives} negatives": (grace, {"num_negatives": negatives}, (0.85, 1.15)),
  }
  found, checks, curves = {}, [], {}
  for name, (paper, algorithm, (low, high)) in methods.items():
    curve = np.zeros(len(sizes))
    for i, size in enumerate(sizes):
      curve[i] = _temp_bytes(config, paper, algorithm, size)
      print(f"{name}, {size} nodes: {curve[i] / _MEBIBYTE:,.1f} MiB", file=sys.stderr)
    fitted = np.log(sizes[-_NUM_FITTED:]), np.log(curve[-_NUM_FITTED:])
    slope = float(np.polyfit(*fitted, 1)[0])
    curves[f"{name}: slope {slope:.2f}"] = curve
    found[f"slope/{name}"] = slope
    checks.append((f"{name}: slope {slope:.3f} in [{low}, {high}]", low <= slope <= high))
  rows = [
    [size, *(curve[i] / _MEBIBYTE for curve in curves.values())] for i, size in enumerate(sizes)
  ]
  caption = (
    f"Mean degree {config.data.mean_degree:g}, {config.data.num_features} features; compiled for "
    f"{jax.default_backend()}, not run. Slopes of log bytes against log nodes over the largest "
    f"{min(_NUM_FITTED, len(sizes))} sizes."
  )
  result = results.Result(
    metrics={**found, "criteria_passed": statistics.fraction_passed(checks)},
    tables=[
      results.checks_table("Expected before the run", checks),
      results.Table(
        "Temporary memory of a step, MiB", ["nodes", *curves], rows, caption=caption, digits=1
      ),
    ],
    figures=[_figure(sizes, curves, caption)],
    arrays={
      "num_nodes": np.array(sizes),
      **{f"temp_bytes/{name}": curve for name, curve in zip(methods, curves.values(), strict=True)},
    },
  )
  suite.write(config, workdir, suite.Summary(result, "slope/BGRL"))
  return training.Outcome("finished", 0, records.History(), result)


def _temp_bytes(config: Any, paper: Any, algorithm: dict[str, Any], num_nodes: int) -> int:
  """Memory between inputs and outputs of one step, in bytes."""
  sub = presets.resolve(f"{paper.__name__.rpartition('.')[2]}:csbm")
  sub.algorithm.update(algorithm)
  sub.network.update(config.network)
  sub.data.csbm.update(
    {
      "num_nodes": num_nodes,
      "num_features": config.data.num_features,
      "mean_degree": config.data.mean_degree,
      "edge_signal": 0.0,
    }
  )
  sub.eval.num_splits = 1
  experiment = paper.build(sub)
  key, graph = jax.eval_shape(lambda: (jax.random.key(0), experiment.init_args[0]))
  state = jax.eval_shape(experiment.init, key, graph)
  analysis: Any = jax.jit(experiment.update).lower(state, graph, key).compile().memory_analysis()
  return analysis.temp_size_in_bytes


def _figure(sizes: tuple[int, ...], curves: dict[str, np.ndarray], caption: str) -> results.Figure:
  figure, axes = plots.subplots(1, 1)
  for (label, curve), style in zip(curves.items(), ("-", "-", "--"), strict=True):  # two coincide
    axes[0][0].plot(sizes, curve / _MEBIBYTE, style, marker="o", ms=3, label=label)
  axes[0][0].set(xscale="log", yscale="log", xlabel="nodes", ylabel="temporary memory, MiB")
  axes[0][0].legend(fontsize=8)
  return results.Figure("memory", caption, figure)
