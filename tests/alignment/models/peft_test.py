"""Tests of alignment.models.peft: the published layout, round trips, folders that are refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from alignment.models import huggingface, lora, peft
from experiments.data import pretrained
from tests import tiny_checkpoints
from tests.alignment.models import make_golden

CONFIG = lora.Config(rank=3, alpha=6.0)
# Logits of size ten, in float32.
TOLERANCE = 1e-4


def adapters_of(params, config=CONFIG):
  shapes = lora.init(params, jax.random.key(0), config=config)
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape).astype(np.float32), shapes)


def make(folder, *, pairing="half", config=CONFIG, **options):
  """Writes adapters; returns the decoder's config, its parameters and the adapters."""
  decoder = tiny_checkpoints.make_config(rope_pairing=pairing)
  params = tiny_checkpoints.make_params(decoder)
  adapters = adapters_of(params, config)
  peft.save(folder, decoder, adapters, adapter_config=config, base="some/base", **options)
  return decoder, params, adapters


def edit(folder, **changes):
  path = folder / "adapter_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("pairing", ["half", "adjacent"])
def test_round_trip_is_bit_equal(tmp_path, pairing):
  decoder, _, adapters = make(tmp_path, pairing=pairing)
  config, found = peft.load(tmp_path, decoder)
  assert (config.rank, config.alpha) == (3, 6.0)
  assert set(config.targets) == {"query", "key", "value", "output", "gate", "up", "down"}
  assert jax.tree.structure(found) == jax.tree.structure(adapters)
  jax.tree.map(np.testing.assert_array_equal, found, adapters)


def test_the_layout_is_that_of_peft(tmp_path):
  config = lora.Config(rank=3, alpha=6.0, targets=("query", "down"))
  make(tmp_path, config=config)
  tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
  start = "base_model.model.model.layers"
  assert set(tensors) == {
    f"{start}.{layer}.{module}.lora_{letter}.weight"
    for layer in (0, 1)
    for module in ("self_attn.q_proj", "mlp.down_proj")
    for letter in "AB"
  }
  assert tensors[f"{start}.0.mlp.down_proj.lora_A.weight"].shape == (3, 64)  # [r, in]
  assert tensors[f"{start}.0.mlp.down_proj.lora_B.weight"].shape == (32, 3)  # [out, r]
  fields = json.loads((tmp_path / "adapter_config.json").read_text())
  wanted = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 6.0}
  assert wanted.items() <= fields.items()
  assert fields["target_modules"] == ["down_proj", "q_proj"]
  assert fields["base_model_name_or_path"] == "some/base" == peft.base_of(tmp_path)


def merged_by_hand(base, adapter, folder):
  """Writes base + alpha / r B A of each linear layer, as PEFT's `merge_and_unload` does."""
  fields = json.loads((adapter / "adapter_config.json").read_text())
  scale = fields["lora_alpha"] / fields["r"]
  tensors = safetensors.numpy.load_file(base / "model.safetensors")
  factors = safetensors.numpy.load_file(adapter / "adapter_model.safetensors")
  for name, a in factors.items():
    if ".lora_A." in name:
      target = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
      tensors[target] = tensors[target] + scale * factors[name.replace("lora_A", "lora_B")] @ a
  folder.mkdir()
  safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
  (folder / "config.json").write_text((base / "config.json").read_text())


@pytest.mark.parametrize("pairing", ["half", "adjacent"])
def test_files_merged_by_hand_give_the_logits_of_the_adapted_network(tmp_path, pairing):
  decoder, params, adapters = make(tmp_path / "adapter", pairing=pairing)
  huggingface.save(tmp_path / "base", decoder, params)
  merged_by_hand(tmp_path / "base", tmp_path / "adapter", tmp_path / "hand")
  config, merged = huggingface.load(tmp_path / "hand")
  joined = lora.join(params, adapters, config=CONFIG)
  expected = tiny_checkpoints.logits(joined, decoder)
  assert np.abs(expected - tiny_checkpoints.logits(params, decoder)).max() > 0.1
  np.testing.assert_allclose(tiny_checkpoints.logits(merged, config), expected, atol=TOLERANCE)


@pytest.mark.parametrize("pairing", ["half", "adjacent"])
def test_torch_reads_merged_weights(tmp_path, pairing):
  pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  decoder = tiny_checkpoints.make_config(rope_pairing=pairing)
  params = tiny_checkpoints.make_params(decoder)
  joined = lora.join(params, adapters_of(params), config=CONFIG)
  huggingface.save(tmp_path / "model", decoder, lora.merge(joined))
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
  expected = make_golden.torch_logits(model, tiny_checkpoints.TOKENS)
  ours = tiny_checkpoints.logits(joined, decoder)
  np.testing.assert_allclose(ours, expected, atol=TOLERANCE, rtol=0)


