"""Stores: where the experts of a bundle are, and how each comes to where it is computed.

`Mapped` has them in the files of the bundle, mapped into memory: the system's cache holds what was used lately, and a CPU
computes with them where they lie. It is for a bundle that fits into memory. `Slots` has memory of a fixed size, and reads past
the system's cache. Layers of the decoder keep experts in slots of their own, since tokens come back to them; those of the
encoder, which are all needed once for a batch, pass through a few slots that layers share. The order of layers is cyclic, so
that one cache for all of them would have thrown out each expert before its layer comes again.
"""

import collections
import contextlib
import dataclasses
import mmap
import time
import weakref
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax

from t5x_cpm.chips import GiB
from t5x_cpm.infmoe.bundle import Bundle, Place
from t5x_cpm.infmoe.loader import DEMAND, LIKELY, Load, Loader
from t5x_cpm.infmoe.memory import Expert, Slot, slots

Wishes = Sequence[tuple[Place, Sequence[int]]]
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

  def take(self, place: Place, wanted: Sequence[int]) -> Generator[Loan, None, None]:
    """Experts of a layer, each once, in the order in which they are there. It is to be closed.

    Raises:
      ConfigError: one cannot be read, or is not what was written.
    """
    ...

  def told(self) -> str:
    """What was done so far, in words; '' where there is nothing to say."""
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

  def _hint(self, place: Place, expert: int) -> None:
    """Has the system begin to read an expert that was not used yet."""
    if (place, expert) not in self._got:
      size, _ = self.bundle.block(place)
      with contextlib.suppress(OSError, AttributeError):
        self.bundle.maps[place.file].madvise(mmap.MADV_WILLNEED, self.bundle.begin(place, expert), size)

  def take(self, place: Place, wanted: Sequence[int]) -> Generator[Loan, None, None]:
    for expert in wanted:
      self._hint(place, expert)
    for expert in wanted:
      yield Loan(expert, self._get(place, expert))

  def told(self) -> str:
    return ''

  def close(self) -> None:
    self._got = {}


class _Kept:
  """The experts that a layer keeps, and what each is worth.

  Attributes:
    capacity: how many it may keep.
    free: slots with nothing in them.
    slots: by expert, those that hold one.
  """

  def __init__(self, own: list[Slot]):
    self.capacity, self.free = len(own), own
    self.slots: dict[int, Slot] = {}
    self._uses: dict[int, tuple[float, int]] = {}  # by expert: uses, decayed, and when that was
    self._now = 0

  def used(self, experts: Sequence[int]) -> None:
    """Notes that a batch of tokens goes to these."""
    self._now += 1
    for expert in experts:
      self._uses[expert] = self.worth(expert) + 1, self._now

  def worth(self, expert: int) -> float:
    """How often an expert was used, lately more than long ago."""
    uses, when = self._uses.get(expert, (0.0, self._now))
    return uses * DECAY**(self._now - when)

  def room(self, wanted: Sequence[int]) -> Slot | None:
    """A slot for another expert, of which the least worth is thrown out; None where all are wanted."""
    if self.free:
      return self.free.pop()
    others = [expert for expert in self.slots if expert not in wanted]
    return self.slots.pop(min(others, key=self.worth)) if others else None


class _Coming(NamedTuple):
  """An expert on its way into a slot; `own`: of its layer, rather than one that all share."""

  expert: int
  slot: Slot
  load: Load
  own: bool


@dataclasses.dataclass
class Counts:
  """What a store has done so far.

  Attributes:
    hits, misses: experts of layers that keep some which were there, and which were not.
    foreseen, in_vain: experts that were read before it was known that they are needed: those that then were, and the others.
    waited: seconds for which the caller waited for experts.
  """

  hits: int = 0
  misses: int = 0
  foreseen: int = 0
  in_vain: int = 0
  waited: float = 0.0


