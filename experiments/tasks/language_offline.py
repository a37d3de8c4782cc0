"""A pretrained model with prompts and a reward: its training data and its evaluation.

The prompts are split into train and test. K completions of each training prompt are drawn from the
reference or read from the user's file. They are scored and stored with their reference
log-probabilities. The evaluation draws fresh completions of held-out prompts from the policy and
from the reference, and compares them.
"""

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from alignment import sequences
from alignment.models import architectures, int8_base, sampling
from experiments.data import chats, encoding, pretrained, rewards, sample_cache, templates, text
from sharding import checks

OWN_DATA = ("scored", "preferences", "demonstrations")


def has_own_data(data: Any) -> bool:
  """Whether a config's `data` names a file to train on, in place of samples of the reference."""
  return any(data[name] for name in OWN_DATA)


class Samples(NamedTuple):
  """N prompts with K scored completions each, as NumPy arrays.

  prompt_tokens: `[N, P]` int32, left-padded.  prompt_mask: `[N, P]` float32.
  tokens: `[N, K, T]` int32, right-padded, end of sequence included.  mask: `[N, K, T]` float32.
  ref_logps: `[N, K]` sums over completion tokens under the reference, nats.
  rewards: `[N, K]` float32.
  best_probs: `[N]` P(best beats worst), 1 unless the data have soft labels.
  prompts: N texts.
  """

  prompt_tokens: np.ndarray
  prompt_mask: np.ndarray
  tokens: np.ndarray
  mask: np.ndarray
  ref_logps: np.ndarray
  rewards: np.ndarray
  best_probs: np.ndarray
  prompts: list[str]


