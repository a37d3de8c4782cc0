"""Finite inputs give no NaN: the losses and measures of all packages, with their gradients.

All functions are in one compiled program for each dtype, so that hypothesis can run it often. The
numbers are those at which arithmetic breaks: zeros, equal numbers, and 1e30, whose square is
infinite in float32 and bfloat16. Infinite values are allowed; NaN is not.
"""

import functools
import inspect

import hypothesis
import hypothesis.extra.numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from alignment import copg, dro, ipo, nash_md, reward_model, sequences, srpo
from alignment.baselines import dpo, kto, online_ipo, rloo, sft
from representation import (
  bgrl,
  bidirectional,
  byol,
  byol_variants,
  collapse,
  latent_prediction,
  moving_targets,
  self_predictive,
)
from representation.baselines import grace
from rl_theory import armac, qr_dqn, qtd, regret_matching, returns
from rl_theory.baselines import categorical_td, dqn, nfsp, ppo, td

ROWS, COLUMNS = 3, 4
EDGES = (0.0, 1.0, -1.0, 0.5, 1e-30, -1e-30, 1e15, 1e30, -1e30)
DTYPES = ("float32", "bfloat16", "float64")


def _distribution(p):
  total = p.sum(-1, keepdims=True)
  # No gradient: that of this division is infinite where all are tiny.
  return jax.lax.stop_gradient(jnp.where(total > 0, p / jnp.where(total > 0, total, 1), 0.25))


