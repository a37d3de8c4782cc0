"""Losses on samples of the policy itself, and the forms that no `update` trains, at their optima.

IPO, DPO, CoPG, DRO and SRPO reach theirs through their own `update` in their own tests: a data set
is an exact population there. What draws from the policy has no such data set: its expectations are
enumerated here, and the draw carries no gradient. Then the real draws: their gradients are the
enumerated ones, within Monte Carlo error.
"""

import functools
from typing import Any, NamedTuple

import autoregressive as ar
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignment import dro, ipo, nash_md, oracles, preference_games, sequences
from alignment.baselines import online_ipo, rloo
from alignment.models import sampling

TAU, MIXTURE = 0.5, 0.4
NUM_STEPS = 3000


def cube(probs):
  """A Psi of nobody's: monotone, neither the identity nor the logit."""
  return probs**3


class Problem(NamedTuple):
  """N enumerated completions; `preferences [N, N]` are not Bradley-Terry, `behaviour [N]` is mu."""

  tokens: Any
  mask: Any
  ref_token_logps: Any
  ref_logps: Any
  preferences: Any
  rewards: Any
  behaviour: Any


class Policy(NamedTuple):
  token_logps: Any
  logps: Any


def pairs(size):
  return [x.ravel() for x in np.indices((size, size))]


def mixture(policy, problem, weight):
  mixed = (1 - weight) * policy.logps + weight * problem.ref_logps
  return jax.lax.stop_gradient(jax.nn.softmax(mixed))


def expected_nash_md(weight, policy, problem):
  wins = problem.preferences @ mixture(policy, problem, weight)
  losses = nash_md.nash_md_pg_loss(
    policy.token_logps, problem.ref_token_logps, problem.mask, wins, tau=TAU
  )
  return mixture(policy, problem, 0.0) @ losses


def expected_online_ipo(weight, policy, problem):
  first, second = pairs(len(problem.rewards))
  ratios, drawn = policy.logps - problem.ref_logps, mixture(policy, problem, weight)
  losses = online_ipo.online_ipo_loss(
    ratios[first], ratios[second], problem.preferences[first, second], tau=TAU
  )
  return (drawn[first] * drawn[second]) @ losses


def expected_rloo(policy, problem):
  rows, drawn = np.stack(pairs(len(problem.rewards)), axis=1), mixture(policy, problem, 0.0)
  losses = rloo.rloo_loss(
    policy.logps[rows], problem.ref_logps[rows], problem.rewards[rows], beta=TAU
  )
  return drawn[rows].prod(1) @ losses


def expected_reinforce(policy, problem):
  single = (policy.logps[:, None], problem.ref_logps[:, None], problem.rewards[:, None])
  losses = rloo.rloo_loss(*single, beta=TAU, baseline="none")
  return mixture(policy, problem, 0.0) @ losses


def dro_p(policy, problem):
  ratios = policy.logps - problem.ref_logps
  return dro.dro_p_loss(ratios[None], problem.rewards[None], tau=TAU)[0]


def psi_po(policy, problem):
  first, second = pairs(len(problem.rewards))
  ratios = policy.logps - problem.ref_logps
  scores = ipo.psi_po_target(problem.preferences, problem.behaviour, psi=cube)
  losses = ipo.psi_po_loss(ratios[first], ratios[second], scores[first], scores[second], tau=TAU)
  return (problem.behaviour[first] * problem.behaviour[second]) @ losses


def ipo_label(policy, problem):
  first, second = pairs(len(problem.rewards))
  ratios = policy.logps - problem.ref_logps
  wins = problem.preferences[first, second]
  losses = [
    ipo.ipo_label_loss(ratios[first], ratios[second], jnp.full(len(first), label), tau=TAU)
    for label in (1.0, 0.0)
  ]
  weights = problem.behaviour[first] * problem.behaviour[second]
  return weights @ (wins * losses[0] + (1 - wins) * losses[1])


OBJECTIVES = {
  "self-play": functools.partial(expected_nash_md, 0.0),
  "Nash-MD-PG": functools.partial(expected_nash_md, MIXTURE),
  "best response": functools.partial(expected_nash_md, 1.0),
  "online IPO": functools.partial(expected_online_ipo, 0.0),
  "IPO-MD": functools.partial(expected_online_ipo, MIXTURE),
  "RLOO": expected_rloo,
  "REINFORCE": expected_reinforce,
  "DRO-P": dro_p,
  "Psi-PO": psi_po,
  "IPO, sampled labels": ipo_label,
}


