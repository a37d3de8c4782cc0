"""Scores a policy on the tasks of the lm-evaluation-harness, where that package is installed.

`extend` runs the tasks that `eval.tasks` names. `scores` and `continuations` answer its two
kinds of questions and work without it.

Reference: Gao et al., https://github.com/EleutherAI/lm-evaluation-harness.
"""

import dataclasses
import functools
import importlib.util
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignment.models import sampling, transformer
from experiments import files
from experiments.report import results
from experiments.tasks import language_offline
from sharding import checks

_LENGTHS = 32  # inputs are filled up to a multiple of it, so that few shapes are compiled


def check(config: Any, network: Any) -> None:
  """Raises ValueError for settings that no evaluation of a model of this shape could use."""
  checks.count("eval.task_limit", config.eval.task_limit, least=0)
  checks.count("eval.num_fewshot", config.eval.num_fewshot, least=0)
  for name in config.eval.tasks.split(","):
    _task_name(name.strip())
  if _entries(config) and not isinstance(network, transformer.TransformerConfig):
    raise ValueError(
      f"eval.tasks={config.eval.tasks} needs a decoder, and {config.network.model} is an "
      "encoder-decoder: leave eval.tasks empty"
    )


def _entries(config: Any) -> list[str]:
  return [entry.strip() for entry in config.eval.tasks.split(",") if entry.strip()]


