"""ARMAC, Advantage Regret-Matching Actor-Critic: CFR from episodes, without importance ratios.

Problem: an equilibrium of a game whose tree is too large to walk. CFR plays regret matching on its
cumulative regrets; ARMAC learns their mean. In each episode of epoch t one player i explores with
any policy mu_i. The others play pi^j, the policy of a past epoch j that is drawn for the episode.
Take the advantages of pi^j at the states s of player i, from the critic of epoch j. Their mean

  E[q_{pi^j,i}(h, a) - v_{pi^j,i}(h) | s] = R^t(s, a) / w^t(s)

is the cumulative counterfactual regret divided by a positive number w^t(s), which does not change
what regret matching plays. No importance ratio is needed, because mu_i reaches all histories h of s
with the same probability, so it cancels. With exact expectations this is CFR that updates all
players at once (`armac_tables`).

An epoch has four parts: play (`armac_play`); learn q_{pi^t} by Tree-Backup(lambda) from the
episodes; keep the pair (pi^t, q_{pi^t}); learn the mean regrets W and the mean policy from the kept
pairs (`armac_epochs`). The next policy is pi^{t+1} = RM(W). In two-player zero-sum games the mean
policy converges to an equilibrium; it is learned at the states where the others play. The policies
pi^t themselves cycle.

Where a game fits into memory, `armac_sums` comes nearer to an equilibrium with the same networks.

The critic and the actor learn from different batches, in turn, so each has its own loss and update:
`loss_critic` and `update_critic`, `loss_actor` and `update_actor`.

Reference: Gruslys et al. 2020, https://arxiv.org/abs/2008.12234.

| paper | here |
|---|---|
| theta^t | `State.params`: an actor and a critic |
| past networks | `State.past`, stacked, and `State.epoch` t |
| W_theta(s, a), mean policy | what the actor returns: `(regrets, policy_logits)` |
| q_theta(h, a) | what the critic returns, from the observations of all players |
| K_act, K_learn | `Config.num_episodes`; `num_critic_steps` and `num_actor_steps` |
| lambda | `Config.trace_decay` |
| mu_i | uniform play, RM(W) or the mean policy of the current or a past actor, drawn per episode |

Deviations: none in the exact form. Choices that the paper leaves open: the regrets of a past policy
use the critic of its own epoch, never the current one, so the critic learns before the actor in
each epoch. The states of the others are stored too, because the mean policy needs them. The
explorer plays a fixed mixture. One candidate of the paper is left out: play on q(h, .) looks at
hidden cards, and then mu_i no longer cancels. Episodes come in groups that share j; the draws of j
are stratified, so each j is still uniform, and a group costs one matrix product.
`recency` above 0 is ours, not the paper's.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sharding
from rl_theory import policy_arrays, returns
from sharding import checks

Metrics = dict[str, jax.Array]
_COUNTS = (
  "num_episodes", "num_groups", "batch_size", "num_critic_steps", "num_actor_steps", "capacity",
  "num_microbatches",
)  # fmt: skip


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["trace_decay", "epsilon", "recency"],
  meta_fields=list(_COUNTS),
)
@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters. The paper does not publish its own.

  Attributes:
    trace_decay: lambda in [0, 1] of Tree-Backup.
    epsilon: share of uniform play in [0, 1] when the explorer plays regret matching.
    recency: p >= 0: the past policy of epoch j is drawn with probability about proportional to j^p.
      0 is the paper's method, which is CFR in expectation; 1 is linear CFR, which forgets early
      policies.
    num_episodes: episodes in an epoch.
    num_groups: number of past policies drawn for them; must divide `num_episodes`.
    batch_size: episodes in an optimisation step; must divide `num_episodes`.
    num_critic_steps, num_actor_steps: optimisation steps in an epoch.
    capacity: number of past networks kept; after that each new one replaces the oldest.
    num_microbatches: number of parts of a batch, to save memory; the result is the same.
  """

  trace_decay: Any = 1.0
  epsilon: Any = 0.05
  recency: Any = 0.0
  num_episodes: int = 1024
  num_groups: int = 32
  batch_size: int = 128
  num_critic_steps: int = 64
  num_actor_steps: int = 64
  capacity: int = 512
  num_microbatches: int = 1

  def __post_init__(self):
    checks.probabilities("trace_decay", self.trace_decay)
    checks.probabilities("epsilon", self.epsilon)
    checks.not_negative("recency", self.recency)
    for name in _COUNTS:
      checks.count(name, getattr(self, name))
    for name in ("num_groups", "batch_size"):
      if self.num_episodes % getattr(self, name):
        raise ValueError(
          f"{name} must divide num_episodes={self.num_episodes}, got {getattr(self, name)}"
        )


