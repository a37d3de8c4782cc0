"""Nash-MD against hand numbers, its theorems, exact gradients and fixed points."""

import autoregressive as ar
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignment import nash_md, oracles, preference_games, sequences

CYCLE = np.array([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]])
REFERENCE = np.log([0.6, 0.3, 0.1])


def iterate(logps, preferences, ref_logps, num_steps, *, tau, eta=None, opponent="mixture"):
  """All policies of tabular mirror descent, `[num_steps, ..., A]`."""

  def body(logps, step):
    size = nash_md.step_size(step, tau=tau) if eta is None else eta
    logps = nash_md.nash_md_step(
      logps, preferences, ref_logps, tau=tau, eta=size, opponent=opponent
    )
    return logps, logps

  return jax.lax.scan(body, jnp.asarray(logps), jnp.arange(num_steps))[1]


# --- tabular ---


def test_worked_step():
  cycle = np.array([[9, 10, 8], [8, 9, 10], [10, 8, 9]]) / 18
  logps, uniform = np.log([0.6, 0.3, 0.1]), np.log(np.ones(3) / 3)
  mixture = jax.nn.softmax(nash_md.geometric_mixture_logits(logps, uniform, beta=0.5))
  np.testing.assert_allclose(mixture, [0.4727, 0.3343, 0.1930], atol=5e-5)
  np.testing.assert_allclose(cycle @ mixture, [0.508, 0.484, 0.508], atol=5e-4)
  after = jnp.exp(nash_md.nash_md_step(logps, cycle, uniform, tau=0.1, eta=5.0))
  np.testing.assert_allclose(after, [0.4909, 0.3088, 0.2003], atol=5e-5)


def test_the_schedule_starts_at_the_reference_and_counts_integer_steps():
  """eta_0 tau = 1: the first mixture is the reference, whatever the policy."""
  np.testing.assert_allclose([nash_md.step_size(t, tau=0.1) for t in (0, 1, 8)], [10, 20 / 3, 2])
  first = [
    nash_md.nash_md_step(logps, CYCLE, REFERENCE, tau=0.1, eta=nash_md.step_size(0, tau=0.1))
    for logps in (REFERENCE, np.log([0.01, 0.01, 0.98]))
  ]
  np.testing.assert_array_equal(first[0], first[1])


def test_a_step_maximises_its_objective(x64):
  """argmax of eta P(pi beats mixture) - KL(pi || mixture): step 2 of the paper's algorithm."""
  rng = np.random.default_rng(0)
  preferences, ref_logps = ar.random_game(rng, 4)
  logps, tau, eta = np.log(rng.dirichlet(np.ones(4))), 0.3, 1.5
  mixture = jax.nn.log_softmax(nash_md.geometric_mixture_logits(logps, ref_logps, beta=eta * tau))
  after = nash_md.nash_md_step(logps, preferences, ref_logps, tau=tau, eta=eta)
  wins = preferences @ np.exp(mixture)
  want = oracles.kl_regularised_optimum(np.asarray(mixture), eta * wins, 1.0)
  np.testing.assert_allclose(after, want, atol=1e-12)


def test_one_step_inequality_and_bound_of_the_theorem_on_random_games(x64):
  rng = np.random.default_rng(0)
  run = jax.jit(iterate, static_argnames=("num_steps",))
  for num_actions in range(2, 7):
    games = [ar.random_game(rng, num_actions) for _ in range(40)]
    preferences, ref_logps = (jnp.stack(x) for x in zip(*games, strict=True))
    tau = jnp.asarray(10 ** rng.uniform(-2, 0.5, (40, 1)))
    start = jnp.asarray(np.log(rng.dirichlet(np.ones(num_actions), 40)))
    nash = preference_games.regularised_nash(
      np.asarray(preferences), np.asarray(ref_logps), np.asarray(tau[:, 0])
    )
    policies = np.asarray(run(start, preferences, ref_logps, num_steps=200, tau=tau))
    policies = np.concatenate([np.asarray(start)[None], policies])
    gaps = oracles.kl(np.broadcast_to(nash, policies.shape), policies)  # [201, 40]
    steps, tau = np.arange(200)[:, None], np.asarray(tau)[:, 0]
    eta = nash_md.step_size(steps, tau=tau)
    assert (gaps[1:] <= (1 - eta * tau) * gaps[:-1] + 2 * eta**2 + 1e-9).all()
    bound = 8 / (tau**2 * (steps + 2))  # KL_T <= 8 / (tau^2 (T + 1)) with T = steps + 1
    assert (gaps[1:] <= bound).all()


