"""The port of process 0, open to anyone while the processes gather: who does not know the secret is told nothing."""

import dataclasses
import errno
import ipaddress
import selectors
import socket
import time
from typing import Any

from t5x_cpm.cluster import secret as secret_lib
from t5x_cpm.cluster.connection import BEAT, Connection
from t5x_cpm.cluster.group import ProcessError
from t5x_cpm.cluster.secret import Secret

SECONDS_TO_GREET = 20.0  # that a connection may take to say who it is
MOST_STRANGERS = 256  # connections that have not said it yet; of more the oldest is closed, and a process of ours tries again
EVERYWHERE = ''  # the address of all interfaces


@dataclasses.dataclass
class Stranger:
  """A connection of which is not known yet who it is."""

  connection: Connection
  challenge: str
  since: float
  is_ours: bool = False  # it knows the secret, and has yet to say which process it is


def _addresses(host: str) -> list[str]:
  """The addresses of a host that are of use to others. A name may stand for this machine's loopback on this machine alone."""
  try:
    found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
  except (OSError, UnicodeError):
    return []
  is_meant = host == 'localhost' or host in found
  return [address for address in found if is_meant or not ipaddress.ip_address(address.partition('%')[0]).is_loopback]


def _listen(host: str, port: int) -> socket.socket:
  """Listens at the address of `host`; everywhere if this machine does not have it, as behind a translation of addresses."""
  both = socket.has_dualstack_ipv6()
  reason = ''
  for address in (*_addresses(host)[:1], EVERYWHERE):
    family = socket.AF_INET6 if ':' in address or (address == EVERYWHERE and both) else socket.AF_INET
    try:
      return socket.create_server(
          (address, port), family=family, backlog=MOST_STRANGERS, dualstack_ipv6=both and address == EVERYWHERE)
    except OSError as error:
      reason = error.strerror or str(error)
      if error.errno in (errno.EADDRINUSE, errno.EACCES):
        break
  raise ProcessError(f'process 0 cannot listen on port {port}: {reason}. Give another --coordinator.')


def _is_greeting(message: dict[str, Any]) -> bool:
  """Whether a message says which process sent it."""
  settings = message.get('settings')
  return (type(message.get('hello')) is int and type(message.get('count')) is int and isinstance(message.get('host'), str)
          and isinstance(settings, list) and all(isinstance(line, str) for line in settings))


class Door:
  """A port that lets in who knows the secret.

  Attributes:
    address: host:port where it listens, as JAX writes it.
    turned_away: how many connections were closed because they did not know the secret.
  """

  def __init__(self, host: str, port: int, secret: Secret):
    """Begins to listen at the address of `host`. Raises ProcessError where the port is in use."""
    self._secret = secret
    self._listener = _listen(host, port)
    self._listener.setblocking(False)  # who connected may be gone again before it is accepted
    self._strangers: dict[Connection, Stranger] = {}  # in the order in which they came
    self._selector = selectors.DefaultSelector()
    self._selector.register(self._listener, selectors.EVENT_READ)
    self.turned_away = 0
    bound, port = self._listener.getsockname()[:2]
    self.address = f'[{bound}]:{port}' if ':' in bound else f'{bound}:{port}'

  def _forget(self, stranger: Stranger) -> None:
    del self._strangers[stranger.connection]
    self._selector.unregister(stranger.connection)

  def _turn_away(self, stranger: Stranger) -> None:
    self._forget(stranger)
    self.turned_away += 1
    stranger.connection.close()

  def _make_room(self, most: int) -> None:
    """Closes the oldest connection where there are more than `most` that have not said who they are."""
    if len(self._strangers) > most:
      self._turn_away(next(iter(self._strangers.values())))

  def _open(self) -> None:
    try:
      connection = Connection(self._listener.accept()[0], BEAT)
    except OSError:  # gone already, or this process may not open one more
      self._make_room(0)
      return
    stranger = Stranger(connection, secret_lib.challenge(), time.monotonic())
    self._strangers[connection] = stranger
    self._selector.register(connection, selectors.EVENT_READ, stranger)
    connection.send(challenge=stranger.challenge)
    self._make_room(MOST_STRANGERS)

  def _hear(self, stranger: Stranger) -> list[tuple[dict[str, Any], Connection]]:
    """Reads what a stranger says; its greeting once it is one of ours."""
    messages = stranger.connection.read()
    for message in messages or ():
      if stranger.is_ours and _is_greeting(message):
        self._forget(stranger)
        return [(message, stranger.connection)]
      counter = message.get('challenge')
      if stranger.is_ours or not self._secret.is_answer(message.get('answer'), secret_lib.COMER, stranger.challenge, counter):
        stranger.connection.send(denied=True)
        messages = None
        break
      stranger.is_ours = True
      stranger.connection.trust()
      stranger.connection.send(answer=self._secret.answer(secret_lib.LISTENER, stranger.challenge, str(counter)))
    if messages is None:
      self._turn_away(stranger)
    return []

  def poll(self, seconds: float) -> list[tuple[dict[str, Any], Connection]]:
    """Waits a while for somebody; returns the greeting and connection of every process of ours that has come."""
    came = []
    for key, _ in self._selector.select(seconds):
      if key.fileobj is self._listener:
        self._open()
      elif key.data.connection in self._strangers:  # it may have been closed to make room
        came += self._hear(key.data)
    now = time.monotonic()
    for stranger in list(self._strangers.values()):
      if now - stranger.since > SECONDS_TO_GREET:
        self._turn_away(stranger)
    return came

  def close(self) -> None:
    """Ends listening, and all connections that have not been let in."""
    for stranger in list(self._strangers.values()):
      self._turn_away(stranger)
    self._selector.close()
    self._listener.close()
