"""Readers of published graph data sets: one for each layout of files.

| layout          | files and keys                                                   | an edge is |
|-----------------|------------------------------------------------------------------|------------|
| `repacked`      | `.npz`: edges, x_indptr, x_indices(, x_data), y(, train_idx, ..) | a pair     |
| `heterophilous` | `.npz`: node_features, node_labels, edges(, train_masks, ..)     | a pair     |
| `gnn_benchmark` | `.npz`: adj_* and attr_*, both CSR, labels                       | directed   |
| `plain`         | `.npz`: edge_index, x or node_attr, y or node_label(, *_mask)    | directed   |
| `wikics`        | `data.json`: features, labels, links, masks of 20 splits         | directed   |
| `ppi`           | `train_{graph.json,feats.npy,labels.npy,graph_id.npy}`, valid, ..| as it says |
| `ogb`           | `raw/{edge,node-feat,node-label,num-node-list}.csv.gz`, `split/` | directed   |

The sources are Shchur et al. 2018 (arXiv:1811.05868) for `gnn_benchmark` and, saved without
pickles, `repacked`; Platonov et al. 2023 (arXiv:2302.11640) for `heterophilous`; Mernyei and Cangea
2020 (arXiv:2007.02901) for `wikics`; GraphSAGE (arXiv:1706.02216) for `ppi`; and OGB
(arXiv:2005.00687). The `raw` folder of PyTorch Geometric holds the same files and is found. Its
`processed/*.pt` need torch, and the error says how to export them.

`plain` may lack features. Weights of edges are not used: they are dropped with a note, and signs
are refused.

There is no `tfds:` source: the graphs of TensorFlow Datasets are molecules (`ogbg_molpcba`,
`cardiotox`) and hyperlinks without labels (`web_graph`), so none has labelled nodes.
"""

import difflib
import functools
import itertools
import json
import os
import pathlib
import types
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from experiments import files

_READ_ERRORS = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error)
_SPLITS = {"train": "train", "valid": "val", "test": "test"}  # name in files: name here
_EXPORT = (
  "d = dataset[0]; numpy.savez('NAME.npz', node_features=d.x, node_labels=d.y, "
  "edges=d.edge_index.T)"
)
# One line for the shell: it writes the CSR parts of pickled matrices under the keys of this module.
_UNPICKLE = (
  "python -c \"import numpy as np; d = dict(np.load('OLD.npz', allow_pickle=True)); "
  "a, x = d['adj_matrix'].item().tocsr(), d['attr_matrix'].item().tocsr(); np.savez('NEW.npz', "
  "adj_data=a.data, adj_indices=a.indices, adj_indptr=a.indptr, adj_shape=a.shape, "
  "attr_data=x.data, attr_indices=x.indices, attr_indptr=x.indptr, attr_shape=x.shape, "
  "labels=d['labels'])\""
)


class Raw(NamedTuple):
  """A graph as its files store it, neither checked nor cleaned.

  where: the file or folder, for error messages.  layout: the name of its layout, see the module.
  features: `[N, D]` dense or CSR, or None where the file has none.  edges: `[2, E]`, a row of
    senders and a row of receivers.  labels: `[N]`, `[N, 1]` or `[N, L]`.
  splits: name to mask `[N]` or `[num_splits, N]`.
  graph_ids: `[N]`, or None for a single graph.  undirected: whether an edge is an unordered pair.
  notes: what the reader left out, for `graphs.Graph.notes`.
  """

  where: str
  layout: str
  features: Any
  edges: Any
  labels: Any
  splits: dict[str, Any]
  graph_ids: Any = None
  undirected: bool = False
  notes: Mapping[str, int | str] = types.MappingProxyType({})


def find(name: str | os.PathLike[str], directory: str | os.PathLike[str] = "") -> pathlib.Path:
  """Returns the path of a data set.

  It is the first of DIRECTORY/NAME/NAME.npz, DIRECTORY/NAME.npz and DIRECTORY/NAME that exists.
  NAME may be a path; an absolute path needs no directory.

  Raises:
    ValueError: none of them exists; the message lists the closest names that do.
  """
  base = files.local_path("config.data.directory", directory)
  name = os.fspath(files.local_path("config.data.name", name)) if name else ""
  for path in (base / name / f"{name}.npz", base / f"{name}.npz", base / name):
    if name and path.exists():
      return path
  found = sorted({p.stem for p in base.glob("*") if p.is_dir() or p.suffix == ".npz"})
  close = difflib.get_close_matches(name, found, cutoff=0.4) or found[:10]
  hint = f"found {', '.join(close)}" if close else "it holds no data sets"
  if not base.exists():
    hint = "that folder does not exist"
  raise ValueError(f"no graph data set {name!r} under {base}: {hint}; give a name or a path")


