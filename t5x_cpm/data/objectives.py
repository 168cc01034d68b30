"""Span corruption in NumPy, over a whole batch of pieces at once, and the arithmetic of flat arrays that it rests on.

A batch of pieces is *flat*: one array has the tokens of all pieces, another has their lengths. Letters in names: P pieces,
N tokens of all pieces, K noise spans of all pieces. No function here keeps a random state. Every draw is a hash of (key of the
piece, position), so that a piece is corrupted in the same way in every batch that it occurs in.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MAX_PIECE = 1 << 24  # positions have 24 bits in the sort keys of `draw_spans`
_CHUNK = 1 << 15  # pieces sorted together: two segments each, 16 bits
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_S27, _S30, _S31 = np.uint64(27), np.uint64(30), np.uint64(31)


def mix(x: np.ndarray) -> np.ndarray:
  """The finaliser of splitmix64 (Steele et al. 2014): a bijection of uint64 that looks random."""
  with np.errstate(over='ignore'):
    x = (x ^ (x >> _S30)) * _MIX[0]
    x = (x ^ (x >> _S27)) * _MIX[1]
    return x ^ (x >> _S31)


def combine(*values) -> np.ndarray:
  """Hashes integers, or integer arrays of one shape, into uint64 keys; the order of the arguments matters."""
  key = np.zeros((), np.uint64)
  with np.errstate(over='ignore'):
    for value in values:
      key = mix((key + _GOLDEN) ^ mix(np.asarray(value).astype(np.uint64) + _GOLDEN))
  return np.asarray(key)


def exclusive_cumsum(x: np.ndarray) -> np.ndarray:
  """[0, x0, x0 + x1, ...], as long as x."""
  out = np.zeros(len(x), np.int64)
  np.cumsum(x[:-1], out=out[1:])
  return out


def ramp(counts: np.ndarray) -> np.ndarray:
  """[0 .. c0-1, 0 .. c1-1, ...]."""
  counts = np.asarray(counts, np.int64)
  return np.arange(counts.sum()) - np.repeat(exclusive_cumsum(counts), counts)


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
  """[s0 .. s0+c0-1, s1 .. s1+c1-1, ...]."""
  return np.repeat(np.asarray(starts, np.int64), counts) + ramp(counts)


class Spans(NamedTuple):
  """The noise spans of P pieces, in order."""

  counts: np.ndarray  # [P] how many spans each piece has
  start: np.ndarray  # [K] the first noise token of each span, counted from the start of its piece
  length: np.ndarray  # [K] how many tokens it has
  before: np.ndarray  # [K] how many noise tokens its piece has before it


def noise_counts(lengths: np.ndarray, density: float, mean: float) -> tuple[np.ndarray, np.ndarray]:
  """How many tokens of a piece are noise, and in how many spans: functions of its length alone.

  The rule of T5 (`random_spans_noise_mask`, Raffel et al. 2020), which CPM-2's preprocessing repeats: round(length *
  density) tokens, at least one and never all; round(tokens / mean) spans, at least one. Halves round to even, in float64
  as in CPM-2 and in T5's `random_spans_helper`. Neither a span nor the text between two spans is ever empty.

  Args:
    lengths: how many tokens each piece has, at least 2.
    density: the share of noise.
    mean: the wanted mean length of a span.

  Returns:
    How many noise tokens and how many spans each piece has, both of the shape of `lengths`.
  """
  lengths = np.asarray(lengths, np.int64)
  noise = np.clip(np.rint(lengths * density).astype(np.int64), 1, lengths - 1)
  spans = np.maximum(np.rint(noise / mean).astype(np.int64), 1)
  return noise, np.minimum(spans, np.minimum(noise, lengths - noise))


def _draw_chunk(keys_P, lengths_P, noise_P, spans_P, anywhere: bool) -> Spans:
  # Segments 0..P-1 are the tokens that stay, P..2P-1 the noise. A segment of m tokens is split into k runs at k-1 of its
  # m-1 inner borders: those with the smallest hashes. One sort of (segment, hash, border) ranks all of them. If spans may
  # lie anywhere, the tokens that stay have one more run, and one more token at either end, which is then taken away again:
  # so the first and the last run may be empty. A single border is drawn without a sort.
  extra = int(anywhere)
  items = np.concatenate([lengths_P - noise_P + 2 * extra, noise_P]).astype(np.int64)
  runs = np.concatenate([spans_P + extra, spans_P]).astype(np.int64)
  borders = np.where(runs > 1, items - 1, 0)
  single = np.flatnonzero(runs == 2) if anywhere else np.zeros(0, np.int64)
  borders_of_single = borders[single].astype(np.uint64)
  borders[single] = 0
  rank = ramp(borders)
  keys = np.concatenate([mix(keys_P), mix(~keys_P)])
  segment = np.repeat(np.arange(len(items), dtype=np.uint64) << np.uint64(48), borders)
  position = rank.astype(np.uint64)
  with np.errstate(over='ignore'):
    code = mix(np.repeat(keys, borders) + position * _GOLDEN) >> np.uint64(40)
  code = segment | (code << np.uint64(24)) | position
  code.sort()
  chosen = code[rank < np.repeat(runs - 1, borders)]  # segments stay where they are, so that the rank after sorting is `rank`
  chosen = (chosen & np.uint64(0xFFFF << 48)) | (chosen & np.uint64(0xFFFFFF))
  chosen.sort()
  starts = np.zeros(runs.sum(), np.int64)
  later = np.ones(len(starts), bool)
  first = exclusive_cumsum(runs)
  later[first] = False
  inner = later.copy()
  if len(single):
    second = first[single] + 1
    inner[second] = False
    starts[second] = (keys[single] >> np.uint64(32)) * borders_of_single >> np.uint64(32)
    starts[second] += 1
  starts[inner] = (chosen & np.uint64(0xFFFFFF)).astype(np.int64) + 1
  ends = np.append(starts[1:], 0)
  ends[np.cumsum(runs) - 1] = items
  K = int(spans_P.sum())
  noise = slice(len(starts) - K, None)
  # How many of the tokens that stay there are before each span: where each of their runs ends or, but for the last, the next
  # one starts.
  before = starts[:-K][later[:-K]] - 1 if anywhere else ends[:-K]
  return Spans(np.asarray(spans_P, np.int64), before + starts[noise], (ends - starts)[noise], starts[noise])


def draw_spans(keys_P: np.ndarray, lengths_P: np.ndarray, noise_P: np.ndarray, spans_P: np.ndarray,
               anywhere: bool = False) -> Spans:
  """Draws the noise mask of every piece. All masks that are possible under these counts are equally likely.

  By T5's rule a piece starts with tokens that stay and ends with noise: of m tokens that stay and n of noise in k spans,
  there are C(m - 1, k - 1) * C(n - 1, k - 1) masks, and where there is a single span it is the end of the piece. If spans may
  lie anywhere, the text before the first span and after the last one may be empty or not; only that between two spans may
  not. The spans then stand in k of the m + 1 places before, between and after the tokens that stay, and there are
  C(m + 1, k) * C(n - 1, k - 1) masks: every mask of n tokens in k spans.

  Args:
    keys_P: uint64; the mask of a piece is a function of its key.
    lengths_P: how many tokens each piece has, below MAX_PIECE.
    noise_P: how many of them are noise, from `noise_counts`.
    spans_P: how many spans the noise has, from `noise_counts`.
    anywhere: whether spans may lie anywhere, instead of by T5's rule.
  """
  chunks = []
  for begin in range(0, len(keys_P), _CHUNK):
    some = slice(begin, begin + _CHUNK)
    chunks.append(_draw_chunk(keys_P[some], lengths_P[some], noise_P[some], spans_P[some], anywhere))
  return chunks[0] if len(chunks) == 1 else Spans(*(np.concatenate(column) for column in zip(*chunks)))


def noise_mask(lengths_P: np.ndarray, spans: Spans) -> np.ndarray:
  """bool [N]: which tokens are noise."""
  starts = np.repeat(exclusive_cumsum(lengths_P), spans.counts) + spans.start
  change = np.zeros(int(lengths_P.sum()) + 1, np.int8)
  change[starts] = 1
  change[starts + spans.length] -= 1  # the next piece may begin with a span where this one ends with one
  return np.cumsum(change[:-1], dtype=np.int8).view(bool)


class Segments(NamedTuple):
  """Finished pieces, flat: what each of them puts into the two sides of a row."""

  encoder_lengths: np.ndarray  # [P]
  encoder_tokens: np.ndarray
  decoder_lengths: np.ndarray  # [P]
  decoder_inputs: np.ndarray
  decoder_targets: np.ndarray


def span_targets(noise_tokens: np.ndarray, noise_P: np.ndarray, spans: Spans, sentinels: np.ndarray,
                 end: int | None) -> tuple[np.ndarray, np.ndarray]:
  """Makes the targets of each piece: every span after its sentinel, then a closing token.

  Args:
    noise_tokens: the noise of all pieces, in order.
    noise_P: how many noise tokens each piece has.
    spans: the spans; `start` is not read.
    sentinels: ids in order of use; a piece with k spans takes the first k.
    end: the closing token; None is the next sentinel.

  Returns:
    The lengths of the targets [P], and the targets, flat.
  """
  lengths_P = noise_P + spans.counts + 1
  offsets_P = exclusive_cumsum(lengths_P)
  number = ramp(spans.counts)
  targets = np.empty(int(lengths_P.sum()), np.int32)
  is_noise = np.ones(len(targets), bool)
  at_sentinel = np.repeat(offsets_P, spans.counts) + spans.before + number
  at_end = offsets_P + lengths_P - 1
  is_noise[at_sentinel] = False
  is_noise[at_end] = False
  targets[is_noise] = noise_tokens
  targets[at_sentinel] = sentinels[number]
  targets[at_end] = sentinels[spans.counts] if end is None else end
  return lengths_P, targets


def shift_right(targets: np.ndarray, lengths_P: np.ndarray, start: int) -> np.ndarray:
  """Decoder inputs: every piece begins with `start` and loses its last token."""
  inputs = np.empty_like(targets)
  inputs[1:] = targets[:-1]
  inputs[exclusive_cumsum(lengths_P)] = start
  return inputs


def _insert(tokens: np.ndarray, longer_P: np.ndarray, token: int, where_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  out = np.empty(len(tokens) + len(longer_P), np.int32)
  old = np.ones(len(out), bool)
  old[where_P] = False
  out[old] = tokens
  out[where_P] = token
  return out, longer_P


def prepend(tokens: np.ndarray, lengths_P: np.ndarray, token: int) -> tuple[np.ndarray, np.ndarray]:
  """Puts one token before every piece."""
  longer = lengths_P + 1
  return _insert(tokens, longer, token, exclusive_cumsum(longer))


def append(tokens: np.ndarray, lengths_P: np.ndarray, token: int) -> tuple[np.ndarray, np.ndarray]:
  """Adds one token to the end of every piece."""
  longer = lengths_P + 1
  return _insert(tokens, longer, token, np.cumsum(longer) - 1)


def select(tokens: np.ndarray, lengths_P: np.ndarray, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The tokens of every piece for which `keep` [N] holds."""
  kept = np.append(0, np.cumsum(keep))
  ends = np.cumsum(lengths_P)
  return tokens[keep], kept[ends] - kept[ends - lengths_P]


