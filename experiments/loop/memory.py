"""How much memory there is, how much a run has needed, and whether malloc keeps what is freed."""

import ctypes
import pathlib
import sys
from typing import Any

GIBIBYTE = 2**30


def available(devices: Any) -> int | None:
  """Returns the bytes that arrays on these devices can still take, or None where nothing says it.

  Of accelerators what their allocators may hand out together; of CPUs the free memory of the host,
  or of the container if that is less.
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


def reset_peak() -> None:
  """Begins `peak` anew; where the system forbids it, that of the process goes on."""
  try:
    pathlib.Path("/proc/self/clear_refs").write_text("5")
  except OSError:
    return


def peak() -> int | None:
  """Returns the largest resident memory of this process in bytes, or None where none is told."""
  return _field(pathlib.Path("/proc/self/status"), "VmHWM")


def keep_freed(*, all_of_it: bool = False) -> None:
  """Lets malloc keep what a step frees for the next step; does nothing without glibc.

  A step's temporaries are hundreds of megabytes in one piece, which glibc hands back to the system
  and gets anew: 60,000 page faults a step of BGRL. Kept pieces are cut into by what is allocated
  between two steps, so that up to three of them can lie side by side.

  Args:
    all_of_it: also where 2 GiB and more are free, which pieces of a gigabyte soon are; for those
      who know that three times what they need is there.
  """
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
  if mallopt is not None:
    # M_MMAP_MAX, M_TRIM_THRESHOLD and M_ARENA_MAX, since the arenas of threads return memory.
    for option, value in ((-4, 0), (-1, -1 if all_of_it else 2**31 - 1), (-8, 1)):
      mallopt(option, value)


def _meminfo(name: str) -> int | None:
  return _field(pathlib.Path("/proc/meminfo"), name)


def _field(path: pathlib.Path, name: str) -> int | None:
  """Reads `name:  123 kB` of a file of the Linux kernel."""
  try:
    lines = path.read_text().splitlines()
  except OSError:
    return None
  values = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
  return 1024 * int(values[0]) if values else None


def _container(
  group: pathlib.Path | None = None, root: pathlib.Path = pathlib.Path("/sys/fs/cgroup")
) -> int | None:
  """What the control group of this process and those around it leave free; None without a limit."""
  if group is None:
    try:
      lines = pathlib.Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
      return None
    paths = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    group = root.joinpath(*paths)  # as a job of a cluster has one; a container sees its own as root
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
  # Files that were read and lie idle count as used, until someone needs their place.
  idle = next(
    (line.split()[1] for line in stat.splitlines() if line.startswith("inactive_file")), 0
  )
  return None if limit.strip() == "max" else max(0, int(limit) - int(used) + int(idle))
