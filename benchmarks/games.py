"""Solving games beside OpenSpiel's C++ solvers and LiteEFG: CFR iterations and NashConv.

All hold the same game, in one process, and are asked in turn, so all meet the same machine; medians
over rounds of the time per call of a few calls in a row, the fastest in brackets. Ours has the game
as an argument (never a constant of the compiled program), in float32 or with --double in float64;
the others have float64 only. CFR is alternating here and in OpenSpiel; LiteEFG's own CFR updates
both players at once.

Before anything is timed all must agree, or nothing is reported: on the NashConv of the same policy,
and on that of what each finds alone in ten iterations. After it, the accuracy: the NashConv of
our average policy after some iterations of CFR+, measured in float64 by OpenSpiel.

  python benchmarks/games.py                                 # Kuhn, Leduc, goofspiel, Liar's dice
  python benchmarks/games.py --double
  python benchmarks/games.py --games liars_dice --rounds 3 --accuracy 100
  python benchmarks/games.py --games leduc_poker --copies 1000 --iterations 100 --devices 2
  python benchmarks/games.py --games "liars_dice(numdice=1,dice_sides=4)" --sampling --samples 16

LiteEFG is used where it can be imported; it keeps its games in ~/game_instances. It asks for an
older JAX than ours: install it with `pip install --no-deps LiteEFG` and add pandas and tqdm.
"""

import argparse
import contextlib
import dataclasses
import importlib
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyspiel
from jax.sharding import PartitionSpec

import sharding
from rl_theory import cfr, games, mccfr, policy_arrays

GAMES = (
  "kuhn_poker",
  "leduc_poker",
  "goofspiel(num_cards=4,imp_info=True)",
  "liars_dice(numdice=1,dice_sides=4)",
)
CHECKED = 10  # iterations after which all must agree
Work = dict[str, tuple[Callable[[], Any], int]]


def milliseconds(function: Callable[[], Any], count: int) -> float:
  """Returns the time of one of `count` things that `function` does."""
  start = time.perf_counter()
  jax.block_until_ready(function())
  return (time.perf_counter() - start) / count * 1e3


class Times(NamedTuple):
  """Milliseconds over the rounds; where others use the machine too, the fastest says more."""

  median: float
  fastest: float

  def __str__(self) -> str:
    return f"{self.median:10.4f} ({self.fastest:10.4f}) ms"


def measure_in_turn(work: Work, rounds: int) -> dict[str, Times]:
  """Returns the times of each work, asked in turn; the first round compiles."""
  times: dict[str, list[float]] = {label: [] for label in work}
  for number in range(rounds + 1):
    for label, (function, count) in work.items():
      elapsed = milliseconds(function, count)
      if number:
        times[label].append(elapsed)
  return {label: Times(statistics.median(found), min(found)) for label, found in times.items()}


def repeat(function: Callable[[], Any], count: int) -> Callable[[], Any]:
  """Returns a function that calls `function` so often and returns its last result."""
  return lambda: [function() for _ in range(count)][-1]


class LiteEFG:
  """CFR as LiteEFG ships it: both players at once, the average cumulated by its environment."""

  def __init__(self, game: Any) -> None:
    library = importlib.import_module("LiteEFG")
    cfr_graph = importlib.import_module("LiteEFG.baselines.CFR")
    with contextlib.redirect_stdout(None):
      self.graph = cfr_graph.graph()
      self.environment = library.OpenSpielEnv(game)
      self.environment.set_graph(self.graph)

  def iterate(self) -> None:
    """Does one iteration; the policy counts before it changes, so that the first one does too."""
    self.environment.update_strategy(self.graph.current_strategy())
    self.graph.update_graph(self.environment)

  def nash_conv(self) -> float:
    """Returns the NashConv of the average policy."""
    return sum(self.environment.exploitability(self.graph.current_strategy(), "avg-iterate"))


def make_liteefg(game: Any) -> LiteEFG | None:
  """Returns LiteEFG's solver, or None where it is not installed."""
  try:
    return LiteEFG(game)
  except ImportError as error:
    print(f"LiteEFG is left out: {error}")
    return None


