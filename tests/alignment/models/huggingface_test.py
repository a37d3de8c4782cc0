"""Tests of alignment.models.huggingface: parity with transformers, round trips, damaged folders."""

import dataclasses
import importlib.util
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny_checkpoints

from alignment.models import huggingface, tokenizer, transformer

_HERE = pathlib.Path(__file__).parent
_SPEC = importlib.util.spec_from_file_location("make_golden", _HERE / "make_golden.py")
make_golden = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(make_golden)

CASES = list(make_golden.CASES)
# The bound; measured differences are below 1e-5 at logits of 1 to 10.
TOLERANCE = 1e-4


def _logits(config, params, tokens=make_golden.TOKENS):
  return tiny_checkpoints.logits(params, config, np.asarray(tokens, np.int32))


def _golden(case):
  folder = make_golden.FOLDER / case
  return folder, np.load(folder / "logits.npy")


# --- parity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_golden_ones_of_transformers(case):
  folder, expected = _golden(case)
  config, params = huggingface.load(folder)
  np.testing.assert_allclose(_logits(config, params), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
  ("case", "changes"),
  [
    ("plain", {"rope_pairing": "adjacent"}),
    ("grouped_queries", {"rope_pairing": "adjacent"}),
    ("theta", {"rope_theta": 1e4}),
    ("llama3_rope", {"rope_scaling": None}),
    ("plain", {"norm_epsilon": 1e-2}),
  ],
)
def test_goldens_notice_a_wrong_setting(case, changes):
  folder, expected = _golden(case)
  config, params = huggingface.load(folder)
  wrong = _logits(dataclasses.replace(config, **changes), params)
  assert np.abs(wrong - expected).max() > 100 * TOLERANCE


def test_goldens_store_what_they_are_named_after():
  configs = {case: huggingface.load(make_golden.FOLDER / case)[0] for case in CASES}
  assert configs["grouped_queries"].num_kv_heads < configs["grouped_queries"].num_heads
  assert configs["tied"].tied_head and not configs["plain"].tied_head
  assert configs["theta"].rope_theta == 5e5
  assert configs["llama3_rope"].rope_scaling is not None
  assert configs["head_dim"].head_dim * configs["head_dim"].num_heads != configs["head_dim"].width
  assert configs["sharded_bfloat16"].param_dtype == "bfloat16"