class Params(NamedTuple):
  """Parameters of the two networks, or any trees that belong to them, such as optimiser states."""

  actor: Any
  critic: Any


class Networks(NamedTuple):
  """The two networks: hashable functions, such as methods of a Flax module.

  Attributes:
    actor: `actor(params, observations [B, ...]) -> (regrets [B, A], policy_logits [B, A])`, from
      the observations of the player who moves.
    critic: `critic(params, observations [B, n, ...]) -> [B, n, A]`, each player's value of each
      action of the mover, from the observations of all players.
  """

  actor: Callable[..., Any]
  critic: Callable[..., Any]


class Batch(NamedTuple):
  """Episodes of an n-player game, with their decisions in order.

  Attributes:
    observations: `[B, T, n, ...]` each player's observation at each decision.
    players: `[B, T]` int, the player who decides.
    legal: `[B, T, A]` bool.
    actions: `[B, T]` int, the action played.
    mask: `[B, T]` bool, true at decisions, false at the padding after them.
    learners: `[B]` int, the player i who explored.
    slots: `[B]` int, the place in `State.past` of the others' policy pi^j; rows with one j are
      adjacent.
    past_policies: `[B, T, A]` pi^j of the player who decides.
    policies: `[B, T, A]` pi^t of that player, which the critic evaluates.
    utilities: `[B, n]` the players' utilities at the end.
    regrets: `[B, T, A]` advantages of pi^j for the player who decides. The critic learns without
      them (None); `armac_epochs.add_regrets` adds them for the actor.
  """

  observations: Any
  players: Any
  legal: Any
  actions: Any
  mask: Any
  learners: Any
  slots: Any
  past_policies: Any
  policies: Any
  utilities: Any
  regrets: Any = None


class State(NamedTuple):
  """Everything that changes in training.

  Attributes:
    params: of the actor and the critic.
    past: `Params` with leaves `[capacity, ...]`: the actors that played pi^0, pi^1, ... and the
      critics that evaluate them.
    opt_state: `Params` of optimiser states.
    step: scalar int32, optimisation steps done.
    epoch: scalar int32, t.
    env_steps: scalar int32, decisions played so far.
  """

  params: Any
  past: Any
  opt_state: Any
  step: jax.Array
  epoch: jax.Array
  env_steps: jax.Array


# --- losses on arrays ---


@checks.array_arguments
def tree_backup_loss(
  action_values: jax.Array,
  policies: jax.Array,
  actions: jax.Array,
  utilities: jax.Array,
  mask: jax.Array,
  *,
  trace_decay: Any,
) -> jax.Array:
  """Returns the critic's loss: the squared error to the Tree-Backup targets of played actions.

  Args:
    action_values: `[B, T, n, A]` each player's value of each action of the mover.
    policies: `[B, T, A]` the policy of the mover that is evaluated.
    actions: `[B, T]` int.
    utilities: `[B, n]`, received after the last decision.
    mask: `[B, T]`.
    trace_decay: lambda in [0, 1].

  Returns:
    `[B, T]`, summed over players, 0 where masked out; no gradient flows through the targets.
  """
  num_players = action_values.shape[2]
  real, rewards = jnp.asarray(mask, bool), final_rewards(utilities, mask)
  total = jnp.zeros(actions.shape, action_values.dtype)
  for player in range(num_players):
    values = action_values[:, :, player]
    targets = returns.tree_backup_targets(
      jax.lax.stop_gradient(values),
      policies,
      actions,
      rewards[..., player],
      real,
      trace_decay=trace_decay,
    )
    taken = jnp.take_along_axis(values, actions[..., None], -1)[..., 0]
    total = total + jnp.where(real, (taken - targets) ** 2, 0)
  return total


