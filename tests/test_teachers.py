"""Tasks of a mixture with teachers of their own: a row learns from the teacher of its task, or from none if there is none."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_data
import small_run
import test_step
import test_teacher

from t5x_cpm import vocabularies
from t5x_cpm.checkpoints import run_directory
from t5x_cpm.checkpoints.manager import Manager
from t5x_cpm.cli import configure
from t5x_cpm.compile import plan
from t5x_cpm.config import Config, ConfigError, LocalTaskConfig, MoEConfig, TaskConfig, TeacherConfig
from t5x_cpm.data import reader, taught
from t5x_cpm.models import encoder_decoder
from t5x_cpm.tasks import caches
from t5x_cpm.training import before, guidance, losses, teacher_cache, teachers, train

DENSE = test_teacher.SMALL
WHO = np.array([1, 0, -1, 1, 0, 1, -1, 0], np.int32)


class Bigrams:
  """A teacher in a table: logits [B, T, V] by the decoder's input token alone."""

  def apply(self, params, batch, train):
    assert not train
    return (params[batch['decoder_input_tokens']],)


@pytest.mark.parametrize('top_k', [0, 5])
def test_the_loss_is_the_sum_over_rows_each_with_its_own_teacher(top_k):
  config = test_teacher.with_teacher(top_k=top_k, temperature=1.5)
  plain, share, z_loss, rng = test_step.random_batch(config, 3), 0.3, 0.01, np.random.default_rng(0)
  tables = {name: jnp.float32(rng.standard_normal((96, 96))) for name in 'ab'}
  logits = jnp.float32(rng.standard_normal((8, 8, 96)))

  def of(logits, batch):
    own, pairs = losses.cross_entropy(logits, batch['decoder_target_tokens'], batch['decoder_loss_weights'], z_loss)
    if batch.keys() == plain.keys():
      return own, pairs
    total, more = guidance.loss(config.teacher, own, logits, batch, jnp.float32(share), z_loss)
    return total, pairs | more

  differentiate = jax.jit(jax.value_and_grad(of, has_aux=True))
  batch = plain | {'teacher': WHO}
  batch |= guidance.of_teachers(config.teacher, dict.fromkeys(tables, Bigrams()), tables, batch)
  (found, pairs), gradient = differentiate(logits, batch)
  total = kl = weight = 0.0
  for row, number in enumerate(WHO):  # the others do not count
    one = plain | {'decoder_loss_weights': plain['decoder_loss_weights'] * (np.arange(8) == row)[:, None]}
    if number >= 0:
      one |= guidance.of_teachers(config.teacher, Bigrams(), tables['ab'[number]], one)
    (value, of_row), its_gradient = differentiate(logits, one)
    np.testing.assert_allclose(gradient[row], its_gradient[row], atol=1e-5)
    total += value
    if number >= 0:
      kl, weight = kl + of_row['teacher_kl'][0], weight + of_row['teacher_kl'][1]
  np.testing.assert_allclose(found, total, rtol=1e-5)
  np.testing.assert_allclose(pairs['teacher_kl'], (kl, weight), rtol=1e-5)
  assert 0 < weight < pairs['loss'][1]

  (found, pairs), gradient = differentiate(logits, batch | {'teacher': np.full_like(WHO, -1)})
  (value, _), its_gradient = differentiate(logits, plain)
  np.testing.assert_allclose(found, value, rtol=1e-6)
  np.testing.assert_allclose(gradient, its_gradient, atol=1e-6)
  assert pairs['teacher_kl'][0] == 0 < pairs['teacher_kl'][1]  # their mean is a number


def model_dir(folder, vocabulary, steps, **fields):
  """The run of a random model."""
  path = folder / 'model'
  model = dataclasses.replace(DENSE, vocab_size=vocabulary.size + 4, **fields)
  config = Config(model=model, task=TaskConfig(vocabulary=vocabulary.spec, encoder_length=32, decoder_length=16))
  with Manager(path, config, info={'vocabulary': vocabulary.fingerprint}) as manager:
    for step in steps:
      rng = np.random.default_rng(step)
      params = jax.tree.map(lambda leaf, rng=rng: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype),
                            encoder_decoder.build(model).leaves())
      manager.save(step, {'step': jnp.int32(step), 'params': params})
  vocabulary.save(path / 'vocabulary')
  return path


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """The runs of two teachers, of different models, and the files of three tasks."""
  folder = tmp_path_factory.mktemp('teachers')
  for name, first in (('a', 0x4E00), ('b', 0x4E40), ('c', 0x4E80)):
    lines = [chr(first + 7 * i % 400) * 3 + chr(first + i % 400) * 9 for i in range(120)]
    (folder / f'{name}.txt').write_text('\n'.join(lines))
    (folder / name).mkdir()
  vocabulary = vocabularies.load(f'cpm2:{small_data.vocabulary_file(folder)}')
  return {'a': model_dir(folder / 'a', vocabulary, (3, 5)),
          'b': model_dir(folder / 'b', vocabulary, (3,), d_model=12, moe=MoEConfig(
              num_experts=4, group_size=16, encoder_every=0, decoder_every=1))}


