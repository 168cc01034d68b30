"""Whole runs of `train` in processes of their own, on the shipped corpus and a model of no size."""

import json
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


def write_run(path: pathlib.Path) -> None:
  """run.gin in a folder."""
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
