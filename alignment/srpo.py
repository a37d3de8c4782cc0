"""SRPO: Self-Improving Robust Preference Optimization, which learns to answer and to revise.

Problem: labelled pairs of completions, whose preferences need not come from rewards. Two policies
play against each other: pi(y | x) answers, and pi'(y2 | y1, x) revises an answer that it reads,

  min over pi, max over pi' of  E[P(y2 beats y1)] - beta KL(pi' || ref') + beta KL(pi || ref).

pi' becomes the best revision near ref', and pi prefers the answers that leave the least to improve.
The solution does not depend on the policy that drew the data; IPO's optimum does. Training needs no
game: the two conditions of the saddle point are equations between log-ratios, and each becomes a
regression like IPO's. With r(y) the log-ratio of pi and r(y2 | y1) that of pi',

  improvement:  P(y2 beats y1) - 1/2  =  beta (r(y2 | y1) - r(y1 | y1)),
  generative:   2 P(y2 beats y1) - 1  =  beta (r(y2 | y1) + r(y2) - r(y1 | y2) - r(y1)).

One network is both policies; only the prompts differ. At inference the answer can be revised any
number of times.

Reference: Choi et al. 2024, https://arxiv.org/abs/2406.01660 (ICLR 2025).

| paper | here |
|---|---|
| pi, pi_dagger | `params` through `apply_fn`, after `prompt_tokens` or after `given_*_tokens` |
| pi_ref of both | `ref_logps` |
| y_w, y_l | `chosen`, `rejected` |
| y_w given y_l | `chosen_given_rejected`: the prompt holds the rejected answer |
| beta, alpha | `beta`, `alpha` |

Deviations: soft labels. We do not know how the paper scales the generative loss relative to the
other. A factor only changes the meaning of alpha, and the optimum is the same for every alpha
strictly between 0 and 1 (at 0 it is not unique, at 1 pi is not trained).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sharding
from alignment import sequences
from sharding import checks

Metrics = dict[str, jax.Array]

# Order of the last axis of `Batch.ref_logps`: the answer, given the one that the prompt shows.
SCORED = (
  "chosen",
  "rejected",
  "chosen_given_rejected",
  "rejected_given_rejected",
  "chosen_given_chosen",
  "rejected_given_chosen",
)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["beta", "alpha"],
  meta_fields=["num_microbatches"],
)
@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters of SRPO.

  Attributes:
    beta: positive, in units of the preference per nat; larger keeps both policies closer to their
      references.
    alpha: strictly between 0 and 1, the weight of the improvement loss.
    num_microbatches: parts into which a batch is split to save memory, a divisor of B. The result
      is the same.
  """

  beta: Any = 0.1
  alpha: Any = 0.5
  num_microbatches: int = 1

  def __post_init__(self):
    checks.positive("beta", self.beta)
    checks.fractions("alpha", self.alpha)
    checks.count("num_microbatches", self.num_microbatches)


class Batch(NamedTuple):
  """Labelled pairs, with the plain prompt and with the two prompts that show an answer to revise.

  Attributes:
    chosen_tokens: `[B, T]` int, the preferred completion y_w, without the prompt.
    chosen_mask: `[B, T]` 1 on completion tokens including EOS.
    rejected_tokens: `[B, T]` the other completion y_l, perhaps padded to another T.
    rejected_mask: `[B, T]`.
    ref_logps: `[B, 6]` the reference's log-probabilities in the order of `SCORED`, nats, summed
      over completion tokens.
    prompt_tokens: `[B, P]` int, left-padded, the prompt of pi.
    prompt_mask: `[B, P]`.
    given_chosen_tokens: `[B, R]` int, left-padded, the prompt of pi' that shows y_w.
    given_chosen_mask: `[B, R]`.
    given_rejected_tokens: `[B, R]` the one that shows y_l, perhaps of another length.
    given_rejected_mask: `[B, R]`.
    chosen_probs: `[B]` or scalar, P(y_w beats y_l); 1 for hard labels.
  """

  chosen_tokens: Any
  chosen_mask: Any
  rejected_tokens: Any
  rejected_mask: Any
  ref_logps: Any
  prompt_tokens: Any
  prompt_mask: Any
  given_chosen_tokens: Any
  given_chosen_mask: Any
  given_rejected_tokens: Any
  given_rejected_mask: Any
  chosen_probs: Any = 1.0


