"""The group in process 0, to which all other processes are connected."""

import contextlib
import dataclasses
import selectors
import socket
import time
from typing import Any

from t5x_cpm.cluster.connection import BEAT, Connection
from t5x_cpm.cluster.door import Door
from t5x_cpm.cluster.group import Group, ProcessError, stop
from t5x_cpm.cluster.secret import Secret
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


class Hub(Group):
  """The group in process 0: first it gathers the others, then its watch observes them."""

  def __init__(self, count: int, config: ProcessesConfig, address: tuple[str, int], settings: list[str], secret: Secret):
    """Begins to listen.

    Args:
      count: how many processes there are.
      config: how long to wait, and for what.
      address: host and port where the others connect.
      settings: lines that must be the same in all processes.
      secret: what the others must know to be admitted.

    Raises:
      ProcessError: the port is in use.
    """
    super().__init__(count, 0, config)
    self._settings = settings
    self._peers = {0: Peer(0, socket.gethostname())}
    self._failed: tuple[Peer, str] | None = None  # who ended with an error, and which
    self._door = Door(*address, secret)
    self._selector = selectors.DefaultSelector()  # of the connections of processes that were admitted
    self.listens_at = self._door.address

  def gather(self) -> None:
    """Waits for all others, then lets all begin.

    Raises:
      ProcessError: some do not come, or do not belong here. Those that came are told the same.
    """
    with contextlib.closing(self._door):
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
    began, beat, line = time.monotonic(), Timer(BEAT), Timer(SECONDS_BETWEEN_LINES)
    while len(self._peers) < self.count:
      missing = sorted(set(range(self.count)) - set(self._peers))
      strangers = f' ({self._door.turned_away} connections without its secret were closed)' if self._door.turned_away else ''
      if line.is_due():
        print(f'waiting for {_names(missing)} of {self.count}{strangers}', flush=True)
      if beat.is_due():
        self._tell(beat=True)
      if time.monotonic() - began > self.config.start_seconds:
        return (f'{_names(missing)} of {self.count} did not come within {self.config.start_seconds:g} s '
                '(ProcessesConfig.start_seconds). See their output, and whether they reach this host '
                f'({self._peers[0].host}) at {self._door.address}{strangers}.')
      for greeting, connection in self._door.poll(BEAT / 2):
        if error := self._admit(greeting, connection):
          return error
      for peer in self._listen_to_others(0):
        return f'{peer} came, and ended before all were there. See its output.'
    return ''

  def _admit(self, greeting: dict[str, Any], connection: Connection) -> str:
    """Admits a process; returns why that cannot be, or ''."""
    peer = Peer(greeting['hello'], greeting['host'], connection)
    self._selector.register(connection, selectors.EVENT_READ, peer)
    if greeting['count'] != self.count or not 0 < peer.index < self.count:
      self._peers[-1] = peer  # so that it is told
      return f'process 0 was started as one of {self.count} processes, {peer} as one of {greeting["count"]}.'
    given = self._peers.setdefault(peer.index, peer)
    if given is not peer:
      connection.send(error=f'{given} was there before this process on {peer.host}.')
      return f'{peer} has the index of {given}: every process needs its own --process_id.'
    theirs, ours = greeting['settings'], self._settings
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
    beat = Timer(BEAT)
    while not all(peer.done for peer in self._peers.values()):
      self._hear(self._peers[0], self._status())
      reason = self._trouble(self._listen_to_others(BEAT / 2))
      if reason:
        self._tell(stop=reason)
        if self._failure:
          return  # it is this process that failed, and it ends by itself
        stop(reason)
      if beat.is_due():
        self._tell(beat=True)
    self._tell(bye=True)

  def _listen_to_others(self, seconds: float) -> list[Peer]:
    """Waits a while for messages; returns the processes whose connection has ended."""
    ended = []
    for key, _ in self._selector.select(seconds):
      messages = key.data.connection.read()
      for message in messages or ():
        self._hear(key.data, message)
      if messages is None:
        self._selector.unregister(key.fileobj)
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
