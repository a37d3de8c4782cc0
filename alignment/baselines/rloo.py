"""RLOO: the policy gradient with a leave-one-out baseline, and plain REINFORCE with a KL penalty.

Problem: K completions of each prompt, drawn *from the policy itself*, each with a reward R. We want
the policy that maximises E_pi[R] - beta KL(pi || ref). The weight of a sample is its regularised
reward R_beta = R - beta log-ratio, minus the mean of the K - 1 others:

  gradient = sum over i of (R_beta,i - mean over j != i of R_beta,j) grad log pi(y_i).

The baseline does not depend on its sample, so the gradient is unbiased. On samples of another
policy the sum is no policy gradient, but still the gradient of `alignment.copg`, with the same
optimum. REINFORCE (`baseline="none"`) is correct on the policy's own samples only.

Reference: Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740; compared with in Flet-Berliac et
al. 2024, https://arxiv.org/abs/2406.19185.

| paper | here |
|---|---|
| pi_theta, pi_ref | `params` through `apply_fn`; `ref_logps` |
| R, beta | `rewards`, `beta` |
| k | K, axis 1 of the batch |

Deviations: the paper's loss is a mean over the K samples; here it is their sum (as in CoPG), which
differs by the factor K.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sharding
from alignment import copg, sequences
from sharding import checks

Metrics = dict[str, jax.Array]
Batch = copg.Batch
BASELINES = ("leave_one_out", "none")


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["beta"],
  meta_fields=["baseline", "num_microbatches"],
)
@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters of RLOO.

  Attributes:
    beta: positive, in units of the reward per nat; larger keeps the policy closer to the
      reference.
    baseline: "leave_one_out", or "none" for REINFORCE.
    num_microbatches: parts into which the prompts of a batch are split to save memory, a divisor
      of B. The result is the same.
  """

  beta: Any = 0.05
  baseline: str = "leave_one_out"
  num_microbatches: int = 1

  def __post_init__(self):
    checks.positive("beta", self.beta)
    checks.choice("baseline", self.baseline, BASELINES)
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
def rloo_loss(
  logps: jax.Array,
  ref_logps: jax.Array,
  rewards: jax.Array,
  *,
  beta: Any,
  baseline: str = "leave_one_out",
) -> jax.Array:
  """Returns a loss of each prompt whose gradient is minus the policy gradient.

  Args:
    logps: `[B, K]` log pi(y|x) of samples of pi, nats, summed over completion tokens.
    ref_logps: `[B, K]` log ref(y|x), summed.
    rewards: `[B, K]`.
    beta: positive; larger keeps the policy closer to the reference.
    baseline: "leave_one_out" (K >= 2) or "none".

  Returns:
    `[B]` losses, summed over the samples and not averaged over prompts; their value means nothing.
    Gradients reach `logps` only; the weights carry none.

  Raises:
    ValueError: if the shapes differ or are not `[B, K]` with enough samples, `baseline` is unknown,
      or `beta` is not positive.

  Example:
    >>> loss = lambda logps: rloo_loss(
    ...   logps, jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]]), beta=0.5).sum()
    >>> jax.grad(loss)(jnp.zeros((1, 2)))
    Array([[-1.,  1.]], dtype=float32)

  Reference: Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740, section 3.
  """
  checks.positive("beta", beta)
  checks.choice("baseline", baseline, BASELINES)
  checks.finite("rewards", rewards)
  shape = checks.same_shape(logps=logps, ref_logps=ref_logps, rewards=rewards)
  least = 2 if baseline == "leave_one_out" else 1
  if len(shape) != 2 or shape[1] < least:
    raise ValueError(
      f"logps, ref_logps and rewards must have shape [B, K] with K >= {least} samples of each "
      f"prompt, got {list(shape)}"
    )
  regularised = jnp.asarray(rewards) - beta * (jnp.asarray(logps) - ref_logps)
  if baseline == "leave_one_out":
    # R_i - mean of the others = K / (K - 1) times (R_i - mean of all).
    num_samples = shape[1]
    centred = regularised - jnp.mean(regularised, axis=1, keepdims=True)
    advantages = num_samples / (num_samples - 1) * centred
  else:
    advantages = regularised
  return -jnp.sum(sequences.cut_off(jax.lax.stop_gradient(advantages) * logps), axis=1)


def init(params: Any, *, optimizer: optax.GradientTransformation, config: Config) -> State:
  """Returns the first state.

  Args:
    params: parameters of the policy. Start at the reference, where all log-ratios are zero.
  """
  del config
  return State(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def sample(
  state: State, prompts: sequences.Prompts, key: Any, *, sample_fn: sequences.SampleFn
) -> sequences.Sequences:
  """Returns completions drawn from the policy, for a reward to score.

  Args:
    state: the state that the samples will update.
    prompts: B prompts.
    key: typed PRNG key.
    sample_fn: `sample_fn(params, prompt_tokens, prompt_mask, key)` draws K completions of each
      prompt, see `sequences.SampleFn`.

  Returns:
    `Sequences` of B K rows and B prompts; reshape them to `[B, K, T]` for `Batch`.

  Raises:
    ValueError: if the samples do not fit the prompts.
  """
  return sequences.sample(state.params, prompts, key, sample_fn=sample_fn)


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
    params: parameters of the policy, which must have drawn the batch.
    batch: K scored samples of the policy for each of B prompts.
    apply_fn: `apply_fn(params, Sequences) -> [B K, T]`, log-probability of each completion token,
      for B K completions of B prompts.
  """
  del state, key
  flat = sequences.flatten_samples(batch.tokens, batch.mask, batch.prompt_tokens, batch.prompt_mask)
  shape = checks.same_shape(ref_logps=batch.ref_logps, rewards=batch.rewards)
  checks.shape("ref_logps", batch.ref_logps, jnp.shape(batch.tokens)[:2], "[B, K]")
  token_logps = apply_fn(params, flat)
  checks.shape("apply_fn(params, sequences)", token_logps, jnp.shape(flat.tokens), "[B K, T]")
  logps = sequences.sequence_logps(token_logps, flat.mask, reduction="sum").reshape(shape)
  losses = rloo_loss(
    logps, batch.ref_logps, batch.rewards, beta=config.beta, baseline=config.baseline
  )
  value = jnp.mean(losses)
  log_ratios = logps - batch.ref_logps
  metrics = {
    "loss": value,
    "rloo/reward": jnp.mean(batch.rewards),
    "rloo/kl": jnp.mean(log_ratios),
    "rloo/regularised_reward": jnp.mean(batch.rewards - config.beta * log_ratios),
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
    batch: K scored samples of `state.params` for each of B prompts.

  Returns:
    The new state, and the metrics `loss` (its value means nothing), `grad_norm`, and the means
    over all samples of `rloo/reward`, `rloo/kl` (log-ratio, which estimates the KL) and
    `rloo/regularised_reward` (which estimates the objective).
  """
  return sharding.gradient_step(
    loss, state, batch, key, apply_fn=apply_fn, optimizer=optimizer, config=config
  )
