"""Look-up tables of the reader: made once from a cache, stored beside it, and memory-mapped from then on.

A table is made from the data in chunks, so that memory does not grow with it, and its files appear under their final names
only when all of them are complete. One that is damaged is made again. `pieces`, `pairs` and `streams` say what is in the
tables of each objective.
"""

import contextlib
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from t5x_cpm import files, stored
from t5x_cpm.config import ConfigError
from t5x_cpm.data import blocks, objectives

CHUNK = 1 << 21  # documents, or pieces of documents, that are worked on together
_REMEDY = 'Start the command again: it is made again from the cache.'


def _remove_abandoned(directory: pathlib.Path) -> None:
  """Removes the unfinished files of processes that are gone."""
  for path in directory.iterdir():
    owner = re.match(r'\.?tmp-(\d{1,9})-', path.name)
    if owner and not files.is_running(int(owner[1])):
      path.unlink(missing_ok=True)


def _make(directory: pathlib.Path, name: str, make: Callable[[pathlib.Path], dict], source: str) -> None:
  if not directory.is_dir():  # something else may stand in its place
    directory.unlink(missing_ok=True)
  directory.mkdir(parents=True, exist_ok=True)
  _remove_abandoned(directory)
  mark = f'tmp-{os.getpid()}-'
  prefix = directory / f'{mark}{name}'
  try:
    facts = make(prefix)
    known = {path.name.removeprefix(f'{prefix.name}.'): blocks.describe(path)
             for path in sorted(directory.glob(f'{prefix.name}.*'))}
    stored.write(pathlib.Path(f'{prefix}.json'), {'table': name, 'source': source, 'facts': facts, 'files': known})
    written = sorted(directory.glob(f'{prefix.name}.*'), key=lambda path: path.suffix == '.json')
    for path in written:  # the .json comes last, because it says that the others are complete
      final = directory / path.name.removeprefix(mark)
      if final.is_dir() and not final.is_symlink():
        shutil.rmtree(final)
      files.move(path, final)
  finally:
    for path in directory.glob(f'{prefix.name}.*'):
      path.unlink()


def _damaged(directory: pathlib.Path, name: str) -> blocks.Damaged:
  """What is raised for a damaged file of a table, which is then not there any more, so that the next start makes it again."""

  def error(file: pathlib.Path, what: str) -> stored.DamagedError:
    with contextlib.suppress(OSError):
      (directory / f'{name}.json').unlink()
    return stored.DamagedError(file, what, _REMEDY)

  return error


def _open(directory: pathlib.Path, name: str, file: str, known: dict[str, Any] | None, dtype: Any = np.uint8,
          columns: int = 0) -> blocks.Numbers:
  return blocks.Numbers(directory / f'{name}.{file}', dtype, known and known[file], _damaged(directory, name), columns=columns,
                        random=True)


def _read(directory: pathlib.Path, name: str) -> tuple[dict[str, Any], str | None, dict[str, Any] | None]:
  """A table's facts, what it was made from, and its files; the last two are None in a table of an earlier version."""
  path = directory / f'{name}.json'
  value = stored.parse(path, _REMEDY, 'facts')
  if 'facts' not in value and 'table' not in value:
    return value, None, None
  stored.require(path, value, {'table': (name,), 'source': str, 'facts': dict, 'files': {str: blocks.FACTS}}, _REMEDY)
  return value['facts'], value['source'], value['files']


def _verified(directory: pathlib.Path, name: str, form: dict[str, Any], source: str) -> dict[str, Any]:
  """The facts of a table that is there, once its files have been compared with their digests, as far as they are small.

  Raises:
    DamagedError: names the file at fault.
  """
  facts, made_from, known = _read(directory, name)
  path = directory / f'{name}.json'
  stored.require(path, facts, form, _REMEDY)
  if made_from != source and (made_from is not None or source):
    raise stored.DamagedError(path, 'it was not made from this cache', _REMEDY)
  for file in known or ():
    _open(directory, name, file, known)
  return facts


def store(directory: pathlib.Path, name: str, make: Callable[[pathlib.Path], dict], form: dict[str, Any],
          source: str = '') -> dict[str, Any]:
  """Makes a table unless it is there and intact, and returns what is known about it.

  Args:
    directory: the folder of the tables of a cache.
    name: the name of the table. It says everything that the table depends on besides the cache.
    make: writes files whose names begin with the prefix that it is given, and returns facts about them. The files are
      renamed when it has returned.
    form: of these facts, as in `stored.mismatch`.
    source: the identity of the cache (`Cache.identity`).

  Returns:
    What `make` returned, now or in an earlier run, as it comes back from JSON.

  Raises:
    ConfigError: the folder cannot be written.
  """
  if os.path.lexists(directory / f'{name}.json'):
    try:
      return _verified(directory, name, form, source)
    except stored.DamagedError as error:
      print(f'The index {error.reason} and is made again.', file=sys.stderr, flush=True)
  try:
    _make(directory, name, make, source)
  except OSError as error:
    raise ConfigError(f'the index of the cache could not be written to {directory}: {error.strerror or error}. Set '
                      'TaskConfig.cache_dir or $T5X_CPM_CACHE to a folder of your own with more room.') from error
  return _verified(directory, name, form, source)


def load(directory: pathlib.Path, name: str, file: str, dtype, columns: int = 0) -> blocks.Numbers:
  """Opens one file of a table, as [n] or, with `columns`, as [n, columns]."""
  return _open(directory, name, file, _read(directory, name)[2], dtype, columns)


def sort_by_class(prefix: pathlib.Path, chunks: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]], classes: int,
                  columns: int = 1) -> np.ndarray:
  """Writes values in the order of their classes to `prefix.members`, so that "member 17 of class 40" is one look-up.

  This is a stable counting sort.

  Args:
    prefix: what the name of the file begins with.
    chunks: called twice, and must give the same chunks of (class [n], values [n, columns] int64) both times.
    classes: how many classes there are.
    columns: how many numbers a value has.

  Returns:
    [classes] how many values each class has.
  """
  counts = np.zeros(classes, np.int64)
  for class_ids, _ in chunks():
    counts += np.bincount(class_ids, minlength=classes)
  total = int(counts.sum())
  path = pathlib.Path(f'{prefix}.members')
  path.touch()
  if total:
    out = np.memmap(path, np.int64, 'w+', shape=(total, columns))
    cursor = objectives.exclusive_cumsum(counts)
    for class_ids, values in chunks():
      order = np.argsort(class_ids, kind='stable')
      here = np.bincount(class_ids, minlength=classes)
      out[objectives.ranges(cursor, here)] = values[order]
      cursor += here
    out.flush()
  return counts
