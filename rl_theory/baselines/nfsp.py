"""NFSP: Neural Fictitious Self-Play, deep Q-learning against everybody's average play.

Problem: an equilibrium of a game by fictitious play: each player answers the others' average policy
with a best response, and the average goes to the equilibrium of a two-player zero-sum game. Here
the best response is a Q-network and the average a policy network that imitates it. At the start
of every episode each player decides, alone, to play its best response (with probability eta) or its
average: so all data is play against near-averages, and best responses are seen often enough.

  Q: min E_replay[(r + max_a' Q_target(s', a') - Q(s, a))^2],   s' the player's own next decision
  Pi: min E_reservoir[-log Pi(a | s)]

Every decision goes into its player's replay, whoever played it; what a best response played goes
into the reservoir, a uniform sample of all of it ever.

Reference: Heinrich and Silver 2016, https://arxiv.org/abs/1603.01121. Defaults are those of
OpenSpiel's examples for Kuhn and Leduc poker (one hidden layer of 128, `optax.sgd(0.01)`), except
`reservoir_capacity`, there 2e6.

| paper | here |
|---|---|
| Q(s, a; theta^Q), Pi(s, a; theta^Pi) | `Networks.values`, `Networks.policy` |
| theta^Q, theta^Pi; theta^Q' | `State.params`; `State.target_params`: leaves `[n, ...]` |
| M_RL, M_SL | `State.replay` (circular), `State.reservoir` |
| eta | `Config.anticipatory` |
| epsilon | `epsilon`: from `epsilon_start` to `epsilon_end` |
| 2 updates every 128 steps, of 128 | `Config.learn_every` 64, `batch_size` |
| target refit every 300 updates | `Config.target_period` |

Deviations: epsilon decays exponentially, as in OpenSpiel, the paper's with one over a square root.
Episodes are played `num_episodes` at a time, then their updates are done. Both networks wait until
both buffers of every player hold `learning_starts`. Buffers hold numbers of information states, and
an epoch reads the networks at all of them once: play then costs look-ups only.
"""

import dataclasses
import functools
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sharding
from rl_theory import armac, games, regret_matching, rollouts

