"""Products whose gradients are written for the CPU: the same numbers as JAX's own gradients of the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_cpm import backend
from t5x_cpm.models.products import dense, for_rows, scores, weighted_mean


def normal(rng, *shapes, dtype=np.float32):
  return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def assert_same_with_gradients(ours, plain, args, platform, tolerance):
  with backend.compiling_for(platform):
    got = jax.value_and_grad(ours, tuple(range(len(args))))(*args)
  want = jax.value_and_grad(plain, tuple(range(len(args))))(*args)
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert g.dtype == w.dtype
    scale = float(jnp.abs(w).max())
    np.testing.assert_allclose(np.asarray(g, np.float64), np.asarray(w, np.float64), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
def test_dense_and_for_rows(platform):
  print('seed 5')
  x, kernel, bias, a, b = normal(np.random.default_rng(5), (3, 5, 7), (7, 4), (2, 5, 3), (3, 5, 4), (6, 2, 5, 3))
  assert_same_with_gradients(
      lambda x, kernel, bias: (a * dense(x, kernel)).sum() + (b * for_rows(bias, 6)).sum(),
      lambda x, kernel, bias: (a * (x @ kernel)).sum() + (b * bias).sum(), (x, kernel, bias), platform, 1e-6)


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
@pytest.mark.parametrize('dtype, tolerance', [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize('B, H, T, S, K', [(2, 3, 5, 7, 4), (1, 2, 9, 9, 2), (3, 1, 1, 4, 1)])
@pytest.mark.parametrize('rate', [0.0, 0.3])
def test_attention(platform, dtype, tolerance, B, H, T, S, K, rate):
  """A softmax over keys, some of which are masked, with dropout after it."""
  print('seed 6')
  rng = np.random.default_rng(6)
  q, k, v, ct = normal(rng, (B, T, H, K), (B, H, S, K), (B, H, S, K), (B, H, T, K), dtype=dtype)
  mask = jnp.where(jnp.arange(S) < S - 1, 0.0, -1e9)
  keep = jnp.asarray(rng.random((B, H, T, S)) >= rate) / (1 - rate)

  def ours(q, k, v):
    logits = scores(q, k, jnp.float32) + mask
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    return (ct * weighted_mean(weights, (weights * keep).astype(dtype), v)).sum()

  def plain(q, k, v):
    wide = jnp.einsum('bthk,bhsk->bhts', *(x.astype(jnp.float32) for x in (q, k)))
    return (ct * jnp.einsum('bhts,bhsk->bhtk', jax.nn.softmax(wide + mask) * keep, v.astype(jnp.float32))).sum()

  assert_same_with_gradients(ours, plain, (q, k, v), platform, tolerance)
