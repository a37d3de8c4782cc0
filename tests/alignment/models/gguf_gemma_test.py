"""Tests of Gemma in GGUF files: header, norms, and a vocabulary of SentencePiece."""

import dataclasses
import functools
import itertools
import pathlib

import gguf as gguf_package
import jax
import numpy as np
import pytest
import tiny_checkpoints

from alignment.models import gguf, huggingface

_TEXT, _U32 = gguf_package.GGUFWriter.add_string, gguf_package.GGUFWriter.add_uint32
_F32, _FLAG = gguf_package.GGUFWriter.add_float32, gguf_package.GGUFWriter.add_bool
# The same sums in another order: rounding only, at logits of 1 to 10.
TOLERANCE = 2e-5


def _write(path, tiny, **options):
  tiny_checkpoints.write_gguf(path, *tiny, **options)
  return path


_SPACES = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
# The words of SentencePiece end in what stands for a space, or begin with it.
_WORDS = [
  *"\u2581abcdehlostu",
  "th",
  "\u2581t",
  "he",
  "the",
  "\u2581the",
  "so",
  "\u2581so",
  "oo",
  "at",
]
_LINES = ["  ", "\n\n", "<start_of_turn>"]


def _gemma_fields(architecture, config, **own):
  """The header of a Gemma of `config`; `own` are its keys of the architecture."""
  tokens = [*_SPACES, *_WORDS, *_LINES]
  tokens += [f"<unused{i}>" for i in range(config.vocab_size - len(tokens))]
  types = [3, 3, 3, 2] + 256 * [6] + len(_WORDS) * [1] + 3 * [4]
  types += (config.vocab_size - len(types)) * [4]
  scores = [-float(i) for i in range(config.vocab_size)]
  array, ids = gguf_package.GGUFWriter.add_array, ("padding", "eos", "bos", "unknown")
  defaults = {
    "attention.key_length": (_U32, config.head_dim),
    "attention.value_length": (_U32, config.head_dim),
  }
  return {
    "general.architecture": architecture,
    "tokenizer.ggml.model": (_TEXT, "llama"),
    "tokenizer.ggml.pre": (_TEXT, "default"),
    "tokenizer.ggml.merges": None,
    "tokenizer.ggml.tokens": (array, tokens),
    "tokenizer.ggml.token_type": (array, types),
    "tokenizer.ggml.scores": (array, scores),
    **{f"tokenizer.ggml.{name}_token_id": (_U32, i) for i, name in enumerate(ids)},
    "tokenizer.ggml.add_bos_token": (_FLAG, True),
    "tokenizer.ggml.add_space_prefix": (_FLAG, False),
    **{f"{architecture}.{key}": entry for key, entry in {**defaults, **own}.items()},
  }


def _gemma(case, **changes):
  """A golden Gemma with a vocabulary of 300 and what the header cannot say set to its defaults."""
  config, params = huggingface.load(pathlib.Path(__file__).parent / "golden" / case)
  embedding = np.random.default_rng(0).standard_normal((300, config.width)).astype(np.float32)
  config = dataclasses.replace(config, vocab_size=300, norm_epsilon=1e-6, **changes)
  return config, {**params, "embed": {"embedding": 0.3 * embedding}}


_GEMMA_CASES = {
  "gemma2": (
    "gemma2",
    "gemma2",
    {"attention_scale": None},
    {
      "attn_logit_softcapping": (_F32, 3.0),
      "final_logit_softcapping": (_F32, 4.0),
      "attention.sliding_window": (_U32, 5),
    },
  ),
  "gemma3": (
    "gemma3",
    "gemma3",
    {},
    {
      "attention.sliding_window": (_U32, 5),
      "attention.sliding_window_pattern": (_U32, 2),
      "rope.scaling.type": (_TEXT, "linear"),
      "rope.scaling.factor": (_F32, 2.0),
    },
  ),
  "gemma3_bases": (
    "gemma3",
    "gemma3",
    {"window_layers": (True, False, False), "local_rope_theta": 2e4, "logit_softcap": 5.0},
    {
      "attention.sliding_window": (_U32, 5),
      "attention.sliding_window_pattern": (gguf_package.GGUFWriter.add_array, [1, 0, 0]),
      "rope.scaling.factor": (_F32, 2.0),
      "rope.freq_base_swa": (_F32, 2e4),
      "final_logit_softcapping": (_F32, 5.0),
    },
  ),
}


