"""t5x_cpm from Python. `import t5x_cpm` offers these functions, and imports nothing until one of them is used.

    import t5x_cpm
    from t5x_cpm.config import gin

    config = gin.load(['gin/models/cpm2_tiny.gin', 'gin/runs/quickstart.gin'], ['TrainConfig.steps=20'])
    t5x_cpm.train(config, 'runs/example')
    t5x_cpm.load('runs/example').generate(['今天<span>，我们去公园。'])
    t5x_cpm.evaluate('runs/example', 'quickstart')
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from t5x_cpm.config import Config, MeshConfig
from t5x_cpm.config.fields import shown

if TYPE_CHECKING:
  from t5x_cpm.inference.engine import Engine

Directory = str | os.PathLike[str]


def _directory(function: str, model_dir: Any) -> str:
  if not isinstance(model_dir, str | os.PathLike) or not os.fspath(model_dir):
    raise TypeError(f't5x_cpm.{function}: model_dir = {shown(model_dir)}: expected the path of a folder, text or a '
                    'path object.')
  return str(os.fspath(model_dir))


def _checked(function: str, config: Any) -> Config:
  if not isinstance(config, Config):
    given = f'the class {config.__name__}' if isinstance(config, type) else f'of type {type(config).__name__}'
    raise TypeError(f't5x_cpm.{function}: config is {given}: expected a t5x_cpm.Config, from t5x_cpm.config.gin.load(files) or '
                    't5x_cpm.Config(...).')
  return config


def _check_step(function: str, step: Any) -> None:
  if step is not None and (isinstance(step, bool) or not isinstance(step, int)):
    also = " or 'all'" if function == 'evaluate' else ''
    raise TypeError(f't5x_cpm.{function}: step = {shown(step)}: expected the number of a checkpoint{also}.')


def train(config: Config, model_dir: Directory) -> dict[str, float]:
  """Trains in this process until TrainConfig.steps.

  The same call continues a run that was stopped. In the main thread SIGINT, which the interrupt button of a notebook sends, and
  SIGTERM save a checkpoint and return.

  Args:
    config: the run, from `t5x_cpm.config.gin.load` or built in Python.
    model_dir: where checkpoints, metrics and the vocabulary are written.

  Returns:
    The last evaluation, metric -> value; that of the last checkpoint where there was nothing to do.

  Raises:
    TypeError: an argument has the wrong type.
    ConfigError: the configuration, the data or model_dir cannot be used, or a checkpoint cannot be written.
    FloatingPointError: a loss, gradient or parameter is not finite.
  """
  config, folder = _checked('train', config), _directory('train', model_dir)
  from t5x_cpm.inference import in_training
  from t5x_cpm.training import train as training

  return training.run(config, folder, make_answers=in_training.answers)


def load(model_dir: Directory, *, step: int | None = None, config: Config | None = None,
         deltas: Mapping[str, Directory] | None = None, memory_gib: float | None = None) -> 'Engine':
  """Loads a trained model, which generates, scores, chooses, encodes and streams.

  Args:
    model_dir: the run's directory.
    step: the step of the checkpoint; by default the last.
    config: its decode, infer and mesh parts are used, and DeltaConfig.slots; by default those of the run, on all devices of
      this process.
    deltas: by name, the model_dir of each delta to serve beside the model, or a copy of its folder `delta`: texts are then
      answered by `generate(texts, delta=name)`.
    memory_gib: where model_dir is a bundle: GiB that the model may take in memory (OffloadConfig.memory_gib).

  Raises:
    TypeError: an argument has the wrong type.
    ConfigError: there is no such checkpoint, or it is damaged; or a delta is, or belongs to another base or vocabulary.
  """
  folder = _directory('load', model_dir)
  _check_step('load', step)
  if config is not None:
    _checked('load', config)
  from t5x_cpm import inference

  return inference.load(folder, step=step, config=config, deltas=deltas, memory_gib=memory_gib)


def evaluate(model_dir: Directory, tasks: str | Iterable[str], *, step: int | str | None = None,
             config: Config | None = None) -> dict[int, dict[str, dict[str, float]]]:
  """Evaluates checkpoints on tasks; writes the results to model_dir/eval and prints a table.

  Args:
    model_dir: the run's directory.
    tasks: the name of a task or mixture, or several names.
    step: the step of the checkpoint, or 'all'; by default what EvalConfig.checkpoints says, which is the last.
    config: its eval, decode, infer, task and mesh parts are used; by default those of the run, on all devices of this process.

  Returns:
    step -> task -> metric -> value.

  Raises:
    TypeError: an argument has the wrong type.
    ConfigError: there is no such checkpoint, task, split or metric.
  """
  folder = _directory('evaluate', model_dir)
  names = [tasks] if isinstance(tasks, str) else list(tasks) if isinstance(tasks, Iterable) else []
  if not names or not all(isinstance(name, str) for name in names):
    raise TypeError(f't5x_cpm.evaluate: tasks = {shown(tasks)}: expected the name of a task, or a list of names.')
  if step != 'all':
    _check_step('evaluate', step)
  from t5x_cpm import tasks as task_lib
  from t5x_cpm.infmoe import about

  found = about.read_run(folder, step if isinstance(step, int) else None)
  run = task_lib.located(found.config, found.started.get('folder', ''))
  config = dataclasses.replace(run, mesh=MeshConfig()) if config is None else _checked('evaluate', config)
  checkpoints = config.eval.checkpoints if step is None else str(step)
  config = dataclasses.replace(config, model=run.model, eval=dataclasses.replace(config.eval, checkpoints=checkpoints))
  from t5x_cpm.inference import evaluate as evaluation

  return evaluation.run(config, folder, names)
