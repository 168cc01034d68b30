"""Documents that Python code reads without TensorFlow: those of quickstart and local tasks.

A cache takes their tokens directly from here. For all other uses, `sources` wraps the same object as a SeqIO data source.
"""

import collections
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from t5x_cpm.config.template import PROMPT
from t5x_cpm.vocabularies import Vocabulary

BATCH = 256  # documents that are tokenized together
Read = Callable[[str, int, collections.Counter], Iterator[tuple[str, ...]]]
Side = tuple[np.ndarray, np.ndarray]  # the ids of all documents, flat, and the length of each document


class Source(Protocol):
  """What a cache is made from.

  Attributes:
    shards: how many shards each split has.
    features: the names of the texts, ['targets'] or ['inputs', 'targets'].
    files: paths that the documents are read from, so that changes are noticed.
    patterns: globs that these files match, so that new ones are noticed.
  """

  shards: dict[str, int]
  features: list[str]
  files: Sequence[str]
  patterns: Sequence[str]

  def tokens(self, split: str, shard: int, vocabulary: Vocabulary, skipped: collections.Counter) -> Iterator[list[Side]]:
    """The tokens of a shard in batches: for each feature the flat ids and the lengths, without end of document."""


def encode(vocabulary: Vocabulary, texts: Sequence[str], marked: bool = False) -> Side:
  """The ids of some texts one after another, and how many each text has.

  In marked texts the id after the vocabulary's last one stands for PROMPT.
  """
  ids: list[Any]
  if marked:
    pieces = iter(vocabulary.encode_batch([piece for text in texts for piece in text.split(PROMPT)]))
    ids = []
    for text in texts:
      first, *others = itertools.islice(pieces, text.count(PROMPT) + 1)
      ids.append(list(itertools.chain(first, *([vocabulary.size, *other] for other in others))))
  else:
    ids = vocabulary.encode_batch(list(texts))
  lengths = np.array([len(x) for x in ids], np.int64)
  return np.fromiter(itertools.chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths


class Documents:
  """The documents of a task, shard by shard.

  Args:
    read: (split, shard, counter of what is skipped) -> documents, each a tuple of texts.
    shards, features, files, patterns: as in `Source`.
    marked: whether PROMPT in inputs marks the places of a prompt.
  """

  def __init__(self, read: Read, shards: Mapping[str, int], features: Sequence[str], files: Sequence[str] = (),
               patterns: Sequence[str] = (), marked: bool = False):
    self.read, self.shards, self.features, self.marked = read, dict(shards), list(features), marked
    self.files: Sequence[str] = list(files)
    self.patterns: Sequence[str] = list(patterns)

  def texts(self, split: str, shards: Sequence[int], skipped: collections.Counter) -> Iterator[list[tuple[str, ...]]]:
    """The documents of some shards in batches."""
    every = itertools.chain.from_iterable(self.read(split, int(shard), skipped) for shard in shards)
    while block := list(itertools.islice(every, BATCH)):
      yield block

  def tokens(self, split: str, shard: int, vocabulary: Vocabulary, skipped: collections.Counter) -> Iterator[list[Side]]:
    """The tokens of a shard in batches: for each feature the flat ids and the lengths."""
    for block in self.texts(split, [shard], skipped):
      yield [encode(vocabulary, side, self.marked and feature == 'inputs') for feature, side in zip(self.features, zip(*block))]
