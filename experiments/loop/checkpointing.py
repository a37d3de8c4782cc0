"""Checkpoints: a thin layer on Orbax that trusts nothing it has not verified.

A checkpoint of step s is the folder `<directory>/s`: the state after s updates, and a JSON record
(data position, run key, config, and for each leaf its dtype, shape and checksum). Orbax writes in
the background, into a temporary folder that it renames at the end: a killed save leaves no
half checkpoint. What this layer adds: leaves must be finite to be saved; dtypes and shapes are
compared before a restore (Orbax casts silently) and checksums after it; an unreadable
checkpoint is put aside for the one before; the best and the last ones are kept.
"""

import os
import pathlib
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

import sharding


class CheckpointError(OSError):
  """A checkpoint could not be written or read; the message says where, why and what to do."""


class NotFiniteError(ArithmeticError):
  """A leaf of the state holds NaN or Inf, so it was not saved; `leaves` are their paths."""

  def __init__(self, leaves: list[str]):
    super().__init__(f"not finite: {', '.join(leaves[:3])}{' ...' if len(leaves) > 3 else ''}")
    self.leaves = leaves


class Restored(NamedTuple):
  """state: on the mesh asked for. step: updates it has seen. record: the saved JSON."""

  state: Any
  step: int
  record: dict[str, Any]


class _KeepBestAndLast:
  """Orbax preservation policy: the last `keep` checkpoints and the best one."""

  def __init__(self, keep: int, best: Callable[[list[int]], int | None]):
    self._keep, self._best = keep, best

  def should_preserve(self, checkpoints, *, context):
    del context
    steps = [info.step for info in checkpoints]
    kept = {*steps[-self._keep :], self._best(steps)}
    return [step in kept for step in steps]


class Checkpointer:
  """Saves and restores the states of one run."""

  def __init__(
    self,
    directory: pathlib.Path,
    *,
    keep: int = 1,
    scores: Mapping[int, float] | None = None,
    maximise: bool = True,
    read_only: bool = False,
  ):
    """Opens a folder of checkpoints.

    Args:
      directory: made on the first save.
      keep: how many of the last checkpoints stay, at least 1; the best stays as well.
      scores: step to headline metric, read whenever something is to be deleted: the loop may add
        the score of a checkpoint after it was saved.
      maximise: whether a higher score is better.
      read_only: for evaluation: nothing is created, moved or deleted.

    Raises:
      ValueError: if `keep` is below 1.
    """
    if keep < 1:
      raise ValueError(f"checkpoint.keep={keep}: at least the last checkpoint must stay")
    self._directory = pathlib.Path(directory).absolute()
    self._scores = {} if scores is None else scores
    self._keep, self._maximise, self._read_only = keep, maximise, read_only
    self._manager: Any = None
    self._writing = 0

  # --- what there is ----------------------------------------------------------------------------

  def steps(self) -> list[int]:
    """Returns the steps of all complete checkpoints, ascending; half-written ones are not seen."""
    if not self._directory.is_dir():
      return []
    return sorted(int(entry.name) for entry in self._directory.iterdir() if entry.name.isdigit())

  def best_step(self, steps: list[int] | None = None) -> int | None:
    """Returns the step with the best score (the later one of equals); None if none has one."""
    steps = self.steps() if steps is None else steps
    scored = [step for step in steps if step in self._scores]
    sign = 1 if self._maximise else -1
    return max(scored, key=lambda step: (sign * self._scores[step], step), default=None)

  # --- saving -----------------------------------------------------------------------------------

  def save(self, step: int, state: Any, record: Mapping[str, Any]) -> None:
    """Starts to write a checkpoint; returns once the state may be changed or donated.

    Args:
      step: updates that the state has seen; above every earlier checkpoint's.
      state: pytree of arrays, all finite.
      record: JSON saved beside it.

    Raises:
      NotFiniteError: if a leaf holds NaN or Inf; nothing is written.
      CheckpointError: if this write, or the one before in the background, failed.
    """
    leaves = _describe(state)
    bad = [path for path, leaf in leaves.items() if not leaf["finite"]]
    if bad:
      raise NotFiniteError(bad)
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      record=ocp.args.JsonSave({**record, "step": step, "leaves": leaves}),
    )
    self.wait()  # an error of the write before belongs to its own step
    self._writing = step
    try:
      # Orbax answers False, without an error, for a step that is not newer than the last.
      if not self._open().save(step, args=args):
        raise ValueError(f"a checkpoint of step {step} or later exists already")
    except Exception as error:
      raise self._write_error(error) from error

  def wait(self) -> None:
    """Waits for the write in the background; raises `CheckpointError` if it failed."""
    if self._manager is None:
      return
    try:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    except Exception as error:
      raise self._write_error(error) from error

  def close(self) -> None:
    """Waits, then frees Orbax's threads; safe to call twice."""
    manager, self._manager = self._manager, None
    if manager is not None:
      try:
        manager.close()
      except Exception as error:
        raise self._write_error(error) from error

  def _open(self):
    if self._manager is None:
      self._manager = ocp.CheckpointManager(
        self._directory,
        options=ocp.CheckpointManagerOptions(
          preservation_policy=_KeepBestAndLast(self._keep, self.best_step),
          create=not self._read_only,
          save_root_metadata=False,
          save_decision_policy=checkpoint_managers.FixedIntervalPolicy(1),
        ),
        item_names=("state", "record"),
      )
    return self._manager

  def _write_error(self, error: Exception) -> CheckpointError:
    where = f"the checkpoint of step {self._writing} in {self._directory}"
    return CheckpointError(
      f"cannot write {where}: {_reason(error)}. Earlier checkpoints are untouched. "
      "Free some space or make the folder writable, then run the same command to continue."
    )

  # --- restoring --------------------------------------------------------------------------------

  def restore(self, step: int, target: Any) -> Restored:
    """Reads one checkpoint.

    Args:
      step: one of `steps()`.
      target: pytree of `jax.ShapeDtypeStruct` with shardings: it decides the mesh, which need
        not be the one that the state was saved from.

    Raises:
      ValueError: if the saved leaves differ from the target in path, shape or dtype.
      CheckpointError: if the files cannot be read or are not what was written.
    """
    try:
      record = self._open().restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))[
        "record"
      ]
      saved = record["leaves"]
    except Exception as error:
      raise self._read_error(step, error) from error
    self._check_leaves(step, saved, target)
    try:
      state = self._manager.restore(
        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
      )["state"]
      changed = [
        path
        for path, leaf in _describe(state).items()
        if leaf["checksum"] != saved[path]["checksum"]
      ]
    except Exception as error:
      raise self._read_error(step, error) from error
    if changed:
      raise self._read_error(step, ValueError(f"{changed[0]} is not what was saved (checksum)"))
    return Restored(state, step, record)

  def restore_last(self, target: Any) -> Restored | None:
    """Reads the last readable checkpoint; None where there is no checkpoint at all.

    An unreadable one is renamed to `<step>.unreadable`, with a warning, and the one before it
    is tried: the run repeats the steps in between and then writes its own.

    Raises:
      ValueError: as `restore`.
      CheckpointError: if there are checkpoints and none can be read.
    """
    errors = []
    for step in reversed(self.steps()):
      try:
        restored = self.restore(step, target)
      except CheckpointError as error:
        errors.append(error)
        continue
      self._put_aside([other for other in self.steps() if other > step])
      for unreadable in errors:
        warnings.warn(f"{unreadable} Continuing from step {step} instead.", stacklevel=2)
      return restored
    if errors:
      raise CheckpointError(
        f"{errors[0]} No earlier checkpoint in {self._directory} can be read either: restore the "
        "folder from a backup, or start again in a new --workdir."
      )
    return None

  def _put_aside(self, steps: list[int]) -> None:
    if self._read_only or not steps or jax.process_index():
      return
    self.close()  # Orbax would go on counting them as checkpoints
    for step in steps:
      source, number = self._directory / str(step), 0
      while (aside := self._directory / f"{step}.unreadable{number or ''}").exists():
        number += 1
      source.rename(aside)

  def _check_leaves(self, step: int, saved: Mapping[str, Any], target: Any) -> None:
    wanted = _layout(target)
    for path in sorted(saved.keys() | wanted.keys()):
      old, new = saved.get(path), wanted.get(path)
      old = None if old is None else (old["dtype"], tuple(old["shape"]))
      if old != new:
        raise ValueError(
          f"checkpoint {step} in {self._directory} does not fit this experiment: leaf {path!r} is "
          f"{_words(old)} in the checkpoint and {_words(new)} here. Use the code and config that "
          "wrote it, or a new --workdir."
        )

  def _read_error(self, step: int, error: Exception) -> CheckpointError:
    return CheckpointError(
      f"checkpoint {step} in {self._directory} cannot be read ({_reason(error)})."
    )