def check(game: games.Game, theirs: Any, solver: Any, liteefg: LiteEFG | None) -> None:
  """Raises unless all find the same NashConv of one policy, and of what each solves."""
  # Sums over all terminal histories.
  tolerance = 1e-9 if game.utilities.dtype == jnp.float64 else 1e-4
  policy = jnp.asarray(policy_arrays.uniform(game))
  np.testing.assert_allclose(
    games.nash_conv(game, policy),
    pyspiel.nash_conv(theirs, policy_arrays.to_openspiel(game, policy)),
    rtol=tolerance,
  )
  for _ in range(CHECKED):
    solver.evaluate_and_update_policy()
  ours = cfr.solve(game, num_iterations=CHECKED).average_policy
  # Ten iterations of sums; regrets that cancel nearly are rounded most.
  np.testing.assert_allclose(
    games.nash_conv(game, ours),
    pyspiel.nash_conv(theirs, solver.average_policy()),
    rtol=10 * tolerance,
  )
  if liteefg is not None:
    for _ in range(CHECKED):
      liteefg.iterate()
    ours = cfr.solve(game, num_iterations=CHECKED, alternating=False).average_policy
    np.testing.assert_allclose(
      liteefg.nash_conv(), games.nash_conv(game, ours), rtol=10 * tolerance
    )


@jax.jit
def nash_conv_often(game: games.Game, policy: jax.Array, count: int) -> jax.Array:
  """Returns the NashConv of a policy, computed so often inside one program."""

  def body(_: int, found: jax.Array) -> jax.Array:
    return games.nash_conv(game, policy + 0 * found)  # each waits for the one before

  return jax.lax.fori_loop(0, count, body, jnp.zeros((), policy.dtype))


