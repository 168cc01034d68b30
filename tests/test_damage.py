"""Damaged files of a model_dir are refused by name or set aside; what is read is what was saved."""

import collections
import gc
import json
import os
import pathlib
import random
import shutil
import tempfile
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_metrics
from small_run import INFO, abstract, assert_same, config, saved, small_state

from t5x_cpm.checkpoints import arrays, digests, run_directory
from t5x_cpm.checkpoints.arrays import load_params
from t5x_cpm.checkpoints.manager import Manager
from t5x_cpm.checkpoints.run_directory import CheckpointError, read_run
from t5x_cpm.config import Config, MetricsConfig
from t5x_cpm.training import metrics, records, stability


def reference(x):
  """The digest of an array, plainly."""
  bits = x.reshape(-1).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize]).astype(np.uint32)
  h = bits ^ (np.arange(bits.size, dtype=np.uint32) * np.uint32(0x9E3779B1))
  h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
  low, high = (int(part.sum(dtype=np.uint64)) % 2**32 for part in (h & 0xFFFF, h >> 16))
  return f'{x.dtype}{list(x.shape)} {high:08x}{low:08x}'


@pytest.mark.parametrize('shape, dtype', [((), np.int32), ((), bool), ((0, 3), np.float32), ((5, 7), jnp.bfloat16),
                                          ((3, 400, 1000), np.float32), ((70000,), np.float32)])
def test_digests(shape, dtype):
  """Against the plain formula; that they are the same on any mesh, restoring on eight devices shows in test_checkpoint.py."""
  x = np.random.default_rng(0).standard_normal(shape).astype(dtype) if shape else np.array(1, dtype)
  assert digests.of_tree({'x': jnp.asarray(x)}) == {'x': reference(x)}  # a CPU's way
  low, high = np.asarray(digests._of_array(jnp.asarray(x)))
  assert reference(x).endswith(f' {high:08x}{low:08x}')  # any device's way


def damage(rng, path):
  """Does something to a file and returns what."""
  kind = rng.choice(['flip', 'flip', 'flip', 'zeros', 'cut', 'emptied', 'other JSON', 'random', 'deleted', 'folder', 'loop'])
  data = bytearray(path.read_bytes())
  start = rng.randrange(len(data) or 1)
  if kind in ('deleted', 'folder', 'loop'):
    path.unlink()
    if kind == 'folder':
      path.mkdir()
    elif kind == 'loop':
      path.symlink_to(path.name)
    return kind
  if kind == 'flip' and data:
    data[start] ^= 1 << rng.randrange(8)
  elif kind == 'zeros':
    data[start:start + rng.choice([1, 8, 64, 512])] = bytes(min(len(data) - start, 64))
  elif kind == 'cut':
    del data[start:]
  elif kind == 'emptied':
    data.clear()
  elif kind == 'other JSON':
    data = rng.choice([b'[]', b'null', b'3', b'{}', b'"x"', b'\xff\xfe{}', b'[' * 100_000, b'{"config": 1}'])
  elif kind == 'random':
    data = rng.randbytes(len(data) + 1)
  path.write_bytes(data)
  return kind


def outcome(folder, read):
  """How reading a damaged checkpoint ended. `read` returns what was read and what should have been."""
  try:
    got, wanted = read()
  except CheckpointError as error:
    text = str(error)
    return 'refused' if '\n' not in text and str(folder) in text and len(text) < 1500 else f'badly refused: {text}'
  except Exception as error:
    return f'traceback: {error!r}'
  try:
    assert_same(got, wanted)
  except AssertionError:
    return 'silent'
  return 'exact'


def campaign(tmp_path, seed, count):
  """Damages one file of the last of two checkpoints each time, and reads it as inference and as training do."""
  saved(tmp_path / 'good', (1, 2))
  names = sorted(path.relative_to(tmp_path) for path in (tmp_path / 'good' / 'checkpoints' / '2').rglob('*') if path.is_file())
  rng, found, bad = random.Random(seed), collections.Counter(), []
  folder = tmp_path / 'damaged'
  for _ in range(count):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tmp_path / 'good', folder)
    name = rng.choice(names).relative_to('good')
    kind = damage(rng, folder / name)

    def infer():
      return load_params(folder), small_state(read_run(folder).step)['params']

    def train():
      with Manager(folder, config(), info=INFO) as manager:
        return manager.restore(abstract(small_state())), small_state(manager.latest_step())

    for read in (infer, train):
      result = outcome(folder, read)
      found[result.partition(':')[0]] += 1
      if result not in ('refused', 'exact'):
        bad.append(f'{kind} {name}: {read.__name__} {result}')
  print(f'seed {seed}: {dict(found)}')
  assert not bad, f'seed {seed}: ' + '\n'.join(bad[:5])
  return found