Metrics = dict[str, jax.Array]
_COUNTS = (
  "num_episodes", "batch_size", "learn_every", "learning_starts", "target_period",
  "replay_capacity", "reservoir_capacity", "num_microbatches",
)  # fmt: skip
_METRICS = ("loss", "grad_norm", "nfsp/best_response_loss", "nfsp/average_policy_loss")


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["anticipatory", "epsilon_start", "epsilon_end", "epsilon_decay"],
  meta_fields=list(_COUNTS),
)
@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters.

  Attributes:
    anticipatory: eta in (0, 1], how often a player plays its best response in an episode.
    epsilon_start, epsilon_end: in [0, 1], share of uniform play in the best response.
    epsilon_decay: positive, decisions of all players in which e^-1 of the way is left.
    num_episodes: played in an epoch, all with the same networks.
    batch_size: examples of each player and buffer in one update.
    learn_every: decisions of all players for each update.
    learning_starts: what each buffer must hold before the first update.
    target_period: updates between copies of the Q-network into the target network.
    replay_capacity, reservoir_capacity: of each player.
    num_microbatches: parts into which a batch is split to save memory; same result.
  """

  anticipatory: Any = 0.1
  epsilon_start: Any = 0.06
  epsilon_end: Any = 0.001
  epsilon_decay: Any = 3e6
  num_episodes: int = 128
  batch_size: int = 128
  learn_every: int = 64
  learning_starts: int = 1000
  target_period: int = 300
  replay_capacity: int = 200_000
  reservoir_capacity: int = 200_000
  num_microbatches: int = 1

  def __post_init__(self):
    for name, inside, rule in (
      ("anticipatory", lambda x: 0 < x <= 1, "lie in (0, 1]: at 0 nothing teaches the average"),
      ("epsilon_start", lambda x: 0 <= x <= 1, "lie in [0, 1]"),
      ("epsilon_end", lambda x: 0 <= x <= 1, "lie in [0, 1]"),
      ("epsilon_decay", lambda x: x > 0, "be positive: a number of decisions"),
    ):
      value = getattr(self, name)
      if isinstance(value, str) or (isinstance(value, numbers.Real) and not inside(float(value))):
        raise ValueError(f"{name} must {rule}, got {value!r}")
    for name in _COUNTS:
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    if self.learning_starts > min(self.replay_capacity, self.reservoir_capacity):
      raise ValueError(
        f"learning_starts must not exceed replay_capacity={self.replay_capacity} and "
        f"reservoir_capacity={self.reservoir_capacity}, got {self.learning_starts}: learning would "
        "never start"
      )


class Params(NamedTuple):
  """Parameters of the two networks of all players: leaves `[n, ...]`."""

  values: Any
  policy: Any


class Networks(NamedTuple):
  """One player's two networks; functions that hash, such as methods of a Flax module.

  Attributes:
    values: `values(params, observations [B, ...]) -> [B, A]` action values.
    policy: `policy(params, observations [B, ...]) -> [B, A]` logits.
  """

  values: Callable[..., Any]
  policy: Callable[..., Any]


class Batch(NamedTuple):
  """B examples from each player's replay and as many from its reservoir.

  Attributes:
    observations: `[B, n, ...]` what the player has seen at a decision of its own.
    actions: `[B, n]` int, what was played there.
    rewards: `[B, n]` what the player got until its next decision.
    next_observations: `[B, n, ...]` at the player's next decision; anything if there is none.
    next_legal: `[B, n, A]` bool, what is legal there; nothing if there is none.
    imitated_observations: `[B, n, ...]` at a decision that a best response took.
    imitated_legal: `[B, n, A]` bool.
    imitated_actions: `[B, n]` int.
  """

  observations: Any
  actions: Any
  rewards: Any
  next_observations: Any
  next_legal: Any
  imitated_observations: Any
  imitated_legal: Any
  imitated_actions: Any


class Transitions(NamedTuple):
  """Decisions: information state, action, reward, and the own next state, -1 for none."""

  states: jax.Array
  actions: jax.Array
  rewards: jax.Array
  next_states: jax.Array


class Choices(NamedTuple):
  """Actions that best responses took: information state and action."""

  states: jax.Array
  actions: jax.Array


class Buffer(NamedTuple):
  """A memory: `items` with leaves `[C]`, and how many were ever `seen`."""

  items: Any
  seen: jax.Array


class State(NamedTuple):
  """Everything that changes in training.

  Attributes:
    params: of all players' networks.
    target_params: like `params.values`.
    opt_state: of the optimiser of both networks.
    step: scalar int32, updates done.
    env_steps: scalar int32, decisions played.
    replay: `Buffer` of `Transitions`, leaves `[n, ...]`.
    reservoir: `Buffer` of `Choices`, leaves `[n, ...]`.
  """

  params: Any
  target_params: Any
  opt_state: Any
  step: jax.Array
  env_steps: jax.Array
  replay: Any
  reservoir: Any


# --- losses and policies ---


def best_response_loss(
  values: jax.Array,
  actions: jax.Array,
  rewards: jax.Array,
  next_values: jax.Array,
  *,
  next_legal: jax.Array,
) -> jax.Array:
  """Returns the squared error of the played action's value to its Q-learning target.

  Args:
    values: `[..., A]`.
    actions: `[...]` int.
    rewards: `[...]`.
    next_values: `[..., A]` of the target network.
    next_legal: `[..., A]` bool; a row without any is the end of the episode.

  Returns:
    `[...]`; gradients reach `values` only.

  Example:
    >>> best_response_loss(
    ...   jnp.array([1.0, 0.0]), jnp.array(0), jnp.array(0.5), jnp.array([9.0, 2.0]),
    ...   next_legal=jnp.array([False, True]))
    Array(2.25, dtype=float32)
  """
  best = jnp.max(jnp.where(next_legal, next_values, -jnp.inf), axis=-1)
  best = jnp.where(jnp.any(next_legal, axis=-1), best, 0)
  taken = jnp.take_along_axis(values, actions[..., None], -1)[..., 0]
  return (taken - jax.lax.stop_gradient(rewards + best)) ** 2


def average_policy_loss(logits: jax.Array, actions: jax.Array, *, legal: jax.Array) -> jax.Array:
  """Returns -log of the probability that the average policy gives to what was played.

  Args:
    logits: `[..., A]`.
    actions: `[...]` int.
    legal: `[..., A]` bool.

  Returns:
    `[...]` nats.

  Example:
    >>> average_policy_loss(jnp.zeros(3), jnp.array(0), legal=jnp.array([True, True, False]))
    Array(0.6931472, dtype=float32)
  """
  played = jax.nn.one_hot(actions, logits.shape[-1], dtype=logits.dtype)
  return armac.mean_policy_loss(logits, played, legal=legal)


def best_response(values: jax.Array, legal: jax.Array, epsilon: Any) -> jax.Array:
  """Returns the probabilities `[..., A]` of epsilon-greedy play among legal actions."""
  greedy = jnp.argmax(jnp.where(legal, values, -jnp.inf), axis=-1)
  greedy = jax.nn.one_hot(greedy, values.shape[-1], dtype=values.dtype)
  uniform = regret_matching.normalise(jnp.zeros_like(values), legal)
  return epsilon * uniform + (1 - epsilon) * greedy


def epsilon(env_steps: jax.Array, config: Config) -> jax.Array:
  """Returns the share of uniform play after a number of decisions."""
  left = jnp.exp(-env_steps / config.epsilon_decay)
  return config.epsilon_end + (config.epsilon_start - config.epsilon_end) * left


# --- memories; a player each, map over players with `jax.vmap` ---


def add_to_replay(buffer: Buffer, items: Any, mask: jax.Array) -> Buffer:
  """Returns the circular buffer with the items `[M]` that the mask selects, the oldest gone."""
  capacity, rank, count = _ranked(buffer, mask)
  kept = mask & (rank >= count - capacity)
  places = jnp.where(kept, (buffer.seen + rank) % capacity, capacity)
  return Buffer(_put(buffer.items, places, items), buffer.seen + count)


def add_to_reservoir(buffer: Buffer, items: Any, mask: jax.Array, key: Any) -> Buffer:
  """Returns the reservoir after the selected items `[M]` in turn: Vitter's algorithm R.

  Each item ever seen is held with the same probability: item number i (from 0) takes place i, or
  once the reservoir is full, place j uniform in [0, i] if there is one.
  """
  capacity, rank, count = _ranked(buffer, mask)
  number = jnp.maximum(buffer.seen + rank, 0)
  drawn = jax.random.randint(key, mask.shape, 0, number + 1)
  places = jnp.where(number < capacity, number, drawn)
  places = jnp.where(mask & (places < capacity), places, capacity)
  # Of those for one place the last stays: a scatter alone leaves open which.
  order = jnp.argsort(places, stable=True)
  places = places[order]
  last = jnp.append(places[1:] != places[:-1], True)
  items = jax.tree.map(lambda leaf: leaf[order], items)
  places = jnp.where(last, places, capacity)
  return Buffer(_put(buffer.items, places, items), buffer.seen + count)


def _ranked(buffer: Buffer, mask: jax.Array) -> tuple[int, jax.Array, jax.Array]:
  """Returns the capacity, each item's number among the selected, and how many these are."""
  capacity = jax.tree.leaves(buffer.items)[0].shape[0]
  return capacity, jnp.cumsum(mask, dtype=jnp.int32) - 1, jnp.sum(mask, dtype=jnp.int32)


