"""What cannot work is told before the data is cached, and a vocabulary's size need not be repeated."""

import dataclasses
import pathlib
import random
import re

import numpy as np
import pytest
import small_data
import small_run

from t5x_cpm import tasks, vocabularies
from t5x_cpm.config import CheckpointConfig, Config, ConfigError, LocalTaskConfig, ModelConfig
from t5x_cpm.data import objectives
from t5x_cpm.training import before, train


@pytest.fixture
def config(tmp_path, monkeypatch) -> Config:
  """A run on a text file, whose cache is not made, in a current folder with relative paths."""
  monkeypatch.chdir(tmp_path)
  small_data.vocabulary_file(pathlib.Path())
  pathlib.Path('a.txt').write_text('some words of text\n' * 50)
  plain = small_data.make_config(pathlib.Path(), name='local', encoder_length=32, decoder_length=16)
  task = dataclasses.replace(plain.task, cache_dir='cache', cache_processes=1)
  model = ModelConfig(vocab_size=0, d_model=16, d_ff=16, num_heads=2, head_dim=8)
  return dataclasses.replace(plain, model=model, task=task, local_task=LocalTaskConfig(files='*.txt'))


def changed(config: Config, part: str, **fields) -> Config:
  return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **fields)})


def few_sentinels(count: int) -> str:
  path = pathlib.Path(f'few{count}.txt')
  lines = pathlib.Path('vocab.txt').read_text(encoding='utf-8').splitlines()
  path.write_text('\n'.join(lines[:len(lines) - small_data.SENTINELS + count]) + '\n', encoding='utf-8')
  return f'cpm2:{path}'


def test_zero_is_the_size_of_the_vocabulary_and_of_the_run_that_there_is(config, tmp_path):
  size = vocabularies.load(config.task.vocabulary).size
  assert before.with_vocab_size(config, 'run').model.vocab_size == size
  given = changed(config, 'model', vocab_size=7)
  assert before.with_vocab_size(given, 'run') == given
  for folder, rows in (('run', size + 5), ('source', size + 9)):  # padded for a mesh
    small_run.saved(tmp_path / folder, cfg=changed(config, 'model', vocab_size=rows))
  started = changed(config, 'train', init_from='source')
  assert before.with_vocab_size(started, 'new').model.vocab_size == size + 9
  assert before.with_vocab_size(started, 'run').model.vocab_size == size + 5  # what it continues


@pytest.mark.parametrize('part, fields, message', [
    ('model', {'vocab_size': 100}, 'ModelConfig.vocab_size = 100, but the vocabulary cpm2:vocab.txt has '),
    ('task', {'vocabulary': 'few1'}, "'isolated', but the vocabulary cpm2:few1.txt has 1 sentinels: .* at least 2.*'pairs'"),
    ('task', {'objective': 'cpm2', 'encoder_length': 5000}, 'needs about 278'),
    ('train', {'init_from': 'source'}, "TrainConfig.init_from = 'source': that run was trained with another vocabulary"),
    ('checkpoint', {'keep_best': 1, 'best_metric': 'eval/bleu'}, 'expected one of eval/accuracy, eval/loss'),
    ('task', {'vocabulary': 'cpm2:gone.txt'}, 'vocabulary file gone.txt cannot be read'),
])
def test_what_cannot_work_is_told_before_the_data_is_cached(config, tmp_path, part, fields, message):
  if 'init_from' in fields:  # a run of another vocabulary, and of another size, which is not what is wrong
    small_run.saved(tmp_path / 'source', cfg=changed(config, 'model', vocab_size=100))
  if fields.get('vocabulary', '').startswith('few'):
    fields = fields | {'vocabulary': few_sentinels(int(fields['vocabulary'][3:]))}
  with pytest.raises(ConfigError, match=re.compile(message, re.DOTALL)) as error:
    train.run(changed(config, part, **fields), 'run')
  assert not pathlib.Path('cache').exists() and not pathlib.Path('run').exists()
  assert 'cache' not in str(error.value)


