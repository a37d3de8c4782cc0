"""Times a step of BYOL and its augmentation against torch, torchvision and kornia.

Both sides of `step` start from the same weights of a ResNet with the CIFAR stem, and from the same
two views. They take the same step: four passes of the encoders, LARS with momentum, the moving
average. torch has modules in channels_last, `torch.compile` with `--compile`, and LARS by hand on
lists of tensors. Before anything is timed, the sides must agree on the loss and on the gradient of
each parameter, and on the loss after the step. `augment` makes both views of a batch, and counts
images a second. The sides take turns.

  python benchmarks/byol.py step --torch-python other/bin/python  # an interpreter that has torch
  python benchmarks/byol.py step --batch 512 --dtype bfloat16 --compile --platform gpu
  python benchmarks/byol.py step --batch 8 --dtype float64        # shows that the rest is rounding
  python benchmarks/byol.py augment --batch 64 --size 224 --source 256

On a machine with other work, set OMP_WAIT_POLICY=passive and GOMP_SPINCOUNT=0. Otherwise threads of
torch spin for cores that they do not get, and torch looks several times slower than it is.

`docs/performance.md` holds the results.
"""

import argparse
import functools
import os
import pathlib
import statistics
import sys
import tempfile

import numpy as np
import sides
import torch_augmentations

LEARNING_RATE, WEIGHT_DECAY, TRUST, MOMENTUM = 0.2, 1.5e-6, 1e-3, 0.9
DECAY, STEPS = 0.99, 1000


def make_views(args) -> list[np.ndarray]:
  """Returns two random views `[B, size, size, 3]`, as if standardised."""
  rng = np.random.default_rng(0)
  shape = (args.batch, args.size, args.size, 3)
  base = rng.normal(size=shape)
  dtype = np.float64 if args.dtype == "float64" else np.float32
  return [(base + 0.5 * rng.normal(size=shape)).astype(dtype) for _ in range(2)]


def make_images(args) -> np.ndarray:
  """Returns random bytes `[B, source, source, 3]`."""
  shape = (args.batch, args.source, args.source, 3)
  return np.random.default_rng(1).integers(0, 256, shape, np.uint8)


# --- ours -----------------------------------------------------------------------------------------


def make_jax_side(args):
  """Returns the commands of our side; `check` writes weights and gradients for the other side."""
  import jax
  import jax.numpy as jnp

  from representation import byol, image_augmentations, lars
  from representation.networks import adapters, mlp, resnet

  make = image_augmentations
  views = make.Views(make.first_view(args.size), make.second_view(args.size))
  images, key = jnp.asarray(make_images(args)), jax.random.key(0)
  augmented = jax.jit(views)
  if args.task == "augment":
    return {"work": lambda: jax.block_until_ready(augmented(images, key)) and None}

  jax.config.update("jax_enable_x64", args.dtype == "float64")
  dtype = jnp.dtype(args.dtype)
  modules = (
    resnet.ResNet(args.blocks, False, args.width, "cifar", dtype=dtype),
    mlp.BatchNormMLP(args.hidden, args.outputs, dtype=dtype),
    mlp.BatchNormMLP(args.hidden, args.outputs, dtype=dtype),
  )
  networks = [adapters.Encoder(module) for module in modules]
  features = int(64 * args.width) << (len(args.blocks) - 1)
  inputs = (jnp.zeros((1, args.size, args.size, 3)), jnp.zeros((1, features)),
            jnp.zeros((1, args.outputs)))  # fmt: skip
  keys = jax.random.split(key, 3)
  made = [jax.jit(net.init)(*pair) for net, *pair in zip(networks, keys, inputs, strict=True)]
  params, states = (byol.Parts(*column) for column in zip(*made, strict=True))
  optimizer = lars.lars(
    LEARNING_RATE, weight_decay=WEIGHT_DECAY, trust_coefficient=TRUST, momentum=MOMENTUM
  )
  config = byol.Config(target_decay=DECAY, num_steps=STEPS)
  target_states = byol.Parts(states.encoder, states.projector)
  start = byol.init(
    params, optimizer=optimizer, config=config,
    network_state=byol.NetworkState(states, target_states),
  )  # fmt: skip
  given, own = byol.Networks(*networks), byol.Networks(*networks, None, views)
  update = functools.partial(byol.update, optimizer=optimizer, config=config)
  # A pair of views in place of images.
  pair = byol.Batch([jnp.asarray(view) for view in make_views(args)])
  state = {"check": start, "work": start, "augmented": start}

  def run(name):
    batch, apply_fn = (byol.Batch(images), own) if name == "augmented" else (pair, given)
    state[name], metrics = update(state[name], batch, key, apply_fn=apply_fn)
    return float(metrics["loss"])

  def check():
    if state["check"] is start:
      grads = jax.jit(jax.grad(byol.loss, has_aux=True), static_argnames=("apply_fn",))(
        params, start, pair, key, apply_fn=given, config=config
      )[0]
      for name, tree in (("params", params), ("grads", grads)):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        named = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}
        np.savez(args.folder / f"{name}.npz", **named)
    return {"loss": run("check"), "gradient": 0.0}

  def peak():
    return jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 2**20

  return {
    "check": check, "work": lambda: run("work"), "augmented": lambda: run("augmented"), "peak": peak
  }  # fmt: skip


