"""One IPO step by each side of `memory.py`, measured: what it computed and its memory in bytes.

Both functions are called in fresh processes. The growth of a step is `peak` less `rest`.
"""

import ctypes
import dataclasses
import functools
import gc
import os
import pathlib
import tempfile
from typing import Any

import language_model
from language_model import Shape

from experiments.loop import memory

LEARNING_RATE, TAU, CLIP_NORM, EOS = 1e-5, 0.1, 1.0, 2


def make_shape(pairs: int, length: int, vocabulary: int) -> Shape:
  """Returns the small model of `language_model.py` with one matrix for embedding and head."""
  small = language_model.SHAPES["small"]
  return dataclasses.replace(small, tied=True, pairs=pairs, length=length, vocabulary=vocabulary)


def make_tokens(shape: Shape):
  """Returns `[2 * pairs, length]` ids, chosen and rejected in turn: start, completion, end."""
  tokens, _ = language_model.make_tokens(shape)
  tokens[:, -1] = EOS
  return tokens


def write_models(folder: pathlib.Path, shape: Shape) -> None:
  """Writes two random models as Hugging Face folders: `policy` and `reference`.

  They differ, because the loss of a policy that equals its reference says nothing about either.
  """
  import jax

  from alignment.models import huggingface, transformer

  config, *_ = language_model.make_step(shape, "cpu", {})
  folder.mkdir()
  for seed, name in enumerate(("policy", "reference")):
    huggingface.save(folder / name, config, transformer.init_params(config, jax.random.key(seed)))


def settle() -> int:
  """Gives freed memory back to the system, restarts the peak, and returns the resident bytes."""
  gc.collect()
  ctypes.CDLL(None).malloc_trim(0)
  memory.reset_peak()
  pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
  return int(pages) * os.sysconf("SC_PAGE_SIZE")


def measure_jax(folder: pathlib.Path, shape: Shape, remat: bool) -> dict[str, Any]:
  """Returns what a step computed, its memory, and the compiler's plan, in bytes.

  As in the launcher, the reference's log-probabilities come from a program of their own.
  """
  import jax
  import jax.numpy as jnp
  import optax

  import sharding
  from alignment import ipo, sequences
  from alignment.models import huggingface, transformer

  memory.keep_freed()  # as in every run of the launcher
  config, *_ = language_model.make_step(shape, "cpu", {"remat": remat})
  apply_fn = transformer.make_apply_fn(config)
  algorithm = ipo.Config(tau=TAU, reduction="mean")
  adam = optax.adamw(LEARNING_RATE, weight_decay=0.0)
  optimizer = optax.chain(optax.clip_by_global_norm(CLIP_NORM), adam)

  def load(name):
    _, params = huggingface.load(folder / name)
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)

  mesh = sharding.make_mesh({"data": 1}, devices=jax.devices()[:1])
  init = functools.partial(ipo.init, optimizer=optimizer, config=algorithm)
  state = sharding.init_sharded(init, mesh, sharding.REPLICATED, load("policy"))
  reference = load("reference")
  tokens = jnp.asarray(make_tokens(shape))
  mask, prompt = jnp.ones((len(tokens), shape.length - 1)), tokens[:, :1]
  rows = sequences.Sequences(tokens[:, 1:], mask, prompt, jnp.ones_like(prompt))

  @jax.jit
  def score(params, batch):
    return sequences.sequence_logps(apply_fn(params, batch), batch.mask, reduction="sum")

  update = functools.partial(ipo.update, apply_fn=apply_fn, optimizer=optimizer, config=algorithm)
  step = sharding.jit_update(update, mesh, sharding.REPLICATED)

  def make_batch(ref_logps):
    return ipo.Batch(
      *(rows.tokens[::2], rows.mask[::2], ref_logps[::2]),
      *(rows.tokens[1::2], rows.mask[1::2], ref_logps[1::2]),
      prompt_tokens=prompt[::2],
      prompt_mask=rows.prompt_mask[::2],
    )

  key = jax.random.key(0)
  scorer = score.lower(reference, rows).compile()
  plan = {
    "reference": planned_growth(scorer),
    "step": planned_growth(step.lower(state, make_batch(jnp.zeros(len(tokens))), key).compile()),
  }
  rest = settle()
  state, metrics = step(state, make_batch(scorer(reference, rows)), key)
  jax.block_until_ready(state)
  peak = memory.peak()
  return {
    "loss": float(metrics["loss"]),
    "margin": float(metrics["ipo/margin"]),
    "grad_norm": float(metrics["grad_norm"]),
    "rest": rest,
    "peak": peak,
    "plan": plan,
    "versions": {"jax": jax.__version__},
  }


def planned_growth(program: Any) -> int:
  """Returns the bytes that a compiled program needs beside its arguments."""
  stats = program.memory_analysis()
  outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes  # those that reuse no argument
  return stats.temp_size_in_bytes + outputs


def make_tokenizer(vocabulary: int) -> Any:
  """Returns a tokenizer whose words are the ids themselves, parted by spaces."""
  import tokenizers
  import transformers

  words = {"<pad>": 0, "<s>": 1, "</s>": EOS} | {str(i): i for i in range(3, vocabulary)}
  model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
  model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=model, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
  )


def measure_trl(folder: pathlib.Path, shape: Shape, checkpointing: bool) -> dict[str, Any]:
  """Returns what a step of DPOTrainer computed, and its memory in bytes.

  A step on one short row, with a learning rate of zero, comes before it: it makes the optimiser's
  moments and changes no parameter.
  """
  import datasets
  import torch
  import transformers
  import trl

  found: dict[str, Any] = {}

  class Measure(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
      found["rest"] = settle()

    def on_step_end(self, args, state, control, **kwargs):
      found["peak"] = memory.peak()

  def load(name):
    return transformers.AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)

  def words(ids):
    return " ".join(map(str, ids))

  tokens = make_tokens(shape).tolist()
  rows = [
    {"prompt": "<s> ", "chosen": words(chosen[1:-1]), "rejected": words(other[1:-1])}
    for chosen, other in zip(tokens[::2], tokens[1::2], strict=True)
  ]  # the trainer adds the end
  with tempfile.TemporaryDirectory() as output:
    trainer = trl.DPOTrainer(
      load("policy"),
      load("reference"),
      args=trl.DPOConfig(
        output_dir=output,
        loss_type="ipo",
        beta=TAU,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=CLIP_NORM,
        per_device_train_batch_size=shape.pairs,
        max_steps=1,
        max_length=None,
        gradient_checkpointing=checkpointing,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
      ),
      train_dataset=datasets.Dataset.from_list(rows),
      processing_class=make_tokenizer(shape.vocabulary),
      callbacks=[Measure()],
    )
    ids = torch.tensor([[1, 3, 4, EOS]])
    trainer.model(ids, labels=ids).loss.backward()
    optimizer = trainer.create_optimizer()
    for group in optimizer.param_groups:
      group["lr"] = 0.0
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group in optimizer.param_groups:
      group["lr"] = LEARNING_RATE
    trainer.train()
  steps = {int(state["step"]) for state in optimizer.state.values()}
  if steps != {2}:
    raise RuntimeError(f"the trainer has dropped the moments made before: {steps}")
  logs = next(line for line in trainer.state.log_history if "loss" in line)
  return {
    "loss": float(logs["loss"]),
    "margin": float(logs["rewards/margins"]) / TAU / (shape.length - 1),
    "grad_norm": float(logs["grad_norm"]),
    **found,
    "versions": {module.__name__: module.__version__ for module in (torch, transformers, trl)},
  }
