"""Products in the form that the CPU runs fastest: the numbers and gradients of the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_cpm import backend
from t5x_cpm.models.products import dense, for_rows


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
def test_dense_and_for_rows(platform):
  print('seed 5')
  rng = np.random.default_rng(5)
  x, kernel, bias, a, b = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in (
      (3, 5, 7), (7, 4), (2, 5, 3), (3, 5, 4), (6, 2, 5, 3)))

  def ours(x, kernel, bias):
    return (a * dense(x, kernel)).sum() + (b * for_rows(bias, 6)).sum()

  def plain(x, kernel, bias):
    return (a * (x @ kernel)).sum() + (b * bias).sum()

  with backend.compiling_for(platform):
    got = jax.value_and_grad(ours, (0, 1, 2))(x, kernel, bias)
  want = jax.value_and_grad(plain, (0, 1, 2))(x, kernel, bias)
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(g, w, rtol=0, atol=1e-6 * float(jnp.abs(w).max()))
