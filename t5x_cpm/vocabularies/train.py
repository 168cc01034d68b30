"""Trains a vocabulary in the manner of CPM-2 from text files.

The recipe (Zhang et al. 2021, section 2.2): text is cut into words, SentencePiece learns a unigram model of the words, and
pieces that differ only in whether they start a word are merged. What continues a word that is not Chinese is written
'##piece', as in CPM-2's bilingual vocabulary. Order of ids: special tokens, or the pieces of a vocabulary that is extended;
pieces by frequency; bytes if wanted; sentinels.

The result is used as TaskConfig.vocabulary = 'cpm2:FILE'. The same text gives the same file.
"""

import collections
import contextlib
import errno
import io
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence

from t5x_cpm import files
from t5x_cpm.config import ConfigError
from t5x_cpm.config.fields import shown
from t5x_cpm.vocabularies import cpm2, texts, word_cut
from t5x_cpm.vocabularies.base import LINE_FEED, SPACE

SPECIALS = ('<unk>', '<s>', '</s>', LINE_FEED, '<sep>', '<pad>', '<mask>', '<go>', '<eod>', '\u2581', ',', SPACE)
TAIL = re.compile(r'<s_\d+>|<0x[0-9A-F]{2}>')  # what stands at the end of a file
LATIN = 'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789'


def count_words(documents: Iterator[str]) -> collections.Counter[str]:
  """How often each word occurs; spaces, line ends and control characters are not words."""
  counts: collections.Counter[str] = collections.Counter()
  for text in documents:
    counts.update(word_cut.lcut(text))
  for word in [word for word in counts if word.isspace() or not word.isprintable() or '\u2581' in word]:
    del counts[word]
  return counts


def _usage(segmented: dict[str, list[str]], counts: collections.Counter[str]) -> collections.Counter[str]:
  used: collections.Counter[str] = collections.Counter()
  for word, pieces in segmented.items():
    for position, piece in enumerate(pieces):
      is_chinese = any('\u4e00' <= character <= '\u9fff' for character in piece)
      used[piece if position == 0 or is_chinese else f'##{piece}'] += counts[word]
  return used


def unigram_pieces(counts: collections.Counter[str], size: int) -> collections.Counter[str]:
  """How often each piece of a SentencePiece unigram model is used in the words.

  A piece is counted as it will be written: 'piece' where it is Chinese or starts a word, otherwise '##piece'. SentencePiece is
  given bare words: with its mark of word starts it learns most pieces twice, and often the mark alone. Its model must hold all
  single characters, of which `assemble` may keep only some.
  """
  import sentencepiece

  model, characters = io.BytesIO(), len(set().union(*counts))
  with tempfile.NamedTemporaryFile('w', suffix='.tsv', encoding='utf-8') as file:
    for word, count in sorted(counts.items()):
      file.write(f'{word}\t{count}\n')
    file.flush()
    sentencepiece.SentencePieceTrainer.train(
        input=file.name, input_format='tsv', model_writer=model, model_type='unigram', vocab_size=max(size, characters + 3),
        hard_vocab_limit=False, character_coverage=1.0, normalization_rule_name='identity', add_dummy_prefix=False,
        split_by_number=False, split_by_unicode_script=False, shuffle_input_sentence=False, num_threads=1, minloglevel=2)
  trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
  segmented = dict(zip(counts, trained.encode(list(counts), out_type=str)))
  used = _usage(segmented, counts)
  # SentencePiece considers only what occurs in two different words. A frequent word that shares nothing is added here.
  least = sorted(used.values(), reverse=True)[:size][-1]
  whole = {word: [word] for word, pieces in segmented.items() if len(pieces) > 1 and counts[word] > least}
  used = _usage(segmented | whole, counts)
  for special in SPECIALS:
    del used[special]
  return used


def kept_pieces(path: str) -> list[str]:
  """What a vocabulary that extends the one in a file has first: all that stands before its bytes and sentinels.

  Raises:
    ConfigError: it is no vocabulary of this kind, or has other pieces after its bytes or sentinels.
  """
  pieces = cpm2.read_pieces(path, '--extends')
  is_tail = [bool(TAIL.fullmatch(piece)) for piece in pieces]
  count = is_tail.index(True) if True in is_tail else len(pieces)
  if not all(is_tail[count:]):
    raise ConfigError(f'--extends={path}: the piece {pieces[count + is_tail[count:].index(False)]!r} stands after bytes or '
                      'sentinels; expected these at the end, where they make room for new pieces.')
  return pieces[:count]


