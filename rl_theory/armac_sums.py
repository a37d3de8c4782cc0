"""ARMAC on a compiled game, from sums over all episodes: no past networks, no minibatch noise.

`armac_epochs` is the paper's form. It draws a past epoch j for each episode and learns from the
episodes of one epoch. Its mean regrets shrink as epochs pass, while the noise of their labels does
not, and on Leduc poker this noise is what limits it (docs/results/games.md). A game that fits into
memory allows this form instead:

1. Epoch t plays pi^t: player i explores with uniform play, the others play pi^t.
2. The critic learns q_{pi^t} from the episodes of the last epochs. Tree-Backup needs no importance
   ratios, so their targets are computed again under pi^t. The targets of one action at one history
   are averaged before the network sees them.
3. Each decision of the explorer gets a label, the advantages of pi^t, and each decision of the
   others gets pi^t. They are added to the sums of their information state, and stay there.
4. The actor learns the means of all states at once. Then pi^{t+1} = RM(W).

In expectation this is the same method: an episode that is drawn from the sums has a past epoch j
that is uniform, or in proportion to (j + 1)^p (see `Config.recency`), and its labels come from the
critic of epoch j. The gradient of the actor's loss is that of `armac.loss_actor` on all episodes so
far, weighted alike (`test_the_means_have_the_gradient_of_all_episodes`). With exact expectations
the policies are those of CFR, or of linear CFR for p = 1
(`test_with_exact_expectations_the_sums_are_cfr`). So is the mean policy with two players; with more
it is also weighted by the reach of the others.

Deviations from the paper: an episode is labelled once and kept, so no past networks are; the
explorer is the same in all epochs, because it cancels only then; the networks see means in place of
samples. A step of the critic draws episodes, then one decision of each, and weighs the actions seen
there alike. A fixed explorer and a history value network are also the choices of ESCHER
(arXiv:2206.04122).

Reference: Gruslys et al. 2020, https://arxiv.org/abs/2008.12234.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rl_theory import armac, games, policy_arrays
from sharding import checks

_COUNTS = (
  "num_episodes", "replay_epochs", "num_rounds", "batch_size", "num_critic_steps",
  "num_actor_steps",
)  # fmt: skip


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["trace_decay", "recency"],
  meta_fields=list(_COUNTS),
)
@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters.

  Attributes:
    trace_decay: lambda in [0, 1] of Tree-Backup.
    recency: p >= 0: epoch j has weight (j + 1)^p in the sums. 0 is CFR in expectation, 1 is linear
      CFR.
    num_episodes: N, episodes in an epoch.
    replay_epochs: number of epochs whose episodes the critic learns from.
    num_rounds: how often an epoch computes the critic's targets; must divide `num_critic_steps`.
    batch_size: decisions in a step of the critic. A step of the actor sees all states.
    num_critic_steps, num_actor_steps: optimisation steps in an epoch.
  """

  trace_decay: Any = 1.0
  recency: Any = 1.0
  num_episodes: int = 1024
  replay_epochs: int = 16
  num_rounds: int = 8
  batch_size: int = 512
  num_critic_steps: int = 64
  num_actor_steps: int = 64

  def __post_init__(self):
    checks.probabilities("trace_decay", self.trace_decay)
    checks.not_negative("recency", self.recency)
    for name in ("trace_decay", "recency"):
      if np.ndim(getattr(self, name)):
        raise ValueError(f"{name} must be one number, got shape {np.shape(getattr(self, name))}")
    for name in _COUNTS:
      checks.count(name, getattr(self, name))
    if self.num_critic_steps % self.num_rounds:
      raise ValueError(
        f"num_rounds must divide num_critic_steps={self.num_critic_steps}, got {self.num_rounds}"
      )


class Decisions(NamedTuple):
  """The D histories of a game at which a player decides, from `decisions`.

  Attributes:
    numbers: `[H]` int, the number of each history among them, 0 at all others.
    histories: `[D]` int.
    players, states: `[D]` int, who decides, and the information state.
    legal: `[D, A]` bool.
    observations: `[D, n, ...]` each player's observation.
    own_observations: `[S, ...]` that of the player who decides, at each information state.
  """

  numbers: jax.Array
  histories: jax.Array
  players: jax.Array
  states: jax.Array
  legal: jax.Array
  observations: jax.Array
  own_observations: jax.Array


