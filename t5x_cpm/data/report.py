"""What of a user's data a run reads, and what it cuts or leaves out: in words and numbers, a line for each task and split."""

import os
import pathlib
from collections.abc import Iterator

from t5x_cpm.config import Config, row_features
from t5x_cpm.data import cache as cache_lib
from t5x_cpm.data.reader import EmptySplitError, Reader, open_reader
from t5x_cpm.data.rows import counted, in_words

MOST_NAMES = 3  # of files that a line names


def _empty_files(cache: cache_lib.Cache) -> Iterator[str]:
  every = [(name, size) for name, size, _ in cache.info['source']['files']]
  empty = [os.path.basename(name) for name, size in every if not size]
  if empty:
    named = ', '.join(empty[:MOST_NAMES]) + (', ...' if len(empty) > MOST_NAMES else '')
    yield f'{len(empty):,} of {counted(len(every), "file")} {"is" if len(empty) == 1 else "are"} empty: {named}'


def of_reader(reader: Reader) -> list[str]:
  """What a reader found, a line for each task of its split, and one for what has no row there."""
  training, several = reader.split == 'train', len(reader.components) + len(reader.without) > 1
  lines = []
  for component in reader.components:
    task = [component.name] if several else []
    found = [component.describe(), *(_empty_files(component.cache) if training else ())]
    lines += [': '.join([*([] if training else [reader.split]), *task, line]) for line in found]
  return lines + [f'{reader.split}: {line}' for line in reader.without]


def of_cache(path: pathlib.Path, config: Config) -> list[str]:
  """What a cache holds for a configuration in all its splits. Where the objective does not fit, its documents alone.

  Args:
    path: the folder of the cache.
    config: as in `open_reader`.

  Raises:
    ConfigError: there is nothing to train on, or a row is too short for any piece.
  """
  caches = [cache for _, cache in cache_lib.components(path)]
  if any(('inputs' in cache.features) != (config.task.objective == 'pairs') for cache in caches):
    return [f'{cache.name}: {split}: {in_words(facts)}' for cache in caches for split, facts in cache.info['splits'].items()]
  lines = []
  for split in sorted({split for cache in caches for split in cache.splits}):
    try:
      lines += of_reader(open_reader(path, config, split, row=row_features.defaults(config)))
    except EmptySplitError as error:
      lines.append(f'{split}: {error}')
  return lines


def of_evaluation(reader: Reader, rows_read: int, field: str) -> list[str]:
  """What an evaluation reads, and how much of it where `field` limits it to `rows_read` rows (0: it does not)."""
  total = sum(component.rows_once for component in reader.components)
  limited = [f'{reader.split}: {field} leaves out {counted(total - rows_read, "row")} of {total:,}']
  return of_reader(reader) + (limited if 0 < rows_read < total else [])
