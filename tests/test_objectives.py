"""Span corruption against plain reference implementations, one document and one token at a time."""

import itertools

import numpy as np
import pytest

from t5x_cpm.data import objectives

SENTINELS = np.arange(900, 1000)
START, EOS = 1, 7


def plain_counts(length: int, density: float, mean: float) -> tuple[int, int]:
  """The rule of `random_spans_noise_mask` of T5 and of CPM-2's preprocessing, in Python numbers."""
  noise = min(max(round(length * density), 1), length - 1)
  return noise, max(round(noise / mean), 1)


def plain_cpm2(tokens, mask):
  """Encoder, decoder inputs and targets of one piece: what CPM-2's preprocessing and loader do to one document."""
  encoder, targets, sentinel, before = [], [START], -1, False
  for token, noise in zip(tokens, mask):
    if noise and not before:
      sentinel += 1
      encoder.append(SENTINELS[sentinel])
      targets.append(SENTINELS[sentinel])
    (targets if noise else encoder).append(token)
    before = noise
  targets.append(SENTINELS[sentinel + 1])
  return encoder, targets[:-1], targets[1:]


def plain_t5(tokens, mask):
  """`noise_span_to_unique_sentinel` and `nonnoise_span_to_unique_sentinel` of T5, then one end of sequence each."""

  def to_sentinels(replaced):
    out, number, before = [], -1, False
    for token, replace in zip(tokens, replaced):
      if replace and not before:
        number += 1
        out.append(SENTINELS[number])
      if not replace:
        out.append(token)
      before = replace
    return out + [EOS]

  targets = to_sentinels(~mask)
  return to_sentinels(mask), [START, *targets[:-1]], targets


def split(flat, lengths):
  return [part.tolist() for part in np.split(flat, np.cumsum(lengths)[:-1])]


def draw(rng, pieces, density, mean, longest=300, anywhere=False):
  lengths = rng.integers(2, longest, pieces)
  keys = rng.integers(0, 2**63, pieces).astype(np.uint64)
  noise, spans = objectives.noise_counts(lengths, density, mean)
  return keys, lengths, noise, objectives.draw_spans(keys, lengths, noise, spans, anywhere)


@pytest.mark.parametrize('density, mean', [(0.15, 3.0), (0.15, 10.0), (0.5, 3.0), (0.3, 1.0), (0.9, 2.0)])
def test_counts_follow_the_published_rule_at_every_length(density, mean):
  lengths = np.arange(2, 3000)
  noise, spans = objectives.noise_counts(lengths, density, mean)
  for length, n, k in zip(lengths.tolist(), noise, spans):
    expected_noise, expected_spans = plain_counts(length, density, mean)
    assert n == expected_noise
    assert k == min(expected_spans, n, length - n)  # the published rule asks for empty spans where these are fewer


@pytest.mark.parametrize('density, mean', [(0.15, 3.0), (0.15, 10.0), (0.5, 1.0), (0.85, 2.0)])
def test_masks_have_exact_counts_and_begin_without_noise(density, mean):
  seed = 11
  keys, lengths, noise, spans = draw(np.random.default_rng(seed), 400, density, mean)
  mask = objectives.noise_mask(lengths, spans)
  for piece, n, k in zip(split(mask, lengths), noise, spans.counts):
    runs = [(value, len(list(group))) for value, group in itertools.groupby(piece)]
    assert sum(length for value, length in runs if value) == n, f'seed {seed}'
    assert [value for value, _ in runs] == [False, True] * k, f'seed {seed}'


@pytest.mark.parametrize('density, mean', [(0.15, 3.0), (0.15, 10.0), (0.5, 1.0), (0.85, 2.0)])
def test_masks_anywhere_have_the_same_counts(density, mean):
  seed = 12
  keys, lengths, noise, spans = draw(np.random.default_rng(seed), 400, density, mean, anywhere=True)
  np.testing.assert_array_equal(spans.counts, objectives.noise_counts(lengths, density, mean)[1])
  for piece, n, k in zip(split(objectives.noise_mask(lengths, spans), lengths), noise, spans.counts):
    runs = [(value, len(list(group))) for value, group in itertools.groupby(piece)]
    assert sum(length for value, length in runs if value) == n, f'seed {seed}'
    assert sum(value for value, _ in runs) == k, f'seed {seed}'


