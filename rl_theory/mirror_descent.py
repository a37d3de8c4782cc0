"""Mirror descent on a game: magnetic (MMD), with its quantal response equilibria, and optimistic.

Problem: a policy that is optimal up to a regulariser. All players at once take a step towards what
pays, held back by the Kullback-Leibler divergence KL to the last policy and to a magnet rho:

  pi <- argmax over pi' of  eta <g, pi'> - KL(pi', pi) - eta alpha KL(pi', rho).

With a fixed temperature alpha > 0 the last policy converges to the one from which no player gains
payoff minus alpha KL(., rho). With the default magnet, which has the largest entropy, this is a
logit quantal response equilibrium (QRE). With a temperature that falls to 0 it moves to an
equilibrium of the game. With alpha = 0 this is mirror descent; the average of its optimistic form
converges to an equilibrium at rate 1 / t.

`Config.form` says what g and KL are in a game of several moves:

| form | g(s, a) | KL | a fixed point is |
|---|---|---|---|
| "dilated" | payoffs times the others' reach | times own reach | QRE of the reduced normal form |
| "behavioural" | q(s, a), the value given s | at each state | agent QRE: pi = softmax(q / alpha) |

The dilated form has a proof in two-player zero-sum games: with eta <= alpha / L^2 the divergence to
the QRE shrinks by 1 / (1 + eta alpha) in each step, L the Lipschitz constant of g. In a matrix game
L is the largest payoff. The behavioural form has no proof, and divides by the others' reach. The
dilated magnet of largest entropy is uniform over the plans of the reduced normal form, so at a
state it prefers actions after which there is more to choose; the behavioural one is uniform.

| paper symbol | here |
|---|---|
| log pi_t | `State.log_policy` |
| rho, alpha, eta | `State.log_magnet`, `Config.temperature`, `Config.learning_rate` |
| 2 g_t - g_{t-1} in place of g_t | `Config.optimistic`, `State.last_gradient` |

References: Sokota et al. 2023, https://arxiv.org/abs/2206.05825 (magnetic mirror descent, theorem
3.4), Syrgkanis et al. 2015, https://arxiv.org/abs/1507.00407 (optimistic: 1 / t in matrix games),
Hoda et al. 2010 (the dilated entropy). Ours: step sizes and temperatures that fall as powers of t.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rl_theory import games, policy_arrays, regret_matching, segments
from sharding import checks

Metrics = dict[str, jax.Array]
FORMS = ("dilated", "behavioural")
_NUMBERS = ("learning_rate", "temperature", "learning_rate_decay", "temperature_decay")


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=[*_NUMBERS, "averaging_power"],
  meta_fields=["form", "optimistic"],
)
@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters. `jax.vmap` can map over the numbers.

  Attributes:
    learning_rate: eta > 0, per unit of utility.
    temperature: alpha >= 0, in units of utility; 0 is mirror descent without a magnet.
    learning_rate_decay, temperature_decay: p >= 0: in iteration t the number is multiplied by t^-p.
    averaging_power: gamma >= 0: iteration t has weight t^gamma in the average policy.
    form: "dilated" or "behavioural".
    optimistic: whether each step follows 2 g_t - g_{t-1}.
  """

  learning_rate: Any = 0.1
  temperature: Any = 0.1
  learning_rate_decay: Any = 0.0
  temperature_decay: Any = 0.0
  averaging_power: Any = 0.0
  form: str = "dilated"
  optimistic: bool = False

  def __post_init__(self):
    checks.positive("learning_rate", self.learning_rate)
    for name in (*_NUMBERS[1:], "averaging_power"):
      checks.not_negative(name, getattr(self, name))
    checks.choice("form", self.form, FORMS)


class State(NamedTuple):
  """What an iteration changes, and the magnet.

  Attributes:
    log_policy: `[S, A]` log-probabilities of the next iteration, 0 for illegal actions.
    log_magnet: `[S, A]` those of rho.
    policy_sums: `[S, A]` weighted sums of own reach times policy.
    step: scalar int32, iterations done.
    last_gradient: `[S, A]` g of the last iteration; None unless `Config.optimistic`.
  """

  log_policy: jax.Array
  log_magnet: jax.Array
  policy_sums: jax.Array
  step: jax.Array
  last_gradient: Any = None


