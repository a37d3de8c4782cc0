"""Counterfactual regret minimisation: CFR, CFR+, linear, discounted and predictive CFR.

Problem: an equilibrium of a game with imperfect information. Regret matching runs at every
information state on the regrets r(s, a) = sum over h in s of the others' reach times
(q(h, a) - v(h)). The average of the policies, weighted by the player's own reach, converges to
an equilibrium in two-player zero-sum games. The last policy need not converge.

One iteration t = 1, 2, ...:

  R <- (R + r) where r are the regrets of pi = RM(R), then
  positive R <- R t^alpha / (t^alpha + 1), negative R <- R t^beta / (t^beta + 1),
  C <- C ((t - 1) / t)^gamma + own reach * pi        (weights t^gamma, up to a constant)

| variant | alpha | beta | gamma | pi |
|---|---|---|---|---|
| "cfr" | inf (keep all) | inf | 0 | RM(R) |
| "cfr+" | inf | -inf (forget all) | 1 | RM(R) |
| "linear" | 1 | 1 | 1 | RM(R) |
| "discounted" | 1.5 | 0 | 2 | RM(R) |
| "predictive" (predictive CFR+) | inf | -inf | 2 | RM(R + m) |

Predictive CFR+ plays as if a prediction m of the next regrets had come true already. The prediction
is the last regrets r of the same state. Regret matching+ with predictions has regret at most
sqrt(2 sum over t of |r^t - m^t|^2), so play that changes slowly has little regret.

| paper symbol | here |
|---|---|
| R^t(I, a) | `State.regrets` |
| C^t(I, a) | `State.policy_sums` |
| alpha, beta, gamma | `Config.positive_discount`, `negative_discount`, `averaging_power` |
| m^t = r^{t-1} | `State.last_regrets`, with `Config.predictive` |

With `alternating` the players are updated in turn, each against the newest policies of the players
before it; otherwise all players are updated at once. With more than two players or general sums the
updates are the same, but convergence is no longer guaranteed.

In symmetric games actions tie exactly, and regret matching is discontinuous there: if all regrets
are 0 it plays uniformly, but a regret of 1e-17 that comes from rounding alone would be played with
probability 1. So a regret r counts as 0 if it is no larger than the rounding error of its sum: 8
units in the last place of the largest utility, times chance's reach of the state. This keeps the
ties of exact arithmetic and changes the bound on the average policy by no more than that rounding.

References: Zinkevich et al. 2007 (CFR), Tammelin 2014, https://arxiv.org/abs/1407.5042 (CFR+),
Brown and Sandholm 2019, https://arxiv.org/abs/1809.04040 (linear and discounted CFR), Farina, Kroer
and Sandholm 2021, https://arxiv.org/abs/2007.14358 (predictive CFR+).
"""

import dataclasses
import functools
import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rl_theory import game_tree, games, policy_arrays, regret_matching, segments
from sharding import checks

