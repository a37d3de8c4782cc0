"""The language model beside Hugging Face transformers on torch: one training step, one generation.

Both sides hold the same random Llama, each in its own process. A training step is IPO with AdamW,
the pass of the reference model inside it; a generation samples after prompts. The sides must agree
on the reference's log-probabilities and on the loss before a step, or nothing is reported.

  python benchmarks/language_model.py                                # one environment with both
  python benchmarks/language_model.py --torch-python other/bin/python
  python benchmarks/language_model.py --platform=gpu --shape=135m    # or 1b

On a CPU (`--shape=small`, float32) the sides are asked in turn: while one works the other waits, so
both meet the same machine. On an accelerator (bfloat16 products, float32 parameters of the policy,
the reference in bfloat16) two models of the larger shapes do not fit beside each other: there one
side runs after the other, and torch a second time under torch.compile (`torch-compile-layers`; the
side `torch-compile-whole` compiles the loss as one program).

`docs/performance.md` holds the results.
"""

import argparse
import ast
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import sides

LEARNING_RATE, TAU = 1e-5, 0.1


@dataclasses.dataclass(frozen=True)
class Shape:
  """A model, and the work of one training step (pairs of sequences) and of one generation."""

  layers: int
  width: int
  vocabulary: int
  heads: int
  kv_heads: int
  mlp: int
  tied: bool
  pairs: int
  length: int
  prompts: int
  prompt_length: int
  new_tokens: int

  @property
  def head_dim(self) -> int:
    return 32 if self.width == 256 else 64

  @property
  def step_tokens(self) -> int:
    return 2 * self.pairs * self.length

  @property
  def step_flops(self) -> float:
    """Floating-point operations of a training step that no implementation can leave out.

    A product of N parameters and a token takes 2 N forward and 4 N backward: 6 N of the policy and
    2 N of the reference. Causal attention takes half of 2 products forward, twice that backward.
    """
    heads = 2 * (self.heads + self.kv_heads) * self.head_dim
    parameters = self.layers * self.width * (heads + 3 * self.mlp) + self.vocabulary * self.width
    scores = 2 * self.pairs * self.length**2 * self.heads * self.head_dim
    return 8 * parameters * self.step_tokens + 4 * self.layers * 2 * scores


SHAPES = {
  "small": Shape(6, 256, 8192, 8, 8, 1024, False, 8, 128, 16, 32, 96),
  "135m": Shape(30, 576, 49152, 9, 3, 1536, True, 16, 1024, 64, 64, 256),
  "1b": Shape(16, 2048, 128256, 32, 8, 8192, True, 4, 2048, 64, 64, 256),
}


def make_tokens(shape: Shape):
  """Returns `[2 * pairs, length]` ids (chosen and rejected in turn) and the prompts."""
  import numpy as np

  rng = np.random.default_rng(0)
  pairs = rng.integers(3, shape.vocabulary, (2 * shape.pairs, shape.length))
  pairs[:, 0] = 1  # the start token: the prompt, and no part of the scored ones
  return pairs, rng.integers(3, shape.vocabulary, (shape.prompts, shape.prompt_length))