def init(game: games.Game, config: Config, *, magnet: Any = None) -> State:
  """Returns the state before the first iteration, whose policy is the magnet.

  Args:
    game: the game.
    config: only `form` and `optimistic` are used.
    magnet: `[S, A]` rho, positive at legal actions; by default the one with the largest entropy. To
      move it, replace `State.log_magnet`.

  Raises:
    ValueError: if the magnet is not a policy.
  """
  zeros = jnp.zeros(game.legal.shape, game.utilities.dtype)
  if magnet is None:
    log_magnet = _respond(game, zeros, 1.0, dilated=config.form == "dilated")
  else:
    rho = policy_arrays.checked(game, magnet)
    log_magnet = jnp.log(jnp.where(game.legal, rho, 1))
  last = zeros if config.optimistic else None
  return State(log_magnet, log_magnet, zeros, jnp.zeros((), jnp.int32), last)


def current_policy(game: games.Game, state: State) -> jax.Array:
  """Returns the last policy `[S, A]`, the one that converges if there is a magnet."""
  return jnp.where(game.legal, jnp.exp(state.log_policy), 0)


def average_policy(game: games.Game, state: State) -> jax.Array:
  """Returns the average policy `[S, A]`, the one that converges without a magnet."""
  return regret_matching.normalise(state.policy_sums, game.legal)


@jax.jit
def update(
  state: State, game: games.Game, key: Any = None, *, config: Config
) -> tuple[State, Metrics]:
  """Returns the state after one iteration, in which all players move at once.

  Args:
    state: from `init` or an earlier `update` of the same game and `config.optimistic`.
    game: the game.
    key: not used, since nothing is random.
    config: hyper-parameters; other numbers do not compile again.

  Returns:
    The new state, and the metric `mirror_descent/change`: the largest change of a probability.
  """
  del key
  if config.optimistic != (state.last_gradient is not None):
    raise ValueError(
      f"state must come from init with optimistic={config.optimistic}, got "
      f"last_gradient={state.last_gradient}"
    )
  step = state.step + 1
  size = step.astype(game.utilities.dtype)
  rate = config.learning_rate * size**-config.learning_rate_decay
  pull = rate * config.temperature * size**-config.temperature_decay
  policy = current_policy(game, state)
  gradient = _gradient(game, policy, config.form)
  followed = 2 * gradient - state.last_gradient if config.optimistic else gradient
  followed = jnp.where(step > 1, followed, gradient)
  log_policy = _respond(
    game,
    rate * followed + state.log_policy + pull * state.log_magnet,
    1 + pull,
    dilated=config.form == "dilated",
  )
  ageing = ((size - 1) / size) ** config.averaging_power
  reach = segments.take(games.sequence_reach(game, policy), game.sequence_numbers)
  new = State(
    log_policy,
    state.log_magnet,
    ageing * state.policy_sums + jnp.where(game.legal, reach, 0),
    step,
    gradient if config.optimistic else None,
  )
  change = jnp.max(jnp.abs(current_policy(game, new) - policy))
  return new, {"mirror_descent/change": change}


def solve(game: games.Game, *, num_iterations: int, config: Config, magnet: Any = None) -> State:
  """Returns the state after a number of iterations, run as one compiled scan.

  Args:
    game: the game; `jax.vmap` can map over it and over the numbers of `config`.
    num_iterations: at least 1.
    config: hyper-parameters.
    magnet: as in `init`.

  Raises:
    ValueError: if `num_iterations` is not a positive integer.

  Example:
    >>> pennies = games.compile_game([[3, -1], [-1, 1]])
    >>> state = solve(pennies, num_iterations=300, config=Config(0.2, temperature=1.0))
    >>> current_policy(pennies, state).round(2)
    Array([[0.47, 0.53],
           [0.31, 0.69]], dtype=float32)
  """
  checks.count("num_iterations", num_iterations)
  return _solve(game, init(game, config, magnet=magnet), config, num_iterations)


