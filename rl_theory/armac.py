"""ARMAC: an actor that matches its regrets, averaged over its own past by replaying its past.

Problem: an equilibrium of a game too large to walk. CFR plays regret matching on the regrets that
it has cumulated; ARMAC learns their mean. In every episode of epoch t one player i explores by any
policy mu_i and the others play pi^j, the policy of a past epoch j drawn once per episode. Then the
advantage of pi^j at the states s of player i, given by the critic of that same epoch,

  E[q_{pi^j,i}(h, a) - v_{pi^j,i}(h) | s] = R^t(s, a) / w^t(s)

is the cumulated counterfactual regret up to a positive factor of the state, which regret matching
does not see: mu_i is reached equally often at all h of s and cancels, and no importance ratio is
needed. With exact expectations this is CFR, all players at once (`armac_tables`).

An epoch: play; learn q_{pi^t} by Tree-Backup(lambda) from what was played; keep the pair
(pi^t, q_{pi^t}); learn the mean regrets W and the mean policy from the kept pairs;
pi^{t+1} = RM(W). The mean policy, learned where the others play, goes to the equilibrium of a
two-player zero-sum game. pi^t does not: it cycles.

Reference: Gruslys et al. 2020, https://arxiv.org/abs/2008.12234.

| paper | here |
|---|---|
| theta^t | `State.params`: an actor and a critic |
| past networks | `State.past`, stacked, and `State.epoch` t |
| W_theta(s, a), mean policy | what the actor returns: `(regrets, policy_logits)` |
| q_theta(h, a) | what the critic returns, from the observations of all players |
| K_act, K_learn | `Config.num_episodes`; `num_critic_steps` and `num_actor_steps` |
| lambda | `Config.trace_decay` |
| mu_i | uniform play, RM(W) and the mean policy of the current or a past actor, one an episode |

Deviations: none in the exact form. Choices where the paper leaves one: regrets of past policies use
the critic of their own epoch, never the current one, so the critic learns before the actor in each
epoch. States of the others are stored, without which the mean policy has no data. Behaviour is a
fixed mixture; the paper's candidate that plays on q(h, .) is left out, since it looks at the hidden
cards and then mu_i no longer cancels. Episodes come in groups that share j, whose draws are
stratified: each j is still uniform, and a group is one matrix product.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sharding
from rl_theory import games, regret_matching, returns, rollouts

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
  """Hyper-parameters; the paper's are not published.

  Attributes:
    trace_decay: lambda in [0, 1] of Tree-Backup.
    epsilon: in [0, 1], share of uniform play in the explorer's regret matching.
    recency: p >= 0: the past policy of epoch j is drawn in proportion to about j^p. 0 is the
      paper's method, and CFR in expectation; 1 is linear CFR, which forgets its first policies.
    num_episodes: played in an epoch.
    num_groups: how many past policies are drawn for them; must divide `num_episodes`.
    batch_size: episodes in one optimisation step; must divide `num_episodes`.
    num_critic_steps, num_actor_steps: optimisation steps in an epoch.
    capacity: past policies kept; once full the oldest goes.
    num_microbatches: parts into which a batch is split to save memory; same result.
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
    for name in ("trace_decay", "epsilon"):
      value = getattr(self, name)
      if isinstance(value, str) or (isinstance(value, numbers.Real) and not 0 <= float(value) <= 1):
        raise ValueError(f"{name} must lie in [0, 1], got {value!r}")
    if isinstance(self.recency, numbers.Real) and not 0 <= float(self.recency) < math.inf:
      raise ValueError(f"recency must be finite and not negative, got {self.recency!r}")
    for name in _COUNTS:
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    for name in ("num_groups", "batch_size"):
      if self.num_episodes % getattr(self, name):
        raise ValueError(
          f"{name} must divide num_episodes={self.num_episodes}, got {getattr(self, name)}"
        )


class Params(NamedTuple):
  """Parameters of the two networks, or anything that has one leaf for each of them."""

  actor: Any
  critic: Any


class Networks(NamedTuple):
  """The two networks; functions that hash, such as methods of a Flax module.

  Attributes:
    actor: `actor(params, observations [B, ...]) -> (regrets [B, A], policy_logits [B, A])`, the
      observations being those of the player who moves.
    critic: `critic(params, observations [B, n, ...]) -> [B, n, A]`: what each player gets after
      each action of the mover; it sees what all players see.
  """

  actor: Callable[..., Any]
  critic: Callable[..., Any]


