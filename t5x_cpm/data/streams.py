"""Objective 'cpm2': CPM-2's own, windows of one long stream of masked documents (TsinghuaAI/CPM-2-Pretrain).

Documents of 10 tokens or more are masked once, end of document included, shuffled once and joined. A window is
encoder_length tokens of that stream; its targets are, for each of its sentinels, the sentinel and the tokens that it hides,
then one more sentinel, cut to decoder_length; the decoder's inputs are `<s>` and the targets but the last. Sentinels are
numbered anew in each window. A window is one segment, so that its documents see each other. The token after an end of
document is not predicted.

Two things differ from the released loader. It was made for autoregressive models and repeats the last token of a window as
the first of the next; here windows do not overlap. It drops the rest of the stream that fills no window; here the next epoch
begins with it, so that borders move and every token is read equally often.
"""

import contextlib
import functools
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from t5x_cpm import stored
from t5x_cpm.config import Config, ConfigError
from t5x_cpm.data import cache as cache_lib
from t5x_cpm.data import index, objectives, packing
from t5x_cpm.data.blocks import Numbers
from t5x_cpm.data.objectives import Segments
from t5x_cpm.data.rows import FIXED_SEED, Component, RowSegments, counted, in_words
from t5x_cpm.vocabularies import Vocabulary

TOKENS = 1 << 22  # tokens of the documents that are masked together
MOST_COUNTED = 4096  # windows that are looked at to say how many have their targets cut
KEPT = (10, 5_000_000)  # tokens of documents that CPM-2's preprocessing keeps; its upper bound counts characters


class Masking(NamedTuple):
  """What the masks of a stream depend on, beside its documents."""

  density: float  # share of noise
  mean: float  # mean length of a span
  end: int  # the token that ends a document
  sentinels: int  # how many sentinels the vocabulary has


class Masked(NamedTuple):
  """Masked documents of the stream, with K spans."""

  context: np.ndarray  # tokens that stay, and a 0 in place of each span
  noise: np.ndarray  # the tokens of all spans
  places: np.ndarray  # [K] where each span stands in `context`
  starts: np.ndarray  # [K] where each span starts in `noise`


class Stream(NamedTuple):
  """The files of a stream, which are the fields of `Masked`; but `starts` ends with the length of `noise`: [K + 1]."""

  context: Numbers
  noise: Numbers
  places: Numbers
  starts: Numbers


def _documents(lengths_D: np.ndarray) -> Iterator[np.ndarray]:
  """The numbers of the documents that are kept, in the order of the stream, in chunks of about TOKENS tokens."""
  kept = np.flatnonzero((lengths_D >= KEPT[0]) & (lengths_D <= KEPT[1]))
  kept = kept[np.argsort(objectives.combine(FIXED_SEED, kept), kind='stable')]
  ends = np.cumsum(lengths_D[kept])
  borders = np.searchsorted(ends, np.arange(0, int(lengths_D[kept].sum()), TOKENS))
  for begin, end in zip(borders, [*borders[1:], len(kept)]):
    if begin < end:
      yield kept[begin:end]


def _mask(tokens_N: np.ndarray, lengths_P: np.ndarray, documents_P: np.ndarray, masking: Masking) -> Masked:
  """Masks documents, each with its end of document."""
  flat, longer = objectives.append(tokens_N, lengths_P, masking.end)
  noise_P, spans_P = objectives.noise_counts(longer, masking.density, masking.mean)
  spans = objectives.draw_spans(objectives.combine(FIXED_SEED, documents_P), longer, noise_P, spans_P)
  is_noise = objectives.noise_mask(longer, spans)
  first = np.repeat(objectives.exclusive_cumsum(longer), spans.counts) + spans.start
  noise_before = objectives.exclusive_cumsum(spans.length)
  stays = ~is_noise
  stays[first] = True
  context = np.where(is_noise, 0, flat)[stays]
  return Masked(context.astype(tokens_N.dtype), flat[is_noise].astype(tokens_N.dtype),
                first - noise_before + np.arange(len(first)), noise_before)


