"""Labelled pairs and the scalar model that learns from them.

With `network.train=head` the body is frozen. Its features of every completion are computed once and
take the place of the completion's tokens, so `reward_model.update` trains a linear model in
seconds. The features are divided by the root mean square of their differences over the training
pairs. `full_params` turns the trained parameters of either kind into those of a scalar model.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from alignment import reward_model
from alignment.models import architectures, scalar_head
from experiments.data import learned_rewards, pretrained, sample_cache, text
from experiments.tasks import language, language_offline
from sharding import checks


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
  """A body, and pairs split by prompt. A frozen body runs once, when its features are needed."""

  model: pretrained.Pretrained
  network: architectures.Config
  params: Any  # the scalar model's, before training
  settings: learned_rewards.Settings
  pairs: list[text.Preference]
  held_out: np.ndarray  # [N] bool, the test pairs
  frozen: bool
  cache: sample_cache.SampleCache

  @property
  def apply_fn(self) -> reward_model.ApplyFn:
    return _head_of_features if self.frozen else scalar_head.make_apply_fn(self.network)

  @property
  def trained_params(self) -> Any:
    return {"scalar_head": self.params["scalar_head"]} if self.frozen else self.params

  @property
  def train_pairs(self) -> list[text.Preference]:
    return [self.pairs[n] for n in np.flatnonzero(~self.held_out)]

  @property
  def test_pairs(self) -> list[text.Preference]:
    return [self.pairs[n] for n in np.flatnonzero(self.held_out)]

  def train_batch(self) -> reward_model.Batch:
    return self._batch(~self.held_out)

  def test_batch(self) -> reward_model.Batch:
    return self._batch(self.held_out)

  def full_params(self, params: Any) -> Any:
    """Returns the parameters of a whole scalar model, given the trained ones."""
    if not self.frozen:
      return params
    head = params["scalar_head"]
    return self.params | {"scalar_head": head | {"kernel": head["kernel"] / self._scale}}

  def _batch(self, rows: np.ndarray) -> reward_model.Batch:
    batch = self._features if self.frozen else self._tokens
    return reward_model.Batch(*(np.asarray(x)[rows] for x in batch))

  @functools.cached_property
  def _tokens(self) -> reward_model.Batch:
    names = ("prompt", "chosen", "rejected")
    texts = ([getattr(pair, name) for pair in self.pairs] for name in names)
    batch = learned_rewards.encode_pairs(self.model.tokenizer, self.settings, *texts)
    return batch._replace(chosen_probs=np.array([p.chosen_prob for p in self.pairs], np.float32))

  @functools.cached_property
  def _features(self) -> reward_model.Batch:
    """The batch, with features in place of the tokens of each completion."""
    features = self._raw_features / self._scale
    ones = np.ones(features[:, 0].shape, np.float32)
    return self._tokens._replace(
      chosen_tokens=features[:, 0],
      chosen_mask=ones,
      rejected_tokens=features[:, 1],
      rejected_mask=ones,
      prompt_tokens=ones[:, :1],  # the features depend on the prompt already
      prompt_mask=ones[:, :1],
    )

  @functools.cached_property
  def _scale(self) -> np.ndarray:
    """`[D]` root mean square difference within a training pair."""
    chosen, rejected = np.moveaxis(self._raw_features[~self.held_out], 1, 0)
    return np.sqrt(np.mean((chosen - rejected) ** 2, axis=0)) + 1e-6

  @functools.cached_property
  def _raw_features(self) -> np.ndarray:
    """`[N, 2, D]`: features of the row that ends with chosen, and of the one with rejected."""
    kind = self.settings.kind
    rows = reward_model.rows(self._tokens, config=reward_model.Config(kind=kind))
    settings = {
      "features_of": [[pair.prompt, pair.chosen, pair.rejected] for pair in self.pairs],
      "model": [self.model.fingerprint, self.model.tokenizer.fingerprint],
      "network": [self.network.num_layers, self.network.dtype],
      "settings": dataclasses.asdict(self.settings),
    }

    def make():
      print(f"features: {len(rows.tokens)} completions, each distinct one once", flush=True)
      read = functools.partial(scalar_head.features, self.params, config=self.network)
      return {"features": learned_rewards.by_length(read, rows)}

    found = self.cache.get(settings, make)["features"].reshape(len(self.pairs), 2, -1)
    return found if kind == "bradley_terry" else found[:, ::-1]  # row 0 ends with rejected


def make_task(config: Any) -> Task:
  """Loads the pairs and the body of a config; raises ValueError before anything is computed."""
  checks.choice("network.train", config.network.train, ("all", "head"))
  if config.network.train == "head" and config.network.get("lora_rank", 0):
    raise ValueError(
      f"network.lora_rank={config.network.lora_rank} adapts the body, and network.train='head' "
      "freezes it: give network.train='all', or network.lora_rank=0"
    )
  if config.network.train == "head" and config.data.get("length_buckets", 1) != 1:
    raise ValueError(
      f"data.length_buckets={config.data.length_buckets} is for tokens, and network.train='head' "
      "trains on features: set it to 1"
    )
  for name in ("prompt_length", "completion_length"):
    checks.count(f"data.{name}", config.data[name])
  pairs = _load_pairs(config)
  prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
  if not 0 < config.eval.num_prompts < len(prompts):
    raise ValueError(
      f"eval.num_prompts={config.eval.num_prompts} must be at least 1 and leave prompts for "
      f"training: give 1 to {len(prompts) - 1}"
    )
  _, test = text.split_prompts(prompts, num_test=config.eval.num_prompts, seed=config.seed)
  held_out = np.isin([pair.prompt for pair in pairs], test)
  num_train = int((~held_out).sum())
  language.check_batch_size(config, config.algorithm.num_microbatches)
  if config.train.batch_size > num_train:
    raise ValueError(
      f"train.batch_size={config.train.batch_size} exceeds the {num_train} training pairs: "
      "lower it or eval.num_prompts"
    )
  model = language_offline.load_base(config.network)
  num_layers = config.network.num_layers or model.config.num_layers
  if not 0 < num_layers <= model.config.num_layers:
    raise ValueError(
      f"network.num_layers={num_layers} must be 1 to {model.config.num_layers}, the layers of "
      f"{config.network.model}, or 0 for all of them"
    )
  network = dataclasses.replace(
    model.config,
    num_layers=num_layers,
    dtype=config.network.dtype,
    remat=config.network.remat,
    scan_layers=config.network.scan_layers,
  )
  answers = 1 if config.algorithm.kind == "bradley_terry" else 2
  longest = config.data.prompt_length + answers * config.data.completion_length
  if longest > network.max_length:
    raise ValueError(
      f"data.prompt_length + {answers} x data.completion_length = {longest} exceeds the context of "
      f"{config.network.model} ({network.max_length} tokens): lower one of them"
    )
  architectures.check_widths(
    network, longest, "shorten data.prompt_length or data.completion_length"
  )
  params = scalar_head.from_decoder(model.params)
  # Of an encoder-decoder the encoder is cut: the decoder reads one token.
  body = params
  if "encoder" in params:
    body = params["encoder"] = dict(params["encoder"])
  body["layers"] = jax.tree.map(lambda x: x[:num_layers], body["layers"])
  lengths = (config.data.prompt_length, config.data.completion_length)
  return Task(
    model=model,
    network=network,
    params=params,
    settings=learned_rewards.Settings(config.algorithm.kind, *lengths),
    pairs=pairs,
    held_out=held_out,
    frozen=config.network.train == "head",
    cache=sample_cache.SampleCache(config.data.cache or None),
  )


def _load_pairs(config: Any) -> list[text.Preference]:
  if not config.data.preferences:
    raise ValueError(
      "data.preferences is empty: give --config.data.preferences=FILE (JSON lines of prompt, "
      "chosen, rejected), tfds:NAME, hf:NAME or finegrained_rlhf:FILE"
    )
  return text.load_preferences(config.data.preferences, config.data.preference_fields.split(","))


def _head_of_features(params: Any, rows: Any) -> jax.Array:
  """`apply_fn` of a frozen body, where `rows.tokens` are features `[B, D]`."""
  return rows.tokens @ params["scalar_head"]["kernel"] + params["scalar_head"]["bias"]
