"""Whole runs through the command line: training, kill and resume, refusals."""

import pathlib
import signal
import subprocess

import pytest
from small_training import ROOT, command, environment, losses, run, wait_for_step, write_run

from t5x_cpm.config import ConfigError
from t5x_cpm.training import train


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


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM])
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


def test_a_reached_step_count_is_said_and_changes_nothing(folder):
  before = (folder / 'whole' / 'metrics.jsonl').read_bytes()
  done = run(folder, 'whole', 30)
  assert done.returncode == 0 and 'nothing to do' in done.stdout
  assert (folder / 'whole' / 'metrics.jsonl').read_bytes() == before


def test_a_run_that_diverges_names_the_first_bad_tensor_and_keeps_its_checkpoints(folder):
  done = run(folder, 'diverged', 30, '--gin.OptimizerConfig.learning_rate=1e37', '--gin.OptimizerConfig.clip_norm=0.0')
  assert done.returncode == 1, done.stderr[-3000:]
  assert 'the first tensor that is not finite is' in done.stderr and 'Traceback' not in done.stderr


def test_prefetch_keeps_order_and_passes_errors_on():
  with train.prefetch(lambda index: index * 2, 3, 8) as items:
    assert list(items) == [6, 8, 10, 12, 14]

  def fail(index):
    if index == 2:
      raise ConfigError('bad piece')
    return index

  with pytest.raises(ConfigError, match='bad piece'), train.prefetch(fail, 0, 9) as items:
    assert [next(items), next(items)] == [0, 1]
    next(items)
  with train.prefetch(lambda index: index, 0, 10**9) as items:
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
def test_weights_in_host_memory_are_saved_and_restored(tmp_path):
  """The run continues with them there or not."""
  write_run(tmp_path)
  here = ('--gin.ModelConfig.dtype=bfloat16',)
  away = (*here, '--gin.MeshConfig.host_gib=-1')
  for model_dir, steps, extra in (('here', 8, here), ('away', 4, away), ('away', 6, away), ('away', 8, here)):
    result = run(tmp_path, model_dir, steps, '--gin.CheckpointConfig.every=2', *extra)
    assert result.returncode == 0, result.stderr
  assert losses(tmp_path, 'away') == pytest.approx(losses(tmp_path, 'here'), rel=1e-3)
