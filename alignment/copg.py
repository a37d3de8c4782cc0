"""CoPG: Contrastive Policy Gradient, a policy gradient that is right on off-policy data.

Problem: K completions of each prompt, drawn from anywhere, each with a reward R. Wanted is the
policy that maximises E_pi[R] - beta KL(pi || ref); its optimum is ref * exp(R / beta), normalised.
At the optimum the regularised reward R - beta log-ratio is the same for all completions of a
prompt. CoPG regresses its differences to zero:

  sum over i < j of (R_i - R_j - beta (log-ratio_i - log-ratio_j))^2 / (2 beta (K - 1)).

Nothing has to be known of the policies that drew the data, samples need no ranking, ties count. On
samples of the policy itself the gradient is minus the leave-one-out policy gradient; with rewards
1/4 and -1/4 for a winner and a loser it is the gradient of IPO up to scale.

Reference: Flet-Berliac et al. 2024, https://arxiv.org/abs/2406.19185 (EMNLP 2024).

| paper | here |
|---|---|
| pi, pi_ref | `params` through `apply_fn`; `ref_logps` |
| R, beta | `rewards`, `beta` |
| log pi / pi_ref | `log_ratios` |
| R_beta = R - beta log pi / pi_ref | the regularised reward |
| y ~ mu1, y' ~ mu2 | any two samples of a prompt; K = 2 is the paper |

Deviations: minimises the squared form; the paper maximises a function that differs from minus it by
a constant. K samples instead of two (K = 2 gives the paper's loss). No stop-gradient anywhere:
with one inside the regularised reward the method would solve the problem of beta / 2.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sharding
from alignment import checks, sequences

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
    num_microbatches: parts into which a batch is split (along prompts) to save memory; same
      result.
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
    ValueError: if the shapes differ or are not `[B, K]` with K >= 2, or a concrete `beta` is not
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
      f"log_ratios and rewards must have shape [B, K] with K >= 2 samples a prompt, got "
      f"{list(shape)}: CoPG contrasts completions of the same prompt"
    )
  num_samples = shape[1]
  regularised = jnp.asarray(rewards) - beta * jnp.asarray(log_ratios)
  # Sum over pairs of squared differences = K times the sum of squared deviations from the mean.
  deviations = regularised - jnp.mean(regularised, axis=1, keepdims=True)
  return num_samples * jnp.sum(deviations**2, axis=1) / (2 * beta * (num_samples - 1))


def init(params: Any, *, optimizer: optax.GradientTransformation, config: Config) -> State:
  """Returns the first state; `params` should be the reference's (log-ratios start at zero).

  Args:
    params: parameters of the policy; kept in the state, not copied.
    optimizer: the one that `update` will get.
    config: unused; every algorithm's `init` takes it.
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
  """Returns the mean CoPG loss of a batch.

  Args:
    params: parameters of the policy, the only input to differentiate.
    state: unused; every algorithm's `loss` takes it.
    batch: K scored completions of each of B prompts.
    key: unused: nothing is random.
    apply_fn: `apply_fn(params, Sequences) -> [B, T]`, log-probability of each completion token;
      it sees B K completions of B prompts.
    config: hyper-parameters.

  Returns:
    The scalar loss, and `(metrics, ())`.

  Raises:
    ValueError: if the shapes of the batch do not fit.
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
    state: not donated.
    batch: K scored completions of each of B prompts; `config.num_microbatches` must divide B.
    key: unused: nothing is random.
    apply_fn: `apply_fn(params, Sequences) -> [B, T]`, log-probability of each completion token.
    optimizer: any optax transformation; build it once, a rebuilt one compiles again.
    config: hyper-parameters; a new `beta` does not compile again.

  Returns:
    The new state; metrics `loss`, `grad_norm`, `copg/margin` (log-ratio of the best minus that of
    the worst sample of a prompt), and the means over the data of `copg/log_ratio`, `copg/reward`
    and `copg/regularised_reward`.

  Raises:
    ValueError: if the shapes of the batch do not fit.
  """
  grad_fn = sharding.accumulate_grads(loss, config.num_microbatches)
  (_, (metrics, _)), grads = grad_fn(
    state.params, state, batch, key, apply_fn=apply_fn, config=config
  )
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics["grad_norm"] = optax.global_norm(grads)
  return State(params, opt_state, state.step + 1), metrics
