"""The teachers of a run: which checkpoints they are, and which program takes a step, the guided or, after it, the plain one.

Most runs have one teacher or none. Where tasks of a mixture have teachers of their own, each teaches the rows of its tasks.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
from etils import epath

from t5x_cpm import tuning
from t5x_cpm.checkpoints import arrays, run_directory
from t5x_cpm.checkpoints.run_directory import CheckpointError
from t5x_cpm.chips import GiB
from t5x_cpm.config import Config, ConfigError, ModelConfig
from t5x_cpm.data import taught
from t5x_cpm.data.reader import Reader
from t5x_cpm.training import before, guidance
from t5x_cpm.training import step as step_lib
from t5x_cpm.training.step import Frozen, Step


class Teacher(NamedTuple):
  """The checkpoint of a teacher.

  Attributes:
    model_dir: of its run; or the folder with what it says.
    step: of the checkpoint; of such a folder 0.
    fingerprint: of its stored weights; of such a folder that several teachers spoke in, that of each task's.
    model: its hyperparameters; 'cached' or 'cached by task' where batches bring what it says.
    tasks: whose rows it teaches; () is all rows.
  """

  model_dir: epath.Path
  step: int
  fingerprint: Any
  model: ModelConfig | Literal['cached', 'cached by task']
  tasks: tuple[str, ...] = ()

  @property
  def name(self) -> str:
    """The name of one of several teachers: its tasks."""
    return ', '.join(self.tasks)


def of_runs(config: Config) -> list[Teacher]:
  """The newest checkpoint of each run of TeacherConfig.model_dir.

  Raises:
    CheckpointError: there is none, or it holds a delta.
  """
  found = []
  for folder, taught_tasks in config.teacher.runs.items():
    run = run_directory.read_run(folder)
    run_directory.check_is_model(folder, run.config)
    model_dir = run_directory.resolve(folder)
    found.append(Teacher(model_dir, run.step, tuning.fingerprint(model_dir, run.step), run.config.model, taught_tasks))
  return found


def guide(found: Sequence[Teacher]) -> guidance.Teacher:
  """The teachers of a run as `step.build` takes them."""
  if not found:
    return None
  if not found[0].tasks:
    return found[0].model
  return {one.name: one.model for one in found if isinstance(one.model, ModelConfig)}


def weights(found: Sequence[Teacher]) -> Any:
  """The fingerprint of the weights of the teacher; of several, task -> fingerprint; None for no teacher."""
  if not found:
    return None
  return {task: one.fingerprint for one in found for task in one.tasks} or found[0].fingerprint


def numbers(found: Sequence[Teacher]) -> dict[str, int]:
  """The number of the teacher of each task that has one; {} where one teacher is that of all rows."""
  return {task: number for number, one in enumerate(found) for task in one.tasks}


def model_of(config: Config) -> guidance.Teacher:
  """The models that guide the first steps of a run, for `step.build`. Reads neither weights nor vocabularies.

  Raises:
    ConfigError: there is none, although TeacherConfig says how it teaches; or it does not fit the run.
  """
  if not before.is_guided(config, ''):
    return None
  if config.teacher.cache:
    return 'cached' if isinstance(config.teacher.model_dir, str) else 'cached by task'
  before.check_teachers(config, None)
  return guide(of_runs(config))


def _wanted(found: Teacher, fingerprint: str) -> Teacher:
  """The checkpoint of a teacher's run that has the fingerprint with which a student began."""
  if found.fingerprint == fingerprint:
    return found
  steps = run_directory.read_run(found.model_dir).steps
  for step in reversed(steps):
    if tuning.fingerprint(found.model_dir, step) == fingerprint:
      model = run_directory.read_run(found.model_dir, step).config.model
      return found._replace(step=step, fingerprint=fingerprint, model=model)
  raise CheckpointError(
      f'--teacher={found.model_dir}: the run began with a teacher whose weights have the fingerprint {fingerprint}; those of '
      f'step {found.step} there have {found.fingerprint}{", those of other steps have others" if len(steps) > 1 else ""}. Give '
      'the teacher that it began with.')


def _as_begun(found: Sequence[Teacher], known: Any) -> list[Teacher]:
  """The checkpoints with the weights (see `weights`) with which a student began, in the same runs.

  Raises:
    CheckpointError: a run has none, or other tasks have teachers.
  """
  if not isinstance(known, dict) and not found[0].tasks:
    return [_wanted(found[0], known)]
  began = ' and '.join(sorted(known)) if isinstance(known, dict) else 'all rows'
  given = ' and '.join(sorted(numbers(found))) or 'all rows'
  if began != given:
    raise CheckpointError(f'--teacher: the run began with teachers of {began}, and now there are teachers of {given}. Give '
                          'those that it began with.')
  return [_wanted(one, fingerprint)._replace(tasks=tuple(task for task in one.tasks if known[task] == fingerprint))
          for one in found for fingerprint in dict.fromkeys(known[task] for task in one.tasks)]


