"""Learned reward and preference models: the folder `model` of a `reward_model` run.

  model/body/                       the decoder and its tokenizer, a Hugging Face folder
  model/scalar_head.safetensors     the linear head that maps its output to a number
  model/reward_model.json           the kind of model, and the lengths of texts in training

`--config.reward=runs/reward_model-human/model` uses the model as the reward of a run. In Python,
`load(folder)` reads it.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from alignment import reward_model, sequences
from alignment.models import architectures, scalar_head, tokenizer
from experiments import files
from experiments.data import encoding

_Path = str | os.PathLike[str]
_SETTINGS_FILE = "reward_model.json"
_BATCH_SIZE = 16


@dataclasses.dataclass(frozen=True)
class Settings:
  """The settings of a reward or preference model.

  Attributes:
    kind: "bradley_terry" or "pairwise".
    prompt_length: largest number of tokens of a prompt; a longer one loses its beginning.
    completion_length: largest number of tokens of a completion with EOS; a longer one loses its
      end.
    describes: a sentence for the reports of runs that use the model.
  """

  kind: str
  prompt_length: int
  completion_length: int
  describes: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class LearnedReward:
  """A trained model that scores texts.

  Attributes:
    settings: kind and lengths.
    config: the config of the decoder.
    params: parameters of `scalar_head`.
    tokenizer: the tokenizer of this model; it may differ from the policy's, so models exchange
      texts.
    fingerprint: SHA-256 of the files.
  """

  settings: Settings
  config: architectures.Config
  params: Any
  tokenizer: tokenizer.Tokenizer
  fingerprint: str = ""

  def rewards(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
    """Returns `[N]` rewards of N completions.

    Raises:
      ValueError: the model is pairwise and has no reward of a single completion.
    """
    if self.settings.kind != "bradley_terry":
      raise ValueError(
        f"a {self.settings.kind} model compares two completions and has no reward of one: train "
        "with --config.algorithm.kind=bradley_terry, or use preference_probs"
      )
    if not len(prompts):
      return np.zeros(0)
    return self._values(self._rows(prompts, completions))

  def preference_probs(
    self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
  ) -> np.ndarray:
    """Returns `[N]` probabilities that `first` beats `second`."""
    if not len(prompts):
      return np.zeros(0)
    return np.asarray(self._odds(self._values(self._rows(prompts, first, second))))

  # --- inside a compiled step -----------------------------------------------------------------

  @property
  def width(self) -> int:
    """Number of tokens of a row that fits every text."""
    num_texts = 1 if self.settings.kind == "bradley_terry" else 2
    return self.settings.prompt_length + num_texts * self.settings.completion_length

  def tokens(
    self, prompts: Sequence[str], *completions: Sequence[str]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of N texts in a shape that depends on N alone; this is host code.

    Args:
      prompts: N prompts.
      *completions: N completions for their rewards, or twice N for the preferences between them.

    Returns:
      tokens and mask, `[N, width]` for rewards and `[2 N, width]` for preferences, int32.
    """
    return _padded(_joined(self._rows(prompts, *completions)), self.width)

  def scores(
    self, params: Any, tokens: jax.Array, mask: jax.Array, *, compare: bool = False
  ) -> jax.Array:
    """Returns `[N]` rewards, or the probabilities of `preference_probs`, of `tokens`'s arrays.

    This is the part that can be traced. Its parameters are an argument, so that they do not become
    constants of the program.

    Args:
      params: `self.params`.
      tokens: `[N, width]`, to `compare` `[2 N, width]`.
      mask: of the same shape.
      compare: whether the rows are pairs.
    """
    values = scalar_head.scalars(params, tokens, mask, config=self.config)
    return self._odds(values) if compare else values

  # --- parts ----------------------------------------------------------------------------------

  def _rows(self, prompts: Sequence[str], *completions: Sequence[str]) -> sequences.Sequences:
    """Returns the rows that the network reads: one for each completion."""
    if len(completions) == 1:
      encoded = encode(self.tokenizer, self.settings, prompts, *completions)
      return sequences.Sequences(*encoded[2:], *encoded[:2])
    first, second = completions
    batch = encode_pairs(self.tokenizer, self.settings, prompts, first, second)
    return reward_model.rows(batch, config=reward_model.Config(kind=self.settings.kind))

  def _values(self, rows: sequences.Sequences) -> np.ndarray:
    return by_length(functools.partial(scalar_head.scalars, self.params, config=self.config), rows)

  def _odds(self, values: Any) -> jax.Array:
    """Returns the probabilities that the first of two successive rows beats the second, `[N]`."""
    pairs = values.reshape(-1, 2)
    scale = 1 if self.settings.kind == "bradley_terry" else 2  # antisymmetric_logits
    return jax.nn.sigmoid((pairs[:, 0] - pairs[:, 1]) / scale)