def student(runs, given=None, steps=4, **fields) -> Config:
  """A run on a mixture of three tasks, of which two have teachers."""
  folder = runs['a'].parent.parent
  plain = test_teacher.student(runs['a'], steps=steps)
  plain = dataclasses.replace(
      plain, task=dataclasses.replace(plain.task, cache_dir=str(folder)),
      local_task=LocalTaskConfig(files={name: f'{folder}/{name}.txt' for name in 'abc'}, validation_fraction=0.1))
  given = {f'local:{name}': str(run) for name, run in runs.items()} if given is None else given
  return dataclasses.replace(plain, teacher=TeacherConfig(**{'model_dir': given, 'steps': 3} | fields))


def read(config: Config, found) -> taught.WithTeacher:
  """The batches of a run."""
  return teachers.batches(config, reader.open_reader(caches.build(config, progress=False), config, 'train'), found)


def test_what_is_cached_is_what_the_teacher_of_each_row_says(runs, tmp_path, monkeypatch):
  speakers = []

  class Speaker(teacher_cache._Speaker):

    def __init__(self, *arguments):
      super().__init__(*arguments)
      speakers.append(self)

  monkeypatch.setattr(teacher_cache, '_Speaker', Speaker)
  config = student(runs, top_k=5, cache=str(tmp_path / 'said'))
  online = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, cache=''))
  teacher_cache.make(config)
  only = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, model_dir=''))
  (found,) = teachers.find(only, '')
  assert found.model == 'cached by task' and found.fingerprint == teachers.weights(teachers.of_runs(config))
  rows = np.arange(4)
  whose = set()
  for step in range(3):
    batch, other = read(only, [found]).batch(step, rows), read(online, teachers.find(online, '')).batch(step, rows)
    np.testing.assert_array_equal(batch['teacher'] >= 0, other['teacher'] >= 0)
    for row, number in enumerate(other['teacher']):
      whose.add(int(number))
      counted = batch['decoder_loss_weights'][row] != 0
      if number < 0:
        assert counted.any() and not batch['teacher_probs'][row].any()
        continue
      said = {name: value[row] for name, value in speakers[number](other).items()}
      order = np.argsort(said['teacher_ids'], axis=-1)
      ids, probs = (np.take_along_axis(said[name], order, axis=-1) for name in ('teacher_ids', 'teacher_probs'))
      np.testing.assert_array_equal(batch['teacher_ids'][row][counted], ids[counted])
      np.testing.assert_allclose(batch['teacher_probs'][row][counted], probs[counted], atol=0.02)
  assert whose == {-1, 0, 1}
  assert 'teacher' not in read(online, teachers.find(online, '')).batch(3, rows)  # no teacher guides it
  for given, message in [
      (student(runs, str(runs['a']), top_k=5, cache=config.teacher.cache), 'teacher is {.* there, .* here'),
      (student(runs, {'local:a': str(runs['a'])}, top_k=5, cache=config.teacher.cache), r'teacher.local:b is \w+ there, None')]:
    with pytest.raises(ConfigError, match=message) as error:
      read(given, teachers.find(given, ''))
    assert '\n' not in str(error.value)


def test_each_run_is_one_teacher_and_a_run_goes_on_with_those_it_began_with(runs, monkeypatch, tmp_path):
  a, b = map(str, runs.values())
  config = student(runs, {'local:a': a, 'local:b': b, 'local:c': a})
  found = teachers.of_runs(config)
  assert [one.tasks for one in found] == [('local:a', 'local:c'), ('local:b',)]
  assert teachers.numbers(found) == {'local:a': 0, 'local:c': 0, 'local:b': 1}
  models = teachers.model_of(config)
  assert models == {'local:a, local:c': found[0].model, 'local:b': found[1].model} == teachers.guide(found)
  assert plan._of_teacher(config, models) == sum(plan._of_teacher(config, one) for one in models.values())
  said = []
  steps = teachers.Steps(config, test_step.mesh_lib.make_mesh(test_step.ONE_DEVICE, jax.devices()[:1]), models)
  steps.load({}, found)
  teachers.tell(found, config, steps, said.append)
  assert [' is the teacher of local:a, local:c up to step 3: ' in said[0], ' of local:b up' in said[1]] == [True] * 2
  assert {'local:a, local:c', 'local:b'} == set(steps.at(3)[1]['teacher']) and steps.at(4)[1] == {}

  old = teachers.tuning.fingerprint(runs['a'], 3)
  known = teachers.weights(found)
  for began, expected in (({}, [5, 3]), ({'local:a': old, 'local:c': old}, [3, 3]), ({'local:a': old}, [3, 5, 3])):
    monkeypatch.setattr(before, 'known_teacher', lambda model_dir, began=began: {'weights': known | began})
    again = teachers.find(config, '')
    assert [one.step for one in again] == expected and teachers.weights(again) == known | began
  for began, message in (
      (known | {'local:b': 'x'}, r'--teacher=.*: the run began with a teacher whose weights have the fingerprint x'),
      ('x', 'began with teachers of all rows, and now there are teachers of local:a and local:b and local:c'),
      ({'local:a': old}, 'began with teachers of local:a, and now')):
    monkeypatch.setattr(before, 'known_teacher', lambda model_dir, began=began: {'weights': began})
    with pytest.raises(ConfigError, match=message) as error:
      teachers.find(config, '')
    assert '\n' not in str(error.value)