def test_some_damages_of_a_checkpoint(tmp_path, capfd):
  found = campaign(tmp_path, random.randrange(10**6), 8)
  assert found.total() == 16
  assert 'Traceback' not in capfd.readouterr().err


@pytest.mark.slow
def test_200_damages_of_a_checkpoint(tmp_path, capfd):
  found = campaign(tmp_path, random.randrange(10**6), 200)
  assert found['refused'] > 100
  with capfd.disabled():
    print(dict(found))
  assert 'Traceback' not in capfd.readouterr().err


def test_every_flip_in_the_values_of_an_array_is_refused(tmp_path):
  """Whatever lies between a file and an array, another bit of the array has another digest."""
  state = small_state(1)
  wanted = digests.of_tree(state)
  rng = np.random.default_rng(0)
  for name, leaf in [('params/lm_head', state['params']['lm_head']), ('step', state['step']), ('halted', state['halted'])]:
    for _ in range(20):
      data = bytearray(np.asarray(leaf).tobytes())
      data[rng.integers(len(data))] ^= 1 if leaf.dtype == bool else 1 << rng.integers(8)
      changed = np.frombuffer(bytes(data), leaf.dtype).reshape(leaf.shape)
      assert digests.of_tree({name: jnp.asarray(changed)})[name] != wanted[name]


def rename(folder):
  (folder / 'checkpoints' / '2').rename(folder / 'checkpoints' / '900')
  return 900, 'is that of step 2'


def mix(folder):
  shutil.rmtree(folder / 'checkpoints' / '2' / 'state')
  shutil.copytree(folder / 'checkpoints' / '1' / 'state', folder / 'checkpoints' / '2' / 'state')
  return 2, 'state is that of step 1'


def mix_without_digests(folder):
  path = folder / 'checkpoints' / '2' / 'meta' / 'metadata'
  meta = json.loads(path.read_text())
  path.write_text(json.dumps({name: value for name, value in meta.items() if name not in ('arrays', 'seal')}))
  return mix(folder)


@pytest.mark.parametrize('change', [rename, mix, mix_without_digests])
def test_directory_description_and_state_agree(tmp_path, change):
  saved(tmp_path, (1, 2))
  step, reason = change(tmp_path)
  for read in (load_params, lambda path: Manager(path, config(), info=INFO).restore(abstract(small_state()))):
    message = rf'checkpoints/{step} is damaged: .*{reason}.* Move it away to use that of step 1'
    with pytest.raises(CheckpointError, match=message):
      read(tmp_path)


def test_a_checkpoint_without_digests_is_read(tmp_path):
  saved(tmp_path)
  path = tmp_path / 'checkpoints' / '1' / 'meta' / 'metadata'
  meta = json.loads(path.read_text())
  path.write_text(json.dumps({name: value for name, value in meta.items() if name not in ('arrays', 'seal', 'step')}))
  assert_same(load_params(tmp_path), small_state(1)['params'])
  with Manager(tmp_path, config(), info=INFO) as manager:
    assert_same(manager.restore(abstract(small_state())), small_state(1))


