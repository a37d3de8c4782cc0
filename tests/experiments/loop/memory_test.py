"""What memory is free, how much a run has needed, and what malloc keeps."""

import ctypes
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from experiments.loop import memory


def test_what_is_free_is_the_least_that_the_host_and_its_container_leave(monkeypatch):
  cpu = [types.SimpleNamespace(platform="cpu")]
  for host, container, found in ((50, 60, 50), (50, 40, 40), (None, 40, 40), (None, None, None)):
    monkeypatch.setattr(memory, "_meminfo", lambda name, host=host: host)
    monkeypatch.setattr(memory, "_container", lambda container=container: container)
    assert memory.available(cpu) == found


def test_what_is_free_on_accelerators_is_what_their_allocators_have_left():
  def device(stats):
    return types.SimpleNamespace(platform="gpu", memory_stats=lambda: stats)

  known = device({"bytes_limit": 100, "bytes_in_use": 30})
  assert memory.available([known, device({"bytes_limit": 50})]) == 70 + 50
  assert memory.available([known, device(None)]) is None  # nothing is known of one of them


def test_the_memory_of_a_step_counts_each_array_once(monkeypatch):
  """A donated state of 4 MiB, a batch of 1 MiB, and 64 products for each of its numbers."""
  step = jax.jit(
    lambda state, batch: (state + jnp.sort(batch[:, None] * state[:64], axis=0).sum(), batch[0]),
    donate_argnums=0,
  )
  program = step.lower(jnp.zeros(2**20), jnp.zeros(2**18))
  want = "memory of a step: 4.0 MiB for the state, 1.0 MiB for the batch, 64.0 MiB while it runs"
  monkeypatch.setattr(memory, "available", lambda devices: 2**30)
  cpu = [types.SimpleNamespace(platform="cpu")]
  assert memory.of_step(program, cpu) == f"{want} (1.00 GiB free on this host)"
  monkeypatch.setattr(memory, "available", lambda devices: 2**25)
  assert memory.of_step(program, cpu) == f"{want} (32.0 MiB free on this host). It may not fit"
  found = memory.of_step(program, cpu, ["train.batch_size", "network.remat"])
  assert found.endswith("It may not fit: change train.batch_size, network.remat")
  monkeypatch.setattr(memory, "available", lambda devices: None)
  assert memory.of_step(program, cpu) == want


def test_the_fullest_accelerator_decides_whether_a_step_fits():
  def device(free):
    stats = {"bytes_limit": 2**40, "bytes_in_use": 2**40 - free}
    return types.SimpleNamespace(platform="gpu", memory_stats=lambda: stats)

  program = jax.jit(lambda x: jnp.sort(x[:, None] * x[:64], axis=0).sum()).lower(jnp.zeros(2**18))
  words = memory.of_step(program, [device(2**35), device(2**25)])
  assert "memory of a step on each device: " in words and "(32.0 MiB free there). It may" in words


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_counts_what_was_touched_since_it_was_reset():
  code = """if True:
    import mmap
    from experiments.loop import memory
    def touch(size):
      with mmap.mmap(-1, size) as block:  # the system gets it back at once
        block.write(b"1" * size)
    start = memory.peak()
    touch(2**27)
    high = memory.peak()
    memory.reset_peak()
    low = memory.peak()
    touch(2**26)
    print(high - start, low - start, memory.peak() - start)
  """
  process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  high, low, again = (int(part) / 2**20 for part in process.stdout.split())
  # A block of 128 MiB and the bytes written into it. The interpreter may take a few more, and the
  # kernel counts in batches of pages.
  assert 246 < high < 266
  if low >= high:
    pytest.skip("this system forbids to reset the peak")
  assert low < 10 and 118 < again < 138


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_free_memory_of_the_host_is_in_bytes():
  page = os.sysconf("SC_PAGE_SIZE")
  # What nobody uses is available, and caches that can be dropped; half for what others take now.
  least, most = os.sysconf("SC_AVPHYS_PAGES") * page / 2, os.sysconf("SC_PHYS_PAGES") * page
  assert least < memory._meminfo("MemAvailable") < most


def test_a_control_group_and_those_around_it_say_what_is_free(tmp_path):
  def limit(folder, most):
    folder.mkdir(exist_ok=True)
    for name, text in (
      ("max", most),
      ("current", "7000"),
      ("stat", "anon 900\ninactive_file 5000"),  # files that lie idle leave memory free
    ):
      (folder / f"memory.{name}").write_text(text + "\n")
    return folder

  group = limit(tmp_path / "job", "8000")
  assert memory._container(group, tmp_path) == 6000  # the root has no files
  limit(tmp_path, "7500")
  assert memory._container(group, tmp_path) == 5500
  limit(tmp_path, "max")
  limit(group, "max")
  assert memory._container(group, tmp_path) is None


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_freed_memory_is_kept_for_the_next_step():
  code = """if True:
    import ctypes, resource, sys
    from experiments.loop import memory
    memory.keep_freed(all_of_it="all" in sys.argv)
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    faults = []
    for _ in range(3):
      block = libc.malloc(2**26)
      ctypes.memset(block, 1, 2**26)
      libc.free(block)
      faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    print(faults[2] - faults[1])
  """
  for argument in ("", "all"):
    process = subprocess.run(
      [sys.executable, "-c", code, argument], capture_output=True, text=True, check=True
    )
    assert int(process.stdout) < 2**26 / 4096 / 10
