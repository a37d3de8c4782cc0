"""A request to stop, heard between two steps."""

import os
import signal
from typing import Any

import jax


class Listener:
  """Turns the first SIGTERM or SIGINT into a request to stop; a second one kills at once."""

  def __init__(self):
    self.received = 0  # the signal's number
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> "Listener":
    if jax.process_count() > 1:
      return self  # JAX's own service listens, so that all hosts stop at the same step
    try:
      for number in (signal.SIGTERM, signal.SIGINT):
        self._previous[number] = signal.signal(number, self._receive)
    except ValueError:  # not the main thread: whoever runs it decides when to stop
      pass
    return self

  def __exit__(self, *unused):
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _receive(self, number, frame):
    del frame
    self.received = number
    for other in (signal.SIGTERM, signal.SIGINT):
      signal.signal(other, signal.SIG_DFL)
    os.write(2, b"\nstopping after this step; once more kills at once\n")

  def stop(self, step: int) -> bool:
    """Whether to stop before this step; hosts of one run agree on the step."""
    if jax.process_count() > 1:
      from jax.experimental import multihost_utils

      if multihost_utils.reached_preemption_sync_point(step):
        self.received = self.received or signal.SIGTERM
        return True
      return False
    return bool(self.received)
