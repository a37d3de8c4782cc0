"""SRPO (arXiv:2406.01660) on bandits: robustness to the behaviour policy, and gains by revision.

The bandit trains SRPO, IPO and DPO on labelled pairs from three behaviour policies. Arm c beats
both others, and arm a beats arm b almost always. If the data are full of b, then a looks best to a
method that averages over its data. All methods train the same table: one row for the answer, and
one row for the rewrite of each arm.

The revisions need no training; their win rates are closed forms. In the first problem ten arms are
ordered by quality, and the reference rewrites an arm into one near it. (If the reference ignored
the arm that it rewrites, revisions would not help.) The second is a small copy of the language of
`comparison:digits`: the arms are the orders of four digits and rewrites swap neighbours at random.
There revisions pay only if the reference often keeps what it is shown.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alignment import ipo, oracles, preference_games, sequences, srpo
from alignment.baselines import dpo
from experiments.data import digits
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
EDIT_BETAS = (0.5, 0.17)
KEPT = (0.0, 1 / 3)  # how often the reference keeps the arm that it is shown
NUM_REVISIONS = 5
HELPED = "rewritten by SRPO"


class _Data(NamedTuple):
  """Labelled pairs of one behaviour policy and seed: `chosen [N]`, `rejected [N]` arms."""

  chosen: jax.Array
  rejected: jax.Array


def build(config: Any) -> training.Experiment:
  """Returns the experiment of the preset `bandit`."""
  # A criterion uses the standard error over seeds, so there must be two.
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

  # The data depend only on the seed, so a resumed run sees the same.
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
      keys = jax.random.split(key, shape)  # the same batches for all methods
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
    figures=lambda history, result: [
      _behaviour_figure(history, algorithm, num_steps),
      _revision_figure(),
      _edit_figure(),
    ],
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
  """Row 0 of the table answers and row 1 + y rewrites arm y; the prompt token selects the row."""
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
  """Returns the closed forms, `[behaviours, 3]`. DPO has none: the preferences have a cycle."""
  robust, _ = preference_games.srpo_optimum(PREFERENCES, UNIFORM[0], UNIFORM, float(algorithm.beta))
  averaging = [
    oracles.psi_po_optimum(PREFERENCES, np.array(mu), UNIFORM[0], float(algorithm.ipo_tau))
    for mu in BEHAVIOURS.values()
  ]
  return {"srpo": np.exp(np.stack([robust] * len(BEHAVIOURS))), "ipo": np.exp(averaging)}


class RevisionGame(NamedTuple):
  """A problem of A arms whose answers are rewritten.

  quality: `[A]` Bradley-Terry log-odds.  reference: `[A]` log-probabilities of an answer.
  rewrites: `[A, A]` log-probabilities of the reference's rewrite of each arm (rows).
  opponent: `[A]` probabilities of the policy that win rates are taken against.
  """

  quality: np.ndarray
  reference: np.ndarray
  rewrites: np.ndarray
  opponent: np.ndarray


def ordered_arms() -> RevisionGame:
  """Returns ten arms with qualities from -2 to 2.

  The reference answers near arm 2 and the gold policy near arm 6. The reference's rewrites move by
  an arm or two.
  """
  arms = np.arange(10.0)

  def normalise(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

  reference, gold = normalise(-((arms - 2) ** 2) / 4), normalise(-((arms - 6) ** 2) / 4)
  near = normalise(-(((arms[None] - arms[:, None]) / 1.5) ** 2) / 2)
  return RevisionGame(np.linspace(-2, 2, 10), reference, near, np.exp(gold))


def digit_orders(kept: float, num_digits: int = 4) -> RevisionGame:
  """Returns a tabular copy of the language of digits: the arms are the orders of the digits.

  The reward is the share of neighbours in order, on the scale of `data.digits`. The reference
  writes a random order (60 %), the sorted one (12 %) or the sorted one after two swaps of random
  neighbours (28 %). It is the opponent as well. It keeps the arm that it is shown with probability
  `kept`; otherwise it makes two swaps (70 %) or answers anew (30 %).
  """
  orders = list(itertools.permutations(range(num_digits)))
  swapped = np.zeros((len(orders), len(orders)))
  for row, order in enumerate(orders):
    for i in range(num_digits - 1):
      other = (*order[:i], order[i + 1], order[i], *order[i + 2 :])
      swapped[row, orders.index(other)] += 1 / (num_digits - 1)
  twice, is_sorted = swapped @ swapped, np.eye(len(orders))[0]
  reference = 0.6 / len(orders) + 0.12 * is_sorted + 0.28 * is_sorted @ twice
  rewrites = kept * np.eye(len(orders)) + (1 - kept) * (0.7 * twice + 0.3 * reference)
  rewards = (np.diff(orders, axis=1) > 0).mean(1)
  with np.errstate(divide="ignore"):
    return RevisionGame(
      rewards / digits.BRADLEY_TERRY_SCALE, np.log(reference), np.log(rewrites), reference
    )


def revision_win_rates(game: RevisionGame, beta: float) -> dict[str, np.ndarray]:
  """Returns win rates after 0 to 5 revisions `[6]`, all in closed form.

  "SRPO" rewrites its own answers. "IPO", "DPO" and "reference" have their answers rewritten by the
  reference, because nobody trains them to rewrite. "IPO, rewritten by SRPO" and so on have them
  rewritten as SRPO's are.
  """
  preferences = 1 / (1 + np.exp(game.quality[None] - game.quality[:, None]))
  reference = game.reference
  answer, rewrite = preference_games.srpo_optimum(preferences, reference, game.rewrites, beta)
  wins = preferences @ game.opponent

  def revised(policy, kernel):
    found = [np.exp(policy)]
    for _ in range(NUM_REVISIONS):
      found.append(found[-1] @ np.exp(kernel))
    return np.array(found) @ wins

  others = {
    "IPO": oracles.psi_po_optimum(preferences, np.exp(reference), reference, beta),
    "DPO": oracles.kl_regularised_optimum(reference, game.quality, beta),
    "reference": reference,
  }
  own = {name: revised(policy, game.rewrites) for name, policy in others.items()}
  helped = {f"{name}, {HELPED}": revised(policy, rewrite) for name, policy in others.items()}
  return {"SRPO": revised(answer, rewrite)} | own | helped


def _result(sweep: bandits.Sweep, algorithm: Any) -> results.Result:
  exact, rows, checks = _exact(algorithm), [], []
  means = {name: np.asarray(average).mean(1) for name, average in sweep.averages.items()}
  best = {name: [int(np.argmax(p)) for p in mean] for name, mean in means.items()}
  for i, behaviour in enumerate(BEHAVIOURS):
    errors = np.abs(means["srpo"][i] - exact["srpo"][i])
    # Labels are noisy, so the data of each seed have their own optimum.
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
  checks.append(("SRPO prefers arm c on all data sets", best["srpo"] == [2, 2, 2]))
  checks.append(("IPO's favourite depends on the behaviour policy", len(set(best["ipo"])) > 1))
  revised = {beta: revision_win_rates(ordered_arms(), beta) for beta in REVISION_BETAS}
  rising = all(bool(np.all(np.diff(rates["SRPO"]) > -1e-9)) for rates in revised.values())
  checks.append(("ten arms: SRPO's win rate never falls with a revision", rising))
  revision_rows = [
    [beta, name, [*map(float, values)]]
    for beta, rates in revised.items()
    for name, values in rates.items()
  ]
  edits = {
    (kept, beta): revision_win_rates(digit_orders(kept), beta)
    for kept in KEPT
    for beta in EDIT_BETAS
  }
  for beta in EDIT_BETAS:
    never, often = (edits[kept, beta]["SRPO"] for kept in KEPT)
    gains = [float(rates[-1] - rates[0]) for rates in (never, often)]
    checks.append(
      (
        f"digits, beta {beta}: revisions gain over 0.05 if the reference keeps arms",
        gains[1] > 0.05,
      )
    )
    checks.append((f"digits, beta {beta}: they gain less if it never does", gains[0] < gains[1]))
  edit_rows = [
    [kept, beta, name, [*map(float, values)]]
    for (kept, beta), rates in edits.items()
    for name, values in rates.items()
  ]
  return results.Result(
    metrics={"criteria_passed": statistics.fraction_passed(checks)},
    tables=[
      results.checks_table("Pass criteria", checks),
      results.Table(
        "P(a), P(b), P(c), mean over seeds and the last scan of updates",
        ["data", "method", "closed form", "trained"],
        rows,
      ),
      results.Table(
        "Ten arms: win rate against the gold policy after 0 to 5 revisions (closed forms)",
        ["beta", "policy", "win rates"],
        revision_rows,
        digits=3,
      ),
      results.Table(
        "Orders of four digits: win rate against the reference after 0 to 5 revisions (closed "
        "forms)",
        ["kept by the reference", "beta", "policy", "win rates"],
        edit_rows,
        digits=3,
      ),
    ],
  )


def _behaviour_figure(history, algorithm, num_steps) -> results.Figure:
  figure, axes = plots.subplots(len(METHODS), len(BEHAVIOURS), sharex=True, sharey=True)
  exact = _exact(algorithm)
  # A point is the mean over a scan, so it stands in the middle of the scan.
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
    "The lines show the probability of each arm in one game, for data from three behaviour "
    "policies (columns). Dotted lines show the closed forms of SRPO and IPO; DPO has none. Only "
    "SRPO ends at the same policy for all data."
  )
  return results.Figure(name="srpo_bandit_behaviour", caption=caption, figure=figure)


def _revision_figure() -> results.Figure:
  figure, axes = plots.subplots(len(REVISION_BETAS) // 2, 2, sharex=True, sharey=True)
  for axis, beta in zip(axes.flat, REVISION_BETAS, strict=True):
    _draw_revisions(axis, ordered_arms(), beta)
    axis.set(title=f"beta = {beta}", ylim=(0, 1))
  _label(axes, "win rate against the gold policy")
  plots.legend_below(figure, axes[0][0])
  caption = (
    "The curves show win rates after each revision, in closed form. SRPO rewrites its own answers "
    "(points). Solid lines show the answers of the others as the reference rewrites them, dashed "
    "lines as SRPO does."
  )
  return results.Figure(name="srpo_revisions", caption=caption, figure=figure)


def _edit_figure() -> results.Figure:
  cases = list(itertools.product(EDIT_BETAS, KEPT))
  figure, axes = plots.subplots(len(EDIT_BETAS), len(KEPT), sharex=True, sharey=True)
  for axis, (beta, kept) in zip(axes.flat, cases, strict=True):
    _draw_revisions(axis, digit_orders(kept), beta)
    share = f"{kept:.0%} kept" if kept else "never kept"
    axis.set_title(f"beta = {beta}, {share}")
  _label(axes, "win rate against the reference")
  plots.legend_below(figure, axes[0][0])
  caption = (
    "The arms are the orders of four digits. SRPO's win rate (points) rises with revisions if the "
    "reference keeps what it is shown in a third of its edits. Lines as in the figure before."
  )
  return results.Figure(name="srpo_edits", caption=caption, figure=figure)


def _label(axes: Any, win_rate: str) -> None:
  for axis in axes[:, 0]:
    axis.set_ylabel(win_rate)
  for axis in axes[-1]:
    axis.set_xlabel("number of revisions")


def _draw_revisions(axis: Any, game: RevisionGame, beta: float) -> None:
  for name, rates in revision_win_rates(game, beta).items():
    first = name.split(",")[0]
    color = plots.PALETTE[("SRPO", "IPO", "DPO", "reference").index(first)]
    style = "--" if HELPED in name else "-"
    marker = "o" if name == "SRPO" else ""
    axis.plot(rates, label=name, color=color, linestyle=style, marker=marker)
