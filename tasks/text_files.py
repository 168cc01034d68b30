"""Reads documents from .txt and .jsonl files, plain or .gz: strictly, by byte range, and every error names file and line."""

import collections
import hashlib
import re
from collections.abc import Iterator, Sequence

from t5x_cpm import user_files
from t5x_cpm.config import ConfigError, LocalTaskConfig
from t5x_cpm.config.template import FieldError, Template
from t5x_cpm.data.cache import DataError
from t5x_cpm.data.rows import BLANK_FILES

UNIT_BYTES = 4 << 20  # how many bytes of a file are about one shard
_BLANK_LINE = re.compile(rb'\n[ \t\r]*\n')
OR_WHOLE = ", or if it is one document set LocalTaskConfig.text_document = 'file'"


def _end_of_match(f, pattern: re.Pattern) -> int:
  """How many bytes there are from here to the end of the first match, or of the file."""
  read, before = 0, b''
  while block := f.read(1 << 16):
    seen = before + block
    if match := pattern.search(seen):
      return read - len(before) + match.end()
    read += len(block)
    # The next block may end a blank line that this one begins.
    before = b'\n' if b'\n' in seen and not seen[seen.rfind(b'\n'):].strip() else b''
  return read


def ranges(files: list[str], document: str) -> list[tuple[str, int, int]]:
  """Cuts files into ranges (path, first byte, last byte + 1) at the borders of documents; a .gz file is one range, to -1.

  Args:
    files: paths.
    document: LocalTaskConfig.text_document.

  Raises:
    ConfigError: a file cannot be read, or is not text in UTF-8.
  """
  result = []
  for path in files:
    with user_files.opened(path) as f:
      if path.endswith('.gz'):
        result.append((path, 0, -1))
        continue
      size = f.seek(0, 2)
      borders = [0]
      if '.jsonl' in path or document != 'file':
        pattern = _BLANK_LINE if path.endswith('.txt') and document == 'paragraph' else re.compile(rb'\n')
        while borders[-1] + UNIT_BYTES < size:
          f.seek(borders[-1] + UNIT_BYTES)
          borders.append(f.tell() + _end_of_match(f, pattern))
      result += [(path, begin, end) for begin, end in zip(borders, [*borders[1:], size]) if begin < end]
  return result


def _newlines(path: str, end: int) -> int:
  """How many lines end before byte `end`, which is 0 in .gz files."""
  count = 0
  if end:
    with user_files.opened(path) as f:
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


def _parse(raw: bytes, sides: Sequence[str | Template]) -> tuple[str, ...]:
  wanted = tuple(name for side in sides for name in (side.fields if isinstance(side, Template) else (side,)))
  value = user_files.json_object(user_files.decode(raw), wanted)
  texts = []
  for side in sides:
    if isinstance(side, Template):
      try:
        texts.append(side.fill(value))
      except FieldError as error:
        raise user_files.MalformedError(f'{error} (LocalTaskConfig.inputs_template and targets_template name it)') from None
    else:
      hint = 'LocalTaskConfig.text_field, inputs_field and targets_field name the fields'
      texts += user_files.texts_of(value, (side,), hint)
  return tuple(texts)


def read(path: str, begin: int, end: int, config: LocalTaskConfig, sides: Sequence[str | Template],
         skipped: collections.Counter) -> Iterator[tuple[str, ...]]:
  """The documents of a range: one text, or inputs and targets. Blank lines and empty documents are left out.

  Args:
    path: the file.
    begin: the first byte, at the start of a document.
    end: the last byte + 1, or -1 for the end of the file.
    config: `text_document` and `skip_malformed` are read.
    sides: the field of a JSON line that holds a text, or the template that makes it; a .txt file has one text, whatever is
      given here.
    skipped: counts the documents that are left out, by reason; and under BLANK_FILES the files that hold nothing but blanks.

  Raises:
    DataError: the file cannot be read, or its lines end with CR alone; or a line is not UTF-8, or not a JSON object with these
      fields, and is not to be skipped.
  """
  found = False
  reader = _json_lines if '.jsonl' in path.rsplit('/', 1)[-1] else _texts
  try:
    with user_files.opened(path) as f:
      f.seek(begin)
      whole = reader is _texts and config.text_document == 'file'
      lines = user_files.lines(f, path, end - begin if end >= 0 else -1, whole=whole, or_else=OR_WHOLE)
      for number, raw in reader(lines, config):
        found = True
        try:
          document = _parse(raw, sides) if reader is _json_lines else (user_files.decode(raw),)
        except user_files.MalformedError as error:
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
  except ConfigError as error:
    raise DataError(str(error)) from None


def held_out(document: tuple[str, ...], fraction: float) -> bool:
  """Whether a document belongs to the validation split: a function of its text, so that copies stay together."""
  digest = hashlib.blake2b('\0'.join(document).encode(), digest_size=8).digest()
  return int.from_bytes(digest, 'big') < fraction * 2**64