def assemble(pieces: collections.Counter[str], counts: collections.Counter[str], *, size: int, sentinels: int,
             byte_fallback: bool, first: Sequence[str] = SPECIALS) -> list[str]:
  """The lines of the vocabulary file.

  Every character of the text has a piece (the most frequent ones where there is no room for all), and so has every letter and
  digit that continues a word.

  Args:
    pieces: how often each piece of the text is used.
    counts: how often each word occurs.
    size, sentinels, byte_fallback: see `run`.
    first: the pieces that are there whatever the text is.

  Raises:
    ConfigError: the text has too many different characters for `size`, or too few pieces.
  """
  tail = [f'<0x{value:02X}>' for value in range(256)] if byte_fallback else []
  tail += [f'<s_{number}>' for number in range(sentinels)]
  room = size - len(first) - len(tail)
  characters: collections.Counter[str] = collections.Counter()
  for word, count in counts.items():
    for character in word:
      characters[character] += count
  needed = [c for c, _ in sorted(characters.items(), key=lambda item: (-item[1], item[0])) if c not in first]
  needed += [f'##{c}' for c in LATIN if f'##{c}' not in (*needed, *first)]
  if byte_fallback:  # bytes can write what is rare, so that at most half of the room is for single characters
    needed = needed[:room // 2] if len(needed) > room // 2 else needed
  chosen = dict.fromkeys(needed[:max(room, 0)])
  for piece in sorted(pieces, key=lambda piece: (-pieces[piece], piece)):  # not most_common(), to have ties in a fixed order
    if len(chosen) >= room:
      break
    if piece not in first:
      chosen.setdefault(piece)
  fixed = len(first) + len(tail)
  if len(needed) > room or not chosen:
    least = fixed + (1 if byte_fallback else len(needed))
    raise ConfigError(f'--size={size}: a vocabulary of this text has at least {least} pieces.')
  if len(chosen) < room:
    raise ConfigError(f'--size={size}: a vocabulary of this text has at most {fixed + len(chosen)} pieces.')
  return [*first, *sorted(chosen, key=lambda piece: (-pieces[piece], piece)), *tail]


@contextlib.contextmanager
def _writing(output: str) -> Iterator[None]:
  """Turns an error of the system in writing the vocabulary into a ConfigError."""
  try:
    yield
  except OSError as error:
    raise ConfigError(f'--output={shown(output)} cannot be written: {error.strerror or error}.') from None


def run(patterns: Sequence[str], output: str, *, field: str = 'text', size: int = 8000, sentinels: int = 100,
        byte_fallback: bool = False, extends: str = '') -> None:
  """Trains a vocabulary and writes it.

  Args:
    patterns: globs of files, as `texts.read` takes them.
    output: the file to write, one piece a line.
    field: the field of .jsonl with the text.
    size: pieces in all, special tokens included.
    sentinels: how many marks of masked spans stand at its end.
    byte_fallback: add the 256 bytes, with which every text can be written without loss.
    extends: a vocabulary file whose pieces come first, each with its id, as CPM-2's second vocabulary extends its first.

  Raises:
    ConfigError: no text, or a text that does not give so many pieces, or a file that cannot be written.
  """
  if sentinels < 1:
    raise ConfigError(f'--sentinels={sentinels}: expected at least 1.')
  if sentinels >= size:
    raise ConfigError(f'--sentinels={sentinels}: expected fewer than there are pieces, --size={size}.')
  first = kept_pieces(extends) if extends else SPECIALS
  path = pathlib.Path(output)
  with _writing(output):  # before the text is read, which may take long
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
      raise IsADirectoryError(errno.EISDIR, 'it is a folder; expected a file')
  counts = count_words(texts.read(patterns, field))
  if not counts:
    raise ConfigError('there is no word in the input.')
  print(f'{sum(counts.values()):,} words, {len(counts):,} different', file=sys.stderr)
  lines = assemble(unigram_pieces(counts, size), counts, size=size, sentinels=sentinels, byte_fallback=byte_fallback,
                   first=first)
  with _writing(output):
    files.write_atomically(path, ''.join(f'{line}\n' for line in lines).encode())
  kept = f', {len(first):,} those of {extends}' if extends else ''
  print(f'wrote {path}: {len(lines):,} pieces{kept}, {sentinels} of them sentinels', file=sys.stderr)
