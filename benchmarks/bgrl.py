"""Times a training step of BGRL against PyTorch Geometric, and against the number of edges.

All sides train on the same random graph of the size of Amazon Photo (7,650 nodes, 238,162 directed
edges with heavy-tailed degrees, 745 features). They start from the same parameters and take the
same step: two views, an online and a target GCN with BatchNorm, the predictor, AdamW and the moving
average. There are two PyTorch sides. One uses GCNConv on an edge list. The other uses CSR products
written by hand, whose backward pass is a product with the transposed CSR matrix. The sides take
turns. They must first agree on the loss before and after a step without random masks.

  python benchmarks/bgrl.py --torch-python other/bin/python       # an interpreter that has torch
  python benchmarks/bgrl.py --widths 512 256
  python benchmarks/bgrl.py --scaling                             # ours only, 10^4 to 10^7 edges

`docs/performance.md` holds the results.
"""

import argparse
import functools
import itertools
import os
import pathlib
import statistics
import sys
import tempfile
import time

import numpy as np
import sides

NODES, PAIRS, FEATURES, DENSITY = 7650, 119_081, 745, 0.35
PREDICTOR = 512
FEATURE_MASK, EDGE_DROP = (0.1, 0.2), (0.4, 0.1)
LEARNING_RATE, WEIGHT_DECAY, DECAY = 1e-4, 1e-5, 0.99


def make_graph(
  nodes: int = NODES, pairs: int = PAIRS, *, hub: bool = False
) -> tuple[np.ndarray, np.ndarray]:
  """Returns both directions of `pairs` random edges `[2, 2 * pairs]`, with heavy-tailed degrees.

  With `hub`, node 0 is joined to all other nodes by some of these edges.
  """
  rng = np.random.default_rng(0)
  chances = rng.pareto(1.6, nodes) + 0.3
  chances = np.cumsum(np.minimum(chances, 1500 * chances.mean() / 31) / chances.sum())
  spokes = np.arange(1, nodes) if hub else np.zeros(0, np.int64)  # smaller * nodes + larger
  found = np.zeros(0, np.int64)
  while len(found) < pairs - len(spokes):
    drawn = np.searchsorted(chances / chances[-1], rng.random((2 * pairs, 2)))
    drawn = np.sort(drawn[drawn[:, 0] != drawn[:, 1]], axis=1)
    found = np.union1d(found, drawn[:, 0] * nodes + drawn[:, 1])
    found = np.setdiff1d(found, spokes, assume_unique=True)
  chosen = found[rng.permutation(len(found))[: pairs - len(spokes)]]
  chosen = np.stack(np.divmod(np.concatenate([spokes, chosen]), nodes), axis=1)
  return np.concatenate([chosen, chosen[:, ::-1]]).T


def make_features() -> np.ndarray:
  """Returns random bags of words, `[NODES, FEATURES]`, with rows that sum to 1."""
  rng = np.random.default_rng(1)
  words = (rng.random((NODES, FEATURES)) < DENSITY).astype(np.float32)
  return words / np.maximum(words.sum(1, keepdims=True), 1)


def make_ours(graph, widths: tuple[int, ...], corrupt: bool, predictor_width: int = PREDICTOR):
  """Returns the compiled update and the state before the first step."""
  import jax
  import jax.numpy as jnp
  import optax

  from representation import bgrl
  from representation.networks import adapters, gcn, mlp

  encoder = adapters.Encoder(gcn.GCN(widths))
  predictor = adapters.Predictor(mlp.MLP(predictor_width, widths[-1]))
  keys = jax.random.split(jax.random.key(0), 3)
  (online, state), (target, target_state) = (jax.jit(encoder.init)(key, graph) for key in keys[:2])
  params = bgrl.Params(online, predictor.init(keys[2], jnp.zeros((1, widths[-1]))))
  optimizer = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
  none = (0.0, 0.0)
  config = bgrl.Config(FEATURE_MASK if corrupt else none, EDGE_DROP if corrupt else none, DECAY)
  start = bgrl.init(
    params, optimizer=optimizer, config=config, target_params=target,
    network_state=bgrl.NetworkState(state, target_state),
  )  # fmt: skip
  update = functools.partial(
    bgrl.update, apply_fn=bgrl.Networks(encoder, predictor), optimizer=optimizer, config=config
  )
  return jax.jit(update), start


