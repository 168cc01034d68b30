"""Whole runs through the command line: training, kill and resume, refusals."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from t5x_cpm.config import ConfigError
from t5x_cpm.training import train

ROOT = pathlib.Path(__file__).resolve().parent.parent


def command(folder: pathlib.Path, model_dir: str, steps: int, *extra: str) -> list[str]:
  return [
      sys.executable, '-m', 't5x_cpm', 'train', f'--gin_file={folder / "run.gin"}', f'--model_dir={folder / model_dir}',
      f'--gin.TrainConfig.steps={steps}', *extra]


def environment(folder: pathlib.Path) -> dict[str, str]:
  return os.environ | {'JAX_PLATFORMS': 'cpu', 'T5X_CPM_CACHE': str(folder / 'cache')}


def run(folder: pathlib.Path, model_dir: str, steps: int, *extra: str) -> subprocess.CompletedProcess:
  return subprocess.run(
      command(folder, model_dir, steps, *extra), cwd=ROOT, env=environment(folder), capture_output=True, text=True, check=False)


def losses(folder: pathlib.Path, model_dir: str) -> dict[int, float]:
  lines = (folder / model_dir / 'metrics.jsonl').read_text().splitlines()
  records = [json.loads(line) for line in lines]
  train = [(record['step'], record['loss']) for record in records if record['split'] == 'train']
  assert len(train) == len(dict(train)), 'a step stands twice in metrics.jsonl'
  return dict(train)


def wait_for_step(folder: pathlib.Path, model_dir: str, step: int, process: subprocess.Popen) -> None:
  deadline = time.monotonic() + 120
  while time.monotonic() < deadline:
    assert process.poll() is None, 'the run ended before it could be stopped'
    path = folder / model_dir / 'metrics.jsonl'
    if path.exists() and path.read_text().count('"train"') >= step:
      return
    time.sleep(0.02)
  raise AssertionError(f'step {step} was not reached')


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> pathlib.Path:
  """A run file over the shipped corpus, and one run of it that nothing interrupted."""
  path = tmp_path_factory.mktemp('train')
  (path / 'run.gin').write_text(f"""
TaskConfig.name = 'local'
TaskConfig.vocabulary = 'cpm2:{ROOT}/tasks/corpus/vocab.txt'
TaskConfig.encoder_length = 48
TaskConfig.decoder_length = 24
LocalTaskConfig.files = {{'zh': '{ROOT}/tasks/corpus/zh.txt', 'en': '{ROOT}/tasks/corpus/en.txt'}}
LocalTaskConfig.validation_fraction = 0.1
ModelConfig.vocab_size = {len((ROOT / 'tasks/corpus/vocab.txt').read_text().splitlines())}
ModelConfig.d_model = 32
ModelConfig.d_ff = 64
ModelConfig.num_heads = 2
ModelConfig.head_dim = 16
ModelConfig.dropout_rate = 0.1
ModelConfig.init_std = 0.05
ModelConfig.layer_loop = 'scan'
TrainConfig.batch_size = 4
OptimizerConfig.schedule = 'constant'
OptimizerConfig.learning_rate = 0.003
OptimizerConfig.warmup_steps = 0
CheckpointConfig.every = 7
MetricsConfig.every = 1
MetricsConfig.tensorboard = False
""")
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