@functools.partial(jax.jit, static_argnames="num_iterations")
def _solve(game: games.Game, state: State, config: Config, num_iterations: int) -> State:
  def body(state: State, _: None) -> tuple[State, None]:
    return update(state, game, config=config)[0], None

  return jax.lax.scan(body, state, length=num_iterations)[0]


def quantal_response(
  game: games.Game, policy: Any, *, temperature: Any, form: str = "dilated", magnet: Any = None
) -> jax.Array:
  """Returns each player's regularised best response `[S, A]` to the others' policy.

  It maximises the payoff minus `temperature` times KL(., rho). A policy is a quantal response
  equilibrium if it equals its own response. In the behavioural form the response at a state
  assumes that the player follows `policy` at its later states.

  Args:
    game: the game.
    policy: `[S, A]`.
    temperature: alpha > 0.
    form: "dilated" or "behavioural".
    magnet: `[S, A]` rho, as in `init`.

  Raises:
    ValueError: if the temperature is not positive.
  """
  checks.positive("temperature", temperature)
  checks.choice("form", form, FORMS)
  policy = policy_arrays.checked(game, policy)
  log_magnet = init(game, Config(form=form), magnet=magnet).log_magnet
  return _quantal_response(game, policy, temperature, log_magnet, form)


@functools.partial(jax.jit, static_argnames="form")
def _quantal_response(
  game: games.Game, policy: jax.Array, temperature: Any, log_magnet: jax.Array, form: str
) -> jax.Array:
  scores = _gradient(game, policy, form) + temperature * log_magnet
  response = _respond(game, scores, temperature, dilated=form == "dilated")
  return jnp.where(game.legal, jnp.exp(response), 0)


def _gradient(game: games.Game, policy: jax.Array, form: str) -> jax.Array:
  """Returns g `[S, A]`, see the module docstring."""
  reach, payoffs = games.sequence_reach(game, policy), games.terminal_payoffs(game)
  found = []
  for player, tree in enumerate(game.player_trees):
    own = games.sequence_payoffs(game, player, reach, payoffs[player])
    if form == "dilated":
      found.append(own[:-1])
      continue
    probs = games.sequence_probs(game, player, policy)
    values = games.pass_up(game, player, own, probs)[0]
    # The same passes over utilities of 1 give the others' reach of each state.
    ones = segments.gather(game.chance_reach[game.terminals], tree.terminals)
    others = games.sequence_payoffs(game, player, reach, ones)
    others = games.pass_up(game, player, others, probs)[0]
    found.append(jnp.where(others > 0, values / jnp.where(others > 0, others, 1), 0))
  return games.by_state(game, found)


def _respond(game: games.Game, scores: jax.Array, temperature: Any, *, dilated: bool) -> jax.Array:
  """Returns the log-policy `[S, A]` that maximises <scores, pi> + temperature * entropy.

  In the dilated form all this is weighted by own reach, so the value of a state counts for the
  sequence that leads to it.
  """
  log_policies = []
  for player, tree in enumerate(game.player_trees):
    own = games.sequence_probs(game, player, scores)
    levels, values = game.layout.sequence_levels[player], None
    found: list[jax.Array] = []
    for level in reversed(range(len(levels))):
      rows = slice(levels[level][0] - levels[0][0], levels[level][1] - levels[0][0])
      states = tree.level_states[level]
      first = game.layout.state_levels[player][level][0] - game.layout.state_levels[player][0][0]
      of_state = tree.state_of[rows] - first
      here = own[rows]
      if dilated and values is not None:
        here = here + segments.segment_sum(values, tree.children[level])
      here = here / temperature
      largest = segments.segment_max(here, states)
      exps = jnp.exp(here - segments.take(largest, of_state))
      normaliser = largest + jnp.log(segments.segment_sum(exps, states))
      values = temperature * normaliser
      found.insert(0, here - segments.take(normaliser, of_state))
    log_policies.append(jnp.concatenate(found) if found else own)
  return games.by_state(game, log_policies)