def read(path: pathlib.Path) -> Raw:
  """Reads a file or folder; its layout is detected.

  Raises:
    ValueError: no layout matches, a key is missing, or a file is damaged or holds pickled objects.
  """
  if path.is_dir():
    return _read_folder(path)
  if path.suffix == ".npz":
    return _read_npz(path)
  if path.suffix == ".json":
    return _ppi(path.parent) if path.name.endswith("_graph.json") else _wikics(path)
  if path.suffix == ".pt":
    raise ValueError(f"{path} is a file of torch: export it where PyG is installed with {_EXPORT}")
  raise ValueError(f"{path}: expected .npz, .json or a folder")


def _read_folder(path: pathlib.Path) -> Raw:
  for folder in (path, path / "raw"):
    if (folder / "data.json").exists():
      return _wikics(folder / "data.json")
    if (folder / "train_graph.json").exists():
      return _ppi(folder)
    if (folder / "edge.csv.gz").exists():
      return _ogb(folder)
    archives = sorted(folder.glob("*.npz"))
    if len(archives) > 1:
      raise ValueError(f"{folder} holds {[p.name for p in archives]}: give the path of one file")
    if archives:
      return _read_npz(archives[0])
  if any(path.rglob("*.pt")):
    raise ValueError(f"{path} holds files of torch: export them where PyG is with {_EXPORT}")
  raise ValueError(
    f"{path}: no .npz, data.json, train_graph.json or edge.csv.gz in the folder or its raw/; give "
    "the folder of a data set"
  )


# --- .npz -----------------------------------------------------------------------------------------


def _read_npz(path: pathlib.Path) -> Raw:
  where = str(path)
  archive = _loaded(path)
  if not isinstance(archive, np.lib.npyio.NpzFile):
    raise ValueError(f"{where} is a single array, not an archive; save arrays with numpy.savez")
  with archive:
    for key, reader in _NPZ.items():
      if key in archive.files:
        return reader(functools.partial(_key, archive, where), archive.files, where)
    if {"adj_matrix", "attr_matrix"} & set(archive.files):
      raise ValueError(
        f"{where} holds pickled SciPy matrices, which can run code when they are read. If you "
        f"trust the file, convert it once: {_UNPICKLE}"
      )
    raise ValueError(f"{where}: expected one of the keys {list(_NPZ)}, found {archive.files}")


def _repacked(get: Callable[[str], Any], keys: list[str], where: str) -> Raw:
  indices, shape = get("x_indices"), (get("num_nodes"), get("num_features"))
  data = get("x_data") if "x_data" in keys else np.ones(len(indices))
  features = _csr(data, indices, get("x_indptr"), shape, f"{where}, x")
  labels = _integers(get("y"), f"{where}, y")
  if "unlabeled" in keys:  # the stored labels of these nodes mean nothing
    labels[_mask(get("unlabeled"), len(labels), f"{where}, unlabeled")] = -1
  splits = {
    name: _mask(get(f"{name}_idx"), features.shape[0], f"{where}, {name}_idx")
    for name in _SPLITS.values()
    if f"{name}_idx" in keys
  }
  return Raw(where, "repacked", features, get("edges"), labels, splits, undirected=True)


def _heterophilous(get: Callable[[str], Any], keys: list[str], where: str) -> Raw:
  splits = {n: get(f"{n}_masks") for n in _SPLITS.values() if f"{n}_masks" in keys}
  undirected = "directed" not in pathlib.Path(where).stem  # the authors tell it by the file name
  features, labels, edges = get("node_features"), get("node_labels"), get("edges").T
  return Raw(where, "heterophilous", features, edges, labels, splits, undirected=undirected)


def _gnn_benchmark(get: Callable[[str], Any], keys: list[str], where: str) -> Raw:
  del keys

  def matrix(name):
    data, indices, indptr, shape = (
      get(f"{name}_{x}") for x in ("data", "indices", "indptr", "shape")
    )
    return _csr(data, indices, indptr, shape, f"{where}, {name}")

  notes = _dropped_weights(get("adj_data"), f"{where}, adj_data")
  pairs = matrix("adj").tocoo()
  edges = np.stack([pairs.row, pairs.col])
  return Raw(where, "gnn_benchmark", matrix("attr"), edges, get("labels"), {}, notes=notes)