# Each takes x [6, 3, 4] (any finite numbers), p [3, 4] in [0, 1], mask [3, 4] bool and ids [3] in
# [0, 4). Outputs have one entry for each row, except those of collapse.
FUNCTIONS = {
  "copg.copg_loss": lambda x, p, m, i: copg.copg_loss(x[0], x[1], beta=0.1),
  "dpo.dpo_loss": lambda x, p, m, i: dpo.dpo_loss(
    x[0, :, 0], x[1, :, 0], beta=0.1, chosen_probs=p[:, 0]
  ),
  "dro.dro_loss": lambda x, p, m, i: dro.dro_loss(x[0, :, 0], x[1, :, 0], x[2, :, 0], tau=0.5),
  "dro.dro_p_loss": lambda x, p, m, i: dro.dro_p_loss(x[0], x[1], tau=0.5),
  "dro.dro_v_losses": lambda x, p, m, i: dro.dro_v_losses(
    x[0, :, 0], x[1, :, 0], x[2, :, 0], tau=0.5
  ),
  "ipo.ipo_loss": lambda x, p, m, i: ipo.ipo_loss(
    x[0, :, 0], x[1, :, 0], tau=0.1, chosen_probs=p[:, 0]
  ),
  "ipo.ipo_label_loss": lambda x, p, m, i: ipo.ipo_label_loss(
    x[0, :, 0], x[1, :, 0], p[:, 0], tau=0.1
  ),
  "ipo.psi_po_loss": lambda x, p, m, i: ipo.psi_po_loss(*x[:4, :, 0], tau=0.1),
  "kto.kto_loss": lambda x, p, m, i: kto.kto_loss(
    x[0, :, 0], p[:, 0], beta=0.1, kl=x[1, :, 0], desirable_weight=2.0
  ),
  "nash_md.nash_md_pg_loss": lambda x, p, m, i: nash_md.nash_md_pg_loss(
    x[0], x[1], m, p[:, 0], tau=0.1
  ),
  "nash_md.geometric_mixture_logits": lambda x, p, m, i: nash_md.geometric_mixture_logits(
    x[0], x[1], beta=0.25
  ),
  "online_ipo.online_ipo_loss": lambda x, p, m, i: online_ipo.online_ipo_loss(
    x[0, :, 0], x[1, :, 0], p[:, 0], tau=0.1
  ),
  "reward_model.preference_loss": lambda x, p, m, i: reward_model.preference_loss(
    x[0, :, 0], chosen_probs=p[:, 0]
  ),
  "rloo.rloo_loss": lambda x, p, m, i: rloo.rloo_loss(x[0], x[1], x[2], beta=0.1),
  "sequences.token_logps": lambda x, p, m, i: sequences.token_logps(
    x[:3].swapaxes(0, 1), jnp.stack([i, i, i], 1), mask=m[:, :3]
  ),
  "sequences.log_ratios": lambda x, p, m, i: sequences.log_ratios(
    x[0], m, x[1, :, 0], reduction="mean"
  ),
  "sft.sft_loss": lambda x, p, m, i: sft.sft_loss(x[0], m, reduction="mean"),
  "srpo.srpo_loss": lambda x, p, m, i: srpo.srpo_loss(
    *x[:6, :, 0], beta=0.1, alpha=0.5, chosen_probs=p[:, 0]
  ),
  "bgrl.bgrl_loss": lambda x, p, m, i: bgrl.bgrl_loss(x[0], x[1]),
  "bidirectional.bidirectional_loss": lambda x, p, m, i: bidirectional.bidirectional_loss(*x[:4]),
  "byol.byol_loss": lambda x, p, m, i: byol.byol_loss(x[0], x[1]),
  "byol_variants.negatives_loss": lambda x, p, m, i: byol_variants.negatives_loss(
    *x[:3], temperature=0.1
  ),
  "collapse.metrics": lambda x, p, m, i: collapse.metrics(x[0], mask=m[:, 0], spectrum=True),
  "collapse.metrics of one row": lambda x, p, m, i: collapse.metrics(x[0, :1], spectrum=True),
  "grace.grace_loss": lambda x, p, m, i: grace.grace_loss(
    x[0], x[1], temperature=0.5, mask=m[:, 0]
  ),
  "latent_prediction.prediction_loss": lambda x, p, m, i: latent_prediction.prediction_loss(*x[:2]),
  "moving_targets.normalise": lambda x, p, m, i: moving_targets.normalise(x[0]),
  "self_predictive.self_predictive_loss": lambda x, p, m, i: self_predictive.self_predictive_loss(
    x[0], x[1], stop_gradient=False
  ),
  "armac.mean_policy_loss": lambda x, p, m, i: armac.mean_policy_loss(
    x[0], _distribution(p), legal=jnp.ones_like(m)
  ),
  "armac.regret_loss": lambda x, p, m, i: armac.regret_loss(x[0], x[1], legal=m),
  "armac.tree_backup_loss": lambda x, p, m, i: armac.tree_backup_loss(
    x[:2].swapaxes(0, 1)[:, None].repeat(2, 1),
    _distribution(p)[:, None].repeat(2, 1),
    jnp.stack([i, i], 1),
    x[2, :, :2],
    m[:, :2],
    trace_decay=0.5,
  ),
  "categorical_td.categorical_target": lambda x, p, m, i: categorical_td.categorical_target(
    _distribution(p), x[0, :, 0], discount=0.9, low=-1.0, high=1.0
  ),
  "dqn.huber_loss": lambda x, p, m, i: dqn.huber_loss(x[0], x[1]),
  "nfsp.average_policy_loss": lambda x, p, m, i: nfsp.average_policy_loss(
    x[0], i, legal=jnp.ones_like(m)
  ),
  "nfsp.best_response_loss": lambda x, p, m, i: nfsp.best_response_loss(
    x[0], i, x[1, :, 0], x[2], next_legal=m
  ),
  "ppo.advantages": lambda x, p, m, i: ppo.advantages(
    x[0], m.astype(int), m, x[1, :, :2], trace_decay=0.5
  ),
  "ppo.clipped_policy_loss": lambda x, p, m, i: ppo.clipped_policy_loss(
    x[0], _distribution(p), i, x[1, :, 0], legal=jnp.ones_like(m), clip=0.2
  ),
  "ppo.magnet_loss": lambda x, p, m, i: ppo.magnet_loss(x[0], legal=m),
  "qr_dqn.quantile_huber_loss": lambda x, p, m, i: qr_dqn.quantile_huber_loss(x[0], x[1]),
  "qtd.pinball_loss": lambda x, p, m, i: qtd.pinball_loss(x[0], x[1]),
  "regret_matching.regret_matching": lambda x, p, m, i: regret_matching.regret_matching(
    jax.lax.stop_gradient(x[0]), jnp.ones_like(m)
  ),
  "returns.tree_backup_targets": lambda x, p, m, i: returns.tree_backup_targets(
    x[:2].swapaxes(0, 1),
    _distribution(p)[:, None].repeat(2, 1),
    jnp.stack([i, i], 1),
    x[2, :, :2],
    m[:, :2],
    trace_decay=0.5,
  ),
  "td.td_error": lambda x, p, m, i: td.td_error(
    x[0, :, 0], x[1, :, 0], x[2, :, 0], discount=0.9
  ),
}  # fmt: skip
# Their rows see each other.
COUPLED = ("byol_variants.negatives_loss", "grace.grace_loss", "collapse.")
MODULES = (
  copg, dpo, dro, ipo, kto, nash_md, online_ipo, reward_model, rloo, sft, srpo, bgrl, bidirectional,
  byol, byol_variants, grace, latent_prediction, self_predictive, armac, dqn, nfsp, ppo,
  qr_dqn, qtd,
)  # fmt: skip


