"""Nash-MD (arXiv:2312.00886): the theorem's rate, large steps, where the policy gradient stops.

And the language-model run, Nash-MD-PG. The bandits are two games, a cycle with unequal odds and
rock-paper-scissors; the reference plays (.6, .3, .1). Trained by the loop are exact policy
gradients on a third one, with four actions: the mixture at several beta (0 is self-play, 1 the best
response to the reference) and, as opponents, moving averages of the parameters. The mirror descents
are scans of seconds, made for the figures in float64.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignment import nash_md, oracles, preference_games
from experiments.loop import training
from experiments.report import plots, results, statistics
from experiments.tasks import bandits

GAMES = {
  "unequal cycle": np.array([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]]),
  "rock-paper-scissors": np.array([[0.5, 1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]]),
}
REFERENCE = np.log([0.6, 0.3, 0.1])
# Drawn once: upper triangle uniform in [.1, .9], reference from a flat Dirichlet, two decimals.
FOUR_ACTIONS = np.array(
  [
    [0.50, 0.61, 0.32, 0.11],
    [0.39, 0.50, 0.75, 0.83],
    [0.68, 0.25, 0.50, 0.59],
    [0.89, 0.17, 0.41, 0.50],
  ]
)
FOUR_REFERENCE = np.log([0.31, 0.27, 0.34, 0.08])
BETAS = (0.0, 0.125, 0.25, 0.5, 1.0)
DECAYS = (0.9, 0.99, 0.999)
NUM_ITERATIONS = 10_000
# tau = 0.1, rock-paper-scissors: constant steps of this size leave both last policies far away.
LARGE_STEP = 3.0
STEP_SIZES = (0.5, 1.0, 2.0, LARGE_STEP, 5.0)


def build(config: Any) -> training.Experiment:
  """Returns the experiment of the preset `bandit`."""
  bandits.check_counts(config)
  (tau,), learning_rate = bandits.positives(config, "algorithm.tau"), config.optimizer.learning_rate
  if tau * max(STEP_SIZES) > 1:
    raise ValueError(
      f"config.algorithm.tau={tau}: give at most {1 / max(STEP_SIZES)}; the figures take steps of "
      f"{max(STEP_SIZES)}, and eta * tau may not exceed 1"
    )
  fixed_points = np.exp(
    [
      preference_games.nash_md_pg_fixed_point(FOUR_ACTIONS, FOUR_REFERENCE, tau, beta)
      for beta in BETAS
    ]
  )

  def init(key):
    del key  # every run starts at the reference

    def runs_of(settings):
      start = bandits.broadcast(jnp.asarray(FOUR_REFERENCE, jnp.float32), (len(settings),))
      return nash_md.State(start, jnp.copy(start), (), jnp.zeros((), jnp.int32))

    runs = {"mixture": runs_of(BETAS), "average": runs_of(DECAYS)}
    return bandits.Sweep(runs, jnp.zeros((), jnp.int32))

  def update(sweep, batch, key):
    del batch, key  # the gradient is exact
    runs = {}
    for name, settings, follow in (
      ("mixture", BETAS, _against_mixture),
      ("average", DECAYS, _against_average),
    ):
      run = functools.partial(
        _descend, follow, tau=tau, rate=learning_rate, num_steps=config.train.inner_steps
      )
      old = sweep.runs[name]
      params, ema_params = jax.vmap(run)(old.params, old.ema_params, jnp.array(settings))
      runs[name] = old._replace(params=params, ema_params=ema_params, step=old.step + 1)
    error = jnp.abs(jax.nn.softmax(runs["mixture"].params) - jnp.asarray(fixed_points)).max()
    metrics = {"loss": error, "nash_md/error": error}
    exploited = _exploitability(jax.nn.log_softmax(runs["mixture"].params), tau)
    metrics |= {f"exploitability/{b}": x for b, x in zip(BETAS, exploited, strict=True)}
    return bandits.Sweep(runs, sweep.step + 1), metrics

  return training.Experiment(
    init=init,
    update=update,
    batches=bandits.NoData,
    headline="nash_md/error",
    maximise=False,
    evaluate=lambda sweep: _result(sweep, tau, fixed_points),
    sample=functools.partial(bandits.sample_table, logits_of=lambda params: params[:, None]),
    figures=lambda history, result: _figures(tau, history),
  )


def _against_mixture(params, ema_params, beta):
  del ema_params
  return nash_md.geometric_mixture_logits(
    jax.nn.log_softmax(params), jnp.asarray(FOUR_REFERENCE, params.dtype), beta=beta
  )


def _against_average(params, ema_params, decay):
  del params, decay
  return ema_params


def _descend(opponent_of, params, ema_params, setting, *, tau, rate, num_steps):
  """Steps of the policy gradient, enumerated over the four actions; `setting` is beta or decay."""
  ref_logps = jnp.asarray(FOUR_REFERENCE, params.dtype)[:, None]

  def loss(params, probs, wins):
    losses = nash_md.nash_md_pg_loss(
      jax.nn.log_softmax(params)[:, None], ref_logps, jnp.ones((4, 1)), wins, tau=tau
    )
    return jnp.sum(probs * losses)

  def body(carry, _):
    params, ema_params = carry
    opponent = jax.nn.softmax(opponent_of(params, ema_params, setting))
    wins = jnp.asarray(FOUR_ACTIONS, params.dtype) @ opponent
    params -= rate * jax.grad(loss)(params, jax.nn.softmax(params), wins)
    # In the runs against a mixture nobody reads the average.
    return (params, setting * ema_params + (1 - setting) * params), None

  return jax.lax.scan(body, (params, ema_params), None, length=num_steps)[0]


@functools.cache
def policies(game: str, tau: float, eta: float | None, opponent: str) -> np.ndarray:
  """All policies of tabular mirror descent from the reference, `[NUM_ITERATIONS, 3]`, float64.

  `eta` None takes the theorem's schedule.
  """
  steps = np.arange(NUM_ITERATIONS)
  etas = nash_md.step_size(steps, tau=tau) if eta is None else np.full(NUM_ITERATIONS, eta)
  with jax.enable_x64(True):
    return np.asarray(_descent(GAMES[game], REFERENCE, etas, tau, opponent=opponent))


@functools.partial(jax.jit, static_argnames="opponent")
def _descent(preferences, ref_logps, etas, tau, *, opponent):
  def body(logps, eta):
    logps = nash_md.nash_md_step(logps, preferences, ref_logps, tau=tau, eta=eta, opponent=opponent)
    return logps, logps

  return jax.lax.scan(body, ref_logps, etas)[1]


def distances(game: str, tau: float, eta: float | None, opponent: str, average=False) -> np.ndarray:
  """KL(equilibrium || policy) after each iteration, of the last policy or of the average one."""
  logps = policies(game, tau, eta, opponent)
  if average:
    counts = np.arange(1, len(logps) + 1)[:, None]
    logps = np.log(np.cumsum(np.exp(logps), axis=0) / counts)
  return oracles.kl(preference_games.regularised_nash(GAMES[game], REFERENCE, tau), logps)


def bound(tau: float) -> np.ndarray:
  """The theorem's 8 / (tau^2 (T + 1)) for T = 1, 2, ..."""
  return 8 / (tau**2 * (np.arange(1, NUM_ITERATIONS + 1) + 1))


