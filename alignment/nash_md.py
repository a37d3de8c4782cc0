"""Nash-MD: Nash learning from preferences by mirror descent, tabular and as a policy gradient.

Problem: a preference P(y beats y' | x), possibly cyclic, which no reward explains. We want the
policy that no other policy beats: the Nash equilibrium of the game in which a policy earns
P(pi beats pi') - tau KL(pi || ref) + tau KL(pi' || ref). It is unique and symmetric.

Tabular: mirror descent against a geometric mixture of policy and reference. The mixture is
pi^mix = pi^(1 - eta tau) ref^(eta tau), normalised; the next policy is
pi^mix exp(eta P(. beats pi^mix)), normalised. With eta_t = 2 / (tau (t + 2)) the *last* policy
converges: KL(pi* || pi_T) <= 8 / (tau^2 (T + 1)). Against the policy itself (`opponent="self"`,
online mirror descent, self-play) the average policy is known to converge. Fictitious play averages
best responses to the average so far (`fictitious_play_step`).

Deep (Nash-MD-PG): y comes from the policy, y' from the mixture pi^(1 - beta) ref^beta of each
token's distributions, and the policy gradient is
grad log pi(y) (P(y beats y') - 1/2 - tau log-ratio(y)). beta = 0 is self-play, beta = 1 the best
response to the reference. For beta > 0 training stops at `preference_games.nash_md_pg_fixed_point`,
near the equilibrium but not at it. In Nash-EMA-PG y' comes from a moving average of the parameters
(`State.ema_params`).

Reference: Munos et al. 2023, https://arxiv.org/abs/2312.00886 (ICML 2024).

| paper | here |
|---|---|
| pi_t, mu | `logps`, `ref_logps` (tables of log-probabilities), `params` through `apply_fn` |
| P(y > y') | `preferences` |
| tau, eta | `tau`, `eta` |
| beta (of the mixture) | `beta`, the weight of the reference |
| beta (of Nash-EMA-PG) | `ema_decay` |

Deviations: none in the tabular form. In the policy gradient's KL term, the weight of a token's
score is the sum of the log-ratios from that token on (the paper allows this: earlier tokens are
known by then). To use the token's own log-ratio alone, as some code does, gives a biased gradient
of the KL of sequences.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sharding
from alignment import sequences
from sharding import averages, checks

Metrics = dict[str, jax.Array]
OPPONENTS = ("mixture", "self")


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["tau", "ema_decay"],
  meta_fields=["num_microbatches"],
)
@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters of Nash-MD-PG.

  Attributes:
    tau: positive, in units of the preference per nat (the paper has 0.008 on TL;DR). It does not
      compare with the beta of a method that uses rewards.
    ema_decay: in [0, 1]; each update moves `ema_params` by a share 1 - ema_decay of the way to
      `params`. 0 keeps them equal to `params`, 1 keeps them where they started.
    num_microbatches: parts into which a batch is split to save memory, a divisor of B. The result
      is the same.
  """

  tau: Any = 0.008
  ema_decay: Any = 0.0
  num_microbatches: int = 1

  def __post_init__(self):
    checks.positive("tau", self.tau)
    checks.probabilities("ema_decay", self.ema_decay)
    checks.count("num_microbatches", self.num_microbatches)


class Batch(NamedTuple):
  """Completions drawn from the current policy, each compared with one of the opponent's.

  Attributes:
    tokens: `[B, T]` int, y ~ pi, right-padded, without the prompt.
    mask: `[B, T]` 1 on completion tokens including EOS.
    ref_token_logps: `[B, T]` log ref(token | prefix) of each token, nats.
    preferences: `[B]` P(y beats y'), or a sampled label 0 or 1.
    prompt_tokens: `[B, P]` int, left-padded, or None.
    prompt_mask: `[B, P]` or None.
  """

  tokens: Any
  mask: Any
  ref_token_logps: Any
  preferences: Any
  prompt_tokens: Any = None
  prompt_mask: Any = None


class State(NamedTuple):
  """Everything that changes in training.

  Attributes:
    params: parameters of the policy, as `apply_fn` takes them.
    ema_params: their moving average, the opponent of Nash-EMA-PG, in float32 or wider.
    opt_state: state of the optimiser.
    step: scalar int32, number of updates done.
  """

  params: Any
  ema_params: Any
  opt_state: Any
  step: jax.Array