@pytest.mark.parametrize("case", CASES)
def test_live_parity_with_torch(case, tmp_path):
  pytest.importorskip("torch")
  model = make_golden.make_model(make_golden.CASES[case], seed=100)
  model.save_pretrained(tmp_path)
  config, params = huggingface.load(tmp_path)
  expected = make_golden.torch_logits(model)
  np.testing.assert_allclose(_logits(config, params), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("pairing", ["half", "adjacent"])
@pytest.mark.parametrize("tied", [True, False])
def test_torch_reads_what_we_save(tmp_path, pairing, tied):
  pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  scaling = transformer.RopeScaling(8.0, 1.0, 4.0, 64)
  config = tiny_checkpoints.make_config(
    rope_pairing=pairing, tied_head=tied, rope_theta=5e4, rope_scaling=scaling
  )
  params = tiny_checkpoints.make_params(config)
  words = tiny_checkpoints.make_tokenizer()
  huggingface.save(tmp_path / "model", config, params, tokenizer=words)
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
  assert model.config.eos_token_id == words.eos_id
  expected = make_golden.torch_logits(model, tiny_checkpoints.TOKENS)
  ours = _logits(config, params, tiny_checkpoints.TOKENS)
  np.testing.assert_allclose(ours, expected, atol=TOLERANCE, rtol=0)


def test_transformers_understands_the_saved_config(tmp_path):
  transformers = pytest.importorskip("transformers")
  config = tiny_checkpoints.make_config(
    rope_theta=5e4, rope_scaling=transformer.RopeScaling(8.0, 1.0, 4.0, 64)
  )
  huggingface.save(tmp_path / "model", config, tiny_checkpoints.make_params(config))
  theirs = transformers.AutoConfig.from_pretrained(tmp_path / "model")
  assert theirs.model_type == "llama" and theirs.tie_word_embeddings
  assert theirs.rope_parameters["rope_theta"] == 5e4
  assert theirs.rope_parameters["rope_type"] == "llama3"
  # Unknown ids stay unknown, where transformers would assume 1 and 2.
  assert theirs.eos_token_id is None and theirs.bos_token_id is None


# --- round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_is_bit_equal(tmp_path, dtype, tied):
  config = tiny_checkpoints.make_config(param_dtype=dtype, tied_head=tied, rope_theta=12345.0)
  params = jax.tree.map(jnp.asarray, tiny_checkpoints.make_params(config))
  huggingface.save(tmp_path / "a" / "model", config, params)
  loaded_config, loaded = huggingface.load(tmp_path / "a" / "model")
  assert loaded_config == config
  tiny_checkpoints.assert_bit_equal(params, loaded)


def test_round_trip_keeps_odd_bits(tmp_path):
  config = tiny_checkpoints.make_config()
  params = tiny_checkpoints.make_params(config)
  params["final_norm"]["scale"][:4] = [3.4e38, -0.0, -3.4e38, 1e-42]
  huggingface.save(tmp_path / "model", config, params)
  tiny_checkpoints.assert_bit_equal(params, huggingface.load(tmp_path / "model")[1])


@pytest.mark.parametrize("case", CASES)
def test_saving_what_transformers_wrote_keeps_its_tensors(tmp_path, case):
  folder, _ = _golden(case)
  huggingface.save(tmp_path / "model", *huggingface.load(folder))
  ours = safetensors.numpy.load_file(tmp_path / "model" / "model.safetensors")
  theirs = {}
  for path in folder.glob("*.safetensors"):
    theirs.update(safetensors.numpy.load_file(path))
  assert ours.keys() == theirs.keys()
  for name, tensor in theirs.items():
    assert tensor.tobytes() == ours[name].tobytes(), name


def test_adjacent_pairs_are_saved_as_half_pairs_of_the_same_function(tmp_path):
  config = tiny_checkpoints.make_config(rope_pairing="adjacent")
  params = tiny_checkpoints.make_params(config)
  before = _logits(config, params, tiny_checkpoints.TOKENS)
  huggingface.save(tmp_path / "model", config, params)
  loaded_config, loaded = huggingface.load(tmp_path / "model")
  assert loaded_config.rope_pairing == "half"
  after = _logits(loaded_config, loaded, tiny_checkpoints.TOKENS)
  # The same sums in another order: rounding only, at logits of 1 to 10.
  np.testing.assert_allclose(after, before, atol=2e-5, rtol=0)
  # The control: without the reordering the same weights are another function.
  wrong = _logits(dataclasses.replace(config, rope_pairing="half"), params, tiny_checkpoints.TOKENS)
  assert np.abs(wrong - before).max() > 0.1


def test_config_json_of_transformers_4_is_read():
  fields = json.loads((make_golden.FOLDER / "llama3_rope" / "config.json").read_text())
  expected = huggingface.from_config_json(fields)
  rope = fields.pop("rope_parameters")
  fields["rope_theta"] = rope.pop("rope_theta")
  fields["rope_scaling"] = rope
  assert huggingface.from_config_json(fields) == expected


def test_mistral_without_a_window_is_read():
  fields = json.loads((make_golden.FOLDER / "grouped_queries" / "config.json").read_text())
  mistral = {**fields, "model_type": "mistral", "sliding_window": None}
  assert huggingface.from_config_json(mistral) == huggingface.from_config_json(fields)


def test_half_precision_is_widened(tmp_path):
  folder, _ = _golden("plain")
  shutil.copytree(folder, tmp_path / "model")
  path = tmp_path / "model" / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  half = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
  safetensors.numpy.save_file(half, path)
  config, params = huggingface.load(tmp_path / "model")
  assert config.param_dtype == "float32"
  embedding = half["model.embed_tokens.weight"].astype(np.float32)
  np.testing.assert_array_equal(params["embed"]["embedding"], embedding)


# --- refused configs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"model_type": "bloom"}, "model_type 'bloom'.*llama"),
    ({"model_type": None}, "model_type None"),
    ({"hidden_act": "relu"}, "hidden_act='relu'"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_parameters": {"rope_type": "long"}}, "rope_type='long'"),
    ({"rope_parameters": {"rope_type": "longrope"}}, r"\['short_factor'\]=None must be a list"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn' needs 'factor'"),
    ({"rope_parameters": {"rope_type": "llama3"}}, "llama3' needs 'factor'"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "'linear' needs 'factor'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"hidden_size": None}, "hidden_size must be an integer"),
    ({"hidden_size": "16"}, "hidden_size must be an integer"),
    ({"hidden_size": 10**400}, "hidden_size must be an integer <= 2147483647"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer <= 10000"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps=1000.* must be a positive number"),
    ({"num_key_value_heads": 3}, "num_kv_heads"),
    ({"model_type": "mistral", "sliding_window": "no"}, "sliding_window must be an integer"),
    # What transformers would go by, although a plain `rope_parameters` stands beside it.
    ({"rope_scaling": {"rope_type": "long", "factor": 2}}, "rope_type='long'"),
    ({"rope_scaling": "linear"}, "rope_scaling='linear' must be an object"),
    ({"rope_parameters": {"rope_theta": None}}, "rope_theta=None must be a positive number"),
    ({"rms_norm_eps": None}, "rms_norm_eps=None must be a positive number"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be a positive number"),
    ({"num_hidden_layers": None}, "num_hidden_layers must be an integer"),
    ({"num_attention_heads": 3}, "not divisible by num_attention_heads=3"),
    ({"qk_norm": True}, "qk_norm=True is not supported"),
    ({"qkv_bias": True}, "qkv_bias=True is not supported"),
    ({"num_local_experts": 8}, "num_local_experts=8 is not supported"),
    ({"embedding_multiplier": 12.0}, "embedding_multiplier=12.0 is not supported"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
    ({"no_rope_layers": [1, 0]}, "no_rope_layers="),
    ({"attention_multiplier": 0.1}, "attention_multiplier=0.1 is not known here"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not known here"),
    ({"clip_qkv": 8}, "clip_qkv=8 is not known here"),
    ({"auto_map": {"AutoModelForCausalLM": "a.B"}}, "auto_map=.* is not known here"),
  ],
)
def test_unsupported_config_is_refused_by_name(tmp_path, changes, match):
  folder, _ = _golden("plain")
  shutil.copytree(folder, tmp_path / "model")
  path = tmp_path / "model" / "config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
  with pytest.raises(ValueError, match=match) as info:
    huggingface.load(tmp_path / "model")
  assert str(path) in str(info.value)


def test_keys_that_change_nothing_are_read():
  fields = json.loads((make_golden.FOLDER / "plain" / "config.json").read_text())
  more = {
    "use_cache": False,
    "_attn_implementation_autoset": True,
    "torchscript": False,
    "clip_qkv": None,
    "qk_norm": False,
    "logits_scaling": 1.0,
    "layer_types": ["full_attention"] * 2,
    "rope_interleaved": False,
  }
  assert huggingface.from_config_json({**fields, **more}) == huggingface.from_config_json(fields)


@pytest.mark.parametrize("theta", [{}, {"rope_theta": 7e4}])
def test_scaling_goes_before_parameters_as_in_transformers(tmp_path, theta):
  transformers = pytest.importorskip("transformers")
  fields = json.loads((make_golden.FOLDER / "llama3_rope" / "config.json").read_text())
  scaling = {**fields["rope_parameters"], "factor": 2.0, **theta}
  if not theta:
    del scaling["rope_theta"]
  fields.update(rope_scaling=scaling, rope_theta=3e4)
  (tmp_path / "config.json").write_text(json.dumps(fields))
  theirs = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters
  ours = huggingface.from_config_json(fields)
  assert ours.rope_scaling.factor == theirs["factor"] == 2
  assert ours.rope_theta == theirs["rope_theta"] == theta.get("rope_theta", 3e4)


def test_width_that_transformers_refuses_is_refused_before_anything_is_written(tmp_path):
  config = tiny_checkpoints.make_config(width=30)
  params = tiny_checkpoints.make_params(config)
  with pytest.raises(ValueError, match="hidden_size=30 is not divisible by num_attention_heads=4"):
    huggingface.save(tmp_path / "model", config, params)
  assert not list(tmp_path.iterdir())


def test_tokenizer_of_a_larger_model_is_refused(tmp_path):
  config = tiny_checkpoints.make_config(vocab_size=2)
  words = tiny_checkpoints.make_tokenizer()
  with pytest.raises(ValueError, match="special id 2, but the model 2 embeddings"):
    huggingface.to_config_json(config, tokenizer=words)


def test_end_tokens_are_written_as_they_were_read(tmp_path):
  transformers = pytest.importorskip("transformers")
  config = tiny_checkpoints.make_config()
  words = dataclasses.replace(
    tiny_checkpoints.make_tokenizer(), eos_ids=(2, 0), generation={"temperature": 0.6}
  )
  params = tiny_checkpoints.make_params(config)
  for _ in range(2):  # the second replaces the first
    huggingface.save(tmp_path / "model", config, params, tokenizer=words)
  assert transformers.AutoConfig.from_pretrained(tmp_path / "model").eos_token_id == [2, 0]
  generation = transformers.GenerationConfig.from_pretrained(tmp_path / "model")
  assert generation.eos_token_id == [2, 0] and generation.temperature == 0.6
  assert tokenizer.load(tmp_path / "model").eos_ids == (2, 0)


def test_weights_that_are_not_finite_are_named(tmp_path):
  config = tiny_checkpoints.make_config(param_dtype="bfloat16")
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_checkpoints.make_params(config))
  params["layers"]["mlp"]["up"]["kernel"][1, 0, 0] = np.nan
  huggingface.save(tmp_path / "model", config, params)
  with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight holds 1 values that are NaN"):
    huggingface.load(tmp_path / "model")


def test_adapter_is_refused(tmp_path):
  shutil.copytree(make_golden.FOLDER / "plain", tmp_path / "model")
  (tmp_path / "model" / "adapter_config.json").write_text("{}")
  with pytest.raises(ValueError, match="merge_and_unload"):
    huggingface.load(tmp_path / "model")


# --- damaged folders ------------------------------------------------------------------------------


def _edit_tensors(folder, edit):
  path = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  edit(tensors)
  safetensors.numpy.save_file(tensors, path)


def _cut(path, keep):
  path.write_bytes(path.read_bytes()[:keep])


_NORM = "model.norm.weight"
DAMAGE = {
  "no folder": (shutil.rmtree, "has no config.json"),
  "config cut": (lambda f: _cut(f / "config.json", 100), "config.json: not JSON"),
  "config list": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object"),
  "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
  "weights empty": (lambda f: _cut(f / "model.safetensors", 0), "model.safetensors .0 bytes"),
  "header cut": (lambda f: _cut(f / "model.safetensors", 100), "truncated or not a safetensors"),
  "data cut": (lambda f: _cut(f / "model.safetensors", 20000), "20000 bytes. is truncated"),
  "tensor missing": (
    lambda f: _edit_tensors(f, lambda t: t.pop(_NORM)),
    f"lacks 1 tensor.s.: {_NORM}",
  ),
  "tensor too many": (
    lambda f: _edit_tensors(f, lambda t: t.update({"model.bias": np.zeros(3, np.float32)})),
    "unknown 1 tensor.s.: model.bias",
  ),
  "wrong shape": (
    lambda f: _edit_tensors(f, lambda t: t.update({_NORM: np.zeros(3, np.float32)})),
    rf"{_NORM} has shape \[3\].*\[16\]",
  ),
  "integers": (
    lambda f: _edit_tensors(f, lambda t: t.update({_NORM: np.zeros(16, np.int8)})),
    f"{_NORM} is stored as I8",
  ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folder_is_refused(tmp_path, damage):
  folder = tmp_path / "model"
  shutil.copytree(_golden("plain")[0], folder)
  harm, match = DAMAGE[damage]
  harm(folder)
  with pytest.raises(ValueError, match=match) as info:
    huggingface.load(folder)
  assert str(folder) in str(info.value)


@pytest.mark.parametrize(
  ("harm", "match"),
  [
    (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "model-00002-of-00002"),
    (lambda f: _cut(f / "model-00001-of-00002.safetensors", 5000), "5000 bytes"),
    (lambda f: _cut(f / "model.safetensors.index.json", 200), "no readable weight_map"),
    (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "no readable weight_map"),
    (
      lambda f: (f / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {_NORM: "../plain/model.safetensors"}})
      ),
      "not in",
    ),
    (
      lambda f: (f / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"other": "model-00001-of-00002.safetensors"}})
      ),
      "lacks other",
    ),
  ],
)
def test_damaged_shards_are_refused(tmp_path, harm, match):
  folder = tmp_path / "model"
  shutil.copytree(_golden("sharded_bfloat16")[0], folder)
  harm(folder)
  with pytest.raises(ValueError, match=match):
    huggingface.load(folder)


def test_tied_model_may_store_its_head_if_it_is_the_embedding(tmp_path):
  folder = tmp_path / "model"
  shutil.copytree(_golden("tied")[0], folder)
  _edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 0}))
  config, params = huggingface.load(folder)
  np.testing.assert_allclose(_logits(config, params), _golden("tied")[1], atol=TOLERANCE, rtol=0)
  _edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
  with pytest.raises(ValueError, match="tie_word_embeddings"):
    huggingface.load(folder)