def find(config: Config, model_dir: Any) -> list[Teacher]:
  """The teachers of a run: the newest checkpoints of TeacherConfig.model_dir, or those that the run began with.

  Returns:
    [] where no teacher guides any of the steps that are left.

  Raises:
    ConfigError: there is none, or not those that the run began with.
  """
  if not before.is_guided(config, model_dir):
    return []
  if config.teacher.cache:
    folder = pathlib.Path(config.teacher.cache).expanduser()
    of = taught.describe(folder)['key']['teacher']
    return [Teacher(epath.Path(folder), 0, of, 'cached by task' if isinstance(of, dict) else 'cached')]
  found, known = of_runs(config), before.known_teacher(model_dir)
  return found if known is None else _as_begun(found, known['weights'])


def info(config: Config, model_dir: Any, found: Sequence[Teacher]) -> dict[str, Any]:
  """What a checkpoint says of its teachers, which a run that continues must have the same.

  Args:
    config: the run.
    model_dir: of the run.
    found: the teachers; () where none guides the steps that are left.
  """
  if not found:
    known = before.known_teacher(model_dir)
    return {} if known is None else {'teacher': known}
  return {'teacher': {'weights': weights(found), 'cached': bool(config.teacher.cache)}}


def batches(config: Config, reader: Reader, found: Sequence[Teacher]) -> Reader | taught.WithTeacher:
  """The batches of a run: those of the reader, with who teaches which row, and with what they say where that is cached.

  Raises:
    ConfigError: it is the word of another teacher, or of other rows, or of fewer steps.
  """
  steps = config.teacher.guided(config.train.steps)
  if not found or isinstance(found[0].model, ModelConfig):
    return taught.WithTeacher(reader, steps, numbers(found)) if numbers(found) else reader
  folder, of = pathlib.Path(found[0].model_dir), weights(of_runs(config) or found)
  said = taught.Taught(folder, taught.key(config, reader, of), steps, (config.train.batch_size, config.task.decoder_length))
  if missing := said.missing:
    raise ConfigError(f'--teacher_cache={folder} has nothing for step {said.steps_of(missing[0])[-1] + 1}, and a '
                      f'teacher guides this run up to step {steps}: `t5x_cpm cache` with the same --teacher, gin files and '
                      'flags goes on.')
  return taught.WithTeacher(reader, steps, dict.fromkeys(of, 0) if isinstance(of, dict) else {}, said)


class Steps:
  """The programs of a run: the guided step for its first steps, with the teachers, then the plain one, without them.

  Attributes:
    plain: the step without a teacher, which also evaluates and says what a state is.
    last_guided: the last step, counted from 1, that the teacher guides; 0: none.
  """

  def __init__(self, config: Config, mesh: jax.sharding.Mesh, teacher: guidance.Teacher):
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

  def load(self, frozen: Frozen, found: Sequence[Teacher]) -> None:
    """Takes what all steps read, and loads the weights of the teachers."""
    self._frozen = frozen
    if self.guided is None or 'teacher' not in self.guided.abstract_frozen:
      return
    into = self.guided.abstract_frozen['teacher']
    loaded = {one.name: arrays.load_params(one.model_dir, step=one.step, into=into[one.name] if one.tasks else into)
              for one in found}
    self._weights = {'teacher': loaded if found[0].tasks else loaded['']}

  def of(self, number: int) -> Step:
    """The program of a step, counted from 1."""
    return self.guided if self.guided is not None and number <= self.last_guided else self.plain

  def at(self, number: int) -> tuple[Step, Frozen]:
    """The program of a step, counted from 1, and what it reads. Once no teacher guides, its weights are let go."""
    if number > self.last_guided:
      self.guided, self._weights = None, {}
    return self.of(number), self._frozen | self._weights


def tell(found: Sequence[Teacher], config: Config, steps: Steps, say: Callable[[str], None]) -> None:
  """Says who guides the run, for how long, and how large each teacher is."""
  assert steps.guided is not None
  course = f'Its share in the loss begins with {config.teacher.alpha:g} ({config.teacher.schedule}).'
  for one in found:
    if not isinstance(one.model, ModelConfig):
      of = one.fingerprint
      who = (f'teachers of {", ".join(f"{task} (weights {of[task]})" for task in of)} do' if isinstance(of, dict) else
             f'teacher (weights {of}) does')
      say(f'{one.model_dir} says what the {who}, up to step {steps.last_guided}. {course}')
      continue
    into = steps.guided.abstract_frozen['teacher']
    leaves = jax.tree.leaves(into[one.name] if one.tasks else into)
    size, whose = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves), f' of {one.name}' if one.tasks else ''
    say(f'{one.model_dir} at step {one.step} (weights {one.fingerprint}) is the teacher{whose} up to step '
        f'{steps.last_guided}: {sum(leaf.size for leaf in leaves):,} parameters, {size / GiB:.3g} GiB. {course}')
