"""What the reader looks up: made once from a cache, stored beside it, memory-mapped afterwards.

`sort_by_class` puts pieces of equal size side by side, so that "member 17 of class 40" is one look-up. `cpm2_streams` holds
the two streams of CPM-2's objective, whose masks never change. Both pass over the data in chunks, so that memory does not
grow with it, and both appear under their final names only when complete.
"""

import contextlib
import json
import mmap
import os
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

from t5x_cpm.config import ConfigError
from t5x_cpm.data import objectives

CHUNK = 1 << 21  # documents, or pieces of documents
TOKENS = 1 << 22  # tokens of a chunk of documents
STATIC = 233  # CPM-2's masks and order of documents are drawn once, from the seed of its preprocessing
CPM2_TOKENS = (10, 5_000_000)  # documents that CPM-2's preprocessing keeps; its upper bound counts characters


def store(directory: pathlib.Path, name: str, make: Callable[[pathlib.Path], dict]) -> dict:
  """Runs `make(prefix)` unless it was run to its end before; returns what it returned, through JSON.

  Args:
    directory: the folder of the index.
    name: of this part of it.
    make: writes files whose names start with the prefix that it is given; they are renamed when it returns.
  """
  done = directory / f'{name}.json'
  if not done.is_file():
    try:
      _make(directory, name, make)
    except OSError as error:
      raise ConfigError(f'the index of the cache could not be written to {directory}: {error.strerror or error}. Set '
                        'TaskConfig.cache_dir or $T5X_CPM_CACHE to a folder of your own with more room.') from error
  return json.loads(done.read_text())


def _make(directory: pathlib.Path, name: str, make: Callable[[pathlib.Path], dict]) -> None:
  directory.mkdir(parents=True, exist_ok=True)
  _remove_abandoned(directory)
  mark = f'tmp-{os.getpid()}-'
  prefix = directory / f'{mark}{name}'
  try:
    result = make(prefix)
    pathlib.Path(f'{prefix}.json').write_text(json.dumps(result))
    written = sorted(directory.glob(f'{prefix.name}.*'), key=lambda path: path.suffix == '.json')
    for path in written:  # the .json last: it says that the others are complete
      os.replace(path, directory / path.name.removeprefix(mark))
  finally:
    for path in directory.glob(f'{prefix.name}.*'):
      path.unlink()


def _remove_abandoned(directory: pathlib.Path) -> None:
  for path in directory.glob('tmp-*'):
    owner = int(path.name.split('-')[1])
    try:
      os.kill(owner, 0)
    except ProcessLookupError:
      path.unlink(missing_ok=True)
    except PermissionError:
      pass  # alive, of another user


def map_file(path: pathlib.Path, dtype, *, random: bool = False) -> np.ndarray:
  """Maps a file of numbers into memory, read-only.

  Args:
    path: of the file.
    dtype: of its numbers.
    random: it is read in no order; else the system reads ahead, which costs 100 times the data that is wanted.
  """
  if not path.stat().st_size:
    return np.zeros(0, dtype)
  with open(path, 'rb') as f:
    mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
  if random and hasattr(mmap, 'MADV_RANDOM'):
    mapped.madvise(mmap.MADV_RANDOM)
  return np.frombuffer(mapped, dtype)


def load(directory: pathlib.Path, name: str, part: str, dtype, columns: int = 0) -> np.ndarray:
  """A stored array, memory-mapped for look-ups."""
  array = map_file(directory / f'{name}.{part}', dtype, random=True)
  return array.reshape(-1, columns) if columns else array


