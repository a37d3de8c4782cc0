"""DRO (arXiv:2405.19107): what the value is for, and the language-model run.

The bandit has three prompts with five completions each. Every method sees the same full batch,
drawn from a behaviour policy that is not the reference, and one reward a completion. DRO-V has a
value for each prompt; "shared" has one for all, "no_value" keeps it at zero, DRO-P takes the
variance over the batch, KTO calls a completion good where its reward is above the mean.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alignment import dro, oracles, sequences
from alignment.baselines import kto
from experiments.loop import training
from experiments.report import plots, results, statistics
from experiments.tasks import bandits

REWARDS = np.array(
  [
    [0.13, -0.13, 0.64, 0.10, -0.54],
    [0.36, 1.30, 0.95, -0.70, -1.27],
    [-0.62, 0.04, -2.33, -0.22, -1.25],
  ]
)
REFERENCE = np.log(
  [
    [0.07, 0.11, 0.29, 0.35, 0.18],
    [0.21, 0.10, 0.23, 0.17, 0.29],
    [0.14, 0.10, 0.29, 0.28, 0.19],
  ]
)
# How often each completion is in the data: 40 rows a prompt.
COUNTS = np.array([[2, 16, 10, 1, 11], [1, 16, 15, 1, 7], [4, 14, 11, 1, 10]])
NAMES = {
  "dro_v": "DRO-V",
  "shared": "one value for all prompts",
  "no_value": "value zero",
  "dro_p": "DRO-P over the batch",
  "kto": "KTO",
}


def _rows() -> tuple[np.ndarray, np.ndarray]:
  """Prompt and completion of each row of the data."""
  prompts, arms = np.indices(COUNTS.shape)
  return np.repeat(prompts.ravel(), COUNTS.ravel()), np.repeat(arms.ravel(), COUNTS.ravel())


def build(config: Any) -> training.Experiment:
  """Returns the experiment of the preset `bandit`."""
  bandits.check_counts(config)
  taus, num_steps = bandits.positives(config, "algorithm.tau"), config.train.inner_steps
  optimizer = bandits.cosine_adam(config)
  optima = [oracles.dro_optimum(REFERENCE, REWARDS, tau) for tau in taus]
  exact = np.exp(np.stack([logps for logps, _ in optima]))  # [taus, prompts, A]
  exact_values = np.stack([value for _, value in optima])  # [taus, prompts]
  steps = {name: _step_of(name, optimizer) for name in NAMES}

  def init(key):
    del key  # every run starts at the reference
    policy = jnp.asarray(REFERENCE, jnp.float32)
    params = dro.Params(policy, jnp.zeros(len(REFERENCE)))
    # One kind of state for all: what a method does not use stays where it is.
    one = dro.init(params, optimizer=optimizer, config=dro.Config())
    return bandits.Sweep(
      {name: bandits.broadcast(one, (len(taus),)) for name in NAMES}, jnp.int32(0)
    )

  def update(sweep, batch, key):
    del batch
    runs, metrics = {}, {}
    for name in NAMES:
      run = bandits.scan_updates(steps[name], lambda data, key: jnp.arange(num_steps), num_steps)
      runs[name], losses, _ = jax.vmap(run, in_axes=(0, None, None, 0))(
        sweep.runs[name], (), key, jnp.array(taus)
      )
      errors = jnp.abs(jax.nn.softmax(runs[name].params.policy) - exact).max((1, 2))
      for tau, error in zip(taus, errors, strict=True):
        metrics[f"{name}/{tau}/error"] = error
      if name == "dro_v":
        metrics["loss"] = losses.mean()
        metrics["dro/error"] = errors.max()
        value_errors = jnp.abs(runs[name].params.value - exact_values).max(1)
        for tau, error in zip(taus, value_errors, strict=True):
          metrics[f"{name}/{tau}/value_error"] = error
        metrics["dro/value_error"] = value_errors.max()
    return bandits.Sweep(runs, sweep.step + 1), metrics

  return training.Experiment(
    init=init,
    update=update,
    batches=bandits.NoData,
    headline="dro/error",
    maximise=False,
    evaluate=lambda sweep: _result(sweep, taus, exact, exact_values),
    sample=functools.partial(
      bandits.sample_table, logits_of=lambda params: params.policy[:, :, None]
    ),
    figures=lambda history, result: [_figure(history, taus, num_steps)],
  )


def _step_of(name: str, optimizer: optax.GradientTransformation) -> Any:
  """Returns `(state, batch, key, config) -> (state, metrics)`; `config` is tau."""
  prompts, arms = _rows()
  tokens, ones = jnp.asarray(arms[:, None]), jnp.ones((len(arms), 1))
  ref_logps = jnp.asarray(REFERENCE[prompts, arms], jnp.float32)
  rewards = jnp.asarray(REWARDS[prompts, arms], jnp.float32)
  context = (jnp.asarray(prompts[:, None]), ones)
  data = dro.Batch(tokens, ones, ref_logps, rewards, *context)
  value_of = {
    "dro_v": lambda values, prompts: values[prompts],
    "shared": lambda values, prompts: jnp.broadcast_to(values[0], prompts.shape),
    "no_value": lambda values, prompts: jnp.zeros(prompts.shape),
  }

  if name in value_of:

    def apply_fn(params, rows):
      values = value_of[name](params.value, rows.prompt_tokens[:, -1])
      return bandits.contextual_apply_fn(params.policy, rows), values

    def dro_step(state, batch, key, config):
      del batch
      return dro.update(
        state, data, key, apply_fn=apply_fn, optimizer=optimizer, config=dro.Config(tau=config)
      )

    return dro_step

  def loss(params, tau):
    if name == "dro_p":
      rows = sequences.Sequences(*data[:2], *context)
      log_ratios = bandits.contextual_apply_fn(params.policy, rows)[:, 0] - ref_logps
      return dro.dro_p_loss(log_ratios[None], rewards[None], tau=tau).mean()
    # The completions of other prompts: those of the data rolled by the rows of one prompt.
    shift = len(arms) // len(REFERENCE)
    others = jnp.roll(tokens, shift, axis=0)
    other_ref_logps = jnp.asarray(REFERENCE[prompts, np.roll(arms, shift)], jnp.float32)
    labels = (rewards > rewards.mean()).astype(jnp.float32)
    batch = kto.Batch(tokens, ones, ref_logps, labels, others, ones, other_ref_logps, *context)
    state: Any = None  # KTO's loss does not look at it
    return kto.loss(
      params.policy,
      state,
      batch,
      None,
      apply_fn=bandits.contextual_apply_fn,
      config=kto.Config(beta=tau),
    )[0]

  def step(state, batch, key, config):
    del batch, key
    value, grads = jax.value_and_grad(loss)(state.params, config)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return dro.State(params, opt_state, state.step + 1), {"loss": value}

  return step


def _result(sweep, taus, exact, exact_values) -> results.Result:
  probs = {name: np.asarray(jax.nn.softmax(run.params.policy)) for name, run in sweep.runs.items()}
  errors = {name: np.abs(p - exact).max((1, 2)) for name, p in probs.items()}
  value_errors = np.abs(np.asarray(sweep.runs["dro_v"].params.value) - exact_values).max(1)
  checks = []
  for i, tau in enumerate(taus):
    worst = max(errors["dro_v"][i], value_errors[i])
    checks.append((f"DRO-V, tau {tau}: policy and value within 1e-4", bool(worst < 1e-4)))
    moved = np.abs(probs["shared"][i] - np.exp(REFERENCE)).max() > 1e-2
    same = moved and np.abs(probs["shared"][i] - probs["dro_p"][i]).max() < 1e-3
    checks.append((f"a shared value and DRO-P end alike, tau {tau}", bool(same)))
    biased = min(errors[name][i] for name in ("shared", "no_value", "dro_p", "kto")) > 1e-2
    checks.append((f"all others are more than 0.01 off, tau {tau}", bool(moved and biased)))
  rows = [[NAMES[name], *map(float, errors[name])] for name in NAMES]
  rows.append(["DRO-V, its value", *map(float, value_errors)])
  return results.Result(
    metrics={"criteria_passed": statistics.fraction_passed(checks)},
    tables=[
      results.checks_table("Pass criteria", checks),
      results.Table(
        "Largest error of a probability (and of DRO-V's value) after training",
        ["method", *(f"tau {tau}" for tau in taus)],
        rows,
      ),
    ],
  )


def _figure(history, taus, num_steps) -> results.Figure:
  figure, axes = plots.subplots(1, len(taus), sharey=True)
  steps = (np.array([record["step"] for record in history]) + 1) * num_steps
  for axis, tau in zip(axes[0], taus, strict=True):
    for name, label in NAMES.items():
      axis.semilogy(steps, [record[f"{name}/{tau}/error"] for record in history], label=label)
    values = [record[f"dro_v/{tau}/value_error"] for record in history]
    axis.semilogy(steps, values, "k:", label="DRO-V, error of its value")
    axis.set(title=f"tau = {tau}", xlabel="step")
  axes[0][0].set_ylabel("largest error of a probability")
  plots.legend_below(figure, axes[0][0])
  caption = "One value a prompt is what the regression needs; the others stop beside the optimum."
  return results.Figure(name="dro_bandit_error", caption=caption, figure=figure)
