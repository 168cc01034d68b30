"""The vocabularies of this project as seqio.Vocabulary, for tasks. Imports TensorFlow."""

from collections.abc import Sequence

import numpy as np
import seqio
import tensorflow as tf

from t5x_cpm.vocabularies import Vocabulary

tf.config.set_visible_devices([], 'GPU')  # TensorFlow would take all memory of a GPU, which JAX needs


class SeqioVocabulary(seqio.Vocabulary):
  """A seqio.Vocabulary with the same ids as a vocabulary of this project. It declares no extra ids: sentinels are plain ids."""

  def __init__(self, vocabulary: Vocabulary):
    """Wraps any vocabulary of `t5x_cpm.vocabularies`."""
    super().__init__(extra_ids=0)
    self.vocabulary = vocabulary

  @property
  def bos_id(self) -> int:
    return self.vocabulary.bos_id

  @property
  def eos_id(self) -> int:
    return self.vocabulary.eos_id

  @property
  def unk_id(self) -> int:
    return self.vocabulary.unk_id

  @property
  def pad_id(self) -> int:
    return self.vocabulary.pad_id

  @property
  def _base_vocab_size(self) -> int:
    return self.vocabulary.size

  def _encode(self, s: str) -> Sequence[int]:
    return self.vocabulary.encode(s)

  def _decode(self, ids: Sequence[int]) -> str:
    return self.vocabulary.decode(ids)

  def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
    def encode(text: bytes) -> np.ndarray:
      return np.asarray(self.vocabulary.encode(text.decode('utf-8')), np.int32)

    ids = tf.numpy_function(encode, [s], tf.int32, stateful=False)
    ids.set_shape([None])
    return ids

  def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    def decode(tokens: np.ndarray) -> bytes:
      return self.vocabulary.decode(tokens.tolist()).encode('utf-8')

    return tf.numpy_function(decode, [ids], tf.string, stateful=False)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, SeqioVocabulary) and self.vocabulary.fingerprint == other.vocabulary.fingerprint

  def __hash__(self) -> int:
    return hash(self.vocabulary.fingerprint)