def test_arrays_that_are_converted_are_read_in_groups(tmp_path, monkeypatch):
  saved(tmp_path)
  monkeypatch.setattr(arrays, 'GROUP_BYTES', 200)
  params = small_state(1)['params']
  half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
  assert_same(load_params(tmp_path, into=half), jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def test_another_vocabulary_is_refused(tmp_path):
  run_directory.check_vocabulary(tmp_path, {'vocabulary': 'abc'}, 'abc')
  with pytest.raises(CheckpointError, match='vocabulary holds another vocabulary .*damaged'):
    run_directory.check_vocabulary(tmp_path, {'vocabulary': 'abc'}, 'abd')


@pytest.mark.parametrize('name', ['config.json', '.lock', 'checkpoints'])
@pytest.mark.parametrize('kind', ['folder', 'loop', 'text'])
def test_what_stands_in_the_place_of_a_file(tmp_path, name, kind):
  saved(tmp_path)
  path = tmp_path / name
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  {'folder': path.mkdir, 'loop': lambda: path.symlink_to(name), 'text': lambda: path.write_bytes(b'\xff')}[kind]()
  try:
    Manager(tmp_path, config(), info=INFO).close()
  except CheckpointError as error:
    assert name in str(error) and '\n' not in str(error)
  else:
    assert kind == 'text' or (name, kind) in (('config.json', 'loop'), ('checkpoints', 'folder'))


def test_a_save_fails_at_once(tmp_path, capfd):
  gone = pytest.raises(CheckpointError, match='was deleted or unmounted')
  with gone, Manager(tmp_path / 'a', config(), info=INFO) as manager:
    manager.save(1, small_state(1))
    manager.wait()
    shutil.rmtree(tmp_path / 'a')
    manager.save(2, small_state(2))
  user = os.geteuid()
  with tempfile.TemporaryDirectory() as name:  # which, unlike tmp_path, another user may enter
    folder = pathlib.Path(name)
    os.chmod(folder, 0o777)
    try:
      if user == 0:
        os.seteuid(65534)  # root may write everywhere
      with Manager(folder / 'b', config(), info=INFO) as manager:
        manager.save(1, small_state(1))
        manager.wait()
        os.chmod(folder / 'b' / 'checkpoints', 0o555)
        with pytest.raises(CheckpointError, match='b/checkpoints/.write_probe cannot be written: Permission denied. Make it'):
          manager.save(2, small_state(2))
      with pytest.raises(CheckpointError, match='b/checkpoints/.write_probe cannot be written'):
        Manager(folder / 'b', config(), info=INFO)  # before the first step
    finally:
      os.seteuid(user)
      os.chmod(folder / 'b' / 'checkpoints', 0o755)
  assert not capfd.readouterr().err


@pytest.mark.parametrize('name', ['_CHECKPOINT_METADATA', 'state/_METADATA', 'state/d/x', 'meta/metadata'])
def test_nothing_waits_for_a_pipe_in_a_checkpoint(tmp_path, name):
  saved(tmp_path, (1, 2))
  path = tmp_path / 'checkpoints' / '2' / name
  path.unlink(missing_ok=True)
  os.mkfifo(path)
  for read in (load_params, lambda folder: Manager(folder, config(), info=INFO)):
    with pytest.raises(CheckpointError, match=f'checkpoints/2 is damaged: .*{path.name}.* not a regular file'):
      read(tmp_path)


def test_what_a_failed_read_leaves_behind_is_not_printed(tmp_path, capfd):
  """Coroutines of Orbax that nobody waited for, when they are collected at some later time."""
  saved(tmp_path, (1,))
  for path in (tmp_path / 'checkpoints' / '1' / 'state').rglob('d/*'):
    path.unlink()
  for _ in range(3):
    with pytest.raises(CheckpointError) as error:
      load_params(tmp_path)
    assert len(str(error.value)) < 600
  del error
  gc.collect()
  assert not capfd.readouterr().err


def test_metrics_that_were_cut_short_are_told(tmp_path, capsys):
  saved(tmp_path, (6,), Config(metrics=MetricsConfig(every=2)))
  test_metrics.run(tmp_path, 0, 6)
  whole = (tmp_path / 'metrics.jsonl').read_bytes().splitlines(keepends=True)
  for kept, gap in ((len(whole), ''), (2, 'has no records of train of steps 3 to 6: it was cut short'), (0, 'of steps 1 to 6')):
    (tmp_path / 'metrics.jsonl').write_bytes(b''.join(whole[:kept]))
    capsys.readouterr()
    test_metrics.run(tmp_path, 6, 6)
    said = capsys.readouterr().err
    assert gap in said and bool(gap) == ('metrics.jsonl' in said)


def test_metrics_that_are_damaged_are_set_aside(tmp_path, capsys):
  """Lines of metrics.jsonl and files of TensorBoard, damaged at random: the run goes on, and the rest is as it was."""
  seed = random.randrange(10**6)
  rng = random.Random(seed)
  good = tmp_path / 'good'
  good.mkdir()
  test_metrics.run(good, 0, 6, evaluate=(4,))
  for number in range(25):
    folder = tmp_path / str(number)
    shutil.copytree(good, folder)
    path = rng.choice([folder / 'metrics.jsonl', *folder.glob('tensorboard/*/*')])
    kind = damage(rng, path)
    capsys.readouterr()
    test_metrics.run(folder, 4, 6)
    said = [line for line in capsys.readouterr().err.splitlines() if 'set aside' in line]
    steps = [record['step'] for record in records.read_jsonl(folder / 'metrics.jsonl')]
    assert len(said) <= 1 and (not said or str(path) in said[0]), f'seed {seed}: {kind} {path}: {said}'
    assert steps[-1] == 6 and (len(steps) == 5 or path.name == 'metrics.jsonl'), f'seed {seed}: {kind} {path}: {steps}'


def test_bad_lines_are_kept_in_another_file(tmp_path, capsys):
  test_metrics.run(tmp_path, 0, 6)
  path = tmp_path / 'metrics.jsonl'
  lines = path.read_bytes().split(b'\n')
  bad = [b'{"step": "4"', b'\xff\xfe', b'[1]', b'{"step": 1, "split": 3}', b'{"step": 2, "split": "train", "loss": "x"}']
  path.write_bytes(b'\n'.join([lines[0], *bad, *lines[1:]]))
  test_metrics.run(tmp_path, 6, 8)
  assert f'{path} holds what is no record in line 2, 3, 4, 5, 6: set aside as metrics.jsonl.damaged' in capsys.readouterr().err
  assert [step for step, _, _ in test_metrics.losses(tmp_path)] == [1, 2, 4, 6, 8]
  assert bad[1] in (tmp_path / 'metrics.jsonl.damaged').read_bytes()


def test_a_disk_that_fills_up_while_metrics_are_written(tmp_path, monkeypatch):
  with metrics.Writers(tmp_path, test_metrics.config(), start_step=0, total_steps=4) as writers:
    file = types.SimpleNamespace(write=lambda text: None, flush=lambda: os.write(os.open('/dev/full', os.O_WRONLY), b'x'),
                                 close=lambda: None)
    monkeypatch.setattr(writers, '_jsonl', file)
    with pytest.raises(CheckpointError, match=r'metrics.jsonl cannot be written: No space left on device. Make room and start'):
      writers.step(1, test_metrics.values(1))


def test_files_of_tensorboard_sort_after_older_ones_whatever_the_clock_says(tmp_path, monkeypatch):
  for now in (3e18, 2e18, 1e18):
    monkeypatch.setattr(records.time, 'time_ns', lambda now=now: int(now))
    records.EventFile(tmp_path).close()
  names = sorted(path.name for path in tmp_path.iterdir())
  assert [name.split('.')[3] for name in names] == [f'{3 * 10**15 + n:017d}' for n in range(3)]


def late(norm, size=4, **values):
  """LateMetrics of a state of one tensor, after a step that reports this norm; the notes; a function that reports it."""
  notes = []
  writers = types.SimpleNamespace(step=lambda number, values, finished: None, note=notes.append)
  state = {'params': {'w': np.zeros(size)}}
  step = types.SimpleNamespace(explain=lambda *_: 'loss', abstract_state=state)
  reporter = metrics.LateMetrics(step, {}, writers, lambda: 'There is no checkpoint yet.')

  def report():
    given = {'halted': False, 'loss': 1.0, 'gradient_norm': 1.0, 'parameter_norm': norm} | values
    reporter.add(7, {name: np.asarray(value) for name, value in given.items()}, {})
    reporter.report(state)

  return report, notes


def test_a_run_that_diverges_is_told():
  report, notes = late(20.0)
  report()
  assert not notes
  report, notes = late(1e5)
  report()
  report()
  assert len(notes) == 1 and 'seems to have diverged. There is no checkpoint yet.' in notes[0]
  report, notes = late(3e16)
  with pytest.raises(FloatingPointError, match=r'step 7: the run has diverged: .* norm of 3e\+16'):
    report()
  report, notes = late(1.0, halted=True)
  with pytest.raises(FloatingPointError, match='There is no checkpoint yet'):
    report()


def test_the_tensor_whose_square_overflows_is_named():
  params = {'a': jnp.ones((3, 4)), 'b': jnp.full((5,), 3e19), 'c': jnp.int32(3)}
  assert stability.overflowing_tensor(params).startswith('b (finite, but its norm of 6.7e+19')
  assert stability.overflowing_tensor({'a': jnp.zeros((3,)), 'b': jnp.full((5,), 1e15)}) is None
