"""Training, from top to bottom: mesh, data, step, restore, loop."""

import contextlib
import dataclasses
import functools
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from t5x_cpm import backend, vocabularies
from t5x_cpm import config as config_lib
from t5x_cpm import mesh as mesh_lib
from t5x_cpm.checkpoints import arrays, run_directory
from t5x_cpm.checkpoints.manager import Manager
from t5x_cpm.cluster.group import Group
from t5x_cpm.config import Config, ConfigError, gin
from t5x_cpm.data import reader as reader_lib
from t5x_cpm.tasks import caches
from t5x_cpm.training import host_memory, metrics, optimizer, plots
from t5x_cpm.training import step as step_lib


class Interrupted:
  """Notes SIGTERM and SIGINT, so that the loop can stop between two steps with its state saved.

  Of several processes one alone may be signalled, and all must stop at one step. JAX agrees on it, but hears SIGTERM only,
  with a handler of its own.
  """

  def __init__(self, several: bool) -> None:
    self._signal, self._several = '', several

  def _note(self, number: int, frame: Any) -> None:
    if self._signal and number == signal.SIGINT:
      raise KeyboardInterrupt  # asked twice: now
    self._signal = signal.Signals(number).name
    if self._several:
      os.kill(os.getpid(), signal.SIGTERM)

  def before(self, step: int) -> str:
    """The name of a signal, if all processes are to stop before this step; '' otherwise. To be asked before each step."""
    if self._several:
      return 'SIGTERM' if multihost_utils.reached_preemption_sync_point(step) else ''
    return self._signal

  @contextlib.contextmanager
  def watch(self) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
      yield  # Python delivers signals to the main thread only
      return
    numbers = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, self._note) for number in numbers}
    try:
      yield
    finally:
      for number, handler in previous.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def prefetch(make: Callable[[int], Any], start: int, stop: int, ahead: int = 2) -> Iterator[Iterator[Any]]:
  """make(start), ..., make(stop - 1), computed in a thread that runs at most `ahead` items before its reader."""
  items: queue.Queue[Any] = queue.Queue(maxsize=ahead)
  closed = threading.Event()

  def put(item: Any) -> None:
    while not closed.is_set():
      with contextlib.suppress(queue.Full):
        items.put(item, timeout=0.1)
        return

  def work() -> None:
    try:
      for index in range(start, stop):
        if closed.is_set():
          return
        put(make(index))
    except BaseException as error:  # the loop raises it where it asks for the batch
      put(error)

  def read() -> Iterator[Any]:
    for _ in range(start, stop):
      item = items.get()
      if isinstance(item, BaseException):
        raise item
      yield item

  thread = threading.Thread(target=work, name='input', daemon=True)
  thread.start()
  try:
    yield read()
  finally:
    closed.set()
    thread.join()


def evaluate(step: step_lib.Step, params: Any, reader: reader_lib.Reader, max_batches: int) -> dict[str, float]:
  """Mean loss and accuracy over the targets of the validation split; each row counts once."""
  total: dict[str, tuple[float, float]] = {}
  rows = own_rows(step)
  for batch in reader.eval_batches(max_batches, rows):
    sums = jax.device_get(step.evaluate(params, put_batch(step, batch, rows)))
    for name, (value, weight) in sums.items():
      a, b = total.get(name, (0.0, 0.0))
      total[name] = (a + float(value), b + float(weight))
  return {name: float(value) for name, value in step_lib.means(total).items()}


def validation_reader(config: Config, step: step_lib.Step, say: Callable[[str], None]) -> reader_lib.Reader | None:
  """Opens what the run is evaluated on, once, so that every evaluation is of the same; None where the task has nothing.

  Raises:
    ConfigError: checkpoints are to be ranked by what no evaluation gives.
  """
  options = config.checkpoint
  if options.keep_best:
    names = [f'eval/{name}' for name in jax.eval_shape(
        step.evaluate, host_memory.working(step.abstract_state), step.abstract_batch)]
    if options.best_metric not in names:
      raise ConfigError(f'CheckpointConfig.best_metric = {options.best_metric!r}: expected one of {", ".join(sorted(names))}.')
  try:
    return reader_lib.open_reader(caches.build(config), config, 'validation')
  except reader_lib.EmptySplitError as error:
    if options.keep_best:
      raise ConfigError(f'CheckpointConfig.keep_best = {options.keep_best} needs evaluations, but {error}') from error
    say(f'The run is not evaluated: {error}')
    return None