class Episodes(NamedTuple):
  """Episodes of at most T decisions, in order.

  Attributes:
    decisions: `[B, T]` int, numbers of `Decisions`; 0 in the padding.
    actions: `[B, T]` int.
    mask: `[B, T]` bool, false in the padding and in places of the memory that are still empty.
    learners: `[B]` int, the player who explored.
    utilities: `[B, n]`.
  """

  decisions: jax.Array
  actions: jax.Array
  mask: jax.Array
  learners: jax.Array
  utilities: jax.Array


class Sums(NamedTuple):
  """What all episodes taught, by information state; the newest epoch has weight 1.

  Attributes:
    regrets: `[S, A]` sums of advantages at the explorers' decisions.
    regret_counts: `[S]` number of these decisions.
    policies: `[S, A]` sums of policies at the others' decisions.
    policy_counts: `[S]` number of these decisions.
    episodes: scalar, number of episodes.
  """

  regrets: jax.Array
  regret_counts: jax.Array
  policies: jax.Array
  policy_counts: jax.Array
  episodes: jax.Array


class ActorBatch(NamedTuple):
  """What the actor learns from: all information states, and the sums.

  Attributes:
    observations: `[S, ...]` of the player who decides.
    legal: `[S, A]` bool.
    sums: from the episodes.
  """

  observations: jax.Array
  legal: jax.Array
  sums: Sums


class CriticBatch(NamedTuple):
  """What the critic learns from.

  Attributes:
    observations: `[B, n, ...]` each player's observation at a decision.
    targets: `[B, n, A]` mean Tree-Backup targets.
    seen: `[B, A]` bool, the actions that have any.
  """

  observations: jax.Array
  targets: jax.Array
  seen: jax.Array


class State(NamedTuple):
  """Everything that changes in training.

  Attributes:
    params: `armac.Params` of the actor and the critic.
    opt_state: `armac.Params` of optimiser states.
    policy: `[S, A]` pi^t.
    sums: over the episodes of epochs 0 to t - 1.
    memory: the episodes of the last epochs, leaves `[replay_epochs, num_episodes, ...]`.
    step: scalar int32, optimisation steps done.
    epoch: scalar int32, t.
    env_steps: scalar int32, decisions played so far.
  """

  params: armac.Params
  opt_state: armac.Params
  policy: jax.Array
  sums: Sums
  memory: Episodes
  step: jax.Array
  epoch: jax.Array
  env_steps: jax.Array


def decisions(game: games.Game, observations: jax.Array) -> Decisions:
  """Returns the decisions of a game. Call it outside of `jit`: D depends on the game.

  Args:
    game: the game.
    observations: `[H, n, ...]` each player's observation at each history, such as
      `games.information_state_tensors`.

  Raises:
    ValueError: if `observations` does not have one row for each history.
  """
  observations = jnp.asarray(observations)
  sizes = (len(game.parents), game.num_players)
  if observations.ndim < 3 or observations.shape[:2] != sizes:
    raise ValueError(
      f"observations must have shape [H, n, ...] with H, n = {sizes} for {game.layout.name}, got "
      f"{observations.shape}"
    )
  players = np.asarray(game.players)
  histories = np.flatnonzero(players >= 0)
  numbers = np.zeros(len(players), np.int32)
  numbers[histories] = np.arange(len(histories))
  states = game.info_states[histories]
  return Decisions(
    numbers=jnp.asarray(numbers),
    histories=jnp.asarray(histories, jnp.int32),
    players=game.players[histories],
    states=states,
    legal=game.legal[states],
    observations=observations[histories],
    own_observations=games.state_observations(game, observations),
  )


