"""The unit of work in making a cache: one shard of one split, from its documents to files of tokens."""

import collections
import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable

import numpy as np

from t5x_cpm import files
from t5x_cpm.data import cache
from t5x_cpm.tasks.documents import Source
from t5x_cpm.vocabularies import Vocabulary

KINDS = ('tokens', 'lengths')  # the files of a feature


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
    """Whether the unit is complete in the folder `path`: its .json is written last."""
    return (path / f'{self.name}.json').is_file()

  def facts(self, path: pathlib.Path) -> dict:
    """What `write` found: documents, tokens of each feature, 'skipped' with a count for each reason, and 'digest'."""
    return json.loads((path / f'{self.name}.json').read_text())


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
           for feature in source.features for kind in KINDS}
    for sides in source.tokens(unit.split, unit.shard, vocabulary, skipped):
      keep = sides[-1][1] > 0
      for feature, (flat, lengths) in zip(source.features, sides):
        flat = flat[np.repeat(keep, lengths)].astype(cache.token_dtype(vocabulary))
        for kind, array in zip(KINDS, (flat, lengths[keep].astype(np.uint32))):
          array.tofile(out[feature, kind])
          digest.update(array.data)
        counts[feature] += len(flat)
      counts['documents'] += int(keep.sum())
      skipped['empty'] += int((~keep).sum())
      report(len(keep))
  files.write_json(path / f'{unit.name}.json', {**counts, 'skipped': dict(skipped), 'digest': digest.hexdigest()})