def _plain(get: Callable[[str], Any], keys: list[str], where: str) -> Raw:
  def first(*names: str) -> Any:
    return next((get(name) for name in names if name in keys), None)

  edges, labels = get("edge_index"), first("y", "node_label")
  if labels is None:
    raise ValueError(f"{where}: key 'y' (or 'node_label') is missing; found {keys}")
  weights = first("edge_weight", "edge_attr")
  notes = {} if weights is None else _dropped_weights(weights, f"{where}, weights of edges")
  splits = {name: get(f"{name}_mask") for name in _SPLITS.values() if f"{name}_mask" in keys}
  # PyTorch Geometric stores several splits as columns.
  splits = {n: x.T if x.ndim == 2 and len(x) == len(labels) else x for n, x in splits.items()}
  return Raw(where, "plain", first("x", "node_attr"), edges, labels, splits, notes=notes)


def _dropped_weights(weights: np.ndarray, where: str) -> dict[str, int | str]:
  """Returns the note on weights of edges, none if all are 1; raises `ValueError` for signs."""
  if weights.dtype.kind not in "biuf":
    raise ValueError(f"{where}: expected numbers, found {weights.dtype}")
  if weights.size and weights.min() < 0:
    raise ValueError(
      f"{where}: {int((weights < 0).sum())} edges have negative weights, such as {weights.min()}, "
      "but the encoders know no signs: leave those edges out, or save weights of 1"
    )
  different = int((weights[weights != 0] != 1).sum())
  return {"edge_weights_dropped": different} if different else {}


_NPZ = {
  "x_indptr": _repacked,
  "node_features": _heterophilous,
  "adj_indptr": _gnn_benchmark,
  "edge_index": _plain,
}


def _loaded(path: pathlib.Path) -> Any:
  try:
    return np.load(path, allow_pickle=False)
  except _READ_ERRORS as error:
    raise ValueError(
      f"{path} is missing, damaged or pickled ({error}); copy it again, or save arrays of numbers"
    ) from error


def _key(archive: Any, where: str, key: str) -> Any:
  if key not in archive.files:
    raise ValueError(f"{where}: key {key!r} is missing; found {archive.files}")
  try:
    return archive[key]
  except _READ_ERRORS as error:
    raise ValueError(
      f"{where}: {key} is damaged or holds pickled objects ({error}); save it as numbers"
    ) from error


def _csr(data: Any, indices: Any, indptr: Any, shape: Any, where: str) -> sparse.csr_array:
  try:
    parts = data.astype(np.float32), indices.astype(np.int64), indptr.astype(np.int64)
    matrix = sparse.csr_array(parts, shape=tuple(int(size) for size in shape))
    matrix.check_format(full_check=True)
  except (ValueError, TypeError) as error:
    raise ValueError(
      f"{where}_indptr, _indices and _data do not form a CSR matrix: {error}"
    ) from error
  matrix.sum_duplicates()
  matrix.eliminate_zeros()
  return matrix


# --- folders --------------------------------------------------------------------------------------


def _wikics(path: pathlib.Path) -> Raw:
  data, where = _json(path), str(path)
  features, labels = (_matrix(data, key, where) for key in ("features", "labels"))
  links = _field(data, "links", where)
  if not isinstance(links, list) or not all(isinstance(row, list) for row in links):
    raise ValueError(f"{where}: links must be a list of lists of nodes")
  if len(links) != len(features):
    raise ValueError(
      f"{where}: links list {len(links)} nodes, but features {len(features)}; copy the file again"
    )
  senders = np.repeat(np.arange(len(links)), [len(row) for row in links])
  edges = np.stack([senders, _integers(list(itertools.chain(*links)), f"{where}, links")])
  masks = {"train": "train_masks", "val": "val_masks", "stopping": "stopping_masks"}
  splits = {name: _matrix(data, key, where) for name, key in {**masks, "test": "test_mask"}.items()}
  return Raw(where, "wikics", features, edges, labels, splits)


