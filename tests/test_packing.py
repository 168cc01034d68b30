"""Packing, permutations and indices: everything in exactly one place."""

import numpy as np
import pytest

from t5x_cpm.config import ConfigError
from t5x_cpm.data import index, objectives, packing, pairs, pieces


def test_pairs_with_more_sizes_than_classes_still_hold_every_pair(tmp_path):
  rng = np.random.default_rng(0)
  lengths = [rng.integers(1, 64, 3000), rng.integers(1, 64, 3000)]
  table = pairs.table(tmp_path, 'train', *lengths, room=(64, 64), most_classes=20)
  members = index.load(tmp_path, table['name'], 'members', np.int64, columns=4)[:]
  sizes = np.repeat(table['sizes'], table['counts'], axis=0)
  assert 20 < len(table['sizes']) <= 32 * 32 + 20  # not the about 2000 exact ones
  assert (np.minimum(members[:, 2:] + 1, 64) <= sizes).all() and (sizes <= 64).all()
  assert sorted(map(tuple, members[:, 2:].tolist())) == sorted(zip(lengths[0].tolist(), lengths[1].tolist()))


def rates_of(text: str) -> dict[str, float]:
  """The rates that an error names, as in 'a: 1, b: 3'."""
  return {name: float(rate) for name, rate in (part.split(': ') for part in text.rstrip('.').split(', '))}


def named(rates) -> dict[str, float]:
  return {f't{number}': rate for number, rate in enumerate(rates)}


@pytest.mark.parametrize('rates, expected', [
    ([7], [1]), ([1, 2], [1, 2]), ([0.5, 0.25, 0.25], [2, 1, 1]), ([10, 3], [10, 3]), ([1 / 3, 2 / 3], [1, 2]),
    ([1e6, 1], [1_000_000, 1]), ([1, 3, 1000], [1, 3, 1000]), ([0.3333, 0.6667], [3333, 6667]), ([1e308, 1e308], [1, 1]),
    ([2] * 1500, [1] * 1500)])
def test_rates_become_exact_counts(rates, expected):
  assert packing.rate_counts(named(rates)) == expected


@pytest.mark.parametrize('rates', [[0.0, 1.0], [1.0, -2.0], [float('nan'), 1.0], [float('inf'), 1.0]])
def test_a_rate_that_is_not_positive_is_refused(rates):
  with pytest.raises(ConfigError, match='the mixture gives task .* expected a positive number'):
    packing.rate_counts(named(rates))


def test_any_rates_are_kept_or_refused_with_the_nearest_that_are(monkeypatch):
  """Of each task the rows in batches of any size, read by any number of processes, are those of its rate."""
  seed = 17
  rng = np.random.default_rng(seed)
  monkeypatch.setattr(packing, 'LONGEST_PERIOD', 1 << 12)
  kinds = {'kept': 0, 'refused': 0, 'exact': 0}
  for number in range(120):
    rates = np.exp(rng.uniform(0, rng.uniform(1, 12), rng.integers(1, 6)))
    if number % 2:
      rates = np.rint(rates)
    what = f'seed {seed}, rates {rates.tolist()}'
    try:
      counts = packing.rate_counts(named(rates.tolist()))
    except ConfigError as error:
      nearest = rates_of(str(error).partition('nearest rates that work are ')[2])
      assert packing.rate_counts(nearest) == list(nearest.values()), what
      kinds['refused'] += 1
      continue
    share = rates / rates.sum()
    np.testing.assert_allclose(np.array(counts) / sum(counts), share, rtol=packing.MOST_OFF, err_msg=what)
    if number % 2 and rates.sum() <= packing.LONGEST_PERIOD:
      assert counts == (rates // np.gcd.reduce(rates.astype(int))).tolist(), what
      kinds['exact'] += 1
    kinds['kept'] += 1
    mixer, size, processes = packing.Mixer(counts, seed), int(rng.integers(1, 9)), int(rng.integers(1, 4))
    steps = -(-2 * len(mixer.order) // size)
    rows = np.arange(steps * size).reshape(steps, size)
    component = np.zeros_like(rows)
    for process in range(processes):
      component[:, process::processes] = mixer.locate(rows[:, process::processes])[0]
    of_each = np.cumsum(component.ravel()[:, None] == np.arange(len(rates)), axis=0)
    off = np.abs(of_each - np.arange(1, rows.size + 1)[:, None] * (mixer.counts / mixer.counts.sum()))
    assert (off[len(mixer.order) - 1::len(mixer.order)] < 1e-6).all(), what
    if len(mixer.order) > packing.SHORT_PERIOD:
      assert (off <= 1 + len(rates) * share * 1.01).all(), what
  assert min(kinds.values()) >= 5, kinds


@pytest.mark.parametrize('size', [1, 2, 3, 5, 16, 17, 100, 997, 4096])
def test_permutations_are_bijections_that_differ_by_key(size):
  images = [packing.permute(np.arange(size), size, objectives.combine(key)).tolist() for key in range(4)]
  assert all(sorted(image) == list(range(size)) for image in images)
  if size > 15:
    assert len({tuple(image) for image in images}) == 4
    assert sum(i == j for i, j in enumerate(images[0])) < 8


def test_permutation_is_about_uniform():
  seed = 5
  keys = objectives.combine(seed, np.arange(30_000))
  places = packing.permute(np.full(30_000, 3), 10, keys)
  counts = np.bincount(places, minlength=10)
  assert ((counts - 3000) ** 2 / 3000).sum() < 27.9, counts  # 9 degrees of freedom, p = 0.001


@pytest.mark.parametrize('low, high, expected', [(2, 570, 0.99), (2, 60, 0.97), (40, 200, 0.97)])
def test_packing_is_complete_and_tight(low, high, expected):
  seed = 6
  lengths = np.random.default_rng(seed).integers(low, high, 30_000)
  classes = np.arange(2, 570)
  sizes = np.stack(objectives.corrupted_lengths(classes, 0.15, 3.0, False), axis=1)
  counts = np.bincount(lengths - 2, minlength=len(classes))[:len(classes)]
  result = packing.pack(sizes, counts, (512, 128), 64)
  row, class_id, member = result.members(np.arange(result.rows))
  order = np.lexsort((member, class_id))  # each class has each of its members once
  np.testing.assert_array_equal(class_id[order], np.repeat(np.arange(len(classes)), counts))
  np.testing.assert_array_equal(member[order], objectives.ramp(counts))
  used = np.stack([np.bincount(row, sizes[class_id, side]) for side in (0, 1)])
  assert used[0].max() <= 512 and used[1].max() <= 128 and np.bincount(row).max() <= 64
  best = max(used[0].sum() / 512, used[1].sum() / 128)  # rows that no packing can do without
  assert best / result.rows > expected, f'seed {seed}'


def test_an_index_is_the_same_in_chunks_of_any_size(tmp_path, monkeypatch):
  seed = 3
  rng = np.random.default_rng(seed)
  lengths = rng.integers(0, 200, 300)
  for chunk in (1 << 20, 50, 7):
    monkeypatch.setattr(index, 'CHUNK', chunk)
    table = pieces.table(tmp_path / str(chunk), 'train', lengths, 30, with_end=True)
    members = index.load(tmp_path / str(chunk), table['name'], 'members', np.int64)
    if chunk == 1 << 20:
      expected, histogram = np.array(members), table['counts']
    np.testing.assert_array_equal(members, expected, err_msg=f'seed {seed}')
    assert table['counts'] == histogram == pieces.histogram(lengths, 30, True).tolist()
