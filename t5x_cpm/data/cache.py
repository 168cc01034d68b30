"""The format of a cache: a SeqIO task that was run once, its tokens in flat files that are read without TensorFlow.

A cache is a folder:

  <split>.<feature>.tokens   uint16 or uint32: all documents one after another, without end of document
  <split>.<feature>.lengths  uint32: the tokens of each document
  *.crc                      digests of the blocks of these files (`data.blocks`)
  vocabulary/                the vocabulary that made the tokens
  index/                     look-up tables of the reader
  cache.json                 facts about all these, and the name of the folder; written last: without it it is no cache yet
  damaged                    there only if a damaged file was found while it was read: its name

A mixture is a folder whose cache.json names the folders of its tasks and their rates. The same cache serves every objective
and every length. `tasks.caches` makes caches.
"""

import contextlib
import pathlib
from typing import Any

import numpy as np

from t5x_cpm import files, stored, vocabularies
from t5x_cpm.config import ConfigError
from t5x_cpm.data import blocks
from t5x_cpm.data.blocks import Numbers

FORMAT = 1
SPLITS = ('train', 'validation')
KINDS = ('tokens', 'lengths')  # the files of a feature
REMEDY = 'Make the cache again with `t5x_cpm cache`; where its source is gone, restore the file or remove the cache.'


class DataError(ValueError):
  """A document that cannot be used. The message starts with its file and line."""


class FormatError(ConfigError):
  """A cache in another format. `reason` is the message without what to do."""

  def __init__(self, path: pathlib.Path, number: int):
    self.reason = f'it has format {number}, expected {FORMAT}'
    super().__init__(f'{path} has cache format {number}, expected {FORMAT}: remove it, or set TaskConfig.cache_dir to another '
                     'folder.')


def _is_state(value: Any) -> bool:
  """Whether a value is [path, bytes, time of last change] of a file."""
  return isinstance(value, list) and [type(part) for part in value] == [str, int, int]


def _is_rate(value: Any) -> bool:
  return not stored.mismatch(value, float) and value > 0


_FORM = {'format': int, 'task': str, 'folder?': str, 'features': (['targets'], ['inputs', 'targets']),
         'dtype': ('uint16', 'uint32'), 'checksum': str, 'vocabulary': str,
         'splits': {str: {'documents': stored.COUNT, 'tokens': {str: stored.COUNT}, 'skipped?': {str: stored.COUNT}}},
         'source': {'patterns': [str], 'files': [_is_state], 'vocabulary': [_is_state]}, 'files?': {str: blocks.FACTS}}
_MIXTURE_FORM = {'format': int, 'task': str, 'folder?': str, 'components': [
    {'name': str, 'rate': _is_rate, 'directory': stored.is_plain_name}]}


def describe(path: pathlib.Path) -> dict[str, Any]:
  """What cache.json says.

  Raises:
    DamagedError: it is missing or not as it was written.
    FormatError: it has another format.
  """
  file = path / 'cache.json'
  info = stored.parse(file, REMEDY, 'files')
  number = info.get('format')
  if type(number) is int and number != FORMAT:
    raise FormatError(path, number)
  stored.require(file, info, _MIXTURE_FORM if 'components' in info else _FORM, REMEDY)
  if info.get('folder', path.name) != path.name:  # whose name says what determined the tokens
    raise stored.DamagedError(file, f'it belongs to a cache named {info["folder"]}: folders were exchanged or renamed', REMEDY)
  if 'components' not in info:
    for split, facts in info['splits'].items():
      if split not in SPLITS or sorted(facts['tokens']) != sorted(info['features']):
        raise stored.DamagedError(file, f'splits: unexpected {split!r} or features of it', REMEDY)
  return info


