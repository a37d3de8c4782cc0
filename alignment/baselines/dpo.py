"""DPO: Direct Preference Optimisation, the Bradley-Terry classifier on log-ratios.

Problem: labelled pairs of completions, as in `alignment.ipo`. The regression is logistic where
IPO's is least squares:

  mean of -q log sigmoid(beta h) - (1 - q) log sigmoid(-beta h),
  h = log-ratio(chosen) - log-ratio(rejected).

If preferences are Bradley-Terry with rewards r, the optimum is ref * exp(r / beta), normalised. If
a completion never loses (or never wins) in the data, no beta gives a finite optimum: the margin
grows without bound. IPO repairs this failure.

Reference: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; compared with in Azar et al.
2023, https://arxiv.org/abs/2310.12036.

| paper | here |
|---|---|
| pi_theta, pi_ref | `params` through `apply_fn`; `*_ref_logps` |
| beta (tau in the IPO paper) | `beta` |
| p(y_w > y_l) | `chosen_probs` (q above: soft labels; the paper has q = 1) |

Deviations: soft labels. `reduction="mean"` divides each log-ratio by the number of its completion
tokens, which the paper does not.
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
Batch = sequences.PreferenceBatch


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["beta"],
  meta_fields=["reduction", "num_microbatches"],
)
@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters of DPO.

  Attributes:
    beta: positive; larger keeps the policy closer to the reference.
    reduction: "sum" (the paper's: log-probabilities of sequences) or "mean" (per token).
    num_microbatches: parts into which a batch is split to save memory, a divisor of B. The result
      is the same.
  """

  beta: Any = 0.1
  reduction: str = "sum"
  num_microbatches: int = 1

  def __post_init__(self):
    checks.positive("beta", self.beta)
    checks.choice("reduction", self.reduction, sequences.REDUCTIONS)
    checks.count("num_microbatches", self.num_microbatches)


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
def dpo_loss(
  chosen_log_ratios: jax.Array,
  rejected_log_ratios: jax.Array,
  *,
  beta: Any,
  chosen_probs: Any = 1.0,
) -> jax.Array:
  """Returns the DPO loss of each preference pair.

  loss = -q log sigmoid(beta h) - (1 - q) log sigmoid(-beta h), with the margin
  h = log-ratio(chosen) - log-ratio(rejected).

  Args:
    chosen_log_ratios: `[B]` log pi(y_w|x) - log ref(y_w|x), nats, summed over completion tokens.
    rejected_log_ratios: `[B]` the same for y_l.
    beta: positive; larger keeps the policy closer to the reference.
    chosen_probs: `[B]` or scalar q = P(y_w beats y_l), 1 for hard labels.

  Returns:
    `[B]` non-negative losses, not averaged; gradients reach both inputs.

  Raises:
    ValueError: if the shapes differ, or `beta` is not positive, or
      `chosen_probs` lie outside [0, 1].

  Example:
    >>> dpo_loss(jnp.array([0.0, 20.0]), jnp.zeros(2), beta=0.1).round(4)
    Array([0.6931, 0.1269], dtype=float32)

  Reference: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, eq. 7.
  """
  checks.positive("beta", beta)
  checks.probabilities("chosen_probs", chosen_probs)
  shape = checks.same_shape(
    chosen_log_ratios=chosen_log_ratios, rejected_log_ratios=rejected_log_ratios
  )
  if jnp.ndim(chosen_probs):
    checks.shape("chosen_probs", chosen_probs, shape, "[B]")
  logits = beta * (jnp.asarray(chosen_log_ratios) - jnp.asarray(rejected_log_ratios))
  # softplus(-z) = -log sigmoid(z), without overflow on either side.
  return chosen_probs * jax.nn.softplus(-logits) + (1 - chosen_probs) * jax.nn.softplus(logits)


def init(params: Any, *, optimizer: optax.GradientTransformation, config: Config) -> State:
  """Returns the first state.

  Args:
    params: parameters of the policy. Start at the reference, where all log-ratios are zero.
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
  """Returns the mean DPO loss, and `(metrics, ())`.

  Args:
    batch: B labelled pairs.
    apply_fn: `apply_fn(params, Sequences) -> [2 B, T]`, log-probability of each completion token.
  """
  del state, key
  chosen, rejected = sequences.pair_log_ratios(
    params, batch, apply_fn=apply_fn, reduction=config.reduction
  )
  losses = dpo_loss(chosen, rejected, beta=config.beta, chosen_probs=batch.chosen_probs)
  value = jnp.mean(losses)
  metrics = {
    "loss": value,
    "dpo/margin": jnp.mean(chosen - rejected),
    "dpo/accuracy": jnp.mean((chosen > rejected).astype(value.dtype)),
    "dpo/chosen_log_ratio": jnp.mean(chosen),
    "dpo/rejected_log_ratio": jnp.mean(rejected),
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
    The new state, and the metrics `loss`, `grad_norm`, `dpo/margin` (mean h), `dpo/accuracy`
    (share of pairs with h > 0), `dpo/chosen_log_ratio` and `dpo/rejected_log_ratio` (means, nats).
  """
  return sharding.gradient_step(
    loss, state, batch, key, apply_fn=apply_fn, optimizer=optimizer, config=config
  )
