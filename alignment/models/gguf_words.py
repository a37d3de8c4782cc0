"""The tokenizer in the header of a GGUF file: byte-level BPE, or SentencePiece's BPE."""

import pathlib
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from alignment.models import tokenizer as tokenizer_lib

# Token types.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_SPACE = "\u2581"  # SentencePiece writes it for a space


def _split(digits: str) -> str:
  return (
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
  )


# Digits go together by up to three, or alone.
_SPLITS = {"llama-bpe": _split("{1,3}"), "qwen2": _split("")}


def read(path: pathlib.Path, metadata: dict[str, Any]) -> tokenizer_lib.Tokenizer:
  """Returns the tokenizer that a header describes.

  Args:
    path: of the file, for messages.
    metadata: all fields of its header.

  Raises:
    ValueError: a field is absent, or of a kind that is not known here.
  """

  def get(name: str) -> Any:
    if f"tokenizer.ggml.{name}" not in metadata:
      raise ValueError(f"{path} lacks the field tokenizer.ggml.{name}: convert the model again")
    return metadata[f"tokenizer.ggml.{name}"]

  if get("model") not in ("gpt2", "llama"):
    raise ValueError(
      f"{path} has a vocabulary of kind {get('model')!r}: only 'gpt2' (byte-level BPE) and 'llama' "
      "(SentencePiece's BPE) are supported; load the model's Hugging Face folder"
    )
  tokens, eos_id = get("tokens"), get("eos_token_id")
  types = metadata.get("tokenizer.ggml.token_type", [])
  if get("model") == "gpt2":
    kind = metadata.get("tokenizer.ggml.pre", "gpt-2")
    backend = tokenizers.Tokenizer(_bpe(path, tokens, get("merges"), kind))
    backend.pre_tokenizer = _pre_tokenizer(path, kind)
    backend.decoder = decoders.ByteLevel()
    adds_bos = kind == "llama-bpe"
  else:
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
      raise ValueError(
        f"{path} begins texts with a space (tokenizer.ggml.add_space_prefix, also where it is "
        "absent), which is not supported: load the model's Hugging Face folder"
      )
    unknown_id = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    if not len(tokens) == len(get("scores")) == len(types) > unknown_id:
      raise ValueError(
        f"{path} has {len(tokens)} tokens, {len(get('scores'))} scores, {len(types)} token types "
        f"and unknown_token_id={unknown_id}, which do not fit; is it corrupt? Copy it again"
      )
    backend = _sentencepiece(tokens, get("scores"), types, tokens[unknown_id])
    adds_bos = True
  for code, special in ((_CONTROL, True), (_USER_DEFINED, False)):
    added = [t for t, c in zip(tokens, types, strict=False) if c == code]
    backend.add_tokens(
      [tokenizers.AddedToken(token, special=special, normalized=False) for token in added]
    )
  bos_id = metadata.get("tokenizer.ggml.bos_token_id")
  # llama.cpp adds a start token to texts of these schemes unless the file says otherwise.
  adds_bos = metadata.get("tokenizer.ggml.add_bos_token", adds_bos)
  adds_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
  around = bos_id if adds_bos else None, eos_id if adds_eos else None
  if around != (None, None):
    tokenizer_lib.add_around(backend, *around)
  ends = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
  return tokenizer_lib.Tokenizer(
    backend=backend,
    eos_id=eos_id,
    pad_id=metadata.get("tokenizer.ggml.padding_token_id", eos_id),
    bos_id=bos_id,
    chat_template=metadata.get("tokenizer.chat_template"),
    eos_ids=tuple(index for index in ends if index is not None),
  )


def _bpe(path: pathlib.Path, tokens: list[str], merges: list[str], kind: str) -> models.BPE:
  vocabulary = {token: index for index, token in enumerate(tokens)}
  pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
  whole = kind == "llama-bpe"  # Llama 3 keeps a word that is itself a token, whatever the merges
  try:
    return models.BPE(vocab=vocabulary, merges=pairs, fuse_unk=False, ignore_merges=whole)
  except Exception as error:  # the library raises bare Exception
    raise ValueError(
      f"{path}: vocabulary and merges do not fit ({error}); is it corrupt? Copy it again"
    ) from error


def _sentencepiece(
  tokens: list[str], scores: list[float], types: list[int], unknown: str
) -> tokenizers.Tokenizer:
  """Returns a BPE whose merges are the tokens by falling score, each from any two others.

  SentencePiece joins the two neighbours that make the token of the highest score.
  """
  vocabulary = {token: index for index, token in enumerate(tokens)}
  every = zip(tokens, scores, types, strict=True)
  words = {token: score for token, score, kind in every if kind == _NORMAL}
  merges = [
    (score, cut, token)
    for token, score in words.items()
    for cut in range(1, len(token))
    if token[:cut] in words and token[cut:] in words
  ]
  merges.sort(key=lambda merge: merge[:2], reverse=True)
  pairs = [(token[:cut], token[cut:]) for _, cut, token in merges]
  model = models.BPE(
    vocab=vocabulary, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True
  )
  backend = tokenizers.Tokenizer(model)
  backend.normalizer = normalizers.Replace(" ", _SPACE)
  steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
  backend.decoder = decoders.Sequence(steps)
  return backend


def _pre_tokenizer(path: pathlib.Path, kind: str) -> pre_tokenizers.PreTokenizer:
  """Returns the word splitter that llama.cpp uses for a scheme of this name."""
  if kind in ("gpt-2", "default"):
    return pre_tokenizers.ByteLevel(add_prefix_space=False)
  if kind in ("smollm", "starcoder", "refact"):
    return pre_tokenizers.Sequence(
      [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
      ]
    )
  if kind in _SPLITS:
    return pre_tokenizers.Sequence(
      [
        pre_tokenizers.Split(tokenizers.Regex(_SPLITS[kind]), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
      ]
    )
  raise ValueError(
    f"{path} splits words by the scheme {kind!r}; supported are gpt-2, smollm, starcoder, refact, "
    "llama-bpe, qwen2: load the model's Hugging Face folder, whose tokenizer.json has the scheme"
  )
