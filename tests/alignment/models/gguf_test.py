"""Tests of alignment.models.gguf: synthetic files, damaged ones, and the real model by hand."""

import dataclasses
import shutil
import struct

import gguf as gguf_package
import jax
import numpy as np
import pytest
import tiny_checkpoints

from alignment.models import gguf, huggingface, layout, rotary

KINDS = gguf_package.GGMLQuantizationType
# The same sums in another order: rounding only, at logits of 1 to 10.
TOLERANCE = 2e-5
_TEXT, _U32 = gguf_package.GGUFWriter.add_string, gguf_package.GGUFWriter.add_uint32
_F32, _FLAG = gguf_package.GGUFWriter.add_float32, gguf_package.GGUFWriter.add_bool


@pytest.fixture
def tiny():
  config = tiny_checkpoints.make_config(rope_pairing="adjacent", rope_theta=5e4)
  return config, tiny_checkpoints.make_params(config)


def _write(path, tiny, **options):
  tiny_checkpoints.write_gguf(path, *tiny, **options)
  return path


def _bits(raw):
  """Low and high halves of bytes `[N, 16]` as `[N, 32]`: values 0-15 first, then 16-31."""
  return np.concatenate([raw & 15, raw >> 4], axis=1)


def dequantise_by_hand(raw, kind, shape):
  """Q4_1 (scale, offset, 32 nibbles) and Q8_0 (scale, 32 bytes), from the format's description."""
  raw = np.ascontiguousarray(raw).reshape(-1).view(np.uint8)
  if kind == KINDS.F32:
    return raw.view(np.float32).reshape(shape)
  if kind == KINDS.Q4_1:
    raw = raw.reshape(-1, 20)
    scale, offset = (raw[:, i : i + 2].copy().view(np.float16) for i in (0, 2))
    return (scale.astype(np.float32) * _bits(raw[:, 4:]) + offset).reshape(shape)
  assert kind == KINDS.Q8_0
  raw = raw.reshape(-1, 34)
  scale = raw[:, :2].copy().view(np.float16).astype(np.float32)
  return (scale * raw[:, 2:].copy().view(np.int8)).reshape(shape)


# --- synthetic files ------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_float_file_loads_bit_equal(tmp_path, tied):
  config = tiny_checkpoints.make_config(rope_pairing="adjacent", rope_theta=5e4, tied_head=tied)
  params = tiny_checkpoints.make_params(config)
  loaded_config, loaded, words = gguf.load(_write(tmp_path / "m.gguf", (config, params)))
  assert loaded_config == config
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  assert words.vocab_size == config.vocab_size
  assert (words.eos_id, words.pad_id, words.bos_id) == (2, 2, 1)


def test_tokenizer_is_the_one_written(tmp_path, tiny):
  _, _, words = gguf.load(_write(tmp_path / "m.gguf", tiny))
  expected = tiny_checkpoints.make_tokenizer()
  for text in [" the soup", "In 2024:\n\tcafé 🙂", "a<|im_end|>b", "it's we'll", ""]:
    assert words.encode(text) == expected.encode(text)
    assert words.decode(words.encode(text), skip_special_tokens=False) == text
  message = [{"role": "user", "content": "Hi"}]
  assert words.apply_chat(message) == expected.apply_chat(message)


def test_start_token_is_added_only_on_request(tmp_path, tiny):
  changes = {"tokenizer.ggml.add_bos_token": (gguf_package.GGUFWriter.add_bool, True)}
  _, _, words = gguf.load(_write(tmp_path / "m.gguf", tiny, changes=changes))
  assert words.encode("up", add_special_tokens=True) == [1, *words.encode("up")]
  assert 1 not in words.encode("up")


def test_llama3_words_keep_three_digits(tmp_path, tiny):
  changes = {"tokenizer.ggml.pre": (gguf_package.GGUFWriter.add_string, "llama-bpe")}
  _, _, words = gguf.load(_write(tmp_path / "m.gguf", tiny, changes=changes))
  pieces = [piece for piece, _ in words.backend.pre_tokenizer.pre_tokenize_str("a 12345 DON'T")]
  assert pieces == ["a", "Ġ", "123", "45", "ĠDON", "'T"]