def test_bad_input_is_refused_in_a_line(runs, tmp_path):
  a = str(runs['a'])
  before.check(student(runs))
  file = runs['a'].parent.parent / 'a.txt'
  single = dataclasses.replace(student(runs, {'local': a}), local_task=LocalTaskConfig(files=str(file)))
  for given, message in [
      (student(runs, {'local:a': a, 'zh': a}), "--teacher=zh=.*'local' has no task zh; its tasks are local:a, local:b"),
      (single, "--teacher=local=.* is for a task of a mixture, and TaskConfig.name = 'local' is a single task: give"),
      (student(runs, {'local:a': a, 'local:b': str(tmp_path / 'no')}), 'No checkpoint in .*no: the directory does not'),
      (dataclasses.replace(student(runs), model=dataclasses.replace(student(runs).model, vocab_size=9)),
       r'--teacher=local:a=.*: its model has ModelConfig.vocab_size = \d+, this one 9')]:
    with pytest.raises(ConfigError, match=message) as error:
      before.check(given)
    assert '\n' not in str(error.value)
  with pytest.raises(ConfigError, match='expected a run for each task'):
    TeacherConfig(model_dir={'local:a': ''}).validate()


def test_the_flag(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'lr=1').mkdir()
  for values, expected in [
      (['run'], 'run'), (['run', 'run'], 'run'), (['lr=1'], 'lr=1'), (['x/lr=2'], 'x/lr=2'), (['zh=run'], {'zh': 'run'}),
      (['local:zh=a', 'local:en=b=c'], {'local:zh': 'a', 'local:en': 'b=c'})]:
    assert configure.teachers_of(values) == expected
  for values, message in [
      (['a', 'b'], '--teacher=a is the teacher of all rows, and --teacher is given 2 times'), (['zh=a', 'b'], '--teacher=b is'),
      (['zh=a', 'zh=b'], "the name 'zh' is given twice, for a and b"), (['=a'], 'expected --teacher=NAME=DIR')]:
    with pytest.raises(ConfigError, match=message) as error:
      configure.teachers_of(values)
    assert '\n' not in str(error.value)


@pytest.mark.slow
def test_a_run_from_a_cache_is_the_run_with_its_teachers_and_both_go_on(runs, tmp_path):
  online, said = student(runs), student(runs, cache=str(tmp_path / 'said'))
  teacher_cache.make(said)
  train.run(online, str(tmp_path / 'online'))
  moved = {name: tmp_path / 'moved' / name for name in runs}
  for name, run in runs.items():
    shutil.copytree(run, moved[name])
  short = dataclasses.replace(online, train=dataclasses.replace(online.train, steps=2))
  train.run(short, str(tmp_path / 'parts'))
  later = student(moved)
  shutil.rmtree(moved['a'] / 'checkpoints/5')
  with pytest.raises(ConfigError, match='--teacher=.*moved/a: the run began with a teacher whose weights'):
    train.run(later, str(tmp_path / 'parts'))
  train.run(student(runs | {'b': moved['b']}), str(tmp_path / 'parts'))
  assert test_teacher.records(tmp_path / 'parts') == test_teacher.records(tmp_path / 'online')
  digests = [run_directory.read_meta(run_directory.resolve(tmp_path / name), 4)['arrays'] for name in ('online', 'parts')]
  assert digests[0] == digests[1]
  train.run(dataclasses.replace(said, teacher=dataclasses.replace(said.teacher, model_dir='')), str(tmp_path / 'cached'))
  for x, y in zip(*(test_teacher.records(tmp_path / name) for name in ('online', 'cached')), strict=True):
    assert x.keys() == y.keys() and ('teacher_kl' in x) == (x['step'] <= 3)
    np.testing.assert_allclose(list(x.values()), list(y.values()), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_every_mesh_learns_the_same():
  code = test_teacher.MESHES.replace(
      'config, teacher = test_teacher.with_experts()',
      "import test_teachers\nconfig, routed = test_teacher.with_experts()\nteacher = {'a': test_teachers.DENSE, 'b': routed}"
  ).replace(
      'jax.device_get(jax.jit(encoder_decoder.build(teacher).init)(jax.random.key(5)))',
      '{name: jax.device_get(jax.jit(encoder_decoder.build(one).init)(jax.random.key(5))) for name, one in teacher.items()}'
  ).replace('test_step.random_batch(config, index)', "test_step.random_batch(config, index) | {'teacher': test_teachers.WHO}")
  done = small_run.python(code, XLA_FLAGS='--xla_force_host_platform_device_count=8')
  assert done.stdout.count('ok') == 2, done.stderr[-3000:]
