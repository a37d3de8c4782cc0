"""Monte Carlo CFR: regrets from sampled histories, by outcome sampling or external sampling.

The problem, the regrets, the policies and the averages are those of `cfr`; an iteration costs less.
One update samples for each player i in turn and adds unbiased estimates of the player's regrets:

- "outcome" samples one history to its end. Player i explores with a share epsilon of uniform play,
  the others follow their policies, and samples are divided by their probability.
- "external" tries all actions of player i, and samples one of everybody else at each history.

The average policy is accumulated at the states that are visited. "outcome" adds own reach * pi
divided by the sampling probability at the states of player i. "external" adds pi at the states of
the next player.

| paper symbol | here |
|---|---|
| pi_i(z[I]), pi_-i(z[I]), q(z[I]) | own, others' and sampling reach: `own`, `others`, `sampled` |
| epsilon | `Config.epsilon` |

Reference: Lanctot et al. 2009, "Monte Carlo sampling for regret minimization in extensive games",
https://papers.nips.cc/paper/3713. With more than two players the average of "external" is a
heuristic, because the visits of a state also depend on the reach of the other sampled players.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rl_theory import cfr, games, regret_matching, rollouts
from sharding import checks

Metrics = dict[str, jax.Array]
State = cfr.State
SAMPLING = ("outcome", "external")
init, current_policy, average_policy = cfr.init, cfr.current_policy, cfr.average_policy


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["epsilon"],
  meta_fields=["sampling", "num_samples"],
)
@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters.

  Attributes:
    epsilon: in (0, 1], share of uniform play when the updated player samples; "outcome" only. At 0
      actions that are not played would never be explored.
    sampling: "outcome" or "external".
    num_samples: independent samples for each player and update; their estimates are averaged.
  """

  epsilon: Any = 0.6
  sampling: str = "outcome"
  num_samples: int = 1

  def __post_init__(self):
    checks.choice("sampling", self.sampling, SAMPLING)
    checks.count("num_samples", self.num_samples)
    checks.positive("epsilon", self.epsilon)
    checks.probabilities("epsilon", self.epsilon)


@jax.jit
def update(
  state: State, game: games.Game, key: jax.Array, *, config: Config
) -> tuple[State, Metrics]:
  """Returns the state after one sampled iteration of every player in turn.

  Args:
    state: from `init` or an earlier `update` of the same game.
    game: the game.
    key: typed PRNG key.
    config: hyper-parameters.

  Returns:
    The new state, and the metric `mccfr/nodes`: the mean number of histories in a sample.
  """
  checks.given(config)
  traverse = _outcome if config.sampling == "outcome" else _external
  met = []
  for player in range(game.num_players):
    keys = jax.random.split(jax.random.fold_in(key, player), config.num_samples)

    def sample(
      key: jax.Array, player: int = player, regrets: jax.Array = state.regrets
    ) -> "_Increments":
      return traverse(key, game, player, regrets, config)

    found = jax.vmap(sample)(keys)
    state = state._replace(
      regrets=_scatter(state.regrets, found.states, found.actions, found.regrets, config),
      policy_sums=_scatter(
        state.policy_sums, found.policy_states, found.actions, found.policies, config
      ),
    )
    met.append(jnp.mean(found.nodes.astype(state.regrets.dtype)))
  return state._replace(step=state.step + 1), {"mccfr/nodes": jnp.mean(jnp.stack(met))}


def solve(
  game: games.Game,
  key: jax.Array,
  *,
  num_iterations: int,
  config: Config | None = None,
) -> cfr.Solution:
  """Returns the average policy after a number of updates, run as one compiled scan.

  Args:
    game: the game.
    key: typed PRNG key; `jax.vmap` over keys gives independent runs.
    num_iterations: at least 1; each updates every player once.
    config: hyper-parameters; outcome sampling by default.

  Raises:
    ValueError: if `num_iterations` is not a positive integer.
  """
  checks.count("num_iterations", num_iterations)
  return _solve(game, key, Config() if config is None else config, num_iterations)


@functools.partial(jax.jit, static_argnames="num_iterations")
def _solve(game: games.Game, key: jax.Array, config: Config, num_iterations: int) -> cfr.Solution:
  def body(state: State, _: None) -> tuple[State, None]:
    return update(state, game, jax.random.fold_in(key, state.step), config=config)[0], None

  state, _ = jax.lax.scan(body, init(game), length=num_iterations)
  return cfr.Solution(average_policy(game, state), state)


class _Increments(NamedTuple):
  """What one sample adds to the tables, in rows for X histories with at most W children.

  Attributes:
    states: `[X]` the state to which regrets are added; S for none.
    policy_states: `[X]` the state to which the policy is added; S for none.
    actions: `[X, W]` the action of each child; A beyond the last.
    regrets: `[X, W]`.
    policies: `[X, W]`.
    nodes: scalar, the number of histories in the sample.
  """

  states: jax.Array
  policy_states: jax.Array
  actions: jax.Array
  regrets: jax.Array
  policies: jax.Array
  nodes: jax.Array


def _scatter(
  table: jax.Array, states: jax.Array, actions: jax.Array, added: jax.Array, config: Config
) -> jax.Array:
  """Returns the table `[S, A]` with rows added; entries outside the table are dropped."""
  return table.at[states[..., None], actions].add(added / config.num_samples, mode="drop")


class _Local(NamedTuple):
  """A history's children `[W]` with their actions, probabilities and legality; state and mover."""

  children: jax.Array
  actions: jax.Array
  probs: jax.Array
  legal: jax.Array
  state: jax.Array
  player: jax.Array