def test_distances_of_the_published_fixture(x64):
  nash = preference_games.regularised_nash(CYCLE, REFERENCE, 0.1)
  policies = np.asarray(iterate(REFERENCE, CYCLE, REFERENCE, 10_000, tau=0.1))
  for num_steps, distance in (
    (1, 3.727e-1),
    (10, 1.824e-2),
    (100, 1.029e-4),
    (1000, 1.059e-6),
    (10_000, 1.077e-8),
  ):
    np.testing.assert_allclose(oracles.kl(nash, policies[num_steps - 1]), distance, rtol=1e-3)


@pytest.mark.parametrize(
  ("eta", "distance"), [(0.1, 2.17e-5), (0.5, 5.71e-4), (1, 2.42e-3), (2, 1.08e-2), (5, 7.9e-2)]
)
def test_a_constant_step_stops_at_the_fixed_point_of_the_policy_gradient(x64, eta, distance):
  """The distances are those of the fixed point, which its oracle gives independently."""
  last = iterate(REFERENCE, CYCLE, REFERENCE, 20_000, tau=0.1, eta=eta)[-1]
  np.testing.assert_allclose(
    last, preference_games.nash_md_pg_fixed_point(CYCLE, REFERENCE, 0.1, 0.1 * eta), atol=1e-9
  )
  nash = preference_games.regularised_nash(CYCLE, REFERENCE, 0.1)
  np.testing.assert_allclose(oracles.kl(nash, np.asarray(last)), distance, rtol=5e-3)


def test_self_play_has_the_equilibrium_as_its_fixed_point(x64):
  last = iterate(REFERENCE, CYCLE, REFERENCE, 2000, tau=0.1, eta=0.5, opponent="self")[-1]
  np.testing.assert_allclose(
    last, preference_games.regularised_nash(CYCLE, REFERENCE, 0.1), atol=1e-9
  )


def test_fictitious_play_converges_to_the_equilibrium_of_random_games(x64):
  rng = np.random.default_rng(5)
  games = [ar.random_game(rng, 5) for _ in range(40)]
  preferences, ref_logps = (jnp.stack(x) for x in zip(*games, strict=True))
  taus = 10 ** rng.uniform(-1, 0.5, 40)
  nash = preference_games.regularised_nash(np.asarray(preferences), np.asarray(ref_logps), taus)

  def body(logps, count):
    logps = nash_md.fictitious_play_step(
      logps, preferences, ref_logps, tau=taus[:, None], count=count
    )
    return logps, logps

  start = jnp.asarray(np.log(rng.dirichlet(np.ones(5), 40)))
  policies = np.asarray(jax.lax.scan(body, start, jnp.arange(1, 1001))[1])
  np.testing.assert_allclose(np.exp(policies[-1]).sum(-1), 1, atol=1e-9)
  gaps = oracles.kl(np.broadcast_to(nash, policies.shape), policies)
  # The KL of an average of t policies falls like 1 / t^2: seen 1.1e-3 and 1.5e-5 in the worst game.
  assert gaps[99].max() < 5e-3 and gaps[-1].max() < 1e-4


def test_rock_paper_scissors_with_large_steps(x64):
  """tau = .1, eta = 3: both last policies are far away, self-play's average is not."""
  game = np.array([[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]])
  nash = preference_games.regularised_nash(game, REFERENCE, 0.1)
  distances = {}
  for opponent in nash_md.OPPONENTS:
    policies = iterate(REFERENCE, game, REFERENCE, 20_000, tau=0.1, eta=3.0, opponent=opponent)
    distances[opponent] = oracles.kl(nash, np.asarray(policies[-1]))
    average = np.log(np.exp(np.asarray(policies)).mean(0))
  np.testing.assert_allclose(distances["mixture"], 3.82e-2, rtol=2e-3)
  assert distances["self"] > 0.1
  assert oracles.kl(nash, average) < 1e-3


