"""KTO: Kahneman-Tversky Optimisation, from completions labelled good or bad.

Problem: completions y of prompts x with one label each, desirable or not; there are no pairs. Each
sample has a value, a sigmoid of its log-ratio r relative to a reference point z. The loss is what
the value lacks to its maximum,

  desirable:   w_D (1 - sigmoid(beta (r - z))),    undesirable:   w_U (1 - sigmoid(beta (z - r))),

where z estimates KL(pi || ref): it is the positive part of the mean log-ratio of completions that
belong to other prompts. All samples of a batch share it, and it carries no gradient.

There is no closed form to compare with: the probability of a completion that is more often good
than bad rises until its sigmoid saturates, and that of the others falls towards zero.

Reference: Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306; compared with in Richemond et
al. 2024, https://arxiv.org/abs/2405.19107 (desirable: a reward above the mean of its batch).

| paper | here |
|---|---|
| pi_theta, pi_ref | `params` through `apply_fn`; `ref_logps` |
| r_theta(x, y) | `log_ratios` |
| z_0 | `kl` |
| lambda_D, lambda_U | `desirable_weight`, `undesirable_weight` |

Deviations: the mismatched completions are part of the batch (`mismatched_*`), so that their
reference log-probabilities can be cached. z couples the examples of a batch, so there are no
micro-batches.
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
  data_fields=["beta", "desirable_weight", "undesirable_weight"],
  meta_fields=["num_microbatches"],
)
@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters of KTO.

  Attributes:
    beta: positive; larger keeps the policy closer to the reference.
    desirable_weight: positive weight of desirable samples. With n_D and n_U of each kind the paper
      advises desirable_weight n_D / (undesirable_weight n_U) in [1, 4/3].
    undesirable_weight: positive weight of the others.
    num_microbatches: must be 1, since the reference point is shared by the batch.
  """

  beta: Any = 0.1
  desirable_weight: Any = 1.0
  undesirable_weight: Any = 1.0
  num_microbatches: int = 1

  def __post_init__(self):
    checks.positive("beta", self.beta)
    checks.positive("desirable_weight", self.desirable_weight)
    checks.positive("undesirable_weight", self.undesirable_weight)
    if self.num_microbatches != 1:
      raise ValueError(
        f"num_microbatches must be 1, got {self.num_microbatches}: KTO's reference point is "
        "estimated from the whole batch; make the batch smaller or use more devices"
      )