def test_peft_reads_what_we_save(tmp_path):
  library = pytest.importorskip("peft")
  transformers = pytest.importorskip("transformers")
  decoder, params, adapters = make(tmp_path / "adapter", pairing="adjacent")
  huggingface.save(tmp_path / "base", decoder, params)
  base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
  model = library.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
  expected = make_golden.torch_logits(model, tiny_checkpoints.TOKENS)
  joined = lora.join(params, adapters, config=CONFIG)
  np.testing.assert_allclose(
    tiny_checkpoints.logits(joined, decoder), expected, atol=TOLERANCE, rtol=0
  )
  model.save_pretrained(tmp_path / "again")
  _, found = peft.load(tmp_path / "again", decoder)
  jax.tree.map(np.testing.assert_array_equal, found, adapters)


@pytest.mark.parametrize("family", ["gpt2", "phi3", "pythia"])
def test_matrices_that_a_family_stores_joined_have_no_place(tmp_path, family):
  config, params = huggingface.load(make_golden.FOLDER / family)
  with pytest.raises(ValueError, match="no place for layers/attention/key/lora_a"):
    peft.save(tmp_path, config, adapters_of(params), adapter_config=CONFIG, base="")


def test_the_scale_of_rslora_is_honoured(tmp_path):
  decoder, _, _ = make(tmp_path)
  edit(tmp_path, use_rslora=True)
  config, _ = peft.load(tmp_path, decoder)
  np.testing.assert_allclose(config.alpha / config.rank, 6.0 / np.sqrt(3), rtol=1e-12)  # float64


def test_a_folder_of_adapters_is_a_model_merged_with_its_base(tmp_path):
  base = pretrained.load("tiny-random")
  adapters = adapters_of(base.params)
  settings = {"adapter_config": CONFIG, "base": "tiny-random", "fingerprint": base.fingerprint}
  peft.save(tmp_path, base.config, adapters, **settings)
  found = pretrained.load(str(tmp_path))
  merged = lora.merge(lora.join(base.params, adapters, config=CONFIG))
  jax.tree.map(np.testing.assert_array_equal, found.params, merged)
  assert found.tokenizer.eos_id == base.tokenizer.eos_id
  assert found.fingerprint != base.fingerprint
  peft.save(tmp_path, base.config, adapters, **settings | {"fingerprint": "other"})
  with pytest.raises(ValueError, match="adapter of another base"):
    pretrained.load(str(tmp_path))
  edit(tmp_path, base_model_name_or_path=str(tmp_path))
  with pytest.raises(ValueError, match="names the folder itself as the base"):
    pretrained.load(str(tmp_path))


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"peft_type": "IA3"}, "peft_type='IA3' is not supported"),
    ({"use_dora": True}, "use_dora=True is not supported"),
    ({"rank_pattern": {"q_proj": 8}}, "rank_pattern=.* is not supported"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ({"a_key_of_the_future": 1}, "a_key_of_the_future"),
    ({"r": 0}, "r must be"),
    ({"r": 4}, r"has shape \[3, 32\].*asks for \[4, 32\]"),
    ({"lora_alpha": -1}, "lora_alpha=-1 must be a positive number"),
    ({"lora_alpha": []}, r"lora_alpha=\[\] must be a positive number"),
    ({"use_rslora": "false"}, "use_rslora='false' must be true or false"),
    ({"base_model_name_or_path": None}, None),
  ],
)
def test_keys_that_change_the_function_are_refused(tmp_path, changes, match):
  decoder, _, _ = make(tmp_path)
  edit(tmp_path, **changes)
  if match is None:
    peft.load(tmp_path, decoder)  # the caller knows the base
    with pytest.raises(ValueError, match="names no base_model_name_or_path"):
      peft.base_of(tmp_path)
    return
  with pytest.raises(ValueError, match=match):
    peft.load(tmp_path, decoder)


def test_a_damaged_config_is_named(tmp_path):
  path = tmp_path / "adapter_config.json"
  for text, match in (("[1]", "expected a JSON object"), ('{"r": ', "not JSON")):
    path.write_text(text)
    with pytest.raises(ValueError, match=match) as raised:
      peft.base_of(tmp_path)
    assert str(path) in str(raised.value)


def test_files_of_another_base_or_damaged_ones_are_refused(tmp_path):
  decoder, _, _ = make(tmp_path, fingerprint="a" * 64)
  for changes, match in (
    ({"num_layers": 1}, "of 1 layers does not take"),
    ({"num_layers": 3}, "lacks base_model.model.model.layers.2"),
    ({"width": 64}, "different models"),
  ):
    with pytest.raises(ValueError, match=match):
      peft.load(tmp_path, dataclasses.replace(decoder, **changes))
  with pytest.raises(ValueError, match="fingerprint aaaaaaaaaaaa, and these have bbbbbbbbbbbb"):
    peft.load(tmp_path, decoder, fingerprint="b" * 64)
  path = tmp_path / "adapter_model.safetensors"
  path.write_bytes(path.read_bytes()[:100])
  with pytest.raises(ValueError, match="missing or damaged"):
    peft.load(tmp_path, decoder)
  (tmp_path / "adapter_config.json").unlink()
  with pytest.raises(ValueError, match="has no adapter_config"):
    peft.load(tmp_path, decoder)
  scalar = {"scalar_head": {"kernel": jnp.zeros(32)}}
  with pytest.raises(ValueError, match="scalar_head/kernel"):
    peft.save(tmp_path, decoder, scalar, adapter_config=CONFIG, base="")
