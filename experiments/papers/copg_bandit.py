"""CoPG (arXiv:2406.19185): the off-policy bandit of its toy figure, and the language-model run.

The bandit compares four methods on the same fixed pairs (y ~ mu1, y' ~ mu2): CoPG, IPO on labels
drawn once per pair, and two policy gradients that ignore that the data are off-policy, without a
baseline and with the policy's own mean reward as one.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alignment import copg, ipo, oracles, sequences
from experiments.loop import training
from experiments.report import plots, results, statistics
from experiments.tasks import bandits

REWARDS = np.array([2.5, 2.0, 1.0])
BEHAVIOUR = np.array([[0.1, 0.2, 0.7], [0.05, 0.05, 0.9]])  # mu1, mu2
METHODS = ("copg", "ipo", "pg", "pg_value")
NAMES = {
  "copg": "CoPG",
  "ipo": "IPO",
  "pg": "policy gradient, no baseline",
  "pg_value": "policy gradient, value baseline",
}
# Final regret of each method: the interval that the acceptance criterion asks for.
REGRET_RANGES = {
  "copg": (0.0, 1e-4),
  "ipo": (0.14, 0.16),
  "pg": (0.60, 0.66),
  "pg_value": (0.012, 0.016),
}


class _Data(NamedTuple):
  """One seed's data set: `arms [N, 2]`, `chosen [N]` is 1 where the second arm won the label."""

  arms: jax.Array
  chosen: jax.Array


def _sample_data(key: jax.Array, num_pairs: int) -> _Data:
  arm_key, label_key = jax.random.split(key)
  logits = jnp.log(jnp.asarray(BEHAVIOUR))
  arms = jax.random.categorical(arm_key, logits, shape=(num_pairs, 2))
  rewards = jnp.asarray(REWARDS)[arms]
  first_wins = jax.random.bernoulli(label_key, jax.nn.sigmoid(rewards[:, 0] - rewards[:, 1]))
  return _Data(arms, 1 - first_wins.astype(jnp.int32))


def _policy_gradient_loss(params, batch: copg.Batch, *, beta: float, use_value: bool):
  """Off-policy REINFORCE on both arms of each pair: weights (R_beta - b) carry no gradient."""
  logps = jax.nn.log_softmax(params)
  arm_logps = logps[batch.tokens[..., 0]]  # [B, 2]
  returns = batch.rewards - beta * (arm_logps - batch.ref_logps)
  baseline = jnp.exp(logps) @ jnp.asarray(REWARDS, logps.dtype) if use_value else 0.0
  return -jnp.mean(jnp.sum(jax.lax.stop_gradient(returns - baseline) * arm_logps, axis=1))


def _policy_gradient_update(state, batch, key, *, optimizer, config, use_value):
  """The same step as an algorithm's `update`, for the two biased baselines of the figure."""
  del key
  loss, grads = jax.value_and_grad(_policy_gradient_loss)(
    state.params, batch, beta=config.beta, use_value=use_value
  )
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  return copg.State(params, opt_state, state.step + 1), {"loss": loss}


def _as_pairs(batch: copg.Batch, chosen: jax.Array) -> ipo.Batch:
  take = functools.partial(jnp.take_along_axis, batch.tokens, axis=1)
  ones = jnp.ones((*batch.tokens.shape[:1], 1))
  return sequences.PreferenceBatch(
    chosen_tokens=take(chosen[:, None, None])[:, 0],
    chosen_mask=ones,
    chosen_ref_logps=batch.ref_logps[:, 0],
    rejected_tokens=take(1 - chosen[:, None, None])[:, 0],
    rejected_mask=ones,
    rejected_ref_logps=batch.ref_logps[:, 1],
    chosen_probs=jnp.ones(batch.tokens.shape[0]),
  )


def regret(logits: jax.Array, beta: float) -> jax.Array:
  """J(pi*) - J(pi) of logits `[..., 3]` against the uniform reference."""
  logps = jax.nn.log_softmax(logits)
  uniform = jnp.full_like(logps, -jnp.log(3.0))
  rewards = jnp.broadcast_to(jnp.asarray(REWARDS, logps.dtype), logps.shape)
  return oracles.regret(logps, uniform, rewards, beta)


