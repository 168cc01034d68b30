"""Files that are either complete or not there, and locks between processes.

Paths are `pathlib.Path` or `epath.Path`. A path with '://' in it lies in a bucket, where an object appears only when it is
complete and nothing can be locked.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
from collections.abc import Iterator
from typing import Any, BinaryIO


class LockedError(Exception):
  """Another process holds a lock; the message names that process."""


def is_running(process: int) -> bool:
  """Whether there is a process of this number on this machine."""
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return False
  except OSError:
    pass  # it is another user's
  return True


def check_regular(path: Any) -> None:
  """Raises OSError unless a path is that of a file or folder: a pipe would be waited for, and a device has no end."""
  kind = stat.S_IFREG if '://' in str(path) else stat.S_IFMT(os.stat(path).st_mode)
  if kind not in (stat.S_IFREG, stat.S_IFDIR):  # of a folder the system says so itself when it is opened
    raise OSError(errno.EISDIR, 'not a regular file', str(path))


def read_bytes(path: Any) -> bytes:
  """The content of a file. Raises OSError if it cannot be read, or is none."""
  check_regular(path)
  return path.read_bytes()


def move(temporary: Any, path: Any) -> None:
  """Gives a finished local file its name, once its content is on the disk."""
  with open(temporary, 'rb') as file:
    os.fsync(file.fileno())
  os.replace(temporary, path)


def _try_lock(file: Any, kind: int) -> bool:
  """Locks an open file; False where that is not possible."""
  try:
    fcntl.flock(file, kind)
  except OSError:
    return False
  return True


@contextlib.contextmanager
def replacing(path: Any) -> Iterator[BinaryIO]:
  """Opens a local file for writing that takes its name when the block ends, and that is removed if the block fails.

  A reader finds, and a kill leaves, either the old content or the new, never a part of it.
  """
  temporary = path.with_name(f'.{path.name}.tmp{os.getpid()}')  # two processes may write the same file
  try:
    with open(temporary, 'wb') as file:
      _try_lock(file, fcntl.LOCK_SH)  # `_remove_abandoned` sees by it that the writer is alive
      yield file
    move(temporary, path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.unlink(temporary)
    raise


def _remove_abandoned(path: Any) -> None:
  """Removes what processes that were killed have left of a file that they were writing.

  The number of a process means nothing on another machine or in another container, so nobody may hold the lock either.
  """
  start = f'.{path.name}.tmp'
  with contextlib.suppress(OSError):
    for name in os.listdir(path.parent):
      number = name.removeprefix(start)
      if name.startswith(start) and number.isdecimal() and len(number) < 10 and not is_running(int(number)):
        temporary = os.path.join(path.parent, name)
        with contextlib.suppress(OSError), open(temporary, 'rb') as file:
          if _try_lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
            os.unlink(temporary)


def write_atomically(path: Any, data: bytes) -> None:
  """Writes a file so that a reader finds, and a kill leaves, either the old content or the new.

  What an earlier writer of the same file left when it was killed is removed.
  """
  if '://' in str(path):
    path.write_bytes(data)
    return
  _remove_abandoned(path)
  with replacing(path) as file:
    file.write(data)


def write_json(path: Any, value: Any) -> None:
  """Writes a value as JSON, atomically."""
  write_atomically(path, json.dumps(value, ensure_ascii=False, indent=1).encode())


@contextlib.contextmanager
def lock(path: Any, *, wait: bool) -> Iterator[None]:
  """Holds a lock file within the block. The system frees it when the process ends, however it ends.

  On a file system without locks nothing is held, and the block runs as if it were alone.

  Args:
    path: the local file to lock; it is created if it does not exist, and stays.
    wait: whether to wait until no other process holds it.

  Raises:
    LockedError: another process holds it, and `wait` is False.
    OSError: the file cannot be written.
  """
  with open(path, 'a+', errors='replace') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise LockedError(file.read().strip() or 'another process') from None
    except OSError:
      pass  # a file system without locks
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}')
    file.flush()
    yield
