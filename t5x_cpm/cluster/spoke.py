"""The group in every process but process 0, to which it is connected."""

import socket
import time
from typing import Any

from t5x_cpm.cluster import secret as secret_lib
from t5x_cpm.cluster.connection import BEAT, Connection
from t5x_cpm.cluster.group import Group, ProcessError, stop
from t5x_cpm.cluster.secret import Secret
from t5x_cpm.config import ProcessesConfig


class Spoke(Group):
  """The group in a process other than 0: it joins process 0, and then its watch stops this process when process 0 says so."""

  def __init__(self, count: int, index: int, config: ProcessesConfig, address: tuple[str, int], settings: list[str],
               secret: Secret):
    """Makes the group.

    Args:
      count: how many processes there are.
      index: which of them this one is.
      config: how long to wait, and for what.
      address: host and port where process 0 listens.
      settings: lines that must be the same in all processes.
      secret: what process 0 must know too.
    """
    super().__init__(count, index, config)
    self._address, self._settings, self._secret = address, settings, secret
    self._hub = f'process 0 at {address[0]}:{address[1]}'

  def gather(self) -> None:
    """Joins process 0, and waits until it says that all are there.

    Raises:
      ProcessError: process 0 does not come, or does not admit this process.
    """
    self._connection = self._join()
    self._connection.trust()
    self._connection.send(hello=self.index, count=self.count, host=socket.gethostname(), settings=self._settings)
    answer = self._answer(self._connection)
    if answer is None:
      raise ProcessError(f'{self._hub} ended while it waited for all.')
    if 'go' not in answer:
      raise ProcessError(str(answer.get('error', f'{self._hub} does not answer as one: is it of another version?')))
    self._start_watch(self._watch)

  def _join(self) -> Connection:
    """Connects to process 0, tries again where it is not there yet or has no room, and sees that both know the secret."""
    deadline, reason = time.monotonic() + self.config.start_seconds, ''
    while True:
      try:
        connection = Connection(socket.create_connection(self._address, timeout=5), BEAT / 2)
      except OSError as error:
        reason = error.strerror or str(error)
      else:
        if self._is_process_0(connection):
          return connection
        connection.close()
        reason = "who answers there is not of this run: is that port another program's?"
      if time.monotonic() > deadline:
        raise ProcessError(
            f'{self._hub} did not come within {self.config.start_seconds:g} s (ProcessesConfig.start_seconds): '
            f'{reason.removesuffix(".")}.')
      time.sleep(0.2)

  def _is_process_0(self, connection: Connection) -> bool:
    """Shows that this process knows the secret; returns whether the other end has shown it too."""
    first = self._answer(connection) or {}
    theirs, ours = first.get('challenge'), secret_lib.challenge()
    if not isinstance(theirs, str):
      return False
    connection.send(challenge=ours, answer=self._secret.answer(secret_lib.COMER, theirs, ours))
    answer = self._answer(connection) or {}
    if 'denied' in answer:
      raise ProcessError(
          f'{self._hub} has another secret than this process, which has that of {self._secret.origin}: expected one '
          f'--model_dir that all processes share, and {secret_lib.VARIABLE} the same for all or set for none.')
    return self._secret.is_answer(answer.get('answer'), secret_lib.LISTENER, theirs, ours)

  def _answer(self, connection: Connection) -> dict[str, Any] | None:
    """The first message of process 0 that is more than a sign of life; None if the connection has ended."""
    heard = time.monotonic()
    while True:
      messages = connection.read()
      if messages is None:
        return None
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