def _exploitability(logps: Any, tau: float) -> Any:
  return preference_games.regularised_exploitability(logps, FOUR_ACTIONS, FOUR_REFERENCE, tau)


def _result(sweep: bandits.Sweep, tau: float, fixed_points: np.ndarray) -> results.Result:
  checks, rows = [], []
  for game in GAMES:
    kl = distances(game, tau, None, "mixture")
    slope = np.log(kl[-1] / kl[99]) / np.log(len(kl) / 100)
    checks.append(
      (f"{game}: KL to the equilibrium below the bound", bool(np.all(kl <= bound(tau))))
    )
    checks.append((f"{game}: falls at least like 1 / T", bool(slope <= -1)))
    rows.append(
      [game, *(float(kl[steps - 1]) for steps in (1, 10, 100, 1000, 10_000)), float(slope)]
    )
  large = {
    name: distances("rock-paper-scissors", tau, LARGE_STEP, opponent, average)[-1]
    for name, opponent, average in (
      ("Nash-MD, last policy", "mixture", False),
      ("self-play, last policy", "self", False),
      ("self-play, average policy", "self", True),
    )
  }
  checks.append(
    (
      f"steps of {LARGE_STEP}: self-play is near the equilibrium on average only",
      bool(large["self-play, average policy"] < 1e-3 < 0.1 < large["self-play, last policy"]),
    )
  )
  exploited = {
    name: _exploitability(np.asarray(jax.nn.log_softmax(run.params), float), tau)
    for name, run in sweep.runs.items()
  }
  probs = np.asarray(jax.nn.softmax(sweep.runs["mixture"].params), float)
  reached = bool(np.abs(probs - fixed_points).max() < 1e-4)
  checks.append(("policy gradient within 1e-4 of its fixed point for every beta", reached))
  # Rounding of float32 logits shows as 1e-7 of exploitability.
  rising = bool(np.all(np.diff(exploited["mixture"]) > 1e-5))
  checks.append(("exploitability rises with beta", rising))
  checks.append(
    ("every moving average ends at the equilibrium", bool(exploited["average"].max() < 1e-4))
  )
  stops = [
    [f"mixture, beta {b}", float(x)] for b, x in zip(BETAS, exploited["mixture"], strict=True)
  ]
  stops += [
    [f"moving average, decay {d}", float(x)]
    for d, x in zip(DECAYS, exploited["average"], strict=True)
  ]
  return results.Result(
    metrics={"criteria_passed": statistics.fraction_passed(checks)},
    tables=[
      results.checks_table("Pass criteria", checks),
      results.Table(
        "KL to the equilibrium with the theorem's steps",
        ["game", "T = 1", "10", "100", "1,000", "10,000", "slope"],
        rows,
      ),
      results.Table(
        f"Rock-paper-scissors, constant steps of {LARGE_STEP}: KL after {NUM_ITERATIONS:,}",
        ["policy", "KL"],
        [[name, float(kl)] for name, kl in large.items()],
      ),
      results.Table("Exploitability where the policy gradient stops", ["opponent", "it"], stops),
    ],
  )


