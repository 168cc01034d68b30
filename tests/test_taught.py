"""What a teacher says, in files: the format there and back, cached against online, what is refused."""

import dataclasses

import numpy as np
import pytest
import test_teacher
from test_teacher import records, student, teacher_dir  # noqa: F401

from t5x_cpm import stored
from t5x_cpm.checkpoints import run_directory
from t5x_cpm.config import ConfigError
from t5x_cpm.data import distributions, reader, taught
from t5x_cpm.tasks import caches
from t5x_cpm.training import teacher_cache, teachers, train


def test_fifty_tokens_of_the_bilingual_vocabulary_take_114_bytes():
  assert distributions.record_bytes(50, 51968) == 114
  assert distributions.record_bytes(10, 51968) < 30


@pytest.mark.parametrize('seed', range(4))
def test_distributions_there_and_back(seed):
  rng = np.random.default_rng(seed)
  for _ in range(12):
    V = int(rng.choice([2, 3, 17, 256, 3200, 51968, 250112]))
    K, N = int(rng.integers(1, min(V, 65))), int(rng.integers(0, 40))
    print(f'seed {seed} K {K} V {V} N {N}')
    ids = np.argsort(rng.random((N, V)), axis=1)[:, :K] if V < 4000 else np.stack(
        [rng.choice(V, K, replace=False) for _ in range(N)]).reshape(N, K) if N else np.zeros((0, K), int)
    logits = rng.normal(0, rng.choice([0.1, 2.0, 8.0]), (N, K))
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs *= rng.choice([1.0, 1 - 1e-5, 0.7, 0.01], (N, 1)) / probs.sum(axis=1, keepdims=True)
    packed = distributions.pack(ids, np.float32(probs), V)
    assert packed.shape == (N, distributions.record_bytes(K, V)) and packed.dtype == np.uint8
    again, found = distributions.unpack(packed, K, V)
    order = np.argsort(ids, axis=1)
    np.testing.assert_array_equal(again, np.take_along_axis(ids, order, axis=1))
    if not N:
      continue
    np.testing.assert_allclose(distributions.unpack(distributions.pack(again, found, V), K, V)[1], found, atol=1e-5)
    probs = np.take_along_axis(probs, order, axis=1)
    below, got = (np.log(x.max(axis=1, keepdims=True)) - np.log(np.maximum(x, 1e-30)) for x in (probs, np.float64(found)))
    inside = below < distributions.RATIO_RANGE
    assert (abs(below - got)[inside] <= np.sqrt(16 * below[inside]) / 63 + 0.002).all()
    assert (got[~inside] > 15.9).all()
    np.testing.assert_allclose(found.sum(axis=1), probs.sum(axis=1), atol=0.005)


def cached(teacher_dir, folder, **fields):  # noqa: F811
  return student(teacher_dir, cache=str(folder), **fields)


def opened(config):
  """What is read of a folder, beside the batches that it is about."""
  return teachers.batches(config, reader.open_reader(caches.build(config), config, 'train'), teachers.find(config, ''))


@pytest.fixture(scope='module')
def folders(teacher_dir, tmp_path_factory):  # noqa: F811
  """By top_k, a folder with what the teacher says of four steps."""
  path = tmp_path_factory.mktemp('taught')
  for top_k in (0, 10):
    teacher_cache.make(cached(teacher_dir, path / str(top_k), top_k=top_k))
  return path


def test_what_is_cached_is_what_the_teacher_says(teacher_dir, folders):  # noqa: F811
  config = cached(teacher_dir, folders / '10', top_k=10)
  speaker, batches = teacher_cache._Speaker(config, *teachers.of_runs(config)), opened(config)
  batch = batches.batch(2, np.arange(4))
  said = speaker({name: leaf for name, leaf in batch.items() if not name.startswith('teacher')})
  counted = batch['decoder_loss_weights'] != 0
  order = np.argsort(said['teacher_ids'], axis=-1)
  ids, probs = (np.take_along_axis(said[name], order, axis=-1)[counted] for name in ('teacher_ids', 'teacher_probs'))
  np.testing.assert_array_equal(batch['teacher_ids'][counted], ids)
  np.testing.assert_allclose(batch['teacher_probs'][counted], probs, atol=0.02)
  assert 0 < counted.sum() < counted.size and not batch['teacher_probs'][~counted].any()
  some = batches.batch(2, np.array([1, 3]))  # as another process reads them
  np.testing.assert_array_equal(some['teacher_probs'], batch['teacher_probs'][[1, 3]])
  assert 'teacher_ids' not in batches.batch(4, np.arange(4))


