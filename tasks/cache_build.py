"""How a cache is made: shards of the task in worker processes, then one file of each kind.

A unit of work is one shard of one split. Its files get their names when they are complete, its .json last, so that a build
that was killed goes on with the units that are missing. How many units there are depends on the source alone: a cache has
the same content whatever the number of processes.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import queue
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from t5x_cpm import config as config_lib
from t5x_cpm import files, tasks, vocabularies
from t5x_cpm.config import Config, ConfigError
from t5x_cpm.data import cache

_ERRORS = {'DataError': cache.DataError, 'ConfigError': ConfigError}


@dataclasses.dataclass(frozen=True)
class Unit:
  """One shard of one split."""

  split: str
  shard: int
  shards: int

  @property
  def name(self) -> str:
    return f'{self.split}-{self.shard:05d}-of-{self.shards:05d}'


def build_task(config: Config, path: pathlib.Path, *, progress: bool) -> None:
  """Writes the cache of one task to `path`, whose lock is held.

  Args:
    config: of the run.
    path: folder of the cache.
    progress: show it on stderr.
  """
  source, vocabulary = tasks.tokens(config), tasks.vocabulary(config)
  units = [Unit(split, shard, source.shards[split]) for split in cache.SPLITS for shard in range(source.shards.get(split, 0))]
  if not units:
    raise ConfigError(f'task {config.task.name!r} has the splits {sorted(source.shards)}: expected train or validation.')
  states = {'patterns': list(source.patterns), 'files': cache.file_states(source.files),
            'vocabulary': cache.file_states(vocabulary.files)}
  _continue_or_start(path, {'units': [unit.name for unit in units], 'source': states, 'vocabulary': vocabulary.fingerprint})
  missing = [unit for unit in units if not (path / f'{unit.name}.json').is_file()]
  watch = _Progress(len(units), len(missing), config.task.name) if progress else None
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
  processes = min(config.task.cache_processes or cores, len(missing))
  if processes > 1 and len(missing) > 2 and tasks.in_any_process(config):  # starting a process takes a second
    _run_workers(config, path, missing, processes, watch)
  else:
    for unit in missing:
      run_unit(source, unit, path, vocabulary, watch.add if watch else lambda documents: None)
      if watch:
        watch.finish_unit()
  if watch:
    watch.close()
  _join(config.task.name, path, units, source.features, vocabulary, states)


def _continue_or_start(path: pathlib.Path, plan: dict) -> None:
  old = path / 'plan.json'
  if old.is_file() and json.loads(old.read_text()) == plan:
    finished = sum((path / f'{name}.json').is_file() for name in plan['units'])
    print(f'Continuing the cache {path}: {finished} of {len(plan["units"])} shards are there.', file=sys.stderr)
    return
  if path.exists():
    print(f'Starting the cache {path} again: its sources changed while it was unfinished.', file=sys.stderr)
    shutil.rmtree(path)
  path.mkdir(parents=True)
  files.write_json(old, plan)


def run_unit(source: Any, unit: Unit, path: pathlib.Path, vocabulary: vocabularies.Vocabulary,
             report: Callable[[int], None]) -> None:
  """Writes the tokens of one shard of what `tasks.tokens` gave; `report(documents)` is called as they come."""
  counts: collections.Counter = collections.Counter()
  skipped: collections.Counter = collections.Counter()
  digest = hashlib.blake2b(digest_size=16)
  names = [f'{feature}.{kind}' for feature in source.features for kind in ('tokens', 'lengths')]
  temporary = {name: path / f'{unit.name}.{name}.tmp{os.getpid()}' for name in names}
  with contextlib.ExitStack() as stack:
    out = {name: stack.enter_context(open(file, 'wb')) for name, file in temporary.items()}
    for sides in source.tokens(unit.split, unit.shard, vocabulary, skipped):
      keep = sides[-1][1] > 0
      for feature, (flat, lengths) in zip(source.features, sides):
        flat = flat[np.repeat(keep, lengths)].astype(cache.token_dtype(vocabulary))
        for kind, array in (('tokens', flat), ('lengths', lengths[keep].astype(np.uint32))):
          array.tofile(out[f'{feature}.{kind}'])
          digest.update(array)
        counts[feature] += len(flat)
      counts['documents'] += int(keep.sum())
      skipped['empty'] += int((~keep).sum())
      report(len(keep))
  for name, file in temporary.items():
    os.replace(file, path / f'{unit.name}.{name}')
  files.write_json(path / f'{unit.name}.json', {**counts, 'skipped': dict(skipped), 'digest': digest.hexdigest()})


def _run_workers(config: Config, path: pathlib.Path, units: list[Unit], processes: int, watch: '_Progress | None') -> None:
  """Spreads the units over processes that each run this module, and reads what they report."""
  environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(p for p in sys.path if p), 'CUDA_VISIBLE_DEVICES': '',
                 'TF_CPP_MIN_LOG_LEVEL': '3'}
  job = json.dumps({'config': config_lib.to_dict(config), 'path': str(path.resolve()), 'imports': tasks.imported()})
  waiting = collections.deque(units)
  messages: queue.Queue[tuple[subprocess.Popen, dict]] = queue.Queue()
  running = []

  def assign(process) -> None:
    if waiting:
      process.stdin.write(json.dumps(dataclasses.asdict(waiting.popleft())) + '\n')
      process.stdin.flush()
    else:
      process.stdin.close()  # the worker ends

  def listen(process, results) -> None:
    with os.fdopen(results) as lines:
      for line in lines:
        messages.put((process, json.loads(line)))
    if not process.stdin.closed:
      messages.put((process, {'kind': 'RuntimeError', 'error': 'a cache worker ended without a message; was it killed for '
                              'memory? Set TaskConfig.cache_processes to a smaller number.'}))

  try:
    for _ in range(processes):
      read_end, write_end = os.pipe()
      process = subprocess.Popen([sys.executable, '-m', __name__, str(write_end)], stdin=subprocess.PIPE, env=environment,
                                 stdout=subprocess.DEVNULL, pass_fds=(write_end,), text=True)
      os.close(write_end)
      running.append(process)
      threading.Thread(target=listen, args=(process, read_end), daemon=True).start()
      assert process.stdin
      process.stdin.write(job + '\n')
      assign(process)
    unfinished = len(units)
    while unfinished:
      process, message = messages.get()
      if 'error' in message:
        raise _ERRORS.get(message['kind'], RuntimeError)(message['error'])
      if watch:
        watch.add(message['documents'])
      if message['finished']:
        unfinished -= 1
        if watch:
          watch.finish_unit()
        assign(process)
  finally:
    for process in running:
      process.kill()
      process.wait()


def _work(results) -> None:
  """Runs the units that come as lines on stdin, until there are no more or the parent is gone."""
  job = json.loads(sys.stdin.readline())
  config = config_lib.from_dict(job['config'])
  parent = os.getppid()

  def send(**message) -> None:
    if os.getppid() != parent:
      sys.exit(1)
    results.write(json.dumps(message) + '\n')
    results.flush()

  try:
    tasks.import_modules(job['imports'])
    source, vocabulary = tasks.tokens(config), tasks.vocabulary(config)
    for line in sys.stdin:
      run_unit(source, Unit(**json.loads(line)), pathlib.Path(job['path']), vocabulary,
               lambda documents: send(documents=documents, finished=False))
      send(documents=0, finished=True)
  except (ValueError, OSError) as error:
    send(error=str(error), kind=type(error).__name__)
  except Exception:  # of a user's own task, say
    send(error=traceback.format_exc(), kind='RuntimeError')


def _join(name: str, path: pathlib.Path, units: list[Unit], features: list[str],
          vocabulary: vocabularies.Vocabulary, source: dict) -> None:
  """Appends the shards to one file of each kind, then makes the folder a cache, then drops the shards."""
  parts = {unit: json.loads((path / f'{unit.name}.json').read_text()) for unit in units}
  splits: dict[str, dict] = {}
  for split in dict.fromkeys(unit.split for unit in units):
    mine = [unit for unit in units if unit.split == split]
    for file in (f'{feature}.{kind}' for feature in features for kind in ('tokens', 'lengths')):
      with open(path / f'{split}.{file}.tmp', 'wb') as whole:
        for unit in mine:
          with open(path / f'{unit.name}.{file}', 'rb') as part:
            shutil.copyfileobj(part, whole, 1 << 22)
      os.replace(path / f'{split}.{file}.tmp', path / f'{split}.{file}')
    skipped: collections.Counter = collections.Counter()
    for unit in mine:
      skipped.update(parts[unit]['skipped'])
    splits[split] = {'documents': sum(parts[unit].get('documents', 0) for unit in mine),
                     'tokens': {feature: sum(parts[unit].get(feature, 0) for unit in mine) for feature in features},
                     'skipped': {reason: count for reason, count in skipped.items() if count}}
  checksum = hashlib.blake2b(json.dumps([(unit.name, parts[unit]['digest']) for unit in units]).encode(), digest_size=16)
  cache.finish(path, name, vocabulary, splits, features, checksum.hexdigest(), source)
  for unit in units:
    for part_file in path.glob(f'{unit.name}.*'):
      part_file.unlink()
  (path / 'plan.json').unlink()


class _Progress:
  """One line on stderr: documents per second and the time left."""

  def __init__(self, units: int, missing: int, name: str):
    self.name, self.units, self.left, self.missing = name, units, missing, missing
    self.documents = 0
    self.begin = self.shown = time.monotonic()
    self.every = 0.5 if sys.stderr.isatty() else 30.0

  def add(self, documents: int) -> None:
    self.documents += documents
    if time.monotonic() - self.shown > self.every:
      self.show('\r' if sys.stderr.isatty() else '\n')

  def finish_unit(self) -> None:
    self.left -= 1

  def show(self, end: str) -> None:
    self.shown = time.monotonic()
    elapsed = self.shown - self.begin
    done = self.missing - self.left
    left = f', {elapsed / done * self.left:.0f} s left' if done and self.left else ''
    print(f'cache {self.name}: {self.documents:,} documents, {self.documents / max(elapsed, 1e-3):,.0f}/s, shard '
          f'{self.units - self.left} of {self.units}{left}   ', end=end, file=sys.stderr, flush=True)

  def close(self) -> None:
    self.show('\n')


if __name__ == '__main__':
  with os.fdopen(int(sys.argv[1]), 'w') as pipe:
    _work(pipe)
