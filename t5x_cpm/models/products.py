"""Matrix products whose gradients are written the way that XLA:CPU computes fast.

Other platforms get the plain form with JAX's own gradient; the results are the same up to rounding. `grouped` has the products
of experts.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.xla_metadata import set_xla_metadata

from t5x_cpm import backend

PRODUCT = 'product'  # checkpoint_name of what _product returns: a policy that saves products sees none inside a custom_vjp


def dense(x: jax.Array, kernel: Any) -> jax.Array:
  """x [..., I] @ kernel [I, O] -> [..., O], as one product of two matrices.

  XLA:CPU runs a product of 2-D operands markedly faster than one with leading axes.
  """
  x_NI, kernel = x.reshape(-1, x.shape[-1]), jnp.asarray(kernel, x.dtype)
  y = checkpoint_name(_product(x_NI, kernel), PRODUCT) if backend.on_cpu() else x_NI @ kernel
  return y.reshape(*x.shape[:-1], kernel.shape[-1])


def for_rows(x: jax.Array, B: int) -> jax.Array:
  """Repeats x [...] for every row of a batch: [B, ...]."""
  return _for_rows(x, B) if backend.on_cpu() else jnp.broadcast_to(x, (B, *x.shape))


def scores(q_BTHK: jax.Array, k_BHSK: jax.Array, dtype: Any) -> jax.Array:
  """The scores [B, H, T, S] of each query with each key of its head, in `dtype`."""
  if backend.on_cpu():
    return _scores(jnp.swapaxes(q_BTHK, 1, 2), k_BHSK, dtype)
  return jnp.einsum('BTHK,BHSK->BHTS', q_BTHK, k_BHSK, preferred_element_type=dtype)


def weighted_mean(weights_BHTS: jax.Array, dropped_BHTS: jax.Array, values_BHSK: jax.Array) -> jax.Array:
  """The weighted mean [B, H, T, K] of the values of each head, in the dtype of the weights, which need not sum to 1.

  The sum of the weights divides the result, which has [T, K] numbers where the weights have [T, S].

  Args:
    weights_BHTS: not negative.
    dropped_BHTS: the weights after dropout, which multiply the values. The sum is of those before.
    values_BHSK: what to average.
  """
  return (_weighted_mean if backend.on_cpu() else _plain_mean)(weights_BHTS, dropped_BHTS, values_BHSK)


@jax.jit
def _transpose(x: jax.Array) -> jax.Array:
  return x.T


def _transposed_copy(x_NI: jax.Array) -> jax.Array:
  """A transposed copy of x, made by a kernel of its own: fused with what computes x it takes XLA:CPU four times as long."""
  with set_xla_metadata(inlineable='false'):
    return _transpose(x_NI)


def _turned(x: jax.Array) -> jax.Array:
  """A transposed copy [..., J, I]: XLA:CPU is slow at batched products that contract the first axis of each matrix."""
  return jax.lax.optimization_barrier(jnp.swapaxes(x, -1, -2))


def _stacked_product(a: jax.Array, b: jax.Array) -> jax.Array:
  """a [B, H, I, J] @ b [B, H, J, K], on all cores.

  XLA:CPU computes it on one core where a matrix has 256 rows of 256 numbers, and divides the stack among the cores if the
  kernel contains a sum. This one adds two halves, which it takes from b because it would add constants when it compiles.
  """
  product = a @ b
  halves = jnp.broadcast_to(0.5 + 0 * b[:, :, :1, :2], (*product.shape[:3], 2)).astype(product.dtype)
  return product * jax.lax.optimization_barrier(halves).sum(axis=-1, keepdims=True)


@jax.custom_vjp
def _product(x_NI: jax.Array, kernel_IO: jax.Array) -> jax.Array:
  return x_NI @ kernel_IO


def _gradients_of_product(saved: tuple[jax.Array, jax.Array], gradient_NO: jax.Array) -> tuple[jax.Array, jax.Array]:
  x_NI, kernel_IO = saved
  # XLA:CPU multiplies by a transposed copy 15 % faster than it contracts the first axes.
  return gradient_NO @ kernel_IO.T, _transposed_copy(x_NI) @ gradient_NO


_product.defvjp(lambda x, kernel: (_product(x, kernel), (x, kernel)), _gradients_of_product)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _for_rows(x: jax.Array, B: int) -> jax.Array:
  return jnp.broadcast_to(x, (B, *x.shape))


def _sum_of_rows(B: int, _: None, gradient: jax.Array) -> tuple[jax.Array]:
  # XLA:CPU takes 50 times as long for a sum over a leading axis as for a product with ones.
  return (jnp.tensordot(jnp.ones(B, gradient.dtype), gradient, 1),)


_for_rows.defvjp(lambda x, B: (_for_rows(x, B), None), _sum_of_rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _scores(q_BHTK: jax.Array, k_BHSK: jax.Array, dtype: Any) -> jax.Array:
  return jnp.einsum('BHTK,BHSK->BHTS', q_BHTK, k_BHSK, preferred_element_type=dtype)


def _gradients_of_scores(
    dtype: Any, saved: tuple[jax.Array, jax.Array], gradient_BHTS: jax.Array) -> tuple[jax.Array, jax.Array]:
  del dtype
  q_BHTK, k_BHSK = saved
  q = _stacked_product(gradient_BHTS, k_BHSK)
  k = _stacked_product(_turned(q_BHTK), gradient_BHTS)
  return q.astype(q_BHTK.dtype), jnp.swapaxes(k, -1, -2).astype(k_BHSK.dtype)


_scores.defvjp(lambda q, k, dtype: (_scores(q, k, dtype), (q, k)), _gradients_of_scores)


def _plain_mean(weights_BHTS: jax.Array, dropped_BHTS: jax.Array, values_BHSK: jax.Array) -> jax.Array:
  product = jnp.einsum('BHTS,BHSK->BHTK', dropped_BHTS, values_BHSK, preferred_element_type=weights_BHTS.dtype)
  return product / weights_BHTS.sum(axis=-1, keepdims=True)


_weighted_mean = jax.custom_vjp(_plain_mean)


def _gradients_of_mean(saved: tuple[jax.Array, ...], gradient_BHTK: jax.Array) -> tuple[jax.Array, ...]:
  weights_BHTS, dropped_BHTS, values_BHSK, mean_BHTK = saved
  # The sum is not kept but computed anew, so that the forward pass needs it in one kernel alone, that of the product.
  gradient = gradient_BHTK / jax.lax.optimization_barrier(weights_BHTS).sum(axis=-1, keepdims=True)
  of_sum = -(gradient * mean_BHTK).sum(axis=-1, keepdims=True)
  values = _stacked_product(_turned(gradient), dropped_BHTS)
  return (jnp.broadcast_to(of_sum, weights_BHTS.shape),
          jnp.einsum('BHTK,BHSK->BHTS', gradient, values_BHSK).astype(dropped_BHTS.dtype),
          jnp.swapaxes(values, -1, -2).astype(values_BHSK.dtype))


def _mean_and_saved(*args: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  mean_BHTK = _plain_mean(*args)
  return mean_BHTK, (*args, mean_BHTK)


_weighted_mean.defvjp(_mean_and_saved, _gradients_of_mean)
