"""Graphs: one small graph in every layout, how it is cleaned, and the errors of bad files."""

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest
from scipy import sparse

from experiments.data import graph_formats, graphs

# Two pairs and an isolated node, whose label is missing where the layout can say so.
FEATURES = np.array([[1, 0, 3], [0, 2, 0], [1, 1, 0], [0, 0, 0]], np.float32)
LABELS = np.array([0, 1, 1, 2])
EDGES = np.array([[0, 2], [1, 1]])
MASKS = {"train": [1, 0, 0, 0], "val": [0, 1, 0, 0], "test": [0, 0, 1, 0]}
PLAIN = {"row_normalise": False, "standardise": False}


def _arrays(**changes):
  raw = graph_formats.Raw("here", "made", FEATURES, EDGES, LABELS, MASKS)
  return raw._replace(**changes)


def _build(**changes):
  return graphs.build(_arrays(**changes), name="made")


def _csr(name, dense):
  matrix = sparse.csr_array(dense)
  parts = (matrix.data, matrix.indices, matrix.indptr, matrix.shape)
  return {
    f"{name}_{part}": x
    for part, x in zip(("data", "indices", "indptr", "shape"), parts, strict=True)
  }


def _repacked(**changes):
  matrix = sparse.csr_array(FEATURES)
  return {
    "num_nodes": 4,
    "num_features": 3,
    "edges": EDGES.astype(np.uint16),
    "x_indptr": matrix.indptr,
    "x_indices": matrix.indices.astype(np.uint16),
    "x_data": matrix.data.astype(np.uint8),
    "y": LABELS.astype(np.uint8),
    "train_idx": [0],
    "val_idx": [1],
    "test_idx": [2],
    "unlabeled": [3],
    **changes,
  }


def _gnn_benchmark(**changes):
  adjacency = np.zeros((4, 4))
  adjacency[tuple(EDGES)] = 1
  return {**_csr("adj", adjacency), **_csr("attr", FEATURES), "labels": LABELS, **changes}


def _heterophilous(**changes):
  masks = {f"{name}_masks": np.array([mask] * 2, bool) for name, mask in MASKS.items()}
  return {
    "node_features": FEATURES,
    "node_labels": LABELS,
    "edges": EDGES.T,
    **masks,
    **changes,
  }


def _wikics(**changes):
  return {
    "features": FEATURES.tolist(),
    "labels": LABELS.tolist(),
    "links": [[1], [], [1], []],
    "train_masks": [MASKS["train"]] * 2,
    "val_masks": [MASKS["val"]] * 2,
    "stopping_masks": [[0, 0, 0, 1]] * 2,
    "test_mask": MASKS["test"],
    **changes,
  }


def _write_npz(root, keys):
  root.mkdir(exist_ok=True)
  np.savez(root / f"{root.name}.npz", **keys)


def _write_wikics(root, data):
  root.mkdir(exist_ok=True)
  (root / "data.json").write_text(json.dumps(data))


def _write_ogb(root, **changes):
  files = {
    "raw/edge": EDGES.T,
    "raw/node-feat": FEATURES,
    "raw/node-label": [["0"], ["1"], ["1"], ["nan"]],
    "raw/num-node-list": [[4]],
    "split/time/train": [[0]],
    "split/time/valid": [[1]],
    "split/time/test": [[2]],
    **changes,
  }
  for name, rows in files.items():
    path = root / f"{name}.csv.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(",".join(str(x) for x in row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()))


def _write_ppi(root, directed=False, links=None, feats=None):
  """Two training graphs of two nodes, a validation and a test graph of two each."""
  root.mkdir(exist_ok=True)
  for split, ids in (("train", [1, 1, 2, 2]), ("valid", [3, 3]), ("test", [4, 4])):
    nodes = [{"id": i} for i in range(len(ids))]
    found = links or [{"source": 0, "target": 1}]
    graph = {"directed": directed, "graph": {}, "nodes": nodes, "links": found}
    (root / f"{split}_graph.json").write_text(json.dumps(graph))
    width = feats.get(split, 3) if feats else 3
    np.save(root / f"{split}_feats.npy", np.ones((len(ids), width)))
    np.save(root / f"{split}_labels.npy", np.eye(len(ids), 2, dtype=np.int64))
    np.save(root / f"{split}_graph_id.npy", ids)


