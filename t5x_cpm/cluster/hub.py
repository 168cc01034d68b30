"""The group in process 0, to which all other processes are connected."""

import dataclasses
import selectors
import socket
import time
from typing import Any

from t5x_cpm.cluster.connection import BEAT, Connection
from t5x_cpm.cluster.group import Group, ProcessError, stop
from t5x_cpm.config import ProcessesConfig

SECONDS_BETWEEN_LINES = 10.0  # while process 0 waits for the others


@dataclasses.dataclass
class Peer:
  """What process 0 knows about a process, itself included."""

  index: int
  host: str
  connection: Connection | None = None  # None: process 0 itself
  heard: float = 0.0  # time of the last message
  progress: int = 0  # how many events of the run it has begun
  doing: str = 'the start'
  moved: float = 0.0  # time when `progress` last changed
  done: bool = False

  def __str__(self) -> str:
    return f'process {self.index} on {self.host}'

  def hear(self, status: dict[str, Any]) -> None:
    """Records what the process says about itself."""
    now = time.monotonic()
    if status['progress'] > self.progress:
      self.moved = now
    self.heard, self.progress, self.doing, self.done = now, status['progress'], status['doing'], status['done']


class Timer:
  """Is due once in so many seconds."""

  def __init__(self, seconds: float):
    self._seconds, self._last = seconds, time.monotonic()

  def is_due(self) -> bool:
    now = time.monotonic()
    if now - self._last < self._seconds:
      return False
    self._last = now
    return True


def _names(indices: list[int]) -> str:
  shown = ', '.join(map(str, indices[:8])) + (f' and {len(indices) - 8} more' if len(indices) > 8 else '')
  return f'process{"es" if len(indices) > 1 else ""} {shown}'


def _listen(port: int, count: int) -> socket.socket:
  both = socket.has_dualstack_ipv6()
  try:
    return socket.create_server(
        ('', port), family=socket.AF_INET6 if both else socket.AF_INET, backlog=count, dualstack_ipv6=both)
  except OSError as error:
    raise ProcessError(f'process 0 cannot listen on port {port}: {error.strerror}. Give another --coordinator.') from error


