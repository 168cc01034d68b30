"""Measures how well a vocabulary fits some text: unknown tokens, length, speed, and what encoding and decoding loses."""

import collections
import difflib
import time
import unicodedata
import warnings
from collections.abc import Sequence

from t5x_cpm import vocabularies
from t5x_cpm.vocabularies import texts as texts_lib

EXAMPLES = 3
SAMPLE = 2_000_000  # bytes of text that jieba cuts to measure its speed


def cause(lost: str, found: str) -> str:
  """The cause of one difference between a text and what came back. Characters without a piece are named by Unicode category."""
  if '<unk>' in found:
    return 'no piece: ' + ' '.join(sorted({unicodedata.category(character) for character in lost}) or ['?'])
  if not lost and not found.strip(' '):
    return 'space put in'
  if not found and not lost.strip(' '):
    return 'space left out'
  if unicodedata.normalize('NFKC', lost) == unicodedata.normalize('NFKC', found):
    return 'full-width form folded'
  return 'other'


def differences(text: str, back: str) -> list[tuple[str, str]]:
  """(cause, context) of each difference between a text and what came back."""
  found = []
  for tag, a, b, c, d in difflib.SequenceMatcher(None, text, back, autojunk=False).get_opcodes():
    if tag != 'equal':
      found.append((cause(text[a:b], back[c:d]), f'{text[max(0, a - 8):b + 8]!r} -> {back[max(0, c - 8):d + 8]!r}'))
  return found


def jieba_speed(texts: list[str]) -> float:
  """Bytes per second that jieba cuts, measured on a sample of the texts: a limit for any tokenizer built on it."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # it imports pkg_resources
    import jieba
  jieba.setLogLevel('WARNING')
  jieba.initialize()
  size = sum(len(text.encode('utf-8', 'replace')) for text in texts)
  sample = texts[::max(1, round(size / SAMPLE))]
  start = time.perf_counter()
  for text in sample:
    jieba.lcut(text)
  return sum(len(text.encode('utf-8', 'replace')) for text in sample) / (time.perf_counter() - start)


def measure(vocabulary: vocabularies.Vocabulary, texts: list[str]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
  """Encodes texts and decodes them again.

  Returns:
    The rows of a table, as names and values; and the texts that changed, each with what came back.
  """
  vocabulary.encode('一二 a b')  # loads the dictionaries
  start = time.perf_counter()
  encoded = vocabulary.encode_batch(texts)
  seconds = max(time.perf_counter() - start, 1e-9)
  back = [vocabulary.decode(ids) for ids in encoded]

  characters, tokens = sum(map(len, texts)), sum(map(len, encoded))
  size = sum(len(text.encode('utf-8', 'replace')) for text in texts)
  unknown = sum(ids.count(vocabulary.unk_id) for ids in encoded)
  changed = [(text, other) for text, other in zip(texts, back) if text != other]
  rows = [
      ('vocabulary', f'{vocabulary.spec}, {vocabulary.size:,} pieces, {len(vocabulary.sentinels)} sentinels'),
      ('text', f'{len(texts):,} lines or documents, {characters:,} characters, {size / 1e6:.2f} MB'),
      ('tokens', f'{tokens:,}'),
      ('pieces per character', f'{tokens / max(characters, 1):.3f}'),
      ('unknown tokens', f'{unknown:,} ({unknown / max(tokens, 1):.4%})'),
      ('speed', f'{size / 1e6 / seconds:.2f} MB/s, {tokens / seconds:,.0f} tokens/s, one process'),
      ('not restored exactly', f'{len(changed):,} of {len(texts):,} ({len(changed) / max(len(texts), 1):.2%})'),
  ]
  if vocabulary.kind.startswith('cpm') and size:
    plain = jieba_speed(texts)
    rows.insert(-1, ('jieba, cut alone', f'{plain / 1e6:.2f} MB/s: the speed above is {size / seconds / plain:.1f} times that'))
  return rows, changed


def run(vocabulary: str, patterns: Sequence[str], *, field: str = 'text', compared: int = 2000) -> None:
  """Prints how well a vocabulary fits some text.

  Args:
    vocabulary: KIND:FILE, as in TaskConfig.vocabulary.
    patterns: globs of files, as `texts.read` takes them.
    field: the field of .jsonl with the text.
    compared: how many of the texts that changed are searched for the causes.

  Raises:
    ConfigError: no such vocabulary, or no text.
  """
  vocab = vocabularies.load(vocabulary)
  rows, changed = measure(vocab, list(texts_lib.read(patterns, field)))
  for name, value in rows:
    print(f'{name:<22}{value}')
  causes: dict[str, list[str]] = collections.defaultdict(list)
  for text, other in changed[:compared]:
    for name, context in differences(text[:2000], other[:2000]):
      causes[name].append(context)
  if causes:
    print(f'\n{"losses by cause":<40}{"count":>8}  examples')
  for name, contexts in sorted(causes.items(), key=lambda item: -len(item[1])):
    print(f'{name:<40}{len(contexts):>8,}  {contexts[0]}')
    for context in contexts[1:EXAMPLES]:
      print(f'{"":<50}{context}')
