"""CPM-2's vocabularies: a list of pieces, matched longest first in each word of the text."""

import itertools
import re
from collections.abc import Sequence
from typing import Any

from t5x_cpm.config import ConfigError
from t5x_cpm.data import word_cut
from t5x_cpm.data.vocabulary_base import LINE_FEED, MARKS, SPACE, SPECIALS, UNMARKS, Vocabulary, no_options, read

_HAN = re.compile('[\u4e00-\u9fff]')
_SENTINEL = re.compile(r'<s_(\d+)>')
# Full-width ASCII to half-width, but for the punctuation that Chinese text is written with.
_FOLDED = (chr(code) for code in range(0xff01, 0xff5f) if chr(code) not in '，。！（）？、；：')
_HALF_WIDTH = str.maketrans({wide: chr(ord(wide) - 0xfee0) for wide in _FOLDED} | {'\u3000': ' '})
_REMEMBERED = 1 << 18  # words whose ids are kept


class Cpm2(Vocabulary):
  """CPM-2's: a list of pieces, matched longest first in each word."""

  kind = 'cpm2'

  def __init__(self, path: str, options: dict[str, str]):
    super().__init__(path, options)
    no_options(self.spec, options)
    self.pieces = _read_pieces(path)
    self.size = len(self.pieces)
    index = {piece: token for token, piece in enumerate(self.pieces)}
    for special in SPECIALS:
      if special not in index:
        raise ConfigError(f'{path}: no piece {special}; a CPM-2 vocabulary has {", ".join(SPECIALS)} and <s_0>, <s_1> ...')
    self.unk_id, self.bos_id, _, self.pad_id, self.eos_id = (index[special] for special in SPECIALS)
    numbers = {int(match[1]): token for piece, token in index.items() if (match := _SENTINEL.fullmatch(piece))}
    if not numbers or sorted(numbers) != list(range(len(numbers))):
      missing = next(number for number in range(len(numbers) + 1) if number not in numbers)
      raise ConfigError(
          f'{path}: sentinel <s_{missing}> is missing; {len(numbers)} are there, expected <s_0>, <s_1> ... without a gap.')
    self.sentinels = tuple(numbers[number] for number in range(len(numbers)))
    self._bytes = [index.get(f'<0x{value:02X}>', self.unk_id) for value in range(256)]
    self._byte_value = {token: value for value, token in enumerate(self._bytes) if token != self.unk_id}
    self._special = {index[p] for p in ('<sep>', '<mask>', '<go>', *SPECIALS) if p in index}
    own = {piece: token for piece, token in index.items() if token not in {*self._special, *self.sentinels, *self._byte_value}}
    self._continued = {piece[2:]: token for piece, token in own.items() if piece.startswith('##') and len(piece) > 2}
    self._start = {piece: token for piece, token in own.items() if not (piece.startswith('##') and len(piece) > 2)}
    self.bilingual = bool(self._continued)
    self._longest = max(map(len, own), default=1)
    self._han = [_is_chinese(piece) for piece in self.pieces]
    self._words = _Words(self._match)

  def encode(self, text: str) -> list[int]:
    if not self.bilingual:
      text = text.translate(_HALF_WIDTH)
    words = word_cut.lcut(text)
    if len(self._words) > _REMEMBERED:
      self._words.clear()
    if self.bilingual and ' ' in text:
      words = self._drop_spaces(words)
    return list(itertools.chain.from_iterable(map(self._words.__getitem__, words)))

  def _drop_spaces(self, words: list[str]) -> list[str]:
    """The words without each space that stands between two tokens that imply it."""
    spaces = [place for place, word in enumerate(words) if word == ' ']
    implied = [place for place in spaces if 0 < place < len(words) - 1 and self._implies_space(
        self._words[words[place - 1]][-1], self._words[words[place + 1]][0])]
    for place in implied:
      words[place] = ''
    return words

  def _implies_space(self, before: int, after: int) -> bool:
    """Whether decoding puts a space between two tokens, the second of which begins a word."""
    return not self._han[before] and not self._han[after]

  def _beside_blank(self, part: str, left: bool, right: bool) -> str:
    """Without the space that masking leaves out: between a blank and a token that is not Chinese there is none."""
    if not self.bilingual:
      return part
    if left and part.startswith(' ') and not part.startswith('  ') and not _HAN.match(part[1:2]):
      part = part[1:]
    if right and part.endswith(' ') and not part.endswith('  ') and not _HAN.match(part[-2:-1]):
      part = part[:-1]
    return part

  def _match(self, word: str) -> tuple[int, ...]:
    """The ids of a word, longest piece first."""
    word = word.translate(MARKS)
    ids: list[int] = []
    place = 0
    while place < len(word):
      for end in range(min(len(word), place + self._longest), place, -1):
        part = word[place:end]
        continues = place > 0 and self.bilingual and not _is_chinese(part)
        token = (self._continued if continues else self._start).get(part)
        if token is not None:
          ids.append(token)
          break
      else:
        end = place + 1
        ids += self._fallback(word[place])
      place = end
    return tuple(ids)

  def _fallback(self, character: str) -> list[int]:
    return [self.unk_id]

  def _decode_run(self, ids: Sequence[int]) -> str:
    out: list[str] = []
    before: int | None = None
    for token in ids:
      if not 0 <= token < self.size or token == self.unk_id:
        out.append('<unk>')
        before = None
        continue
      if token in self._special:
        continue
      piece = self.pieces[token]
      continues = self.bilingual and piece.startswith('##') and len(piece) > 2
      if continues:
        piece = piece[2:]
      elif before is not None and self.bilingual and self._implies_space(before, token):
        piece = ' ' + piece
      out.append(piece)
      before = token
    return ''.join(out).translate(UNMARKS)

  def piece(self, token: int) -> str:
    return self.pieces[token]