def build(config: Any) -> training.Experiment:
  """Returns the experiment of the preset `bandit`."""
  bandits.check_counts(config, num_seeds=2, batch_size=1, num_pairs=1)
  (beta,), batch_size = bandits.positives(config, "algorithm.beta"), config.data.batch_size
  num_seeds, num_steps = config.data.num_seeds, config.train.inner_steps
  num_pairs = config.data.num_pairs
  if batch_size * num_steps > num_pairs:
    raise ValueError(
      f"train.inner_steps={num_steps} batches of data.batch_size={batch_size} need more than "
      f"data.num_pairs={num_pairs} pairs: one step of the loop is one pass without replacement"
    )
  optimizer = optax.adam(config.optimizer.learning_rate)
  bound = {"apply_fn": bandits.apply_fn, "optimizer": optimizer}
  copg_config, ipo_config = copg.Config(beta=beta), ipo.Config(tau=beta)

  def update_one(name, state, inputs, key, config):
    batch, chosen = inputs
    if name == "copg":
      return copg.update(state, batch, key, config=config, **bound)
    if name == "ipo":
      return ipo.update(state, _as_pairs(batch, chosen), key, config=config, **bound)
    return _policy_gradient_update(
      state, batch, key, optimizer=optimizer, config=config, use_value=name == "pg_value"
    )

  def draw(data: _Data, key):
    # One epoch: a permutation cut into full batches, the remainder dropped.
    ids = jax.random.permutation(key, num_pairs)[: num_steps * batch_size]
    arms, chosen = (x[ids].reshape(num_steps, batch_size, *x.shape[1:]) for x in data)
    batch = copg.Batch(
      tokens=arms[..., None],
      mask=jnp.ones((*arms.shape, 1)),
      ref_logps=jnp.full(arms.shape, -jnp.log(3.0)),
      rewards=jnp.asarray(REWARDS, jnp.float32)[arms],
    )
    return batch, chosen

  def data_of(key):
    return jax.vmap(functools.partial(_sample_data, num_pairs=num_pairs))(
      jax.random.split(key, num_seeds)
    )

  # Drawn once, from the seed alone: a resumed run sees the same data.
  data = jax.jit(data_of)(jax.random.key(config.seed))

  def init(key):
    del key  # every seed starts at the reference, as in the paper
    one = copg.init(jnp.zeros(len(REWARDS)), optimizer=optimizer, config=copg_config)
    as_ipo = ipo.init(jnp.zeros(len(REWARDS)), optimizer=optimizer, config=ipo_config)
    runs = {
      name: bandits.broadcast(as_ipo if name == "ipo" else one, (num_seeds,)) for name in METHODS
    }
    return bandits.Sweep(runs, jnp.zeros((), jnp.int32))

  def update(sweep, batch, key):
    del batch
    runs, metrics = {}, {}
    for name in METHODS:
      run = bandits.scan_updates(functools.partial(update_one, name), draw, num_steps)
      method_config = ipo_config if name == "ipo" else copg_config
      keys = jax.random.split(key, num_seeds)  # all methods see the same batches
      runs[name], losses, _ = jax.vmap(run, in_axes=(0, 0, 0, None))(
        sweep.runs[name], data, keys, method_config
      )
      regrets = regret(runs[name].params, beta)
      metrics[f"{name}/regret"] = regrets.mean()
      metrics[f"{name}/regret_sd"] = regrets.std(ddof=1)
      if name == "copg":
        metrics["loss"] = losses.mean()
    return bandits.Sweep(runs, sweep.step + 1), metrics

  return training.Experiment(
    init=init,
    update=update,
    batches=bandits.NoData,
    headline="copg/regret",
    maximise=False,
    evaluate=lambda sweep: _result(sweep, beta),
    sample=bandits.sample_table,
    figures=lambda history, result: _figures(history, beta, num_seeds),
  )


def _result(sweep: bandits.Sweep, beta: float) -> results.Result:
  rows, checks = [], []
  exact = np.exp(oracles.copg_optimum(np.full(3, -np.log(3.0)), REWARDS, beta))
  for name, (low, high) in REGRET_RANGES.items():
    params = sweep.runs[name].params
    value = float(regret(params, beta).mean())
    # float32 rounds the regret of the optimum to a few 1e-7 on either side of zero.
    checks.append((f"{NAMES[name]}: final regret in [{low}, {high}]", low - 1e-6 <= value <= high))
    probs = np.asarray(jax.nn.softmax(params)).mean(0)
    rows.append([NAMES[name], value, *map(float, probs)])
  rows.append(["exact optimum", 0.0, *map(float, exact)])
  return results.Result(
    metrics={"criteria_passed": statistics.fraction_passed(checks)},
    tables=[
      results.checks_table("Pass criteria", checks),
      results.Table(
        "After training (mean over seeds)", ["method", "regret", "P(a)", "P(b)", "P(c)"], rows
      ),
    ],
  )


def _figures(history, beta, num_seeds) -> list[results.Figure]:
  figure, axes = plots.subplots(1, 1)
  epochs = np.array([record["step"] for record in history]) + 1
  start = float(regret(jnp.zeros(3), beta))
  for name in METHODS:
    mean = np.array([start, *(record[f"{name}/regret"] for record in history)])
    sd = np.array([0.0, *(record[f"{name}/regret_sd"] for record in history)])
    half = 1.96 * sd / num_seeds**0.5
    (line,) = axes[0][0].plot([0, *epochs], mean, label=NAMES[name])
    axes[0][0].fill_between(
      [0, *epochs], mean - half, mean + half, alpha=0.2, color=line.get_color()
    )
  axes[0][0].set(xlabel="epoch", ylabel="regret J(pi*) - J(pi)", yscale="symlog")
  axes[0][0].set_yscale("symlog", linthresh=1e-2)
  axes[0][0].axhline(0, color="0.6", linewidth=0.8)
  axes[0][0].legend()
  caption = (
    "Only CoPG's baseline is valid off-policy: the others stop at, or move to, biased policies."
  )
  return [results.Figure(name="copg_bandit_regret", caption=caption, figure=figure)]
