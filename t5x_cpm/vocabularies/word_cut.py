"""The word cut of jieba 0.42.1 (accurate mode, Hidden Markov Model on, default dictionary), ten times faster.

Every CPM tokenizer starts with ``jieba.cut``, which has four steps:

1. Runs of Chinese characters (U+4E00-9FD5), ASCII letters, digits and ``+#&._%-`` are each cut on their own; any other
   character is a word, and so is a carriage return with its line feed.
2. A run becomes the most probable sequence of words by the frequencies of the dictionary.
3. Neighbouring words of one character are joined again. The Chinese among them is cut by a Hidden Markov Model, unless
   all of it is a word of the dictionary.
4. The rest of them is cut by a regular expression for names and numbers.

rjieba, the same program in Rust, does step 2. In the others its version 0.2 differs from jieba: it counts the CJK extension
blocks as part of a run, keeps 'WES-5.4.5' whole, and holds the model in rounded numbers, so that it decides otherwise where
two ways are nearly or exactly as probable ('常在吃', '哈哈哈哈哈'). Here the model runs with jieba's own numbers, added in
the same order, at once on all of a text that needs it.
"""

import functools
import importlib.util
import pathlib
import re
import threading
from collections.abc import Iterator
from typing import Any

_CHUNK = 1 << 17  # characters cut at a time, so that the words of a very long document are never all in memory
_loading = threading.Lock()
_NEVER = -3.14e100  # jieba's logarithm of zero
_LONGEST = 1000  # characters given to the model at once, far more than real text needs; jieba's time grows with the square

_ASCII = 'a-zA-Z0-9+#&._%\\-'
_CHUNK_END = re.compile(f'[^\u4e00-\u9fd5{_ASCII}\r]')
# Runs of characters that jieba takes as words, each of them, and rjieba would join with a neighbour; surrogates, which rjieba
# refuses; and NUL, which separates words below.
_ALONE = re.compile('([\u3400-\u4dbf\u9fd6-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f\ud800-\udfff\0]+)')
# Step 4, on words with NUL between them. In ASCII, rjieba's step 2 joins only letters and digits. The first expression finds
# where that may differ from jieba's expression, the third. The second takes in all neighbours. No word of the dictionary
# matches it: those in pure ASCII have a sign beside a letter ('C++', 'AT&T').
_NOT_AS_JIEBA = re.compile('[+#&._%-](?:(?<=%)|\0(?:[+#&._%-]|(?<=\\.\0)[0-9]))')
_NOT_CHINESE = re.compile('(?<![^\0])(?:[a-zA-Z0-9]+\0)?(?:[+#&._%-]\0(?:[a-zA-Z0-9]+\0)?)+')
_NAME_OR_NUMBER = re.compile(r'([a-zA-Z0-9]+(?:\.\d+)?%?)')
_NAME_CHARACTERS = frozenset('abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+#&._%-\0')
# Step 3 asks whether joined characters are a word of the dictionary. Step 2 would have chosen a longer one, because no longer
# word is less probable than its characters one by one.
_LONGEST_UNLIKELY_WORD = 3


def _chunks(text: str) -> Iterator[str]:
  start = 0
  while len(text) - start > _CHUNK:
    end = _CHUNK_END.search(text, start + _CHUNK)
    if end is None:
      break
    yield text[start:end.end()]
    start = end.end()
  yield text[start:] if start else text


@functools.cache
def _load_dictionary() -> tuple[Any, Any]:
  """rjieba's cut and look-up. It loads its dictionary at import, 0.15 s (jieba's takes 0.7 s)."""
  import rjieba
  # jieba's dictionary has one line twice, of frequency 3, and counts it twice in the total, so the same is added here as NUL,
  # which never reaches the dictionary. The total matters only to the rounding of equal probabilities.
  rjieba.add_word('\0', 3, '')
  return rjieba.cut, functools.lru_cache(1 << 17)(rjieba.has_word)


