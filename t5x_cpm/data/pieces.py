"""Objectives 'isolated', 't5' and 'prefix_lm': documents are cut into pieces, and each is corrupted or continued by itself."""

import abc
import functools
import pathlib
from collections.abc import Iterator

import numpy as np

from t5x_cpm import stored
from t5x_cpm.config import Config, ConfigError
from t5x_cpm.data import cache as cache_lib
from t5x_cpm.data import index, objectives, packing
from t5x_cpm.data.blocks import Numbers
from t5x_cpm.data.objectives import Segments
from t5x_cpm.data.rows import Packed, counted, in_words
from t5x_cpm.vocabularies import Vocabulary

SPANS = 'spans'  # the rule that says where the spans of 'isolated' lie, in the fingerprint of a run's data
SHORTEST = 3  # the longest piece must have at least this many tokens; a cut may leave pieces of 2


def piece_counts(lengths_D: np.ndarray, longest: int) -> np.ndarray:
  """How many pieces each document has: none if it is too short to be corrupted."""
  return np.where(lengths_D < 2, 0, -(-lengths_D // longest))


def cut(lengths_D: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Cuts documents into pieces of `longest` tokens and a rest; a rest of one token takes another from the piece before it.

  Args:
    lengths_D: tokens of each document; one below 2 gives no piece.
    longest: at least SHORTEST.

  Returns:
    For each piece its document, where it starts there, and its length.
  """
  counts = piece_counts(lengths_D, longest)
  document = np.repeat(np.arange(len(lengths_D)), counts)
  start = objectives.ramp(counts) * longest
  length = np.minimum(longest, lengths_D[document] - start)
  short = np.flatnonzero(length == 1)
  start[short] -= 1
  length[short] += 1
  length[short - 1] -= 1  # always a piece of the same document: a document of one token has no piece
  return document, start, length


def _blocks(lengths_D: np.ndarray, longest: int, with_end: bool) -> Iterator[tuple[int, np.ndarray]]:
  """The lengths as they are stored, in blocks of at most about index.CHUNK pieces, each after the number of its first token."""
  first = 0
  for begin in range(0, len(lengths_D), index.CHUNK):
    block = np.asarray(lengths_D[begin:begin + index.CHUNK], np.int64)
    pieces_before = np.cumsum(piece_counts(block + with_end, longest))
    inner = np.searchsorted(pieces_before, np.arange(index.CHUNK, pieces_before[-1], index.CHUNK))
    borders = np.unique([0, *inner, len(block)])
    for a, b in zip(borders, borders[1:]):
      yield first, block[a:b]
      first += int(block[a:b].sum())


def histogram(lengths_D: np.ndarray, longest: int, with_end: bool) -> np.ndarray:
  """[longest + 1] how many pieces of each length `table` would find."""
  counts = np.zeros(longest + 1, np.int64)
  for _, tokens_D in _blocks(lengths_D, longest, with_end):
    counts += np.bincount(cut(tokens_D + with_end, longest)[2], minlength=longest + 1)
  return counts


def _chunks(lengths_D: np.ndarray, longest: int, with_end: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Chunks of pieces, as `index.sort_by_class` takes them."""
  for first, tokens_D in _blocks(lengths_D, longest, with_end):
    document, start, length = cut(tokens_D + with_end, longest)
    ends = start + length > tokens_D[document]
    values = 2 * (first + objectives.exclusive_cumsum(tokens_D)[document] + start) + ends
    yield length.astype(np.uint16 if longest < 1 << 16 else np.int64), values[:, None]


def _make_table(prefix: pathlib.Path, *, name: str, lengths_D: np.ndarray | Numbers, longest: int, with_end: bool) -> dict:
  lengths_D = np.asarray(lengths_D)
  counts = index.sort_by_class(prefix, functools.partial(_chunks, lengths_D, longest, with_end), longest + 1)
  dropped = sum(int((np.asarray(lengths_D[i:i + index.CHUNK]) + int(with_end) < 2).sum())
                for i in range(0, len(lengths_D), index.CHUNK))
  return {'name': name, 'counts': counts.tolist(), 'dropped': dropped}


def table(directory: pathlib.Path, split: str, lengths_D: np.ndarray | Numbers, longest: int, with_end: bool,
          source: str = '') -> dict:
  """The pieces of a split by length: `members` holds 2 * (first token) + (1 if the piece ends with the end of document).

  Args:
    directory: the folder of the tables of a cache.
    split: 'train' or 'validation'.
    lengths_D: tokens of the documents of the split, without an end of document.
    longest: tokens of the largest piece.
    with_end: whether every document is followed by an end of document, which is not in the cache.
    source: as in `index.store`.

  Returns:
    {'name': the name of the table, 'counts': pieces of each length, 'dropped': documents too short for a piece}.
  """
  name = f'{split}.pieces-{longest}-{int(with_end)}'
  make = functools.partial(_make_table, name=name, lengths_D=lengths_D, longest=longest, with_end=with_end)
  return index.store(directory, name, make, {'name': (name,), 'counts': [stored.COUNT], 'dropped': stored.COUNT}, source)


def _lengths(longest: int) -> np.ndarray:
  """The length of the pieces of each class; classes 0 and 1, whose pieces would be too short, stay empty."""
  return np.maximum(np.arange(longest + 1), 2)


class Cut(Packed):
  """Rows of pieces of documents. A subclass says how many slots a piece takes, and what it puts there.

  Attributes:
    with_end: whether a document is followed by an end of document, which then is a token of its last piece.
    purpose: what a document may be too short for.
  """

  with_end: bool
  purpose: str

  def _open(self, longest: int, name: str) -> None:
    """Finds the pieces, of at most `longest` tokens. `name` says what their slots depend on beside the length of a row."""
    self.documents = self.cache.lengths(self.split, 'targets')
    longest = self._choose_longest(longest, name)
    found = table(self.folder, self.split, self.documents, longest, self.with_end, self.cache.identity)
    self.left_out = found['dropped']
    self.facts = {'longest_piece': longest, 'too_short': self.left_out}
    self._pack(self._sizes(longest), np.array(found['counts'], np.int64),
               index.load(self.folder, found['name'], 'members', np.int64))

  def describe(self) -> str:
    """See the base class."""
    unfit = f'{self.left_out:,} too short {self.purpose}' if self.left_out else ''
    pieces = f'{counted(int(self.counts.sum()), "piece")} of at most {self.facts["longest_piece"]:,} tokens'
    return in_words(self.cache.info['splits'][self.split], unfit=unfit, after=f', {pieces}')

  @abc.abstractmethod
  def _sizes(self, longest: int) -> np.ndarray:
    """[longest + 1, 2] encoder and decoder slots of a piece of each length."""

  def _choose_longest(self, longest: int, name: str) -> int:
    """Takes shorter pieces where those that just fit leave over 10 % of the slots empty, as when all documents have 300 tokens.

    Halves, thirds and quarters of the longest piece fill rows whatever the lengths of the documents; they are taken where
    that saves 5 % of the rows.
    """
    return index.store(self.folder, f'{self.split}.cut-{self.room[0]}-{self.room[1]}-{name}',
                       lambda prefix: {'longest': self._try_lengths(longest)},
                       {'longest': range(SHORTEST, longest + 1)}, self.cache.identity)['longest']

  def _try_lengths(self, longest: int) -> int:
    rows, documents = {}, np.asarray(self.documents)
    for divisor in range(1, 5):
      length = longest // divisor
      if length < 8:
        break
      counts, sizes = histogram(documents, length, self.with_end), self._sizes(length)
      rows[length] = packing.pack(sizes, counts, self.room, self.most).rows
      if (counts @ sizes / self.room).max() >= 0.9 * rows[length]:
        break
    best = min(rows, key=rows.__getitem__, default=longest)
    return best if best == longest or rows[best] < 0.95 * rows[longest] else longest

  def _read(self, members: np.ndarray, length: np.ndarray) -> np.ndarray:
    """The tokens of pieces, flat, with the ends of documents."""
    start, ends = members >> 1, (members & 1).astype(bool)
    token = objectives.ranges(start, length)
    last = (np.cumsum(length) - 1)[ends]
    token[last] -= 1  # the end of document is not in the cache
    tokens = self.tokens['targets'][token].astype(np.int32)
    tokens[last] = self.vocabulary.eos_id
    return tokens


class Pieces(Cut):
  """Rows of corrupted pieces: 'isolated' and 't5'.

  'isolated' has CPM-2's form, with an end of document, and masks spans anywhere in a piece. 't5' has T5's form, without an
  end of document, and its rule, by which a piece ends with a masked span.
  """

  def __init__(self, cache: cache_lib.Cache, split: str, config: Config, vocabulary: Vocabulary):
    """Opens a split of a cache.

    Raises:
      ConfigError: a row is too short for any piece.
    """
    super().__init__(cache, split, config, vocabulary)
    self.purpose = 'for a mask'
    self.t5 = self.task.objective == 't5'
    self.with_end = not self.t5
    if not self.t5:
      self.rules = {SPANS: 'anywhere in a piece; earlier versions always masked its end'}
    longest = objectives.longest_piece(*self.room, self.task.noise_density, self.task.mean_span_length, len(self.sentinels),
                                       self.t5)
    if longest < SHORTEST:
      raise ConfigError(f'TaskConfig.encoder_length = {self.room[0]} and decoder_length = {self.room[1]} do not hold a piece '
                        f'of {SHORTEST} tokens with {len(self.sentinels)} sentinels: set longer ones.')
    self._open(longest, f'{self.task.noise_density}-{self.task.mean_span_length}-{len(self.sentinels)}-{int(self.t5)}')
    self.noise, self.spans = objectives.noise_counts(
        _lengths(self.facts['longest_piece']), self.task.noise_density, self.task.mean_span_length)

  def _sizes(self, longest: int) -> np.ndarray:
    return np.stack(objectives.corrupted_lengths(_lengths(longest), self.task.noise_density, self.task.mean_span_length,
                                                 self.t5), axis=1)

  def _segments(self, members: np.ndarray, class_ids: np.ndarray, keys: np.ndarray) -> Segments:
    tokens, start, noise, spans = self._read(members, class_ids), members >> 1, self.noise[class_ids], self.spans[class_ids]
    drawn = objectives.draw_spans(objectives.combine(keys, start), class_ids, noise, spans, anywhere=not self.t5)
    return objectives.corrupt(tokens, class_ids, drawn, noise, self.sentinels, start=self.vocabulary.bos_id,
                              eos=self.vocabulary.eos_id if self.t5 else None)


class Continuations(Cut):
  """Rows of pieces that are cut in two: 'prefix_lm' (Raffel et al. 2020), to which Lester et al. (2021) adapt a model.

  The encoder reads what is before the cut and an end of sequence, as the inputs of a pair have one; the decoder writes the
  rest, with an end of document where the document ends, and without one where only the piece does. All cuts by which each side
  has a token and fits its row are equally likely.
  """

  def __init__(self, cache: cache_lib.Cache, split: str, config: Config, vocabulary: Vocabulary):
    super().__init__(cache, split, config, vocabulary)
    self.with_end, self.purpose = True, 'to be cut'
    # The longest pieces fill the encoder up to some place in its last half decoder, so that their cut still varies.
    self._open(self.room[0] + self.room[1] // 2, 'prefix_lm')

  def _sizes(self, longest: int) -> np.ndarray:
    length = _lengths(longest)
    return np.stack([np.minimum(length, self.room[0]), np.minimum(length - 1, self.room[1])], axis=1)

  def _segments(self, members: np.ndarray, class_ids: np.ndarray, keys: np.ndarray) -> Segments:
    tokens, length = self._read(members, class_ids), class_ids.astype(np.int64)
    first = np.maximum(length - self.room[1], 1)
    choices = np.minimum(length - 1, self.room[0] - 1) - first + 1
    drawn = objectives.combine(keys, members >> 1) >> np.uint64(32)
    before = first + (drawn * choices.astype(np.uint64) >> np.uint64(32)).astype(np.int64)  # tokens before the cut
    is_input = objectives.ramp(length) < np.repeat(before, length)
    inputs, inputs_length = objectives.append(tokens[is_input], before, self.vocabulary.eos_id)
    targets, targets_length = tokens[~is_input], length - before
    return Segments(inputs_length, inputs, targets_length,
                    objectives.shift_right(targets, targets_length, self.vocabulary.bos_id), targets)
