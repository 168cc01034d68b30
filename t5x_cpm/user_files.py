"""Files of text that a user gives: found by a glob, opened, read line by line, refused in words that say what they are.

Text is UTF-8, with or without a byte order mark, and compressed by gzip where the name of the file ends in .gz. Whatever reads
such files reads them with these functions, so that all accept the same and refuse the rest in the same words.
"""

import codecs
import contextlib
import errno
import functools
import glob
import gzip
import json
import os
import re
import stat
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from t5x_cpm.config import ConfigError
from t5x_cpm.config.fields import shown

LONGEST = 1 << 30  # bytes of a line: a longer one would fill the memory before anybody can refuse it
_HEAD = 4096  # bytes by which a file is recognised
_SIGNATURES = {
    b'\x1f\x8b': 'gzip data', b'PK\x03\x04': 'a zip archive', b'BZh': 'bzip2 data', b'\xfd7zXZ': 'xz data',
    b'\x28\xb5\x2f\xfd': 'zstd data', b'PAR1': 'a Parquet file', b'%PDF-': 'a PDF'}
_BYTE_ORDER_MARKS = {  # that of UTF-16 begins that of UTF-32
    codecs.BOM_UTF32_LE: 'UTF-32', codecs.BOM_UTF32_BE: 'UTF-32', codecs.BOM_UTF16_LE: 'UTF-16', codecs.BOM_UTF16_BE: 'UTF-16'}
_ORDINARY = re.compile('[\t\r\n -~\xa0-\u04ff\u2010-\u2027\u3000-\u30ff\u4e00-\u9fff\uff00-\uffee]')
_PAUSES = re.compile('[\n ,、。，]')
# Where a line ends with CR alone. Within a JSON object CR is a space like others.
_RETURN = re.compile(rb'^(?!\{).*\r|\}[ \t]*\r\s*\{', re.DOTALL)
_HIGH_PAIR = re.compile(rb'[\xa1-\xfe][\xa1-\xfe]')


class MalformedError(Exception):
  """A line or document that cannot be read. The message does not say where it is; `line` is the line of it at fault, from 0."""

  def __init__(self, text: str, line: int = 0):
    super().__init__(text)
    self.line = line


# ---- Finding files ----


def check(path: Any, name: str, *, pipes: bool = False) -> None:
  """Raises ConfigError, which calls it `name`, unless the path is that of a file, or of a pipe where `pipes` are taken."""
  try:
    mode = os.stat(path).st_mode
  except OSError as error:
    reason = f'cannot be read: {error.strerror or error}'
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
      reason = f'is a link to {os.readlink(path)}, which is not there' if os.path.islink(path) else 'does not exist'
    raise ConfigError(f'{name} {reason}.') from None
  if stat.S_ISDIR(mode):
    raise ConfigError(f'{name} is a folder: expected a file.')
  if not stat.S_ISREG(mode) and not (pipes and (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode))):
    raise ConfigError(f'{name} is neither a file nor a folder: expected a file.')


def literal(pattern: str) -> str:
  """A glob, in which brackets stand for themselves if there is a file of that very name."""
  return glob.escape(pattern) if '[' in pattern and not set('*?') & set(pattern) and os.path.lexists(pattern) else pattern


def _why_none(pattern: str) -> str:
  """Why no file matches a glob."""
  bare = pattern.replace('[', '[[]')
  if bare != pattern and glob.glob(bare, recursive=True):
    brackets = pattern[pattern.find('['):pattern.find(']') + 1]
    return (f'matches no file: in a glob, {brackets} stands for one of the characters in it. For the brackets themselves write '
            f'{bare!r}.')
  folder = pattern
  while glob.has_magic(folder) or not os.path.lexists(folder or '.'):
    folder = os.path.dirname(folder.rstrip('/'))
  if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
    return f'matches no file: the folder {folder} cannot be read (no permission).'
  return f'matches no file (current folder: {os.getcwd()}).'


def find(pattern: str, given: str, *, pipes: bool = False) -> list[str]:
  """The files of a glob, in a fixed order. Folders that match it as well are passed over.

  Args:
    pattern: the glob, as in `glob.glob(recursive=True)`; see `literal` for names with brackets.
    given: what errors call it, such as '--input=*.txt'.
    pipes: whether a named pipe may stand for a file.

  Raises:
    ConfigError: no file matches, or something does that is neither a file nor a folder, such as a link to nothing.
  """
  pattern = os.path.expanduser(pattern)
  if os.path.isdir(pattern):
    raise ConfigError(f'{given} is a folder: for the files in it, write {os.path.join(pattern, "*.txt")!r}, say.')
  found = sorted(glob.glob(literal(pattern), recursive=True))
  files = [path for path in found if not os.path.isdir(path)]
  for path in files:
    check(path, path if path == pattern else f'{path} (of {given})', pipes=pipes)
  if found and not files:
    raise ConfigError(f'{given} matches only folders: for the files in them, write {os.path.join(pattern, "*.txt")!r}, say.')
  if not files:
    raise ConfigError(f'{given} {_why_none(pattern)}')
  return files