def own_rows(step: step_lib.Step) -> np.ndarray:
  """The rows of a batch that the devices of this process hold, ascending."""
  leaf = next(iter(step.abstract_batch.values()))
  held = {index[0].indices(leaf.shape[0]) for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values()}
  return np.unique(np.concatenate([np.arange(*rows) for rows in held]))


def put_batch(step: step_lib.Step, batch: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, jax.Array]:
  """The batch on the devices of the mesh, of which this process has `rows`."""

  def put(name: str) -> jax.Array:
    leaf, mine = step.abstract_batch[name], batch[name]

    def part(index: Any) -> np.ndarray:
      return mine[np.searchsorted(rows, np.arange(*index[0].indices(leaf.shape[0])))]

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

  return {name: put(name) for name in batch}


def initial_state(config: Config, step: step_lib.Step, vocabulary: vocabularies.Vocabulary) -> step_lib.State:
  """A fresh state, with the parameters of another run where TrainConfig.init_from names one."""
  state = step.init(jax.random.key(config.train.seed))
  if config.train.init_from:
    source = run_directory.read_run(config.train.init_from)
    theirs = source.info.get('vocabulary')
    if theirs != vocabulary.fingerprint:
      raise ConfigError(
          f'TrainConfig.init_from = {config.train.init_from!r}: that run was trained with another vocabulary ({theirs}, this '
          f'run has {vocabulary.fingerprint}). Set TaskConfig.vocabulary to the one in {config.train.init_from}/vocabulary.')
    state['params'] = arrays.load_params(config.train.init_from, into=step.abstract_state['params'])
    state = step.complete(host_memory.saved(state))
  return state


