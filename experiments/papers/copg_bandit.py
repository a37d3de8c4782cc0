"""CoPG (arXiv:2406.19185): the off-policy bandit of the paper's toy figure.

The bandit compares four methods on the same fixed pairs (y ~ mu1, y' ~ mu2). The first is CoPG. The
second is IPO, on one label drawn for each pair. The other two are policy gradients that ignore that
the data are off-policy: one without a baseline, one with the policy's mean reward as its baseline.

The paper runs 100 epochs. The preset runs 300 with the same learning rate, because CoPG is still
descending after 100.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sharding
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
# The pass criterion of each method: its final regret must lie in this interval.
REGRET_RANGES = {
  "copg": (0.0, 1e-4),
  "ipo": (0.14, 0.16),
  "pg": (0.60, 0.66),
  "pg_value": (0.012, 0.016),
}


class _Data(NamedTuple):
  """Data of one seed: `arms [N, 2]`, and `chosen [N]`, the column (0 or 1) of the preferred arm."""

  arms: jax.Array
  chosen: jax.Array


def _sample_data(key: jax.Array, num_pairs: int) -> _Data:
  arm_key, label_key = jax.random.split(key)
  logits = jnp.log(jnp.asarray(BEHAVIOUR))
  arms = jax.random.categorical(arm_key, logits, shape=(num_pairs, 2))
  rewards = jnp.asarray(REWARDS)[arms]
  first_wins = jax.random.bernoulli(label_key, jax.nn.sigmoid(rewards[:, 0] - rewards[:, 1]))
  return _Data(arms, 1 - first_wins.astype(jnp.int32))


def _policy_gradient_loss(params, state, batch: copg.Batch, key, *, apply_fn, config, use_value):
  """REINFORCE on off-policy pairs, both arms; the weights (R_beta - b) carry no gradient."""
  del state, key, apply_fn
  logps = jax.nn.log_softmax(params)
  arm_logps = logps[batch.tokens[..., 0]]  # [B, 2]
  returns = batch.rewards - config.beta * (arm_logps - batch.ref_logps)
  baseline = jnp.exp(logps) @ jnp.asarray(REWARDS, logps.dtype) if use_value else 0.0
  value = -jnp.mean(jnp.sum(jax.lax.stop_gradient(returns - baseline) * arm_logps, axis=1))
  return value, ({"loss": value}, ())


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
  """Returns J(pi*) - J(pi) of logits `[..., 3]`, with the uniform policy as the reference."""
  logps = jax.nn.log_softmax(logits)
  uniform = jnp.full_like(logps, -jnp.log(3.0))
  rewards = jnp.broadcast_to(jnp.asarray(REWARDS, logps.dtype), logps.shape)
  return oracles.regret(logps, uniform, rewards, beta)


def ipo_limit(beta: float) -> np.ndarray:
  """Returns where IPO ends with exact win probabilities and pairs of mu1 x mu2, `[3]`.

  IPO's targets are the probabilities, which are no linear function of the rewards. So its policy is
  not CoPG's, even without noise in the labels.
  """
  weights = np.outer(*BEHAVIOUR)
  targets = (1 / (1 + np.exp(REWARDS - REWARDS[:, None])) - 0.5) / beta
  # Least squares: the log-ratios u solve L u = b, with the Laplacian L of the weights.
  symmetric = weights + weights.T
  laplacian = np.diag(symmetric.sum(1)) - symmetric
  logits = np.linalg.pinv(laplacian) @ (symmetric * targets).sum(1)
  return np.exp(logits) / np.exp(logits).sum()


def build(config: Any) -> training.Experiment:
  """Returns the experiment of the preset `bandit`."""
  bandits.check_counts(config, num_seeds=2, batch_size=1, num_pairs=1)
  (beta,), batch_size = bandits.positives(config, "algorithm.beta"), config.data.batch_size
  num_seeds, num_steps = config.data.num_seeds, config.train.inner_steps
  num_pairs = config.data.num_pairs
  if batch_size * num_steps > num_pairs:
    raise ValueError(
      f"train.inner_steps={num_steps} batches of data.batch_size={batch_size} need more than "
      f"data.num_pairs={num_pairs} pairs, but each epoch draws without replacement: lower one of "
      "the first two"
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
    loss = functools.partial(_policy_gradient_loss, use_value=name == "pg_value")
    return sharding.gradient_step(loss, state, batch, key, config=config, **bound)

  def draw(data: _Data, key):
    # One epoch: a permutation cut into full batches, without the remainder.
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

  # The data depend only on the seed, so a resumed run sees the same.
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
      keys = jax.random.split(key, num_seeds)  # the same batches for all methods
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
  limit = ipo_limit(beta)
  text = "IPO on exact probabilities, closed form"
  rows.append([text, float(regret(np.log(limit), beta)), *map(float, limit)])
  rows.append(["exact optimum", 0.0, *map(float, exact)])
  return results.Result(
    metrics={"criteria_passed": statistics.fraction_passed(checks)},
    tables=[
      results.checks_table("Pass criteria", checks),
      results.Table(
        "Regret and policy after training, mean over seeds",
        ["method", "regret", "P(a)", "P(b)", "P(c)"],
        rows,
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
    # A regret cannot be negative, so its band is that of the logarithm; 1e-6 is float32 rounding.
    ratio = np.exp(statistics.half_width(sd, num_seeds) / np.maximum(mean, 1e-6))
    (line,) = axes[0][0].plot([0, *epochs], mean, label=NAMES[name])
    axes[0][0].fill_between(
      [0, *epochs], mean / ratio, mean * ratio, alpha=0.2, color=line.get_color()
    )
  axes[0][0].set(xlabel="epoch", ylabel="regret J(pi*) - J(pi)", yscale="symlog")
  axes[0][0].set_yscale("symlog", linthresh=1e-2)
  axes[0][0].axhline(0, color="0.6", linewidth=0.8)
  axes[0][0].legend()
  caption = (
    "The curves show the mean regret over seeds; bands are 95 % intervals. Only CoPG's baseline is "
    "valid off-policy: the other methods end at biased policies."
  )
  return [results.Figure(name="copg_bandit_regret", caption=caption, figure=figure)]
