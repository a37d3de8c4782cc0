"""Tests of runs that train low-rank adapters: what they leave, how they resume and are refused."""

import shutil

import jax
import numpy as np
import pytest
import safetensors

import sharding
from alignment.models import huggingface, int8_base, lora, scalar_head
from experiments import main
from experiments.data import pretrained
from experiments.loop import presets
from experiments.papers import nash_md as nash_md_paper
from experiments.tasks import language_offline

LORA = ("--config.network.lora_rank=4", "--config.optimizer.learning_rate=1e-2")
SHORT = ("--config.train.num_steps=4", "--config.eval.num_prompts=16", "--config.eval.every=0")


def run(paper, folder, *arguments):
  return main.run([f"--config={paper}:tiny", f"--workdir={folder}", *LORA, *SHORT, *arguments])


def files_of(folder):
  """Metadata and the bytes of every tensor; a file's own bytes have the metadata in any order."""
  found = {}
  for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
    with safetensors.safe_open(folder / name, "np") as file:
      tensors = {key: file.get_tensor(key).tobytes() for key in file.keys()}
      found[name] = (file.metadata(), tensors)
  return found


@pytest.mark.slow
def test_a_resumed_run_leaves_the_same_adapter_and_merged_model_to_the_bit(tmp_path, capsys):
  checkpoints = ("--config.checkpoint.every=2", "--config.checkpoint.keep=2")
  assert run("ipo", tmp_path / "run", *checkpoints) == 0
  assert "low-rank adapters: 4,096 of 25,760 parameters are trained" in capsys.readouterr().out
  once = files_of(tmp_path / "run")
  base = pretrained.load("tiny-random")
  adapted = pretrained.load(str(tmp_path / "run" / "adapter"))
  _, merged = huggingface.load(tmp_path / "run" / "model")
  jax.tree.map(np.testing.assert_array_equal, merged, adapted.params)
  moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), merged, base.params)
  assert moved["layers"]["mlp"]["down"]["kernel"] > 1e-3
  assert moved["embed"]["embedding"] == moved["final_norm"]["scale"] == 0

  # As if it had been interrupted after its first checkpoint.
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
  for name in ("model", "adapter"):
    shutil.rmtree(tmp_path / "run" / name)
  (tmp_path / "run" / "results.json").unlink()
  assert run("ipo", tmp_path / "run", *checkpoints) == 0
  assert "at step 2 of 4" in capsys.readouterr().err
  assert files_of(tmp_path / "run") == once


@pytest.mark.slow  # the other kinds of wiring
@pytest.mark.parametrize("paper", ["dro", "srpo", "nash_md", "rloo", "online_ipo", "kto"])
def test_every_kind_of_method_trains_adapters(paper, tmp_path):
  assert run(paper, tmp_path / "run") == 0
  adapted = pretrained.load(str(tmp_path / "run" / "adapter"))
  _, merged = huggingface.load(tmp_path / "run" / "model")
  jax.tree.map(np.testing.assert_array_equal, merged, adapted.params)


@pytest.mark.slow
def test_a_run_on_an_int8_base_exports_its_weights_in_full(tmp_path):
  assert run("ipo", tmp_path / "run", "--config.network.lora_base=int8") == 0
  _, merged = huggingface.load(tmp_path / "run" / "model")
  adapted = pretrained.load(str(tmp_path / "run" / "adapter"))  # on the base in full
  base = pretrained.load("tiny-random").params
  scales = int8_base.quantise(base)["layers"]
  np.testing.assert_array_equal(merged["embed"]["embedding"], base["embed"]["embedding"])
  for part, names in (("attention", ("query", "output")), ("mlp", ("gate", "down"))):
    for name in names:
      error = np.abs(
        merged["layers"][part][name]["kernel"] - adapted.params["layers"][part][name]["kernel"]
      )
      limit = 0.501 * scales[part][name]["kernel_scale"][:, None]
      assert np.all(error <= limit) and error.max() > 0.1 * limit.max()


def test_an_int8_base_needs_adapters():
  section = presets.resolve("ipo:tiny").network
  section.lora_base = "int8"
  with pytest.raises(ValueError, match=r"lora_base=int8 freezes the model, and.*lora_rank=0"):
    language_offline.load_base(section)
  section.lora_rank = 4
  found, full = language_offline.load_base(section), pretrained.load("tiny-random")
  assert found.params["layers"]["mlp"]["up"]["kernel"].dtype == np.int8
  assert found.fingerprint != full.fingerprint  # cached samples are of one base


@pytest.mark.slow  # a scalar head beside the adapters
def test_a_reward_model_of_adapters_is_exported_whole(tmp_path):
  assert run("reward_model", tmp_path / "run") == 0
  _, params, _ = scalar_head.load(tmp_path / "run" / "model")
  base = pretrained.load("tiny-random").params
  for name in ("gate", "down"):
    moved = params["layers"]["mlp"][name]["kernel"] - base["layers"]["mlp"][name]["kernel"]
    assert np.abs(moved).max() > 1e-4
  np.testing.assert_array_equal(params["embed"]["embedding"], base["embed"]["embedding"])


@pytest.mark.slow  # compiles two samplers; `lora_test` reads the memory of a larger step
def test_an_online_step_has_one_model_as_base_and_reference():
  changes = [("network.lora_rank", "4"), ("data.num_prompts", "8")]
  experiment = nash_md_paper.build(presets.override(presets.resolve("nash_md:tiny"), changes))
  state = experiment.init(jax.random.key(0), *experiment.init_args)
  _, batch = next(experiment.batches())
  base, size = state.ref_params, lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
  step = jax.jit(experiment.update, donate_argnums=0).lower(state, batch, jax.random.key(0))
  plan = step.compile().memory_analysis()
  # Adapters, their average and two moments; counters and the key in what is left.
  small = size(batch) + 4 * size(state.learner.params)
  assert plan.argument_size_in_bytes < size(base) + small + 10_000
  assert plan.alias_size_in_bytes >= size(base)  # passed through in place
  shardings = sharding.infer_shardings(state, experiment.rules, _mesh())
  adapter = shardings.learner.params["layers"]["mlp"]["up"][lora.A]
  assert adapter.spec == jax.P(None, "fsdp")
  before = jax.tree.map(np.array, base)
  new_state, _ = step.compile()(state, batch, jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, new_state.ref_params, before)


def _mesh():
  return sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


@pytest.mark.parametrize(
  ("paper", "argument", "match"),
  [
    ("ipo", "lora_base=int4", "network.lora_base must be one of"),
    ("ipo", "lora_rank=-1", "network.lora_rank must be an integer >= 0, got -1"),
    ("ipo", "lora_rank=33", "rank=33 exceeds the smaller side of layers/attention/key, 32 x 16"),
    ("ipo", "lora_alpha=0.0", "network.lora_alpha must be positive"),
    ("nash_md", "lora_targets=q_proj", "targets has ['q_proj']"),
    ("reward_model", "train=head", "network.train='all', or network.lora_rank=0"),
  ],
)
def test_bad_settings_are_named_before_anything_is_sampled(
  paper, argument, match, tmp_path, capsys
):
  assert run(paper, tmp_path / "run", f"--config.network.{argument}") == 2
  printed = capsys.readouterr()
  assert match in printed.err and "sampling" not in printed.out
