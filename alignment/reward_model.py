"""Reward and preference models: judges learned from labelled pairs.

Problem: a judge has said which of two completions of a prompt is better. There are two models of
it:

* "bradley_terry": a reward r(x, y) of each completion, P(y beats y') = sigmoid(r(y) - r(y')).
  If preferences are not of this form (cyclic, say), the fit depends on which pairs were compared.
* "pairwise": a function f(x, y, y') of both, P = sigmoid((f(x, y, y') - f(x, y', y)) / 2). It is
  antisymmetric by construction, P(y beats y') = 1 - P(y' beats y), and may be cyclic.

Both minimise -q log P - (1 - q) log(1 - P). The network is `apply_fn(params, Sequences) -> [B]`,
one number for each sequence, such as `models.scalar_head.make_apply_fn` returns. For a pairwise
model the first completion is at the end of the prompt.

Reference: Munos et al. 2023, https://arxiv.org/abs/2312.00886, sections 3 and 8; the reward model
of Stiennon et al. 2020, https://arxiv.org/abs/2009.01325.

| paper | here |
|---|---|
| r(x, y) or P(y > y' given x) | `params` through `apply_fn`; `preference_probs` |
| y_w, y_l | `chosen`, `rejected` |
| p(y_w > y_l) | `chosen_probs` (q above: a tie is 1/2) |

Deviations: the paper's rater answers with one token, whose probability is the preference; its
symmetry is left to the training data. `centring` (off by default) adds c (r(y_w) + r(y_l))^2, which
fixes the constant that a Bradley-Terry reward leaves open; a large c also shrinks differences. In
"pairwise" only the EOS of the first completion separates it from the second. A completion that was
cut before its EOS has no separator.
"""

import dataclasses
import functools
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sharding
from alignment import sequences
from sharding import checks

Metrics = dict[str, jax.Array]
ApplyFn = Callable[[Any, sequences.Sequences], jax.Array]
KINDS = ("bradley_terry", "pairwise")


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["centring"],
  meta_fields=["kind", "num_microbatches"],
)
@dataclasses.dataclass(frozen=True)
class Config:
  """Choices of a reward or preference model.

  Attributes:
    kind: "bradley_terry" or "pairwise".
    centring: non-negative weight of the squared sum of a pair's rewards; Bradley-Terry only.
    num_microbatches: parts into which a batch is split to save memory, a divisor of B. The result
      is the same.
  """

  kind: str = "bradley_terry"
  centring: Any = 0.0
  num_microbatches: int = 1

  def __post_init__(self):
    checks.choice("kind", self.kind, KINDS)
    checks.not_negative("centring", self.centring)
    known = isinstance(self.centring, numbers.Real | np.ndarray)
    if self.kind == "pairwise" and known and np.any(self.centring):
      raise ValueError(f"centring must be 0 for kind='pairwise', got {self.centring}")
    checks.count("num_microbatches", self.num_microbatches)


class Batch(NamedTuple):
  """Labelled pairs of completions of the same prompt.

  Attributes:
    chosen_tokens: `[B, T]` int, the preferred completion, without the prompt.
    chosen_mask: `[B, T]` 1 on completion tokens including EOS.
    rejected_tokens: `[B, T]` the other one, perhaps padded to another T.
    rejected_mask: `[B, T]`.
    prompt_tokens: `[B, P]` int, left-padded.
    prompt_mask: `[B, P]`.
    chosen_probs: `[B]` or scalar, P(chosen beats rejected); 1 for hard labels, 1/2 for a tie.
  """

  chosen_tokens: Any
  chosen_mask: Any
  rejected_tokens: Any
  rejected_mask: Any
  prompt_tokens: Any
  prompt_mask: Any
  chosen_probs: Any = 1.0


class State(NamedTuple):
  """Everything that changes in training.

  Attributes:
    params: parameters of the model, as `apply_fn` takes them.
    opt_state: state of the optimiser.
    step: scalar int32, number of updates done.
  """

  params: Any
  opt_state: Any
  step: jax.Array


@checks.array_arguments
def preference_loss(logits: jax.Array, *, chosen_probs: Any = 1.0) -> jax.Array:
  """Returns the cross-entropy -q log sigmoid(z) - (1 - q) log sigmoid(-z) of each pair.

  Args:
    logits: `[B]` z, the log-odds that chosen beats rejected: a difference of Bradley-Terry rewards,
      or `antisymmetric_logits`.
    chosen_probs: `[B]` or scalar q, 1 for hard labels.

  Returns:
    `[B]` non-negative losses, not averaged.

  Raises:
    ValueError: if the shapes differ or `chosen_probs` lie outside [0, 1].

  Example:
    >>> preference_loss(jnp.zeros(2)).round(4)
    Array([0.6931, 0.6931], dtype=float32)

  Reference: Munos et al. 2023, https://arxiv.org/abs/2312.00886, section 3.
  """
  checks.probabilities("chosen_probs", chosen_probs)
  logits = jnp.asarray(logits)
  if jnp.ndim(chosen_probs):
    checks.shape("chosen_probs", chosen_probs, logits.shape, "[B]")
  # softplus(-z) = -log sigmoid(z), without overflow on either side.
  return chosen_probs * jax.nn.softplus(-logits) + (1 - chosen_probs) * jax.nn.softplus(logits)


