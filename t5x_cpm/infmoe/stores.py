"""Stores: where the experts of a bundle are, and how one comes to where it is computed.

`Mapped` has them in the files of the bundle, mapped into memory. The system's cache holds what was used lately, and a CPU
computes with them where they lie.
"""

from typing import Any, Protocol

import jax

from t5x_cpm.infmoe.bundle import Bundle, Place

Expert = dict[str, dict[str, jax.Array]]  # by matrix and part


class Store(Protocol):
  """Brings experts to the device."""

  def get(self, place: Place, expert: int) -> Expert:
    """The weights of an expert, which stay as they are until the next call of `done`."""
    ...

  def done(self) -> None:
    """What was got is not needed any more, once all that was dispatched has run."""
    ...


class Mapped:
  """The experts as they are mapped."""

  def __init__(self, bundle: Bundle, device: Any):
    self._bundle, self._device = bundle, device
    self._got: dict[tuple[Place, int], Expert] = {}

  def get(self, place: Place, expert: int) -> Expert:
    found = self._got.get((place, expert))
    if found is None:
      names = self._bundle.names(place, expert)
      found = {matrix: {part: jax.device_put(self._bundle.tensor(place.file, name), self._device) for part, name in parts.items()}
               for matrix, parts in names.items()}
      if self._device.platform == 'cpu':  # elsewhere it is a copy
        self._got[place, expert] = found
    return found

  def done(self) -> None:
    pass
