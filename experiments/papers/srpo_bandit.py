"""SRPO (arXiv:2406.01660): who wrote the data, what revising brings, and the language-model run.

The bandit trains SRPO, IPO and DPO on labelled pairs that three behaviour policies drew. Arm c
beats both others, arm a crushes arm b: data full of b make a look best to a method that averages
over its data. All methods train the same table, a row to answer with and a row to rewrite each arm.

The revisions are closed forms, no training: ten ordered arms whose reference rewrites an arm into
one near it. (With a reference that ignores what it rewrites, revising does not help.)
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alignment import ipo, oracles, preference_games, sequences, srpo
from alignment.baselines import dpo
from experiments.loop import training
from experiments.report import plots, results, statistics
from experiments.tasks import bandits

PREFERENCES = np.array([[0.5, 0.99, 0.3], [0.01, 0.5, 0.25], [0.7, 0.75, 0.5]])
BEHAVIOURS = {
  "uniform": (1 / 3, 1 / 3, 1 / 3),
  "mostly b": (0.15, 0.70, 0.15),
  "mostly a": (0.70, 0.15, 0.15),
}
METHODS: dict[str, Any] = {"srpo": srpo, "ipo": ipo, "dpo": dpo}
NAMES = {"srpo": "SRPO", "ipo": "IPO", "dpo": "DPO"}
UNIFORM = np.full((3, 3), -np.log(3.0))
REVISION_BETAS = (0.02, 0.05, 0.1, 0.3)
NUM_REVISIONS = 5


class _Data(NamedTuple):
  """Labelled pairs of one behaviour policy and seed: `chosen [N]`, `rejected [N]` arms."""

  chosen: jax.Array
  rejected: jax.Array


def build(config: Any) -> training.Experiment:
  """Returns the experiment of the preset `bandit`."""
  # Two seeds: a standard error is part of a criterion.
  bandits.check_counts(config, num_seeds=2, batch_size=1, num_pairs=1)
  for name in ("beta", "ipo_tau", "dpo_beta"):
    bandits.positives(config, f"algorithm.{name}")
  algorithm, num_seeds = config.algorithm, config.data.num_seeds
  num_pairs, batch_size = config.data.num_pairs, config.data.batch_size
  num_steps = config.train.inner_steps
  optimizer = optax.adam(config.optimizer.learning_rate)
  configs = {
    "srpo": srpo.Config(beta=float(algorithm.beta), alpha=float(algorithm.alpha)),
    "ipo": ipo.Config(tau=float(algorithm.ipo_tau)),
    "dpo": dpo.Config(beta=float(algorithm.dpo_beta)),
  }
  shape = (len(BEHAVIOURS), num_seeds)

  def sample_data(behaviour, key):
    arm_key, label_key = jax.random.split(key)
    first, second = jax.random.categorical(arm_key, jnp.log(behaviour), shape=(2, num_pairs))
    wins = jax.random.bernoulli(label_key, jnp.asarray(PREFERENCES)[first, second])
    return _Data(jnp.where(wins, first, second), jnp.where(wins, second, first))

  # Drawn once, from the seed alone: a resumed run sees the same data.
  over_seeds = jax.vmap(sample_data, in_axes=(None, 0))
  data = jax.jit(jax.vmap(over_seeds))(
    jnp.array(list(BEHAVIOURS.values())), jax.random.split(jax.random.key(config.seed), shape)
  )

  def draw(data: _Data, key):
    ids = jax.random.randint(key, (num_steps, batch_size), 0, num_pairs)
    return _Data(data.chosen[ids], data.rejected[ids])

  def update_one(name, state, pairs, key, config):
    batch = (_srpo_batch if name == "srpo" else _pairs)(pairs)
    return METHODS[name].update(
      state, batch, key, apply_fn=bandits.contextual_apply_fn, optimizer=optimizer, config=config
    )

  def init(key):
    del key  # every seed starts at the reference
    runs = {}
    for name, method in METHODS.items():
      one = method.init(jnp.zeros((4, 3)), optimizer=optimizer, config=configs[name])
      runs[name] = bandits.broadcast(one, shape)
    averages = {name: jnp.full((*shape, 3), 1 / 3) for name in METHODS}
    return bandits.Sweep(runs, jnp.zeros((), jnp.int32), averages)

  def update(sweep, batch, key):
    del batch
    runs, metrics, averages = {}, {}, {}
    for name in METHODS:
      run = bandits.scan_updates(
        functools.partial(update_one, name),
        draw,
        num_steps,
        observe=lambda state: jax.nn.softmax(state.params[0]),
      )
      runs_of_seeds = jax.vmap(jax.vmap(run, in_axes=(0, 0, 0, None)), in_axes=(0, 0, 0, None))
      keys = jax.random.split(key, shape)  # all methods see the same batches
      runs[name], losses, averages[name] = runs_of_seeds(
        sweep.runs[name], data, keys, configs[name]
      )
      for i, mean in enumerate(averages[name].mean(1)):
        for k, arm in enumerate(bandits.arm_names(3)):
          metrics[f"{name}/{i}/{arm}"] = mean[k]
      if name == "srpo":
        metrics["loss"] = losses.mean()
    error = jnp.abs(averages["srpo"].mean(1) - jnp.asarray(_exact(algorithm)["srpo"])).max()
    return bandits.Sweep(runs, sweep.step + 1, averages), metrics | {"srpo/error": error}

  return training.Experiment(
    init=init,
    update=update,
    batches=bandits.NoData,
    headline="srpo/error",
    maximise=False,
    evaluate=lambda sweep: _result(sweep, algorithm),
    sample=functools.partial(bandits.sample_table, logits_of=lambda params: params[..., 0, :]),
    figures=lambda history, result: [_behaviour_figure(history, algorithm, num_steps), *_revised()],
  )


def _pairs(pairs: _Data) -> ipo.Batch:
  ones, ref_logps = jnp.ones((len(pairs.chosen), 1)), jnp.full(len(pairs.chosen), -jnp.log(3.0))
  return sequences.PreferenceBatch(
    chosen_tokens=pairs.chosen[:, None],
    chosen_mask=ones,
    chosen_ref_logps=ref_logps,
    rejected_tokens=pairs.rejected[:, None],
    rejected_mask=ones,
    rejected_ref_logps=ref_logps,
    prompt_tokens=jnp.zeros(ones.shape, jnp.int32),
    prompt_mask=ones,
  )


def _srpo_batch(pairs: _Data) -> srpo.Batch:
  """Row 0 of the table answers, row 1 + y rewrites arm y: the prompt of one token says which."""
  ones = jnp.ones((len(pairs.chosen), 1))
  return srpo.Batch(
    chosen_tokens=pairs.chosen[:, None],
    chosen_mask=ones,
    rejected_tokens=pairs.rejected[:, None],
    rejected_mask=ones,
    ref_logps=jnp.full((len(pairs.chosen), len(srpo.SCORED)), -jnp.log(3.0)),
    prompt_tokens=jnp.zeros(ones.shape, jnp.int32),
    prompt_mask=ones,
    given_chosen_tokens=1 + pairs.chosen[:, None],
    given_chosen_mask=ones,
    given_rejected_tokens=1 + pairs.rejected[:, None],
    given_rejected_mask=ones,
  )


def _exact(algorithm: Any) -> dict[str, np.ndarray]:
  """The closed forms, `[behaviours, 3]`; DPO has none on preferences that are not Bradley-Terry."""
  robust, _ = preference_games.srpo_optimum(PREFERENCES, UNIFORM[0], UNIFORM, float(algorithm.beta))
  averaging = [
    oracles.psi_po_optimum(PREFERENCES, np.array(mu), UNIFORM[0], float(algorithm.ipo_tau))
    for mu in BEHAVIOURS.values()
  ]
  return {"srpo": np.exp(np.stack([robust] * len(BEHAVIOURS))), "ipo": np.exp(averaging)}


def revision_win_rates(beta: float) -> dict[str, np.ndarray]:
  """Win rates against the gold policy after 0 to 5 revisions, all in closed form.

  Ten arms of Bradley-Terry quality -2 to 2; the reference answers near arm 2, the gold policy near
  arm 6, and the reference's rewrites stay within an arm or two.
  """
  arms = np.arange(10.0)
  quality = np.linspace(-2, 2, 10)
  preferences = 1 / (1 + np.exp(quality[None] - quality[:, None]))

  def normalise(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

  reference, gold = normalise(-((arms - 2) ** 2) / 4), normalise(-((arms - 6) ** 2) / 4)
  near = normalise(-(((arms[None] - arms[:, None]) / 1.5) ** 2) / 2)
  answer, rewrite = preference_games.srpo_optimum(preferences, reference, near, beta)
  policies = [np.exp(answer)]
  for _ in range(NUM_REVISIONS):
    policies.append(policies[-1] @ np.exp(rewrite))
  still = {
    "IPO": oracles.psi_po_optimum(preferences, np.exp(reference), reference, beta),
    "DPO": oracles.kl_regularised_optimum(reference, quality, beta),
    "reference": reference,
  }
  wins = preferences @ np.exp(gold)
  return {"SRPO": np.array(policies) @ wins} | {
    name: np.array([np.exp(logps) @ wins]) for name, logps in still.items()
  }


def _result(sweep: bandits.Sweep, algorithm: Any) -> results.Result:
  exact, rows, checks = _exact(algorithm), [], []
  means = {name: np.asarray(average).mean(1) for name, average in sweep.averages.items()}
  best = {name: [int(np.argmax(p)) for p in mean] for name, mean in means.items()}
  for i, behaviour in enumerate(BEHAVIOURS):
    errors = np.abs(means["srpo"][i] - exact["srpo"][i])
    # Labels are noisy: a seed's data have an optimum of their own.
    spread = (
      np.asarray(sweep.averages["srpo"])[i].std(0, ddof=1) / len(sweep.averages["srpo"][i]) ** 0.5
    )
    near = bool(np.all(errors < np.maximum(0.01, 3 * spread)))
    checks.append(
      (f"SRPO, data {behaviour}: within 0.01 or 3 standard errors of its optimum", near)
    )
    for name, mean in means.items():
      closed = [*map(float, exact[name][i])] if name in exact else ""
      rows.append([behaviour, NAMES[name], closed, [*map(float, mean[i])]])
  checks.append(("SRPO prefers arm c on all data", best["srpo"] == [2, 2, 2]))
  checks.append(("IPO's favourite depends on who wrote the data", len(set(best["ipo"])) > 1))
  revised = {beta: revision_win_rates(beta) for beta in REVISION_BETAS}
  rising = all(bool(np.all(np.diff(rates["SRPO"]) > -1e-9)) for rates in revised.values())
  checks.append(("SRPO's win rate never falls with a revision", rising))
  revision_rows = [
    [beta, [*map(float, rates["SRPO"])]]
    + [float(rates[name][0]) for name in ("IPO", "DPO", "reference")]
    for beta, rates in revised.items()
  ]
  return results.Result(
    metrics={"criteria_passed": statistics.fraction_passed(checks)},
    tables=[
      results.checks_table("Pass criteria", checks),
      results.Table(
        "P(a), P(b), P(c), mean over seeds and the last scan",
        ["data", "method", "closed form", "trained"],
        rows,
      ),
      results.Table(
        "Win rate against gold after 0 to 5 revisions (closed forms)",
        ["beta", "SRPO", "IPO", "DPO", "reference"],
        revision_rows,
      ),
    ],
  )


def _behaviour_figure(history, algorithm, num_steps) -> results.Figure:
  figure, axes = plots.subplots(len(METHODS), len(BEHAVIOURS), sharex=True, sharey=True)
  exact = _exact(algorithm)
  # A point is the mean over a scan: it stands in its middle.
  steps = np.array([0, *(record["step"] + 0.5 for record in history)]) * num_steps
  for row, name in enumerate(METHODS):
    for i, behaviour in enumerate(BEHAVIOURS):
      axis = axes[row][i]
      for k, arm in enumerate(bandits.arm_names(3)):
        values = [1 / 3, *(record[f"{name}/{i}/{arm}"] for record in history)]
        (line,) = axis.plot(steps, values, label=f"P({arm})")
        if name in exact:
          axis.axhline(exact[name][i][k], color=line.get_color(), linestyle=":", linewidth=1)
      axis.set(title=f"{NAMES[name]}, data {behaviour}", ylim=(-0.03, 1.03))
      if row == len(METHODS) - 1:
        axis.set_xlabel("step")
    axes[row][0].set_ylabel("probability")
  axes[0][0].legend()
  caption = (
    "The same game, three sources of data. Dotted: closed forms. Only SRPO ignores the source."
  )
  return results.Figure(name="srpo_bandit_behaviour", caption=caption, figure=figure)


def _revised() -> list[results.Figure]:
  figure, axes = plots.subplots(1, len(REVISION_BETAS), sharey=True)
  for axis, beta in zip(axes[0], REVISION_BETAS, strict=True):
    for name, rates in revision_win_rates(beta).items():
      values = np.broadcast_to(rates, NUM_REVISIONS + 1) if len(rates) == 1 else rates
      axis.plot(values, label=name, marker="o" if name == "SRPO" else "")
    axis.set(title=f"beta = {beta}", xlabel="revisions", ylim=(0, 1))
  axes[0][0].set_ylabel("win rate against gold")
  plots.legend_below(figure, axes[0][0])
  caption = "Revising with SRPO's own rewrite, in closed form, where the reference edits locally."
  return [results.Figure(name="srpo_revisions", caption=caption, figure=figure)]
