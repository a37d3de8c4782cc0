"""IPO (arXiv:2310.12036): the bandits of the paper's figures 1 and 2.

IPO and DPO train on three data sets of labelled pairs over the arms a, b, c. The paper prints the
third one as {(a, b), (b, a)}, where no loss ever sees arm c. The figure that its text describes
belongs to the reading D3' below. Both run here; the literal D3 is a control.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alignment import ipo, oracles, sequences
from alignment.baselines import dpo
from experiments.loop import training
from experiments.report import plots, results, statistics
from experiments.tasks import bandits

# (winner, loser) pairs.
DATASETS: dict[str, tuple[tuple[int, int], ...]] = {
  "D1": ((0, 1), (1, 2), (0, 2)),
  "D3'": ((0, 1), (1, 0), (1, 2)),
  "D3": ((0, 1), (1, 0)),
}
METHODS: dict[str, Any] = {"ipo": ipo, "dpo": dpo}


def _padded_pairs() -> np.ndarray:
  """Returns all data sets as one array `[datasets, 6, 2]`; repeated pairs keep draws uniform."""
  return np.stack([np.tile(pairs, (6 // len(pairs), 1)) for pairs in DATASETS.values()])


def exact_probs(tau: float) -> np.ndarray:
  """Returns IPO's closed form on each data set, with a uniform reference, `[datasets, 3]`."""
  uniform = np.full(3, -np.log(3.0))
  return np.stack(
    [
      np.exp(
        oracles.ipo_dataset_optimum(np.array(pairs)[:, 0], np.array(pairs)[:, 1], uniform, tau)
      )
      for pairs in DATASETS.values()
    ]
  )


def build(config: Any) -> training.Experiment:
  """Returns the experiment of the preset `bandit`."""
  taus = bandits.positives(config, "algorithm.tau")
  bandits.check_counts(config, num_seeds=2, batch_size=1)
  num_seeds, batch_size = config.data.num_seeds, config.data.batch_size
  num_steps, num_arms = config.train.inner_steps, 3
  optimizer = optax.adam(config.optimizer.learning_rate)
  pairs = jnp.asarray(_padded_pairs())
  exact = jnp.asarray(np.stack([exact_probs(tau) for tau in taus], axis=1))  # [datasets, taus, A]
  configs = {
    "ipo": ipo.Config(tau=jnp.array(taus), reduction=config.algorithm.reduction),
    "dpo": dpo.Config(beta=jnp.array(taus), reduction=config.algorithm.reduction),
  }
  shape = (len(DATASETS), len(taus), num_seeds)
  ref_logp = -float(np.log(num_arms))

  def draw(pairs, key):
    chosen = pairs[jax.random.randint(key, (num_steps, batch_size), 0, len(pairs))]
    ones = jnp.ones((num_steps, batch_size, 1))
    ref_logps = jnp.full((num_steps, batch_size), ref_logp)
    return sequences.PreferenceBatch(
      chosen_tokens=chosen[..., :1],
      chosen_mask=ones,
      chosen_ref_logps=ref_logps,
      rejected_tokens=chosen[..., 1:],
      rejected_mask=ones,
      rejected_ref_logps=ref_logps,
      chosen_probs=jnp.ones((num_steps, batch_size)),
    )

  def init(key):
    del key  # every seed starts at the reference, as in the paper
    runs = {}
    for name, algorithm in METHODS.items():
      one = algorithm.init(jnp.zeros(num_arms), optimizer=optimizer, config=algorithm.Config())
      runs[name] = bandits.broadcast(one, shape)
    return bandits.Sweep(runs, jnp.zeros((), jnp.int32))

  def update(sweep, batch, key):
    del batch
    runs, metrics = {}, {}
    for name, algorithm in METHODS.items():
      bound = functools.partial(algorithm.update, apply_fn=bandits.apply_fn, optimizer=optimizer)
      run = bandits.scan_updates(bound, draw, num_steps)
      over_seeds = jax.vmap(run, in_axes=(0, None, 0, None))
      over_taus = jax.vmap(over_seeds, in_axes=(0, None, 0, 0))
      over_datasets = jax.vmap(over_taus, in_axes=(0, 0, 0, None))
      # Both methods see the same pairs in the same order.
      keys = jax.random.split(key, shape)
      runs[name], losses, _ = over_datasets(sweep.runs[name], pairs, keys, configs[name])
      probs = jax.nn.softmax(runs[name].params)
      if name == "ipo":
        metrics["loss"] = losses.mean()
        metrics["ipo/error"] = jnp.abs(probs.mean(2) - exact).max()
      mean, spread = probs.mean(2), probs.std(2, ddof=1)
      for i, dataset in enumerate(DATASETS):
        for j, tau in enumerate(taus):
          for k, arm in enumerate(bandits.arm_names(num_arms)):
            metrics[f"{name}/{dataset}/{tau}/{arm}"] = mean[i, j, k]
            metrics[f"{name}/{dataset}/{tau}/{arm}_sd"] = spread[i, j, k]
    return bandits.Sweep(runs, sweep.step + 1), metrics

  return training.Experiment(
    init=init,
    update=update,
    batches=bandits.NoData,
    headline="ipo/error",
    maximise=False,
    evaluate=lambda sweep: _result(sweep, taus),
    sample=bandits.sample_table,
    figures=lambda history, result: _figures(history, taus, num_steps, num_seeds),
  )


