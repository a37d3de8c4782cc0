"""SRPO against hand numbers and its closed form, whichever policy drew the data."""

import autoregressive as ar
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignment import ipo, preference_games, sequences, srpo


def table_apply_fn(params, rows):
  """A bandit with contexts: params `[1 + A, A]` logits, the row chosen by the last prompt token.

  Row 0 answers; row 1 + y1 revises answer y1.
  """
  rows = sequences.repeat_prompts(rows)
  logits = params[jnp.asarray(rows.prompt_tokens)[:, -1]]
  return sequences.token_logps(
    jnp.broadcast_to(logits[:, None], (*rows.tokens.shape, params.shape[1])), rows.tokens
  )


def completions_apply_fn(params, rows):
  """The 15-sequence policy, `[16, 7, 3]`: one table of prefixes for each context."""
  rows = sequences.repeat_prompts(rows)
  tables = params[jnp.asarray(rows.prompt_tokens)[:, -1]]
  one = lambda table, tokens: ar.apply_fn(table, sequences.Sequences(tokens[None], None))[0]  # noqa: E731
  return jax.vmap(one)(tables, jnp.asarray(rows.tokens))


def batch(tokens, mask, ref_logps, revision_ref_logps, chosen, rejected, chosen_probs=1.0):
  """The batch of pairs of enumerated completions; `revision_ref_logps[y1, y2]`."""
  chosen, rejected = np.asarray(chosen), np.asarray(rejected)
  given = revision_ref_logps
  scores = [
    ref_logps[chosen],
    ref_logps[rejected],
    given[rejected, chosen],
    given[rejected, rejected],
    given[chosen, chosen],
    given[chosen, rejected],
  ]
  ones = np.ones((len(chosen), 1), np.float32)
  return srpo.Batch(
    tokens[chosen],
    mask[chosen],
    tokens[rejected],
    mask[rejected],
    jnp.stack([jnp.asarray(x) for x in scores], axis=1),
    np.zeros((len(chosen), 1), np.int32),
    ones,
    1 + chosen[:, None],
    ones,
    1 + rejected[:, None],
    ones,
    jnp.asarray(chosen_probs),
  )


def arms(num_actions):
  return np.arange(num_actions)[:, None], np.ones((num_actions, 1), np.float32)


def population(preferences, counts):
  """All pairs that independent draws give, each in both orders with its preference."""
  first, second = ar.pair_indices(counts)
  return first, second, preferences[first, second]


def random_problem(rng, num_actions):
  preferences = ar.preferences(rng, num_actions)
  ref_logps = np.log(rng.dirichlet(np.ones(num_actions)))
  revision = np.log(rng.dirichlet(np.ones(num_actions), num_actions))
  return preferences, ref_logps, revision


# --- rung 1 ---


def test_worked_losses():
  # w, l, w|l, l|l, w|w, l|w
  ratios = [jnp.array([x]) for x in (1.0, -1.0, 2.0, 0.5, 1.5, -0.5)]
  generative = srpo.srpo_generative_loss(ratios[0], ratios[1], ratios[2], ratios[5], beta=0.1)
  np.testing.assert_allclose(generative, (1 - 0.1 * (2 + 1 + 0.5 + 1)) ** 2, rtol=1e-6)
  improvement = srpo.srpo_improvement_loss(*ratios[2:], beta=0.1)
  np.testing.assert_allclose(improvement, (0.5 - 0.15) ** 2 + (0.5 - 0.2) ** 2, rtol=1e-6)
  both = srpo.srpo_loss(*ratios, beta=0.1, alpha=0.2)
  np.testing.assert_allclose(both, 0.8 * generative + 0.2 * improvement, rtol=1e-6)


def test_losses_vanish_at_the_saddle_point(x64):
  rng = np.random.default_rng(0)
  for num_actions in range(2, 8):
    preferences, ref_logps, revision = random_problem(rng, num_actions)
    logps, rewrite = preference_games.srpo_optimum(preferences, ref_logps, revision, 0.2)
    r, d = logps - ref_logps, rewrite - revision
    w, lose = (x.ravel() for x in np.indices((num_actions, num_actions)))
    values = srpo.srpo_loss(
      r[w], r[lose], d[lose, w], d[lose, lose], d[w, w], d[w, lose], beta=0.2, alpha=0.5,
      chosen_probs=preferences[w, lose],
    )  # fmt: skip
    np.testing.assert_allclose(values, 0, atol=1e-24)


def test_hard_labels_have_the_gradient_of_their_mean(x64):
  """Bernoulli labels in either order give the soft loss's gradient: targets are regressed."""
  ratios, q = jnp.array([0.3, -0.2, 0.7, 0.1, -0.4, 0.6]), 0.7
  swap = jnp.array([1, 0, 5, 4, 3, 2])  # the same pair with its roles exchanged

  def one(ratios, q):
    return srpo.srpo_loss(*ratios[:, None], beta=0.3, alpha=0.4, chosen_probs=q)[0]

  soft = jax.grad(one)(ratios, q)
  hard = q * jax.grad(one)(ratios, 1.0) + (1 - q) * jax.grad(lambda x: one(x[swap], 1.0))(ratios)
  np.testing.assert_allclose(hard, soft, atol=1e-14)


# --- the update reaches the oracle ---