def measure(name: str, *, rounds: int, iterations: int, accuracy: int, dtype: Any) -> None:
  """Prints the median milliseconds of each side's work, and the accuracy of ours."""
  start = time.perf_counter()
  game = games.compile_game(name, dtype=dtype)
  print(f"\n{game!r}, {jnp.dtype(dtype).name}; compiled in {time.perf_counter() - start:.1f} s")
  theirs = pyspiel.load_game(game.layout.name)
  solver, liteefg = pyspiel.CFRSolver(theirs), make_liteefg(theirs)
  check(game, theirs, solver, liteefg)
  policy = policy_arrays.uniform(game)
  exported = policy_arrays.to_openspiel(game, policy)
  few, calls = max(iterations // 100, 1), 20
  work: Work = {
    "CFR iteration, ours": (lambda: cfr.solve(game, num_iterations=iterations), iterations),
    "CFR iteration, OpenSpiel": (repeat(solver.evaluate_and_update_policy, few), few),
    "NashConv, ours": (repeat(lambda: games.nash_conv(game, policy), calls), calls),
    "NashConv, ours, inside a program": (lambda: nash_conv_often(game, policy, calls), calls),
    "NashConv, OpenSpiel": (lambda: pyspiel.nash_conv(theirs, exported), 1),
  }
  if liteefg is not None:
    work["CFR iteration, LiteEFG"] = repeat(liteefg.iterate, few), few
    work["NashConv, LiteEFG"] = liteefg.nash_conv, 1
  found = measure_in_turn(work, rounds)
  for label, times in sorted(found.items()):
    ours = found[label.split(",")[0] + ", ours"]
    ratios = [time / own for time, own in zip(times, ours, strict=True)]
    print(f"  {label:36s} {times}; {ratios[0]:7.1f} ({ratios[1]:7.1f}) x ours")
  solved = cfr.solve(game, num_iterations=accuracy, variant="cfr+").average_policy
  distance = pyspiel.nash_conv(theirs, policy_arrays.to_openspiel(game, solved))
  print(f"  NashConv after {accuracy} iterations of CFR+: {distance:.3g}", flush=True)


def measure_copies(name: str, *, rounds: int, iterations: int, copies: int, dtype: Any) -> None:
  """Prints the time per iteration and copy of many solvers with other payoffs each."""
  game = games.compile_game(name, dtype=dtype)
  scales = jnp.linspace(0.5, 1.5, copies, dtype=dtype)

  def solve_scaled(game: games.Game, scale: jax.Array) -> jax.Array:
    scaled = dataclasses.replace(game, utilities=scale * game.utilities)
    return cfr.solve(scaled, num_iterations=iterations).average_policy

  def one_by_one(game: games.Game, scales: jax.Array) -> jax.Array:
    return jax.lax.map(lambda scale: solve_scaled(game, scale), scales)

  single = jax.jit(solve_scaled)
  ways = {
    "vmap": jax.jit(jax.vmap(solve_scaled, in_axes=(None, 0))),
    "lax.map": jax.jit(one_by_one),
    f"lax.map on each of {jax.device_count()} devices": jax.jit(
      jax.shard_map(
        one_by_one,
        mesh=sharding.make_mesh({"data": -1}),
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec("data"),
        check_vma=False,  # states begin as zeros, the same on all devices
      )
    ),
  }
  work: Work = {"one alone": (lambda: single(game, scales[0]), iterations)}
  for label, way in ways.items():
    work[label] = (lambda way=way: way(game, scales)), iterations * copies
  print(f"\n{name}, {copies} copies, {iterations} iterations, {jnp.dtype(dtype).name}")
  for label, times in measure_in_turn(work, rounds).items():
    print(f"  {label:36s} {times} an iteration and copy", flush=True)


def measure_sampling(name: str, *, rounds: int, iterations: int, samples: int, dtype: Any) -> None:
  """Prints compile time, time of a sample of each player, and the NashConv that samples reach.

  Ours takes `samples` at a time, OpenSpiel one.
  """
  game = games.compile_game(name, dtype=dtype)
  key = jax.random.key(0)
  theirs = pyspiel.load_game(game.layout.name)
  print(f"\n{name}, Monte Carlo CFR, {samples} samples an update, {jnp.dtype(dtype).name}")
  for kind, solver in (
    ("outcome", pyspiel.OutcomeSamplingMCCFRSolver(theirs)),
    ("external", pyspiel.ExternalSamplingMCCFRSolver(theirs)),
  ):
    config = mccfr.Config(sampling=kind, num_samples=samples)

    def solve(config: mccfr.Config = config) -> Any:
      count = max(iterations // samples, 1)
      return mccfr.solve(game, key, num_iterations=count, config=config).average_policy

    few = max(iterations // 10, 1)
    first = milliseconds(solve, 1)
    work: Work = {"ours": (solve, iterations), "theirs": (repeat(solver.run_iteration, few), few)}
    found = measure_in_turn(work, rounds)
    compiling = (first - iterations * found["ours"].median) / 1e3
    for _ in range(max(iterations - rounds * few, 0)):
      solver.run_iteration()
    reached = [
      float(games.nash_conv(game, policy))
      for policy in (solve(), policy_arrays.from_openspiel(game, solver.average_policy()))
    ]
    print(
      f"  {kind:10s} compiles in {compiling:.1f} s; a sample {found['ours']}, OpenSpiel "
      f"{found['theirs']}; NashConv {reached[0]:.3f}, OpenSpiel {reached[1]:.3f}",
      flush=True,
    )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--games", nargs="+", default=GAMES)
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--iterations", type=int, default=1000)
  parser.add_argument("--accuracy", type=int, default=1000, help="iterations of CFR+")
  parser.add_argument("--double", action="store_true", help="float64 in place of float32")
  parser.add_argument("--copies", type=int, default=0, help="time this many solvers mapped")
  parser.add_argument("--devices", type=int, default=1, help="that the CPU is split into")
  parser.add_argument("--sampling", action="store_true", help="time Monte Carlo CFR")
  parser.add_argument("--samples", type=int, default=1, help="samples in one update of MCCFR")
  args = parser.parse_args()
  jax.config.update("jax_enable_x64", args.double)
  if args.devices > 1:
    jax.config.update("jax_num_cpu_devices", args.devices)
  dtype = jnp.float64 if args.double else jnp.float32
  version = f"JAX {jax.__version__}, OpenSpiel {pyspiel.__version__}"
  print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {version}")
  settings = {"rounds": args.rounds, "iterations": args.iterations, "dtype": dtype}
  for name in args.games:
    if args.copies:
      measure_copies(name, copies=args.copies, **settings)
    elif args.sampling:
      measure_sampling(name, samples=args.samples, **settings)
    else:
      measure(name, accuracy=args.accuracy, **settings)


if __name__ == "__main__":
  main()
