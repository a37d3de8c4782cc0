"""Tests of loop.interruption in a separate process."""

import pathlib
import signal
import subprocess
import sys

from experiments.loop import interruption


def test_the_first_signal_asks_and_the_second_kills():
  script = """
import os, signal, time
from experiments.loop import interruption
with interruption.Listener() as signals:
  assert not signals.stop(0)
  os.kill(os.getpid(), signal.SIGINT)
  print(signals.received, signals.stop(1), flush=True)
  os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(10)
"""
  done = subprocess.run(
    [sys.executable, "-c", script],
    capture_output=True,
    text=True,
    timeout=60,
    cwd=pathlib.Path(interruption.__file__).resolve().parent.parent,
  )
  assert done.stdout.split() == [str(int(signal.SIGINT)), "True"], done.stderr
  assert done.returncode == -signal.SIGTERM
  assert "a second signal kills at once" in done.stderr