class Cache:
  """The cache of one task, opened for reading.

  Attributes:
    info: what cache.json says.
    identity: changes with any number in the files of tokens and lengths; '' for a cache of an earlier version, which does not
      know their digests.

  Raises:
    DamagedError: its cache.json is damaged.
    FormatError: it was written in another format.
  """

  def __init__(self, path: pathlib.Path):
    self.path = pathlib.Path(path)
    self.info = describe(self.path)
    if 'components' in self.info:
      raise ConfigError(f'{path} is the cache of a mixture, expected one of a task.')
    known = self.info.get('files')
    self.identity = '' if known is None else stored.digest(known)

  @property
  def name(self) -> str:
    return self.info['task']

  @property
  def features(self) -> list[str]:
    return self.info['features']

  @property
  def splits(self) -> list[str]:
    return list(self.info['splits'])

  def _damaged(self, file: pathlib.Path, what: str) -> stored.DamagedError:
    """The error for a damaged file, which is remembered, so that `tasks.caches` makes the cache again."""
    with contextlib.suppress(OSError):
      files.write_atomically(self.path / 'damaged', file.name.encode())
    return stored.DamagedError(file, what, f'Start the command again: the cache is made again from its source. {REMEDY}')

  def _numbers(self, split: str, feature: str, kind: str, random: bool = False) -> Numbers:
    file = self.path / f'{split}.{feature}.{kind}'
    facts, known = self.info['splits'][split], self.info.get('files')
    if known is not None and file.name not in known:
      raise stored.DamagedError(self.path / 'cache.json', f'files: no {file.name!r}', REMEDY)
    numbers = Numbers(file, self.info['dtype'] if kind == 'tokens' else np.uint32, known and known[file.name], self._damaged,
                      random=random)
    expected = facts['tokens'][feature] if kind == 'tokens' else facts['documents']
    if len(numbers) != expected:
      raise self._damaged(file, f'it has {len(numbers):,} numbers, expected {expected:,}')
    return numbers

  def tokens(self, split: str, feature: str, *, random: bool = False) -> Numbers:
    """All tokens of a split; `random` as in `Numbers`."""
    return self._numbers(split, feature, 'tokens', random)

  def lengths(self, split: str, feature: str) -> Numbers:
    """The tokens of each document of a split, uint32."""
    return self._numbers(split, feature, 'lengths')

  def vocabulary(self) -> vocabularies.Vocabulary:
    """The vocabulary that made the tokens. Raises DamagedError if the cache has it no longer."""
    return vocabularies.load_saved(self.path / 'vocabulary', self.info['vocabulary'], REMEDY)

  def verify(self) -> None:
    """Checks sizes, the vocabulary, and the content of files that are small; the others are checked as they are read.

    Raises:
      DamagedError: names the file.
    """
    vocabularies.check_saved(self.path / 'vocabulary', self.info['vocabulary'], REMEDY)
    every = [self._numbers(split, feature, kind) for split in self.splits for feature in self.features for kind in KINDS]
    mark = self.path / 'damaged'
    if mark.exists():
      for numbers in every:
        numbers.check()
      with contextlib.suppress(OSError):  # nothing is damaged: it was restored
        mark.unlink()


def components(path: pathlib.Path) -> list[tuple[float, Cache]]:
  """The tasks of a cache, each after its rate; a task alone has rate 1."""
  info = describe(path)
  if 'components' not in info:
    return [(1.0, Cache(path))]
  return [(component['rate'], Cache(path.parent / component['directory'])) for component in info['components']]


def token_dtype(vocabulary: vocabularies.Vocabulary) -> str:
  """The type of the numbers in a file of tokens."""
  return 'uint16' if vocabulary.size < 1 << 16 else 'uint32'  # the id after the last one marks places


def finish(path: pathlib.Path, task: str, vocabulary: vocabularies.Vocabulary, splits: dict, features: list[str],
           checksum: str = '', source: dict | None = None, digests: bool = True) -> None:
  """Turns a folder with files of tokens and lengths into a cache: saves the vocabulary and, last, cache.json.

  Args:
    path: the folder.
    task: the name of the task.
    vocabulary: what made the tokens.
    splits: {split: {'documents': how many, 'tokens': {feature: how many}, 'skipped': {reason: documents left out}}}.
    features: ['targets'] or ['inputs', 'targets'].
    checksum: a digest of the tokens; a run is resumed only with an equal one.
    source: what the cache was made from, as `tasks.caches` describes it.
    digests: whether to read the files once more, for the digests of their blocks.
  """
  vocabulary.save(path / 'vocabulary')
  names = [f'{split}.{feature}.{kind}' for split in splits for feature in features for kind in KINDS]
  known = {'files': {name: blocks.describe(path / name) for name in names}} if digests else {}
  stored.write(path / 'cache.json', {
      'format': FORMAT, 'task': task, 'folder': path.name, 'features': features, 'dtype': token_dtype(vocabulary),
      'checksum': checksum, 'vocabulary': vocabulary.fingerprint, 'splits': splits,
      'source': source or {'patterns': [], 'files': [], 'vocabulary': []}, **known})


def finish_mixture(path: pathlib.Path, task: str, caches: list[tuple[str, float, pathlib.Path]]) -> None:
  """Makes the cache of a mixture from those of its tasks, which lie beside it: (name, rate, folder) of each."""
  path.mkdir(exist_ok=True)
  stored.write(path / 'cache.json', {'format': FORMAT, 'task': task, 'folder': path.name, 'components': [
      {'name': name, 'rate': rate, 'directory': folder.name} for name, rate, folder in caches]})
