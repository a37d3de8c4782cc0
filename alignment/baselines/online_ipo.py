"""Online IPO and IPO-MD: the regression of IPO on fresh pairs of the policy's own samples.

Problem: find the Nash equilibrium of the regularised game of a preference P(y beats y' | x),
possibly cyclic, as in `alignment.nash_md`. Both completions come from the policy, a judge gives P,
and IPO's margin is regressed onto it:

  (h - (2 P(y beats y') - 1) / (2 tau))^2,   h = log-ratio(y) - log-ratio(y').

The samples carry no gradient. The expected gradient is 4 / tau times that of self-play, so training
stops at the equilibrium (`preference_games.regularised_nash`). `ipo` on a fixed data set stops
elsewhere.

In IPO-MD both completions come from the mixture pi^(1 - beta) ref^beta
(`nash_md.geometric_mixture_logits`), and training stops at the fixed point of Nash-MD-PG with that
beta (`preference_games.nash_md_pg_fixed_point`). The loss is the same; only the samples differ.

Reference: Calandriello et al. 2024, https://arxiv.org/abs/2403.08635 (ICML 2024).

| paper | here |
|---|---|
| pi_theta, pi_ref | `params` through `apply_fn`; `*_ref_logps` |
| p(y > y') | `preferences` |
| tau | `tau` |
| y, y' | `first`, `second` |

Deviations: the loss is not multiplied by a power of tau, as in `ipo`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sharding
from alignment import ipo, sequences
from sharding import checks

Metrics = dict[str, jax.Array]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["tau"],
  meta_fields=["num_microbatches"],
)
@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters of online IPO.

  Attributes:
    tau: positive, in units of the preference per nat; larger keeps the policy closer to the
      reference.
    num_microbatches: parts into which a batch is split to save memory, a divisor of B. The result
      is the same.
  """

  tau: Any = 1.0
  num_microbatches: int = 1

  def __post_init__(self):
    checks.positive("tau", self.tau)
    checks.count("num_microbatches", self.num_microbatches)


class Batch(NamedTuple):
  """Two completions of each prompt, both drawn from the current policy (or from the mixture).

  Attributes:
    first_tokens: `[B, T]` int, y, without the prompt.
    first_mask: `[B, T]` 1 on completion tokens including EOS.
    first_ref_logps: `[B]` log ref(y|x), nats, summed over completion tokens.
    second_tokens: `[B, T]` y'.
    second_mask: `[B, T]`.
    second_ref_logps: `[B]`.
    preferences: `[B]` P(y beats y'), or a sampled label 0 or 1.
    prompt_tokens: `[B, P]` int, left-padded, or None.
    prompt_mask: `[B, P]` or None.
  """

  first_tokens: Any
  first_mask: Any
  first_ref_logps: Any
  second_tokens: Any
  second_mask: Any
  second_ref_logps: Any
  preferences: Any
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
def online_ipo_loss(
  first_log_ratios: jax.Array,
  second_log_ratios: jax.Array,
  preferences: jax.Array,
  *,
  tau: Any,
) -> jax.Array:
  """Returns (h - (2 P - 1) / (2 tau))^2 of each pair, h the difference of the log-ratios.

  Args:
    first_log_ratios: `[B]` log pi(y|x) - log ref(y|x), nats, summed over completion tokens.
    second_log_ratios: `[B]` the same for y'.
    preferences: `[B]` P(y beats y').
    tau: positive; larger keeps the policy closer to the reference.

  Returns:
    `[B]` non-negative losses, not averaged; gradients reach both log-ratios.

  Raises:
    ValueError: if the shapes differ, or `tau` or `preferences` is out of range.

  Example:
    >>> online_ipo_loss(jnp.zeros(2), jnp.zeros(2), jnp.array([1.0, 0.5]), tau=0.1)
    Array([25.,  0.], dtype=float32)

  Reference: Calandriello et al. 2024, https://arxiv.org/abs/2403.08635, section 4.
  """
  checks.probabilities("preferences", preferences)
  checks.same_shape(
    first_log_ratios=first_log_ratios,
    second_log_ratios=second_log_ratios,
    preferences=preferences,
  )
  return ipo.ipo_loss(first_log_ratios, second_log_ratios, tau=tau, chosen_probs=preferences)


def init(params: Any, *, optimizer: optax.GradientTransformation, config: Config) -> State:
  """Returns the first state.

  Args:
    params: parameters of the policy. Start at the reference, where all log-ratios are zero.
  """
  del config
  return State(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def sample(
  state: State, prompts: sequences.Prompts, key: Any, *, sample_fn: sequences.SampleFn
) -> tuple[sequences.Sequences, sequences.Sequences]:
  """Returns two completions of each prompt, y and y', for a judge to compare.

  Args:
    state: the state that the samples will update.
    prompts: N prompts.
    key: typed PRNG key.
    sample_fn: `sample_fn(params, prompt_tokens, prompt_mask, key)` draws two completions of each
      prompt, see `sequences.SampleFn`; for IPO-MD from the mixture.

  Returns:
    Two `Sequences` of N rows and N prompts.

  Raises:
    ValueError: if `sample_fn` does not draw two completions of each prompt.
  """
  both = sequences.sample(state.params, prompts, key, sample_fn=sample_fn)
  if (count := sequences.rows_per_prompt(both)) != 2:
    raise ValueError(
      f"sample_fn drew {count} completions of each prompt: a pair needs 2, so set num_samples=2"
    )
  first, second = (both._replace(tokens=both.tokens[i::2], mask=both.mask[i::2]) for i in (0, 1))
  return first, second


def loss(
  params: Any,
  state: State,
  batch: Batch,
  key: Any,
  *,
  apply_fn: sequences.ApplyFn,
  config: Config,
) -> tuple[jax.Array, tuple[Metrics, Any]]:
  """Returns the mean online IPO loss, and `(metrics, ())`.

  Args:
    batch: B judged pairs.
    apply_fn: `apply_fn(params, Sequences) -> [2 B, T]`, log-probability of each completion token.
  """
  del state, key
  batch_size = sequences.check_rows(batch, "first", "second")
  for name in ("first_ref_logps", "second_ref_logps"):
    checks.shape(name, getattr(batch, name), (batch_size,), "[B]")
  pairs = sequences.PreferenceBatch(*batch)  # the same fields; `chosen` is the first one
  first, second = sequences.pair_log_ratios(params, pairs, apply_fn=apply_fn, reduction="sum")
  value = jnp.mean(online_ipo_loss(first, second, batch.preferences, tau=config.tau))
  metrics = {
    "loss": value,
    "online_ipo/decidedness": jnp.mean(jnp.abs(2 * jnp.asarray(batch.preferences) - 1)),
    "online_ipo/margin": jnp.mean(jnp.abs(first - second)),
    "online_ipo/kl": jnp.mean((first + second) / 2),
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
    batch: B judged pairs, drawn from `state.params` (IPO-MD: from the mixture).

  Returns:
    The new state, and the metrics `loss`, `grad_norm`, `online_ipo/decidedness` (mean of
    |2 P - 1|), `online_ipo/margin` (mean of |h|) and `online_ipo/kl` (mean log-ratio of all
    samples, which estimates the KL if the policy drew them).
  """
  return sharding.gradient_step(
    loss, state, batch, key, apply_fn=apply_fn, optimizer=optimizer, config=config
  )
