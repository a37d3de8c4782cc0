"""Psi-PO and its identity case IPO: learning from preferences without a reward model.

Problem: completions y, y' of a prompt x are drawn from a behaviour policy mu, and a judge says
which one wins. Psi-PO looks for the policy pi that maximises

  E_{y ~ pi, y' ~ mu}[Psi(P(y beats y'))] - tau KL(pi || ref),   optimum  pi* ~ ref exp(g / tau),

with g(y) = E_{y' ~ mu}[Psi(P(y beats y'))] (`psi_po_target`). Psi = logit gives the optimum of RLHF
and DPO. The logit is unbounded, so a preference of 0 or 1 overrules the regulariser at every tau.
The identity is bounded, and a regression on labelled pairs reaches its optimum. That is IPO:

  mean of (h - (2 q - 1) / (2 tau))^2,   h = log-ratio(chosen) - log-ratio(rejected).

Reference: Azar et al. 2023, https://arxiv.org/abs/2310.12036 (AISTATS 2024).

| paper | here |
|---|---|
| pi, pi_ref, mu | `params` through `apply_fn`; `*_ref_logps`; the data (`behaviour_probs`) |
| tau | `tau` ("beta" in several libraries; the target is 1 / (2 tau), not 1 / tau) |
| h_pi(y_w, y_l) | the margin `chosen_log_ratios - rejected_log_ratios` |
| p*(y > y') | `preferences[i, j]`, `chosen_probs` (q above: soft labels) |
| Psi | `psi`; `identity` or `logit` |

Deviations: soft labels q, where the paper has hard ones (q = 1). `reduction="mean"` divides each
log-ratio by its number of completion tokens, as several libraries do and call IPO. The margin is
then in nats per token, and the optimum is a different one.
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
Batch = sequences.PreferenceBatch


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["tau"],
  meta_fields=["reduction", "num_microbatches"],
)
@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters of IPO.

  Attributes:
    tau: positive; larger keeps the policy closer to the reference. The loss grows like 1 / tau^2.
    reduction: "sum" (the paper's: log-probabilities of sequences) or "mean" (per token).
    num_microbatches: parts into which a batch is split to save memory, a divisor of B. The result
      is the same.
  """

  tau: Any = 0.1
  reduction: str = "sum"
  num_microbatches: int = 1

  def __post_init__(self):
    checks.positive("tau", self.tau)
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


def identity(probs: jax.Array) -> jax.Array:
  """Returns the preference itself: the Psi of IPO."""
  return probs


def logit(probs: jax.Array) -> jax.Array:
  """Returns log(p / (1 - p)): the Psi of RLHF and DPO; infinite at 0 and 1."""
  return jnp.log(probs) - jnp.log1p(-probs)


@checks.array_arguments
def psi_po_target(
  preferences: jax.Array,
  behaviour_probs: jax.Array,
  *,
  psi: Callable[[jax.Array], jax.Array],
) -> jax.Array:
  """Returns g(y) = E_{y' ~ mu}[Psi(P(y beats y'))], the score that Psi-PO regularises.

  The Psi-PO optimum is ref * exp(g / tau), normalised; g is not divided by tau here.

  Args:
    preferences: `[..., A, A]`, entry i, j is P(i beats j) in [0, 1], 1/2 on the diagonal.
    behaviour_probs: `[..., A]` mu, which draws the opponent. Actions of probability 0 contribute
      nothing, and have no gradient where Psi is infinite.
    psi: non-decreasing function on [0, 1], applied elementwise: `identity`, `logit` or another.

  Returns:
    `[..., A]` scores.

  Raises:
    ValueError: if the shapes do not fit, or values are not probabilities.

  Example:
    >>> preferences = jnp.array([[0.5, 1.0], [0.0, 0.5]])
    >>> psi_po_target(preferences, jnp.array([0.5, 0.5]), psi=identity)
    Array([0.75, 0.25], dtype=float32)

  Reference: Azar et al. 2023, https://arxiv.org/abs/2310.12036, section 4.
  """
  checks.preference_matrix(preferences, behaviour_probs=behaviour_probs)
  checks.distribution("behaviour_probs", behaviour_probs)
  if not callable(psi):
    raise ValueError(f"psi must be a function, such as ipo.identity or ipo.logit, got {psi!r}")
  opponents, preferences = jnp.asarray(behaviour_probs)[..., None, :], jnp.asarray(preferences)
  # Left out before and after Psi: the gradient of 0 * Psi would be 0 * inf = NaN.
  absent = (opponents == 0) & ~jnp.isfinite(psi(preferences))
  utilities = jnp.where(absent, 0, psi(jnp.where(absent, 0.5, preferences)))
  return jnp.sum(_times(jnp.broadcast_to(opponents, utilities.shape), utilities), axis=-1)


