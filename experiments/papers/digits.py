"""Every method on the language of digits: one run trains a method under both judges at once.

The state of a run has leading axes [judge, setting, seed]: two judges, the values of the method's
own regulariser (traced, so one program serves all), the seeds. Offline methods learn from pairs
that the reference wrote once; online ones draw from the policy and ask the judge at every step. A
reward model stands in where a method needs a reward and the judge, being intransitive, has none.
"""

import functools
import pathlib
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignment import checks, dro, reward_model, sequences, srpo
from alignment.baselines import sft
from alignment.models import sampling, scalar_head, transformer
from experiments import bandit, digit_methods, evaluation, language_model, report, training
from experiments.data import digits

# --- the network, the reference, the reward model, the data ---------------------------------------


def network_of(config: Any) -> transformer.TransformerConfig:
  """Returns the shape of the decoder."""
  width, head_dim = config.network.width, 16
  if width < head_dim or width % head_dim:
    raise ValueError(f"config.network.width={width}: give a multiple of {head_dim}")
  return transformer.TransformerConfig(
    vocab_size=digits.VOCAB_SIZE,
    num_layers=config.network.num_layers,
    width=width,
    num_heads=width // head_dim,
    num_kv_heads=width // head_dim,
    head_dim=head_dim,
    mlp_width=3 * width,
    max_length=digits.REVISION_LENGTH + digits.LENGTH,
  )


def generate_fn(network: transformer.TransformerConfig) -> Callable[..., Any]:
  """Returns a `sequences.SampleFn` at temperature 1."""
  return functools.partial(
    sampling.generate,
    config=network,
    max_new_tokens=digits.LENGTH,
    eos_id=digits.EOS,
    pad_id=digits.PAD,
  )


class World:
  """What the methods of a comparison share, each made once: reference, reward model, data."""

  def __init__(self, config: Any, folder: pathlib.Path):
    self._config, self._folder = config, folder

  @functools.cached_property
  def ref_params(self) -> Any:
    return restore_params("sft", self._config, self._folder)

  @functools.cached_property
  def reward_params(self) -> Any:
    return restore_params("reward_model", self._config, self._folder)

  @functools.cached_property
  def data(self) -> digit_methods.Data:
    return make_data(self._config, self.ref_params, self.reward_params)


def build(config: Any, workdir: pathlib.Path, world: World | None = None) -> training.Experiment:
  """Returns the experiment of `config.method`.

  Args:
    config: of one method, as `comparison.sub_config` makes it.
    workdir: of the run; those of the reference and the reward model lie beside it.
    world: shared by several runs of one process; made from the folders by default.
  """
  bandit.check_counts(config, num_prompts=2, num_seeds=1)
  checks.count("config.train.batch_size", config.train.batch_size)
  checks.count("config.eval.num_prompts", config.eval.num_prompts)
  if config.method == "sft":
    return _reference(config)
  world = world or World(config, workdir.parent)
  if config.method == "reward_model":
    return _reward_model(config, world)
  checks.choice("config.method", config.method, tuple(digit_methods.METHODS))
  return _method(config, world)


def scanned(step: Callable[..., Any], num_steps: int) -> Callable[..., Any]:
  """Returns `run(state, key)`: `step(state, key) -> (state, metrics)` that many times.

  Metrics are those of the last step, their losses the mean of all.
  """

  def run(state, key):
    state, metrics = jax.lax.scan(step, state, jax.random.split(key, num_steps))
    return state, {name: values.mean(0) for name, values in metrics.items()}

  return run