def _task_name(entry: str) -> str:
  """Returns the name of a task, which its file says if the entry is a file."""
  if not entry.endswith(".yaml"):
    return entry
  path = files.local_path("config.eval.tasks", entry)
  if not path.is_file():
    raise ValueError(f"eval.tasks: there is no file {entry!r}; name a task or a YAML file of one")
  found = re.search(r"^task:\s*['\"]?([^'\"#\s]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
  if found is None:
    raise ValueError(f"eval.tasks: {entry!r} has no line `task: NAME`, by which it is known")
  return found.group(1)


def extend(result: results.Result, task: language_offline.Task, params: Any) -> results.Result:
  """Returns a result with the metrics of the tasks in `eval.tasks`; without the harness, a note.

  Args:
    result: of the rest of the evaluation.
    task: gives the model's shape, its tokenizer and the config.
    params: of the policy.

  Raises:
    ValueError: if a task is unknown or its data cannot be read.
  """
  entries = _entries(task.config)
  if not entries:
    return result
  if importlib.util.find_spec("lm_eval") is None:
    reason = (
      f"eval.tasks={task.config.eval.tasks} was skipped, because lm_eval is not installed: "
      "pip install lm_eval"
    )
    print(reason)
    return dataclasses.replace(result, notes=[*result.notes, reason])
  import lm_eval
  from lm_eval import tasks as lm_eval_tasks

  paths = [files.local_path("config.eval.tasks", x) for x in entries if x.endswith(".yaml")]
  folders = {str(path.parent) for path in paths}
  manager = lm_eval_tasks.TaskManager(include_path=sorted(folders) or None)
  wanted, known = [_task_name(entry) for entry in entries], set(manager.all_tasks)
  unknown = [name for name in wanted if name not in known]
  if unknown:
    raise ValueError(
      f"eval.tasks: lm_eval has no task {unknown[0]!r}; `lm_eval ls tasks` lists them"
    )
  try:
    found = lm_eval.simple_evaluate(
      model=_adapter(task, params),
      tasks=wanted,
      num_fewshot=task.config.eval.num_fewshot or None,
      limit=task.config.eval.task_limit or None,
      task_manager=manager,
      bootstrap_iters=1000,
      log_samples=False,
    )
  except (OSError, ConnectionError) as error:
    raise ValueError(
      f"eval.tasks={task.config.eval.tasks}: the data of a task could not be read "
      f"({type(error).__name__}: {error})"
    ) from error
  metrics, table = _summary(found)
  return dataclasses.replace(
    result, metrics={**result.metrics, **metrics}, tables=[*result.tables, table]
  )


def _summary(found: Any) -> tuple[dict[str, results.Estimate], results.Table]:
  metrics, rows = {}, []
  for name, row in found["results"].items():
    count = found["n-samples"].get(name, {}).get("effective")
    for key, value in row.items():
      metric, _, filtered = key.partition(",")
      if not isinstance(value, int | float) or "stderr" in metric or metric == "sample_len":
        continue
      error = row.get(f"{metric}_stderr,{filtered}")
      half = 1.96 * error if isinstance(error, int | float) else None
      low, high = (None, None) if half is None else (value - half, value + half)
      estimate = results.Estimate(float(value), low, high, count)
      metrics[f"{name}/{metric}"] = estimate
      rows.append([name, metric, estimate, count or ""])
  table = results.Table(
    "Tasks of the lm-evaluation-harness",
    ["task", "metric", "value", "examples"],
    rows,
    caption="Brackets hold 95 % intervals over the examples, from the harness's standard errors.",
  )
  return metrics, table


def _adapter(task: language_offline.Task, params: Any) -> Any:
  """Returns the policy as a model of the harness, whose class exists only where it is installed."""
  from lm_eval.api.model import TemplateLM
  from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

  tokenizer = task.model.tokenizer

  class Policy(TemplateLM):
    eot_token_id = tokenizer.eos_id
    prefix_token_id = next(iter(tokenizer.encode_prompt("")), tokenizer.eos_id)
    tokenizer_name = "bootstrax"

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
      del kwargs
      return (
        tokenizer.encode(string) if add_special_tokens is False else tokenizer.encode_prompt(string)
      )

    def _loglikelihood_tokens(self, requests, **kwargs):
      del kwargs
      return scores(task, params, [(context, target) for _, context, target in requests])

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
      del disable_tqdm
      windows = [
        list(
          map(
            make_disjoint_window,
            get_rolling_token_windows(
              token_list=tokenizer.encode(request.args[0]),
              prefix_token=self.prefix_token_id,
              max_seq_len=task.network.max_length - 1,
              context_len=1,
            ),
          )
        )
        for request in requests
      ]
      found = iter(scores(task, params, [pair for window in windows for pair in window]))
      return [sum(next(found)[0] for _ in window) for window in windows]

    def generate_until(self, requests, disable_tqdm=False):
      del disable_tqdm
      texts = [""] * len(requests)
      groups: dict[tuple[int, float], list[int]] = {}
      for i, request in enumerate(requests):
        options = request.args[1]
        temperature = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
        groups.setdefault((int(options.get("max_gen_toks", 256)), temperature), []).append(i)
      for (length, temperature), places in groups.items():
        prompts = [requests[i].args[0] for i in places]
        drawn = continuations(task, params, prompts, max_new_tokens=length, temperature=temperature)
        for i, text in zip(places, drawn, strict=True):
          until = requests[i].args[1].get("until") or []
          for stop in [until] if isinstance(until, str) else until:
            text = text.split(stop)[0] if stop else text
          texts[i] = text
      return texts

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
      return tokenizer.apply_chat(chat_history, add_generation_prompt=add_generation_prompt)

  return Policy()


def scores(
  task: language_offline.Task, params: Any, pairs: Sequence[tuple[list[int], list[int]]]
) -> list[tuple[float, bool]]:
  """Returns how likely each text is after its context.

  Args:
    task: gives the model's shape and the number of rows that are computed together.
    params: of the model.
    pairs: tokens of a context, at least one, and of the text after it. What exceeds the model's
      length is cut from the start of the context.

  Returns:
    For each pair, the summed log-probability of the text in nats, and whether each of its tokens is
    the most probable one.
  """
  longest = task.network.max_length
  inputs, targets = [], []
  for context, text in pairs:
    if not context or not text:
      raise ValueError(f"context and text must have a token each, got {context} and {text}")
    if len(text) > longest:
      raise ValueError(
        f"a text of {len(text)} tokens is longer than the model's context of {longest}"
      )
    inputs.append([*context, *text][:-1][-longest:])
    targets.append(text)
  found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
  size = task.config.data.sample_batch_size
  # The longest first: if memory is short, the first batch shows it.
  order = sorted(range(len(pairs)), key=lambda i: -len(inputs[i]))
  for start in range(0, len(order), size):
    rows = order[start : start + size]
    width = min(_filled(max(len(inputs[i]) for i in rows)), longest)
    length = min(_filled(max(len(targets[i]) for i in rows)), width)
    tokens, mask = np.zeros((2, size, width), np.int32)
    wanted, places, counted = np.zeros((3, size, length), np.int32)
    mask[len(rows) :, 0] = 1  # rows that fill the last batch
    for row, i in enumerate(rows):
      tokens[row, : len(inputs[i])], mask[row, : len(inputs[i])] = inputs[i], 1
      count = len(targets[i])
      wanted[row, :count], counted[row, :count] = targets[i], 1
      places[row, :count] = np.arange(len(inputs[i]) - count, len(inputs[i]))
    out = _scores(params, tokens, mask, wanted, places, counted, config=task.network)
    for i, logp, greedy in zip(rows, *map(np.asarray, out), strict=False):
      found[i] = float(logp), bool(greedy)
  return found


@functools.partial(jax.jit, static_argnames="config")
def _scores(params, tokens, mask, targets, places, counted, *, config):
  """Returns `[B]` log-probabilities and `[B]` whether all tokens are the most probable ones."""
  hidden = transformer.hidden_states(params, tokens, mask, config=config)
  hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)
  embedding = transformer.output_embedding(params)

  def one(column):  # of one position, since [B, C, V] is large
    states, wanted = column
    logits = transformer.output_logits(states, embedding, softcap=config.logit_softcap)
    chosen = jnp.take_along_axis(logits, wanted[:, None], axis=1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=1), chosen >= logits.max(axis=1)

  logps, greedy = jax.lax.map(one, (hidden.swapaxes(0, 1), targets.T))
  return (logps.T * counted).sum(1), (greedy.T | (counted == 0)).all(1)


