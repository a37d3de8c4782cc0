"""Solving games beside OpenSpiel's C++ solvers: time of a CFR iteration and of a NashConv.

Both sides hold the same game, in one process, and are asked in turn, so both meet the same machine;
medians over rounds. Ours is float32 with the game as an argument (never a constant of the compiled
program); OpenSpiel's is float64, the only one it has. They must agree on the NashConv of the
average policy after ten iterations, to what float32 allows, or nothing is reported.

  python benchmarks/games.py                                 # Kuhn, Leduc, Liar's dice with 4 sides
  python benchmarks/games.py --games "goofspiel(num_cards=4,imp_info=True)" --rounds 9
  python benchmarks/games.py --copies 256                    # also that many solvers under one vmap
"""

import argparse
import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import pyspiel

from rl_theory import cfr, games

GAMES = ("kuhn_poker", "leduc_poker", "liars_dice(numdice=1,dice_sides=4)")
CHECKED = 10  # iterations after which the two sides must agree


def milliseconds(function, count: int) -> float:
  """Returns the time of one of `count` things that `function` does."""
  start = time.perf_counter()
  jax.block_until_ready(function())
  return (time.perf_counter() - start) / count * 1e3


def check(game: games.Game, theirs) -> None:
  """Raises unless both sides find the same NashConv of what both solve."""
  solver = pyspiel.CFRSolver(theirs)
  for _ in range(CHECKED):
    solver.evaluate_and_update_policy()
  reference = pyspiel.nash_conv(theirs, solver.average_policy())
  ours = games.nash_conv(game, cfr.solve(game, num_iterations=CHECKED).average_policy)
  # Solved apart and measured apart; float32 over ten iterations.
  np.testing.assert_allclose(ours, reference, rtol=1e-3)


def measure(name: str, *, rounds: int, iterations: int, copies: int) -> dict[str, float]:
  """Returns the median milliseconds of each side's work."""
  game = games.compile_game(name)
  theirs = pyspiel.load_game(game.layout.name)
  check(game, theirs)
  solver = pyspiel.CFRSolver(theirs)
  policy = games.uniform_policy(game)
  exported = games.policy_to_openspiel(game, policy)
  scales = jnp.linspace(0.5, 1.5, copies)

  @jax.jit
  @jax.vmap
  def solve_scaled(scale):
    scaled = dataclasses.replace(game, utilities=scale * game.utilities)
    return cfr.solve(scaled, num_iterations=iterations).average_policy

  def iterate():
    for _ in range(max(iterations // 100, 1)):
      solver.evaluate_and_update_policy()

  work = {
    "CFR iteration, ours": (lambda: cfr.solve(game, num_iterations=iterations), iterations),
    "CFR iteration, OpenSpiel": (iterate, max(iterations // 100, 1)),
    "NashConv, ours": (lambda: games.nash_conv(game, policy), 1),
    "NashConv, OpenSpiel": (lambda: pyspiel.nash_conv(theirs, exported), 1),
  }
  if copies > 1:
    label = f"CFR iteration, ours, one of {copies} mapped"
    work[label] = (lambda: solve_scaled(scales), iterations * copies)
  times: dict[str, list[float]] = {label: [] for label in work}
  for number in range(rounds + 1):
    for label, (function, count) in work.items():
      elapsed = milliseconds(function, count)
      if number:  # the first round compiles
        times[label].append(elapsed)
  return {label: statistics.median(values) for label, values in times.items()}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--games", nargs="+", default=GAMES)
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--iterations", type=int, default=1000)
  parser.add_argument("--copies", type=int, default=1)
  args = parser.parse_args()
  print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, OpenSpiel {pyspiel.__version__}")
  for name in args.games:
    found = measure(name, rounds=args.rounds, iterations=args.iterations, copies=args.copies)
    print(f"\n{name}, median ms over {args.rounds} rounds")
    for label, value in found.items():
      print(f"  {label:42s} {value:10.4f}")


if __name__ == "__main__":
  main()