def make_step(shape: Shape, platform: str, changes: Mapping[str, Any]):
  """Returns the config, a function that scores tokens, a training step, and its `init(params)`.

  Args:
    shape: of the model and the step.
    platform: "cpu" for float32, or "gpu" for bfloat16.
    changes: fields of `TransformerConfig`, and `logps_chunk` of `make_apply_fn`.
  """
  import jax
  import jax.numpy as jnp
  import optax

  from alignment import ipo, sequences
  from alignment.models import transformer

  config = transformer.TransformerConfig(
    vocab_size=shape.vocabulary,
    num_layers=shape.layers,
    width=shape.width,
    num_heads=shape.heads,
    num_kv_heads=shape.kv_heads,
    head_dim=shape.head_dim,
    mlp_width=shape.mlp,
    max_length=2 * shape.length,
    tied_head=shape.tied,
    dtype="float32" if platform == "cpu" else "bfloat16",
    scan_layers=platform == "cpu",
  )
  chunk = changes.get("logps_chunk")
  config = dataclasses.replace(config, **{k: v for k, v in changes.items() if k != "logps_chunk"})
  apply_fn = transformer.make_apply_fn(config, logps_chunk=chunk)
  optimizer = optax.adamw(LEARNING_RATE)
  algorithm = ipo.Config(tau=TAU)

  @jax.jit
  def score_tokens(params, tokens):
    completions, prompt = tokens[:, 1:], tokens[:, :1]
    batch = sequences.Sequences(
      completions, jnp.ones(completions.shape), prompt, jnp.ones_like(prompt)
    )
    return jnp.sum(apply_fn(params, batch), axis=-1)

  def step(state, ref_params, tokens):
    completions, mask = tokens[:, 1:], jnp.ones((2 * shape.pairs, shape.length - 1))
    prompt = tokens[:, :1]
    ref_logps = score_tokens(ref_params, tokens)
    pairs = ipo.Batch(
      completions[::2],
      mask[::2],
      ref_logps[::2],
      completions[1::2],
      mask[1::2],
      ref_logps[1::2],
      prompt_tokens=prompt[::2],
      prompt_mask=jnp.ones_like(prompt[::2]),
    )
    return ipo.update(state, pairs, None, apply_fn=apply_fn, optimizer=optimizer, config=algorithm)

  def init(params):
    return ipo.init(params, optimizer=optimizer, config=algorithm)

  return config, score_tokens, jax.jit(step, donate_argnums=0), init


def make_jax_side(folder: pathlib.Path, shape: Shape, platform: str, changes: Mapping[str, Any]):
  """Returns the commands of the JAX side; writes the model to `folder` for the other one."""
  import jax
  import jax.numpy as jnp

  from alignment.models import huggingface, sampling, transformer

  config, score_tokens, step, init = make_step(shape, platform, changes)
  params = jax.jit(lambda key: transformer.init_params(config, key))(jax.random.key(0))
  huggingface.save(folder, config, params)
  ref_params = jax.tree.map(lambda x: x.astype(config.dtype), params)
  tokens, prompts = map(jnp.asarray, make_tokens(shape))
  state = init(jax.tree.map(jnp.copy, params))
  del params
  count = 0

  def train():
    nonlocal state
    state, metrics = step(state, ref_params, tokens)
    return float(metrics["loss"])

  def generate():
    nonlocal count
    count += 1
    samples = sampling.generate(
      ref_params,
      prompts,
      jnp.ones_like(prompts),
      jax.random.key(count),
      config=config,
      max_new_tokens=shape.new_tokens,
      eos_id=-1,
      pad_id=0,
    )
    return int(jax.device_get(samples.mask).sum())

  def score():
    return float(jnp.mean(score_tokens(ref_params, tokens)))

  return {"score": score, "train": train, "generate": generate}


