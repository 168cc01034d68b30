"""CPM-1's vocabulary, and plain SentencePiece. The library is imported when a vocabulary is loaded."""

import itertools
import re
from collections.abc import Iterable
from typing import Any

from t5x_cpm.config import ConfigError
from t5x_cpm.vocabularies import word_cut
from t5x_cpm.vocabularies.base import MARKS, SPECIALS, UNMARKS, Vocabulary, no_options, read


def _encode(model: Any, text: str) -> list[int]:
  try:
    return model.encode(text)
  except (UnicodeEncodeError, RuntimeError):  # half of a surrogate pair; which error depends on SentencePiece's version
    return model.encode(text.encode('utf-16-le', 'surrogatepass').decode('utf-16-le', 'replace'))


def _sentencepiece(path: str) -> Any:
  import sentencepiece

  model = sentencepiece.SentencePieceProcessor()
  try:
    model.load_from_serialized_proto(read(path))
  except RuntimeError:
    raise ConfigError(f'{path} is not a SentencePiece model. Check TaskConfig.vocabulary.') from None
  return model


class Cpm1(Vocabulary):
  """The vocabulary of CPM-1: jieba's words, joined with spaces, in SentencePiece. CPM-1 is decoder-only, so no sentinels."""

  kind = 'cpm1'

  def __init__(self, path: str, options: dict[str, str]):
    super().__init__(path, options)
    no_options(self.spec, options)
    self._model = _sentencepiece(path)
    self.size = self._model.get_piece_size()
    ids = {special: self._model.piece_to_id(special) for special in SPECIALS}
    unknown = [special for special, token in ids.items() if special != '<unk>' and token == ids['<unk>']]
    if unknown:
      raise ConfigError(f'{path}: no piece {", ".join(unknown)}: it is not the vocabulary of CPM-1.')
    self.unk_id, self.bos_id, self.pad_id, self.eos_id = ids['<unk>'], ids['<s>'], ids['<pad>'], ids['<eod>']
    self.sentinels = ()

  def encode(self, text: str) -> list[int]:
    # Not word by word: SentencePiece adds up scores in 32 bits, so that earlier text may decide between nearly equal ways.
    return _encode(self._model, ' '.join([' '.join(words) for words in word_cut.cut(text.translate(MARKS))]))

  def decode(self, ids: Iterable[int]) -> str:
    special = {self.bos_id, self.pad_id, self.eos_id}
    kept = [token for token in map(int, ids) if token not in special and 0 <= token < self.size]
    return self._model.decode(kept).replace(' ', '').translate(UNMARKS)

  def piece(self, token: int) -> str:
    return self._model.id_to_piece(token)


class SentencePiece(Vocabulary):
  """Plain SentencePiece. Sentinels are the pieces <extra_id_k> of the model, or `extra_ids` ids after its last one.

  As in T5, the first sentinel is the last id, and a decoder starts from padding.
  """

  kind = 'sentencepiece'

  def __init__(self, path: str, options: dict[str, str]):
    super().__init__(path, options)
    extra = options.get('extra_ids', '100')
    if set(options) - {'extra_ids'} or not extra.isdecimal() or len(extra) > 6:
      raise ConfigError(f'{self.spec}: the only option is extra_ids, a number below a million, as in '
                        'sentencepiece:FILE?extra_ids=100.')
    self._model = _sentencepiece(path)
    own = self._model.get_piece_size()
    self.unk_id, self.eos_id = self._model.unk_id(), self._model.eos_id()
    if self.eos_id < 0:
      raise ConfigError(f'{path}: the model has no end of sequence (it was trained with eos_id=-1); T5 needs one.')
    self.pad_id = self.bos_id = max(self._model.pad_id(), 0)
    inside = self._sentinels_inside()
    self.size = own if inside else own + int(extra)
    self.sentinels = inside or tuple(range(self.size - 1, own - 1, -1))

  def _sentinels_inside(self) -> tuple[int, ...]:
    for form in ('<extra_id_{}>', '\u2581<extra_id_{}>'):
      tokens = map(self._model.piece_to_id, map(form.format, itertools.count()))
      inside = tuple(itertools.takewhile(lambda token: token != self.unk_id, tokens))
      if inside:
        return inside
    return ()

  def encode(self, text: str) -> list[int]:
    ids = _encode(self._model, text)
    if not self._sentinel_number.keys().isdisjoint(ids):  # the text has '<extra_id_0>' in it
      return [token for chunk in re.split('(?<=<)(?=extra_id_)', text) for token in _encode(self._model, chunk)]
    return ids

  def decode(self, ids: Iterable[int]) -> str:
    out = ''
    left_out = {self.pad_id, self.eos_id} - {self.unk_id}
    known = [token if 0 <= token < self.size else self.unk_id for token in map(int, ids) if token not in left_out]
    for number, group in itertools.groupby(known, self._sentinel_number.get):
      for run in [list(group)] if number is None else [[token] for token in group]:
        text = self._model.decode(run) if number is None else f'<s_{number}>'
        apart = number is not None or self.piece(run[0]).startswith('\u2581')
        out += f' {text}' if out and apart else text
    return out

  def piece(self, token: int) -> str:
    if token in self._sentinel_number:
      return f'<extra_id_{self._sentinel_number[token]}>'
    return self._model.id_to_piece(token)