class Batch(NamedTuple):
  """Episodes of an n-player game, their decisions in order.

  The step functions take a batch without regrets to the critic and one with them to the actor.

  Attributes:
    observations: `[B, T, n, ...]` what each player has seen at each decision.
    players: `[B, T]` int, who decides.
    legal: `[B, T, A]` bool.
    actions: `[B, T]` int, what was played.
    mask: `[B, T]` bool, true at decisions.
    learners: `[B]` int, the player i who explored.
    slots: `[B]` int, where in `State.past` the others' policy pi^j is; rows of one j are adjacent.
    past_policies: `[B, T, A]` pi^j of the player who decides.
    policies: `[B, T, A]` pi^t of that player, which the critic evaluates.
    utilities: `[B, n]` what the players got in the end.
    regrets: `[B, T, A]` advantages of pi^j for its mover, from `add_regrets`; None before.
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


# --- losses ---


def regret_loss(regrets: jax.Array, targets: jax.Array, *, legal: jax.Array) -> jax.Array:
  """Returns the squared error of mean regrets, summed over legal actions.

  Args:
    regrets: `[..., A]` what the actor says.
    targets: `[..., A]` advantages of a past policy.
    legal: `[..., A]` bool.

  Returns:
    `[...]`; gradients reach `regrets` only.

  Example:
    >>> regret_loss(jnp.array([1.0, 9.0]), jnp.zeros(2), legal=jnp.array([True, False]))
    Array(1., dtype=float32)
  """
  error = jnp.where(legal, regrets - jax.lax.stop_gradient(targets), 0)
  return jnp.sum(error**2, axis=-1)


def mean_policy_loss(logits: jax.Array, policies: jax.Array, *, legal: jax.Array) -> jax.Array:
  """Returns KL(past policy || mean policy): the cross-entropy less what cannot be helped.

  Args:
    logits: `[..., A]` of the mean policy.
    policies: `[..., A]` the whole distribution of a past policy, not the action it drew.
    legal: `[..., A]` bool.

  Returns:
    `[...]` nats; gradients reach `logits` only.

  Example:
    >>> mean_policy_loss(jnp.zeros(2), jnp.array([1.0, 0.0]), legal=jnp.ones(2, bool))
    Array(0.6931472, dtype=float32)
  """
  policies = jax.lax.stop_gradient(policies)
  logps = _log_softmax(logits, legal)
  return jnp.sum(jax.scipy.special.xlogy(policies, policies) - policies * logps, axis=-1)


def final_rewards(utilities: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns the utilities `[B, n]` at the last decision of each episode, `[B, T, n]`, else 0."""
  real = jnp.asarray(mask, bool)
  last = real & (jnp.cumsum(real[:, ::-1], axis=1)[:, ::-1] == 1)
  return jnp.where(last[..., None], utilities[:, None], 0)


def critic_loss(
  action_values: jax.Array,
  policies: jax.Array,
  actions: jax.Array,
  utilities: jax.Array,
  mask: jax.Array,
  *,
  trace_decay: Any,
) -> jax.Array:
  """Returns the squared error of the played actions' values to their Tree-Backup targets.

  Args:
    action_values: `[B, T, n, A]` what each player gets after each action of the mover.
    policies: `[B, T, A]` the policy to be evaluated, of the mover.
    actions: `[B, T]` int.
    utilities: `[B, n]`, given after the last decision.
    mask: `[B, T]`.
    trace_decay: lambda in [0, 1].

  Returns:
    `[B, T]`, summed over players, 0 where masked out; targets carry no gradient.
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


def _log_softmax(logits: jax.Array, legal: jax.Array) -> jax.Array:
  """Log-probabilities among legal actions, 0 for the others."""
  masked = jnp.where(legal, logits, -jnp.inf)
  masked = jnp.where(jnp.any(legal, axis=-1, keepdims=True), masked, 0)
  return jnp.where(legal, jax.nn.log_softmax(masked), 0)


def mean_policy(logits: jax.Array, legal: jax.Array) -> jax.Array:
  """Returns the probabilities `[..., A]` of the actor's policy head, 0 for illegal actions."""
  return jnp.where(legal, jnp.exp(_log_softmax(logits, legal)), 0)


# --- one optimisation step ---


