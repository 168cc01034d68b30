"""The group in every process but process 0, to which it is connected."""

import socket
import time
from typing import Any

from t5x_cpm.cluster.connection import BEAT, Connection
from t5x_cpm.cluster.group import Group, ProcessError, stop
from t5x_cpm.config import ProcessesConfig


class Spoke(Group):
  """The group in a process other than 0: it joins process 0, and then its watch stops this process when process 0 says so."""

  def __init__(self, count: int, index: int, config: ProcessesConfig, address: tuple[str, int], settings: list[str]):
    """Makes the group.

    Args:
      count: how many processes there are.
      index: which of them this one is.
      config: how long to wait, and for what.
      address: host and port where process 0 listens.
      settings: lines that must be the same in all processes.
    """
    super().__init__(count, index, config)
    self._address, self._settings = address, settings
    self._hub = f'process 0 at {address[0]}:{address[1]}'

  def gather(self) -> None:
    """Joins process 0, and waits until it says that all are there.

    Raises:
      ProcessError: process 0 does not come, or does not admit this process.
    """
    self._connection = Connection(self._connect(), BEAT / 2)
    self._connection.send(hello=self.index, count=self.count, host=socket.gethostname(), settings=self._settings)
    answer = self._answer()
    if 'go' not in answer:
      raise ProcessError(answer.get('error', f"{self._hub} does not answer as one: is that port another program's?"))
    self._start_watch(self._watch)

  def _connect(self) -> socket.socket:
    deadline = time.monotonic() + self.config.start_seconds
    while True:
      try:
        return socket.create_connection(self._address, timeout=5)
      except OSError as error:
        if time.monotonic() > deadline:
          raise ProcessError(
              f'{self._hub} did not come within {self.config.start_seconds:g} s (ProcessesConfig.start_seconds): '
              f'{error.strerror or error}.') from error
        time.sleep(0.2)

  def _answer(self) -> dict[str, Any]:
    """The first message of process 0 that is more than a sign of life."""
    heard = time.monotonic()
    while True:
      messages = self._connection.read()
      if messages is None:
        raise ProcessError(f'{self._hub} ended while it waited for all.')
      now = time.monotonic()
      heard = now if messages else heard
      if now - heard > self.config.silent_seconds:
        raise ProcessError(f'{self._hub} has not answered for {self.config.silent_seconds:g} s '
                           "(ProcessesConfig.silent_seconds): it is frozen, or that port is another program's.")
      for message in messages:
        if 'beat' not in message:
          return message

  def _watch(self) -> None:
    """Tells process 0 how this one is getting on, until process 0 says goodbye, says stop, or is lost."""
    heard = spoken = time.monotonic()
    while True:
      messages = self._connection.read()
      now = time.monotonic()
      for message in messages or ():
        heard = now
        if 'stop' in message:
          if self._failure:
            return  # it is this process that failed, and it ends by itself
          stop(message['stop'])
        if 'bye' in message:
          return
      if messages is None:
        stop('process 0 ended without a word: it was killed, or its host is lost.')
      if now - heard > self.config.silent_seconds:
        stop(f'process 0 has not answered for {self.config.silent_seconds:g} s: it is frozen or cannot be reached '
             '(ProcessesConfig.silent_seconds).')
      if now - spoken >= BEAT or self._failure:
        spoken = now
        self._connection.send(**self._status())
