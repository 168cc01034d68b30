"""CPM-2's vocabularies: a list of pieces, matched longest first in each word of the text.

Internally a token is the character chr(id) and a sequence of tokens is a string, because strings are joined and substituted
much faster than lists of numbers. The tokens of a word are remembered, so that each word is matched only once.
"""

import array
import contextlib
import functools
import gc
import itertools
import re
import sys
from collections.abc import Iterable, Iterator

from t5x_cpm import user_files
from t5x_cpm.config import ConfigError
from t5x_cpm.vocabularies import word_cut
from t5x_cpm.vocabularies.base import LINE_FEED, MARKS, SPACE, SPECIALS, UNMARKS, Vocabulary, Words, no_options, read

_HAN = re.compile('[\u4e00-\u9fff]')
_SENTINEL = re.compile(r'<s_(\d+)>')
_BYTES = [f'<0x{value:02X}>' for value in range(256)]
# Full-width ASCII to half-width, except for the punctuation of Chinese text.
_HALF_WIDTH = {chr(code): chr(code - 0xfee0) for code in range(0xff00, 0xff5f) if chr(code) not in '，。！（）？、；：'}
_HALF_WIDTH['\u3000'] = ' '
_FULL_WIDTH = re.compile(f'[{"".join(_HALF_WIDTH)}]')
_SEPARATOR, _SEPARATOR_TOKEN = '\uffff', '\U0010ffff'  # between the texts of a batch; not a character, and a word of its own
_BATCH = 1 << 20  # characters
_LONGEST_PIECE = 256  # characters; every beginning of a piece is kept, so that memory grows with the square of its length


def _is_chinese(piece: str) -> bool:
  """The released code's test: whether a piece has a Chinese character in it, or is the space."""
  return piece == SPACE or _HAN.search(piece) is not None


def _is_latin(character: str) -> bool:
  return character.isascii() and character.isalnum()


def _continues(piece: str) -> bool:
  return len(piece) > 2 and piece.startswith('##')


def read_pieces(path: str, field: str = 'TaskConfig.vocabulary') -> list[str]:
  """The lines of a vocabulary file, which `field` names. Raises ConfigError where it is none."""
  content = read(path, field)
  try:
    text = content.decode('utf-8')
  except UnicodeDecodeError as error:
    line = content.count(b'\n', 0, error.start) + 1
    raise ConfigError(f'{path}:{line}: not UTF-8{user_files.hint(content)}; expected one piece a line. Check '
                      f'{field}.') from None
  text = text.removeprefix('\ufeff').replace('\r\n', '\n')  # as some editors save it
  pieces = text.removesuffix('\n').split('\n')  # not splitlines(): a piece may be another kind of line break
  if len(pieces) > ord(_SEPARATOR_TOKEN):
    raise ConfigError(f'{path} has {len(pieces):,} lines; expected one piece a line, at most {ord(_SEPARATOR_TOKEN):,}.')
  seen: dict[str, int] = {}
  for number, piece in enumerate(pieces, 1):
    if not piece:
      raise ConfigError(f'{path}:{number}: an empty line; expected one piece a line.')
    if len(piece) > _LONGEST_PIECE:
      raise ConfigError(f'{path}:{number}: a piece of {len(piece):,} characters; expected one piece of at most '
                        f'{_LONGEST_PIECE} a line. Check {field}.')
    if piece in seen:
      raise ConfigError(f'{path}:{number}: the piece {piece!r} stands in line {seen[piece]} too.')
    seen[piece] = number
  return pieces


def _sentinels(path: str, index: dict[str, int]) -> tuple[int, ...]:
  numbers = {int(match[1]): token for piece, token in index.items() if (match := _SENTINEL.fullmatch(piece))}
  for number in range(max(len(numbers), 1)):
    if number not in numbers:
      raise ConfigError(f'{path}: sentinel <s_{number}> is missing; {len(numbers)} are there, expected <s_0>, <s_1> ... '
                        'without a gap.')
  return tuple(numbers[number] for number in range(len(numbers)))


def _prefixes(tokens: dict[str, str]) -> dict[str, str]:
  """Adds the beginnings of all pieces, without a token, so that a search knows when to stop."""
  begun = {piece[:end]: '' for piece in tokens for end in range(1, len(piece))}
  return begun | tokens


def _numbers(tokens: str) -> list[int]:
  ids = array.array('I' if array.array('I').itemsize == 4 else 'L')
  ids.frombytes(tokens.encode(f'utf-32-{sys.byteorder[0]}e', 'surrogatepass'))
  return ids.tolist()


