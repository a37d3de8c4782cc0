"""CoPG: Contrastive Policy Gradient, a policy gradient that is correct on off-policy data.

Problem: K completions of each prompt, drawn from any policy, each with a reward R. We want the
policy that maximises E_pi[R] - beta KL(pi || ref), which is ref * exp(R / beta), normalised. At
this optimum the regularised reward R - beta log-ratio is the same for all completions of a prompt.
CoPG regresses its differences to zero:

  sum over i < j of (R_i - R_j - beta (log-ratio_i - log-ratio_j))^2 / (2 beta (K - 1)).

The policies that drew the data may be unknown, the samples need no ranking, and ties carry
information. On samples of the policy itself the gradient is minus the leave-one-out policy
gradient. With reward 1/4 for a winner and -1/4 for a loser it is the gradient of IPO up to scale.

Reference: Flet-Berliac et al. 2024, https://arxiv.org/abs/2406.19185 (EMNLP 2024).

| paper | here |
|---|---|
| pi, pi_ref | `params` through `apply_fn`; `ref_logps` |
| R, beta | `rewards`, `beta` |
| log pi / pi_ref | `log_ratios` |
| R_beta = R - beta log pi / pi_ref | the regularised reward |
| y ~ mu1, y' ~ mu2 | any two samples of a prompt; K = 2 is the paper |

Deviations: we minimise the squared form; the paper maximises a function that differs from its
negative by a constant. K samples instead of two (K = 2 gives the paper's loss). The paper's
function contains R with beta / 2, and gradients flow through it; a stop-gradient there would solve
the problem of beta / 2.
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
  jax.tree_util.register_dataclass, data_fields=["beta"], meta_fields=["num_microbatches"]
)
@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters of CoPG.

  Attributes:
    beta: positive, in units of the reward per nat; larger keeps the policy closer to the
      reference. Scaling all rewards by c is the same as dividing beta by c.
    num_microbatches: parts into which the prompts of a batch are split to save memory, a divisor
      of B. The result is the same.
  """

  beta: Any = 0.06
  num_microbatches: int = 1

  def __post_init__(self):
    checks.positive("beta", self.beta)
    checks.count("num_microbatches", self.num_microbatches)


class Batch(NamedTuple):
  """K scored completions of each of B prompts.

  Attributes:
    tokens: `[B, K, T]` int, completion tokens, right-padded, without the prompt.
    mask: `[B, K, T]` 1 on completion tokens including EOS.
    ref_logps: `[B, K]` log ref(y|x), nats, **summed** over completion tokens.
    rewards: `[B, K]`.
    prompt_tokens: `[B, P]` int, left-padded, or None.
    prompt_mask: `[B, P]` or None.
  """

  tokens: Any
  mask: Any
  ref_logps: Any
  rewards: Any
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
def copg_loss(log_ratios: jax.Array, rewards: jax.Array, *, beta: Any) -> jax.Array:
  """Returns the CoPG loss of each prompt.

  loss = sum_{i<j} (R_i - R_j - beta (lr_i - lr_j))^2 / (2 beta (K - 1)).

  Args:
    log_ratios: `[B, K]` log pi(y|x) - log ref(y|x), nats, summed over completion tokens.
    rewards: `[B, K]`, K >= 2.
    beta: positive; larger keeps the policy closer to the reference.

  Returns:
    `[B]` non-negative losses, not averaged. Gradients reach both inputs; none is stopped.

  Raises:
    ValueError: if the shapes differ or are not `[B, K]` with K >= 2, or `beta` is not
      positive.

  Example:
    >>> rewards = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    >>> copg_loss(jnp.array([[0.0, 0.0], [2.0, 0.0]]), rewards, beta=0.5)
    Array([1., 0.], dtype=float32)

  Reference: Flet-Berliac et al. 2024, https://arxiv.org/abs/2406.19185, proof of theorem 1.
  """
  checks.positive("beta", beta)
  checks.finite("rewards", rewards)
  shape = checks.same_shape(log_ratios=log_ratios, rewards=rewards)
  if len(shape) != 2 or shape[1] < 2:
    raise ValueError(
      f"log_ratios and rewards must have shape [B, K] with K >= 2 samples of each prompt, got "
      f"{list(shape)}: CoPG compares completions of the same prompt"
    )
  num_samples = shape[1]
  regularised = jnp.asarray(rewards) - beta * jnp.asarray(log_ratios)
  # Sum over pairs of squared differences = K times the sum of squared deviations from the mean.
  deviations = regularised - jnp.mean(regularised, axis=1, keepdims=True)
  return num_samples * jnp.sum(deviations**2, axis=1) / (2 * beta * (num_samples - 1))


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
  """Returns the mean CoPG loss, and `(metrics, ())`.

  Args:
    batch: K scored completions of each of B prompts.
    apply_fn: `apply_fn(params, Sequences) -> [B K, T]`, log-probability of each completion token,
      for B K completions of B prompts.
  """
  del state, key
  flat = sequences.flatten_samples(batch.tokens, batch.mask, batch.prompt_tokens, batch.prompt_mask)
  shape = checks.same_shape(ref_logps=batch.ref_logps, rewards=batch.rewards)
  checks.shape("ref_logps", batch.ref_logps, jnp.shape(batch.tokens)[:2], "[B, K]")
  logps = apply_fn(params, flat)
  checks.shape("apply_fn(params, sequences)", logps, jnp.shape(flat.tokens), "[B K, T]")
  log_ratios = sequences.log_ratios(
    logps, flat.mask, jnp.reshape(batch.ref_logps, -1), reduction="sum"
  ).reshape(shape)
  value = jnp.mean(copg_loss(log_ratios, batch.rewards, beta=config.beta))
  best = jnp.argmax(batch.rewards, axis=1, keepdims=True)
  worst = jnp.argmin(batch.rewards, axis=1, keepdims=True)
  margins = jnp.take_along_axis(log_ratios, best, 1) - jnp.take_along_axis(log_ratios, worst, 1)
  metrics = {
    "loss": value,
    "copg/margin": jnp.mean(margins),
    "copg/log_ratio": jnp.mean(log_ratios),
    "copg/reward": jnp.mean(batch.rewards),
    "copg/regularised_reward": jnp.mean(batch.rewards - config.beta * log_ratios),
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
    batch: K scored completions of each of B prompts.

  Returns:
    The new state, and the metrics `loss`, `grad_norm`, `copg/margin` (log-ratio of the best
    sample of a prompt minus that of the worst, mean over prompts), and the means over all samples
    of `copg/log_ratio`, `copg/reward` and `copg/regularised_reward`.
  """
  return sharding.gradient_step(
    loss, state, batch, key, apply_fn=apply_fn, optimizer=optimizer, config=config
  )
