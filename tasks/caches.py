"""The caches of tasks: where they lie, whether they are up to date, and making those that are not."""

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

from t5x_cpm import files, tasks
from t5x_cpm.config import Config, ConfigError
from t5x_cpm.data import cache
from t5x_cpm.tasks import cache_build


def root(config: Config) -> pathlib.Path:
  """The folder that holds all caches."""
  chosen = config.task.cache_dir or os.environ.get('T5X_CPM_CACHE') or '~/.cache/t5x_cpm'
  return pathlib.Path(chosen).expanduser()


def directory(config: Config) -> pathlib.Path:
  """The folder of the cache of `config.task`; its name depends on what determines the tokens, not on lengths or objective."""
  identity = json.dumps(tasks.identity(config), sort_keys=True, ensure_ascii=False)
  readable = re.sub(r'[^\w.]+', '_', config.task.name).strip('_')[:60]
  return root(config) / f'{readable}-{hashlib.blake2b(identity.encode(), digest_size=6).hexdigest()}'


def stale(path: pathlib.Path) -> str | None:
  """Why a complete cache must be made again, or None. A cache whose sources are all gone stays good."""
  info = json.loads((path / 'cache.json').read_text())
  if info['format'] != cache.FORMAT:
    return f'it has format {info["format"]}, expected {cache.FORMAT}'
  source = info['source']
  vocabulary = [name for name, *_ in source['vocabulary'] if os.path.exists(name)]
  before = {name: rest for name, *rest in source['files'] + source['vocabulary']}
  data = [name for name, *_ in source['files'] if os.path.exists(name)]
  data += [name for pattern in source['patterns'] for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
  now = {name: rest for name, *rest in cache.file_states(data + vocabulary)}
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
      files.write_json(path / 'cache.json', {'format': cache.FORMAT, 'task': config.task.name, 'components': parts})
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