# --- tabular ---


def step_size(step: Any, *, tau: Any) -> Any:
  """Returns eta_t = 2 / (tau (t + 2)), the schedule of the theorem; t counts from 0."""
  return 2 / (tau * (step + 2))


@checks.array_arguments
def nash_md_step(
  logps: jax.Array,
  preferences: jax.Array,
  ref_logps: jax.Array,
  *,
  tau: Any,
  eta: Any,
  opponent: str = "mixture",
) -> jax.Array:
  """Returns the policy after one step of tabular mirror descent.

  Args:
    logps: `[..., A]` log-probabilities of the policy.
    preferences: `[..., A, A]`, entry i, j is P(i beats j).
    ref_logps: `[..., A]`.
    tau: positive strength of the regulariser.
    eta: step size, at most 1 / tau.
    opponent: "mixture" plays against pi^(1 - eta tau) ref^(eta tau) (Nash-MD), "self" against the
      policy (online mirror descent).

  Returns:
    `[..., A]` normalised log-probabilities.

  Raises:
    ValueError: if the shapes do not fit, or `tau` or `eta` is out of range.

  Example:
    >>> cycle = jnp.array([[9, 10, 8], [8, 9, 10], [10, 8, 9]]) / 18  # 5/9 against 4/9
    >>> policy, uniform = jnp.log(jnp.array([0.6, 0.3, 0.1])), jnp.log(jnp.ones(3) / 3)
    >>> after = jnp.exp(nash_md_step(policy, cycle, uniform, tau=0.1, eta=5.0))
    >>> [round(float(prob), 3) for prob in after]
    [0.491, 0.309, 0.2]

  Reference: Munos et al. 2023, https://arxiv.org/abs/2312.00886, section 4.
  """
  checks.positive("tau", tau)
  checks.positive("eta", eta)
  checks.choice("opponent", opponent, OPPONENTS)
  _check_game(preferences, logps, ref_logps)
  weight = eta * tau
  checks.probabilities("eta * tau", weight)
  mixture = jax.nn.log_softmax(_mix(jnp.asarray(logps), jnp.asarray(ref_logps), weight))
  answered = mixture if opponent == "mixture" else jnp.asarray(logps)
  wins = _wins(preferences, answered)
  return jax.nn.log_softmax(mixture + eta * wins)


@checks.array_arguments
def best_response(
  opponent_logps: jax.Array, preferences: jax.Array, ref_logps: jax.Array, *, tau: Any
) -> jax.Array:
  """Returns the log-probabilities of argmax over pi of P(pi beats opponent) - tau KL(pi || ref).

  The maximiser is ref exp(P(. beats opponent) / tau), normalised. Shapes are those of
  `nash_md_step`.
  """
  checks.positive("tau", tau)
  _check_game(preferences, opponent_logps, ref_logps)
  wins = _wins(preferences, jnp.asarray(opponent_logps))
  return jax.nn.log_softmax(jnp.asarray(ref_logps) + wins / tau)


@checks.array_arguments
def fictitious_play_step(
  logps: jax.Array, preferences: jax.Array, ref_logps: jax.Array, *, tau: Any, count: Any
) -> jax.Array:
  """Returns the average policy after one step of fictitious play.

  The average moves by 1 / (count + 1) towards its `best_response`. It converges to the equilibrium.
  A smaller tau makes it slower, since best responses then jump from action to action.

  Args:
    logps: `[..., A]` log-probabilities of the average.
    preferences: `[..., A, A]`, entry i, j is P(i beats j).
    ref_logps: `[..., A]`.
    tau: positive strength of the regulariser.
    count: number of policies averaged so far, the first one included: 1, 2, ...

  Returns:
    `[..., A]` normalised log-probabilities.

  Raises:
    ValueError: if the shapes do not fit, or `tau` or `count` is not positive.

  Example:
    >>> sure = jnp.array([[0.5, 1.0], [0.0, 0.5]])  # the first action always wins
    >>> uniform = jnp.log(jnp.ones(2) / 2)
    >>> after = jnp.exp(fictitious_play_step(uniform, sure, uniform, tau=0.1, count=1))
    >>> [round(float(prob), 3) for prob in after]  # halfway to sigmoid(5) = 0.993
    [0.747, 0.253]
  """
  checks.positive("count", count)
  response = best_response(logps, preferences, ref_logps, tau=tau)
  stay = jnp.asarray(logps) + jnp.log(count / (count + 1))
  return jnp.logaddexp(stay, response - jnp.log1p(count))