class Hub(Group):
  """The group in process 0: first it gathers the others, then its watch observes them."""

  def __init__(self, count: int, config: ProcessesConfig, port: int, settings: list[str]):
    """Begins to listen.

    Args:
      count: how many processes there are.
      config: how long to wait, and for what.
      port: where the others connect.
      settings: lines that must be the same in all processes.

    Raises:
      ProcessError: the port is in use.
    """
    super().__init__(count, 0, config)
    self._settings = settings
    self._peers = {0: Peer(0, socket.gethostname())}
    self._failed: tuple[Peer, str] | None = None  # who ended with an error, and which
    self._listener = _listen(port, count)

  def gather(self) -> None:
    """Waits for all others, then lets all begin.

    Raises:
      ProcessError: some do not come, or do not belong here. Those that came are told the same.
    """
    error = self._wait_for_all()
    self._tell(**({'error': error} if error else {'go': True}))
    if error:
      raise ProcessError(error)
    now = time.monotonic()
    for peer in self._peers.values():
      peer.heard = peer.moved = now
    self._start_watch(self._watch)

  def _wait_for_all(self) -> str:
    """Admits processes until all are there; returns why that cannot be, or ''."""
    newcomers: set[Connection] = set()  # connected, but who they are is not known yet
    began, beat, line = time.monotonic(), Timer(BEAT), Timer(SECONDS_BETWEEN_LINES)
    error = ''
    with selectors.DefaultSelector() as selector, self._listener:
      selector.register(self._listener, selectors.EVENT_READ)
      while len(self._peers) < self.count and not error:
        missing = sorted(set(range(self.count)) - set(self._peers))
        if line.is_due():
          print(f'waiting for {_names(missing)} of {self.count}', flush=True)
        if beat.is_due():
          self._tell(beat=True)
        if time.monotonic() - began > self.config.start_seconds:
          error = (f'{_names(missing)} of {self.count} did not come within {self.config.start_seconds:g} s '
                   '(ProcessesConfig.start_seconds). See their output, and whether they reach this host '
                   f'({self._peers[0].host}).')
          break
        for key, _ in selector.select(BEAT / 2):
          if key.fileobj is self._listener:
            connection = Connection(self._listener.accept()[0], BEAT)
            newcomers.add(connection)
            selector.register(connection, selectors.EVENT_READ)
          else:
            complaint = self._receive(key.fileobj, newcomers, selector)
            error = error or complaint
    for connection in newcomers:
      connection.close()
    return error

  def _receive(self, connection: Any, newcomers: set[Connection], selector: selectors.BaseSelector) -> str:
    """Reads from a connection while processes gather; returns why they cannot come together, or ''."""
    messages = connection.read()
    if messages == []:
      return ''  # a long hello of which only the beginning has come
    if connection not in newcomers:  # a process that was admitted, and then says nothing until all are there
      peer = next(peer for peer in self._peers.values() if peer.connection is connection)
      return f'{peer} came, and ended before all were there. See its output.'
    newcomers.remove(connection)
    if messages and 'hello' in messages[0]:
      return self._admit(messages[0], connection)
    selector.unregister(connection)
    connection.close()  # something else that tried this port, or a process that gave up
    return ''

  def _admit(self, hello: dict[str, Any], connection: Connection) -> str:
    """Admits a process; returns why that cannot be, or ''."""
    peer = Peer(hello['hello'], hello['host'], connection)
    if hello['count'] != self.count:
      self._peers[-1] = peer  # so that it is told
      return f'process 0 was started as one of {self.count} processes, {peer} as one of {hello["count"]}.'
    given = self._peers.setdefault(peer.index, peer)
    if given is not peer:
      connection.send(error=f'{given} was there before this process on {peer.host}.')
      return f'{peer} has the index of {given}: every process needs its own --process_id.'
    theirs, ours = hello['settings'], self._settings
    for a, b, whose in ((theirs, ours, 'it'), (ours, theirs, 'process 0')):
      if different := [line for line in a if line not in b]:
        return f'{peer} was started with another configuration than process 0: {whose} has {"; ".join(different[:3])}.'
    return ''

  def _tell(self, **message: Any) -> None:
    """Sends a message to all others."""
    for peer in self._peers.values():
      if peer.connection is not None:
        peer.connection.send(**message)

  def _watch(self) -> None:
    """Observes the others until all are done, or one is lost."""
    selector = selectors.DefaultSelector()
    for peer in self._peers.values():
      if peer.connection is not None:
        selector.register(peer.connection, selectors.EVENT_READ, peer)
    beat = Timer(BEAT)
    while not all(peer.done for peer in self._peers.values()):
      self._hear(self._peers[0], self._status())
      reason = self._trouble(self._listen_to_others(selector))
      if reason:
        self._tell(stop=reason)
        if self._failure:
          return  # it is this process that failed, and it ends by itself
        stop(reason)
      if beat.is_due():
        self._tell(beat=True)
    self._tell(bye=True)

  def _listen_to_others(self, selector: selectors.BaseSelector) -> list[Peer]:
    """Waits half a beat for messages; returns the processes whose connection has ended."""
    ended = []
    for key, _ in selector.select(BEAT / 2):
      messages = key.data.connection.read()
      for message in messages or ():
        self._hear(key.data, message)
      if messages is None:
        selector.unregister(key.fileobj)
        ended.append(key.data)
    return ended

  def _hear(self, peer: Peer, status: dict[str, Any]) -> None:
    peer.hear(status)
    if 'failed' in status:
      self._failed = (peer, status['failed'])

  def _trouble(self, ended: list[Peer]) -> str:
    """Why the run cannot go on; '' if it can."""
    if self._failed:
      peer, failure = self._failed
      return f'{peer} stopped: {failure}'
    for peer in ended:
      return f'{peer} ended at {peer.doing} without a word: it was killed, or its host is lost.'
    now, peers = time.monotonic(), [peer for peer in self._peers.values() if not peer.done]
    for peer in peers:
      if now - peer.heard > self.config.silent_seconds:
        return (f'{peer} has not answered for {self.config.silent_seconds:g} s, at {peer.doing}: it is frozen or cannot be '
                'reached (ProcessesConfig.silent_seconds).')
    leader = max(peers, key=lambda peer: peer.progress, default=self._peers[0])
    for peer in peers:
      if peer.progress < leader.progress and now - max(peer.moved, leader.moved) > self.config.behind_seconds:
        return (f'{peer} hangs at {peer.doing}: the others have been at {leader.doing} for {self.config.behind_seconds:g} s '
                '(ProcessesConfig.behind_seconds).')
    return ''
