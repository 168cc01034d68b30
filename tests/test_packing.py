"""Packing, permutations and indices: everything in exactly one place."""

import numpy as np
import pytest

from t5x_cpm.data import index, objectives, packing, pairs, pieces


def test_pairs_with_more_sizes_than_classes_still_hold_every_pair(tmp_path):
  rng = np.random.default_rng(0)
  lengths = [rng.integers(1, 64, 3000), rng.integers(1, 64, 3000)]
  table = pairs.table(tmp_path, 'train', *lengths, room=(64, 64), most_classes=20)
  members = index.load(tmp_path, table['name'], 'members', np.int64, columns=4)[:]
  sizes = np.repeat(table['sizes'], table['counts'], axis=0)
  assert 20 < len(table['sizes']) <= 32 * 32 + 20  # not the about 2000 exact ones
  assert (members[:, 2:] + 1 <= sizes).all() and (sizes <= 64).all()
  assert sorted(map(tuple, members[:, 2:].tolist())) == sorted(zip(*(np.minimum(x, 63).tolist() for x in lengths)))


def test_rates_become_exact_counts():
  assert packing.rate_counts([1, 2]) == [1, 2]
  assert packing.rate_counts([0.5, 0.25, 0.25]) == [2, 1, 1]
  assert packing.rate_counts([10, 3]) == [10, 3]
  counts = packing.rate_counts([1, np.pi, 1e-7])
  assert sum(counts) == 1000 and counts[2] == 1 and counts[1] / counts[0] == pytest.approx(np.pi, rel=0.01)


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
