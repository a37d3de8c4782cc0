"""T5 in Hugging Face folders: parity with transformers, round trips, refusals, its tokenizer."""

import dataclasses
import importlib.util
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny_checkpoints
import tiny_t5

from alignment.models import huggingface, scalar_head, t5, tokenizer

_HERE = pathlib.Path(__file__).parent
_SPEC = importlib.util.spec_from_file_location("make_golden_t5", _HERE / "make_golden_t5.py")
make_golden_t5 = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(make_golden_t5)

CASES = list(make_golden_t5.CASES)
# The bound; measured differences are below 1e-5 at logits of 3.
TOLERANCE = 1e-4


def _logits(config, params):
  arrays = (make_golden_t5.PROMPTS, make_golden_t5.MASK, make_golden_t5.TOKENS)
  with jax.default_matmul_precision("highest"):
    return t5.logits(params, *(np.asarray(x, np.int32) for x in arrays), config=config)


def _golden(case):
  folder = make_golden_t5.FOLDER / case
  return folder, np.load(folder / "logits.npy")


# --- parity ---


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_golden_ones_of_transformers(case):
  folder, expected = _golden(case)
  config, params = huggingface.load(folder)
  assert config.param_dtype == ("bfloat16" if "bfloat16" in case else "float32")
  assert config.tied_head == (case == "first")
  np.testing.assert_allclose(_logits(config, params), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
  "changes",
  [
    {"max_distance": 40},
    pytest.param({"mlp": "gated-silu"}, marks=pytest.mark.slow),
    pytest.param({"norm_epsilon": 1e-2}, marks=pytest.mark.slow),
  ],
)
def test_goldens_notice_a_wrong_setting(changes):
  folder, expected = _golden("v1_1")
  config, params = huggingface.load(folder)
  wrong = _logits(dataclasses.replace(config, **changes), params)
  assert np.abs(wrong - expected).max() > 100 * TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_live_parity_with_torch(case, tmp_path):
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  model = make_golden_t5.make_model(make_golden_t5.CASES[case], seed=100)
  model.save_pretrained(tmp_path)
  config, params = huggingface.load(tmp_path)
  expected = make_golden_t5.torch_logits(model)
  np.testing.assert_allclose(_logits(config, params), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("changes", [{}, {"tied_head": True, "mlp": "relu"}])
def test_torch_reads_what_we_save(tmp_path, changes):
  pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  config = tiny_t5.make_config(num_decoder_layers=3, max_distance=20, num_buckets=8, **changes)
  params, words = tiny_t5.make_params(config), tiny_t5.make_tokenizer()
  huggingface.save(tmp_path / "model", config, params, tokenizer=words)
  model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model").eval()
  expected = make_golden_t5.torch_logits(model)
  np.testing.assert_allclose(_logits(config, params), expected, atol=TOLERANCE, rtol=0)
  assert (model.config.eos_token_id, model.config.decoder_start_token_id) == (1, 0)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
  assert theirs("the soup!").input_ids == words.encode_prompt("the soup!")


# --- round trips and refusals ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [{"start_id": 3}, {"tied_head": True, "mlp": "relu"}])
def test_round_trip_is_bit_equal(tmp_path, dtype, changes):
  config = tiny_t5.make_config(param_dtype=dtype, num_buckets=8, norm_epsilon=1e-3, **changes)
  params = tiny_t5.make_params(config)
  huggingface.save(tmp_path / "model", config, params)
  loaded_config, loaded = huggingface.load(tmp_path / "model")
  assert loaded_config == config
  tiny_checkpoints.assert_bit_equal(loaded, params)


def test_a_value_model_is_saved_and_read(tmp_path):
  config = tiny_t5.make_config()
  params = scalar_head.from_decoder(tiny_t5.make_params(config))
  params["scalar_head"]["kernel"] += 0.5
  scalar_head.save(tmp_path / "model", config, params, tokenizer=tiny_t5.make_tokenizer())
  found_config, found, words = scalar_head.load(tmp_path / "model")
  tiny_checkpoints.assert_bit_equal(found, jax.tree.map(np.asarray, params))
  assert found_config == dataclasses.replace(config, tied_head=True) and words.ends_prompts


def _with_config(tmp_path, case, **changes):
  shutil.copytree(_golden(case)[0], tmp_path / "model")
  path = tmp_path / "model" / "config.json"
  fields = {**json.loads(path.read_text()), **changes}
  path.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))
  return tmp_path / "model"


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"feed_forward_proj": "gelu"}, "feed_forward_proj"),
    ({"is_encoder_decoder": False}, "is_encoder_decoder=False"),
    ({"d_model": "16"}, "d_model must be an integer"),
    ({"num_layers": None}, "num_layers must be an integer"),
    ({"num_layers": 10**9}, "num_layers must be an integer <= 10000"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"layer_norm_epsilon": 0}, "layer_norm_epsilon"),
    ({"layer_norm_epsilon": []}, r"layer_norm_epsilon=\[\] must be a positive number"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false' must be true or false"),
    ({"relative_attention_num_buckets": 6}, "num_buckets must be a multiple of 4"),
    ({"num_experts": 8}, "num_experts=8 is not supported"),
    ({"rope_theta": 1e4}, "rope_theta=10000.0 is not known here"),
    ({"d_kv": 8}, r"shape \[12, 16\], its configuration asks for \[16, 16\]"),
    ({"num_decoder_layers": 2}, "has unknown .* with 2 layers"),
    # Tied as transformers 4 says it, and divided by the root of the width: not this head.
    (
      {"scale_decoder_outputs": ..., "tie_word_embeddings": True},
      "makes lm_head.weight a copy of shared.weight, from which it differs",
    ),
  ],
)
def test_unsupported_config_is_refused_by_name(tmp_path, changes, match):
  folder = _with_config(tmp_path, "v1_1", **changes)
  with pytest.raises(ValueError, match=match) as info:
    huggingface.load(folder)
  assert str(folder) in str(info.value)


