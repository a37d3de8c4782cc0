"""Counterfactual regret minimisation over the whole tree: CFR, CFR+, linear and discounted CFR.

Problem: an equilibrium of a game with imperfect information. Regret matching runs at every
information state on the regrets r(s, a) = sum over h in s of the others' reach times
(q(h, a) - v(h)); the average of the policies played, weighted with the player's own reach, goes to
an equilibrium in two-player zero-sum games. The last policy need not.

One iteration t = 1, 2, ...:

  R <- (R + r) where r are the regrets of pi = RM(R), then
  positive R <- R t^alpha / (t^alpha + 1), negative R <- R t^beta / (t^beta + 1),
  C <- C ((t - 1) / t)^gamma + own reach * pi        (weights t^gamma, up to a constant)

| variant | alpha | beta | gamma |
|---|---|---|---|
| "cfr" | inf (keep all) | inf | 0 |
| "cfr+" | inf | -inf (forget all) | 1 |
| "linear" | 1 | 1 | 1 |
| "discounted" | 1.5 | 0 | 2 |

| paper symbol | here |
|---|---|
| R^t(I, a) | `State.regrets` |
| C^t(I, a) | `State.policy_sums` |
| alpha, beta, gamma | `Config.positive_discount`, `negative_discount`, `averaging_power` |

With `alternating` the players are updated in turn, each against the newest policies of those
before; without it all at once. For more than two players or general sums the updates are the same
and the guarantee is gone.

Actions of symmetric games tie exactly, and regret matching jumps there: a regret of 1e-17 that
only rounding made would be played with probability 1, where all regrets at 0 play uniformly. So an
r that is no larger than the rounding error of the sums it comes from counts as 0: 8 ulp of the
largest utility times chance's reach of the state. That keeps the ties of exact arithmetic; up to
that rounding, the bound on the average policy does not depend on it.

References: Zinkevich et al. 2007 (CFR), Tammelin 2014, https://arxiv.org/abs/1407.5042 (CFR+),
Brown and Sandholm 2019, https://arxiv.org/abs/1809.04040 (linear and discounted CFR).
"""

import dataclasses
import functools
import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rl_theory import game_tree, games, regret_matching, segments

Metrics = dict[str, jax.Array]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["positive_discount", "negative_discount", "averaging_power"],
  meta_fields=["alternating"],
)
@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters; the defaults are plain CFR. Numbers may be swept with `jax.vmap`.

  Attributes:
    positive_discount: alpha: positive regrets keep t^alpha / (t^alpha + 1); inf keeps all of them.
    negative_discount: beta: the same for negative ones; -inf forgets them (CFR+).
    averaging_power: gamma >= 0: iteration t has weight t^gamma in the average.
    alternating: players in turn, or all at once.
  """

  positive_discount: Any = math.inf
  negative_discount: Any = math.inf
  averaging_power: Any = 0.0
  alternating: bool = True

  def __post_init__(self):
    for name in ("positive_discount", "negative_discount", "averaging_power"):
      value = getattr(self, name)
      if isinstance(value, str) or (isinstance(value, numbers.Real) and math.isnan(value)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    power = self.averaging_power
    if isinstance(power, numbers.Real) and not 0 <= float(power) < math.inf:
      raise ValueError(f"averaging_power must be finite and not negative, got {power}")


VARIANTS = {
  "cfr": Config(),
  "cfr+": Config(math.inf, -math.inf, 1.0),
  "linear": Config(1.0, 1.0, 1.0),
  "discounted": Config(1.5, 0.0, 2.0),
}


class State(NamedTuple):
  """What an iteration changes; `current_policy` and `average_policy` read it.

  Attributes:
    regrets: `[S, A]` cumulated, discounted as the variant says; 0 for illegal actions.
    policy_sums: `[S, A]` cumulated own reach times policy.
    step: scalar int32, iterations done.
  """

  regrets: jax.Array
  policy_sums: jax.Array
  step: jax.Array


class Solution(NamedTuple):
  """What `solve` returns.

  Attributes:
    average_policy: `[S, A]`, what goes to the equilibrium.
    state: to go on from, with `update`.
  """

  average_policy: jax.Array
  state: Any


def make_config(variant: str, *, alternating: bool = True) -> Config:
  """Returns the hyper-parameters of a variant: "cfr", "cfr+", "linear" or "discounted"."""
  if variant not in VARIANTS:
    listed = ", ".join(map(repr, VARIANTS))
    raise ValueError(f"variant must be one of {listed}, got {variant!r}; sampling is in mccfr")
  return dataclasses.replace(VARIANTS[variant], alternating=alternating)


def init(game: games.Game, *, config: Any = None) -> State:
  """Returns the state before the first iteration; its policy is uniform. `config` is not used."""
  del config
  zeros = jnp.zeros(game.legal.shape, game.utilities.dtype)
  return State(zeros, jnp.zeros_like(zeros), jnp.zeros((), jnp.int32))


def current_policy(game: games.Game, state: State) -> jax.Array:
  """Returns the policy `[S, A]` that the next iteration plays."""
  return regret_matching.regret_matching(state.regrets, game.legal)


def average_policy(game: games.Game, state: State) -> jax.Array:
  """Returns the average policy `[S, A]`; uniform at states that the player never allowed itself."""
  return regret_matching.normalise(state.policy_sums, game.legal)


@jax.jit
def update(
  state: State, game: games.Game, key: Any = None, *, config: Config
) -> tuple[State, Metrics]:
  """Returns the state after one iteration.

  Args:
    state: from `init` or an earlier `update` of the same game.
    game: the game.
    key: unused: nothing is random.
    config: hyper-parameters; new numbers do not compile again.

  Returns:
    The new state, and `cfr/regret_bound`: the sum over information states of the largest positive
    regret over the number of iterations. For plain CFR, all players at once, it bounds the
    `nash_conv` of the average policy of a two-player zero-sum game.
  """
  del key
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
    game: the game; may be mapped over with `jax.vmap`, as may the numbers of `config`.
    num_iterations: at least 1.
    variant: "cfr", "cfr+", "linear" or "discounted".
    alternating: players in turn, or all at once.
    config: in place of the last two.

  Raises:
    ValueError: if the variant is unknown or `num_iterations` is no positive integer.

  Example:
    >>> kuhn = games.compile_game("kuhn_poker")  # doctest: +SKIP
    >>> solution = solve(kuhn, num_iterations=1000, variant="cfr+")  # doctest: +SKIP
    >>> games.nash_conv(kuhn, solution.average_policy)  # doctest: +SKIP
    Array(0.00017521, dtype=float32)
  """
  if isinstance(num_iterations, bool) or not isinstance(num_iterations, int) or num_iterations < 1:
    raise ValueError(f"num_iterations must be an integer >= 1, got {num_iterations!r}")
  if config is None:
    config = make_config(variant, alternating=alternating)
  return _solve(game, config, num_iterations)