def _dictionary() -> tuple[Any, Any]:
  with _loading:  # two threads that come first at the same time would both add to it
    return _load_dictionary()


def _is_left_over(codes: Any, position: int, step: int) -> bool:
  """Whether the word that begins or ends at `position` is ASCII that jieba's step 2 leaves as single characters."""
  word = ''
  while 0 <= position < len(codes) and codes[position]:
    word += chr(codes[position])
    position += step
  return word.isascii() and (word.isalnum() or len(word) == 1 and word in '+#&._%-')


@functools.cache
def _model() -> tuple[Any, Any, Any, Any]:
  """jieba's model, with its states in the order B(egin), E(nd), M(iddle), S(ingle).

  Returns:
    Log-probabilities, as arrays: of the first state [4, 1]; of a step into each state from the first and from the
    second of the two states that may come before it [4, 1], [4, 1]; of each character from U+4E00 on in each state [4, N].
  """
  import numpy as np
  spec = importlib.util.find_spec('jieba')  # without running its __init__, which takes 0.4 s
  if spec is None or not spec.submodule_search_locations:
    raise ImportError('CPM vocabularies cut words with the model of jieba: pip install jieba==0.42.1')
  tables = []
  for name in ('start', 'trans', 'emit'):
    path = pathlib.Path(spec.submodule_search_locations[0], 'finalseg', f'prob_{name}.py')
    file_spec = importlib.util.spec_from_file_location(f'_jieba_prob_{name}', path)
    assert file_spec and file_spec.loader
    module = importlib.util.module_from_spec(file_spec)
    file_spec.loader.exec_module(module)
    tables.append(module.P)
  start, step, emit = tables
  emission = np.full((4, 0x9fd6 - 0x4e00), _NEVER)
  for state, name in enumerate('BEMS'):
    known = {ord(character) - 0x4e00: value for character, value in emit[name].items() if '\u4e00' <= character <= '\u9fd5'}
    emission[state, list(known)] = list(known.values())
  steps = ([step[x][y] for x, y in zip(before, 'BEMS')] for before in ('EBBE', 'SMMS'))
  first, from_first, from_second = (np.array(values)[:, None] for values in ([start[y] for y in 'BEMS'], *steps))
  return first, from_first, from_second, emission


_FIRST, _SECOND = (1, 0, 0, 1), (3, 2, 2, 3)  # the two states that may come before B, E, M and S, in alphabetical order


def _word_ends(characters: Any, first: Any, lengths: Any) -> Any:
  """Where words end by the model (Viterbi).

  All sequences are advanced together, the longest first, so that those still running at a step are the first columns.
  Of two equally probable states jieba takes the one that is later in the alphabet.

  Args:
    characters: code points [N].
    first, lengths: where each sequence of them begins, and how many it has, [R] each.

  Returns:
    Whether a word ends after each character [N]; True outside the sequences.
  """
  import numpy as np
  ends = np.ones(len(characters), bool)
  if not len(first):
    return ends
  if lengths.max() > _LONGEST:
    split = [(s + i, min(n - i, _LONGEST)) for s, n in zip(first.tolist(), lengths.tolist()) for i in range(0, n, _LONGEST)]
    first, lengths = np.array(split).T
  order = np.argsort(-lengths, kind='stable')
  first, lengths = first[order], lengths[order]
  start, from_first, from_second, emission = _model()
  codes = characters.astype(np.intp) - 0x4e00
  running = np.searchsorted(-lengths, -np.arange(lengths[0]), side='left')  # [T]: sequences with a character at step t

  best = start + emission[:, codes[first]]  # [4, R]
  second_wins, single = [], np.empty(len(first), bool)
  for t in range(1, len(running)):
    rows = running[t]
    single[rows:best.shape[1]] = best[3, rows:] >= best[1, rows:]
    best = best[:, :rows]
    emitted = emission[:, codes[first[:rows] + t]]
    a = best[_FIRST, :] + from_first + emitted
    b = best[_SECOND, :] + from_second + emitted
    second_wins.append(b >= a)
    best = np.maximum(a, b)
  single[:best.shape[1]] = best[3] >= best[1]

  state = np.where(single, 3, 1)
  previous = np.array([_FIRST, _SECOND])
  for t in range(len(running) - 1, -1, -1):
    rows = running[t]
    now = state[:rows]
    ends[first[:rows] + t] = now & 1  # End or Single
    if t:
      state[:rows] = previous[second_wins[t - 1][now, np.arange(rows)].astype(np.intp), now]
  return ends


