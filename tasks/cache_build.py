"""How a cache is made: first a plan of units, then each unit by itself, and last one file of each kind.

A build that was killed continues with the units that are missing. How many units there are depends on the source alone, so that
a cache has the same content whatever the number of processes.
"""

import collections
import hashlib
import json
import os
import pathlib
import shutil
import sys

from t5x_cpm import files, stored, tasks
from t5x_cpm.config import Config, ConfigError
from t5x_cpm.data import cache
from t5x_cpm.progress import Progress
from t5x_cpm.tasks import cache_units, cache_workers
from t5x_cpm.tasks.cache_units import Unit
from t5x_cpm.tasks.documents import Source
from t5x_cpm.vocabularies import Vocabulary


class _Report:
  """Counts what is done and shows it."""

  def __init__(self, name: str, units: int, missing: int, show: bool):
    self.done, self.documents = units - missing, 0
    self.progress = Progress(f'cache {name}', 'shard', units, self.done) if show and missing else None

  def __call__(self, documents: int, finished: bool) -> None:
    self.documents += documents
    self.done += finished
    if self.progress:
      self.progress.show(self.done, f'{self.documents:,} documents, {self.progress.rate(self.documents):,.0f}/s')

  def close(self) -> None:
    if self.progress:
      self.progress.close()


def _cores() -> int:
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def leftovers(path: pathlib.Path) -> list[pathlib.Path]:
  """What a finished cache should not hold any more: the plan, the files of units, unfinished files."""
  return [file for pattern in ('*-of-*', '.*.tmp*', 'plan.json') for file in path.glob(pattern)]


def remove(path: pathlib.Path) -> None:
  """Removes a cache, or whatever stands in its place."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink()


def _continue_or_start(path: pathlib.Path, plan: dict) -> None:
  old = path / 'plan.json'
  if os.path.lexists(path):
    reason = 'its sources changed while it was unfinished'
    try:
      if stored.parse(old, '') == plan:
        finished = sum((path / f'{name}.json').is_file() for name in plan['units'])
        print(f'Continuing the cache {path}: {finished} of {len(plan["units"])} shards are there.', file=sys.stderr)
        return
    except stored.DamagedError as error:
      reason = error.reason
    print(f'Starting the cache {path} again: {reason}.', file=sys.stderr)
    remove(path)
  path.mkdir(parents=True)
  stored.write(old, plan)


def _join(path: pathlib.Path, units: list[Unit], features: list[str]) -> tuple[dict[str, dict], str]:
  """Joins the files of the units into one of each kind. Returns what cache.json says about the splits, and the checksum."""
  facts = {unit: unit.facts(path) for unit in units}
  splits: dict[str, dict] = {}
  for split in dict.fromkeys(unit.split for unit in units):
    mine = [unit for unit in units if unit.split == split]
    for file in (f'{feature}.{kind}' for feature in features for kind in cache.KINDS):
      with files.replacing(path / f'{split}.{file}') as whole:
        for unit in mine:
          unit.copy(path, file, whole)
    skipped: collections.Counter = collections.Counter()
    for unit in mine:
      skipped.update(facts[unit]['skipped'])
    splits[split] = {'documents': sum(facts[unit].get('documents', 0) for unit in mine),
                     'tokens': {feature: sum(facts[unit].get(feature, 0) for unit in mine) for feature in features},
                     'skipped': {reason: count for reason, count in skipped.items() if count}}
  digests = json.dumps([(unit.name, facts[unit]['content']) for unit in units])
  return splits, hashlib.blake2b(digests.encode(), digest_size=16).hexdigest()


def clean(path: pathlib.Path) -> None:
  """Removes from a finished cache the plan, the files of units, and what a build that was killed left unfinished."""
  for file in leftovers(path):
    file.unlink(missing_ok=True)


def build(config: Config, path: pathlib.Path, source: Source, vocabulary: Vocabulary, described: dict, *,
          progress: bool) -> None:
  """Makes the cache of one task.

  Args:
    config: the configuration of the run.
    path: the folder of the cache; no other process works there.
    source: the documents.
    vocabulary: makes the tokens.
    described: what cache.json says about the source. An interrupted build continues only if this is the same.
    progress: whether to show it on stderr.

  Raises:
    ConfigError: the task has neither a split train nor validation.
    DataError: a document that cannot be read.
  """
  name = config.task.name
  units = [Unit(split, shard, source.shards[split]) for split in cache.SPLITS for shard in range(source.shards.get(split, 0))]
  if not units:
    raise ConfigError(f'task {name!r} has the splits {sorted(source.shards)}: expected train or validation.')
  _continue_or_start(path, {'units': [unit.name for unit in units], 'source': described,
                            'vocabulary': vocabulary.fingerprint})
  missing = [unit for unit in units if not unit.is_done(path)]
  report = _Report(name, len(units), len(missing), progress)
  processes = min(config.task.cache_processes or _cores(), len(missing))
  if processes > 1 and len(missing) > 2 and tasks.in_any_process(config):  # starting a process takes a second
    cache_workers.run(config, path, missing, processes, report)
  else:
    for unit in missing:
      cache_units.write(source, unit, path, vocabulary, lambda documents: report(documents, False))
      report(0, True)
  report.close()
  splits, checksum = _join(path, units, source.features)
  cache.finish(path, name, vocabulary, splits, source.features, checksum, described)
  clean(path)
