"""GRACE: its loss against a double loop, its negatives, masks and padding, and that it learns.

Tolerances of 1e-8 and below allow for rounding in float64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from representation import graph_augmentations, graphs, moving_targets
from representation.baselines import grace
from representation.networks import adapters, gcn, mlp

NUM_NODES, NUM_FEATURES, WIDTH = 12, 6, 4
FULL, SUBSAMPLED = jax.jit(grace.grace_loss), jax.jit(grace.subsampled_grace_loss)


def _graph():
  rng = np.random.default_rng(0)
  edges = np.array([(s, r) for s in range(NUM_NODES) for r in range(s) if rng.random() < 0.3])
  senders, receivers = np.concatenate([edges, edges[:, ::-1]]).T
  return rng.normal(size=(NUM_NODES, NUM_FEATURES)), senders, receivers


def _wide(tree):
  """Returns the tree in the default float dtype: Flax initialises in float32, also with x64."""
  return jax.tree.map(lambda leaf: leaf.astype(jnp.result_type(float)), tree)


def _start(graph, **options):
  encoder = adapters.Encoder(gcn.GCN((8, WIDTH)))
  projector = adapters.Predictor(mlp.MLP(8, WIDTH, jax.nn.elu))
  keys = jax.random.split(jax.random.key(0))
  params, network_state = _wide(encoder.init(keys[0], graph))
  head = _wide(projector.init(keys[1], jnp.zeros((1, WIDTH))))
  optimizer, config = optax.adamw(1e-2), grace.Config(**options)
  state = grace.init(
    grace.Params(params, head), optimizer=optimizer, config=config, network_state=network_state
  )
  return state, {
    "apply_fn": grace.Networks(encoder, projector), "optimizer": optimizer, "config": config
  }  # fmt: skip


def _slow_loss(first, second, temperature, negatives):
  """The formula of the paper (arXiv:2006.04131, eq. 1 and 2) as plain loops."""

  def cosine(a, b):
    return np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b))

  def one_direction(u, v, i):
    own = np.exp(cosine(u[i], v[i]) / temperature)
    total = own
    for j in negatives[i]:
      total += np.exp(cosine(u[i], v[j]) / temperature)
      total += np.exp(cosine(u[i], u[j]) / temperature)
    return -np.log(own / total)

  pairs = ((first, second), (second, first))
  return np.array([np.mean([one_direction(*p, i) for p in pairs]) for i in range(len(first))])


def _others(num_nodes):
  return np.array([[j for j in range(num_nodes) if j != i] for i in range(num_nodes)])


@pytest.mark.parametrize("temperature", [0.5, 0.05])
def test_losses_against_a_double_loop(x64, temperature):
  rng = np.random.default_rng(0)
  first, second = rng.normal(size=(2, 9, 5))
  expected = _slow_loss(first, second, temperature, _others(9))
  found = FULL(first, second, temperature=temperature)
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  np.testing.assert_allclose(
    FULL(3 * first, second / 7, temperature=temperature), found, rtol=1e-12
  )
  negatives = rng.integers(0, 8, (9, 4))
  negatives += negatives >= np.arange(9)[:, None]  # anything but the node itself
  np.testing.assert_allclose(
    SUBSAMPLED(first, second, negatives, temperature=temperature),
    _slow_loss(first, second, temperature, negatives),
    rtol=1e-12,
  )


def test_all_negatives_are_the_full_loss_and_fewer_are_less(x64):
  first, second = np.random.default_rng(1).normal(size=(2, 9, 5))
  mask, key = jnp.ones(9, bool), jax.random.key(0)
  full = FULL(first, second, temperature=0.5)
  for k in (8, 20):  # where there are not enough others, all are taken, each once
    negatives = grace.sample_negatives(key, mask, num_negatives=k)
    found = SUBSAMPLED(first, second, negatives, temperature=0.5)
    np.testing.assert_allclose(found, full, rtol=1e-12)
  fewer = grace.sample_negatives(key, mask, num_negatives=3)
  assert np.all(SUBSAMPLED(first, second, fewer, temperature=0.5) < full)


def test_negatives_are_a_uniform_draw_of_others_in_use():
  mask = jnp.arange(9) != 4
  draw = jax.jit(lambda key: grace.sample_negatives(key, mask, num_negatives=3))
  draws = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(0), 4000)))
  for node in np.flatnonzero(mask):
    drawn = np.sort(draws[:, node])
    assert np.all(np.diff(drawn, axis=1) > 0) and not np.any(np.isin(drawn, (node, 4)))
    # All 35 sets of 3 of the 7 other nodes are equally likely. A chi-squared variable with 34
    # degrees of freedom exceeds 80 with probability 1.5e-5.
    counts = np.unique(drawn, axis=0, return_counts=True)[1]
    assert len(counts) == 35 and np.sum((counts - 4000 / 35) ** 2) / (4000 / 35) < 80


def test_gradients(x64):
  rng = np.random.default_rng(2)
  first, second = rng.normal(size=(2, 5, 3))
  negatives = rng.integers(0, 5, (5, 2))
  for function in (FULL, functools.partial(SUBSAMPLED, negatives=negatives)):

    def value(u, v, num_used, function=function):
      mask = jnp.arange(5) < num_used
      return function(u, second_embeddings=v, temperature=0.4, mask=mask).sum()

    check_grads(lambda u, v: value(u, v, 4), (first, second), order=1, modes=["rev"])
    # Gradients are finite for rows of zeros, and if only one node is in use.
    for num_used in (4, 1):
      assert np.all(np.isfinite(jax.jit(jax.grad(value))(jnp.zeros((5, 3)), second, num_used)))


def test_nodes_not_in_use_change_nothing(x64):
  first, second = np.random.default_rng(3).normal(size=(2, 6, 4))
  mask = jnp.array([True, False, True, True, False, True])
  negatives = np.array([[1, 2, 0], [0, 2, 3], [0, 3, 4], [5, 5, 2], [0, 1, 2], [0, 2, 3]])
  rows = np.flatnonzero(mask)
  full = FULL(first, second, temperature=0.5, mask=mask)
  np.testing.assert_allclose(
    full[rows], FULL(first[rows], second[rows], temperature=0.5), rtol=1e-12
  )
  some = SUBSAMPLED(first, second, negatives, temperature=0.5, mask=mask)
  kept = {
    0: [2],
    2: [0, 3],
    3: [5, 5, 2],
    5: [0, 2, 3],
  }  # others in use
  expected = _slow_loss(first, second, 0.5, [kept.get(i, []) for i in range(6)])
  np.testing.assert_allclose(some[rows], expected[rows], rtol=1e-12)
  np.testing.assert_array_equal([full[1], full[4], some[1], some[4]], 0)


@pytest.mark.slow
def test_padding_changes_nothing(x64):
  """Views without masking: random masks are drawn for each slot, so they depend on the padding."""
  graph, padded = (graphs.make_graph(*_graph(), multiple=multiple) for multiple in (1, 8))
  assert len(padded.mask) == 16
  state, bound = _start(graph, feature_mask_probs=(0.0, 0.0), edge_drop_probs=(0.0, 0.0))
  one = grace.update(state, graph, jax.random.key(0), **bound)
  other = grace.update(state, padded, jax.random.key(0), **bound)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-8), other, one)


@pytest.mark.slow
@pytest.mark.parametrize("num_negatives", [0, 3])
def test_training_lowers_the_loss_and_finds_nodes_in_the_other_view(num_negatives):
  graph = graphs.make_graph(*_graph())
  start, bound = _start(graph, num_negatives=num_negatives)
  networks, config = bound["apply_fn"], bound["config"]

  @jax.jit
  @functools.partial(jax.vmap, in_axes=(None, 0))
  def share_found(state, key):
    """The share of nodes that are nearest to themselves in the other view."""
    views = graph_augmentations.two_views(
      graph,
      key,
      feature_mask_probs=config.feature_mask_probs,
      edge_drop_probs=config.edge_drop_probs,
    )
    rows = []
    for view in views:
      hidden, _ = networks.encoder(state.params.encoder, state.network_state, view, train=True)
      rows.append(moving_targets.normalise(networks.projector(state.params.projector, hidden)))
    return jnp.mean(jnp.argmax(rows[0] @ rows[1].T, axis=1) == jnp.arange(NUM_NODES))

  def step(state, key):
    return grace.update(state, graph, key, **bound)

  end, metrics = jax.jit(lambda s: jax.lax.scan(step, s, jax.random.split(jax.random.key(1), 200)))(
    start
  )
  loss = np.asarray(metrics["loss"])
  # The loss falls to between 0.74 and 0.86 of its start over three keys and both losses.
  assert loss[-50:].mean() < 0.9 * loss[:5].mean()
  # The share is 0.16 before training, and 0.23 to 0.31 after it; the standard error is 0.02.
  before, after = (
    share_found(state, jax.random.split(jax.random.key(9), 50)).mean() for state in (start, end)
  )
  assert after > 1.2 * before
  found = grace.embed(end, graph, apply_fn=networks)
  assert found.shape == (NUM_NODES, WIDTH) and np.all(np.isfinite(found))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"feature_mask_probs": (0.2,)}, "feature_mask_probs must have one number for each"),
    ({"edge_drop_probs": (0.2, 1.5)}, r"edge_drop_probs must lie in \[0, 1\], got 1.5"),
    ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
    ({"temperature": "warm"}, "temperature must be a number, got the string 'warm'"),
    ({"num_negatives": -1}, "num_negatives must be an integer >= 0, got -1"),
    ({"num_microbatches": 2}, "num_microbatches must be 1, got 2"),
  ],
)
def test_bad_hyperparameters_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    grace.Config(**options)


def test_bad_arrays_are_refused():
  rows = jnp.ones((4, 3))
  with pytest.raises(ValueError, match="first_embeddings must have shape"):
    grace.grace_loss(rows[0], rows[0], temperature=0.5)
  with pytest.raises(ValueError, match=r"second_embeddings \[3, 3\]"):
    grace.grace_loss(rows, rows[:3], temperature=0.5)
  with pytest.raises(ValueError, match="temperature must be positive"):
    grace.grace_loss(rows, rows, temperature=-1.0)
  with pytest.raises(ValueError, match=r"mask must have shape \[4\].* got bool \[1\]"):
    grace.subsampled_grace_loss(
      rows, rows, np.zeros((4, 1), int), temperature=0.5, mask=jnp.ones(1, bool)
    )
  for negatives, message in (
    (np.zeros((3, 2), int), r"negatives must have shape \[N, k\], N = 4"),
    (np.full((4, 2), 4), r"negatives must lie in \[0, 4\), got 4 to 4"),
    (np.zeros(4, int), "negatives must have 2 axes"),
  ):
    with pytest.raises(ValueError, match=message):
      grace.subsampled_grace_loss(rows, rows, negatives, temperature=0.5)
