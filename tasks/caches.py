"""The caches of tasks: where they lie, whether they are up to date, and how those that are not get made."""

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator

from t5x_cpm import files, stored, tasks
from t5x_cpm.config import Config, ConfigError
from t5x_cpm.data import cache, packing
from t5x_cpm.tasks import cache_build
from t5x_cpm.tasks.documents import Source
from t5x_cpm.vocabularies import Vocabulary


def root(config: Config) -> pathlib.Path:
  """The folder that holds all caches."""
  chosen = config.task.cache_dir or os.environ.get('T5X_CPM_CACHE') or '~/.cache/t5x_cpm'
  return pathlib.Path(chosen).expanduser()


def directory(config: Config) -> pathlib.Path:
  """The folder of the cache of `config.task`; its name depends on what determines the tokens, not on lengths or objective."""
  identity = json.dumps(tasks.identity(config), sort_keys=True, ensure_ascii=False)
  readable = re.sub(r'[^\w.]+', '_', config.task.name).strip('_')[:60]
  return root(config) / f'{readable}-{hashlib.blake2b(identity.encode(), digest_size=6).hexdigest()}'


def _file_states(paths: Iterable[str]) -> list[list]:
  """[path, bytes, time of last change in ns] of each file, which reveal an edit."""
  states = []
  for path in sorted({os.path.abspath(path) for path in paths}):
    status = os.stat(path)
    states.append([path, status.st_size, status.st_mtime_ns])
  return states


def describe_source(source: Source, vocabulary: Vocabulary) -> dict:
  """What a cache is made from, for its cache.json: globs, and the state of every file."""
  return {'patterns': list(source.patterns), 'files': _file_states(source.files),
          'vocabulary': _file_states(vocabulary.files)}


def stale(path: pathlib.Path) -> str | None:
  """Why a complete cache must be made again; None if it is up to date. One whose sources are all gone stays valid.

  Raises:
    ConfigError: a file of it cannot be read, for want of permission for example.
  """
  try:
    opened = cache.Cache(path)
    opened.verify()
  except (stored.DamagedError, cache.FormatError) as error:
    return error.reason
  source = opened.info['source']
  of_vocabulary = {name for name, *_ in source['vocabulary']}
  before = {name: state for name, *state in source['files'] + source['vocabulary']}
  data = [name for name, *_ in source['files'] if os.path.exists(name)]
  data += [name for pattern in source['patterns'] for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
  now = {name: state for name, *state in _file_states(data + [name for name in of_vocabulary if os.path.exists(name)])}
  for name in sorted(set(before) | set(now)):
    if name not in before:
      return f'{name} is new'
    if name in now and before[name] != now[name]:
      return f'{name} changed'
    if name not in now and data and name not in of_vocabulary:
      return f'{name} is gone'
  return None


def is_ready(path: pathlib.Path) -> bool:
  """Whether the cache and, for a mixture, those of its tasks are complete and agree with their sources."""
  if not (path / 'cache.json').is_file():
    return False
  try:
    components = cache.describe(path).get('components')
  except (stored.DamagedError, cache.FormatError):
    return False
  if components is None:
    return stale(path) is None
  return all(is_ready(path.parent / component['directory']) for component in components)


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
  """Waits until no other process makes this cache, and keeps others from making it."""
  with contextlib.ExitStack() as held:
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      held.enter_context(files.lock(path.with_name(path.name + '.lock'), wait=True))
    except OSError as error:
      raise ConfigError(f'the cache folder {path.parent} cannot be written ({error.strerror}): set TaskConfig.cache_dir or '
                        '$T5X_CPM_CACHE to a folder of your own.') from error
    yield


def _build_task(config: Config, path: pathlib.Path, progress: bool) -> None:
  reason = stale(path) if os.path.lexists(path / 'cache.json') else None
  try:
    source, vocabulary = tasks.tokens(config), tasks.vocabulary(config)
  except ConfigError as error:  # what there is of the cache is left as it is
    if not os.path.lexists(path):
      raise
    reason = reason or 'it has no cache.json'
    raise ConfigError(f'The cache {path} cannot be used: {reason}. It cannot be made again either: {error}') from None
  try:
    if reason is not None:
      print(f'The cache {path} is made again: {reason}.', file=sys.stderr)
      cache_build.remove(path)
    cache_build.build(config, path, source, vocabulary, describe_source(source, vocabulary), progress=progress)
  except OSError as error:
    raise ConfigError(f'the cache {path} could not be written: {error.strerror or error}. Set TaskConfig.cache_dir or '
                      '$T5X_CPM_CACHE to a folder with more room.') from error


def _finish_mixture(path: pathlib.Path, name: str, built: list[tuple[str, float, pathlib.Path]]) -> None:
  try:
    if os.path.lexists(path / 'cache.json'):
      try:
        cache.describe(path)
      except (stored.DamagedError, cache.FormatError) as error:
        print(f'The cache {path} is made again: {error.reason}.', file=sys.stderr)
        cache_build.remove(path)
    cache.finish_mixture(path, name, built)
  except OSError as error:
    raise ConfigError(f'the cache {path} could not be written: {error.strerror or error}.') from error


def _tidy(path: pathlib.Path) -> None:
  """Removes what a process left that was killed when it had made the cache; a folder that cannot be written stays as it is."""
  if cache_build.leftovers(path):
    with contextlib.suppress(OSError, ConfigError), _locked(path):
      cache_build.clean(path)


def build(config: Config, *, progress: bool = True) -> pathlib.Path:
  """Makes the cache of `config.task`, or of every task of a mixture, unless it is there.

  TensorFlow is imported only for tasks that are not plain text files.

  Args:
    config: `task` and, for the task named 'local', `local_task` are read.
    progress: whether to show documents per second and the time left on stderr.

  Returns:
    The folder of the cache.

  Raises:
    ConfigError: an unknown task, no file, or a folder that cannot be written.
    DataError: a document that cannot be read, with its file and line.
  """
  path = directory(config)
  if is_ready(path):
    _tidy(path)
    return path
  with _locked(path):
    if is_ready(path):  # another process made it while this one waited
      return path
    rates = tasks.parts(config)
    if rates is None:
      _build_task(config, path, progress)
    else:
      packing.rate_counts(rates)  # rates that cannot be kept are refused before time is spent
      built = []
      for name, rate in rates.items():
        own = dataclasses.replace(config, task=dataclasses.replace(config.task, name=name))
        built.append((name, rate, build(own, progress=progress)))
      _finish_mixture(path, config.task.name, built)
  return path
