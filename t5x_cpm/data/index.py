"""Look-up tables of the reader: made once from a cache, stored beside it, and memory-mapped from then on.

A table is made from the data in chunks, so that memory does not grow with it, and its files appear under their final names
only when all of them are complete. `pieces`, `pairs` and `streams` say what is in the tables of each objective.
"""

import json
import os
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

from t5x_cpm import files
from t5x_cpm.config import ConfigError
from t5x_cpm.data import cache, objectives

CHUNK = 1 << 21  # documents, or pieces of documents, that are worked on together


def _remove_abandoned(directory: pathlib.Path) -> None:
  """Removes the unfinished files of processes that are gone."""
  for path in directory.glob('tmp-*'):
    owner = int(path.name.split('-')[1])
    try:
      os.kill(owner, 0)
    except ProcessLookupError:
      path.unlink(missing_ok=True)
    except PermissionError:
      pass  # the process is alive and another user's


def _make(directory: pathlib.Path, name: str, make: Callable[[pathlib.Path], dict]) -> None:
  directory.mkdir(parents=True, exist_ok=True)
  _remove_abandoned(directory)
  mark = f'tmp-{os.getpid()}-'
  prefix = directory / f'{mark}{name}'
  try:
    facts = make(prefix)
    pathlib.Path(f'{prefix}.json').write_text(json.dumps(facts))
    written = sorted(directory.glob(f'{prefix.name}.*'), key=lambda path: path.suffix == '.json')
    for path in written:  # the .json comes last, because it says that the others are complete
      files.move(path, directory / path.name.removeprefix(mark))
  finally:
    for path in directory.glob(f'{prefix.name}.*'):
      path.unlink()


def store(directory: pathlib.Path, name: str, make: Callable[[pathlib.Path], dict]) -> dict:
  """Makes a table unless it is there, and returns what is known about it.

  Args:
    directory: the folder of the tables of a cache.
    name: the name of the table. It says everything that the table depends on besides the cache.
    make: writes files whose names begin with the prefix that it is given, and returns facts about them. The files are
      renamed when it has returned.

  Returns:
    What `make` returned, now or in an earlier run, as it comes back from JSON.

  Raises:
    ConfigError: the folder cannot be written.
  """
  done = directory / f'{name}.json'
  if not done.is_file():
    try:
      _make(directory, name, make)
    except OSError as error:
      raise ConfigError(f'the index of the cache could not be written to {directory}: {error.strerror or error}. Set '
                        'TaskConfig.cache_dir or $T5X_CPM_CACHE to a folder of your own with more room.') from error
  return json.loads(done.read_text())


def load(directory: pathlib.Path, name: str, file: str, dtype, columns: int = 0) -> np.ndarray:
  """Maps one file of a table into memory, as [n] or, with `columns`, as [n, columns]."""
  array = cache.map_file(directory / f'{name}.{file}', dtype, random=True)
  return array.reshape(-1, columns) if columns else array


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
