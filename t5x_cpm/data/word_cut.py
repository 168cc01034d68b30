"""The word cut of jieba 0.42.1 (accurate mode, Hidden Markov Model on, default dictionary) at the speed of rjieba.

Every CPM tokenizer starts with ``jieba.cut``. rjieba is the same algorithm with the same dictionary in Rust, but its
version 0.2 differs from jieba in two places, which `cut` and `parts` put right:

* rjieba counts CJK extension blocks (U+3400-4DBF, U+9FD6-9FFF, U+F900-FAFF, U+20000 and up) as part of a run that it
  segments; jieba stops at U+9FD5 and makes each such character a word. `cut` splits the text at them first.
* rjieba keeps 'WES-5.4.5' or 'a_1' whole, jieba cuts them by the expression below. `parts` cuts such a word again. It
  is separate so that a caller that keeps a table of words pays for it once per distinct word.

Where rjieba cannot be installed, jieba itself serves, with the same words at a twentieth of the speed.
"""

import re
from collections.abc import Callable, Iterator

_CHUNK = 1 << 17  # characters cut at a time, so that the words of a very long document are not all in memory

# Characters that jieba never joins with a neighbour, while rjieba may. The surrogates have no UTF-8 form for rjieba.
_ALONE = re.compile('([㐀-䶿\u9fd6-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ebef\U0002f800-\U0002fa1f])')
_SURROGATE = re.compile('[\ud800-\udfff]')
# What ends a block of jieba's outer splitting. '\r' is left out because '\r\n' is one word.
_BLOCK_END = re.compile('[^\u4e00-\u9fd5a-zA-Z0-9+#&._%\\-\r]')

_CONNECTED = re.compile(r'[a-zA-Z0-9][-._]')
_NUMBER_OR_NAME = re.compile(r'([a-zA-Z0-9]+(?:\.\d+)?%?)')

_cut: Callable[[str], list[str]] | None = None


def _load() -> Callable[[str], list[str]]:
  """Loads the dictionary (0.15 s with rjieba, 0.7 s with jieba) at the first cut, not at import."""
  global _cut
  try:
    import rjieba
    _cut = rjieba.cut
  except ImportError:
    try:
      import logging

      import jieba
    except ImportError as error:
      raise ImportError('CPM vocabularies cut text into words with jieba: install rjieba (fast) or jieba==0.42.1.') from error
    jieba.setLogLevel(logging.WARNING)
    _cut = jieba.lcut
  return _cut


def _chunks(text: str) -> Iterator[str]:
  start = 0
  while len(text) - start > _CHUNK:
    end = _BLOCK_END.search(text, start + _CHUNK)
    if end is None:
      break
    yield text[start:end.end()]
    start = end.end()
  yield text[start:] if start else text


def cut(text: str) -> Iterator[list[str]]:
  """Cuts a text of any length into words, a list for each part of it.

  The words joined are the text, except that a lone surrogate, which no encoding can hold, becomes U+FFFD. A word that
  rjieba keeps whole although jieba cuts it is returned whole: give it to `parts`.
  """
  words_of = _cut or _load()
  for chunk in _chunks(text):
    try:
      words = words_of(chunk)
    except UnicodeEncodeError:
      chunk = _SURROGATE.sub('\ufffd', chunk)
      words = words_of(chunk)
    if _ALONE.search(chunk):
      words = [word for part in _ALONE.split(chunk) if part for word in words_of(part)]
    yield words


def parts(word: str) -> list[str]:
  """The words that jieba makes of one word of `cut`: nearly always itself."""
  if _CONNECTED.search(word):
    return [part for part in _NUMBER_OR_NAME.split(word) if part]
  return [word]


def lcut(text: str) -> list[str]:
  """The words of a text, as ``jieba.lcut`` gives them."""
  return [part for words in cut(text) for word in words for part in parts(word)]