def _reference(config: Any) -> training.Experiment:
  """Imitates answers and revisions of the language's people, half of each in a batch."""
  network = network_of(config)
  num_steps = config.train.num_steps * config.train.inner_steps
  optimizer = language_model.make_optimizer(config.optimizer, num_steps)
  algorithm_config = sft.Config()
  half = config.train.batch_size

  def step(state, key):
    prompt_key, answer_key, edit_key, update_key = jax.random.split(key, 4)
    prompts = digits.prompts(prompt_key, 2 * half)
    answers = digits.imitations(answer_key, prompts)
    plain, shown = (jax.tree.map(lambda leaf, i=i: leaf[i::2], answers) for i in (0, 1))
    better = digits.edits(edit_key, shown)
    room = [(0, 0), (digits.REVISION_LENGTH - digits.PROMPT_LENGTH, 0)]
    context = [
      jnp.concatenate([jnp.pad(short, room), long])
      for short, long in zip(plain[2:], digits.revision_prompts(shown), strict=True)
    ]
    tokens, mask = (jnp.concatenate([plain[i], better[i]]) for i in (0, 1))
    return sft.update(
      state,
      sft.Batch(tokens, mask, *context),
      update_key,
      apply_fn=transformer.make_apply_fn(network),
      optimizer=optimizer,
      config=algorithm_config,
    )

  def init(key):
    params = transformer.init_params(network, key)
    return sft.init(params, optimizer=optimizer, config=algorithm_config)

  def evaluate(state):
    samples = sample_rows(network, state.params, config, "sft")
    lines = digits.text(*map(np.asarray, samples[:2]))
    prompts = digits.text(*map(np.asarray, samples[2:]))
    return evaluation.Result(
      metrics={"reward": evaluation.mean_interval(digits.judge(samples).rewards)},
      tables=[
        report.Table(
          "Samples", ["prompt", "answer"], list(map(list, zip(prompts[:8], lines[:8], strict=True)))
        )
      ],
    )

  return training.Experiment(
    init=init,
    update=lambda state, batch, key: scanned(step, config.train.inner_steps)(state, key),
    batches=bandit.NoData,
    headline="reward",
    evaluate=evaluate,
  )


def _reward_model(config: Any, world: World) -> training.Experiment:
  """Fits Bradley-Terry rewards to the intransitive judge's labels of the offline pairs."""
  network = network_of(config)
  num_steps = config.train.num_steps * config.train.inner_steps
  optimizer = language_model.make_optimizer(config.optimizer, num_steps)
  ref_params = world.ref_params
  algorithm_config = reward_model.Config()
  apply_fn = scalar_head.make_apply_fn(network)

  def batch_of(data, rows):
    pairs = digit_methods.pairs(None, digit_methods.Draw(data, rows, *[None] * 4))  # type: ignore[arg-type]
    answers = (*pairs[:2], *pairs[3:5])
    return reward_model.Batch(*answers, pairs.prompt_tokens, pairs.prompt_mask)

  def update(state, data, key):
    data = data._replace(judged=jax.tree.map(lambda leaf: leaf[1], data.judged))

    def step(state, key):
      rows = jax.random.randint(key, (config.train.batch_size,), 0, len(data.tokens))
      return reward_model.update(
        state,
        batch_of(data, rows),
        key,
        apply_fn=apply_fn,
        optimizer=optimizer,
        config=algorithm_config,
      )

    return scanned(step, config.train.inner_steps)(state, key)

  def evaluate(state):
    """Accuracy on fresh pairs of the reference, against the more probable winner."""
    first, second = (sample_rows(network, ref_params, config, name) for name in ("one", "two"))
    truth = digits.preferences(digits.judge(first), digits.judge(second), True)
    margin = apply_fn(state.params, first) - apply_fn(state.params, second)
    decided = np.asarray(truth != 0.5)
    right = np.asarray((margin > 0) == (truth > 0.5))[decided]
    return evaluation.Result(
      metrics={"accuracy": evaluation.clopper_pearson(int(right.sum()), right.size)},
      notes=["Accuracy: agreement with the side that the intransitive judge favours."],
    )

  return training.Experiment(
    init=lambda key, params: reward_model.init(
      scalar_head.from_decoder(params), optimizer=optimizer, config=algorithm_config
    ),
    init_args=(ref_params,),
    update=update,
    batches=lambda: bandit.NoData(make_data(config, ref_params, None)),
    headline="accuracy",
    evaluate=evaluate,
  )


def restore_params(method: str, config: Any, folder: pathlib.Path) -> Any:
  """Returns the parameters of a finished run beside this one."""
  from experiments import workdir as run_folder

  saved = run_folder.read_config(folder / method)
  return training.restore(build(saved, folder / method), saved, folder / method).state.params


def sample_rows(
  network: transformer.TransformerConfig, params: Any, config: Any, name: str
) -> sequences.Sequences:
  """Answers to the held-out prompts; `name` seeds the draws, so that no two runs share them."""
  key = jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(name.encode()))
  return sequences.sample(params, test_prompts(config), key, sample_fn=generate_fn(network))


def test_prompts(config: Any) -> sequences.Prompts:
  """The held-out prompts: other draws of a hundred million."""
  key = jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(b"test prompts"))
  return digits.prompts(key, config.eval.num_prompts)


