"""DRO: Direct Reward Optimisation, from one scored completion of each prompt.

Problem: triples (prompt, completion, reward), one completion of each prompt, drawn from any policy.
We want the policy that maximises E_pi[r] - tau KL(pi || ref). At the optimum
r(x, y) = V(x) + tau log-ratio(x, y) for every completion, where V(x) = tau log E_ref[exp(r / tau)].
DRO fits this equation by least squares, with a policy and a value that are separate networks. The
solution for V is unique because probabilities sum to one:

  1/2 mean of (r - V(x) - tau log-ratio)^2.

DRO-V is the practical form: two networks, and the policy's gradient divided by tau. DRO-P has no
value network. It compares the completions of a prompt (`dro_p_loss`), which is exact; with one
completion of each prompt it compares those of a batch, which is biased if V differs between
prompts.

Reference: Richemond et al. 2024, https://arxiv.org/abs/2405.19107.

| paper | here |
|---|---|
| pi_theta, pi_ref | `params.policy` through `apply_fn`; `ref_logps` |
| V_phi(x) | `params.value` through `apply_fn`, one number for each prompt |
| r, tau | `rewards`, `tau` |
| log pi / pi_ref | `log_ratios` |

Deviations: the listing of DRO-V prints 1/2 before the squared log-ratio; the gradient of the
objective divided by tau has tau / 2, which is used here (equal at the paper's tau = 1). DRO-P's
printed gradient drops the centring; here it is the derivative of the printed objective.

The value is no baseline: another V moves the optimum. Rewards must not be normalised within a
batch; standardise them once over the data set. The rescaling by 1 / tau has no effect if each
network has its own Adam (`make_optimizer`), and a large effect under SGD or clipping of the joint
gradient.
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
# apply_fn(params, Sequences) -> (log-probability of each token [B, T], value of each prompt [B]).
ApplyFn = Callable[[Any, sequences.Sequences], tuple[jax.Array, jax.Array]]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["tau"],
  meta_fields=["rescale", "num_microbatches"],
)
@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters of DRO.

  Attributes:
    tau: positive, in units of the reward per nat; larger keeps the policy closer to the reference.
    rescale: divide the policy's gradient by tau (DRO-V); False is the plain joint objective.
    num_microbatches: parts into which a batch is split to save memory, a divisor of B. The result
      is the same.
  """

  tau: Any = 1.0
  rescale: bool = True
  num_microbatches: int = 1

  def __post_init__(self):
    checks.positive("tau", self.tau)
    checks.choice("rescale", self.rescale, (True, False))
    checks.count("num_microbatches", self.num_microbatches)


class Params(NamedTuple):
  """Parameters of the two networks, which share none: the paper found that sharing hurts."""

  policy: Any
  value: Any


class Batch(NamedTuple):
  """One scored completion of each of B prompts.

  Attributes:
    tokens: `[B, T]` int, completion tokens, right-padded, without the prompt.
    mask: `[B, T]` 1 on completion tokens including EOS.
    ref_logps: `[B]` log ref(y|x), nats, **summed** over completion tokens.
    rewards: `[B]`, standardised over the data set.
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
    params: `Params(policy, value)`, as `apply_fn` takes them.
    opt_state: state of the optimiser.
    step: scalar int32, number of updates done.
  """

  params: Any
  opt_state: Any
  step: jax.Array


@checks.array_arguments
def dro_loss(
  log_ratios: jax.Array, rewards: jax.Array, values: jax.Array, *, tau: Any
) -> jax.Array:
  """Returns the joint loss of each completion, (r - V - tau log-ratio)^2 / 2.

  Args:
    log_ratios: `[B]` log pi(y|x) - log ref(y|x), nats, summed over completion tokens.
    rewards: `[B]`.
    values: `[B]` V(x).
    tau: positive; larger keeps the policy closer to the reference.

  Returns:
    `[B]` non-negative losses, not averaged; gradients reach all inputs.

  Raises:
    ValueError: if the shapes differ or `tau` is not positive.

  Example:
    >>> dro_loss(jnp.array([0.0, 1.0]), jnp.array([2.0, 1.0]), jnp.zeros(2), tau=1.0)
    Array([2., 0.], dtype=float32)

  Reference: Richemond et al. 2024, https://arxiv.org/abs/2405.19107, theorem 1.
  """
  checks.positive("tau", tau)
  checks.finite("rewards", rewards)
  checks.same_shape(log_ratios=log_ratios, rewards=rewards, values=values)
  residuals = jnp.asarray(rewards) - values - tau * jnp.asarray(log_ratios)
  return residuals**2 / 2