def encode(
  tokens_of: tokenizer.Tokenizer,
  settings: Settings,
  prompts: Sequence[str],
  completions: Sequence[str],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Returns tokens and mask of prompts `[N, P]` and of completions `[N, T]`, cut to length."""
  return (
    *encoding.encode_prompts(
      tokens_of, prompts, max_length=settings.prompt_length, truncate="left"
    ),
    *encoding.encode_completions(
      tokens_of,
      completions,
      prompts=prompts,
      max_length=settings.completion_length,
      truncate="right",
      allow_empty=True,
    ),
  )


def encode_pairs(
  tokens_of: tokenizer.Tokenizer,
  settings: Settings,
  prompts: Sequence[str],
  first: Sequence[str],
  second: Sequence[str],
) -> reward_model.Batch:
  """Returns N pairs as a batch in which the first completion is always the chosen one."""
  prompt_tokens, prompt_mask, *both = encode(
    tokens_of, settings, [*prompts, *prompts], [*first, *second]
  )
  size = len(prompts)
  tokens, mask = both
  return reward_model.Batch(
    chosen_tokens=tokens[:size],
    chosen_mask=mask[:size],
    rejected_tokens=tokens[size:],
    rejected_mask=mask[size:],
    prompt_tokens=prompt_tokens[:size],
    prompt_mask=prompt_mask[:size],
    chosen_probs=np.ones(size, np.float32),
  )


def by_length(
  function: Callable[[jax.Array, jax.Array], jax.Array], rows: sequences.Sequences
) -> np.ndarray:
  """Applies `function(tokens, mask) -> [B, ...]` to N rows, in batches of similar length.

  Prompt and completion are joined without their padding, and equal rows are computed once. So that
  `function` compiles for few shapes, it gets 16 rows at a time, padded to a multiple of 32 tokens.

  Args:
    function: a jitted function of tokens and mask `[B, T]`.
    rows: NumPy arrays; several rows may share a prompt.

  Returns:
    `[N, ...]` the values of all rows.
  """
  joined = _joined(rows)
  unique = sorted(set(joined), key=len)
  found = []
  # This takes minutes on a CPU, so a terminal shows a progress bar.
  for start in tqdm.tqdm(range(0, len(unique), _BATCH_SIZE), leave=False, disable=None):
    chunk = unique[start : start + _BATCH_SIZE]
    chunk += chunk[-1:] * (_BATCH_SIZE - len(chunk))
    width = -(-len(chunk[-1]) // 32) * 32
    tokens, mask = _padded(chunk, width)
    found.append(np.asarray(function(jnp.asarray(tokens), jnp.asarray(mask))))
  places = {row: n for n, row in enumerate(unique)}
  return np.concatenate(found)[[places[row] for row in joined]]


def _joined(rows: sequences.Sequences) -> list[tuple[int, ...]]:
  """Returns the tokens of each row, prompt and completion without their padding."""
  group = len(rows.tokens) // len(rows.prompt_tokens)
  return [
    (*rows.prompt_tokens[i // group][rows.prompt_mask[i // group] > 0], *line[keep > 0])
    for i, (line, keep) in enumerate(zip(rows.tokens, rows.mask, strict=True))
  ]


def _padded(rows: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns tokens and mask `[N, width]` of N rows, padded at the end."""
  tokens, mask = np.zeros((2, len(rows), width), np.int32)
  for n, row in enumerate(rows):
    tokens[n, : len(row)], mask[n, : len(row)] = row, 1
  return tokens, mask


def save(
  folder: _Path,
  settings: Settings,
  config: architectures.Config,
  params: Any,
  *,
  tokenizer: tokenizer.Tokenizer,
) -> None:
  """Writes the folder that `load` reads; errors are those of `scalar_head.save`."""
  scalar_head.save(folder, config, params, tokenizer=tokenizer)
  path = pathlib.Path(folder) / _SETTINGS_FILE
  path.write_text(json.dumps(dataclasses.asdict(settings), indent=2) + "\n", encoding="utf-8")


def load(folder: _Path) -> LearnedReward:
  """Reads a reward or preference model.

  Raises:
    ValueError: the folder is absent, damaged, or does not hold such a model.
  """
  folder = files.local_path("reward model", folder)
  path = folder / _SETTINGS_FILE
  if not path.is_file():
    raise ValueError(
      f"{folder} has no {_SETTINGS_FILE}: give the folder `model` of a finished reward_model run"
    )
  try:
    settings = Settings(**json.loads(path.read_text(encoding="utf-8")))
    reward_model.Config(kind=settings.kind)
  except (ValueError, TypeError) as error:
    raise ValueError(
      f"{path} is damaged or was written by another version ({error}): export the model again"
    ) from error
  config, params, words = scalar_head.load(folder)
  digest = hashlib.sha256()
  for file in [*sorted(folder.rglob("*.safetensors")), path]:
    with open(file, "rb") as stream:
      digest.update(hashlib.file_digest(stream, "sha256").digest())
  params = jax.tree.map(jnp.asarray, params)
  return LearnedReward(settings, config, params, words, digest.hexdigest())