def test_quantised_tensors_equal_those_computed_by_hand(tmp_path, tiny):
  quantise = {
    "blk.0.attn_q.weight": KINDS.Q4_1,
    "blk.1.ffn_down.weight": KINDS.Q4_1,
    "token_embd.weight": KINDS.Q8_0,
    "blk.0.attn_v.weight": KINDS.F16,
  }
  config, params = tiny
  _, loaded, _ = gguf.load(_write(tmp_path / "m.gguf", tiny, quantise=quantise))
  layers, expected = loaded["layers"], params["layers"]
  stored = {
    "blk.0.attn_q.weight": layers["attention"]["query"]["kernel"][0].T,
    "blk.1.ffn_down.weight": layers["mlp"]["down"]["kernel"][1].T,
    "token_embd.weight": loaded["embed"]["embedding"],
  }
  for tensor in gguf_package.GGUFReader(tmp_path / "m.gguf").tensors:
    if tensor.name in stored:
      shape = stored[tensor.name].shape
      by_hand = dequantise_by_hand(tensor.data, tensor.tensor_type, shape)
      np.testing.assert_allclose(stored[tensor.name], by_hand, rtol=1e-6, atol=1e-7)
  # Close to what was quantised: half a step of 15 or 127 over a block's range (about 1.5).
  query = expected["attention"]["query"]["kernel"]
  assert 0.01 < np.abs(layers["attention"]["query"]["kernel"] - query)[0].max() < 0.1
  assert np.abs(loaded["embed"]["embedding"] - params["embed"]["embedding"]).max() < 0.02
  np.testing.assert_array_equal(layers["attention"]["query"]["kernel"][1], query[1])
  value = expected["attention"]["value"]["kernel"][0]
  np.testing.assert_array_equal(
    layers["attention"]["value"]["kernel"][0], value.astype(np.float16).astype(np.float32)
  )
  assert config.num_layers == 2


def test_large_tensors_are_dequantised_in_parts(tmp_path, tiny, monkeypatch):
  quantise = {"token_embd.weight": KINDS.Q8_0, "blk.0.ffn_up.weight": KINDS.Q4_1}
  path = _write(tmp_path / "m.gguf", tiny, quantise=quantise)
  whole = gguf.load(path)[1]
  monkeypatch.setattr(gguf, "_BYTES_AT_ONCE", 700)  # does not divide the tensors
  jax.tree.map(np.testing.assert_array_equal, gguf.load(path)[1], whole)


def test_adjacent_weights_are_the_reordered_half_weights(tmp_path, tiny):
  config, params = tiny
  half = dataclasses.replace(config, rope_pairing="half")
  loaded_config, loaded, _ = gguf.load(_write(tmp_path / "m.gguf", tiny))
  reordered = jax.tree.map(np.copy, params)
  for name in ("query", "key"):
    kernel = reordered["layers"]["attention"][name]["kernel"]
    kernel[...] = layout.adjacent_to_half(kernel, config.head_dim)
  adjacent = tiny_checkpoints.logits(loaded, loaded_config)
  expected = tiny_checkpoints.logits(reordered, half)
  np.testing.assert_allclose(adjacent, expected, atol=TOLERANCE, rtol=0)
  assert np.abs(tiny_checkpoints.logits(params, half) - expected).max() > 0.1


@pytest.mark.parametrize(
  ("architecture", "changes"), [("qwen2", {"qkv_bias": True}), ("qwen3", {"head_norms": True})]
)
def test_qwen_is_read_and_saved(tmp_path, architecture, changes):
  config = tiny_checkpoints.make_config(rope_theta=5e4, **changes)
  params = tiny_checkpoints.make_params(config)
  fields = {
    "general.architecture": architecture,
    "tokenizer.ggml.pre": (gguf_package.GGUFWriter.add_string, "qwen2"),
  }
  path = _write(tmp_path / "m.gguf", (config, params), changes=fields)
  loaded_config, loaded, words = gguf.load(path)
  assert loaded_config == config
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  pieces = [piece for piece, _ in words.backend.pre_tokenizer.pre_tokenize_str("a 12 DON'T")]
  assert pieces == ["a", "Ġ", "1", "2", "ĠDON", "'T"]
  huggingface.save(tmp_path / "model", config, params, tokenizer=words)
  assert f'"model_type": "{architecture}"' in (tmp_path / "model" / "config.json").read_text()
  changes = {**fields, f"{architecture}.attention.scale": (_F32, 0.1)}
  with pytest.raises(ValueError, match=rf"{architecture}.attention.scale="):
    gguf.load(_write(tmp_path / "bad.gguf", (config, params), changes=changes))


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_factor_without_a_type_is_linear(tmp_path, tiny, key):
  path = _write(tmp_path / "m.gguf", tiny, changes={f"llama.{key}": (_F32, 2.5)})
  config = dataclasses.replace(tiny[0], rope_scaling=rotary.LinearScaling(2.5))
  assert gguf.load(path)[0] == config


