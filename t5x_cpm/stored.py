"""JSON files that the project wrote, read back: each has a known form and, since digests were introduced, a digest of its own.

A file of an earlier version, without a digest, is accepted as it is. `data.blocks` does the same for files of numbers.
"""

import errno
import hashlib
import json
import math
from collections.abc import Callable
from typing import Any, NoReturn

from t5x_cpm import files
from t5x_cpm.config import ConfigError

COUNT = range(1 << 53)
OF_THE_FILE = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EIO)  # not of permissions, say
_KINDS = {str: 'a text', bool: 'true or false', dict: 'an object', list: 'a list', float: 'a number'}


class DamagedError(ConfigError):
  """A file does not hold what the project wrote there. The message says which file, what is wrong and what to do.

  Attributes:
    what: what is wrong.
    reason: the message without what to do.
  """

  def __init__(self, path: Any, what: str, remedy: str):
    self.what, self.reason = what, f'{path} is damaged ({what})'
    super().__init__(f'{self.reason}. {remedy}')


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 40 else text[:37] + '...'


def mismatch(value: Any, form: Any, place: str = '') -> str:
  """What keeps a JSON value from having a form; '' if nothing does.

  Args:
    value: what `json.loads` gave.
    form: a type (`float` is any finite number); a range, for a whole number in it; a tuple, for one of the values in it;
      [form], for a list; {str: form}, for an object with any names; {'name': form, 'optional?': form}, for one with these
      names and no others; or a function that says whether the value is right.
    place: where the value stands, as errors call it.
  """
  where = f'{place}: ' if place else ''
  if isinstance(form, dict):
    if not isinstance(value, dict):
      return f'{where}expected an object, got {_short(value)}'
    fields = {name.removesuffix('?'): inner for name, inner in form.items() if name is not str}
    missing = [name for name in form if name is not str and not name.endswith('?') and name not in value]
    unknown = [name for name in value if name not in fields and str not in form]
    if missing or unknown:
      return f'{where}no {missing[0]!r}' if missing else f'{where}unknown field {_short(unknown[0])}'
    parts = ((name, inner, fields[name] if name in fields else form[str]) for name, inner in value.items())
  elif isinstance(form, list):
    if not isinstance(value, list):
      return f'{where}expected a list, got {_short(value)}'
    parts = ((str(number), inner, form[0]) for number, inner in enumerate(value))
  elif isinstance(form, range):
    right = isinstance(value, int) and not isinstance(value, bool) and value in form
    return '' if right else f'{where}expected a whole number from {form.start} to {form.stop - 1}, got {_short(value)}'
  elif isinstance(form, tuple):
    return '' if value in form else f'{where}expected one of {", ".join(map(repr, form))}, got {_short(value)}'
  elif form is float:
    right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return '' if right else f'{where}expected a number, got {_short(value)}'
  elif isinstance(form, type):
    return '' if isinstance(value, form) else f'{where}expected {_KINDS[form]}, got {_short(value)}'
  else:
    return '' if form(value) else f'{where}unexpected {_short(value)}'
  wrong = (mismatch(inner, of_inner, f'{place}.{name}' if place else name) for name, inner, of_inner in parts)
  return next(filter(None, wrong), '')


def digest(value: Any) -> str:
  """A digest of a JSON value, whatever the order of its fields."""
  text = json.dumps(value, sort_keys=True, separators=(',', ':'))
  return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def write(path: Any, value: dict[str, Any]) -> None:
  """Writes an object as JSON, atomically, with its digest as the field 'digest'."""
  files.write_json(path, value | {'digest': digest(json.loads(json.dumps(value)))})


def _refuse(constant: str) -> NoReturn:
  raise ValueError(f'{constant} is not JSON')


def loads(raw: bytes, parse_constant: Callable[[str], Any] | None = None) -> Any:
  """The JSON value in the content of a file. Raises ValueError, with a reason in one line, where there is none."""
  try:
    value = json.loads(raw.decode(), parse_constant=parse_constant)
  except UnicodeDecodeError as error:
    raise ValueError(f'byte {error.start} is not UTF-8') from None
  except RecursionError:
    raise ValueError('nested too deeply') from None
  except ValueError as error:
    raise ValueError(f'malformed JSON: {error}') from None
  if b'\\ud' in raw.lower() and any('\ud800' <= char <= '\udfff' for char in json.dumps(value, ensure_ascii=False)):
    raise ValueError('half of a surrogate pair, which UTF-8 cannot write')
  return value


def content(path: Any, remedy: str) -> bytes:
  """What is in a file that the project wrote.

  Raises:
    DamagedError: it is missing, or not a file.
    ConfigError: it cannot be read, for want of permission for example.
  """
  try:
    return files.read_bytes(path)
  except OSError as error:
    if error.errno in OF_THE_FILE:
      raise DamagedError(path, error.strerror or 'it cannot be read', remedy) from None
    raise ConfigError(f'{path} cannot be read: {error.strerror or error}.') from None


def parse(path: Any, remedy: str, signed: str = '', *, finite: bool = True) -> dict[str, Any]:
  """The object in a JSON file, of any form; its digest has been compared and is left out.

  Args:
    path: the file.
    remedy: what errors tell the user to do.
    signed: a field that is as new as digests are: an object that has it must have a digest.
    finite: whether NaN and infinite numbers, which JSON does not have, are refused. The metrics of a checkpoint may be so.

  Raises:
    DamagedError: it is missing, not a file, no JSON object, or not what was written.
    ConfigError: it cannot be read, for want of permission for example.
  """
  raw = content(path, remedy)
  try:
    value = loads(raw, _refuse if finite else None)
  except ValueError as error:
    raise DamagedError(path, str(error), remedy) from None
  if not isinstance(value, dict):
    raise DamagedError(path, f'expected a JSON object, got {_short(value)}', remedy)
  expected = value.pop('digest', None)
  try:
    is_changed = digest(value) != expected if expected is not None else signed in value
  except ValueError as error:  # a number of thousands of digits
    raise DamagedError(path, str(error), remedy) from None
  if is_changed:
    raise DamagedError(path, 'its content does not have the digest that it was written with', remedy)
  return value


def require(path: Any, value: Any, form: Any, remedy: str) -> None:
  """Raises DamagedError unless the value of a file has a form; see `mismatch`."""
  wrong = mismatch(value, form)
  if wrong:
    raise DamagedError(path, wrong, remedy)


def read(path: Any, form: Any, remedy: str, signed: str = '') -> dict[str, Any]:
  """The object in a JSON file. Arguments and errors are those of `parse` and `require`."""
  value = parse(path, remedy, signed)
  require(path, value, form, remedy)
  return value


def is_plain_name(name: Any) -> bool:
  """Whether a text names a file of the same folder, rather than one of another folder."""
  return isinstance(name, str) and name not in ('', '.', '..') and not any(c in name for c in '/\\\0')