def optima(problem):
  game = (problem.preferences, problem.ref_logps, TAU)
  nash, mixed, best = (
    preference_games.nash_md_pg_fixed_point(*game, beta) for beta in (0, MIXTURE, 1)
  )
  rewarded = oracles.kl_regularised_optimum(problem.ref_logps, problem.rewards, TAU)
  by_cube, by_identity = (
    oracles.psi_po_optimum(problem.preferences, problem.behaviour, problem.ref_logps, TAU, psi=psi)
    for psi in (cube, ipo.identity)
  )
  if len(nash) > 2:  # of two actions either wins by the same against any opponent
    assert np.abs(nash - mixed).max() > 1e-5, "Nash-MD-PG does not stop at the equilibrium"
  ends = (nash, mixed, best, nash, mixed, rewarded, rewarded, rewarded, by_cube, by_identity)
  return dict(zip(OBJECTIVES, ends, strict=True))


def make_problem(rng, ref_token_logps, tokens, mask):
  size = len(tokens)
  return Problem(
    tokens, mask, ref_token_logps, np.sum(ref_token_logps * mask, axis=1),
    ar.preferences(rng, size), rng.uniform(-0.5, 0.5, size), rng.dirichlet(np.full(size, 4.0)),
  )  # fmt: skip


def sequence_problem(rng):
  """On the 15 completions, and the parameters of the reference."""
  params = jnp.asarray(rng.normal(size=(ar.NUM_PREFIXES, 3)))
  ref_token_logps = ar.apply_fn(params, sequences.Sequences(ar.TOKENS, ar.MASK))
  return params, make_problem(rng, np.asarray(ref_token_logps), ar.TOKENS, ar.MASK)


def policy_of(params, problem, apply_fn):
  token_logps = apply_fn(params, sequences.Sequences(problem.tokens, problem.mask))
  return Policy(token_logps, jnp.sum(token_logps * problem.mask, axis=1))