def test_anywhere_means_that_all_masks_with_these_counts_are_equally_likely():
  """Every mask of up to 7 tokens, one by one. The sum over all (length, noise, spans) of squared deviations is chi-squared."""
  seed, each, deviation, freedom = 5, 200, 0.0, 0
  for length in range(2, 8):
    every = np.array(list(itertools.product([0, 1], repeat=length)), bool)
    spans = every[:, 0] + (every[:, 1:] & ~every[:, :-1]).sum(axis=1)
    for n, k in {(n, k) for n, k in zip(every.sum(axis=1).tolist(), spans.tolist()) if 0 < n < length and k <= length - n}:
      possible = every[(every.sum(axis=1) == n) & (spans == k)]
      pieces = each * len(possible)
      drawn = objectives.draw_spans(objectives.combine(seed, length, n, k) + np.arange(pieces, dtype=np.uint64),
                                    *(np.full(pieces, x) for x in (length, n, k)), anywhere=True)
      mask = objectives.noise_mask(np.full(pieces, length), drawn).reshape(pieces, length)
      found, counts = np.unique(mask, axis=0, return_counts=True)
      np.testing.assert_array_equal(found, possible, err_msg=f'seed {seed}: {length} tokens, {n} of noise in {k} spans')
      deviation, freedom = deviation + ((counts - each) ** 2 / each).sum(), freedom + len(possible) - 1
  assert abs(deviation - freedom) < 4 * (2 * freedom) ** 0.5, f'seed {seed}: {deviation:.0f} of {freedom}'


def test_every_token_of_a_short_text_is_predicted_sometimes():
  """By T5's rule only the end of a text of up to 30 tokens is."""
  seed = 3
  for length in range(2, 31):
    lengths = np.full(2000, length)
    counts = objectives.noise_counts(lengths, 0.15, 3.0)
    assert (counts[1] == 1).all()
    predicted = {anywhere: objectives.noise_mask(lengths, objectives.draw_spans(
        objectives.combine(seed, np.arange(2000)), lengths, *counts, anywhere)).reshape(2000, length).any(axis=0)
                 for anywhere in (False, True)}
    assert predicted[True].all() and predicted[False].sum() == counts[0][0], f'seed {seed}, {length} tokens'


def test_all_segmentations_are_equally_likely():
  """Every one of the C(4,1) * C(3,1) masks of 9 tokens with 4 noise tokens in 2 spans comes up as often as the others."""
  pieces = 24_000
  lengths = np.full(pieces, 9)
  noise, spans = np.full(pieces, 4), np.full(pieces, 2)
  drawn = objectives.draw_spans(objectives.combine(5, np.arange(pieces)), lengths, noise, spans)
  masks, counts = np.unique(objectives.noise_mask(lengths, drawn).reshape(-1, 9), axis=0, return_counts=True)
  assert len(masks) == 4 * 3
  chi_squared = ((counts - pieces / 12) ** 2 / (pieces / 12)).sum()
  assert chi_squared < 31.3, counts  # 11 degrees of freedom, p = 0.001


