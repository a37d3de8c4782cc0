"""One method on the language of digits, trained under both judges at once.

The state of a run has leading axes [judge, setting, seed]. The settings are values of the method's
own regulariser; they are traced, so one program serves all. Offline methods learn from pairs that
were drawn once from the reference. Online methods draw from the policy and ask the judge at every
step. The intransitive judge has no reward, so a reward model replaces it for methods that need one.
"""

import functools
import pathlib
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignment import dro, reward_model, sequences, srpo
from alignment.baselines import sft
from alignment.models import scalar_head, transformer
from experiments import files
from experiments.data import digits
from experiments.loop import run_folder, training
from experiments.report import results, statistics
from experiments.tasks import bandits, digit_language, digit_methods, language
from sharding import checks

CYCLE = digits.ORACLES.index("intransitive")
# Models of the intransitive judge by the name of their run, and their kind.
FITTED = {"reward_model": "bradley_terry", "preference_model": "pairwise"}


class World:
  """Reference, fitted models and data of a comparison, made once and shared by all methods."""

  def __init__(self, config: Any, folder: pathlib.Path):
    self._config, self._folder = config, folder

  @functools.cached_property
  def ref_params(self) -> Any:
    return restore_params("sft", self._config, self._folder)

  @functools.cached_property
  def reward_params(self) -> Any:
    return restore_params("reward_model", self._config, self._folder)

  @functools.cached_property
  def preference_params(self) -> Any:
    return restore_params("preference_model", self._config, self._folder)

  @functools.cached_property
  def data(self) -> digit_methods.Data:
    return digit_language.make_data(
      self._config, self.ref_params, self.reward_params, self.preference_params
    )

  def opponent(self, name: str) -> digit_methods.Opponent:
    """Returns the policy of a method at the KL `eval.kl`, under the intransitive judge.

    Leaves have a leading axis over seeds.
    """
    folder = self._folder / name
    saved = run_folder.read_config(folder)
    log_ratios = files.read_json(
      folder / "results.json",
      lambda data: results.Result.from_json(data["result"]).arrays["log_ratios"],
      otherwise="nobody can exploit its policy",
    )
    if log_ratios is None:
      raise ValueError(f"{folder} has no results.json: finish the run of {name} first")
    kls = log_ratios[CYCLE].mean((1, 2))
    near, far, weight = digit_methods.neighbours(kls, self._config.eval.kl)
    restored = training.restore(build_in(saved, folder, self), saved, folder)
    params = restored.state.runs[name].params
    params = params.policy if isinstance(params, dro.Params) else params
    num_seeds = saved.data.num_seeds

    def point(setting):
      if setting < 0:
        return bandits.broadcast(self.ref_params, (num_seeds,))
      return jax.tree.map(lambda leaf: leaf[CYCLE, setting], params)

    return digit_methods.Opponent(point(near), point(far), jnp.full(num_seeds, weight))


def build_in(config: Any, workdir: pathlib.Path, world: World | None = None) -> training.Experiment:
  """Returns the experiment of `config.method`.

  Args:
    config: config of one method, from `comparison.sub_config`.
    workdir: folder of the run, next to the folders of the reference and the reward model.
    world: shared by several runs of one process; by default it is restored from those folders.
  """
  bandits.check_counts(config, num_prompts=2, num_seeds=1)
  checks.count("config.train.batch_size", config.train.batch_size)
  checks.count("config.eval.num_prompts", config.eval.num_prompts)
  if config.method == "sft":
    return _reference(config)
  world = world or World(config, workdir.parent)
  if config.method in FITTED:
    return _fitted_model(config, world)
  if config.method == "exploiter":
    checks.choice("config.victim", config.victim, tuple(digit_methods.METHODS))
  else:
    checks.choice("config.method", config.method, tuple(digit_methods.METHODS))
  return _method(config, world)


def scanned(step: Callable[..., Any], num_steps: int) -> Callable[..., Any]:
  """Returns `run(state, key)`, which scans over `num_steps` of `step(state, key)`.

  Both functions return (state, metrics). The metrics of `run` are means over its steps.
  """

  def run(state, key):
    state, metrics = jax.lax.scan(step, state, jax.random.split(key, num_steps))
    return state, {name: values.mean(0) for name, values in metrics.items()}

  return run