def _filled(length: int) -> int:
  return length + -length % _LENGTHS


def continuations(
  task: language_offline.Task,
  params: Any,
  prompts: Sequence[str],
  *,
  max_new_tokens: int,
  temperature: float = 0.0,
) -> list[str]:
  """Returns what the model writes after each prompt, until an end token.

  Args:
    task: gives the model's shape, its tokenizer and the number of rows that are drawn together.
    params: of the model.
    prompts: texts. What exceeds the model's length is cut from their start.
    max_new_tokens: the longest text, in tokens.
    temperature: 0 takes the most probable token.
  """
  tokenizer, size = task.model.tokenizer, task.config.data.sample_batch_size
  room = task.network.max_length - max_new_tokens
  if room < 1:
    raise ValueError(
      f"a task asks for {max_new_tokens} new tokens, but the model's context has "
      f"{task.network.max_length}: lower max_gen_toks in the task"
    )
  ids = [tokenizer.encode_prompt(prompt)[-room:] for prompt in prompts]
  order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
  texts = [""] * len(ids)
  for start in range(0, len(order), size):
    rows = order[start : start + size]
    width = min(_filled(max(1, *(len(ids[i]) for i in rows))), room)
    tokens: Any = np.full((size, width), tokenizer.pad_id, np.int32)
    mask: Any = np.zeros((size, width), np.int32)
    for row, i in enumerate(rows):
      tokens[row, : len(ids[i])], mask[row, : len(ids[i])] = ids[i], 1
    drawn = sampling.generate(
      params,
      tokens,
      mask,
      jax.random.fold_in(jax.random.key(task.config.seed), start),
      config=task.network,
      max_new_tokens=max_new_tokens,
      temperature=temperature,
      eos_id=tokenizer.eos_ids,
      pad_id=tokenizer.pad_id,
    )
    for i, row, keep in zip(rows, np.asarray(drawn.tokens), np.asarray(drawn.mask), strict=False):
      texts[i] = tokenizer.decode_completion(row[keep > 0].tolist(), prompt=prompts[i])
  return texts