def test_a_side_of_weight_zero_is_ignored_and_infinities_stay():
  policy, ref = jnp.array([0.0, -jnp.inf, 1.0]), jnp.array([-jnp.inf, 2.0, 3.0])
  mix = nash_md.geometric_mixture_logits
  np.testing.assert_array_equal(mix(policy, ref, beta=0.0), policy)
  np.testing.assert_array_equal(mix(policy, ref, beta=1.0), ref)
  np.testing.assert_array_equal(mix(policy, ref, beta=0.5), [-jnp.inf, -jnp.inf, 2])
  np.testing.assert_array_equal(jax.jit(mix)(policy, ref, beta=0.0), policy)  # traced beta


def test_token_mixture_equals_the_sequence_mixture_after_the_z_correction(x64):
  """Sampling token by token leaves out the normaliser of each prefix."""
  rng = np.random.default_rng(0)
  policy, ref = rng.normal(size=(2, ar.NUM_PREFIXES, 3)) * 1.5
  beta = 0.3
  logits = nash_md.geometric_mixture_logits(
    jax.nn.log_softmax(policy), jax.nn.log_softmax(ref), beta=beta
  )
  log_z = jax.nn.logsumexp(logits, axis=-1)  # [7], one for each prefix
  rows = sequences.Sequences(ar.TOKENS, ar.MASK)
  token = ar.all_logps(logits)

  # The same look-up of prefixes, on a table whose every token scores log Z.
  def scores(table):
    tokens = ar.TOKENS
    first, second = np.minimum(tokens[:, 0], 1), np.minimum(tokens[:, 1], 1)
    prefixes = np.stack([0 * first, 1 + first, 3 + 2 * first + second], axis=1)
    return jnp.sum(jnp.asarray(table)[prefixes] * rows.mask, axis=1)

  corrected = jax.nn.log_softmax(token + scores(log_z))
  exact = jax.nn.log_softmax((1 - beta) * ar.all_logps(policy) + beta * ar.all_logps(ref))
  np.testing.assert_allclose(corrected, exact, atol=1e-12)
  assert np.abs(np.exp(token) - np.exp(exact)).sum() > 1e-3  # the correction corrects something


# --- the policy gradient ---


def expected_loss(logits, behaviour_logps, ref, preferences, tau):
  """The loss averaged over completions drawn from `behaviour_logps` (no gradient through them)."""
  rows = sequences.Sequences(ar.TOKENS, ar.MASK)
  losses = nash_md.nash_md_pg_loss(
    ar.apply_fn(logits, rows), ar.apply_fn(ref, rows), ar.MASK, preferences, tau=tau
  )
  return jnp.sum(jax.lax.stop_gradient(jnp.exp(behaviour_logps)) * losses)


def test_the_gradient_is_that_of_the_regularised_preference(x64):
  """Enumerated, against finite differences of E[P] - tau KL of sequences; opponent held fixed."""
  rng = np.random.default_rng(0)
  logits, ref = jnp.asarray(rng.normal(size=(2, ar.NUM_PREFIXES, 3)))
  wins, tau = rng.uniform(size=ar.NUM_COMPLETIONS), 0.3

  def objective(logits):
    logps = ar.all_logps(logits)
    return jnp.sum(jnp.exp(logps) * (wins - tau * (logps - ar.all_logps(ref))))

  got = jax.grad(expected_loss)(logits, ar.all_logps(logits), ref, wins, tau)
  steps = 1e-5 * jnp.eye(logits.size).reshape(-1, *logits.shape)
  differences = [jax.vmap(objective)(logits + sign * steps) for sign in (1, -1)]
  # Central differences: their square of 1e-5 and rounding of 1e-16 / 1e-5.
  want = (differences[0] - differences[1]).reshape(logits.shape) / 2e-5
  np.testing.assert_allclose(-got, want, atol=1e-9)
  # Two shorter ways that public code takes: both leave out the other tokens' log-ratios.
  for stop in (True, False):
    biased = jax.grad(own_ratio_only)(logits, ref, wins, tau, stop)
    assert np.abs(biased + want).max() > 1e-2


