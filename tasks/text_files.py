"""Reads documents from .txt and .jsonl files, plain or .gz: strictly, by byte range, and every error names file and line."""

import collections
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from typing import Any

from t5x_cpm.config import LocalTaskConfig
from t5x_cpm.data.cache import DataError
from t5x_cpm.data.rows import BLANK_FILES

UNIT_BYTES = 4 << 20  # how many bytes of a file are about one shard
_BOM = b'\xef\xbb\xbf'
_BLANK_LINE = re.compile(rb'\n[ \t\r]*\n')


def _end_of_match(f, pattern: re.Pattern) -> int:
  """How many bytes there are from here to the end of the first match, or of the file."""
  seen = b''
  while block := f.read(1 << 16):
    seen += block
    if match := pattern.search(seen):
      return match.end()
  return len(seen)


def ranges(files: list[str], document: str) -> list[tuple[str, int, int]]:
  """Cuts files into ranges (path, first byte, last byte + 1) at the borders of documents; a .gz file is one range, to -1.

  Args:
    files: paths.
    document: LocalTaskConfig.text_document.
  """
  result = []
  for path in files:
    if path.endswith('.gz'):
      result.append((path, 0, -1))
      continue
    with open(path, 'rb') as f:
      size = f.seek(0, 2)
      borders = [0]
      if '.jsonl' in path or document != 'file':
        pattern = _BLANK_LINE if path.endswith('.txt') and document == 'paragraph' else re.compile(rb'\n')
        while borders[-1] + UNIT_BYTES < size:
          f.seek(borders[-1] + UNIT_BYTES)
          borders.append(f.tell() + _end_of_match(f, pattern))
      result += [(path, begin, end) for begin, end in zip(borders, [*borders[1:], size]) if begin < end]
  return result


class MalformedError(Exception):
  """A document that cannot be read. The message does not say where it is; `line` is the line of it at fault, from 0."""

  def __init__(self, text: str, line: int = 0):
    super().__init__(text)
    self.line = line


class _CarriageReturnsError(Exception):
  """A file is one line, with carriage returns in it."""


def _lines(f, size: int, whole: bool) -> Iterator[bytes]:
  """The lines of `size` bytes from here on, or of all that follow. `whole`: the file is one document, so nothing is checked."""
  first = f.tell() == 0
  for line in f:
    if first and not whole and b'\r' in line.strip(b'\r\n') and not f.peek(1):
      raise _CarriageReturnsError
    yield line.removeprefix(_BOM) if first else line
    first = False
    size -= len(line)
    if size == 0:
      return


def _newlines(path: str, end: int) -> int:
  """How many lines end before byte `end`, which is 0 in .gz files."""
  count = 0
  if end:
    with open(path, 'rb') as f:
      while end and (block := f.read(min(end, 1 << 20))):
        count += block.count(b'\n')
        end -= len(block)
  return count


def _json_lines(lines: Iterator[bytes], config: LocalTaskConfig) -> Iterator[tuple[int, bytes]]:
  del config
  for number, line in enumerate(lines, 1):
    if line.strip():
      yield number, line


def _texts(lines: Iterator[bytes], config: LocalTaskConfig) -> Iterator[tuple[int, bytes]]:
  if config.text_document == 'file':
    yield 1, b''.join(lines)
    return
  block: list[bytes] = []
  number = 0
  for number, line in enumerate(lines, 1):
    if config.text_document == 'line':
      if line.strip():
        yield number, line
    elif line.strip():
      block.append(line)
    elif block:
      yield number - len(block), b''.join(block)
      block = []
  if block:
    yield number - len(block) + 1, b''.join(block)


def _decode(raw: bytes) -> str:
  try:
    return raw.decode().replace('\r\n', '\n').strip('\r\n')
  except UnicodeDecodeError as error:
    line = raw.count(b'\n', 0, error.start)
    column = error.start - (raw.rfind(b'\n', 0, error.start) + 1) + 1
    raise MalformedError(f'byte {column} of the line (0x{raw[error.start]:02x}) is not valid UTF-8', line) from None