@jax.custom_vjp
def _times(first: jax.Array, second: jax.Array) -> jax.Array:
  """The product of two arrays of one shape in which 0 * inf is 0, in the gradient too."""
  return jnp.where((first == 0) | (second == 0), 0, first * second)


_times.defvjp(
  lambda first, second: (_times(first, second), (first, second)),
  lambda factors, cotangent: (_times(cotangent, factors[1]), _times(cotangent, factors[0])),
)


@checks.array_arguments
def ipo_loss(
  chosen_log_ratios: jax.Array,
  rejected_log_ratios: jax.Array,
  *,
  tau: Any,
  chosen_probs: Any = 1.0,
) -> jax.Array:
  """Returns the IPO loss of each preference pair.

  loss = (h - (2 q - 1) / (2 tau))^2, with the margin h = log-ratio(chosen) - log-ratio(rejected).
  The margin has a finite target. (A Bradley-Terry loss increases it for ever if one completion
  always wins.)

  Args:
    chosen_log_ratios: `[B]` log pi(y_w|x) - log ref(y_w|x), nats, summed over completion tokens.
    rejected_log_ratios: `[B]` the same for y_l.
    tau: positive; larger keeps the policy closer to the reference.
    chosen_probs: `[B]` or scalar q = P(y_w beats y_l), 1 for hard labels.

  Returns:
    `[B]` non-negative losses, not averaged; gradients reach both inputs.

  Raises:
    ValueError: if the shapes differ, or `tau` is not positive, or
      `chosen_probs` lie outside [0, 1].

  Example:
    >>> ipo_loss(jnp.array([5.0, 0.0]), jnp.zeros(2), tau=0.1)
    Array([ 0., 25.], dtype=float32)

  Reference: Azar et al. 2023, https://arxiv.org/abs/2310.12036, eq. 17.
  """
  checks.positive("tau", tau)
  checks.probabilities("chosen_probs", chosen_probs)
  shape = checks.same_shape(
    chosen_log_ratios=chosen_log_ratios, rejected_log_ratios=rejected_log_ratios
  )
  if jnp.ndim(chosen_probs):
    checks.shape("chosen_probs", chosen_probs, shape, "[B]")
  margins = jnp.asarray(chosen_log_ratios) - jnp.asarray(rejected_log_ratios)
  return (margins - (2 * chosen_probs - 1) / (2 * tau)) ** 2