def test_gguf_to_huggingface_folder_keeps_the_function(tmp_path, tiny):
  config, params, words = gguf.load(_write(tmp_path / "m.gguf", tiny))
  huggingface.save(tmp_path / "model", config, params, tokenizer=words)
  saved = huggingface.load(tmp_path / "model")
  np.testing.assert_allclose(
    tiny_checkpoints.logits(saved[1], saved[0]),
    tiny_checkpoints.logits(params, config),
    atol=TOLERANCE,
    rtol=0,
  )


# --- files that are refused -----------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 3, 23, 24, 60, 1000, 5000, -64, -1])
def test_file_cut_short_names_its_sizes(tmp_path, tiny, keep):
  path = _write(tmp_path / "m.gguf", tiny)
  whole = path.read_bytes()
  # The writer pads the file at its end; cut into the last tensor, not into padding.
  whole = whole[: len(whole) if keep >= 0 else len(whole.rstrip(b"\0"))]
  path.write_bytes(whole[:keep])
  with pytest.raises(ValueError, match="is truncated") as info:
    gguf.load(path)
  assert str(path) in str(info.value) and str(path.stat().st_size) in str(info.value)


def test_missing_file_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"none\.gguf is not a file"):
    gguf.load(tmp_path / "none.gguf")


@pytest.mark.parametrize(
  ("edit", "match"),
  [
    (lambda b: b"PK\x03\x04" + b[4:], "not a GGUF file"),
    (lambda b: b[:4] + struct.pack("<I", 1) + b[8:], "version 1"),
    (lambda b: b[:4] + struct.pack(">I", 3) + b[8:], "big-endian"),
    (lambda b: b[:16] + struct.pack("<Q", 2**60) + b[24:], "corrupt|truncated|unknown"),
  ],
)
def test_other_files_are_refused(tmp_path, tiny, edit, match):
  path = _write(tmp_path / "m.gguf", tiny)
  path.write_bytes(edit(path.read_bytes()))
  with pytest.raises(ValueError, match=match):
    gguf.load(path)


_ONE = np.ones(4, np.float32)
REFUSED = {
  "architecture": ({"changes": {"general.architecture": "falcon"}}, "architecture 'falcon'"),
  "field missing": ({"changes": {"llama.block_count": None}}, "llama.block_count"),
  "wordpiece": ({"changes": {"tokenizer.ggml.model": (_TEXT, "bert")}}, "kind 'bert'"),
  "space before": ({"changes": {"tokenizer.ggml.model": (_TEXT, "llama")}}, "add_space_prefix"),
  "word cutter": ({"changes": {"tokenizer.ggml.pre": (_TEXT, "tekken")}}, "'tekken'"),
  "no eos": ({"changes": {"tokenizer.ggml.eos_token_id": None}}, "eos_token_id"),
  "eos outside": ({"changes": {"tokenizer.ggml.eos_token_id": (_U32, 9999)}}, "eos_id=9999"),
  "stretched": ({"changes": {"llama.rope.scaling.type": (_TEXT, "yarn")}}, "yarn"),
  "unknown": ({"changes": {"llama.attention.scale": (_F32, 0.1)}}, "llama.attention.scale="),
  "window": ({"changes": {"llama.attention.sliding_window": (_U32, 8)}}, "sliding_window=8"),
  "space": ({"changes": {"tokenizer.ggml.add_space_prefix": (_FLAG, True)}}, "add_space_prefix"),
  "values": ({"changes": {"llama.attention.value_length": (_U32, 4)}}, "values of 4 and keys of 8"),
  "rope table": ({"tensors": {"rope_freqs.weight": _ONE}}, "rope_freqs"),
  "partly rotated": ({"changes": {"llama.rope.dimension_count": (_U32, 4)}}, "4 of 8"),
  "experts": ({"changes": {"llama.expert_count": (_U32, 8)}}, "mixture of experts"),
  "parts": ({"changes": {"split.count": (_U32, 2)}}, "several parts"),
  "bias": ({"tensors": {"blk.0.attn_q.bias": _ONE}}, "unknown 1 tensor.s.: blk.0.attn_q.bias"),
  "tensor missing": ({"drop": ["blk.1.ffn_up.weight"]}, "lacks 1 tensor.s.: blk.1.ffn_up.weight"),
  "shape": ({"changes": {"llama.feed_forward_length": (_U32, 32)}}, r"ffn_\w+.weight has shape"),
}


@pytest.mark.parametrize("problem", REFUSED)
def test_unsupported_model_is_refused(tmp_path, tiny, problem):
  options, match = REFUSED[problem]
  path = _write(tmp_path / "m.gguf", tiny, **options)
  with pytest.raises(ValueError, match=match) as info:
    gguf.load(path)
  assert str(path) in str(info.value) or problem == "eos outside"


