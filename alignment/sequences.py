"""Masked log-probabilities of token sequences, from which every loss over sequences is built.

A policy enters the algorithms as `apply_fn(params, Sequences) -> [B, T]`, the log-probability of
each completion token given the prompt and the tokens before it. A bandit is the case T = 1 whose
tokens are arm ids.

Implementations often differ silently in three conventions. Here they are:

* the log-probability of a sequence is the **sum** over its completion tokens, EOS included. The
  mean over tokens is another objective, so `reduction` has no default here;
* a mean divides by the number of unmasked tokens, not by the number of non-zero values;
* cached reference log-probabilities (`ref_logps`) are always sums.

For a vocabulary of 50,000 the logits `[B, T, V]` are usually the largest array of a training step.
`chunked_likelihood` computes them for a slice of the vocabulary at a time.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sharding import checks

REDUCTIONS = ("sum", "mean")


class Sequences(NamedTuple):
  """Completions, and the prompts that they continue.

  Attributes:
    tokens: `[B, T]` int, completion tokens, right-padded (a bandit: T = 1, arm ids).
    mask: `[B, T]` 1 on completion tokens including EOS, 0 on padding.
    prompt_tokens: `[N, P]` int, left-padded, so that each prompt ends where its completions start;
      None if there is no prompt. N divides B, and prompt n belongs to the B / N rows from row
      n B / N on: a model reads a prompt once for all its samples. `repeat_prompts` gives every row
      its own copy.
    prompt_mask: `[N, P]` 1 on prompt tokens, 0 on padding.
  """

  tokens: Any
  mask: Any
  prompt_tokens: Any = None
  prompt_mask: Any = None


ApplyFn = Callable[[Any, Sequences], jax.Array]


class Prompts(NamedTuple):
  """Prompts for which a policy draws completions.

  Attributes:
    tokens: `[N, P]` int, left-padded.
    mask: `[N, P]` 1 on prompt tokens, 0 on padding.
  """

  tokens: Any
  mask: Any


# `sample_fn(params, prompt_tokens, prompt_mask, key)` draws K completions of each of N prompts. Its
# result has fields `tokens` and `mask` `[N K, T]`, the K of a prompt in successive rows, as that of
# `models.sampling.generate` with its settings bound.
SampleFn = Callable[[Any, Any, Any, Any], Any]


class PreferenceBatch(NamedTuple):
  """Labelled pairs of completions of the same prompt.

  The two completions may be padded to different lengths T.

  Attributes:
    chosen_tokens: `[B, T]` int, the preferred completion y_w, without the prompt.
    chosen_mask: `[B, T]` 1 on completion tokens including EOS.
    chosen_ref_logps: `[B]` log ref(y_w|x), nats, **summed** over completion tokens.
    rejected_tokens: `[B, T]` the other completion y_l.
    rejected_mask: `[B, T]`.
    rejected_ref_logps: `[B]`.
    chosen_probs: `[B]` or scalar, P(y_w beats y_l); 1 for hard labels.
    prompt_tokens: `[B, P]` int, left-padded, or None.
    prompt_mask: `[B, P]` or None.
  """

  chosen_tokens: Any
  chosen_mask: Any
  chosen_ref_logps: Any
  rejected_tokens: Any
  rejected_mask: Any
  rejected_ref_logps: Any
  chosen_probs: Any = 1.0
  prompt_tokens: Any = None
  prompt_mask: Any = None


def completion_mask(tokens: jax.Array, eos_id: int | Sequence[int]) -> jax.Array:
  """Returns the mask of completions that end with their first EOS.

  The first EOS counts, and nothing after it does. This is correct even if the padding id equals
  `eos_id`; a mask made from `tokens != pad_id` would then teach a model never to stop. A row
  without EOS was cut at T, and all of it counts. If a cut row is padded afterwards, make its mask
  from its length instead.

  Args:
    tokens: `[..., T]` int completion tokens, right-padded.
    eos_id: id of the end-of-sequence token, or several of them.

  Returns:
    `[..., T]` float32, 1 up to and including the first EOS, 0 after it.

  Example:
    >>> completion_mask(jnp.array([[5, 2, 2, 2], [2, 2, 2, 2], [5, 6, 7, 8]]), eos_id=2)
    Array([[1., 1., 0., 0.],
           [1., 0., 0., 0.],
           [1., 1., 1., 1.]], dtype=float32)
  """
  ends = jnp.isin(jnp.asarray(tokens), jnp.asarray(eos_id)).astype(jnp.int32)
  ended_before = jnp.cumsum(ends, axis=-1) - ends
  return (ended_before == 0).astype(jnp.float32)


@checks.array_arguments
def token_logps(
  logits: jax.Array, tokens: jax.Array, *, mask: jax.Array | None = None
) -> jax.Array:
  """Returns the log-probability of each token, in float32 or wider.

  Args:
    logits: `[..., T, V]`, aligned so that `logits[..., t, :]` predicts `tokens[..., t]`.
    tokens: `[..., T]` int in [0, V).
    mask: `[..., T]`, only needed if the logits of padding may be NaN or infinite. Masked positions
      then return the log-probability under zero logits, with zero gradient. (A later mask alone
      does not suffice: the backward pass would compute 0 * NaN.)

  Returns:
    `[..., T]` nats.

  Raises:
    ValueError: if the shapes do not fit.

  Example:
    >>> token_logps(jnp.log(jnp.array([[0.25, 0.75]])), jnp.array([1])).round(4)
    Array([-0.2877], dtype=float32)
  """
  logits = jnp.asarray(logits)
  checks.shape("tokens", tokens, logits.shape[:-1], "logits.shape[:-1]")
  checks.token_ids("tokens", tokens, logits.shape[-1])
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  if mask is not None:
    checks.shape("mask", mask, logits.shape[:-1], "logits.shape[:-1]")
    logits = jnp.where(jnp.asarray(mask, bool)[..., None], logits, 0.0)
  chosen = jnp.take_along_axis(logits, jnp.asarray(tokens)[..., None], axis=-1)[..., 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)


@checks.array_arguments
def sequence_logps(token_logps: jax.Array, mask: jax.Array, *, reduction: str) -> jax.Array:
  """Returns one log-probability for each sequence.

  Masked positions contribute neither value nor gradient, even if they hold NaN or -inf. A fully
  masked row gives 0 with zero gradient under either reduction.

  Args:
    token_logps: `[..., T]` log-probability of each completion token.
    mask: `[..., T]` non-zero on the tokens that count, EOS included.
    reduction: "sum", the log-probability of the sequence, or "mean", divided by the number of
      unmasked tokens (at least 1).

  Returns:
    `[...]` nats (per token for "mean").

  Raises:
    ValueError: if the shapes differ or the reduction is unknown.

  Example:
    >>> logps, mask = jnp.array([[-1.0, -2.0, -9.0]]), jnp.array([[1, 1, 0]])
    >>> sequence_logps(logps, mask, reduction="sum")
    Array([-3.], dtype=float32)
    >>> sequence_logps(logps, mask, reduction="mean")
    Array([-1.5], dtype=float32)
  """
  checks.choice("reduction", reduction, REDUCTIONS)
  checks.same_shape(token_logps=token_logps, mask=mask)
  total = jnp.sum(jnp.where(jnp.asarray(mask, bool), token_logps, 0.0), axis=-1)
  return total if reduction == "sum" else total / _num_tokens(mask, total.dtype)


@checks.array_arguments
def log_ratios(
  token_logps: jax.Array, mask: jax.Array, ref_logps: jax.Array, *, reduction: str
) -> jax.Array:
  """Returns log pi(y|x) - log ref(y|x) of each sequence.

  Args:
    token_logps: `[B, T]` the policy's log-probability of each completion token.
    mask: `[B, T]`.
    ref_logps: `[B]` the reference's log-probability, always **summed** over the same tokens.
    reduction: "sum" or "mean"; "mean" divides both sides by the same number of tokens.

  Returns:
    `[B]` nats (per token for "mean").

  Raises:
    ValueError: if the shapes do not fit or the reduction is unknown.

  Example:
    >>> log_ratios(jnp.array([[-1.0, -1.0]]), jnp.ones((1, 2)), jnp.array([-6.0]),
    ...            reduction="mean")
    Array([2.], dtype=float32)
  """
  total = sequence_logps(token_logps, mask, reduction="sum")
  checks.choice("reduction", reduction, REDUCTIONS)
  checks.shape("ref_logps", ref_logps, total.shape, "[B]")
  ratios = total - ref_logps
  return ratios if reduction == "sum" else ratios / _num_tokens(mask, ratios.dtype)


@jax.custom_jvp
def cut_off(terms: jax.Array) -> jax.Array:
  """Returns the terms of a policy gradient's loss, cut off where float32 nears its end.

  The value of such a loss means nothing, but two infinities of opposite signs, met in one sum,
  would make it NaN. The gradient passes as if nothing had been cut off.

  Example:
    >>> cut_off(jnp.array([jnp.inf, -jnp.inf])).sum()
    Array(0., dtype=float32)
    >>> jax.grad(lambda x: cut_off(1e30 * x))(1e30)
    Array(1.e+30, dtype=float32, weak_type=True)
  """
  limit = float(jnp.finfo(terms.dtype).max) ** 0.75  # thousands of them have a finite sum
  return jnp.clip(terms, -limit, limit)


@cut_off.defjvp
def _cut_off_jvp(primals, tangents):
  return cut_off(*primals), tangents[0]


def _num_tokens(mask: jax.Array, dtype: Any) -> jax.Array:
  return jnp.maximum(jnp.sum(jnp.asarray(mask, bool), axis=-1), 1).astype(dtype)


def flatten_samples(
  tokens: jax.Array,
  mask: jax.Array,
  prompt_tokens: jax.Array | None = None,
  prompt_mask: jax.Array | None = None,
) -> Sequences:
  """Returns K completions of each of B prompts as one batch of B K sequences.

  Row b K + k is sample k of prompt b: a batch sharded along B stays sharded where it is.

  Args:
    tokens: `[B, K, T]` int.
    mask: `[B, K, T]`.
    prompt_tokens: `[B, P]` or None, shared by its K samples.
    prompt_mask: `[B, P]` or None.

  Returns:
    `Sequences` of B K rows and B prompts.

  Raises:
    ValueError: if the shapes do not fit, or only one of the prompt fields is given.
  """
  if jnp.ndim(tokens) != 3:
    raise ValueError(f"tokens must have shape [B, K, T], got {list(jnp.shape(tokens))}")
  batch_size, num_samples, length = jnp.shape(tokens)
  checks.same_shape(tokens=tokens, mask=mask)
  if (prompt_tokens is None) != (prompt_mask is None):
    raise ValueError("prompt_tokens and prompt_mask must be given together, or neither")
  if prompt_tokens is not None:
    checks.same_shape(prompt_tokens=prompt_tokens, prompt_mask=prompt_mask)
    checks.shape(
      "prompt_tokens", prompt_tokens, (batch_size, *jnp.shape(prompt_tokens)[1:]), "[B, P]"
    )
  flat = (batch_size * num_samples, length)
  tokens, mask = (array_module(x).reshape(x, flat) for x in (tokens, mask))
  return Sequences(tokens, mask, prompt_tokens, prompt_mask)


def rows_per_prompt(batch: Sequences) -> int:
  """Returns how many successive rows share each prompt; `ValueError` if N does not divide B.

  Example:
    >>> rows_per_prompt(Sequences(jnp.ones((6, 1)), jnp.ones((6, 1)), jnp.ones((2, 5))))
    3
  """
  num_rows, num_prompts = len(batch.tokens), len(batch.prompt_tokens)
  if not num_prompts or num_rows % num_prompts:
    raise ValueError(
      f"{num_prompts} prompts do not divide {num_rows} completions: give each prompt the same "
      "number of completions, in successive rows"
    )
  return num_rows // num_prompts


def sample(params: Any, prompts: Prompts, key: Any, *, sample_fn: SampleFn) -> Sequences:
  """Returns completions of the prompts, drawn by `sample_fn`, without a gradient.

  The `sample` of every online method calls it. It can be jitted, `vmap`ped and sharded as
  `sample_fn` can. A judge, on the device or on the host, compares the completions before `update`
  sees them.

  Args:
    params: parameters of the policy, as `sample_fn` takes them.
    prompts: N prompts.
    key: typed PRNG key.
    sample_fn: `sample_fn(params, prompt_tokens, prompt_mask, key)`, see `SampleFn`.

  Returns:
    `Sequences` of N K rows and N prompts.

  Raises:
    ValueError: if the samples do not fit the prompts.
  """
  checks.same_shape(prompt_tokens=prompts.tokens, prompt_mask=prompts.mask)
  drawn = sample_fn(params, *prompts, key)
  tokens, mask = jax.lax.stop_gradient((drawn.tokens, drawn.mask))
  checks.same_shape(**{"sample_fn(...).tokens": tokens, "sample_fn(...).mask": mask})
  rows = Sequences(tokens, mask, *prompts)
  rows_per_prompt(rows)
  return rows


def repeat_prompts(batch: Sequences) -> Sequences:
  """Returns the same sequences with one copy of the prompt for each row.

  Example:
    >>> rows = repeat_prompts(Sequences(jnp.ones((4, 1)), jnp.ones((4, 1)), jnp.array([[7], [8]])))
    >>> rows.prompt_tokens[:, 0]
    Array([7, 7, 8, 8], dtype=int32)
  """
  if batch.prompt_tokens is None:
    return batch
  count = rows_per_prompt(batch)
  prompts = (
    None if x is None else array_module(x).repeat(x, count, axis=0)
    for x in (batch.prompt_tokens, batch.prompt_mask)
  )
  return Sequences(batch.tokens, batch.mask, *prompts)


def pair_log_ratios(
  params: Any, batch: PreferenceBatch, *, apply_fn: ApplyFn, reduction: str
) -> tuple[jax.Array, jax.Array]:
  """Returns the log-ratios of the chosen and of the rejected completions.

  The policy scores both answers in one pass over 2 B sequences, chosen and rejected in turn. So the
  weights are read once, and no data moves between devices that hold different pairs.

  Args:
    params: parameters of the policy.
    batch: B labelled pairs.
    apply_fn: `apply_fn(params, Sequences) -> [B, T]`, log-probability of each completion token.
    reduction: "sum" or "mean".

  Returns:
    `[B]` and `[B]`, nats (per token for "mean").

  Raises:
    ValueError: if the shapes of the batch do not fit, or `reduction` is unknown.
  """
  batch_size = _num_pairs(batch)
  sequences = flatten_samples(
    stack_padded(batch.chosen_tokens, batch.rejected_tokens, side="right"),
    stack_padded(batch.chosen_mask, batch.rejected_mask, side="right"),
    batch.prompt_tokens,
    batch.prompt_mask,
  )
  ref_logps = jnp.stack([batch.chosen_ref_logps, batch.rejected_ref_logps], axis=1).reshape(-1)
  logps = apply_fn(params, sequences)
  checks.shape("apply_fn(params, sequences)", logps, jnp.shape(sequences.tokens), "[2 B, T]")
  ratios = log_ratios(logps, sequences.mask, ref_logps, reduction=reduction)
  chosen, rejected = ratios.reshape(batch_size, 2).T
  return chosen, rejected


def _num_pairs(batch: PreferenceBatch) -> int:
  """Returns B; raises `ValueError` if the fields of the batch do not fit each other."""
  batch_size = check_rows(batch, "chosen", "rejected")
  for name in ("chosen_ref_logps", "rejected_ref_logps"):
    checks.shape(name, getattr(batch, name), (batch_size,), "[B]")
  return batch_size


def stack_padded(*arrays: jax.Array, side: str) -> jax.Array:
  """Returns `[B, n, T]` of n arrays `[B, T_i]`, padded with zeros to the longest.

  Pad the masks in the same way: their zeros then mask the padding of the tokens.

  Args:
    *arrays: `[B, T_i]` each.
    side: where the padding goes, "left" (prompts) or "right" (completions).

  Example:
    >>> stack_padded(jnp.ones((1, 1), int), jnp.ones((1, 2), int), side="left")
    Array([[[0, 1],
            [1, 1]]], dtype=int32)
  """
  checks.choice("side", side, ("left", "right"))
  xp = array_module(*arrays)
  length = max(jnp.shape(array)[1] for array in arrays)
  missing = [length - jnp.shape(array)[1] for array in arrays]
  widths = [((0, 0), (n, 0) if side == "left" else (0, n)) for n in missing]
  return xp.stack([xp.pad(x, width) for x, width in zip(arrays, widths, strict=True)], axis=1)


def array_module(*arrays: Any) -> Any:
  """Returns NumPy if all arrays are NumPy's, whose ids can still be checked, else jax.numpy."""
  return np if all(isinstance(array, np.ndarray) for array in arrays) else jnp


def check_rows(batch: Any, *names: str) -> int:
  """Returns B; raises `ValueError` unless every `<name>_tokens` and `_mask` are `[B, ...]` alike.

  Args:
    batch: a `NamedTuple` with these fields.
    *names: prefixes of its fields, such as "chosen".
  """
  size = np.shape(getattr(batch, f"{names[0]}_tokens"))[:1]
  for name in names:
    tokens, mask = (getattr(batch, f"{name}_{kind}") for kind in ("tokens", "mask"))
    if np.ndim(tokens) != 2 or np.shape(tokens)[:1] != size:
      raise ValueError(
        f"{name}_tokens must have two axes, the first one as long as that of {names[0]}_tokens "
        f"{list(size)}, got {list(np.shape(tokens))}"
      )
    checks.same_shape(**{f"{name}_tokens": tokens, f"{name}_mask": mask})
  return size[0]