def _tightest(places: np.ndarray, total: int, sentinels: int) -> int:
  """The width of the narrowest window with one span too many, 0 if there is none.

  A window needs a sentinel for each span and one to close, and windows continue past the end of the stream at its start.
  """
  ring = np.concatenate([places, places[:sentinels] + total])
  if len(ring) < sentinels:
    return 0
  return int((ring[sentinels - 1:] - ring[:len(ring) - sentinels + 1]).min()) + 1


def _make_table(prefix: pathlib.Path, *, name: str, tokens: np.ndarray | Numbers, lengths_D: np.ndarray | Numbers,
                masking: Masking) -> dict:
  tokens = np.asarray(tokens)
  lengths = np.asarray(lengths_D, np.int64)
  offsets = objectives.exclusive_cumsum(lengths)
  kept = context = noise = 0
  with contextlib.ExitStack() as stack:
    out = {file: stack.enter_context(open(f'{prefix}.{file}', 'wb')) for file in Masked._fields}
    for some in _documents(lengths):
      masked = _mask(tokens[objectives.ranges(offsets[some], lengths[some])], lengths[some], some, masking)
      shifted = masked._replace(places=masked.places + context, starts=masked.starts + noise)
      for file, array in shifted._asdict().items():
        array.tofile(out[file])
      kept, context, noise = kept + len(some), context + len(masked.context), noise + len(masked.noise)
    np.array([noise]).tofile(out['starts'])
  places = np.fromfile(f'{prefix}.places', np.int64)
  return {'name': name, 'context': context, 'spans': len(places), 'dropped': len(lengths) - kept,
          'tightest': _tightest(places, context, masking.sentinels)}


def table(directory: pathlib.Path, split: str, tokens: np.ndarray | Numbers, lengths_D: np.ndarray | Numbers,
          masking: Masking, source: str = '') -> dict:
  """The stream of a split; `Stream` says what its files are.

  Args:
    directory: the folder of the tables of a cache.
    split: 'train' or 'validation'.
    tokens: the tokens of the split.
    lengths_D: tokens of its documents, without an end of document.
    masking: how the documents are masked.
    source: as in `index.store`.

  Returns:
    {'name': the name of the table, 'context': tokens of the stream, 'spans': spans in it, 'dropped': documents that are not
    in it, 'tightest': the width of the narrowest window with one span too many, or 0}.
  """
  name = f'{split}.cpm2-{masking.density}-{masking.mean}-{masking.sentinels}'
  make = functools.partial(_make_table, name=name, tokens=tokens, lengths_D=lengths_D, masking=masking)
  counts = dict.fromkeys(('context', 'spans', 'dropped', 'tightest'), stored.COUNT)
  return index.store(directory, name, make, {'name': (name,), **counts}, source)


