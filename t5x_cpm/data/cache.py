"""A SeqIO task, run once: its tokens as flat files that are read without TensorFlow.

A cache is a folder: `<split>.<feature>.tokens` (uint16 or uint32, all documents one after another, without end of document),
`<split>.<feature>.lengths` (uint32), `vocabulary/`, and `cache.json`, which is written last. A folder without it is a build
that was interrupted; building again continues with the shards that were finished. A mixture is a folder whose cache.json
names the folders of its tasks and their rates. The same cache serves every objective and every length.
"""

import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import json
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator

import numpy as np

from t5x_cpm.config import Config, ConfigError
from t5x_cpm.data import index
from t5x_cpm.data import vocabulary as vocabulary_lib

FORMAT = 1
SPLITS = ('train', 'validation')


class DataError(ValueError):
  """A document that cannot be used. The message starts with its file and line."""


def root(config: Config) -> pathlib.Path:
  """The folder that holds all caches."""
  chosen = config.task.cache_dir or os.environ.get('T5X_CPM_CACHE') or '~/.cache/t5x_cpm'
  return pathlib.Path(chosen).expanduser()


def directory(config: Config) -> pathlib.Path:
  """The folder of the cache of `config.task`; its name depends on what determines the tokens, not on lengths or objective."""
  from t5x_cpm import tasks
  identity = json.dumps(tasks.identity(config), sort_keys=True, ensure_ascii=False)
  readable = re.sub(r'[^\w.]+', '_', config.task.name).strip('_')[:60]
  return root(config) / f'{readable}-{hashlib.blake2b(identity.encode(), digest_size=6).hexdigest()}'


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
    """All tokens of a split; `random` as in `index.map_file`."""
    return index.map_file(self.path / f'{split}.{feature}.tokens', self.info['dtype'], random=random)

  def lengths(self, split: str, feature: str) -> np.ndarray:
    return index.map_file(self.path / f'{split}.{feature}.lengths', np.uint32)

  def vocabulary(self) -> vocabulary_lib.Vocabulary:
    return vocabulary_lib.load_saved(self.path / 'vocabulary')


def components(path: pathlib.Path) -> list[tuple[float, Cache]]:
  """The tasks of a cache with their rates; a task alone has rate 1."""
  info = json.loads((path / 'cache.json').read_text())
  if 'components' not in info:
    return [(1.0, Cache(path))]
  return [(part['rate'], Cache(path.parent / part['directory'])) for part in info['components']]


def write(path: pathlib.Path, task: str, vocabulary: vocabulary_lib.Vocabulary, splits: dict, **extra) -> None:
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


def token_dtype(vocabulary: vocabulary_lib.Vocabulary) -> str:
  return 'uint16' if vocabulary.size <= 1 << 16 else 'uint32'


def finish(path: pathlib.Path, task: str, vocabulary: vocabulary_lib.Vocabulary, splits: dict, features: list[str],
           checksum: str = '', source: dict | None = None) -> None:
  """Makes the files in `path` a cache: saves the vocabulary and, last, cache.json."""
  vocabulary.save(path / 'vocabulary')
  write_json(path / 'cache.json', {
      'format': FORMAT, 'task': task, 'features': features, 'dtype': token_dtype(vocabulary), 'checksum': checksum,
      'vocabulary': vocabulary.fingerprint, 'splits': splits,
      'source': source or {'patterns': [], 'files': [], 'vocabulary': []}})


def write_json(path: pathlib.Path, value) -> None:
  """Writes a file that is either complete or not there."""
  temporary = path.with_name(f'{path.name}.tmp{os.getpid()}')
  with open(temporary, 'w') as f:
    json.dump(value, f, ensure_ascii=False, indent=1)
    f.flush()
    os.fsync(f.fileno())
  os.replace(temporary, path)


def file_states(paths) -> list[list]:
  """[path, bytes, time of change in ns] of each file: what tells that a source was edited."""
  states = []
  for path in sorted({os.path.abspath(path) for path in paths}):
    status = os.stat(path)
    states.append([path, status.st_size, status.st_mtime_ns])
  return states


def stale(path: pathlib.Path) -> str | None:
  """Why a complete cache must be made again, or None. A cache whose sources are all gone stays good."""
  info = json.loads((path / 'cache.json').read_text())
  if info['format'] != FORMAT:
    return f'it has format {info["format"]}, expected {FORMAT}'
  source = info['source']
  vocabulary = [name for name, *_ in source['vocabulary'] if os.path.exists(name)]
  before = {name: rest for name, *rest in source['files'] + source['vocabulary']}
  data = [name for name, *_ in source['files'] if os.path.exists(name)]
  data += [name for pattern in source['patterns'] for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
  now = {name: rest for name, *rest in file_states(data + vocabulary)}
  for name in sorted(set(before) | set(now)):
    if name not in before:
      return f'{name} is new'
    if name in now and before[name] != now[name]:
      return f'{name} changed'
    if name not in now and data and name not in {name for name, *_ in source['vocabulary']}:
      return f'{name} is gone'
  return None


@contextlib.contextmanager
def lock(path: pathlib.Path) -> Iterator[None]:
  """Holds a cache folder for one process at a time; the system frees it when the process ends, however it ends."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = open(path.with_name(path.name + '.lock'), 'w')  # noqa: SIM115
  except OSError as error:
    raise ConfigError(f'the cache folder {path.parent} cannot be written ({error.strerror}): set TaskConfig.cache_dir or '
                      '$T5X_CPM_CACHE to a folder of your own.') from error
  with handle:
    fcntl.flock(handle, fcntl.LOCK_EX)
    yield


def is_ready(path: pathlib.Path) -> bool:
  """Whether the cache and, for a mixture, those of its tasks are complete and agree with their sources."""
  if not (path / 'cache.json').is_file():
    return False
  parts = json.loads((path / 'cache.json').read_text()).get('components')
  if parts is None:
    return stale(path) is None
  return all(is_ready(path.parent / part['directory']) for part in parts)


def build(config: Config, *, progress: bool = True) -> pathlib.Path:
  """Makes the cache of `config.task`, or of every task of a mixture, unless it is there.

  TensorFlow is imported only for tasks that are not plain text files.

  Args:
    config: `task` and, for the task named 'local', `local_task` are read.
    progress: show documents per second and the time left on stderr.

  Returns:
    The folder of the cache.

  Raises:
    ConfigError: unknown task, no file, folder that cannot be written.
    DataError: a document that cannot be read, with its file and line.
  """
  path = directory(config)
  if is_ready(path):
    return path
  from t5x_cpm import tasks
  from t5x_cpm.data import cache_build
  with lock(path):
    if is_ready(path):  # another process made it while this one waited
      return path
    rates = tasks.parts(config)
    if rates is not None:
      parts = []
      for name, rate in rates.items():
        part = dataclasses.replace(config, task=dataclasses.replace(config.task, name=name))
        parts.append({'name': name, 'rate': rate, 'directory': build(part, progress=progress).name})
      path.mkdir(exist_ok=True)
      write_json(path / 'cache.json', {'format': FORMAT, 'task': config.task.name, 'components': parts})
    else:
      if (path / 'cache.json').is_file():
        print(f'The cache {path} is made again: {stale(path)}.', file=sys.stderr)
        shutil.rmtree(path)
      try:
        cache_build.build_task(config, path, progress=progress)
      except OSError as error:
        raise ConfigError(f'the cache {path} could not be written: {error.strerror or error}. Set TaskConfig.cache_dir or '
                          '$T5X_CPM_CACHE to a folder with more room.') from error
  return path