def make_jax_side(folder: pathlib.Path, widths: tuple[int, ...]):
  """Returns the commands of our side, and writes its parameters to `folder` for the other sides."""
  import jax

  from representation import graphs

  senders, receivers = make_graph()
  graph = graphs.make_graph(make_features(), senders, receivers)
  plain, start = make_ours(graph, widths, corrupt=False)
  step, state = make_ours(graph, widths, corrupt=True)
  leaves = {}
  for name, tree in (("online", start.params.encoder), ("target", start.target_params)):
    for layer in range(len(widths)):
      leaves[f"{name}/{layer}"] = tree[f"GCNLayer_{layer}"]["kernel"]
  for layer in range(2):
    for kind in ("kernel", "bias"):
      leaves[f"predictor/{layer}/{kind}"] = start.params.predictor[f"Dense_{layer}"][kind]
  np.savez(folder / "params.npz", **{name: np.asarray(leaf) for name, leaf in leaves.items()})
  count = 0

  def check():
    nonlocal start
    start, metrics = plain(start, graph, jax.random.key(0))
    return float(metrics["loss"])

  def train():
    nonlocal state, count
    count += 1
    state, metrics = step(state, graph, jax.random.key(count))
    return float(metrics["loss"])

  return {"check": check, "train": train}


def make_torch_side(folder: pathlib.Path, widths: tuple[int, ...], layout: str):
  """Returns the commands of a torch side; `layout` is "edges" or "csr"."""
  import copy
  import warnings

  import torch
  import torch_geometric.nn as pyg_nn
  import torch_geometric.utils as pyg_utils

  warnings.filterwarnings("ignore", "Sparse ")  # CSR is in beta
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  torch.manual_seed(0)
  saved = np.load(folder / "params.npz")
  features = torch.from_numpy(make_features())
  senders, receivers = make_graph()
  order = np.lexsort((senders, receivers))
  edges = torch.from_numpy(np.stack([senders[order], receivers[order]]))
  # The graph has both directions, so the transposed CSR is the same one with its values permuted.
  back = torch.from_numpy(np.lexsort((receivers[order], senders[order])))
  counts = np.bincount(receivers, minlength=NODES)
  starts = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))

  class Product(torch.autograd.Function):
    """The CSR matrix of the edges with these values, times x."""

    @staticmethod
    def forward(context, values, x):
      context.save_for_backward(values)
      return torch.sparse_csr_tensor(starts, edges[0], values, (NODES, NODES)) @ x

    @staticmethod
    def backward(context, gradient):
      (values,) = context.saved_tensors
      moved = torch.sparse_csr_tensor(starts, edges[0], values[back], (NODES, NODES))
      return None, moved @ gradient

  class Layer(torch.nn.Module):
    def __init__(self, width_in, width):
      super().__init__()
      self.conv = pyg_nn.GCNConv(width_in, width) if layout == "edges" else None
      if layout == "csr":
        self.weight = torch.nn.Parameter(torch.zeros(width_in, width))
        self.bias = torch.nn.Parameter(torch.zeros(width))
      self.norm = torch.nn.BatchNorm1d(width, momentum=0.99)
      self.activation = torch.nn.PReLU()

    def forward(self, x, graph):
      if layout == "edges":
        out = self.conv(x, graph)
      else:
        scale, mask = graph
        sent = scale * (x @ self.weight)
        out = scale * (Product.apply(mask, sent) + sent) + self.bias
      return self.activation(self.norm(out))

    def load(self, kernel):
      with torch.no_grad():
        if layout == "edges":
          self.conv.lin.weight.copy_(torch.from_numpy(kernel.T))
        else:
          self.weight.copy_(torch.from_numpy(kernel))

  class Encoder(torch.nn.Module):
    def __init__(self):
      super().__init__()
      sizes = (FEATURES, *widths)
      self.layers = torch.nn.ModuleList(Layer(*pair) for pair in itertools.pairwise(sizes))

    def forward(self, x, graph):
      for layer in self.layers:
        x = layer(x, graph)
      return x

  def make_encoder(name):
    encoder = Encoder()
    for index, layer in enumerate(encoder.layers):
      layer.load(saved[f"{name}/{index}"])
    return encoder

  online, target = make_encoder("online"), make_encoder("target").requires_grad_(False)
  predictor = torch.nn.Sequential(
    torch.nn.Linear(widths[-1], PREDICTOR), torch.nn.PReLU(), torch.nn.Linear(PREDICTOR, widths[-1])
  )
  with torch.no_grad():
    for layer, index in ((predictor[0], 0), (predictor[2], 1)):
      layer.weight.copy_(torch.from_numpy(saved[f"predictor/{index}/kernel"].T))
      layer.bias.copy_(torch.from_numpy(saved[f"predictor/{index}/bias"]))

  def view(feature_mask, edge_drop):
    x = features * (torch.rand(FEATURES) >= feature_mask)
    if layout == "edges":
      return x, pyg_utils.dropout_edge(edges, p=edge_drop)[0] if edge_drop else edges
    mask = (torch.rand(edges.shape[1]) >= edge_drop).float()
    degrees = torch.zeros(NODES).index_add_(0, edges[1], mask)
    return x, (torch.rsqrt(1 + degrees)[:, None], mask)

  class Learner:
    def __init__(self, modules, corrupt):
      self.online, self.target, self.predictor = modules
      parameters = [*self.online.parameters(), *self.predictor.parameters()]
      self.optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
      self.corrupt = corrupt

    def step(self):
      probs = zip(FEATURE_MASK, EDGE_DROP, strict=True) if self.corrupt else [(0.0, 0.0)] * 2
      views = [view(*pair) for pair in probs]
      predictions = [self.predictor(self.online(*one)) for one in views]
      with torch.no_grad():
        targets = [self.target(*one) for one in views]
      cosine = torch.nn.functional.cosine_similarity
      pairs = zip(predictions, targets[::-1], strict=True)
      loss = 2 - sum(cosine(*pair).mean() for pair in pairs)
      self.optimizer.zero_grad(set_to_none=True)
      loss.backward()
      self.optimizer.step()
      with torch.no_grad():
        for slow, fast in zip(self.target.parameters(), self.online.parameters(), strict=True):
          slow.lerp_(fast, 1 - DECAY)
      return float(loss.detach())

  modules = (online, target, predictor)
  plain, real = Learner(copy.deepcopy(modules), False), Learner(modules, True)
  return {"check": plain.step, "train": real.step}


