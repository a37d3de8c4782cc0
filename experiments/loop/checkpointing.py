"""Checkpoints: a thin layer over Orbax that verifies every state it saves or restores.

The checkpoint of step s is the folder `<directory>/s`. It holds the state after s updates and a
JSON record: data position, key of the run, config, and dtype, shape and checksum of each leaf.
Orbax writes in the background into a temporary folder, which it renames at the end, so that a
killed save leaves no partial checkpoint.

This layer adds four rules. A state with a leaf that is not finite is not saved. Before a restore,
dtypes and shapes are compared, because Orbax casts silently. After it, checksums are compared. A
checkpoint that cannot be read is renamed, and the one before it is read. The last checkpoints and
the best one are kept.
"""

import os
import pathlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from experiments.loop import leaves


class CheckpointError(OSError):
  """A checkpoint cannot be written or read; the message gives the place, reason and remedy."""


class NotFiniteError(ArithmeticError):
  """The state was not saved because leaves hold NaN or Inf; `leaves` are their paths."""

  def __init__(self, leaves: list[str]):
    super().__init__(f"not finite: {', '.join(leaves[:3])}{' ...' if len(leaves) > 3 else ''}")
    self.leaves = leaves


class Restored(NamedTuple):
  """A checkpoint that was read.

  state: the state, on the mesh of the target.  step: updates it has seen.  record: its JSON record.
  """

  state: Any
  step: int
  record: dict[str, Any]


