"""Wiring shared by the language-model runs of all methods.

A method names its algorithm and turns scored completions into its batch (`collate`). If it trains
more than the policy, it also gives a `Network`. The model, its data and the comparison with the
reference are in `language_offline.Task`. Methods that draw completions while they train use
`language_online`. Both kinds end in `experiment`.

With `network.lora_rank` above 0 only low-rank adapters are trained (`alignment.models.lora`). They
are then the parameters of the algorithm, and the state holds the pretrained model beside them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import sharding
from alignment import copg, sequences
from alignment.baselines import sft
from alignment.models import architectures, huggingface, lora, peft
from experiments import files
from experiments.data import batching, buckets, text
from experiments.loop import training
from experiments.report import results
from experiments.tasks import harness, language_offline, language_report, optimizers
from sharding import checks


@dataclasses.dataclass(frozen=True)
class Network:
  """The network that is trained, made from a pretrained model; by default the model itself.

  Attributes:
    make_apply_fn: `make_apply_fn(network_config, logps_chunk=...) -> apply_fn` of the algorithm.
    make_params: maps the model's parameters to the trained parameters.
    policy_of: maps the trained parameters to the policy's.
    make_optimizer: maps one optimiser to the optimiser of all trained parameters.
    rules: say how the parameters are split over a mesh.
    adapters: None to train all parameters, else low-rank adapters alone.
  """

  make_apply_fn: Callable[..., Any] = architectures.make_apply_fn
  make_params: Callable[[Any], Any] = lambda params: params
  policy_of: Callable[[Any], Any] = lambda params: params
  make_optimizer: Callable[[Any], optax.GradientTransformation] = lambda optimizer: optimizer
  rules: sharding.Rules = architectures.SHARDING_RULES
  adapters: lora.Config | None = None

  def start(self, params: Any, key: jax.Array) -> Any:
    """Returns the first trained parameters, given those of the decoder."""
    params = self.make_params(params)
    return params if self.adapters is None else lora.init(params, key, config=self.adapters)

  def join(self, trained: Any, params: Any) -> Any:
    """Returns the parameters of the network: the trained ones, within those of the decoder."""
    if self.adapters is None:
      return trained
    return lora.join(self.make_params(params), trained, config=self.adapters)

  def bind(self, apply_fn: Callable[..., Any], params: Any) -> Callable[..., Any]:
    """Returns `apply_fn` of the trained parameters; `params` are the decoder's, traced."""
    if self.adapters is None:
      return apply_fn
    return lora.bind(apply_fn, self.make_params(params), config=self.adapters)


POLICY = Network()


class State(NamedTuple):
  """The algorithm's state and the reference policy, where a step needs it.

  Methods that draw completions need the reference in every step. Low-rank adapters need it as
  their base. It must not become a constant of the compiled step, and donation must not free it. As
  a part of the state it is split like the parameters and passed through in place. A resumed run
  finds it in the checkpoint on any mesh, even if the pretrained model is gone. The price is one
  more copy of the parameters in a checkpoint, which has three without adapters under Adam.
  """

  learner: Any
  ref_params: Any

  @property
  def step(self) -> jax.Array:
    """Number of updates so far."""
    return self.learner.step


def with_adapters(network: Network, section: Any) -> Network:
  """Returns the network with the adapters of a config's section `network`.

  Raises:
    ValueError: if `lora_rank` or `lora_alpha` is out of range.
  """
  rank = section.get("lora_rank", 0)  # configs of older runs have no adapters
  checks.count("network.lora_rank", rank, least=0)
  if not rank:
    return network
  checks.positive("network.lora_alpha", section.lora_alpha)
  names = tuple(name.strip() for name in section.lora_targets.split(","))
  targets = None if names == ("all",) else names
  adapters = lora.Config(rank=rank, alpha=section.lora_alpha, targets=targets)
  rules = (*lora.SHARDING_RULES, *network.rules)
  return dataclasses.replace(network, adapters=adapters, rules=rules)


def check_adapters(network: Network, params: Any) -> None:
  """Prints how many parameters are trained; raises ValueError where the adapters do not fit."""
  if network.adapters is None:
    return
  key = jax.random.key(0)
  trained, joined = jax.eval_shape(
    lambda params: (trained := network.start(params, key), network.join(trained, params)), params
  )
  count, total = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (trained, joined))
  print(f"low-rank adapters: {count:,} of {total:,} parameters are trained", flush=True)


