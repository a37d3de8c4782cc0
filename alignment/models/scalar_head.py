"""A language model with a scalar head, which returns one number: a value, reward or preference.

The parameters are the model's without its output embedding, plus `scalar_head/kernel` `[D]` and
`scalar_head/bias` `[]`. The head reads the hidden state of the last real token, after the final
norm: the last prompt token for the value of a prompt, the last completion token (EOS) for a reward.
Of an encoder-decoder, whose encoder reads the tokens, it reads the decoder's state at the start.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import PartitionSpec

import sharding
from alignment import sequences
from alignment.models import architectures, attention, huggingface, transformer
from alignment.models import tokenizer as tokenizer_lib
from sharding import checks

_HEAD_FILE = "scalar_head.safetensors"

HEAD_RULE = ("scalar_head/", PartitionSpec())
SHARDING_RULES: sharding.Rules = (HEAD_RULE, *architectures.SHARDING_RULES)


def from_decoder(params: transformer.Params) -> transformer.Params:
  """Returns the parameters of a scalar model with a decoder's body and a head of zeros.

  The body is shared, not copied; an untied output embedding is left out.
  """
  body = {name: value for name, value in params.items() if name != "head"}
  width = params["embed"]["embedding"].shape[1]
  # Zero: the first output is 0 for every input, and the first gradient is that of a linear probe.
  return body | {"scalar_head": {"kernel": jnp.zeros(width), "bias": jnp.zeros(())}}


@functools.partial(jax.jit, static_argnames="config")
def features(
  params: transformer.Params,
  tokens: jax.Array,
  mask: jax.Array,
  *,
  config: architectures.Config,
) -> jax.Array:
  """Returns the features that the head reads: the hidden state of each row's last real token.

  Args:
    params: parameters of a scalar model or of a decoder.
    tokens: `[B, T]` int ids.
    mask: `[B, T]` non-zero on real tokens; padding may be anywhere, also between them.
    config: the shape of the model.

  Returns:
    `[B, D]` float32, after the final norm. A row without any real token is one start token,
    `tokens[b, -1]`.

  Raises:
    ValueError: if shapes differ or T exceeds `config.max_length`.
  """
  if tokens.ndim != 2 or tokens.shape != mask.shape:
    raise ValueError(
      f"tokens and mask must both be [B, T], got {list(tokens.shape)} and {list(mask.shape)}"
    )
  tokens, mask = attention.justify_prompts(tokens, mask)
  body = {name: value for name, value in params.items() if name != "scalar_head"}
  return architectures.last_states(body, tokens, mask, config=config).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="config")
def scalars(
  params: transformer.Params,
  tokens: jax.Array,
  mask: jax.Array,
  *,
  config: architectures.Config,
) -> jax.Array:
  """Returns `[B]` float32, one number for each row; arguments and errors as `features`."""
  head = params["scalar_head"]
  return features(params, tokens, mask, config=config) @ head["kernel"] + head["bias"]


@functools.cache
def make_apply_fn(
  config: architectures.Config,
) -> Callable[[Any, sequences.Sequences], jax.Array]:
  """Returns `apply_fn(params, Sequences) -> [B]`, read at the last completion token.

  The same config gives the same function object; see `transformer.make_apply_fn`, also for prompts
  without tokens.
  """

  def apply_fn(params: Any, batch: sequences.Sequences) -> jax.Array:
    checks.same_shape(tokens=batch.tokens, mask=batch.mask)
    checks.token_ids("tokens", batch.tokens, config.vocab_size)
    if batch.prompt_tokens is not None:
      checks.same_shape(prompt_tokens=batch.prompt_tokens, prompt_mask=batch.prompt_mask)
      checks.token_ids("prompt_tokens", batch.prompt_tokens, config.vocab_size)
    batch = sequences.repeat_prompts(batch)
    tokens, mask = batch.tokens, jnp.asarray(batch.mask) > 0
    if batch.prompt_tokens is not None:
      prompt, prompt_mask = attention.justify_prompts(batch.prompt_tokens, batch.prompt_mask)
      tokens = jnp.concatenate([prompt, tokens], axis=1)
      mask = jnp.concatenate([prompt_mask > 0, mask], axis=1)
    return scalars(params, tokens, mask, config=config)

  return apply_fn


@functools.cache
def make_policy_and_value_fn(
  config: architectures.Config, *, logps_chunk: int | None = None
) -> Callable[[Any, sequences.Sequences], tuple[jax.Array, jax.Array]]:
  """Returns the network that `dro` takes: `apply_fn(params, Sequences) -> ([B, T], [B])`.

  `params.policy` belongs to a decoder, `params.value` to a scalar model of the same shape. The
  value is read at the last prompt token, once for each prompt.
  """
  policy_fn = architectures.make_apply_fn(config, logps_chunk=logps_chunk)

  def apply_fn(params: Any, batch: sequences.Sequences) -> tuple[jax.Array, jax.Array]:
    logps = policy_fn(params.policy, batch)  # also checks that there is a prompt
    values = scalars(params.value, batch.prompt_tokens, batch.prompt_mask, config=config)
    return logps, jnp.repeat(values, sequences.rows_per_prompt(batch))

  return apply_fn


def save(
  folder: str | os.PathLike[str],
  config: architectures.Config,
  params: transformer.Params,
  *,
  tokenizer: tokenizer_lib.Tokenizer,
) -> None:
  """Writes a scalar model: a Hugging Face folder `body` and `scalar_head.safetensors` beside it.

  Args:
    folder: created if it is absent; an earlier model in it is replaced.
    config: the config of `params`.
    params: parameters of a scalar model, fully addressable from this process.
    tokenizer: saved with the body.

  Raises:
    ValueError: `params` do not fit `config`, or `folder/body` holds files of another kind.
    OSError: the disk is full or read-only.
  """
  folder = pathlib.Path(folder)
  body = {name: value for name, value in params.items() if name != "scalar_head"}
  head = {name: np.asarray(value) for name, value in params["scalar_head"].items()}
  # Remove the head first: an interrupted save then leaves no model rather than a mixed one.
  (folder / _HEAD_FILE).unlink(missing_ok=True)
  config = dataclasses.replace(config, tied_head=True)  # there is no output embedding
  huggingface.save(folder / "body", config, body, tokenizer=tokenizer)
  partial = folder / f".{_HEAD_FILE}.tmp"
  safetensors.numpy.save_file(head, partial)
  partial.chmod(0o644)  # the library makes it private; others may read a model
  os.replace(partial, folder / _HEAD_FILE)


def load(
  folder: str | os.PathLike[str],
) -> tuple[architectures.Config, transformer.Params, tokenizer_lib.Tokenizer]:
  """Reads a model that `save` wrote: config, parameters as NumPy arrays, tokenizer.

  Raises:
    ValueError: a file is missing or damaged; the message names it and says what to do.
  """
  path = pathlib.Path(folder) / _HEAD_FILE
  if not path.is_file():
    raise ValueError(
      f"{folder} has no {_HEAD_FILE}: give the folder `model` of a finished reward_model run"
    )
  try:
    head = safetensors.numpy.load_file(path)
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(f"{path} is damaged ({error}): copy it again") from error
  config, params = huggingface.load(path.parent / "body")
  found = {name: value.shape for name, value in head.items()}
  if found != {"kernel": (config.width,), "bias": ()}:
    raise ValueError(
      f"{path} holds {found}, not a kernel [{config.width}] and a bias []: body and head belong to "
      "different models; export them again"
    )
  return config, params | {"scalar_head": head}, tokenizer_lib.load(path.parent / "body")
