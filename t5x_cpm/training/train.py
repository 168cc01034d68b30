"""Training, from top to bottom: mesh, step, data, restore, loop."""

import contextlib
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax

from t5x_cpm import backend, files, tuning
from t5x_cpm import mesh as mesh_lib
from t5x_cpm.checkpoints import run_directory
from t5x_cpm.checkpoints.manager import Manager
from t5x_cpm.cluster.group import Group
from t5x_cpm.config import Config, gin
from t5x_cpm.data import reader as reader_lib
from t5x_cpm.data import report
from t5x_cpm.tasks import caches
from t5x_cpm.training import batches, before, deltas, host_memory, metrics, optimizer, plots, start, teachers, validation
from t5x_cpm.training.interrupts import Interrupted
from t5x_cpm.training.profile import Profile


def _must_stay(config: Config, model_dir: str, reader: reader_lib.Reader, base: tuning.Base | None,
               guides: Sequence[teachers.Teacher]) -> dict[str, Any]:
  """What a checkpoint says besides the configuration, which must be the same when the run is continued."""
  info: dict[str, Any] = {'vocabulary': reader.vocabulary.fingerprint, 'data': reader.fingerprint}
  info |= {'base': base.fingerprint} if base else {}
  info |= {'first_step': before.first_step(config, model_dir)} if config.train.go_on else {}
  return info | teachers.info(config, model_dir, guides)


def _write_beginning(manager: Manager, reader: reader_lib.Reader, config: Config) -> None:
  """Writes what a model_dir has before its first checkpoint: the vocabulary and the configuration."""
  with run_directory.writing(manager.model_dir):
    reader.vocabulary.save(manager.model_dir / 'vocabulary')
    files.write_atomically(manager.model_dir / 'config.gin', gin.dump(config).encode())


def _draw(manager: Manager, model_dir: str) -> None:
  """Draws the pictures of a run."""
  with run_directory.writing(manager.model_dir):
    plots.plot_loss(model_dir)
    plots.plot_experts(model_dir)


def _last_evaluation(model_dir: str, step: int) -> dict[str, float]:
  """The evaluation that a checkpoint was saved with."""
  return {name.removeprefix('eval/'): value for name, value in run_directory.read_run(model_dir, step).metrics.items()}


