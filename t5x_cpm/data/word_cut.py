"""The word cut of jieba 0.42.1 (accurate mode, Hidden Markov Model on, default dictionary), ten times faster.

Every CPM tokenizer starts with ``jieba.cut``. It is made of four steps:

1. Runs of Chinese characters (U+4E00-9FD5), ASCII letters, digits and ``+#&._%-`` are cut each by itself; any other
   character is a word, and so is '\\r\\n'.
2. The most probable way through a run by the frequencies of the dictionary.
3. What is left as two or more neighbouring words of one character goes to the Hidden Markov Model where Chinese, and is
   split by an expression for names and numbers where ASCII ...
4. ... unless it is in the dictionary as a whole: then it stays single characters.

rjieba, the same program in Rust, serves step 2 only. In the others its version 0.2 differs: it counts the CJK extension
blocks as part of a run, keeps 'WES-5.4.5' whole, and has the model in rounded numbers, so that it decides otherwise
where two ways are nearly or exactly as probable ('\u5e38\u5728\u5403', '\u54c8\u54c8\u54c8\u54c8\u54c8'). Here the model runs with jieba's own numbers, in
the same order of additions, over all that a text needs it for at once.
"""

import functools
import importlib.util
import pathlib
import re
from collections.abc import Iterator

_CHUNK = 1 << 17  # characters cut at a time, so that the words of a very long document are not all in memory
_NEVER = -3.14e100  # jieba's log of zero
_LONGEST = 1000  # characters given to the model at once, far above what text has; jieba's time grows with the square
_REMEMBERED = 1 << 17  # results of steps 3 and 4 that are kept

_HAN = '\u4e00-\u9fd5'
_RUN = _HAN + 'a-zA-Z0-9+#&._%\\-'
_CHUNK_END = re.compile(f'[^{_RUN}\r]')  # '\r\n' is one word
# Words for jieba that rjieba would join with a neighbour, surrogates, which it refuses, and the separator used below.
_ALONE = re.compile('([\u3400-\u4dbf\u9fd6-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f\ud800-\udfff\0])')
# Step 2's words, each followed by a NUL: two or more neighbours of one character. rjieba joins ASCII letters and digits.
_LEFT_OVER = re.compile(f'(?<![^\0])((?:(?:[{_RUN}]|[a-zA-Z0-9]{{2,}})\0){{2,}})')
_NOT_HAN = re.compile(f'([^{_HAN}]+)')
_NAME_OR_NUMBER = re.compile(r'([a-zA-Z0-9]+(?:\.\d+)?%?)')

_left_over: dict[str, str] = {}  # 'a\0b\0c\0' -> 'a\0bc\0'


def cut(text: str) -> Iterator[list[str]]:
  """Cuts a text of any length into words, one list for each part of it; the words joined are the text."""
  for chunk in _chunks(text):
    if _ALONE.search(chunk):
      yield [word for i, part in enumerate(_ALONE.split(chunk)) for word in ([part] if i % 2 else _cut(part))]
    else:
      yield _cut(chunk)


def lcut(text: str) -> list[str]:
  """The words of a text, as ``jieba.lcut`` gives them."""
  return [word for words in cut(text) for word in words]


def _chunks(text: str) -> Iterator[str]:
  start = 0
  while len(text) - start > _CHUNK:
    end = _CHUNK_END.search(text, start + _CHUNK)
    if end is None:
      break
    yield text[start:end.end()]
    start = end.end()
  yield text[start:] if start else text


def _cut(text: str) -> list[str]:
  import rjieba  # loads its dictionary, 0.15 s (jieba's takes 0.7 s): not at import of this module
  if not text:
    return []
  parts = _LEFT_OVER.split('\0'.join(rjieba.cut(text, False)) + '\0')
  if len(parts) > 1:
    unknown = {part for part in parts[1::2] if part not in _left_over}
    if unknown:
      if len(_left_over) > _REMEMBERED:
        _left_over.clear()
        unknown = set(parts[1::2])
      _left_over.update(_cut_left_over(unknown, rjieba.has_word))
    parts[1::2] = map(_left_over.__getitem__, parts[1::2])
  words = ''.join(parts).split('\0')
  words.pop()
  return words