def init(
  params: armac.Params,
  game: games.Game,
  *,
  optimizer: optax.GradientTransformation,
  config: Config,
) -> State:
  """Returns the state before the first epoch, whose policy is uniform.

  Args:
    params: of an actor and a critic.
    game: the game.
    optimizer: the one that the updates will get; each network has its own optimiser state.
    config: only `num_episodes` and `replay_epochs` are used.
  """
  rows = (config.replay_epochs, config.num_episodes)
  checks.count("config.replay_epochs * config.num_episodes", rows[0] * rows[1])
  shape = (*rows, num_steps(game))
  memory = Episodes(
    decisions=jnp.zeros(shape, jnp.int32),
    actions=jnp.zeros(shape, jnp.int32),
    mask=jnp.zeros(shape, bool),
    learners=jnp.zeros(rows, jnp.int32),
    utilities=jnp.zeros((*rows, game.num_players), game.utilities.dtype),
  )
  table = jnp.zeros(game.legal.shape, game.utilities.dtype)
  sums = Sums(table, table[:, 0], table, table[:, 0], jnp.zeros((), table.dtype))
  opt_state = armac.Params(optimizer.init(params.actor), optimizer.init(params.critic))
  policy = policy_arrays.uniform(game)
  return State(
    params, opt_state, policy, sums, memory, *(jnp.zeros((), jnp.int32) for _ in range(3))
  )


def num_steps(game: games.Game) -> int:
  """Returns T, the largest number of decisions in an episode, or a bound on it."""
  return min(max(len(game.layout.levels) - 1, 1), sum(map(len, game.layout.state_levels)))


# --- one optimisation step of one network ---


def loss_actor(
  params: armac.Params,
  state: Any,
  batch: ActorBatch,
  key: Any,
  *,
  apply_fn: armac.Networks,
  config: Any,
) -> tuple[jax.Array, tuple[armac.Metrics, Any]]:
  """Returns the actor's loss, a mean over all episodes of sums over decisions, and `(metrics, ())`.

  The squared error to a mean label and that to the labels themselves differ by the variance of the
  labels. So this loss has the gradient of `armac.loss_actor`.
  """
  del state, key, config
  sums, legal = batch.sums, batch.legal
  regrets, logits = apply_fn.actor(params.actor, batch.observations)
  targets = _mean(sums.regrets, sums.regret_counts)
  policies = _mean(sums.policies, sums.policy_counts)
  regret = sums.regret_counts * armac.regret_loss(regrets, targets, legal=legal)
  policy = sums.policy_counts * armac.mean_policy_loss(logits, policies, legal=legal)
  regret, policy = (jnp.sum(x) / jnp.maximum(sums.episodes, 1) for x in (regret, policy))
  value = regret + policy
  return value, ({"loss": value, "armac/regret_loss": regret, "armac/policy_loss": policy}, ())


def _mean(sums: jax.Array, counts: jax.Array) -> jax.Array:
  counts = counts[:, None]
  return jnp.where(counts > 0, sums / jnp.where(counts > 0, counts, 1), 0)


def loss_critic(
  params: armac.Params,
  state: Any,
  batch: CriticBatch,
  key: Any,
  *,
  apply_fn: armac.Networks,
  config: Any,
) -> tuple[jax.Array, tuple[armac.Metrics, Any]]:
  """Returns the critic's loss, the squared error of the actions seen, and `(metrics, ())`."""
  del state, key, config
  values = apply_fn.critic(params.critic, batch.observations)
  errors = jnp.where(batch.seen[:, None], values - jax.lax.stop_gradient(batch.targets), 0)
  value = jnp.mean(jnp.sum(errors**2, axis=(1, 2)))
  return value, ({"loss": value, "armac/critic_loss": value}, ())


@functools.partial(jax.jit, static_argnames=("apply_fn", "optimizer"))
def update_actor(
  state: State,
  batch: ActorBatch,
  key: Any,
  *,
  apply_fn: armac.Networks,
  optimizer: optax.GradientTransformation,
  config: Config,
) -> tuple[State, armac.Metrics]:
  """Returns the state after one step of the actor; see `armac.update_actor`."""
  return armac.step_network(
    "actor", loss_actor, state, batch, key, apply_fn=apply_fn, optimizer=optimizer, config=config
  )


@functools.partial(jax.jit, static_argnames=("apply_fn", "optimizer"))
def update_critic(
  state: State,
  batch: CriticBatch,
  key: Any,
  *,
  apply_fn: armac.Networks,
  optimizer: optax.GradientTransformation,
  config: Config,
) -> tuple[State, armac.Metrics]:
  """Returns the state after one step of the critic; see `armac.update_critic`."""
  return armac.step_network(
    "critic", loss_critic, state, batch, key, apply_fn=apply_fn, optimizer=optimizer, config=config
  )
