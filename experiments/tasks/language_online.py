"""Wiring of methods that learn from their own fresh completions: Nash-MD, RLOO, online IPO.

Each step is one compiled program: it draws completions, judges them, scores them under the
reference and updates the policy. A method makes its batch in `collect`, with the help of a `Round`.

A judge is host code, called with `jax.pure_callback`. In every step the accelerator waits while
the host decodes and judges the tokens. A word list takes milliseconds. If a judge takes seconds,
prefer a method that learns from completions scored in advance. In a run of several processes the
first process judges for all.

A learned reward or preference model is part of the step: the host only turns the policy's tokens
into the model's. Its parameters are in the state, so that they are no constants of the program, but
not in checkpoints. A model must not run inside the callback, since the devices that it needs may be
waiting for it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignment import nash_md, sequences
from alignment.models import sampling, scalar_head
from experiments.data import rewards
from experiments.loop import training
from experiments.tasks import language, language_offline
from sharding import checks

_Judge = rewards.Reward | rewards.Preference


class JudgedState(NamedTuple):
  """As `language.State`, and the parameters of a learned judge."""

  learner: Any
  ref_params: Any
  judge_params: Any

  @property
  def step(self) -> jax.Array:
    """Number of updates so far."""
    return self.learner.step


class Prompts(NamedTuple):
  """Training examples: tokens and mask `[B, P]`, and index `[B]` into `task.train_prompts`."""

  tokens: Any
  mask: Any
  index: Any


@dataclasses.dataclass(frozen=True)
class Round:
  """Sampling, reference and judge of one step, for use while the step is traced.

  Attributes:
    task: the model, its prompts and its reward.
    ref_params: the reference's parameters.
    index: `[B]` indices into `task.train_prompts`, because judges read the prompts as text.
    preference_fn: a judge of pairs, or None to derive preferences from rewards.
    network: the network that is trained.
    judge_params: the parameters of `judge`, if it is a learned model.
  """

  task: language_offline.Task
  ref_params: Any
  index: jax.Array
  preference_fn: rewards.Preference | None
  network: language.Network = language.POLICY
  judge_params: Any = None

  def sample_fn(self, beta: float = 0.0) -> sequences.SampleFn:
    """Returns a sampler of `data.num_samples` completions per prompt, from pi^(1-beta) ref^beta."""
    task = self.task
    mixture: dict[str, Any] = {}
    if beta:
      mixture = {"mixture_fn": nash_md.geometric_mixture_logits, "beta": beta}
      mixture["ref_params"] = self.ref_params
    generate: sequences.SampleFn = functools.partial(
      sampling.generate,
      config=task.network,
      max_new_tokens=task.config.data.completion_length,
      num_samples=task.config.data.num_samples,
      temperature=1.0,
      eos_id=task.model.tokenizer.eos_ids,
      pad_id=task.model.tokenizer.pad_id,
      **mixture,
    )
    return lambda trained, *prompts_and_key: generate(
      self.network.join(trained, self.ref_params), *prompts_and_key
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

  def _scores(self, judge: _Judge, *sides: sequences.Sequences) -> jax.Array:
    """Returns `judge(prompts, texts, ...)`, which must depend on its arguments alone."""
    num_rows = len(sides[0].tokens)
    learned, compare = judge.learned, len(sides) > 1
    if learned is None:
      shapes: Any = jax.ShapeDtypeStruct((num_rows,), jnp.float32)
    else:
      rows = jax.ShapeDtypeStruct((num_rows * len(sides), learned.width), jnp.int32)
      shapes = (rows, rows)

    def on_host(index, *arrays):
      # Through NumPy at once: computing with JAX inside a callback can block the device.
      places, *numbers = (np.asarray(x) for x in (index, *arrays))
      prompts = [self.task.train_prompts[i] for i in places.repeat(num_rows // len(places))]
      pairs = zip(numbers[::2], numbers[1::2], strict=True)
      texts = [self.task.decode(tokens, mask, prompts) for tokens, mask in pairs]
      return learned.tokens(prompts, *texts) if learned else judge(prompts, *texts).astype("f4")

    arrays = (x for side in sides for x in (side.tokens, side.mask))
    found = jax.pure_callback(on_host, shapes, self.index, *arrays)
    return found if learned is None else learned.scores(self.judge_params, *found, compare=compare)


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
  network = language.with_adapters(language.POLICY, config.network)
  optimizer = language.make_optimizer(config.optimizer, config.train.num_steps)
  task = language_offline.make_task(config)
  language.check_adapters(network, task.model.params)
  learned = (preference_fn or task.reward_fn).learned
  if learned is not None:
    # The head's own rule alone: those of its body are the policy's, after the adapters'.
    rules = (scalar_head.HEAD_RULE, *network.rules)
    network = dataclasses.replace(network, rules=rules)

  def with_learner(learner, *frozen):
    kind: Any = language.State if learned is None else JudgedState
    return kind(learner, *frozen)

  def init(key, params, *judge_params):
    trained = network.start(params, key)
    learner = algorithm.init(trained, optimizer=optimizer, config=algorithm_config)
    return with_learner(learner, params, *judge_params)

  def update(state, batch, key):
    _, ref_params, *judge_params = state
    this_round = Round(task, ref_params, batch.index, preference_fn, network, *judge_params)
    prompts = sequences.Prompts(batch.tokens, batch.mask)
    learner, metrics = algorithm.update(
      state.learner,
      collect(state.learner, prompts, key, this_round),
      key,
      apply_fn=network.bind(task.apply_fn, ref_params),
      optimizer=optimizer,
      config=algorithm_config,
    )
    return with_learner(learner, ref_params, *judge_params), metrics

  def arrays():
    tokens, mask = task.encode_prompts(task.train_prompts)
    task.count_waste(task.train_prompts, [mask], "prompt_padding")
    return Prompts(tokens, mask, np.arange(len(task.train_prompts), dtype=np.int32))

  found = language.experiment(
    task,
    init=init,
    update=update,
    arrays=arrays,
    trained=lambda state: state.learner.params,
    network=network,
    init_args=() if learned is None else (learned.params,),
  )
  if learned is None:
    return found
  return dataclasses.replace(
    found,
    saved=lambda state: language.State(state.learner, state.ref_params),
    rebuilt=lambda saved: JudgedState(saved.learner, saved.ref_params, learned.params),
  )


def _check(config: Any) -> rewards.Preference | None:
  """Returns the judge of pairs, if any; raises ValueError for settings that need offline data."""
  data = config.data
  for name in language_offline.OWN_DATA:
    if data[name]:
      raise ValueError(
        f"data.{name}={data[name]}: {config.paper} learns from completions that it draws itself; "
        "leave it empty, or use a method that learns from a file, such as copg"
      )
  if (data.temperature, data.top_k, data.top_p) != (1.0, 0, 1.0):
    raise ValueError(
      f"data.temperature={data.temperature}, data.top_k={data.top_k}, data.top_p={data.top_p} "
      f"must be 1, 0 and 1, because {config.paper} learns from unmodified samples of its policy"
    )
  if "preference_scale" not in data:
    return None
  checks.positive("data.preference_scale", data.preference_scale)
  checks.probabilities("data.mixture_beta", data.mixture_beta)
  return rewards.resolve_preference(config.preference) if config.preference else None
