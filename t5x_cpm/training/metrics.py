"""What a run reports: metrics.jsonl, TensorBoard, Weights & Biases and a progress bar.

Every value that is written is that of one step, never a mean over the steps since the last line, so that a run that was
killed and resumed writes the same lines as one that was not (throughput aside).
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from t5x_cpm.checkpoints.run_directory import read_run, resolve, scan, writing
from t5x_cpm.config import Config, ConfigError, to_dict
from t5x_cpm.progress import Progress
from t5x_cpm.training import flops
from t5x_cpm.training.records import EventFile, cut_all_events, cut_jsonl
from t5x_cpm.training.step import Batch, Frozen, State, Step

SECONDS_BETWEEN_LINES = 10.0  # of progress, where the output is not a terminal
# Root mean squares of parameters. Models that work stay below ten; from the first on a user is told, at the second a run ends.
STRANGE, DIVERGED = 1e3, 1e6
ADVICE = 'Try a lower OptimizerConfig.learning_rate or more OptimizerConfig.warmup_steps.'


def _start_wandb(config: Config, model_dir: epath.Path, start_step: int) -> Any:
  try:
    import wandb  # pyright: ignore[reportMissingImports]
  except ImportError as error:
    raise ConfigError(
        f"MetricsConfig.wandb_project = {config.metrics.wandb_project!r} needs the package wandb: run 'pip install wandb', or "
        "set MetricsConfig.wandb_project = ''.") from error
  # W&B cannot take back the steps after a restored one, so each start is a run of its own, all in one group.
  try:
    return wandb.init(
        project=config.metrics.wandb_project, dir=str(model_dir), group=model_dir.name,
        name=f'{model_dir.name}-from-{start_step}', config=to_dict(config))
  except wandb.Error as error:  # no key, no network
    raise ConfigError(
        f"MetricsConfig.wandb_project = {config.metrics.wandb_project!r}: W&B did not start: {error} Run 'wandb login', set "
        "WANDB_MODE=offline, or MetricsConfig.wandb_project = ''.") from error


def _finite(value: Any) -> Any:
  """None in the place of a number that JSON does not have."""
  if isinstance(value, list):
    return [_finite(item) for item in value]
  return value if math.isfinite(value) else None


def _scalars(values: Mapping[str, Any]) -> dict[str, float]:
  """For curves: the mean of what each layer has, and the maximum of what each layer has for each expert."""
  scalars = {}
  for name, value in values.items():
    if not isinstance(value, list):
      scalars[name] = value
    elif isinstance(value[0], list):
      scalars[f'{name}_max'] = max(map(max, value))
    else:
      scalars[name] = sum(value) / len(value)
  return scalars


def _last_written(model_dir: epath.Path, step: int) -> dict[str, int]:
  """For splits, the last step up to this one, that of a checkpoint, of which metrics were written."""
  if step not in scan(model_dir)[0]:
    return {}
  run = read_run(model_dir, step)
  every = run.config.metrics.every
  return {'train': step // every * every or min(step, 1), 'eval': step if run.metrics else 0}


class Writers:
  """Writes the metrics of a run. Processes other than the first call the same methods, which then do nothing."""

  def __init__(self, model_dir: Any, config: Config, *, start_step: int, total_steps: int):
    """Cuts what is already there back to start_step and opens everything for appending.

    Args:
      model_dir: the run's directory, which exists.
      config: the run's configuration.
      start_step: updates done: 0, or the step that was restored.
      total_steps: step at which the run ends.

    Raises:
      ConfigError: W&B is asked for, but is not installed or does not start; or a file cannot be written.
    """
    self._config, self._total = config, total_steps
    self._active = jax.process_index() == 0
    self._tokens = self._seconds = 0.0  # since the last line
    self._steps = 0
    self._marked: float | None = None  # when the last step was reported; None: do not count until the next
    self._pace: list[float] = [0.0, 0.0]  # steps and seconds since the start, for the time left
    if not self._active:
      return
    model_dir = resolve(model_dir)
    self._wandb = _start_wandb(config, model_dir, start_step) if config.metrics.wandb_project else None
    self._path = model_dir / 'metrics.jsonl'
    self._events: dict[str, EventFile] = {}
    self._event_dir = model_dir / 'tensorboard'
    with writing(model_dir):
      cut_jsonl(self._path, start_step, _last_written(model_dir, start_step))
      self._jsonl = self._path.open('a')
      cut_all_events(self._event_dir, start_step)
    self._peak = flops.peak_flops(jax.devices()[0], config.metrics.peak_flops)
    self._progress = Progress('', 'step', total_steps, start_step, interval=SECONDS_BETWEEN_LINES, lines=sys.stdout)
    if self._peak is None:
      self.note(f'No peak FLOP/s known for {jax.devices()[0].device_kind}: set MetricsConfig.peak_flops to have MFU reported.')

  def __enter__(self) -> 'Writers':
    return self

  def __exit__(self, *exception: Any) -> None:
    self.close()

  def step(self, step: int, values: Mapping[str, Any], finished: float | None = None) -> None:
    """Takes the metrics of a training step; writes every MetricsConfig.every steps, and at the first and the last.

    Args:
      step: updates done, this one included.
      values: numbers by name: 'loss', 'encoder_tokens' and 'decoder_tokens' (not padding, of the whole batch), and others.
        A list has a number for each layer, a list of lists one for each layer and expert.
      finished: when the devices had done it, by time.monotonic(); None: now.
    """
    if not self._active:
      return
    now = time.monotonic() if finished is None else finished
    if self._marked is not None:
      self._seconds += now - self._marked
      self._tokens += values['encoder_tokens'] + values['decoder_tokens']
      self._steps += 1
      self._pace = [self._pace[0] + 1, self._pace[1] + now - self._marked]
    self._marked = now
    if step % self._config.metrics.every == 0 or step in (1, self._total):
      values = dict(values) | self._throughput(values)
      self._write('train', step, values)
      self._tokens = self._seconds = 0.0
      self._steps = 0
    done, seconds = self._pace
    loss = f'loss {values["loss"]:.4f}'
    rate = f'  {values["tokens_per_second"]:,.0f} tokens/s' if 'tokens_per_second' in values else ''
    # The time of an evaluation, and that of the first step, which compiles, say nothing about the steps to come.
    seconds_left = (self._total - step) * seconds / done if done else None
    self._progress.show(step, loss + rate, bar_detail=loss, seconds_left=seconds_left)

  def _throughput(self, values: Mapping[str, float]) -> dict[str, float]:
    """Rates since the last line; nothing before two steps were reported, because the first one compiles."""
    if not self._seconds:
      return {}
    model, task = self._config.model, self._config.task
    per_step = flops.model_flops(
        model, values['encoder_tokens'], values['decoder_tokens'], task.encoder_length, task.decoder_length,
        frozen=self._config.delta.frozen)
    rate = self._steps / self._seconds
    result = {
        'steps_per_second': rate, 'tokens_per_second': self._tokens / self._seconds, 'model_flops_per_second': per_step * rate}
    if self._peak:
      result['mfu'] = per_step * rate / (self._peak * jax.device_count())
    return result

  def evaluation(self, step: int, values: Mapping[str, float]) -> None:
    """Writes the metrics of an evaluation after `step` updates. The time it took does not count as training time."""
    if not self._active:
      return
    self._marked = time.monotonic()
    self._write('eval', step, values)
    self.note(f'step {step}  evaluation: ' + '  '.join(f'{name} {value:.4f}' for name, value in values.items()))

  def note(self, text: str) -> None:
    """Prints a line above the progress bar."""
    if self._active:
      self._progress.note(text)

  def _write(self, split: str, step: int, values: Mapping[str, Any]) -> None:
    record = {name: _finite(value) for name, value in values.items()}
    with writing(self._path):
      self._jsonl.write(json.dumps({'step': step, 'split': split} | record, allow_nan=False) + '\n')
      self._jsonl.flush()
    values = _scalars(values)
    if self._config.metrics.tensorboard:
      with writing(self._event_dir / split):
        if split not in self._events:
          self._events[split] = EventFile(self._event_dir / split)
        self._events[split].write(step, values)
    if self._wandb is not None:
      self._wandb.log({f'{split}/{name}': value for name, value in values.items()}, step=step)

  def close(self) -> None:
    """Closes files and bar."""
    if not self._active:
      return
    self._progress.close()
    for file in (self._jsonl, *self._events.values()):
      with contextlib.suppress(OSError):  # every line was flushed, or its error was raised then
        file.close()
    if self._wandb is not None:
      self._wandb.finish()


class LateMetrics:
  """The metrics of steps, read one step late: when the next step is already dispatched, so that the devices never wait."""

  def __init__(self, step: Step, frozen: Frozen, writers: Writers, checkpoints: Callable[[], str] = str):
    """Args:
      step: the step.
      frozen: what it is called with.
      writers: take the metrics.
      checkpoints: says which checkpoint was written last, for messages about a run that fails.
    """
    self._step, self._frozen, self._writers, self._checkpoints = step, frozen, writers, checkpoints
    self._waiting: tuple[int, dict[str, jax.Array], Batch, Step, Frozen, float | None] | None = None
    self._root = math.sqrt(sum(leaf.size for leaf in jax.tree.leaves(step.abstract_state['params'])))
    self._told = False

  def add(self, number: int, values: dict[str, jax.Array], batch: Batch, step: Step | None = None,
          frozen: Frozen | None = None) -> None:
    """Takes the metrics of a step, which need not have run yet, and what it was given; step: of another program than others."""
    # A small program on CPU has run when the call of it returns. It is read later, the last ones two at once, which would give
    # one of them the time of both, and the other none.
    leaves: list[Any] = [value for value in values.values() if isinstance(value, jax.Array)]
    finished = time.monotonic() if all(leaf.is_ready() for leaf in leaves) else None
    self._waiting = number, values, batch, step or self._step, self._frozen if frozen is None else frozen, finished

  def report(self, state: State) -> None:
    """Writes what waits. `state` may be that of the step or a later one: once something is not finite, it does not change.

    Raises:
      FloatingPointError: a loss, gradient or parameter is not finite, or parameters have diverged beyond all use.
    """
    if self._waiting is None:
      return
    number, values, batch, step, frozen, finished = self._waiting
    self._waiting = None
    numbers = {name: value.tolist() for name, value in jax.device_get(values).items()}
    if numbers.pop('halted'):
      raise FloatingPointError(
          f'step {number}: loss {numbers["loss"]}, gradient norm {numbers["gradient_norm"]}; the first tensor that is not '
          f'finite is {step.explain(state, frozen, batch)}. {self._checkpoints()} {ADVICE}')
    self._writers.step(number, numbers, finished)
    self._check_size(number, numbers.get('parameter_norm', 0.0))

  def _check_size(self, number: int, norm: float) -> None:
    """Says so where parameters are far larger than those of any model that works, and ends the run where they are useless."""
    size = norm / self._root
    if size > DIVERGED:
      raise FloatingPointError(
          f'step {number}: the run has diverged: the parameters have a norm of {norm:.3g}, a root mean square of {size:.3g}. '
          f'{self._checkpoints()} {ADVICE}')
    if size > STRANGE and not self._told:
      self._told = True
      self._writers.note(
          f'step {number}: the parameters have a norm of {norm:.3g}, a root mean square of {size:.3g}: the run seems to have '
          f'diverged. {self._checkpoints()} Later ones will hold such parameters. {ADVICE}')