def antisymmetric_logits(forward: jax.Array, backward: jax.Array) -> jax.Array:
  """Returns (f(x, y, y') - f(x, y', y)) / 2, which changes sign if y and y' are exchanged.

  Args:
    forward: `[B]` f(x, y, y').
    backward: `[B]` f(x, y', y).

  Raises:
    ValueError: if the shapes differ.
  """
  checks.same_shape(forward=forward, backward=backward)
  return (jnp.asarray(forward) - jnp.asarray(backward)) / 2


def preference_probs(params: Any, batch: Batch, *, apply_fn: ApplyFn, config: Config) -> jax.Array:
  """Returns `[B]` P(chosen beats rejected) under the model, such as `nash_md.Batch` takes.

  Args:
    params: parameters of the model.
    batch: B pairs, in any order; their labels are ignored.
    apply_fn: `apply_fn(params, Sequences) -> [B]`.
    config: the kind of model.

  Raises:
    ValueError: if the shapes of the batch do not fit.
  """
  return jax.nn.sigmoid(preference_logits(params, batch, apply_fn=apply_fn, config=config))


def preference_logits(params: Any, batch: Batch, *, apply_fn: ApplyFn, config: Config) -> jax.Array:
  """Returns `[B]` log-odds that chosen beats rejected; arguments as `preference_probs`."""
  return _logits(params, batch, apply_fn=apply_fn, config=config)[0]


def rows(batch: Batch, *, config: Config) -> sequences.Sequences:
  """Returns the two sequences of each pair that the network reads.

  Rows 2 b and 2 b + 1 are chosen and rejected of pair b ("bradley_terry"), or the arguments of
  f(x, chosen, rejected) and f(x, rejected, chosen) ("pairwise").

  Args:
    batch: B pairs; their labels are ignored.
    config: the kind of model.

  Raises:
    ValueError: if the shapes of the batch do not fit.
  """
  sequences.check_rows(batch, "chosen", "rejected", "prompt")
  tokens = sequences.stack_padded(batch.chosen_tokens, batch.rejected_tokens, side="right")
  mask = sequences.stack_padded(batch.chosen_mask, batch.rejected_mask, side="right")
  if config.kind == "bradley_terry":
    return sequences.flatten_samples(tokens, mask, batch.prompt_tokens, batch.prompt_mask)

  # The other completion is at the end of the prompt; the padding between the two is masked.
  def join(prompt, answers):
    prompt = prompt[:, None].repeat(2, axis=1)
    joined = sequences.array_module(prompt, answers).concatenate([prompt, answers], axis=2)
    return joined.reshape(2 * len(answers), -1)

  swapped = sequences.flatten_samples(tokens[:, ::-1], mask[:, ::-1])
  return swapped._replace(
    prompt_tokens=join(batch.prompt_tokens, tokens), prompt_mask=join(batch.prompt_mask, mask)
  )


def _logits(params, batch: Batch, *, apply_fn: ApplyFn, config: Config):
  """Returns log-odds `[B]` that chosen beats rejected, and the network's two numbers `[B, 2]`."""
  pairs = rows(batch, config=config)
  values = apply_fn(params, pairs)
  checks.shape("apply_fn(params, sequences)", values, (len(pairs.tokens),), "[2 B]")
  values = values.reshape(-1, 2)
  if config.kind == "bradley_terry":
    return values[:, 0] - values[:, 1], values
  return antisymmetric_logits(values[:, 0], values[:, 1]), values


def init(params: Any, *, optimizer: optax.GradientTransformation, config: Config) -> State:
  """Returns the first state.

  Args:
    params: parameters of the model.
  """
  del config
  return State(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def loss(
  params: Any, state: State, batch: Batch, key: Any, *, apply_fn: ApplyFn, config: Config
) -> tuple[jax.Array, tuple[Metrics, Any]]:
  """Returns the mean cross-entropy, and `(metrics, ())`.

  Args:
    batch: B labelled pairs.
    apply_fn: `apply_fn(params, Sequences) -> [2 B]`, one number for each sequence.
  """
  del state, key
  logits, values = _logits(params, batch, apply_fn=apply_fn, config=config)
  losses = preference_loss(logits, chosen_probs=batch.chosen_probs)
  if config.kind == "bradley_terry":
    losses = losses + config.centring * jnp.sum(values, axis=1) ** 2
  value = jnp.mean(losses)
  # A tie in the model counts half.
  right = jnp.mean((logits > 0) + 0.5 * (logits == 0)).astype(value.dtype)
  metrics = {
    "loss": value,
    "reward_model/accuracy": right,
    "reward_model/margin": jnp.mean(logits),
  }
  return value, (metrics, ())


@functools.partial(jax.jit, static_argnames=("apply_fn", "optimizer"))
def update(
  state: State,
  batch: Batch,
  key: Any,
  *,
  apply_fn: ApplyFn,
  optimizer: optax.GradientTransformation,
  config: Config,
) -> tuple[State, Metrics]:
  """Returns the state after one gradient step, and metrics from before it.

  Args:
    batch: B labelled pairs.

  Returns:
    The new state, and the metrics `loss`, `grad_norm`, `reward_model/accuracy` (share of pairs
    whose chosen completion the model prefers) and `reward_model/margin` (mean log-odds).
  """
  return sharding.gradient_step(
    loss, state, batch, key, apply_fn=apply_fn, optimizer=optimizer, config=config
  )
