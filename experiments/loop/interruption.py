"""Signals that ask a run to stop between two steps."""

import os
import signal
from typing import Any

import jax


class Listener:
  """A context in which the first SIGTERM or SIGINT requests a stop; a second one kills at once.

  Attributes:
    received: the number of the signal; 0 before one arrives.
  """

  def __init__(self):
    self.received = 0
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> "Listener":
    if jax.process_count() > 1:
      return self  # JAX's preemption service listens, so that all hosts stop at the same step
    try:
      for number in (signal.SIGTERM, signal.SIGINT):
        self._previous[number] = signal.signal(number, self._receive)
    except ValueError:  # only the main thread may set handlers; elsewhere the caller stops the run
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
    os.write(2, b"\nstopping after this step; a second signal kills at once\n")

  def stop(self, step: int) -> bool:
    """Returns whether to stop before `step`; the hosts of a run agree on the step."""
    if jax.process_count() > 1:
      from jax.experimental import multihost_utils

      if multihost_utils.reached_preemption_sync_point(step):
        self.received = self.received or signal.SIGTERM
        return True
      return False
    return bool(self.received)