@checks.array_arguments
def final_rewards(utilities: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns rewards `[B, T, n]`: the utilities `[B, n]` at an episode's last decision, else 0."""
  real = jnp.asarray(mask, bool)
  last = real & (jnp.cumsum(real[:, ::-1], axis=1)[:, ::-1] == 1)
  return jnp.where(last[..., None], utilities[:, None], 0)


@checks.array_arguments
def regret_loss(regrets: jax.Array, targets: jax.Array, *, legal: jax.Array) -> jax.Array:
  """Returns the squared error of the mean regrets, summed over legal actions.

  Args:
    regrets: `[..., A]` from the actor.
    targets: `[..., A]` advantages of a past policy.
    legal: `[..., A]` bool.

  Returns:
    `[...]`; no gradient flows through the targets.

  Example:
    >>> regret_loss(jnp.array([1.0, 9.0]), jnp.zeros(2), legal=jnp.array([True, False]))
    Array(1., dtype=float32)
  """
  error = jnp.where(legal, regrets - jax.lax.stop_gradient(targets), 0)
  return jnp.sum(error**2, axis=-1)


@checks.array_arguments
def mean_policy_loss(logits: jax.Array, policies: jax.Array, *, legal: jax.Array) -> jax.Array:
  """Returns KL(past policy || mean policy), the cross-entropy minus the past policy's entropy.

  The entropy does not depend on the logits, so the gradient is that of the cross-entropy.

  Args:
    logits: `[..., A]` of the mean policy.
    policies: `[..., A]` the whole distribution of a past policy, not the action drawn from it.
    legal: `[..., A]` bool.

  Returns:
    `[...]` nats; no gradient flows through the past policies.

  Example:
    >>> mean_policy_loss(jnp.zeros(2), jnp.array([1.0, 0.0]), legal=jnp.ones(2, bool))
    Array(0.6931472, dtype=float32)
  """
  policies = jax.lax.stop_gradient(policies)
  logps = policy_arrays.log_softmax(logits, legal)
  return jnp.sum(jax.scipy.special.xlogy(policies, policies) - policies * logps, axis=-1)


# --- one optimisation step of one network ---


def init(
  params: Params, *, optimizer: optax.GradientTransformation, config: Config, past: Any = None
) -> State:
  """Returns the state before the first epoch.

  Args:
    params: of an actor whose regrets are 0 at initialisation (so that pi^0 is uniform) and of a
      critic.
    optimizer: the one that the updates will get; each network has its own optimiser state.
    config: only `capacity` is used.
    past: the buffer of past networks; by default `params` in every place.
  """
  if past is None:
    past = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], config.capacity, axis=0), params)
  opt_state = Params(optimizer.init(params.actor), optimizer.init(params.critic))
  return State(params, past, opt_state, *(jnp.zeros((), jnp.int32) for _ in range(3)))


def loss_critic(
  params: Params, state: Any, batch: Batch, key: Any, *, apply_fn: Networks, config: Config
) -> tuple[jax.Array, tuple[Metrics, Any]]:
  """Returns the critic's loss, a mean over episodes of sums over decisions, and `(metrics, ())`.

  Args:
    params: only the critic's get a gradient.
    batch: B episodes; `regrets` are not used.
    apply_fn: the networks.
    config: only `trace_decay` is used.
  """
  del state, key
  mask = jnp.asarray(batch.mask, bool)
  values = apply_fn.critic(params.critic, _flat_observations(batch))
  losses = tree_backup_loss(
    values.reshape(*mask.shape, *values.shape[1:]),
    batch.policies,
    batch.actions,
    batch.utilities,
    mask,
    trace_decay=config.trace_decay,
  )
  value = _per_episode(losses, mask)
  return value, ({"loss": value, "armac/critic_loss": value}, ())


def loss_actor(
  params: Params, state: Any, batch: Batch, key: Any, *, apply_fn: Networks, config: Config
) -> tuple[jax.Array, tuple[Metrics, Any]]:
  """Returns the actor's loss, a mean over episodes of sums over decisions, and `(metrics, ())`.

  It is the regret loss at the explorer's decisions plus the policy loss at the others' decisions.

  Args:
    params: only the actor's get a gradient.
    batch: B episodes with `regrets`.
    apply_fn: the networks.

  Raises:
    ValueError: if the batch has no regrets.
  """
  del state, key, config
  if batch.regrets is None:
    raise ValueError("batch.regrets must not be None: call armac_epochs.add_regrets first")
  mask = jnp.asarray(batch.mask, bool)
  own = of_mover(_flat_observations(batch), batch.players.reshape(-1))
  regrets, logits = (x.reshape(*mask.shape, -1) for x in apply_fn.actor(params.actor, own))
  mine = batch.players == batch.learners[:, None]
  regret = _per_episode(regret_loss(regrets, batch.regrets, legal=batch.legal), mask & mine)
  policy = _per_episode(
    mean_policy_loss(logits, batch.past_policies, legal=batch.legal), mask & ~mine
  )
  value = regret + policy
  metrics = {"loss": value, "armac/regret_loss": regret, "armac/policy_loss": policy}
  return value, (metrics, ())