class Windows(Component):
  """Rows that are windows of the stream."""

  def __init__(self, cache: cache_lib.Cache, split: str, config: Config, vocabulary: Vocabulary):
    """Opens a split of a cache.

    Raises:
      ConfigError: some windows need more sentinels than the vocabulary has.
    """
    super().__init__(cache, split, config, vocabulary)
    task = self.task
    found = table(self.folder, split, cache.tokens(split, 'targets'), cache.lengths(split, 'targets'),
                  Masking(task.noise_density, task.mean_span_length, vocabulary.eos_id, len(self.sentinels)), cache.identity)
    types = (cache.info['dtype'], cache.info['dtype'], np.int64, np.int64)
    self.stream = Stream(*(index.load(self.folder, found['name'], file, kind) for file, kind in zip(Masked._fields, types)))
    self.total = found['context']
    self.width = min(self.room[0], self.total)
    if found['tightest'] and self.width >= found['tightest']:
      raise ConfigError(f'some windows of TaskConfig.encoder_length = {self.room[0]} tokens need more than the '
                        f'{len(self.sentinels)} sentinels of the vocabulary: set a shorter encoder_length (below '
                        f"{found['tightest']}), a larger mean_span_length, or TaskConfig.objective = 'isolated'.")
    self.rows_per_epoch = self.total // self.width if self.total else 0
    self.left_out = found['dropped']

  def _targets(self, first: np.ndarray) -> np.ndarray:
    """How many targets windows have before they are cut, given the numbers of the windows in the first epoch."""
    begin, end = (self.stream.places.search(number * self.width) for number in (first, first + 1))
    return self.stream.starts[end] - self.stream.starts[begin] + end - begin + 1

  def describe(self) -> str:
    """See the base class."""
    unfit = f'{self.left_out:,} of fewer than {KEPT[0]} or more than {KEPT[1]:,} tokens not used' if self.left_out else ''
    windows, rest = self.rows_per_epoch, self.total - self.rows_per_epoch * self.width
    after = f', joined into {counted(windows, "window")} of {self.width:,} tokens' if windows else ''
    if rest:
      after += f' (with the rest, of {rest:,}, the next epoch begins)'
    looked_at = np.unique(np.linspace(0, max(windows - 1, 0), min(windows, MOST_COUNTED)).astype(np.int64))
    share = np.mean(self._targets(looked_at) > self.room[1]) if windows else 0.0
    if share:
      about = 'about ' if windows > MOST_COUNTED else ''
      after += f', the targets of {about}{round(share * windows):,} cut to {self.room[1]:,} tokens'
    return in_words(self.cache.info['splits'][self.split], unfit=unfit, after=after)

  def summarize(self) -> dict:
    targets = self._targets(np.arange(self.rows_per_epoch))
    return {'pieces': self.rows_per_epoch, 'encoder_slots_used': self.rows_per_epoch * self.width,
            'decoder_slots_used': int(np.minimum(targets, self.room[1]).sum()),
            'truncated': int((targets > self.room[1]).sum()), 'too_short': self.left_out}

  @property
  def rows_once(self) -> int:
    return -(-self.total // self.width) if self.total else 0

  def read(self, rows: np.ndarray, seed: int) -> RowSegments:
    epoch, number, _ = self._locate(rows, seed)
    begin = (epoch * self.rows_per_epoch + number) * self.width % self.total
    return self._windows(begin, np.full(len(rows), self.width))

  def read_once(self, rows: np.ndarray) -> RowSegments:
    begin = packing.permute(rows, self.rows_once, objectives.combine(FIXED_SEED, self.salt)) * self.width
    return self._windows(begin, np.minimum(self.width, self.total - begin))

  def _windows(self, begin: np.ndarray, width: np.ndarray) -> RowSegments:
    """Cuts R windows out of the stream, given where each begins [R] and how many tokens it has [R]."""
    encoder = self.stream.context[objectives.ranges(begin, width) % self.total].astype(np.int32)
    # A window may continue past the end of the stream at its start; the count of spans goes on there.
    spans = len(self.stream.places)
    laps, end = np.divmod(begin + width, self.total)
    first = self.stream.places.search(begin)
    count = self.stream.places.search(end) + laps * spans - first
    lap, span = np.divmod(objectives.ranges(first, count), spans)
    column = self.stream.places[span] + lap * self.total - np.repeat(begin, count)
    encoder[np.repeat(objectives.exclusive_cumsum(width), count) + column] = self.sentinels[objectives.ramp(count)]
    start = self.stream.starts[span]
    length = self.stream.starts[span + 1] - start
    row = np.repeat(np.arange(len(begin)), count)
    noise_R = np.bincount(row, length, minlength=len(begin)).astype(np.int64)
    before = objectives.exclusive_cumsum(length) - np.repeat(objectives.exclusive_cumsum(noise_R), count)
    lengths, targets = objectives.span_targets(self.stream.noise[objectives.ranges(start, length)], noise_R,
                                               objectives.Spans(count, column, length, before), self.sentinels, None)
    inputs = objectives.shift_right(targets, lengths, self.vocabulary.bos_id)
    keep = objectives.ramp(lengths) < self.room[1]
    return RowSegments(np.arange(len(begin)), Segments(width, encoder, np.minimum(lengths, self.room[1]), inputs[keep],
                                                       targets[keep]))
