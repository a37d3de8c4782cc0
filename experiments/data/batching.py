"""Shuffled batches of arrays in memory, with Grain; a saved position resumes at the same batch."""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from experiments.data import buckets


def batches(
  arrays: Any,
  *,
  batch_size: int,
  seed: int,
  num_epochs: int | None = None,
  drop_remainder: bool = True,
  make: Callable[[Any, np.random.Generator], Any] | None = None,
  length_buckets: int = 1,
) -> "Batches":
  """Returns an iterator over shuffled batches of N examples.

  Each epoch visits all examples in a new order, which depends only on `seed` and the number of the
  epoch. If `batch_size` does not divide N, a batch may hold the end of one epoch and the start of
  the next, so that no example is left out.

  Args:
    arrays: pytree (NamedTuple, dict, ...) of NumPy arrays with the same leading axis N; fields that
      are None stay None.
    batch_size: examples in a batch, at most N.
    seed: seed of the shuffles.
    num_epochs: number of epochs; None for an endless iterator.
    drop_remainder: whether to drop a last, smaller batch, which only occurs with `num_epochs`.
    make: `make(examples, rng) -> batch`, which two threads call ahead of time. The random numbers
      of `rng` depend only on `seed` and the number of the batch.
    length_buckets: above 1, batches hold rows of similar length and are cut to this many sets of
      widths (`buckets.Buckets`); for endless batches of a NamedTuple without `make`. An epoch then
      has whole batches only, and leaves out other rows each time if `batch_size` does not divide N.

  Raises:
    ValueError: the leading axes differ, there are no examples, `batch_size` lies outside 1..N, or
      there are no tokens whose length could be compared.
  """
  named = jax.tree_util.tree_leaves_with_path(arrays)
  sizes = {
    jax.tree_util.keystr(path): np.shape(leaf)[0] if np.ndim(leaf) else None for path, leaf in named
  }
  if not sizes or None in sizes.values() or len(set(sizes.values())) > 1:
    raise ValueError(f"all arrays must have the same leading axis of examples, found {sizes}")
  num_examples = next(iter(sizes.values()))
  if not num_examples:
    raise ValueError("arrays hold no examples; supply a data set that is not empty")
  if not 1 <= batch_size <= num_examples:
    raise ValueError(
      f"batch_size is {batch_size} but there are {num_examples} examples; choose 1 to "
      f"{num_examples}, or supply more data"
    )
  if num_epochs is not None and num_epochs < 1:
    raise ValueError(f"num_epochs is {num_epochs}; choose 1 or more, or None for endless batches")
  # These fix the order of the examples, so a saved position is valid only with equal ones.
  order = {
    "num_examples": num_examples,
    "batch_size": batch_size,
    "seed": seed,
    "num_epochs": num_epochs,
    "drop_remainder": drop_remainder,
  }
  if length_buckets == 1:
    return Batches(arrays, order, make)
  if make is not None or num_epochs is not None:
    raise ValueError(
      f"length_buckets={length_buckets} is for endless batches without `make`: set it to 1, or "
      "leave num_epochs and make out"
    )
  order["length_buckets"] = length_buckets
  return Batches(arrays, order, lengths=buckets.Buckets(arrays, length_buckets))


class Batches(Iterator[tuple[np.ndarray, Any]]):
  """Yields (ids `[B]` of the examples, batch); see `batches`."""

  def __init__(
    self,
    arrays: Any,
    order: dict[str, Any],
    make: Callable[..., Any] | None = None,
    lengths: buckets.Buckets | None = None,
  ):
    import grain

    self.padding: float | None = None  # its share in an epoch, where batches are cut

    def read(ids, rng=None):
      examples = jax.tree.map(lambda leaf: np.asarray(leaf)[ids], arrays)
      if lengths is not None:
        examples = lengths.cut(examples, ids)
      return ids, examples if make is None else make(examples, rng)

    dataset = grain.MapDataset.source(range(order["num_examples"])).seed(order["seed"]).shuffle()
    dataset = dataset.repeat(order["num_epochs"])
    if lengths is None:
      dataset = dataset.batch(order["batch_size"], drop_remainder=order["drop_remainder"])
    else:
      rows = _Rows(lengths, dataset, order)
      self.padding = lengths.padding(rows[i] for i in range(rows.per_epoch))
      dataset = grain.MapDataset.source(rows)
    dataset = dataset.map(read) if make is None else dataset.random_map(read)
    # Taking rows of arrays is fast; only `make` is worth threads and a prefetch buffer.
    threads, ahead = (0, 0) if make is None else (2, 4)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    self._iterator = iter(dataset.to_iter_dataset(options))
    self._order = order

  def __next__(self) -> tuple[np.ndarray, Any]:
    return next(self._iterator)

  def get_state(self) -> dict[str, Any]:
    """Returns the position as a dictionary of JSON values."""
    return {**self._order, "position": self._iterator.get_state()}

  def set_state(self, state: dict[str, Any]) -> None:
    """Returns to a position that `get_state` saved; the next batch is the one that came next then.

    Raises:
      ValueError: the position was saved with data of another size or with other settings.
    """
    differ = [name for name, value in self._order.items() if state.get(name, "absent") != value]
    if differ or "position" not in state:
      found = ", ".join(
        f"{name}: {state.get(name, 'absent')!r}, here {self._order[name]!r}" for name in differ
      )
      raise ValueError(
        f"the saved data position does not fit this data set ({found or 'no position'}); resume "
        "with the data and settings of the saved run"
      )
    self._iterator.set_state(state["position"])


class _Rows:
  """The rows of each batch, as a source of Grain: windows lie within epochs."""

  def __init__(self, lengths: buckets.Buckets, shuffled: Any, order: dict[str, Any]):
    self._lengths, self._shuffled, self._seed = lengths, shuffled, order["seed"]
    self._num_rows, self._batch_size = order["num_examples"], order["batch_size"]
    self.per_epoch = self._num_rows // self._batch_size
    self._window = functools.lru_cache(maxsize=2)(self._make_window)

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, number: int) -> np.ndarray:
    epoch, place = divmod(number, self.per_epoch)
    return self._window(epoch, place // buckets.WINDOW)[place % buckets.WINDOW]

  def _make_window(self, epoch: int, number: int) -> np.ndarray:
    first = number * buckets.WINDOW
    last = min(first + buckets.WINDOW, self.per_epoch)
    places = range(first * self._batch_size, last * self._batch_size)
    rows = np.array([self._shuffled[epoch * self._num_rows + i] for i in places])
    rng = np.random.default_rng((self._seed, epoch, number))
    return rng.permutation(self._lengths.sorted(rows).reshape(-1, self._batch_size))