def piece_counts(lengths_D: np.ndarray, longest: int) -> np.ndarray:
  """Pieces of each document; none of one that is too short to be corrupted."""
  return np.where(lengths_D < 2, 0, -(-lengths_D // longest))


def cut(lengths_D: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Cuts documents into pieces of `longest` tokens and a rest; a rest of one token takes another from its neighbour.

  Args:
    lengths_D: tokens of each document; one below 2 gives no piece.
    longest: at least 3.

  Returns:
    For each piece its document, where it starts there, and its length.
  """
  counts = piece_counts(lengths_D, longest)
  document = np.repeat(np.arange(len(lengths_D)), counts)
  start = objectives.ramp(counts) * longest
  length = np.minimum(longest, lengths_D[document] - start)
  short = np.flatnonzero(length == 1)
  start[short] -= 1
  length[short] += 1
  length[short - 1] -= 1  # never the last piece of another document: a document of one token has no piece
  return document, start, length


def _by_pieces(lengths_D: np.ndarray, longest: int, with_end: bool) -> Iterator[tuple[int, np.ndarray]]:
  """Lengths as they are stored, in chunks of about CHUNK pieces at most, each with its first token."""
  first = 0
  for begin in range(0, len(lengths_D), CHUNK):
    block = np.asarray(lengths_D[begin:begin + CHUNK], np.int64)
    pieces_before = np.cumsum(piece_counts(block + with_end, longest))
    borders = np.unique([0, *np.searchsorted(pieces_before, np.arange(CHUNK, pieces_before[-1], CHUNK)), len(block)])
    for a, b in zip(borders, borders[1:]):
      yield first, block[a:b]
      first += int(block[a:b].sum())


def piece_histogram(lengths_D: np.ndarray, longest: int, with_end: bool) -> np.ndarray:
  """[longest + 1] how many pieces of each length `pieces` would find."""
  counts = np.zeros(longest + 1, np.int64)
  for _, stored in _by_pieces(lengths_D, longest, with_end):
    counts += np.bincount(cut(stored + with_end, longest)[2], minlength=longest + 1)
  return counts


def sort_by_class(prefix: pathlib.Path, chunks: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]], classes: int,
                  columns: int = 1) -> np.ndarray:
  """Writes values ordered by class (a stable counting sort) to `prefix.members`.

  Args:
    prefix: of the file.
    chunks: called twice; each time it gives the same chunks of (class [n], values [n, columns] int64).
    classes: number of classes.
    columns: of the values.

  Returns:
    [classes] how many values each class has.
  """
  counts = np.zeros(classes, np.int64)
  for class_ids, _ in chunks():
    counts += np.bincount(class_ids, minlength=classes)
  total = int(counts.sum())
  path = pathlib.Path(f'{prefix}.members')
  path.touch()
  if total:
    out = np.memmap(path, np.int64, 'w+', shape=(total, columns))
    cursor = objectives.exclusive_cumsum(counts)
    for class_ids, values in chunks():
      order = np.argsort(class_ids, kind='stable')
      here = np.bincount(class_ids, minlength=classes)
      out[np.repeat(cursor - objectives.exclusive_cumsum(here), here) + np.arange(len(order))] = values[order]
      cursor += here
    out.flush()
  return counts


def pieces(directory: pathlib.Path, split: str, lengths_D: np.ndarray, longest: int, with_end: bool) -> dict:
  """Pieces of a split by length: `members` holds 2 * (first token) + (1 if the piece ends with the end of document).

  Args:
    directory: the folder of the index.
    split: of the cache.
    lengths_D: tokens of its documents, without an end of document.
    longest: largest piece.
    with_end: whether every document is followed by an end of document, which is not in the cache.

  Returns:
    {'name': of the index, 'counts': pieces of each length, 'dropped': documents too short for a piece}.
  """
  name = f'{split}.pieces-{longest}-{int(with_end)}'

  def chunks():
    for first, stored in _by_pieces(lengths_D, longest, with_end):
      document, start, length = cut(stored + with_end, longest)
      ends = start + length > stored[document]
      values = 2 * (first + objectives.exclusive_cumsum(stored)[document] + start) + ends
      yield length.astype(np.uint16 if longest < 1 << 16 else np.int64), values[:, None]

  def make(prefix):
    counts = sort_by_class(prefix, chunks, longest + 1)
    dropped = sum(int((np.asarray(lengths_D[i:i + CHUNK]) + int(with_end) < 2).sum())
                  for i in range(0, len(lengths_D), CHUNK))
    return {'name': name, 'counts': counts.tolist(), 'dropped': dropped}

  return store(directory, name, make)


def pairs(directory: pathlib.Path, split: str, inputs_D: np.ndarray, targets_D: np.ndarray, room: tuple[int, int],
          most_classes: int = 2048) -> dict:
  """Pairs of a split by size: `members` holds (first token of the inputs, of the targets, their lengths once cut to fit).

  Sizes count one end of sequence on each side. The most frequent sizes are classes of their own, the others are rounded up,
  so that packing stays quick.

  Args:
    directory: the folder of the index.
    split: of the cache.
    inputs_D: tokens of the inputs of each pair.
    targets_D: of the targets.
    room: encoder and decoder slots of a row.
    most_classes: exact classes.

  Returns:
    {'name', 'sizes': [C, 2], 'counts': [C], 'truncated': pairs that had to be cut}.
  """
  name = f'{split}.pairs-{room[0]}-{room[1]}'

  def fitted(begin):
    sides = np.stack([inputs_D[begin:begin + CHUNK], targets_D[begin:begin + CHUNK]], axis=1).astype(np.int64)
    return sides, np.minimum(sides, np.array(room) - 1)

  def make(prefix):
    exact = np.zeros((room[0] + 1, room[1] + 1), np.int64)
    truncated = 0
    for begin in range(0, len(inputs_D), CHUNK):
      sides, kept = fitted(begin)
      truncated += int((sides != kept).any(axis=1).sum())
      exact += np.bincount((kept[:, 0] + 1) * (room[1] + 1) + kept[:, 1] + 1, minlength=exact.size).reshape(exact.shape)
    used = np.argwhere(exact)
    rare = np.ones(len(used), bool)
    rare[np.argsort(-exact[tuple(used.T)], kind='stable')[:most_classes]] = False
    step = np.maximum(np.array(room) // 32, 1)
    rounded = np.where(rare[:, None], np.minimum(-(-used // step) * step, room), used)
    sizes, class_of = np.unique(rounded, axis=0, return_inverse=True)
    table = np.zeros(exact.shape, np.int64)
    table[tuple(used.T)] = class_of.reshape(-1)

    def chunks():
      first = np.zeros(2, np.int64)
      for begin in range(0, len(inputs_D), CHUNK):
        sides, kept = fitted(begin)
        starts = first + np.cumsum(sides, axis=0) - sides
        yield table[kept[:, 0] + 1, kept[:, 1] + 1], np.concatenate([starts, kept], axis=1)
        first += sides.sum(axis=0)

    counts = sort_by_class(prefix, chunks, len(sizes), columns=4)
    return {'name': name, 'sizes': sizes.tolist(), 'counts': counts.tolist(), 'truncated': truncated}

  return store(directory, name, make)


def cpm2_streams(directory: pathlib.Path, split: str, tokens: np.ndarray, lengths_D: np.ndarray, density: float,
                 mean: float, eod: int, sentinels: int) -> dict:
  """The streams of CPM-2's objective (facts of the released preprocessing are in `reader.Windows`).

  Files: `context` (tokens that stay, a 0 at each span), `noise` (tokens of all spans), `places` ([K] where each span stands in
  `context`), `starts` ([K + 1] where it starts in `noise`, and the length of `noise`).

  Args:
    directory: the folder of the index.
    split: of the cache.
    tokens: of the split.
    lengths_D: of its documents, without end of document.
    density: share of noise.
    mean: mean span length.
    eod: end of document.
    sentinels: how many the vocabulary has.

  Returns:
    {'name', 'context': tokens, 'spans', 'dropped': documents, 'tightest': the shortest window with a span too many}.
  """
  name = f'{split}.cpm2-{density}-{mean}-{sentinels}'

  def make(prefix):
    lengths = np.asarray(lengths_D, np.int64)
    offsets = objectives.exclusive_cumsum(lengths)
    kept = np.flatnonzero((lengths >= CPM2_TOKENS[0]) & (lengths <= CPM2_TOKENS[1]))
    kept = kept[np.argsort(objectives.combine(STATIC, kept), kind='stable')]
    border = np.searchsorted(np.cumsum(lengths[kept]), np.arange(0, int(lengths[kept].sum()), TOKENS))
    border = np.append(border, len(kept))
    total = np.zeros(2, np.int64)
    with contextlib.ExitStack() as stack:
      context, noise, places, begins = (stack.enter_context(open(f'{prefix}.{part}', 'wb'))
                                        for part in ('context', 'noise', 'places', 'starts'))
      for begin, end in zip(border, border[1:]):
        some = kept[begin:end]
        if not len(some):
          continue
        flat, longer = objectives.append(tokens[np.repeat(offsets[some], lengths[some]) + objectives.ramp(lengths[some])],
                                         lengths[some], eod)
        noise_P, spans_P = objectives.noise_counts(longer, density, mean)
        spans = objectives.draw_spans(objectives.combine(STATIC, some), longer, noise_P, spans_P)
        is_noise = objectives.noise_mask(longer, spans)
        starts = np.repeat(objectives.exclusive_cumsum(longer), spans.counts) + spans.start
        noise_before = objectives.exclusive_cumsum(spans.length)
        place = starts - noise_before + np.arange(len(starts))
        stays = ~is_noise
        stays[starts] = True
        out = np.where(is_noise, 0, flat)[stays].astype(tokens.dtype)
        out.tofile(context)
        flat[is_noise].astype(tokens.dtype).tofile(noise)
        (place + total[0]).tofile(places)
        (noise_before + total[1]).tofile(begins)
        total += len(out), int(is_noise.sum())
      total[1:].tofile(begins)
    place = np.fromfile(f'{prefix}.places', np.int64)
    # A window needs one sentinel for each span and one to close, and windows run over the end of the stream.
    ring = np.concatenate([place, place[:sentinels] + total[0]])
    tight = int((ring[sentinels - 1:] - ring[:len(ring) - sentinels + 1]).min()) + 1 if len(ring) >= sentinels else 0
    return {'name': name, 'context': int(total[0]), 'spans': len(place), 'dropped': len(lengths) - len(kept),
            'tightest': tight}

  return store(directory, name, make)