def run(config: Config, model_dir: str, group: Group | None = None) -> dict[str, float]:
  """Trains until TrainConfig.steps and returns the last evaluation.

  The same call continues a run that was stopped, at the step of its newest complete checkpoint and with the same losses
  bit for bit. SIGTERM and SIGINT save a checkpoint and return.

  Args:
    config: the run. A model_dir that holds a run with another identity is refused.
    model_dir: where checkpoints, metrics and the vocabulary are written; created when absent. Shared by all processes.
    group: the processes that make this call together; None: this one is alone.

  Raises:
    ConfigError: the configuration, data or model_dir cannot work; nothing was changed on disk.
    FloatingPointError: a loss, gradient or parameter is not finite; the message names the first bad tensor.
  """
  config.validate()
  started = time.monotonic()
  group = group or Group()
  backend.use_cpu_devices(config.mesh.cpu_devices, group.count)
  backend.keep_compiled_programs()

  # Mesh. Before the data, because a mesh that cannot work is found in no time and data may take hours to cache.
  mesh = mesh_lib.make_mesh(config.mesh)
  step = step_lib.build(config, mesh)

  # Data. A batch is a pure function of (config, seed, step): there is no iterator whose state could be lost.
  say = functools.partial(print, flush=True) if group.first else lambda text: None
  reader = reader_lib.open_reader(caches.build(config), config, 'train')
  vocabularies.check_size(config.model, reader.vocabulary)
  held_out = validation_reader(config, step, say)
  info = {'vocabulary': reader.vocabulary.fingerprint, 'data': reader.fingerprint}

  # Restore. The manager refuses a model_dir of another run before anything is written to it.
  with contextlib.ExitStack() as until_the_loop:
    manager = until_the_loop.enter_context(Manager(model_dir, config, info=info))
    if group.first:
      reader.vocabulary.save(manager.model_dir / 'vocabulary')
      run_directory.write_atomically(manager.model_dir / 'config.gin', gin.dump(config).encode())
    latest = manager.latest_step()
    if latest is not None and latest >= config.train.steps:
      say(f'{model_dir} is at step {latest} and TrainConfig.steps = {config.train.steps}: nothing to do. '
          'Set TrainConfig.steps higher to go on.')
      return {}
    if latest is None:
      state = initial_state(config, step, reader.vocabulary)
    else:
      state = step.complete(manager.restore(host_memory.saved(step.abstract_state), latest))
      say(f'continuing {model_dir} from step {latest}')
      steps = run_directory.read_run(model_dir, latest).config.train.steps
      before, now = float(optimizer.make_schedule(config.optimizer, steps)(latest)), float(step.schedule(latest))
      if before != now:
        say(f'OptimizerConfig.schedule = {config.optimizer.schedule!r} ends with the run: for TrainConfig.steps = '
            f'{config.train.steps} instead of {steps} the learning rate goes from {before:.3g} to {now:.3g} here. '
            'OptimizerConfig.decay_steps, set from the start, keeps it.')
    first = latest or 0
    writers = metrics.Writers(model_dir, config, start_step=first, total_steps=config.train.steps)
    until_the_loop.pop_all()

  # Loop. Input runs ahead in a thread; metrics are read one step late, when the next step is already dispatched.
  interrupted = Interrupted(several=group.count > 1)
  rows = own_rows(step)
  profile = metrics.Profile(model_dir, config.metrics)
  evaluation: dict[str, float] = {}
  evaluated: int | None = None
  pending: tuple[int, dict[str, jax.Array], Any] | None = None

  def report() -> None:
    nonlocal pending
    if pending is None:
      return
    number, values, batch = pending
    pending = None
    numbers = {name: value.tolist() for name, value in jax.device_get(values).items()}
    if numbers.pop('halted'):
      raise FloatingPointError(
          f'step {number}: loss {numbers["loss"]}, gradient norm {numbers["gradient_norm"]}; the first tensor that is not '
          f'finite is {step.explain(state, {}, batch)}. The last checkpoint is intact. Try a lower '
          'OptimizerConfig.learning_rate or more OptimizerConfig.warmup_steps.')
    writers.step(number, numbers)

  def validation(number: int) -> None:
    nonlocal evaluation, evaluated
    if held_out is None:
      return
    group.at(f'the evaluation after step {number}')
    evaluated = number
    evaluation = evaluate(step, host_memory.working(state), held_out, config.train.eval_batches)
    writers.evaluation(number, evaluation)

  def save(number: int) -> None:
    report()  # a state that is not finite is never saved
    group.at(f'saving step {number}')
    current = evaluation if evaluated == number else {}  # an older evaluation is not of this state
    manager.save(number, host_memory.saved(state), metrics={f'eval/{name}': value for name, value in current.items()} or None)

  def make(index: int) -> Any:
    return put_batch(step, reader.batch(index, rows), rows)

  number = first
  with interrupted.watch(), writers, profile, manager, prefetch(make, first, config.train.steps) as batches:
    if number == config.train.steps:  # no step is asked for: the parameters as they are, evaluated and saved
      validation(number)
      save(number)
    for batch in batches:
      group.at(f'step {number + 1}')
      with profile.step(number):
        state, values = step.fn(state, {}, batch)
      report()
      number += 1
      pending = (number, values, batch)
      if number == first + 1:
        report()
        writers.note(f'first step after {time.monotonic() - started:.1f} s')
      last = number == config.train.steps
      stop = interrupted.before(number + 1)
      if last or (config.train.eval_every and number % config.train.eval_every == 0):
        report()
        validation(number)
      if last or stop or number % config.checkpoint.every == 0:
        save(number)
      if stop and not last:
        writers.note(f'{stop} at step {number}: saved, stopping')
        break
  if group.first:
    plots.plot_loss(model_dir)
    plots.plot_experts(model_dir)
  return evaluation


def describe(config: Config) -> dict[str, Any]:
  """What `--dry_run` prints beside the configuration: parameters, tokens per step, learning rates. Touches no device."""
  from t5x_cpm.models import encoder_decoder

  schedule = optimizer.make_schedule(config.optimizer, config.train.steps)
  steps = sorted({0, config.optimizer.warmup_steps, config.train.steps // 2, config.train.steps})
  slots = config.train.batch_size * (config.task.encoder_length + config.task.decoder_length)
  model = encoder_decoder.build(config.model)
  return {
      'parameters': model.num_parameters(),
      'active parameters': model.num_active_parameters(),
      'slots per step': slots,
      'learning rate': {step: float(schedule(step)) for step in steps},
      'configuration': config_lib.to_dict(dataclasses.replace(config)),
  }
