"""CPM-1's vocabulary, and plain SentencePiece. The library is imported when a vocabulary is loaded."""

import functools
import itertools
import re
from collections.abc import Iterable
from typing import Any

from t5x_cpm.config import ConfigError
from t5x_cpm.vocabularies import word_cut
from t5x_cpm.vocabularies.base import MARKS, SPECIALS, UNKNOWN, UNMARKS, Vocabulary, no_options, read


def _without_halves(text: str) -> str:
  """A text with U+FFFD for each half of a surrogate pair."""
  return text.encode('utf-16-le', 'surrogatepass').decode('utf-16-le', 'replace')


def _encode(model: Any, text: str) -> list[int]:
  try:
    return model.encode(text)
  except (UnicodeEncodeError, RuntimeError):  # half of a surrogate pair; which error depends on SentencePiece's version
    return model.encode(_without_halves(text))


# As a protocol buffer, normalizer_spec { add_dummy_prefix: false }. Appended to a model, it replaces what the model says.
_WITHOUT_PREFIX = b'\x1a\x02\x18\x00'


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
    known = [token if 0 <= token < self.size else self.unk_id for token in map(int, ids)]
    known = [token for token in known if token not in special]
    runs = itertools.groupby(known, self.unk_id.__eq__)
    texts = [UNKNOWN * len(list(run)) if unknown else self._model.decode(list(run)).replace(' ', '') for unknown, run in runs]
    return ''.join(texts).translate(UNMARKS)

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
    return self._plain(self._model, text)

  def _plain(self, model: Any, text: str) -> list[int]:
    ids = _encode(model, text)
    if not self._sentinel_number.keys().isdisjoint(ids):  # the text has '<extra_id_0>' in it
      first, *rest = re.split('(?<=<)(?=extra_id_)', text)
      return [*_encode(model, first), *(token for chunk in rest for token in _encode(self._model, chunk))]
    return ids

  @functools.cached_property
  def _inside(self) -> Any:
    """The model without the space that it puts before a text."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor()
    model.load_from_serialized_proto(self._model.serialized_model_proto() + _WITHOUT_PREFIX)
    return model

  def encode_after(self, before: str, text: str) -> list[int]:
    # Where a space stands between, the text begins like one of its own.
    begun = self._inside.normalize(f'a{_without_halves(text[:1])}a')
    if not before or before[-1].isspace() or begun.startswith('a\u2581'):
      return self.encode(text)
    return self._plain(self._inside, text)

  @functools.cached_property
  def _names(self) -> dict[int, str]:
    """What decoding writes for tokens that SentencePiece does not know or writes in its own way."""
    return {token: f'<s_{number}>' for number, token in enumerate(self.sentinels)} | {self.unk_id: UNKNOWN}

  def decode(self, ids: Iterable[int]) -> str:
    out = ''
    left_out = {self.pad_id, self.eos_id} - {self.unk_id}
    known = [token if 0 <= token < self.size else self.unk_id for token in map(int, ids) if token not in left_out]
    for name, group in itertools.groupby(known, self._names.get):
      for run in [list(group)] if name is None else [[token] for token in group]:
        if name is not None:
          out += f' {name}' if out and run[0] in self._sentinel_number else name
        elif out:  # after another token, SentencePiece keeps the space that it would drop at the start of a text
          out += self._model.decode([self.unk_id, *run]).removeprefix(self._model.decode([self.unk_id]))
        else:
          out = self._model.decode(run)
    return out

  def piece(self, token: int) -> str:
    if token in self._sentinel_number:
      return f'<extra_id_{self._sentinel_number[token]}>'
    return self._model.id_to_piece(token)
