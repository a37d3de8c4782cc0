"""Self-predictive learning: its variants against the theorems, the dynamics, and each other."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear_dynamics import (
  FAMILIES,
  assert_gram_only_grows,
  random_chains,
  random_distributions,
  random_features,
  two_view_chain,
)

from representation import chains, collapse, self_predictive, self_predictive_flow

pytestmark = pytest.mark.usefixtures("x64")

Config, Params, Transitions = (
  self_predictive.Config, self_predictive.Params, self_predictive.Transitions
)  # fmt: skip
MATRIX = np.zeros((2, 2))


def _table(table, states):
  return table[states]


def _linear(weights, observations):
  return observations @ weights


def _updates(batch, config, step, apply_fn=_table):
  """Returns an update of the weights alone, for `assert_gram_only_grows`."""
  optimizer = optax.sgd(step)

  def update(weights):
    params = Params(jnp.asarray(weights), jnp.zeros((weights.shape[1],) * 2))
    state = self_predictive.init(params, optimizer=optimizer, config=config)
    new, _ = self_predictive.update(
      state, batch, None, apply_fn=apply_fn, optimizer=optimizer, config=config
    )
    return new.params.representation

  return update


# --- non-collapse in discrete steps ---


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gram_matrix_only_grows(family):
  (chain,), (distribution,) = random_chains(family, 1), random_distributions(1)
  batch = self_predictive.make_expectation(chain, distribution)
  weights = np.asarray(random_features(1, orthonormal=False)[0])
  assert_gram_only_grows(_updates(batch, Config(), 1.0), weights)


def test_the_gram_matrix_only_grows_on_samples():
  states, next_states = np.random.default_rng(0).integers(0, 20, (2, 64))
  weights = np.asarray(random_features(1)[0])
  assert_gram_only_grows(_updates(Transitions(states, next_states), Config(), 1.0), weights)


def test_linear_byol_obeys_the_same_invariants():
  """Two views of an item are a chain, and a linear encoder conserves the Gram matrix of weights."""
  chain, distribution = two_view_chain(jax.random.key(0), num_items=12, num_views=20)
  images = jax.random.normal(jax.random.key(1), (20, 6))
  batch = self_predictive.make_expectation(chain, distribution, states=images)
  weights = np.asarray(random_features(1, num_states=6)[0])
  assert_gram_only_grows(_updates(batch, Config(), 0.3, _linear), weights)


def _assert_caught(update, weights):
  with pytest.raises(AssertionError):
    assert_gram_only_grows(update, weights)


def test_the_invariant_catches_what_breaks_it():
  batch = self_predictive.make_expectation(random_chains("symmetric", 1)[0])
  weights = np.asarray(random_features(1)[0])
  for config in (
    Config(stop_gradient=False), Config(predictor="gradient"), Config(ridge=0.01),
  ):  # fmt: skip
    _assert_caught(_updates(batch, config, 1.0), weights)


# --- the update against the dynamics ---


def test_a_step_is_a_step_of_the_dynamics():
  (chain,), (distribution,), (phi,) = (
    random_chains("arbitrary", 1), random_distributions(1), random_features(1, orthonormal=False)
  )  # fmt: skip
  matrix = jax.random.normal(jax.random.key(3), (2, 2))
  target = random_features(1, seed=4)[0]
  batch = self_predictive.make_expectation(chain, distribution)
  optimizer = optax.sgd(0.5)
  slow = {"predictor": "gradient", "predictor_ratio": 3.0}
  variables = self_predictive_flow.Variables
  for options, start, dynamics in (
    ({}, variables(phi), {}),
    ({"ridge": 0.1}, variables(phi), {"ridge": 0.1}),
    ({"stop_gradient": False}, variables(phi), {"gradient": "full"}),
    ({"target_decay": 0.9}, variables(phi, target=target), {"target_rate": 0.2}),
    (slow, variables(phi, matrix), {"ratio": 3.0}),
    (
      slow | {"target_decay": 0.9}, variables(phi, matrix, target),
      {"ratio": 3.0, "target_rate": 0.2},
    ),
  ):  # fmt: skip
    config = Config(**options)
    state = self_predictive.init(
      Params(phi, matrix), optimizer=optimizer, config=config, target_params=start.target
    )
    new, _ = self_predictive.update(
      state, batch, None, apply_fn=_table, optimizer=optimizer, config=config
    )
    slope = self_predictive_flow.flow(start, chain, distribution, **dynamics)
    found = new.params.representation
    np.testing.assert_allclose(found, phi + 0.5 * slope.representation, atol=1e-13)
    if start.predictor is not None:
      np.testing.assert_allclose(new.params.predictor, matrix + 0.5 * slope.predictor, atol=1e-13)
    else:
      np.testing.assert_array_equal(new.params.predictor, matrix)
    decay = options.get("target_decay", 0)
    before = phi if start.target is None else target
    np.testing.assert_allclose(new.target_params, decay * before + (1 - decay) * found, atol=1e-15)


@pytest.mark.parametrize("ratio", [None, 2.0], ids=["optimal", "slow"])
def test_updates_approach_the_dynamics_in_proportion_to_their_step(ratio):
  """100 random chains of each kind; half the step halves the distance to the ODE at time 5."""
  batch_chains = jnp.concatenate([random_chains(family, 34) for family in FAMILIES])[:100]
  phis = random_features(100)
  config = Config() if ratio is None else Config(predictor="gradient", predictor_ratio=ratio)

  def updates(chain, phi, step, num_steps):
    batch = chains.Expectation(chain, jnp.full(20, 1 / 20))
    optimizer = optax.sgd(20 * step)  # the dynamics without a distribution are 20 times faster
    state = self_predictive.init(
      Params(phi, jnp.asarray(MATRIX)), optimizer=optimizer, config=config
    )

    def body(state, _):
      return self_predictive.update(
        state, batch, None, apply_fn=_table, optimizer=optimizer, config=config
      )[0], None

    return jax.lax.scan(body, state, length=num_steps)[0].params.representation

  def both(chain, phi):
    start = self_predictive_flow.Variables(phi, None if ratio is None else jnp.asarray(MATRIX))
    slope = functools.partial(self_predictive_flow.flow, transitions=chain, ratio=ratio)
    exact, _ = self_predictive_flow.integrate(
      slope, start, step=0.05, num_steps=100, save_every=100
    )
    ends = updates(chain, phi, 0.05, 100), updates(chain, phi, 0.025, 200)
    return [jnp.linalg.norm(end - exact.representation) for end in ends]

  whole, half = map(np.asarray, jax.jit(jax.vmap(both))(batch_chains, phis))
  assert whole.max() < 0.05  # one step of the size of the whole step
  np.testing.assert_allclose(whole / half, 2, rtol=0.15)  # the error is first-order


@pytest.mark.slow
def test_samples_give_the_expectation():
  """All transitions of a chain whose probabilities are multiples of 1/4, each as often as it is."""
  counts = np.random.default_rng(0).multinomial(4, [0.2] * 5, size=5)
  states, next_states = np.nonzero(counts)
  repeats = counts[states, next_states]
  sampled = Transitions(np.repeat(states, repeats), np.repeat(next_states, repeats))
  exact = self_predictive.make_expectation(jnp.asarray(counts / 4))
  params = Params(random_features(1, num_states=5)[0], jnp.eye(2) / 2)
  optimizer = optax.sgd(0.1)
  for config in (Config(stop_gradient=False), Config(predictor="gradient", num_inner_steps=3)):
    first, second = (
      self_predictive.update(
        self_predictive.init(params, optimizer=optimizer, config=config), batch, None,
        apply_fn=_table, optimizer=optimizer, config=config,
      )
      for batch in (sampled, exact)
    )  # fmt: skip
    for one, other in zip(jax.tree.leaves(first[0]), jax.tree.leaves(second[0]), strict=True):
      np.testing.assert_allclose(one, other, atol=1e-13)
    np.testing.assert_allclose(first[1]["loss"], second[1]["loss"], rtol=1e-12)


def test_inner_steps_lead_to_the_optimal_predictor():
  (chain,), (phi,) = random_chains("arbitrary", 1), random_features(1)
  batch = self_predictive.make_expectation(chain)
  optimizer = optax.sgd(1.0)
  ends = []
  for config in (
    Config(),
    Config(predictor="gradient", num_inner_steps=400, inner_step_size=10.0),
  ):
    state = self_predictive.init(
      Params(phi, jnp.asarray(MATRIX)), optimizer=optimizer, config=config
    )
    ends.append(
      self_predictive.update(
        state, batch, None, apply_fn=_table, optimizer=optimizer, config=config
      )[0].params.representation
    )
  assert np.abs(ends[0] - phi).max() > 1e-4
  # 1e-12: with D = I / 20 and orthonormal columns each step halves the distance.
  np.testing.assert_allclose(ends[1], ends[0], atol=1e-12)


# --- slow predictors ---


@functools.cache
def _cosines(num_steps=20_000, num_seeds=6):
  """Returns |cos| of the columns and singular values, `[seeds, ratios, decays]`, by variant."""
  found = {}
  grids = {
    "gradient": (jnp.array([0.1, 1.0, 10.0, 100.0]), jnp.array([0.0, 0.9, 0.99, 0.999])),
    "optimal": (jnp.array([1.0]), jnp.array([0.0, 0.9, 0.99, 0.999])),
  }
  symmetric, phis = random_chains("symmetric", num_seeds), random_features(num_seeds)
  for predictor, (ratios, decays) in grids.items():

    def one(chain, phi, ratio, decay, predictor=predictor):
      config = dataclasses.replace(
        Config(predictor=predictor), predictor_ratio=ratio, target_decay=decay
      )
      batch, optimizer = chains.Expectation(chain, jnp.full(20, 1 / 20)), optax.sgd(20 * 0.01)
      state = self_predictive.init(
        Params(phi, jnp.asarray(MATRIX)), optimizer=optimizer, config=config
      )

      def body(state, _):
        return self_predictive.update(
          state, batch, None, apply_fn=_table, optimizer=optimizer, config=config
        )[0], None

      end = jax.lax.scan(body, state, length=num_steps)[0].params.representation
      return collapse.column_cosine(end), collapse.singular_values(end)

    over_decays = jax.vmap(one, (None, None, None, 0))
    over_ratios = jax.vmap(over_decays, (None, None, 0, None))
    over_seeds = jax.vmap(over_ratios, (0, 0, None, None))
    found[predictor] = jax.tree.map(
      np.asarray, jax.jit(over_seeds)(symmetric, phis, ratios, decays)
    )
  return found


@pytest.mark.slow  # 20,000 steps of 120 runs
def test_a_slow_predictor_aligns_the_columns():
  cosines, values = (each[:, :, 0] for each in _cosines()["gradient"])
  optimal, _ = _cosines()["optimal"]
  means = cosines.mean(0)
  assert optimal[:, 0, 0].max() < 1e-2 and means[3] < 1e-2
  assert means[0] > means[1] > means[2] > means[3]
  assert means[0] > 0.2
  assert values[:, 0, 0].mean() > 2, "the predictor pours its mass into one direction"


@pytest.mark.slow
def test_a_target_network_does_not_repair_a_slow_predictor():
  cosines, _ = _cosines()["gradient"]
  without, with_target = cosines[:, :, :1].mean(0), cosines[:, :, 1:].mean(0)
  np.testing.assert_allclose(with_target[:3], np.broadcast_to(without[:3], (3, 3)), atol=0.02)
  optimal, values = _cosines()["optimal"]
  assert optimal.max() < 1e-2, "nor is it needed by an optimal one"
  np.testing.assert_allclose(values, 1, atol=5e-3)


# --- actions ---


def _with_actions(seed=0, num_actions=3, num_states=7):
  rng = np.random.default_rng(seed)
  transitions = rng.dirichlet(np.ones(num_states), (num_actions, num_states))
  policy = rng.dirichlet(np.ones(num_actions), num_states)
  distribution = rng.dirichlet(np.ones(num_states))
  phi = jnp.asarray(rng.normal(size=(num_states, 2)))
  batch = self_predictive.make_expectation(
    jnp.asarray(transitions), jnp.asarray(distribution), policy=jnp.asarray(policy)
  )
  return batch, phi


@functools.partial(jax.jit, static_argnames="objective")
def _loss(batch, phi, objective):
  shape = (2, 2) if objective == "policy" else (3, 2, 2)
  config = Config(objective=objective)
  return self_predictive.loss_of_embeddings(phi, phi, jnp.zeros(shape), batch, config=config)


def test_the_action_objective_is_the_policy_objective_plus_a_variance():
  """For any policy, distribution and representation: the projection theorem."""
  for seed in range(5):
    batch, phi = _with_actions(seed)
    transitions, d, policy, features = map(np.asarray, (*batch[:3], phi))
    matrices = []
    for action in range(3):
      weights = d * policy[:, action]
      gram = features.T @ (weights[:, None] * features)
      moments = features.T @ (weights[:, None] * (transitions[action] @ features))
      matrices.append(np.linalg.solve(gram, moments))
    mean_chain = np.einsum("sa,ast->st", policy, transitions)
    mean = np.linalg.solve(
      features.T @ (d[:, None] * features), features.T @ (d[:, None] * (mean_chain @ features))
    )
    variance = sum(
      np.sum(d * policy[:, action] * np.sum((features @ (matrices[action] - mean)) ** 2, axis=1))
      for action in range(3)
    )
    gap = _loss(batch, phi, "policy") - _loss(batch, phi, "action")
    np.testing.assert_allclose(gap, variance / 2, atol=1e-10)
    np.testing.assert_allclose(_loss(batch, phi, "variance"), -gap, atol=1e-10)


def test_under_a_policy_without_states_the_gap_is_the_variance_of_the_predictors():
  """Orthonormal Phi, uniform d: sum_a pi_a |M_a|^2 = |mean M|^2 + sum_a pi_a |M_a - mean M|^2."""
  batch, phi = _with_actions()
  phi = jnp.linalg.qr(phi)[0]
  probs = np.array([0.5, 0.2, 0.3])
  policy, uniform = jnp.tile(probs, (7, 1)), jnp.full(7, 1 / 7)
  batch = self_predictive.make_expectation(batch.transitions, uniform, policy=policy)
  matrices = np.asarray(phi.T @ batch.transitions @ phi)
  mean = np.einsum("a,akl->kl", probs, matrices)
  spread = np.einsum("a,akl->", probs, (matrices - mean) ** 2)
  by_policy, by_action = np.sum(mean**2), np.einsum("a,akl->", probs, matrices**2)
  np.testing.assert_allclose(by_action, by_policy + spread, atol=1e-10)
  gap = _loss(batch, phi, "policy") - _loss(batch, phi, "action")
  np.testing.assert_allclose(gap, spread / 2 / 7, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["action", "variance"])
def test_objectives_with_actions_do_not_collapse(objective):
  batch, phi = _with_actions()
  optimizer, config = optax.sgd(0.5), Config(objective=objective)

  def update(weights):
    params = Params(jnp.asarray(weights), jnp.zeros((3, 2, 2)))
    state = self_predictive.init(params, optimizer=optimizer, config=config)
    return self_predictive.update(
      state, batch, None, apply_fn=_table, optimizer=optimizer, config=config
    )[0].params.representation

  assert_gram_only_grows(update, np.asarray(phi))


def test_an_action_that_was_not_sampled_does_not_matter():
  rng = np.random.default_rng(0)
  states, next_states, actions = rng.integers(0, [[7], [7], [2]], (3, 40))
  phi = random_features(1, num_states=7)[0]
  config = Config(objective="action")
  loss = jax.jit(functools.partial(self_predictive.loss_of_embeddings, config=config))
  values = [
    loss(
      phi[states], phi[next_states], jnp.zeros((num_actions, 2, 2)),
      Transitions(states, next_states, actions),
    )
    for num_actions in (2, 3)
  ]  # fmt: skip
  assert np.isfinite(values[0])
  np.testing.assert_allclose(values[0], values[1], rtol=1e-12)


# --- bad input ---

CHAIN = np.full((3, 3), 1 / 3)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: Config(predictor="best"), "predictor must be one of"),
    (lambda: Config(ridge=-1.0), "ridge must be finite and not negative"),
    (lambda: Config(predictor="gradient", predictor_ratio=0.0), "predictor_ratio must be positive"),
    (lambda: Config(predictor="gradient", inner_step_size=0.0), "inner_step_size must be positive"),
    (lambda: Config(num_inner_steps=2), "num_inner_steps must be 0 with predictor='optimal'"),
    (lambda: Config(target_decay=1.5), r"target_decay must lie in \[0, 1\]"),
    (lambda: Config(target_decay=0.5, stop_gradient=False), "target_decay must be 0"),
    (lambda: Config(objective="variance", predictor="gradient"), "predictor must be 'optimal'"),
    (lambda: Config(num_microbatches=2), "num_microbatches must be 1"),
    (lambda: self_predictive.make_expectation(0.9 * CHAIN), "transitions must sum to 1"),
    (lambda: self_predictive.make_expectation(CHAIN[:2]), r"transitions must have shape \[S, S\]"),
    (lambda: self_predictive.make_expectation(1.0), r"transitions must have shape \[S, S\]"),
    (
      lambda: self_predictive.make_expectation(CHAIN, np.ones(3)),
      "distribution must sum to 1",
    ),
    (
      lambda: self_predictive.make_expectation(CHAIN, policy=np.ones((3, 2)) / 2),
      r"transitions must have shape \[A, S, S\]",
    ),
    (
      lambda: self_predictive.make_expectation(np.stack([CHAIN] * 2), policy=np.ones((3, 2))),
      "policy must sum to 1",
    ),
    (
      lambda: self_predictive.make_expectation(CHAIN, states=np.ones((4, 2))),
      "states must have one row for each of the 3 states",
    ),
    (lambda: _step(np.ones((3, 4)), np.eye(4)), "at most as many features as there are states, 3"),
    (
      lambda: self_predictive.loss_of_embeddings(
        np.ones((2, 3)), np.ones((2, 3)), np.eye(3),
        self_predictive.Transitions(np.arange(2), np.arange(2)), config=Config(),
      ),
      "at least as many transitions as features, 3, got 2",
    ),
    (
      lambda: self_predictive.loss_of_embeddings(
        np.ones((4, 2)), np.ones((1, 2)), np.eye(2),
        self_predictive.Transitions(np.arange(4), np.arange(1)),
        config=Config(predictor="gradient"),
      ),
      "shapes must be equal",
    ),
    (
      lambda: Config(stop_gradient=False, target_decay=np.float32(0.5)),
      "target_decay must be 0 with stop_gradient=False",
    ),
    (lambda: _step(np.eye(3), np.eye(2)), r"predictor must have shape \[k, k\]"),
    (
      lambda: _step(np.eye(3), np.ones((2, 3, 3)), Config(objective="action")),
      "policy must be given with objective='action'",
    ),
    (
      lambda: self_predictive.self_predictive_loss(np.ones((2, 3)), np.ones((2, 2))),
      "shapes must be equal",
    ),
  ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_a_chain_may_be_lists():
  batch = self_predictive.make_expectation(CHAIN.tolist())
  embeddings, predictor = jnp.eye(3)[:, :2], jnp.eye(2)
  losses = [
    self_predictive.loss_of_embeddings(embeddings, embeddings, predictor, each, config=Config())
    for each in (batch, self_predictive.make_expectation(CHAIN))
  ]
  assert losses[0] == losses[1]


def _step(table, predictor, config=None):
  config, optimizer = config or Config(), optax.sgd(0.1)
  state = self_predictive.init(
    Params(jnp.asarray(table), jnp.asarray(predictor)), optimizer=optimizer, config=config
  )
  batch = self_predictive.make_expectation(CHAIN)
  return self_predictive.update(
    state, batch, None, apply_fn=_table, optimizer=optimizer, config=config
  )