# ---- Reading lines ----


def _is_written_in(head: bytes, encoding: str) -> bool:
  """Whether bytes that are no UTF-8 text make sense in an encoding: ordinary characters, some of them between words."""
  unit = int(encoding[4:6]) // 8
  try:
    text = codecs.getincrementaldecoder(encoding)().decode(head[:len(head) // unit * unit])
  except UnicodeDecodeError:
    return False
  pauses = len(_PAUSES.findall(text))
  return len(_ORDINARY.findall(text)) >= 0.95 * len(text) and pauses >= 0.01 * len(text) > 0


def _what_instead(head: bytes) -> str:
  """What a file is that begins with these bytes, if it is clearly something else than UTF-8 text; otherwise ''."""
  try:
    codecs.getincrementaldecoder('utf-8')().decode(head)  # which may end within a character
    if b'\0' not in head:
      return ''
  except UnicodeDecodeError:
    pass
  for signature, kind in _SIGNATURES.items():
    if head.startswith(signature):
      return f'{kind}, not text'
  marked = (name for mark, name in _BYTE_ORDER_MARKS.items() if head.startswith(mark))
  unmarked = (name for name in ('UTF-32LE', 'UTF-32BE', 'UTF-16LE', 'UTF-16BE') if _is_written_in(head, name))
  if encoding := next(marked, '') or next(unmarked, ''):
    return f'text in {encoding}: convert it to UTF-8 with `iconv -f {encoding} -t UTF-8`'
  return 'not text: it is full of NUL bytes' if head.count(0) > 0.1 * len(head) else ''


def _check_head(head: bytes, name: str) -> None:
  if what := _what_instead(head[:_HEAD]):
    raise ConfigError(f'{name} is {what}.')


@contextlib.contextmanager
def opened(path: Any, name: str = '') -> Iterator[BinaryIO]:
  """Opens a file of text for reading bytes; what ends in .gz is decompressed.

  Args:
    path: the file.
    name: what errors call it; by default its path.

  Raises:
    ConfigError: it cannot be read, is damaged, or is clearly something else than UTF-8 text. The block must do nothing but
      read: an error of the system in it is taken for one of this file.
  """
  name = name or str(path)
  try:
    with open(path, 'rb') as plain:
      if not str(path).endswith('.gz'):
        _check_head(plain.peek(_HEAD), name)
        yield plain
        return
      start = plain.peek(2)
      if start and not start.startswith(b'\x1f\x8b'):
        raise ConfigError(f'{name} is not in gzip format, though its name ends in .gz: rename or compress it.')
      with gzip.GzipFile(fileobj=plain) as file:
        _check_head(file.peek(_HEAD), name)
        yield cast(BinaryIO, file)
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise ConfigError(f'{name} is damaged: {str(error)[:1].lower()}{str(error)[1:]}.') from None
  except OSError as error:
    raise ConfigError(f'{name} cannot be read: {error.strerror or error}.') from None


def _follows(file: Any) -> bool:
  """Whether more bytes follow in a file. One that cannot tell is taken to have them."""
  return not hasattr(file, 'peek') or bool(file.peek(1))


def lines(file: BinaryIO, name: str, size: int = -1, *, whole: bool = False, or_else: str = '') -> Iterator[bytes]:
  """The lines of an open file from where it stands, with their ends; a byte order mark at its start is left out.

  Args:
    file: from `opened`.
    name: what errors call it.
    size: how many bytes to read, up to the end of a line; -1 is all.
    whole: whether lines mean nothing, because the file is one text.
    or_else: what else than converting it may help where lines end with CR alone.

  Raises:
    ConfigError: a line is longer than LONGEST bytes; or the whole file is one line, with CR in it.
  """
  is_first = file.tell() == 0 if file.seekable() else True
  for line in iter(functools.partial(file.readline, LONGEST), b''):
    length = len(line)
    if length == LONGEST and not line.endswith(b'\n') and file.read(1):
      raise ConfigError(f'{name} has a line of more than {LONGEST:,} bytes: cut it into lines.')
    if is_first and not whole and _RETURN.search(line.strip()) and not _follows(file):
      raise ConfigError(f'{name}: its lines end with CR alone, so that all would be read as one line. Convert it with '
                        f"`tr '\\r' '\\n'`{or_else}.")
    yield line.removeprefix(codecs.BOM_UTF8) if is_first else line
    is_first = False
    size -= length
    if not size:
      return


def _is_gbk(raw: bytes) -> bool:
  """Whether bytes that are not UTF-8 look like Chinese in GBK: pairs of high bytes, most of them of frequent characters."""
  pairs = _HIGH_PAIR.findall(raw)
  frequent = [pair for pair in pairs if 0xb0 <= pair[0] <= 0xd7]  # sorted by pinyin, from 啊 to 座
  high = len(raw) - len(raw.translate(None, bytes(range(0x80, 0x100))))
  # In Korean's EUC-KR the same range ends at 0xc8.
  return 2 * len(pairs) >= 0.9 * high and 2 * len(frequent) > len(pairs) and (len(pairs) < 8 or max(frequent)[0] > 0xc8)


def hint(raw: bytes) -> str:
  """What the first bytes of something that is not UTF-8 look like, if that is clear, as the end of an error; otherwise ''."""
  if what := _what_instead(raw[:_HEAD]):
    return f'; it is {what}'
  return '; it looks like GBK: convert it to UTF-8 with `iconv -f GB18030 -t UTF-8`' if _is_gbk(raw[:1 << 16]) else ''


def decode(raw: bytes) -> str:
  """The text of one or several lines, with line feeds between them and no line end around them.

  Raises:
    MalformedError: it is not UTF-8; says which byte, and whether it looks like GBK.
  """
  try:
    return raw.decode().replace('\r\n', '\n').strip('\r\n')
  except UnicodeDecodeError as error:
    line = raw.count(b'\n', 0, error.start)
    column = error.start - (raw.rfind(b'\n', 0, error.start) + 1) + 1
    raise MalformedError(f'byte {column} of the line (0x{raw[error.start]:02x}) is not valid UTF-8{hint(raw)}', line) from None


# ---- JSON ----


def _from_json(text: str) -> Any:
  """A value. Raises MalformedError if the text is not JSON."""
  try:
    return json.loads(text)
  except json.JSONDecodeError as error:
    rest = f' of line {error.lineno}' if error.lineno > 1 else ''
    raise MalformedError(f'malformed JSON ({error.msg.removesuffix(" starting at")} at column {error.colno}{rest})') from None
  except RecursionError:
    raise MalformedError('malformed JSON (nested too deeply)') from None
  except ValueError:  # Python limits the digits of an integer
    raise MalformedError('malformed JSON (a number of too many digits)') from None


def json_file(path: Any, name: str) -> dict[str, Any]:
  """The JSON object in a file, which errors call `name`. Raises ConfigError if the file cannot be read or holds none."""
  check(path, name)
  with opened(path, name) as file:
    raw = file.read()
  try:
    value = _from_json(decode(raw.removeprefix(codecs.BOM_UTF8)))
  except MalformedError as error:
    raise ConfigError(f'{name}: {error}.') from None
  if not isinstance(value, dict):
    raise ConfigError(f'{name}: expected a JSON object, got {shown(value)}.')
  return value


def json_object(line: str, fields: tuple[str, ...]) -> dict[str, Any]:
  """The JSON object of a line, of which `fields` are wanted. Raises MalformedError if the line holds no object."""
  wanted = ' and '.join(map(repr, fields))
  if line.lstrip().startswith('['):  # which may end on another line
    raise MalformedError(f'a JSON array, where a JSON object with {wanted} is expected: write one object a line')
  if line.strip() == '{':
    raise MalformedError('a JSON object that does not end on its line: write one object a line')
  value = _from_json(line)
  if not isinstance(value, dict):
    raise MalformedError(f'expected a JSON object with {wanted}, got {shown(value)}')
  return value


def texts_of(value: dict[str, Any], fields: tuple[str, ...], hint: str) -> tuple[str, ...]:
  """The texts in some fields of a JSON object.

  Args:
    value: the object.
    fields: names of the fields.
    hint: says where these names are set.

  Raises:
    MalformedError: a field is missing or not a text, or its text cannot be written in UTF-8.
  """
  for field in fields:
    if not isinstance(value.get(field), str):
      given = f'{field!r} is not a text' if field in value else f'no field {field!r} among {sorted(value)[:8]}'
      raise MalformedError(f'{given} ({hint})')
    if any('\ud800' <= c <= '\udfff' for c in value[field]):
      raise MalformedError(f'{field!r} holds half of a surrogate pair')
  return tuple(value[field] for field in fields)


def json_texts(line: str, fields: tuple[str, ...], hint: str) -> tuple[str, ...]:
  """The texts in some fields of the JSON object of a line. Arguments and errors are those of `json_object` and `texts_of`."""
  return texts_of(json_object(line, fields), fields, hint)