def make_torch_side(folder: pathlib.Path, shape: Shape, platform: str, *, compiled: str):
  """Returns the commands of the torch side, with the model read from `folder`.

  Args:
    folder: that the JAX side wrote.
    shape: of the model and the work.
    platform: "cpu" or "gpu".
    compiled: what torch.compile is given: "" for nothing, "layers" for one layer (all layers share
      its code) and the loss after the last one, or "whole" for the loss as one program, which takes
      minutes at 30 layers.
  """
  import torch
  import transformers

  torch.set_num_threads(len(os.sched_getaffinity(0)))
  torch.manual_seed(0)
  device = "cpu" if platform == "cpu" else "cuda"
  narrow = torch.float32 if platform == "cpu" else torch.bfloat16
  load = functools.partial(
    transformers.AutoModelForCausalLM.from_pretrained, folder, attn_implementation="sdpa"
  )
  policy = load(dtype=torch.float32).to(device)
  ref = load(dtype=narrow).to(device).requires_grad_(False)
  tokens, prompts = (torch.from_numpy(x).to(device) for x in make_tokens(shape))
  optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, fused=True)

  def head_logps(head, hidden):
    logits = head(hidden)[:, :-1].flatten(0, 1).float()
    logps = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
    return -logps.reshape(len(tokens), -1).sum(-1)

  def sequence_logps(model):
    hidden = model.model(tokens, use_cache=False).last_hidden_state
    return head_logps(model.lm_head, hidden)

  def loss_fn():
    with torch.no_grad():
      ref_logps = sequence_logps(ref)
    with torch.autocast(device, torch.bfloat16, enabled=platform != "cpu"):
      ratios = sequence_logps(policy) - ref_logps
    margin = ratios[::2] - ratios[1::2]
    return ((margin - 1 / (2 * TAU)) ** 2).mean()

  if compiled == "whole":
    loss_fn = torch.compile(loss_fn)
  if compiled == "layers":
    head_logps = torch.compile(head_logps)
    for layer in [*policy.model.layers, *ref.model.layers]:
      layer.compile()

  def train():
    loss = loss_fn()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return float(loss.detach())

  def generate():
    with torch.inference_mode():
      out = ref.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        top_k=0,
        min_new_tokens=shape.new_tokens,
        max_new_tokens=shape.new_tokens,
        pad_token_id=0,
      )
    return int(out.numel() - prompts.numel())

  def score():
    with torch.inference_mode():
      return float(sequence_logps(ref).mean())

  return {"score": score, "train": train, "generate": generate}


def parse_changes(settings: list[str]) -> dict[str, Any]:
  """Returns what `--set NAME=VALUE` asks for; a value is a Python literal."""
  pairs = (setting.split("=", 1) for setting in settings)
  return {name: ast.literal_eval(value) for name, value in pairs}


def worker(side: str, python: str, folder: str, args: argparse.Namespace) -> sides.Side:
  """Starts a side of the benchmark."""
  return sides.Side(
    __file__,
    python,
    *("--worker", side, "--folder", folder, "--platform", args.platform, "--shape", args.shape),
    *(f"--set={change}" for change in args.set),
    platform=args.platform,
  )


def check(task: str, results: dict, tolerance: float) -> None:
  """Stops the benchmark unless the sides computed the same number."""
  if abs(results["jax"] - results["torch"]) > tolerance * abs(results["torch"]):
    raise SystemExit(f"the sides compute different numbers in {task}: {results}")


def compare_in_turn(args: argparse.Namespace) -> dict:
  """Runs both sides in turn and returns all (wall seconds, CPU seconds), by task and side."""
  with tempfile.TemporaryDirectory() as folder:
    model = os.path.join(folder, "model")
    pythons = {"jax": sys.executable, "torch": args.torch_python}  # the first one writes the model
    workers = {name: worker(name, python, model, args) for name, python in pythons.items()}
    for task, tolerance in (("score", 1e-4), ("train", 1e-4), ("train", 1e-2)):
      # The second loss sees the step of the first, whose first moments are all signs.
      check(task, {name: side.ask(task)["result"] for name, side in workers.items()}, tolerance)
    seconds: dict = {}
    for task in args.tasks.split(","):
      seconds[task] = {name: [] for name in workers}
      for side in workers.values():
        side.ask(task)  # warm: everything is compiled and allocated
      for _ in range(args.rounds):
        for name, side in workers.items():
          answer = side.ask(task)
          seconds[task][name].append((answer["seconds"], answer["cpu"]))
    for side in workers.values():
      side.close()
  return seconds