class _KeepBestAndLast:
  """Keeps the last `keep` checkpoints and the best one: a preservation policy of Orbax."""

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
      directory: the folder, which the first save creates.
      keep: number of last checkpoints that are kept, at least 1. The best one is kept as well.
      scores: maps step to headline metric. It is read whenever checkpoints are deleted, so the loop
        may add the score of a checkpoint after the save.
      maximise: whether a higher score is better.
      read_only: creates, moves and deletes nothing; for evaluation.

    Raises:
      ValueError: `keep` is below 1.
    """
    if keep < 1:
      raise ValueError(f"checkpoint.keep={keep}: keep at least 1, the last checkpoint")
    self._directory = pathlib.Path(directory).absolute()
    self._scores = {} if scores is None else scores
    self._keep, self._maximise, self._read_only = keep, maximise, read_only
    self._manager: Any = None
    self._writing = 0

  # --- steps --------------------------------------------------------------------------------------

  def steps(self) -> list[int]:
    """Returns the steps of all complete checkpoints in ascending order."""
    if not self._directory.is_dir():
      return []
    return sorted(int(entry.name) for entry in self._directory.iterdir() if entry.name.isdigit())

  def best_step(self, steps: list[int] | None = None) -> int | None:
    """Returns the step with the best score, the last one of equals; None without scores."""
    steps = self.steps() if steps is None else steps
    scored = [step for step in steps if step in self._scores]
    sign = 1 if self._maximise else -1
    return max(scored, key=lambda step: (sign * self._scores[step], step), default=None)

  # --- saving -----------------------------------------------------------------------------------

  def save(self, step: int, state: Any, record: Mapping[str, Any]) -> None:
    """Starts to write a checkpoint; returns once the state may be changed or donated.

    Args:
      step: updates that the state has seen, more than in every earlier checkpoint.
      state: pytree of arrays, all finite.
      record: JSON to save with the state.

    Raises:
      NotFiniteError: a leaf holds NaN or Inf; nothing is written.
      CheckpointError: this write failed, or the earlier one that ran in the background.
    """
    described = leaves.describe(state)
    bad = [path for path, leaf in described.items() if not leaf["finite"]]
    if bad:
      raise NotFiniteError(bad)
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      record=ocp.args.JsonSave({**record, "step": step, "leaves": described}),
    )
    self.wait()  # so that an error of the earlier write names the earlier step
    self._writing = step
    try:
      # For a step that is not after the last one, Orbax returns False and raises no error.
      if not self._open().save(step, args=args):
        raise ValueError(f"a checkpoint of step {step} or a later one exists already")
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
    """Waits for the write, then frees Orbax's threads; may be called twice."""
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
      target: pytree of `jax.ShapeDtypeStruct` with shardings. Its mesh may differ from the one that
        the state was saved from.

    Raises:
      ValueError: the saved leaves differ from the target in path, shape or dtype.
      CheckpointError: the files cannot be read, or a checksum differs.
    """
    record = self._read_record(step)
    saved = record["leaves"]
    self._check_leaves(step, saved, target)
    try:
      state = self._manager.restore(
        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
      )["state"]
      changed = _changed(state, saved)
    except Exception as error:
      raise self._read_error(step, error) from error
    if changed:
      raise self._read_error(step, ValueError(f"the checksum of {changed[0]} differs"))
    return Restored(state, step, record)

  def restore_parts(self, step: int, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Reads parts of a state, such as an encoder without what was trained beside it.

    Args:
      step: one of `steps()`.
      parts: by path, such as `params/encoder`: nested dictionaries of `jax.ShapeDtypeStruct` with
        shardings. A part is read as a whole: the checkpoint must have no other leaves below a path.

    Returns:
      The parts that were read, by path.

    Raises:
      ValueError, CheckpointError: as `restore`.
    """
    saved = {
      path: leaf
      for path, leaf in self._read_record(step)["leaves"].items()
      if any(path.startswith(f"{part}/") for part in parts)
    }
    target: dict[str, Any] = {}
    for part, tree in parts.items():
      _below(target, part.split("/")[:-1])[part.split("/")[-1]] = tree
    self._check_leaves(step, saved, target)
    try:
      with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        state = reader.restore(
          self._directory / str(step) / "state",
          args=ocp.args.PyTreeRestore(
            item=target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
          ),
        )
      changed = _changed(state, saved)
    except Exception as error:
      raise self._read_error(step, error) from error
    if changed:
      raise self._read_error(step, ValueError(f"the checksum of {changed[0]} differs"))
    return {part: _below(state, part.split("/")) for part in parts}

  def _read_record(self, step: int) -> dict[str, Any]:
    try:
      args = ocp.args.Composite(record=ocp.args.JsonRestore())
      record = self._open().restore(step, args=args)["record"]
      record["leaves"]  # absent where the file is damaged
    except Exception as error:
      raise self._read_error(step, error) from error
    return record

  def restore_last(self, target: Any) -> Restored | None:
    """Reads the last readable checkpoint; returns None if there is no checkpoint.

    A checkpoint that cannot be read is renamed to `<step>.unreadable` with a warning, and the one
    before it is read. The run then repeats the steps in between.

    Raises:
      ValueError: as `restore`.
      CheckpointError: there are checkpoints, but none can be read.
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
    self.close()  # an open manager of Orbax would still list the renamed folders
    for step in steps:
      source, number = self._directory / str(step), 0
      while (aside := self._directory / f"{step}.unreadable{number or ''}").exists():
        number += 1
      source.rename(aside)

  def _check_leaves(self, step: int, saved: Mapping[str, Any], target: Any) -> None:
    wanted = leaves.layout(target)
    for path in sorted(saved.keys() | wanted.keys()):
      old, new = saved.get(path), wanted.get(path)
      old = None if old is None else (old["dtype"], tuple(old["shape"]))
      if old != new:
        raise ValueError(
          f"checkpoint {step} in {self._directory} does not fit this experiment: leaf {path!r} is "
          f"{_words(old)} in the checkpoint and {_words(new)} here. Use the code and config that "
          "wrote it, or name a new --workdir."
        )

  def _read_error(self, step: int, error: Exception) -> CheckpointError:
    return CheckpointError(
      f"checkpoint {step} in {self._directory} cannot be read ({_reason(error)})."
    )


def _changed(state: Any, saved: Mapping[str, Any]) -> list[str]:
  """Returns the paths of the leaves whose checksum is not the saved one."""
  found = leaves.describe(state)
  return [path for path, leaf in found.items() if leaf["checksum"] != saved[path]["checksum"]]


def _below(tree: dict[str, Any], keys: Sequence[str]) -> Any:
  """Returns the subtree at the end of a path of keys; dictionaries that are absent are added."""
  for key in keys:
    tree = tree.setdefault(key, {})
  return tree


def _reason(error: Exception) -> str:
  """Returns one line that gives the reason of an error; TensorStore's messages are long."""
  text = str(error).strip() or type(error).__name__
  code = re.search(r"os_error_code='(\d+)'", text)
  return os.strerror(int(code.group(1))) if code else text.splitlines()[0][:300]


def _words(leaf: tuple[str, tuple[int, ...]] | None) -> str:
  return "absent" if leaf is None else f"{leaf[0]}{list(leaf[1])}"
