"""Digests of arrays: a changed bit gives another digest, and a mesh gives the same as a single device.

The bits of each element are mixed with its place (by the finalizer of MurmurHash3, which is a bijection, so that a change of
one element never goes unseen), and the two halves of all results are added up. Sums have no order: an array is digested where
it lies, each device its own part.
"""

import math
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_cpm import backend, trees

GOLDEN = np.uint32(0x9E3779B1)  # odd: places differ in all bits
BLOCK = 1024, 1024  # elements that are digested at a time on a CPU
FEW = 2**16  # elements that numpy digests sooner than a block


def _mixed(bits: Any, places: Any) -> Any:
  """Bits of elements, mixed with their places; uint32 of one shape, of numpy or of JAX."""
  x = bits ^ (places * GOLDEN)
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def _sums(x: jax.Array) -> jax.Array:
  """uint32 [2]: the sums of the lower and of the upper halves of an array of uint32 that is no scalar."""
  # Both in one reduction over rows and then one of what is left: XLA:CPU (JAX 0.10) runs this at 18 GB/s on two cores, and
  # one over all axes at once, or one for each sum, at 0.7 to 5.
  zero = np.uint32(0)
  rows = jax.lax.reduce(
      (x & np.uint32(0xFFFF), x >> 16), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), (x.ndim - 1,))
  return jnp.stack([jnp.sum(part, dtype=jnp.uint32) for part in jax.lax.optimization_barrier(rows)])


@jax.jit
def _of_array(x: jax.Array) -> jax.Array:
  """The sums of an array of any shape and sharding."""
  if x.dtype != jnp.bool_:
    x = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32))
  bits = x.astype(jnp.uint32).reshape(x.shape or (1,))
  places = jnp.zeros(bits.shape, jnp.uint32)
  for axis in range(bits.ndim):  # the place in a flat array, in 32 bits
    stride = np.uint32(math.prod(bits.shape[axis + 1:]) % 2**32)
    places += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * stride
  return _sums(_mixed(bits, places))


@jax.jit
def _of_block(bits: jax.Array, start: jax.Array, count: jax.Array) -> jax.Array:
  """The sums of the first `count` of the elements that lie from place `start` on."""
  index = jax.lax.broadcasted_iota(jnp.uint32, BLOCK, 0) * np.uint32(BLOCK[1]) + jax.lax.broadcasted_iota(jnp.uint32, BLOCK, 1)
  return _sums(jnp.where(index < count, _mixed(bits.reshape(BLOCK), index + start), np.uint32(0)))


def _on_host(x: np.ndarray) -> np.ndarray:
  """As `_of_array`, by one program for any shape: compiling one for each would take longer than reading them."""
  words = x.reshape(-1).view({1: np.uint8, 2: np.uint16}.get(x.dtype.itemsize, np.uint32))
  size = math.prod(BLOCK)
  sums = np.zeros(2, np.uint32)
  for start in range(0, len(words), size):
    bits = words[start:start + size].astype(np.uint32, copy=False)
    count, first = len(bits), np.uint32(start % 2**32)
    if count <= FEW:
      mixed = _mixed(bits, np.arange(count, dtype=np.uint32) + first)
      sums += np.array([(mixed & np.uint32(0xFFFF)).sum(dtype=np.uint32), (mixed >> 16).sum(dtype=np.uint32)])
    else:
      padded = bits if count == size else np.pad(bits, (0, size - count))
      sums += np.asarray(_of_block(padded, first, np.uint32(count)))
  return sums


def prepare() -> threading.Thread:
  """Starts to compile what `of_tree` needs on a CPU, while arrays are still being read. The result is to be joined."""
  def compile_block() -> None:
    if backend.on_cpu():
      _of_block(np.zeros(math.prod(BLOCK), np.uint32), np.uint32(0), np.uint32(0))

  thread = threading.Thread(target=compile_block)
  thread.start()
  return thread


def _here(x: Any) -> Any:
  """An array that lies in the memory of the hosts, on the devices."""
  if isinstance(x, jax.Array) and x.sharding.memory_kind == 'pinned_host' and not backend.on_cpu():
    return jax.device_put(x, x.sharding.with_memory_kind('device'))
  return x


def kind(dtype: Any, shape: Sequence[int]) -> str:
  """'float32[3, 4]', for an array of this type and shape."""
  return f'{dtype}{list(shape)}'


def of_tree(tree: Any) -> dict[str, str]:
  """Name -> 'float32[3, 4] 0123456789abcdef' for every array of a tree: its type, its shape, and the digest of its bits.

  Every process of a run calls it with the same tree.
  """
  sums, result = {}, {}
  for name, x in trees.named(tree).items():  # all are under way before the first result is waited for
    whole = isinstance(x, np.ndarray) or (x.is_fully_addressable and x.is_fully_replicated)
    sums[name] = _on_host(np.asarray(x)) if whole and backend.on_cpu() else _of_array(_here(x))
  for name, x in trees.named(tree).items():
    low, high = (int(word) for word in np.asarray(sums[name]))
    result[name] = f'{kind(x.dtype, x.shape)} {high:08x}{low:08x}'
  return result