def test_end_tokens_of_the_header_are_a_set(tmp_path, tiny):
  changes = {
    "tokenizer.ggml.eot_token_id": (_U32, 0),
    "tokenizer.ggml.eom_token_id": (_U32, 2),
    "llama.rope.scaling.factor": (_F32, 1.0),
    "llama.logit_scale": (_F32, 1.0),
  }
  *_, words = gguf.load(_write(tmp_path / "m.gguf", tiny, changes=changes))
  assert words.eos_id == 2 and words.eos_ids == (2, 0)


@pytest.mark.parametrize(
  ("flags", "around"),
  [
    ({}, [1]),
    ({"add_bos_token": False}, []),
    ({"add_bos_token": True, "add_eos_token": True}, [1, 2]),
    ({"add_eos_token": True, "add_bos_token": False}, [2]),
  ],
)
def test_what_goes_around_llama3_texts(tmp_path, tiny, flags, around):
  changes = {"tokenizer.ggml.pre": (_TEXT, "llama-bpe"), "tokenizer.ggml.add_bos_token": None}
  changes |= {f"tokenizer.ggml.{name}": (_FLAG, value) for name, value in flags.items()}
  *_, words = gguf.load(_write(tmp_path / "m.gguf", tiny, changes=changes))
  assert words.encode("", add_special_tokens=True) == around
  assert words.encode_prompt("") == [i for i in around if i == 1]
  assert words.encode_completion("x") == [*words.encode("x"), 2]


def test_unreadable_quantisation_is_named(tmp_path, tiny, monkeypatch):
  path = _write(tmp_path / "m.gguf", tiny, quantise={"blk.0.ffn_up.weight": KINDS.Q4_1})

  def dequantize(data, kind):
    raise NotImplementedError(kind)

  monkeypatch.setattr(gguf_package.quants, "dequantize", dequantize)
  with pytest.raises(ValueError, match=r"token_embd.weight is quantised as F32.*another"):
    gguf.load(path)


# --- the real model -------------------------------------------------------------------------------

PROSE = (
  "The old lighthouse keeper climbed the stairs every evening before sunset, although nobody had "
  "asked him to do so for many years. The lamp was automatic now, and the ships in the bay found "
  "their way by satellite. Still, he liked to stand at the top and watch the water change from "
  "blue to grey, and he believed that someone ought to look at the sea at least once a day.\n\n"
  "In the village below, people said that he was lonely, but this was not quite true. He had his "
  "books, a small radio, and a cat that came and went as it pleased. On Sundays his sister brought "
  "bread and news, and they would sit together in the kitchen and talk about their parents until "
  "it was time for her to catch the last bus home."
)


def _numpy_forward(weights, tokens, *, layers, heads, kv_heads, theta, epsilon):
  """Llama logits `[T, V]` for one row, straight from stored tensors; rotations as complex numbers.

  Written from the papers for this test: shares no code with the package.
  """

  def norm(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale

  def split(x, count):  # [T, count * d] -> [count, T, d]
    return x.reshape(len(x), count, -1).swapaxes(0, 1)

  def turn(x):  # adjacent features are the real and imaginary part of one number
    frequencies = theta ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
    angles = np.arange(x.shape[-2])[:, None] * frequencies
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)

  x = weights["token_embd.weight"][tokens]
  future = np.triu(np.full((len(tokens), len(tokens)), -np.inf), 1)
  for i in range(layers):
    w = {name: weights[f"blk.{i}.{name}.weight"] for name in _PARTS}
    y = norm(x, w["attn_norm"])
    q = turn(split(y @ w["attn_q"].T, heads))
    k = np.repeat(turn(split(y @ w["attn_k"].T, kv_heads)), heads // kv_heads, axis=0)
    v = np.repeat(split(y @ w["attn_v"].T, kv_heads), heads // kv_heads, axis=0)
    scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]) + future
    attention = np.exp(scores - scores.max(axis=-1, keepdims=True))
    attention /= attention.sum(axis=-1, keepdims=True)
    x = x + (attention @ v).swapaxes(0, 1).reshape(len(x), -1) @ w["attn_output"].T
    y = norm(x, w["ffn_norm"])
    gate = y @ w["ffn_gate"].T
    x = x + (gate / (1 + np.exp(-gate)) * (y @ w["ffn_up"].T)) @ w["ffn_down"].T
  return norm(x, weights["output_norm.weight"]) @ weights["token_embd.weight"].T


