"""Graph encoders equal dense formulas in NumPy, whatever the order of the nodes and the padding.

Tolerances of 1e-9 and below allow for rounding in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from representation import graph_augmentations, graphs
from representation.networks import adapters, gcn

NUM_NODES, NUM_FEATURES = 9, 5


def _data(seed=0, num_nodes=NUM_NODES):
  rng = np.random.default_rng(seed)
  adjacency = (rng.random((num_nodes, num_nodes)) < 0.3) & ~np.eye(num_nodes, dtype=bool)
  features = rng.normal(size=(num_nodes, NUM_FEATURES)) * (
    rng.random((num_nodes, NUM_FEATURES)) < 0.5
  )
  receivers, senders = np.nonzero(adjacency)  # adjacency[r, s]: s sends to r
  return features, senders, receivers, adjacency.astype(float)


def _randomised(params, seed=5):
  leaves, treedef = jax.tree.flatten(params)
  rng = np.random.default_rng(seed)
  return jax.tree.unflatten(treedef, [jnp.asarray(rng.normal(size=x.shape)) for x in leaves])


MODULES = {
  "gcn": gcn.GCN((6, 4)),
  "gcn_graph": gcn.GCN((6, 4, 4), norm="graph", standardise=True),
  "mean_pooling": gcn.MeanPooling(4),
  "gat": gcn.GAT((2, 3), 4),
}


def _dense_view(graph):
  """Returns the adjacency matrix `[N, N]` of the edges in use."""
  used = np.asarray(graphs.edge_weights(graph)) > 0
  neighbours, size = graph.neighbours, len(graph.mask)
  adjacency = np.zeros((size, size))
  owners = np.repeat(np.asarray(neighbours.receivers)[:, None], used.shape[1], 1)
  np.add.at(adjacency, (owners[used], np.asarray(neighbours.senders)[used]), 1)
  return adjacency


def test_gcn_layer_equals_the_dense_formula(x64):
  features, senders, receivers, adjacency = _data()
  graph = graphs.make_graph(features, senders, receivers)
  layer = gcn.GCNLayer(4)
  params = _randomised(layer.init(jax.random.key(0), graph))
  for view in (
    graph,
    graph_augmentations.corrupt(
      graph, jax.random.key(1), feature_mask_prob=0.4, edge_drop_prob=0.5
    ),
  ):
    used = _dense_view(view)
    assert np.all(used <= adjacency) and (view is graph or used.sum() < adjacency.sum())
    loops = used + np.eye(NUM_NODES)
    scale = 1 / np.sqrt(loops.sum(1))
    columns = np.ones(NUM_FEATURES) if view.column_mask is None else np.asarray(view.column_mask)
    kernel, bias = np.asarray(params["params"]["kernel"]), np.asarray(params["params"]["bias"])
    expected = (
      scale[:, None] * loops * scale @ (np.asarray(graph.features) * columns) @ kernel + bias
    )
    np.testing.assert_allclose(layer.apply(params, view), expected, atol=1e-12)


# Those that take longest to compile are slow tests.
@pytest.mark.parametrize(
  "name",
  [
    pytest.param(n, marks=() if n in ("gcn", "mean_pooling") else pytest.mark.slow) for n in MODULES
  ],
)
def test_embeddings_follow_the_order_of_nodes_and_ignore_padding(x64, name):
  features, senders, receivers, _ = _data()
  module = MODULES[name]
  graph = graphs.make_graph(features, senders, receivers)
  variables = _randomised(module.init(jax.random.key(0), graph, train=False))
  apply = jax.jit(lambda g: module.apply(variables, g, train=True, mutable=["batch_stats"])[0])
  embeddings = apply(graph)
  order = np.random.default_rng(2).permutation(NUM_NODES)
  place = np.argsort(order)
  permuted = apply(graphs.make_graph(features[order], place[senders], place[receivers]))
  np.testing.assert_allclose(permuted, embeddings[order], atol=1e-10)
  padded = graphs.make_graph(features, senders, receivers, multiple=8)
  assert padded.features.shape == (16, NUM_FEATURES) and padded.mask.sum() == NUM_NODES
  np.testing.assert_allclose(apply(padded)[:NUM_NODES], embeddings, atol=1e-10)


@pytest.mark.parametrize(
  "name", ["mean_pooling", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gcn_graph", "gat"))]
)
def test_graphs_side_by_side_do_not_interact(x64, name):
  first, second = _data(), _data(1, 6)
  module = MODULES[name]
  together = graphs.make_graph(
    np.concatenate([first[0], second[0]]),
    np.concatenate([first[1], second[1] + NUM_NODES]),
    np.concatenate([first[2], second[2] + NUM_NODES]),
    graph_ids=[0] * NUM_NODES + [1] * 6,
  )
  variables = _randomised(module.init(jax.random.key(0), together, train=False))
  found = module.apply(variables, together, train=True)
  parts = [
    module.apply(variables, graphs.make_graph(*data[:3]), train=True) for data in (first, second)
  ]
  np.testing.assert_allclose(found, np.concatenate(parts), atol=1e-10)


@pytest.mark.slow
def test_sparse_features_equal_dense_ones(x64):
  features, senders, receivers, _ = _data()
  module = MODULES["gcn"]
  dense = graphs.make_graph(features, senders, receivers)
  sparse = graphs.make_graph(scipy.sparse.csr_array(features), senders, receivers)
  variables = _randomised(module.init(jax.random.key(0), dense, train=False))
  view_key = jax.random.key(3)

  def value(params, graph):
    view = graph_augmentations.mask_columns(graph, view_key, prob=0.4)
    out, _ = module.apply(
      {**variables, "params": params}, view, train=True, mutable=["batch_stats"]
    )
    return jnp.sum(out**3)

  one, other = (jax.value_and_grad(value)(variables["params"], graph) for graph in (dense, sparse))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), one, other)
  with pytest.raises(ValueError, match="features must be dense"):
    graphs.masked_features(sparse)


@pytest.mark.parametrize(
  "name", ["gcn", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mean_pooling", "gat"))]
)
def test_nodes_without_neighbours_have_finite_gradients(name):
  """Dropping edges can leave a graph without any; each layer then uses the node itself."""
  graph = graphs.make_graph(_data()[0].astype(np.float32), [], [])
  module = MODULES[name]
  variables = module.init(jax.random.key(0), graph, train=False)

  def value(params):
    out = module.apply({**variables, "params": params}, graph, train=True, mutable=["batch_stats"])
    return jnp.sum(out[0] ** 2)

  gradients = jax.tree.leaves(jax.grad(value)(variables["params"]))
  assert all(np.all(np.isfinite(leaf)) for leaf in gradients)
  assert any(np.any(leaf != 0) for leaf in gradients)


def test_mean_pooling_equals_the_dense_formula(x64):
  features, senders, receivers, adjacency = _data()
  assert not adjacency.sum(1).all()  # one node has no neighbour: its mean is 0
  graph = graphs.make_graph(features, senders, receivers)
  module = MODULES["mean_pooling"]
  variables = _randomised(module.init(jax.random.key(0), graph, train=False))
  params = jax.tree.map(np.asarray, variables["params"])
  mean = adjacency / np.maximum(adjacency.sum(1, keepdims=True), 1)

  def layer(hidden, index, first):
    dense = params[f"Dense_{first}"]
    out = mean @ hidden @ dense["kernel"] + dense["bias"]
    out = out + hidden @ params[f"Dense_{first + 1}"]["kernel"]
    norm = params[f"GraphNorm_{index}"]
    out = (out - out.mean()) / (out.std() + 1e-5) * norm["scale"] + norm["bias"]
    return np.where(out > 0, out, params[f"PReLU_{index}"]["negative_slope"] * out)

  first = layer(features, 0, 0)
  second = layer(first + features @ params["Dense_2"]["kernel"], 1, 3)
  expected = layer(first + second + features @ params["Dense_5"]["kernel"], 2, 6)
  np.testing.assert_allclose(module.apply(variables, graph, train=True), expected, atol=1e-10)


def test_attention_equals_the_dense_softmax(x64):
  features, senders, receivers, adjacency = _data()
  graph = graphs.make_graph(features, senders, receivers)
  layer = gcn.GATLayer(2, 3)
  params = _randomised(layer.init(jax.random.key(0), graph, graph.features))["params"]
  sent = (features @ np.asarray(params["Dense_0"]["kernel"])).reshape(NUM_NODES, 2, 3)
  logits = (
    np.sum(sent * params["receiver"], -1)[:, None] + np.sum(sent * params["sender"], -1)[None]
  )
  logits = np.where(logits > 0, logits, 0.2 * logits)  # [receiver, sender, head]
  weights = np.exp(logits) * (adjacency + np.eye(NUM_NODES))[..., None]
  weights = weights / weights.sum(1, keepdims=True)
  expected = np.einsum("rsh,shw->rhw", weights, sent).reshape(NUM_NODES, 6) + params["bias"]
  found = layer.apply({"params": params}, graph, graph.features)
  np.testing.assert_allclose(found, expected, atol=1e-12)
  averaged = gcn.GATLayer(2, 3, average=True)
  params["bias"] = jnp.zeros(3)
  np.testing.assert_allclose(
    averaged.apply({"params": params}, graph, graph.features),
    (expected - _randomised(layer.init(jax.random.key(0), graph, graph.features))["params"]["bias"])
    .reshape(NUM_NODES, 2, 3).mean(1),
    atol=1e-12,
  )  # fmt: skip


def test_weights_are_standardised_without_a_gradient_through_it(x64):
  kernel = jnp.asarray(np.random.default_rng(0).normal(2, 3, (50, 4)))
  found = gcn.standardise_weights(kernel)
  np.testing.assert_allclose(found.mean(0), 0, atol=1e-12)
  # 1e-6: epsilon = 1e-5 beside a variance of about 9.
  np.testing.assert_allclose(found.std(0, ddof=1), 1, atol=1e-6)
  gradient = jax.grad(lambda kernel: jnp.sum(gcn.standardise_weights(kernel) ** 2))(kernel)
  np.testing.assert_allclose(gradient, 2 * found, atol=1e-12)


def test_weights_are_standardised_from_the_start():
  features, senders, receivers, _ = _data()
  graph = graphs.make_graph(features, senders, receivers)
  module = gcn.GCN((30, 5), norm="graph", standardise=True)
  params = module.init(jax.random.key(0), graph, train=False)["params"]
  kernel = params["GCNLayer_1"]["kernel"]  # drawn with variance 2 / (30 + 5)
  # 1e-6: float32. 1e-3: epsilon = 1e-5 beside that variance changes the deviation by 1e-4.
  np.testing.assert_allclose(kernel.mean(0), 0, atol=1e-6)
  np.testing.assert_allclose(kernel.std(0, ddof=1), 1, atol=1e-3)


def test_batch_norm_counts_real_nodes_and_keeps_a_hundredth(x64):
  features, senders, receivers, _ = _data()
  graph = graphs.make_graph(features, senders, receivers, multiple=8)
  encoder = adapters.Encoder(gcn.GCN((6,)))
  params, state = encoder.init(jax.random.key(0), graph)
  out, new_state = encoder(params, state, graph, train=True)
  hidden = gcn.GCNLayer(6).apply({"params": params["GCNLayer_0"]}, graph)[:NUM_NODES]
  stats = new_state["batch_stats"]["BatchNorm_0"]
  np.testing.assert_allclose(stats["mean"], 0.99 * hidden.mean(0), atol=1e-12)
  np.testing.assert_allclose(stats["var"], 0.01 + 0.99 * hidden.var(0), atol=1e-12)
  normal = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5)
  np.testing.assert_allclose(
    out[:NUM_NODES], np.where(normal > 0, normal, 0.25 * normal), atol=1e-10
  )
  _, same = encoder(params, new_state, graph, train=False)
  assert same is new_state


def test_an_unknown_norm_is_refused():
  graph = graphs.make_graph(*_data()[:3])
  with pytest.raises(ValueError, match="norm must be 'batch' or 'graph', got 'layer'"):
    gcn.GCN((2,), norm="layer").init(jax.random.key(0), graph, train=False)