def _reference(config: Any) -> training.Experiment:
  """Trains the reference on answers and revisions of simulated people, half of a batch each."""
  network = digit_language.network_of(config)
  num_steps = config.train.num_steps * config.train.inner_steps
  optimizer = language.make_optimizer(config.optimizer, num_steps)
  algorithm_config = sft.Config()
  kept = config.data.get("kept_edits", 0.0)  # runs from before this field have none
  checks.probabilities("config.data.kept_edits", kept)
  half = config.train.batch_size

  def step(state, key):
    prompt_key, answer_key, edit_key, update_key = jax.random.split(key, 4)
    prompts = digits.prompts(prompt_key, 2 * half)
    answers = digits.imitations(answer_key, prompts)
    plain, shown = (jax.tree.map(lambda leaf, i=i: leaf[i::2], answers) for i in (0, 1))
    better = digits.edits(edit_key, shown, kept)
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
    samples = digit_language.sample_rows(network, state.params, config, "sft")
    lines = digits.text(*map(np.asarray, samples[:2]))
    prompts = digits.text(*map(np.asarray, samples[2:]))
    return results.Result(
      metrics={"reward": statistics.mean_interval(digits.quality(samples).rewards)},
      tables=[
        results.Table(
          "Samples", ["prompt", "answer"], list(map(list, zip(prompts[:8], lines[:8], strict=True)))
        )
      ],
    )

  return training.Experiment(
    init=init,
    update=lambda state, batch, key: scanned(step, config.train.inner_steps)(state, key),
    batches=bandits.NoData,
    steps_per_update=config.train.inner_steps,
    headline="reward",
    evaluate=evaluate,
  )


def _fitted_model(config: Any, world: World) -> training.Experiment:
  """Fits Bradley-Terry rewards, or a pairwise model, to the intransitive judge's offline labels."""
  network = digit_language.network_of(config)
  num_steps = config.train.num_steps * config.train.inner_steps
  optimizer = language.make_optimizer(config.optimizer, num_steps)
  ref_params = world.ref_params
  algorithm_config = reward_model.Config(kind=FITTED[config.method])
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
    """Returns the accuracy on fresh pairs of the reference, for the more probable winner."""
    first, second = (
      digit_language.sample_rows(network, ref_params, config, name) for name in ("one", "two")
    )
    truth = digits.preferences(digits.quality(first), digits.quality(second), True)
    margin = reward_model.preference_logits(
      state.params,
      reward_model.Batch(*first[:2], *second),
      apply_fn=apply_fn,
      config=algorithm_config,
    )
    decided = np.asarray(truth != 0.5)
    right = np.asarray((margin > 0) == (truth > 0.5))[decided]
    return results.Result(
      metrics={"accuracy": statistics.clopper_pearson(int(right.sum()), right.size)},
      notes=[
        "Accuracy is how often the model prefers the side that the intransitive judge favours."
      ],
    )

  return training.Experiment(
    init=lambda key, params: reward_model.init(
      scalar_head.from_decoder(params), optimizer=optimizer, config=algorithm_config
    ),
    init_args=(ref_params,),
    update=update,
    batches=lambda: bandits.NoData(digit_language.make_data(config, ref_params, None)),
    steps_per_update=config.train.inner_steps,
    headline="accuracy",
    evaluate=evaluate,
  )


def restore_params(method: str, config: Any, folder: pathlib.Path) -> Any:
  """Returns the parameters of the finished run of `method` in `folder`."""
  saved = run_folder.read_config(folder / method)
  return training.restore(build_in(saved, folder / method), saved, folder / method).state.params


# --- one method -----------------------------------------------------------------------------------


