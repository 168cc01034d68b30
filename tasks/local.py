"""The task 'local': a user's own text files, from gin alone.

One glob is one task. A dict of globs is a mixture of the tasks 'local:NAME', each with a cache of its own.
"""

import collections
import dataclasses
import os

from t5x_cpm import user_files
from t5x_cpm.config import Config, ConfigError, LocalTaskConfig
from t5x_cpm.config.fields import shown
from t5x_cpm.tasks import text_files
from t5x_cpm.tasks.documents import Documents
from t5x_cpm.tasks.table import MixtureRow, Row

SUFFIXES = ('.txt', '.jsonl', '.txt.gz', '.jsonl.gz')
_TEXT = 'your own files'


def rates(config: LocalTaskConfig) -> dict[str, float]:
  """The rate of each task 'local:NAME'; all equal where none are given."""
  return {f'local:{name}': float(config.rates.get(name, 1.0)) for name in config.files}


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


def own_config(name: str, config: LocalTaskConfig) -> LocalTaskConfig:
  """The configuration of one task of a mixture without the others, so that a change to those leaves its cache alone."""
  if name == 'local':
    return config
  assert isinstance(config.files, dict)
  key = name.removeprefix('local:')
  held_out = config.validation_files
  if isinstance(held_out, dict):
    held_out = held_out.get(key, '')
  elif held_out:
    raise ConfigError(f'LocalTaskConfig.validation_files = {held_out!r}: expected a dict of name -> glob, as in '
                      'LocalTaskConfig.files.')
  return dataclasses.replace(config, files=config.files[key], rates={}, validation_files=held_out)


def find(pattern: str, field: str, pairs: bool) -> list[str]:
  """The files of a glob, in a fixed order.

  Raises:
    ConfigError: no file matches, or one is of a kind that cannot be read.
  """
  files = user_files.find(pattern, f'LocalTaskConfig.{field} = {shown(pattern)}')
  for path in files:
    if not path.endswith(SUFFIXES):
      raise ConfigError(f'LocalTaskConfig.{field}: {path} ends in none of {", ".join(SUFFIXES)}.')
    if pairs and '.jsonl' not in os.path.basename(path):
      raise ConfigError(f"LocalTaskConfig.{field}: {path}: TaskConfig.objective = 'pairs' reads .jsonl files, with inputs and "
                        'targets.')
  return files


def documents(name: str, config: Config) -> Documents:
  """The documents of 'local' or 'local:NAME'. Without files of its own, validation takes a share of the training documents.

  Raises:
    ConfigError: as in `find`, or all files are empty.
  """
  own, pairs = own_config(name, config.local_task), config.task.objective == 'pairs'
  assert isinstance(own.files, str) and isinstance(own.validation_files, str)
  found = {'train': find(own.files, 'files', pairs)}
  if own.validation_files:
    found['validation'] = find(own.validation_files, 'validation_files', pairs)
  elif own.validation_fraction:
    found['validation'] = found['train']
  ranges = {split: text_files.ranges(paths, own.text_document) for split, paths in found.items()}
  if not ranges['train']:
    raise ConfigError(f'LocalTaskConfig.files = {own.files!r}: every file that matches is empty.')
  templates = own.templates()
  sides = (templates[0] or own.inputs_field, templates[1] or own.targets_field) if pairs else (own.text_field,)

  def read(split, shard, skipped):
    path, begin, end = ranges[split][shard]
    if split == 'validation' and not own.validation_files:  # both splits read all files: what is left out is counted once
      skipped = collections.Counter()
    for document in text_files.read(path, begin, end, own, sides, skipped):
      if own.validation_files or text_files.held_out(document, own.validation_fraction) == (split == 'validation'):
        yield document

  patterns = [user_files.literal(os.path.abspath(os.path.expanduser(pattern)))
              for pattern in (own.files, own.validation_files) if pattern]
  shards = {split: len(cuts) for split, cuts in ranges.items() if cuts}
  every = sorted({path for paths in found.values() for path in paths})
  return Documents(read, shards, ['inputs', 'targets'] if pairs else ['targets'], every, patterns, config.marks > 0)
