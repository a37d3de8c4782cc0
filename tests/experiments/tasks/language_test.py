"""Tests of the batches of each method, of what an online step draws, and of the paper presets."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from alignment import dro, reward_model, sequences, srpo
from alignment.baselines import kto
from alignment.models import scalar_head, t5, transformer
from experiments import main
from experiments.data import learned_rewards, pretrained, rewards
from experiments.loop import presets, training
from experiments.papers import copg as copg_paper
from experiments.papers import dpo as dpo_paper
from experiments.papers import dro as dro_paper
from experiments.papers import ipo as ipo_paper
from experiments.papers import kto as kto_paper
from experiments.papers import nash_md as nash_md_paper
from experiments.papers import online_ipo as online_ipo_paper
from experiments.papers import rloo as rloo_paper
from experiments.papers import srpo as srpo_paper
from experiments.studies import frontier as frontier_paper
from experiments.tasks import language_offline, language_online, revision


def tiny(paper, **changes):
  config = presets.resolve(f"{paper}:tiny")
  return presets.override(
    config, [(name.replace("__", "."), str(x)) for name, x in changes.items()]
  )


# --- batches from samples ---


def _samples(task):
  """Five prompts with three completions each, of random characters, some cut before their end."""
  rng = np.random.default_rng(0)
  prompts = task.train_prompts[:5]
  tokens = rng.integers(0, task.network.vocab_size, (5, 3, 8), dtype=np.int32)
  tokens[::2, :, 5] = task.model.tokenizer.eos_id
  mask = np.asarray(sequences.completion_mask(tokens, task.model.tokenizer.eos_id))
  ref_logps = task.logps(task.model.params, prompts, tokens, mask)
  scores = rng.normal(size=(5, 3)).astype(np.float32)
  ones = np.ones(5, np.float32)
  return language_offline.Samples(
    *task.encode_prompts(prompts), tokens, mask, ref_logps, scores, ones, prompts
  )


def _log_ratios(task, rows, ref_logps):
  logps = jax.jit(task.apply_fn)(task.model.params, rows)
  return sequences.log_ratios(logps, rows.mask, np.ravel(ref_logps), reduction="sum")


# Float32 rounding of sums of eight terms of about four nats.
ROUNDING = 1e-4


def test_dro_starts_from_the_reference_and_a_value_of_zero():
  task = language_offline.make_task(tiny("dro"))
  batch = dro_paper.triples(_samples(task))
  np.testing.assert_allclose([batch.rewards.mean(), batch.rewards.std()], [0, 1], atol=1e-6)
  network = dro_paper.POLICY_AND_VALUE
  params = network.make_params(task.model.params)
  assert network.policy_of(params) is task.model.params
  apply_fn = network.make_apply_fn(task.network, logps_chunk=32)
  loss = functools.partial(dro.loss, apply_fn=apply_fn, config=dro.Config(tau=0.2))
  _, (metrics, _) = jax.jit(loss)(params, None, batch, None)
  assert abs(metrics["dro/log_ratio"]) < ROUNDING and metrics["dro/value"] == 0
  # The residual is then the reward alone.
  np.testing.assert_allclose(metrics["dro/squared_residual"], 1, atol=ROUNDING)


def test_kto_pairs_each_prompt_with_completions_of_the_one_before():
  task = language_offline.make_task(tiny("kto"))
  found = _samples(task)
  batch = kto_paper.labelled(found, task=task)
  np.testing.assert_array_equal(batch.labels.reshape(5, 3), found.rewards > found.rewards.mean())
  np.testing.assert_array_equal(batch.mismatched_tokens[3:6], found.tokens[0])
  for prefix in ("", "mismatched_"):
    tokens, mask, ref_logps = (
      getattr(batch, f"{prefix}{x}") for x in ("tokens", "mask", "ref_logps")
    )
    rows = sequences.Sequences(tokens, mask, batch.prompt_tokens, batch.prompt_mask)
    ratios = _log_ratios(task, rows, ref_logps)
    np.testing.assert_allclose(ratios, 0, atol=ROUNDING)
  assert isinstance(batch, kto.Batch)


def test_srpo_caches_the_reference_of_all_six_rows_and_shows_the_answers():
  """Compares the six log-probabilities, whose order is easily wrong, with a pass over the rows."""
  reviser = revision.Reviser(language_offline.make_task(tiny("srpo")))
  task = reviser.task
  batch = reviser.pairs(_samples(task))
  rows = srpo.six_sequences(batch)
  ratios = _log_ratios(task, rows, batch.ref_logps)
  np.testing.assert_allclose(ratios, 0, atol=ROUNDING)
  assert np.ptp(batch.ref_logps, axis=1).min() > 0.01  # different numbers: order matters
  shown = task.decode(batch.given_rejected_tokens, batch.given_rejected_mask)
  rejected = task.decode(batch.rejected_tokens, batch.rejected_mask)
  for text, answer, prompt in zip(shown, rejected, task.train_prompts, strict=False):
    assert text == f"{answer.strip()} < {prompt}"


def test_an_answer_that_grew_is_cut_at_its_end_to_fit():
  reviser = revision.Reviser(language_offline.make_task(tiny("srpo")))
  (text,) = reviser.prompts(["The soup"], ["x" * 90 + " "])
  assert text == "x" * (80 - len(" < The soup")) + " < The soup"
  with pytest.raises(ValueError, match=r"6 tokens more than data\.revision_length=80: raise it"):
    reviser.prompts(["p" * 83], ["x"])


@pytest.mark.parametrize(
  ("paper", "changes", "match"),
  [
    ("srpo", {"data.revision_template": "{answer}"}, r"holds {prompt} 0 times"),
    ("srpo", {"data.revision_template": "{prompt}{answer}{answer}"}, r"holds {answer} 2 times"),
    ("srpo", {"data.revision_length": "20"}, "data.revision_length=20: data.revision_template"),
    ("srpo", {"data.revision_length": "250"}, "exceeds the context"),
    ("srpo", {"eval.num_revisions": "-1"}, "eval.num_revisions=-1"),
    ("copg", {"data.prompt_template": "TL;DR"}, r"data.prompt_template='TL;DR' holds {prompt}"),
    ("rloo", {"data.scored": "a.jsonl"}, "data.scored=a.jsonl: rloo learns from completions that"),
    ("rloo", {"data.temperature": "0.7"}, "data.temperature=0.7"),
    ("rloo", {"data.num_samples": "1"}, "data.num_samples=1"),
    ("online_ipo", {"data.num_samples": "3"}, "data.num_samples=3 must be 2"),
    ("nash_md", {"data.mixture_beta": "1.5"}, "data.mixture_beta"),
    ("nash_md", {"data.preference_scale": "0"}, "data.preference_scale"),
    ("nash_md", {"preference": "nowhere:f"}, "preference 'nowhere:f'"),
    ("copg", {"eval.judges": "vader, vader"}, "two judges are called 'vader'"),
    ("copg", {"eval.judges": "vowels"}, "eval.judges='vowels': vowels is the reward"),
    ("copg", {"eval.judges": "vader,mine:a_reference"}, "'a_reference' is the name of another"),
    ("copg", {"eval.judges": "nope"}, "eval.judges='nope' (commas part the judges): reward is"),
    ("frontier", {"algorithms": "('copg', 'ppo')"}, "is not one of copg, dpo"),
  ],
)
def test_bad_settings_are_named_before_any_sampling(paper, changes, match, tmp_path, capsys):
  arguments = [f"--config.{name}={value}" for name, value in changes.items()]
  assert main.run([f"--config={paper}:tiny", f"--workdir={tmp_path / 'run'}", *arguments]) == 2
  assert match in capsys.readouterr().err


def test_the_frontier_names_every_method_with_a_sentiment_preset():
  found = {name for name, module in presets.papers().items() if "sentiment" in module.PRESETS}
  assert set(frontier_paper.NAMES) == found - {"frontier"}


# --- online steps ---


def test_an_online_batch_is_judged_on_the_prompts_as_written_and_scored_by_the_reference():
  task = language_offline.make_task(tiny("rloo"))
  asked = []

  def count_letters(prompts, completions):
    asked.extend(prompts)
    return [sum(map(str.isalpha, text)) for text in completions]

  task = dataclasses.replace(
    task, reward_fn=rewards.Reward("own:letters", count_letters, "", "own:letters")
  )
  index = jnp.array([3, 0])
  chosen = [task.train_prompts[i] for i in (3, 0)]
  this_round = language_online.Round(task, task.model.params, index, None)
  learner = rloo_paper.rloo.State(task.model.params, (), jnp.int32(0))
  prompts = sequences.Prompts(*task.encode_prompts(chosen))
  batch = jax.jit(functools.partial(rloo_paper.collect, this_round=this_round))(
    learner, prompts, jax.random.key(0)
  )
  assert asked == [chosen[0]] * 4 + [chosen[1]] * 4
  tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
  texts = task.decode(*(x.reshape(8, -1) for x in (tokens, mask)))
  np.testing.assert_array_equal(batch.rewards.ravel(), count_letters([], texts))
  fresh = task.logps(task.model.params, chosen, tokens, mask)
  np.testing.assert_allclose(batch.ref_logps, fresh, atol=ROUNDING)


def test_pairs_are_judged_by_rewards_or_by_a_function_of_the_users():
  task = language_offline.make_task(tiny("nash_md"))
  tokens, mask = task.model.tokenizer.encode("aeiou"), np.ones((1, 5), np.float32)
  vowels = sequences.Sequences(jnp.array([tokens]), mask)
  others = sequences.Sequences(jnp.array([task.model.tokenizer.encode("tuvwx")]), mask)
  index = jnp.array([0])
  this_round = language_online.Round(task, None, index, None)
  want = 1 / (1 + np.exp(-(1 - 1 / 5) / 0.25))
  np.testing.assert_allclose(this_round.preferences(vowels, others), want, rtol=1e-6)
  longer = rewards.Preference("own:f", lambda prompts, first, second: [float(first < second)])
  this_round = dataclasses.replace(this_round, preference_fn=longer)
  np.testing.assert_array_equal(this_round.preferences(vowels, others), 1)
  with pytest.raises(ValueError, match=r"preference own:f returned .*2"):
    dataclasses.replace(longer, function=lambda *texts: [2.0])(["p"], ["a"], ["b"])


def _learned_judge(folder, kind):
  """Writes a reward or preference model of random numbers, and returns its folder."""
  model = pretrained.load("tiny-random")
  params = scalar_head.from_decoder(model.params)
  kernel = np.random.default_rng(0).normal(size=model.config.width).astype(np.float32)
  params["scalar_head"] = {"kernel": kernel, "bias": np.float32(0.3)}
  settings = learned_rewards.Settings(kind, prompt_length=12, completion_length=6)
  learned_rewards.save(folder, settings, model.config, params, tokenizer=model.tokenizer)
  return str(folder)


@pytest.mark.parametrize("kind", reward_model.KINDS)
def test_a_learned_judge_inside_a_step_says_what_it_says_outside(kind, tmp_path):
  folder = _learned_judge(tmp_path / "judge", kind)
  config = tiny("online_ipo", preference=folder)
  task = language_offline.make_task(config)
  rng = np.random.default_rng(1)
  tokens = rng.integers(0, task.network.vocab_size, (2, 6, 8), dtype=np.int32)
  tokens[:, ::2, 5] = task.model.tokenizer.eos_id  # some are cut to fit the judge, some end
  mask = np.asarray(sequences.completion_mask(tokens, task.model.tokenizer.eos_id))
  sides = [sequences.Sequences(*side) for side in zip(tokens, mask, strict=True)]
  index = np.array([5, 0, 7])  # two completions each
  prompts = [task.train_prompts[i] for i in index.repeat(2)]
  texts = [task.decode(side.tokens, side.mask, prompts) for side in sides]
  judge = rewards.resolve_preference(folder)

  @jax.jit
  def inside(params, index, *sides):
    found = language_online.Round(task, None, index, judge, judge_params=params)
    return found.preferences(*sides)

  want = judge(prompts, *texts)
  assert np.ptp(want) > 0.1
  got = inside(judge.learned.params, index, *sides)
  np.testing.assert_allclose(got, want, atol=1e-5)  # rows are padded to another width
  if kind == "bradley_terry":
    scored = dataclasses.replace(task, reward_fn=rewards.resolve(folder))
    this_round = language_online.Round(scored, None, index, None, judge_params=judge.learned.params)
    np.testing.assert_allclose(
      this_round.rewards(sides[0]), scored.reward_fn(prompts, texts[0]), atol=1e-4
    )


def test_a_learned_judge_is_not_in_the_checkpoint(tmp_path):
  # So another reward may evaluate the run, and runs of earlier versions go on.
  experiments = {
    reward: rloo_paper.build(tiny("rloo", reward=reward, network__lora_rank=2, **int8))
    for reward, int8 in (
      (_learned_judge(tmp_path / "judge", "bradley_terry"), {"network__lora_base": "int8"}),
      ("vowels", {"network__lora_base": "int8"}),
    )
  }
  learned, plain = experiments.values()
  states = [jax.eval_shape(x.init, jax.random.key(0), *x.init_args) for x in (learned, plain)]
  assert jax.tree.leaves(learned.saved(states[0])) == jax.tree.leaves(states[1])
  rebuilt = learned.rebuilt(learned.saved(states[0]))
  assert jax.tree.structure(rebuilt) == jax.tree.structure(states[0])
  mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 2}, jax.devices()[:4])
  sharding.infer_shardings(states[0], learned.rules, mesh)  # the rules fit an int8 base, too


@pytest.mark.slow  # two compilations of a step with two models
def test_a_learned_reward_on_eight_devices_is_that_of_one(tmp_path):
  # A model that runs on the host inside a step waits for devices that wait for it.
  folder = _learned_judge(tmp_path / "judge", "bradley_terry")
  experiment = rloo_paper.build(tiny("rloo", reward=folder, optimizer__warmup_steps=0))
  batch = next(experiment.batches())[1]

  def run(axes, num_devices):
    mesh = sharding.make_mesh(axes, jax.devices()[:num_devices])
    state = sharding.init_sharded(
      experiment.init, mesh, experiment.rules, jax.random.key(0), *experiment.init_args
    )
    step = sharding.jit_update(experiment.update, mesh, experiment.rules)
    state, metrics = step(state, sharding.shard_batch(batch, mesh), jax.random.key(1))
    for before, after in zip(
      jax.tree.leaves(experiment.init_args[1]), jax.tree.leaves(state.judge_params), strict=True
    ):
      np.testing.assert_array_equal(before, after)
    return jax.device_get(metrics)

  one = run({"data": 1, "fsdp": 1, "tensor": 1}, 1)
  eight = run({"data": 2, "fsdp": 2, "tensor": 2}, 8)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), eight, one)


@pytest.mark.slow  # three compilations of a step that draws from two models
def test_an_online_run_resumes_to_the_bit(tmp_path):
  config = tiny("nash_md", train__num_steps=4, checkpoint__every=2, eval__every=0)
  whole, stopped = tmp_path / "whole", tmp_path / "stopped"

  class Crash(Exception):
    pass

  def experiment(crash_at=None):
    made = nash_md_paper.build(config)

    class Data:
      """Stops the run while it fetches the batch of a step."""

      def __init__(self):
        self.inner, self.step = made.batches(), 0

      def __next__(self):
        if self.step == crash_at:
          raise Crash
        self.step += 1
        return next(self.inner)

      def get_state(self):
        return self.inner.get_state()

      def set_state(self, state):
        self.inner.set_state(state)

    return dataclasses.replace(made, batches=Data, evaluate=None, export=None, figures=None)

  training.train(experiment(), config, whole)
  with pytest.raises(Crash):
    training.train(experiment(crash_at=3), config, stopped)
  outcome = training.train(experiment(), config, stopped)
  assert [record["step"] for record in outcome.history] == [0, 1, 2, 3]
  states = [training.restore(experiment(), config, folder).state for folder in (whole, stopped)]
  jax.tree.map(np.testing.assert_array_equal, *states)
  reference = pretrained.load("tiny-random").params
  jax.tree.map(np.testing.assert_array_equal, states[0].ref_params, reference)


@pytest.mark.slow  # three compilations of a step that draws, judges, scores and learns
def test_an_online_step_on_eight_devices_is_that_of_one():
  config = tiny("nash_md", optimizer__warmup_steps=0, data__mixture_beta=0.25)
  experiment = nash_md_paper.build(config)
  batches = [next(experiment.batches())[1] for _ in range(2)]

  def run(axes, num_devices):
    mesh = sharding.make_mesh(axes, jax.devices()[:num_devices])
    step = sharding.jit_update(experiment.update, mesh, experiment.rules)
    state = sharding.init_sharded(
      experiment.init, mesh, experiment.rules, jax.random.key(0), *experiment.init_args
    )
    records = []
    for i, batch in enumerate(batches):
      state, metrics = step(state, sharding.shard_batch(batch, mesh), jax.random.key(i))
      records.append(jax.device_get(metrics))
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(state)} == {num_devices}
    return records, jax.device_get(state.learner.params)

  records, params = run({"data": 1, "fsdp": 1, "tensor": 1}, 1)
  start = jax.device_get(experiment.init_args[0])
  largest = max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), params, start)))
  assert largest > 0.9 * config.optimizer.learning_rate  # it has learned
  for axes in ({"data": 8, "fsdp": 1, "tensor": 1}, {"data": 2, "fsdp": 2, "tensor": 2}):
    many_records, many_params = run(axes, 8)
    for one, many in zip(records, many_records, strict=True):
      # The same completions and judgements: one other token would move these by percents.
      for name, value in one.items():
        np.testing.assert_allclose(
          many[name], value, rtol=1e-3, atol=1e-5, err_msg=f"{name} {axes}"
        )
    # Adam divides by the gradient's size, which enlarges rounding where the gradient is near zero.
    for one, many in zip(jax.tree.leaves(params), jax.tree.leaves(many_params), strict=True):
      assert np.mean(np.abs(many - one) > 0.01 * largest) < 1e-3, axes


# --- the paper presets ---

_WIDE = {"max_length": 4096, "dtype": "bfloat16", "remat": True}
NETWORKS = {
  "meta-llama/Llama-2-7b-hf": transformer.TransformerConfig(
    vocab_size=32_000, num_layers=32, width=4096, num_heads=32, num_kv_heads=32, head_dim=128,
    mlp_width=11_008, tied_head=False, **_WIDE,
  ),
  "google/flan-t5-large": t5.T5Config(
    vocab_size=32_128, num_layers=24, num_decoder_layers=24, width=1024, num_heads=16, head_dim=64,
    mlp_width=2816, dtype="bfloat16", remat=True,
  ),
}  # fmt: skip
# Parameters that are trained, in billions: 7B; two networks of 0.78B, without a head for the value.
PAPERS = {
  "copg": (copg_paper, 6.74),
  "dro": (dro_paper, 1.53),
  "nash_md": (nash_md_paper, 0.78),
  "srpo": (srpo_paper, 6.74),
  "dpo": (dpo_paper, 6.74),
  "kto": (kto_paper, 6.74),
  "online_ipo": (online_ipo_paper, 0.78),
  "rloo": (rloo_paper, 6.74),
}
_ALWAYS = {"copg", "dro", "srpo"}  # the others have the wiring of one of these


@pytest.mark.parametrize(
  "paper", [pytest.param(n, marks=() if n in _ALWAYS else pytest.mark.slow) for n in PAPERS]
)
def test_paper_preset_traces_at_full_size(paper, tmp_path, monkeypatch):
  """Traces model, data and update as the launcher builds them; nothing is allocated."""
  module, billions = PAPERS[paper]
  config = presets.resolve(f"{paper}:paper")
  network = NETWORKS[config.network.model]
  made_by = t5 if isinstance(network, t5.T5Config) else transformer
  shapes = jax.eval_shape(functools.partial(made_by.init_params, network), jax.random.key(0))
  words = pretrained.load("tiny-random").tokenizer
  monkeypatch.setattr(
    pretrained, "load", lambda name: pretrained.Pretrained(network, shapes, words, "none")
  )
  monkeypatch.setattr(
    language_offline.Task, "logps", lambda self, params, prompts, tokens, mask: mask.sum(-1)
  )
  # Enough prompts for a batch and an evaluation, each of the maximal length.
  template = config.data.prompt_template.replace("{prompt}", "")
  length = config.data.prompt_length - len(template)
  prompts = [f"{n:05d}".ljust(length, "x") for n in range(2 * config.train.batch_size)]
  rows = {
    "prompts": [{"prompt": prompt} for prompt in prompts],
    "scored": [{"prompt": p, "completions": ["a", "b"], "rewards": [1, 0]} for p in prompts],
    "preferences": [{"prompt": p, "chosen": "a", "rejected": "b"} for p in prompts],
  }
  needed = {name: ["prompts"] for name in ("nash_md", "online_ipo", "rloo")}
  needed |= {name: ["prompts", "preferences"] for name in ("srpo", "dpo")}
  for name in needed.get(paper, ["prompts", "scored"]):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    config.data[name] = str(path)
  config.eval.num_prompts, config.data.num_prompts = 8, config.train.batch_size

  experiment = module.build(config)
  state = jax.eval_shape(experiment.init, jax.random.key(0), *experiment.init_args)
  learner = getattr(state, "learner", state)
  trained = sum(leaf.size for leaf in jax.tree.leaves(learner.params)) / 1e9
  np.testing.assert_allclose(trained, billions, atol=0.01)
  _, batch = next(experiment.batches())
  widths = {leaf.shape[-1] for leaf in jax.tree.leaves(batch) if leaf.ndim > 1}
  assert config.data.prompt_length in widths
  new_state, metrics = jax.eval_shape(experiment.update, state, batch, jax.random.key(0))
  assert jax.tree.structure(new_state) == jax.tree.structure(state)
  assert metrics["loss"].shape == ()


def test_the_paper_preset_of_ipo_traces():
  experiment = ipo_paper.build(presets.resolve("ipo:paper"))
  state = jax.eval_shape(experiment.init, jax.random.key(0))
  new_state, _ = jax.eval_shape(experiment.update, state, (), jax.random.key(0))
  assert jax.tree.structure(new_state) == jax.tree.structure(state)


def test_every_paper_preset_is_traced():
  found = {name for name, module in presets.papers().items() if "paper" in module.PRESETS}
  # Traced in preferences_test.py, game_runs_test.py and byol_mesh_test.py; compiled but never run;
  # runs of runs.
  others = {"ipo", "reward_model", "armac", "armac_sums", "nfsp", "graph_memory", "bgrl", "byol"}
  assert found == {*PAPERS, *others, "qtd", "self_predictive"}