def init(
  params: Params, *, optimizer: optax.GradientTransformation, config: Config, past: Any = None
) -> State:
  """Returns the state before the first epoch.

  Args:
    params: of an actor whose regrets start at 0 (so that pi^0 is uniform) and a critic.
    optimizer: the one that `update` will get; the two networks have a state of it each.
    config: hyper-parameters; `capacity` is used.
    past: the buffer of past networks, by default the first ones in every place.
  """
  if past is None:
    past = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], config.capacity, axis=0), params)
  opt_state = Params(optimizer.init(params.actor), optimizer.init(params.critic))
  return State(params, past, opt_state, *(jnp.zeros((), jnp.int32) for _ in range(3)))


def loss(
  params: Params, state: Any, batch: Batch, key: Any, *, apply_fn: Networks, config: Config
) -> tuple[jax.Array, tuple[Metrics, Any]]:
  """Returns the critic's mean loss, or the actor's where the batch has regrets.

  Args:
    params: the only input to differentiate.
    state: unused; every algorithm's `loss` takes it.
    batch: B episodes.
    key: unused: nothing is random.
    apply_fn: the networks.
    config: hyper-parameters.

  Returns:
    The scalar loss, a mean over episodes of sums over decisions, and `(metrics, ())`.
  """
  del state, key
  mask = jnp.asarray(batch.mask, bool)
  shape = mask.shape
  flat = batch.observations.reshape(-1, *batch.observations.shape[2:])
  zero = jnp.zeros((), jnp.float32)
  parts = {"armac/critic_loss": zero, "armac/regret_loss": zero, "armac/policy_loss": zero}
  if batch.regrets is None:
    values = apply_fn.critic(params.critic, flat)
    losses = critic_loss(
      values.reshape(*shape, *values.shape[1:]),
      batch.policies,
      batch.actions,
      batch.utilities,
      mask,
      trace_decay=config.trace_decay,
    )
    parts["armac/critic_loss"] = value = _per_episode(losses, mask)
  else:
    own = _of_mover(flat, batch.players.reshape(-1))
    regrets, logits = (x.reshape(*shape, -1) for x in apply_fn.actor(params.actor, own))
    mine = batch.players == batch.learners[:, None]
    regret = _per_episode(regret_loss(regrets, batch.regrets, legal=batch.legal), mask & mine)
    policy = _per_episode(
      mean_policy_loss(logits, batch.past_policies, legal=batch.legal), mask & ~mine
    )
    parts |= {"armac/regret_loss": regret, "armac/policy_loss": policy}
    value = regret + policy
  return value, ({"loss": value, **parts}, ())


def _per_episode(losses: jax.Array, mask: jax.Array) -> jax.Array:
  return jnp.mean(jnp.sum(jnp.where(mask, losses, 0), axis=1))


def _of_mover(observations: jax.Array, players: jax.Array) -> jax.Array:
  """Returns the observations `[B, ...]` of one player each, from `[B, n, ...]`."""
  return jax.vmap(lambda rows, player: rows[player])(observations, players)


@functools.partial(jax.jit, static_argnames=("apply_fn", "optimizer"))
def update(
  state: State,
  batch: Batch,
  key: Any,
  *,
  apply_fn: Networks,
  optimizer: optax.GradientTransformation,
  config: Config,
) -> tuple[State, Metrics]:
  """Returns the state after one step of the critic, or of the actor where the batch has regrets.

  Args:
    state: not donated.
    batch: B episodes; `config.num_microbatches` must divide B.
    key: unused: nothing is random.
    apply_fn: the networks.
    optimizer: any optax transformation; build it once, a rebuilt one compiles again.
    config: hyper-parameters.

  Returns:
    The new state; metrics `loss`, `grad_norm`, `armac/critic_loss` (squared utility),
    `armac/regret_loss` (squared utility, most of it noise that no network can learn) and
    `armac/policy_loss` (nats); 0 for the network that had no step.
  """
  name = "critic" if batch.regrets is None else "actor"

  def of_network(
    params: Any, state: State, batch: Batch, key: Any, *, apply_fn: Networks, config: Config
  ) -> tuple[jax.Array, tuple[Metrics, Any]]:
    joint = state.params._replace(**{name: params})
    return loss(joint, state, batch, key, apply_fn=apply_fn, config=config)

  params, opt_state = getattr(state.params, name), getattr(state.opt_state, name)
  grad_fn = sharding.accumulate_grads(of_network, config.num_microbatches)
  (_, (metrics, _)), grads = grad_fn(params, state, batch, key, apply_fn=apply_fn, config=config)
  updates, opt_state = optimizer.update(grads, opt_state, params)
  metrics["grad_norm"] = optax.global_norm(grads)
  return state._replace(
    params=state.params._replace(**{name: optax.apply_updates(params, updates)}),
    opt_state=state.opt_state._replace(**{name: opt_state}),
    step=state.step + 1,
  ), metrics


