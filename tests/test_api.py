"""t5x_cpm from Python: train, load, evaluate; and in a notebook."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import small_training

import t5x_cpm
from t5x_cpm.config import MetricsConfig, ModelConfig, OptimizerConfig, TrainConfig, gin

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def config(tmp_path, monkeypatch) -> t5x_cpm.Config:
  """A run of three steps on the shipped corpus."""
  monkeypatch.setenv('T5X_CPM_CACHE', str(tmp_path / 'cache'))
  small_training.write_run(tmp_path)
  return gin.load([str(tmp_path / 'run.gin')], ['TrainConfig.steps=3', 'TrainConfig.eval_batches=1'], scope='train')


def more_steps(config: t5x_cpm.Config, steps: int) -> t5x_cpm.Config:
  return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


def test_train_resume_ask_and_evaluate(config, tmp_path, capsys):
  run = tmp_path / 'run'
  assert t5x_cpm.train(config, run).keys() == {'loss', 'accuracy'}
  result = t5x_cpm.train(more_steps(config, 5), str(run))
  assert f'continuing {run} from step 3' in capsys.readouterr().out
  assert t5x_cpm.train(more_steps(config, 5), run) == result  # nothing to do, and the same to say
  assert list(small_training.losses(tmp_path, 'run')) == [1, 2, 3, 4, 5]
  model = t5x_cpm.load(run, step=3)
  assert model.step == 3
  assert len(model.generate(['今天<span>，我们去公园。'], max_new_tokens=4)) == 1

  options = dataclasses.replace(config, eval=dataclasses.replace(config.eval, batch_size=4, max_examples=4))
  found = t5x_cpm.evaluate(run, 'local', step='all', config=options)
  assert list(found) == [3, 5] and list(found[5]) == ['local']
  assert found[5]['local']['loss'] == pytest.approx(result['loss'], rel=1e-3)  # the same four rows, with the same weights
  assert json.loads((run / 'eval' / '3' / 'metrics.json').read_text())['local']['metrics']['loss'] > 0


def test_names_are_found_when_they_are_used():
  code = ('import sys, t5x_cpm; before = set(sys.modules); t5x_cpm.Config, t5x_cpm.train, t5x_cpm.load, t5x_cpm.evaluate; '
          'print({"jax", "numpy", "tensorflow"} & set(sys.modules), before & {"t5x_cpm.api", "t5x_cpm.config"})')
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
  assert done.stdout.strip() == 'set() set()'
  assert {'Config', 'ConfigError', 'evaluate', 'load', 'train'} <= set(dir(t5x_cpm))
  with pytest.raises(AttributeError, match="module 't5x_cpm' has no attribute 'trian'"):
    t5x_cpm.trian  # noqa: B018


@pytest.mark.parametrize('call, error, message', [
    (lambda config: t5x_cpm.train({'steps': 3}, 'x'), TypeError, 'train: config is of type dict: expected a t5x_cpm.Config'),
    (lambda config: t5x_cpm.train(t5x_cpm.Config, 'x'), TypeError, 'config is the class Config: expected a t5x_cpm.Config'),
    (lambda config: t5x_cpm.train(config, 3), TypeError, 'train: model_dir = 3: expected the path of a folder'),
    (lambda config: t5x_cpm.train(config, ''), TypeError, "model_dir = '': expected the path of a folder"),
    (lambda config: t5x_cpm.train(t5x_cpm.Config(train=TrainConfig(steps=2.5)), 'x'), t5x_cpm.ConfigError,
     r'TrainConfig\.steps = 2\.5 is of type float; expected int'),
    (lambda config: t5x_cpm.train(t5x_cpm.Config(train=ModelConfig()), 'x'), t5x_cpm.ConfigError,
     r'Config\.train is of type ModelConfig; expected TrainConfig'),
    (lambda config: t5x_cpm.train(t5x_cpm.Config(metrics=MetricsConfig(tensorboard=1)), 'x'), t5x_cpm.ConfigError,
     r'MetricsConfig\.tensorboard = 1 is of type int; expected True or False'),
    (lambda config: t5x_cpm.load('nowhere'), t5x_cpm.ConfigError, 'No checkpoint in .*nowhere'),
    (lambda config: t5x_cpm.load('x', step='3'), TypeError, "load: step = '3': expected the number of a checkpoint"),
    (lambda config: t5x_cpm.load('x', config='y'), TypeError, 'load: config is of type str'),
    (lambda config: t5x_cpm.evaluate('x', 3), TypeError, 'tasks = 3: expected the name of a task, or a list of names'),
    (lambda config: t5x_cpm.evaluate('x', []), TypeError, 'expected the name of a task'),
    (lambda config: t5x_cpm.evaluate('x', 'a', step='last'), TypeError, "number of a checkpoint or 'all'"),
])
def test_arguments_of_another_type_are_refused(config, call, error, message):
  with pytest.raises(error, match=message):
    call(config)
  assert not pathlib.Path('x').exists()


def test_whole_numbers_serve_as_fractions():
  rate = t5x_cpm.Config(optimizer=OptimizerConfig(learning_rate=1, warmup_steps=0)).optimizer.learning_rate
  assert rate == 1.0 and isinstance(rate, float)


SETUP = """
import os, signal, threading, time
import t5x_cpm
from t5x_cpm.config import gin

