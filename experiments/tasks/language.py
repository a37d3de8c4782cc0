"""The wiring that the language-model runs of all methods share.

A method says which algorithm it is, how scored completions become its batch (`collate`), and what
it trains where that is more than the policy (`Network`). The model, its data and its comparison
with the reference are a `language_task.Task`. Methods that draw their own completions as they
train are wired in `online_language_model`; `experiment` is what both end in.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import optax

import sharding
from alignment import copg, sequences
from alignment.baselines import sft
from alignment.models import huggingface, transformer
from experiments.data import batching, text
from experiments.loop import training
from experiments.report import results
from experiments.tasks import language_offline, language_report


@dataclasses.dataclass(frozen=True)
class Network:
  """What is trained, made from a pretrained decoder; the default is the decoder itself.

  Attributes:
    make_apply_fn: `make_apply_fn(network_config, logps_chunk=...) -> apply_fn` of the algorithm.
    make_params: from the decoder's parameters to those that are trained.
    policy_of: from those back to the policy's.
    make_optimizer: from one optimiser to that of all that is trained.
    rules: how the parameters are split over a mesh.
  """

  make_apply_fn: Callable[..., Any] = transformer.make_apply_fn
  make_params: Callable[[Any], Any] = lambda params: params
  policy_of: Callable[[Any], Any] = lambda params: params
  make_optimizer: Callable[[Any], optax.GradientTransformation] = lambda optimizer: optimizer
  rules: sharding.Rules = transformer.SHARDING_RULES


POLICY = Network()


# --- batches that several methods share ---


def groups(samples: language_offline.Samples) -> copg.Batch:
  """CoPG's batch: all K completions of a prompt."""
  return copg.Batch(
    tokens=samples.tokens,
    mask=samples.mask,
    ref_logps=samples.ref_logps,
    # A soft label shrinks the contrast; scored completions have best_probs = 1.
    rewards=samples.rewards * (2 * samples.best_probs - 1)[:, None],
    prompt_tokens=samples.prompt_tokens,
    prompt_mask=samples.prompt_mask,
  )


def demonstrations(samples: language_offline.Samples) -> sft.Batch:
  """SFT's batch: the one completion of each prompt."""
  return sft.Batch(
    tokens=samples.tokens[:, 0],
    mask=samples.mask[:, 0],
    prompt_tokens=samples.prompt_tokens,
    prompt_mask=samples.prompt_mask,
  )


def extreme_pairs(samples: language_offline.Samples) -> text.Pairs:
  """Returns the best and the worst completion of each prompt; prompts without one drop out."""
  found = text.reward_pairs(samples.rewards)
  if not found.example.size:
    raise ValueError(
      "every prompt's completions have equal rewards: there is no pair to learn from"
    )
  if found.num_ties:
    size = found.example.size
    print(f"{found.num_ties} prompts whose completions tie are left out: {size} pairs")
  return found


def pairs(samples: language_offline.Samples) -> sequences.PreferenceBatch:
  """IPO's and DPO's batch: the best against the worst completion."""
  found = extreme_pairs(samples)
  rows = found.example
  return sequences.PreferenceBatch(
    chosen_tokens=samples.tokens[rows, found.chosen],
    chosen_mask=samples.mask[rows, found.chosen],
    chosen_ref_logps=samples.ref_logps[rows, found.chosen],
    rejected_tokens=samples.tokens[rows, found.rejected],
    rejected_mask=samples.mask[rows, found.rejected],
    rejected_ref_logps=samples.ref_logps[rows, found.rejected],
    chosen_probs=samples.best_probs[rows],
    prompt_tokens=samples.prompt_tokens[rows],
    prompt_mask=samples.prompt_mask[rows],
  )


def single_rows(samples: language_offline.Samples) -> sequences.Sequences:
  """Returns all completions as rows that each have a prompt of their own: one example each."""
  arrays: tuple[Any, ...] = (
    samples.tokens,
    samples.mask,
    samples.prompt_tokens,
    samples.prompt_mask,
  )
  return sequences.repeat_prompts(sequences.flatten_samples(*arrays))


# --- the experiment ---


def make_optimizer(config: Any, num_steps: int) -> optax.GradientTransformation:
  """Adam(W) with global-norm clipping, linear warm-up and a cosine to `final_scale`."""
  schedule = optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=config.warmup_steps,
    decay_steps=max(num_steps, config.warmup_steps + 1),
    end_value=config.learning_rate * config.final_scale,
  )
  adam = optax.adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay)
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), adam)