# --- episodes and epochs ---


class Cast(NamedTuple):
  """Who plays the episodes of an epoch, in G groups of E.

  Attributes:
    past_slots: `[G]` int, where in `State.past` the others' policy pi^j is.
    base_slots: `[G]` int, the same for the networks that the explorer goes by.
    candidates: `[G, E]` int, how it does: 0 uniform play, 1 regret matching, 2 the mean policy.
    learners: `[G, E]` int, the player i who explores.
  """

  past_slots: jax.Array
  base_slots: jax.Array
  candidates: jax.Array
  learners: jax.Array


def draw_cast(state: State, key: Any, *, num_players: int, config: Config) -> Cast:
  """Returns who plays the episodes of an epoch; for n players."""
  groups, size = config.num_groups, config.num_episodes // config.num_groups
  past_key, base_key, base_slot_key, candidate_key, learner_key, _ = jax.random.split(key, 6)
  slot, count = _slot(state), _num_kept(state)
  # Stratified: the g-th of G draws is uniform in the g-th part, so a group's draw is uniform.
  strata = (jnp.arange(groups) + jax.random.uniform(past_key, (groups,))) / groups
  # (k + 1)^(1 + p) - k^(1 + p) of count^(1 + p) fall to the k-th oldest: in proportion to about
  # k^p.
  order = (count * strata ** (1 / (1 + config.recency))).astype(jnp.int32)
  past_slots = (slot - (count - 1 - jnp.minimum(order, count - 1))) % _capacity(state)
  # The explorer's own policies are drawn independently of j, or it would not cancel.
  recent = jax.random.bernoulli(base_key, 0.5, (groups,))
  base_slots = jnp.where(recent, slot, jax.random.randint(base_slot_key, (groups,), 0, count))
  candidates = jax.random.randint(candidate_key, (groups, size), 0, 3)
  # Which episode of a group explores for whom must not depend on the stratum.
  learners = jax.random.randint(learner_key, (groups, size), 0, num_players)
  return Cast(past_slots, base_slots, candidates, learners)


def acting_policies(
  state: State,
  cast: Cast,
  observations: jax.Array,
  movers: jax.Array,
  legal: jax.Array,
  *,
  apply_fn: Networks,
  config: Config,
) -> tuple[jax.Array, jax.Array]:
  """Returns what is played at one decision of each episode, and pi^j there, `[G, E, A]` each.

  Args:
    state: whose past plays.
    cast: from `draw_cast`.
    observations: `[G, E, ...]` of the player who moves.
    movers: `[G, E]` int.
    legal: `[G, E, A]` bool.
    apply_fn: the networks.
    config: hyper-parameters.
  """
  past, base = (_take(state.past.actor, slots) for slots in (cast.past_slots, cast.base_slots))
  act = jax.vmap(apply_fn.actor)
  past_policies = regret_matching.regret_matching(act(past, observations)[0], legal)
  regrets, logits = act(base, observations)
  explore = _behaviour(regrets, logits, legal, cast.candidates, config.epsilon)
  return jnp.where((movers == cast.learners)[..., None], explore, past_policies), past_policies


def current_policies(
  state: State, observations: jax.Array, legal: jax.Array, *, apply_fn: Networks
) -> jax.Array:
  """Returns pi^t `[..., A]`, from observations `[B, ...]` of the movers and `legal` `[..., A]`."""
  actor = jax.tree.map(lambda leaf: leaf[_slot(state)], state.past.actor)
  regrets = apply_fn.actor(actor, observations)[0].reshape(legal.shape)
  return regret_matching.regret_matching(regrets, legal)


