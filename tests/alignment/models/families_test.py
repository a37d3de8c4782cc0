"""The families of language models: each equals transformers, in every way that it is run."""

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

import sharding
from alignment import sequences
from alignment.models import (
  attention,
  families,
  huggingface,
  layout,
  rotary,
  sampling,
  tokenizer,
  transformer,
)

_SPEC = importlib.util.spec_from_file_location(
  "make_golden", pathlib.Path(__file__).parent / "make_golden.py"
)
make_golden = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(make_golden)

# Measured differences are below 3e-5 at logits of 1 to 7.
TOLERANCE = 1e-4
CASES = list(make_golden.FAMILY_CASES)


def _slow_but(*quick):
  return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


# One case of each family, and one of each kind of layer; the others run with the slow tests.
_VARIANTS = {"linear_rope", "biases", "qwen2_windows", "pythia_serial", "longrope_short"}
FAMILIES = _slow_but(*(set(CASES) - _VARIANTS))
LAYERS = _slow_but("gemma2", "gpt2")
TOKENS = np.asarray(make_golden.TOKENS, np.int32)


def _load(case):
  return huggingface.load(make_golden.FOLDER / case)


def _logits(config, params):
  return tiny_checkpoints.logits(params, config, TOKENS)


def _fields(case):
  return json.loads((make_golden.FOLDER / case / "config.json").read_text())


# --- the function ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FAMILIES)
def test_logits_equal_the_golden_ones_of_transformers(case):
  got = _logits(*_load(case))
  want = np.load(make_golden.FOLDER / case / "logits.npy")
  np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("case", "changes"),
  [
    ("mistral", {"sliding_window": 6}),
    ("qwen2_windows", {"window_layers": (True, False)}),
    ("gemma2", {"logit_softcap": None}),
    ("gemma2", {"attention_softcap": None}),
    ("gemma2", {"attention_scale": None}),
    ("gemma2", {"embedding_scale": 1.0}),
    ("gemma2", {"activation": "silu"}),
    ("gemma2", {"window_layers": (False, True)}),
    ("gemma3", {"local_rope_theta": None}),
    ("gemma3", {"rope_scaling": None}),
    ("smollm3", {"rotary_layers": (False, True)}),
    ("phi3", {"rotary_dims": None}),
    ("yarn_rope", {"rope_scaling": rotary.YarnScaling(4.0, 16)}),
    ("longrope", {"rope_scaling": None}),
    ("longrope", {"rope_scaling": rotary.LongScaling((1.0, 1.1, 1.3), (1.2, 2.5, 7.0), 16)}),
    ("longrope_short", {"rope_scaling": None}),
    ("pythia", {"norm_placement": "pre"}),
  ],
)
def test_goldens_notice_a_wrong_setting(case, changes):
  config, params = _load(case)
  wrong = _logits(dataclasses.replace(config, **changes), params)
  want = np.load(make_golden.FOLDER / case / "logits.npy")
  assert np.abs(wrong - want).max() > 100 * TOLERANCE


@pytest.mark.parametrize("case", LAYERS)
def test_cached_generation_equals_teacher_forcing(case):
  """Also where completions share their prompt, and with padding on either side."""
  config, params = _load(case)
  prompt = TOKENS[:, :8]
  mask = np.ones(prompt.shape, np.float32)
  mask[0, :3] = 0
  mask[1, 6:] = 0
  with jax.default_matmul_precision("highest"):
    samples = sampling.generate(
      params, prompt, mask, jax.random.key(0),
      config=config, max_new_tokens=9, eos_id=-1, pad_id=0, num_samples=2,
    )  # fmt: skip
    batch = sequences.Sequences(samples.tokens, samples.mask, prompt, mask)
    apply_fn = jax.jit(transformer.make_apply_fn(config, logps_chunk=20))
    shared = apply_fn(params, batch)
    alone = apply_fn(params, sequences.repeat_prompts(batch))
  # float32 sums in another order, log-probabilities of size 5
  np.testing.assert_allclose(shared, alone, atol=5e-5)
  np.testing.assert_allclose(samples.logps, alone, atol=5e-5)


