"""The unit of work in making a cache: one shard of one split, from its documents to files of tokens."""

import collections
import contextlib
import dataclasses
import hashlib
import os
import pathlib
import sys
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from t5x_cpm import files, stored
from t5x_cpm.data import cache
from t5x_cpm.tasks.documents import Source
from t5x_cpm.vocabularies import Vocabulary

_FORM = {str: stored.COUNT, 'skipped': {str: stored.COUNT}, 'content': str, 'sums': {str: [stored.COUNT]}}
_REMEDY = 'Start again: it is made again.'


@dataclasses.dataclass(frozen=True)
class Unit:
  """One shard of one split. Its files lie in the folder of the cache until the cache is finished."""

  split: str
  shard: int
  shards: int

  @property
  def name(self) -> str:
    return f'{self.split}-{self.shard:05d}-of-{self.shards:05d}'

  def is_done(self, path: pathlib.Path) -> bool:
    """Whether the unit is complete and intact in the folder `path`: its .json is written last."""
    if not os.path.lexists(path / f'{self.name}.json'):
      return False
    try:
      for name in self.facts(path)['sums']:
        self.copy(path, name, None)
    except stored.DamagedError as error:
      print(f'{error.reason} and is made again.', file=sys.stderr)
      return False
    return True

  def facts(self, path: pathlib.Path) -> dict[str, Any]:
    """What `write` found.

    Returns:
      Documents, tokens of each feature, 'skipped' with a count for each reason, 'content', which is a digest of all, and
      'sums': bytes and CRC-32 of each file.

    Raises:
      DamagedError: it cannot be read.
    """
    return stored.read(path / f'{self.name}.json', _FORM, _REMEDY, 'sums')

  def copy(self, path: pathlib.Path, name: str, whole: BinaryIO | None) -> None:
    """Reads one of the files of the unit, such as 'targets.tokens', and appends it to `whole`.

    Raises:
      DamagedError: it is not what `write` wrote.
    """
    file, found = path / f'{self.name}.{name}', [0, 0]
    try:
      files.check_regular(file)
      with open(file, 'rb') as own:
        while chunk := own.read(1 << 22):
          found = [found[0] + len(chunk), zlib.crc32(chunk, found[1])]
          if whole:
            whole.write(chunk)
    except OSError as error:
      if error.errno not in stored.OF_THE_FILE:
        raise
      raise stored.DamagedError(file, error.strerror or 'it cannot be read', _REMEDY) from None
    if found != self.facts(path)['sums'].get(name):
      raise stored.DamagedError(file, 'it does not have the size and the digest that it was written with', _REMEDY)


def write(source: Source, unit: Unit, path: pathlib.Path, vocabulary: Vocabulary, report: Callable[[int], None]) -> None:
  """Writes the tokens of a unit.

  Args:
    source: the documents.
    unit: which of them.
    path: the folder of the cache.
    vocabulary: makes the tokens.
    report: called whenever documents have been written, with their number.

  Raises:
    DataError: a document that cannot be read.
  """
  counts: collections.Counter = collections.Counter()
  skipped: collections.Counter = collections.Counter()
  digest = hashlib.blake2b(digest_size=16)
  with contextlib.ExitStack() as stack:
    out = {(feature, kind): stack.enter_context(files.replacing(path / f'{unit.name}.{feature}.{kind}'))
           for feature in source.features for kind in cache.KINDS}
    sums = {name: [0, 0] for name in out}
    for sides in source.tokens(unit.split, unit.shard, vocabulary, skipped):
      keep = sides[-1][1] > 0
      for feature, (flat, lengths) in zip(source.features, sides):
        flat = flat[np.repeat(keep, lengths)].astype(cache.token_dtype(vocabulary))
        for kind, array in zip(cache.KINDS, (flat, lengths[keep].astype(np.uint32))):
          array.tofile(out[feature, kind])
          digest.update(array.data)
          size, sum_before = sums[feature, kind]
          sums[feature, kind] = [size + array.nbytes, zlib.crc32(array.data, sum_before)]
        counts[feature] += len(flat)
      counts['documents'] += int(keep.sum())
      skipped['empty'] += int((~keep).sum())
      report(len(keep))
  stored.write(path / f'{unit.name}.json', {
      **counts, 'skipped': dict(skipped), 'content': digest.hexdigest(),
      'sums': {f'{feature}.{kind}': found for (feature, kind), found in sums.items()}})
