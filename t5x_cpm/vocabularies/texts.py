"""Reads the text that a vocabulary is trained on or measured with."""

from collections.abc import Iterator, Sequence

from t5x_cpm import user_files
from t5x_cpm.config import ConfigError
from t5x_cpm.config.fields import shown


def _read_file(path: str, field: str) -> Iterator[str]:
  kind = path.removesuffix('.gz')
  if kind.endswith('.json'):
    raise ConfigError(f'{path}: expected a .txt, .tsv or .jsonl file: write one JSON object a line, and name the file .jsonl.')
  with user_files.opened(path) as file:
    for number, raw in enumerate(user_files.lines(file, path), 1):
      try:
        text = user_files.decode(raw)
        if text.strip() and kind.endswith('.jsonl'):
          text, = user_files.json_texts(text, (field,), '--field names the field')
      except user_files.MalformedError as error:
        raise ConfigError(f'{path}:{number}: {error}.') from None
      if text.strip():
        yield text


def read(patterns: Sequence[str], field: str) -> Iterator[str]:
  """The lines of all files that are not blank, or the text fields of .jsonl; .gz is decompressed.

  Args:
    patterns: globs of .txt, .tsv or .jsonl files.
    field: the field of .jsonl with the text.

  Raises:
    ConfigError: a glob without files, or files without text; a file that cannot be read or is not text in UTF-8; or a line,
      with its number, that is not UTF-8, or not JSON with such a field.
  """
  is_empty = True
  for pattern in patterns:
    for path in user_files.find(pattern, f'--input={shown(pattern)}', pipes=True):
      for text in _read_file(path, field):
        is_empty = False
        yield text
  if is_empty:
    raise ConfigError(f'there is no text in --input={shown(" ".join(patterns))}.')
