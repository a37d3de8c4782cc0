"""Shuffled batches of arrays in memory, resumable to the very example, on Grain."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np


def batches(
  arrays: Any,
  *,
  batch_size: int,
  seed: int,
  num_epochs: int | None = None,
  drop_remainder: bool = True,
  make: Callable[[Any, np.random.Generator], Any] | None = None,
) -> "Batches":
  """Returns an endless (or `num_epochs` long) iterator over shuffled batches.

  Every N consecutive examples are one epoch, in an order of its own that depends on `seed` and
  the epoch only. Epochs follow each other without a gap: where `batch_size` does not divide N, a
  batch holds the end of one and the beginning of the next, and no example is left out.

  Args:
    arrays: pytree (NamedTuple, dict, ...) of NumPy arrays with the same leading axis N; None
      fields stay None.
    batch_size: examples of a batch, at most N.
    seed: of the shuffles.
    num_epochs: None repeats for ever.
    drop_remainder: leaves out a last, smaller batch (there is one only with `num_epochs`).
    make: `make(examples, rng) -> batch`, called ahead of time by two threads; what its generator
      draws depends on `seed` and the number of the batch only.

  Raises:
    ValueError: leading axes differ, no examples, or `batch_size` outside 1..N.
  """
  named = jax.tree_util.tree_leaves_with_path(arrays)
  sizes = {
    jax.tree_util.keystr(path): np.shape(leaf)[0] if np.ndim(leaf) else None for path, leaf in named
  }
  if not sizes or None in sizes.values() or len(set(sizes.values())) > 1:
    raise ValueError(f"arrays need one leading axis of examples, the same for all; found {sizes}")
  num_examples = next(iter(sizes.values()))
  if not num_examples:
    raise ValueError("arrays hold no examples: the data set is empty")
  if not 1 <= batch_size <= num_examples:
    raise ValueError(
      f"batch_size is {batch_size} but there are {num_examples} examples; choose 1 to "
      f"{num_examples}, or supply more data"
    )
  if num_epochs is not None and num_epochs < 1:
    raise ValueError(f"num_epochs is {num_epochs}; choose 1 or more, or None for ever")
  # Both settings and data size fix the order: a saved position means nothing under others.
  order = {
    "num_examples": num_examples,
    "batch_size": batch_size,
    "seed": seed,
    "num_epochs": num_epochs,
    "drop_remainder": drop_remainder,
  }
  return Batches(arrays, order, make)


class Batches(Iterator[tuple[np.ndarray, Any]]):
  """Yields (ids `[B]` of the examples, batch with the structure of `arrays`); see `batches`."""

  def __init__(self, arrays: Any, order: dict[str, Any], make: Callable[..., Any] | None = None):
    import grain

    def read(ids, rng=None):
      examples = jax.tree.map(lambda leaf: np.asarray(leaf)[ids], arrays)
      return ids, examples if make is None else make(examples, rng)

    dataset = grain.MapDataset.source(range(order["num_examples"])).seed(order["seed"]).shuffle()
    dataset = dataset.repeat(order["num_epochs"])
    dataset = dataset.batch(order["batch_size"], drop_remainder=order["drop_remainder"])
    dataset = dataset.map(read) if make is None else dataset.random_map(read)
    # Rows alone are not worth a thread or a prefetch buffer.
    threads, ahead = (0, 0) if make is None else (2, 4)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    self._iterator = iter(dataset.to_iter_dataset(options))
    self._order = order

  def __next__(self) -> tuple[np.ndarray, Any]:
    return next(self._iterator)

  def get_state(self) -> dict[str, Any]:
    """Returns the position as a dict that JSON can hold."""
    return {**self._order, "position": self._iterator.get_state()}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to a position from `get_state`: the next batch is the one that came next there.

    Raises:
      ValueError: the state comes from data of another size or from other settings.
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