@functools.partial(jax.jit, static_argnames=("names", "apply_fn"))
def train(start, problem, *, names, apply_fn):
  """Several methods at once, each with its own parameters: the last log-probabilities `[M, N]`."""
  # As in `autoregressive.train`: halved eight times, so that float64 runs end at the minimum.
  optimizer = optax.adam(optax.exponential_decay(0.05, NUM_STEPS // 9, 0.5, staircase=True))
  policies_of = jax.vmap(lambda params: policy_of(params, problem, apply_fn))

  def total(params):
    policies = policies_of(params)
    return sum(
      OBJECTIVES[name](Policy(*(x[i] for x in policies)), problem) for i, name in enumerate(names)
    )

  def body(carry, _):
    params, opt_state = carry
    updates, opt_state = optimizer.update(jax.grad(total)(params), opt_state)
    return (optax.apply_updates(params, updates), opt_state), None

  params = jnp.stack([start] * len(names))
  (params, _), _ = jax.lax.scan(body, (params, optimizer.init(params)), None, length=NUM_STEPS)
  return policies_of(params).logps


ABSENT = -1e30  # the logit of an arm that a bandit does not have: probability 0, log-ratio 0


def padded(problem, num_arms):
  """The bandit as one of `num_arms`, so that bandits of all sizes are one program."""
  extra = num_arms - len(problem.rewards)
  fill = lambda array, value: np.pad(array, [(0, extra)] * np.ndim(array), constant_values=value)  # noqa: E731
  return Problem(
    np.arange(num_arms)[:, None], np.ones((num_arms, 1)),
    fill(problem.ref_logps, ABSENT)[:, None], fill(problem.ref_logps, ABSENT),
    fill(problem.preferences, 0.5), fill(problem.rewards, 0), fill(problem.behaviour, 0),
  )  # fmt: skip


def test_every_other_loss_reaches_its_closed_form_on_bandits(x64):
  """Four random bandits of each size; a group of DRO-P would count the absent arms."""
  rng = np.random.default_rng(0)
  names = tuple(name for name in OBJECTIVES if name != "DRO-P")
  problems = []
  for num_arms in np.repeat(np.arange(2, 8), 4):
    ref_logps = np.log(rng.dirichlet(np.full(num_arms, 4.0)))[:, None]
    arms = np.arange(num_arms)[:, None]
    problems.append(make_problem(rng, ref_logps, arms, np.ones(arms.shape)))
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(padded(p, 7) for p in problems))
  run = functools.partial(train, names=names, apply_fn=ar.arm_apply_fn)
  found = np.asarray(jax.vmap(run)(stacked.ref_logps, stacked))  # [bandits, methods, 7]
  for ends, problem in zip(found, problems, strict=True):
    num_arms, wanted = len(problem.rewards), optima(problem)
    for end, name in zip(ends[:, :num_arms], names, strict=True):
      np.testing.assert_allclose(end, wanted[name], atol=1e-6, err_msg=f"{name}, {num_arms} arms")
      assert np.abs(wanted[name] - problem.ref_logps).max() > 1e-3, f"{name} had nothing to learn"


def test_dro_p_reaches_its_closed_form_on_bandits(x64):
  """Its group is the whole bandit, so each size is a program of its own."""
  rng = np.random.default_rng(1)
  for num_arms in range(2, 8):
    ref_logps, arms = np.log(rng.dirichlet(np.full(num_arms, 4.0))), np.arange(num_arms)[:, None]
    problem = make_problem(rng, ref_logps[:, None], arms, np.ones(arms.shape))
    found = train(ref_logps, problem, names=("DRO-P",), apply_fn=ar.arm_apply_fn)[0]
    wanted = optima(problem)["DRO-P"]
    np.testing.assert_allclose(found, wanted, atol=1e-6, err_msg=f"{num_arms} arms")
    assert np.abs(wanted - ref_logps).max() > 1e-3, "nothing to learn"


def test_every_other_loss_reaches_its_closed_form_on_sequences(x64):
  start, problem = sequence_problem(np.random.default_rng(0))
  found = train(start, problem, names=tuple(OBJECTIVES), apply_fn=ar.apply_fn)
  wanted = optima(problem)
  for end, name in zip(found, OBJECTIVES, strict=True):
    np.testing.assert_allclose(end, wanted[name], atol=1e-8, err_msg=name)


# --- real draws ---


def _sample_fn(params, prompt_tokens, prompt_mask, key, *, num_samples, ref_params=None):
  """Completions of the enumerated policy, or of its exact mixture with another."""
  del prompt_mask
  logps = ar.all_logps(params)
  if ref_params is not None:
    logps = (1 - MIXTURE) * logps + MIXTURE * ar.all_logps(ref_params)
  rows = jax.random.categorical(key, logps, shape=(len(prompt_tokens) * num_samples,))
  return sampling.Samples(jnp.asarray(ar.TOKENS)[rows], jnp.asarray(ar.MASK)[rows], None)


def _index(rows):
  """Which of the 15 completions each row is."""
  return jnp.argmax(jnp.all(rows.tokens[:, None] == jnp.asarray(ar.TOKENS), axis=2), axis=1)


@pytest.mark.parametrize("method", ["Nash-MD-PG", "IPO-MD", "RLOO"])
def test_sampled_gradients_are_the_enumerated_ones(x64, method):
  rng = np.random.default_rng(1)
  ref_params, problem = sequence_problem(rng)
  problem = jax.tree.map(jnp.asarray, problem)
  params = jnp.asarray(rng.normal(size=ref_params.shape))
  prompts = sequences.Prompts(jnp.zeros((2000, 1), int), jnp.ones((2000, 1)))
  num_samples = 1 if method == "Nash-MD-PG" else 2
  draw = functools.partial(_sample_fn, num_samples=num_samples)
  drawn_from_mixture = functools.partial(draw, ref_params=ref_params)
  optimizer = optax.sgd(1.0)

  def gradient(key):
    if method == "Nash-MD-PG":
      module, config = nash_md, nash_md.Config(tau=TAU)
      state = module.init(params, optimizer=optimizer, config=config)
      first, second = module.sample(
        state, prompts, key, sample_fn=draw, opponent_fn=drawn_from_mixture
      )
      wins = problem.preferences[_index(first), _index(second)]
      ref_token_logps = problem.ref_token_logps[_index(first)]
      batch: Any = module.Batch(first.tokens, first.mask, ref_token_logps, wins)
    elif method == "IPO-MD":
      module, config = online_ipo, online_ipo.Config(tau=TAU)
      state = module.init(params, optimizer=optimizer, config=config)
      first, second = module.sample(state, prompts, key, sample_fn=drawn_from_mixture)
      batch = module.Batch(
        first.tokens, first.mask, problem.ref_logps[_index(first)],
        second.tokens, second.mask, problem.ref_logps[_index(second)],
        problem.preferences[_index(first), _index(second)],
      )  # fmt: skip
    else:
      module, config = rloo, rloo.Config(beta=TAU)
      state = module.init(params, optimizer=optimizer, config=config)
      rows = module.sample(state, prompts, key, sample_fn=draw)
      grouped = [x.reshape(-1, 2, *x.shape[1:]) for x in (rows.tokens, rows.mask, _index(rows))]
      batch = module.Batch(*grouped[:2], problem.ref_logps[grouped[2]], problem.rewards[grouped[2]])
    bound = {"apply_fn": ar.apply_fn, "config": config}
    return jax.grad(lambda p: module.loss(p, state, batch, key, **bound)[0])(params)

  def enumerated(params):
    return OBJECTIVES[method](policy_of(params, problem, ar.apply_fn), problem)

  gradients = np.asarray(jax.jit(jax.vmap(gradient))(jax.random.split(jax.random.key(0), 50)))
  want, error = np.asarray(jax.grad(enumerated)(params)), gradients.std(0, ddof=1) / 50**0.5
  # 21 entries, in standard errors of 100,000 draws; a factor of 1.1 would show.
  assert np.abs((gradients.mean(0) - want) / error).max() < 5 < np.abs(0.1 * want / error).max()
