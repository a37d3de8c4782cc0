"""How each method trains on the language of digits: its batch, its regulariser, its panel.

Offline methods learn from pairs that were drawn once from the reference (`Data`). Online methods
draw from the policy and ask the judge at every step (`Draw`). `METHODS` lists them all.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignment import copg, dro, ipo, nash_md, reward_model, sequences, srpo
from alignment.baselines import dpo, kto, online_ipo, rloo
from experiments.data import digits


class Judged(NamedTuple):
  """One judge's labels of the offline pairs; in `Data` leaves have a leading axis over judges.

  intransitive: `[]` bool, which judge this is.  first_wins: `[N]` bool, one label drawn per pair.
  scores: `[N, 2]` rewards; under the intransitive judge, those of the fitted reward model.
  first_beats_rewrite: `[N]` bool, as `first_wins` for the pairs of `Rewritten`.
  """

  intransitive: jax.Array
  first_wins: jax.Array
  scores: jax.Array
  first_beats_rewrite: jax.Array


class Rewritten(NamedTuple):
  """The pairs of `Data`, where the second completion of every other pair rewrites the first.

  The reference writes it when it is shown the first. Fields as in `Data`.
  """

  tokens: jax.Array
  mask: jax.Array
  srpo_ref_logps: jax.Array


class Data(NamedTuple):
  """N prompts with two completions each from the reference, the reference and the fitted models.

  srpo_ref_logps: `[N, 6]` in the order of `srpo.SCORED`, the first completion as the chosen one.
  mismatched_ref_logps: `[N]` of the next prompt's first completion, given this prompt.
  reward_params, preference_params: a Bradley-Terry and a pairwise model of the intransitive judge,
  fitted to the same labels.
  """

  prompts: sequences.Prompts
  tokens: jax.Array  # [N, 2, T]
  mask: jax.Array
  ref_logps: jax.Array  # [N, 2]
  srpo_ref_logps: jax.Array
  mismatched_ref_logps: jax.Array
  rewritten: Rewritten
  ref_params: Any
  reward_params: Any
  preference_params: Any
  judged: Judged


class Opponent(NamedTuple):
  """A fixed policy: for each prompt a coin toss chooses one of two.

  near, far: parameters.  weight: probability of `far`.
  """

  near: Any
  far: Any
  weight: jax.Array


PAIRWISE = reward_model.Config(kind="pairwise")


class Draw(NamedTuple):
  """What a method can use to make a batch: rows of the data, the judge and the network."""

  data: Data
  rows: jax.Array  # [B] of data
  key: jax.Array
  generate: Callable[..., Any]
  apply_fn: Callable[..., jax.Array]
  score_fn: Callable[..., jax.Array]
  opponent: Any = ()  # an `Opponent`, for `EXPLOITER`

  def prompts(self) -> tuple[jax.Array, jax.Array]:
    """Returns tokens and mask, `[B, P]` each."""
    return self.data.prompts.tokens[self.rows], self.data.prompts.mask[self.rows]

  def scores(self, rows: sequences.Sequences) -> jax.Array:
    """Returns rewards `[B]` of fresh completions, from the scalar judge or the reward model."""
    fitted = self.score_fn(self.data.reward_params, rows)
    return jnp.where(self.data.judged.intransitive, fitted, digits.quality(rows).rewards)

  def preferences(self, first: sequences.Sequences, second: sequences.Sequences) -> jax.Array:
    """Returns the judge's P(first beats second), `[B]`."""
    intransitive = self.data.judged.intransitive
    return digits.preferences(digits.quality(first), digits.quality(second), intransitive)

  def fitted_preferences(
    self, first: sequences.Sequences, second: sequences.Sequences
  ) -> jax.Array:
    """Returns `preferences`, with the pairwise model in place of the intransitive judge."""
    batch = reward_model.Batch(*first[:2], *second[:2], *self.prompts())
    fitted = reward_model.preference_probs(
      self.data.preference_params, batch, apply_fn=self.score_fn, config=PAIRWISE
    )
    return jnp.where(self.data.judged.intransitive, fitted, self.preferences(first, second))

  def ref_token_logps(self, rows: sequences.Sequences) -> jax.Array:
    return self.apply_fn(self.data.ref_params, rows)

  def ref_logps(self, rows: sequences.Sequences) -> jax.Array:
    return sequences.sequence_logps(self.ref_token_logps(rows), rows.mask, reduction="sum")


def pairs(state: Any, draw: Draw) -> sequences.PreferenceBatch:
  del state
  data, rows = draw.data, draw.rows
  chosen = 1 - data.judged.first_wins[rows].astype(int)

  both: list[Any] = []
  for which in (chosen, 1 - chosen):
    both += [data.tokens[rows, which], data.mask[rows, which], data.ref_logps[rows, which]]
  both += [jnp.ones(len(rows)), *draw.prompts()]
  return sequences.PreferenceBatch(*both)


