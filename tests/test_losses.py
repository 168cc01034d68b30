"""Cross entropy, z-loss and accuracy, against plain formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_cpm.training import losses, stability

LOSS_AND_GRADIENT = jax.jit(jax.value_and_grad(losses.cross_entropy, has_aux=True), static_argnums=3)


def example(seed=0, shape=(3, 5, 17), scale=2.0):
  rng = np.random.default_rng(seed)
  B, T, V = shape
  weights = (rng.random((B, T)) < 0.7) * rng.choice([0.5, 1.0], (B, T))
  return scale * rng.standard_normal(shape), rng.integers(0, V, (B, T)), weights


def reference(logits, targets, weights, z_loss):
  """Loss, correct targets and the gradient of the loss, by the definition, in float64."""
  log_z = np.log(np.exp(logits).sum(-1))
  onehot = np.eye(logits.shape[-1])[targets]
  nll = log_z - (logits * onehot).sum(-1)
  softmax = np.exp(logits - log_z[..., None])
  gradient = weights[..., None] * (softmax * (1 + 2 * z_loss * log_z[..., None]) - onehot)
  return (weights * nll).sum(), (weights * z_loss * log_z**2).sum(), (weights * (logits.argmax(-1) == targets)).sum(), gradient


@pytest.mark.parametrize('z_loss', [0.0, 1e-2])
def test_values_and_gradient(z_loss):
  logits, targets, weights = example()
  nll, extra, correct, gradient = reference(logits, targets, weights, z_loss)
  (loss, pairs), got = LOSS_AND_GRADIENT(jnp.float32(logits), jnp.asarray(targets), jnp.float32(weights), z_loss)
  np.testing.assert_allclose(loss, nll + extra, rtol=1e-5)
  np.testing.assert_allclose(got, gradient, atol=1e-5)
  np.testing.assert_allclose(pairs['loss'], (nll, weights.sum()), rtol=1e-5)
  np.testing.assert_allclose(pairs['accuracy'], (correct, weights.sum()), rtol=1e-5)
  assert ('z_loss' in pairs) == bool(z_loss)
  if z_loss:
    np.testing.assert_allclose(pairs['z_loss'], (extra, weights.sum()), rtol=1e-5)


def test_padding_contributes_exactly_nothing():
  logits, targets, weights = example(1)
  weights[0, :2] = 0.0
  clean, broken = np.float32(logits), np.float32(logits)
  broken[weights == 0] = np.inf
  broken[0, 0] = np.nan
  broken[0, 1] = -np.inf
  (a, pairs_a), gradient_a = LOSS_AND_GRADIENT(clean, targets, weights, 1e-2)
  (b, pairs_b), gradient_b = LOSS_AND_GRADIENT(broken, targets, weights, 1e-2)
  assert a == b
  assert jax.tree.map(float, pairs_a) == jax.tree.map(float, pairs_b)
  np.testing.assert_array_equal(gradient_a, gradient_b)
  assert (np.asarray(gradient_b)[weights == 0] == 0).all()


def test_a_batch_without_targets_has_loss_zero():
  logits, targets, weights = example(2)
  (loss, pairs), gradient = LOSS_AND_GRADIENT(logits, targets, 0 * weights)
  assert loss == 0 and pairs['accuracy'] == (0, 0) and not np.asarray(gradient).any()


def test_large_logits_neither_overflow_nor_lose_the_target():
  logits = jnp.float32([[[1e4, -1e4, 0.0], [3e38, 0.0, -3e38]]])
  (loss, _), gradient = LOSS_AND_GRADIENT(logits, jnp.int32([[0, 0]]), jnp.ones((1, 2)))
  assert loss == 0 and np.isfinite(gradient).all()


def test_dtypes():
  logits, targets, weights = example(3)
  nll, _, _, gradient = reference(np.float64(jnp.bfloat16(logits)), targets, weights, 0.0)
  (loss, _), got = LOSS_AND_GRADIENT(jnp.bfloat16(logits), targets, jnp.float32(weights))
  assert loss.dtype == jnp.float32 and got.dtype == jnp.bfloat16
  np.testing.assert_allclose(loss, nll, rtol=1e-5)  # summed in float32 although the logits are bfloat16
  np.testing.assert_allclose(np.float64(got), gradient, atol=4e-3)
  nll, _, _, gradient = reference(logits, targets, weights, 0.0)
  with jax.enable_x64(True):
    (loss, _), got = LOSS_AND_GRADIENT(jnp.float64(logits), targets, jnp.float64(weights))
    np.testing.assert_allclose(loss, nll, rtol=1e-13)
    np.testing.assert_allclose(got, gradient, atol=1e-13)


def test_microbatches_add_up():
  logits, targets, weights = example(4, (4, 6, 11))
  function = jax.jit(losses.cross_entropy)
  whole, pairs = function(logits, targets, weights)
  parts = [function(logits[i:i + 1], targets[i:i + 1], weights[i:i + 1]) for i in range(4)]
  np.testing.assert_allclose(sum(loss for loss, _ in parts), whole, rtol=1e-5)
  np.testing.assert_allclose(sum(p['accuracy'][0] for _, p in parts), pairs['accuracy'][0], rtol=1e-6)


def test_no_second_array_of_the_size_of_the_logits():
  """The gradient is the only array [B, T, V] beside the logits."""
  shape = jax.ShapeDtypeStruct((4, 32, 8192), jnp.float32)
  targets, weights = jax.ShapeDtypeStruct(shape.shape[:2], jnp.int32), jax.ShapeDtypeStruct(shape.shape[:2], jnp.float32)
  compiled = jax.jit(jax.value_and_grad(losses.cross_entropy, has_aux=True)).lower(shape, targets, weights).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * 4 * shape.size


def test_first_bad_tensor_names_it():
  tree = {'a': jnp.ones(3), 'ids': jnp.arange(3), 'z': jnp.ones(()), 'encoder': {'layers': {'query': jnp.ones((4, 2, 2))}}}
  axes = {'a': ('embed',), 'ids': ('length',), 'z': (), 'encoder': {'layers': {'query': ('layers', 'embed', 'heads')}}}
  assert stability.first_bad_tensor(tree, axes) is None
  tree['z'] = jnp.float32(np.nan)
  assert stability.first_bad_tensor(tree, axes) == 'z'
  tree['encoder']['layers']['query'] = tree['encoder']['layers']['query'].at[2, 1, 0].set(np.inf)
  assert stability.first_bad_tensor(tree, axes) == 'encoder/layers/query [layer 2]'
  assert stability.first_bad_tensor({'ids': jnp.arange(3)}, {'ids': ('length',)}) is None
