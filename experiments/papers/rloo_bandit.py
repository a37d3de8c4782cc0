"""RLOO (arXiv:2402.14740), the baseline of CoPG's paper: the problems and the online LM run.

The problems are random, with rewards of a given mean under the reference. At the optimum the
regularised reward is the same for every arm: with the leave-one-out baseline every single gradient
vanishes there, so that RLOO arrives with a constant step size. Without a baseline (REINFORCE) the
gradient vanishes only on average, and the policy trembles.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alignment import oracles
from alignment.baselines import rloo
from experiments.loop import training
from experiments.report import plots, results, statistics
from experiments.tasks import bandit_grid, bandits

NUM_PROBES = 1024  # gradients of single prompts behind a variance
LABELS = {"leave_one_out": "RLOO", "none": "REINFORCE"}


def draw(problem: Any, params: jax.Array, key: jax.Array, *, shape: tuple[int, int]) -> rloo.Batch:
  """Draws arms of the policy `params [A]` as a batch `[B, K]`; a problem is (log ref, rewards)."""
  ref_logps, rewards = problem
  arms = bandits.draw_arms(key, params, shape)
  return rloo.Batch(arms[..., None], jnp.ones((*shape, 1)), ref_logps[arms], rewards[arms])


def gradient_variance(
  problem: Any, params: jax.Array, key: jax.Array, beta: Any, *, num_samples: int, baseline: str
) -> jax.Array:
  """Returns the variance of RLOO's gradient on one prompt, summed over the logits: a scalar."""
  config = rloo.Config(beta=beta, baseline=baseline)
  state: Any = None  # RLOO's loss does not look at it

  def gradient(key):
    batch = draw(problem, params, key, shape=(1, num_samples))
    return jax.grad(rloo.loss, has_aux=True)(
      params, state, batch, None, apply_fn=bandits.apply_fn, config=config
    )[0]

  return jax.vmap(gradient)(jax.random.split(key, NUM_PROBES)).var(0, ddof=1).sum()


def build(config: Any) -> training.Experiment:
  """Returns the experiment of the preset `bandit`."""
  bandits.check_counts(config, batch_size=1, num_samples=2)
  betas, grid = bandits.positives(config, "algorithm.beta"), bandit_grid.random_bandits(config)
  ref_logps, num_samples = grid.ref_logps, config.data.num_samples
  means = (np.exp(ref_logps) * grid.rewards).sum(1, keepdims=True)
  rewards = grid.rewards - means + config.data.mean_reward
  problems = (jnp.asarray(ref_logps, jnp.float32), jnp.asarray(rewards, jnp.float32))
  optima = [oracles.kl_regularised_optimum(ref_logps, rewards, beta) for beta in betas]

  def method(baseline):
    return bandit_grid.Method(
      label=LABELS[baseline],
      algorithm=rloo,
      config=lambda beta: rloo.Config(beta=beta, baseline=baseline),
      batch=lambda problem, setting, params, key: draw(
        problem, params, key, shape=(config.data.batch_size, num_samples)
      ),
      problems=problems,
      start=ref_logps,
      exact=np.exp(optima),
      tolerance=1e-3 if baseline == "leave_one_out" else None,
    )

  methods = {baseline: method(baseline) for baseline in LABELS}

  def variances(params, key):  # [S, P] of each baseline; all see the same arms
    keys = jax.random.split(key, params["none"].shape[:2])
    found = {}
    for baseline in LABELS:
      over_bandits = jax.vmap(
        lambda problem, logits, key, beta, baseline=baseline: gradient_variance(
          problem, logits, key, beta, num_samples=num_samples, baseline=baseline
        ),
        in_axes=(0, 0, 0, None),
      )
      over_betas = jax.vmap(over_bandits, in_axes=(None, 0, 0, 0))
      found[baseline] = over_betas(problems, params[baseline], keys, jnp.array(betas))
    return found

  def observe(sweep, key):
    found = variances({name: run.params for name, run in sweep.runs.items()}, key)
    return {
      f"{name}/{beta}/variance": row.mean()
      for name, rows in found.items()
      for beta, row in zip(betas, rows, strict=True)
    }

  def findings(sweep, ends):
    start = jnp.broadcast_to(problems[0], (len(betas), *ref_logps.shape))
    # Both at the policy that RLOO ends at, and both at the reference.
    places = {"reference": start, "end of RLOO": sweep.runs["leave_one_out"].params}
    found = {
      place: {
        name: np.asarray(x, float)
        for name, x in jax.jit(variances)(dict.fromkeys(LABELS, params), jax.random.key(1)).items()
      }
      for place, params in places.items()
    }
    checks, rows = [], []
    for i, beta in enumerate(betas):
      errors = {name: np.abs(end[i] - np.exp(optima[i])).max() for name, end in ends.items()}
      trembles = bool(errors["none"] > 10 * errors["leave_one_out"])
      checks.append((f"beta {beta}: REINFORCE's error is over ten times RLOO's", trembles))
      for place, by_name in found.items():
        cells = [np.maximum(by_name[name][i], 1e-30) for name in LABELS]
        # Variances of different problems differ by magnitudes: the mean and interval of logarithms.
        ratio = statistics.mean_interval(np.log10(cells[1] / cells[0]))
        rows.append([beta, place, *(float(x.mean()) for x in cells), ratio])
        if place == "end of RLOO":
          text = "RLOO's gradient noise is a hundredth of REINFORCE's at its end, or less"
          checks.append((f"beta {beta}: {text}", ratio.low is not None and ratio.low > 2))
    columns = ["beta", "at the policy", *LABELS.values(), "log10 of the ratio"]
    title = f"Variance of the gradient on one prompt, {num_samples} samples, mean over the problems"
    return checks, [results.Table(title, columns, rows)]

  return bandit_grid.build(
    config,
    methods,
    betas,
    symbol="beta",
    optimizer=optax.sgd(config.optimizer.learning_rate),
    findings=findings,
    observe=observe,
    figures=lambda history: [_figure(history, betas, config.train.inner_steps)],
  )


def _figure(history, betas, num_steps) -> results.Figure:
  figure, axes = plots.subplots(1, len(betas), sharey=True)
  steps = (np.array([record["step"] for record in history]) + 1) * num_steps
  for axis, beta in zip(axes[0], betas, strict=True):
    for name, label in LABELS.items():
      values = [record[f"{name}/{beta}/variance"] for record in history]
      axis.semilogy(steps, np.maximum(values, 1e-12), label=label)
    axis.set(title=f"beta = {beta}", xlabel="step")
  axes[0][0].set_ylabel("variance of the gradient")
  plots.legend_below(figure, axes[0][0])
  caption = "Noise of the gradient on one prompt along each run. The floor is 1e-12."
  return results.Figure("rloo_bandit_variance", caption, figure)
