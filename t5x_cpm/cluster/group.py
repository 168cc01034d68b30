"""The processes of one run, as one of them sees them.

JAX's collectives wait forever for a process that hangs, and its own service aborts without a name or waits for minutes. So
each process keeps a connection to process 0, over which both send a message every second. Process 0 (`hub`) sees who never
came, who died (the connection ends), who is frozen (nothing is heard) and who hangs (the others go on without it). It tells
the others (`spoke`), and all stop at once: the run can continue from its last checkpoint. In every process a thread, its
watch, does this beside the work.
"""

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from t5x_cpm.cluster.connection import BEAT
from t5x_cpm.config import ConfigError, ProcessesConfig

LOST = 3  # exit code of a process that stops because of another one


class ProcessError(ConfigError):
  """The processes of a run do not come together. The message says which ones, and what to do."""


class Group:
  """The processes of a run. A process alone is a group too, without a watch."""

  def __init__(self, count: int = 1, index: int = 0, config: ProcessesConfig | None = None):
    """Makes the group of a process.

    Args:
      count: how many processes there are.
      index: which of them this one is.
      config: how long to wait, and for what.
    """
    self.count, self.index, self.config = count, index, config or ProcessesConfig()
    self.listens_at: str | None = None  # in process 0 of several: host:port where it lets the others in
    self._progress, self._doing = 0, 'the start'
    self._done = threading.Event()
    self._watch_thread: threading.Thread | None = None
    self._failure = ''

  @property
  def first(self) -> bool:
    """Whether this is the process that prints and writes."""
    return self.index == 0

  def at(self, what: str) -> None:
    """Notes that this process begins something, such as a step, that all processes do in the same order."""
    self._progress, self._doing = self._progress + 1, what

  def fail(self, reason: str) -> None:
    """Tells the others that this process ends, and why; returns once that has been sent."""
    if self._watch_thread is not None:
      self._failure = reason.split('\n')[0] or 'an error'
      self._watch_thread.join(3 * BEAT)

  def close(self) -> None:
    """Says that this process has done its share, and returns once all have."""
    self._done.set()
    if self._watch_thread is not None:
      self._watch_thread.join()

  def _status(self) -> dict[str, Any]:
    """What this process tells process 0 about itself at every beat."""
    status: dict[str, Any] = {'progress': self._progress, 'doing': self._doing, 'done': self._done.is_set()}
    return status | ({'failed': self._failure} if self._failure else {})

  def _start_watch(self, watch: Callable[[], None]) -> None:
    self._watch_thread = threading.Thread(target=watch, name='watch', daemon=True)
    self._watch_thread.start()


def stop(reason: str) -> None:
  """Ends this process at once: its main thread may be inside a collective that never returns."""
  print(f'error: {reason} Start the same command on every process again to continue from the last checkpoint.',
        file=sys.stderr, flush=True)
  sys.stdout.flush()
  os._exit(LOST)
