"""Trains a CPM-2 style vocabulary from text files.

The recipe of CPM-2 (Zhang et al. 2021, section 2.2): text is cut into words, SentencePiece learns a unigram model of the words,
and pieces that differ only in standing at the start of a word are merged. What continues a word that is not Chinese is written
'##piece', as in CPM-2's bilingual vocabulary. Order of ids: special tokens, pieces by frequency, bytes (with --byte_fallback),
sentinels.

The result is used as TaskConfig.vocabulary = 'cpm2:FILE'. The same text gives the same file.
"""

import argparse
import collections
import glob
import gzip
import io
import json
import pathlib
import sys
import tempfile
from collections.abc import Iterator

import sentencepiece

from t5x_cpm.vocabularies import word_cut
from t5x_cpm.vocabularies.base import LINE_FEED, SPACE

SPECIALS = ('<unk>', '<s>', '</s>', LINE_FEED, '<sep>', '<pad>', '<mask>', '<go>', '<eod>', '\u2581', ',', SPACE)
LATIN = 'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789'


def read_texts(patterns: list[str], field: str) -> Iterator[str]:
  """The lines of all files, or the text fields of .jsonl; .gz is read through."""
  for pattern in patterns:
    paths = sorted(glob.glob(pattern, recursive=True))
    if not paths:
      raise SystemExit(f'error: --input={pattern} matches no file.')
    for path in paths:
      opened = gzip.open(path, 'rt', encoding='utf-8') if path.endswith('.gz') else open(path, encoding='utf-8')  # noqa: SIM115
      with opened as lines:
        for number, line in enumerate(lines, 1):
          if not path.removesuffix('.gz').endswith('.jsonl'):
            yield line
            continue
          try:
            yield json.loads(line)[field]
          except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f'error: {path}:{number}: expected a JSON object with the field {field!r} ({error}).') from None


def count_words(texts: Iterator[str]) -> collections.Counter[str]:
  """How often each word occurs; spaces, line ends and control characters are not words."""
  counts: collections.Counter[str] = collections.Counter()
  for text in texts:
    counts.update(word_cut.lcut(text))
  for word in [word for word in counts if word.isspace() or not word.isprintable() or '\u2581' in word]:
    del counts[word]
  return counts


def unigram_pieces(counts: collections.Counter[str], size: int) -> collections.Counter[str]:
  """How often each piece of a SentencePiece unigram model is used in the words.

  A piece is counted as it will be written: 'piece' where it is Chinese or starts a word, otherwise '##piece'. SentencePiece is
  given bare words: with its mark of word starts it learns most pieces twice, and often the mark alone.
  """
  model = io.BytesIO()
  with tempfile.NamedTemporaryFile('w', suffix='.tsv', encoding='utf-8') as file:
    for word, count in sorted(counts.items()):
      file.write(f'{word}\t{count}\n')
    file.flush()
    sentencepiece.SentencePieceTrainer.train(
        input=file.name, input_format='tsv', model_writer=model, model_type='unigram', vocab_size=size, hard_vocab_limit=False,
        character_coverage=1.0, normalization_rule_name='identity', add_dummy_prefix=False, split_by_number=False,
        split_by_unicode_script=False, shuffle_input_sentence=False, num_threads=1, minloglevel=2)
  trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
  segmented = dict(zip(counts, trained.encode(list(counts), out_type=str)))
  used = _usage(segmented, counts)
  # SentencePiece considers what occurs in two different words. A frequent word with no such relative is added here.
  least = sorted(used.values(), reverse=True)[:size][-1]
  whole = {word: [word] for word, pieces in segmented.items() if len(pieces) > 1 and counts[word] > least}
  used = _usage(segmented | whole, counts)
  for special in SPECIALS:
    del used[special]
  return used


def _usage(segmented: dict[str, list[str]], counts: collections.Counter[str]) -> collections.Counter[str]:
  used: collections.Counter[str] = collections.Counter()
  for word, pieces in segmented.items():
    for place, piece in enumerate(pieces):
      is_chinese = any('\u4e00' <= character <= '\u9fff' for character in piece)
      used[piece if place == 0 or is_chinese else f'##{piece}'] += counts[word]
  return used


def assemble(pieces: collections.Counter[str], counts: collections.Counter[str], *, size: int, sentinels: int,
             byte_fallback: bool) -> list[str]:
  """The lines of the vocabulary file.

  Every character of the text has a piece (the most frequent ones where there is no room for all), and so has every letter and
  digit that continues a word.
  """
  tail = [f'<0x{value:02X}>' for value in range(256)] if byte_fallback else []
  tail += [f'<s_{number}>' for number in range(sentinels)]
  room = size - len(SPECIALS) - len(tail)
  characters: collections.Counter[str] = collections.Counter()
  for word, count in counts.items():
    for character in word:
      characters[character] += count
  needed = [c for c, _ in sorted(characters.items(), key=lambda item: (-item[1], item[0])) if c not in SPECIALS]
  needed += [f'##{c}' for c in LATIN if f'##{c}' not in needed]
  if byte_fallback:  # bytes write what is rare: at most half of the room is for single characters
    needed = needed[:room // 2] if len(needed) > room // 2 else needed
  chosen = dict.fromkeys(needed[:max(room, 0)])
  for piece in sorted(pieces, key=lambda piece: (-pieces[piece], piece)):  # not most_common(): ties in one order
    if len(chosen) >= room:
      break
    chosen.setdefault(piece)
  if len(needed) > room or len(chosen) < room:
    low, high = len(SPECIALS) + len(tail) + len(needed), len(SPECIALS) + len(tail) + len(chosen)
    raise SystemExit(f'error: --size={size}: this text gives a vocabulary of {low} to {high} pieces.')
  return [*SPECIALS, *sorted(chosen, key=lambda piece: (-pieces[piece], piece)), *tail]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--input', action='append', required=True, help='glob of .txt, .tsv or .jsonl, also .gz; repeatable')
  parser.add_argument('--field', default='text', help='of .jsonl (default: text)')
  parser.add_argument('--size', type=int, default=8000, help='pieces in all, special tokens included (default: 8000)')
  parser.add_argument('--sentinels', type=int, default=100, help='marks of masked spans (default: 100)')
  parser.add_argument('--byte_fallback', action='store_true', help='add the 256 bytes: every text can be written without loss')
  parser.add_argument('--output', type=pathlib.Path, required=True, help='vocab.txt to write')
  args = parser.parse_args()
  if args.sentinels < 1:
    parser.error('--sentinels must be at least 1')
  counts = count_words(read_texts(args.input, args.field))
  if not counts:
    raise SystemExit('error: there is no word in the input.')
  print(f'{sum(counts.values()):,} words, {len(counts):,} different', file=sys.stderr)
  lines = assemble(
      unigram_pieces(counts, args.size), counts, size=args.size, sentinels=args.sentinels, byte_fallback=args.byte_fallback)
  args.output.parent.mkdir(parents=True, exist_ok=True)
  temporary = args.output.with_name(args.output.name + '.tmp')
  temporary.write_text('\n'.join(lines) + '\n', encoding='utf-8')
  temporary.replace(args.output)
  print(f'wrote {args.output}: {len(lines):,} pieces, {args.sentinels} of them sentinels', file=sys.stderr)


if __name__ == '__main__':
  main()
