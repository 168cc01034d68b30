"""The task 'local': a user's own text files, from gin alone.

One glob is one task. A dict of globs is a mixture of the tasks 'local:NAME', each with a cache of its own.
"""

import dataclasses
import glob
import os

from t5x_cpm.config import ConfigError, LocalTaskConfig
from t5x_cpm.tasks.table import MixtureRow, Row

SUFFIXES = ('.txt', '.jsonl', '.txt.gz', '.jsonl.gz')
_TEXT = 'your own files'


def row(name: str, config: LocalTaskConfig) -> Row | MixtureRow:
  """The row of 'local' or 'local:NAME'."""
  if not config.files:
    raise ConfigError("TaskConfig.name = 'local' needs files: set LocalTaskConfig.files to a glob such as "
                      "'/data/zh/*.jsonl', or to a dict of name -> glob for a mixture.")
  if name == 'local' and isinstance(config.files, dict):
    return MixtureRow(name, _TEXT, rates(config), kind='local')
  if name != 'local' and (not isinstance(config.files, dict) or name.removeprefix('local:') not in config.files):
    known = sorted(config.files) if isinstance(config.files, dict) else 'one glob'
    raise ConfigError(f'TaskConfig.name = {name!r}: LocalTaskConfig.files has {known}.')
  return Row(name, _TEXT, 'local', metrics=('exact_match', 'char_f1'))


def rates(config: LocalTaskConfig) -> dict[str, float]:
  """The rate of each task 'local:NAME'; all equal where none are given."""
  return {f'local:{name}': float(config.rates.get(name, 1.0)) for name in config.files}


def part(name: str, config: LocalTaskConfig) -> LocalTaskConfig:
  """The configuration of one task of a mixture, without the others, whose changes do not concern its cache."""
  if name == 'local':
    return config
  key = name.removeprefix('local:')
  held_out = config.validation_files
  if isinstance(held_out, dict):
    held_out = held_out.get(key, '')
  elif held_out:
    raise ConfigError(f'LocalTaskConfig.validation_files = {held_out!r}: expected a dict of name -> glob, as in '
                      'LocalTaskConfig.files.')
  return dataclasses.replace(config, files=dict(config.files)[key], rates={}, validation_files=held_out)


def find(pattern: str, field: str, pairs: bool) -> list[str]:
  """The files of a glob, in a fixed order.

  Raises:
    ConfigError: there are none, or one is of a kind that cannot be read.
  """
  pattern = os.path.expanduser(pattern)
  files = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
  if not files:
    raise ConfigError(f'LocalTaskConfig.{field} = {pattern!r} matches no file (current folder: {os.getcwd()}).')
  for path in files:
    if not path.endswith(SUFFIXES):
      raise ConfigError(f'LocalTaskConfig.{field}: {path} ends in none of {", ".join(SUFFIXES)}.')
    if pairs and '.jsonl' not in os.path.basename(path):
      raise ConfigError(f"LocalTaskConfig.{field}: {path}: TaskConfig.objective = 'pairs' reads .jsonl files, with inputs and "
                        'targets.')
  return files