_PARTS = "attn_norm attn_q attn_k attn_v attn_output ffn_norm ffn_gate ffn_up ffn_down".split()


def _perplexity(logits, tokens):
  logits = logits[0, :-1].astype(np.float64)
  logps = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
  return float(np.exp(-np.mean(logps[np.arange(len(logps)), tokens[0, 1:]])))


@pytest.mark.weights
def test_real_model_is_the_published_one(smollm2):
  config = smollm2.config
  shape = (config.num_layers, config.width, config.num_heads, config.num_kv_heads)
  assert shape == (30, 576, 9, 3)
  assert config.vocab_size == smollm2.tokenizer.vocab_size == 49152
  assert config.rope_theta == 1e5 and config.rope_pairing == "adjacent" and config.tied_head
  assert (config.norm_epsilon, config.max_length) == (1e-5, 8192)
  assert sum(x.size for x in jax.tree.leaves(smollm2.params)) == 134_515_008
  assert smollm2.tokenizer.eos_id == smollm2.tokenizer.pad_id == 2


@pytest.mark.weights
def test_real_tokenizer(smollm2):
  words = smollm2.tokenizer
  # Whole words, not letters: the merges apply. The ids guard against a change of cutting.
  assert words.encode("The soup was cold.") == [504, 14562, 436, 4011, 30]
  for text in [PROSE, "naïve 日本語 🙂\n\n\tx = 3.14", "I paid 1234 dollars", " ", ""]:
    assert words.decode(words.encode(text)) == text
  digits = [words.backend.id_to_token(i) for i in words.encode("in 2024")]
  assert digits == ["in", "Ġ", "2", "0", "2", "4"]
  # English: about four characters a token.
  assert 4 < len(PROSE) / len(words.encode(PROSE)) < 5.5
  chat = words.apply_chat([{"role": "user", "content": "Hi"}])
  assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
  ids = words.encode(chat)
  assert ids[0] == 1 and ids.count(2) == 2


@pytest.mark.slow
@pytest.mark.weights
def test_real_logits_equal_an_independent_numpy_pass(smollm2):
  from experiments.data import pretrained

  reader = gguf_package.GGUFReader(pretrained.fetch_smollm2())
  kinds = [tensor.tensor_type for tensor in reader.tensors]
  assert [kinds.count(kind) for kind in (KINDS.Q4_1, KINDS.Q8_0, KINDS.F32)] == [210, 1, 61]
  weights = {
    tensor.name: dequantise_by_hand(
      tensor.data, tensor.tensor_type, [int(n) for n in tensor.shape[::-1]]
    )
    for tensor in reader.tensors
  }
  tokens = np.array([smollm2.tokenizer.encode(PROSE)[:64]], np.int32)
  expected = _numpy_forward(
    weights, tokens[0], layers=30, heads=9, kv_heads=3, theta=1e5, epsilon=1e-5
  )
  logits = tiny_checkpoints.logits(smollm2.params, smollm2.config, tokens)[0]
  assert np.abs(expected).max() > 10  # so the bound below is a relative one of 1e-4
  np.testing.assert_allclose(logits, expected, atol=1e-3, rtol=0)


@pytest.mark.weights
def test_half_split_rotation_would_ruin_the_real_model(smollm2):
  tokens = np.array([smollm2.tokenizer.encode(PROSE)], np.int32)
  wrong_config = dataclasses.replace(smollm2.config, rope_pairing="half")
  right = _perplexity(tiny_checkpoints.logits(smollm2.params, smollm2.config, tokens), tokens)
  wrong = _perplexity(tiny_checkpoints.logits(smollm2.params, wrong_config, tokens), tokens)
  # Measured: 23.0 and 114.8. The bounds say "predicts English" and "visibly worse".
  assert 10 < right < 35
  assert wrong > 1.5 * right


@pytest.mark.slow  # writes and reads half a gigabyte
@pytest.mark.weights
def test_real_model_survives_a_huggingface_folder(smollm2, tmp_path):
  folder = tmp_path / "model"
  huggingface.save(folder, smollm2.config, smollm2.params, tokenizer=smollm2.tokenizer)
  config, params = huggingface.load(folder)
  shutil.rmtree(folder)  # pytest would keep three of them
  tokens = np.array([smollm2.tokenizer.encode(PROSE)[:32]], np.int32)
  np.testing.assert_allclose(
    tiny_checkpoints.logits(params, config, tokens),
    tiny_checkpoints.logits(smollm2.params, smollm2.config, tokens),
    atol=1e-3,  # 30 layers of float32 sums in another order, logits up to 30
    rtol=0,
  )
