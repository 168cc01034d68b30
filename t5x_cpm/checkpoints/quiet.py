"""Errors of Orbax and TensorStore in one line, without what they print beside it.

A failed save or read raises an error, and is also logged with its traceback by several threads. Other reads and writes that
were under way report to an event loop that is closed by then, some of them after the call has returned.
"""

import contextlib
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

_hooks: list[Any] = []


def _not_of_orbax(record: logging.LogRecord) -> bool:
  return 'orbax' not in record.pathname and not (record.name == 'asyncio' and 'orbax' in record.getMessage())


def _ignore_closed_loops() -> None:
  """From now on: nobody can say when the last report comes."""
  if _hooks and sys.unraisablehook is _hooks[-1]:
    return
  before = sys.unraisablehook

  def hook(unraisable: Any) -> None:
    left = getattr(unraisable.object, 'cr_code', None)  # a coroutine that failed and that nobody waited for
    if str(unraisable.exc_value) != 'Event loop is closed' and not (left and 'orbax' in left.co_filename):
      before(unraisable)

  warnings.filterwarnings('ignore', r"coroutine '_\w+' was never awaited", RuntimeWarning)  # reads that were not begun
  _hooks.append(hook)
  sys.unraisablehook = hook
  logging.getLogger('asyncio').addFilter(_not_of_orbax)


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
  """Within the block, which may be entered again inside itself, Orbax's log does not reach the terminal."""
  _ignore_closed_loops()
  logger = logging.getLogger('absl')

  def keep(record: logging.LogRecord) -> bool:  # one for each block: a filter stands in the list once
    return _not_of_orbax(record)

  logger.addFilter(keep)
  try:
    yield
  finally:
    logger.removeFilter(keep)


def reason(error: BaseException) -> str:
  """What an error says, in one line, without the specifications and source lines that TensorStore adds."""
  if isinstance(error, OSError) and error.strerror:
    return f'{error.strerror}: {error.filename}' if error.filename else error.strerror
  text = ' '.join(str(error).split()) or type(error).__name__
  if ' See full TensorStore details' in text:  # pages of them
    text = text.partition(' See full TensorStore details')[0]
    return reason(error.__cause__) if error.__cause__ else text
  if 'No space left' in text:
    return 'no space left on the device'
  text = re.split(r' \[(?:tensorstore_spec|source locations)', text)[0]
  return text if len(text) <= 300 else text[:297] + '...'