def _ppi(folder: pathlib.Path) -> Raw:
  parts, num_nodes, num_graphs, undirected = [], 0, 0, True
  for split in _SPLITS:
    path = folder / f"{split}_graph.json"
    graph, where = _json(path), str(path)
    feats, labels, ids = (
      _loaded(folder / f"{split}_{x}.npy") for x in ("feats", "labels", "graph_id")
    )
    sizes = [len(_field(graph, "nodes", where)), len(feats), len(labels), len(ids)]
    if len(set(sizes)) > 1:
      raise ValueError(f"{where}: numbers of nodes, feats, labels and graph_id differ: {sizes}")
    try:
      pairs = [(link["source"], link["target"]) for link in _field(graph, "links", where)]
    except (TypeError, KeyError):
      raise ValueError(f"{where}: links must be objects with source and target") from None
    edges = _integers(pairs, f"{where}, links").reshape(-1, 2).T
    # Node numbers are shifted below, so one that is too large would name a node of the next file.
    if edges.size and (edges.min() < 0 or edges.max() >= sizes[0]):
      raise ValueError(f"{where}: links name nodes outside 0 to {sizes[0] - 1}")
    ids = np.unique(ids, return_inverse=True)[1]
    parts.append((feats, labels, ids + num_graphs, edges.T + num_nodes))
    num_nodes, num_graphs = num_nodes + sizes[0], num_graphs + ids.max(initial=-1) + 1
    undirected = undirected and not graph.get("directed", False)
  try:
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
  except ValueError as error:
    raise ValueError(f"{folder}: train, valid and test differ in width: {error}") from error
  features, labels, graph_ids, edges = columns
  counts = [len(part[0]) for part in parts]
  splits = {name: np.repeat(np.arange(3) == i, counts) for i, name in enumerate(_SPLITS.values())}
  return Raw(str(folder), "ppi", features, edges.T, labels, splits, graph_ids, undirected)


def _ogb(folder: pathlib.Path) -> Raw:
  counts = _csv(folder / "num-node-list.csv.gz", np.int64)
  if counts.size != 1:
    raise ValueError(f"{folder} holds {counts.size} graphs; give a set of one graph (ogbn-*)")
  num_nodes = int(counts[0, 0])
  features = _csv(folder / "node-feat.csv.gz", np.float32)
  if len(features) != num_nodes:
    raise ValueError(
      f"{folder}: node-feat has {len(features)} rows, num-node-list says {num_nodes}"
    )
  labels = _csv(folder / "node-label.csv.gz", np.float64)
  schemes = [path for path in (folder.parent / "split").glob("*") if path.is_dir()]
  if len(schemes) > 1:
    raise ValueError(f"{folder.parent / 'split'} holds {len(schemes)} ways to split; keep one")
  splits = {}
  for scheme, (stored, name) in itertools.product(schemes, _SPLITS.items()):
    path = scheme / f"{stored}.csv.gz"
    splits[name] = _mask(_csv(path, np.int64)[:, 0], num_nodes, str(path))
  edges = _csv(folder / "edge.csv.gz", np.int64).T
  return Raw(str(folder), "ogb", features, edges, labels, splits)


def _csv(path: pathlib.Path, dtype: Any) -> np.ndarray:
  try:
    return np.loadtxt(path, dtype=dtype, delimiter=",", ndmin=2)
  except _READ_ERRORS as error:
    raise ValueError(f"{path} is missing, damaged or not a table of numbers: {error}") from error


def _json(path: pathlib.Path) -> dict[str, Any]:
  try:
    data = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    raise ValueError(f"{path} is missing or not JSON: {error}") from error
  if not isinstance(data, dict):
    raise ValueError(f"{path}: expected an object {{...}}, found {type(data).__name__}")
  return data


def _field(data: dict[str, Any], key: str, where: str) -> Any:
  if key not in data:
    raise ValueError(f"{where}: key {key!r} is missing; found {sorted(data)}")
  return data[key]


def _matrix(data: dict[str, Any], key: str, where: str) -> np.ndarray:
  try:
    return np.asarray(_field(data, key, where))
  except ValueError as error:
    raise ValueError(f"{where}: {key} is not an array: {error}") from error


def _integers(values: Any, where: str) -> np.ndarray:
  try:
    array = np.asarray(values)
  except ValueError as error:
    raise ValueError(f"{where}: expected integers: {error}") from error
  if array.size and array.dtype.kind not in "iu":  # an empty list becomes an array of floats
    raise ValueError(f"{where}: expected integers, found {array.dtype}")
  return array.astype(np.int64)


def _mask(indices: np.ndarray, num_nodes: int, where: str) -> np.ndarray:
  indices = _integers(indices, where)
  if indices.size and (indices.min() < 0 or indices.max() >= num_nodes):
    raise ValueError(f"{where} names nodes outside 0 to {num_nodes - 1}")
  mask = np.zeros(num_nodes, bool)
  mask[indices] = True
  return mask
