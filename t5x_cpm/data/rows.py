"""One task's stream of rows, from its cache: pieces packed into rows, or windows of CPM-2's stream.

A row is found by its number, without a list of rows: a keyed permutation says which row of its epoch it is, the packing
which pieces are in it, the index where their tokens are.
"""

import abc
import hashlib
from typing import NamedTuple

import numpy as np

from t5x_cpm.config import Config, ConfigError
from t5x_cpm.data import cache as cache_lib
from t5x_cpm.data import index, objectives, packing
from t5x_cpm.data.objectives import Segments
from t5x_cpm.vocabularies import Vocabulary


class Part(NamedTuple):
  """Segments of some rows of one component: `row` is the position in the rows asked for, [P], in ascending order."""

  row: np.ndarray
  segments: Segments


class Component(abc.ABC):
  """One task's stream of rows: epoch after epoch, each in another order.

  Attributes:
    name: of the task.
    checksum: of its cache.
    rows_per_epoch: rows that hold every piece once.
    left_out: documents that are too short for the objective.
  """

  name: str
  checksum: str
  rows_per_epoch: int
  left_out: int

  def __init__(self, cache: cache_lib.Cache, vocabulary: Vocabulary, objective: str):
    if not vocabulary.sentinels and objective != 'pairs':
      raise ConfigError(f'TaskConfig.objective = {objective!r} marks masked spans with sentinels, and {vocabulary.spec!r} has '
                        "none (CPM-1's have none): only TaskConfig.objective = 'pairs' works with it, or set another "
                        'TaskConfig.vocabulary.')
    self.name, self.checksum, self.vocabulary = cache.name, cache.info['checksum'], vocabulary
    self.salt = int.from_bytes(hashlib.blake2b(cache.name.encode(), digest_size=7).digest(), 'big')
    self.sentinels = np.asarray(vocabulary.sentinels, np.int32)

  @abc.abstractmethod
  def summarize(self) -> dict:
    """Pieces, slots used on both sides in an epoch, and what was cut or left out."""

  @abc.abstractmethod
  def read(self, rows: np.ndarray, seed: int) -> Part:
    """Rows of the stream, by number from its beginning."""

  def read_once(self, rows: np.ndarray) -> Part:
    """Rows of the one pass that evaluation makes: 0 .. rows_once - 1, with masks that never change."""
    return self.read(rows, index.STATIC)

  @property
  def rows_once(self) -> int:
    return self.rows_per_epoch