def _any(members: list[bool]) -> str:
  """A regular expression that matches one token whose entry in `members` is true."""
  ranges = []
  for joins, group in itertools.groupby(enumerate(members), lambda item: item[1]):
    if joins:
      tokens = [token for token, _ in group]
      ranges.append(f'{re.escape(chr(tokens[0]))}-{re.escape(chr(tokens[-1]))}')
  return f'[{"".join(ranges)}]' if ranges else '(?!.).'


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
  """Stops Python's garbage collector: walking lists of ids, which have no cycles, again and again takes a tenth of the time."""
  enabled = gc.isenabled()
  gc.disable()
  try:
    yield
  finally:
    if enabled:
      gc.enable()


class Cpm2(Vocabulary):
  """The vocabulary of CPM-2: a list of pieces, matched longest first in each word."""

  kind = 'cpm2'
  _longest_word = 200  # characters; a longer word is unknown

  def __init__(self, path: str, options: dict[str, str]):
    super().__init__(path, options)
    no_options(self.spec, options)
    self.pieces = read_pieces(path)
    self.size = len(self.pieces)
    index = {piece: token for token, piece in enumerate(self.pieces)}
    for special in (*SPECIALS, SPACE, LINE_FEED):
      if special not in index:
        raise ConfigError(f'{path}: no piece {special}; a CPM-2 vocabulary has {", ".join(SPECIALS)}, {SPACE} (space), '
                          f'{LINE_FEED} (line feed) and <s_0>, <s_1> ... Check TaskConfig.vocabulary.')
    self.unk_id, self.bos_id, _, self.pad_id, self.eos_id = (index[special] for special in SPECIALS)
    self.sentinels = _sentinels(path, index)
    self._byte_value = {index[piece]: value for value, piece in enumerate(_BYTES) if piece in index}
    self._silent = {index[piece] for piece in ('<sep>', '<mask>', '<go>', *SPECIALS[1:]) if piece in index}
    not_text = {self.unk_id, *self._silent, *self.sentinels, *self._byte_value}
    tokens = {piece: chr(token) for piece, token in index.items() if token not in not_text}
    first = {piece: token for piece, token in tokens.items() if not _continues(piece)}
    continued = {piece[2:]: token for piece, token in tokens.items() if _continues(piece) and not _is_chinese(piece[2:])}
    self.bilingual = bool(continued) or '<go>' in index
    self._space, self._line_feed = first[SPACE], first[LINE_FEED]
    self._first = _prefixes(first)
    self._next = self._first
    if self.bilingual:
      self._next = _prefixes(continued | {piece: token for piece, token in first.items() if self._stays(piece)})
    self._unknown = chr(self.unk_id)
    self._words = Words(self._match)

  def _stays(self, piece: str) -> bool:
    """Whether a piece may also stand inside a word as it is, without '##'."""
    return _is_chinese(piece)

  @functools.cached_property
  def _joins(self) -> tuple[list[bool], list[bool]]:
    """For each token, whether a space after it, and one before it, may be left out; both sides must agree."""
    not_chinese = [not _is_chinese(piece) for piece in self.pieces]
    return not_chinese, not_chinese

  @functools.cached_property
  def _implied_space(self) -> re.Pattern[str]:
    first, second = self._joins
    space = re.escape(self._space)
    return re.compile(f'{space}(?<={_any(first)}{space})(?={_any(second)})')

  def encode(self, text: str) -> list[int]:
    return _numbers(self._join(self._tokens(text)))

  def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
    with _without_collector():
      return self._encode_batch(texts)

  def _encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
    ids: list[list[int]] = []
    batch: list[str] = []
    size = 0
    for text in itertools.chain(texts, [None]):
      if text is None or size + len(text) > _BATCH or _SEPARATOR in text:
        if batch:
          ids += map(_numbers, self._join(self._tokens(_SEPARATOR.join(batch), separated=True)).split(_SEPARATOR_TOKEN))
        batch, size = [], 0
      if text is not None and _SEPARATOR in text:
        ids.append(self.encode(text))
      elif text is not None:
        batch.append(text)
        size += len(text)
    return ids

  def _encode_around_blanks(self, texts: list[str]) -> list[int]:
    tokens = self._tokens(texts[0])
    for sentinel, text in zip(self.sentinels, texts[1:]):
      tokens += chr(sentinel) + self._tokens(text)
    return _numbers(self._join(tokens))

  def encode_after(self, before: str, text: str) -> list[int]:
    # The last token, for which the end of `before` is enough, decides whether a space or '##' is left out or put in.
    last = self._tokens(before[-64:])[-1:] if self.bilingual else ''
    return _numbers(self._join(last + self._tokens(text))[len(last):])

  def _tokens(self, text: str, separated: bool = False) -> str:
    """The tokens of the words of a text, or of texts with separators between them."""
    if not self.bilingual:
      text = _FULL_WIDTH.sub(lambda match: _HALF_WIDTH[match[0]], text)
    tokens = ''.join([''.join(map(self._words.__getitem__, words)) for words in word_cut.cut(text)])
    if not separated and _SEPARATOR in text:
      tokens = tokens.replace(_SEPARATOR_TOKEN, self._longest_first(_SEPARATOR, self._first))
    return tokens

  def _join(self, tokens: str) -> str:
    """The tokens of a text, made from those of its words by leaving out the spaces that decoding puts back."""
    return self._implied_space.sub('', tokens) if self.bilingual else tokens

  def _match(self, word: str) -> str:
    """The tokens of a word."""
    if word == _SEPARATOR:
      return _SEPARATOR_TOKEN
    if len(word) > self._longest_word:
      return self._unknown
    if word[-1] in ' \n':
      word = word.translate(MARKS)
    return self._first.get(word) or self._longest_first(word, self._first)

  def _longest_first(self, word: str, table: dict[str, str]) -> str:
    """The tokens of a word; the first is looked up in `table`, the others in `self._next`."""
    tokens: list[str] = []
    start, length, look_up = 0, len(word), table.get
    while start < length:
      token = entry = look_up(word[start])
      end = longest = start + 1
      while entry is not None and end < length:
        end += 1
        entry = look_up(word[start:end])
        if entry:
          token, longest = entry, end
      tokens.append(token or self._fallback(word[start]))
      start, look_up = longest, self._next.get
    return ''.join(tokens)

  def _fallback(self, character: str) -> str:
    return self._unknown

  def decode(self, ids: Iterable[int]) -> str:
    first, second = self._joins if self.bilingual else ([False] * self.size,) * 2
    out: list[str] = []
    octets = bytearray()
    before = -1
    for token in map(int, ids):
      if not 0 <= token < self.size:
        token = self.unk_id
      if token in self._silent:
        continue
      if token in self._byte_value:
        octets.append(self._byte_value[token])
      else:
        if octets:
          out.append(octets.decode('utf-8', 'replace'))
          octets.clear()
        piece = self.pieces[token]
        if self.bilingual and _continues(piece):
          piece = piece[2:]
        elif before >= 0 and first[before] and second[token]:
          out.append(' ')
        out.append(piece.translate(UNMARKS) if len(piece) == 1 else piece)
      before = token
    out.append(octets.decode('utf-8', 'replace'))
    return ''.join(out)

  def piece(self, token: int) -> str:
    return self.pieces[token]


