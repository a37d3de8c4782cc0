"""BGRL: its loss by hand, its moving target, and the views that it learns from.

Tolerances of 1e-8 and below allow for rounding in float64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from representation import bgrl, graph_augmentations, graphs
from representation.networks import adapters, gcn, mlp

NUM_NODES, NUM_FEATURES, WIDTH = 12, 6, 4


def _graph(seed=0):
  rng = np.random.default_rng(seed)
  edges = np.array([(s, r) for s in range(NUM_NODES) for r in range(s) if rng.random() < 0.3])
  senders, receivers = np.concatenate([edges, edges[:, ::-1]]).T
  return graphs.make_graph(rng.normal(size=(NUM_NODES, NUM_FEATURES)), senders, receivers)


def _identity(params, embeddings):
  del params
  return embeddings


def _wide(tree):
  """Returns the tree in the default float dtype: Flax initialises in float32, also with x64."""
  return jax.tree.map(lambda leaf: leaf.astype(jnp.result_type(float)), tree)


def _start(graph, *, predictor=None, **options):
  encoder = adapters.Encoder(gcn.GCN((8, WIDTH)))
  predictor = predictor or adapters.Predictor(mlp.MLP(8, WIDTH))
  keys = jax.random.split(jax.random.key(0), 3)
  online, online_state = _wide(encoder.init(keys[0], graph))
  target, target_state = _wide(encoder.init(keys[1], graph))
  is_mlp = isinstance(predictor, adapters.Predictor)
  parts = _wide(predictor.init(keys[2], jnp.zeros((1, WIDTH)))) if is_mlp else ()
  optimizer = optax.adamw(1e-2, weight_decay=1e-5)
  config = bgrl.Config(**options)
  state = bgrl.init(
    bgrl.Params(online, parts),
    optimizer=optimizer,
    config=config,
    target_params=target,
    network_state=bgrl.NetworkState(online_state, target_state),
  )
  return state, {
    "apply_fn": bgrl.Networks(encoder, predictor), "optimizer": optimizer, "config": config
  }  # fmt: skip


def test_loss_by_hand_and_against_numpy(x64):
  rng = np.random.default_rng(0)
  predictions, targets = rng.normal(size=(2, 7, 5))
  expected = 1 - np.sum(predictions * targets, 1) / (
    np.linalg.norm(predictions, axis=1) * np.linalg.norm(targets, axis=1)
  )
  found = bgrl.bgrl_loss(jnp.asarray(predictions), jnp.asarray(targets))
  np.testing.assert_allclose(found, expected, atol=1e-12)
  # The loss does not depend on the norms.
  scales = rng.uniform(0.1, 9, (7, 1))
  np.testing.assert_allclose(
    bgrl.bgrl_loss(predictions * scales, targets / scales), found, atol=1e-12
  )
  to_targets = jax.grad(lambda t: bgrl.bgrl_loss(predictions, t).sum())(jnp.asarray(targets))
  np.testing.assert_array_equal(to_targets, 0)
  # At a row of zeros the cosine counts as 0, and nothing is NaN.
  value, gradient = jax.value_and_grad(lambda p: bgrl.bgrl_loss(p, targets[:1]).sum())(
    jnp.zeros((1, 5))
  )
  assert value == 1 and np.all(np.isfinite(gradient))
  with pytest.raises(ValueError, match="shapes must be equal"):
    bgrl.bgrl_loss(predictions, targets[:3])


@pytest.mark.parametrize("length", [0.0, 1e-20, 1e-14, 1e-11])
def test_short_rows_have_finite_gradients(length):
  row = jnp.array([[length, 2 * length]])
  gradient = jax.grad(lambda row: bgrl.bgrl_loss(row, jnp.ones((1, 2))).sum())(row)
  assert jnp.isfinite(gradient).all()


def test_loss_is_zero_if_both_networks_and_both_views_are_equal(x64):
  graph = _graph()
  state, bound = _start(
    graph, predictor=_identity, feature_mask_probs=(0.0, 0.0), edge_drop_probs=(0.0, 0.0)
  )
  state = state._replace(target_params=state.params.encoder)
  del bound["optimizer"]
  value, (metrics, _) = bgrl.loss(state.params, state, graph, jax.random.key(0), **bound)
  np.testing.assert_allclose(value, 0, atol=1e-12)
  assert metrics["loss"] == value


def test_loss_is_the_mean_of_both_directions(x64):
  """Draws the same views and calls the networks one by one."""
  graph, key = _graph(), jax.random.key(4)
  state, bound = _start(graph, feature_mask_probs=(0.2, 0.5), edge_drop_probs=(0.6, 0.1))
  networks = bound["apply_fn"]
  views = [
    graph_augmentations.corrupt(graph, k, feature_mask_prob=p_f, edge_drop_prob=p_e)
    for k, p_f, p_e in zip(jax.random.split(key), (0.2, 0.5), (0.6, 0.1), strict=True)
  ]

  def cosines(first, second):
    online, _ = networks.encoder(
      state.params.encoder, state.network_state.online, first, train=True
    )
    target, _ = networks.encoder(
      state.target_params, state.network_state.target, second, train=True
    )
    rows = np.asarray(networks.predictor(state.params.predictor, online)), np.asarray(target)
    return np.sum(rows[0] * rows[1], 1) / np.prod([np.linalg.norm(r, axis=1) for r in rows], axis=0)

  expected = 2 - cosines(*views).mean() - cosines(*views[::-1]).mean()
  value, (_, network_state) = bgrl.loss(
    state.params, state, graph, key, apply_fn=networks, config=bound["config"]
  )
  np.testing.assert_allclose(value, expected, atol=1e-10)
  # The network state passes through the first view and then through the second.
  _, after = networks.encoder(
    state.params.encoder, state.network_state.online, views[0], train=True
  )
  _, after = networks.encoder(state.params.encoder, after, views[1], train=True)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), network_state.online, after
  )


@pytest.mark.slow
def test_padding_changes_nothing(x64):
  """Views without masking: random masks are drawn for each slot, so they depend on the padding."""
  graph = _graph()
  mask = np.asarray(graph.neighbours.mask)
  owners = np.repeat(np.asarray(graph.neighbours.receivers)[:, None], mask.shape[1], 1)
  padded = graphs.make_graph(
    np.asarray(graph.features), np.asarray(graph.neighbours.senders)[mask], owners[mask], multiple=8
  )
  assert len(padded.mask) == 16
  options = {"feature_mask_probs": (0.0, 0.0), "edge_drop_probs": (0.0, 0.0)}
  state, bound = _start(graph, **options)
  one = bgrl.update(state, graph, jax.random.key(0), **bound)
  other = bgrl.update(state, padded, jax.random.key(0), **bound)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-8), other, one)


def test_the_target_follows_after_the_step(x64):
  graph = _graph()
  state, bound = _start(graph, target_decay=0.9, num_steps=10)
  state = state._replace(step=jnp.asarray(5, jnp.int32))
  after, metrics = bgrl.update(state, graph, jax.random.key(0), **bound)
  # Step 5 of 10: 1 - 0.1 (1 + cos(pi / 2)) / 2.
  np.testing.assert_allclose(metrics["bgrl/target_decay"], 0.95)
  trees = (after.target_params, state.target_params, after.params.encoder)
  for new, old, online in zip(*map(jax.tree.leaves, trees), strict=True):
    # 1e-7: the decay is a float32 scalar.
    np.testing.assert_allclose(new, 0.95 * old + 0.05 * online, atol=1e-7)


@pytest.mark.slow
def test_narrow_parameters_stay_narrow_and_their_average_wide():
  graph = _graph()
  state, bound = _start(graph)
  narrow = functools.partial(jax.tree.map, lambda leaf: leaf.astype(jnp.bfloat16))
  state = bgrl.init(
    narrow(state.params),
    optimizer=bound["optimizer"],
    config=bound["config"],
    target_params=narrow(state.target_params),
    network_state=state.network_state,
  )
  update = functools.partial(bgrl.update, **bound)
  after, _ = jax.eval_shape(update, state, graph, jax.random.key(0))
  assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {jnp.dtype("bfloat16")}
  assert {leaf.dtype for leaf in jax.tree.leaves(after.target_params)} == {jnp.dtype("float32")}


def test_views_drop_columns_and_edges_as_often_as_they_should():
  graph, draws = _graph(), 2000
  num_edges = graph.neighbours.num_edges

  def view(key):
    seen = graph_augmentations.corrupt(graph, key, feature_mask_prob=0.3, edge_drop_prob=0.6)
    return seen.column_mask, graphs.edge_weights(seen)

  columns, edges = jax.vmap(view)(jax.random.split(jax.random.key(0), draws))
  # Four standard errors of a mean of independent draws.
  assert abs(columns.mean() - 0.7) < 4 * (0.21 / (draws * NUM_FEATURES)) ** 0.5
  assert abs(edges.sum() / (draws * num_edges) - 0.4) < 4 * (0.24 / (draws * num_edges)) ** 0.5
  assert np.all(np.asarray(edges)[:, ~np.asarray(graph.neighbours.mask)] == 0)
  # Both directions of an undirected edge survive independently: 0.16 of the time together.
  mask = np.asarray(graph.neighbours.mask)
  owners = np.repeat(np.asarray(graph.neighbours.receivers)[:, None], mask.shape[1], 1)[mask]
  pairs = list(
    zip(np.asarray(graph.neighbours.senders)[mask].tolist(), owners.tolist(), strict=True)
  )
  kept = np.asarray(edges)[:, mask] > 0
  there, back = 0, pairs.index(pairs[0][::-1])
  both = np.mean(kept[:, there] & kept[:, back])
  assert abs(both - 0.16) < 4 * (0.16 * 0.84 / draws) ** 0.5
  # What the first view dropped stays dropped in a view of it.
  once = graph_augmentations.drop_edges(graph, jax.random.key(1), prob=0.5)
  twice = graph_augmentations.drop_edges(once, jax.random.key(2), prob=0.5)
  assert np.all(graphs.edge_weights(twice) <= graphs.edge_weights(once))


@pytest.mark.slow
def test_training_lowers_the_loss_and_does_not_collapse():
  graph = _graph()
  state, bound = _start(graph, num_steps=300)

  def step(state, key):
    return bgrl.update(state, graph, key, **bound)

  _, metrics = jax.jit(lambda s: jax.lax.scan(step, s, jax.random.split(jax.random.key(1), 300)))(
    state
  )
  loss = np.asarray(metrics["loss"])
  # The loss falls to between 0.33 and 0.47 of its start on four random graphs.
  assert loss[-50:].mean() < 0.6 * loss[:5].mean()
  # It is 1 after a collapse, and below 0.05 on those graphs.
  assert np.asarray(metrics["collapse/mean_cosine"])[-50:].mean() < 0.3


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"feature_mask_probs": (0.2,)}, "feature_mask_probs must have one number for each"),
    ({"feature_mask_probs": 0.2}, "feature_mask_probs must have one number for each .* got 0.2"),
    ({"edge_drop_probs": np.array([0.2, 1.5])}, r"edge_drop_probs must lie in \[0, 1\], got 1.5"),
    ({"edge_drop_probs": (0.2, 1.5)}, r"edge_drop_probs must lie in \[0, 1\], got 1.5"),
    ({"target_decay": -0.1}, "target_decay must lie in"),
    ({"num_steps": 0}, "num_steps must be an integer >= 1, got 0"),
    ({"num_microbatches": 2}, "num_microbatches must be 1, got 2"),
  ],
)
def test_bad_hyperparameters_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    bgrl.Config(**options)