def compare_one_by_one(args: argparse.Namespace) -> dict:
  """Runs one side after the other; returns what `compare_in_turn` does."""
  tasks = args.tasks.split(",")
  seconds: dict = {task: {} for task in tasks}
  results: dict = {"score": {}, "train": {}}
  with tempfile.TemporaryDirectory() as folder:
    model = os.path.join(folder, "model")
    for name in args.sides.split(","):
      side = worker(name, sys.executable if name == "jax" else args.torch_python, model, args)
      for task in ("score", "train"):
        answer = side.ask(task)
        results[task][name] = answer["result"]
        print(f"{name}: first {task} {answer['seconds']:.0f} s", file=sys.stderr, flush=True)
      for task in tasks:
        if task == "generate" and name.startswith("torch-compile"):
          continue  # what is compiled is the loss
        for _ in range(2):
          side.ask(task)  # warm
        answers = [side.ask(task) for _ in range(args.rounds)]
        seconds[task][name] = [(answer["seconds"], answer["cpu"]) for answer in answers]
      side.close()
      if "jax" in results["score"] and name == "torch":
        # bfloat16 keeps eight bits: 0.4% of a log-probability, less of a sum over a sequence. The
        # margin of a policy that equals its reference is what is left of these errors.
        for task, tolerance in (("score", 1e-3), ("train", 5e-2)):
          check(task, results[task], tolerance)
  return seconds


def summarise(seconds: dict, shape: Shape, peak: float | None) -> str:
  """Returns a table: median wall seconds (fastest, CPU seconds) of each side, and their ratio.

  The CPU seconds tell a machine that others use too: there they stay well below the wall seconds
  times the number of cores.
  """
  names = list(dict.fromkeys(name for times in seconds.values() for name in times))
  lines = [f"{'':12}" + "".join(f"{name:>28}" for name in names)]
  units = {"train": shape.step_tokens, "generate": shape.prompts * shape.new_tokens}
  for task, times in seconds.items():
    medians = {name: statistics.median(wall for wall, _ in times[name]) for name in times}
    rows: dict = {task: {}, "  tokens/s": {}, "  products": {}, "  to jax": {}}
    for name, median in medians.items():
      wall, cpu = zip(*times[name], strict=True)
      rows[task][name] = f"{median:.3f} s ({min(wall):.3f}, {statistics.median(cpu):.3f})"
      rows["  tokens/s"][name] = f"{units[task] / median:,.0f}"
      if task == "train":
        rate = shape.step_flops / median / 1e12
        share = f", {rate / peak:.1%}" if peak else ""
        rows["  products"][name] = f"{rate:.1f} TFLOP/s{share}"
      if "jax" in medians:
        rows["  to jax"][name] = f"{median / medians['jax']:.2f}x"
    for label, cells in rows.items():
      if cells:
        lines.append(f"{label:12}" + "".join(f"{cells.get(name, ''):>28}" for name in names))
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu")
  parser.add_argument("--shape", choices=SHAPES, default="small")
  parser.add_argument("--tasks", default="train,generate")
  parser.add_argument(
    "--sides", default="jax,torch,torch-compile-layers", help="on a GPU, in this order"
  )
  parser.add_argument(
    "--set", action="append", default=[], metavar="NAME=VALUE",
    help="a field of TransformerConfig, or logps_chunk, for the JAX side",
  )  # fmt: skip
  parser.add_argument("--peak", type=float, help="TFLOP/s of the card, such as 989 of an H100")
  parser.add_argument("--torch-python", default=sys.executable, help="interpreter with torch")
  parser.add_argument("--rounds", type=int, default=9)
  parser.add_argument("--json", type=pathlib.Path, help="write every timing here")
  parser.add_argument("--worker", help=argparse.SUPPRESS)
  parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
  args = parser.parse_args()
  shape = SHAPES[args.shape]
  if args.worker == "jax":
    sides.serve(lambda: make_jax_side(args.folder, shape, args.platform, parse_changes(args.set)))
    return
  if args.worker:
    compiled = args.worker.removeprefix("torch").removeprefix("-compile-")
    sides.serve(lambda: make_torch_side(args.folder, shape, args.platform, compiled=compiled))
    return
  seconds = (compare_in_turn if args.platform == "cpu" else compare_one_by_one)(args)
  print(summarise(seconds, shape, args.peak))
  if args.json:
    args.json.write_text(json.dumps(seconds, indent=2))


if __name__ == "__main__":
  main()