def _look(game: games.Game, regrets: jax.Array, node: jax.Array) -> _Local:
  """Returns the moves at a history, with a player's probabilities from regret matching."""
  state = game.info_states[node]
  row = jnp.maximum(state, 0)
  found = rollouts.moves(game, node)
  policy = regret_matching.regret_matching(regrets[row], game.legal[row])
  probs = rollouts.move_probs(game, node, found, policy)
  return _Local(found.children, found.actions, probs, found.legal, state, game.players[node])


def _outcome(
  key: jax.Array, game: games.Game, player: int, regrets: jax.Array, config: Config
) -> _Increments:
  """Samples one history to its end; the carried reaches are those of the path to a node."""
  num_states, num_actions = game.legal.shape
  one = jnp.ones((), regrets.dtype)

  def step(carry: Any, chosen: jax.Array) -> tuple[Any, Any]:
    node, own, others, sampled = carry
    moves = _look(game, regrets, node)
    mine, moving = moves.player == player, moves.player != games.TERMINAL
    uniform = moves.legal / jnp.maximum(jnp.sum(moves.legal), 1)
    explored = config.epsilon * uniform + (1 - config.epsilon) * moves.probs
    sampling = jnp.where(mine, explored, moves.probs).astype(regrets.dtype)
    slot = rollouts.draw(chosen, sampling)
    prob = jnp.where(moving, moves.probs[slot], 1)
    drawn = jnp.where(moving, sampling[slot], 1)
    following = (
      jnp.where(moving, moves.children[slot], node),
      jnp.where(mine, own * prob, own),
      jnp.where(mine, others, others * prob),
      sampled * drawn,
    )
    return following, (moves, slot, prob / drawn, drawn, own, others / sampled, own / sampled)

  uniforms = jax.random.uniform(key, (max(len(game.layout.levels) - 1, 1),), regrets.dtype)
  (last, *_), path = jax.lax.scan(step, (jnp.zeros((), jnp.int32), one, one, one), uniforms)
  moves, slots, ratios, drawn, _, others, own = path
  # The importance-weighted value of the sampled path, from the end backwards.
  end = game.utilities[last, player]
  after = jnp.concatenate([jnp.cumprod(ratios[::-1])[::-1][1:], jnp.ones(1, ratios.dtype)]) * end
  taken = jnp.arange(game.layout.max_children) == slots[:, None]
  child_values = jnp.where(taken, (after / drawn)[:, None], 0)
  values = (after * ratios)[:, None]
  mine = moves.player == player
  states = jnp.where(mine, moves.state, num_states)
  return _Increments(
    states=states,
    policy_states=states,
    actions=jnp.where(moves.legal, moves.actions, num_actions),
    regrets=(child_values - values) * others[:, None],
    policies=moves.probs * own[:, None],
    nodes=jnp.sum(moves.player != games.TERMINAL) + 1,
  )


def _external(
  key: jax.Array, game: games.Game, player: int, regrets: jax.Array, config: Config
) -> _Increments:
  """Goes down level by level through the sampled histories, then up with their values."""
  del config
  num_states, num_actions = game.legal.shape
  widths = game.layout.sampling_widths[player]
  next_player = (player + 1) % game.num_players
  uniforms = jax.random.uniform(
    key, (sum(widths),), regrets.dtype
  )  # one draw for all levels is cheaper
  nodes, levels = jnp.zeros(1, jnp.int32), []
  for depth, width in enumerate(widths):
    real = nodes >= 0
    moves = jax.vmap(lambda node: _look(game, regrets, node))(jnp.maximum(nodes, 0))
    start = sum(widths[:depth])
    slots = rollouts.draw(uniforms[start : start + width], moves.probs)
    drawn = jnp.arange(game.layout.max_children) == slots[:, None]
    mine = real & (moves.player == player)
    kept = real[:, None] & moves.legal & (mine[:, None] | drawn)
    places = jnp.cumsum(kept.reshape(-1)).reshape(kept.shape) - 1  # at the next level
    levels.append((nodes, moves, mine, kept, places))
    if depth + 1 < len(widths):
      following = jnp.full(widths[depth + 1], -1, jnp.int32)
      places = jnp.where(kept, places, len(following))
      nodes = following.at[places].set(moves.children, mode="drop")
  values, increments = jnp.zeros(1, regrets.dtype), []
  for nodes, moves, mine, kept, places in reversed(levels):
    below = jnp.where(kept, values[jnp.clip(places, 0, len(values) - 1)], 0)
    weights = jnp.where(mine[:, None], moves.probs, 1)
    ends = game.utilities[jnp.maximum(nodes, 0), player]  # 0 at all but terminal histories
    values = jnp.sum(weights * below, axis=1) + ends
    theirs = (nodes >= 0) & (moves.player == next_player)
    increments.append(
      _Increments(
        states=jnp.where(mine, moves.state, num_states),
        policy_states=jnp.where(theirs, moves.state, num_states),
        actions=jnp.where(moves.legal, moves.actions, num_actions),
        regrets=below - values[:, None],
        policies=moves.probs,
        nodes=jnp.sum(nodes >= 0),
      )
    )
  nodes_met = sum(increment.nodes for increment in increments)
  joined = jax.tree.map(
    lambda *parts: jnp.concatenate(parts),
    *(part._replace(nodes=jnp.zeros(1)) for part in increments),
  )
  return joined._replace(nodes=nodes_met)