def _put(held: Any, places: jax.Array, items: Any) -> Any:
  """Returns the arrays with items written; places beyond the end are dropped."""
  return jax.tree.map(lambda leaf, new: leaf.at[places].set(new, mode="drop"), held, items)


# --- one optimisation step ---


def init(params: Params, *, optimizer: optax.GradientTransformation, config: Config) -> State:
  """Returns the state before the first epoch.

  Args:
    params: leaves `[n, ...]`, from `jax.vmap` of a network's initialiser over n keys; n is the
      number of players.
    optimizer: the one that `update` will get. For two learning rates use
      `optax.multi_transform({"values": ..., "policy": ...}, Params("values", "policy"))`.
    config: hyper-parameters.
  """
  num_players = len(jax.tree.leaves(params)[0])

  def empty(cls: Any, capacity: int, **dtypes: Any) -> Buffer:
    shape = (num_players, capacity)
    items = cls(*(jnp.zeros(shape, dtypes.get(name, jnp.int32)) for name in cls._fields))
    return Buffer(items, jnp.zeros(num_players, jnp.int32))

  return State(
    params=params,
    target_params=jax.tree.map(jnp.copy, params.values),
    opt_state=optimizer.init(params),
    step=jnp.zeros((), jnp.int32),
    env_steps=jnp.zeros((), jnp.int32),
    replay=empty(Transitions, config.replay_capacity, rewards=jnp.float32),
    reservoir=empty(Choices, config.reservoir_capacity),
  )


