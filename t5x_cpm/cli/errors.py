"""Which errors are reported in one line, and with which exit code."""

import errno
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from t5x_cpm.config.fields import printable

# Errors of the machine, not of the program: the message is enough.
OF_THE_MACHINE = (
    'ENOSPC', 'EDQUOT', 'EROFS', 'EACCES', 'EPERM', 'ENOENT', 'EISDIR', 'ENOTDIR', 'EEXIST', 'ELOOP', 'ENAMETOOLONG', 'EIO')


def is_users(error: Exception) -> bool:
  """Whether the message of an error is all that a user needs: t5x_cpm raised it for bad input, or the disk refused."""
  if isinstance(error, OSError):
    return errno.errorcode.get(error.errno or 0) in OF_THE_MACHINE
  return isinstance(error, ValueError) and type(error).__module__.split('.')[0] == 't5x_cpm'


def _readable(text: str) -> str:
  """A message whose quotations do not move the cursor, can be written as UTF-8, and fill no screen."""
  short = re.sub(r'\S{500,}', lambda word: f'{word[0][:100]}... ({len(word[0]):,} characters)', text)
  return '\n'.join(map(printable, short.split('\n')))


def tell(error: BaseException) -> int:
  """Prints an error whose message is enough, and returns the exit code: 2 for bad input. Raises any other."""
  if isinstance(error, KeyboardInterrupt):
    return 130
  if isinstance(error, FloatingPointError) or (isinstance(error, Exception) and is_users(error)):
    print(f'error: {_readable(str(error))}', file=sys.stderr)
    return 1 if isinstance(error, FloatingPointError) else 2
  raise error


def run_script(main: Callable[[], None]) -> NoReturn:
  """Runs a script and ends the program, with the words and the exit codes of the modes."""
  try:
    main()
  except (Exception, KeyboardInterrupt) as error:
    sys.exit(tell(error))
  sys.exit(0)