def _reason(error: Exception) -> str:
  """Returns the one line of an error that a person needs; TensorStore nests file names."""
  text = str(error).strip() or type(error).__name__
  code = re.search(r"os_error_code='(\d+)'", text)
  return os.strerror(int(code.group(1))) if code else text.splitlines()[0][:300]


def _words(leaf: tuple[str, tuple[int, ...]] | None) -> str:
  return "absent" if leaf is None else f"{leaf[0]}{list(leaf[1])}"


def _layout(tree: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
  paths, leaves = sharding.tree_paths(tree), jax.tree.leaves(tree)
  return {
    path: (str(leaf.dtype), tuple(leaf.shape)) for path, leaf in zip(paths, leaves, strict=True)
  }


def _describe(state: Any) -> dict[str, dict[str, Any]]:
  """Returns dtype, shape, checksum and finiteness of each leaf by path."""
  checks = jax.device_get(_inspect(jax.tree.leaves(state)))
  return {
    path: {
      "dtype": dtype,
      "shape": list(shape),
      "checksum": int(checksum),
      "finite": bool(finite),
    }
    for (path, (dtype, shape)), (checksum, finite) in zip(
      _layout(state).items(), checks, strict=True
    )
  }


@jax.jit
def _inspect(leaves: list[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
  """Returns (checksum, all finite) of each leaf.

  The checksum is the sum of the leaf's bits as unsigned integers, modulo 2^32: the same for every
  sharding, since integer addition is exact in any order.
  """
  return [(_checksum(leaf), _is_finite(leaf)) for leaf in leaves]


def _is_finite(leaf: jax.Array) -> jax.Array:
  if jnp.issubdtype(leaf.dtype, jnp.inexact):
    return jnp.isfinite(leaf).all()
  return jnp.array(True)


def _checksum(leaf: jax.Array) -> jax.Array:
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
    return _checksum(leaf.real) + 3 * _checksum(leaf.imag)
  if leaf.dtype == jnp.bool_:
    leaf = leaf.astype(jnp.uint8)
  size = np.dtype(leaf.dtype).itemsize
  unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32)  # 8 bytes become two words
  bits = jax.lax.bitcast_convert_type(leaf, unsigned)
  return jnp.sum(bits, dtype=jnp.uint32)