@functools.partial(jax.jit, static_argnames="num_iterations")
def _solve(game: games.Game, config: Config, num_iterations: int) -> Solution:
  constants = _constants(game)

  def body(running: _Running, _: None) -> tuple[_Running, None]:
    return _iterate(running, game, constants, config), None

  running = _start(game, init(game), constants)
  running, _ = jax.lax.scan(body, running, length=num_iterations)
  state = _stop(game, running)
  return Solution(average_policy(game, state), state)


class _Constants(NamedTuple):
  """What iterations share, for each player.

  Attributes:
    payoffs: of `games.terminal_payoffs`.
    errors: `[Q]`, up to which a regret of one iteration may be rounding; see the module.
    uniform: `[Q]` uniform play.
  """

  payoffs: list[Any]
  errors: list[jax.Array]
  uniform: list[jax.Array]


class _Running(NamedTuple):
  """A state at the sequences of each player, `[Q]`: legal actions only, and what follows from it.

  Attributes:
    regrets, policy_sums, step: of the `State`.
    policies: what the next iteration plays.
    reaches: own reach of the sequences under these policies.
  """

  regrets: list[jax.Array]
  policy_sums: list[jax.Array]
  step: jax.Array
  policies: list[jax.Array]
  reaches: list[jax.Array]


def _constants(game: games.Game) -> _Constants:
  largest = jnp.max(jnp.abs(game.utilities)) * jnp.finfo(game.utilities.dtype).eps
  errors = jnp.broadcast_to(8 * largest * game.state_chance_reach[:, None], game.legal.shape)
  return _Constants(
    list(games.terminal_payoffs(game)),
    _by_player(game, errors),
    _by_player(game, games.uniform_policy(game)),
  )


def _by_player(game: games.Game, values: jax.Array) -> list[jax.Array]:
  return [games.sequence_probs(game, player, values) for player in range(game.num_players)]


def _start(game: games.Game, state: State, constants: _Constants) -> _Running:
  regrets = _by_player(game, state.regrets)
  policies = [
    _match(tree, own, uniform)
    for tree, own, uniform in zip(game.player_trees, regrets, constants.uniform, strict=True)
  ]
  reaches = [games.own_reach(game, player, policy) for player, policy in enumerate(policies)]
  return _Running(regrets, _by_player(game, state.policy_sums), state.step, policies, reaches)


def _stop(game: games.Game, running: _Running) -> State:
  return State(
    games.by_state(game, running.regrets), games.by_state(game, running.policy_sums), running.step
  )


def _match(tree: game_tree.PlayerTree, regrets: jax.Array, uniform: jax.Array) -> jax.Array:
  """Returns `regret_matching.regret_matching` of regrets `[Q]`."""
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
  joint = games.join_reach(reaches)
  for player, tree in enumerate(game.player_trees):
    payoffs = games.sequence_payoffs(game, player, joint, constants.payoffs[player])
    action_values, values, _ = games.pass_up(game, player, payoffs, policies[player])
    added = action_values - segments.take(values, tree.state_of)
    added = jnp.where(jnp.abs(added) > constants.errors[player], added, 0)
    added = regrets[player] + added
    regrets[player] = jnp.where(added > 0, kept[0] * added, kept[1] * added)
    sums[player] = ageing * sums[player] + reaches[player]
    policies[player] = _match(tree, regrets[player], constants.uniform[player])
    reaches[player] = games.own_reach(game, player, policies[player])
    if config.alternating:
      joint = games.join_reach(reaches)
  return _Running(regrets, sums, step, policies, reaches)


def _kept(step: jax.Array, power: Any) -> jax.Array:
  """Returns t^power / (t^power + 1), with all kept for inf and nothing for -inf, even at t = 1."""
  power = jnp.asarray(power, step.dtype)
  finite = jax.nn.sigmoid(jnp.where(jnp.isfinite(power), power, 0) * jnp.log(step))
  return jnp.where(jnp.isfinite(power), finite, jnp.where(power > 0, 1, 0).astype(step.dtype))
