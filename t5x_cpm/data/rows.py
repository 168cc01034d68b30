"""One task's stream of rows: what all objectives have in common.

A row is found by its number, without a list of rows: a keyed permutation says which row of its epoch it is, the packing says
which pieces are in it, and a table says where their tokens are. `pieces`, `pairs` and `streams` implement the objectives.
"""

import abc
import hashlib
from typing import Any, NamedTuple

import numpy as np

from t5x_cpm import stored
from t5x_cpm.config import Config, ConfigError
from t5x_cpm.data import cache as cache_lib
from t5x_cpm.data import objectives, packing
from t5x_cpm.data.blocks import Numbers
from t5x_cpm.data.objectives import Segments
from t5x_cpm.vocabularies import Vocabulary

FIXED_SEED = 233  # for what is drawn once, whatever the seed of the run; CPM-2's preprocessing has the same
WITHOUT_SENTINELS = ('pairs', 'prefix_lm')  # objectives that mark no spans

BLANK_FILES = 'blank_files'  # among the reasons for which documents are left out, in cache.json: files without any


def counted(number: int, noun: str) -> str:
  """'1 document', '12,034 documents'."""
  return f'{number:,} {noun}' + ('' if number == 1 else 's')


def in_words(facts: dict[str, Any], noun: str = 'document', unfit: str = '', after: str = '') -> str:
  """'12,034 documents (3 malformed and 17 empty left out, 41 too short for a mask)'.

  Args:
    facts: what cache.json says about a split.
    noun: what a document is called.
    unfit: how many the objective does not use and why, if there are any.
    after: what follows the brackets.
  """
  skipped = facts.get('skipped', {})
  each = [f'{counted(skipped[reason], "file")} of blanks' if reason == BLANK_FILES else f'{skipped[reason]:,} {reason}'
          for reason in sorted(skipped, reverse=True)]  # malformed, empty, files of blanks
  left_out = f'{" and ".join([", ".join(each[:-1]), *each[-1:]] if each[1:] else each)} left out'
  notes = [*([left_out] if each else []), *([unfit] if unfit else [])]
  return counted(facts['documents'], noun) + (f' ({", ".join(notes)})' if notes else '') + after


class RowSegments(NamedTuple):
  """Segments, and for each the row that it belongs to [P], in ascending order."""

  row: np.ndarray
  segments: Segments


class Component(abc.ABC):
  """One task's stream of rows: epoch after epoch, each in another order.

  Attributes:
    name: the name of the task.
    checksum: the checksum of its cache.
    rows_per_epoch: how many rows hold every piece once.
    left_out: how many documents are too short for the objective.
    rules: what rows are a function of beside the configuration and the cache, in words: which way of making them holds where
      earlier versions had another. A run is not continued under others.
  """

  name: str
  checksum: str
  rows_per_epoch: int
  left_out: int
  rules: dict[str, str]

  def __init__(self, cache: cache_lib.Cache, split: str, config: Config, vocabulary: Vocabulary):
    """Opens a split of a cache.

    Raises:
      ConfigError: the objective needs sentinels, and the vocabulary has none.
    """
    objective = config.task.objective
    if not vocabulary.sentinels and objective not in WITHOUT_SENTINELS:
      raise ConfigError(f'TaskConfig.objective = {objective!r} marks masked spans with sentinels, and {vocabulary.spec!r} has '
                        "none (CPM-1's have none): only TaskConfig.objective = 'pairs' and 'prefix_lm' work with it, or "
                        'set another TaskConfig.vocabulary.')
    self.cache, self.split, self.task, self.rules = cache, split, config.task, {}
    self.name, self.checksum, self.vocabulary = cache.name, cache.info['checksum'], vocabulary
    self.folder = cache.path / 'index'
    self.room = (config.task.encoder_length, config.task.decoder_length)
    self.salt = int.from_bytes(hashlib.blake2b(cache.name.encode(), digest_size=7).digest(), 'big')
    self.sentinels = np.asarray(vocabulary.sentinels, np.int32)

  @abc.abstractmethod
  def summarize(self) -> dict:
    """Counts the pieces, the slots that an epoch uses on both sides, and what was cut or left out."""

  @abc.abstractmethod
  def describe(self) -> str:
    """What there is to read, and what was cut or left out, in words."""

  @abc.abstractmethod
  def read(self, rows: np.ndarray, seed: int) -> RowSegments:
    """Reads rows of the stream, by their numbers from its beginning; `row` of the result is the position in `rows`."""

  def read_once(self, rows: np.ndarray) -> RowSegments:
    """Reads rows of the one pass that evaluation makes, 0 .. rows_once - 1, with masks that never change."""
    return self.read(rows, FIXED_SEED)

  @property
  def rows_once(self) -> int:
    return self.rows_per_epoch

  def _locate(self, rows: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each row of the stream: its epoch, which row of the epoch it is, and the key of all draws in that epoch."""
    epoch, number = np.divmod(rows, self.rows_per_epoch)
    key = objectives.combine(np.full(len(rows), seed), np.full(len(rows), self.salt), epoch)
    return epoch, packing.permute(number, self.rows_per_epoch, key), key


class Packed(Component):
  """Rows of several pieces, each in a segment of its own.

  A subclass calls `_pack` with what there is to pack, and makes segments of it in `_segments`. Pieces of one size form a
  class, whose members are interchangeable.

  Attributes:
    sizes: [C, 2] encoder and decoder slots of a piece of each class.
    counts: [C] how many pieces each class has.
    members: one entry for each piece, in the order of the classes, which `_segments` makes a segment of.
    facts: what `summarize` says beyond the counts.
  """

  facts: dict

  def __init__(self, cache: cache_lib.Cache, split: str, config: Config, vocabulary: Vocabulary):
    super().__init__(cache, split, config, vocabulary)
    self.most = max(1, self.room[0] // 8)  # the most pieces in a row
    self.tokens = {feature: cache.tokens(split, feature, random=True) for feature in cache.features}

  def _pack(self, sizes: np.ndarray, counts: np.ndarray, members: Numbers) -> None:
    if len(members) != counts.sum() or len(sizes) != len(counts):
      raise stored.DamagedError(members.path, f'it has {len(members):,} pieces, expected {counts.sum():,}',
                                f'Remove the folder {self.folder}: it is made again.')
    self.sizes, self.counts, self.members = sizes, counts, members
    self.first = objectives.exclusive_cumsum(counts)  # [C] the first member of each class
    self.packing = packing.pack(sizes, counts, self.room, self.most)
    self.rows_per_epoch = self.packing.rows

  @abc.abstractmethod
  def _segments(self, members: np.ndarray, class_ids: np.ndarray, keys: np.ndarray) -> Segments:
    """Makes the segments of P pieces from their members [P, ...], their classes [P] and the keys of their rows [P]."""

  def _slots_used(self) -> np.ndarray:
    return self.counts @ self.sizes

  def summarize(self) -> dict:
    encoder, decoder = self._slots_used()
    return {'pieces': int(self.counts.sum()), 'encoder_slots_used': int(encoder), 'decoder_slots_used': int(decoder),
            **self.facts}

  def read(self, rows: np.ndarray, seed: int) -> RowSegments:
    _, number, key = self._locate(rows, seed)
    row, class_id, member = self.packing.members(number)
    member = packing.permute(member, self.counts[class_id], objectives.combine(key[row], class_id))
    return RowSegments(row, self._segments(self.members[self.first[class_id] + member], class_id, key[row]))
