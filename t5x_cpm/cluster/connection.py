"""A TCP connection between two processes of a run, over which both send messages, which are lines of JSON."""

import contextlib
import json
import socket
from typing import Any

BEAT = 1.0  # seconds between two messages


class Connection:
  """One end of a connection.

  Args:
    given: the connected socket.
    patience: how many seconds `read` waits for a message.
  """

  def __init__(self, given: socket.socket, patience: float):
    given.settimeout(patience)
    self._socket, self._incomplete = given, b''

  def fileno(self) -> int:
    """The number by which a selector knows the connection."""
    return self._socket.fileno()

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
    try:
      return [dict(json.loads(line)) for line in lines] if data else None
    except ValueError:
      return None

  def close(self) -> None:
    self._socket.close()