def own_ratio_only(logits, ref, wins, tau, stop):
  """Each token's score times its own log-ratio alone, which carries a gradient or does not."""
  rows = sequences.Sequences(ar.TOKENS, ar.MASK)
  logps, ref_logps = ar.apply_fn(logits, rows), ar.apply_fn(ref, rows)
  ratios = (jax.lax.stop_gradient(logps) if stop else logps) - ref_logps
  losses = -jnp.sum(ar.MASK * ((wins - 0.5)[:, None] - tau * ratios) * logps, axis=1)
  return jnp.sum(jax.lax.stop_gradient(jnp.exp(ar.all_logps(logits))) * losses)


def test_the_kl_gradient_is_zero_at_the_reference(x64):
  ref = jnp.asarray(np.random.default_rng(0).normal(size=(ar.NUM_PREFIXES, 3)))
  half = jnp.full(ar.NUM_COMPLETIONS, 0.5)
  grad = jax.grad(expected_loss)(ref, ar.all_logps(ref), ref, half, 1.0)
  np.testing.assert_allclose(grad, 0, atol=1e-14)
  # Without the stop-gradient it would not be.
  assert np.abs(jax.grad(own_ratio_only)(ref, ref, half, 1.0, False)).max() > 0.1


def test_masked_tokens_count_nothing():
  logps = jnp.array([[-1.0, -2.0, jnp.nan]])
  loss = nash_md.nash_md_pg_loss(
    logps, jnp.array([[-1.5, -1.0, -jnp.inf]]), jnp.array([[1.0, 1, 0]]), jnp.ones(1), tau=0.5
  )
  # To go: 0.5 - 1 = -0.5 and -1; weights 0.5 + 0.25 and 0.5 + 0.5.
  np.testing.assert_allclose(loss, [0.75 * 1 + 1.0 * 2])


def test_the_moving_average_follows():
  config = nash_md.Config(tau=0.1, ema_decay=0.75)
  optimizer = optax.sgd(0.1)
  batch = nash_md.Batch(
    jnp.array([[1]]), jnp.ones((1, 1)), jnp.full((1, 1), -1.0), jnp.array([1.0])
  )
  state = nash_md.init(jnp.zeros(3), optimizer=optimizer, config=config)
  after, _ = nash_md.update(
    state, batch, None, apply_fn=ar.arm_apply_fn, optimizer=optimizer, config=config
  )
  assert np.abs(after.params).max() > 0
  np.testing.assert_allclose(after.ema_params, after.params / 4, rtol=1e-6)


# --- bad input ---


@pytest.mark.parametrize(
  ("call", "match"),
  [
    (lambda: nash_md.Config(tau=0.0), "tau"),
    (lambda: nash_md.Config(ema_decay=1.5), "ema_decay"),
    (lambda: nash_md.Config(ema_decay="x"), "ema_decay must be a number, got the string 'x'"),
    (
      lambda: nash_md.best_response(REFERENCE, np.full((3, 3), 0.9), REFERENCE, tau=0.1),
      "preferences must be antisymmetric",
    ),
    (
      lambda: nash_md.fictitious_play_step(REFERENCE, CYCLE, REFERENCE, tau=0.1, count=0),
      "count",
    ),
    (lambda: nash_md.nash_md_step(REFERENCE, CYCLE, REFERENCE, tau=0.1, eta=11.0), "eta"),
    (lambda: nash_md.nash_md_step(REFERENCE, CYCLE, REFERENCE[:2], tau=0.1, eta=1.0), "shapes"),
    (
      lambda: nash_md.nash_md_step(REFERENCE, CYCLE, REFERENCE, tau=0.1, eta=1.0, opponent="me"),
      "opponent",
    ),
    (lambda: nash_md.geometric_mixture_logits(jnp.ones(2), jnp.ones(2), beta=-0.1), "beta"),
    (lambda: nash_md.geometric_mixture_logits(jnp.ones(2), jnp.ones(3), beta=0.1), "ref_logits"),
    (
      lambda: nash_md.nash_md_pg_loss(
        jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.ones((2, 1)), tau=0.1
      ),
      "preferences",
    ),
  ],
)
def test_bad_input_names_the_argument(call, match):
  with pytest.raises(ValueError, match=match):
    call()