def _write(layout, root):
  if layout == "ogb":
    _write_ogb(root)
  elif layout == "wikics":
    _write_wikics(root, _wikics())
  else:
    _write_npz(root, globals()[f"_{layout}"]())


def _dense(features):
  return features.toarray() if sparse.issparse(features) else features


# --- layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("layout", "last_label", "one_way", "num_splits"),
  [
    ("repacked", -1, 0, 1),
    ("heterophilous", 2, 0, 2),
    ("gnn_benchmark", 2, 2, 0),
    ("wikics", 2, 2, 2),
    ("ogb", -1, 2, 1),
  ],
)
def test_every_layout_gives_the_same_graph(tmp_path, layout, last_label, one_way, num_splits):
  _write(layout, tmp_path / "small")
  graph = graphs.load("small", directory=tmp_path, **PLAIN)
  assert graph.name == "small" and graph.notes["layout"] == layout
  np.testing.assert_array_equal(_dense(graph.features), FEATURES)
  assert graph.features.dtype == np.float32
  np.testing.assert_array_equal(graph.senders, [1, 0, 2, 1])  # sorted by receiver
  np.testing.assert_array_equal(graph.receivers, [0, 1, 1, 2])
  np.testing.assert_array_equal(graph.labels, [0, 1, 1, last_label])
  np.testing.assert_array_equal(graph.graph_ids, np.zeros(4))
  for array in (graph.senders, graph.receivers, graph.labels, graph.graph_ids):
    assert array.dtype == np.int32
  assert graph.notes["one_way_edges"] == one_way
  assert graph.notes["isolated_nodes"] == 1 and graph.notes["largest_degree"] == 2
  assert graph.notes["unlabelled_nodes"] == (last_label < 0)
  if num_splits:
    for name, mask in MASKS.items():
      np.testing.assert_array_equal(graph.splits[name], np.array([mask] * num_splits, bool))
  assert ("stopping" in graph.splits) == (layout == "wikics")


def test_ppi_is_one_graph_for_each_number_with_labels_of_zeros_and_ones(tmp_path):
  _write_ppi(tmp_path / "ppi")
  graph = graphs.load("ppi", directory=tmp_path)
  np.testing.assert_array_equal(graph.graph_ids, [0, 0, 1, 1, 2, 2, 3, 3])
  np.testing.assert_array_equal(graph.senders, [1, 0, 5, 4, 7, 6])
  np.testing.assert_array_equal(graph.receivers, [0, 1, 4, 5, 6, 7])
  np.testing.assert_array_equal(graph.labels[4:], np.tile(np.eye(2), (2, 1)))
  assert graph.labels.dtype == np.float32
  np.testing.assert_array_equal(graph.splits["val"], [[0, 0, 0, 0, 1, 1, 0, 0]])
  assert graph.notes["num_graphs"] == 4 and graph.notes["num_classes"] == 2
  _write_ppi(tmp_path / "ppi", directed=True)
  assert graphs.load("ppi", directory=tmp_path).notes["one_way_edges"] == 3


def test_binary_features_need_no_data_and_splits_may_be_missing(tmp_path):
  keys = _repacked()
  for key in ("x_data", "train_idx", "val_idx", "test_idx", "unlabeled"):
    del keys[key]
  _write_npz(tmp_path / "small", keys)
  graph = graphs.load("small", directory=tmp_path, row_normalise=False)
  np.testing.assert_array_equal(_dense(graph.features), FEATURES > 0)
  assert graph.splits == {} and graph.labels[3] == 2


def test_a_name_is_a_folder_a_file_or_a_path(tmp_path):
  _write_npz(tmp_path / "small", _repacked())
  (tmp_path / "small" / "small.npz").rename(tmp_path / "one.npz")
  assert graphs.load("one", directory=tmp_path).name == "one"
  assert graphs.load(tmp_path / "one.npz").name == "one"
  _write_npz(tmp_path / "raw", _repacked())  # as PyTorch Geometric keeps its downloads
  (tmp_path / "raw").rename(tmp_path / "small" / "raw")
  assert graphs.load(tmp_path / "small").name == "small"


def test_an_unknown_name_is_answered_with_the_closest(tmp_path):
  for name in ("amazon_photo", "amazon_computers", "wikics"):
    (tmp_path / name).mkdir()
  with pytest.raises(ValueError, match=r"'amazon_fotos' under .*: found amazon_photo"):
    graphs.load("amazon_fotos", directory=tmp_path)
  with pytest.raises(ValueError, match="amazon_computers, amazon_photo, wikics"):
    graphs.load("qqq", directory=tmp_path)
  with pytest.raises(ValueError, match="that folder does not exist"):
    graphs.load("qqq", directory=tmp_path / "none")