def _flat_observations(batch: Batch) -> jax.Array:
  return batch.observations.reshape(-1, *batch.observations.shape[2:])


def _per_episode(losses: jax.Array, mask: jax.Array) -> jax.Array:
  return jnp.mean(jnp.sum(jnp.where(mask, losses, 0), axis=1))


def of_mover(rows: jax.Array, players: jax.Array) -> jax.Array:
  """Returns the entries `[B, ...]` of one player in each row, from `[B, n, ...]`."""
  return jax.vmap(lambda row, player: row[player])(rows, players)


@functools.partial(jax.jit, static_argnames=("apply_fn", "optimizer"))
def update_critic(
  state: State,
  batch: Batch,
  key: Any,
  *,
  apply_fn: Networks,
  optimizer: optax.GradientTransformation,
  config: Config,
) -> tuple[State, Metrics]:
  """Returns the state after one step of the critic; the actor stays as it is.

  Args:
    state: not donated.
    batch: B episodes; `config.num_microbatches` must divide B.
    apply_fn: the networks.
    optimizer: any optax transformation; build it once, since a new one compiles again.
    config: hyper-parameters.

  Returns:
    The new state; metrics `loss`, `grad_norm` and `armac/critic_loss` (squared utility).
  """
  return step_network(
    "critic", loss_critic, state, batch, key, apply_fn=apply_fn, optimizer=optimizer, config=config
  )


@functools.partial(jax.jit, static_argnames=("apply_fn", "optimizer"))
def update_actor(
  state: State,
  batch: Batch,
  key: Any,
  *,
  apply_fn: Networks,
  optimizer: optax.GradientTransformation,
  config: Config,
) -> tuple[State, Metrics]:
  """Returns the state after one step of the actor; the critic stays as it is.

  Args:
    state: not donated.
    batch: B episodes with `regrets`; `config.num_microbatches` must divide B.
    apply_fn: the networks.
    optimizer: as in `update_critic`.
    config: hyper-parameters.

  Returns:
    The new state; metrics `loss`, `grad_norm`, `armac/regret_loss` (squared utility, most of it
    the variance of the advantages, which no network can remove) and `armac/policy_loss` (nats).
  """
  return step_network(
    "actor", loss_actor, state, batch, key, apply_fn=apply_fn, optimizer=optimizer, config=config
  )


class _OneNetwork(NamedTuple):
  """The part of a `State` that a step of one network changes."""

  params: Any
  opt_state: Any
  step: jax.Array


def step_network(
  name: str, loss: Callable[..., Any], state: Any, batch: Any, key: Any, **kwargs: Any
) -> tuple[Any, Metrics]:
  """Returns the state after a gradient step on the parameters of the actor or of the critic.

  Args:
    name: "actor" or "critic".
    loss: of both networks' parameters, as `loss_actor`.
    state: a `NamedTuple` with `params`, `opt_state` (both `Params`) and `step`.
    batch: for the loss.
    key: for the loss.
    **kwargs: `apply_fn`, `optimizer` and `config`.
  """

  def loss_of_network(params: Any, _: _OneNetwork, batch: Any, key: Any, **kwargs: Any) -> Any:
    return loss(state.params._replace(**{name: params}), state, batch, key, **kwargs)

  own = _OneNetwork(getattr(state.params, name), getattr(state.opt_state, name), state.step)
  own, metrics = sharding.gradient_step(loss_of_network, own, batch, key, **kwargs)
  return state._replace(
    params=state.params._replace(**{name: own.params}),
    opt_state=state.opt_state._replace(**{name: own.opt_state}),
    step=own.step,
  ), metrics