class State(NamedTuple):
  """Everything that changes in training.

  Attributes:
    params: parameters of both policies, as `apply_fn` takes them.
    opt_state: state of the optimiser.
    step: scalar int32, number of updates done.
  """

  params: Any
  opt_state: Any
  step: jax.Array


@checks.array_arguments
def srpo_improvement_loss(
  chosen_given_rejected: jax.Array,
  rejected_given_rejected: jax.Array,
  chosen_given_chosen: jax.Array,
  rejected_given_chosen: jax.Array,
  *,
  beta: Any,
  chosen_probs: Any = 1.0,
) -> jax.Array:
  """Returns the loss that fits the revising policy, for each pair.

  loss = (q - 1/2 - beta (r(w | l) - r(l | l)))^2 + (q - 1/2 - beta (r(w | w) - r(l | w)))^2. The
  first term is about improving the rejected answer, the second about keeping the chosen one.

  Args:
    chosen_given_rejected: `[B]` log-ratio r(w | l) of the chosen answer, the rejected one in the
      prompt; nats, summed over completion tokens.
    rejected_given_rejected: `[B]` r(l | l).
    chosen_given_chosen: `[B]` r(w | w).
    rejected_given_chosen: `[B]` r(l | w).
    beta: positive; larger keeps the policy closer to the reference.
    chosen_probs: `[B]` or scalar q = P(y_w beats y_l), 1 for hard labels.

  Returns:
    `[B]` non-negative losses, not averaged; gradients reach all four inputs.

  Raises:
    ValueError: if the shapes differ, or `beta` or `chosen_probs` is out of range.

  Example:
    >>> srpo_improvement_loss(jnp.array([5.0]), *jnp.zeros((3, 1)), beta=0.1)
    Array([0.25], dtype=float32)

  Reference: Choi et al. 2024, https://arxiv.org/abs/2406.01660, section 4.
  """
  _check(
    beta,
    chosen_probs,
    chosen_given_rejected=chosen_given_rejected,
    rejected_given_rejected=rejected_given_rejected,
    chosen_given_chosen=chosen_given_chosen,
    rejected_given_chosen=rejected_given_chosen,
  )
  target = jnp.asarray(chosen_probs) - 0.5
  improving = jnp.asarray(chosen_given_rejected) - rejected_given_rejected
  keeping = jnp.asarray(chosen_given_chosen) - rejected_given_chosen
  return (target - beta * improving) ** 2 + (target - beta * keeping) ** 2


@checks.array_arguments
def srpo_generative_loss(
  chosen: jax.Array,
  rejected: jax.Array,
  chosen_given_rejected: jax.Array,
  rejected_given_chosen: jax.Array,
  *,
  beta: Any,
  chosen_probs: Any = 1.0,
) -> jax.Array:
  """Returns the loss that ties the answering policy to the revising one, for each pair.

  loss = (2 q - 1 - beta (r(w | l) + r(w) - r(l | w) - r(l)))^2.

  Args:
    chosen: `[B]` log-ratio r(w) of the chosen answer under the plain prompt; nats, summed.
    rejected: `[B]` r(l).
    chosen_given_rejected: `[B]` r(w | l), the rejected answer in the prompt.
    rejected_given_chosen: `[B]` r(l | w).
    beta: positive; larger keeps the policy closer to the reference.
    chosen_probs: `[B]` or scalar q = P(y_w beats y_l), 1 for hard labels.

  Returns:
    `[B]` non-negative losses, not averaged; gradients reach all four inputs.

  Raises:
    ValueError: if the shapes differ, or `beta` or `chosen_probs` is out of range.

  Example:
    >>> srpo_generative_loss(jnp.array([5.0]), *jnp.zeros((3, 1)), beta=0.1)
    Array([0.25], dtype=float32)

  Reference: Choi et al. 2024, https://arxiv.org/abs/2406.01660, section 4.
  """
  _check(
    beta,
    chosen_probs,
    chosen=chosen,
    rejected=rejected,
    chosen_given_rejected=chosen_given_rejected,
    rejected_given_chosen=rejected_given_chosen,
  )
  margin = jnp.asarray(chosen_given_rejected) + chosen - rejected_given_chosen - rejected
  return (2 * jnp.asarray(chosen_probs) - 1 - beta * margin) ** 2


