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
    encoded = encode(self.tokenizer, self.settings, prompts, completions)
    return self._values(sequences.Sequences(*encoded[2:], *encoded[:2]))

  def preference_probs(
    self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
  ) -> np.ndarray:
    """Returns `[N]` probabilities that `first` beats `second`."""
    if not len(prompts):
      return np.zeros(0)
    batch = encode_pairs(self.tokenizer, self.settings, prompts, first, second)
    config = reward_model.Config(kind=self.settings.kind)
    values = self._values(reward_model.rows(batch, config=config)).reshape(-1, 2)
    scale = 1 if self.settings.kind == "bradley_terry" else 2  # antisymmetric_logits
    return np.asarray(jax.nn.sigmoid((values[:, 0] - values[:, 1]) / scale))

  def _values(self, rows: sequences.Sequences) -> np.ndarray:
    return by_length(functools.partial(scalar_head.scalars, self.params, config=self.config), rows)


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
  group = len(rows.tokens) // len(rows.prompt_tokens)
  joined = [
    (*rows.prompt_tokens[i // group][rows.prompt_mask[i // group] > 0], *line[keep > 0])
    for i, (line, keep) in enumerate(zip(rows.tokens, rows.mask, strict=True))
  ]
  unique = sorted(set(joined), key=len)
  found = []
  # This takes minutes on a CPU, so a terminal shows a progress bar.
  for start in tqdm.tqdm(range(0, len(unique), _BATCH_SIZE), leave=False, disable=None):
    chunk = unique[start : start + _BATCH_SIZE]
    chunk += chunk[-1:] * (_BATCH_SIZE - len(chunk))
    width = -(-len(chunk[-1]) // 32) * 32
    tokens, mask = np.zeros((2, len(chunk), width), np.int32)
    for n, row in enumerate(chunk):
      tokens[n, : len(row)], mask[n, : len(row)] = row, 1
    found.append(np.asarray(function(jnp.asarray(tokens), jnp.asarray(mask))))
  places = {row: n for n, row in enumerate(unique)}
  return np.concatenate(found)[[places[row] for row in joined]]


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
