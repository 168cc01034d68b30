"""A TCP connection between two processes of a run, over which both send messages, which are lines of JSON."""

import contextlib
import json
import socket
from typing import Any

BEAT = 1.0  # seconds between two messages
LONGEST_GREETING = 4096  # bytes of a line from whoever has connected
LONGEST = 1 << 20  # bytes of a line from a process that has shown that it belongs to the run


class Connection:
  """One end of a connection. Until `trust` is called, the other end may be anything, and only short lines are read.

  Args:
    given: the connected socket.
    patience: how many seconds `read` waits for a message.
  """

  def __init__(self, given: socket.socket, patience: float):
    given.settimeout(patience)
    self._socket, self._incomplete, self._longest = given, b'', LONGEST_GREETING

  def fileno(self) -> int:
    """The number by which a selector knows the connection."""
    return self._socket.fileno()

  def trust(self) -> None:
    """Allows long lines from now on."""
    self._longest = LONGEST

  def send(self, **message: Any) -> None:
    """Sends a message. If the other end is gone, nothing happens here; `read` will say so."""
    with contextlib.suppress(OSError):
      self._socket.sendall(json.dumps(message).encode() + b'\n')

  def read(self) -> list[dict[str, Any]] | None:
    """The messages that have arrived, [] if none came in time; None if the connection has ended, or is not one of ours."""
    try:
      data = self._socket.recv(1 << 16)
    except TimeoutError:
      return []
    except OSError:
      return None
    *lines, self._incomplete = (self._incomplete + data).split(b'\n')
    if not data or max(map(len, (*lines, self._incomplete))) > self._longest:
      return None
    try:
      messages = [json.loads(line) for line in lines]
    except (ValueError, RecursionError):  # the latter for a line of opening brackets
      return None
    return messages if all(isinstance(message, dict) for message in messages) else None

  def close(self) -> None:
    self._socket.close()
