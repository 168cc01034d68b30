"""How a matrix is stored, and the product with it as it is stored.

Weights alone are rounded; activations keep their type. With 8 bits each output has a scale of its own, as in GLM-130B (Zeng et
al. 2023, section 3.2); with 4 bits each group of inputs to an output has one, as in FlexGen (Sheng et al. 2023).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t5x_cpm.checkpoints.readers import Kind
from t5x_cpm.config import ConfigError
from t5x_cpm.models.layers import at_least_float32

Parts = dict[str, np.ndarray]  # a stored matrix: 'kernel' and, where it is rounded to whole numbers, 'scale'


class Format(NamedTuple):
  """One way to store a matrix [I, O] of I inputs and O outputs.

  Attributes:
    kinds: (I, O, numbers that share a scale) -> shapes and types of its parts. Raises ConfigError where it cannot be stored so.
    encode: (matrix, numbers that share a scale) -> its parts.
    product: (x [M, I], parts) -> x @ matrix, [M, O], in the type of x.
    decode: parts -> the matrix that they stand for, float32: the reference of `product`.
  """

  kinds: Callable[[int, int, int], dict[str, Kind]]
  encode: Callable[[np.ndarray, int], Parts]
  product: Callable[[jax.Array, dict[str, jax.Array]], jax.Array]
  decode: Callable[[Parts], np.ndarray]


def _plain(dtype: type) -> Format:
  kind = np.dtype(dtype)

  def product(x_MI: jax.Array, parts: dict[str, jax.Array]) -> jax.Array:
    wide = at_least_float32(x_MI.dtype)
    return jnp.matmul(x_MI, parts['kernel'].astype(x_MI.dtype), preferred_element_type=wide).astype(x_MI.dtype)

  return Format(
      kinds=lambda I, O, group: {'kernel': Kind((I, O), kind)},
      encode=lambda matrix, group: {'kernel': matrix.astype(kind)},
      product=product,
      decode=lambda parts: parts['kernel'].astype(np.float32))


def _rounded(matrix_GIO: np.ndarray, largest: int) -> tuple[np.ndarray, np.ndarray]:
  """Whole numbers from -largest to largest, int8, and their scales, for groups [G, I, O]: the scales are [G, 1, O]."""
  scale = np.abs(matrix_GIO).max(axis=1, keepdims=True).astype(np.float32) / np.float32(largest)
  scale[scale == 0] = 1
  return np.rint(matrix_GIO / scale).astype(np.int8), scale


# With 8 bits. Outputs come first, so that a product reads the inputs to each one after the other.


def _int8_kinds(I: int, O: int, group: int) -> dict[str, Kind]:
  return {'kernel': Kind((O, I), np.dtype(np.int8)), 'scale': Kind((O,), np.dtype(np.float32))}


def _int8_encode(matrix_IO: np.ndarray, group: int) -> Parts:
  whole, scale = _rounded(matrix_IO[None], 127)
  return {'kernel': np.ascontiguousarray(whole[0].T), 'scale': scale.reshape(-1)}


def _int8_product(x_MI: jax.Array, parts: dict[str, jax.Array]) -> jax.Array:
  wide = at_least_float32(x_MI.dtype)
  y_MO = jax.lax.dot_general(x_MI, parts['kernel'].astype(x_MI.dtype), (((1,), (1,)), ((), ())), preferred_element_type=wide)
  return (y_MO * parts['scale']).astype(x_MI.dtype)


def _int8_decode(parts: Parts) -> np.ndarray:
  return np.ascontiguousarray((parts['kernel'] * parts['scale'][:, None]).T)


# With 4 bits. Two inputs share a byte: one of the first half of the inputs, in the low bits, and one of the second.


def _groups(I: int, group: int) -> int:
  return I // group if group else 1


def _int4_kinds(I: int, O: int, group: int) -> dict[str, Kind]:
  if I % 2 or (group and I % group):
    raise ConfigError(f"OffloadConfig: 'int4' stores matrices in groups of {group or 2} inputs, and one has {I}: take another "
                      "OffloadConfig.group, or 'int8'.")
  return {'kernel': Kind((O, I // 2), np.dtype(np.uint8)), 'scale': Kind((O, _groups(I, group)), np.dtype(np.float32))}


def _int4_encode(matrix_IO: np.ndarray, group: int) -> Parts:
  I, O = matrix_IO.shape
  whole, scale = _rounded(matrix_IO.reshape(_groups(I, group), -1, O), 7)
  nibbles_OI = np.ascontiguousarray(whole.reshape(I, O).T).view(np.uint8) & 0xF
  return {'kernel': nibbles_OI[:, :I // 2] | (nibbles_OI[:, I // 2:] << 4), 'scale': np.ascontiguousarray(scale[:, 0].T)}


def _int4_product(x_MI: jax.Array, parts: dict[str, jax.Array]) -> jax.Array:
  wide = at_least_float32(x_MI.dtype)
  packed_OJ, scale_OG = parts['kernel'].view(jnp.int8), parts['scale']
  O, J = packed_OJ.shape
  M, groups = x_MI.shape[0], scale_OG.shape[1]
  low, high = jnp.right_shift(jnp.left_shift(packed_OJ, 4), 4), jnp.right_shift(packed_OJ, 4)  # with their signs
  whole_OI = jnp.concatenate([low, high], axis=1).astype(x_MI.dtype)
  y_MOG = jnp.einsum('MGI,OGI->MOG', x_MI.reshape(M, groups, -1), whole_OI.reshape(O, groups, -1), preferred_element_type=wide)
  return jnp.sum(y_MOG * scale_OG, axis=-1).astype(x_MI.dtype)


def _int4_decode(parts: Parts) -> np.ndarray:
  packed_OJ = parts['kernel'].view(np.int8)
  whole_OI = np.concatenate([(packed_OJ << 4) >> 4, packed_OJ >> 4], axis=1).astype(np.float32)
  O, I = whole_OI.shape
  return np.ascontiguousarray((whole_OI.reshape(O, parts['scale'].shape[1], -1) * parts['scale'][:, :, None]).reshape(O, I).T)


FORMATS: dict[str, Format] = {
    'float32': _plain(np.float32),
    'bfloat16': _plain(jnp.bfloat16),
    'int8': Format(_int8_kinds, _int8_encode, _int8_product, _int8_decode),
    'int4': Format(_int4_kinds, _int4_encode, _int4_product, _int4_decode)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stored:
  """A matrix as it is stored, in the place of a kernel.

  Attributes:
    parts: by name, its parts.
    form: the name of its format.
  """

  parts: dict[str, Any]
  form: str = dataclasses.field(metadata={'static': True})

  def __getitem__(self, key: Any) -> 'Stored':
    """The whole, as modules ask for their parameters."""
    assert key is ...
    return self

  def product(self, x_NI: jax.Array) -> jax.Array:
    return FORMATS[self.form].product(x_NI, self.parts)


def bits_per_weight(name: str, I: int, O: int, group: int) -> float:
  """What a number of a matrix [I, O] takes in a format, its share of the scales included."""
  return 8 * sum(kind.nbytes for kind in FORMATS[name].kinds(I, O, group).values()) / math.prod((I, O))