Metrics = dict[str, jax.Array]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["positive_discount", "negative_discount", "averaging_power"],
  meta_fields=["alternating", "predictive"],
)
@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters; the defaults are plain CFR. `jax.vmap` can map over the numbers.

  Attributes:
    positive_discount: alpha: positive regrets are multiplied by t^alpha / (t^alpha + 1), which is
      1 for inf.
    negative_discount: beta, the same for negative regrets; -inf sets them to 0 (CFR+).
    averaging_power: gamma >= 0: iteration t has weight t^gamma in the average.
    alternating: whether to update the players in turn instead of all at once.
    predictive: whether to play regret matching on the regrets plus the last iteration's.
  """

  positive_discount: Any = math.inf
  negative_discount: Any = math.inf
  averaging_power: Any = 0.0
  alternating: bool = True
  predictive: bool = False

  def __post_init__(self):
    for name in ("positive_discount", "negative_discount"):  # infinite ones have a meaning
      value = getattr(self, name)
      if isinstance(value, str) or (isinstance(value, numbers.Real) and math.isnan(value)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    checks.not_negative("averaging_power", self.averaging_power)


VARIANTS = {
  "cfr": Config(),
  "cfr+": Config(math.inf, -math.inf, 1.0),
  "linear": Config(1.0, 1.0, 1.0),
  "discounted": Config(1.5, 0.0, 2.0),
  "predictive": Config(math.inf, -math.inf, 2.0, predictive=True),
}


class State(NamedTuple):
  """What an iteration changes. `current_policy` and `average_policy` turn it into policies.

  Attributes:
    regrets: `[S, A]` cumulative regrets, discounted as in the table; 0 for illegal actions.
    policy_sums: `[S, A]` sums of own reach times policy, weighted as in the table.
    step: scalar int32, iterations done.
    last_regrets: `[S, A]` regrets of the last iteration; None unless `Config.predictive`.
  """

  regrets: jax.Array
  policy_sums: jax.Array
  step: jax.Array
  last_regrets: Any = None


class Solution(NamedTuple):
  """The result of `solve`.

  Attributes:
    average_policy: `[S, A]`, which converges to an equilibrium.
    state: from which `update` can continue.
  """

  average_policy: jax.Array
  state: Any


def make_config(variant: str, *, alternating: bool = True) -> Config:
  """Returns the hyper-parameters of a variant, one of `VARIANTS`."""
  checks.choice("variant", variant, list(VARIANTS))
  return dataclasses.replace(VARIANTS[variant], alternating=alternating)


def init(game: games.Game, config: Config | None = None) -> State:
  """Returns the state before the first iteration, whose policy is uniform.

  Args:
    game: the game.
    config: only `predictive` is used; None means plain CFR.
  """
  zeros = jnp.zeros(game.legal.shape, game.utilities.dtype)
  last = jnp.zeros_like(zeros) if config is not None and config.predictive else None
  return State(zeros, jnp.zeros_like(zeros), jnp.zeros((), jnp.int32), last)


def current_policy(game: games.Game, state: State) -> jax.Array:
  """Returns the policy `[S, A]` that the next iteration plays."""
  last = 0 if state.last_regrets is None else state.last_regrets
  return regret_matching.regret_matching(state.regrets + last, game.legal)


def average_policy(game: games.Game, state: State) -> jax.Array:
  """Returns the average policy `[S, A]`, uniform at states that the player's own moves avoid."""
  return regret_matching.normalise(state.policy_sums, game.legal)


@jax.jit
def update(
  state: State, game: games.Game, key: Any = None, *, config: Config
) -> tuple[State, Metrics]:
  """Returns the state after one iteration.

  Args:
    state: from `init` or an earlier `update` of the same game; `init` needs the config if it is
      predictive.
    game: the game.
    key: not used, since nothing is random; `mccfr.update` needs one.
    config: hyper-parameters; other numbers do not compile again.

  Returns:
    The new state, and the metric `cfr/regret_bound`: the sum over information states of the largest
    positive regret, divided by the number of iterations. For plain CFR with all players updated at
    once it bounds the `nash_conv` of the average policy in two-player zero-sum games.
  """
  del key
  checks.given(config)
  if config.predictive != (state.last_regrets is not None):
    raise ValueError(
      f"state must come from init(game, config) with predictive={config.predictive}, got "
      f"last_regrets={state.last_regrets}"
    )
  constants = _constants(game)
  running = _iterate(_start(game, state, constants), game, constants, config)
  state = _stop(game, running)
  largest = jnp.max(jnp.where(game.legal, jnp.maximum(state.regrets, 0), 0), axis=1)
  return state, {"cfr/regret_bound": jnp.sum(largest) / state.step}


def solve(
  game: games.Game,
  *,
  num_iterations: int,
  variant: str = "cfr",
  alternating: bool = True,
  config: Config | None = None,
) -> Solution:
  """Returns the average policy after a number of iterations, run as one compiled scan.

  Args:
    game: the game; `jax.vmap` can map over it and over the numbers of `config`.
    num_iterations: at least 1.
    variant: one of `VARIANTS`.
    alternating: whether to update the players in turn instead of all at once.
    config: replaces `variant` and `alternating`.

  Raises:
    ValueError: if the variant is unknown or `num_iterations` is not a positive integer.

  Example:
    >>> kuhn = games.compile_game("kuhn_poker")  # doctest: +SKIP
    >>> solution = solve(kuhn, num_iterations=1000, variant="cfr+")  # doctest: +SKIP
    >>> games.nash_conv(kuhn, solution.average_policy)  # doctest: +SKIP
    Array(0.00017521, dtype=float32)
  """
  checks.count("num_iterations", num_iterations)
  if config is None:
    config = make_config(variant, alternating=alternating)
  return _solve(game, config, num_iterations)


@functools.partial(jax.jit, static_argnames="num_iterations")
def _solve(game: games.Game, config: Config, num_iterations: int) -> Solution:
  checks.given(config)
  constants = _constants(game)

  def body(running: _Running, _: None) -> tuple[_Running, None]:
    return _iterate(running, game, constants, config), None

  running = _start(game, init(game, config), constants)
  running, _ = jax.lax.scan(body, running, length=num_iterations)
  state = _stop(game, running)
  return Solution(average_policy(game, state), state)