@pytest.mark.parametrize("new", [8, pytest.param(9, marks=pytest.mark.slow), 10])
def test_generation_has_the_factors_of_its_longest_completion(new):
  """Around the border of 16 tokens, the last of which is never read; so has teacher forcing."""
  config, params = _load("longrope")
  prompt, mask = TOKENS[:, :8], np.ones((2, 8), np.float32)
  with jax.default_matmul_precision("highest"):
    samples = sampling.generate(
      params, prompt, mask, jax.random.key(0),
      config=config, max_new_tokens=new, eos_id=-1, pad_id=0, num_samples=2,
    )  # fmt: skip
    batch = sequences.Sequences(samples.tokens, samples.mask, prompt, mask)
    shared = jax.jit(transformer.make_apply_fn(config))(params, batch)
    rows = np.concatenate([np.repeat(prompt, 2, axis=0), samples.tokens], axis=1)[:, :-1]
    full = tiny_checkpoints.logits(params, config, rows)[:, 7:]
  alone = jnp.take_along_axis(jax.nn.log_softmax(full), samples.tokens[..., None], axis=-1)[..., 0]
  # float32 sums in another order, log-probabilities of size 5
  np.testing.assert_allclose(shared, alone, atol=5e-5)
  np.testing.assert_allclose(samples.logps, alone, atol=5e-5)
  scaling = config.rope_scaling
  want = scaling.long_factors if 8 + new - 1 > 16 else scaling.short_factors
  fixed = dataclasses.replace(scaling, short_factors=want, long_factors=want)
  with_fixed = dataclasses.replace(config, rope_scaling=fixed)
  np.testing.assert_allclose(
    tiny_checkpoints.logits(params, with_fixed, rows)[:, 7:], full, atol=5e-5
  )


def test_a_window_counts_real_tokens():
  mask = jnp.array([[0, 1, 1, 1, 1], [1, 1, 0, 1, 1]])
  seen = attention.attention_bias(mask, window=2) == 0
  want = [
    [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]],
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 1, 1]],
  ]
  np.testing.assert_array_equal(seen, want)


def test_a_window_as_long_as_the_row_costs_nothing():
  config = tiny_checkpoints.make_config()
  params = tiny_checkpoints.make_params(config)
  wide = dataclasses.replace(config, sliding_window=TOKENS.shape[1])

  def program(config):
    return transformer.logits.lower(params, TOKENS, TOKENS >= 0, config=config).as_text()

  assert program(wide) == program(config)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gemma3", "pythia"])
def test_rematerialised_layers_and_copies_change_no_number(case):
  config, params = _load(case)
  batch = sequences.Sequences(TOKENS[:, 8:], np.ones((2, 16)), TOKENS[:, :8], np.ones((2, 8)))

  def run(**changes):
    apply_fn = transformer.make_apply_fn(dataclasses.replace(config, **changes), logps_chunk=20)
    loss = jax.jit(jax.value_and_grad(lambda p: jnp.sum(apply_fn(p, batch))))
    return jax.tree.leaves(loss(params))

  for want, got in zip(run(), run(remat=True, scan_layers=False), strict=True):
    np.testing.assert_allclose(got, want, atol=2e-4, rtol=1e-4)  # sums in another order


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FAMILIES)
def test_a_saved_folder_has_the_tensors_and_the_settings_that_were_read(case, tmp_path):
  config, params = _load(case)
  huggingface.save(tmp_path / "one", config, params)
  huggingface.save(tmp_path / "cut", config, params, shard_bytes=4000)
  assert len(list((tmp_path / "cut").glob("model-*.safetensors"))) > 2
  ours = safetensors.numpy.load_file(tmp_path / "one" / "model.safetensors")
  theirs = safetensors.numpy.load_file(make_golden.FOLDER / case / "model.safetensors")
  assert ours.keys() == theirs.keys()
  for name, tensor in theirs.items():
    assert tensor.tobytes() == ours[name].tobytes(), name
  for folder in ("one", "cut"):
    loaded_config, loaded = huggingface.load(tmp_path / folder)
    assert loaded_config == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
  fields = json.loads((tmp_path / "one" / "config.json").read_text())
  assert fields["model_type"] == make_golden.FAMILY_CASES[case][0]
  assert fields["architectures"] == _fields(case)["architectures"]


