"""The evaluations of a run: mean loss and accuracy, each time over the same rows of the validation split, and when to stop."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import jax

from t5x_cpm.checkpoints import run_directory
from t5x_cpm.config import CheckpointConfig, Config, ConfigError
from t5x_cpm.config.fields import did_you_mean
from t5x_cpm.data import reader as reader_lib
from t5x_cpm.data import report
from t5x_cpm.tasks import caches
from t5x_cpm.training import batches, before, host_memory, records
from t5x_cpm.training.gradients import means
from t5x_cpm.training.step import Frozen, State, Step
from t5x_cpm.vocabularies import Vocabulary


class Answers(Protocol):
  """Metrics of a task's answers or choices, on examples that were read at the start of a run.

  `inference` provides them. It stands below this folder, so whoever starts a run hands them on.
  """

  @property
  def names(self) -> Collection[str]:
    """Of the metrics."""
    ...

  @property
  def note(self) -> str:
    """What is measured, in words."""
    ...

  def __call__(self, params: Any) -> dict[str, float]:
    """Name -> value for the parameters of the whole model. All processes call it together."""
    ...


# Makes them for a run on a mesh, with its vocabulary; None where its task has no answers.
MakeAnswers = Callable[[Config, jax.sharding.Mesh, Vocabulary], Answers | None]


def check_metric(config: Config, step: Step, mesh: jax.sharding.Mesh, make: MakeAnswers | None) -> Answers | None:
  """Finds out what evaluations measure beside the loss: answers, if checkpoints are ranked by a metric of them.

  Args:
    config: the run.
    step: its step.
    mesh: its mesh.
    make: makes what measures answers; None: nothing does.

  Returns:
    What measures them; None where no metric of them is asked for.

  Raises:
    ConfigError: checkpoints are to be ranked by a metric that no evaluation gives, or too few evaluations are asked for.
  """
  options, answers = config.checkpoint, None
  if options.patience and not (options.keep_best and config.train.eval_every):
    raise ConfigError(f'CheckpointConfig.patience = {options.patience} counts evaluations and leaves the best: set '
                      'TrainConfig.eval_every and CheckpointConfig.keep_best to 1 or more.')
  if not options.keep_best:
    return None
  names = {f'eval/{name}' for name in jax.eval_shape(
      step.evaluate, host_memory.working(step.abstract_state), step.abstract_frozen, step.abstract_batch)}
  if options.best_metric not in names:
    answers = make(config, mesh, before.vocabulary(config)) if make else None
    names |= {f'eval/{name}' for name in answers.names} if answers else set()
  if options.best_metric not in names:
    raise ConfigError(f'CheckpointConfig.best_metric = {options.best_metric!r}: expected one of {", ".join(sorted(names))}.'
                      f'{did_you_mean(options.best_metric, sorted(names))}')
  return answers


class Patience:
  """Counts evaluations without a better CheckpointConfig.best_metric.

  What a run has reported decides, so that one that was stopped and goes on ends where one that was not does.
  """

  def __init__(self, options: CheckpointConfig, model_dir: Any, begins: int, step: int):
    """step: updates done; evaluations up to it are read from the metrics of the run, which began after `begins` updates."""
    self._options, self._best, self._best_step, self._count = options, math.inf, 0, 0
    path = run_directory.resolve(model_dir) / 'metrics.jsonl'
    if options.patience and path.exists():
      for record in records.read_jsonl(path):
        if record['split'] == 'eval' and begins < record['step'] <= step:
          self.add(record['step'], {f'eval/{name}': value for name, value in record.items()})

  def add(self, step: int, metrics: Mapping[str, Any]) -> str:
    """Takes the metrics, as eval/NAME, of an evaluation after `step` updates. Returns `reason`."""
    value = metrics.get(self._options.best_metric)
    value = math.nan if value is None else value if self._options.best_mode == 'min' else -value
    if value < self._best:
      self._best, self._best_step, self._count = value, step, 0
    else:
      self._count += 1
    return self.reason

  @property
  def reason(self) -> str:
    """Why the run is to stop, as a part of a sentence; '' while it is not."""
    options = self._options
    if not 0 < options.patience <= self._count:
      return ''
    best = self._best if options.best_mode == 'min' else -self._best
    return f'no {options.best_metric} better than {best:.4g} of step {self._best_step} in {self._count} evaluations'


def open_reader(config: Config, say: Callable[[str], None]) -> reader_lib.Reader | None:
  """Opens what the run is evaluated on, once, so that every evaluation uses the same rows; None where the task has none.

  Raises:
    ConfigError: checkpoints are to be ranked by evaluations, and the task has none.
  """
  try:
    reader = reader_lib.open_reader(caches.build(config), config, 'validation')
  except reader_lib.EmptySplitError as error:
    if config.checkpoint.keep_best:
      raise ConfigError(f'CheckpointConfig.keep_best = {config.checkpoint.keep_best} needs evaluations, but {error}') from error
    say(f'The run is not evaluated: {error}')
    return None
  limit = config.train.eval_batches * config.train.batch_size
  for line in report.of_evaluation(reader, limit, f'TrainConfig.eval_batches = {config.train.eval_batches}'):
    say(f'data: {line}')
  return reader


def evaluate(step: Step, state: State, frozen: Frozen, reader: reader_lib.Reader, max_batches: int,
             answers: Answers | None = None) -> dict[str, float]:
  """Mean loss and accuracy over the targets of the validation split, each row once; and what `answers` measures."""
  total: dict[str, tuple[float, float]] = {}
  params: Any = host_memory.working(state)
  rows = batches.own_rows(step)
  for batch in reader.eval_batches(max_batches, rows):
    sums = jax.device_get(step.evaluate(params, frozen, batches.put(step, batch, rows)))
    for name, (value, weight) in sums.items():
      a, b = total.get(name, (0.0, 0.0))
      total[name] = (a + float(value), b + float(weight))
  measured = {name: float(value) for name, value in means(total).items()}
  return measured | (answers(frozen.get('base', {}) | params) if answers else {})