@pytest.mark.parametrize('t5, anywhere', [(False, False), (False, True), (True, False)])
def test_corrupt_equals_plain_loops(t5, anywhere):
  for seed in range(5):
    rng = np.random.default_rng(seed)
    density, mean = rng.choice([0.15, 0.3, 0.5]), rng.choice([3.0, 10.0])
    keys, lengths, noise, spans = draw(rng, 50, density, mean, anywhere=anywhere)
    tokens = rng.integers(20, 900, lengths.sum())
    result = objectives.corrupt(tokens, lengths, spans, noise, SENTINELS, start=START, eos=EOS if t5 else None)
    mask = objectives.noise_mask(lengths, spans)
    expected = [(plain_t5 if t5 else plain_cpm2)(piece, np.array(noisy))
                for piece, noisy in zip(split(tokens, lengths), split(mask, lengths))]
    got = zip(split(result.encoder_tokens, result.encoder_lengths), split(result.decoder_inputs, result.decoder_lengths),
              split(result.decoder_targets, result.decoder_lengths))
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
      assert [list(map(int, x)) for x in a] == [list(map(int, x)) for x in b], f'seed {seed}, piece {number}'
    sizes = objectives.corrupted_lengths(lengths, density, mean, t5)
    np.testing.assert_array_equal(sizes, (result.encoder_lengths, result.decoder_lengths))


def test_the_t5_paper_sentence():
  """Figure 2 of Raffel et al. 2020: Thank you <X> me to your party <Y> week."""
  words = ['Thank', 'you', 'for', 'inviting', 'me', 'to', 'your', 'party', 'last', 'week']
  ids = {word: 20 + i for i, word in enumerate(words)}
  spans = objectives.Spans(np.array([2]), np.array([2, 8]), np.array([2, 1]), np.array([0, 2]))
  X, Y = 999, 998
  result = objectives.corrupt(np.array([ids[w] for w in words]), np.array([10]), spans, np.array([3]),
                              np.arange(999, 899, -1), start=0, eos=1)
  assert result.encoder_tokens.tolist() == [20, 21, X, 24, 25, 26, 27, Y, 29, 1]
  # The paper closes with a third sentinel; the published code has only the end of sequence there.
  assert result.decoder_targets.tolist() == [X, 22, 23, Y, 28, 1]
  assert result.decoder_inputs.tolist() == [0, X, 22, 23, Y, 28]


@pytest.mark.parametrize('anywhere', [False, True])
def test_a_piece_is_corrupted_in_the_same_way_in_any_batch(monkeypatch, anywhere):
  seed = 3
  rng = np.random.default_rng(seed)
  keys, lengths, noise, spans = draw(rng, 300, 0.15, 3.0, anywhere=anywhere)
  whole = split(objectives.noise_mask(lengths, spans), lengths)
  chosen = rng.permutation(300)[:40]
  part = objectives.draw_spans(keys[chosen], lengths[chosen], noise[chosen], spans.counts[chosen], anywhere)
  assert split(objectives.noise_mask(lengths[chosen], part), lengths[chosen]) == [whole[i] for i in chosen], f'seed {seed}'
  monkeypatch.setattr(objectives, '_CHUNK', 7)
  chunked = objectives.draw_spans(keys, lengths, noise, spans.counts, anywhere)
  for a, b in zip(spans, chunked, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('t5', [False, True])
@pytest.mark.parametrize('encoder, decoder, density, mean', [
    (512, 128, 0.15, 3.0), (512, 128, 0.15, 10.0), (128, 128, 0.5, 3.0), (512, 60, 0.15, 3.0), (64, 32, 0.15, 3.0)])
def test_the_longest_piece_fits_and_the_next_does_not(t5, encoder, decoder, density, mean):
  longest = objectives.longest_piece(encoder, decoder, density, mean, 100, t5)
  sizes = np.array(objectives.corrupted_lengths(np.arange(2, longest + 2), density, mean, t5)).T
  assert (sizes[:-1] <= [encoder, decoder]).all()
  assert (sizes[-1] > [encoder, decoder]).any()


def test_the_longest_piece_at_the_published_lengths():
  assert objectives.longest_piece(512, 114, 0.15, 3.0, 100, t5=True) == 568  # `random_spans_helper` of T5 says 568 and 114
  assert objectives.longest_piece(512, 128, 0.15, 3.0, 190, t5=False) == 569
  assert objectives.longest_piece(512, 128, 0.15, 3.0, 10, t5=False) == 190  # 28 noise tokens in 9 spans, and the last sentinel
