"""Reads the text that a vocabulary is trained on or measured with."""

import glob
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence

from t5x_cpm.config import ConfigError


def _read_file(path: str, field: str) -> Iterator[str]:
  opened = gzip.open(path, 'rt', encoding='utf-8') if path.endswith('.gz') else open(path, encoding='utf-8')  # noqa: SIM115
  with opened as lines:
    for number, line in enumerate(lines, 1):
      if not path.removesuffix('.gz').endswith('.jsonl'):
        yield line
        continue
      try:
        text = json.loads(line)[field]
      except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f'{path}:{number}: expected a JSON object with the field {field!r} ({error}).') from None
      if not isinstance(text, str):
        raise ConfigError(f'{path}:{number}: the field {field!r} is not a text.')
      yield text


def read(patterns: Sequence[str], field: str) -> Iterator[str]:
  """The lines of all files, or the text fields of .jsonl; .gz is decompressed.

  Args:
    patterns: globs of .txt, .tsv or .jsonl files.
    field: the field of .jsonl with the text.

  Raises:
    ConfigError: a glob without files, or a file that is not UTF-8 text, or not JSON with such a field.
  """
  for pattern in patterns:
    paths = sorted(glob.glob(pattern, recursive=True))
    if not paths:
      raise ConfigError(f'--input={pattern} matches no file.')
    for path in paths:
      try:
        yield from _read_file(path, field)
      except UnicodeDecodeError as error:
        raise ConfigError(f'{path}: not UTF-8 text ({error.reason}, byte {error.object[error.start]:#04x}).') from None
      except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ConfigError(f'{path}: the file is damaged or not in gzip format ({error}).') from None