def _desirable(state: Any, draw: Draw) -> kto.Batch:
  """The first completion of each pair; it is desirable if it won the comparison."""
  del state
  data, rows = draw.data, draw.rows
  following = (rows + 1) % len(data.tokens)
  return kto.Batch(
    tokens=data.tokens[rows, 0],
    mask=data.mask[rows, 0],
    ref_logps=data.ref_logps[rows, 0],
    labels=data.judged.first_wins[rows].astype(jnp.float32),
    mismatched_tokens=data.tokens[following, 0],
    mismatched_mask=data.mask[following, 0],
    mismatched_ref_logps=data.mismatched_ref_logps[rows],
    prompt_tokens=data.prompts.tokens[rows],
    prompt_mask=data.prompts.mask[rows],
  )


def _scored_singles(state: Any, draw: Draw) -> dro.Batch:
  del state
  data, rows = draw.data, draw.rows
  first = (data.tokens[rows, 0], data.mask[rows, 0], data.ref_logps[rows, 0])
  return dro.Batch(*first, data.judged.scores[rows, 0], *draw.prompts())


def _scored_pairs(state: Any, draw: Draw) -> copg.Batch:
  del state
  data, rows = draw.data, draw.rows
  both = (data.tokens[rows], data.mask[rows], data.ref_logps[rows], data.judged.scores[rows])
  return copg.Batch(*both, *draw.prompts())


_SWAPPED = np.array([1, 0, 5, 4, 3, 2])  # `srpo.SCORED` with the two completions exchanged


def _revised_pairs(state: Any, draw: Draw, *, rewritten: bool = False) -> srpo.Batch:
  if rewritten:
    labels = draw.data.judged._replace(first_wins=draw.data.judged.first_beats_rewrite)
    own = draw.data.rewritten._asdict()
    draw = draw._replace(data=draw.data._replace(judged=labels, **own))
  pair = pairs(state, draw)
  prompts = draw.prompts()

  def shown(tokens, mask):
    return digits.revision_prompts(sequences.Sequences(tokens, mask, *prompts))

  ref_logps = draw.data.srpo_ref_logps[draw.rows]
  first_wins = draw.data.judged.first_wins[draw.rows, None]
  return srpo.Batch(
    pair.chosen_tokens,
    pair.chosen_mask,
    pair.rejected_tokens,
    pair.rejected_mask,
    jnp.where(first_wins, ref_logps, ref_logps[:, _SWAPPED]),
    *prompts,
    *shown(pair.chosen_tokens, pair.chosen_mask),
    *shown(pair.rejected_tokens, pair.rejected_mask),
  )


def _rollouts(state: Any, draw: Draw) -> rloo.Batch:
  sample_fn = functools.partial(draw.generate, num_samples=2)
  rows = rloo.sample(state, sequences.Prompts(*draw.prompts()), draw.key, sample_fn=sample_fn)
  shape = (len(draw.rows), 2)
  return rloo.Batch(
    rows.tokens.reshape((*shape, digits.LENGTH)),
    rows.mask.reshape((*shape, digits.LENGTH)),
    draw.ref_logps(rows).reshape(shape),
    draw.scores(rows).reshape(shape),
    *draw.prompts(),
  )


def _mixture_fn(draw: Draw, beta: float) -> Callable[..., Any]:
  """Draws from the geometric mixture with the reference. At beta 0 the policy alone is enough."""
  if not beta:
    return draw.generate
  mixture = {"mixture_fn": nash_md.geometric_mixture_logits, "beta": beta}
  return functools.partial(draw.generate, ref_params=draw.data.ref_params, **mixture)


def _play(state: Any, draw: Draw, opponent_fn: Callable[..., Any], *, fitted: bool = False):
  first, second = nash_md.sample(
    state,
    sequences.Prompts(*draw.prompts()),
    draw.key,
    sample_fn=draw.generate,
    opponent_fn=opponent_fn,
  )
  wins = (draw.fitted_preferences if fitted else draw.preferences)(first, second)
  logps = draw.ref_token_logps(first)
  return nash_md.Batch(first.tokens, first.mask, logps, wins, *draw.prompts())


def _games(state: Any, draw: Draw, *, beta: float, fitted: bool = False) -> nash_md.Batch:
  return _play(state, draw, _mixture_fn(draw, beta), fitted=fitted)


def _exploits(state: Any, draw: Draw) -> nash_md.Batch:
  """Games against `draw.opponent`, which does not move."""
  near, far, weight = draw.opponent

  def opponent_fn(params, tokens, mask, key):
    del params
    near_key, far_key, toss_key = jax.random.split(key, 3)
    both = (draw.generate(near, tokens, mask, near_key), draw.generate(far, tokens, mask, far_key))
    is_far = jax.random.bernoulli(toss_key, weight, (len(tokens), 1))
    return jax.tree.map(lambda one, other: jnp.where(is_far, other, one), *both)

  return _play(state, draw, opponent_fn)


