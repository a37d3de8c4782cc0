"""Graphs as arrays: which ones are refused."""

import numpy as np
import pytest
import scipy.sparse

from representation import graphs


def _data():
  rng = np.random.default_rng(0)
  receivers, senders = np.nonzero((rng.random((9, 9)) < 0.3) & ~np.eye(9, dtype=bool))
  return rng.normal(size=(9, 5)), senders, receivers


def test_bad_graphs_are_refused():
  features, senders, receivers = _data()
  with pytest.raises(ValueError, match="must not be self-loops, got one at node 3"):
    graphs.make_graph(features, [0, 3], [1, 3])
  with pytest.raises(ValueError, match=r"features must have shape \[N, D\] .* got shape \(9,\)"):
    graphs.make_graph(features[:, 0], senders, receivers)
  with pytest.raises(ValueError, match=r"graph_ids must have shape \[N\] = \[9\]"):
    graphs.make_graph(features, senders, receivers, graph_ids=[0, 1])
  with pytest.raises(ValueError, match=r"graph_ids must lie in \[0, N\) = \[0, 9\), got 1 to 9"):
    graphs.make_graph(features, senders, receivers, graph_ids=range(1, 10))
  with pytest.raises(ValueError, match="graph_ids must be integers, got float64"):
    graphs.make_graph(features, senders, receivers, graph_ids=np.arange(9) / 2)
  with pytest.raises(ValueError, match=r"multiple must be an integer >= 1, got 0"):
    graphs.make_graph(features, senders, receivers, multiple=0)
  with pytest.raises(ValueError, match=r"receivers must lie in \[0, 9\), got 9 at position 1"):
    graphs.make_graph(features, [0, 3], [1, 9])
  # Also if node 9 exists as padding.
  with pytest.raises(ValueError, match=r"receivers must lie in \[0, 9\), got 9 at position 1"):
    graphs.make_graph(features, [0, 3], [1, 9], multiple=8)
  with pytest.raises(ValueError, match=r"must not be empty, got shape \(9, 0\)"):
    graphs.make_graph(features[:, :0], senders, receivers)
  holed = features.copy()
  holed[4, 2] = np.nan
  for given in (holed, scipy.sparse.csr_array(holed)):
    with pytest.raises(ValueError, match=r"must be finite, got nan at node 4 \(1 such values\)"):
      graphs.make_graph(given, senders, receivers)
