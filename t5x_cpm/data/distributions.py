"""The K most probable tokens of a distribution, in few bytes: 114 for K = 50 of 51,968 tokens.

A record holds, bit after bit,

  low bits    of each token, ascending; as many as log2(V / K) rounded down
  high bits   the rest of each token, as the places of ones in a string of bits (Elias 1974, Fano 1971): together with the low
              bits at most two bits a token more than the least that any code needs
  ratios      6 bits a token: how far its log-probability is below that of the most probable one, on a scale that is fine near 0
  rest        11 bits: the probability of all other tokens together, on a logistic scale

A ratio of d nats comes back within sqrt(16 d) / 63 + 0.002 nats for d up to 16, which is where the scale ends. Probabilities
and the rest sum to 1 when they come back.
"""

import numpy as np

RATIO_BITS, RATIO_RANGE = 6, 16.0  # nats
REST_BITS, REST_RANGE = 11, 16.0  # of log(rest / (1 - rest)), on both sides of 0
_RATIO_MAX, _REST_MAX = (1 << RATIO_BITS) - 1, (1 << REST_BITS) - 1


def _low_bits(K: int, V: int) -> int:
  return (V // K).bit_length() - 1


def _widths(K: int, V: int) -> tuple[int, ...]:
  """How many bits each part of a record has."""
  low = _low_bits(K, V)
  return K * low, K + ((V - 1) >> low), K * RATIO_BITS, REST_BITS


def record_bytes(K: int, V: int) -> int:
  """How many bytes a record takes."""
  return -(-sum(_widths(K, V)) // 8)


def _to_bits(values: np.ndarray, width: int) -> np.ndarray:
  """[N, n] whole numbers -> [N, n * width] bits."""
  return ((values[..., None] >> np.arange(width)) & 1).astype(np.uint8).reshape(len(values), values.shape[1] * width)


def _from_bits(bits: np.ndarray, width: int) -> np.ndarray:
  """The inverse of `_to_bits`."""
  return bits.reshape(len(bits), bits.shape[1] // width, width) @ (1 << np.arange(width, dtype=np.int64))


def pack(ids_NK: np.ndarray, probs_NK: np.ndarray, V: int) -> np.ndarray:
  """Packs N distributions.

  Args:
    ids_NK: K different tokens of V, in any order; K < V.
    probs_NK: their probabilities, of sum at most 1.
    V: how many tokens there are.

  Returns:
    uint8 [N, record_bytes(K, V)].
  """
  N, K = ids_NK.shape
  low = _low_bits(K, V)
  order = np.argsort(ids_NK, axis=1)
  ids = np.take_along_axis(ids_NK, order, axis=1).astype(np.int64)
  probs = np.take_along_axis(probs_NK, order, axis=1).astype(np.float64)
  ones = np.zeros((N, _widths(K, V)[1]), np.uint8)
  np.put_along_axis(ones, (ids >> low) + np.arange(K), 1, axis=1)
  logs = np.log(np.maximum(probs, 1e-300))
  below = np.clip(logs.max(axis=1, keepdims=True) - logs, 0, RATIO_RANGE)
  ratios = np.rint(_RATIO_MAX * np.sqrt(below / RATIO_RANGE)).astype(np.int64)
  rest = np.clip(1 - probs.sum(axis=1, keepdims=True), 1e-9, 1 - 1e-9)
  logit = np.clip(np.log(rest / (1 - rest)), -REST_RANGE, REST_RANGE)
  rests = np.rint((logit + REST_RANGE) / (2 * REST_RANGE) * _REST_MAX).astype(np.int64)
  return np.packbits(np.concatenate([
      _to_bits(ids & ((1 << low) - 1), low), ones, _to_bits(ratios, RATIO_BITS), _to_bits(rests, REST_BITS)], axis=1), axis=1)


def unpack(packed: np.ndarray, K: int, V: int) -> tuple[np.ndarray, np.ndarray]:
  """The tokens, int32 [N, K], ascending, and their probabilities, float32 [N, K], of packed distributions."""
  widths = _widths(K, V)
  low = _low_bits(K, V)
  bits = np.unpackbits(packed, axis=1, count=sum(widths))
  low_bits, ones, ratio_bits, rest_bits = np.split(bits, np.cumsum(widths)[:-1], axis=1)
  high = np.nonzero(ones)[1].reshape(len(packed), K) - np.arange(K)
  ids = (high << low) + (_from_bits(low_bits, low) if low else 0)
  ratios = _from_bits(ratio_bits, RATIO_BITS) / _RATIO_MAX
  weights = np.exp(-RATIO_RANGE * ratios**2)
  rest = 1 / (1 + np.exp(REST_RANGE - _from_bits(rest_bits, REST_BITS) / _REST_MAX * 2 * REST_RANGE))
  return ids.astype(np.int32), ((1 - rest) * weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