def json_object(line: str, fields: tuple[str, ...]) -> dict[str, Any]:
  """The JSON object of a line, of which `fields` are wanted. Raises MalformedError if the line holds no object."""
  try:
    value = json.loads(line)
  except json.JSONDecodeError as error:
    raise MalformedError(f'malformed JSON ({error.msg} at column {error.colno})') from None
  except RecursionError:
    raise MalformedError('malformed JSON (nested too deeply)') from None
  except ValueError:  # Python limits the digits of an integer
    raise MalformedError('malformed JSON (a number of too many digits)') from None
  if not isinstance(value, dict):
    raise MalformedError(f'expected a JSON object with {" and ".join(map(repr, fields))}, got {line[:40]!r}')
  return value


def texts_of(value: dict[str, Any], fields: tuple[str, ...], hint: str) -> tuple[str, ...]:
  """The texts in some fields of a JSON object.

  Args:
    value: the object.
    fields: names of the fields.
    hint: says which fields of the configuration name them.

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
  """The texts in some fields of a JSON object. Arguments and errors are those of `json_object` and `texts_of`."""
  return texts_of(json_object(line, fields), fields, hint)


def _parse(raw: bytes, fields: tuple[str, ...]) -> tuple[str, ...]:
  return json_texts(_decode(raw), fields, 'LocalTaskConfig.text_field, inputs_field and targets_field name the fields')


def read(path: str, begin: int, end: int, config: LocalTaskConfig, fields: tuple[str, ...],
         skipped: collections.Counter) -> Iterator[tuple[str, ...]]:
  """The documents of a range: one text, or inputs and targets. Blank lines and empty documents are left out.

  Args:
    path: the file.
    begin: the first byte, at the start of a document.
    end: the last byte + 1, or -1 for the end of the file.
    config: `text_document` and `skip_malformed` are read.
    fields: the fields of a JSON line that hold the texts; a .txt file has one text, whatever is named here.
    skipped: counts the documents that are left out, by reason; and under BLANK_FILES the files that hold nothing but blanks.

  Raises:
    DataError: a line is not UTF-8, or not a JSON object with these fields, and is not to be skipped; or lines end with CR
      alone.
  """
  found = False
  reader = _json_lines if '.jsonl' in path.rsplit('/', 1)[-1] else _texts
  opener = gzip.open if path.endswith('.gz') else open
  try:
    with opener(path, 'rb') as f:
      f.seek(begin)
      whole = reader is _texts and config.text_document == 'file'
      for number, raw in reader(_lines(f, end - begin if end >= 0 else -1, whole), config):
        found = True
        try:
          document = _parse(raw, fields) if reader is _json_lines else (_decode(raw),)
        except MalformedError as error:
          if not config.skip_malformed:
            line = number + error.line + _newlines(path, begin)
            raise DataError(f'{path}:{line}: {error}. Mend the line, or set LocalTaskConfig.skip_malformed = True to leave '
                            'such lines out.') from None
          skipped['malformed'] += 1
          continue
        if all(text.strip() for text in document):
          yield document
        else:
          skipped['empty'] += 1
      if not found and begin == 0 and not f.read(1):
        skipped[BLANK_FILES] += 1
  except _CarriageReturnsError:
    raise DataError(f'{path}: its lines end with CR alone, so that the whole file would be read as one line. Convert it with '
                    "`tr '\\r' '\\n'`, or if it is one document set LocalTaskConfig.text_document = 'file'.") from None
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise DataError(f'{path}: the file is damaged or not in gzip format ({error}).') from None


def held_out(document: tuple[str, ...], fraction: float) -> bool:
  """Whether a document belongs to the validation split: a function of its text, so that copies stay together."""
  digest = hashlib.blake2b('\0'.join(document).encode(), digest_size=8).digest()
  return int.from_bytes(digest, 'big') < fraction * 2**64
