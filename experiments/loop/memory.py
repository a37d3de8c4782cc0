"""Memory of a run: what a step needs, what is free, the peak, and what malloc keeps."""

import ctypes
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

GIBIBYTE = 2**30


def available(devices: Any) -> int | None:
  """Returns the bytes that new arrays on `devices` can take; None if they are unknown.

  For accelerators this is the free memory of their allocators, summed over the devices. For CPUs it
  is the free memory of the host, or of the container if that is less.
  """
  free = [_free_on(device) for device in devices if device.platform != "cpu"]
  if free:
    known = [size for size in free if size is not None]
    return sum(known) if len(known) == len(free) else None
  found = [size for size in (_meminfo("MemAvailable"), _container()) if size is not None]
  return min(found, default=None)


def _free_on(device: Any) -> int | None:
  stats = device.memory_stats() or {}
  if "bytes_limit" not in stats:
    return None
  return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def of_step(program: Any, devices: Sequence[Any], levers: Sequence[str] = ()) -> str:
  """Describes the memory of a step before it runs, by the compiler's plan; "" where it has none.

  Args:
    program: a `jax.stages.Lowered`, from `sharding.jit_update(...).lower`.
    devices: those of this process.
    levers: settings of the run by which a step needs less.
  """
  stats: Any = program.compile().memory_analysis()
  if stats is None:
    return ""
  state = stats.alias_size_in_bytes  # of the arguments, the one that the step reuses
  batch = stats.argument_size_in_bytes - state
  others = stats.temp_size_in_bytes + stats.output_size_in_bytes - state
  each = "" if len(devices) == 1 else " on each device"
  words = (
    f"memory of a step{each}: {_size(state)} for the state, {_size(batch)} for the batch, "
    f"{_size(others)} while it runs"
  )
  if devices[0].platform == "cpu":
    free, where, needed = available(devices), "on this host", others * len(devices)
  else:  # the fullest device decides
    known = [_free_on(device) for device in devices]
    free, where, needed = min((x for x in known if x is not None), default=None), "there", others
  if free is None:
    return words
  words += f" ({_size(free)} free {where})"
  if needed > free:
    words += ". It may not fit" + (f": change {', '.join(levers)}" if levers else "")
  return words


def _size(num_bytes: int) -> str:
  if num_bytes < GIBIBYTE / 10:
    return f"{num_bytes / 2**20:.1f} MiB"
  return f"{num_bytes / GIBIBYTE:.2f} GiB"


def reset_peak() -> None:
  """Sets `peak` back to the present use; does nothing where the system forbids it."""
  try:
    pathlib.Path("/proc/self/clear_refs").write_text("5")
  except OSError:
    return


def peak() -> int | None:
  """Returns the peak resident memory of this process in bytes; None outside Linux."""
  return _field(pathlib.Path("/proc/self/status"), "VmHWM")


def keep_freed(*, all_of_it: bool = False) -> None:
  """Makes glibc's malloc keep freed memory for the next step; does nothing with another malloc.

  The temporaries of a step are single blocks of hundreds of megabytes. By default glibc returns
  them to the system after each step and requests them again, which costs BGRL 60,000 page faults a
  step. The price is fragmentation: allocations between two steps split the blocks that were kept,
  so that the process can hold up to three times the memory of one step.

  Args:
    all_of_it: whether to keep free memory beyond 2 GiB too. Blocks of a gigabyte reach that limit
      soon. Set it only where three times the memory of a step is available.
  """
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
  if mallopt is not None:
    # M_MMAP_MAX, M_TRIM_THRESHOLD and M_ARENA_MAX: the arenas of other threads return memory.
    for option, value in ((-4, 0), (-1, -1 if all_of_it else 2**31 - 1), (-8, 1)):
      mallopt(option, value)


def _meminfo(name: str) -> int | None:
  return _field(pathlib.Path("/proc/meminfo"), name)


def _field(path: pathlib.Path, name: str) -> int | None:
  """Returns the bytes of a line `name:  123 kB` in a file of the Linux kernel, or None."""
  try:
    lines = path.read_text().splitlines()
  except OSError:
    return None
  values = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
  return 1024 * int(values[0]) if values else None


def _container(
  group: pathlib.Path | None = None, root: pathlib.Path = pathlib.Path("/sys/fs/cgroup")
) -> int | None:
  """Returns the bytes that the control groups of this process leave free; None without a limit."""
  if group is None:
    try:
      lines = pathlib.Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
      return None
    paths = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    group = root.joinpath(*paths)  # the job of a cluster; inside a container it is the root
  around = [folder for folder in (group, *group.parents) if folder.is_relative_to(root)]
  free = [size for size in map(_left_by_group, around) if size is not None]
  return min(free, default=None)


def _left_by_group(folder: pathlib.Path) -> int | None:
  try:
    limit, used, stat = (
      (folder / f"memory.{name}").read_text() for name in ("max", "current", "stat")
    )
  except OSError:
    return None
  # The kernel counts cached files as used, but drops inactive ones when memory is needed.
  idle = next(
    (line.split()[1] for line in stat.splitlines() if line.startswith("inactive_file")), 0
  )
  return None if limit.strip() == "max" else max(0, int(limit) - int(used) + int(idle))
