"""`cache --teacher`: runs a teacher over the rows that a run will be guided on, once, and writes down what it says."""

import functools
import pathlib
import shutil
from collections.abc import Callable

import jax
import numpy as np

from t5x_cpm import backend, files
from t5x_cpm import mesh as mesh_lib
from t5x_cpm.checkpoints import arrays, run_directory
from t5x_cpm.chips import GiB
from t5x_cpm.config import Config, ConfigError, ModelConfig
from t5x_cpm.data import reader as reader_lib
from t5x_cpm.data.taught import Taught, WithTeacher, counted, key
from t5x_cpm.models import encoder_decoder
from t5x_cpm.progress import Progress
from t5x_cpm.tasks import caches
from t5x_cpm.training import before, guidance, teachers
from t5x_cpm.training import layout as layout_lib

SAMPLED = 4  # batches by which the size of the whole is foretold


class _Speaker:
  """Asks a teacher about rows of the batches of a run."""

  def __init__(self, config: Config, teacher: teachers.Teacher):
    assert isinstance(teacher.model, ModelConfig)
    mesh = mesh_lib.make_mesh(config.mesh)
    layout = layout_lib.make(config, mesh, None, teacher.model)
    into = layout.abstract_frozen['teacher']
    self._places = {name: leaf.sharding for name, leaf in layout.abstract_batch.items()}
    self._weights = arrays.load_params(teacher.model_dir, step=teacher.step, into=into)
    ask = functools.partial(guidance.of_teacher, config.teacher, encoder_decoder.build(teacher.model))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    self._ask = jax.jit(mesh_lib.traced(mesh, ask), in_shardings=(layout_lib.shardings_of(into), self._places),
                        out_shardings=whole)

  def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    placed = {name: jax.device_put(batch[name], place) for name, place in self._places.items()}
    return jax.device_get(self._ask(self._weights, placed))


def _records(taught: Taught, batch: dict[str, np.ndarray], speakers: list[_Speaker]) -> np.ndarray:
  """The records of some rows, uint8 [n, bytes], each the word of its teacher. A teacher without a row here is not asked."""
  counts = counted(batch)
  found = np.zeros((*counts.shape, taught.record), np.uint8)
  for number, speaker in enumerate(speakers):
    mine = counts & (batch['teacher'] == number)[:, None] if 'teacher' in batch else counts
    if mine.any():
      found[mine] = taught.pack(speaker(batch), mine)
  return found[counts]


def _shown(size: float) -> str:
  return f'{size / GiB:.3g} GiB' if size >= 0.1 * GiB else f'{size / 2**20:.3g} MiB'


def _make_file(taught: Taught, number: int, reader: WithTeacher, speakers: list[_Speaker], microbatches: int,
               report: Callable[[int], None]) -> None:
  """Writes a file; `report` is told the targets of each step."""
  counts, records = [], []
  for step in taught.steps_of(number):
    for rows in np.split(np.arange(taught.shape[0]), microbatches):
      batch = reader.batch(step, rows)
      counts.append(counted(batch).sum(axis=1))
      records.append(_records(taught, batch, speakers))
    report(sum(map(len, records[-microbatches:])))
  taught.write(number, np.concatenate(counts).reshape(-1, taught.shape[0]), np.concatenate(records))


def _check_room(taught: Taught, reader: WithTeacher) -> str:
  """What the missing files take, in words. Raises ConfigError where the disk has no room for them."""
  steps = sum(len(taught.steps_of(number)) for number in taught.missing)
  some = range(min(SAMPLED, taught.steps))
  targets = sum(int(counted(reader.batch(step)).sum()) for step in some) / max(len(some), 1)
  size, free = steps * targets * taught.record, shutil.disk_usage(taught.folder).free
  told = (f'{steps:,} steps, about {steps * targets:,.0f} targets of {taught.record:,} bytes: {_shown(size)}; the disk of '
          f'{taught.folder} has {_shown(free)} free')
  if 1.05 * size > free:
    raise ConfigError(f'--teacher_cache={taught.folder} needs room for {told}. Make room, or lower TeacherConfig.steps or '
                      'TeacherConfig.top_k (0 stores the logits of all tokens).')
  return told


def _fill(config: Config, taught: Taught, reader: WithTeacher, found: list[teachers.Teacher], told: str) -> None:
  """Makes the files that are missing, after saying `told`."""
  missing = taught.missing
  if not missing:
    return
  speakers = [_Speaker(config, teacher) for teacher in found]
  progress = Progress('teacher', 'step', taught.steps, taught.steps - sum(len(taught.steps_of(one)) for one in missing))
  progress.note(told)
  done = targets = 0

  def report(count: int) -> None:
    nonlocal done, targets
    done, targets = done + 1, targets + count
    progress.show(progress.before + done, f'{progress.rate(targets):,.0f} targets/s')

  for number in missing:
    _make_file(taught, number, reader, speakers, config.train.microbatches, report)
  progress.close()


def make(config: Config) -> pathlib.Path:
  """Writes what TeacherConfig.model_dir says of the rows of the guided steps to TeacherConfig.cache, and returns the folder.

  The same call goes on after it was stopped, and adds to a folder that was made for fewer steps.

  Raises:
    ConfigError: no folder is given, it is that of another teacher or of other rows, or the disk has no room.
  """
  if not config.teacher.cache:
    raise ConfigError('cache --teacher=DIR needs --teacher_cache=DIR, the folder to write to.')
  if not config.teacher.guided(config.train.steps):
    raise ConfigError(f'TeacherConfig.alpha = {config.teacher.alpha} and TrainConfig.steps = {config.train.steps}: no step of '
                      'the run is guided by a teacher, so there is nothing to write.')
  before.check(config)
  found = teachers.of_runs(config)
  folder = pathlib.Path(config.teacher.cache).expanduser()
  if folder.exists() and not (folder / 'about.json').is_file() and (not folder.is_dir() or any(folder.iterdir())):
    raise ConfigError(f'--teacher_cache={folder} is not empty, and not made by `cache --teacher`: give a new folder.')
  backend.use_cpu_devices(config.mesh.cpu_devices, 1)
  reader = reader_lib.open_reader(caches.build(config), config, 'train')
  wanted = key(config, reader, teachers.weights(found))
  steps, shape = config.teacher.guided(config.train.steps), (config.train.batch_size, config.task.decoder_length)
  taught, batches = Taught(folder, wanted, steps, shape), WithTeacher(reader, steps, teachers.numbers(found))
  with run_directory.writing(folder):
    folder.mkdir(parents=True, exist_ok=True)
    try:
      with files.lock(folder / '.lock', wait=False):
        told = _check_room(taught, batches)
        taught.start(wanted)
        _fill(config, taught, batches, found, told)
    except files.LockedError as error:
      raise ConfigError(f'--teacher_cache={folder} is in use: {error} writes there.') from None
  return folder