class _Constants(NamedTuple):
  """What all iterations share, for each player.

  Attributes:
    payoffs: from `games.terminal_payoffs`.
    errors: `[Q]`, the rounding error of an iteration's regret; see the module docstring.
    uniform: `[Q]` uniform play.
  """

  payoffs: list[Any]
  errors: list[jax.Array]
  uniform: list[jax.Array]


class _Running(NamedTuple):
  """A state with one array `[Q]` for each player's sequences, and the policies that follow from it.

  Attributes:
    regrets, policy_sums, step, last_regrets: of the `State`, at legal actions only.
    policies: the policy of the next iteration.
    reaches: own reach of the sequences under it.
  """

  regrets: list[jax.Array]
  policy_sums: list[jax.Array]
  step: jax.Array
  policies: list[jax.Array]
  reaches: list[jax.Array]
  last_regrets: Any


def _constants(game: games.Game) -> _Constants:
  largest = jnp.max(jnp.abs(game.utilities)) * jnp.finfo(game.utilities.dtype).eps
  errors = jnp.broadcast_to(8 * largest * game.state_chance_reach[:, None], game.legal.shape)
  return _Constants(
    list(games.terminal_payoffs(game)),
    _by_player(game, errors),
    _by_player(game, policy_arrays.uniform(game)),
  )


def _by_player(game: games.Game, values: jax.Array) -> list[jax.Array]:
  return [games.sequence_probs(game, player, values) for player in range(game.num_players)]


def _start(game: games.Game, state: State, constants: _Constants) -> _Running:
  regrets = _by_player(game, state.regrets)
  last = None if state.last_regrets is None else _by_player(game, state.last_regrets)
  policies = [
    _match(tree, regrets[player] + (0 if last is None else last[player]), constants.uniform[player])
    for player, tree in enumerate(game.player_trees)
  ]
  reaches = [games.own_reach(game, player, policy) for player, policy in enumerate(policies)]
  sums = _by_player(game, state.policy_sums)
  return _Running(regrets, sums, state.step, policies, reaches, last)


def _stop(game: games.Game, running: _Running) -> State:
  last = running.last_regrets
  return State(
    games.by_state(game, running.regrets),
    games.by_state(game, running.policy_sums),
    running.step,
    None if last is None else games.by_state(game, last),
  )


def _match(tree: game_tree.PlayerTree, regrets: jax.Array, uniform: jax.Array) -> jax.Array:
  """Returns the policy `[Q]` of regret matching on regrets `[Q]`."""
  positive = jnp.maximum(regrets, 0)
  totals = segments.take(segments.segment_sum(positive, tree.states), tree.state_of)
  return jnp.where(totals > 0, positive / jnp.where(totals > 0, totals, 1), uniform)


def _iterate(
  running: _Running, game: games.Game, constants: _Constants, config: Config
) -> _Running:
  regrets, sums, policies, reaches = map(
    list, (running.regrets, running.policy_sums, running.policies, running.reaches)
  )
  step = running.step + 1
  step_size = step.astype(game.utilities.dtype)
  kept = _kept(step_size, config.positive_discount), _kept(step_size, config.negative_discount)
  ageing = ((step_size - 1) / step_size) ** config.averaging_power
  joint, last = games.join_reach(reaches), []
  for player, tree in enumerate(game.player_trees):
    payoffs = games.sequence_payoffs(game, player, joint, constants.payoffs[player])
    action_values, values, _ = games.pass_up(game, player, payoffs, policies[player])
    added = action_values - segments.take(values, tree.state_of)
    added = jnp.where(jnp.abs(added) > constants.errors[player], added, 0)
    last.append(added)
    total = regrets[player] + added
    regrets[player] = jnp.where(total > 0, kept[0] * total, kept[1] * total)
    sums[player] = ageing * sums[player] + reaches[player]
    predicted = regrets[player] + added if config.predictive else regrets[player]
    policies[player] = _match(tree, predicted, constants.uniform[player])
    reaches[player] = games.own_reach(game, player, policies[player])
    if config.alternating:
      joint = games.join_reach(reaches)
  return _Running(regrets, sums, step, policies, reaches, last if config.predictive else None)


def _kept(step: jax.Array, power: Any) -> jax.Array:
  """Returns t^power / (t^power + 1), exactly 1 for inf and 0 for -inf, even at t = 1."""
  power = jnp.asarray(power, step.dtype)
  finite = jax.nn.sigmoid(jnp.where(jnp.isfinite(power), power, 0) * jnp.log(step))
  return jnp.where(jnp.isfinite(power), finite, jnp.where(power > 0, 1, 0).astype(step.dtype))
