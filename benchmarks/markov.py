"""Synchronous quantile TD: transitions per second beside NumPy and rlax, and work against m.

All sides learn the same Garnet (S states, Gaussian rewards) from the same first tables, with random
numbers of their own, and take turns in one process. Before anything is timed, one step on the same
transitions must agree. Reported are medians over rounds of the transitions per second, and of the
ratio to ours in the same round. Ours is one scan of `qtd.update`, sampling included, with all seeds
vmapped; `--method` chooses the form. NumPy's side has both ways of doing it, for all seeds at once.
rlax's quantile regression is differentiated in the same scan; where rlax cannot be imported it is
left out with the reason.

  python benchmarks/markov.py                             # S = 100, m = 128, 32 seeds
  python benchmarks/markov.py --steps 10000 --rounds 3
  python benchmarks/markov.py --scaling                   # operations and time against m
"""

import argparse
import functools
import importlib
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rl_theory import markov, qtd

RATE, DISCOUNT = 0.05, 0.9


def our_scan(
  mrp: markov.MarkovRewardProcess, tables: jax.Array, num_steps: int, config: qtd.Config
) -> Callable[[jax.Array], jax.Array]:
  """Returns a compiled function from one key to all seeds' tables after the steps."""
  optimizer, states = optax.sgd(RATE), jnp.arange(tables.shape[1], dtype=jnp.int32)

  def learn(mrp: Any, table: jax.Array, key: jax.Array) -> jax.Array:
    def body(state: qtd.State, key: jax.Array) -> tuple[qtd.State, None]:
      batch = qtd.Batch(states, *markov.sample_step(mrp, key))
      state, _ = qtd.update(
        state, batch, None, apply_fn=qtd.lookup, optimizer=optimizer, config=config
      )
      return state, None

    state = qtd.init(table, optimizer=optimizer, config=config)
    return jax.lax.scan(body, state, jax.random.split(key, num_steps))[0].params

  mapped = jax.jit(jax.vmap(learn, (None, 0, 0)))
  return lambda key: mapped(mrp, tables, jax.random.split(key, len(tables)))


