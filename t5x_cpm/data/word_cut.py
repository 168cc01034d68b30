"""The word cut of jieba 0.42.1 (accurate mode, Hidden Markov Model on, default dictionary) at the speed of rjieba.

Every CPM tokenizer starts with ``jieba.cut``. rjieba is the same algorithm with the same dictionary in Rust, but its
version 0.2 differs from jieba in three places, which this module puts right:

* rjieba counts CJK extension blocks (U+3400-4DBF, U+9FD6-9FFF, U+F900-FAFF, U+20000 and up) as part of a run that it
  segments; jieba stops at U+9FD5 and makes each such character a word. `cut` splits the text at them first.
* rjieba keeps 'WES-5.4.5' or 'a_1' whole, jieba cuts them by the expression below. `parts` cuts such a word again. It
  is separate so that a caller that keeps a table of words pays for it once per distinct word.
* Two paths through the Hidden Markov Model can have the same probability, as in '哈哈哈哈哈', and rounding then decides
  differently. That needs two repetitions among the characters that the dictionary leaves to the model: two paths of
  equal probability give every character the same states in another order, and a single pair of equal characters cannot
  exchange its states. `cut` finds such runs and takes the model of the jieba package for them.
"""

import re
from collections.abc import Iterator

_CHUNK = 1 << 17  # characters cut at a time, so that the words of a very long document are not all in memory

# Characters that jieba never joins with a neighbour, while rjieba may. The surrogates have no UTF-8 form for rjieba.
_ALONE = re.compile('([\u3400-\u4dbf\u9fd6-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ebef\U0002f800-\U0002fa1f])')
_SURROGATE = re.compile('[\ud800-\udfff]')
# jieba cuts each run of these characters by itself. '\r' does not end a chunk because '\r\n' is one word.
_RUN = '\u4e00-\u9fd5a-zA-Z0-9+#&._%\\-'
_IN_RUN = re.compile(f'[{_RUN}]+')
_CHUNK_END = re.compile(f'[^{_RUN}\r]')
_HAN = re.compile('[\u4e00-\u9fd5]{3,}')

_CONNECTED = re.compile('[a-zA-Z0-9][-._]')
_NUMBER_OR_NAME = re.compile(r'([a-zA-Z0-9]+(?:\.\d+)?%?)')


def cut(text: str) -> Iterator[list[str]]:
  """Cuts a text of any length into words, a list for each part of it.

  The words joined are the text, except that a lone surrogate, which no encoding can hold, becomes U+FFFD. A word that
  rjieba keeps whole although jieba cuts it is returned whole: give it to `parts`.
  """
  for chunk in _chunks(text):
    try:
      yield _cut_chunk(chunk)
    except UnicodeEncodeError:
      yield _cut_chunk(_SURROGATE.sub('\ufffd', chunk))


def parts(word: str) -> list[str]:
  """The words that jieba makes of one word of `cut`: nearly always itself."""
  if _CONNECTED.search(word):
    return [part for part in _NUMBER_OR_NAME.split(word) if part]
  return [word]


def lcut(text: str) -> list[str]:
  """The words of a text, as ``jieba.lcut`` gives them."""
  return [part for words in cut(text) for word in words for part in parts(word)]


def _chunks(text: str) -> Iterator[str]:
  start = 0
  while len(text) - start > _CHUNK:
    end = _CHUNK_END.search(text, start + _CHUNK)
    if end is None:
      break
    yield text[start:end.end()]
    start = end.end()
  yield text[start:] if start else text


def _repetitive(text: str) -> list[str]:
  """The stretches of Chinese characters that have two repetitions."""
  return [run for run in _HAN.findall(text) if len(run) - len(set(run)) > 1]


def _tied_runs(text: str) -> Iterator[tuple[int, int, list[str]]]:
  """The runs in which rounding may decide, as (start, end, their words by jieba)."""
  position = end = 0
  for stretch in _repetitive(text):
    start = text.index(stretch, position)
    position = start + len(stretch)
    if start < end:
      continue  # it is part of the run before
    while start > end and _IN_RUN.match(text[start - 1]):
      start -= 1
    end = _IN_RUN.match(text, start).end()
    words = _route(text[start:end])
    if any(left and _repetitive(word) for word, left in words):
      yield start, end, _cut_route(words)


def _route(run: str) -> list[tuple[str, bool]]:
  """The most probable dictionary words of a run; neighbouring words of one character are joined and marked True."""
  import rjieba
  words = []
  for word in rjieba.cut(run, False):
    left = len(word) == 1 or word.isascii() and word.isalnum()  # rjieba joins ASCII by itself
    if left and words and words[-1][1]:
      words[-1] = (words[-1][0] + word, True)
    else:
      words.append((word, left))
  return words


def _cut_route(words: list[tuple[str, bool]]) -> list[str]:
  import jieba.finalseg
  import rjieba
  cut = []
  for word, left in words:
    if not left or len(word) == 1:
      cut.append(word)
    elif rjieba.has_word(word):
      cut.extend(word)
    else:
      cut.extend(jieba.finalseg.cut(word))
  return cut


def _cut_chunk(text: str) -> list[str]:
  import rjieba  # loads its dictionary, 0.15 s (jieba's takes 0.7 s): not at import of this module
  words = []
  for part in _ALONE.split(text) if _ALONE.search(text) else [text]:
    done = 0
    for start, end, run in _tied_runs(part):
      words += rjieba.cut(part[done:start])
      words += run
      done = end
    words += rjieba.cut(part[done:])
  return words
