"""Samples of a graph: true edges, constant shapes, unbiased sums."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import sparse

import sharding
from representation import bgrl, graphs, message_passing, neighbour_sampling
from representation.networks import adapters, gcn, mlp

NUM_NODES = 60


def _data(seed=0):
  """A directed graph with a hub, an isolated node, and nodes that only send."""
  rng = np.random.default_rng(seed)
  senders, receivers = np.nonzero(rng.random((NUM_NODES, NUM_NODES)) < 0.05)
  hub = np.arange(1, 40)
  senders, receivers = np.concatenate([senders, hub]), np.concatenate([receivers, 0 * hub])
  kept = (senders != receivers) & (senders != 59) & (receivers != 59) & (receivers != 58)
  codes = np.unique(receivers[kept] * NUM_NODES + senders[kept])
  features = rng.normal(size=(NUM_NODES, 5)).astype(np.float32)
  return features, codes % NUM_NODES, codes // NUM_NODES


def _sampler(fan_outs=(4, 3), batch_size=8, num_blocks=2, data=None):
  return neighbour_sampling.Sampler(
    *(data or _data()), fan_outs=fan_outs, batch_size=batch_size, num_blocks=num_blocks
  )


def _number(sampler, data, sample):
  """Returns the node of the graph in each place of a sample, by its features; -1 for padding."""
  same = (sample.features[:, None] == data[0][None]).all(-1)
  return np.where(same.any(1), same.argmax(1), -1)


def test_a_sample_is_part_of_the_graph():
  data, sampler = _data(), _sampler()
  edges = set(zip(data[1].tolist(), data[2].tolist(), strict=True))
  degrees = np.bincount(data[2], minlength=NUM_NODES)
  shapes, num_nodes = set(), sampler.num_nodes
  for seed in range(20):
    rng = np.random.default_rng(seed)
    centre = rng.permutation(NUM_NODES)[:8]
    sample = sampler(centre, rng)
    shapes.add(str(jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), sample)))
    rows, nodes = sample.neighbours.rows, _number(sampler, data, sample)
    owners = np.repeat(rows.receivers[:, None], rows.senders.shape[1], 1)
    pairs = np.stack([rows.senders[rows.mask], owners[rows.mask]])
    # No edge joins two blocks, no edge occurs twice, and all are edges of the graph.
    np.testing.assert_array_equal(*(pairs // num_nodes))
    assert len(np.unique(pairs, axis=1).T) == rows.mask.sum()
    assert set(zip(*nodes[pairs].tolist(), strict=True)) <= edges
    # The transposed rows hold the same edges.
    back = sample.neighbours.transposed
    back_owners = np.repeat(back.receivers[:, None], back.senders.shape[1], 1)
    np.testing.assert_array_equal(
      np.sort(pairs[0] * 1000 + pairs[1]),
      np.sort((back_owners * 1000 + back.senders)[back.mask]),
    )
    np.testing.assert_array_equal(
      (rows.senders * 1000 + owners).ravel()[back.edges[back.mask]],
      (back_owners * 1000 + back.senders)[back.mask],
    )
    for block in range(2):
      part = slice(block * num_nodes, (block + 1) * num_nodes)
      np.testing.assert_array_equal(
        np.sort(nodes[part][sample.central[part]]), np.sort(centre[4 * block : 4 * block + 4])
      )
      known = nodes[part][nodes[part] >= 0]
      assert len(np.unique(known)) == len(known)
    # Degrees are those of the whole graph.
    weights = jnp.asarray(graphs.edge_weights(sample))
    found = graphs.in_degrees(jax.tree.map(jnp.asarray, sample), weights)
    np.testing.assert_allclose(found, np.where(nodes >= 0, degrees[nodes], 0), rtol=1e-6)
    drawn = np.bincount(pairs[1], minlength=len(nodes))
    first = np.minimum(degrees[nodes[sample.central]], 4)
    np.testing.assert_array_equal(drawn[sample.central], first)
  assert len(shapes) == 1


def test_the_same_generator_draws_the_same_sample():
  sampler, centre = _sampler(), np.arange(8)
  first, again, other = (sampler(centre, np.random.default_rng(seed)) for seed in (1, 1, 2))
  jax.tree.map(np.testing.assert_array_equal, first, again)
  assert not np.array_equal(first.features, other.features)
  # Duplicates in a block count once.
  twice = sampler(np.array([5, 5, 5, 6, 7, 8, 9, 10]), np.random.default_rng(0))
  assert twice.central.sum() == 6


def test_all_neighbours_are_drawn_equally_often():
  data = _data()
  sampler = _sampler(fan_outs=(4,), batch_size=1, num_blocks=1, data=data)
  degree, draws = int((data[2] == 0).sum()), 2000
  found = np.zeros(NUM_NODES)
  rng = np.random.default_rng(0)
  for _ in range(draws):
    sample = sampler([0], rng)
    found[_number(sampler, data, sample)[sample.neighbours.senders[0]]] += 1
  expected = np.isin(np.arange(NUM_NODES), data[1][data[2] == 0]) * 4 / degree
  # Five standard errors of a share of independent draws.
  np.testing.assert_allclose(found / draws, expected, atol=5 * (4 / degree / draws) ** 0.5)


@pytest.mark.parametrize("features", ["dense", pytest.param("sparse", marks=pytest.mark.slow)])
def test_with_all_neighbours_central_nodes_are_embedded_as_in_the_whole_graph(features):
  data = _data()
  graph = graphs.make_graph(*data)
  encoder = adapters.Encoder(gcn.GCN((8, 6)))
  params, network_state = encoder.init(jax.random.key(0), graph)
  # A training pass, so that the running statistics are not the initial ones.
  _, network_state = encoder(params, network_state, graph, train=True)
  whole, _ = encoder(params, network_state, graph, train=False)
  if features == "sparse":
    data = (sparse.csr_array(data[0]), *data[1:])
  sampler = _sampler(fan_outs=(45, 45), data=data)
  centre = np.array([0, 58, 59, 3, 17, 20, 30, 31])
  sample = sampler(centre, np.random.default_rng(0))
  found, _ = encoder(params, network_state, jax.tree.map(jnp.asarray, sample), train=False)
  expected = np.concatenate([whole[np.sort(part)] for part in np.split(centre, 2)])
  # 1e-5: float32 sums in another order.
  np.testing.assert_allclose(found[sample.central], expected, atol=1e-5)


def test_sums_by_block_are_those_of_the_whole_sample():
  sample = jax.tree.map(jnp.asarray, _sampler()(np.arange(8), np.random.default_rng(0)))
  weights = graphs.edge_weights(sample) * jax.random.uniform(
    jax.random.key(0), sample.edge_scale.shape
  )
  sent = jax.random.normal(jax.random.key(1), (len(sample.mask), 3))
  norm = gcn.GraphNorm()
  params = norm.init(jax.random.key(2), sample, sent)

  @functools.partial(jax.jit, static_argnames="num_blocks")
  def found(sent, weights, num_blocks):
    neighbours = dataclasses.replace(sample.neighbours, num_blocks=num_blocks)

    def total(sent, weights):
      sums = message_passing.neighbour_sum(sent, neighbours, weights)
      sums += message_passing.degrees(neighbours, weights)[:, None]
      sums = norm.apply(params, sample._replace(neighbours=neighbours), sums)
      return jnp.sum(jnp.sin(sums)), sums

    return jax.value_and_grad(total, (0, 1), has_aux=True)(sent, weights)

  # Each block has its own graph id, so the norm is the same. 1e-4: float32 sums in another order.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
    found(sent, weights, num_blocks=2),
    found(sent, weights, num_blocks=1),
  )


def _bgrl(sample, num_steps=4):
  encoder, predictor = adapters.Encoder(gcn.GCN((8, 4), "graph")), adapters.Predictor(mlp.MLP(8, 4))
  keys = jax.random.split(jax.random.key(0), 3)
  (params, online), (target_params, target) = (encoder.init(key, sample) for key in keys[:2])
  optimizer, config = optax.adamw(1e-2), bgrl.Config(num_steps=num_steps)
  state = bgrl.init(
    bgrl.Params(params, predictor.init(keys[2], jnp.zeros((1, 4)))),
    optimizer=optimizer,
    config=config,
    target_params=target_params,
    network_state=bgrl.NetworkState(online, target),
  )
  return state, functools.partial(
    bgrl.update,
    apply_fn=bgrl.Networks(encoder, predictor),
    optimizer=optimizer,
    config=config,
  )


@pytest.mark.slow  # two compiled updates
def test_updates_compile_once_and_eight_devices_equal_one():
  sampler = _sampler(batch_size=16, num_blocks=8)
  samples = [sampler(np.arange(k, k + 16), np.random.default_rng(k)) for k in range(3)]
  state, update = _bgrl(jax.tree.map(jnp.asarray, samples[0]))
  ends, losses, compilations = [], [], 0

  def counting(state, batch, key):
    nonlocal compilations
    compilations += 1
    return update(state, batch, key)

  for num_devices in (1, 8):
    mesh = sharding.make_mesh({"data": num_devices}, jax.devices()[:num_devices])
    step = sharding.jit_update(counting, mesh, sharding.REPLICATED)
    end = jax.tree.map(jnp.copy, state)
    for k, sample in enumerate(samples):
      end, metrics = step(end, sample, jax.random.key(k))
    ends.append(jax.device_get(end))
    losses.append(float(metrics["loss"]))
  assert compilations == 2  # one for each mesh
  # Devices exchange sums and gradients only, no array of nodes or edges.
  key = jax.random.key(0)
  batch = sharding.shard_batch(samples[0], mesh)
  replicated = jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
  text = jax.jit(update).lower(replicated, batch, key).compile().as_text()
  exchanged = re.findall(r"= (.*?) (?:all-gather|all-reduce|all-to-all)(?:-start)?\(", text)
  sizes = [int(x) for kind in exchanged for x in re.findall(r"\[(\d+)", kind)]
  assert exchanged and max(sizes) < sampler.num_nodes
  # Sums over devices round differently, and Adam turns a rounding error in a tiny gradient into a
  # whole step.
  np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), *ends)


def test_only_central_nodes_count():
  sampler = _sampler()
  sample = jax.tree.map(jnp.asarray, sampler(np.arange(8), np.random.default_rng(0)))
  state, update = _bgrl(sample)
  bound = {name: update.keywords[name] for name in ("apply_fn", "config")}

  @jax.jit
  def loss(central):
    batch = sample._replace(central=central)
    return bgrl.loss(state.params, state, batch, jax.random.key(0), **bound)[0]

  places = jnp.arange(len(sample.mask))
  parts = [loss(places == node) for node in np.flatnonzero(sample.central)]
  # 1e-5: means of float32 in another order.
  np.testing.assert_allclose(loss(sample.central), np.mean(parts), rtol=1e-5)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"fan_outs": ()}, "fan_outs must have one number for each hop"),
    ({"fan_outs": (3, 0)}, "fan_outs must be an integer >= 1, got 0"),
    ({"batch_size": 9}, "batch_size must be a multiple of num_blocks = 2 .* got 9"),
    ({"batch_size": 62}, "at most the number of nodes, 60, got 62"),
  ],
)
def test_bad_sizes_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    _sampler(**options)


def test_bad_edges_and_centres_are_refused():
  data = _data()
  for edges, message in (
    (([0, 60], [1, 2]), r"senders must lie in \[0, 60\), got 60 at position 1"),
    (([0, -1], [1, 2]), r"senders must lie in \[0, 60\), got -1 at position 1"),
    (([0, 3], [1, 3]), "must not be self-loops, got one at node 3"),
    (([0, 3], [1]), "lists of equal length"),
  ):
    with pytest.raises(ValueError, match=message):
      neighbour_sampling.Sampler(data[0], *edges, fan_outs=(2,), batch_size=4)
  sampler = _sampler()
  for nodes, message in (
    (np.arange(-1, 7), r"nodes must lie in \[0, 60\), got -1 to 6"),
    (np.arange(16), r"nodes must have shape \[batch_size\] = \[8\], got \[16\]"),
  ):
    with pytest.raises(ValueError, match=message):
      sampler(nodes, np.random.default_rng(0))