def _method(config: Any, world: World) -> training.Experiment:
  """Trains a method of `METHODS` under both judges, or the exploiter of `config.victim`.

  The exploiter has an opponent that does not move, and only the intransitive judge.
  """
  network = digit_language.network_of(config)
  exploits = config.method == "exploiter"
  method = digit_methods.EXPLOITER if exploits else digit_methods.METHODS[config.method]
  judges = (CYCLE,) if exploits else tuple(range(len(digits.ORACLES)))
  values = bandits.positives(config, f"algorithm.{method.knob}")
  settings = method.configs(values)
  num_seeds, inner_steps = config.data.num_seeds, config.train.inner_steps
  adam = language.make_optimizer(config.optimizer, config.train.num_steps * inner_steps)
  is_dro = method.algorithm is dro
  optimizer = dro.make_optimizer(adam, adam) if is_dro else adam
  logps_fn = transformer.make_apply_fn(network)
  apply_fn = scalar_head.make_policy_and_value_fn(network) if is_dro else logps_fn
  ref_params = world.ref_params
  shape = (len(judges), len(values), num_seeds)

  def init(key, ref_params):
    del key  # every run starts at the reference
    params = ref_params
    if is_dro:
      params = dro.Params(ref_params, scalar_head.from_decoder(ref_params))
    one = method.algorithm.init(params, optimizer=optimizer, config=settings)
    return bandits.Sweep({config.method: bandits.broadcast(one, shape)}, jnp.zeros((), jnp.int32))

  def run(data, state, key, opponent, judged, setting):
    def step(state, key):
      row_key, draw_key, update_key = jax.random.split(key, 3)
      rows = jax.random.randint(row_key, (config.train.batch_size,), 0, len(data.tokens))
      draw = digit_methods.Draw(
        data._replace(judged=judged),
        rows,
        draw_key,
        digit_language.generate_fn(network),
        logps_fn,
        scalar_head.make_apply_fn(network),
        opponent,
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

  def update(sweep, batch, key):
    data, opponent = batch
    over_seeds = jax.vmap(functools.partial(run, data), in_axes=(0, 0, 0, None, None))
    over_settings = jax.vmap(over_seeds, in_axes=(0, None, None, None, 0))
    over_judges = jax.vmap(over_settings, in_axes=(0, None, None, 0, None))
    # All settings and judges use the same keys, so they do not differ by chance.
    keys = jax.random.split(key, num_seeds)
    judged = jax.tree.map(lambda leaf: leaf[jnp.array(judges)], data.judged)
    state, metrics = over_judges(sweep.runs[config.method], keys, opponent, judged, settings)
    metrics = {name: jnp.mean(each) for name, each in metrics.items()}
    return bandits.Sweep({config.method: state}, sweep.step + 1), metrics

  def evaluate(sweep):
    params = sweep.runs[config.method].params
    policy = params.policy if is_dro else params
    return _measure(config, network, policy, ref_params, values, judges)

  return training.Experiment(
    init=init,
    init_args=(ref_params,),
    update=update,
    batches=lambda: bandits.NoData((world.data, world.opponent(config.victim) if exploits else ())),
    headline=f"win_rate/{digits.ORACLES[judges[0]]}/{values[0]:g}",
    evaluate=evaluate,
  )


def _measure(config, network, params, ref_params, values, judges) -> results.Result:
  """Samples one answer to each held-out prompt from every policy, for the comparison of methods.

  `arrays` holds `rewards`, `styles` and `log_ratios` `[judge, setting, seed, prompt]` of the
  answers, and `revised` `[judge, setting, seed, revision]`, win rates against the reference's
  answers.
  """
  sample_fn, apply_fn = digit_language.generate_fn(network), transformer.make_apply_fn(network)
  prompts = digit_language.test_prompts(config)
  reference = digits.quality(digit_language.sample_rows(network, ref_params, config, "sft"))
  shape = jax.tree.leaves(params)[0].shape[:3]
  name = config.method + config.get("victim", "")
  seed = jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(name.encode()))
  keys = jax.random.split(seed, shape)

  @jax.jit
  def look(params, ref_params, answers, reference, intransitive):
    first = answers[0]
    logps = apply_fn(params, first) - apply_fn(ref_params, first)
    log_ratios = sequences.sequence_logps(logps, first.mask, reduction="sum")
    quality = digits.quality(first)
    wins = [digits.preferences(digits.quality(a), reference, intransitive).mean() for a in answers]
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
    found.append(look(own, ref_params, answers, reference, judges[run[0]] == CYCLE))
  found = [np.stack(values) for values in zip(*jax.device_get(found), strict=True)]
  arrays = {
    name: values.reshape(*shape, -1)
    for name, values in zip(("rewards", "styles", "log_ratios", "revised"), found, strict=True)
  }
  metrics = {}
  for i, judge in enumerate(digits.ORACLES[index] for index in judges):
    for j, value in enumerate(values):
      tag = f"{judge}/{value:g}"
      # Intervals are over seeds; each seed counts with its mean over the prompts.
      metrics[f"win_rate/{tag}"] = statistics.mean_interval(
        arrays["revised"][i, j, :, 0], method="logit"
      )
      metrics[f"reward/{tag}"] = statistics.mean_interval(arrays["rewards"][i, j].mean(-1))
      metrics[f"kl/{tag}"] = statistics.mean_interval(arrays["log_ratios"][i, j].mean(-1))
  kept = {name: np.round(values, 4) for name, values in arrays.items()}
  return results.Result(metrics=metrics, arrays=kept)