def test_a_folder_goes_on_where_it_was_left_and_grows(teacher_dir, tmp_path, monkeypatch):  # noqa: F811
  monkeypatch.setattr(taught, 'FILE_BYTES', 2 * 4 * 16 * distributions.record_bytes(3, 700))  # about two steps
  config, made = cached(teacher_dir, tmp_path / 'a', top_k=3), []
  write = taught.Taught.write

  def killed(self, number, *arguments):
    made.append(number)
    if len(made) == 2:
      raise KeyboardInterrupt
    write(self, number, *arguments)

  monkeypatch.setattr(taught.Taught, 'write', killed)
  with pytest.raises(KeyboardInterrupt):
    teacher_cache.make(config)
  with pytest.raises(ConfigError, match='has nothing for step 4, and a teacher guides this run up to step 4'):
    opened(config)
  teacher_cache.make(config)
  assert made[:2] == [0, 1] and made[2] == 1 and 0 not in made[2:]
  before = opened(config).batch(1, np.arange(4))
  longer = cached(teacher_dir, tmp_path / 'a', top_k=3, guided=6)
  teacher_cache.make(longer)
  assert 'teacher_ids' in opened(longer).batch(5, np.arange(4))
  np.testing.assert_array_equal(opened(longer).batch(1, np.arange(4))['teacher_ids'], before['teacher_ids'])


def test_a_cache_of_other_rows_is_refused_in_a_line(teacher_dir, folders, tmp_path, monkeypatch):  # noqa: F811
  config = cached(teacher_dir, folders / '10', top_k=10)
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'x').write_text('x')
  seed = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=1))
  size = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=8))
  for use, message in [
      (lambda: opened(seed), 'other rows: rows.seed is 0 there, 1 here. Give another folder'),
      (lambda: opened(size), 'rows.batch_size is 4 there, 8 here'),
      (lambda: opened(cached(teacher_dir, folders / '10', top_k=9)), 'top_k is 10 there, 9 here'),
      (lambda: opened(cached(teacher_dir, folders / '10', top_k=10, temperature=1.0)), 'temperature is 2.0 there, 1.0 here'),
      (lambda: teacher_cache.make(seed), 'rows.seed is 0 there, 1 here'),
      (lambda: opened(cached(teacher_dir, folders / '10', top_k=10, guided=6)), 'has nothing for step 6'),
      (lambda: opened(cached(teacher_dir, tmp_path / 'no')), 'holds nothing of a teacher'),
      (lambda: teacher_cache.make(cached(teacher_dir, tmp_path / 'full')), 'is not empty, and not made by'),
      (lambda: teacher_cache.make(student(teacher_dir)), 'needs --teacher_cache=DIR'),
      (lambda: teacher_cache.make(cached(teacher_dir, tmp_path / 'n', alpha=0.0)), 'there is nothing to write')]:
    with pytest.raises(ConfigError, match=message) as error:
      use()
    assert '\n' not in str(error.value), error.value
  monkeypatch.setattr(teacher_cache.shutil, 'disk_usage', lambda path: type('Usage', (), {'free': 100}))
  with pytest.raises(ConfigError, match=r'needs room for 4 steps, about \d+ targets of .* bytes: .* Make room'):
    teacher_cache.make(cached(teacher_dir, tmp_path / 'small'))
  other = run_directory.resolve(tmp_path) / 'other'
  test_teacher.shutil.copytree(teacher_dir, other)
  test_teacher.shutil.rmtree(other / 'checkpoints' / '5')
  with pytest.raises(ConfigError, match='teacher is .* there, .* here'):
    opened(cached(teacher_dir, folders / '10', top_k=10, model_dir=str(other)))
  file = folders / '10' / '000000.said'
  content = file.read_bytes()
  try:
    for damaged in (content[:-100], content[:200] + bytes([content[200] ^ 1]) + content[201:]):
      file.write_bytes(damaged)
      with pytest.raises(stored.DamagedError, match='digest'):
        opened(config).batch(0, np.arange(4))
  finally:
    file.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize('top_k', [0, 10])
def test_a_run_from_a_cache_is_the_run_with_its_teacher(teacher_dir, folders, tmp_path, top_k):  # noqa: F811
  online, said = student(teacher_dir, top_k=top_k), cached(teacher_dir, folders / str(top_k), top_k=top_k, model_dir='')
  train.run(online, str(tmp_path / 'online'))
  train.run(dataclasses.replace(said, train=dataclasses.replace(said.train, steps=3)), str(tmp_path / 'cached'))
  with pytest.raises(ConfigError, match='teacher.cached: true in the checkpoint, false now'):
    train.run(online, str(tmp_path / 'cached'))
  train.run(said, str(tmp_path / 'cached'))
  for a, b in zip(records(tmp_path / 'online'), records(tmp_path / 'cached'), strict=True):
    assert a.keys() == b.keys()
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=0.02 if top_k else 1e-6, atol=1e-6)