def _result(sweep: bandits.Sweep, taus: tuple[float, ...]) -> results.Result:
  """Returns the pass criteria and the final probabilities."""
  probs = {name: np.asarray(jax.nn.softmax(run.params)) for name, run in sweep.runs.items()}
  rows, checks = [], []
  for i, dataset in enumerate(DATASETS):
    for j, tau in enumerate(taus):
      exact = exact_probs(tau)[i]
      mean, sd = probs["ipo"][i, j].mean(0), probs["ipo"][i, j].std(0, ddof=1)
      dpo_mean = probs["dpo"][i, j].mean(0)
      # Where the gradient noise vanishes at the optimum, the spread is float32 rounding alone.
      within = bool(np.all(np.abs(mean - exact) <= 3 * sd + 1e-4))
      text = "mean within 3 standard deviations of one seed of the closed form"
      checks.append((f"IPO on {dataset}, tau {tau}: {text}", within))
      if dataset == "D1":
        passed = float(dpo_mean.max()) > 0.99
        checks.append((f"DPO on D1, tau {tau}: one arm above 0.99", passed))
      elif dataset == "D3'":
        passed = float(dpo_mean[2]) < 0.005
        checks.append((f"DPO on D3', tau {tau}: P(c) below 0.005", passed))
      rows.append([dataset, tau, *([*map(float, p)] for p in (exact, mean, dpo_mean))])
  return results.Result(
    metrics={"criteria_passed": statistics.fraction_passed(checks)},
    tables=[
      results.checks_table("Pass criteria", checks),
      results.Table(
        "P(a), P(b), P(c) after training (mean over seeds)",
        ["data", "tau", "IPO, closed form", "IPO, trained", "DPO, trained"],
        rows,
      ),
    ],
  )


def _figures(history, taus, num_steps, num_seeds) -> list[results.Figure]:
  """Draws the paper's figures 1 and 2: probabilities during training, with 95 % intervals."""
  figures = []
  for dataset, title in (("D1", "total order a > b > c"), ("D3'", "c never wins")):
    figure, axes = plots.subplots(len(METHODS), len(taus), sharex=True, sharey=True)
    for row, name in enumerate(METHODS):
      for column, tau in enumerate(taus):
        axis = axes[row][column]
        exact = exact_probs(tau)[list(DATASETS).index(dataset)]
        for k, arm in enumerate(bandits.arm_names(3)):
          # Every seed starts at the reference: one third, spread zero.
          steps = np.array([0, *(record["step"] + 1 for record in history)]) * num_steps
          tag = f"{name}/{dataset}/{tau}/{arm}"
          mean = np.array([1 / 3, *(record[tag] for record in history)])
          spread = np.array([0.0, *(record[f"{tag}_sd"] for record in history)])
          half = statistics.half_width(spread, num_seeds)
          (line,) = axis.plot(steps, mean, label=f"P({arm})")
          axis.fill_between(steps, mean - half, mean + half, color=line.get_color(), alpha=0.2)
          if name == "ipo":
            axis.axhline(exact[k], color=line.get_color(), linestyle=":", linewidth=1)
        axis.set(title=f"{name.upper()}, tau = {tau}", ylim=(-0.03, 1.03))
        if row == len(METHODS) - 1:
          axis.set_xlabel("step")
      axes[row][0].set_ylabel("probability")
    axes[0][0].legend()
    figures.append(
      results.Figure(
        name=f"ipo_bandit_{dataset.replace(chr(39), 'prime')}",
        caption=(
          f"The lines show the mean probability of each arm over {num_seeds} seeds on {dataset} "
          f"({title}). Dotted lines show IPO's closed form. Bands are 95 % intervals; most are too "
          "narrow to see."
        ),
        figure=figure,
      )
    )
  return figures