def test_messages_name_the_users_file_where_there_is_a_cache(config):
  tasks.caches.build(config, progress=False)
  with pytest.raises(ConfigError, match='the vocabulary cpm2:vocab.txt has'):
    before.check(changed(config, 'model', vocab_size=5))
  pathlib.Path('vocab.txt').unlink()
  with pytest.raises(ConfigError, match='the vocabulary cpm2:.*cache.*vocab.txt has'):  # all that is left
    before.check(changed(config, 'model', vocab_size=5))


def test_any_number_of_sentinels_is_refused_exactly_where_no_piece_fits():
  seed = random.randrange(2**31)
  print('seed', seed)
  rng = random.Random(seed)
  for _ in range(300):
    count, objective = rng.randint(0, 4), rng.choice(['isolated', 't5'])
    task = dataclasses.replace(
        Config().task, objective=objective, encoder_length=rng.randint(4, 12), decoder_length=rng.randint(4, 12),
        noise_density=rng.uniform(0.01, 0.9), mean_span_length=rng.uniform(1, 4))
    noise, spans = objectives.noise_counts(np.array([3]), task.noise_density, task.mean_span_length)
    sides = 3 - noise[0] + spans[0] + (objective == 't5'), noise[0] + spans[0] + 1
    shorter = objectives.noise_counts(np.array([2]), task.noise_density, task.mean_span_length)
    fits_two = (2 - shorter[0][0] + shorter[1][0] + (objective == 't5') <= task.encoder_length
                and shorter[0][0] + shorter[1][0] + 1 <= task.decoder_length)
    fits = (fits_two and sides[0] <= task.encoder_length and sides[1] <= task.decoder_length
            and spans[0] + (objective != 't5') <= count)
    found = type('', (), {'sentinels': tuple(range(count)), 'spec': 'cpm2:x'})()
    try:
      before.check_sentinels(dataclasses.replace(Config(), task=task), found)
    except ConfigError:
      assert not fits, task
    else:
      assert fits, task


def test_relative_paths_belong_to_the_folder_of_the_run(config, tmp_path, monkeypatch):
  config = changed(config, 'local_task', files={'a': '*.txt', 'b': '/x/*.txt'}, validation_files={'a': '~/v.txt'})
  here = tasks.caches.directory(config)
  (tmp_path / 'other').mkdir()
  monkeypatch.chdir(tmp_path / 'other')
  found = tasks.located(config, str(tmp_path))
  assert found.local_task.files == {'a': str(tmp_path / '*.txt'), 'b': '/x/*.txt'}
  assert found.local_task.validation_files == {'a': '~/v.txt'}
  assert found.task.vocabulary == f'cpm2:{tmp_path}/vocab.txt'
  assert tasks.caches.directory(found) == tmp_path / here
  assert tasks.located(config, '') == tasks.located(config, '/no/such/folder') == config


@pytest.mark.parametrize('runs', [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_best_evaluation_is_kept_whatever_the_intervals_and_after_a_resume(tmp_path, runs):
  seed = random.randrange(2**31)
  print('seed', seed)
  rng = random.Random(seed)
  for number in range(runs):
    every, eval_every, count = rng.randint(1, 7), rng.randint(1, 4), rng.randint(1, 3)
    mode, folder = rng.choice(['min', 'max']), tmp_path / str(number)
    options = CheckpointConfig(keep=1, keep_best=count, best_mode=mode)
    values = {step: rng.choice([rng.random(), 0.5, float('nan')]) for step in range(eval_every, 13, eval_every)}
    for begin, end in ((0, 7), (7, 12)):  # the second is a resume
      with small_run.Manager(folder, Config(checkpoint=options), info=small_run.INFO) as manager:
        for step in range(begin + 1, end + 1):
          measured = {'eval/loss': values[step]} if step in values else {}
          if step in (7, 12) or step % every == 0 or manager.is_among_best(measured):
            manager.save(step, {'x': np.float32(step)}, measured)
    finite = sorted(((value if mode == 'min' else -value, step) for step, value in values.items() if value == value))
    kept = small_run.read_run(folder).steps
    assert {12, *(step for _, step in finite[:count])} == set(kept), (every, eval_every, count, mode, values, kept)
