"""Digests of arrays: a changed bit gives another digest, and a mesh gives the same as a single device.

The bits of each element are mixed with its place (as MurmurHash3's finalizer does, but for its last step: a bijection, so that
a change of one element never goes unseen), and the lower and the upper halves of all results are added up. Sums have no order:
an array is digested where it lies, each device its own part.
"""

import math
import threading
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_cpm import backend, trees

GOLDEN = np.uint32(0x9E3779B1)  # odd: places differ in all bits
BLOCK = 1024, 1024  # elements that are digested at a time on a CPU


def _mixed(bits: Any, places: Any) -> Any:
  """Bits of elements, mixed with GOLDEN times their places; uint32 of numpy or of JAX."""
  x = bits ^ places
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  return (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)


def _row_sums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The sums over the last axis of the lower and of the upper halves of uint32."""
  # Both in one reduction over rows and then one of what is left: XLA:CPU (JAX 0.10) runs this at 7 GB/s a core, and one over
  # all axes at once, or one for each sum, at 0.4 to 2.
  zero = np.uint32(0)
  sums = jax.lax.reduce(
      (x & np.uint32(0xFFFF), x >> 16), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), (x.ndim - 1,))
  return jax.lax.optimization_barrier(sums)


@jax.jit
def _of_array(x: jax.Array) -> jax.Array:
  """uint32 [2]: the sums of an array of any shape and sharding."""
  if x.dtype != jnp.bool_:
    x = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32))
  bits = x.astype(jnp.uint32).reshape(x.shape or (1,))
  places = jnp.zeros(bits.shape, jnp.uint32)
  for axis in range(bits.ndim):  # the place in a flat array, in 32 bits
    stride = np.uint32(math.prod(bits.shape[axis + 1:]) % 2**32)
    places += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * stride
  return jnp.stack([jnp.sum(part, dtype=jnp.uint32) for part in _row_sums(_mixed(bits, places * GOLDEN))])


@jax.jit
def _of_block(bits: jax.Array, start: jax.Array, rows: jax.Array) -> jax.Array:
  """The sums of the first `rows` rows of a block whose first element lies at place `start`."""
  row, column = (jax.lax.broadcasted_iota(jnp.uint32, BLOCK, axis) for axis in (0, 1))
  sums = _row_sums(_mixed(bits.reshape(BLOCK), (row * np.uint32(BLOCK[1]) + column + start) * GOLDEN))
  return jnp.stack([jnp.sum(jnp.where(row[:, 0] < rows, part, np.uint32(0)), dtype=jnp.uint32) for part in sums])


def _on_host(x: np.ndarray, first: int = 0) -> np.ndarray:
  """As `_of_array`, by one program for any shape: compiling one for each would take longer than reading them.

  Args:
    x: an array, or a part of one.
    first: the place of its first element in the whole array.
  """
  words = x.reshape(-1).view({1: np.uint8, 2: np.uint16}.get(x.dtype.itemsize, np.uint32))
  size, row = math.prod(BLOCK), BLOCK[1]
  sums = np.zeros(2, np.uint32)
  whole = len(words) // row * row
  for start in range(0, whole, size):
    bits = words[start:min(start + size, whole)].astype(np.uint32, copy=False)
    padded = bits if len(bits) == size else np.concatenate([bits, np.zeros(size - len(bits), np.uint32)])
    sums += np.asarray(_of_block(padded, np.uint32((first + start) % 2**32), np.uint32(len(bits) // row)))
  places = np.arange(first + whole, first + len(words), dtype=np.uint64).astype(np.uint32) * GOLDEN
  x = _mixed(words[whole:].astype(np.uint32), places)  # less than a row
  return sums + np.array([(x & np.uint32(0xFFFF)).sum(dtype=np.uint32), (x >> 16).sum(dtype=np.uint32)])


def of_host(x: np.ndarray) -> str:
  """The digest of the bytes of a contiguous array in the memory of the host, 16 hexadecimal digits."""
  raw = x.reshape(-1).view(np.uint8)
  low, high = (int(word) for word in _on_host(raw if raw.nbytes % 4 else raw.view(np.uint32)))
  return f'{high:08x}{low:08x}'


def prepare() -> threading.Thread:
  """Starts to compile what `of_tree` needs on a CPU, while arrays are still being read. The result is to be joined."""
  def compile_block() -> None:
    if backend.on_cpu():
      _of_block(np.zeros(math.prod(BLOCK), np.uint32), np.uint32(0), np.uint32(0))

  thread = threading.Thread(target=compile_block)
  thread.start()
  return thread


def _start(x: Any) -> Any:
  """Starts to digest an array; what lies in the memory of the hosts, one after the other, for it may not fit the devices."""
  if backend.on_cpu() and (not isinstance(x, jax.Array) or (x.is_fully_addressable and x.is_fully_replicated)):
    return _on_host(np.asarray(x))
  if isinstance(x, jax.Array) and x.sharding.memory_kind == 'pinned_host':
    return jax.device_get(_of_array(jax.device_put(x, x.sharding.with_memory_kind('device'))))
  # On a CPU programs that exchange numbers run one after the other: several at once wait for each other's threads for ever.
  return jax.block_until_ready(_of_array(x)) if backend.on_cpu() else _of_array(x)


def kind(dtype: Any, shape: Sequence[int]) -> str:
  """'float32[3, 4]', for an array of this type and shape."""
  return f'{dtype}{list(shape)}'


def _text(dtype: Any, shape: Sequence[int], sums: Any) -> str:
  low, high = (int(word) for word in np.asarray(sums))
  return f'{kind(dtype, shape)} {high:08x}{low:08x}'


class Running:
  """The digest of an array that is seen slice by slice, along its leading axes, in any order."""

  def __init__(self, dtype: Any, shape: Sequence[int]):
    """dtype, shape: of the whole array."""
    self._dtype, self._shape = dtype, tuple(shape)
    self._sums: dict[tuple[int, ...], Any] = {}

  @property
  def seen(self) -> Collection[tuple[int, ...]]:
    """The indices of the slices that were seen."""
    return self._sums.keys()

  def add(self, index: tuple[int, ...], x: np.ndarray) -> list[int]:
    """Takes the slice at an index of the leading axes, of which all slices have equally many. Returns its sums."""
    first = sum(place * math.prod(self._shape[axis + 1:]) for axis, place in enumerate(index))
    return self.add_sums(index, [int(word) for word in _on_host(x, first)])

  def add_sums(self, index: tuple[int, ...], sums: list[int]) -> list[int]:
    """Takes a slice by what `add` has returned for it."""
    self._sums[index] = sums
    return sums

  @property
  def is_whole(self) -> bool:
    """Whether all slices were seen."""
    depth = len(next(iter(self._sums), ()))
    return bool(self._sums) and len(self._sums) == math.prod(self._shape[:depth])

  @property
  def text(self) -> str:
    """As `of_tree` says it."""
    return _text(self._dtype, self._shape, [sum(words) % 2**32 for words in zip(*self._sums.values())])


def of_tree(tree: Any) -> dict[str, str]:
  """Name -> 'float32[3, 4] 0123456789abcdef' for every array of a tree: its type, its shape, and the digest of its bits.

  Every process of a run calls it with the same tree.
  """
  leaves, result = trees.named(tree), {}
  sums = {name: _start(x) for name, x in leaves.items()}  # all are under way before the first result is waited for
  for name, x in leaves.items():
    result[name] = _text(x.dtype, x.shape, sums[name])
  return result
