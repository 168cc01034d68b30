"""Text to ids and back: CPM-2, CPM-1 and plain SentencePiece vocabularies. Pure Python; libraries are loaded when used.

A vocabulary is named by a spec, KIND:FILE or KIND:FILE?option=value:

  cpm2:vocab.txt             one piece a line; text is cut into words (`word_cut`), each word matched longest piece first
  cpm1:chinese_vocab.model   words joined with spaces and given to SentencePiece
  sentencepiece:spiece.model plain SentencePiece, as T5 and mT5 use it; ?extra_ids=100 sentinels

CPM-2's published files come in two forms, told apart by their pieces. The Chinese one (no '##') folds full-width characters to
half-width and keeps every space as a token. The bilingual one writes what continues a word that is not Chinese as '##piece',
folds nothing, and leaves out a space between two tokens that are not Chinese. `tools/train_vocabulary.py` makes a third: the
bilingual one with the 256 bytes as pieces, in which nothing is lost (see `Lossless`).

Ids are those of the released code (CPM-2: tokenization_enc_dec.py of CPM-2-Finetune for Chinese, its _encn variant for the
bilingual form), also where they lose something: a word of more than 200 characters is one `<unk>`, and in the bilingual form
so is a character inside a word for which there is no '##' piece, such as the % of '5%'. `tools/tokenize_report.py` counts
what a vocabulary loses. Left out on purpose: the bilingual encoder repeats the token of a text of one token.
"""

import difflib
import itertools
import json
import re
from collections.abc import Iterable
from typing import Any

from t5x_cpm.config import ConfigError
from t5x_cpm.data import word_cut
from t5x_cpm.data.vocabulary_base import BLANK, MARKS, SPECIALS, UNMARKS, Vocabulary, no_options, read
from t5x_cpm.data.vocabulary_cpm2 import Cpm2, Lossless

__all__ = ['BLANK', 'Vocabulary', 'load', 'load_saved']


class Cpm1(Vocabulary):
  """CPM-1's: words from jieba, joined with spaces, in SentencePiece. It has no sentinels: CPM-1 is decoder-only."""

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
    # Not word by word: SentencePiece adds up in 32 bits, so that of nearly equal ways the text before decides.
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
    if set(options) - {'extra_ids'} or not extra.isdigit():
      raise ConfigError(f'{self.spec}: the only option is extra_ids, a number, as in sentencepiece:FILE?extra_ids=100.')
    self._model = _sentencepiece(path)
    own = self._model.get_piece_size()
    self.unk_id, self.eos_id = self._model.unk_id(), self._model.eos_id()
    if self.eos_id < 0:
      raise ConfigError(f'{path}: the model has no end of sequence (it was trained with eos_id=-1); T5 needs one.')
    self.pad_id = self.bos_id = max(self._model.pad_id(), 0)
    inside = self._sentinels_inside()
    self.size = own if inside else own + int(extra)
    self.sentinels = inside or tuple(range(self.size - 1, own - 1, -1))
    self._own = own

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
      return [token for part in re.split('(?<=<)(?=extra_id_)', text) for token in _encode(self._model, part)]
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


_KINDS: dict[str, type[Vocabulary]] = {cls.kind: cls for cls in (Cpm2, Cpm1, SentencePiece)}


def _make(kind: str, path: str, options: dict[str, str]) -> Vocabulary:
  if kind == 'cpm2' and b'<0x00>' in read(path):
    return Lossless(path, options)
  return _KINDS[kind](path, options)


def load(spec: str) -> Vocabulary:
  """The vocabulary of a spec; see the head of this file.

  Raises:
    ConfigError: unknown kind, or a file that is missing or not of this kind.
  """
  kind, colon, rest = spec.partition(':')
  if not colon or kind not in _KINDS:
    near = difflib.get_close_matches(kind, _KINDS, n=1)
    hint = f' Did you mean {near[0]}:?' if near else ''
    raise ConfigError(f'TaskConfig.vocabulary = {spec!r}: expected {", ".join(f"{name}:FILE" for name in _KINDS)}.{hint}')
  path, _, query = rest.partition('?')
  options = dict(part.partition('=')[::2] for part in query.split('&') if part)
  return _make(kind, path, options)


def load_saved(directory: Any) -> Vocabulary:
  """The vocabulary that `Vocabulary.save` wrote to a folder."""
  from etils import epath

  path = epath.Path(directory) / 'vocabulary.json'
  if not path.exists():
    raise ConfigError(f'{directory} holds no vocabulary (no vocabulary.json).')
  saved = json.loads(path.read_text())
  return _make(saved['kind'], str(epath.Path(directory) / saved['file']), saved['options'])
