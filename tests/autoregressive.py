"""A policy over sequences small enough to enumerate, and data sets that are exact populations.

Tokens {0, 1, EOS}, at most three of them: 15 completions, 7 prefixes, one row of three logits for
each prefix. An expectation over completions is a sum of 15 terms, so every closed form can be
checked through the same `apply_fn`, masks and `update` that a language model uses. Padding is the
EOS token on purpose: where a mask is wrong, the optimum is wrong.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alignment import sequences

EOS = 2
LENGTH = 3
NUM_PREFIXES = 7


def _completions():
  rows = [()]
  finished = []
  for _ in range(LENGTH):
    finished += [(*row, EOS) for row in rows]
    rows = [(*row, token) for row in rows for token in (0, 1)]
  rows = finished + rows  # those of full length without EOS are cut
  tokens = np.full((len(rows), LENGTH), EOS, np.int32)
  mask = np.zeros((len(rows), LENGTH), np.float32)
  for index, row in enumerate(rows):
    tokens[index, : len(row)] = row
    mask[index, : len(row)] = 1
  return tokens, mask


TOKENS, MASK = _completions()
NUM_COMPLETIONS = len(TOKENS)


def apply_fn(params, sequences_):
  """`[B, T]` log-probabilities under params `[7, 3]`; the context is read from the tokens."""
  tokens = jnp.asarray(sequences_.tokens)
  first, second = jnp.minimum(tokens[:, 0], 1), jnp.minimum(tokens[:, 1], 1)
  prefixes = jnp.stack([jnp.zeros_like(first), 1 + first, 3 + 2 * first + second], axis=1)
  return sequences.token_logps(params[prefixes], tokens)


def arm_apply_fn(params, sequences_):
  """The same for a bandit: params `[A]` logits, one token, the arm."""
  tokens = jnp.asarray(sequences_.tokens)
  return sequences.token_logps(jnp.broadcast_to(params, (*tokens.shape, params.shape[0])), tokens)


@jax.jit
def all_logps(params):
  """`[15]` log-probabilities of all completions."""
  rows = sequences.Sequences(TOKENS, MASK)
  return sequences.sequence_logps(apply_fn(params, rows), MASK, reduction="sum")


def pair_indices(counts):
  """All ordered pairs (i, j), each as often as two independent draws from `counts` give it."""
  draws = np.repeat(np.arange(len(counts)), counts)
  return np.array(list(itertools.product(draws, draws))).T


def preference_batch(tokens, mask, ref_logps, chosen, rejected, chosen_probs=1.0):
  """The batch of pairs (`chosen[n]`, `rejected[n]`) of enumerated completions."""
  chosen, rejected = np.asarray(chosen), np.asarray(rejected)
  return sequences.PreferenceBatch(
    jnp.asarray(tokens[chosen]),
    jnp.asarray(mask[chosen]),
    jnp.asarray(ref_logps)[chosen],
    jnp.asarray(tokens[rejected]),
    jnp.asarray(mask[rejected]),
    jnp.asarray(ref_logps)[rejected],
    jnp.asarray(chosen_probs),
  )


def preferences(rng, num_actions):
  """A random preference matrix, not Bradley-Terry, away from 0 and 1."""
  upper = np.triu(rng.uniform(0.1, 0.9, (num_actions, num_actions)), 1)
  return upper + np.tril(1 - upper.T, -1) + np.eye(num_actions) / 2


def random_game(rng, num_actions):
  """A preference matrix and reference log-probabilities; in one game of four the winner is sure."""
  matrix = preferences(rng, num_actions)
  if rng.random() < 0.25:
    upper = np.triu(matrix > 0.5, 1)
    matrix = upper + np.tril(1 - upper.T, -1) + np.eye(num_actions) / 2
  return matrix, np.log(rng.dirichlet(np.ones(num_actions)))


def bradley_terry(rewards):
  """P(i beats j) = sigmoid(r_i - r_j)."""
  return 1 / (1 + np.exp(rewards[None, :] - rewards[:, None]))


@functools.partial(jax.jit, static_argnames=("module", "apply_fn", "num_steps"))
def train(params, batch, config, *, module, apply_fn, num_steps=6000, learning_rate=0.03):
  """The parameters after `num_steps` updates of `module` on the same full batch.

  Adam whose rate halves eight times, the last one at 1/256: float64 runs end at the minimum of a
  smooth convex loss to about 1e-12, and the tests ask for 1e-8.
  """
  schedule = optax.exponential_decay(
    learning_rate, transition_steps=num_steps // 9, decay_rate=0.5, staircase=True
  )
  optimizer = optax.adam(schedule)
  state = module.init(params, optimizer=optimizer, config=config)

  def body(state, _):
    return module.update(state, batch, None, apply_fn=apply_fn, optimizer=optimizer, config=config)

  state, metrics = jax.lax.scan(body, state, None, length=num_steps)
  return state.params, metrics