@functools.partial(jax.jit, static_argnames="apply_fn")
def sample(
  state: State,
  game: games.Game,
  observations: jax.Array,
  key: Any,
  *,
  apply_fn: Networks,
  config: Config,
) -> Batch:
  """Returns the episodes of an epoch, played on the device.

  Args:
    state: whose past plays; the place of epoch t must hold the current actor, as `init` and
      `next_epoch` leave it.
    game: the game.
    observations: `[H, n, ...]` what each player has seen at each history, such as
      `games.information_state_tensors`.
    key: typed PRNG key.
    apply_fn: the networks.
    config: hyper-parameters.
  """
  cast = draw_cast(state, key, num_players=game.num_players, config=config)
  play_key = jax.random.split(key, 6)[5]

  def step(nodes: jax.Array, key: Any) -> tuple[jax.Array, Any]:
    players = game.players[nodes]
    movers = jnp.maximum(players, 0)
    seen = jax.vmap(_of_mover)(observations[nodes], movers)
    legal = game.legal[jnp.maximum(game.info_states[nodes], 0)]
    policies, past_policies = acting_policies(
      state, cast, seen, movers, legal, apply_fn=apply_fn, config=config
    )
    following, actions = rollouts.advance(game, nodes, policies, key)
    return following, (nodes, actions, past_policies, players >= 0)

  keys = jax.random.split(play_key, max(len(game.layout.levels) - 1, 1))
  last, path = jax.lax.scan(step, jnp.zeros(cast.learners.shape, jnp.int32), keys)
  path = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(-1, len(keys), *x.shape[3:]), path)
  nodes, actions, past_policies, mask = _decisions_first(path, game)
  info_states = jnp.maximum(game.info_states[nodes], 0)
  players, legal = jnp.maximum(game.players[nodes], 0), game.legal[info_states]
  flat = observations[nodes.reshape(-1)]
  own = _of_mover(flat, players.reshape(-1))
  return Batch(
    observations=flat.reshape(*nodes.shape, *flat.shape[1:]),
    players=players,
    legal=legal,
    actions=jnp.where(mask, actions, 0),  # chance's have numbers of their own
    mask=mask,
    learners=cast.learners.reshape(-1),
    slots=jnp.repeat(cast.past_slots, cast.learners.shape[1]),
    past_policies=past_policies,
    policies=current_policies(state, own, legal, apply_fn=apply_fn),
    utilities=game.utilities[last.reshape(-1)],
  )


def _behaviour(
  regrets: jax.Array, logits: jax.Array, legal: jax.Array, candidates: jax.Array, epsilon: Any
) -> jax.Array:
  """Returns the explorer's policy: uniform, regret matching with some uniform play, or the mean."""
  uniform = regret_matching.normalise(jnp.zeros(legal.shape, regrets.dtype), legal)
  matching = epsilon * uniform + (1 - epsilon) * regret_matching.regret_matching(regrets, legal)
  chosen = candidates[..., None]
  return jnp.where(
    chosen == 0, uniform, jnp.where(chosen == 1, matching, mean_policy(logits, legal))
  )


def _decisions_first(path: Any, game: games.Game) -> Any:
  """Returns the path `[B, depth, ...]` without chance and what lies past the end, `[B, T, ...]`."""
  num_steps = min(path[-1].shape[1], sum(map(len, game.layout.state_levels)))
  order = jnp.argsort(~path[-1], axis=1, stable=True)[:, :num_steps]
  return jax.tree.map(lambda x: jax.vmap(lambda row, index: row[index])(x, order), path)