class Lossless(Cpm2):
  """A bilingual vocabulary with byte pieces: decode(encode(text)) == text for every text that UTF-8 can hold.

  A space is left out only between two tokens of ASCII letters and digits, and decoding puts it back only there. Where two
  such words touch, the second is written with '##'. A character without a piece is written as its UTF-8 bytes.
  """

  _longest_word = 1 << 60

  def __init__(self, path: str, options: dict[str, str]):
    super().__init__(path, options)
    missing = [piece for value, piece in enumerate(_BYTES) if value not in self._byte_value.values()]
    if missing:
      raise ConfigError(f'{path}: no piece {missing[0]}; a vocabulary with pieces for bytes needs all 256.')
    self._byte = {value: chr(token) for token, value in self._byte_value.items()}

  def _stays(self, piece: str) -> bool:
    return super()._stays(piece) and not _is_latin(piece[0])  # decoding would put a space before it

  @functools.cached_property
  def _joins(self) -> tuple[list[bool], list[bool]]:
    # A sentinel counts as such a token, because most tokens that it hides are.
    sentinels = set(self.sentinels)
    silent = {*self._byte_value, *self._silent}
    first = [t in sentinels or t not in silent and _is_latin(piece[-1]) for t, piece in enumerate(self.pieces)]
    second = [t in sentinels or _is_latin(piece[0]) for t, piece in enumerate(self.pieces)]
    return first, second

  @functools.cached_property
  def _touching(self) -> re.Pattern[str]:
    first, second = self._joins
    sentinels = set(self.sentinels)
    return re.compile(f'(?<={_any(first)}){_any([joins and t not in sentinels for t, joins in enumerate(second)])}')

  def _join(self, tokens: str) -> str:
    continued = self._touching.sub(lambda match: self._longest_first(self.pieces[ord(match[0])], self._next), tokens)
    return super()._join(continued)

  def _match(self, word: str) -> str:
    return self._as_bytes(word) if word in (SPACE, LINE_FEED) else super()._match(word)

  def _fallback(self, character: str) -> str:
    return self._line_feed if character == LINE_FEED else self._as_bytes(character)  # in the word '\r\n'

  def _as_bytes(self, character: str) -> str:
    try:
      octets = character.encode('utf-8')
    except UnicodeEncodeError:  # half of a surrogate pair
      octets = b'\xef\xbf\xbd'
    return ''.join(self._byte[value] for value in octets)
