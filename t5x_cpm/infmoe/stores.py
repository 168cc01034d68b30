"""Stores: where the experts of a bundle are, and how each comes to where it is computed.

`Mapped` has them in the files of the bundle, mapped into memory: the system's cache holds what was used lately, and a CPU
computes with them where they lie. It is for a bundle that fits into memory. `Slots` has memory of a fixed size, and reads past
the system's cache. Layers of the decoder keep experts in slots of their own, since tokens come back to them; those of the
encoder, which are all needed once for a batch, pass through a few slots that layers share. The order of layers is cyclic, so
that one cache for all of them would have thrown out each expert before its layer comes again.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax

from t5x_cpm.infmoe.bundle import Bundle, Place
from t5x_cpm.infmoe.loader import DEMAND, Load, Loader
from t5x_cpm.infmoe.memory import Expert, Slot, slots

DECAY = 0.98  # of the uses of an expert, with each use of its layer


class Loan:
  """An expert that is there until the next one is asked for.

  Attributes:
    expert: which.
    weights: on the device.
    fence: to be set: an array that is there when the expert is not needed any more.
  """

  def __init__(self, expert: int, weights: Expert):
    self.expert, self.weights = expert, weights
    self.fence: jax.Array | None = None


class Store(Protocol):
  """Brings experts to the device.

  Attributes:
    bundle: whose experts.
  """

  bundle: Bundle

  def take(self, place: Place, wanted: Sequence[int]) -> Iterator[Loan]:
    """Experts of a layer, each once, in the order in which they are there.

    Raises:
      ConfigError: one cannot be read, or is not what was written.
    """
    ...

  def close(self) -> None:
    """Ends what runs beside the caller, and gives the memory back."""
    ...


class Mapped:
  """The experts as they are mapped. See `Store`."""

  def __init__(self, bundle: Bundle, device: Any):
    self.bundle, self._device = bundle, device
    self._got: dict[tuple[Place, int], Expert] = {}

  def _get(self, place: Place, expert: int) -> Expert:
    found = self._got.get((place, expert))
    if found is None:
      names = self.bundle.names(place, expert)
      found = {matrix: {part: jax.device_put(self.bundle.tensor(place.file, name), self._device)
                        for part, name in parts.items()} for matrix, parts in names.items()}
      if self._device.platform == 'cpu':  # elsewhere it is a copy
        self._got[place, expert] = found
    return found

  def take(self, place: Place, wanted: Sequence[int]) -> Iterator[Loan]:
    for expert in wanted:
      yield Loan(expert, self._get(place, expert))

  def close(self) -> None:
    self._got = {}


class _Kept:
  """The experts that a layer keeps."""

  def __init__(self, own: list[Slot]):
    self.free, self.slots = own, dict[int, Slot]()  # by expert
    self._uses: dict[int, tuple[float, int]] = {}  # by expert: uses, decayed, and when that was
    self._now = 0

  def used(self, experts: Sequence[int]) -> None:
    """Notes that a batch of tokens goes to these."""
    self._now += 1
    for expert in experts:
      self._uses[expert] = self._worth(expert) + 1, self._now

  def _worth(self, expert: int) -> float:
    uses, when = self._uses.get(expert, (0.0, self._now))
    return uses * DECAY**(self._now - when)

  def room(self, wanted: Sequence[int]) -> Slot | None:
    """A slot for another expert, of which the least worth is thrown out; None where all are wanted."""
    if self.free:
      return self.free.pop()
    others = [expert for expert in self.slots if expert not in wanted]
    return self.slots.pop(min(others, key=self._worth)) if others else None


class Slots:
  """Experts in memory of a fixed size. See `Store`.

  Attributes:
    bundle: whose experts.
    hits, misses: how many experts of layers that keep some were there, and how many were not.
    loader: what reads them.
  """

  def __init__(self, bundle: Bundle, device: Any, staging: int, kept: Mapping[Place, int], threads: int, seconds: float):
    """Args:
      bundle: what is read.
      device: where experts are computed.
      staging: how many slots all layers share, two or more.
      kept: how many each of the others has of its own.
      threads: how many read.
      seconds: after which a read is given up.
    """
    self.bundle, self._seconds = bundle, seconds
    self.hits = self.misses = 0
    self.loader = Loader(threads)
    first = next(iter(kept), next(iter(bundle.places)))
    size, parts = bundle.block(first)
    made = slots(staging + sum(kept.values()), size, parts, device)
    self._staging = collections.deque(made[:staging])
    self._kept, made = {}, made[staging:]
    for place, count in kept.items():
      self._kept[place], made = _Kept(made[:count]), made[count:]

  def _load(self, place: Place, expert: int, slot: Slot) -> Load:
    def check() -> None:
      for matrix, parts in self.bundle.names(place, expert).items():
        for part, name in parts.items():
          self.bundle.check(place.file, name, slot.views[matrix][part])

    load = Load(f'expert {expert} of {place.stack} layer {place.row}', self.bundle.folder / place.file,
                self.bundle.begin(place, expert), slot.memory, slot.wait, check)
    self.loader.submit(load, DEMAND)
    return load

  def take(self, place: Place, wanted: Sequence[int]) -> Iterator[Loan]:
    kept = self._kept.get(place, _Kept([]))
    kept.used(wanted)
    hits = [expert for expert in wanted if expert in kept.slots]
    misses = [expert for expert in wanted if expert not in kept.slots]
    if place in self._kept:
      self.hits += len(hits)
      self.misses += len(misses)
    own: list[tuple[int, Slot, Load]] = []
    passing = collections.deque(misses)
    for expert in misses:
      slot = kept.room(wanted)
      if slot is None:
        break
      own.append((expert, slot, self._load(place, passing.popleft(), slot)))
    shared: collections.deque[tuple[int, Slot, Load]] = collections.deque()

    def pass_on() -> None:
      while passing and self._staging:
        slot = self._staging.popleft()
        shared.append((passing[0], slot, self._load(place, passing.popleft(), slot)))

    try:
      pass_on()
      for expert in hits:
        yield from self._lend(expert, kept.slots[expert])
      while own:
        expert, slot, load = own[0]
        load.wait(self._seconds)
        own.pop(0)
        kept.slots[expert] = slot
        yield from self._lend(expert, slot)
      while shared:
        expert, slot, load = shared[0]
        load.wait(self._seconds)
        shared.popleft()
        self._staging.append(slot)
        yield from self._lend(expert, slot)
        pass_on()
    finally:  # of an error, or where the caller has had enough
      for _, slot, load in own:
        load.is_dropped = True
        kept.free.append(slot)
      for _, slot, load in shared:
        load.is_dropped = True
        self._staging.append(slot)
      for _, _, load in (*own, *shared):
        load.join(self._seconds)

  def _lend(self, expert: int, slot: Slot) -> Iterator[Loan]:
    loan = Loan(expert, slot.weights)
    yield loan
    slot.fence = loan.fence

  def close(self) -> None:
    self.loader.close()