def loss(
  params: Params, state: Any, batch: Batch, key: Any, *, apply_fn: Networks, config: Config
) -> tuple[jax.Array, tuple[Metrics, Any]]:
  """Returns the sum of both networks' mean losses; neither has a gradient of the other's.

  Args:
    params: the only input to differentiate.
    state: whose target network is used.
    batch: B examples.
    key: unused: nothing is random.
    apply_fn: the networks.
    config: unused; every algorithm's `loss` takes it.

  Returns:
    The scalar loss, a mean over examples of sums over players (each learns as if it were alone),
    and `(metrics, ())`.
  """
  del key, config
  values, logits = (jax.vmap(f, in_axes=(0, 1), out_axes=1) for f in apply_fn)
  responses = best_response_loss(
    values(params.values, batch.observations),
    batch.actions,
    batch.rewards,
    values(state.target_params, batch.next_observations),
    next_legal=batch.next_legal,
  )
  averages = average_policy_loss(
    logits(params.policy, batch.imitated_observations),
    batch.imitated_actions,
    legal=batch.imitated_legal,
  )
  response, average = (jnp.mean(jnp.sum(losses, axis=1)) for losses in (responses, averages))
  value = response + average
  metrics = {"nfsp/best_response_loss": response, "nfsp/average_policy_loss": average}
  return value, ({"loss": value, **metrics}, ())


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
  """Returns the state after one step of all players' networks.

  Args:
    state: not donated; its buffers are left alone.
    batch: B examples, from `draw`; `config.num_microbatches` must divide B.
    key: unused: nothing is random.
    apply_fn: the networks.
    optimizer: any optax transformation; build it once, a rebuilt one compiles again.
    config: hyper-parameters.

  Returns:
    The new state; metrics `loss`, `grad_norm`, `nfsp/best_response_loss` (squared utility) and
    `nfsp/average_policy_loss` (nats), both summed over players.
  """
  grad_fn = sharding.accumulate_grads(loss, config.num_microbatches)
  (_, (metrics, _)), grads = grad_fn(
    state.params, state, batch, key, apply_fn=apply_fn, config=config
  )
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params, step = optax.apply_updates(state.params, updates), state.step + 1
  copied = step % config.target_period == 0
  target_params = jax.tree.map(
    lambda new, old: jnp.where(copied, new, old), params.values, state.target_params
  )
  metrics["grad_norm"] = optax.global_norm(grads)
  state = state._replace(params=params, target_params=target_params, opt_state=opt_state, step=step)
  return state, metrics


# --- episodes and epochs ---


class Episodes(NamedTuple):
  """What an epoch played, by player.

  Attributes:
    transitions: leaves `[n, B, T]`.
    mask: `[n, B, T]` bool, true at the player's decisions.
    by_best_response: `[n, B]` bool, how the player chose to play the episode.
  """

  transitions: Transitions
  mask: jax.Array
  by_best_response: jax.Array