# --- batches that several methods share ---


def groups(samples: language_offline.Samples) -> copg.Batch:
  """Returns CoPG's batch: all K completions of each prompt."""
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
  """Returns SFT's batch: the single completion of each prompt."""
  return sft.Batch(
    tokens=samples.tokens[:, 0],
    mask=samples.mask[:, 0],
    prompt_tokens=samples.prompt_tokens,
    prompt_mask=samples.prompt_mask,
  )


def extreme_pairs(samples: language_offline.Samples) -> text.Pairs:
  """Returns the best and the worst completion of each prompt, without prompts where they tie."""
  found = text.reward_pairs(samples.rewards)
  if not found.example.size:
    raise ValueError(
      "the completions of each prompt have equal rewards, so there are no pairs: give another "
      "reward, or draw more completions (data.num_samples)"
    )
  if found.num_ties:
    size = found.example.size
    print(f"{found.num_ties} prompts are left out: their completions tie; {size} pairs remain")
  return found


def pairs(samples: language_offline.Samples) -> sequences.PreferenceBatch:
  """Returns IPO's and DPO's batch: the best and the worst completion of each prompt."""
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
  """Returns each completion as a row with a prompt of its own, so that each is one example."""
  arrays: tuple[Any, ...] = (
    samples.tokens,
    samples.mask,
    samples.prompt_tokens,
    samples.prompt_mask,
  )
  return sequences.repeat_prompts(sequences.flatten_samples(*arrays))


# --- the experiment ---


def make_optimizer(config: Any, num_steps: int) -> optax.GradientTransformation:
  """Returns AdamW with global-norm clipping, linear warm-up and cosine decay to `final_scale`."""
  warmup = config.warmup_steps
  rates = optimizers.schedule(config, max(num_steps, warmup + 1), warmup_steps=warmup)
  adam = optimizers.adamw(config, rates, b1=config.b1, b2=config.b2)
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
  """Returns the experiment of one algorithm that learns from a fixed set of completions.

  Args:
    config: an `experiments.configs.base.language_model` config.
    algorithm: a module in the one shape (`ipo`, `dpo`, `copg`).
    collate: `Samples -> algorithm.Batch` with a leading axis of training examples.
    network: the network that is trained.
    min_samples: the fewest completions of a prompt that the algorithm can learn from.
    task: the task of the config, if `collate` has already made it.
    evaluate_more: see `experiment`.
  """
  algorithm_config = algorithm.Config(**config.algorithm)
  check_sizes(config, algorithm_config.num_microbatches, min_samples)
  network = with_adapters(network, config.network)
  task = task or language_offline.make_task(config)
  check_adapters(network, task.model.params)
  init, update, trained = learner(
    algorithm,
    apply_fn=network.make_apply_fn(task.network, logps_chunk=config.network.logps_chunk or None),
    optimizer=network.make_optimizer(make_optimizer(config.optimizer, config.train.num_steps)),
    config=algorithm_config,
    network=network,
  )
  return experiment(
    task,
    init=init,
    update=update,
    arrays=lambda: collate(task.training_samples(min_samples)),
    trained=trained,
    network=network,
    evaluate_more=evaluate_more,
  )


def learner(
  algorithm: Any,
  *,
  apply_fn: Callable[..., Any],
  optimizer: optax.GradientTransformation,
  config: Any,
  network: Network,
) -> tuple[Callable[..., Any], Callable[..., Any], Callable[[Any], Any]]:
  """Returns `init(key, params)`, `update(state, batch, key)` and `trained(state)` of an algorithm.

  The state is the algorithm's; with adapters it is a `State`, whose reference is their base.
  """
  step = functools.partial(algorithm.update, optimizer=optimizer, config=config)

  def init(key, params):
    state = algorithm.init(network.start(params, key), optimizer=optimizer, config=config)
    return state if network.adapters is None else State(state, params)

  def update_beside_base(state, batch, key):
    bound = network.bind(apply_fn, state.ref_params)
    inner, metrics = step(state.learner, batch, key, apply_fn=bound)
    return State(inner, state.ref_params), metrics

  if network.adapters is None:
    return init, functools.partial(step, apply_fn=apply_fn), lambda state: state.params
  return init, update_beside_base, lambda state: state.learner.params


