"""How the processes of one run find each other and stop together when one of them is lost.

JAX's collectives wait for ever for a process that hangs, and its own service aborts without a name or waits for minutes. So
each process keeps a TCP connection to process 0, on which both speak once a second, in lines of JSON. Process 0 sees who never
came, who died (the connection ends), who is frozen (nothing is heard) and who hangs (the others go on without it), tells
everyone, and all stop at once: a run continues from its last checkpoint. Nothing here imports JAX.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from t5x_cpm.config import ConfigError, ProcessesConfig

BEAT = 1.0  # seconds between two messages
SECONDS_BETWEEN_LINES = 10.0  # while process 0 waits for the others
LOST = 3  # exit code of a process that stops because of another one


class ProcessError(ConfigError):
  """The processes of a run do not come together. The message names those concerned and what to do."""


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
  with contextlib.suppress(OSError):  # the other end is gone, which shows when it is read from
    connection.sendall(json.dumps(message).encode() + b'\n')


class _Lines:
  """Reads messages from a socket as they arrive."""

  def __init__(self, connection: socket.socket):
    self.connection, self.rest = connection, b''

  def read(self) -> list[dict[str, Any]] | None:
    """Messages that have arrived, [] after a timeout. None: the connection has ended, or speaks something else."""
    try:
      data = self.connection.recv(1 << 16)
    except TimeoutError:
      return []
    except OSError:
      return None
    *lines, self.rest = (self.rest + data).split(b'\n')
    try:
      return [dict(json.loads(line)) for line in lines] if data else None
    except ValueError:
      return None


@dataclasses.dataclass
class _Peer:
  """What process 0 knows of a process, itself included."""

  index: int
  host: str
  lines: _Lines | None = None  # None: itself
  heard: float = 0.0  # time of the last message
  progress: int = 0  # events of the run that it has begun
  doing: str = 'the start'
  moved: float = 0.0  # time when `progress` last changed
  done: bool = False

  def __str__(self) -> str:
    return f'process {self.index} on {self.host}'


class Group:
  """The processes of a run, as one of them sees it. One process alone has nothing to watch."""

  def __init__(self, count: int = 1, index: int = 0, config: ProcessesConfig | None = None):
    self.count, self.index, self.config = count, index, config or ProcessesConfig()
    self._progress, self._doing = 0, 'the start'
    self._done = threading.Event()
    self._thread: threading.Thread | None = None
    self._failure = ''

  @property
  def first(self) -> bool:
    """Whether this is the process that prints and writes."""
    return self.index == 0

  def at(self, what: str) -> None:
    """Notes that this process begins something that all processes do, in the same order, such as a step."""
    self._progress, self._doing = self._progress + 1, what

  def fail(self, reason: str) -> None:
    """Tells the others that this process ends, and why; returns when that has been sent."""
    if self._thread is not None:
      self._failure = reason.split('\n')[0] or 'an error'
      self._thread.join(3 * BEAT)

  def close(self) -> None:
    """Says that this process has done its part, and returns when all have."""
    self._done.set()
    if self._thread is not None:
      self._thread.join()

  def _beat(self) -> dict[str, Any]:
    beat: dict[str, Any] = {'progress': self._progress, 'doing': self._doing, 'done': self._done.is_set()}
    return beat | ({'failed': self._failure} if self._failure else {})

  def _start(self, work: Callable[[], None]) -> None:
    self._thread = threading.Thread(target=work, name='watch', daemon=True)
    self._thread.start()


def _stop(reason: str) -> None:
  """Ends this process at once: its main thread may be inside a collective that never returns."""
  print(f'error: {reason} Start the same command on every process again to continue from the last checkpoint.',
        file=sys.stderr, flush=True)
  sys.stdout.flush()
  os._exit(LOST)


def _names(indices: list[int]) -> str:
  shown = ', '.join(map(str, indices[:8])) + (f' and {len(indices) - 8} more' if len(indices) > 8 else '')
  return f'process{"es" if len(indices) > 1 else ""} {shown}'


class _Hub(Group):
  """The group in process 0, which all others are connected to."""

  def __init__(self, count: int, config: ProcessesConfig, port: int, settings: list[str]):
    super().__init__(count, 0, config)
    self._settings = settings
    self._peers = {0: _Peer(0, socket.gethostname())}
    self._failed: tuple[_Peer, str] | None = None  # who ended with an error, and that
    self._selector = selectors.DefaultSelector()
    try:
      both = socket.has_dualstack_ipv6()
      self._listener = socket.create_server(
          ('', port), family=socket.AF_INET6 if both else socket.AF_INET, backlog=count, dualstack_ipv6=both)
    except OSError as error:
      raise ProcessError(f'process 0 cannot listen on port {port}: {error.strerror}. Give another --coordinator.') from error

  def gather(self) -> None:
    """Waits for all others, then lets all begin. Raises ProcessError for who is missing or does not belong."""
    newcomers: dict[socket.socket, _Lines] = {}
    began = said = spoken = time.monotonic()
    self._selector.register(self._listener, selectors.EVENT_READ)
    error = ''
    while len(self._peers) < self.count and not error:
      now, missing = time.monotonic(), sorted(set(range(self.count)) - set(self._peers))
      if now - said > SECONDS_BETWEEN_LINES:
        said = now
        print(f'waiting for {_names(missing)} of {self.count}', flush=True)
      if now - spoken >= BEAT:
        spoken = now
        self._tell({'beat': True})
      if now - began > self.config.start_seconds:
        error = (f'{_names(missing)} of {self.count} did not come within {self.config.start_seconds:g} s '
                 '(ProcessesConfig.start_seconds). See their output, and whether they reach this host '
                 f'({self._peers[0].host}).')
        break
      for key, _ in self._selector.select(BEAT / 2):
        if key.fileobj is self._listener:
          connection, _ = self._listener.accept()
          connection.settimeout(BEAT)
          newcomers[connection] = _Lines(connection)
          self._selector.register(connection, selectors.EVENT_READ, newcomers[connection])
          continue
        messages = key.data.read()
        if messages == []:
          continue  # a long hello has come in part
        lines = newcomers.pop(key.data.connection, None)
        if lines is None:  # one that was taken in, and says nothing until all are there
          peer = next(peer for peer in self._peers.values() if peer.lines is key.data)
          error = error or f'{peer} came, and ended before all were there. See its output.'
        elif messages and 'hello' in messages[0]:
          error = error or self._admit(messages[0], lines)
        else:
          self._selector.unregister(lines.connection)
          lines.connection.close()  # something else that tried this port, or a process that gave up
    self._selector.close()
    self._listener.close()
    for connection in newcomers:
      connection.close()
    self._tell({'error': error} if error else {'go': True})
    if error:
      raise ProcessError(error)
    now = time.monotonic()
    for peer in self._peers.values():
      peer.heard = peer.moved = now
    self._start(self._watch)

  def _admit(self, hello: dict[str, Any], lines: _Lines) -> str:
    """Takes a process in; returns why it cannot be, '' otherwise."""
    peer = _Peer(hello['hello'], hello['host'], lines)
    if hello['count'] != self.count:
      self._peers[-1] = peer  # so that it is told
      return f'process 0 was started as one of {self.count} processes, {peer} as one of {hello["count"]}.'
    given = self._peers.setdefault(peer.index, peer)
    if given is not peer:
      _send(lines.connection, {'error': f'{given} was there before this process on {peer.host}.'})
      return f'{peer} has the index of {given}: every process needs its own --process_id.'
    theirs, ours = hello['settings'], self._settings
    for a, b, whose in ((theirs, ours, 'it'), (ours, theirs, 'process 0')):
      if different := [line for line in a if line not in b]:
        return f'{peer} was started with another configuration than process 0: {whose} has {"; ".join(different[:3])}.'
    return ''

  def _tell(self, message: dict[str, Any]) -> None:
    for peer in self._peers.values():
      if peer.lines is not None:
        _send(peer.lines.connection, message)

  def _watch(self) -> None:
    selector = selectors.DefaultSelector()
    for peer in self._peers.values():
      if peer.lines is not None:
        selector.register(peer.lines.connection, selectors.EVENT_READ, peer)
    spoken = time.monotonic()
    while not all(peer.done for peer in self._peers.values()):
      self._hear(self._peers[0], self._beat())
      ended = []
      for key, _ in selector.select(BEAT / 2):
        messages = key.data.lines.read()
        for message in messages or ():
          self._hear(key.data, message)
        if messages is None:
          selector.unregister(key.fileobj)
          ended.append(key.data)
      reason = self._trouble(ended)
      if reason:
        self._tell({'stop': reason})
        if self._failure:
          return
        _stop(reason)
      if time.monotonic() - spoken >= BEAT:
        spoken = time.monotonic()
        self._tell({'beat': True})
    self._tell({'bye': True})

  def _hear(self, peer: _Peer, message: dict[str, Any]) -> None:
    now = time.monotonic()
    if message['progress'] > peer.progress:
      peer.moved = now
    peer.heard, peer.progress, peer.doing, peer.done = now, message['progress'], message['doing'], message['done']
    if 'failed' in message:
      self._failed = (peer, message['failed'])

  def _trouble(self, ended: list[_Peer]) -> str:
    """Why the run cannot go on; '' where it can."""
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


class _Spoke(Group):
  """The group in any other process."""

  def __init__(self, count: int, index: int, config: ProcessesConfig, address: tuple[str, int], settings: list[str]):
    super().__init__(count, index, config)
    self._address, self._settings = address, settings
    self._there = f'process 0 at {address[0]}:{address[1]}'

  def gather(self) -> None:
    """Joins process 0. Raises ProcessError where that is not there, or does not take this process."""
    deadline = time.monotonic() + self.config.start_seconds
    while True:
      try:
        connection = socket.create_connection(self._address, timeout=5)
        break
      except OSError as error:
        if time.monotonic() > deadline:
          raise ProcessError(
              f'{self._there} did not come within {self.config.start_seconds:g} s (ProcessesConfig.start_seconds): '
              f'{error.strerror or error}.') from error
        time.sleep(0.2)
    connection.settimeout(BEAT / 2)
    _send(connection, {'hello': self.index, 'count': self.count, 'host': socket.gethostname(), 'settings': self._settings})
    self._lines = _Lines(connection)
    heard = time.monotonic()
    answer: dict[str, Any] = {'beat': True}
    while 'beat' in answer:
      messages = self._lines.read()
      if messages is None:
        raise ProcessError(f'{self._there} ended while it waited for all.')
      now = time.monotonic()
      heard = now if messages else heard
      if now - heard > self.config.silent_seconds:
        raise ProcessError(f'{self._there} has not answered for {self.config.silent_seconds:g} s '
                           "(ProcessesConfig.silent_seconds): it is frozen, or that port is another program's.")
      answer = next((message for message in messages if 'beat' not in message), answer)
    if 'go' not in answer:
      raise ProcessError(answer.get('error', f"{self._there} does not answer as one: is that port another program's?"))
    self._start(self._watch)

  def _watch(self) -> None:
    heard = spoken = time.monotonic()
    while True:
      messages = self._lines.read()
      now = time.monotonic()
      for message in messages or ():
        heard = now
        if 'stop' in message:
          if self._failure:
            return
          _stop(message['stop'])
        if 'bye' in message:
          return
      if messages is None:
        _stop('process 0 ended without a word: it was killed, or its host is lost.')
      if now - heard > self.config.silent_seconds:
        _stop(f'process 0 has not answered for {self.config.silent_seconds:g} s: it is frozen or cannot be reached '
              '(ProcessesConfig.silent_seconds).')
      if now - spoken >= BEAT or self._failure:
        spoken = now
        _send(self._lines.connection, self._beat())


def join(count: int, index: int, address: tuple[str, int], config: ProcessesConfig, settings: list[str]) -> Group:
  """Waits until all processes have come, and watches them from then on.

  Args:
    count: of processes.
    index: of this one; process 0 listens at `address` until all have come.
    address: host and port of process 0.
    config: how long to wait for what.
    settings: lines that must be the same everywhere, such as the configuration.

  Raises:
    ProcessError: some did not come in time, two have one index, or counts or settings differ.
  """
  group = _Hub(count, config, address[1], settings) if index == 0 else _Spoke(count, index, config, address, settings)
  group.gather()
  return group
