"""Draws docs/overview.png, the first figure of the README, from the records of real runs.

  bootstrax --config=copg:bandit --workdir=runs/copg
  bootstrax --config=solvers:kuhn --workdir=runs/solvers-kuhn
  bootstrax --config=graph_sweep:threshold --workdir=runs/threshold
  python docs/overview_figure.py --runs=runs

The runs take 18 minutes on two cores. The panel of Nash-MD needs no run: its 10,000 iterations are
computed here, in a second.
"""

import argparse
import json
import pathlib

import jax
import matplotlib
import numpy as np
from matplotlib import figure as mpl_figure

from alignment import nash_md, oracles, preference_games

BLUE, ORANGE, GREEN, PURPLE, GREY = "#3b6fd4", "#e07b39", "#2a9d8f", "#b5478a", "#8a8f98"
INK, GRID = "#30343c", "#e6e8ec"

# The game of `nash_md:bandit`: a beats b, b beats c, c beats a, with unequal odds.
CYCLE = np.array([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]])
REFERENCE = np.log([0.6, 0.3, 0.1])
TAU, NUM_ITERATIONS = 0.1, 10_000


def main() -> None:
  parser = argparse.ArgumentParser(description="Draws the first figure of the README.")
  parser.add_argument("--runs", type=pathlib.Path, default="runs", help="folder of the three runs")
  default = pathlib.Path(__file__).with_name("overview.png")
  parser.add_argument("--output", type=pathlib.Path, default=default, help="PNG to write")
  args = parser.parse_args()
  matplotlib.rcParams.update(
    {"font.size": 8.5, "axes.titlesize": 9, "axes.labelcolor": INK, "text.color": INK}
  )
  figure = mpl_figure.Figure(figsize=(11.6, 3.3), layout="constrained")
  figure.get_layout_engine().set(w_pad=0.08)
  axes = figure.subplots(1, 4)
  draw_copg(axes[0], records(args.runs / "copg"))
  draw_nash_md(axes[1])
  draw_games(axes[2], {name: records(args.runs / "solvers-kuhn" / name) for name in _SOLVERS})
  draw_graphs(axes[3], args.runs / "threshold")
  for axis in axes:
    axis.grid(True, color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(colors=INK)
    axis.legend(  # below, where it hides no curve
      loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize=7, frameon=False,
      columnspacing=1.0,
    )  # fmt: skip
  figure.savefig(args.output, dpi=150, metadata={"Software": None})


def records(folder: pathlib.Path) -> list[dict]:
  """Returns the training records of one run, in order."""
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [row for row in map(json.loads, lines) if row["kind"] == "train"]


def column(rows: list[dict], name: str) -> np.ndarray:
  return np.array([row[name] for row in rows], float)


def draw_copg(axis, rows: list[dict]) -> None:
  """Regret of four methods on pairs that two other policies drew."""
  epochs = column(rows, "step") + 1
  for name, label, color in (
    ("pg", "policy gradient", GREY),
    ("ipo", "IPO", ORANGE),
    ("pg_value", "policy gradient, baseline", GREEN),
    ("copg", "CoPG", BLUE),
  ):
    axis.semilogy(
      epochs, np.maximum(column(rows, f"{name}/regret"), 1e-9), color=color, label=label
    )
  axis.set(title="CoPG reaches the optimum off-policy", xlabel="epoch", ylabel="regret")


def draw_nash_md(axis) -> None:
  """KL from the equilibrium to the last policy, and the bound of the theorem."""
  equilibrium = preference_games.regularised_nash(CYCLE, REFERENCE, TAU)
  etas = nash_md.step_size(np.arange(NUM_ITERATIONS), tau=TAU)

  def step(logps, eta):
    logps = nash_md.nash_md_step(logps, CYCLE, REFERENCE, tau=TAU, eta=eta)
    return logps, logps

  with jax.enable_x64(True):
    logps = np.asarray(jax.lax.scan(step, jax.numpy.asarray(REFERENCE), etas)[1])
  iterations = np.arange(1, NUM_ITERATIONS + 1)
  axis.loglog(iterations, 8 / (TAU**2 * (iterations + 1)), "--", color=INK, label="theorem's bound")
  axis.loglog(iterations, oracles.kl(equilibrium, logps), color=BLUE, label="Nash-MD")
  axis.set(title="Nash-MD converges on a cycle", xlabel="iteration", ylabel="KL to equilibrium")


_SOLVERS = {
  "nfsp": ("NFSP", ORANGE),
  "armac": ("ARMAC", BLUE),
  "mccfr": ("MCCFR, tables", GREEN),
  "cfr": ("CFR, whole tree", PURPLE),
}


def draw_games(axis, runs: dict[str, list[dict]]) -> None:
  """Exact distance from the equilibrium of Kuhn poker; bands span the seeds."""
  for name, rows in runs.items():
    label, color = _SOLVERS[name]
    steps = column(rows, "env_steps")
    low, high = (column(rows, f"nash_conv/{end}") for end in ("low", "high"))
    axis.loglog(steps, column(rows, "nash_conv"), color=color, label=label, linewidth=1.2)
    axis.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
  axis.set(title="ARMAC learns Kuhn poker", xlabel="decisions played", ylabel="NashConv")


def draw_graphs(axis, folder: pathlib.Path) -> None:
  """Accuracy against the signal of a block model; bands span the seeds."""
  signal = json.loads((folder / "config.json").read_text())["sweep"]["at"]
  arrays = json.loads((folder / "results.json").read_text())["result"]["arrays"]
  for name, label, color, style in (
    ("SGC-2", "SGC, not trained", GREY, "--"),
    ("trained", "BGRL", BLUE, "-o"),
    ("no labels", "BGRL, no labels", PURPLE, "-o"),
    ("untrained", "encoder, untrained", ORANGE, "--"),
  ):
    seeds = np.array(arrays[f"signal/{name}"]["values"])
    axis.plot(signal, seeds.mean(1), style, color=color, label=label, markersize=3)
    axis.fill_between(signal, seeds.min(1), seeds.max(1), color=color, alpha=0.15, linewidth=0)
  axis.axvline(1, color=INK, linestyle=":")
  axis.set(title="BGRL and the recovery threshold", xlabel="signal", ylabel="test accuracy")


if __name__ == "__main__":
  main()