# --- cleaning and preparation ---------------------------------------------------------------------


def test_cleaning_counts_what_it_drops_and_merges():
  # Stored: 0->1 three times, 1->0, 1->2 one way, a loop on 3, 3->4 between two graphs.
  edges = np.array([[0, 0, 0, 1, 1, 3, 3], [1, 1, 1, 0, 2, 3, 4]])
  raw = graph_formats.Raw(
    "here", "made", np.ones((6, 1)), edges, np.arange(6) % 2, {}, np.array([0, 0, 0, 0, 1, 1])
  )
  graph = graphs.build(raw, name="made")
  want = {
    "edges_stored": 7,
    "self_loops_dropped": 1,
    "edges_between_graphs_dropped": 1,
    "duplicates_merged": 2,
    "one_way_edges": 1,
    "isolated_nodes": 3,
    "largest_degree": 2,
    "num_graphs": 2,
    "num_classes": 2,
  }
  assert want.items() <= graph.notes.items()
  pairs = list(zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True))
  assert pairs == [(1, 0), (0, 1), (2, 1), (1, 2)]
  kept = graphs.build(raw, name="made", edges="keep")
  assert list(zip(kept.senders, kept.receivers, strict=True)) == [(1, 0), (0, 1), (1, 2)]
  assert kept.notes["isolated_nodes"] == 3, "node 2 receives, so it is not isolated"
  with pytest.raises(ValueError, match=r"here: 1 edges have no reverse, such as 1 to 2; edges="):
    graphs.build(raw, name="made", edges="error")
  pairs_of = graphs.build(raw._replace(undirected=True), name="made", edges="error")
  assert pairs_of.notes["duplicates_merged"] == 3, "a pair in both directions is stored twice"
  np.testing.assert_array_equal(pairs_of.senders, graph.senders)


def test_a_graph_without_edges():
  graph = _build(edges=np.zeros((2, 0), np.int64))
  assert graph.senders.shape == graph.receivers.shape == (0,)
  assert graph.notes["isolated_nodes"] == 4 and graph.notes["largest_degree"] == 0


@pytest.mark.parametrize("container", [np.asarray, sparse.csr_array])
def test_features_are_binarised_then_normalised_then_standardised(container):
  def prepared(features=FEATURES, **options):
    raw = _arrays(features=container(features))
    found = graphs.build(raw, name="made", **options)
    assert found.features.dtype == np.float32
    return _dense(found.features)

  want = [[0.25, 0, 0.75], [0, 1, 0], [0.5, 0.5, 0], [0, 0, 0]]
  np.testing.assert_array_equal(prepared(row_normalise=True), want)
  np.testing.assert_array_equal(prepared(binarise=True), FEATURES > 0)
  both = prepared(binarise=True, row_normalise=True)
  np.testing.assert_array_equal(both[0], [0.5, 0, 0.5])
  constant = np.concatenate([FEATURES, np.ones((4, 1), np.float32)], axis=1)
  scaled = prepared(constant, standardise=True)
  np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-6)  # float32
  np.testing.assert_allclose(scaled.std(0), [1, 1, 1, 0], atol=1e-6)
  signed = np.array([[1, -1, 0], [4, 0, -2], [0.5, 0, 0], [0, 0, 0]], np.float32)
  want = [[1, -1, 0], [2, 0, -1], [0.5, 0, 0], [0, 0, 0]]  # max(sum, 1) is 1, 2, 1, 1
  np.testing.assert_array_equal(prepared(signed, row_normalise=True), want)


