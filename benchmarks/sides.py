"""Two libraries in two processes, asked in turn: while one works the other waits.

A benchmark makes a worker process for each side (`Side`), which answers commands (`serve`), and
compares what they computed before it compares their times.
"""

import json
import os
import pathlib
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping


def serve(make_commands: Callable[[], Mapping[str, Callable]]) -> None:
  """Answers each command on stdin with a JSON line on stdout: wall and CPU seconds, and result.

  The command `memory` is answered with the process's highest resident size so far, in MiB.
  """
  answers, sys.stdout = sys.stdout, sys.stderr  # a library that prints must not spoil the answers
  commands = dict(make_commands())
  commands["memory"] = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  print(json.dumps({"ready": True}), file=answers, flush=True)
  for line in sys.stdin:
    start, cpu_start = time.perf_counter(), time.process_time()
    result = commands[line.strip()]()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    print(json.dumps({"seconds": seconds, "cpu": cpu, "result": result}), file=answers, flush=True)


class Side:
  """A worker process of a benchmark that does one thing at a time, when asked.

  Args:
    script: the benchmark, which calls `serve` when started with these arguments.
    python: interpreter.
    *arguments: of the script.
    platform: "cpu", or "gpu" for whatever accelerator JAX finds.
  """

  def __init__(self, script: str, python: str, *arguments: str, platform: str = "cpu"):
    root = pathlib.Path(__file__).resolve().parent.parent
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    if platform == "cpu":
      environment["JAX_PLATFORMS"] = "cpu"
    environment["PYTHONPATH"] = os.pathsep.join(
      filter(None, [str(root), os.environ.get("PYTHONPATH")])
    )
    self.process = subprocess.Popen(
      [python, script, *arguments],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=environment,
    )
    self._read()

  def _read(self) -> dict:
    line = self.process.stdout.readline()
    if not line:
      raise SystemExit("a side of the benchmark died; its error is above")
    return json.loads(line)

  def ask(self, command: str) -> dict:
    """Returns the answer to a command, once it has been carried out."""
    self.process.stdin.write(command + "\n")
    self.process.stdin.flush()
    return self._read()

  def close(self) -> None:
    """Ends the process."""
    self.process.stdin.close()
    self.process.wait()
