"""Reads pieces of files into memory by threads of its own, what is needed first before what may be needed.

Files are read past the system's cache where it allows that (O_DIRECT): a model that is read over and over would only push
everything else out of it. Reading leaves the interpreter free, so that Python goes on meanwhile.
"""

import errno
import heapq
import itertools
import os
import pathlib
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from t5x_cpm.config import ConfigError

DEMAND, LIKELY = 0, 1  # in this order
CHUNK = 8 << 20  # bytes of one read: several at once keep a disk busy
ATTEMPTS = 3
WAIT = 0.2  # seconds before the second attempt; doubled for the next


class ReadError(ConfigError):
  """A file that is there could not be read."""


class Load:
  """A region of a file on its way into memory."""

  def __init__(self, what: str, file: pathlib.Path, begin: int, into: np.ndarray, ready: Callable[[], None],
               then: Callable[[], None]):
    """Args:
      what: for errors, such as 'expert 3 of decoder layer 5'.
      file: what is read.
      begin: of the first byte; a multiple of the system's page.
      into: where it goes: uint8, whole pages.
      ready: waits until the memory may be written to.
      then: called when all is there, by the thread that read the last piece; may raise.
    """
    self.what, self.file, self.begin, self.into, self.ready, self.then = what, file, begin, into, ready, then
    self.is_dropped = False
    self.error: BaseException | None = None
    self._left = -(-len(into) // CHUNK)
    self._lock, self._done = threading.Lock(), threading.Event()
    self._is_ready = False

  def chunks(self) -> range:
    """Where each piece begins in the memory."""
    return range(0, len(self.into), CHUNK)

  def begin_now(self) -> bool:
    """Waits until the memory is free. False where nobody needs the load any more."""
    with self._lock:
      if not self._is_ready and not self.is_dropped and not self.error:
        self.ready()
        self._is_ready = True
      return not self.is_dropped and not self.error

  def end_piece(self, error: BaseException | None) -> None:
    """Notes that a piece is there, or failed."""
    with self._lock:
      self.error = self.error or error
      self._left -= 1
      if self._left:
        return
      if not self.error and not self.is_dropped:
        try:
          self.then()
        except BaseException as raised:
          self.error = raised
    self._done.set()

  @property
  def is_done(self) -> bool:
    return self._done.is_set()

  def join(self) -> None:
    """Waits until nothing is read into the memory any more."""
    self._done.wait()

  def wait(self, seconds: float) -> None:
    """Waits until all is there.

    Raises:
      ReadError: it cannot be read, or is not there within so many seconds.
    """
    if not self._done.wait(seconds):
      raise ReadError(f'{self.what} is not there after {seconds:g} s: reading {self.file} hangs.')
    if self.error:
      raise self.error


class Loader:
  """Threads that read."""

  def __init__(self, threads: int):
    self._queue: list[tuple[int, int, Load, int]] = []
    self._number = itertools.count()
    self._changed = threading.Condition()
    self._files: dict[pathlib.Path, tuple[int, bool]] = {}
    self._is_closed = False
    self.bytes = 0  # that were read
    self._threads = [threading.Thread(target=self._work, name='t5x_cpm-read', daemon=True) for _ in range(threads)]
    for thread in self._threads:
      thread.start()

  def submit(self, load: Load, priority: int) -> None:
    """Begins a load."""
    with self._changed:
      for place in load.chunks():
        heapq.heappush(self._queue, (priority, next(self._number), load, place))
      self._changed.notify_all()

  def drop(self, load: Load) -> None:
    """Gives up what is not read yet of a load that nobody needs any more."""
    load.is_dropped = True
    with self._changed:
      count = len(self._queue)
      self._queue = [entry for entry in self._queue if entry[2] is not load]
      heapq.heapify(self._queue)
      count -= len(self._queue)
    for _ in range(count):
      load.end_piece(None)

  def hurry(self, load: Load) -> None:
    """Makes what is still to be read of a load as urgent as can be."""
    with self._changed:
      self._queue = [(DEMAND if one is load else priority, number, one, place) for priority, number, one, place in self._queue]
      heapq.heapify(self._queue)

  def _work(self) -> None:
    while True:
      with self._changed:
        while not self._queue and not self._is_closed:
          self._changed.wait()
        if self._is_closed:
          return
        _, _, load, place = heapq.heappop(self._queue)
      error: BaseException | None = None
      try:
        if load.begin_now():
          self._read(load, place)
      except BaseException as raised:  # the one who waits for it is told
        error = raised
      load.end_piece(error)

  def _open(self, file: pathlib.Path) -> tuple[int, bool]:
    with self._changed:
      if file not in self._files:
        try:
          self._files[file] = os.open(file, os.O_RDONLY | getattr(os, 'O_DIRECT', 0)), True
        except OSError as error:
          if error.errno != errno.EINVAL:  # a file system without it
            raise
          self._files[file] = os.open(file, os.O_RDONLY), False
      return self._files[file]

  def _read(self, load: Load, place: int) -> None:
    """Reads a piece, again where that fails, on from where it stopped where it comes short."""
    view = load.into[place:place + CHUNK].data
    done = failures = 0
    while done < len(view):
      try:
        number, is_direct = self._open(load.file)
        count = read(number, view[done:], load.begin + place + done)
        if not count:
          raise OSError(errno.EIO, 'the file ends before')
        done += count
        self.bytes += count
        if is_direct and done < len(view) and done % 4096:  # what comes next would not be aligned
          done -= done % 4096
      except OSError as error:
        failures += 1
        if failures == ATTEMPTS:
          raise ReadError(
              f'{load.what} cannot be read from {load.file}: {error.strerror or error} ({ATTEMPTS} attempts).') from error
        time.sleep(WAIT * 2**failures / 2)

  def close(self) -> None:
    """Ends the threads, and waits for their end."""
    with self._changed:
      self._is_closed = True
      self._changed.notify_all()
    for thread in self._threads:
      thread.join()
    for number, _ in self._files.values():
      os.close(number)
    self._files = {}


def read(number: int, view: Any, begin: int) -> int:
  """Reads from an open file; tests put their own in its place."""
  return os.preadv(number, [view], begin)