# --- saving ---------------------------------------------------------------------------------------


@pytest.fixture
def tiny():
  config = tiny_checkpoints.make_config()
  return config, tiny_checkpoints.make_params(config)


def test_save_replaces_an_earlier_checkpoint_and_leaves_nothing_else(tmp_path, tiny):
  config, params = tiny
  words = tiny_checkpoints.make_tokenizer()
  huggingface.save(tmp_path / "model", config, params, tokenizer=words)
  changed = jax.tree.map(lambda x: x + 1, params)
  huggingface.save(tmp_path / "model", config, changed, tokenizer=words)
  tiny_checkpoints.assert_bit_equal(changed, huggingface.load(tmp_path / "model")[1])
  assert tokenizer.load(tmp_path / "model").fingerprint == words.fingerprint
  assert [path.name for path in tmp_path.iterdir()] == ["model"]
  fields = json.loads((tmp_path / "model" / "config.json").read_text())
  assert (fields["eos_token_id"], fields["pad_token_id"], fields["bos_token_id"]) == (2, 2, 1)


@pytest.mark.parametrize("step", ["weights", "config", "tokenizer", "move"])
def test_failed_save_leaves_the_old_checkpoint(tmp_path, tiny, monkeypatch, step):
  config, params = tiny
  words = tiny_checkpoints.make_tokenizer()
  huggingface.save(tmp_path / "model", config, params, tokenizer=words)

  def fail(*args, **kwargs):
    raise OSError(28, "No space left on device")

  rename = pathlib.Path.rename

  def fail_to_move_in(self, target):
    if pathlib.Path(target) == tmp_path / "model" and "-old-" not in str(self):
      fail()
    return rename(self, target)

  if step == "weights":
    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
  elif step == "config":
    monkeypatch.setattr(huggingface, "to_config_json", lambda *a, **k: {"model_type": "llama"})
    monkeypatch.setattr(pathlib.Path, "write_text", fail)
  elif step == "tokenizer":
    monkeypatch.setattr(tokenizer.Tokenizer, "save", fail)
  else:
    monkeypatch.setattr(pathlib.Path, "rename", fail_to_move_in)
  with pytest.raises(OSError, match="No space left"):
    huggingface.save(
      tmp_path / "model", config, jax.tree.map(np.zeros_like, params), tokenizer=words
    )
  monkeypatch.undo()
  tiny_checkpoints.assert_bit_equal(params, huggingface.load(tmp_path / "model")[1])
  assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_save_removes_no_foreign_files(tmp_path, tiny):
  (tmp_path / "thesis.tex").write_text("years of work")
  with pytest.raises(ValueError, match=r"thesis\.tex"):
    huggingface.save(tmp_path, *tiny)
  assert (tmp_path / "thesis.tex").exists()


def test_save_refuses_a_file_in_the_place_of_the_folder(tmp_path, tiny):
  (tmp_path / "model").write_text("")
  with pytest.raises(ValueError, match="not a plain folder"):
    huggingface.save(tmp_path / "model", *tiny)


def test_save_refuses_params_of_another_config(tmp_path, tiny):
  config, params = tiny
  with pytest.raises(ValueError, match="head/kernel"):
    huggingface.save(tmp_path / "m", dataclasses.replace(config, tied_head=False), params)
  with pytest.raises(ValueError, match=r"kernel has shape .*the config asks for"):
    huggingface.save(tmp_path / "m", dataclasses.replace(config, mlp_width=65), params)
  wide = jax.tree.map(lambda x: x.astype(np.float16), params)
  with pytest.raises(ValueError, match="float16"):
    huggingface.save(tmp_path / "m", config, wide)
  assert not (tmp_path / "m").exists()
