"""SeqIO data sources over Python readers, and tokenization in batches. Imports TensorFlow and hides GPUs from it."""

import collections
import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from t5x_cpm.tasks import documents
from t5x_cpm.vocabularies import Vocabulary

tf.config.set_visible_devices([], 'GPU')


class _State:
  """What a reader, which runs in a thread of TensorFlow, has to tell its caller."""

  error: Exception | None = None


@contextlib.contextmanager
def errors() -> Iterator[None]:
  """Within the block, raises an error of a reader itself instead of TensorFlow's report of it."""
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
    self.skipped: collections.Counter = collections.Counter()  # documents that the last reading left out, by reason

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return False

  def list_shards(self, split: str) -> list[str]:
    return [f'{split}-{shard}' for shard in range(self.documents.shards[split])]

  def get_dataset(self, split='train', shuffle=True, seed=None, shard_info=None, *, sequence_length=None,
                  use_cached=False, num_epochs=1) -> tf.data.Dataset:
    del sequence_length, use_cached, num_epochs  # part of the interface, and unused by other sources too
    mine = np.arange(self.documents.shards[split])
    if shard_info:
      mine = mine[shard_info.index::shard_info.num_shards]
    if shuffle:
      mine = np.random.default_rng(seed).permutation(mine)

    def batches():
      self.skipped.clear()
      try:
        yield from self.documents.texts(split, mine.tolist(), self.skipped)
      except Exception as error:
        _State.error = error
        raise

    features = self.documents.features
    dataset = tf.data.Dataset.from_generator(batches, output_signature=tf.TensorSpec([None, len(features)], tf.string))
    return dataset.map(lambda x: {name: x[:, i] for i, name in enumerate(features)}).unbatch()


def _encode_batch(batch: dict[str, tf.Tensor], vocabulary: Vocabulary, features: Sequence[str]) -> dict[str, Any]:
  def encode(texts: tf.Tensor) -> documents.Side:
    return documents.encode(vocabulary, [text.decode() for text in texts.numpy()])

  ragged: Any = tf.RaggedTensor
  for feature in features:
    flat, lengths = tf.py_function(encode, [batch[feature]], (tf.int32, tf.int64))
    flat.set_shape([None])
    lengths.set_shape([None])
    batch = batch | {feature: ragged.from_row_lengths(flat, lengths, validate=False),
                     f'{feature}_pretokenized': batch[feature]}
  return batch


def _dense(example: dict[str, Any], features: Sequence[str]) -> dict[str, Any]:
  ids = {f: example[f].to_tensor() if isinstance(example[f], tf.RaggedTensor) else example[f] for f in features}
  return example | {feature: tf.ensure_shape(value, [None]) for feature, value in ids.items()}


def _tokenize(dataset: tf.data.Dataset, vocabulary: Vocabulary, features: Sequence[str]) -> tf.data.Dataset:
  batched = dataset.batch(documents.BATCH).map(functools.partial(_encode_batch, vocabulary=vocabulary, features=features))
  return batched.unbatch().map(functools.partial(_dense, features=features))


def tokenize(vocabulary: Vocabulary, features: Sequence[str]) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
  """A preprocessor that turns texts into ids, many at a time, and keeps each text as `<feature>_pretokenized`.

  Args:
    vocabulary: makes the ids.
    features: the names of the texts.
  """

  return functools.partial(_tokenize, vocabulary=vocabulary, features=features)
