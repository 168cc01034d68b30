"""Balanced assignment against the exact optimum of scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from t5x_cpm.models.assignment import balanced


def scores(T, E, seed, common=0.0):
  """Of random features at random centroids; `common` is the size of what all features share, which makes experts unequal."""
  print(f'seed {seed}')
  rng = np.random.default_rng(seed)
  x_TD = rng.standard_normal((T, 64)) + common * rng.standard_normal(64)
  return (x_TD @ rng.standard_normal((64, E)) / 8).astype(np.float32)


def optimum(scores_TE):
  T, E = scores_TE.shape
  slots = np.repeat(scores_TE, -(-T // E), axis=1)
  rows, columns = linear_sum_assignment(-slots)
  return slots[rows, columns].sum()


def repeated(T, E, seed, kinds, noise):
  """Scores of tokens that repeat as words do: of so many kinds, by Zipf's law, each with some noise of its own."""
  print(f'seed {seed}')
  rng = np.random.default_rng(seed)
  often = 1 / np.arange(1, kinds + 1)
  x_TD = rng.standard_normal((kinds, 64))[rng.choice(kinds, T, p=often / often.sum())] + noise * rng.standard_normal((T, 64))
  return (x_TD @ rng.standard_normal((64, E)) / 8).astype(np.float32)


assign = jax.jit(balanced)


def quality(scores_TE):
  """The share of what scipy reaches, counted from what an assignment at random has: a constant changes nothing."""
  T, E = scores_TE.shape
  expert_T = assign(scores_TE, jnp.ones(T, bool))
  assert (np.bincount(expert_T, minlength=E) == T // E).all()
  got, best, random = scores_TE[np.arange(T), expert_T].sum(), optimum(scores_TE), scores_TE.mean() * T
  print(f'{(got - random) / (best - random):.4f} of the optimum')
  return (got - random) / (best - random)


@pytest.mark.parametrize('T, E, seeds', [
    (512, 8, range(3)), (2048, 32, range(1)),
    pytest.param(2048, 32, range(1, 3), marks=pytest.mark.slow)], ids=str)  # scipy takes seconds for each of the large ones
@pytest.mark.parametrize('common', [0.0, 0.7, 4.0])
def test_near_the_optimum(T, E, seeds, common):
  for seed in seeds:
    assert quality(scores(T, E, seed, common)) >= 0.995


@pytest.mark.parametrize('seeds', [range(1), pytest.param(range(1, 8), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize('noise', [0.0, 1e-4, 1e-2, 0.1, 1.0])
def test_near_the_optimum_where_tokens_repeat(noise, seeds):
  for seed in seeds:
    for kinds in (2, 16, 64):
      assert quality(repeated(512, 32, seed, kinds, noise)) >= 0.995, kinds


@pytest.mark.parametrize('T, E, valid', [(500, 8, 500), (37, 8, 37), (64, 8, 41), (64, 8, 3), (16, 32, 16), (64, 8, 0)])
def test_floor_or_ceiling_and_nothing_for_padding(T, E, valid):
  mask_T = np.random.default_rng(1).permutation(T) < valid
  expert_T = np.asarray(balanced(jnp.asarray(scores(T, E, 0)), jnp.asarray(mask_T)))
  assert (expert_T[~mask_T] == E).all()
  counts = np.bincount(expert_T[mask_T], minlength=E)
  assert counts.sum() == valid and len(counts) == E
  assert counts.max() <= -(-valid // E) and counts.min() >= valid // E


def test_hard_scores():
  """All equal, not finite, and far apart."""
  some_infinite, far_apart = np.where(np.eye(32, 4), np.inf, 1.0), np.ones((32, 4)) * [1e6, 0, 0, 0]
  for values in (np.zeros((32, 4)), np.full((32, 4), np.nan), some_infinite, far_apart):
    expert_T = balanced(jnp.asarray(values, jnp.float32), jnp.ones(32, bool))
    assert (np.bincount(expert_T, minlength=4) == 8).all()