@checks.array_arguments
def geometric_mixture_logits(
  policy_logits: jax.Array, ref_logits: jax.Array, *, beta: Any
) -> jax.Array:
  """Returns the logits of pi^(1 - beta) ref^beta, not normalised.

  Args:
    policy_logits: `[..., V]`, normalised or not.
    ref_logits: `[..., V]`.
    beta: in [0, 1], weight of the reference: 0 is the policy, 1 the reference. Logits of weight 0
      are ignored even if they are -inf; otherwise -inf in either input stays -inf.

  Returns:
    `[..., V]`.

  Raises:
    ValueError: if the shapes differ or `beta` lies outside [0, 1].

  Example:
    >>> geometric_mixture_logits(jnp.array([0.0, 2.0]), jnp.array([-jnp.inf, 4.0]), beta=0.25)
    Array([-inf,  2.5], dtype=float32)

  Reference: Munos et al. 2023, https://arxiv.org/abs/2312.00886, section 7.
  """
  checks.probabilities("beta", beta)
  checks.same_shape(policy_logits=policy_logits, ref_logits=ref_logits)
  return _mix(jnp.asarray(policy_logits), jnp.asarray(ref_logits), beta)


def _mix(logits: jax.Array, ref_logits: jax.Array, beta: Any) -> jax.Array:
  beta = jnp.asarray(beta, logits.dtype)
  own = jnp.where(beta < 1, (1 - beta) * logits, 0)  # 0 * -inf is NaN
  return own + jnp.where(beta > 0, beta * ref_logits, 0)


def _wins(preferences: Any, logps: jax.Array) -> jax.Array:
  """P(y beats pi) of each action, `[..., A]`."""
  return jnp.einsum("...ij,...j->...i", jnp.asarray(preferences), jnp.exp(logps))


def _check_game(preferences: Any, logps: Any, ref_logps: Any) -> None:
  checks.preference_matrix(preferences, logps=logps, ref_logps=ref_logps)


# --- the policy gradient ---


@checks.array_arguments
def nash_md_pg_loss(
  token_logps: jax.Array,
  ref_token_logps: jax.Array,
  mask: jax.Array,
  preferences: jax.Array,
  *,
  tau: Any,
) -> jax.Array:
  """Returns a loss of each sample whose gradient is minus Nash-MD-PG's.

  The weight of each token's score is P(y beats y') - 1/2 minus tau times the sum of the log-ratios
  from that token to the end. The weights carry no gradient; the value of the loss means nothing.

  Args:
    token_logps: `[B, T]` the policy's log-probability of each token of y ~ pi, nats.
    ref_token_logps: `[B, T]` the reference's.
    mask: `[B, T]` non-zero on completion tokens including EOS.
    preferences: `[B]` P(y beats y') or a sampled label. 1/2 is subtracted as a baseline, which adds
      no bias.
    tau: positive.

  Returns:
    `[B]` losses, not averaged; gradients reach `token_logps` only.

  Raises:
    ValueError: if the shapes do not fit or `tau` is not positive.

  Example:
    >>> loss = lambda logps: nash_md_pg_loss(
    ...   logps, jnp.zeros((1, 2)), jnp.ones((1, 2)), jnp.ones(1), tau=0.1).sum()
    >>> jax.grad(loss)(-jnp.ones((1, 2)))  # -(1/2 + 0.2) and -(1/2 + 0.1)
    Array([[-0.7, -0.6]], dtype=float32)

  Reference: Munos et al. 2023, https://arxiv.org/abs/2312.00886, section 7.
  """
  checks.positive("tau", tau)
  checks.probabilities("preferences", preferences)
  shape = checks.same_shape(token_logps=token_logps, ref_token_logps=ref_token_logps, mask=mask)
  checks.shape("preferences", preferences, shape[:1], "[B]")
  keep = jnp.asarray(mask, bool)
  ratios = jnp.where(keep, jax.lax.stop_gradient(token_logps) - ref_token_logps, 0.0)
  to_go = jax.lax.cumsum(ratios, axis=1, reverse=True)
  weights = jax.lax.stop_gradient(jnp.asarray(preferences)[:, None] - 0.5 - tau * to_go)
  return -jnp.sum(jnp.where(keep, sequences.cut_off(weights * token_logps), 0.0), axis=1)