def test_fields_of_both_generations_of_transformers_are_read(tmp_path):
  """The files of FLAN-T5 are of version 4, with keys that change no number."""
  want = huggingface.load(_golden("v1_1")[0])[0]
  older = dict.fromkeys("scale_decoder_outputs dense_act_fn is_gated_act is_decoder".split(), ...)
  more = {"n_positions": 512, "output_past": True, "task_specific_params": {"a": 1}}
  folder = _with_config(tmp_path, "v1_1", **older, **more, tie_word_embeddings=False)
  assert huggingface.load(folder)[0] == want


def test_copies_of_the_embedding_and_an_unused_table_may_be_in_the_file(tmp_path):
  shutil.copytree(_golden("first")[0], tmp_path / "model")
  path = tmp_path / "model" / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  copies = ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
  tensors.update({name: tensors["shared.weight"].copy() for name in copies})
  unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
  tensors[unused] = np.ones((8, 2), np.float32)
  safetensors.numpy.save_file(tensors, path)
  tiny_checkpoints.assert_bit_equal(
    *(huggingface.load(x)[1] for x in (tmp_path / "model", _golden("first")[0]))
  )
  tensors["decoder.embed_tokens.weight"] += 1
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(ValueError, match=r"makes decoder\.embed_tokens\.weight a copy of"):
    huggingface.load(tmp_path / "model")


# --- the tokenizer ---


def test_prompts_end_and_completions_are_texts_of_their_own(tmp_path):
  config = tiny_t5.make_config()
  huggingface.save(
    tmp_path / "model", config, tiny_t5.make_params(config), tokenizer=tiny_t5.make_tokenizer()
  )
  words = tokenizer.load(tmp_path / "model")
  assert words.ends_prompts and words.bos_id is None and (words.eos_id, words.pad_id) == (1, 0)
  assert words.fingerprint == tiny_t5.make_tokenizer().fingerprint
  assert words.fingerprint != dataclasses.replace(words, ends_prompts=False).fingerprint
  soup = [tiny_t5.PIECES.index(piece) for piece in ("▁the", "▁soup")]
  assert words.encode_prompt("the soup") == [*soup, 1]
  assert words.encode_prompt("the soup</s>") == [*soup, 1]
  assert words.encode_completion("the soup", prompt="is it cold?") == [*soup, 1]
  for prompt in (None, "is it cold?"):
    assert words.decode_completion([*soup, 1], prompt=prompt) == "the soup"