def compare(torch_python: str, widths: tuple[int, ...], rounds: int) -> None:
  """Prints the seconds and the memory of each side, and its seconds as a multiple of ours."""
  pythons = {"jax": sys.executable, "edges": torch_python, "csr": torch_python}
  with tempfile.TemporaryDirectory() as folder:
    workers = {
      name: sides.Side(
        __file__, python, "--worker", name, "--folder", folder, "--widths", *map(str, widths)
      )
      for name, python in pythons.items()
    }
    for _ in range(2):
      results = {name: side.ask("check")["result"] for name, side in workers.items()}
      if np.ptp(list(results.values())) > 1e-4:
        raise SystemExit(f"the sides compute different losses: {results}")
    for side in workers.values():
      side.ask("train")  # warms up
    seconds = {name: [] for name in workers}
    for _ in range(rounds):
      for name, side in workers.items():
        side.ask("train")  # fills caches and memory after the steps of the other sides
        answer = side.ask("train")
        seconds[name].append((answer["seconds"], answer["cpu"]))
    memory = {name: side.ask("memory")["result"] for name, side in workers.items()}
    for side in workers.values():
      side.close()
  print(f"widths {widths}; losses without corruption agree: {results}")
  print(f"{'':8}{'seconds (least, CPU)':>28}{'peak MiB':>10}{'beside ours':>14}")
  medians = {name: statistics.median(wall for wall, _ in times) for name, times in seconds.items()}
  for name, times in seconds.items():
    wall, cpu = zip(*times, strict=True)
    cell = f"{medians[name]:.3f} ({min(wall):.3f}, {statistics.median(cpu):.3f})"
    ratio = f"{medians[name] / medians['jax']:.2f}x"
    print(f"{name:8}{cell:>28}{memory[name]:10.0f}{ratio:>14}")


