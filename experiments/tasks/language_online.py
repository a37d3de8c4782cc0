"""The wiring of methods that learn from what they have just drawn: Nash-MD, RLOO, online IPO.

One step is one compiled program: completions are drawn, judged, scored under the reference and
learned from. A method says how a batch comes about (`collect`), with what a `Round` offers.

The judge is host code, reached by `jax.pure_callback`: in every step the accelerator waits while
token ids travel to the host, are decoded and judged there, and numbers come back. A word list costs
milliseconds; a judge that takes seconds is better asked ahead of time, by a method that learns from
scored completions. In a run of several processes the first one judges for all.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignment import nash_md, sequences
from alignment.models import sampling
from experiments.data import rewards
from experiments.loop import training
from experiments.tasks import language, language_offline
from sharding import checks


class State(NamedTuple):
  """The algorithm's state and, beside it, the reference that it is held to.

  The reference is an input of every step, and a step may neither bake it into its program nor lose
  it to donation. As a part of the state it is split like the parameters, handed through in place,
  and found again by a resumed run on any mesh, even where the pretrained model is gone. The price
  is a checkpoint larger by one copy of the parameters, which has three under Adam.
  """

  learner: Any
  ref_params: Any

  @property
  def step(self) -> jax.Array:
    """Number of updates done."""
    return self.learner.step


class Prompts(NamedTuple):
  """Training examples: tokens and mask `[B, P]`, and place `[B]` among `task.train_prompts`."""

  tokens: Any
  mask: Any
  index: Any


@dataclasses.dataclass(frozen=True)
class Round:
  """What one step can ask for while it is traced.

  Attributes:
    task: the model, its prompts and its reward.
    ref_params: the reference's parameters.
    index: `[B]` places of the prompts among `task.train_prompts`: judges read them as written.
    preference_fn: a judge of pairs, or None for one made from rewards.
  """

  task: language_offline.Task
  ref_params: Any
  index: jax.Array
  preference_fn: rewards.Preference | None

  def sample_fn(self, beta: float = 0.0) -> sequences.SampleFn:
    """Returns what draws `data.num_samples` completions a prompt; of pi^(1-beta) ref^beta."""
    task = self.task
    mixture: dict[str, Any] = {}
    if beta:
      mixture = {"mixture_fn": nash_md.geometric_mixture_logits, "beta": beta}
      mixture["ref_params"] = self.ref_params
    return functools.partial(
      sampling.generate,
      config=task.network,
      max_new_tokens=task.config.data.completion_length,
      num_samples=task.config.data.num_samples,
      temperature=1.0,
      eos_id=task.model.tokenizer.eos_id,
      pad_id=task.model.tokenizer.pad_id,
      **mixture,
    )

  def ref_token_logps(self, rows: sequences.Sequences) -> jax.Array:
    """Returns the reference's log-probability of each token, `[B K, T]`."""
    return jax.lax.stop_gradient(self.task.apply_fn(self.ref_params, rows))

  def ref_logps(self, rows: sequences.Sequences) -> jax.Array:
    """Returns the reference's log-probability of each completion, `[B K]`."""
    return sequences.sequence_logps(self.ref_token_logps(rows), rows.mask, reduction="sum")

  def rewards(self, rows: sequences.Sequences) -> jax.Array:
    """Returns the reward of each completion, `[B K]`."""
    return self._scores(self.task.reward_fn, rows)

  def preferences(self, first: sequences.Sequences, second: sequences.Sequences) -> jax.Array:
    """Returns P(the first beats the second) of each pair, `[B K]`."""
    if self.preference_fn is not None:
      return self._scores(self.preference_fn, first, second)
    difference = self.rewards(first) - self.rewards(second)
    return jax.nn.sigmoid(difference / self.task.config.data.preference_scale)

  def _scores(self, judge: Callable[..., np.ndarray], *sides: sequences.Sequences) -> jax.Array:
    """Asks `judge(prompts, texts, ...)` on the host; it must be a function of its arguments."""
    num_rows = len(sides[0].tokens)

    def on_host(index, *arrays):
      # Through NumPy at once: computing with JAX inside a callback can block the device.
      places, *numbers = (np.asarray(x) for x in (index, *arrays))
      prompts = [self.task.train_prompts[i] for i in places.repeat(num_rows // len(places))]
      texts = [self.task.decode(*pair) for pair in zip(numbers[::2], numbers[1::2], strict=True)]
      return judge(prompts, *texts).astype(np.float32)

    shape = jax.ShapeDtypeStruct((num_rows,), jnp.float32)
    arrays = (x for side in sides for x in (side.tokens, side.mask))
    return jax.pure_callback(on_host, shape, self.index, *arrays)


# (state of the algorithm, prompts, key, round) -> batch of the algorithm
Collect = Callable[[Any, sequences.Prompts, jax.Array, Round], Any]


def build(
  config: Any, *, algorithm: Any, collect: Collect, min_samples: int = 1
) -> training.Experiment:
  """Returns the experiment of one algorithm that learns from its own completions.

  Args:
    config: an `experiments.configs.base.online_language_model` config.
    algorithm: a module in the one shape (`nash_md`, `rloo`, `online_ipo`).
    collect: draws and judges one batch, with the algorithm's `sample`.
    min_samples: the fewest completions of a prompt that the algorithm can learn from.
  """
  algorithm_config = algorithm.Config(**config.algorithm)
  language.check_sizes(config, algorithm_config.num_microbatches, min_samples)
  preference_fn = _check(config)
  optimizer = language.make_optimizer(config.optimizer, config.train.num_steps)
  task = language_offline.make_task(config)

  def init(key, params):
    del key
    return State(algorithm.init(params, optimizer=optimizer, config=algorithm_config), params)

  def update(state, batch, key):
    this_round = Round(task, state.ref_params, batch.index, preference_fn)
    prompts = sequences.Prompts(batch.tokens, batch.mask)
    learner, metrics = algorithm.update(
      state.learner,
      collect(state.learner, prompts, key, this_round),
      key,
      apply_fn=task.apply_fn,
      optimizer=optimizer,
      config=algorithm_config,
    )
    return State(learner, state.ref_params), metrics

  def arrays():
    return Prompts(
      *task.encode_prompts(task.train_prompts), np.arange(len(task.train_prompts), dtype=np.int32)
    )

  return language.experiment(
    task, init=init, update=update, arrays=arrays, policy_of=lambda state: state.learner.params
  )


def _check(config: Any) -> rewards.Preference | None:
  """Returns the judge of pairs, if there is one; raises for what an online run cannot have."""
  data = config.data
  for name in language_offline.OWN_DATA:
    if data[name]:
      raise ValueError(
        f"data.{name}={data[name]}: {config.paper} learns from completions that it draws itself; "
        "leave it empty, or choose a method that learns from a file, such as copg"
      )
  if (data.temperature, data.top_k, data.top_p) != (1.0, 0, 1.0):
    raise ValueError(
      f"data.temperature={data.temperature}, data.top_k={data.top_k}, data.top_p={data.top_p}: "
      f"{config.paper} learns from samples of the policy as it is; give 1, 0 and 1"
    )
  if "preference_scale" not in data:
    return None
  checks.positive("data.preference_scale", data.preference_scale)
  checks.probabilities("data.mixture_beta", data.mixture_beta)
  return rewards.resolve_preference(config.preference) if config.preference else None