def experiment(
  task: language_offline.Task,
  *,
  init: Callable[..., Any],
  update: Callable[..., Any],
  arrays: Callable[[], Any],
  trained: Callable[[Any], Any],
  network: Network = POLICY,
  init_args: tuple[Any, ...] = (),
  evaluate_more: Callable[..., results.Result] | None = None,
) -> training.Experiment:
  """Returns the experiment that trains on a task and compares its policy with the reference.

  Args:
    task: the model, its prompts and its reward.
    init: `init(key, params, *init_args) -> State`; `params` are the pretrained parameters.
    update: `update(state, batch, key) -> (State, Metrics)`.
    arrays: makes the training examples, NumPy arrays with one leading axis.
    trained: maps the state to the trained parameters.
    network: the network whose they are.
    init_args: further arguments of `init`.
    evaluate_more: `(result, comparison, policy_params, task) -> Result`, for a method that
      evaluates more than one completion per prompt.
  """
  config = task.config
  harness.check(config, task.network)

  def policy_of(state):
    # A state without a reference has no adapters either, which `join` would look for there.
    joined = network.join(trained(state), getattr(state, "ref_params", None))
    return network.policy_of(joined)

  def evaluate(state):
    params = policy_of(state)
    comparison = task.compare(params)
    found = harness.extend(language_report.result(comparison, task), task, params)
    return evaluate_more(found, comparison, params, task) if evaluate_more else found

  def export(state, folder):
    merged = lora.merge(policy_of(state))
    huggingface.save(folder, task.network, merged, tokenizer=task.model.tokenizer)
    if network.adapters is None:
      return
    base = config.network.model
    if files.local_path("config.network.model", base).is_dir():  # found from any working folder
      base = str(files.local_path("config.network.model", base).resolve())
    try:
      peft.save(
        folder.parent / "adapter",
        task.network,
        network.policy_of(trained(state)),
        adapter_config=network.adapters,
        base=base,
        fingerprint=task.model.fingerprint.removesuffix(language_offline.IN_INT8),
      )
    except ValueError as error:  # the merged weights are written
      print(f"no folder of adapters: {error}", flush=True)

  return training.Experiment(
    init=init,
    init_args=(task.model.params, *init_args),
    update=update,
    batches=lambda: batches(config, arrays()),
    headline="win_rate",
    rules=(*network.rules, *sharding.REPLICATED),
    evaluate=evaluate,
    sample=lambda state: language_report.sample_table(task.compare(policy_of(state))),
    export=export,
    figures=language_report.figures,
  )


def batches(config: Any, arrays: Any) -> batching.Batches:
  """Returns the batches of training examples that the sections `data` and `train` ask for."""
  found = batching.batches(
    arrays,
    batch_size=config.train.batch_size,
    seed=config.seed,
    length_buckets=config.data.get("length_buckets", 1),
  )
  if found.padding is not None:
    print(f"padding in batches of similar length: {found.padding:.3g}", flush=True)
  return found


def check_batch_size(config: Any, num_microbatches: int) -> None:
  """Raises ValueError if batches of this size cannot be made, before the model is read."""
  buckets.check(config.data.get("length_buckets", 1))
  size = config.train.batch_size
  if size % num_microbatches:
    raise ValueError(
      f"algorithm.num_microbatches={num_microbatches} does not divide train.batch_size={size}: "
      "choose a divisor"
    )
  mesh = training.make_mesh(config.sharding.mesh)
  shards = sharding.num_shards(mesh)
  if size % shards:
    raise ValueError(
      f"train.batch_size={size} must be a multiple of the {shards} data shards of sharding.mesh "
      f"{dict(mesh.shape)}"
    )


def check_sizes(config: Any, num_microbatches: int, min_samples: int) -> None:
  """Raises ValueError for sizes at which the first step would fail, before minutes of sampling."""
  check_batch_size(config, num_microbatches)
  size, data = config.train.batch_size, config.data
  if language_offline.has_own_data(data):
    return
  if data.num_samples < min_samples:
    raise ValueError(
      f"data.num_samples={data.num_samples} must be at least {min_samples}: the method compares "
      "completions of one prompt"
    )
  if size > data.num_prompts:
    raise ValueError(
      f"train.batch_size={size} exceeds data.num_prompts={data.num_prompts}: lower the first or "
      "raise the second"
    )