def _figures(tau: float, history: Any) -> list[results.Figure]:
  iterations = np.arange(1, NUM_ITERATIONS + 1)
  rate, axes = plots.subplots(1, len(GAMES), sharey=True)
  for axis, game in zip(axes[0], GAMES, strict=True):
    axis.loglog(iterations, bound(tau), "k--", label="bound of the theorem")
    axis.loglog(iterations, distances(game, tau, None, "mixture"), label="Nash-MD, eta_t")
    for eta in (0.1, 0.5, 1.0):
      axis.loglog(iterations, distances(game, tau, eta, "mixture"), label=f"Nash-MD, eta {eta}")
    self_play = distances(game, tau, 0.5, "self")
    axis.loglog(iterations, np.maximum(self_play, 1e-16), label="self-play, eta 0.5")
    average = distances(game, tau, 0.5, "self", average=True)
    axis.loglog(iterations, average, label="self-play, eta 0.5, average")
    axis.set(title=game, xlabel="iteration T", ylim=(1e-12, 1e3))
  axes[0][0].set_ylabel("KL to the equilibrium, nats")
  plots.legend_below(rate, axes[0][0])

  large, axes = plots.subplots(1, 1)
  for label, opponent, averaged in (
    ("Nash-MD, last", "mixture", False),
    ("self-play, last", "self", False),
    ("self-play, average", "self", True),
  ):
    ends = [
      distances("rock-paper-scissors", tau, eta, opponent, averaged)[-1] for eta in STEP_SIZES
    ]
    axes[0][0].loglog(STEP_SIZES, np.maximum(ends, 1e-12), marker="o", label=label)
  axes[0][0].set(xlabel="step size eta", ylabel=f"KL after {NUM_ITERATIONS:,} iterations, nats")
  axes[0][0].set_xticks(STEP_SIZES, [str(size) for size in STEP_SIZES])
  axes[0][0].minorticks_off()
  axes[0][0].legend()

  stop, axes = plots.subplots(1, 1)
  values = [history[-1][f"exploitability/{beta}"] for beta in BETAS]
  axes[0][0].plot(BETAS, values, marker="o")
  axes[0][0].set(xlabel="beta, weight of the reference in the opponent", ylabel="exploitability")
  return [
    results.Figure(
      name="nash_md_rate",
      caption=f"tau = {tau}. Nash-MD with constant steps stops beside the equilibrium.",
      figure=rate,
    ),
    results.Figure(
      name="nash_md_large_steps",
      caption="Rock-paper-scissors: large steps cycle; averages suffer less. The floor is 1e-12.",
      figure=large,
    ),
    results.Figure(
      name="nash_md_exploitability",
      caption="Where the exact policy gradient stops: at the equilibrium for beta = 0 only.",
      figure=stop,
    ),
  ]