def init(
  params: Any, *, optimizer: optax.GradientTransformation, config: Config, ema_params: Any = None
) -> State:
  """Returns the first state.

  Args:
    params: parameters of the policy. Start at the reference, where all log-ratios are zero.
    ema_params: where the moving average starts; a copy of `params` by default.
  """
  del config
  ema_params = averages.start(params if ema_params is None else ema_params)
  return State(params, ema_params, optimizer.init(params), jnp.zeros((), jnp.int32))


def sample(
  state: State,
  prompts: sequences.Prompts,
  key: Any,
  *,
  sample_fn: sequences.SampleFn,
  opponent_fn: sequences.SampleFn | None = None,
) -> tuple[sequences.Sequences, sequences.Sequences]:
  """Returns y drawn from the policy and y' drawn from its opponent, for a judge to compare.

  The opponent's parameters are `state.ema_params`, which equal the policy's if `ema_decay` is 0. So
  the same call is self-play, Nash-EMA-PG or, with a mixture as `opponent_fn`, Nash-MD-PG.

  Args:
    state: the state that the samples will update.
    prompts: N prompts.
    key: typed PRNG key.
    sample_fn: `sample_fn(params, prompt_tokens, prompt_mask, key)` draws completions, see
      `sequences.SampleFn`.
    opponent_fn: the same for the opponent, such as `sampling.generate` with `ref_params`,
      `mixture_fn=geometric_mixture_logits` and `beta`; `sample_fn` by default.

  Returns:
    Two `Sequences` of N K rows and N prompts.

  Raises:
    ValueError: if the samples do not fit the prompts, or the two functions draw different numbers.
  """
  policy_key, opponent_key = jax.random.split(key)
  first = sequences.sample(state.params, prompts, policy_key, sample_fn=sample_fn)
  opponent = averages.like(state.ema_params, state.params)
  second = sequences.sample(opponent, prompts, opponent_key, sample_fn=opponent_fn or sample_fn)
  if len(first.tokens) != len(second.tokens):
    raise ValueError(
      f"sample_fn drew {len(first.tokens)} completions and opponent_fn {len(second.tokens)}: the "
      "judge compares them one to one, so set the same num_samples for both"
    )
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
  """Returns the mean Nash-MD-PG loss, and `(metrics, ())`.

  Args:
    params: parameters of the policy, which must have drawn the batch.
    batch: B completions of the policy with their preferences.
    apply_fn: `apply_fn(params, Sequences) -> [B, T]`, log-probability of each completion token.
  """
  del state, key
  rows = sequences.Sequences(batch.tokens, batch.mask, batch.prompt_tokens, batch.prompt_mask)
  logps = apply_fn(params, rows)
  checks.shape("apply_fn(params, sequences)", logps, jnp.shape(batch.tokens), "[B, T]")
  losses = nash_md_pg_loss(
    logps, batch.ref_token_logps, batch.mask, batch.preferences, tau=config.tau
  )
  value = jnp.mean(losses)
  ref_logps = sequences.sequence_logps(batch.ref_token_logps, batch.mask, reduction="sum")
  log_ratios = sequences.log_ratios(logps, batch.mask, ref_logps, reduction="sum")
  metrics = {
    "loss": value,
    "nash_md/preference": jnp.mean(batch.preferences),
    "nash_md/kl": jnp.mean(log_ratios),
    "nash_md/regularised_preference": jnp.mean(batch.preferences - config.tau * log_ratios),
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
    batch: B completions drawn from `state.params`, each compared with one of the opponent's.

  Returns:
    The new state, and the metrics `loss` (its value means nothing), `grad_norm`, and the means
    over the batch of `nash_md/preference`, `nash_md/kl` (log-ratio, which estimates the KL) and
    `nash_md/regularised_preference`. The moving average `ema_params` follows the new parameters.
  """
  state, metrics = sharding.gradient_step(
    loss, state, batch, key, apply_fn=apply_fn, optimizer=optimizer, config=config
  )
  ema_params = averages.move(state.ema_params, state.params, config.ema_decay)
  return state._replace(ema_params=ema_params), metrics