def test_every_loss_on_arrays_is_here():
  known = {name.split(" ")[0] for name in FUNCTIONS}
  # Sums of entries above (SRPO), and losses whose arguments are networks.
  known |= {"srpo.srpo_generative_loss", "srpo.srpo_improvement_loss", "armac.loss_actor"}
  known |= {"armac.loss_critic", "latent_prediction.losses", "grace.subsampled_grace_loss"}
  found = {
    f"{module.__name__.split('.')[-1]}.{name}"
    for module in MODULES
    for name, value in inspect.getmembers(module, inspect.isfunction)
    if value.__module__ == module.__name__ and name.split("_")[-1] in ("loss", "losses")
    if not name.startswith("_") and name != "loss"
  }
  assert found <= known


@functools.cache
def _program(dtype):
  """Returns a jitted `run(x, p, mask, ids) -> {name: (values, gradients in x and p)}`."""

  def total(name, x, p, mask, ids):
    values = FUNCTIONS[name](x, p, mask, ids)
    floats = [v for v in jax.tree.leaves(values) if jnp.issubdtype(v.dtype, jnp.inexact)]
    # Each output alone: the sum of two infinities of opposite signs is the test's, not theirs.
    return floats, values

  def run(x, p, mask, ids):
    x, p = x.astype(dtype), p.astype(dtype)
    found = {}
    for name in FUNCTIONS:
      outputs, pull, values = jax.vjp(
        lambda x, p, name=name: total(name, x, p, mask, ids), x, p, has_aux=True
      )
      found[name] = values, pull([jnp.ones_like(leaf) for leaf in outputs])
    return found

  return jax.jit(run)


def _run(dtype, *arrays):
  with jax.enable_x64(dtype == "float64"):
    return jax.device_get(_program(dtype)(*arrays))


def _numbers(shape, low=None):
  numbers = strategies.sampled_from([v for v in EDGES if low is None or low <= v <= 1])
  return hypothesis.extra.numpy.arrays(np.float64, shape, elements=numbers)


INPUTS = (
  _numbers((6, ROWS, COLUMNS)),
  _numbers((ROWS, COLUMNS), low=0),
  hypothesis.extra.numpy.arrays(np.bool_, (ROWS, COLUMNS)),
  hypothesis.extra.numpy.arrays(np.int32, ROWS, elements=strategies.integers(0, COLUMNS - 1)),
)
# What random draws seldom hit: all equal, all zero, all masked.
WORST = [
  (np.full((6, ROWS, COLUMNS), number), np.full((ROWS, COLUMNS), prob), mask, np.zeros(ROWS, int))
  for number in (0.0, 1.0, 1e30)
  for prob in (0.0, 1.0)
  for mask in (np.zeros((ROWS, COLUMNS), bool), np.eye(ROWS, COLUMNS, dtype=bool))
] + [  # An importance ratio of 1e29 times an advantage of -1e30.
  (
    np.full((6, ROWS, COLUMNS), -1e30),
    np.tile([1e-30, 1e-30, 1e-30, 0.5], (ROWS, 1)),
    np.ones((ROWS, COLUMNS), bool),
    np.zeros(ROWS, int),
  ),
  (  # An advantage of 1e30 where the ratio is a zero over 1e-30.
    np.concatenate(
      [
        np.tile([-1e30, 1e30, 1e30, 1e30], (1, ROWS, 1)),
        np.full((5, ROWS, COLUMNS), 1e30),
      ]
    ),
    np.tile([1e-30, 1e-30, 1e-30, 0.5], (ROWS, 1)),
    np.ones((ROWS, COLUMNS), bool),
    np.zeros(ROWS, int),
  ),
]


def _check(dtype, x, p, mask, ids):
  for name, found in _run(dtype, x, p, mask, ids).items():
    for leaf in jax.tree.leaves(found):
      assert not np.isnan(np.asarray(leaf, np.float64)).any(), (name, dtype, found, x, p, mask, ids)


# Each dtype compiles its own program.
@pytest.mark.parametrize(
  "dtype", ["float32"] + [pytest.param(d, marks=pytest.mark.slow) for d in DTYPES[1:]]
)
def test_no_nan_at_the_worst(dtype):
  for arrays in WORST:
    _check(dtype, *arrays)


def _settings(count):
  # Derandomised: the default suite must not fail by chance. No deadline: the first run compiles. No
  # shrinking: the failing entry is named, and a smaller input would take minutes to find.
  return hypothesis.settings(
    max_examples=count, deadline=None, derandomize=True, database=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
  )  # fmt: skip


@pytest.mark.slow  # each dtype compiles its own program: 15 seconds; the worst numbers run always
@pytest.mark.parametrize("dtype", DTYPES)
@_settings(60)
@hypothesis.given(*INPUTS)
def test_no_nan(dtype, x, p, mask, ids):
  _check(dtype, x, p, mask, ids)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@_settings(3000)