def our_array_scan(
  mrp: markov.MarkovRewardProcess, tables: jax.Array, num_steps: int, method: str
) -> Callable[[jax.Array], jax.Array]:
  """The same with `qtd.quantile_td_error` alone: no loss, no optimiser."""

  def learn(mrp: Any, table: jax.Array, key: jax.Array) -> jax.Array:
    def body(table: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
      rewards, following = markov.sample_step(mrp, key)
      targets = rewards[:, None] + DISCOUNT * table[following]
      return table + RATE * qtd.quantile_td_error(table, targets, method=method), None

    return jax.lax.scan(body, table, jax.random.split(key, num_steps))[0]

  mapped = jax.jit(jax.vmap(learn, (None, 0, 0)))
  return lambda key: mapped(mrp, tables, jax.random.split(key, len(tables)))


def rlax_scan(
  mrp: markov.MarkovRewardProcess, tables: jax.Array, num_steps: int
) -> Callable[[jax.Array], jax.Array] | None:
  """The same with rlax's quantile regression loss (kappa = 0); None where rlax is missing."""
  try:
    rlax = importlib.import_module("rlax")
  except Exception as error:  # an rlax for another JAX fails in many ways
    print(f"rlax is left out: {type(error).__name__}: {error}")
    return None
  num_quantiles = tables.shape[-1]
  levels = qtd.quantile_levels(num_quantiles)

  def learn(mrp: Any, table: jax.Array, key: jax.Array) -> jax.Array:
    def loss(table: jax.Array, targets: jax.Array) -> jax.Array:
      regression = functools.partial(rlax.quantile_regression_loss, huber_param=0.0)
      return jnp.sum(jax.vmap(lambda own, target: regression(own, levels, target))(table, targets))

    def body(table: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
      rewards, following = markov.sample_step(mrp, key)
      targets = rewards[:, None] + DISCOUNT * table[following]
      return table - RATE * jax.grad(loss)(table, targets), None

    return jax.lax.scan(body, table, jax.random.split(key, num_steps))[0]

  mapped = jax.jit(jax.vmap(learn, (None, 0, 0)))
  return lambda key: mapped(mrp, tables, jax.random.split(key, len(tables)))


def numpy_step(
  tables: np.ndarray, rewards: np.ndarray, following: np.ndarray, way: str
) -> np.ndarray:
  """Returns tables `[N, S, m]` after one step, in NumPy, by sorting or by comparing pairs."""
  num_seeds, num_states, num_quantiles = tables.shape
  targets = rewards[..., None] + DISCOUNT * tables[np.arange(num_seeds)[:, None], following]
  if way == "sort":
    targets = np.sort(targets, axis=-1).reshape(-1, num_quantiles)
    below = np.empty((num_seeds * num_states, num_quantiles), np.int64)
    for row, (ordered, own) in enumerate(
      zip(targets, tables.reshape(-1, num_quantiles), strict=True)
    ):
      below[row] = np.searchsorted(ordered, own)
    below = below.reshape(tables.shape)
  else:
    below = np.empty(tables.shape, np.int64)
    for seed in range(num_seeds):  # the pairs of one seed fit into the cache
      pairs = targets[seed][:, None, :] < tables[seed][:, :, None]
      below[seed] = np.count_nonzero(pairs, axis=-1)
  levels = (2 * np.arange(num_quantiles, dtype=np.float32) + 1) / (2 * num_quantiles)
  return tables + np.float32(RATE) * (levels - below.astype(np.float32) / num_quantiles)


def numpy_run(
  mrp: markov.MarkovRewardProcess, tables: np.ndarray, num_steps: int, way: str, seed: int
) -> np.ndarray:
  """Returns the tables after the steps, with NumPy's random numbers."""
  rng = np.random.default_rng(seed)
  cumulative = np.cumsum(np.asarray(mrp.transitions, np.float64), axis=1)
  offsets = np.arange(len(cumulative))
  flat = (cumulative / cumulative[:, -1:] + offsets[:, None]).ravel()  # one search for all rows
  means = np.asarray(markov.reward_means(mrp))
  for _ in range(num_steps):
    uniform = rng.random(tables.shape[:2])
    following = np.searchsorted(flat, uniform + offsets, side="right") - offsets * len(offsets)
    following = np.clip(following, 0, len(offsets) - 1)
    rewards = means + rng.standard_normal(tables.shape[:2], np.float32)
    tables = numpy_step(tables, rewards, following, way)
  return tables


def check(mrp: markov.MarkovRewardProcess, tables: jax.Array) -> None:
  """Raises unless all ways agree on one step from the same transitions."""
  rewards, following = jax.vmap(lambda key: markov.sample_step(mrp, key))(
    jax.random.split(jax.random.key(5), len(tables))
  )
  own = np.asarray(tables), np.asarray(rewards), np.asarray(following)
  expected = numpy_step(*own, way="pairs")
  np.testing.assert_array_equal(numpy_step(*own, way="sort"), expected)
  targets = rewards[..., None] + DISCOUNT * jax.vmap(lambda table, row: table[row])(
    tables, following
  )
  for method in ("sort", "pairs"):
    found = tables + RATE * qtd.quantile_td_error(tables, targets, method=method)
    # A target that rounds to the other side of a quantile moves it by RATE / m.
    differs = np.abs(np.asarray(found) - expected) > 1e-6
    assert differs.mean() < 1e-4, method


def compare(args: argparse.Namespace) -> None:
  """Prints transitions per second of all sides and their ratios to ours."""
  mrp = markov.garnet(
    jax.random.key(0), args.states, min(5, args.states), discount=DISCOUNT, noise="gaussian"
  )
  shape = args.seeds, args.states, args.quantiles
  tables = jax.random.normal(jax.random.key(1), shape)
  check(mrp, tables)
  config = qtd.Config(discount=DISCOUNT, method=args.method)
  few = max(args.steps // 100, 5)
  work: dict[str, tuple[Callable[[int], Any], int]] = {}
  update = our_scan(mrp, tables, args.steps, config)
  array = our_array_scan(mrp, tables, args.steps, args.method)
  work["update"] = (lambda seed: update(jax.random.key(seed))), args.steps
  work["quantile_td_error"] = (lambda seed: array(jax.random.key(seed))), args.steps
  other = "sort" if args.method != "sort" else "pairs"
  slower = our_array_scan(mrp, tables, few, other)
  work[f"quantile_td_error, {other}"] = (lambda seed: slower(jax.random.key(seed))), few
  rlax = rlax_scan(mrp, tables, few)
  if rlax is not None:
    work["rlax"] = (lambda seed: rlax(jax.random.key(seed))), few
  for way in ("sort", "pairs"):
    run = functools.partial(numpy_run, mrp, np.asarray(tables), few, way)
    work[f"NumPy, {way}"] = run, few
  rates: dict[str, list[float]] = {name: [] for name in work}
  for number in range(args.rounds + 1):  # the first round compiles
    for name, (run, steps) in work.items():
      start = time.perf_counter()
      jax.block_until_ready(run(number))
      elapsed = time.perf_counter() - start
      if number:
        rates[name].append(args.seeds * args.states * steps / elapsed)
  print(
    f"S = {args.states}, m = {args.quantiles}, {args.seeds} seeds, {args.steps} steps in a scan"
  )
  for name, found in rates.items():
    ratios = [ours / theirs for ours, theirs in zip(rates["update"], found, strict=True)]
    print(
      f"  {name:28s}{statistics.median(found):14,.0f} transitions a second "
      f"(best {max(found):,.0f}); ours is {statistics.median(ratios):.2f} times this"
    )


def operations(method: str, size: int) -> int:
  """Returns how many comparisons one transition needs with m = n = size.

  Counted by hand, since XLA's cost analysis counts the body of a loop once: all pairs, or a sort
  and m binary searches.
  """
  if method == "pairs":
    return size * size
  return 2 * size * math.ceil(math.log2(size))


def scale(args: argparse.Namespace) -> None:
  """Prints comparisons and time of both forms against m, with their slopes."""
  sizes = [64, 128, 256, 512, 1024, 2048, 4096]
  for method in ("sort", "pairs"):
    counts, times = [], []
    for size in sizes:
      rows = max(200_000 // size, 8)
      own, targets = jax.random.normal(jax.random.key(0), (2, rows, size))
      error = jax.jit(functools.partial(qtd.quantile_td_error, method=method))
      jax.block_until_ready(error(own, targets))
      found = []
      for _ in range(args.rounds):
        start = time.perf_counter()
        jax.block_until_ready(error(own, targets))
        found.append((time.perf_counter() - start) / rows)
      counts.append(operations(method, size))
      times.append(min(found))
      print(
        f"  {method:6s} m = {size:5d}: {counts[-1]:10,d} comparisons, "
        f"{1e6 * times[-1]:9.1f} us a transition",
        flush=True,
      )
    slopes = [np.polyfit(np.log(sizes), np.log(values), 1)[0] for values in (counts, times)]
    print(f"  {method}: slope {slopes[0]:.2f} in comparisons, {slopes[1]:.2f} in time")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--states", type=int, default=100)
  parser.add_argument("--quantiles", type=int, default=128)
  parser.add_argument("--seeds", type=int, default=32)
  parser.add_argument("--steps", type=int, default=10_000)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--method", choices=qtd.METHODS, default="auto")
  parser.add_argument("--scaling", action="store_true", help="work and time against m")
  args = parser.parse_args()
  print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, JAX {jax.__version__}")
  if args.scaling:
    scale(args)
  else:
    compare(args)


if __name__ == "__main__":
  main()
