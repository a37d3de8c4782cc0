"""The language model beside Hugging Face transformers on torch: one training step, one generation.

Both sides hold the same random Llama (6 layers, width 256, vocabulary 8192, 8 heads, feed-forward
1024), each in its own process, and are asked in turn: while one works the other waits, so both
meet the same machine. A training step is IPO with AdamW on 8 pairs of 128 tokens, the pass of the
reference model inside it; a generation samples 16 x 96 tokens after prompts of 32. The two sides
must agree on the reference's log-probabilities and on the loss after a step, or nothing is
reported.

  python benchmarks/language_model.py                                # one environment with both
  python benchmarks/language_model.py --torch-python other/bin/python

`docs/performance.md` holds the results.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile

import sides

LAYERS, WIDTH, VOCABULARY, HEADS, MLP = 6, 256, 8192, 8, 1024
PAIRS, LENGTH = 8, 128
PROMPTS, PROMPT_LENGTH, NEW_TOKENS = 16, 32, 96
LEARNING_RATE, TAU = 1e-5, 0.1


def make_tokens():
  """Returns `[2 * PAIRS, LENGTH]` ids (chosen and rejected in turn) and the prompts."""
  import numpy as np

  rng = np.random.default_rng(0)
  pairs = rng.integers(3, VOCABULARY, (2 * PAIRS, LENGTH))
  pairs[:, 0] = 1  # the start token: the prompt, and no part of the 127 scored ones
  return pairs, rng.integers(3, VOCABULARY, (PROMPTS, PROMPT_LENGTH))


def make_jax_side(folder: pathlib.Path):
  """Returns the commands of the JAX side; writes the model to `folder` for the other one."""
  import jax
  import jax.numpy as jnp
  import optax

  from alignment import ipo, sequences
  from alignment.models import huggingface, sampling, transformer

  config = transformer.TransformerConfig(
    vocab_size=VOCABULARY,
    num_layers=LAYERS,
    width=WIDTH,
    num_heads=HEADS,
    num_kv_heads=HEADS,
    head_dim=WIDTH // HEADS,
    mlp_width=MLP,
    max_length=2 * LENGTH,
    tied_head=False,
  )
  ref_params = jax.jit(lambda key: transformer.init_params(config, key))(jax.random.key(0))
  huggingface.save(folder, config, ref_params)
  tokens, prompts = map(jnp.asarray, make_tokens())
  apply_fn = transformer.make_apply_fn(config)
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
    completions, mask = tokens[:, 1:], jnp.ones((2 * PAIRS, LENGTH - 1))
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

  step = jax.jit(step, donate_argnums=0)
  params = jax.tree.map(jnp.copy, ref_params)
  state = ipo.init(params, optimizer=optimizer, config=algorithm)
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
      max_new_tokens=NEW_TOKENS,
      eos_id=-1,
      pad_id=0,
    )
    return int(jax.device_get(samples.mask).sum())

  def score():
    return float(jnp.mean(score_tokens(ref_params, tokens)))

  return {"score": score, "train": train, "generate": generate}


def make_torch_side(folder: pathlib.Path):
  """Returns the commands of the torch side, with the model read from `folder`."""
  import torch
  import transformers

  torch.set_num_threads(len(os.sched_getaffinity(0)))
  torch.manual_seed(0)
  policy, ref = (transformers.AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
  ref.requires_grad_(False)
  tokens, prompts = map(torch.from_numpy, make_tokens())
  optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, fused=True)

  def sequence_logps(model):
    logits = model(tokens, use_cache=False).logits[:, :-1].float()
    chosen = torch.gather(logits, 2, tokens[:, 1:, None])[..., 0]
    return (chosen - torch.logsumexp(logits, -1)).sum(-1)

  def train():
    with torch.inference_mode():
      ref_logps = sequence_logps(ref)
    ratios = sequence_logps(policy) - ref_logps.clone()
    margin = ratios[::2] - ratios[1::2]
    loss = ((margin - 1 / (2 * TAU)) ** 2).mean()
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
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
      )
    return int(out.numel() - prompts.numel())

  def score():
    with torch.inference_mode():
      return float(sequence_logps(ref).mean())

  return {"score": score, "train": train, "generate": generate}


def compare(torch_python: str, rounds: int) -> dict:
  """Runs both sides in turn and returns all (wall seconds, CPU seconds), by task and side."""
  with tempfile.TemporaryDirectory() as folder:
    model = os.path.join(folder, "model")
    pythons = {"jax": sys.executable, "torch": torch_python}  # the first one writes the model
    workers = {
      name: sides.Side(__file__, python, "--worker", name, "--folder", model)
      for name, python in pythons.items()
    }
    for task, tolerance in (("score", 1e-4), ("train", 1e-4), ("train", 1e-2)):
      # The second loss sees the step of the first, whose first moments are all signs.
      results = {name: side.ask(task)["result"] for name, side in workers.items()}
      if abs(results["jax"] - results["torch"]) > tolerance * abs(results["torch"]):
        raise SystemExit(f"the sides compute different numbers in {task}: {results}")
    seconds: dict = {}
    for task in ("train", "generate"):
      seconds[task] = {name: [] for name in workers}
      for side in workers.values():
        side.ask(task)  # warm: everything is compiled and allocated
      for _ in range(rounds):
        for name, side in workers.items():
          answer = side.ask(task)
          seconds[task][name].append((answer["seconds"], answer["cpu"]))
    for side in workers.values():
      side.close()
  return seconds


def summarise(seconds: dict) -> str:
  """Returns a table: median wall seconds (fastest, CPU seconds) of each side, and their ratio.

  The CPU seconds tell a machine that others use too: there they stay well below the wall seconds
  times the number of cores.
  """
  lines = [f"{'':20}{'jax':>28}{'torch':>28}{'ratio':>8}"]
  rates = []
  for task, times in seconds.items():
    cells, medians = [], {}
    for name in ("jax", "torch"):
      wall, cpu = zip(*times[name], strict=True)
      medians[name] = statistics.median(wall)
      cells.append(f"{medians[name]:.3f} s ({min(wall):.3f}, {statistics.median(cpu):.3f})")
    ratio = medians["torch"] / medians["jax"]
    lines.append(f"{task:20}{cells[0]:>28}{cells[1]:>28}{ratio:7.2f}x")
    rates = [f"{PROMPTS * NEW_TOKENS / medians[name]:.0f}" for name in ("jax", "torch")]
  lines.append(f"{'  tokens a second':20}{rates[0]:>28}{rates[1]:>28}")
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--torch-python", default=sys.executable, help="interpreter with torch")
  parser.add_argument("--rounds", type=int, default=9)
  parser.add_argument("--json", type=pathlib.Path, help="write every timing here")
  parser.add_argument("--worker", choices=("jax", "torch"), help=argparse.SUPPRESS)
  parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.worker:
    make = {"jax": make_jax_side, "torch": make_torch_side}[args.worker]
    sides.serve(lambda: make(args.folder))
    return
  seconds = compare(args.torch_python, args.rounds)
  print(summarise(seconds))
  if args.json:
    args.json.write_text(json.dumps(seconds, indent=2))


if __name__ == "__main__":
  main()