def test_layouts_have_the_preparation_of_the_paper_and_notes_say_so(tmp_path):
  want = {"repacked": 1, "gnn_benchmark": 1, "wikics": 2, "heterophilous": 0, "ogb": 0}
  for layout, steps in want.items():
    _write(layout, tmp_path / layout)
    notes = graphs.load(layout, directory=tmp_path).notes
    assert notes["row_normalised"] == (steps > 0) and notes["standardised"] == (steps > 1)
    assert notes["binarised"] is False


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"features": np.ones(4)}, r"features have shape \(4,\)"),
    ({"features": np.ones((0, 3))}, r"features have shape \(0, 3\)"),
    ({"features": np.array([["a"]] * 4)}, "features are <U1"),
    ({"features": np.where(FEATURES == 3, np.nan, FEATURES)}, r"features of node 0 hold nan \(1"),
    ({"features": sparse.csr_array(np.diag([1, 1, np.inf, 1]))}, "features of node 2 hold inf"),
    (
      {"features": np.diag([1.0, 1, 1, 1e39])},
      r"features of node 3 hold 1e\+39 .*finite in float32",
    ),
    ({"labels": LABELS[:3]}, r"labels have shape \(3,\), features 4 rows"),
    ({"labels": np.full(4, -1)}, "every label is missing"),
    ({"labels": [0, 1, -2, 0]}, "label of node 2 is -2; give a class from 0, or -1"),
    ({"labels": [0, 1, 1.5, 0]}, "label of node 2 is 1.5"),
    ({"labels": list("abcd")}, "labels are <U1; number the classes"),
    ({"labels": np.full((4, 2), 2)}, "labels .* hold 2; each must be 0 or 1"),
    ({"edges": EDGES.T[:1]}, r"edges have shape \(1, 2\)"),
    ({"edges": EDGES * 1.0}, "edges are float64"),
    ({"edges": EDGES + 2}, r"edge 1 joins 4 and 3, but the 4 nodes are 0 to 3 \(1 such"),
    ({"edges": EDGES - 1}, "edge 0 joins -1 and 0"),
    ({"splits": {"train": [1, 0, 0]}}, r"split train has shape \(1, 3\); expected \[1, 4\]"),
    ({"splits": {"train": [0, 1, 2, 3]}}, "split train must be a mask"),
    ({"splits": {"train": [0, 0, 0, 0]}}, "split train number 0 has no nodes"),
    ({"splits": {**MASKS, "test": [1, 0, 1, 0]}}, "splits train and test share node 0"),
    (
      {"labels": [0, 1, -1, 0], "splits": {"test": [[0, 1, 0, 0], [0, 0, 1, 1]]}},
      r"split test holds node 2, which has no label \(1 such nodes\): remove them",
    ),
    ({"graph_ids": np.zeros(3)}, r"graph_ids has shape \(3,\)"),
    ({"graph_ids": np.array([0, 0.5, 0, 0.5])}, "graph_ids must be integers"),
    ({"graph_ids": np.array([0, 0, -1, -1])}, "graph_ids must be integers from 0, found -1"),
  ],
)
def test_bad_arrays_are_named(changes, message):
  with pytest.raises(ValueError, match=f"here: {message}"):
    _build(**changes)


def test_an_unknown_edge_policy():
  with pytest.raises(ValueError, match=r"edges is 'both'; choose one of \('symmetrise'"):
    graphs.build(_arrays(), name="made", edges="both")


PICKLED = np.array([{"a": 1}], dtype=object)


@pytest.mark.parametrize(
  ("keys", "message"),
  [
    (_repacked(x_indices=np.full(5, 9)), "x_indptr, _indices and _data do not form a CSR"),
    (_repacked(x_indptr=np.arange(4)), "x_indptr, _indices and _data do not form a CSR"),
    (_repacked(num_nodes=[4, 4]), "x_indptr, _indices and _data do not form a CSR"),
    (_repacked(train_idx=[4]), "train_idx names nodes outside 0 to 3"),
    (_repacked(y=PICKLED), "y is damaged or holds pickled objects .*; save it as numbers"),
    (_repacked(y=LABELS[:2], unlabeled=[]), r"labels have shape \(2,\), features 4 rows"),
    (_gnn_benchmark(attr_data=PICKLED), "attr_data is damaged or holds pickled objects"),
    (_heterophilous(edges=np.zeros((2, 3), int)), r"edges have shape \(3, 2\)"),
    ({"x_indptr": [0]}, r"key 'x_indices' is missing; found \['x_indptr'\]"),
    ({"weights": [0]}, r"expected one of the keys \['x_indptr', .* found \['weights'\]"),
  ],
)
def test_a_bad_archive_is_named_by_file_and_key(tmp_path, keys, message):
  _write_npz(tmp_path / "bad", keys)
  with pytest.raises(ValueError, match=rf"bad\.npz.*{message}"):
    graphs.load("bad", directory=tmp_path)


def test_pickles_that_nobody_needs_are_left_alone(tmp_path):
  _write_npz(tmp_path / "small", _gnn_benchmark(node_names=PICKLED))
  assert graphs.load("small", directory=tmp_path).notes["layout"] == "gnn_benchmark"


