"""SeqIO data sources over Python readers, and tokenization by batches. Imports TensorFlow, which sees no GPU."""

import collections
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from t5x_cpm.tasks import documents
from t5x_cpm.vocabularies import Vocabulary

tf.config.set_visible_devices([], 'GPU')


class _State:
  """What a reader that runs in a thread of TensorFlow has to say to the caller."""

  error: Exception | None = None


@contextlib.contextmanager
def errors() -> Iterator[None]:
  """Within it an error of a reader is raised as itself, not as TensorFlow's report of it."""
  _State.error = None
  try:
    yield
  except tf.errors.OpError:
    if _State.error is not None:
      raise _State.error from None
    raise


class TextSource(seqio.DataSource):
  """Documents that Python code reads, as a SeqIO data source."""

  def __init__(self, source: documents.Documents):
    super().__init__(splits=list(source.shards))
    self.documents = source

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return False

  def list_shards(self, split: str) -> list[str]:
    return [f'{split}-{shard}' for shard in range(self.documents.shards[split])]

  def get_dataset(self, split='train', shuffle=True, seed=None, shard_info=None, *, sequence_length=None,
                  use_cached=False, num_epochs=1) -> tf.data.Dataset:
    del sequence_length, use_cached, num_epochs  # of the interface; other sources do not use them either
    mine = np.arange(self.documents.shards[split])
    if shard_info:
      mine = mine[shard_info.index::shard_info.num_shards]
    if shuffle:
      mine = np.random.default_rng(seed).permutation(mine)

    def batches():
      try:
        yield from self.documents.texts(split, mine.tolist(), collections.Counter())
      except Exception as error:
        _State.error = error
        raise

    features = self.documents.features
    dataset = tf.data.Dataset.from_generator(batches, output_signature=tf.TensorSpec([None, len(features)], tf.string))
    return dataset.map(lambda x: {name: x[:, i] for i, name in enumerate(features)}).unbatch()


def tokenize(vocabulary: Vocabulary, features: Sequence[str]) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
  """A preprocessor that turns texts into ids, many at a time, and keeps the text as `<feature>_pretokenized`.

  Args:
    vocabulary: whose `encode_batch` is called.
    features: names of the texts.
  """

  def encode(texts):
    return documents.encode(vocabulary, [text.decode() for text in texts.numpy()])

  def encode_batch(batch):
    for feature in features:
      flat, lengths = tf.py_function(encode, [batch[feature]], (tf.int32, tf.int64))
      flat.set_shape([None])
      lengths.set_shape([None])
      ragged: Any = tf.RaggedTensor
      batch = batch | {feature: ragged.from_row_lengths(flat, lengths, validate=False),
                       f'{feature}_pretokenized': batch[feature]}
    return batch

  def preprocess(dataset):
    def dense(x):
      return x | {f: tf.ensure_shape(x[f].to_tensor() if isinstance(x[f], tf.RaggedTensor) else x[f], [None]) for f in features}
    return dataset.batch(documents.BATCH).map(encode_batch).unbatch().map(dense)

  return preprocess
