"""Damaged caches: whatever happens to a file of theirs, the batches are the same, or the file is named, or it is made again."""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import small_data

from t5x_cpm import files, stored
from t5x_cpm.config import ConfigError, LocalTaskConfig
from t5x_cpm.data import blocks, cache, index
from t5x_cpm.tasks import caches

SEED = 14
OBJECTIVES = ('isolated', 'cpm2', 'pairs')
LENGTHS = {'encoder_length': 64, 'decoder_length': 48}
STRANGE = ['', None, [], {}, -1, 10**400, 1e300, True, 'x' * 300, '../../etc', '/etc/passwd', [[]], 3.5]


def write_sources(folder):
  rng = np.random.default_rng(SEED)
  texts = [''.join(rng.choice([chr(c) for c in range(0x4E00, 0x5200)], n)) for n in rng.integers(12, 90, 160)]
  (folder / 'a.txt').write_text('\n'.join(texts) + '\n', encoding='utf-8')
  pairs = [json.dumps({'inputs': text, 'targets': text[:20][::-1]}) for text in texts]
  (folder / 'a.jsonl').write_text('\n'.join(pairs) + '\n')


def make_config(folder, objective):
  config = small_data.make_config(folder, name='local', objective=objective, cache_processes=1, batch_size=4, **LENGTHS)
  glob = str(folder / ('a.jsonl' if objective == 'pairs' else 'a.txt'))
  return dataclasses.replace(config, local_task=LocalTaskConfig(files=glob, validation_fraction=0.2))


def batches(config):
  """The batches of an epoch, and of an evaluation."""
  found = []
  for split in ('train', 'validation'):
    read = small_data.open_reader(config, split)
    found += [read.batch(step) for step in range(int(read.rows_per_epoch) // 4 + 1)] if split == 'train' else [
        *read.eval_batches()]
  return b''.join(value.tobytes() for batch in found for _, value in sorted(batch.items()))


class Victim:
  """A cache with its index, and what it holds."""

  def __init__(self, folder, objective):
    folder.mkdir()
    write_sources(folder)
    self.folder, self.config = folder, make_config(folder, objective)
    self.expected = batches(self.config)
    self.path = caches.directory(self.config)
    self.copy = folder / 'copy'
    shutil.copytree(self.path, self.copy)

  def files(self):
    return sorted(path.relative_to(self.copy) for path in self.copy.rglob('*') if path.is_file())

  def restore(self):
    if self.path.is_dir() and not self.path.is_symlink():
      shutil.rmtree(self.path)
    shutil.copytree(self.copy, self.path)

  def outcome(self, names, capfd):
    """What reading does: 'exact', 'made again', 'refused', 'silent' or 'traceback' with what happened."""
    capfd.readouterr()
    try:
      with contextlib.redirect_stdout(None):
        found = batches(self.config)
    except ConfigError as error:
      one_line = '\n' not in str(error)
      return 'refused' if one_line and any(name in str(error) for name in names) else f'traceback: {error}'
    except Exception as error:
      return f'traceback: {error!r}'
    told = capfd.readouterr().err
    if found != self.expected:
      return f'silent: {told}'
    return 'made again' if 'made again' in told or 'Starting the cache' in told else 'exact'


@pytest.fixture(scope='module')
def victims(tmp_path_factory):
  folder = tmp_path_factory.mktemp('damage')
  return {objective: Victim(folder / objective, objective) for objective in OBJECTIVES}


def flip(data, rng):
  place = rng.randrange(len(data))
  data[place] ^= 1 << rng.randrange(8)


def zero(data, rng):
  place = rng.randrange(len(data))
  data[place:place + rng.randint(1, 64)] = bytes(min(64, len(data) - place))


def cut(data, rng):
  del data[rng.randrange(len(data)):]


def repeat(data, rng):
  place = rng.randrange(len(data))
  data[place:place] = data[place:place + rng.randint(1, 16)]


def damage(victim, rng):
  """Damages a file of the cache in one of several ways; returns what errors may call what was damaged."""
  name, other = rng.sample(victim.files(), 2)
  target, kind = victim.path / name, rng.choice(['bytes'] * 6 + ['swap', 'swap', 'gone', 'folder', 'loop'])
  if kind == 'bytes':
    data = bytearray(target.read_bytes())
    change = rng.choice([flip, flip, flip, zero, cut, repeat])
    kind = change.__name__
    if data:
      change(data, rng)
    target.write_bytes(data)
  elif kind == 'swap':
    a, b = target.read_bytes(), (victim.path / other).read_bytes()
    target.write_bytes(b)
    (victim.path / other).write_bytes(a)
  else:
    target.unlink()
    if kind == 'folder':
      target.mkdir()
      (target / 'x').write_text('x')
    elif kind == 'loop':
      target.symlink_to(target.name)
  return kind, (name.name, other.name)


def campaign(victims, capfd, count, source_gone):
  rng = random.Random(SEED)
  found = {}
  for number in range(count):
    victim = victims[OBJECTIVES[number % len(OBJECTIVES)]]
    victim.restore()
    what, names = damage(victim, rng)
    moved = [path for path in victim.folder.glob('a.*') if source_gone]
    for path in moved:
      path.rename(path.with_suffix('.gone' + path.suffix))
    try:
      outcome = victim.outcome((*names, 'vocabulary', 'cache.json'), capfd)
    finally:
      for path in moved:
        path.with_suffix('.gone' + path.suffix).rename(path)
    found.setdefault(outcome.partition(':')[0], []).append((number, what, names, outcome))
  print(f'seed {SEED}, source {"gone" if source_gone else "there"}:', {name: len(cases) for name, cases in found.items()})
  bad = found.get('silent', []) + found.get('traceback', [])
  assert not bad, bad
  return found


@pytest.mark.parametrize('source_gone', [False, True])
def test_damage_is_made_again_or_refused_by_name(victims, capfd, source_gone):
  found = campaign(victims, capfd, 18, source_gone)
  assert len(found.get('refused', [])) == 0 or source_gone


@pytest.mark.slow
@pytest.mark.parametrize('source_gone', [False, True])
def test_no_damage_of_two_hundred_is_silent(victims, capfd, source_gone):
  assert len(campaign(victims, capfd, 200, source_gone)) > 1
