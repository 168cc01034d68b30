"""The format of a cache: a SeqIO task that was run once, its tokens in flat files that are read without TensorFlow.

A cache is a folder:

  <split>.<feature>.tokens   uint16 or uint32: all documents one after another, without end of document
  <split>.<feature>.lengths  uint32: the tokens of each document
  vocabulary/                the vocabulary that made the tokens
  index/                     look-up tables of the reader
  cache.json                 facts about all these, written last: a folder without it is not a cache yet

A mixture is a folder whose cache.json names the folders of its tasks and their rates. The same cache serves every objective
and every length. `tasks.caches` makes caches.
"""

import json
import mmap
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
    path: the file.
    dtype: the type of its numbers.
    random: whether it will be read in random order, for which the system must not read ahead: that costs 100 times the data.
  """
  if not path.stat().st_size:
    return np.zeros(0, dtype)
  with open(path, 'rb') as f:
    mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
  if random and hasattr(mmap, 'MADV_RANDOM'):
    mapped.madvise(mmap.MADV_RANDOM)
  return np.frombuffer(mapped, dtype)


class Cache:
  """The cache of one task, opened for reading.

  Raises:
    ConfigError: it was written in another format.
  """

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
    """The tokens of each document of a split, uint32."""
    return map_file(self.path / f'{split}.{feature}.lengths', np.uint32)

  def vocabulary(self) -> vocabularies.Vocabulary:
    return vocabularies.load_saved(self.path / 'vocabulary')


def components(path: pathlib.Path) -> list[tuple[float, Cache]]:
  """The tasks of a cache, each after its rate; a task alone has rate 1."""
  info = json.loads((path / 'cache.json').read_text())
  if 'components' not in info:
    return [(1.0, Cache(path))]
  return [(component['rate'], Cache(path.parent / component['directory'])) for component in info['components']]


def token_dtype(vocabulary: vocabularies.Vocabulary) -> str:
  """The type of the numbers in a file of tokens."""
  return 'uint16' if vocabulary.size <= 1 << 16 else 'uint32'


def finish(path: pathlib.Path, task: str, vocabulary: vocabularies.Vocabulary, splits: dict, features: list[str],
           checksum: str = '', source: dict | None = None) -> None:
  """Turns a folder with files of tokens and lengths into a cache: saves the vocabulary and, last, cache.json.

  Args:
    path: the folder.
    task: the name of the task.
    vocabulary: what made the tokens.
    splits: {split: {'documents': how many, 'tokens': {feature: how many}, 'skipped': {reason: documents left out}}}.
    features: ['targets'] or ['inputs', 'targets'].
    checksum: a digest of the tokens; a run is resumed only with an equal one.
    source: what the cache was made from, as `tasks.caches` describes it.
  """
  vocabulary.save(path / 'vocabulary')
  files.write_json(path / 'cache.json', {
      'format': FORMAT, 'task': task, 'features': features, 'dtype': token_dtype(vocabulary), 'checksum': checksum,
      'vocabulary': vocabulary.fingerprint, 'splits': splits,
      'source': source or {'patterns': [], 'files': [], 'vocabulary': []}})


def finish_mixture(path: pathlib.Path, task: str, caches: list[tuple[str, float, pathlib.Path]]) -> None:
  """Makes the cache of a mixture from those of its tasks, which lie beside it: (name, rate, folder) of each."""
  path.mkdir(exist_ok=True)
  files.write_json(path / 'cache.json', {'format': FORMAT, 'task': task, 'components': [
      {'name': name, 'rate': rate, 'directory': folder.name} for name, rate, folder in caches]})
