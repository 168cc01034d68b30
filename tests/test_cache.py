"""Building caches: the same whatever the number of processes, after a kill, after a change of the source."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import small_data

from t5x_cpm import files, tasks
from t5x_cpm.config import ConfigError, LocalTaskConfig
from t5x_cpm.data import cache
from t5x_cpm.data.cache import DataError
from t5x_cpm.tasks import cache_units, caches

CHARS = [chr(c) for c in range(0x4E00, 0x5200)]


def write_texts(path, rng, number, longest=80):
  texts = [''.join(rng.choice(CHARS, n)) for n in rng.integers(1, longest, number)]
  path.write_text('\n'.join(texts) + '\n', encoding='utf-8')
  return texts


def make_config(folder, files, *, processes=1, objective='isolated', **local):
  config = small_data.make_config(folder, name='local', cache_processes=processes, objective=objective, batch_size=4)
  return dataclasses.replace(config, local_task=LocalTaskConfig(files=files, **local))


def documents(path, split, feature='targets'):
  opened = cache.Cache(path)
  ends = np.cumsum(opened.lengths(split, feature))
  return [part.tolist() for part in np.split(opened.tokens(split, feature), ends)[:-1]]


def test_a_cache_holds_the_tokens_of_every_document(tmp_path, capfd):
  rng = np.random.default_rng(0)
  texts = write_texts(tmp_path / 'a.txt', rng, 400)
  config = make_config(tmp_path, str(tmp_path / '*.txt').replace('*', 'a'), validation_fraction=0.2)
  path = caches.build(config)
  assert 'documents, ' in capfd.readouterr().err
  opened = cache.Cache(path)
  vocabulary = opened.vocabulary()
  found = {split: documents(path, split) for split in ('train', 'validation')}
  assert sorted(found['train'] + found['validation']) == sorted(vocabulary.encode(text) for text in texts)
  assert 40 < len(found['validation']) < 120
  assert opened.info['splits']['train']['tokens']['targets'] == sum(map(len, found['train']))
  assert not list(path.glob('*-of-*')) and not (path / 'plan.json').exists()
  before = (path / 'cache.json').stat().st_mtime_ns
  assert caches.build(config) == path and (path / 'cache.json').stat().st_mtime_ns == before


def test_pairs_and_skipped_lines(tmp_path):
  lines = [json.dumps({'inputs': '天' * i, 'targets': '地' * (i % 3)}, ensure_ascii=False) for i in range(1, 31)]
  (tmp_path / 'a.jsonl').write_text('\n'.join([*lines, '{broken']), encoding='utf-8')
  config = make_config(tmp_path, str(tmp_path / 'a.jsonl'), objective='pairs', validation_fraction=0.0)
  with pytest.raises(DataError, match='a.jsonl:31: malformed JSON'):
    caches.build(config)
  config = dataclasses.replace(config, local_task=dataclasses.replace(config.local_task, skip_malformed=True))
  path = caches.build(config, progress=False)
  vocabulary = cache.Cache(path).vocabulary()
  kept = [i for i in range(1, 31) if i % 3]
  assert documents(path, 'train', 'inputs') == [vocabulary.encode('天' * i) for i in kept]
  assert documents(path, 'train') == [vocabulary.encode('地' * (i % 3)) for i in kept]
  assert cache.Cache(path).info['splits']['train']['skipped'] == {'malformed': 1, 'empty': 10}
  read = small_data.open_reader(config, 'train')
  assert read.statistics()['pieces'] == 20 and read.vocabulary.fingerprint == vocabulary.fingerprint


def test_a_mixture_of_files_keeps_a_cache_for_each(tmp_path):
  rng = np.random.default_rng(0)
  for name in ('zh', 'en'):
    write_texts(tmp_path / f'{name}.txt', rng, 60)
  files = {name: str(tmp_path / f'{name}.txt') for name in ('zh', 'en')}
  config = make_config(tmp_path, files, rates={'zh': 2.0, 'en': 1.0})
  path = caches.build(config, progress=False)
  parts = cache.components(path)
  assert {part.name: rate for rate, part in parts} == {'local:zh': 2.0, 'local:en': 1.0}
  shares = small_data.open_reader(config, 'train').statistics()['tasks']
  assert shares['local:zh']['share_of_rows'] == pytest.approx(2 / 3)


def test_a_changed_source_is_read_again(tmp_path, capfd):
  rng = np.random.default_rng(0)
  write_texts(tmp_path / 'a.txt', rng, 20)
  config = make_config(tmp_path, str(tmp_path / '[ab].txt'), validation_fraction=0.0)
  first = cache.Cache(caches.build(config, progress=False)).info['checksum']
  write_texts(tmp_path / 'b.txt', rng, 20)
  second = cache.Cache(caches.build(config, progress=False)).info
  assert 'b.txt is new' in capfd.readouterr().err
  assert second['checksum'] != first and second['splits']['train']['documents'] == 40
  (tmp_path / 'b.txt').unlink()
  third = cache.Cache(caches.build(config, progress=False)).info
  assert 'b.txt is gone' in capfd.readouterr().err
  assert third['checksum'] == first  # of the content, not of times
  (tmp_path / 'a.txt').unlink()
  assert caches.is_ready(caches.directory(config))  # a cache may outlive its sources
  file = tmp_path / 'vocab.txt'
  file.write_text(file.read_text(encoding='utf-8').replace('!', '\u00e9', 1), encoding='utf-8')
  assert caches.stale(caches.directory(config)) == f'{file} changed'


def test_a_cache_of_another_format_is_made_again(tmp_path, capfd):
  write_texts(tmp_path / 'a.txt', np.random.default_rng(0), 20)
  config = make_config(tmp_path, str(tmp_path / 'a.txt'))
  path = caches.build(config, progress=False)
  files.write_json(path / 'cache.json', {'format': 0})
  caches.build(config, progress=False)
  assert 'it has format 0, expected 1' in capfd.readouterr().err
  assert caches.is_ready(path)


def test_the_source_may_change_while_a_build_is_unfinished(tmp_path, capfd):
  rng = np.random.default_rng(0)
  write_texts(tmp_path / 'a.txt', rng, 20)
  config = make_config(tmp_path, str(tmp_path / 'a.txt'), validation_fraction=0.0)
  path = caches.build(config, progress=False)
  files.write_json(path / 'plan.json', {'units': ['train-00000-of-00001'], 'source': {}, 'vocabulary': ''})
  (path / 'cache.json').unlink()
  texts = write_texts(tmp_path / 'a.txt', rng, 30)
  caches.build(config, progress=False)
  assert 'its sources changed while it was unfinished' in capfd.readouterr().err
  assert len(documents(path, 'train')) == len(texts)


def test_a_folder_that_cannot_be_written(tmp_path):
  write_texts(tmp_path / 'a.txt', np.random.default_rng(0), 5)
  config = make_config(tmp_path, str(tmp_path / 'a.txt'))
  blocked = tmp_path / 'file'
  blocked.write_text('')
  config = dataclasses.replace(config, task=dataclasses.replace(config.task, cache_dir=str(blocked / 'sub')))
  with pytest.raises(ConfigError, match='cannot be written.*TaskConfig.cache_dir'):
    caches.build(config)


def test_the_seqio_task_gives_the_same_tokens(tmp_path):
  """The cache reads files without TensorFlow; evaluation reads the SeqIO task. An error keeps its file and line there too."""
  from t5x_cpm import tasks
  rng = np.random.default_rng(0)
  texts = write_texts(tmp_path / 'a.txt', rng, 300)
  config = make_config(tmp_path, str(tmp_path / 'a.txt'), validation_fraction=0.2)
  path = caches.build(config, progress=False)
  task = tasks.get(config)
  from t5x_cpm.tasks import sources
  for split in ('train', 'validation'):
    examples = list(task.get_dataset(None, split, shuffle=False).as_numpy_iterator())
    assert [example['targets'].tolist() for example in examples] == documents(path, split)
    assert all(example['targets_pretokenized'].decode() in texts for example in examples)
  (tmp_path / 'a.txt').write_bytes(b'good\nb\xe4d\n')
  with pytest.raises(DataError, match='a.txt:2: byte 2'), sources.errors():
    list(tasks.get(config).get_dataset(None, 'train', shuffle=False))


def test_a_task_that_somebody_else_registered(tmp_path):
  """A SeqIO task with its own vocabulary and end of sequence; the latter is left to the objective."""
  import seqio
  import tensorflow as tf

  from t5x_cpm import vocabularies
  from t5x_cpm.tasks import seqio_vocabulary
  config = small_data.make_config(tmp_path, name='somebody_elses', encoder_length=32, decoder_length=16)
  vocabulary = vocabularies.load(config.task.vocabulary)

  def numbers(split, shuffle_files):
    return tf.data.Dataset.range(50).map(lambda i: {'targets': tf.fill([i % 5 + 1], tf.cast(i, tf.int32) + 20)})

  source = seqio.FunctionDataSource(numbers, splits=['train'])
  features = {'targets': seqio.Feature(seqio_vocabulary.SeqioVocabulary(vocabulary), add_eos=True)}
  seqio.TaskRegistry.add('somebody_elses', source=source, output_features=features,
                         preprocessors=[seqio.preprocessors.append_eos])
  try:
    for spec in (config.task.vocabulary, ''):
      chosen = dataclasses.replace(config, task=dataclasses.replace(config.task, vocabulary=spec))
      path = caches.build(chosen, progress=False)
      assert documents(path, 'train') == [[i + 20] * (i % 5 + 1) for i in range(50)]
    other = tmp_path / 'other'
    other.mkdir()
    file = small_data.vocabulary_file(other)
    file.write_text(file.read_text(encoding='utf-8').replace('!', '\u00e9', 1), encoding='utf-8')
    wrong = dataclasses.replace(config, task=dataclasses.replace(config.task, vocabulary=f'cpm2:{file}'))
    with pytest.raises(ConfigError, match="but task 'somebody_elses' makes its ids with"):
      caches.build(wrong)
  finally:
    seqio.TaskRegistry.remove('somebody_elses')


@pytest.fixture(scope='module')
def large(tmp_path_factory):
  """A source of several shards, and its cache made in one process."""
  folder = tmp_path_factory.mktemp('large')
  rng = np.random.default_rng(1)
  for name in 'abc':
    write_texts(folder / f'{name}.txt', rng, 1000)
  (folder / 'one').mkdir()
  return folder, cache.Cache(caches.build(make_large(folder, 'one'), progress=False)).info


def make_large(folder, name, processes=1):
  config = make_config(folder, str(folder / '?.txt'), processes=processes, validation_fraction=0.1)
  return dataclasses.replace(config, task=dataclasses.replace(config.task, cache_dir=str(folder / name)))


def test_many_processes_make_the_same_cache(large):
  folder, expected = large
  (folder / 'two').mkdir()
  info = cache.Cache(caches.build(make_large(folder, 'two', processes=2), progress=False)).info
  assert info == expected
  for name in ('train.targets.tokens', 'validation.targets.lengths'):
    files = [next((folder / run).glob('local-*/' + name)) for run in ('one', 'two')]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_error_in_a_worker_arrives(large):
  folder, _ = large
  (folder / 'bad').mkdir()
  for name in 'abc':
    (folder / 'bad' / f'{name}.txt').write_bytes(b'fine\n\xff\n')
  config = make_config(folder, str(folder / 'bad' / '?.txt'), processes=2)
  with pytest.raises(DataError, match=r'[abc].txt:2: byte 1 of the line \(0xff\) is not valid UTF-8'):
    caches.build(config, progress=False)


# In a worker only, whatever a user's module does when its documents are read.
BROKEN = """
import sys
from t5x_cpm import files, tasks
if 'pytest' not in sys.modules:
  tasks.tokens = lambda config: {}['no such field']