@pytest.mark.parametrize(
  ("data", "message"),
  [
    ([], "expected an object"),
    ({"features": []}, "key 'labels' is missing"),
    (_wikics(links=[[1]]), "links list 1 nodes, but features 4"),
    (_wikics(links=[1, 2, 3, 4]), "links must be a list of lists"),
    (_wikics(links=[["a"], [], [], []]), "links: expected integers"),
    (_wikics(features=[[1], [2, 3]]), "features is not an array"),
    (_wikics(test_mask=[1]), "split test has shape"),
  ],
)
def test_a_bad_json_is_named_by_file_and_key(tmp_path, data, message):
  _write_wikics(tmp_path / "bad", data)
  with pytest.raises(ValueError, match=rf"data\.json.*{message}"):
    graphs.load("bad", directory=tmp_path)
  (tmp_path / "bad" / "data.json").write_text("{")
  with pytest.raises(ValueError, match=r"data\.json is missing or not JSON"):
    graphs.load("bad", directory=tmp_path)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"links": [{"source": 0, "target": 9}]}, r"train_graph\.json: links name nodes outside"),
    ({"links": [{"from": 0}]}, r"train_graph\.json: links must be objects with source"),
    ({"feats": {"test": 2}}, "differ in width"),
  ],
)
def test_bad_ppi_files_are_named(tmp_path, options, message):
  _write_ppi(tmp_path / "ppi", **options)
  with pytest.raises(ValueError, match=message):
    graphs.load("ppi", directory=tmp_path)


def test_ppi_files_that_disagree_or_are_missing_are_named(tmp_path):
  _write_ppi(tmp_path / "ppi")
  np.save(tmp_path / "ppi" / "valid_feats.npy", np.ones((5, 3)))
  with pytest.raises(ValueError, match=r"valid_graph\.json: .* graph_id differ: \[2, 5, 2, 2\]"):
    graphs.load("ppi", directory=tmp_path)
  (tmp_path / "ppi" / "valid_feats.npy").unlink()
  with pytest.raises(ValueError, match=r"valid_feats\.npy is missing"):
    graphs.load("ppi", directory=tmp_path)


@pytest.mark.parametrize(
  ("files", "message"),
  [
    ({"raw/num-node-list": [[3], [1]]}, "2 graphs; give a set of one graph"),
    ({"raw/num-node-list": [[5]]}, "node-feat has 4 rows, num-node-list says 5"),
    ({"raw/edge": [["a", "b"]]}, r"edge\.csv\.gz is missing, damaged or not a table"),
    ({"split/time/test": [[7]]}, r"test\.csv\.gz names nodes outside 0 to 3"),
    ({"split/year/train": [[1]]}, "2 ways to split"),
  ],
)
def test_bad_ogb_files_are_named(tmp_path, files, message):
  _write_ogb(tmp_path / "ogb", **files)
  with pytest.raises(ValueError, match=message):
    graphs.load("ogb", directory=tmp_path)


def test_what_is_no_graph_at_all(tmp_path):
  _write_npz(tmp_path / "a", _repacked())
  (tmp_path / "a" / "a.npz").rename(tmp_path / "a" / "b.npz")
  np.savez(tmp_path / "a" / "c.npz", **_repacked())
  with pytest.raises(ValueError, match=r"holds \['b.npz', 'c.npz'\]: give the path of one"):
    graphs.load("a", directory=tmp_path)
  data = (tmp_path / "a" / "b.npz").read_bytes()
  (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
  with pytest.raises(ValueError, match=r"cut\.npz is missing, damaged or pickled"):
    graphs.load("cut", directory=tmp_path)
  with (tmp_path / "array.npz").open("wb") as file:
    np.save(file, LABELS)
  with pytest.raises(ValueError, match=r"array\.npz is a single array"):
    graphs.load("array", directory=tmp_path)
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match=r"empty: no \.npz, data\.json"):
    graphs.load("empty", directory=tmp_path)
  (tmp_path / "pyg" / "processed").mkdir(parents=True)
  (tmp_path / "pyg" / "processed" / "data.pt").touch()
  for name in ("pyg", "pyg/processed/data.pt"):
    with pytest.raises(ValueError, match=r"of torch.*numpy\.savez\('NAME\.npz', node_features"):
      graphs.load(name, directory=tmp_path)
  (tmp_path / "notes.txt").touch()
  with pytest.raises(ValueError, match=r"expected \.npz, \.json or a folder"):
    graphs.load("notes.txt", directory=tmp_path)


