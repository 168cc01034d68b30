"""Which pieces share a row, and in which order rows come, both without a list of rows.

Packing works on the histogram of piece sizes alone (Krell et al. 2021, "Efficient sequence packing without cross-
contamination"): it yields patterns such as "one piece of 300 and two of 106" with the number of rows that use each. A row is
then found by its number: its pattern by a binary search, its pieces by counting. Orders are keyed bijections that are
computed for one index at a time. So any row of any epoch is reached at once, whatever the size of the data.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from t5x_cpm.config import ConfigError
from t5x_cpm.data import objectives

SHORT_PERIOD = 1000  # rows of the longest period of a mixture whose order is wholly random
LONGEST_PERIOD = 1 << 20  # rows of the longest period: a task has at least one of them
MOST_OFF = 1e-3  # the greatest relative error of a rate
_ROUNDS = 4


def _round(key, round_number, value):
  return (objectives.combine(key ^ np.uint64(round_number), value) >> np.uint64(2)).astype(np.int64)


def permute(index: np.ndarray, size: np.ndarray | int, key: np.ndarray) -> np.ndarray:
  """Where `index` goes in the permutation of 0..size-1 that `key` names.

  A Feistel network on the smallest rectangle that holds `size` numbers, walked until it lands below `size` (Black and
  Rogaway 2002, "Ciphers with arbitrary finite domains").

  Args:
    index: an int64 array with 0 <= index < size.
    size: a number, or an array of the same shape, at least 1.
    key: uint64, one or an array of the same shape.
  """
  index, size, key = np.broadcast_arrays(np.asarray(index, np.int64), size, key)
  out = index.astype(np.int64)
  size = size.astype(np.int64)
  height = np.sqrt(size.astype(np.float64)).astype(np.int64) + 1
  width = -(-size // height)
  todo = np.arange(out.size)
  while len(todo):
    h, w, k = height[todo], width[todo], key[todo]
    x, y = out[todo] // w, out[todo] % w
    for round_number in range(_ROUNDS):
      x = (x + _round(k, 2 * round_number, y)) % h
      y = (y + _round(k, 2 * round_number + 1, x)) % w
    value = x * w + y
    out[todo] = value
    todo = todo[value >= size[todo]]
  return out


class Packing(NamedTuple):
  """Rows described by patterns. Q patterns, G groups; a group is all pieces of one class in one pattern."""

  rows: int
  first_row: np.ndarray  # [Q + 1] the rows of pattern q are first_row[q] .. first_row[q + 1] - 1
  first_group: np.ndarray  # [Q + 1] and likewise its groups
  group_class: np.ndarray  # [G] the class of the pieces
  group_copies: np.ndarray  # [G] how many pieces of the class a row has
  group_member: np.ndarray  # [G] how many members of the class earlier groups use

  def members(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Finds the pieces of some rows: for each the position in `rows`, its class, and which member of the class it is."""
    pattern = np.searchsorted(self.first_row, rows, side='right') - 1
    groups = self.first_group[pattern + 1] - self.first_group[pattern]
    group = np.repeat(self.first_group[pattern], groups) + objectives.ramp(groups)
    number = np.repeat(rows - self.first_row[pattern], groups)  # of the row among those of its pattern
    copies = self.group_copies[group]
    member = self.group_member[group] + number * copies
    return (np.repeat(np.repeat(np.arange(len(rows)), groups), copies), np.repeat(self.group_class[group], copies),
            np.repeat(member, copies) + objectives.ramp(copies))


def _finish(lines: np.ndarray, nodes: list[tuple[int, int, int]], classes: int) -> Packing:
  groups: list[tuple[int, int]] = []
  first_group = [0]
  member: list[int] = []
  used = [0] * classes
  for rows, node in lines[:, 3:].tolist():
    while node >= 0:
      node, class_id, copies = nodes[node]
      groups.append((class_id, copies))
      member.append(used[class_id])
      used[class_id] += rows * copies
    first_group.append(len(groups))
  table = np.array(groups, np.int64).reshape(-1, 2)
  return Packing(int(lines[:, 3].sum()), np.concatenate([[0], np.cumsum(lines[:, 3])]), np.array(first_group),
                 table[:, 0], table[:, 1], np.array(member, np.int64))