class Packed(Component):
  """Rows of several pieces, each in a segment of its own: objectives 'isolated', 't5' and 'pairs'."""

  def __init__(self, cache: cache_lib.Cache, split: str, config: Config, vocabulary: Vocabulary):
    super().__init__(cache, vocabulary, config.task.objective)
    task = config.task
    self.task = task
    self.most = max(1, task.encoder_length // 8)  # pieces in a row
    self.t5 = task.objective == 't5'
    self.is_pairs = task.objective == 'pairs'
    self.tokens = {feature: cache.tokens(split, feature, random=True) for feature in cache.features}
    room, folder = (task.encoder_length, task.decoder_length), cache.path / 'index'
    if self.is_pairs:
      table = index.pairs(folder, split, cache.lengths(split, 'inputs'), cache.lengths(split, 'targets'), room)
      self.sizes, counts = np.array(table['sizes'], np.int64).reshape(-1, 2), np.array(table['counts'], np.int64)
      self.left_out, self.extra = 0, {'truncated': table['truncated']}
    else:
      longest = objectives.longest_piece(*room, task.noise_density, task.mean_span_length, len(self.sentinels), self.t5)
      if longest < 3:
        raise ConfigError(f'TaskConfig.encoder_length = {room[0]} and decoder_length = {room[1]} do not hold a piece of 3 '
                          f'tokens with {len(self.sentinels)} sentinels: set longer ones.')
      documents = cache.lengths(split, 'targets')
      longest = self._choose_cut(folder, split, documents, longest)
      table = index.pieces(folder, split, documents, longest, with_end=not self.t5)
      self.noise, self.spans = objectives.noise_counts(self._lengths(longest), task.noise_density, task.mean_span_length)
      self.sizes = self._sizes(longest)
      counts = np.array(table['counts'], np.int64)
      self.left_out = table['dropped']
      self.extra = {'longest_piece': longest, 'too_short': self.left_out}
    self.members = index.load(folder, table['name'], 'members', np.int64, columns=4 if self.is_pairs else 0)
    self.packing = packing.pack(self.sizes, counts, room, self.most)
    self.counts, self.first = counts, objectives.exclusive_cumsum(counts)
    self.rows_per_epoch = self.packing.rows

  def _lengths(self, longest: int) -> np.ndarray:
    return np.maximum(np.arange(longest + 1), 2)  # the classes 0 and 1 stay empty

  def _sizes(self, longest: int) -> np.ndarray:
    return np.stack(objectives.corrupted_lengths(self._lengths(longest), self.task.noise_density, self.task.mean_span_length,
                                                 self.t5), axis=1)

  def _choose_cut(self, folder, split: str, documents: np.ndarray, longest: int) -> int:
    """Shorter pieces where those that just fit leave over 10 % of the slots empty, as documents that are all of 300 tokens do.

    Halves, thirds and quarters of the longest piece fill rows whatever the lengths of the documents; they are taken where
    that saves 5 % of the rows.
    """
    room = (self.task.encoder_length, self.task.decoder_length)

    def make(prefix) -> dict:
      del prefix
      rows = {}
      for part in range(1, 5):
        length = longest // part
        if length < 8:
          break
        counts, sizes = index.piece_histogram(documents, length, not self.t5), self._sizes(length)
        rows[length] = packing.pack(sizes, counts, room, self.most).rows
        if (counts @ sizes / room).max() >= 0.9 * rows[length]:
          break
      best = min(rows, key=rows.__getitem__, default=longest)
      return {'longest': best if best == longest or rows[best] < 0.95 * rows[longest] else longest}

    task = self.task
    name = f'{split}.cut-{room[0]}-{room[1]}-{task.noise_density}-{task.mean_span_length}-{len(self.sentinels)}-{int(self.t5)}'
    return index.store(folder, name, make)['longest']

  def summarize(self) -> dict:
    used = self.counts @ self.sizes
    if self.is_pairs:  # whose classes may be rounded up
      used = np.full(2, len(self.members), np.int64)
      for i in range(0, len(self.members), index.CHUNK):
        used += self.members[i:i + index.CHUNK, 2:].sum(axis=0)
    return {'pieces': int(self.counts.sum()), 'encoder_slots_used': int(used[0]), 'decoder_slots_used': int(used[1]),
            **self.extra}

  def read(self, rows: np.ndarray, seed: int) -> Part:
    epoch, place = np.divmod(rows, self.rows_per_epoch)
    key = objectives.combine(np.full(len(rows), seed), np.full(len(rows), self.salt), epoch)
    row, class_id, member = self.packing.members(packing.permute(place, self.rows_per_epoch, key))
    member = packing.permute(member, self.counts[class_id], objectives.combine(key[row], class_id))
    value = self.members[self.first[class_id] + member]
    if self.is_pairs:
      return Part(row, self._pairs(value))
    return Part(row, self._corrupt(value, class_id, key[row]))

  def _corrupt(self, value: np.ndarray, length: np.ndarray, key: np.ndarray) -> Segments:
    start, ends = value >> 1, (value & 1).astype(bool)
    where = np.repeat(start - objectives.exclusive_cumsum(length), length) + np.arange(length.sum())
    last = (np.cumsum(length) - 1)[ends]
    where[last] -= 1  # the end of document is not in the cache
    tokens = self.tokens['targets'][where].astype(np.int32)
    tokens[last] = self.vocabulary.eos_id
    noise, spans = self.noise[length], self.spans[length]
    drawn = objectives.draw_spans(objectives.combine(key, start), length, noise, spans)
    return objectives.corrupt(tokens, length, drawn, noise, self.sentinels, start=self.vocabulary.bos_id,
                              eos=self.vocabulary.eos_id if self.t5 else None)

  def _pairs(self, value: np.ndarray) -> Segments:
    sides = []
    for side, feature in enumerate(('inputs', 'targets')):
      start, length = value[:, side], value[:, 2 + side]
      where = np.repeat(start - objectives.exclusive_cumsum(length), length) + np.arange(length.sum())
      sides.append(objectives.append(self.tokens[feature][where], length, self.vocabulary.eos_id))
    (inputs, inputs_length), (targets, targets_length) = sides
    shifted = objectives.shift_right(targets, targets_length, self.vocabulary.bos_id)
    return Segments(inputs_length, inputs, targets_length, shifted, targets)


class Windows(Component):
  """Rows of CPM-2's own objective: windows of a stream of masked documents (TsinghuaAI/CPM-2-Pretrain).

  Documents of 10 tokens or more are masked once, end of document included, shuffled once and joined. A window is
  encoder_length tokens of that stream; its targets are `<s>`, then for each of its sentinels the sentinel and its tokens,
  then one more sentinel, cut to decoder_length. Sentinels are numbered anew in each window, which is one segment: documents
  see each other. The token after an end of document is not predicted.

  Two things differ. The released loader, made for autoregressive models, repeats the last token of a window as the first of
  the next; here windows do not overlap. It drops the rest of the stream that fills no window; here the next epoch begins with
  it, so that borders move and every token is read equally often.
  """

  def __init__(self, cache: cache_lib.Cache, split: str, config: Config, vocabulary: Vocabulary):
    super().__init__(cache, vocabulary, config.task.objective)
    task = config.task
    folder = cache.path / 'index'
    table = index.cpm2_streams(folder, split, cache.tokens(split, 'targets'), cache.lengths(split, 'targets'),
                               task.noise_density, task.mean_span_length, vocabulary.eos_id, len(self.sentinels))
    dtype = cache.info['dtype']
    self.context = index.load(folder, table['name'], 'context', dtype)
    self.noise = index.load(folder, table['name'], 'noise', dtype)
    self.places = index.load(folder, table['name'], 'places', np.int64)
    self.starts = index.load(folder, table['name'], 'starts', np.int64)
    self.total = table['context']
    self.width = min(task.encoder_length, self.total)
    if table['tightest'] and self.width >= table['tightest']:
      raise ConfigError(f'some windows of TaskConfig.encoder_length = {task.encoder_length} tokens need more than the '
                        f'{len(self.sentinels)} sentinels of the vocabulary: set a shorter encoder_length (below '
                        f"{table['tightest']}), a larger mean_span_length, or TaskConfig.objective = 'isolated'.")
    self.decoder_length = task.decoder_length
    self.rows_per_epoch = self.total // self.width if self.total else 0
    self.left_out = table['dropped']

  def summarize(self) -> dict:
    borders = np.searchsorted(self.places, np.arange(self.rows_per_epoch + 1) * self.width)
    targets = np.diff(self.starts[borders]) + np.diff(borders) + 1
    return {'pieces': self.rows_per_epoch, 'encoder_slots_used': self.rows_per_epoch * self.width,
            'decoder_slots_used': int(np.minimum(targets, self.decoder_length).sum()),
            'truncated': int((targets > self.decoder_length).sum()), 'too_short': self.left_out}

  @property
  def rows_once(self) -> int:
    return -(-self.total // self.width) if self.total else 0

  def read(self, rows: np.ndarray, seed: int) -> Part:
    epoch, place = np.divmod(rows, self.rows_per_epoch)
    key = objectives.combine(np.full(len(rows), seed), np.full(len(rows), self.salt), epoch)
    place = packing.permute(place, self.rows_per_epoch, key)
    begin = (epoch * self.rows_per_epoch + place) * self.width % self.total
    return self._windows(begin, np.full(len(rows), self.width))

  def read_once(self, rows: np.ndarray) -> Part:
    begin = packing.permute(rows, self.rows_once, objectives.combine(index.STATIC, self.salt)) * self.width
    return self._windows(begin, np.minimum(self.width, self.total - begin))

  def _windows(self, begin: np.ndarray, width: np.ndarray) -> Part:
    where = np.repeat(begin - objectives.exclusive_cumsum(width), width) + np.arange(width.sum())
    encoder = self.context[where % self.total].astype(np.int32)
    # Spans are counted on over the end of the stream, where a window may go on with its beginning.
    spans = len(self.places)
    lap, end = np.divmod(begin + width, self.total)
    lo = np.searchsorted(self.places, begin)
    hi = np.searchsorted(self.places, end) + lap * spans
    count = hi - lo
    span = np.repeat(lo - objectives.exclusive_cumsum(count), count) + np.arange(count.sum())
    lap, span = np.divmod(span, spans)
    column = self.places[span] + lap * self.total - np.repeat(begin, count)
    encoder[np.repeat(objectives.exclusive_cumsum(width), count) + column] = self.sentinels[objectives.ramp(count)]
    length = self.starts[span + 1] - self.starts[span]
    owner = np.repeat(np.arange(len(begin)), count)
    noise_P = np.bincount(owner, length, minlength=len(begin)).astype(np.int64)
    before = objectives.exclusive_cumsum(length) - np.repeat(objectives.exclusive_cumsum(noise_P), count)
    tokens = self.noise[np.repeat(self.starts[span], length) + objectives.ramp(length)]
    lengths, targets = objectives.span_targets(tokens, noise_P, objectives.Spans(count, column, length, before),
                                               self.sentinels, None)
    inputs = objectives.shift_right(targets, lengths, self.vocabulary.bos_id)
    keep = objectives.ramp(lengths) < self.decoder_length
    return Part(np.arange(len(begin)), Segments(width, encoder, np.minimum(lengths, self.decoder_length), inputs[keep],
                                                targets[keep]))
