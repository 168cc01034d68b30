"""What a teacher says of the rows of a run, written once to a folder and read back with the batches.

  about.json    whose word it is of which rows (`key`), and for how many steps
  000000.said   some steps: their number, how many targets each row has, a record for each target, and a digest of all this

Only targets whose loss counts have a record: that of `distributions` for the K most probable tokens; for K = 0 the logits of
all tokens, float32, so that nothing is lost. A file is complete or not there, so that making them goes on after a kill.

Where tasks of a mixture have teachers of their own, batches have the number of each row's teacher as `teacher` [rows], -1 for
none; targets of a row without one have no record.
"""

import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from t5x_cpm import files, stored
from t5x_cpm.config import Config, ConfigError
from t5x_cpm.data import distributions
from t5x_cpm.data.reader import EVERY, Batch, Reader

FORMAT = 1
FILE_BYTES = 1 << 24  # of records in a file, at most: what a kill may lose. Another number is another format.
REMEDY = 'Make it again: remove the folder, and start `t5x_cpm cache --teacher=DIR` once more.'
_DIGEST = 12


def _is_teacher(value: Any) -> bool:
  """Whether a value of `key` is a fingerprint of weights, or has one for each task."""
  return isinstance(value, str) or (isinstance(value, dict) and not stored.mismatch(value, {str: str}))


_FORM = {'format': int, 'steps': stored.COUNT, 'key': {
    'teacher': _is_teacher, 'vocab_size': stored.COUNT, 'top_k': stored.COUNT, 'temperature': float,
    'rows': {str: lambda value: True}}}


def key(config: Config, reader: Reader, teacher: str | dict[str, str]) -> dict[str, Any]:
  """What the content of a folder depends on; teacher: the fingerprint of its weights, or of the weights for each task."""
  given = config.teacher
  return {'teacher': teacher, 'vocab_size': config.model.vocab_size, 'top_k': given.top_k,
          'temperature': given.temperature if given.top_k else 0.0, 'rows': reader.fingerprint}


def _differences(saved: Any, given: Any, name: str = '') -> list[str]:
  """What differs between two JSON trees."""
  if isinstance(saved, Mapping) and isinstance(given, Mapping):
    both = sorted(saved.keys() | given.keys())
    return [line for part in both for line in _differences(saved.get(part), given.get(part), f'{name}.{part}'.lstrip('.'))]
  return [] if saved == given else [f'{name} is {str(saved)[:100]} there, {str(given)[:100]} here']


def describe(folder: pathlib.Path) -> dict[str, Any]:
  """What about.json says.

  Raises:
    ConfigError: there is none, or it is damaged or of another version.
  """
  if not (folder / 'about.json').is_file():
    raise ConfigError(f'--teacher_cache={folder} holds nothing of a teacher: `t5x_cpm cache --teacher=DIR --teacher_cache='
                      f'{folder}`, with the gin files and flags of the run, makes it.')
  about = stored.parse(folder / 'about.json', REMEDY)
  if about.get('format') != FORMAT:
    raise ConfigError(f'--teacher_cache={folder} has format {about.get("format")}, expected {FORMAT}. {REMEDY}')
  stored.require(folder / 'about.json', about, _FORM, REMEDY)
  return about


def counted(batch: Batch) -> np.ndarray:
  """The targets of a batch that a teacher speaks of: bool [rows, T]."""
  counts_BT = batch['decoder_loss_weights'] != 0
  return counts_BT & (batch['teacher'] >= 0)[:, None] if 'teacher' in batch else counts_BT