"""


def test_an_exception_of_a_users_module_arrives_with_its_traceback(large, tmp_path, monkeypatch):
  folder, _ = large
  (folder / 'broken').mkdir()
  (tmp_path / 'my_broken_task.py').write_text(BROKEN)
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.setattr(tasks, '_modules', {'my_broken_task': ''})
  with pytest.raises(RuntimeError, match=r"(?s)my_broken_task.py.*KeyError: 'no such field'"):
    caches.build(make_large(folder, 'broken', processes=2), progress=False)


BUILD = """
import json, sys
from t5x_cpm import config
from t5x_cpm.tasks import caches
caches.build(config.from_dict(json.loads(sys.argv[1])))
"""


def test_a_killed_build_goes_on_with_the_shards_that_are_missing(large):
  """kill -9 as soon as the first shards are there; the second build keeps them and gives the same cache."""
  folder, expected = large
  (folder / 'killed').mkdir()
  config = make_large(folder, 'killed')
  path = caches.directory(config)
  from t5x_cpm import config as config_lib
  root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  process = subprocess.Popen([sys.executable, '-c', BUILD, json.dumps(config_lib.to_dict(config))], stderr=subprocess.DEVNULL,
                             env={**os.environ, 'PYTHONPATH': root})
  try:
    deadline = time.monotonic() + 60
    while not list(path.glob('train-*.json')):
      assert process.poll() is None and time.monotonic() < deadline, 'the build ended before it could be killed'
      time.sleep(0.001)
  finally:
    process.send_signal(signal.SIGKILL)
    process.wait()
  assert not (path / 'cache.json').exists() and not caches.is_ready(path)
  kept = {file: file.stat().st_mtime_ns for file in path.glob('*-of-*.json')}
  made = []
  original = cache_units.write

  def remember(source, unit, *rest):
    made.append(unit.name)
    assert all(file.stat().st_mtime_ns == when for file, when in kept.items())
    return original(source, unit, *rest)

  cache_units.write = remember
  try:
    info = cache.Cache(caches.build(config, progress=False)).info
  finally:
    cache_units.write = original
  assert info == expected
  assert not {file.stem for file in kept} & set(made) and len(kept) + len(made) == 6


TFDS = """
import sys
import tensorflow as tf, tensorflow_datasets as tfds
import small_data
from t5x_cpm.config import ConfigError
from t5x_cpm.data import cache
from t5x_cpm.tasks import caches
texts = [f'text {i}' for i in range(200)]
features = tfds.features.FeaturesDict({'text': tfds.features.Text(), 'id': tf.int64})
splits = {'train': texts[:150], 'zh': texts[150:], 'zh-validation': texts[:7]}
tfds.dataset_builders.store_as_tfds_dataset(
    name='small_text', version='1.0.0', features=features, data_dir=sys.argv[1],
    split_datasets={k: tf.data.Dataset.from_tensor_slices({'text': v, 'id': list(range(len(v)))}) for k, v in splits.items()})