@pytest.mark.parametrize("num_actions", range(2, 8))
def test_update_reaches_the_closed_form_for_every_alpha_and_behaviour(x64, num_actions):
  rng = np.random.default_rng(num_actions)
  preferences, ref_logps, revision = random_problem(rng, num_actions)
  logps, rewrite = preference_games.srpo_optimum(preferences, ref_logps, revision, 0.5)
  want = np.exp(np.concatenate([logps[None], rewrite]))
  behaviours = [rng.integers(1, 3, num_actions)]
  if num_actions == 4:  # another source of the same problem's data
    behaviours.append(np.array([1, 1, 1, 2]))
  for counts in behaviours:
    data = batch(*arms(num_actions), ref_logps, revision, *population(preferences, counts))

    def train(alpha, data=data):
      start, config = jnp.concatenate([ref_logps[None], revision]), srpo.Config(0.5, alpha)
      return ar.train(start, data, config, module=srpo, apply_fn=table_apply_fn, num_steps=3000)[0]

    for ends in jax.nn.softmax(jax.vmap(train)(jnp.array([0.2, 0.5, 0.8]))):
      np.testing.assert_allclose(ends, want, atol=1e-6)


def test_update_reaches_the_closed_form_on_sequences(x64):
  """Five of the fifteen completions would do; all of them, of lengths 1 to 3, test the masks."""
  rng = np.random.default_rng(4)
  tables = jnp.asarray(rng.normal(size=(1 + ar.NUM_COMPLETIONS, ar.NUM_PREFIXES, 3)) / 2)
  every = jax.vmap(ar.all_logps)(tables)
  ref_logps, revision = np.asarray(every[0]), np.asarray(every[1:])
  preferences = ar.preferences(rng, ar.NUM_COMPLETIONS)
  want, want_rewrite = preference_games.srpo_optimum(preferences, ref_logps, revision, 1.0)
  first, second = np.triu_indices(ar.NUM_COMPLETIONS, 1)
  data = batch(
    ar.TOKENS, ar.MASK, ref_logps, revision, first, second, preferences[first, second]
  )  # fmt: skip
  params, _ = ar.train(
    tables, data, srpo.Config(beta=1.0), module=srpo, apply_fn=completions_apply_fn
  )
  every = jax.vmap(ar.all_logps)(params)
  np.testing.assert_allclose(jnp.exp(every[0]), np.exp(want), atol=1e-8)
  np.testing.assert_allclose(jnp.exp(every[1:]), np.exp(want_rewrite), atol=1e-8)


# --- batches ---


def test_each_of_the_six_sequences_stands_behind_its_own_prompt():
  tokens = lambda *rows: np.array(rows)  # noqa: E731
  data = srpo.Batch(
    tokens([5, 6]), np.ones((1, 2)), tokens([7]), np.ones((1, 1)), np.zeros((1, 6)),
    tokens([1]), np.ones((1, 1)), tokens([1, 5, 6]), np.ones((1, 3)), tokens([1, 7]),
    np.ones((1, 2)),
  )  # fmt: skip
  rows = sequences.repeat_prompts(srpo.six_sequences(data))
  seen = [
    (tuple(np.asarray(rows.prompt_tokens[i])[np.asarray(rows.prompt_mask[i]) > 0]),
     tuple(np.asarray(rows.tokens[i])[np.asarray(rows.mask[i]) > 0]))
    for i in range(6)
  ]  # fmt: skip
  chosen, rejected = (5, 6), (7,)
  plain, given_rejected, given_chosen = (1,), (1, 7), (1, 5, 6)
  assert seen == [
    (plain, chosen), (plain, rejected), (given_rejected, chosen), (given_rejected, rejected),
    (given_chosen, chosen), (given_chosen, rejected),
  ]  # fmt: skip


def test_bad_input_is_named():
  for alpha in (0.0, 1.0):
    with pytest.raises(ValueError, match=f"alpha must lie strictly between 0 and 1, got {alpha}"):
      srpo.Config(alpha=alpha)
  with pytest.raises(ValueError, match="beta must be positive"):
    srpo.srpo_loss(*jnp.zeros((6, 1)), beta=0.0, alpha=0.5)
  with pytest.raises(ValueError, match="rejected_given_chosen"):
    srpo.srpo_generative_loss(*jnp.zeros((3, 2)), jnp.zeros(3), beta=0.1)
  good = batch(*arms(2), np.zeros(2), np.zeros((2, 2)), [0], [1])
  for field in ("ref_logps", "given_chosen_mask", "prompt_tokens"):
    with pytest.raises(ValueError, match=field):
      srpo.loss(
        jnp.zeros((3, 2)), None, good._replace(**{field: jnp.zeros((3, 3))}), None,
        apply_fn=table_apply_fn, config=srpo.Config(),
      )  # fmt: skip


def test_ipo_and_the_generative_half_differ_by_the_rewrites():
  """With the rewriting policy frozen at its reference, the generative loss is IPO's on 2 q - 1."""
  margin = jnp.array([1.3])
  generative = srpo.srpo_generative_loss(
    margin, jnp.zeros(1), jnp.zeros(1), jnp.zeros(1), beta=0.2, chosen_probs=0.8
  )
  pairwise = ipo.ipo_loss(margin, jnp.zeros(1), tau=0.1, chosen_probs=0.8)
  # (0.6 - 0.2 h)^2 = 0.2^2 (h - 0.6 / 0.2)^2, and IPO's target at tau = beta / 2 is 0.6 / 0.2.
  np.testing.assert_allclose(generative, 0.04 * pairwise, rtol=1e-5)