def pack(sizes: np.ndarray, counts: np.ndarray, room: tuple[int, int], most: int) -> Packing:
  """Packs a histogram of two-sided pieces into rows, largest first, each into the fullest rows that still hold it.

  Args:
    sizes: [C, 2] encoder and decoder slots of a piece of each class, none above `room`.
    counts: [C] how many pieces each class has.
    room: encoder and decoder slots of a row.
    most: how many pieces a row may have.

  Returns:
    The packing; every piece is in exactly one row.
  """
  sizes = np.asarray(sizes, np.int64).reshape(-1, 2)
  weight = np.array([room[1], room[0]])  # makes both sides comparable without fractions
  # One line for each set of equal rows: [encoder, decoder, pieces] left, number of rows, last node of their pattern.
  lines = np.zeros((0, 5), np.int64)
  nodes: list[tuple[int, int, int]] = []  # (parent, class, copies)

  def put(which: np.ndarray, class_id: int, copies: np.ndarray, rows: np.ndarray, need: np.ndarray) -> np.ndarray:
    changed = which.copy()
    changed[:, :3] -= copies[:, None] * need
    changed[:, 3] = rows
    for line, number in zip(changed, copies):
      nodes.append((int(line[4]), class_id, int(number)))
      line[4] = len(nodes) - 1
    return changed

  for class_id in np.argsort(-(sizes * weight).max(axis=1), kind='stable'):
    left = int(counts[class_id])
    if not left:
      continue
    need = np.array([*sizes[class_id], 1], np.int64)
    fitting = np.flatnonzero((lines[:, :3] >= need).all(axis=1))
    fitting = fitting[np.argsort((lines[fitting, :2] * weight).max(axis=1), kind='stable')]
    # The rows of the tightest lines take as many copies as they hold; new rows, in a line without end, take the rest.
    old = np.concatenate([lines[fitting], [[*room, most, np.iinfo(np.int64).max // most, -1]]])
    copies = (old[:, :3] // need).min(axis=1)
    before = np.minimum(objectives.exclusive_cumsum(np.minimum(copies * old[:, 3], left)), left)
    taken = np.minimum(copies * old[:, 3], left - before)
    used = taken > 0
    old, copies, taken, fitting = old[used], copies[used], taken[used], fitting[used[:-1]]
    rows, rest = taken // copies, taken % copies
    result = [lines[np.setdiff1d(np.arange(len(lines)), fitting)]]
    result.append(put(old[rows > 0], class_id, copies[rows > 0], rows[rows > 0], need))
    result.append(put(old[rest > 0], class_id, rest[rest > 0], np.ones((rest > 0).sum(), np.int64), need))
    untouched = old[old[:, 4] >= 0]
    untouched[:, 3] -= (rows + (rest > 0))[old[:, 4] >= 0]
    result.append(untouched[untouched[:, 3] > 0])
    lines = np.concatenate(result)
  return _finish(lines, nodes, len(sizes))


def _ratio(rates: Mapping[str, float]) -> str:
  return ', '.join(f'{name}: {rate:.15g}' for name, rate in rates.items())


def _nearest_counts(shares: np.ndarray) -> tuple[list[int], float]:
  """The whole numbers of sum up to LONGEST_PERIOD that are nearest to some shares, and how far the worst of them is off.

  Sums are compared by the greatest relative error of a share, and the least of those that are equally good is taken.
  """
  periods = np.arange(1, LONGEST_PERIOD + 1)
  total, worst = np.zeros(len(periods), np.int64), np.zeros(len(periods))
  for share, tasks in zip(*np.unique(shares, return_counts=True)):
    exact = periods * share
    count = np.rint(exact)
    total += count.astype(np.int64) * tasks
    worst = np.maximum(worst, np.abs(count - exact) / exact)
  worst[total != periods] = np.inf
  best = np.argmax(worst <= max(worst.min(), 2e-9))  # multiples of an exact period differ by rounding alone
  if worst[best] <= MOST_OFF:
    return [int(n) for n in np.rint(periods[best] * shares)], float(worst[best])
  counts = np.maximum(np.rint(shares * LONGEST_PERIOD).astype(np.int64), 1)
  counts[np.argmax(counts)] -= counts.sum() - LONGEST_PERIOD
  return (counts // np.gcd.reduce(counts)).tolist(), float(worst[best])


def rate_counts(rates: Mapping[str, float]) -> list[int]:
  """Whole numbers in the proportion of the rates of a mixture: the rows that each task has in a period.

  Their sum is the least that is exact, or else the nearest up to LONGEST_PERIOD.

  Args:
    rates: task -> positive number; any sum.

  Raises:
    ConfigError: a rate is not positive, or the nearest proportion is off by more than MOST_OFF for some task.
  """
  for name, rate in rates.items():
    if not 0 < rate < np.inf:
      raise ConfigError(f'the mixture gives task {name!r} the rate {rate}: expected a positive number; leave out a task that '
                        'is not wanted.')
  shares = np.array(list(rates.values()), np.float64) / max(rates.values())
  shares /= shares.sum()
  periods = np.arange(len(shares), SHORT_PERIOD + 1)
  error = np.abs(periods[:, None] * shares - np.rint(periods[:, None] * shares)).max(axis=1)
  exact = np.flatnonzero((error < 1e-9) & (periods * np.min(shares) > 0.5))
  if len(exact):
    return [int(n) for n in np.rint(periods[exact[0]] * shares)]
  counts, off = _nearest_counts(np.maximum(shares, 1e-300))
  if off > MOST_OFF:
    raise ConfigError(f'the rates {_ratio(rates)} cannot be kept: every task must have a row among {LONGEST_PERIOD:,}. The '
                      f'nearest rates that work are {_ratio(dict(zip(rates, counts)))}.')
  return counts


class Mixer:
  """Interleaves the rows of components in fixed proportions.

  Global row g is row `row` of the stream of component `component`, in closed form: every period of `len(order)` rows holds
  the same number of rows of each component, in one order drawn from the seed. A long period is even within: of each of K
  components its first n rows hold n times the share, plus or minus 1 + K times the share.
  """

  def __init__(self, counts: list[int], seed: int):
    period = sum(counts)
    repeats = -(-256 // period)  # a longer period than needed, so that no short pattern repeats
    self.counts = np.array(counts, np.int64) * repeats
    names = np.repeat(np.arange(len(counts)), self.counts)
    key = objectives.combine(seed, 0x6D6978)
    if period <= SHORT_PERIOD:
      self.order = names[permute(np.arange(len(names)), len(names), key)]
      self.rank = np.zeros(len(names), np.int64)
      for component, count in enumerate(self.counts):
        self.rank[self.order == component] = np.arange(count)
    else:  # row r of the c rows of a component has its place at random between r / c and (r + 1) / c of the period
      rank = objectives.ramp(self.counts)
      jitter = (objectives.combine(key, np.arange(len(names))) >> np.uint64(11)) * 2.0 ** -53
      order = np.argsort((rank + jitter) / self.counts[names], kind='stable')
      self.order, self.rank = names[order], rank[order]

  def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The component of each global row, and which row of that component's stream it is."""
    period, position = np.divmod(rows, len(self.order))
    component = self.order[position]
    return component, period * self.counts[component] + self.rank[position]
