"""SFT: supervised fine-tuning by maximum likelihood, from which every other method starts.

Problem: imitate completions y of prompts x. The loss is -log pi(y | x), and its optimum is the
distribution from which the completions were drawn. The other methods use the result as reference.

Reference: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, section 3.

| paper | here |
|---|---|
| pi_theta | `params` through `apply_fn` |

Deviations: `reduction="mean"` divides by the number of completion tokens of each sequence, so that
long completions weigh as much as short ones.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sharding
from alignment import sequences
from sharding import checks

Metrics = dict[str, jax.Array]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=[],
  meta_fields=["reduction", "num_microbatches"],
)
@dataclasses.dataclass(frozen=True)
class Config:
  """Choices of supervised fine-tuning.

  Attributes:
    reduction: "sum" (maximum likelihood of sequences) or "mean" (per token of each sequence).
    num_microbatches: parts into which a batch is split to save memory, a divisor of B. The result
      is the same.
  """

  reduction: str = "sum"
  num_microbatches: int = 1

  def __post_init__(self):
    checks.choice("reduction", self.reduction, sequences.REDUCTIONS)
    checks.count("num_microbatches", self.num_microbatches)


class Batch(NamedTuple):
  """Completions to imitate.

  Attributes:
    tokens: `[B, T]` int, completion tokens, right-padded, without the prompt.
    mask: `[B, T]` 1 on completion tokens including EOS.
    prompt_tokens: `[B, P]` int, left-padded, or None.
    prompt_mask: `[B, P]` or None.
  """

  tokens: Any
  mask: Any
  prompt_tokens: Any = None
  prompt_mask: Any = None


class State(NamedTuple):
  """Everything that changes in training.

  Attributes:
    params: parameters of the policy, as `apply_fn` takes them.
    opt_state: state of the optimiser.
    step: scalar int32, number of updates done.
  """

  params: Any
  opt_state: Any
  step: jax.Array


@checks.array_arguments
def sft_loss(token_logps: jax.Array, mask: jax.Array, *, reduction: str = "sum") -> jax.Array:
  """Returns -log pi(y | x) of each completion.

  Args:
    token_logps: `[B, T]` log-probability of each completion token, nats.
    mask: `[B, T]` non-zero on completion tokens including EOS.
    reduction: "sum", or "mean" over the tokens of each sequence.

  Returns:
    `[B]` losses, not averaged over the batch.

  Raises:
    ValueError: if the shapes differ or the reduction is unknown.

  Example:
    >>> sft_loss(jnp.array([[-1.0, -3.0, -9.0]]), jnp.array([[1, 1, 0]]), reduction="mean")
    Array([2.], dtype=float32)
  """
  return -sequences.sequence_logps(token_logps, mask, reduction=reduction)


def init(params: Any, *, optimizer: optax.GradientTransformation, config: Config) -> State:
  """Returns the first state.

  Args:
    params: parameters of the policy.
  """
  del config
  return State(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def loss(
  params: Any,
  state: State,
  batch: Batch,
  key: Any,
  *,
  apply_fn: sequences.ApplyFn,
  config: Config,
) -> tuple[jax.Array, tuple[Metrics, Any]]:
  """Returns the mean loss, and `(metrics, ())`.

  Args:
    batch: B completions.
    apply_fn: `apply_fn(params, Sequences) -> [B, T]`, log-probability of each completion token.
  """
  del state, key
  checks.same_shape(tokens=batch.tokens, mask=batch.mask)
  logps = apply_fn(params, sequences.Sequences(*batch))
  checks.shape("apply_fn(params, sequences)", logps, jnp.shape(batch.tokens), "[B, T]")
  value = jnp.mean(sft_loss(logps, batch.mask, reduction=config.reduction))
  per_token = sequences.sequence_logps(logps, batch.mask, reduction="mean")
  return value, ({"loss": value, "sft/token_logp": jnp.mean(per_token)}, ())


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
    batch: B completions.

  Returns:
    The new state, and the metrics `loss`, `grad_norm` and `sft/token_logp` (mean over the sequences
    of the mean log-probability of their tokens).
  """
  return sharding.gradient_step(
    loss, state, batch, key, apply_fn=apply_fn, optimizer=optimizer, config=config
  )