@checks.array_arguments
def dro_v_losses(
  log_ratios: jax.Array,
  rewards: jax.Array,
  values: jax.Array,
  *,
  tau: Any,
  rescale: bool = True,
) -> tuple[jax.Array, jax.Array]:
  """Returns DRO-V's losses of the policy and of the value; each has no gradient in the other.

  Their sum has the gradients of `dro_loss`, the policy's divided by tau if `rescale`.

  Args:
    log_ratios: `[B]` log pi(y|x) - log ref(y|x), nats, summed over completion tokens.
    rewards: `[B]`.
    values: `[B]` V(x).
    tau: positive.
    rescale: divide the policy's loss by tau.

  Returns:
    `[B]` losses of the policy, whose value means nothing, and `[B]` of the value: half the squared
    residual.

  Raises:
    ValueError: if the shapes differ or `tau` is not positive.

  Example:
    >>> policy, value = dro_v_losses(jnp.ones(1), jnp.ones(1), jnp.zeros(1), tau=2.0)
    >>> policy, value
    (Array([0.], dtype=float32), Array([0.5], dtype=float32))
  """
  checks.positive("tau", tau)
  checks.finite("rewards", rewards)
  checks.same_shape(log_ratios=log_ratios, rewards=rewards, values=values)
  log_ratios, values = jnp.asarray(log_ratios), jnp.asarray(values)
  advantages = jax.lax.stop_gradient(rewards - values)
  policy_losses = sequences.cut_off(log_ratios * (tau / 2 * log_ratios - advantages))
  if not rescale:
    policy_losses = tau * policy_losses
  return policy_losses, dro_loss(jax.lax.stop_gradient(log_ratios), rewards, values, tau=tau)


@checks.array_arguments
def dro_p_loss(log_ratios: jax.Array, rewards: jax.Array, *, tau: Any) -> jax.Array:
  """Returns the policy-only loss of each group: half the variance of r - tau log-ratio.

  For K completions of one prompt its expectation is the loss with the best value, so the optimum is
  exact. (For K = 2 it is a quarter of the squared difference; with labels in place of differences
  of rewards it is IPO.) A group of completions of different prompts, `[1, B]`, gives all of them
  one value, which is biased unless their optimal values are equal.

  Args:
    log_ratios: `[G, K]` log pi(y|x) - log ref(y|x), nats, summed over completion tokens.
    rewards: `[G, K]`, K >= 2.
    tau: positive.

  Returns:
    `[G]` non-negative losses, not averaged; the variance is the unbiased one, over K - 1.

  Raises:
    ValueError: if the shapes differ or are not `[G, K]` with K >= 2, or `tau` is not
      positive.

  Example:
    >>> dro_p_loss(jnp.array([[1.0, 0.0]]), jnp.array([[3.0, 0.0]]), tau=1.0)
    Array([1.], dtype=float32)
  """
  checks.positive("tau", tau)
  checks.finite("rewards", rewards)
  shape = checks.same_shape(log_ratios=log_ratios, rewards=rewards)
  if len(shape) != 2 or shape[1] < 2:
    raise ValueError(
      f"log_ratios and rewards must have shape [G, K] with K >= 2 completions in each group, got "
      f"{list(shape)}"
    )
  regularised = jnp.asarray(rewards) - tau * jnp.asarray(log_ratios)
  return jnp.var(regularised, axis=1, ddof=1) / 2


def make_optimizer(
  policy: optax.GradientTransformation, value: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Returns a transformation with separate optimisers, clipping included, for policy and value."""
  return optax.partition({"policy": policy, "value": value}, Params(policy="policy", value="value"))


def init(params: Params, *, optimizer: optax.GradientTransformation, config: Config) -> State:
  """Returns the first state.

  Args:
    params: `Params(policy, value)`. Start the policy at the reference, where log-ratios are zero.
    optimizer: the one that `update` gets; see `make_optimizer`.
  """
  del config
  return State(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def loss(
  params: Params,
  state: State,
  batch: Batch,
  key: Any,
  *,
  apply_fn: ApplyFn,
  config: Config,
) -> tuple[jax.Array, tuple[Metrics, Any]]:
  """Returns the mean loss of policy and value together, and `(metrics, ())`.

  Args:
    batch: one scored completion of each of B prompts.
    apply_fn: `apply_fn(params, Sequences) -> ([B, T], [B])`, the policy's log-probability of each
      completion token and the value of each prompt.
  """
  del state, key
  shape = checks.same_shape(ref_logps=batch.ref_logps, rewards=batch.rewards)
  checks.shape("ref_logps", batch.ref_logps, jnp.shape(batch.tokens)[:1], "[B]")
  rows = sequences.Sequences(batch.tokens, batch.mask, batch.prompt_tokens, batch.prompt_mask)
  logps, values = apply_fn(params, rows)
  checks.shape("apply_fn(params, sequences)[0]", logps, jnp.shape(batch.tokens), "[B, T]")
  checks.shape("apply_fn(params, sequences)[1]", values, shape, "[B]")
  log_ratios = sequences.log_ratios(logps, batch.mask, batch.ref_logps, reduction="sum")
  policy_losses, value_losses = dro_v_losses(
    log_ratios, batch.rewards, values, tau=config.tau, rescale=config.rescale
  )
  value = jnp.mean(policy_losses) + jnp.mean(value_losses)
  metrics = {
    "loss": value,
    "dro/squared_residual": 2 * jnp.mean(value_losses),
    "dro/value": jnp.mean(values),
    "dro/reward": jnp.mean(batch.rewards),
    "dro/log_ratio": jnp.mean(log_ratios),
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
    batch: one scored completion of each of B prompts.

  Returns:
    The new state, and the metrics `loss` (its value means nothing), `grad_norm`,
    `dro/squared_residual` (zero at the optimum: watch this one), and the means over the data of
    `dro/value`, `dro/reward` and `dro/log_ratio`.
  """
  return sharding.gradient_step(
    loss, state, batch, key, apply_fn=apply_fn, optimizer=optimizer, config=config
  )