@checks.array_arguments
def srpo_loss(
  chosen: jax.Array,
  rejected: jax.Array,
  chosen_given_rejected: jax.Array,
  rejected_given_rejected: jax.Array,
  chosen_given_chosen: jax.Array,
  rejected_given_chosen: jax.Array,
  *,
  beta: Any,
  alpha: Any,
  chosen_probs: Any = 1.0,
) -> jax.Array:
  """Returns (1 - alpha) generative + alpha improvement loss of each pair.

  Args:
    chosen: `[B]` log-ratio of the chosen answer under the plain prompt; nats, summed over
      completion tokens. The others likewise, in the order of `SCORED`.
    rejected: `[B]`.
    chosen_given_rejected: `[B]` the chosen answer, the rejected one in the prompt.
    rejected_given_rejected: `[B]`.
    chosen_given_chosen: `[B]`.
    rejected_given_chosen: `[B]`.
    beta: positive; larger keeps the policy closer to the reference.
    alpha: strictly between 0 and 1, the weight of the improvement loss.
    chosen_probs: `[B]` or scalar P(y_w beats y_l), 1 for hard labels.

  Returns:
    `[B]` non-negative losses, not averaged; gradients reach all inputs.

  Raises:
    ValueError: if the shapes differ, or `beta`, `alpha` or `chosen_probs` is out of
      range.

  Example:
    >>> srpo_loss(*jnp.zeros((6, 1)), beta=0.1, alpha=0.5)  # 1/2 of 1 and 1/2 of (1/4 + 1/4)
    Array([0.75], dtype=float32)

  Reference: Choi et al. 2024, https://arxiv.org/abs/2406.01660, section 4.
  """
  checks.fractions("alpha", alpha)
  generative = srpo_generative_loss(
    chosen,
    rejected,
    chosen_given_rejected,
    rejected_given_chosen,
    beta=beta,
    chosen_probs=chosen_probs,
  )
  improvement = srpo_improvement_loss(
    chosen_given_rejected,
    rejected_given_rejected,
    chosen_given_chosen,
    rejected_given_chosen,
    beta=beta,
    chosen_probs=chosen_probs,
  )
  return (1 - alpha) * generative + alpha * improvement


def _check(beta: Any, chosen_probs: Any, **log_ratios: Any) -> None:
  checks.positive("beta", beta)
  checks.probabilities("chosen_probs", chosen_probs)
  shape = checks.same_shape(**log_ratios)
  if jnp.ndim(chosen_probs):
    checks.shape("chosen_probs", chosen_probs, shape, "[B]")


def six_sequences(batch: Batch) -> sequences.Sequences:
  """Returns both answers after each of the three prompts of a pair: one batch of 6 B sequences.

  Rows 6 b to 6 b + 5 are those of pair b in the order of `SCORED`. There are 3 B prompts, each
  shared by both answers, so that a model reads it once.

  Args:
    batch: B labelled pairs.

  Raises:
    ValueError: if the shapes of the batch do not fit.
  """
  batch_size = sequences.check_rows(
    batch, "chosen", "rejected", "prompt", "given_chosen", "given_rejected"
  )

  def answers(*arrays):
    both = sequences.stack_padded(*arrays, side="right")
    return both[:, None].repeat(3, axis=1).reshape(6 * batch_size, -1)

  def prompts(*arrays):
    return sequences.stack_padded(*arrays, side="left").reshape(3 * batch_size, -1)

  return sequences.Sequences(
    answers(batch.chosen_tokens, batch.rejected_tokens),
    answers(batch.chosen_mask, batch.rejected_mask),
    prompts(batch.prompt_tokens, batch.given_rejected_tokens, batch.given_chosen_tokens),
    prompts(batch.prompt_mask, batch.given_rejected_mask, batch.given_chosen_mask),
  )