def config(steps):
  return gin.load(['run.gin'], [f'TrainConfig.steps={steps}', 'TrainConfig.eval_batches=1'], scope='train')
"""
CELLS = (
    "print(sorted(t5x_cpm.train(config(3), 'run')))",
    "t5x_cpm.train(config(5), 'run')",  # goes on, in the same process
    # What the interrupt button does.
    """
    def press():
      while not (os.path.exists('other/metrics.jsonl') and open('other/metrics.jsonl').read().count('train') >= 2):
        time.sleep(0.05)
      os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    threading.Thread(target=press).start()
    t5x_cpm.train(config(2000), 'other')
    print(signal.getsignal(signal.SIGINT) == before)
    """,
    "worker = threading.Thread(target=t5x_cpm.train, args=(config(7), 'run')); worker.start(); worker.join()",
    """
    model = t5x_cpm.load('run')
    print(model.step, len(model.generate(['今天<span>。'], max_new_tokens=4)))
    print(sorted(t5x_cpm.evaluate('run', 'local')))
    """,
    "t5x_cpm.train(gin.load(['run.gin'], ['TrainConfig.stps=3']), 'x')",
)


@pytest.mark.slow
def test_in_a_notebook(tmp_path):
  import nbclient
  import nbformat

  small_training.write_run(tmp_path)
  cells = [re.sub('^    ', '', cell, flags=re.MULTILINE) for cell in (SETUP, *CELLS)]
  notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
  client = nbclient.NotebookClient(notebook, timeout=300, allow_errors=True, resources={'metadata': {'path': str(tmp_path)}})
  client.execute(env=small_training.environment(tmp_path) | {'PYTHONPATH': str(ROOT), 'IPYTHONDIR': str(tmp_path / 'ipython')})
  outputs = []
  for cell in notebook.cells:
    texts = [output.get('text', '') + '\n'.join(output.get('traceback', ())) for output in cell.outputs]
    outputs.append(re.sub('\x1b[^m]*m', '', ''.join(texts)))
    print(cell.source, outputs[-1], sep='\n')
  first, again, interrupted, threaded, asked, wrong = outputs[1:]
  assert "['accuracy', 'loss']" in first
  assert 'continuing run from step 3' in again
  assert 'SIGINT at step' in interrupted and 'saved, stopping' in interrupted and interrupted.rstrip().endswith('True')
  assert 'continuing run from step 5' in threaded
  assert '7 1\n' in asked and asked.rstrip().endswith('[7]')
  assert 'ConfigError' in wrong and 'Did you mean steps' in wrong
  assert list(small_training.losses(tmp_path, 'run')) == [1, 2, 3, 4, 5, 6, 7]
  stopped = max(small_training.losses(tmp_path, 'other'))
  assert os.listdir(tmp_path / 'other' / 'checkpoints')[-1:] and (tmp_path / 'other' / 'checkpoints' / str(stopped)).is_dir()