@checks.array_arguments
def psi_po_loss(
  first_log_ratios: jax.Array,
  second_log_ratios: jax.Array,
  first_targets: jax.Array,
  second_targets: jax.Array,
  *,
  tau: Any,
) -> jax.Array:
  """Returns the Psi-PO loss of pairs y, y' ~ mu whose scores g are known (`psi_po_target`).

  loss = (h - (g(y) - g(y')) / tau)^2, the root-finding form, for any Psi. If Psi is the identity
  and both completions come from mu, its mean differs by a constant from those of `ipo_label_loss`
  and `ipo_loss`, which need no g.

  Args:
    first_log_ratios: `[B]` log pi(y|x) - log ref(y|x), nats, summed over completion tokens.
    second_log_ratios: `[B]` the same for y'.
    first_targets: `[B]` g(y).
    second_targets: `[B]` g(y').
    tau: positive; larger keeps the policy closer to the reference.

  Returns:
    `[B]` non-negative losses, not averaged; gradients reach the log-ratios.

  Raises:
    ValueError: if the shapes differ, or `tau` is not positive.

  Example:
    >>> psi_po_loss(jnp.ones(1), jnp.zeros(1), jnp.array([0.75]), jnp.array([0.25]), tau=0.25)
    Array([1.], dtype=float32)

  Reference: Azar et al. 2023, https://arxiv.org/abs/2310.12036, eq. 13.
  """
  checks.positive("tau", tau)
  checks.same_shape(
    first_log_ratios=first_log_ratios,
    second_log_ratios=second_log_ratios,
    first_targets=first_targets,
    second_targets=second_targets,
  )
  margins = jnp.asarray(first_log_ratios) - jnp.asarray(second_log_ratios)
  return (margins - (jnp.asarray(first_targets) - jnp.asarray(second_targets)) / tau) ** 2


@checks.array_arguments
def ipo_label_loss(
  first_log_ratios: jax.Array, second_log_ratios: jax.Array, labels: jax.Array, *, tau: Any
) -> jax.Array:
  """Returns (h - I / tau)^2 of pairs in random order, I = 1 where the first one wins, else 0.

  It is unbiased for IPO only if y and y' come from the same distribution, in random order.
  `ipo_loss` takes each pair in both orders and has less variance.

  Args:
    first_log_ratios: `[B]` log pi(y|x) - log ref(y|x), nats, summed over completion tokens.
    second_log_ratios: `[B]` the same for y'.
    labels: `[B]` I.
    tau: positive; larger keeps the policy closer to the reference.

  Returns:
    `[B]` non-negative losses, not averaged; gradients reach the log-ratios.

  Raises:
    ValueError: if the shapes differ, or `tau` or `labels` is out of range.

  Example:
    >>> ipo_label_loss(jnp.array([4.0, 4.0]), jnp.zeros(2), jnp.array([1, 0]), tau=0.25)
    Array([ 0., 16.], dtype=float32)

  Reference: Azar et al. 2023, https://arxiv.org/abs/2310.12036, eq. 16.
  """
  checks.positive("tau", tau)
  checks.probabilities("labels", labels)
  checks.same_shape(
    first_log_ratios=first_log_ratios, second_log_ratios=second_log_ratios, labels=labels
  )
  margins = jnp.asarray(first_log_ratios) - jnp.asarray(second_log_ratios)
  return (margins - jnp.asarray(labels) / tau) ** 2


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
  """Returns the mean IPO loss, and `(metrics, ())`.

  Args:
    batch: B labelled pairs.
    apply_fn: `apply_fn(params, Sequences) -> [2 B, T]`, log-probability of each completion token.
  """
  del state, key
  chosen, rejected = sequences.pair_log_ratios(
    params, batch, apply_fn=apply_fn, reduction=config.reduction
  )
  losses = ipo_loss(chosen, rejected, tau=config.tau, chosen_probs=batch.chosen_probs)
  value = jnp.mean(losses)
  metrics = {
    "loss": value,
    "ipo/margin": jnp.mean(chosen - rejected),
    "ipo/accuracy": jnp.mean((chosen > rejected).astype(value.dtype)),
    "ipo/chosen_log_ratio": jnp.mean(chosen),
    "ipo/rejected_log_ratio": jnp.mean(rejected),
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
    The new state, and the metrics `loss`, `grad_norm`, `ipo/margin` (mean h), `ipo/accuracy`
    (share of pairs with h > 0), `ipo/chosen_log_ratio` and `ipo/rejected_log_ratio` (means, nats).
  """
  return sharding.gradient_step(
    loss, state, batch, key, apply_fn=apply_fn, optimizer=optimizer, config=config
  )
