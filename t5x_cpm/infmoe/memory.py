"""Memory of a fixed size for experts, in which they are read and computed with."""

import mmap
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from t5x_cpm.checkpoints.readers import Kind
from t5x_cpm.infmoe.loader import Load

Expert = dict[str, dict[str, jax.Array]]  # by matrix and part


class Slot:
  """Room for one expert.

  Attributes:
    memory: uint8, whole pages.
    fence: what was computed last from it; None: nothing. It may be overwritten once this is there.
    dropped: a load into it that was given up, and may not have ended yet; None: there is none.
  """

  def __init__(self, memory: np.ndarray, parts: Mapping[str, Mapping[str, tuple[Kind, int]]], device: Any):
    self.memory = memory
    self.fence: jax.Array | None = None
    self.dropped: Load | None = None
    self._device = device
    self._views = {matrix: {part: memory[begin:begin + kind.nbytes].view(kind.dtype).reshape(kind.shape)
                            for part, (kind, begin) in given.items()} for matrix, given in parts.items()}
    arrays = jax.tree.map(lambda view: jax.device_put(view, device), self._views)
    # XLA:CPU takes aligned memory as it is, so that what is read into it later is what it computes with.
    is_shared = device.platform == 'cpu' and all(
        array.unsafe_buffer_pointer() == view.ctypes.data
        for array, view in zip(jax.tree.leaves(arrays), jax.tree.leaves(self._views), strict=True))
    self._arrays: Expert | None = arrays if is_shared else None

  def wait(self) -> None:
    """Waits until it may be overwritten."""
    if self.dropped is not None:
      self.dropped.join()
      self.dropped = None
    if self.fence is not None:
      jax.block_until_ready(self.fence)
      self.fence = None

  @property
  def weights(self) -> Expert:
    """What it holds, on the device."""
    if self._arrays is None:
      return jax.tree.map(lambda view: jax.device_put(view.copy(), self._device), self._views)
    return self._arrays

  @property
  def views(self) -> dict[str, dict[str, np.ndarray]]:
    """What it holds, in the memory of the host."""
    return self._views


def pages(size: int) -> np.ndarray:
  """Memory that begins with a page, uint8 [size]."""
  room = mmap.mmap(-1, size)
  if hasattr(mmap, 'MADV_HUGEPAGE'):
    room.madvise(mmap.MADV_HUGEPAGE)
  return np.frombuffer(room, np.uint8)


def slots(count: int, size: int, parts: Mapping[str, Mapping[str, tuple[Kind, int]]], device: Any) -> list[Slot]:
  """Makes slots.

  Args:
    count: how many.
    size: bytes of each, whole pages.
    parts: by matrix and part, shape and type, and the first byte in a slot.
    device: where experts are computed.
  """
  if not count:
    return []
  memory = pages(count * size)
  return [Slot(memory[i * size:(i + 1) * size], parts, device) for i in range(count)]