@pytest.mark.parametrize("case", _GEMMA_CASES)
def test_gemma_equals_its_huggingface_folder(tmp_path, case):
  """The folder is one whose logits are those of transformers; its norms add 1 to their scales."""
  architecture, golden, changes, keys = _GEMMA_CASES[case]
  config, params = _gemma(golden, **changes)
  fields = _gemma_fields(architecture, config, **keys)
  path = _write(tmp_path / "m.gguf", (config, params), changes=fields)
  loaded_config, loaded, words = gguf.load(path)
  assert loaded_config == config
  # 1 is added and taken away: rounding of numbers of about 1.
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-7), loaded, params)
  huggingface.save(tmp_path / "model", config, params, tokenizer=words)
  of_folder = tiny_checkpoints.logits(*huggingface.load(tmp_path / "model")[::-1])
  got = tiny_checkpoints.logits(loaded, loaded_config)
  np.testing.assert_allclose(got, of_folder, atol=TOLERANCE, rtol=0)
  bad = {**fields, f"{architecture}.attention.scale": (_F32, 0.1)}
  with pytest.raises(ValueError, match=rf"{architecture}.attention.scale="):
    gguf.load(_write(tmp_path / "bad.gguf", (config, params), changes=bad))


def test_what_a_header_of_gemma_does_not_say(tmp_path):
  """llama.cpp's defaults: caps and window of Gemma 2, layers of Gemma 3, and the scores of 27B."""
  config, params = _gemma("gemma2")

  def read(architecture, num_layers=2, **own):
    sized = dataclasses.replace(config, num_layers=num_layers, window_layers=None)
    layers = jax.tree.map(lambda x: np.repeat(x[:1], num_layers, axis=0), params["layers"])
    if architecture == "gemma3":
      sized = dataclasses.replace(sized, head_norms=True)
      for name in ("query_norm", "key_norm"):
        layers["attention"][name] = {"scale": np.zeros((num_layers, 8), np.float32)}
    fields = _gemma_fields(architecture, sized, **own)
    file = (sized, {**params, "layers": layers})
    return gguf.load(_write(tmp_path / "m.gguf", file, changes=fields))[0]

  gemma2 = read("gemma2")
  caps = (gemma2.attention_softcap, gemma2.logit_softcap, gemma2.sliding_window)
  assert caps == (50.0, 30.0, 4096) and gemma2.window_layers == (True, False)
  assert gemma2.attention_scale is None and gemma2.embedding_scale == 4.0
  assert read("gemma2", 46).attention_scale == (16 // 4) ** -0.5
  gemma3 = read("gemma3", 8, **{"attention.sliding_window": (_U32, 5)})
  assert gemma3.window_layers == (True,) * 5 + (False, True, True)
  assert gemma3.local_rope_theta == 1e4 and gemma3.logit_softcap is None
  plain = read("gemma3", 8)
  assert plain.sliding_window is None and plain.local_rope_theta is None
  assert read("gemma3", 62).attention_scale == (16 // 4) ** -0.5
  array = gguf_package.GGUFWriter.add_array
  pattern = {"attention.sliding_window_pattern": (array, [1, 0, 1])}
  with pytest.raises(ValueError, match="sliding_window_pattern has 3 entries for 4 layers"):
    read("gemma3", 4, **pattern)
  with pytest.raises(ValueError, match=r"attn_logit_softcapping=3\.0 is not supported"):
    read("gemma3", 2, attn_logit_softcapping=(_F32, 3.0))


def _joined(text, scores):
  """SentencePiece's BPE by hand: it joins the neighbours that make the token of highest score."""
  pieces = list(text.replace(" ", "\u2581"))
  while True:
    joins = [
      (scores.get(a + b, -np.inf), -i) for i, (a, b) in enumerate(itertools.pairwise(pieces))
    ]
    if not joins or max(joins)[0] == -np.inf:
      return pieces
    i = -max(joins)[1]
    pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


def test_sentencepiece_words_are_joined_by_their_scores(tmp_path):
  config, params = _gemma("gemma2")
  fields = _gemma_fields("gemma2", config)
  path = _write(tmp_path / "m.gguf", (config, params), changes=fields)
  words = gguf.load(path)[2]
  tokens = fields["tokenizer.ggml.tokens"][1]
  scores = {token: -i for i, token in enumerate(tokens) if token in _WORDS}
  generator = np.random.default_rng(0)
  letters = "aethoso "
  texts = [
    "the soothe sat at the",
    *("".join(generator.choice(list(letters), 30)) for _ in range(40)),
  ]
  for text in texts:
    text = text.replace("  ", "o")
    ids = words.encode(text)
    assert [tokens[i] for i in ids] == _joined(text, scores)
    assert words.decode(ids) == text
  # Bytes of what has no token, spaces in a row and new lines; the start token on request.
  assert [tokens[i] for i in words.encode("é  \n\nz")] == [
    "<0xC3>", "<0xA9>", "  ", "\n\n", "<0x7A>"
  ]  # fmt: skip
  assert words.decode(words.encode("é  \n\nz日")) == "é  \n\nz日"
  assert words.encode("at", add_special_tokens=True) == [2, *words.encode("at")]
  assert (words.eos_id, words.pad_id, words.bos_id) == (1, 0, 2)
  changes = {**fields, "tokenizer.ggml.unknown_token_id": (_U32, 300)}
  with pytest.raises(ValueError, match="300 tokens, 300 scores, 300 token types"):
    gguf.load(_write(tmp_path / "m.gguf", (config, params), changes=changes))
