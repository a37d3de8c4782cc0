"""Tabular Nash-MD on a large game: one compiled scan beside a loop of NumPy.

Both play 10,000 iterations of the theorem's step sizes on the same random game of 1,000 actions in
float32, in turn, and must end at the same policy. `docs/performance.md` holds the results.

  python benchmarks/nash_md.py
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from alignment import nash_md

TAU = 0.1


def make_game(num_actions: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns a random preference matrix and a random reference, float32."""
  rng = np.random.default_rng(0)
  upper = np.triu(rng.uniform(size=(num_actions, num_actions)), 1)
  preferences = upper + np.tril(1 - upper.T, -1) + np.eye(num_actions) / 2
  ref_logps = np.log(rng.dirichlet(np.ones(num_actions)))
  return preferences.astype(np.float32), ref_logps.astype(np.float32)


def numpy_loop(preferences: np.ndarray, ref_logps: np.ndarray, num_steps: int) -> np.ndarray:
  """The same iteration written with NumPy; returns the last log-probabilities."""

  def normalise(logits):
    logits = logits - logits.max()
    return logits - np.log(np.exp(logits).sum())

  logps = ref_logps
  for step in range(num_steps):
    eta = np.float32(2 / (TAU * (step + 2)))
    weight = np.float32(eta * TAU)
    mixture = normalise((1 - weight) * logps + weight * ref_logps)
    logps = normalise(mixture + eta * (preferences @ np.exp(mixture)))
  return logps


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--actions", type=int, default=1000)
  parser.add_argument("--steps", type=int, default=10_000)
  parser.add_argument("--rounds", type=int, default=5)
  args = parser.parse_args()
  preferences, ref_logps = make_game(args.actions)

  @jax.jit
  def scan(preferences, ref_logps):
    def body(logps, step):
      eta = nash_md.step_size(step, tau=TAU)
      return nash_md.nash_md_step(logps, preferences, ref_logps, tau=TAU, eta=eta), None

    return jax.lax.scan(body, ref_logps, jnp.arange(args.steps))[0]

  arrays = jnp.asarray(preferences), jnp.asarray(ref_logps)
  ways = {
    "jax": lambda: np.asarray(scan(*arrays)),
    "numpy": lambda: numpy_loop(preferences, ref_logps, args.steps),
  }
  ends = {name: np.exp(run()) for name, run in ways.items()}  # warm
  if np.abs(ends["jax"] - ends["numpy"]).max() > 1e-5:
    raise SystemExit("the two ways end at different policies")
  seconds: dict[str, list[float]] = {name: [] for name in ways}
  for _ in range(args.rounds):
    for name, run in ways.items():
      start = time.perf_counter()
      run()
      seconds[name].append(time.perf_counter() - start)
  medians = {name: statistics.median(times) for name, times in seconds.items()}
  for name, median in medians.items():
    print(f"{name:6} {median:.3f} s, {args.steps / median:,.0f} iterations a second")
  print(f"ratio {medians['numpy'] / medians['jax']:.2f}")


if __name__ == "__main__":
  main()