def make_data(config: Any, ref_params: Any, reward_params: Any) -> digit_methods.Data:
  """Draws the offline pairs from the reference and has them labelled; the same for every method."""
  network, num_prompts = network_of(config), config.data.num_prompts
  apply_fn, generate = transformer.make_apply_fn(network), generate_fn(network)
  chunk = next(size for size in range(min(num_prompts, 2000), 0, -1) if num_prompts % size == 0)
  keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 1), 3)
  prompts = digits.prompts(keys[0], num_prompts)

  @functools.partial(jax.jit, static_argnums=0)
  def in_chunks(function, *args):
    """Maps `function(key, *rows)` over all prompts, so many rows at a time."""
    cut = jax.tree.map(lambda leaf: leaf.reshape(-1, chunk, *leaf.shape[1:]), args)
    out = jax.lax.map(
      lambda part: function(*part), (jax.random.split(keys[1], num_prompts // chunk), *cut)
    )
    return jax.tree.map(lambda leaf: leaf.reshape(num_prompts, *leaf.shape[2:]), out)

  def draw(key, tokens, mask):
    drawn = generate(ref_params, tokens, mask, key, num_samples=2)
    return jax.tree.map(lambda leaf: leaf.reshape(chunk, 2, *leaf.shape[1:]), drawn)

  samples = in_chunks(draw, *prompts)

  def sums(rows, num_answers):
    logps = sequences.sequence_logps(apply_fn(ref_params, rows), rows.mask, reduction="sum")
    return logps.reshape(chunk, num_answers)

  def score(key, tokens, mask, next_tokens, next_mask, prompt_tokens, prompt_mask):
    del key
    prompts = (prompt_tokens, prompt_mask)
    first, second = (sequences.Sequences(tokens[:, i], mask[:, i], *prompts) for i in (0, 1))
    shown = [*digits.revision_prompts(first), *digits.revision_prompts(second)]
    batch = srpo.Batch(*first[:2], *second[:2], None, *prompts, *shown)
    six = sums(srpo.six_sequences(batch), 6)
    mismatched = sums(sequences.Sequences(next_tokens, next_mask, *prompts), 1)
    fitted = jnp.zeros((chunk, 2))
    if reward_params is not None:
      score_fn = scalar_head.make_apply_fn(network)
      fitted = jnp.stack([score_fn(reward_params, rows) for rows in (first, second)], axis=1)
    return six, mismatched[:, 0], fitted, digits.judge(first), digits.judge(second)

  following = (jnp.roll(samples.tokens[:, 0], -1, axis=0), jnp.roll(samples.mask[:, 0], -1, axis=0))
  six, mismatched, fitted, first, second = in_chunks(
    score, samples.tokens, samples.mask, *following, *prompts
  )
  # One uniform a pair for both judges: where they agree, so do their labels.
  uniform = jax.random.uniform(keys[2], (num_prompts,))
  rewards = jnp.stack([first.rewards, second.rewards], axis=1)
  judged = digit_methods.Judged(
    intransitive=jnp.array([False, True]),
    first_wins=jnp.stack(
      [uniform < digits.preferences(first, second, intransitive) for intransitive in (False, True)]
    ),
    scores=jnp.stack([rewards, fitted]),
  )
  return digit_methods.Data(
    prompts=prompts,
    tokens=samples.tokens,
    mask=samples.mask,
    ref_logps=six[:, :2],
    srpo_ref_logps=six,
    mismatched_ref_logps=mismatched,
    ref_params=ref_params,
    reward_params=reward_params,
    judged=judged,
  )


# --- one method -----------------------------------------------------------------------------------


def _method(config: Any, world: World) -> training.Experiment:
  method, network = digit_methods.METHODS[config.method], network_of(config)
  values = bandit.positives(config, f"algorithm.{method.knob}")
  settings = method.configs(values)
  num_seeds, inner_steps = config.data.num_seeds, config.train.inner_steps
  adam = language_model.make_optimizer(config.optimizer, config.train.num_steps * inner_steps)
  is_dro = method.algorithm is dro
  optimizer = dro.make_optimizer(adam, adam) if is_dro else adam
  logps_fn = transformer.make_apply_fn(network)
  apply_fn = scalar_head.make_policy_and_value_fn(network) if is_dro else logps_fn
  ref_params = world.ref_params
  shape = (len(digits.ORACLES), len(values), num_seeds)

  def init(key, ref_params):
    del key  # every run starts at the reference
    params = ref_params
    if is_dro:
      params = dro.Params(ref_params, scalar_head.from_decoder(ref_params))
    one = method.algorithm.init(params, optimizer=optimizer, config=settings)
    return bandit.Sweep({config.method: bandit.stack(one, shape)}, jnp.zeros((), jnp.int32))

  def run(data, state, key, judged, setting):
    def step(state, key):
      row_key, draw_key, update_key = jax.random.split(key, 3)
      rows = jax.random.randint(row_key, (config.train.batch_size,), 0, len(data.tokens))
      draw = digit_methods.Draw(
        data._replace(judged=judged),
        rows,
        draw_key,
        generate_fn(network),
        logps_fn,
        scalar_head.make_apply_fn(network),
      )
      return method.algorithm.update(
        state,
        method.batch(state, draw),
        update_key,
        apply_fn=apply_fn,
        optimizer=optimizer,
        config=setting,
      )

    return scanned(step, inner_steps)(state, key)

  def update(sweep, data, key):
    over_seeds = jax.vmap(functools.partial(run, data), in_axes=(0, 0, None, None))
    over_settings = jax.vmap(over_seeds, in_axes=(0, None, None, 0))
    over_judges = jax.vmap(over_settings, in_axes=(0, None, 0, None))
    # The same keys under every setting and judge: what differs is not the luck of the draw.
    keys = jax.random.split(key, num_seeds)
    state, metrics = over_judges(sweep.runs[config.method], keys, data.judged, settings)
    metrics = {name: jnp.mean(each) for name, each in metrics.items()}
    return bandit.Sweep({config.method: state}, sweep.step + 1), metrics

  def evaluate(sweep):
    params = sweep.runs[config.method].params
    return _measure(config, network, params.policy if is_dro else params, ref_params, values)

  return training.Experiment(
    init=init,
    init_args=(ref_params,),
    update=update,
    batches=lambda: bandit.NoData(world.data),
    headline=f"win_rate/scalar/{values[0]:g}",
    evaluate=evaluate,
  )


def _measure(config, network, params, ref_params, values) -> evaluation.Result:
  """Samples every run once a held-out prompt: what the comparison between methods is made of.

  `arrays`: `rewards`, `styles`, `log_ratios` `[judge, setting, seed, prompt]` of the answers, and
  `revised` `[judge, setting, seed, revision]`, win rates against the reference's answers.
  """
  sample_fn, apply_fn = generate_fn(network), transformer.make_apply_fn(network)
  prompts = test_prompts(config)
  reference = digits.judge(sample_rows(network, ref_params, config, "sft"))
  shape = jax.tree.leaves(params)[0].shape[:3]
  seed = jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(config.method.encode()))
  keys = jax.random.split(seed, shape)

  @jax.jit
  def look(params, ref_params, answers, reference, intransitive):
    first = answers[0]
    logps = apply_fn(params, first) - apply_fn(ref_params, first)
    log_ratios = sequences.sequence_logps(logps, first.mask, reduction="sum")
    quality = digits.judge(first)
    wins = [digits.preferences(digits.judge(a), reference, intransitive).mean() for a in answers]
    return quality.rewards, quality.styles, log_ratios, jnp.stack(wins)

  found = []
  for run in np.ndindex(*shape):
    own = jax.tree.map(lambda leaf, run=run: leaf[run], params)
    answers = srpo.sample(
      srpo.State(own, (), jnp.zeros((), jnp.int32)),
      prompts,
      keys[run],
      sample_fn=sample_fn,
      revision_fn=digits.revision_prompts,
      num_revisions=config.eval.num_revisions if config.method in digit_methods.REVISED else 0,
    )
    found.append(look(own, ref_params, answers, reference, bool(run[0])))
  found = [np.stack(values) for values in zip(*jax.device_get(found), strict=True)]
  arrays = {
    name: values.reshape(*shape, -1)
    for name, values in zip(("rewards", "styles", "log_ratios", "revised"), found, strict=True)
  }
  metrics = {}
  for i, judge in enumerate(digits.ORACLES):
    for j, value in enumerate(values):
      tag = f"{judge}/{value:g}"
      # The spread over seeds, each the mean of all prompts.
      metrics[f"win_rate/{tag}"] = evaluation.mean_interval(arrays["revised"][i, j, :, 0])
      metrics[f"reward/{tag}"] = evaluation.mean_interval(arrays["rewards"][i, j].mean(-1))
      metrics[f"kl/{tag}"] = evaluation.mean_interval(arrays["log_ratios"][i, j].mean(-1))
  kept = {name: np.round(values, 4) for name, values in arrays.items()}
  return evaluation.Result(metrics=metrics, arrays=kept)