# --- what users bring ---


@pytest.mark.parametrize(
  ("labels", "expected", "note"),
  [
    ([1, 2, 2, 6], [0, 1, 1, 2], "classes 1, 2, 6 are 0 to 2"),
    ([0, 7, 100, -1], [0, 1, 2, -1], "classes 0, 7, 100 are 0 to 2"),
    ([0, 1, 1, 2], [0, 1, 1, 2], None),
  ],
)
def test_classes_are_numbered_without_gaps(labels, expected, note):
  graph = _build(labels=np.array(labels), splits={})
  assert graph.labels.tolist() == expected
  assert graph.notes["num_classes"] == 3
  assert graph.notes.get("labels_renumbered") == note


def test_one_hot_labels_are_classes_and_others_stay():
  graph = _build(labels=np.eye(3)[LABELS], splits={})
  assert graph.labels.tolist() == LABELS.tolist()
  assert graph.notes["labels_were_one_hot"]
  several = np.eye(3)[LABELS] + np.eye(3)[0]
  assert _build(labels=np.minimum(several, 1), splits={}).labels.shape == (4, 3)


@pytest.mark.parametrize("columns", [False, True])  # of the masks
def test_a_plain_archive_is_read(tmp_path, columns):
  keys = {"edge_index": EDGES, "node_attr": FEATURES, "node_label": LABELS}
  masks = {f"{name}_mask": np.array([mask] * 2, bool) for name, mask in MASKS.items()}
  if columns:
    masks = {name: mask.T for name, mask in masks.items()}
  np.savez(tmp_path / "mine.npz", **keys, **masks, edge_weight=np.array([0.5, 2.0]))
  graph = graphs.load("mine", directory=tmp_path)
  assert graph.notes["layout"] == "plain"
  assert graph.notes["edge_weights_dropped"] == 2
  assert graph.senders.tolist() == [1, 0, 2, 1]
  assert graph.splits["train"].shape == (2, 4)
  np.testing.assert_array_equal(graph.features, FEATURES)


def test_weights_of_an_adjacency_are_noted_and_signs_refused(tmp_path):
  adjacency = np.zeros((4, 4))
  adjacency[tuple(EDGES)] = [1, 3]
  np.savez(tmp_path / "w.npz", **_gnn_benchmark(**_csr("adj", adjacency)))
  assert graphs.load("w", directory=tmp_path).notes["edge_weights_dropped"] == 1
  np.savez(tmp_path / "s.npz", **_gnn_benchmark(**_csr("adj", -adjacency)))
  with pytest.raises(ValueError, match=r"adj_data: 2 edges have negative weights, such as -3"):
    graphs.load("s", directory=tmp_path)


def test_a_graph_without_features_gets_those_that_are_asked_for(tmp_path):
  np.savez(tmp_path / "bare.npz", edge_index=EDGES, y=LABELS)
  with pytest.raises(ValueError, match='holds no features: choose features="identity"'):
    graphs.load("bare", directory=tmp_path)
  identity = graphs.load("bare", directory=tmp_path, features="identity")
  np.testing.assert_array_equal(identity.features.toarray(), np.eye(4))
  degree = graphs.load("bare", directory=tmp_path, features="degree")
  np.testing.assert_array_equal(degree.features.toarray(), np.eye(3)[[1, 2, 1, 0]])
  with pytest.raises(ValueError, match="choose one of"):
    graphs.load("bare", directory=tmp_path, features="ones")


def test_pickled_matrices_are_answered_with_the_line_that_converts_them(tmp_path):
  adjacency = np.zeros((4, 4))
  adjacency[tuple(EDGES)] = 1
  old = {"adj_matrix": sparse.csr_matrix(adjacency), "attr_matrix": sparse.csr_matrix(FEATURES)}
  np.savez(tmp_path / "OLD.npz", **old, labels=LABELS)
  with pytest.raises(ValueError, match="pickled SciPy matrices") as caught:
    graphs.load("OLD", directory=tmp_path)
  line = str(caught.value).partition("convert it once: ")[2]
  program = line.removeprefix('python -c "').removesuffix('"')
  subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
  converted = graphs.load("NEW", directory=tmp_path)
  assert converted.labels.tolist() == LABELS.tolist()
  assert converted.senders.tolist() == [1, 0, 2, 1]