@dataclasses.dataclass(frozen=True)
class Task:
  """A model, its prompts and its reward, with the methods that sample, score and compare."""

  config: Any
  model: pretrained.Pretrained
  network: architectures.Config
  apply_fn: Callable[[Any, sequences.Sequences], jax.Array]
  reward_fn: rewards.Reward
  judges: dict[str, rewards.Reward]  # they score evaluations alone
  train_prompts: list[str]
  test_prompts: list[str]
  cache: sample_cache.SampleCache
  # What was found in the training data, for the results of the run.
  found: dict[str, float] = dataclasses.field(default_factory=dict)

  # --- reference log-probabilities and samples ------------------------------------------------

  def encode_prompts(
    self, prompts: list[str], names: list[str] | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and mask `[N, P]`; P is the longest filled-in prompt, rounded up to 4.

    Where the width of a row decides how the model reads it, P is `data.prompt_length`.
    """
    data = self.config.data
    fixed = architectures.reads_by_width(self.network, data.prompt_length + data.completion_length)
    return encoding.encode_prompts(
      self.model.tokenizer,
      self._filled(prompts),
      max_length=data.prompt_length,
      multiple=data.prompt_length if fixed else 4,
      truncate="left" if data.truncate else None,
      names=names,
    )

  def _filled(self, prompts: list[str]) -> list[str]:
    """Returns the prompts in `data.prompt_template`, which is for plain texts."""
    template = self.config.data.prompt_template
    if template == "{prompt}":
      return prompts
    chat = next((prompt for prompt in prompts if isinstance(prompt, chats.Chat)), None)
    if chat is not None:
      raise ValueError(
        f"data.prompt_template={template!r} is for plain prompts, but {chat[:40]!r} is a "
        "list of messages, which the model's chat template formats: leave prompt_template out"
      )
    return [templates.fill(template, prompt=prompt) for prompt in prompts]

  def _texts(self, prompts: list[str]) -> list[str]:
    """Returns the prompts as the model reads them."""
    return [chats.prompt_text(self.model.tokenizer, prompt) for prompt in self._filled(prompts)]

  def logps(self, params: Any, prompts: list[str], tokens: np.ndarray, mask: np.ndarray):
    """Returns `[N, K]` summed log-probabilities of completions `[N, K, T]` of N prompts."""
    out = []
    for chunk in self._chunks("log-probabilities", *self.encode_prompts(prompts), tokens, mask):
      prompt_tokens, prompt_mask, chunk_tokens, chunk_mask = chunk
      batch = sequences.flatten_samples(chunk_tokens, chunk_mask, prompt_tokens, prompt_mask)
      out.append(_sequence_logps(params, batch, apply_fn=self.apply_fn))
    flat = np.concatenate([np.asarray(x) for x in out])
    return flat.reshape(-1, tokens.shape[1])[: len(tokens)]

  def generate(
    self, params: Any, prompts: list[str], key: jax.Array, num_samples: int, *, plain: bool = False
  ) -> dict[str, np.ndarray]:
    """Samples K completions of each prompt, with `plain` from the model itself: at temperature 1.

    Returns `tokens` and `mask` `[N, K, T]`, and `logps` `[N, K]`, the model's summed
    log-probabilities.
    """
    data, tokenizer = self.config.data, self.model.tokenizer
    drawn = []
    chunks = self._chunks("sampling", *self.encode_prompts(prompts), num_samples=num_samples)
    for i, (chunk_tokens, chunk_mask) in enumerate(chunks):
      samples = sampling.generate(
        params,
        chunk_tokens,
        chunk_mask,
        jax.random.fold_in(key, i),
        config=self.network,
        max_new_tokens=data.completion_length,
        num_samples=num_samples,
        temperature=1.0 if plain else data.temperature,
        top_k=0 if plain else data.top_k,
        top_p=1.0 if plain else data.top_p,
        eos_id=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
      )
      drawn.append(jax.device_get(samples))
    shape = (-1, num_samples, data.completion_length)
    tokens, mask, logps = (
      np.concatenate(x).reshape(shape)[: len(prompts)] for x in zip(*drawn, strict=True)
    )
    return {"tokens": tokens, "mask": mask, "logps": (logps * mask).sum(-1)}

  def _chunks(self, what: str, *arrays: np.ndarray, num_samples: int | None = None):
    """Yields slices of N prompts and their data, all of one shape, so that they compile once.

    The last slice repeats its last row. A slice has about `data.sample_batch_size` completions; K
    is `num_samples`, or `arrays[-1].shape[1]`.
    """
    count, num_samples = len(arrays[0]), num_samples or arrays[-1].shape[1]
    size = max(1, self.config.data.sample_batch_size // num_samples)
    # It can take minutes on a CPU: show a bar on a terminal, a line elsewhere.
    starts = range(0, count, size)
    if not sys.stderr.isatty() and len(starts) > 1:
      print(f"{what}: {count * num_samples} completions", flush=True)
    for start in tqdm.tqdm(starts, desc=what, leave=False, disable=None):
      rows = np.minimum(np.arange(start, start + size), count - 1)
      yield tuple(x[rows] for x in arrays)

  def decode(
    self, tokens: np.ndarray, mask: np.ndarray, prompts: list[str] | None = None
  ) -> list[str]:
    """Returns the text of each completion `[N, T]`, without special tokens.

    Args:
      tokens: `[N, T]`.
      mask: `[N, T]`.
      prompts: the N / K prompts that they follow, each before K successive rows.
    """
    before: list[str | None] = [None] * len(tokens)
    if prompts is not None:
      before = list(np.repeat(np.array(self._texts(prompts), object), len(tokens) // len(prompts)))
    return [
      self.model.tokenizer.decode_completion(row, prompt=prompt)
      for row, prompt in zip(_unpad(tokens, mask), before, strict=True)
    ]

  def reference_samples(
    self, prompts: list[str], num_samples: int, seed: int
  ) -> dict[str, np.ndarray]:
    """Samples the reference once for these settings; later calls read the cache."""
    data = self.config.data
    settings = {
      **self._model_settings(),
      "prompts": self._texts(prompts),
      "num_samples": num_samples,
      "seed": seed,
      "temperature": data.temperature,
      "top_k": data.top_k,
      "top_p": data.top_p,
      "sample_batch_size": data.sample_batch_size,  # each batch has its own key
    }

    def make():
      return self.generate(self.model.params, prompts, jax.random.key(seed), num_samples)

    return self.cache.get(settings, make)

  def reference_logps(self, prompts: list[str], tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns the reference's log-probabilities of completions, `[N, K]`, and caches them."""
    settings = {
      **self._model_settings(),
      "prompts": self._texts(prompts),
      "tokens": hashlib.sha256(tokens.tobytes() + mask.tobytes()).hexdigest(),
    }

    def make():
      return {"logps": self.logps(self.model.params, prompts, tokens, mask)}

    return self.cache.get(settings, make)["logps"]

  def _model_settings(self) -> dict[str, Any]:
    return {
      "model": self.model.fingerprint,
      "tokenizer": self.model.tokenizer.fingerprint,
      "dtype": self.network.dtype,
      "prompt_length": self.config.data.prompt_length,
      "completion_length": self.config.data.completion_length,
    }

  # --- training data --------------------------------------------------------------------------

  def training_samples(self, min_samples: int = 1) -> Samples:
    """Returns the scored training completions, from the user's file or from the reference.

    Args:
      min_samples: the fewest completions of a prompt that the method can learn from.
    """
    samples = self._samples(min_samples)
    # A completion has no end token if it was cut, or if the model had not ended it.
    full = samples.mask[..., -1] > 0
    endless = full & ~np.isin(samples.tokens[..., -1], self.model.tokenizer.eos_ids)
    self.count_waste(
      samples.prompts,
      (samples.prompt_mask, samples.mask),
      completions_without_end=int(endless.sum()),
    )
    return samples

  def count_waste(
    self, prompts: list[str], masks: Sequence[np.ndarray], name: str = "padding", **counts: int
  ) -> None:
    """Puts into `found` the share of padding in the arrays, and how many prompts were cut."""
    limit, encode = self.config.data.prompt_length, self.model.tokenizer.encode_prompt
    texts = self._texts(prompts) if self.config.data.truncate else []
    self.found[name] = 1 - sum(float(x.sum()) for x in masks) / sum(x.size for x in masks)
    self.found.update(
      prompts_cut=sum(len(encode(text)) > limit for text in texts),
      **counts,
    )
    words = [
      f"{key}: {value:.3g}" if isinstance(value, float) else f"{key}: {value}"
      for key, value in self.found.items()
    ]
    print("  ".join(words), flush=True)

  def _samples(self, min_samples: int) -> Samples:
    data = self.config.data
    if has_own_data(data):
      return self._own_samples(min_samples)
    drawn = self.reference_samples(self.train_prompts, data.num_samples, self.config.seed)
    tokens, mask = drawn["tokens"], drawn["mask"]
    rows, keep = (x.reshape(-1, x.shape[-1]) for x in (tokens, mask))
    completions = self.decode(rows, keep, self.train_prompts)
    repeated = [p for p in self.train_prompts for _ in range(data.num_samples)]
    scores = self.cache.rewards(
      drawn, self.reward_fn.fingerprint, lambda: self.reward_fn(repeated, completions)
    )
    scores = scores.reshape(tokens.shape[:2]).astype(np.float32)
    encoded, ones = self.encode_prompts(self.train_prompts), np.ones(len(tokens), np.float32)
    return Samples(*encoded, tokens, mask, drawn["logps"], scores, ones, self.train_prompts)

  def _own_samples(self, min_samples: int) -> Samples:
    data = self.config.data
    if data.scored:
      scored = self._without_held_out(text.load_scored(data.scored, least=min_samples))
      completions = [row.completions for row in scored]
      labels = [f"completions[{i}]" for i in range(len(completions[0]))]
      scores = np.array([row.rewards for row in scored], np.float32)
      best_probs = np.ones(len(scored), np.float32)
      prompts, where = _places(scored)
    elif data.demonstrations:
      shown = self._without_held_out(text.load_demonstrations(data.demonstrations))
      completions, labels = [(row.completion,) for row in shown], ["completion"]
      scores, best_probs = np.zeros((len(shown), 1), np.float32), np.ones(len(shown), np.float32)
      prompts, where = _places(shown)
    else:
      fields = data.preference_fields.split(",")
      pairs = self._without_held_out(text.load_preferences(data.preferences, fields))
      completions, labels = [(row.chosen, row.rejected) for row in pairs], ["chosen", "rejected"]
      # These rewards express a hard label: on them CoPG is IPO with tau = beta (proposition 3).
      scores = np.tile(np.array([0.25, -0.25], np.float32), (len(pairs), 1))
      best_probs = np.array([row.chosen_prob for row in pairs], np.float32)
      prompts, where = _places(pairs)
    shape = (*scores.shape, data.completion_length)
    encoded = self.encode_prompts(prompts, [f"{place}: prompt" for place in where])
    tokens, mask = encoding.encode_completions(
      self.model.tokenizer,
      [completion for group in completions for completion in group],
      prompts=[prompt for prompt in self._filled(prompts) for _ in labels],
      max_length=data.completion_length,
      multiple=data.completion_length,
      truncate="right" if data.truncate else None,
      names=[f"{place}: {label}" for place in where for label in labels],
    )
    tokens, mask = tokens.reshape(shape), mask.reshape(shape)
    # A demonstration is imitated, so it needs no reference log-probability.
    logps = np.zeros_like(scores)
    if not data.demonstrations:
      logps = self.reference_logps(prompts, tokens, mask)
    return Samples(*encoded, tokens, mask, logps, scores, best_probs, prompts)

  def _without_held_out(self, rows: list[Any]) -> list[Any]:
    """Returns the rows whose prompt is not held out for the evaluation."""
    held_out = set(self.test_prompts)
    kept = [row for row in rows if row.prompt not in held_out]
    if len(kept) < len(rows):
      print(f"{len(rows) - len(kept)} rows are left out: their prompts are held out", flush=True)
    if not kept:
      raise ValueError(
        f"all {len(rows)} rows have prompts that are held out for the comparison: lower "
        f"eval.num_prompts={len(held_out)}, or give other data.prompts"
      )
    return kept

  # --- evaluation -----------------------------------------------------------------------------

  def compare(self, params: Any) -> "Comparison":
    """Draws one completion of each held-out prompt from policy and reference, and scores both.

    The two use different keys. With common random numbers, two policies that hardly differ would
    draw the same texts. Those are ties, and the win rate over the others would answer another
    question.
    """
    prompts, seed = self.test_prompts, self.config.seed
    reference = self.reference_samples(prompts, 1, seed + 1)
    drawn = self.generate(params, prompts, jax.random.key(seed + 2), 1)
    data = self.config.data
    # Log-ratios estimate KL(pi || ref) only on samples of pi: other samples give no policy's KL.
    plain = (data.temperature, data.top_k, data.top_p) == (1, 0, 1)
    own = (
      drawn if plain else self.generate(params, prompts, jax.random.key(seed + 3), 1, plain=True)
    )
    ref_logps = self.logps(self.model.params, prompts, own["tokens"], own["mask"])
    tokens, mask = drawn["tokens"][:, 0], drawn["mask"][:, 0]
    ref_tokens, ref_mask = reference["tokens"][:, 0], reference["mask"][:, 0]
    texts = self.decode(tokens, mask, prompts)
    ref_texts = self.decode(ref_tokens, ref_mask, prompts)
    return Comparison(
      prompts=prompts,
      texts=texts,
      ref_texts=ref_texts,
      rewards=self.reward_fn(prompts, texts),
      ref_rewards=self.reward_fn(prompts, ref_texts),
      judged={
        name: (judge(prompts, texts), judge(prompts, ref_texts))
        for name, judge in self.judges.items()
      },
      log_ratios=(own["logps"] - ref_logps)[:, 0],
      ids=_unpad(tokens, mask),
      ref_ids=_unpad(ref_tokens, ref_mask),
    )


class Comparison(NamedTuple):
  """N held-out completions each from the policy and from the reference.

  prompts, texts, ref_texts: N strings.  rewards, ref_rewards: `[N]`.
  judged: the same two arrays of each of `eval.judges`, by its name.
  log_ratios: `[N]` log pi - log ref, in nats, of samples of the policy at temperature 1 (other ones
  than `texts` if those were drawn otherwise).  ids, ref_ids: token lists.
  """

  prompts: list[str]
  texts: list[str]
  ref_texts: list[str]
  rewards: np.ndarray
  ref_rewards: np.ndarray
  judged: dict[str, tuple[np.ndarray, np.ndarray]]
  log_ratios: np.ndarray
  ids: list[list[int]]
  ref_ids: list[list[int]]


@functools.partial(jax.jit, static_argnames="apply_fn")
def _sequence_logps(params, batch, *, apply_fn):
  return sequences.sequence_logps(apply_fn(params, batch), batch.mask, reduction="sum")


def _places(rows: list[Any]) -> tuple[list[str], list[str]]:
  return [row.prompt for row in rows], [row.where for row in rows]


def _unpad(tokens: np.ndarray, mask: np.ndarray) -> list[list[int]]:
  return [row[keep > 0].tolist() for row, keep in zip(tokens, mask, strict=True)]


IN_INT8 = " in int8"  # ends the fingerprint of a base that was rounded


def load_base(section: Any) -> pretrained.Pretrained:
  """Loads the model of a config's section `network`, with the weights that adapters rest on."""
  kind = section.get("lora_base", "full")
  checks.choice("network.lora_base", kind, ("full", "int8"))
  if kind == "int8" and not section.lora_rank:
    raise ValueError(
      "network.lora_base=int8 freezes the model, and network.lora_rank=0 trains all of it: give a "
      "rank such as 16, or lora_base=full"
    )
  model = pretrained.load(section.model)
  if kind == "full":
    return model
  params = int8_base.quantise(model.params)
  return dataclasses.replace(model, params=params, fingerprint=model.fingerprint + IN_INT8)


def make_task(config: Any) -> Task:
  """Loads the model, the prompts and the reward of a config."""
  model = load_base(config.network)
  network = dataclasses.replace(
    model.config,
    dtype=config.network.dtype,
    remat=config.network.remat,
    scan_layers=config.network.scan_layers,
  )
  for name in ("num_prompts", "prompt_length", "completion_length", "sample_batch_size"):
    checks.count(f"data.{name}", config.data[name])
  checks.count("network.logps_chunk", config.network.logps_chunk, least=0)
  checks.count("eval.num_table_rows", config.eval.num_table_rows, least=0)
  templates.check("data.prompt_template", config.data.prompt_template, "prompt")
  longest = config.data.prompt_length + config.data.completion_length
  if longest > network.max_length:
    raise ValueError(
      f"data.prompt_length + data.completion_length = {longest} exceeds the context of "
      f"{config.network.model} ({network.max_length} tokens): shorten one of them"
    )
  if config.data.get("length_buckets", 1) > 1:
    architectures.check_widths(network, longest, "set data.length_buckets to 1, or shorten them")
  given = [f"data.{name}={config.data[name]}" for name in OWN_DATA if config.data[name]]
  if len(given) > 1:
    raise ValueError(f"{' and '.join(given)} are both given: a run trains on one of them")
  prompts = text.load_prompts(config.data.prompts or None)
  needed = 1 if given else config.data.num_prompts
  if not 0 < config.eval.num_prompts <= len(prompts) - needed:
    raise ValueError(
      f"{config.data.prompts or 'the package'} has {len(prompts)} prompts, but a run needs "
      f"{needed} to train on and eval.num_prompts={config.eval.num_prompts} (at least 1) to "
      "compare on: lower "
      + ("eval.num_prompts" if given else "eval.num_prompts or data.num_prompts")
    )
  train, test = text.split_prompts(prompts, num_test=config.eval.num_prompts, seed=config.seed)
  reward = rewards.resolve(config.reward)
  return Task(
    config=config,
    model=model,
    network=network,
    apply_fn=architectures.make_apply_fn(network, logps_chunk=config.network.logps_chunk or None),
    reward_fn=reward,
    judges=rewards.resolve_judges(config.eval.get("judges", ""), reward),
    train_prompts=train[: config.data.num_prompts],
    test_prompts=test,
    cache=sample_cache.SampleCache(config.data.cache or None),
  )
