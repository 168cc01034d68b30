"""Which row of an old vocabulary each piece of a new one begins with (Zhang et al. 2021, section 2.3).

A piece that both have keeps its row. The k-th sentinel has that of the k-th sentinel, a special token that of its role. Any
other piece begins with the row of its longest prefix that the old vocabulary has, or else with that of a piece drawn at random.
"""

import collections
import dataclasses
import re
from typing import NamedTuple

import numpy as np

from t5x_cpm.checkpoints.tensors import Index
from t5x_cpm.config import Config, ConfigError
from t5x_cpm.inherit.stage import Stage
from t5x_cpm.models.leaf import Leaf
from t5x_cpm.vocabularies import Vocabulary

CONTINUES = '##'  # what a piece that continues a word begins with
SYMBOL = re.compile('<.+>|[▁▂▃]')  # what vocabularies of other languages share as well: '<mask>', the space, a byte
ROLES = ('pad_id', 'bos_id', 'eos_id', 'unk_id')


class Origins(NamedTuple):
  """Where the rows of a new vocabulary come from.

  Attributes:
    rows: for each row of the new model an id of the old vocabulary, int64 [rows].
    counts: how many pieces have their row 'kept', as a 'symbol' that stands for no text of its own, as a 'sentinel', by their
      'role', from a 'prefix', and at 'random'; rows beyond the pieces are 'padding'.
  """

  rows: np.ndarray
  counts: dict[str, int]


def _longest_prefix(piece: str, ids: dict[str, int]) -> int | None:
  text = piece.removeprefix(CONTINUES)
  return next((ids[text[:length]] for length in range(len(text), 0, -1) if text[:length] in ids), None)


def origins(old: Vocabulary, new: Vocabulary, rows: int, seed: int) -> Origins:
  """The origin of each row.

  Args:
    old: the vocabulary of the source.
    new: that of the new model.
    rows: of the new model's table, at least as many as the vocabulary has pieces.
    seed: of the pieces that are drawn.
  """
  special = {getattr(old, role) for role in ROLES} | set(old.sentinels)
  plain = [token for token in range(old.size) if token not in special]
  ids = {old.piece(token): token for token in reversed(plain)}  # of equal pieces the first
  known: dict[int, tuple[str, int]] = {}
  for number, token in enumerate(new.sentinels[:len(old.sentinels)]):
    known[token] = 'sentinel', old.sentinels[number]
  for role in ROLES:
    known[getattr(new, role)] = 'role', getattr(old, role)
  drawn = np.random.default_rng(seed).choice(plain, rows)
  found, counts = np.empty(rows, np.int64), collections.Counter[str]()
  for token in range(rows):
    kind, origin = 'padding', int(drawn[token])
    if token in known:
      kind, origin = known[token]
    elif token < new.size:
      piece = new.piece(token)
      kind, prefix = 'random', _longest_prefix(piece, ids)
      if piece in ids:
        kind, origin = 'symbol' if SYMBOL.fullmatch(piece) else 'kept', ids[piece]
      elif prefix is not None:
        kind, origin = 'prefix', prefix
    found[token] = origin
    counts[kind] += 1
  return Origins(found, dict(counts))


def grow_vocabulary(stage: Stage, config: Config, words: Vocabulary) -> Stage:
  """The rows of another vocabulary; see `origins`."""
  new = dataclasses.replace(stage.model, vocab_size=config.model.vocab_size)
  found, old = origins(stage.words, words, new.vocab_size, config.inherit.seed), stage.leaves
  if not found.counts.get('kept') and not found.counts.get('prefix'):
    raise ConfigError(f'TaskConfig.vocabulary: {words.spec} shares no piece with {stage.words.spec}, the vocabulary of the '
                      'source: nothing would be inherited.')

  def read(leaf: Leaf, index: Index) -> np.ndarray:
    if 'vocab' not in leaf.axes:
      return stage.read(leaf, index)
    return np.take(stage.read(old[leaf.name], index), found.rows, axis=leaf.axes.index('vocab'))

  counts = ', '.join(f'{count:,} {kind}' for kind, count in found.counts.items())
  told = {name: counts for name, leaf in old.items() if 'vocab' in leaf.axes}
  kept = (f'vocabulary: texts of the {found.counts.get("kept", 0):,} pieces that both have get the same hidden states and the '
          'same logits of these pieces; others compete with them in the softmax.')
  return dataclasses.replace(stage.then(new, read, told, kept), words=words)