def run(config: Config, model_dir: str, group: Group | None = None,
        make_answers: validation.MakeAnswers | None = None) -> dict[str, float]:
  """Trains until TrainConfig.steps and returns the last evaluation; of the last checkpoint where there is nothing to do.

  The same call continues a run that was stopped, at the step of its newest complete checkpoint and with the same losses
  bit for bit. SIGTERM and SIGINT save a checkpoint and return.

  Args:
    config: the run. A model_dir that holds a run with another identity is refused.
    model_dir: where checkpoints, metrics and the vocabulary are written; created when absent. Shared by all processes.
    group: the processes that make this call together; None: this process is alone.
    make_answers: measures answers, for CheckpointConfig.best_metric: `inference.in_training.answers`.

  Raises:
    ConfigError: the configuration, the data or model_dir cannot be used, or a checkpoint cannot be written.
    FloatingPointError: a loss, gradient or parameter is not finite; the message names the first bad tensor.
  """
  config.validate()
  config = before.with_vocab_size(config, model_dir)
  before.check(config, model_dir)
  started = time.monotonic()
  steps = config.train.steps
  group = group or Group()
  say = functools.partial(print, flush=True) if group.first else lambda text: None

  # Mesh and step. Before the data, because a mesh that cannot work is found in no time and data may take hours to cache.
  backend.use_cpu_devices(config.mesh.cpu_devices, group.count)
  backend.keep_compiled_programs()
  mesh = mesh_lib.make_mesh(config.mesh)
  guides = teachers.find(config, model_dir)
  programs = teachers.Steps(config, mesh, teachers.guide(guides))
  step = programs.plain
  base = deltas.find(config, model_dir)
  may_differ = ('base',) if config.delta.allow_other_base else ()
  config = deltas.as_saved(config)
  answers = validation.check_metric(config, step, mesh, make_answers)

  # Data. A batch is a pure function of (config, seed, step): there is no iterator whose state could be lost.
  reader = reader_lib.open_reader(caches.build(config), config, 'train')
  for line in report.of_reader(reader) if group.first else ():
    say(f'data: {line}')
  held_out = validation.open_reader(config, say)
  if answers:
    say(f'data: {answers.note}; the {config.checkpoint.best_mode}imum of {config.checkpoint.best_metric} is the best')
  taught = teachers.batches(config, reader, guides)
  begins = before.first_step(config, model_dir)
  info = _must_stay(config, model_dir, reader, base, guides)

  # Restore. The manager refuses a model_dir of another run before anything is written to it.
  with contextlib.ExitStack() as until_the_loop:
    manager = until_the_loop.enter_context(Manager(model_dir, config, info=info, may_differ=may_differ))
    if group.first:
      _write_beginning(manager, reader, config)
    latest = manager.latest_step()
    patience = validation.Patience(config.checkpoint, model_dir, begins, latest or begins)
    if latest is not None and (latest >= steps or patience.reason):
      if base:
        deltas.mend(base, config, step, manager, latest)
      say(start.why_nothing_is_done(config, model_dir, latest, patience.reason))
      return _last_evaluation(model_dir, latest)
    frozen = deltas.load(base, step)
    if base:
      deltas.tell(base, config, step, say)
    programs.load(frozen, guides)
    if guides:
      teachers.tell(guides, config, programs, say)
    state = start.begin(config, model_dir, step, frozen, manager, reader.vocabulary, say)
    start.tell_of_little_room(manager.model_dir, host_memory.saved(step.abstract_state), say)
    first = begins if latest is None else latest
    writers = metrics.Writers(model_dir, config, start_step=first, total_steps=steps)
    until_the_loop.pop_all()

  # Loop. Input runs ahead in a thread; metrics are read one step late, when the next step is already dispatched.
  interrupted = Interrupted(several=group.count > 1)
  profile = Profile(model_dir, config.metrics)
  late = metrics.LateMetrics(step, frozen, writers, manager.last_words)
  evaluation: dict[str, float] = {}
  with (interrupted.noting(), writers, profile, manager,
        batches.training_batches(programs.of, taught, first, steps) as rows):
    joins = latest is None and begins > 0  # it goes on with another run: what it begins with is evaluated, too
    for number in range(first + (not joins), steps + 1) or [first]:  # if no step is asked for, only the parameters as they are
      if number > first:
        batch = next(rows)
        group.at(f'step {number}')
        program, reads = programs.at(number)
        with profile.step(number - 1):
          state, values = program.fn(state, reads, batch)
        late.report(state)
        late.add(number, values, batch, program, reads)
        del reads
      if number == first + 1:
        late.report(state)
        writers.note(f'first step after {time.monotonic() - started:.1f} s')

      last = number == steps
      stop = interrupted.before(number + 1)
      current: dict[str, float] = {}  # an older evaluation is not of this state
      is_due = last or (joins and number == first) or (config.train.eval_every and number % config.train.eval_every == 0)
      if held_out and is_due:
        late.report(state)
        group.at(f'the evaluation after step {number}')
        evaluation = current = validation.evaluate(step, state, frozen, held_out, config.train.eval_batches, answers)
        writers.evaluation(number, current)
      measured = {f'eval/{name}': value for name, value in current.items()}
      stop = stop or (patience.add(number, measured) if measured else '')
      if last or stop or number % config.checkpoint.every == 0 or manager.is_among_best(measured):
        late.report(state)  # a state that is not finite is never saved
        group.at(f'saving step {number}')
        manager.save(number, host_memory.saved(state), metrics=measured, axes=step.axes)
        if base:
          deltas.write(base, config, step, manager, state, measured)
      if stop and not last:
        writers.note(f'{stop} at step {number}: saved, stopping')
        break
  if group.first:
    _draw(manager, model_dir)
  return evaluation


def describe(config: Config) -> dict[str, Any]:
  """What `--dry_run` prints besides the configuration: parameters, tokens per step, learning rates. Touches no device."""
  schedule = optimizer.make_schedule(config.optimizer, config.train.steps)
  steps = sorted({0, config.optimizer.warmup_steps, config.train.steps // 2, config.train.steps})
  slots = config.train.batch_size * (config.task.encoder_length + config.task.decoder_length)
  model = tuning.build_model(config)
  return {
      'parameters': model.num_parameters(),
      'active parameters': model.num_active_parameters(),
      'trained parameters': sum(leaf.size for leaf in jax.tree.leaves(model.leaves().get('delta', {}))),
      'slots per step': slots,
      'learning rate': {step: float(schedule(step)) for step in steps},
  }
