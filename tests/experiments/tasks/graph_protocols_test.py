"""The inductive and the sampled protocol, what is read sparsely, and what does not fit."""

import json

import jax
import numpy as np
import pytest
from scipy import sparse

from experiments import main
from experiments.data import graphs as graph_data
from experiments.loop import interruption, memory, presets
from experiments.papers import bgrl
from experiments.tasks import graph_runs, node_classification
from representation import graphs
from representation.networks import gcn


def test_presets_have_the_published_settings():
  """The table of the paper for its two inductive and large graphs."""
  ppi, arxiv = (presets.resolve(f"bgrl:{name}") for name in ("ppi", "ogbn_arxiv"))
  assert ppi.algorithm.feature_mask_probs == (0.25, 0.0)
  assert ppi.algorithm.edge_drop_probs == (0.3, 0.25)
  assert ppi.optimizer.learning_rate == 5e-3 and ppi.network.predictor_width == 512
  assert graph_runs.make_encoder(ppi).module == gcn.MeanPooling(512)
  assert arxiv.algorithm.feature_mask_probs == (0.0, 0.0)
  assert arxiv.algorithm.edge_drop_probs == (0.6, 0.6)
  assert arxiv.optimizer.learning_rate == 1e-2 and arxiv.network.predictor_width == 256
  module = graph_runs.make_encoder(arxiv).module
  assert (module.widths, module.norm, module.standardise) == ((256,) * 3, "graph", True)


def test_graphs_with_test_nodes_are_not_trained_on():
  config = presets.resolve("bgrl:tiny_ppi")
  data = graph_runs.load(config)
  kept = graph_data.without_test_graphs(data)
  assert len(np.unique(kept.graph_ids)) == 5 and not kept.splits["test"].any()
  np.testing.assert_array_equal(kept.features, data.features[~data.splits["test"][0]])
  # The edges left out are those of the last graph, and nothing joins two graphs.
  assert len(data.senders) - len(kept.senders) == (data.graph_ids[data.senders] == 5).sum()
  np.testing.assert_array_equal(kept.graph_ids[kept.senders], kept.graph_ids[kept.receivers])
  everywhere = data._replace(splits={"test": np.ones_like(data.splits["test"])})
  with pytest.raises(ValueError, match="each of its 6 graphs has test nodes"):
    graph_data.without_test_graphs(everywhere)


def test_splits_that_cannot_be_judged_by_are_refused():
  data = graph_runs.load(presets.resolve("bgrl:tiny"))
  train = (np.arange(300) < 150)[None]
  data = data._replace(splits={"train": train, "test": ~train})
  with pytest.raises(ValueError, match=r"csbm: its splits lack \['val'\]"):
    node_classification.Evaluator(data, num_splits=2, split_seed=0)


def test_features_stay_sparse_below_a_twentieth():
  config, data = presets.resolve("bgrl:tiny"), graph_runs.load(presets.resolve("bgrl:tiny"))
  for density, kind in ((0.004, graphs.SparseFeatures), (0.3, jax.Array)):
    drawn = sparse.random_array((300, 500), density=density, format="csr", rng=0, dtype=np.float32)
    placed = graph_runs.place(config, data._replace(features=drawn))
    assert isinstance(placed.features, kind)
    assert placed.features.shape == (300, 500)


def test_few_nodes_with_many_features_are_judged_in_all_directions():
  features = sparse.random_array((40, 1200), density=0.02, format="csr", rng=0)
  found, note = node_classification._narrow(features)
  assert found.shape == (40, 40) and note == ""
  dense = features.toarray()
  np.testing.assert_allclose(found @ found.T, dense @ dense.T, atol=1e-12)  # float64


def test_what_does_not_fit_is_refused_with_an_estimate(monkeypatch, tmp_path):
  monkeypatch.setattr(memory, "available", lambda devices: 2**16)
  with pytest.raises(ValueError, match=r"csbm: 300 nodes, .* GiB are free: sample neighbours"):
    bgrl.build(presets.resolve("bgrl:tiny"))
  with pytest.raises(ValueError, match=r"lower data.batch_size=32 or data.fan_outs=\(4, 3\)"):
    bgrl.build(presets.resolve("bgrl:tiny_sampled"))


@pytest.mark.slow  # five compiled updates
@pytest.mark.parametrize(
  ("preset", "fan_outs"),
  [("amazon_photo", ()), ("wikics", ()), ("ogbn_arxiv", ()), ("ogbn_arxiv", (10, 5)), ("ppi", ())],
)
def test_the_estimate_is_what_the_compiler_plans(preset, fan_outs):
  config, published = presets.resolve("bgrl:csbm"), presets.resolve(f"bgrl:{preset}")
  config.network.update(published.network)
  config.data.csbm.update({"num_nodes": 3000, "num_features": 100})
  if fan_outs:  # more nodes than a sample holds
    config.data.csbm.num_nodes = 10_000
    config.data.update({"batch_size": 64, "fan_outs": fan_outs})
  experiment = bgrl.build(config)
  key, graph = jax.eval_shape(lambda: (jax.random.key(0), experiment.init_args[0]))
  state = jax.eval_shape(experiment.init, key, graph)
  plan = jax.jit(experiment.update).lower(state, graph, key).compile().memory_analysis()
  needed = plan.temp_size_in_bytes + plan.argument_size_in_bytes
  num_nodes = len(graph.mask)
  # As `check_memory` asks: a sample has about as many edges as nodes.
  num_edges = num_nodes if fan_outs else graph.neighbours.num_edges
  found = graph_runs.step_bytes(config, num_nodes, num_edges, 100)
  # It must tell what fits from what does not, not more.
  assert 0.75 < found / needed < 1.33


@pytest.mark.slow  # three runs of 30 steps
def test_an_interrupted_sampled_run_goes_on_with_the_samples_that_came_next(tmp_path, monkeypatch):
  def run(folder):
    return main.run(["--config=bgrl:tiny_sampled", f"--workdir={tmp_path / folder}"])

  assert run("whole") == 0
  with monkeypatch.context() as patched:
    # As a signal before step 13 would.
    stop = interruption.Listener.stop

    def early(listener, step):
      if step == 13:
        listener.received = 15
      return stop(listener, step)

    patched.setattr(interruption.Listener, "stop", early)
    assert run("parts") == 128 + 15
  assert run("parts") == 0
  found = [
    [
      {k: v for k, v in json.loads(line).items() if k not in ("seconds", "peak_memory_gib")}
      for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
    ]
    for folder in ("whole", "parts")
  ]
  assert found[0] == found[1]