def build(
  config: Any,
  *,
  algorithm: Any,
  collate: Callable[[language_offline.Samples], Any],
  network: Network = POLICY,
  min_samples: int = 2,
  task: language_offline.Task | None = None,
  evaluate_more: Callable[..., results.Result] | None = None,
) -> training.Experiment:
  """Returns the experiment of one algorithm that learns from completions made beforehand.

  Args:
    config: an `experiments.configs.base.language_model` config.
    algorithm: a module in the one shape (`ipo`, `dpo`, `copg`).
    collate: `Samples -> algorithm.Batch` with a leading axis of training examples.
    network: what is trained.
    min_samples: the fewest completions of a prompt that the algorithm can learn from.
    task: the task of the config, where `collate` needed it already.
    evaluate_more: see `experiment`.
  """
  algorithm_config = algorithm.Config(**config.algorithm)
  check_sizes(config, algorithm_config.num_microbatches, min_samples)
  optimizer = network.make_optimizer(make_optimizer(config.optimizer, config.train.num_steps))
  task = task or language_offline.make_task(config)

  def init(key, params):
    del key
    return algorithm.init(network.make_params(params), optimizer=optimizer, config=algorithm_config)

  return experiment(
    task,
    init=init,
    update=functools.partial(
      algorithm.update,
      apply_fn=network.make_apply_fn(task.network, logps_chunk=config.network.logps_chunk),
      optimizer=optimizer,
      config=algorithm_config,
    ),
    arrays=lambda: collate(task.training_samples()),
    policy_of=lambda state: network.policy_of(state.params),
    rules=network.rules,
    evaluate_more=evaluate_more,
  )


def experiment(
  task: language_offline.Task,
  *,
  init: Callable[..., Any],
  update: Callable[..., Any],
  arrays: Callable[[], Any],
  policy_of: Callable[[Any], Any],
  rules: sharding.Rules = transformer.SHARDING_RULES,
  evaluate_more: Callable[..., results.Result] | None = None,
) -> training.Experiment:
  """Returns the experiment that trains on a task and compares its policy with the reference.

  Args:
    task: the model, its prompts and its reward.
    init: `init(key, params) -> State`, from the pretrained parameters.
    update: `update(state, batch, key) -> (State, Metrics)`.
    arrays: makes the training examples, NumPy arrays with one leading axis.
    policy_of: from the state to the policy's parameters.
    rules: how the parameters are split over a mesh; what they do not name is replicated.
    evaluate_more: `(result, comparison, policy_params, task) -> Result`, for a method that has
      more to show than one completion a prompt.
  """
  config = task.config

  def evaluate(state):
    params = policy_of(state)
    comparison = task.compare(params)
    found = language_report.result(comparison, task)
    return evaluate_more(found, comparison, params, task) if evaluate_more else found

  def export(state, folder):
    huggingface.save(folder, task.network, policy_of(state), tokenizer=task.model.tokenizer)

  return training.Experiment(
    init=init,
    init_args=(task.model.params,),
    update=update,
    batches=lambda: batching.batches(
      arrays(), batch_size=config.train.batch_size, seed=config.seed
    ),
    headline="win_rate",
    rules=(*rules, *sharding.REPLICATED),
    evaluate=evaluate,
    sample=lambda state: language_report.sample_table(task.compare(policy_of(state))),
    export=export,
    figures=language_report.figures,
  )


def check_batch_size(config: Any, num_microbatches: int) -> None:
  """Raises ValueError where `train.batch_size` does not split over micro-batches and devices."""
  size = config.train.batch_size
  if size % num_microbatches:
    raise ValueError(
      f"algorithm.num_microbatches={num_microbatches} does not divide train.batch_size={size}: "
      "choose a divisor"
    )
  mesh = training.make_mesh(config.sharding.mesh)
  shards = math.prod(mesh.shape.get(axis, 1) for axis in sharding.DATA_AXES)
  if size % shards:
    raise ValueError(
      f"train.batch_size={size} does not divide over the {shards} shards of sharding.mesh "
      f"{dict(mesh.shape)}: choose a multiple"
    )


def check_sizes(config: Any, num_microbatches: int, min_samples: int) -> None:
  """Raises before minutes of sampling what the first step would find."""
  check_batch_size(config, num_microbatches)
  size, data = config.train.batch_size, config.data
  if language_offline.has_own_data(data):
    return
  if data.num_samples < min_samples:
    raise ValueError(
      f"data.num_samples={data.num_samples}: completions of a prompt are compared, draw "
      f"{min_samples} or more"
    )
  if size > data.num_prompts:
    raise ValueError(
      f"train.batch_size={size} exceeds data.num_prompts={data.num_prompts}: lower the first or "
      "raise the second"
    )