def scale() -> None:
  """Prints the CPU time of growing graphs, with and without a hub; there are 20 edges for a node.

  It times the sum over neighbours of 32 features, forward and backward, and a step of BGRL. CPU
  time is that of all threads, and the least of five, so other work on the machine matters little.
  """
  import jax
  import jax.numpy as jnp

  from representation import graphs, message_passing

  def seconds(function, *args):
    compiled = jax.jit(function).lower(*args).compile()
    times = []
    for _ in range(6):
      start = time.process_time()
      jax.block_until_ready(compiled(*args))
      times.append(time.process_time() - start)
    return min(times[1:])

  def squares(values, neighbours, weights):
    return jnp.sum(message_passing.neighbour_sum(values, neighbours, weights) ** 2)

  rows: dict[bool, list[tuple[float, ...]]] = {False: [], True: []}
  for pairs, hub in itertools.product((5_000, 50_000, 500_000, 5_000_000), rows):
    nodes = pairs // 10
    senders, receivers = make_graph(nodes, pairs, hub=hub)
    features = np.random.default_rng(0).normal(size=(nodes, 32)).astype(np.float32)
    graph = graphs.make_graph(features, senders, receivers)
    summed = seconds(
      jax.value_and_grad(squares), graph.features, graph.neighbours, graphs.edge_weights(graph)
    )
    step, state = make_ours(graph, (32, 32), corrupt=True, predictor_width=32)
    stepped = seconds(step, state, graph, jax.random.key(0))
    rows[hub].append((2 * pairs, summed, stepped))
    print(
      f"{2 * pairs:>9} edges{', hub' if hub else '':5} of {np.bincount(receivers).max():>6} at most"
      f"  sum {1e3 * summed:9.2f} ms ({1e9 * summed / 2 / pairs:5.1f} ns an edge)"
      f"  step {1e3 * stepped:10.2f} ms ({1e9 * stepped / 2 / pairs:6.1f} ns an edge)",
      flush=True,
    )
  for hub, found in rows.items():
    logs = np.log(found[1:])  # without the smallest graph, which is mostly overhead
    slopes = [np.polyfit(logs[:, 0], logs[:, k], 1)[0] for k in (1, 2)]
    name = "with a hub" if hub else "without"
    print(f"{name}: slopes from {found[1][0]} edges on: sum {slopes[0]:.2f}, step {slopes[1]:.2f}")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--torch-python", default=sys.executable, help="interpreter with torch")
  parser.add_argument("--widths", type=int, nargs="+", default=[256, 128])
  parser.add_argument("--rounds", type=int, default=9)
  parser.add_argument("--scaling", action="store_true", help="time ours only, on growing graphs")
  parser.add_argument("--worker", choices=("jax", "edges", "csr"), help=argparse.SUPPRESS)
  parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
  args = parser.parse_args()
  widths = tuple(args.widths)
  if args.worker == "jax":
    sides.serve(lambda: make_jax_side(args.folder, widths))
  elif args.worker:
    sides.serve(lambda: make_torch_side(args.folder, widths, args.worker))
  elif args.scaling:
    scale()
  else:
    compare(args.torch_python, widths, args.rounds)


if __name__ == "__main__":
  main()
