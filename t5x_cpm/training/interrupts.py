"""Signals that ask a run to stop, noted until the loop can stop between two steps."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from jax.experimental import multihost_utils


class Interrupted:
  """Notes SIGTERM and SIGINT, so that the loop can stop between two steps with its state saved.

  Of several processes only one may be signalled, but all must stop at the same step. JAX makes them agree on the step, but it
  reacts to SIGTERM only, with a handler of its own.
  """

  def __init__(self, several: bool) -> None:
    self._signal, self._several = '', several

  def _note(self, number: int, frame: Any) -> None:
    if self._signal and number == signal.SIGINT:
      raise KeyboardInterrupt  # asked twice: now
    self._signal = signal.Signals(number).name
    if self._several:
      os.kill(os.getpid(), signal.SIGTERM)

  def before(self, step: int) -> str:
    """The name of a signal, if all processes are to stop before this step; '' otherwise. Call it before each step."""
    if self._several:
      return 'SIGTERM' if multihost_utils.reached_preemption_sync_point(step) else ''
    return self._signal

  @contextlib.contextmanager
  def noting(self) -> Iterator[None]:
    """Within the block signals are noted; afterwards they do what they did before."""
    if threading.current_thread() is not threading.main_thread():
      yield  # Python delivers signals to the main thread only
      return
    numbers = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, self._note) for number in numbers}
    try:
      yield
    finally:
      for number, handler in previous.items():
        signal.signal(number, handler)
