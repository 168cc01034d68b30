"""The teacher of a run: which checkpoint it is, and which program takes a step, the guided one or, after it, the plain one."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from etils import epath

from t5x_cpm import tuning
from t5x_cpm.checkpoints import arrays, run_directory
from t5x_cpm.checkpoints.run_directory import CheckpointError
from t5x_cpm.chips import GiB
from t5x_cpm.config import Config, ConfigError
from t5x_cpm.data import taught
from t5x_cpm.data.reader import Reader
from t5x_cpm.training import before, layout
from t5x_cpm.training import step as step_lib
from t5x_cpm.training.step import Frozen, Step


class Teacher(NamedTuple):
  """The checkpoint of a teacher.

  Attributes:
    model_dir: of its run; or the folder with what it says.
    step: of the checkpoint; of such a folder 0.
    fingerprint: of its stored weights.
    model: its hyperparameters; 'cached' where batches bring what it says.
  """

  model_dir: epath.Path
  step: int
  fingerprint: str
  model: layout.Teacher


def of_run(config: Config) -> Teacher:
  """The newest checkpoint of TeacherConfig.model_dir. Raises CheckpointError where there is none, or it holds a delta."""
  run = run_directory.read_run(config.teacher.model_dir)
  run_directory.check_is_model(config.teacher.model_dir, run.config)
  model_dir = run_directory.resolve(config.teacher.model_dir)
  return Teacher(model_dir, run.step, tuning.fingerprint(model_dir, run.step), run.config.model)


def model_of(config: Config) -> layout.Teacher:
  """The model that guides the first steps of a run, for `step.build`. Reads neither weights nor vocabularies.

  Raises:
    ConfigError: there is none, although TeacherConfig says how it teaches; or it does not fit the run.
  """
  if not before.is_guided(config, ''):
    return None
  if config.teacher.cache:
    return 'cached'
  before.check_teacher(config, None)
  return run_directory.read_run(config.teacher.model_dir).config.model


def _wanted(found: Teacher, fingerprint: str) -> Teacher:
  """The checkpoint of a teacher's run that has the fingerprint with which a student began."""
  steps = run_directory.read_run(found.model_dir).steps
  for step in reversed(steps):
    if tuning.fingerprint(found.model_dir, step) == fingerprint:
      return Teacher(found.model_dir, step, fingerprint, run_directory.read_run(found.model_dir, step).config.model)
  raise CheckpointError(
      f'--teacher={found.model_dir}: the run began with a teacher whose weights have the fingerprint {fingerprint}; those of '
      f'step {found.step} there have {found.fingerprint}{", those of other steps have others" if len(steps) > 1 else ""}. Give '
      'the teacher that it began with.')


def find(config: Config, model_dir: Any) -> Teacher | None:
  """The teacher of a run: the newest checkpoint of TeacherConfig.model_dir, or the one that the run began with.

  Returns:
    None where no teacher guides any of the steps that are left.

  Raises:
    ConfigError: there is none, or not the one that the run began with.
  """
  if not before.is_guided(config, model_dir):
    return None
  if config.teacher.cache:
    folder = pathlib.Path(config.teacher.cache).expanduser()
    return Teacher(epath.Path(folder), 0, taught.describe(folder)['key']['teacher'], 'cached')
  found = of_run(config)
  known = before.known_teacher(model_dir)
  return found if known is None or known['weights'] == found.fingerprint else _wanted(found, known['weights'])


def info(config: Config, model_dir: Any, fingerprint: str | None) -> dict[str, Any]:
  """What a checkpoint says of its teacher, which a run that continues must have the same.

  Args:
    config: the run.
    model_dir: of the run.
    fingerprint: of the teacher's weights; None where none guides the steps that are left.
  """
  if fingerprint is None:
    known = before.known_teacher(model_dir)
    return {} if known is None else {'teacher': known}
  return {'teacher': {'weights': fingerprint, 'cached': bool(config.teacher.cache)}}


def batches(config: Config, reader: Reader, teacher: Teacher | None) -> Reader | taught.WithTeacher:
  """The batches of a run: those of the reader, with what the teacher says of them where that is cached.

  Raises:
    ConfigError: it is the word of another teacher, or of other rows, or of fewer steps.
  """
  if teacher is None or teacher.model != 'cached':
    return reader
  weights = of_run(config).fingerprint if config.teacher.model_dir else teacher.fingerprint
  steps, shape = config.teacher.guided(config.train.steps), (config.train.batch_size, config.task.decoder_length)
  found = taught.Taught(pathlib.Path(teacher.model_dir), taught.key(config, reader, weights), steps, shape)
  if missing := found.missing:
    raise ConfigError(f'--teacher_cache={teacher.model_dir} has nothing for step {found.steps_of(missing[0])[-1] + 1}, and a '
                      f'teacher guides this run up to step {steps}: `t5x_cpm cache` with the same --teacher, gin files and '
                      'flags goes on.')
  return taught.WithTeacher(reader, found)


class Steps:
  """The programs of a run: the guided step for its first steps, with the teacher, then the plain one, without it.

  Attributes:
    plain: the step without a teacher, which also evaluates and says what a state is.
    last_guided: the last step, counted from 1, that the teacher guides; 0: none.
  """

  def __init__(self, config: Config, mesh: jax.sharding.Mesh, teacher: layout.Teacher):
    """Args:
      config: the run.
      mesh: its mesh.
      teacher: as in `step.build`.
    """
    self.plain = step_lib.build(config, mesh)
    self.guided = step_lib.build(config, mesh, teacher=teacher) if teacher else None
    self.last_guided = config.teacher.guided(config.train.steps) if teacher else 0
    self._frozen: Frozen = {}
    self._weights: Frozen = {}

  def load(self, frozen: Frozen, teacher: Teacher | None) -> None:
    """Takes what all steps read, and loads the weights of the teacher."""
    self._frozen = frozen
    if teacher is not None and self.guided is not None and teacher.model != 'cached':
      into = self.guided.abstract_frozen['teacher']
      self._weights = {'teacher': arrays.load_params(teacher.model_dir, step=teacher.step, into=into)}

  def of(self, number: int) -> Step:
    """The program of a step, counted from 1."""
    return self.guided if self.guided is not None and number <= self.last_guided else self.plain

  def at(self, number: int) -> tuple[Step, Frozen]:
    """The program of a step, counted from 1, and what it reads. Once no teacher guides, its weights are let go."""
    if number > self.last_guided:
      self.guided, self._weights = None, {}
    return self.of(number), self._frozen | self._weights


def tell(teacher: Teacher, config: Config, steps: Steps, say: Callable[[str], None]) -> None:
  """Says who guides the run, for how long, and how large the teacher is."""
  assert steps.guided is not None
  course = f'Its share in the loss begins with {config.teacher.alpha:g} ({config.teacher.schedule}).'
  if teacher.model == 'cached':
    say(f'{teacher.model_dir} says what the teacher (weights {teacher.fingerprint}) does, up to step {steps.last_guided}. '
        f'{course}')
    return
  leaves = jax.tree.leaves(steps.guided.abstract_frozen['teacher'])
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
  say(f'{teacher.model_dir} at step {teacher.step} (weights {teacher.fingerprint}) is the teacher up to step '
      f'{steps.last_guided}: {sum(leaf.size for leaf in leaves):,} parameters, {size / GiB:.3g} GiB. {course}')
