"""Whole runs through the command line: training, kill and resume, refusals."""

import dataclasses
import pathlib
import re
import shutil
import signal
import subprocess

import pytest
from small_training import ROOT, command, environment, losses, run, wait_for_step, write_run

from t5x_cpm import tuning
from t5x_cpm.checkpoints import manager, run_directory
from t5x_cpm.checkpoints.run_directory import CheckpointError, read_run
from t5x_cpm.config import ConfigError
from t5x_cpm.training import batches, train


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> pathlib.Path:
  """A run file over the shipped corpus, and one run of it that nothing interrupted."""
  path = tmp_path_factory.mktemp('train')
  write_run(path)
  done = run(path, 'whole', 30)
  assert done.returncode == 0, done.stderr[-3000:]
  return path


def test_an_uninterrupted_run_reports_every_step_and_learns(folder):
  history = losses(folder, 'whole')
  assert sorted(history) == list(range(1, 31))
  assert history[30] < history[1]


@pytest.mark.parametrize('number', [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_run_stopped_at_any_step_continues_bit_for_bit(folder, number):
  name = f'stopped_{number.name}'
  process = subprocess.Popen(
      command(folder, name, 30), cwd=ROOT, env=environment(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  wait_for_step(folder, name, 17, process)
  process.send_signal(number)
  process.wait(60)
  done = run(folder, name, 30)
  assert done.returncode == 0, done.stderr[-3000:]
  assert 'from step' in done.stdout
  assert losses(folder, name) == losses(folder, 'whole')


@pytest.mark.slow
def test_a_delta_that_was_killed_at_any_step_continues_bit_for_bit(folder):
  more = (f'--base={folder / "whole"}', '--gin.DeltaConfig.method=lora', '--gin.CheckpointConfig.every=3')
  done = run(folder, 'delta', 12, *more)
  assert done.returncode == 0, done.stderr[-3000:]
  process = subprocess.Popen(command(folder, 'killed', 12, *more), cwd=ROOT, env=environment(folder),
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  wait_for_step(folder, 'killed', 8, process)
  process.kill()
  process.wait(60)
  before = tuning.read(folder / 'killed').about['step']  # what is there is complete, whenever the kill came
  done = run(folder, 'killed', 12, *more)
  assert done.returncode == 0 and 'from step' in done.stdout, done.stderr[-3000:]
  assert losses(folder, 'killed') == losses(folder, 'delta')
  digests = [tuning.read(folder / name).about['weights_digest'] for name in ('killed', 'delta')]
  assert digests[0] == digests[1] and before in (3, 6, 9, 12)


def test_a_reached_step_count_is_said_and_changes_nothing(folder):
  before = (folder / 'whole' / 'metrics.jsonl').read_bytes()
  done = run(folder, 'whole', 30)
  assert done.returncode == 0 and 'nothing to do' in done.stdout
  assert (folder / 'whole' / 'metrics.jsonl').read_bytes() == before


def test_prefetch_keeps_order_and_passes_errors_on():
  with batches.prefetch(lambda index: index * 2, 3, 8) as items:
    assert list(items) == [6, 8, 10, 12, 14]

  def fail(index):
    if index == 2:
      raise ConfigError('bad piece')
    return index

  with pytest.raises(ConfigError, match='bad piece'), batches.prefetch(fail, 0, 9) as items:
    assert [next(items), next(items)] == [0, 1]
    next(items)
  with batches.prefetch(lambda index: index, 0, 10**9) as items:
    next(items)  # leaving early ends the thread


def test_another_identity_is_refused_and_a_free_field_is_not(folder):
  done = run(folder, 'whole', 31, '--gin.OptimizerConfig.learning_rate=0.5')
  assert done.returncode == 2
  assert 'OptimizerConfig.learning_rate' in done.stderr and 'Traceback' not in done.stderr


def test_a_vocabulary_of_another_size_is_refused_with_the_right_one(folder):
  done = run(folder, 'wrong_size', 5, '--gin.ModelConfig.vocab_size=100')
  assert done.returncode == 2 and 'set ModelConfig.vocab_size' in done.stderr
  assert not (folder / 'wrong_size' / 'checkpoints').exists()


def test_starting_from_another_run_takes_its_parameters(folder):
  done = run(folder, 'continued', 3, f'--init_from={folder / "whole"}', '--gin.OptimizerConfig.learning_rate=0.0')
  assert done.returncode == 0, done.stderr[-3000:]
  assert losses(folder, 'continued')[1] < losses(folder, 'whole')[1] - 0.5


@pytest.mark.slow
def test_a_run_that_began_with_another_is_continued_without_it_and_made_longer(folder):
  shutil.copytree(folder / 'whole', folder / 'source')
  more = (f'--init_from={folder / "source"}', '--gin.OptimizerConfig.schedule=cosine', '--gin.OptimizerConfig.warmup_steps=1')
  assert run(folder, 'begun', 2, *more).returncode == 0
  shutil.rmtree(folder / 'source')
  done = run(folder, 'begun', 3, *more)
  assert done.returncode == 0, done.stderr[-3000:]
  assert sorted(losses(folder, 'begun')) == [1, 2, 3]
  assert 'for TrainConfig.steps = 3 instead of 2 the learning rate goes from' in done.stdout


def test_a_run_without_validation_text_is_not_evaluated(tmp_path):
  (tmp_path / 'a.txt').write_text(''.join(f'one short line of text, number {i}\n\n' for i in range(20)))
  write_run(tmp_path)
  local = ('--gin.TaskConfig.name=local', f'--gin.TaskConfig.vocabulary=cpm2:{ROOT}/tasks/corpus/vocab.txt',
           f'--gin.LocalTaskConfig.files={tmp_path}/a.txt', '--gin.LocalTaskConfig.validation_fraction=0.0')
  done = run(tmp_path, 'ranked', 2, *local, '--gin.CheckpointConfig.keep_best=1')
  assert done.returncode == 2 and 'CheckpointConfig.keep_best = 1 needs evaluations' in done.stderr
  done = run(tmp_path, 'plain', 2, *local, '--gin.TrainConfig.eval_every=1')
  assert done.returncode == 0, done.stderr[-3000:]
  assert "The run is not evaluated: task 'local' has no documents in split 'validation'" in done.stdout
  assert re.search(r'^data: 20 documents, \d+ pieces of at most \d+ tokens$', done.stdout, re.MULTILINE)
  assert (tmp_path / 'plain/checkpoints/2').is_dir()


def test_a_start_that_fails_leaves_the_model_dir_free(folder, monkeypatch):
  def damaged(*_):
    raise CheckpointError('damaged')

  monkeypatch.setattr(manager.Manager, 'restore', damaged)
  monkeypatch.setenv('T5X_CPM_CACHE', str(folder / 'cache'))
  config = read_run(folder / 'whole').config
  config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=40))
  with pytest.raises(CheckpointError, match='damaged') as error:
    train.run(config, str(folder / 'whole'))
  with run_directory.claim(folder / 'whole'):
    assert error  # whose frames are still there


def test_a_metric_to_rank_by_is_checked_before_the_first_step(folder):
  done = run(folder, 'ranked', 2, '--gin.CheckpointConfig.keep_best=1', '--gin.CheckpointConfig.best_metric=eval/bleu')
  assert done.returncode == 2
  assert "best_metric = 'eval/bleu': expected one of eval/accuracy, eval/loss" in done.stderr
  assert not (folder / 'ranked').exists()


def test_an_update_that_is_not_finite_is_never_saved_and_its_first_bad_tensor_is_named(folder):
  done = run(folder, 'overflow', 2, '--gin.OptimizerConfig.name=sgd', '--gin.OptimizerConfig.learning_rate=3e38',
             '--gin.OptimizerConfig.clip_norm=1000.0', '--gin.CheckpointConfig.every=1')
  assert done.returncode == 1 and 'error: step 1: loss' in done.stderr, done.stderr
  assert 'the first tensor that is not finite is ' in done.stderr and 'Traceback' not in done.stderr
  assert not list((folder / 'overflow' / 'checkpoints').glob('[0-9]*'))


@pytest.mark.slow
def test_a_run_that_diverges_after_some_steps_names_the_first_bad_tensor(folder):
  done = run(folder, 'diverged', 30, '--gin.OptimizerConfig.learning_rate=1e37', '--gin.OptimizerConfig.clip_norm=0.0')
  assert done.returncode == 1, done.stderr[-3000:]
  assert 'the first tensor that is not finite is' in done.stderr and 'Traceback' not in done.stderr


@pytest.mark.slow
def test_weights_in_host_memory_are_saved_and_restored(tmp_path):
  """The run continues with them there or not."""
  write_run(tmp_path)
  here = ('--gin.ModelConfig.dtype=bfloat16',)
  away = (*here, '--gin.MeshConfig.host_gib=-1')
  for model_dir, steps, extra in (('here', 8, here), ('away', 4, away), ('away', 6, away), ('away', 8, here)):
    result = run(tmp_path, model_dir, steps, '--gin.CheckpointConfig.every=2', *extra)
    assert result.returncode == 0, result.stderr
  assert losses(tmp_path, 'away') == pytest.approx(losses(tmp_path, 'here'), rel=1e-3)
