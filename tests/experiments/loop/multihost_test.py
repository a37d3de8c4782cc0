"""Two processes of one run, started by the command line, against one process."""

import json
import os
import pathlib
import subprocess
import sys

import fake_paper
import pytest

from experiments import main

_ROOT = pathlib.Path(main.__file__).resolve().parent.parent


def _start(arguments, *, devices, process=None, job=0):
  """Starts a run, or one of its two processes, as Open MPI would do it."""
  environment = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(_ROOT), str(pathlib.Path(fake_paper.__file__).parent)]),
    # The last of two equal flags counts.
    "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
  }
  if process is not None:
    arguments = [*arguments, "--multihost"]
    environment |= {
      # JAX makes the port of the coordinator of this number.
      "OMPI_MCA_orte_hnp_uri": f"{job * 2**12}.0;tcp://127.0.0.1:1",
      "OMPI_COMM_WORLD_SIZE": "2",
      "OMPI_COMM_WORLD_RANK": str(process),
      "OMPI_COMM_WORLD_LOCAL_RANK": str(process),
    }
  command = [sys.executable, "-m", "experiments.main", *arguments]
  return subprocess.Popen(
    command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )


def _end(*processes):
  try:
    for process in processes:
      output, _ = process.communicate(timeout=240)
      assert process.returncode == 0, output[-3000:]
  finally:
    for process in processes:
      process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
  "arguments",
  [
    # The noise of the fake paper has the shape of the whole batch.
    [f"--config={fake_paper.__file__}", "--config.train.num_steps=4"],
    ["--config=rloo:tiny", "--config.train.num_steps=2", "--config.eval.num_prompts=8"],
    [
      "--config=byol:tiny",
      "--config.train.num_steps=2",
      "--config.data.num_images=100",
      "--config.train.batch_size=32",
      "--config.eval.probes=knn",
    ],
  ],
)
def test_two_processes_share_the_rows_and_give_the_numbers_of_one(tmp_path, arguments):
  one, two = tmp_path / "one", tmp_path / "two"
  _end(_start([*arguments, f"--workdir={one}"], devices=4))
  both = [*arguments, f"--workdir={two}"]
  job = os.getpid() % 4096
  _end(*(_start(both, devices=2, process=index, job=job) for index in range(2)))
  records = [
    [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for folder in (one, two)
  ]
  assert records[1]
  for found, wanted in zip(*reversed(records), strict=True):
    assert found.pop("ids", None) == wanted.pop("ids", None)
    del found["seconds" if found["kind"] == "train" else "kind"]
    # Sums over devices are in another order: float32 rounding, which differences of
    # log-probabilities enlarge.
    assert found == pytest.approx({name: wanted[name] for name in found}, rel=1e-3, abs=1e-5)
