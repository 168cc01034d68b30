"""Files of numbers that are mapped into memory and whose blocks are compared with their digests when they are first read.

Beside FILE lies FILE.crc, the CRC-32 of each block of FILE, uint32; whoever describes FILE keeps its size and a digest of
FILE.crc. So a file of any size opens at once, and yet nothing of it is read that was not written. All the checks together
read the file once.
"""

import hashlib
import mmap
import os
import pathlib
import threading
import weakref
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from t5x_cpm import files, stored

BLOCK = 1 << 14  # bytes; small, because a row reads a few hundred bytes from a random place
EAGER = 1 << 26  # files of up to so many bytes are checked whole when they are opened, which takes 0.03 s
FACTS = {'bytes': stored.COUNT, 'digest': str}
Damaged = Callable[[pathlib.Path, str], Exception]  # what to raise for a damaged file, given what is wrong with it


def _sums_file(path: pathlib.Path) -> pathlib.Path:
  return path.with_name(path.name + '.crc')


def describe(path: pathlib.Path) -> dict[str, Any]:
  """Writes the digests of the blocks of a file beside it, and returns what `Numbers` needs to know of them (FACTS)."""
  sums: list[int] = []
  with open(path, 'rb') as file:
    while chunk := file.read(256 * BLOCK):
      view = memoryview(chunk)
      sums += [zlib.crc32(view[i:i + BLOCK]) for i in range(0, len(chunk), BLOCK)]
  content = np.array(sums, '<u4').tobytes()
  files.write_atomically(_sums_file(path), content)
  return {'bytes': path.stat().st_size, 'digest': hashlib.blake2b(content, digest_size=12).hexdigest()}


def _read_sums(path: pathlib.Path, facts: dict[str, Any], damaged: Damaged) -> np.ndarray:
  beside = _sums_file(path)
  try:
    content = files.read_bytes(beside)
  except OSError as error:
    raise damaged(beside, error.strerror or 'it cannot be read') from None
  if (hashlib.blake2b(content, digest_size=12).hexdigest() != facts['digest'] or
      len(content) != 4 * -(-facts['bytes'] // BLOCK)):
    raise damaged(beside, 'it does not have its digest')
  return np.frombuffer(content, '<u4')


class Numbers:
  """A file of numbers, [n] or [n, columns], read-only. What is taken out of it by index has been checked.

  `np.asarray` gives all of it, checked, as a mapped array.

  Raises, when it is opened and whenever it is read:
    what `damaged` returns.
  """

  def __init__(self, path: pathlib.Path, dtype: Any, facts: dict[str, Any] | None, damaged: Damaged, *, columns: int = 0,
               random: bool = False):
    """Opens a file.

    Args:
      path: the file.
      dtype: the type of its numbers.
      facts: from `describe`; None for a file of an earlier version, which cannot be checked.
      damaged: makes the error for a damaged file.
      columns: how many numbers a row has; 0: there are no rows. A power of two.
      random: whether it will be read in random order, for which the system must not read ahead: that costs 100 times the
        data.
    """
    self.path, self._damaged = path, damaged
    width = np.dtype(dtype).itemsize * max(columns, 1)
    self._shift = (BLOCK // width).bit_length() - 1
    try:
      self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # which would wait at a pipe
    except OSError as error:
      raise damaged(path, error.strerror or 'it cannot be read') from None
    weakref.finalize(self, os.close, self._file)
    size = os.fstat(self._file).st_size
    if facts is not None and size != facts['bytes']:
      raise damaged(path, f'it has {size:,} bytes, expected {facts["bytes"]:,}')
    if size % width:
      raise damaged(path, f'it has {size:,} bytes, expected a multiple of {width}')
    try:
      array = np.frombuffer(self._map(size, random), dtype) if size else np.zeros(0, dtype)
    except OSError as error:
      raise damaged(path, error.strerror or 'it cannot be read') from None
    self._array = array.reshape(-1, columns) if columns else array
    self._sums = None if facts is None else _read_sums(path, facts, damaged)
    self._unread = np.ones(0 if self._sums is None else len(self._sums), bool)
    self._left = len(self._unread)  # how many blocks have not been checked
    self._counting = threading.Lock()
    if size <= EAGER:
      self.check()

  def _map(self, size: int, random: bool) -> mmap.mmap:
    mapped = mmap.mmap(self._file, size, access=mmap.ACCESS_READ)
    if random and hasattr(mmap, 'MADV_RANDOM'):
      mapped.madvise(mmap.MADV_RANDOM)
    return mapped

  def __len__(self) -> int:
    return len(self._array)

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    del copy
    self.check()
    return self._array if dtype is None else self._array.astype(dtype)

  def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
    """The numbers or rows at `index` [...], or in a slice of step 1."""
    if self._left:
      if isinstance(index, slice):
        begin, end, _ = index.indices(len(self))
        self._check(np.arange(begin >> self._shift, -(-end >> self._shift) if end > begin else 0))
      else:
        self._check(index >> self._shift)
    return self._array[index]

  def search(self, values: np.ndarray) -> np.ndarray:
    """np.searchsorted(numbers, values), of numbers that ascend.

    A search reads numbers all over the file. Its result is right, whatever it read, if the two numbers around each place
    are, so only these are checked.
    """
    place = np.searchsorted(self._array, values)
    if self._left and len(self):
      below, above = self[np.maximum(place - 1, 0)], self[np.minimum(place, len(self) - 1)]
      if ((below >= values) & (place > 0)).any() or ((above < values) & (place < len(self))).any():
        raise self._damaged(self.path, 'its numbers do not ascend')
    return place

  def check(self) -> None:
    """Checks all that has not been checked yet."""
    if self._left:
      self._check(np.arange(len(self._unread)))

  def _check(self, blocks: np.ndarray) -> None:
    wanted = blocks[self._unread[blocks]]
    if not wanted.size:
      return
    assert self._sums is not None
    for block in np.unique(wanted).tolist():
      # Read rather than mapped: one request for a block, not one a page, and an error where the disk fails, not a signal.
      try:
        content = os.pread(self._file, BLOCK, block * BLOCK)
      except OSError as error:
        raise self._damaged(self.path, error.strerror or 'it cannot be read') from None
      if zlib.crc32(content) != self._sums[block]:
        raise self._damaged(self.path, f'bytes {block * BLOCK:,} to {block * BLOCK + len(content):,} do not have their digest')
      with self._counting:
        self._left -= int(self._unread[block])
        self._unread[block] = False