def _judged_pairs(state: Any, draw: Draw, *, beta: float) -> online_ipo.Batch:
  sample_fn = functools.partial(_mixture_fn(draw, beta), num_samples=2)
  prompts = sequences.Prompts(*draw.prompts())
  pair = online_ipo.sample(state, prompts, draw.key, sample_fn=sample_fn)
  fields: list[Any] = []
  for rows in pair:
    fields += [rows.tokens, rows.mask, draw.ref_logps(rows)]
  fields += [draw.preferences(*pair), *draw.prompts()]
  return online_ipo.Batch(*fields)


@dataclasses.dataclass(frozen=True)
class Method:
  """How one method trains.

  Attributes:
    name: its name in tables.
    family: the panel of a figure that shows it.
    algorithm: its module.
    batch: `batch(state, Draw) -> algorithm.Batch`.
    knob: the field of `algorithm.Config` that keeps the policy near the reference.
    options: the other fields of `algorithm.Config`.
  """

  name: str
  family: str
  algorithm: types.ModuleType
  batch: Callable[[Any, Draw], Any]
  knob: str
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def configs(self, values: Any) -> Any:
    """Returns one config whose fields have a leading axis over the values of the knob."""
    each = [self.algorithm.Config(**{self.knob: float(v)}, **self.options) for v in values]
    return jax.tree.map(lambda *leaves: jnp.stack(list(map(jnp.float32, leaves))), *each)


def _nash(name: str, beta: float, *, fitted: bool = False, **options: Any) -> Method:
  batch = functools.partial(_games, beta=beta, fitted=fitted)
  return Method(name, NASH, nash_md, batch, "tau", options)


OFFLINE, REWARD, NASH = "pairs", "rewards and online pairs", "Nash"
# Their answers are revised; only SRPO is trained to revise.
REVISED = ("srpo", "srpo_rewrites", "ipo", "dpo")
METHODS: dict[str, Method] = {
  "dpo": Method("DPO", OFFLINE, dpo, pairs, "beta"),
  "ipo": Method("IPO", OFFLINE, ipo, pairs, "tau"),
  "ipo_mean": Method("IPO, mean", OFFLINE, ipo, pairs, "tau", {"reduction": "mean"}),
  "kto": Method("KTO", OFFLINE, kto, _desirable, "beta"),
  "srpo": Method("SRPO", OFFLINE, srpo, _revised_pairs, "beta"),
  "srpo_rewrites": Method(
    "SRPO, rewrites", OFFLINE, srpo, functools.partial(_revised_pairs, rewritten=True), "beta"
  ),
  "dro": Method("DRO-V", REWARD, dro, _scored_singles, "tau"),
  "copg": Method("CoPG", REWARD, copg, _scored_pairs, "beta"),
  "rloo": Method("RLOO", REWARD, rloo, _rollouts, "beta"),
  "online_ipo": Method(
    "online IPO", REWARD, online_ipo, functools.partial(_judged_pairs, beta=0.0), "tau"
  ),
  "ipo_md": Method(
    "IPO-MD", REWARD, online_ipo, functools.partial(_judged_pairs, beta=0.125), "tau"
  ),
  "self_play": _nash("self-play", 0.0),
  "nash_md_125": _nash("Nash-MD .125", 0.125),
  "nash_md_250": _nash("Nash-MD .25", 0.25),
  "nash_md_500": _nash("Nash-MD .5", 0.5),
  "nash_md_fitted": _nash("Nash-MD .25, fitted", 0.25, fitted=True),
  "nash_ema": _nash("Nash-EMA", 0.0, ema_decay=0.99),
  "best_response": _nash("best response", 1.0),
}
EXPLOITER = Method("exploiter", NASH, nash_md, _exploits, "tau")  # a best response to one policy


def neighbours(kls: Any, kl: float) -> tuple[int, int, float]:
  """Returns the two points around `kl` on a curve that starts at the reference.

  Args:
    kls: `[S]` mean log-ratios of the settings of a method.
    kl: where to look.

  Returns:
    The nearer and the farther setting and the weight of the farther one. Setting -1 is the
    reference. Where no setting reaches `kl`, the farthest has weight 1.
  """
  order = sorted([-1, *range(len(kls))], key=lambda i: 0.0 if i < 0 else float(kls[i]))
  places = [0.0 if i < 0 else float(kls[i]) for i in order]
  above = next((i for i, place in enumerate(places) if place >= kl), None)
  if above is None or above == 0:
    only = order[-1 if above is None else 0]
    return only, only, 1.0
  weight = (kl - places[above - 1]) / (places[above] - places[above - 1])
  return order[above - 1], order[above], weight
