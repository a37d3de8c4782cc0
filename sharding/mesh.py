"""Meshes of devices, and the start-up of a run that spans several hosts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from sharding import checks


def default_device() -> Any:
  """Returns the device of this process that programs run on unless told otherwise."""
  device: Any = jax.config.jax_default_device  # type: ignore[attr-defined]  # set at run time
  device = device or jax.local_devices()[0]
  return jax.devices(device)[0] if isinstance(device, str) else device


def make_mesh(
  axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """Returns a mesh over all devices with the named axes, in the order given.

  The axes are always of type Auto: the compiler splits the computation and adds the
  communication. `jax.make_mesh` alone gives Explicit axes, under which embedding gathers,
  scans that start from `jnp.zeros` and shuffles raise.

  Put the axis with the most communication (`tensor`) last: neighbours along it are then neighbours
  in the hardware.

  Args:
    axes: number of devices along each axis, e.g. `{"data": -1, "fsdp": 4, "tensor": 2}`. At
      most one size may be -1: that axis takes the remaining devices.
    devices: the devices to use; by default all devices of all hosts.

  Returns:
    A `jax.sharding.Mesh` of exactly these devices, ordered to suit the hardware's topology.

  Raises:
    ValueError: if a size is neither positive nor -1, two are -1, or the sizes do not multiply
      to the number of devices.

  Example:
    >>> mesh = make_mesh({"data": -1, "tensor": 1})
    >>> mesh.axis_names, mesh.shape["tensor"], mesh.size == jax.device_count()
    (('data', 'tensor'), 1, True)
    >>> make_mesh({"data": 3, "tensor": 1}, devices=jax.devices()[:1])
    Traceback (most recent call last):
    ...
    ValueError: axes {'data': 3, 'tensor': 1} need 3 devices, and there is 1: change the sizes, \
make one of them -1 to take what is left, or pass as many `devices`.
  """
  if not axes:
    raise ValueError('axes is empty: name at least one, e.g. {"data": -1}.')
  for name, size in axes.items():
    if not checks.is_integer(size) or (size < 1 and size != -1):
      raise ValueError(f"axes[{name!r}] is {size!r}: give a positive integer, or -1 for the rest.")
  free = [name for name, size in axes.items() if size == -1]
  if len(free) > 1:
    raise ValueError(f"axes {dict(axes)} leave {free} open: only one of them may be -1.")

  devices = jax.devices() if devices is None else list(devices)
  taken = math.prod(size for size in axes.values() if size != -1)
  there = f"there {'is' if len(devices) == 1 else 'are'} {len(devices)}"
  if free and (not devices or len(devices) % taken):
    raise ValueError(
      f"axes {dict(axes)} need a multiple of {taken} devices, and {there}: choose sizes whose "
      f"product divides {len(devices)}, or pass as many `devices`."
    )
  if not free and taken != len(devices):
    raise ValueError(
      f"axes {dict(axes)} need {taken} devices, and {there}: change the sizes, make one of them "
      "-1 to take what is left, or pass as many `devices`."
    )
  sizes = tuple(len(devices) // taken if size == -1 else size for size in axes.values())
  return jax.make_mesh(
    sizes, tuple(axes), axis_types=(jax.sharding.AxisType.Auto,) * len(sizes), devices=devices
  )


def initialize_multihost(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> int:
  """Connects the processes of one run, one per host; returns how many there are.

  Call it before the first JAX computation or device query. Without arguments JAX looks for a
  cluster that it knows (TPU pod, Slurm, Open MPI, Kubernetes). If it finds none, the run has one
  process, and the call does nothing. A second call does nothing either.

  Args:
    coordinator_address: "host:port" at which process 0 listens. It is needed only if JAX detects no
      cluster, together with the next two arguments.
    num_processes: how many processes take part.
    process_id: the number of this one, from 0.

  Returns:
    The number of processes.

  Raises:
    ValueError: if only some of the three arguments are known.
    RuntimeError: if JAX has already been used in this process.
  """
  if jax.distributed.is_initialized():
    return jax.process_count()
  try:
    jax.distributed.initialize(coordinator_address, num_processes, process_id)
  except ValueError as error:
    known = (coordinator_address, num_processes, process_id) != (None, None, None)
    # This is JAX's answer if it detects no cluster. An incomplete description is an error: without
    # it every host would train alone.
    if known or "coordinator_address" not in str(error):
      raise ValueError(
        f"cannot connect the processes ({error}): pass coordinator_address, num_processes and "
        f"process_id together; got {coordinator_address!r}, {num_processes!r}, {process_id!r}."
      ) from error
    return 1
  return jax.process_count()