def _cut_single_characters(joined: str, in_dictionary: Any) -> str:
  """Step 3, on words with a NUL before, between and after them."""
  import numpy as np
  codes = np.frombuffer(joined.encode('utf-16-le'), np.uint16)
  chinese = (codes[1:-1] >= 0x4e00) & (codes[1:-1] <= 0x9fd5) & (codes[:-2] == 0) & (codes[2:] == 0)
  where = np.flatnonzero(chinese) + 1  # words that are one Chinese character
  first = np.flatnonzero(np.diff(where, prepend=-2) != 2)  # of these, the first of each neighbourhood
  lengths = np.diff(first, append=len(where))
  first, lengths = first[lengths > 1], lengths[lengths > 1]
  if not len(first):
    return joined
  characters = codes[where]
  text = characters.tobytes().decode('utf-16-le')
  for_model = np.ones(len(first), bool)
  for i in np.flatnonzero(lengths <= _LONGEST_UNLIKELY_WORD).tolist():
    start, end = first[i], first[i] + lengths[i]
    if in_dictionary(text[start:end]):
      for_model[i] = _is_left_over(codes, where[start] - 2, -1) or _is_left_over(codes, where[end - 1] + 2, 1)
  keep = np.ones(len(codes), bool)
  keep[where + 1] = _word_ends(characters, first[for_model], lengths[for_model])
  return codes[keep].tobytes().decode('utf-16-le')


def _cut_names(match: re.Match[str]) -> str:
  words = _NAME_OR_NUMBER.split(match.group().replace('\0', ''))
  return '\0'.join([word for word in words if word]) + '\0'


def _cut_not_chinese(joined: str) -> str:
  """Step 4, on words with a NUL before, between and after them."""
  out: list[str] = []
  done = 0
  for match in _NOT_AS_JIEBA.finditer(joined):
    start, end = match.span()
    if start < done:
      continue
    while start > done and joined[start - 1] in _NAME_CHARACTERS:
      start -= 1
    if start > done and joined[start] != '\0' != joined[start - 1]:  # inside a word that begins in Chinese
      start = joined.index('\0', start)
    while end < len(joined) and joined[end] in _NAME_CHARACTERS:
      end += 1
    out += joined[done:start], _NOT_CHINESE.sub(_cut_names, joined[start:end])
    done = end
  return ''.join([*out, joined[done:]]) if out else joined


def _cut(text: str) -> list[str]:
  most_probable, in_dictionary = _dictionary()
  words = most_probable(text, False)
  if not words:
    return words
  joined = '\0' + '\0'.join(words) + '\0'
  if not joined.isascii():
    joined = _cut_single_characters(joined, in_dictionary)
  return _cut_not_chinese(joined)[1:-1].split('\0')


def cut(text: str) -> Iterator[list[str]]:
  """Cuts a text of any length into words, one list for each chunk of it; joined, the words are the text."""
  for chunk in _chunks(text):
    if _ALONE.search(chunk):
      yield [word for i, run in enumerate(_ALONE.split(chunk)) for word in (run if i % 2 else _cut(run) if run else ())]
    else:
      yield _cut(chunk)


def lcut(text: str) -> list[str]:
  """The words of a text, as ``jieba.lcut`` gives them."""
  return [word for words in cut(text) for word in words]