def expand(tokens: np.ndarray, lengths_P: np.ndarray, mark: int, parts: Sequence[int], first: int) -> tuple[
    np.ndarray, np.ndarray]:
  """Puts tokens in the places of the marks of every piece: parts[0] tokens from `first` on, then the next parts[1], ...

  Args:
    tokens: the pieces one after another, each with len(parts) marks.
    lengths_P: how many tokens each piece has, marks included.
    mark: the token that is a mark.
    parts: how many tokens take the place of each mark of a piece.
    first: the first of these tokens.
  """
  counts = np.asarray(parts, np.int64)
  at = np.flatnonzero(tokens == mark)
  many = np.ones(len(tokens), np.int64)
  many[at] = np.tile(counts, len(lengths_P))
  out = np.repeat(tokens.astype(np.int32), many)
  new = ranges(exclusive_cumsum(many)[at], many[at])
  out[new] = np.tile(first + np.arange(counts.sum(), dtype=np.int32), len(lengths_P))
  return out, lengths_P + counts.sum() - len(counts)


def corrupt(tokens_N: np.ndarray, lengths_P: np.ndarray, spans: Spans, noise_P: np.ndarray, sentinels: np.ndarray, *,
            start: int, eos: int | None = None) -> Segments:
  """Replaces every noise span by a sentinel and collects the noise as the targets.

  Without `eos` this is CPM-2's form: targets end with one more sentinel, inputs as the spans leave them. With `eos` it is
  T5's: both sides end with `eos`.

  Args:
    tokens_N: the pieces one after another.
    lengths_P: how many tokens each piece has.
    spans: the spans, from `draw_spans`.
    noise_P: how many noise tokens each piece has.
    sentinels: ids in order of use.
    start: the first token of the decoder inputs of each piece.
    eos: T5's end of sequence; None for CPM-2's form.
  """
  is_noise = noise_mask(lengths_P, spans)
  first = np.repeat(exclusive_cumsum(lengths_P), spans.counts) + spans.start
  keep = ~is_noise
  keep[first] = True
  replaced = tokens_N.astype(np.int32)
  replaced[first] = sentinels[ramp(spans.counts)]
  encoder, encoder_lengths = replaced[keep], lengths_P - noise_P + spans.counts
  if eos is not None:
    encoder, encoder_lengths = append(encoder, encoder_lengths, eos)
  lengths, targets = span_targets(tokens_N[is_noise], noise_P, spans, sentinels, eos)
  return Segments(encoder_lengths, encoder, lengths, shift_right(targets, lengths, start), targets)


def corrupted_lengths(lengths: np.ndarray, density: float, mean: float, t5: bool) -> tuple[np.ndarray, np.ndarray]:
  """Encoder and decoder slots that pieces of these lengths take once corrupted."""
  noise, spans = noise_counts(lengths, density, mean)
  return lengths - noise + spans + int(t5), noise + spans + 1


def longest_piece(encoder_length: int, decoder_length: int, density: float, mean: float, sentinels: int, t5: bool) -> int:
  """Tokens of the longest piece whose two sides fit and that has enough sentinels; below 2 if there is none."""
  limit = 2 + int((encoder_length + decoder_length) * 1.01)  # the two sides together hold every token of the piece
  lengths = np.arange(2, min(limit, MAX_PIECE))
  encoder, decoder = corrupted_lengths(lengths, density, mean, t5)
  spans = noise_counts(lengths, density, mean)[1] + (0 if t5 else 1)
  fits = (encoder <= encoder_length) & (decoder <= decoder_length) & (spans <= sentinels)
  return int(lengths[0] + np.argmin(fits)) - 1 if not fits.all() else int(lengths[-1])