def _cut_left_over(left_over: set[str], in_dictionary) -> Iterator[tuple[str, str]]:
  """Steps 3 and 4."""
  for_model = []
  for characters in left_over:
    text = characters.replace('\0', '')
    if in_dictionary(text):
      yield characters, '\0'.join(text) + '\0'
    else:
      blocks = [block for block in _NOT_HAN.split(text) if block]
      for_model.append((characters, blocks))
  chinese = [block for _, blocks in for_model for block in blocks if block[0] >= '\u4e00']
  cut_chinese = iter(_model_cut(chinese))
  for characters, blocks in for_model:
    words = [next(cut_chinese) if block[0] >= '\u4e00' else '\0'.join(filter(None, _NAME_OR_NUMBER.split(block)))
             for block in blocks]
    yield characters, '\0'.join(words) + '\0'


@functools.cache
def _model():
  """jieba's model, states in the order B(egin), E(nd), M(iddle), S(ingle): numpy arrays.

  Returns:
    Log-probabilities: of the first state [4]; of a step into each state from the first and from the second of the two
    states that may come before it [4], [4]; of a character in each state [U+4E00-9FFF, 4].
  """
  import numpy as np
  spec = importlib.util.find_spec('jieba')  # without running its __init__, which takes 0.4 s
  if spec is None or not spec.submodule_search_locations:
    raise ImportError('the CPM vocabularies cut words with the model of jieba: pip install jieba==0.42.1')
  tables = []
  for name in ('start', 'trans', 'emit'):
    path = pathlib.Path(spec.submodule_search_locations[0]) / 'finalseg' / f'prob_{name}.py'
    file_spec = importlib.util.spec_from_file_location(f'_jieba_prob_{name}', path)
    module = importlib.util.module_from_spec(file_spec)
    file_spec.loader.exec_module(module)
    tables.append(module.P)
  start, step, emit = tables
  emission = np.full((0x5200, 4), _NEVER)
  for state, name in enumerate('BEMS'):
    for character, value in emit[name].items():
      if 0 <= ord(character) - 0x4e00 < len(emission):
        emission[ord(character) - 0x4e00, state] = value
  return (np.array([start[y] for y in 'BEMS']), np.array([step[x][y] for x, y in zip('EBBE', 'BEMS')]),
          np.array([step[x][y] for x, y in zip('SMMS', 'BEMS')]), emission)


def _model_cut(texts: list[str]) -> list[str]:
  """The most probable words of each text (Viterbi), joined with NUL.

  All texts are advanced together, the longest first, so that the rows still running at a step are the first ones. Of
  two states that are equally probable jieba takes the later one in the alphabet.
  """
  import numpy as np
  if not texts:
    return []
  start, first_step, second_step, emission = _model()
  pieces = [text[i:i + _LONGEST] for text in texts for i in range(0, len(text), _LONGEST)]
  lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
  order = np.argsort(-lengths, kind='stable')
  offsets = (np.cumsum(lengths) - lengths)[order]
  lengths = lengths[order]
  codes = np.frombuffer(''.join(pieces).encode('utf-16-le'), np.uint16).astype(np.int64) - 0x4e00
  running = np.searchsorted(-lengths, -np.arange(1, lengths[0] + 1), side='right')  # [steps]: rows longer than the step

  best = start + emission[codes[offsets]]
  from_second, last = [], np.empty(len(lengths), bool)
  for t, rows in enumerate(running):
    if t:
      ended = best[rows:]
      last[rows:len(best)] = ended[:, 3] >= ended[:, 1]
      best = best[:rows]
      emitted = emission[codes[offsets[:rows] + t]]
      first = best[:, [1, 0, 0, 1]] + first_step + emitted
      second = best[:, [3, 2, 2, 3]] + second_step + emitted
      from_second.append(second >= first)
      best = np.where(from_second[-1], second, first)
  last[:len(best)] = best[:, 3] >= best[:, 1]

  state = np.where(last, 3, 1)
  ends = np.zeros(len(codes), bool)
  for t in range(len(running) - 1, -1, -1):
    rows = running[t]
    now = state[:rows]
    ends[offsets[:rows] + t] = now & 1  # End or Single
    if t:
      state[:rows] = np.where(from_second[t - 1][np.arange(rows), now], np.array([3, 2, 2, 3])[now], np.array([1, 0, 0, 1])[now])

  ends = ends.tobytes()
  words, position = [], 0
  for text in texts:
    words.append(''.join([character + '\0' if ends[i] else character for i, character in enumerate(text, position)])[:-1])
    position += len(text)
  return words