# --- torch ----------------------------------------------------------------------------------------


def make_torch_side(args):
  """Returns the commands of the torch side."""
  import torch
  from torch import nn
  from torch.nn import functional

  torch.set_num_threads(len(os.sched_getaffinity(0)))
  device = "cpu" if args.platform == "cpu" else "cuda"
  if args.dtype == "float64":
    torch.set_default_dtype(torch.float64)

  def wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))

  class Conv(nn.Conv2d):
    """Pads as TensorFlow's SAME."""

    def forward(self, x):
      size, stride = self.kernel_size[0], self.stride[0]
      total = max((-(-x.shape[-1] // stride) - 1) * stride + size - x.shape[-1], 0)
      low, high = total // 2, total - total // 2
      if low != high:
        x = functional.pad(x, (low, high, low, high))
      return functional.conv2d(x, self.weight, stride=stride, padding=low if low == high else 0)

  class Block(nn.Module):
    def __init__(self, width_in, width, stride):
      super().__init__()
      self.Conv_0 = Conv(width_in, width, 3, stride, bias=False)
      self.Conv_1 = Conv(width, width, 3, bias=False)
      self.BatchNorm_0, self.BatchNorm_1 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
      self.projects = stride > 1 or width_in != width
      if self.projects:
        self.Conv_2 = Conv(width_in, width, 1, stride, bias=False)
        self.BatchNorm_2 = nn.BatchNorm2d(width)

    def forward(self, x):
      out = functional.relu(self.BatchNorm_0(self.Conv_0(x)))
      out = self.BatchNorm_1(self.Conv_1(out))
      return functional.relu(out + (self.BatchNorm_2(self.Conv_2(x)) if self.projects else x))

  class ResNet(nn.Module):
    def __init__(self):
      super().__init__()
      width = width_in = int(64 * args.width)
      self.Conv_0, self.BatchNorm_0 = Conv(3, width, 3, bias=False), nn.BatchNorm2d(width)
      self.blocks = []
      for group, count in enumerate(args.blocks):
        for index in range(count):
          stride = 2 if group and not index else 1
          block = Block(width_in, width << group, stride)
          self.add_module(f"Block_{len(self.blocks)}", block)
          self.blocks.append(block)
          width_in = width << group

    def forward(self, x):
      x = functional.relu(self.BatchNorm_0(self.Conv_0(x)))
      for block in self.blocks:
        x = block(x)
      return wide(x).mean((2, 3))

  class MLP(nn.Module):
    def __init__(self, inputs):
      super().__init__()
      self.Dense_0, self.BatchNorm_0 = nn.Linear(inputs, args.hidden), nn.BatchNorm1d(args.hidden)
      self.Dense_1 = nn.Linear(args.hidden, args.outputs, bias=False)

    def forward(self, x):
      return self.Dense_1(functional.relu(self.BatchNorm_0(self.Dense_0(x))))

  features = int(64 * args.width) << (len(args.blocks) - 1)

  def make_networks():
    parts = {"encoder": ResNet(), "projector": MLP(features), "predictor": MLP(args.outputs)}
    return nn.ModuleDict(parts).to(device, memory_format=torch.channels_last)

  def load(networks, file):
    """Returns the arrays of the file as tensors, one for each parameter, in its order."""
    saved, found = np.load(args.folder / file), []
    for name, _ in networks.named_parameters():
      *path, kind = name.split(".")
      norm = path[-1].startswith("BatchNorm")
      key = "/".join([*path, "bias" if kind == "bias" else "scale" if norm else "kernel"])
      array = saved[key]
      array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
      found.append(torch.from_numpy(np.ascontiguousarray(array)).to(device))
    return found

  views = [
    torch.from_numpy(view).permute(0, 3, 1, 2).to(device, memory_format=torch.channels_last)
    for view in make_views(args)
  ]

  class Learner:
    def __init__(self):
      self.online, self.target = make_networks(), make_networks()
      for networks in (self.online, self.target):
        with torch.no_grad():
          for param, value in zip(networks.parameters(), load(networks, "params.npz"), strict=True):
            param.copy_(value)
      self.target.requires_grad_(False)
      self.params = list(self.online.parameters())
      self.kernels = [i for i, param in enumerate(self.params) if param.ndim > 1]
      self.momentum = [torch.zeros_like(param) for param in self.params]
      self.step_count = 0
      compiled = torch.compile if args.compile else lambda function: function
      self.loss = compiled(self.loss_of)

    def loss_of(self, first, second):
      with torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        online, target = self.online, self.target
        predictions = [
          online["predictor"](online["projector"](online["encoder"](x))) for x in (first, second)
        ]
        with torch.no_grad():
          targets = [target["projector"](target["encoder"](x)) for x in (first, second)]
      cosine = functional.cosine_similarity
      pairs = zip(predictions, targets[::-1], strict=True)
      return 4 - 2 * sum(cosine(wide(a), wide(b)).mean() for a, b in pairs)

    def step(self):
      for param in self.params:
        param.grad = None
      loss = self.loss(*views)
      loss.backward()
      with torch.no_grad():
        grads = [param.grad for param in self.params]
        kernels = [self.params[i] for i in self.kernels]
        scaled = [grads[i] for i in self.kernels]
        torch._foreach_add_(scaled, kernels, alpha=WEIGHT_DECAY)
        norms = zip(torch._foreach_norm(kernels), torch._foreach_norm(scaled), strict=True)
        torch._foreach_mul_(scaled, [TRUST * weight / size for weight, size in norms])
        torch._foreach_mul_(self.momentum, MOMENTUM)
        torch._foreach_add_(self.momentum, grads)
        torch._foreach_add_(self.params, self.momentum, alpha=-LEARNING_RATE)
        decay = 1 - (1 - DECAY) * (np.cos(np.pi * self.step_count / STEPS) + 1) / 2
        for part in ("encoder", "projector"):
          slow, fast = (list(nets[part].parameters()) for nets in (self.target, self.online))
          torch._foreach_lerp_(slow, fast, 1 - decay)
      self.step_count += 1
      return float(loss.detach())

  learners = {}

  def check():
    learner = learners.setdefault("check", Learner())
    if learner.step_count:
      return {"loss": learner.step(), "gradient": 0.0}
    ours = load(learner.online, "grads.npz")
    theirs = torch.autograd.grad(learner.loss(*views), learner.params)
    # A bias before a normalisation has gradient 0 but for rounding.
    least = 1e-3 * torch.stack(torch._foreach_norm(ours)).norm()
    pairs = zip(ours, theirs, strict=True)
    worst = max(float((a - b).norm() / torch.maximum(a.norm(), least)) for a, b in pairs)
    return {"loss": learner.step(), "gradient": worst}

  def work():
    if "work" not in learners:
      learners["work"] = Learner()
    loss = learners["work"].step()
    if device == "cuda":
      torch.cuda.synchronize()
    return loss

  return {"check": check, "work": work,
          "peak": lambda: torch.cuda.max_memory_allocated() / 2**20}  # fmt: skip


# --- both -----------------------------------------------------------------------------------------


def start(args, folder: str, names: list[str]) -> dict[str, sides.Side]:
  """Returns a worker process for each side."""
  given = [*sys.argv[1:], "--folder", folder, "--worker"]
  return {
    name: sides.Side(
      __file__, sys.executable if name == "jax" else args.torch_python, *given, name,
      platform=args.platform,
    )
    for name in names
  }  # fmt: skip


def check(workers: dict[str, sides.Side], dtype: str) -> None:
  """Stops the benchmark if losses or gradients differ."""
  # Rounding near the kinks of the ReLUs reaches the gradients of early layers: in a ResNet-18 they
  # differ by 1e-2 in float32 and by 5e-8 in float64 (with parameters in float32).
  loss_tolerance, gradient_tolerance = {
    "float64": (1e-6, 1e-5), "float32": (1e-4, 5e-2), "bfloat16": (5e-2, 0.5)
  }[dtype]  # fmt: skip
  for turn in range(2):
    found = {name: side.ask("check")["result"] for name, side in workers.items()}
    losses = [result["loss"] for result in found.values()]
    worst = max(result["gradient"] for result in found.values())
    print(f"losses {losses}" + (f", gradients differ by {worst:.1e}" if turn == 0 else ""))
    if np.ptp(losses) > loss_tolerance or worst > gradient_tolerance:
      raise SystemExit("the sides compute different losses or gradients")


def compare(args) -> None:
  """Prints the seconds of each side, with CPU seconds, memory, and the ratio to ours."""
  others = ["torch"] if args.task == "step" else ["torchvision", "batched", "kornia"]
  with tempfile.TemporaryDirectory() as folder:
    workers = start(args, folder, ["jax", *others])
    if args.task == "step":
      check(workers, args.dtype)
    tasks = [(name, "work") for name in workers]
    if args.task == "step":
      tasks.append(("jax", "augmented"))
    for name, command in tasks:
      workers[name].ask(command)  # compiles
    times: dict = {task: [] for task in tasks}
    for _ in range(args.rounds):
      for task in tasks:
        answer = workers[task[0]].ask(task[1])
        times[task].append((answer["seconds"], answer["cpu"]))
    command = "memory" if args.platform == "cpu" or args.task == "augment" else "peak"
    memory = {name: side.ask(command)["result"] for name, side in workers.items()}
    for side in workers.values():
      side.close()
  print(f"{'':22}{'seconds (least, CPU)':>28}{'images/s':>10}{'peak MiB':>10}{'beside ours':>14}")
  medians = {task: statistics.median(wall for wall, _ in rows) for task, rows in times.items()}
  cpus = {task: statistics.median(cpu for _, cpu in rows) for task, rows in times.items()}
  ours = medians["jax", "work"], cpus["jax", "work"]
  for task, rows in times.items():
    cell = f"{medians[task]:.3f} ({min(rows)[0]:.3f}, {cpus[task]:.3f})"
    ratio = f"{medians[task] / ours[0]:.2f}x, {cpus[task] / ours[1]:.2f}x"
    rate = args.batch / medians[task]
    print(f"{' '.join(task):22}{cell:>28}{rate:10.1f}{memory[task[0]]:10.0f}{ratio:>14}")
  print("the second ratio is that of CPU seconds")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("task", choices=("step", "augment"))
  parser.add_argument("--torch-python", default=sys.executable, help="interpreter with torch")
  parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu")
  parser.add_argument("--batch", type=int, default=64)
  parser.add_argument("--size", type=int, default=32, help="of the views")
  parser.add_argument("--source", type=int, default=32, help="of the images before augmentation")
  parser.add_argument("--blocks", type=int, nargs="+", default=[2, 2, 2, 2])
  parser.add_argument("--width", type=float, default=1.0, help="times 64 channels")
  parser.add_argument("--hidden", type=int, default=4096, help="of projector and predictor")
  parser.add_argument("--outputs", type=int, default=256, help="of projector and predictor")
  parser.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), default="float32")
  parser.add_argument("--compile", action="store_true", help="torch.compile the loss")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--worker", help=argparse.SUPPRESS)
  parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
  args = parser.parse_args()
  args.blocks = tuple(args.blocks)
  if args.worker == "jax":
    sides.serve(lambda: make_jax_side(args))
  elif args.worker == "torch":
    sides.serve(lambda: make_torch_side(args))
  elif args.worker:
    sides.serve(lambda: torch_augmentations.make_side(args, make_images(args)))
  else:
    compare(args)


if __name__ == "__main__":
  main()
