"""Online IPO and IPO-MD: the regression of IPO on pairs that the policy itself has just drawn.

Problem: that of `alignment.nash_md`, a preference P(y beats y' | x), possibly cyclic, to be
answered by the Nash equilibrium of the regularised game. Both completions come from the policy, a
judge gives P, and IPO's margin is regressed onto it:

  (h - (2 P(y beats y') - 1) / (2 tau))^2,   h = log-ratio(y) - log-ratio(y').

The samples carry no gradient. The expected gradient is 4 / tau times that of self-play, so it stops
at the equilibrium (`oracles.regularised_nash`), while `ipo` on a fixed data set stops elsewhere.

In IPO-MD both completions come from the mixture pi^(1 - beta) ref^beta (see
`nash_md.geometric_mixture_logits`) and it stops where Nash-MD-PG with that beta does
(`oracles.nash_md_pg_fixed_point`). The loss is the same: only the samples differ.

Reference: Calandriello et al. 2024, https://arxiv.org/abs/2403.08635 (ICML 2024).

| paper | here |
|---|---|
| pi_theta, pi_ref | `params` through `apply_fn`; `*_ref_logps` |
| p(y > y') | `preferences` |
| tau | `tau` |
| y, y' | `first`, `second` |

Deviations: the paper's loss is multiplied by no power of tau here, as in `ipo`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sharding
from alignment import checks, ipo, sequences

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
    num_microbatches: parts into which a batch is split to save memory; same result.
  """

  tau: Any = 1.0
  num_microbatches: int = 1

  def __post_init__(self):
    checks.positive("tau", self.tau)
    checks.count("num_microbatches", self.num_microbatches)


class Batch(NamedTuple):
  """Two completions of each prompt, just drawn from the policy (or both from the mixture).

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
    ValueError: if the shapes differ, or a concrete `tau` or `preferences` is out of range.

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
  """Returns the first state; `params` should be the reference's (log-ratios start at zero).

  Args:
    params: parameters of the policy; kept in the state, not copied.
    optimizer: the one that `update` will get.
    config: unused; every algorithm's `init` takes it.
  """
  del config
  return State(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def sample(
  state: State, prompts: sequences.Prompts, key: Any, *, sample_fn: sequences.SampleFn
) -> tuple[sequences.Sequences, sequences.Sequences]:
  """Returns two completions of each prompt, y and y', to be judged.

  Args:
    state: the state to be updated with what is drawn.
    prompts: N prompts.
    key: typed PRNG key.
    sample_fn: `sample_fn(params, prompt_tokens, prompt_mask, key)` draws two completions of each
      prompt, see `sequences.SampleFn`; for IPO-MD from the mixture.

  Returns:
    Two `Sequences` of N rows and N prompts.

  Raises:
    ValueError: if what is drawn does not fit the prompts, or is not two completions of each.
  """
  both = sequences.sample(state.params, prompts, key, sample_fn=sample_fn)
  if (count := sequences.rows_per_prompt(both)) != 2:
    raise ValueError(
      f"sample_fn drew {count} completions of each prompt: a pair needs 2, give it num_samples=2"
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
  """Returns the mean online IPO loss of a batch.

  Args:
    params: parameters of the policy, the only input to differentiate.
    state: unused; every algorithm's `loss` takes it.
    batch: B judged pairs.
    key: unused: nothing is random once the batch is drawn.
    apply_fn: `apply_fn(params, Sequences) -> [B, T]`, log-probability of each completion token.
    config: hyper-parameters.

  Returns:
    The scalar loss, and `(metrics, ())`.

  Raises:
    ValueError: if the shapes of the batch do not fit.
  """
  del state, key
  batch_size = sequences.check_rows(batch, "first", "second")
  for name in ("first_ref_logps", "second_ref_logps"):
    checks.shape(name, getattr(batch, name), (batch_size,), "[B]")
  pairs = sequences.PreferenceBatch(*batch)  # the same fields, told apart by a label there
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
    state: not donated.
    batch: B pairs drawn from `state.params` (IPO-MD: from the mixture) and judged;
      `config.num_microbatches` must divide B.
    key: unused: nothing is random once the batch is drawn.
    apply_fn: `apply_fn(params, Sequences) -> [B, T]`, log-probability of each completion token.
    optimizer: any optax transformation; build it once, a rebuilt one compiles again.
    config: hyper-parameters; a new `tau` does not compile again.

  Returns:
    The new state; metrics `loss`, `grad_norm`, `online_ipo/decidedness` (mean of |2 P - 1|),
    `online_ipo/margin` (mean of |h|) and `online_ipo/kl` (mean log-ratio of all samples: an
    estimate of the KL where they are the policy's own).

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