@hypothesis.given(*INPUTS)
def test_no_nan_in_many_draws(dtype, x, p, mask, ids):
  _check(dtype, x, p, mask, ids)


def test_rows_permute_and_do_not_see_each_other():
  """A micro-batch of the rows gives the rows of the batch: only whole means can differ."""
  rng = np.random.default_rng(0)
  x, p = rng.normal(size=(6, ROWS, COLUMNS)), rng.uniform(size=(ROWS, COLUMNS))
  mask, ids = rng.uniform(size=(ROWS, COLUMNS)) < 0.6, rng.integers(COLUMNS, size=ROWS)
  order = np.array([2, 0, 1])
  whole = _run("float32", x, p, mask, ids)
  moved = _run("float32", x[:, order], p[order], mask[order], ids[order])
  other = [x.copy(), p.copy(), mask.copy(), ids.copy()]
  other[0][:, 2], other[1][2], other[2][2], other[3][2] = 9.0, 0.5, True, 0
  changed = _run("float32", *other)
  for name, (values, _) in whole.items():
    if name == "collapse.metrics of one row":
      continue
    of_rows = not name.startswith("collapse.")
    for value, again, beside in zip(
      *map(jax.tree.leaves, (values, moved[name][0], changed[name][0])), strict=True
    ):
      # 1e-4: sums of three rows in another order, of numbers of size one in float32.
      np.testing.assert_allclose(
        again, value[order] if of_rows else value, 1e-4, 1e-5, err_msg=name
      )
      if not name.startswith(COUPLED):
        np.testing.assert_array_equal(beside[:2], value[:2], err_msg=name)


def test_what_is_masked_changes_nothing():
  rng = np.random.default_rng(1)
  x, p = rng.normal(size=(6, ROWS, COLUMNS)), rng.uniform(size=(ROWS, COLUMNS))
  mask, ids = np.zeros((ROWS, COLUMNS), bool), np.zeros(ROWS, int)
  mask[:2, :2] = True
  hidden = x.copy()
  hidden[0] = np.where(mask, x[0], 1e30)
  whole, other = (_run("float32", each, p, mask, ids) for each in (x, hidden))
  for name in ("nash_md.nash_md_pg_loss", "sequences.log_ratios", "sft.sft_loss"):
    np.testing.assert_array_equal(other[name][0], whole[name][0], err_msg=name)
  hidden = x.copy()
  hidden[:2, 2] = 1e30  # whole rows for those that mask rows
  other = _run("float32", hidden, p, mask, ids)
  for name in ("collapse.metrics", "grace.grace_loss"):
    for value, again in zip(*map(jax.tree.leaves, (whole[name][0], other[name][0])), strict=True):
      np.testing.assert_array_equal(again, value, err_msg=name)


@pytest.mark.parametrize("psi", [ipo.identity, ipo.logit])
def test_psi_po_target_has_a_gradient_in_the_behaviour(psi):
  preferences = jnp.array([[0.5, 1.0, 0.75], [0.0, 0.5, 0.25], [0.25, 0.75, 0.5]])
  behaviour = jnp.array([0.5, 0.0, 0.5])
  jacobian = jax.jacobian(lambda mu: ipo.psi_po_target(preferences, mu, psi=psi))(behaviour)
  # g is linear in mu, with slope Psi, which an absent action has only where it is finite.
  slopes = psi(preferences)
  want = jnp.where(jnp.isfinite(slopes) | (behaviour > 0), slopes, 0)
  np.testing.assert_allclose(jacobian, want, atol=1e-6)


def test_collapse_of_one_row_and_of_none():
  none = collapse.metrics(jnp.ones((3, 4)), mask=jnp.zeros(3, bool), spectrum=True)
  one = collapse.metrics(jnp.zeros((1, 4)), spectrum=True)
  for name in one:
    np.testing.assert_array_equal(none[name], one[name], err_msg=name)
  assert float(one["collapse/mean_cosine"]) == 1 and float(one["collapse/spread"]) == 0
  big = collapse.metrics(1e30 * jnp.eye(3), spectrum=True)
  np.testing.assert_allclose(big["collapse/spread"], 2**0.5 * 1e30, rtol=1e-6)
  np.testing.assert_allclose(big["collapse/mean_norm"], 1e30, rtol=1e-6)


def test_a_policy_gradient_is_right_where_its_value_is_cut_off():
  logps, rewards = jnp.array([[-1e30, -1e30]]), jnp.array([[1e30, -1e30]])

  def loss(logps):
    return rloo.rloo_loss(logps, logps, rewards, beta=0.1)[0]

  value, gradient = jax.value_and_grad(loss)(logps)
  assert np.isfinite(value)
  np.testing.assert_allclose(gradient, [[-2e30, 2e30]], rtol=1e-6)
