"""Meshes: sizes, axis types, and the errors of sizes that do not fit."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import pytest

import sharding


@pytest.mark.parametrize(
  ("axes", "sizes"),
  [
    ({"data": -1, "fsdp": 1, "tensor": 1}, (8, 1, 1)),
    ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 2)),
    ({"tensor": 8}, (8,)),
    ({"data": 8, "fsdp": -1}, (8, 1)),
  ],
)
def test_sizes_names_and_auto_axes(axes, sizes):
  mesh = sharding.make_mesh(axes)
  assert mesh.axis_names == tuple(axes)
  assert mesh.devices.shape == sizes
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
  assert set(mesh.devices.flat) == set(jax.devices())


def test_uses_exactly_the_devices_given():
  chosen = jax.devices()[2:6]
  mesh = sharding.make_mesh({"data": -1, "tensor": 2}, devices=chosen)
  assert set(mesh.devices.flat) == set(chosen)


@pytest.mark.parametrize(
  ("axes", "words"),
  [
    ({"data": 3}, ["need 3 devices", "there are 8", "-1"]),
    ({"data": 4}, ["need 4 devices", "there are 8", "-1"]),  # devices left over are an error too
    ({"data": -1, "tensor": 3}, ["multiple of 3", "there are 8", "divides 8"]),
    ({"data": -1, "tensor": 16}, ["multiple of 16", "there are 8"]),
    ({"data": -1, "fsdp": -1}, ["'data', 'fsdp'", "only one"]),
    ({"data": 0}, ["'data'", "0"]),
    ({"data": 2.0}, ["'data'", "2.0"]),
    ({}, ["empty"]),
  ],
)
def test_sizes_that_do_not_fit_raise(axes, words):
  with pytest.raises(ValueError) as error:
    sharding.make_mesh(axes)
  for word in words:
    assert word in str(error.value)


# What each of two processes runs, four devices in each: the global batch is both halves, and two
# steps of an update give the numbers of one process.
_PROCESS = """
import sys
import jax, jax.numpy as jnp, numpy as np
import sharding

port, process = sys.argv[1:]
assert sharding.initialize_multihost("127.0.0.1:" + port, 2, int(process)) == 2
assert sharding.initialize_multihost() == 2
mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
P = jax.sharding.PartitionSpec
rules = (("kernel", P("fsdp", "tensor")), (".*", P()))

def update(state, batch, key):
  noise = jax.random.normal(key, batch.shape)
  kernel = state["kernel"] + jnp.mean(batch + noise, axis=0)
  return {"kernel": kernel, "key": state["key"], "step": state["step"] + 1}, {"sum": kernel.sum()}

def init(key):
  return {"kernel": jax.random.normal(key, (4, 2)), "key": key, "step": 0}

rows = np.arange(16, dtype=np.float32).reshape(8, 2)
mine = rows[4 * int(process):][:4]
assert sharding.shard_batch(mine, mesh).shape == (8, 2)
np.testing.assert_array_equal(rows[sharding.local_rows(mesh, 8)], mine)
# All rows are placed as own rows are, also where processes hold the same rows or several parts.
for axes in ({"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 8}, {"tensor": 2, "data": 4}):
  other = sharding.make_mesh(axes)
  own = sharding.local_rows(other, 8)
  assert len(own) == (4 if "fsdp" in axes else 8)
  for batch in (
    sharding.shard_batch(rows, other, whole=True), sharding.shard_batch(rows[own], other)
  ):
    assert batch.shape == (8, 2)
    for shard in batch.addressable_shards:
      np.testing.assert_array_equal(shard.data, rows[shard.index])
try:
  sharding.shard_batch(mine[:3], mesh)
  raise AssertionError
except ValueError as error:
  assert "2 shards" in str(error), error

key = jax.random.key(0)
want = init(key)
for index in range(2):
  want, metrics = jax.jit(update)(want, rows, jax.random.fold_in(key, index))
for state in (sharding.init_sharded(init, mesh, rules, key), init(key)):
  step = sharding.jit_update(update, mesh, rules)
  for _ in range(2):
    state, got = step(state, mine, jax.random.fold_in(key, state["step"]))
  np.testing.assert_allclose(got["sum"], metrics["sum"], rtol=1e-6)
print("agrees")
"""


def _run(code, *arguments):
  environment = {
    **os.environ,
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    "PYTHONPATH": str(pathlib.Path(sharding.__file__).parent.parent),
  }
  command = [sys.executable, "-c", code, *arguments]
  return subprocess.Popen(
    command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )


def test_two_processes_equal_one():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = str(probe.getsockname()[1])
  processes = [_run(_PROCESS, port, str(index)) for index in range(2)]
  try:
    for process in processes:
      output, _ = process.communicate(timeout=120)
      assert process.returncode == 0 and "agrees" in output, output[-3000:]
  finally:
    for process in processes:
      process.kill()


def test_one_host_needs_no_start_up_and_half_a_description_raises():
  code = """
import sharding
assert sharding.initialize_multihost() == 1
try:
  sharding.initialize_multihost(num_processes=2)
  raise AssertionError("half a description passed")
except ValueError as error:
  assert "coordinator_address" in str(error)
print("fine")
"""
  output, _ = _run(code).communicate(timeout=60)
  assert "fine" in output, output[-3000:]
