"""SeqIO data sources over Python readers, and tokenization by batches. Imports TensorFlow, which sees no GPU."""

import collections
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf

from t5x_cpm.data.vocabulary import Vocabulary

tf.config.set_visible_devices([], 'GPU')
BATCH = 256  # documents that cross between Python and TensorFlow at once
Reader = Callable[[str, int, collections.Counter], Iterator[tuple[str, ...]]]


class _State:
  """What a reader that runs in a thread of TensorFlow has to say to the caller."""

  error: Exception | None = None
  skipped: collections.Counter = collections.Counter()


@contextlib.contextmanager
def errors() -> Iterator[collections.Counter]:
  """Within it an error of a reader is raised as itself, not as TensorFlow's report of it. Gives the count of skipped lines."""
  _State.error, _State.skipped = None, collections.Counter()
  try:
    yield _State.skipped
  except tf.errors.OpError:
    if _State.error is not None:
      raise _State.error from None
    raise


class TextSource(seqio.DataSource):
  """Documents that a Python function reads, shard by shard.

  Args:
    read: (split, shard, count of what is skipped) -> documents, each a tuple of texts.
    shards: shards of each split.
    fields: names of the texts.
    files: what the documents are read from, to notice changes.
    patterns: globs of these files, to notice new ones.
  """

  def __init__(self, read: Reader, shards: Mapping[str, int], fields: Sequence[str], files: Sequence[str] = (),
               patterns: Sequence[str] = ()):
    super().__init__(splits=list(shards))
    self.read, self.shards, self.fields, self.files, self.patterns = read, dict(shards), tuple(fields), files, patterns

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return False

  def list_shards(self, split: str) -> list[str]:
    return [f'{split}-{shard}' for shard in range(self.shards[split])]

  def get_dataset(self, split='train', shuffle=True, seed=None, shard_info=None, *, sequence_length=None,
                  use_cached=False, num_epochs=1) -> tf.data.Dataset:
    del sequence_length, use_cached, num_epochs  # of the interface; other sources do not use them either
    mine = np.arange(self.shards[split])
    if shard_info:
      mine = mine[shard_info.index::shard_info.num_shards]
    if shuffle:
      mine = np.random.default_rng(seed).permutation(mine)

    def batches():
      try:
        block = []
        for shard in mine:
          for document in self.read(split, int(shard), _State.skipped):
            block.append(document)
            if len(block) == BATCH:
              yield block
              block = []
        if block:
          yield block
      except Exception as error:
        _State.error = error
        raise

    signature = tf.TensorSpec([None, len(self.fields)], tf.string)
    dataset = tf.data.Dataset.from_generator(batches, output_signature=signature)
    return dataset.map(lambda x: {name: x[:, i] for i, name in enumerate(self.fields)}).unbatch()


def tokenize(vocabulary: Vocabulary, features: Sequence[str]) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
  """A preprocessor that turns texts into ids, many at a time, and keeps the text as `<feature>_pretokenized`.

  Args:
    vocabulary: whose `encode_batch` is called.
    features: names of the texts.
  """

  def encode(texts):
    ids = vocabulary.encode_batch([text.decode() for text in texts.numpy()])
    lengths = np.array([len(x) for x in ids], np.int64)
    return np.concatenate([np.asarray(x, np.int32) for x in ids]) if lengths.sum() else np.zeros(0, np.int32), lengths

  def encode_batch(batch):
    for feature in features:
      flat, lengths = tf.py_function(encode, [batch[feature]], (tf.int32, tf.int64))
      flat.set_shape([None])
      lengths.set_shape([None])
      batch = batch | {feature: tf.RaggedTensor.from_row_lengths(flat, lengths, validate=False),
                       f'{feature}_pretokenized': batch[feature]}
    return batch

  def preprocess(dataset):
    def dense(x):
      return x | {f: tf.ensure_shape(x[f].to_tensor() if isinstance(x[f], tf.RaggedTensor) else x[f], [None]) for f in features}
    return dataset.batch(BATCH).map(encode_batch).unbatch().map(dense)

  return preprocess