@functools.partial(jax.jit, static_argnames="apply_fn")
def sample(
  state: State,
  game: games.Game,
  observations: jax.Array,
  key: Any,
  *,
  apply_fn: Networks,
  config: Config,
) -> Episodes:
  """Returns the episodes of an epoch, played on the device.

  Args:
    state: whose networks play.
    game: the game.
    observations: `[H, n, ...]` what each player has seen at each history, such as
      `games.information_state_tensors`.
    key: typed PRNG key.
    apply_fn: the networks.
    config: hyper-parameters.
  """
  mode_key, play_key = jax.random.split(key)
  values = _at_states(apply_fn.values, state.params.values, game, observations)
  responses = best_response(values, game.legal, epsilon(state.env_steps, config))
  averages = policy(state.params, game, observations, apply_fn=apply_fn)
  shape = (game.num_players, config.num_episodes)
  by_best_response = jax.random.bernoulli(mode_key, config.anticipatory, shape)

  def step(nodes: jax.Array, key: Any) -> tuple[jax.Array, Any]:
    players, states = game.players[nodes], jnp.maximum(game.info_states[nodes], 0)
    responds = by_best_response[jnp.maximum(players, 0), jnp.arange(config.num_episodes)]
    policies = jnp.where(responds[:, None], responses[states], averages[states])
    following, actions = rollouts.advance(game, nodes, policies, key)
    return following, (states, actions, players)

  keys = jax.random.split(play_key, max(len(game.layout.levels) - 1, 1))
  last, path = jax.lax.scan(step, jnp.zeros(config.num_episodes, jnp.int32), keys)
  states, actions, players = (x.T for x in path)  # [B, T]
  mask = players == jnp.arange(game.num_players)[:, None, None]
  # The player's next decision: the first place from t + 1 on, T for none.
  num_steps = len(keys)
  places = jnp.where(mask, jnp.arange(num_steps), num_steps)
  following = jax.lax.cummin(places, axis=2, reverse=True)[..., 1:]
  following = jnp.pad(following, ((0, 0), (0, 0), (0, 1)), constant_values=num_steps)
  padded = jnp.pad(states, ((0, 0), (0, 1)), constant_values=-1)
  next_states = jnp.take_along_axis(
    jnp.broadcast_to(padded, (len(mask), *padded.shape)), following, -1
  )
  rewards = jnp.where(next_states < 0, game.utilities[last].T[..., None], 0)
  transitions = Transitions(
    jnp.broadcast_to(states, mask.shape),
    jnp.where(mask, actions, 0),  # chance's have numbers of their own
    rewards.astype(jnp.float32),
    next_states,
  )
  return Episodes(transitions, mask, by_best_response)


@jax.jit
def remember(state: State, episodes: Episodes, key: Any) -> State:
  """Returns the state with the episodes in its memories."""
  transitions, mask = jax.tree.map(
    lambda x: x.reshape(len(x), -1), (episodes.transitions, episodes.mask)
  )
  imitated = (episodes.mask & episodes.by_best_response[..., None]).reshape(mask.shape)
  keys = jax.random.split(key, len(mask))
  choices = Choices(transitions.states, transitions.actions)
  return state._replace(
    env_steps=state.env_steps + jnp.sum(mask, dtype=jnp.int32),
    replay=jax.vmap(add_to_replay)(state.replay, transitions, mask),
    reservoir=jax.vmap(add_to_reservoir)(state.reservoir, choices, imitated, keys),
  )