class Slots:
  """Experts in memory of a fixed size. See `Store`.

  Attributes:
    bundle: whose experts.
    counts: what was done so far.
    loader: what reads them.
  """

  def __init__(self, bundle: Bundle, device: Any, staging: int, kept: Mapping[Place, int], threads: int, seconds: float):
    """Args:
      bundle: what is read.
      device: where experts are computed.
      staging: how many slots all layers share, two or more.
      kept: how many each layer has of its own; none where it is not in it.
      threads: how many read.
      seconds: after which a read is given up.
    """
    self.bundle, self._seconds, self.counts, self.loader = bundle, seconds, Counts(), Loader(threads)
    self._end = weakref.finalize(self, self.loader.close)  # also where nobody closes it
    size, parts = bundle.block(bundle.places[0])
    made = slots(staging + sum(kept.values()), size, parts, device)
    self._staging = collections.deque(made[:staging])
    self._kept, made = {}, made[staging:]
    for place in bundle.places:
      count = kept.get(place, 0)
      self._kept[place], made = _Kept(made[:count]), made[count:]
    self._ahead: dict[Place, list[_Coming]] = {place: [] for place in bundle.places}
    self._wishes: list[tuple[Place, int]] = []

  def _load(self, place: Place, expert: int, slot: Slot, own: bool, priority: int = DEMAND) -> _Coming:
    def check() -> None:
      for matrix, parts in self.bundle.names(place, expert).items():
        for part, name in parts.items():
          self.bundle.check(place.file, name, slot.views[matrix][part])

    load = Load(f'expert {expert} of {place.stack} layer {place.row}', self.bundle.folder / place.file,
                self.bundle.begin(place, expert), slot.memory, slot.wait, check)
    self.loader.submit(load, priority)
    return _Coming(expert, slot, load, own)

  def _give_up(self, place: Place, coming: _Coming) -> None:
    """Makes a slot free again whose expert nobody needs; what is there already stays, where it may."""
    if coming.own and coming.load.is_done and not coming.load.error:
      self._kept[place].slots[coming.expert] = coming.slot
      return
    self.loader.drop(coming.load)
    coming.slot.dropped = coming.load
    (self._kept[place].free if coming.own else self._staging).append(coming.slot)

  def popular(self, place: Place) -> list[int]:
    """The experts of a layer, those first that were used most."""
    experts = range(self.bundle.config.model.moe.num_experts)
    return sorted(experts, key=lambda expert: -self._kept[place].worth(expert))

  def room(self) -> Wishes:
    """Experts with which what is still free in the layers of the decoder may be filled."""
    return [(place, [expert for expert in self.popular(place) if expert not in kept.slots][:len(kept.free)])
            for place, kept in self._kept.items() if place.stack == 'decoder']

  def expect(self, wishes: Wishes) -> None:
    """Says which experts will probably be taken soon, by layer, the most probable ones first."""
    self._wishes = [(place, expert) for place, experts in reversed(wishes) for expert in reversed(experts)]

  def _grant(self) -> None:
    """Begins to read what is expected, as far as there is room: by what is needed it is not held up."""
    while self._wishes:
      place, expert = self._wishes[-1]
      kept, coming = self._kept[place], [one.expert for one in self._ahead[place]]
      if expert not in kept.slots and expert not in coming:
        wanted = [*coming, *(other for where, other in self._wishes if where == place)]
        slot = kept.room(wanted) if kept.capacity else self._staging.popleft() if self._staging else None
        if slot is None:
          return
        self._ahead[place].append(self._load(place, expert, slot, kept.capacity > 0, LIKELY))
      self._wishes.pop()

  def _foreseen(self, place: Place, wanted: Sequence[int]) -> list[_Coming]:
    """What was expected and is wanted; the rest is given up, and so is what another layer has in the slots of all."""
    self._wishes = [wish for wish in self._wishes if wish[0] != place]
    for other, ahead in self._ahead.items():
      if other != place:
        for one in [one for one in ahead if not one.own]:
          ahead.remove(one)
          self.counts.in_vain += 1
          self._give_up(other, one)
    found, self._ahead[place] = self._ahead[place], []
    for one in found:
      if one.expert in wanted:
        self.loader.hurry(one.load)
      else:
        self._give_up(place, one)
    useful = [one for one in found if one.expert in wanted]
    self.counts.foreseen += len(useful)
    self.counts.in_vain += len(found) - len(useful)
    return useful

  def take(self, place: Place, wanted: Sequence[int]) -> Generator[Loan, None, None]:
    kept = self._kept[place]
    kept.used(wanted)
    coming = collections.deque(self._foreseen(place, wanted))
    there = {one.expert for one in coming}
    hits = [expert for expert in wanted if expert in kept.slots]
    misses = collections.deque(expert for expert in wanted if expert not in kept.slots and expert not in there)
    if kept.capacity:
      self.counts.hits += len(hits)
      self.counts.misses += len(misses)

    def begin() -> None:
      while misses:
        own = kept.room(wanted)
        slot = own if own is not None else self._staging.popleft() if self._staging else None
        if slot is None:
          return
        coming.append(self._load(place, misses.popleft(), slot, own is not None))
      self._grant()

    try:
      begin()
      for expert in hits:
        yield from self._lend(expert, kept.slots[expert])
      while coming:
        one = coming[0]
        before = time.monotonic()
        one.load.wait(self._seconds)
        self.counts.waited += time.monotonic() - before
        coming.popleft()
        if one.own:
          kept.slots[one.expert] = one.slot
          yield from self._lend(one.expert, one.slot)
        else:
          yield from self._lend(one.expert, one.slot)
          self._staging.append(one.slot)
          begin()
      assert not misses, f'{place}: no slot for {list(misses)}'
    finally:  # of an error, or where the caller has had enough
      for one in coming:
        self._give_up(place, one)

  def _lend(self, expert: int, slot: Slot) -> Generator[Loan, None, None]:
    loan = Loan(expert, slot.weights)
    yield loan
    slot.fence = loan.fence

  def told(self) -> str:
    counts = self.counts
    asked = counts.hits + counts.misses
    kept = f'{counts.hits / asked:.0%} of experts kept, ' if asked else ''
    return f'{kept}{self.loader.bytes / GiB:.3g} GiB read, {counts.waited:.3g} s waited for'

  def close(self) -> None:
    self._end()