class Batch(NamedTuple):
  """Labelled completions, and for each prompt a completion of another prompt.

  Attributes:
    tokens: `[B, T]` int, completion tokens, right-padded, without the prompt.
    mask: `[B, T]` 1 on completion tokens including EOS.
    ref_logps: `[B]` log ref(y|x), nats, summed over completion tokens.
    labels: `[B]` 1 for desirable, 0 for undesirable.
    mismatched_tokens: `[B, T]` a completion of another prompt (those of the data set rolled by
      one, say), perhaps padded to another T.
    mismatched_mask: `[B, T]`.
    mismatched_ref_logps: `[B]` its log-probability under the reference after *this* prompt.
    prompt_tokens: `[B, P]` int, left-padded, or None.
    prompt_mask: `[B, P]` or None.
  """

  tokens: Any
  mask: Any
  ref_logps: Any
  labels: Any
  mismatched_tokens: Any
  mismatched_mask: Any
  mismatched_ref_logps: Any
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
def kto_loss(
  log_ratios: jax.Array,
  labels: jax.Array,
  *,
  beta: Any,
  kl: Any,
  desirable_weight: Any = 1.0,
  undesirable_weight: Any = 1.0,
) -> jax.Array:
  """Returns the KTO loss of each sample.

  Args:
    log_ratios: `[B]` log pi(y|x) - log ref(y|x), nats, summed over completion tokens.
    labels: `[B]` 1 for desirable, 0 for undesirable; values between mix the two losses.
    beta: positive; larger keeps the policy closer to the reference.
    kl: scalar or `[B]`, the reference point, an estimate of KL(pi || ref). No gradient reaches it,
      and negative values count as zero.
    desirable_weight: positive.
    undesirable_weight: positive.

  Returns:
    `[B]` losses between 0 and the weight, not averaged; gradients reach `log_ratios`.

  Raises:
    ValueError: if the shapes differ, or an argument is out of range.

  Example:
    >>> kto_loss(jnp.array([0.0, 500.0]), jnp.array([1, 0]), beta=0.1, kl=0.0)
    Array([0.5, 1. ], dtype=float32)

  Reference: Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, eq. 8.
  """
  checks.positive("beta", beta)
  checks.positive("desirable_weight", desirable_weight)
  checks.positive("undesirable_weight", undesirable_weight)
  checks.probabilities("labels", labels)
  checks.finite("kl", kl)
  shape = checks.same_shape(log_ratios=log_ratios, labels=labels)
  if jnp.ndim(kl):
    checks.shape("kl", kl, shape, "[B]")
  labels = jnp.asarray(labels)
  reference = jnp.maximum(jax.lax.stop_gradient(kl), 0.0)
  logits = beta * (jnp.asarray(log_ratios) - reference)
  # 1 - sigmoid(z) = sigmoid(-z)
  desirable = desirable_weight * jax.nn.sigmoid(-logits)
  undesirable = undesirable_weight * jax.nn.sigmoid(logits)
  return labels * desirable + (1 - labels) * undesirable


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
  """Returns the mean KTO loss, and `(metrics, ())`.

  Args:
    batch: B labelled completions and B mismatched ones.
    apply_fn: `apply_fn(params, Sequences) -> [B, T]`, log-probability of each completion token.
  """
  del state, key
  prompt = (batch.prompt_tokens, batch.prompt_mask)

  def ratios(params, prefix):
    tokens, mask, ref_logps = (
      getattr(batch, f"{prefix}{name}") for name in ("tokens", "mask", "ref_logps")
    )
    checks.same_shape(**{f"{prefix}tokens": tokens, f"{prefix}mask": mask})
    checks.shape(f"{prefix}ref_logps", ref_logps, jnp.shape(tokens)[:1], "[B]")
    logps = apply_fn(params, sequences.Sequences(tokens, mask, *prompt))
    checks.shape("apply_fn(params, sequences)", logps, jnp.shape(tokens), "[B, T]")
    return sequences.log_ratios(logps, mask, ref_logps, reduction="sum")

  # A separate forward pass: without a gradient it needs no backward pass.
  mismatched = ratios(jax.lax.stop_gradient(params), "mismatched_")
  kl = jnp.maximum(jnp.mean(mismatched), 0.0)
  log_ratios = ratios(params, "")
  losses = kto_loss(
    log_ratios,
    batch.labels,
    beta=config.beta,
    kl=kl,
    desirable_weight=config.desirable_weight,
    undesirable_weight=config.undesirable_weight,
  )
  value = jnp.mean(losses)

  def mean_over(kind):
    return jnp.sum(kind * log_ratios) / jnp.maximum(jnp.sum(kind), 1)

  labels = jnp.asarray(batch.labels, log_ratios.dtype)
  metrics = {
    "loss": value,
    "kto/kl": kl,
    "kto/desirable_log_ratio": mean_over(labels),
    "kto/undesirable_log_ratio": mean_over(1 - labels),
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
    batch: B labelled completions and B mismatched ones.

  Returns:
    The new state, and the metrics `loss`, `grad_norm`, `kto/kl` (the reference point),
    `kto/desirable_log_ratio` and `kto/undesirable_log_ratio` (means over the samples of each kind).
  """
  return sharding.gradient_step(
    loss, state, batch, key, apply_fn=apply_fn, optimizer=optimizer, config=config
  )