@functools.partial(jax.jit, static_argnames="apply_fn")
def add_regrets(state: State, batch: Batch, *, apply_fn: Networks, config: Config) -> Batch:
  """Returns the batch with the advantages of each pi^j, by the critic that was kept beside it."""
  groups = config.num_groups
  observations = batch.observations
  grouped = observations.reshape(groups, -1, *observations.shape[2:])
  critics = _take(state.past.critic, batch.slots[:: len(batch.slots) // groups])
  values = jax.vmap(apply_fn.critic)(critics, grouped)
  values = values.reshape(-1, *values.shape[2:])
  own = _of_mover(values, batch.players.reshape(-1)).reshape(batch.legal.shape)
  baseline = jnp.sum(batch.past_policies * own, axis=-1, keepdims=True)
  return batch._replace(regrets=jnp.where(batch.legal, own - baseline, 0))


@functools.partial(jax.jit, static_argnames=("apply_fn", "optimizer"))
def epoch(
  state: State,
  game: games.Game,
  observations: jax.Array,
  key: Any,
  *,
  apply_fn: Networks,
  optimizer: optax.GradientTransformation,
  config: Config,
) -> tuple[State, Metrics]:
  """Returns the state after an epoch: play, learn the critic, keep it, learn the actor, keep it.

  Args:
    state: not donated.
    game: the game.
    observations: `[H, n, ...]` as in `sample`.
    key: typed PRNG key.
    apply_fn: the networks.
    optimizer: as in `update`.
    config: hyper-parameters.

  Returns:
    The new state and the metrics of `update`, means over the steps of the network concerned.
  """
  sample_key, learn_key = jax.random.split(key)
  batch = sample(state, game, observations, sample_key, apply_fn=apply_fn, config=config)
  return learn(state, batch, learn_key, apply_fn=apply_fn, optimizer=optimizer, config=config)


@functools.partial(jax.jit, static_argnames=("apply_fn", "optimizer"))
def learn(
  state: State,
  batch: Batch,
  key: Any,
  *,
  apply_fn: Networks,
  optimizer: optax.GradientTransformation,
  config: Config,
) -> tuple[State, Metrics]:
  """Returns the state after an epoch's learning from its episodes, wherever they were played.

  Args:
    state: not donated.
    batch: `config.num_episodes` episodes without regrets.
    key: typed PRNG key; what is random is the order of the episodes.
    apply_fn: the networks.
    optimizer: as in `update`.
    config: hyper-parameters.

  Returns:
    As `epoch`.
  """
  _check_capacity(state, config)
  critic_key, actor_key = jax.random.split(key)
  steps = functools.partial(_learn, apply_fn=apply_fn, optimizer=optimizer, config=config)
  state, critic_metrics = steps(state, batch, critic_key, num_steps=config.num_critic_steps)
  state = keep_critic(state)
  batch = add_regrets(state, batch, apply_fn=apply_fn, config=config)
  state, metrics = steps(state, batch, actor_key, num_steps=config.num_actor_steps)
  played = jnp.sum(batch.mask, dtype=jnp.int32)
  state = next_epoch(state._replace(env_steps=state.env_steps + played))
  return state, metrics | {"armac/critic_loss": critic_metrics["armac/critic_loss"]}


def _learn(
  state: State,
  batch: Batch,
  key: Any,
  *,
  num_steps: int,
  apply_fn: Any,
  optimizer: Any,
  config: Any,
) -> tuple[State, Metrics]:
  """Steps over the episodes in random order, again and again."""
  rounds = -(-num_steps * config.batch_size // config.num_episodes)
  orders = jax.vmap(lambda key: jax.random.permutation(key, config.num_episodes))(
    jax.random.split(key, rounds)
  )
  rows = orders.reshape(-1, config.batch_size)[:num_steps]

  def step(state: State, rows: jax.Array) -> tuple[State, Metrics]:
    part = jax.tree.map(lambda leaf: leaf[rows], batch)
    return update(state, part, key, apply_fn=apply_fn, optimizer=optimizer, config=config)

  state, metrics = jax.lax.scan(step, state, rows)
  return state, jax.tree.map(jnp.mean, metrics)


def keep_critic(state: State) -> State:
  """Returns the state with its critic kept beside the policy of this epoch, which it evaluates."""
  return state._replace(
    past=state.past._replace(critic=_put(state.past.critic, _slot(state), state.params.critic))
  )


def next_epoch(state: State) -> State:
  """Returns the state with its actor kept as the policy of the next epoch."""
  state = state._replace(epoch=state.epoch + 1)
  return state._replace(
    past=state.past._replace(actor=_put(state.past.actor, _slot(state), state.params.actor))
  )


def _check_capacity(state: State, config: Config) -> None:
  held = _capacity(state)
  if held != config.capacity:
    raise ValueError(
      f"config.capacity={config.capacity}, but the state keeps {held} past networks: give init and "
      "epoch one config"
    )


def _capacity(state: State) -> int:
  return len(jax.tree.leaves(state.past)[0])


def _slot(state: State) -> jax.Array:
  return state.epoch % _capacity(state)


def _num_kept(state: State) -> jax.Array:
  """Number of policies that can be drawn: those of epochs 0 to t that are still kept."""
  return jnp.minimum(state.epoch + 1, _capacity(state))


def _take(tree: Any, slots: jax.Array) -> Any:
  return jax.tree.map(lambda leaf: leaf[slots], tree)


def _put(tree: Any, slot: jax.Array, value: Any) -> Any:
  return jax.tree.map(lambda leaf, new: leaf.at[slot].set(new), tree, value)


def policy(
  params: Params, game: games.Game, observations: jax.Array, *, apply_fn: Networks
) -> jax.Array:
  """Returns the mean policy `[S, A]` of the actor at all information states: what to evaluate.

  Args:
    params: of both networks.
    game: the game.
    observations: `[H, n, ...]` as in `sample`.
    apply_fn: the networks.
  """
  own = games.state_observations(game, observations)
  return mean_policy(apply_fn.actor(params.actor, own)[1], game.legal)