for name, expected in (('tfds:small_text', (148, 2)), ('tfds:small_text@zh', (50, 7))):
  config = small_data.make_config(sys.argv[1], name=name, cache_processes=1)
  info = cache.Cache(caches.build(config)).info['splits']
  assert (info['train']['documents'], info['validation']['documents']) == expected, info
for name, complaint in (('tfds:small_text@xx', "splits ['train', 'zh', 'zh-validation']; name one of them"),
                        ('tfds:nonsense', "TFDS has no builder 'nonsense'"), ('wiki_zh', 'Make it with `tfds build wiki40b')):
  try:
    caches.build(small_data.make_config(sys.argv[1], name=name))
    raise SystemExit(f'{name} was not refused')
  except ConfigError as error:
    assert complaint in str(error), error
"""


@pytest.mark.slow
def test_text_of_a_tfds_builder(tmp_path):
  """In a process of its own, since TFDS reads where its data is when it is imported."""
  pytest.importorskip('importlib_resources', reason='tensorflow-datasets needs it to write a data set')
  root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  done = subprocess.run([sys.executable, '-c', TFDS, str(tmp_path)], capture_output=True, text=True, env={
      **os.environ, 'TFDS_DATA_DIR': str(tmp_path), 'PYTHONPATH': os.pathsep.join([root, os.path.join(root, 'tests'),
                                                                                      os.environ.get('PYTHONPATH', '')])})
  assert done.returncode == 0, done.stderr[-3000:]