def test_a_save_replaces_a_model_of_several_files(tmp_path):
  config, params = _load("gpt2")
  huggingface.save(tmp_path / "model", config, params, shard_bytes=4000)
  huggingface.save(tmp_path / "model", config, params)
  assert {path.name for path in (tmp_path / "model").iterdir()} == {
    "config.json", "model.safetensors"
  }  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_torch_reads_what_we_save(case, tmp_path):
  pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  config, params = _load(case)
  huggingface.save(tmp_path / "model", config, params, shard_bytes=4000)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "model", attn_implementation="eager"
  )
  want = np.load(make_golden.FOLDER / case / "logits.npy")
  np.testing.assert_allclose(make_golden.torch_logits(model.eval()), want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_live_parity_with_torch(case, tmp_path):
  pytest.importorskip("torch")
  kind, changes = make_golden.FAMILY_CASES[case]
  model = make_golden.make_model(changes, seed=100, kind=kind)
  model.save_pretrained(tmp_path)
  want = make_golden.torch_logits(model)
  np.testing.assert_allclose(_logits(*huggingface.load(tmp_path)), want, atol=TOLERANCE, rtol=0)


def test_adjacent_pairs_are_saved_as_half_pairs_of_the_same_function(tmp_path):
  """Biases and the scales of head norms move with the columns."""
  config = tiny_checkpoints.make_config(
    rope_pairing="adjacent", head_norms=True, qkv_bias=True, output_bias=True
  )
  params = tiny_checkpoints.make_params(config)
  before = tiny_checkpoints.logits(params, config)
  huggingface.save(tmp_path / "model", config, params)
  after = tiny_checkpoints.logits(*huggingface.load(tmp_path / "model")[::-1])
  np.testing.assert_allclose(after, before, atol=2e-5, rtol=0)  # sums in another order


def test_tokenizer_and_chat_template_go_with_a_family(tmp_path):
  config, words = _tiny("qwen3"), tiny_checkpoints.make_tokenizer()
  huggingface.save(tmp_path / "m", config, tiny_checkpoints.make_params(config), tokenizer=words)
  loaded = tokenizer.load(tmp_path / "m")
  messages = [{"role": "user", "content": "soup"}]
  assert loaded.fingerprint == words.fingerprint
  assert loaded.apply_chat(messages) == words.apply_chat(messages)
  assert huggingface.load(tmp_path / "m")[0] == config


def _tiny(kind):
  """A config of a family with the vocabulary of the tiny tokenizer."""
  family = families.FAMILIES[kind]
  return tiny_checkpoints.make_config(norm_epsilon=1e-6, **family.fixed)


def test_files_of_the_bare_model_are_read(tmp_path):
  """As on the hub for GPT-2: no prefix, and the causal mask as a buffer."""
  shutil.copytree(make_golden.FOLDER / "gpt2", tmp_path / "model")
  path = tmp_path / "model" / "model.safetensors"
  bare = {
    name.removeprefix("transformer."): tensor
    for name, tensor in safetensors.numpy.load_file(path).items()
  }
  bare["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)
  safetensors.numpy.save_file(bare, path)
  jax.tree.map(
    np.testing.assert_array_equal, huggingface.load(tmp_path / "model")[1], _load("gpt2")[1]
  )


def test_a_model_that_no_family_has_is_refused_before_anything_is_written(tmp_path):
  config = tiny_checkpoints.make_config(attention_softcap=9.0)
  with pytest.raises(ValueError, match="no family of models"):
    huggingface.save(tmp_path / "m", config, tiny_checkpoints.make_params(config))
  assert not list(tmp_path.iterdir())


def test_every_family_has_a_case():
  assert {kind for kind, _ in make_golden.FAMILY_CASES.values()} == set(families.FAMILIES)


# --- keys of config.json --------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_each_key_that_a_family_reads_is_checked_or_used(case):
  """Every honoured key, with a value of another type, changes the config or is refused by name."""
  fields = _fields(case)
  family = families.FAMILIES[fields["model_type"]]
  before = huggingface.from_config_json(fields)
  for key in family.keys & fields.keys():
    if fields[key] is None or key in ("dtype", "rope_parameters"):
      continue
    odd = not fields[key] if isinstance(fields[key], bool) else "odd"
    if odd is True and key == "use_sliding_window":
      continue  # `layer_types` stands beside it
    try:
      assert huggingface.from_config_json({**fields, key: odd}) != before, key
    except ValueError as error:
      assert key in str(error)


@pytest.mark.parametrize(
  ("case", "changes", "match"),
  [
    ("mistral", {"sliding_window": "no"}, "sliding_window must be an integer"),
    ("phi3", {"original_max_position_embeddings": 0}, "original_max_position_embeddings must be"),
    ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "it has 'longrope' alone"),
    (
      "longrope",
      {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": None}},
      r"rope_scaling\['long_factor'\]=None must be a list of numbers",
    ),
    (
      "longrope",
      {"rope_scaling": {"type": "su", "short_factor": [1.0, -1.0], "long_factor": [1.0]}},
      r"short_factor'\]\[1\]=-1.0 must be a positive number",
    ),
    (
      "longrope",
      {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 4}},
      "rope_scaling has 1 short_factors, but 8 features of a head are rotated: give 4",
    ),
    ("mistral", {"sliding_window": 0}, "sliding_window must be an integer"),
    ("qwen2", {"attention_bias": True}, "attention_bias=True"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 2}, "layer_types=.*sliding_attention"),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types=.*each of the 2 layers"),
    ("qwen3", {"num_experts": 8}, "num_experts=8"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0 must be a positive"),
    ("gemma2", {"final_logit_softcapping": -1.0}, "final_logit_softcapping=-1.0"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ("gemma2", {"hidden_activation": "relu"}, "hidden_activation='relu'"),
    ("gemma3", {"rope_parameters": {"chunked": {}}}, "rope_parameters="),
    (
      "gemma3",
      {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
      "sliding_attention.*must be of type 'default'",
    ),
    ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers="),
    ("phi3", {"auto_map": {"AutoModel": "mine.Model"}}, "auto_map="),
    ("phi3", {"partial_rotary_factor": 0.5, "rope_parameters": None, "head_dim": 6}, "rotary_dims"),
    ("phi3", {"auto_map": "phi3.Model"}, "auto_map="),
    ("qwen2", {"tie_word_embeddings": "false"}, "tie_word_embeddings='false' must be true or"),
    ("qwen2", {"use_sliding_window": "false"}, "use_sliding_window='false' must be true or"),
    ("qwen2", {"hidden_act": ["silu"]}, r"hidden_act=\['silu'\]"),
    ("gpt2", {"scale_attn_weights": "false"}, "scale_attn_weights='false' must be true or"),
    ("pythia", {"use_parallel_residual": "no"}, "use_parallel_residual='no' must be true or"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ("gpt2", {"rope_theta": 1e4}, "rope_theta=10000.0 is not known"),
    ("gpt2", {"n_head": 3}, "not divisible by"),
    ("pythia", {"hidden_act": "gelu_fancy"}, "hidden_act='gelu_fancy'"),
    ("linear_rope", {"rope_parameters": {"rope_type": "linear"}}, "'linear' needs 'factor'"),
    (
      "linear_rope",
      {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}},
      r"rope_parameters\['beta_fast'\]=3 is not known to rope_type 'linear'",
    ),
  ],
)
def test_what_a_family_does_not_compute_is_refused_by_name(case, changes, match):
  with pytest.raises(ValueError, match=match):
    huggingface.from_config_json({**_fields(case), **changes})


@pytest.mark.parametrize(
  ("case", "more"),
  [
    ("phi3", {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "embd_pdrop": 0.1}),
    ("phi3", {"original_max_position_embeddings": 64, "attention_bias": False}),
    ("longrope", {"full_attn_mod": 1, "auto_map": {"AutoTokenizer": "some/words"}}),
    ("gpt2", {"n_ctx": 64, "summary_type": "cls_index", "reorder_and_upcast_attn": True}),
    ("gemma2", {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}),
    ("qwen2", {"use_mrope": False, "max_window_layers": 21}),
    ("pythia", {"classifier_dropout": 0.1}),
  ],
)
def test_keys_that_change_nothing_are_read(case, more):
  fields = _fields(case)
  assert huggingface.from_config_json({**fields, **more}) == huggingface.from_config_json(fields)


# What three files of the hub say, without bookkeeping.
PUBLISHED = {
  "google/gemma-2-9b": {
    "model_type": "gemma2", "attention_bias": False, "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid", "final_logit_softcapping": 30.0, "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 3584, "intermediate_size": 14336, "max_position_embeddings": 8192,
    "num_attention_heads": 16, "num_hidden_layers": 42, "num_key_value_heads": 8,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "sliding_window": 4096, "sliding_window_size": 4096, "torch_dtype": "float32",
    "vocab_size": 256000,
  },
  "microsoft/Phi-3-mini-4k-instruct": {
    "model_type": "phi3", "attention_dropout": 0.0,
    "auto_map": {
      "AutoConfig": "configuration_phi3.Phi3Config",
      "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "embd_pdrop": 0.0, "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192,
    "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "original_max_position_embeddings": 4096, "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": 2047,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "attention_bias": False,
    "vocab_size": 32064,
  },
  "openai-community/gpt2": {
    "model_type": "gpt2", "activation_function": "gelu_new", "attn_pdrop": 0.1,
    "embd_pdrop": 0.1, "layer_norm_epsilon": 1e-5, "n_ctx": 1024, "n_embd": 768, "n_head": 12,
    "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None,
    "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
    "summary_use_proj": True, "task_specific_params": {"text-generation": {"do_sample": True}},
    "vocab_size": 50257,
  },
}  # fmt: skip


def test_published_files_are_read():
  read = {name: huggingface.from_config_json(fields) for name, fields in PUBLISHED.items()}
  gemma2, phi3, gpt2 = read.values()
  assert gemma2.layer_windows(8192)[:3] == (4096, None, 4096) and gemma2.attention_scale is None
  assert gemma2.tied_head and gemma2.embedding_scale == np.sqrt(3584)
  assert phi3.layer_windows(4096) == (2047,) * 32 and phi3.rotary_dims is None
  assert (gpt2.mlp_width, gpt2.head_dim, gpt2.activation) == (3072, 64, "gelu_tanh")
  for config in read.values():
    written = huggingface.to_config_json(config)
    assert huggingface.from_config_json(written) == config


def _without(fields, *keys):
  return {key: value for key, value in fields.items() if key not in keys}


def test_the_format_of_transformers_4_is_read():
  gemma = _without(_fields("gemma3"), "rope_parameters", "layer_types", "_sliding_window_pattern")
  gemma |= {
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "sliding_window_pattern": 2,
  }
  config = dataclasses.replace(_load("gemma3")[0], window_layers=(True, False, True))
  assert huggingface.from_config_json(gemma) == config
  pythia = _without(_fields("pythia"), "rope_parameters")
  pythia |= {"rotary_emb_base": 10000, "rotary_pct": 0.25}
  assert huggingface.from_config_json(pythia) == _load("pythia")[0]
  smollm3 = _without(_fields("smollm3"), "no_rope_layers", "layer_types")
  assert huggingface.from_config_json(smollm3) == _load("smollm3")[0]
  phi3 = _without(_fields("longrope"), "rope_parameters")
  for kind in ("longrope", "su", "yarn"):
    scaling = {"type": kind, "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.2, 2.5, 7.0]}
    phi3 |= {"rope_scaling": scaling, "rope_theta": 1e4, "partial_rotary_factor": 0.75}
    assert huggingface.from_config_json(phi3) == _load("longrope")[0]
  qwen2 = _without(_fields("qwen2_windows"), "layer_types")
  assert huggingface.from_config_json(qwen2) == _load("qwen2_windows")[0]


def test_yarn_computes_its_sharpness_from_mscale():
  rope = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
    "mscale": 0.7, "mscale_all_dim": 0.9,
  }  # fmt: skip
  fields = {**_fields("yarn_rope"), "rope_parameters": rope}
  scaling = huggingface.from_config_json(fields).rope_scaling
  log = 0.1 * np.log(4.0)
  assert scaling.attention_factor == pytest.approx((0.7 * log + 1) / (0.9 * log + 1))


def test_longrope_computes_its_sharpness_from_the_stretch():
  fields = _fields("longrope")
  scaling = huggingface.from_config_json(fields).rope_scaling
  assert scaling.attention_factor == pytest.approx(np.sqrt(1 + np.log(4) / np.log(16)))
  for changes, want in (({"factor": 2.0}, np.sqrt(1.25)), ({"attention_factor": 1.5}, 1.5)):
    changed = {**fields, "rope_parameters": {**fields["rope_parameters"], **changes}}
    found = huggingface.from_config_json(changed).rope_scaling
    assert found.attention_factor == pytest.approx(want)
  fields["original_max_position_embeddings"] = 64  # no stretch
  assert huggingface.from_config_json(fields).rope_scaling.attention_factor == 1


def test_dynamic_scaling_is_kept_and_changes_nothing_within_the_context(tmp_path):
  config, params = huggingface.load(make_golden.FOLDER / "plain")
  scaled = dataclasses.replace(config, rope_scaling=rotary.DynamicScaling(2.0))
  huggingface.save(tmp_path / "m", scaled, params)
  assert huggingface.load(tmp_path / "m")[0] == scaled
  np.testing.assert_array_equal(_logits(scaled, params), _logits(config, params))


# --- meshes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_sharding_rules_cover_every_parameter(case):
  config, params = _load(case)
  mesh = jax.sharding.AbstractMesh((2, 2), ("fsdp", "tensor"))
  shardings = sharding.infer_shardings(params, transformer.SHARDING_RULES, mesh)
  for path, shape in layout.shapes(config).items():
    leaf = shardings
    for key in path.split("/"):
      leaf = leaf[key]
    is_split = any(axis is not None for axis in leaf.spec)
    assert is_split == path.endswith(("kernel", "embedding")) or path.endswith("bias")
    assert len(leaf.spec) <= len(shape)