def init(params: Any, *, optimizer: optax.GradientTransformation, config: Config) -> State:
  """Returns the first state.

  Args:
    params: parameters of the policy. Start at the reference, where all log-ratios are zero.
  """
  del config
  return State(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def sample(
  state: State,
  prompts: sequences.Prompts,
  key: Any,
  *,
  sample_fn: sequences.SampleFn,
  revision_fn: Callable[[sequences.Sequences], sequences.Prompts],
  num_revisions: int,
) -> list[sequences.Sequences]:
  """Returns answers to the prompts and their successive revisions by the same network.

  Args:
    state: the trained state.
    prompts: N prompts of pi.
    key: typed PRNG key.
    sample_fn: `sample_fn(params, prompt_tokens, prompt_mask, key)` draws one completion of each
      prompt, see `sequences.SampleFn`.
    revision_fn: takes prompts with their answers and returns the prompts of pi' that show them.
    num_revisions: 0 for the answers alone.

  Returns:
    `num_revisions + 1` `Sequences` of N rows with the plain prompts, the first answer first.

  Raises:
    ValueError: if the samples do not fit the prompts or `num_revisions` is negative.

  Reference: Choi et al. 2024, https://arxiv.org/abs/2406.01660, section 4 (inference).
  """
  checks.count("num_revisions", num_revisions, least=0)
  keys = jax.random.split(key, num_revisions + 1)
  answers = [sequences.sample(state.params, prompts, keys[0], sample_fn=sample_fn)]
  for revision_key in keys[1:]:
    shown = revision_fn(answers[-1])
    drawn = sequences.sample(state.params, shown, revision_key, sample_fn=sample_fn)
    answers.append(answers[0]._replace(tokens=drawn.tokens, mask=drawn.mask))
  return answers


def loss(
  params: Any,
  state: State,
  batch: Batch,
  key: Any,
  *,
  apply_fn: sequences.ApplyFn,
  config: Config,
) -> tuple[jax.Array, tuple[Metrics, Any]]:
  """Returns the mean SRPO loss, and `(metrics, ())`.

  Args:
    batch: B labelled pairs.
    apply_fn: `apply_fn(params, Sequences) -> [6 B, T]`, log-probability of each completion token;
      called once, with 6 B completions of 3 B prompts.
  """
  del state, key
  rows = six_sequences(batch)
  batch_size = jnp.shape(batch.chosen_tokens)[0]
  checks.shape("ref_logps", batch.ref_logps, (batch_size, len(SCORED)), "[B, 6]")
  logps = apply_fn(params, rows)
  checks.shape("apply_fn(params, sequences)", logps, jnp.shape(rows.tokens), "[6 B, T]")
  ref_logps = jnp.reshape(batch.ref_logps, -1)
  flat = sequences.log_ratios(logps, rows.mask, ref_logps, reduction="sum")
  ratios = dict(zip(SCORED, flat.reshape(batch_size, len(SCORED)).T, strict=True))
  value = jnp.mean(
    srpo_loss(**ratios, beta=config.beta, alpha=config.alpha, chosen_probs=batch.chosen_probs)
  )
  margin = ratios["chosen"] - ratios["rejected"]
  improvement = ratios["chosen_given_rejected"] - ratios["rejected_given_rejected"]
  metrics = {
    "loss": value,
    "srpo/margin": jnp.mean(margin),
    "srpo/accuracy": jnp.mean((margin > 0).astype(value.dtype)),
    "srpo/improvement": jnp.mean(improvement),
  }
  return value, (metrics, ())


@functools.partial(jax.jit, static_argnames=("apply_fn", "optimizer"))
def update(
  state: State,
  batch: Batch,
  key: Any,
  *,
  apply_fn: sequences.ApplyFn,
  optimizer: optax.GradientTransformation,
  config: Config,
) -> tuple[State, Metrics]:
  """Returns the state after one gradient step, and metrics from before it.

  Args:
    batch: B labelled pairs.

  Returns:
    The new state, and the metrics `loss`, `grad_norm`, `srpo/margin` (mean of r(w) - r(l)),
    `srpo/accuracy` (share of pairs where it is positive) and `srpo/improvement` (mean of
    r(w | l) - r(l | l)).
  """
  return sharding.gradient_step(
    loss, state, batch, key, apply_fn=apply_fn, optimizer=optimizer, config=config
  )
