"""A SeqIO task, run once: its tokens as flat files that are read without TensorFlow.

A cache is a folder: `<split>.<feature>.tokens` (uint16 or uint32, all documents one after another, without end of document),
`<split>.<feature>.lengths` (uint32), `vocabulary/`, and `cache.json`, which is written last. A folder without it is a build
that was interrupted; building again continues with the shards that were finished. A mixture is a folder whose cache.json
names the folders of its tasks and their rates. The same cache serves every objective and every length.
"""

import json
import mmap
import os
import pathlib

import numpy as np

from t5x_cpm import files, vocabularies
from t5x_cpm.config import ConfigError

FORMAT = 1
SPLITS = ('train', 'validation')


class DataError(ValueError):
  """A document that cannot be used. The message starts with its file and line."""


def map_file(path: pathlib.Path, dtype, *, random: bool = False) -> np.ndarray:
  """Maps a file of numbers into memory, read-only.

  Args:
    path: of the file.
    dtype: of its numbers.
    random: it is read in no order; else the system reads ahead, which costs 100 times the data that is wanted.
  """
  if not path.stat().st_size:
    return np.zeros(0, dtype)
  with open(path, 'rb') as f:
    mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
  if random and hasattr(mmap, 'MADV_RANDOM'):
    mapped.madvise(mmap.MADV_RANDOM)
  return np.frombuffer(mapped, dtype)


class Cache:
  """One task's cache, opened for reading."""

  def __init__(self, path: pathlib.Path):
    self.path = pathlib.Path(path)
    self.info = json.loads((self.path / 'cache.json').read_text())
    if self.info['format'] != FORMAT:
      raise ConfigError(f'{path} has cache format {self.info["format"]}, expected {FORMAT}: remove it, or set '
                        'TaskConfig.cache_dir to another folder.')

  @property
  def name(self) -> str:
    return self.info['task']

  @property
  def features(self) -> list[str]:
    return self.info['features']

  @property
  def splits(self) -> list[str]:
    return list(self.info['splits'])

  def tokens(self, split: str, feature: str, *, random: bool = False) -> np.ndarray:
    """All tokens of a split; `random` as in `map_file`."""
    return map_file(self.path / f'{split}.{feature}.tokens', self.info['dtype'], random=random)

  def lengths(self, split: str, feature: str) -> np.ndarray:
    return map_file(self.path / f'{split}.{feature}.lengths', np.uint32)

  def vocabulary(self) -> vocabularies.Vocabulary:
    return vocabularies.load_saved(self.path / 'vocabulary')


def components(path: pathlib.Path) -> list[tuple[float, Cache]]:
  """The tasks of a cache with their rates; a task alone has rate 1."""
  info = json.loads((path / 'cache.json').read_text())
  if 'components' not in info:
    return [(1.0, Cache(path))]
  return [(part['rate'], Cache(path.parent / part['directory'])) for part in info['components']]


def write(path: pathlib.Path, task: str, vocabulary: vocabularies.Vocabulary, splits: dict, **extra) -> None:
  """Writes a task's cache from arrays: {split: {feature: (tokens, lengths)}}."""
  path.mkdir(parents=True, exist_ok=True)
  for split, features in splits.items():
    for feature, (tokens, lengths) in features.items():
      np.asarray(tokens, token_dtype(vocabulary)).tofile(path / f'{split}.{feature}.tokens')
      np.asarray(lengths, np.uint32).tofile(path / f'{split}.{feature}.lengths')
  finish(path, task, vocabulary, {
      split: {'documents': len(next(iter(features.values()))[1]),
              'tokens': {feature: int(np.sum(lengths)) for feature, (_, lengths) in features.items()}}
      for split, features in splits.items()}, list(next(iter(splits.values()))), **extra)


def token_dtype(vocabulary: vocabularies.Vocabulary) -> str:
  return 'uint16' if vocabulary.size <= 1 << 16 else 'uint32'


def finish(path: pathlib.Path, task: str, vocabulary: vocabularies.Vocabulary, splits: dict, features: list[str],
           checksum: str = '', source: dict | None = None) -> None:
  """Makes the files in `path` a cache: saves the vocabulary and, last, cache.json."""
  vocabulary.save(path / 'vocabulary')
  files.write_json(path / 'cache.json', {
      'format': FORMAT, 'task': task, 'features': features, 'dtype': token_dtype(vocabulary), 'checksum': checksum,
      'vocabulary': vocabulary.fingerprint, 'splits': splits,
      'source': source or {'patterns': [], 'files': [], 'vocabulary': []}})


def file_states(paths) -> list[list]:
  """[path, bytes, time of change in ns] of each file: what tells that a source was edited."""
  states = []
  for path in sorted({os.path.abspath(path) for path in paths}):
    status = os.stat(path)
    states.append([path, status.st_size, status.st_mtime_ns])
  return states