class Taught:
  """A folder with what a teacher says of the rows of a reader.

  Attributes:
    steps: how many steps it is for.
    record: bytes of a target.
    per_file: steps of a file.
  """

  def __init__(self, folder: pathlib.Path, wanted: dict[str, Any], steps: int, shape: tuple[int, int]):
    """Opens a folder, to read it or to write what is missing.

    Args:
      folder: of the files.
      wanted: the key.
      steps: how many steps it is needed for.
      shape: rows and decoder slots of a batch.

    Raises:
      ConfigError: it is the word of another teacher, or of other rows; says what differs.
    """
    self.folder, self.steps, self.shape = folder, steps, shape
    self.K, self.V = wanted['top_k'], wanted['vocab_size']
    self.record = distributions.record_bytes(self.K, self.V) if self.K else 4 * self.V
    self.per_file = max(1, min(FILE_BYTES // (shape[0] * shape[1] * self.record), 1000))
    self._open: tuple[int, np.ndarray, np.ndarray] | None = None  # number, where each row begins, records
    if (folder / 'about.json').is_file():
      found = _differences(describe(folder)['key'], wanted)
      if found:
        more = f' (and {len(found) - 1} more)' if len(found) > 1 else ''
        raise ConfigError(f'--teacher_cache={folder} was made for another teacher or other rows: {found[0]}{more}. Give '
                          'another folder, or the values that it was made with.')

  def path(self, number: int) -> pathlib.Path:
    """The file of a number."""
    return self.folder / f'{number:06d}.said'

  def steps_of(self, number: int) -> range:
    """The steps whose rows a file has, counted from 0."""
    return range(number * self.per_file, min((number + 1) * self.per_file, self.steps))

  def is_there(self, number: int) -> bool:
    """Whether a file has all that is needed of it."""
    try:
      with open(self.path(number), 'rb') as file:
        return int.from_bytes(file.read(4), 'little') >= len(self.steps_of(number))
    except OSError:
      return False

  @property
  def missing(self) -> list[int]:
    """The numbers of files that are still to be made."""
    return [number for number in range(-(-self.steps // self.per_file)) if not self.is_there(number)]

  def start(self, wanted: dict[str, Any]) -> None:
    """Writes about.json, unless it is there and for as many steps."""
    self.folder.mkdir(parents=True, exist_ok=True)
    if not (self.folder / 'about.json').is_file() or describe(self.folder)['steps'] < self.steps:
      stored.write(self.folder / 'about.json', {'format': FORMAT, 'steps': self.steps, 'key': wanted})

  def write(self, number: int, counts: np.ndarray, records: np.ndarray) -> None:
    """Writes a file: how many targets each row has, [steps, rows], and the record of each target, uint8 [n, bytes]."""
    content = len(counts).to_bytes(4, 'little') + counts.astype('<u4').tobytes() + records.tobytes()
    files.write_atomically(self.path(number), content + hashlib.blake2b(content, digest_size=_DIGEST).digest())

  def pack(self, said: Mapping[str, np.ndarray], counts: np.ndarray) -> np.ndarray:
    """The records, uint8 [n, bytes], of the targets that count (bool [rows, T]) of what a teacher says of some rows."""
    if not self.K:
      return np.ascontiguousarray(said['teacher_logits'][counts], '<f4').view(np.uint8)
    return distributions.pack(said['teacher_ids'][counts], said['teacher_probs'][counts], self.V)

  def _read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the records of each row of a file begin, [steps * rows + 1], and the records."""
    if self._open is None or self._open[0] != number:
      content = stored.content(self.path(number), REMEDY)
      body = content[:-_DIGEST]
      if hashlib.blake2b(body, digest_size=_DIGEST).digest() != content[-_DIGEST:]:
        raise stored.DamagedError(self.path(number), 'it does not have its digest', REMEDY)
      rows = int.from_bytes(body[:4], 'little') * self.shape[0]
      counts = np.frombuffer(body, '<u4', rows, 4)
      self._open = (number, np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
                    np.frombuffer(body, np.uint8, offset=4 + 4 * rows).reshape(-1, self.record))
    return self._open[1:]

  def add(self, batch: Batch, step: int, rows: np.ndarray) -> Batch:
    """A batch with what the teacher says of it.

    Args:
      batch: these rows of the batch of a step.
      step: its number, from 0.
      rows: which rows of the whole batch, as numbers.

    Raises:
      ConfigError: a file is missing or damaged, or is about other rows.
    """
    number = step // self.per_file
    begin, records = self._read(number)
    place = (step - number * self.per_file) * self.shape[0] + rows
    counts = counted(batch)
    if (begin[place + 1] - begin[place] != counts.sum(axis=1)).any():
      raise stored.DamagedError(self.path(number), 'its rows have other targets than those of the run', REMEDY)
    mine = np.concatenate([np.arange(begin[at], begin[at + 1]) for at in place])
    if not self.K:
      logits = np.zeros((*counts.shape, self.V), np.float32)
      logits[counts] = records[mine].view('<f4')
      return batch | {'teacher_logits': logits}
    ids, probs = np.zeros((*counts.shape, self.K), np.int32), np.zeros((*counts.shape, self.K), np.float32)
    ids[counts], probs[counts] = distributions.unpack(records[mine], self.K, self.V)
    return batch | {'teacher_ids': ids, 'teacher_probs': probs}


class WithTeacher:
  """Batches of a reader, the first ones with the number of the teacher of each row, or with what a teacher says of them."""

  def __init__(self, reader: Reader, steps: int, numbers: Mapping[str, int], taught: Taught | None = None):
    """Args:
      reader: makes the batches.
      steps: how many of them have it.
      numbers: of the teacher of each task that has one; {}: one teacher is that of all rows.
      taught: what it says; None: nothing yet.
    """
    self._reader, self._steps, self._taught = reader, steps, taught
    self._numbers = np.array([numbers.get(component.name, -1) for component in reader.components] if numbers else [], np.int32)

  def batch(self, step: int, rows: slice | np.ndarray = EVERY) -> Batch:
    """As that of the reader."""
    rows = np.arange(self._reader.batch_size)[rows]
    batch = self._reader.batch(step, rows)
    if step >= self._steps:
      return batch
    if self._numbers.size:
      batch['teacher'] = self._numbers[self._reader.components_of(step, rows)]
    return batch if self._taught is None else self._taught.add(batch, step, rows)