class Lossless(Cpm2):
  """A bilingual vocabulary with byte pieces: decode(encode(text)) == text for every valid text.

  A space is left out only between two tokens of ASCII letters and digits, and put back there and nowhere else; two such words
  that touch are one word, whose second part is written with '##'. What has no piece is written as its UTF-8 bytes.
  """

  def __init__(self, path: str, options: dict[str, str]):
    super().__init__(path, options)
    self._begins_latin = [_is_latin(piece[:1]) for piece in self.pieces]
    self._ends_latin = [_is_latin(piece[-1:]) for piece in self.pieces]

  def encode(self, text: str) -> list[int]:
    words = word_cut.lcut(text)
    if len(self._words) > _REMEMBERED:
      self._words.clear()
    joined: list[str] = []
    for word in words:
      if joined and _is_latin(word[:1]) and _is_latin(joined[-1][-1:]):
        joined[-1] += word
      else:
        joined.append(word)
    return list(itertools.chain.from_iterable(map(self._words.__getitem__, self._drop_spaces(joined))))

  def _implies_space(self, before: int, after: int) -> bool:
    return self._ends_latin[before] and self._begins_latin[after]

  def _match(self, word: str) -> tuple[int, ...]:
    return tuple(self._fallback(word)) if word in (SPACE, LINE_FEED) else super()._match(word)

  def _fallback(self, character: str) -> list[int]:
    return [self._bytes[value] for value in character.encode('utf-8', 'replace')]

  def _decode_run(self, ids: Sequence[int]) -> str:
    out = []
    for is_byte, run in itertools.groupby(ids, self._byte_value.__contains__):
      tokens = list(run)
      if is_byte:
        out.append(bytes(self._byte_value[token] for token in tokens).decode('utf-8', 'replace'))
      else:
        out.append(super()._decode_run(tokens))
    return ''.join(out)


class _Words(dict):
  """Word -> ids, computed when asked for the first time."""

  def __init__(self, match: Any):
    super().__init__()
    self._match = match

  def __missing__(self, word: str) -> tuple[int, ...]:
    self[word] = ids = self._match(word)
    return ids


def _is_chinese(piece: str) -> bool:
  """The released code's test: a Chinese character in it, or the space."""
  return piece == SPACE or _HAN.search(piece) is not None


def _is_latin(character: str) -> bool:
  return character.isascii() and character.isalnum()


def _read_pieces(path: str) -> list[str]:
  try:
    text = read(path).decode('utf-8')
  except UnicodeDecodeError as error:
    raise ConfigError(
        f'{path} is not UTF-8 (byte {error.start}): expected one piece a line. Check TaskConfig.vocabulary.') from None
  pieces = text.removesuffix('\n').split('\n')  # not splitlines(): a piece may be another kind of line break
  seen: dict[str, int] = {}
  for number, piece in enumerate(pieces, 1):
    if not piece:
      raise ConfigError(f'{path}:{number}: an empty line; expected one piece a line.')
    if piece in seen:
      raise ConfigError(f'{path}:{number}: the piece {piece!r} stands in line {seen[piece]} too.')
    seen[piece] = number
  return pieces