@functools.partial(jax.jit, static_argnames="batch_size")
def draw(state: State, game: games.Game, seen: jax.Array, key: Any, *, batch_size: int) -> Batch:
  """Returns a batch drawn from the memories, uniformly and with replacement.

  Args:
    state: whose memories are not empty.
    game: the game.
    seen: `[S, ...]` from `games.state_observations`.
    key: typed PRNG key.
    batch_size: B, from each player and memory.
  """

  def choose(buffer: Buffer, key: Any) -> Any:
    players, capacity = jax.tree.leaves(buffer.items)[0].shape
    held = jnp.minimum(buffer.seen, capacity)
    places = jax.random.randint(key, (batch_size, players), 0, held)
    return jax.tree.map(lambda leaf: leaf[jnp.arange(players), places], buffer.items)

  replay_key, reservoir_key = jax.random.split(key)
  replayed, imitated = choose(state.replay, replay_key), choose(state.reservoir, reservoir_key)
  next_states = jnp.maximum(replayed.next_states, 0)
  return Batch(
    observations=seen[replayed.states],
    actions=replayed.actions,
    rewards=replayed.rewards,
    next_observations=seen[next_states],
    next_legal=game.legal[next_states] & (replayed.next_states >= 0)[..., None],
    imitated_observations=seen[imitated.states],
    imitated_legal=game.legal[imitated.states],
    imitated_actions=imitated.actions,
  )


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
  """Returns the state after an epoch: play, remember, and the updates that the play calls for.

  Args:
    state: not donated; many epochs are best run as one `jax.lax.scan`.
    game: the game.
    observations: `[H, n, ...]` as in `sample`.
    key: typed PRNG key.
    apply_fn: the networks.
    optimizer: as in `update`.
    config: hyper-parameters.

  Returns:
    The new state and the metrics of `update`, means over the updates; 0 where there were none.

  Raises:
    ValueError: if the state is of another number of players, or its memories of other sizes.
  """
  _check_state(state, game, config)
  sample_key, remember_key, draw_key = jax.random.split(key, 3)
  episodes = sample(state, game, observations, sample_key, apply_fn=apply_fn, config=config)
  before, state = state.env_steps, remember(state, episodes, remember_key)
  due = state.env_steps // config.learn_every - before // config.learn_every
  held = jnp.minimum(jnp.min(state.replay.seen), jnp.min(state.reservoir.seen))
  due = jnp.where(held >= config.learning_starts, due, 0)
  full, seen = state, games.state_observations(game, observations)

  def learn(index: jax.Array, carry: tuple[State, Metrics]) -> tuple[State, Metrics]:
    state, sums = carry
    step_key = jax.random.fold_in(draw_key, index)
    batch = draw(full, game, seen, step_key, batch_size=config.batch_size)
    state, metrics = update(
      state, batch, None, apply_fn=apply_fn, optimizer=optimizer, config=config
    )
    return state, jax.tree.map(jnp.add, sums, metrics)

  # Without the memories: a loop of unequal lengths under `vmap` copies all that it carries.
  start = state._replace(replay=(), reservoir=()), {name: jnp.zeros(()) for name in _METRICS}
  state, sums = jax.lax.fori_loop(0, due, learn, start)
  metrics = {name: value / jnp.maximum(due, 1) for name, value in sums.items()}
  return state._replace(replay=full.replay, reservoir=full.reservoir), metrics


def _check_state(state: State, game: games.Game, config: Config) -> None:
  found = (*state.replay.items.states.shape, state.reservoir.items.states.shape[1])
  expected = (game.num_players, config.replay_capacity, config.reservoir_capacity)
  if found != expected:
    raise ValueError(
      f"the state is of {found[0]} players with memories of {found[1]} and {found[2]}, but the "
      f"game has {expected[0]} and config asks for {expected[1]} and {expected[2]}: give init one "
      "set of parameters a player, and epoch the config of init"
    )


def _at_states(network: Any, params: Any, game: games.Game, observations: jax.Array) -> jax.Array:
  """Returns `[S, A]` what each player's network says at its information states."""
  seen = games.state_observations(game, observations)
  rows = []
  for player in range(game.num_players):
    own = jax.tree.map(lambda leaf, k=player: leaf[k], params)
    rows.append(network(own, seen[game.layout.player_slice(player)]))
  return jnp.concatenate(rows)


def policy(
  params: Params, game: games.Game, observations: jax.Array, *, apply_fn: Networks
) -> jax.Array:
  """Returns the average policy `[S, A]` at all information states: what to evaluate.

  Args:
    params: of all players' networks.
    game: the game.
    observations: `[H, n, ...]` as in `sample`.
    apply_fn: the networks.
  """
  return armac.mean_policy(
    _at_states(apply_fn.policy, params.policy, game, observations), game.legal
  )
