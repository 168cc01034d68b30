"""The evaluations of a run: mean loss and accuracy, each time over the same rows of the validation split."""

from collections.abc import Callable
from typing import Any

import jax

from t5x_cpm.config import Config, ConfigError
from t5x_cpm.data import reader as reader_lib
from t5x_cpm.data import report
from t5x_cpm.tasks import caches
from t5x_cpm.training import batches, host_memory
from t5x_cpm.training.gradients import means
from t5x_cpm.training.step import Frozen, State, Step


def check_metric(config: Config, step: Step) -> None:
  """Raises ConfigError if checkpoints are to be ranked by a metric that no evaluation gives."""
  options = config.checkpoint
  if options.keep_best:
    names = [f'eval/{name}' for name in jax.eval_shape(
        step.evaluate, host_memory.working(step.abstract_state), step.abstract_frozen, step.abstract_batch)]
    if options.best_metric not in names:
      raise ConfigError(f'CheckpointConfig.best_metric = {options.best_metric!r}: expected one of {", ".join(sorted(names))}.')


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


def evaluate(step: Step, state: State, frozen: Frozen, reader: reader_lib.Reader, max_batches: int) -> dict[str, float]:
  """Mean loss and accuracy over the targets of the validation split; each row counts once."""
  total: dict[str, tuple[float, float]] = {}
  params: Any = host_memory.working(state)
  rows = batches.own_rows(step)
  for batch in reader.eval_batches(max_batches, rows):
    sums = jax.device_get(step.evaluate(params, frozen, batches.put(step, batch, rows)))
    for name, (value, weight) in sums.items():
      a, b = total.get(name, (0.0, 0.0))
      total[name] = (a + float(value), b + float(weight))
  return {name: float(value) for name, value in means(total).items()}
