"""The product of runs of rows with a matrix each: row a of expert e's run times expert e's matrix.

Accelerators have jax.lax.ragged_dot. On CPU XLA computes that for every expert and all rows; there the runs are cut into blocks
of a fixed number of rows, and each block is one product.
"""

import jax
import jax.numpy as jnp
import numpy as np

from t5x_cpm import backend

BLOCK = 128  # rows of a product at most: fewer waste less where a run ends, more pass over each matrix less often


def grouped_dot(x_AI: jax.Array, kernel_EIO: jax.Array, counts_E: jax.Array) -> jax.Array:
  """[A, O]: of the first counts_E[0] rows with kernel_EIO[0], of the next counts_E[1] with kernel_EIO[1], and so on.

  Rows after the last run are 0. Gradients flow to x and the kernels.
  """
  if backend.on_cpu():
    return _blocks(x_AI, kernel_EIO, counts_E)
  y_AO = jax.lax.ragged_dot(x_AI, kernel_EIO, counts_E.astype(jnp.int32))
  return jnp.where(jnp.arange(x_AI.shape[0])[:, None] < counts_E.sum(), y_AO, 0)  # kernels differ in what they leave there


def _block_size(A: int, E: int) -> int:
  return min(A, max(8, min(BLOCK, 1 << (-(-A // E) - 1).bit_length())))


def _walk(counts_E: jax.Array, A: int, block: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
  """The blocks: how many, and of each its expert, its first row, and the first and the last row but one that count in it."""
  E = counts_E.shape[0]
  blocks_E = -(-counts_E // block)
  most = A // block + E
  ends_E = jnp.cumsum(blocks_E)
  index_M = jnp.arange(most)
  expert_M = jnp.minimum(jnp.searchsorted(ends_E, index_M, side='right'), E - 1)
  row_E = jnp.cumsum(counts_E) - counts_E
  from_M = row_E[expert_M] + (index_M - (ends_E - blocks_E)[expert_M]) * block
  until_M = jnp.minimum(from_M + block, (row_E + counts_E)[expert_M])
  return ends_E[-1], expert_M, jnp.minimum(from_M, A - block), from_M, until_M


@jax.custom_vjp
def _blocks(x_AI: jax.Array, kernel_EIO: jax.Array, counts_E: jax.Array) -> jax.Array:
  A, E = x_AI.shape[0], kernel_EIO.shape[0]
  block = _block_size(A, E)
  number, expert_M, start_M, from_M, until_M = _walk(counts_E, A, block)

  def one(m: jax.Array, y_AO: jax.Array) -> jax.Array:
    start = start_M[m]
    row = start + jnp.arange(block)[:, None]
    x = jax.lax.dynamic_slice_in_dim(x_AI, start, block)
    y = x @ jax.lax.dynamic_index_in_dim(kernel_EIO, expert_M[m], keepdims=False)
    old = jax.lax.dynamic_slice_in_dim(y_AO, start, block)
    y = jnp.where((row >= from_M[m]) & (row < until_M[m]), y, old)
    return jax.lax.dynamic_update_slice_in_dim(y_AO, y, start, 0)

  return jax.lax.fori_loop(0, number, one, jnp.zeros((A, kernel_EIO.shape[2]), x_AI.dtype))


def _forward(x_AI: jax.Array, kernel_EIO: jax.Array, counts_E: jax.Array) -> tuple[jax.Array, tuple]:
  return _blocks(x_AI, kernel_EIO, counts_E), (x_AI, kernel_EIO, counts_E)


def _backward(residuals: tuple, dy_AO: jax.Array) -> tuple[jax.Array, jax.Array, np.ndarray]:
  x_AI, kernel_EIO, counts_E = residuals
  A, E = x_AI.shape[0], kernel_EIO.shape[0]
  block = _block_size(A, E)
  number, expert_M, start_M, from_M, until_M = _walk(counts_E, A, block)

  def one(m: jax.Array, d_EIO: jax.Array) -> jax.Array:
    start, e = start_M[m], expert_M[m]
    row = start + jnp.arange(block)[:, None]
    x = jax.lax.dynamic_slice_in_dim(x_AI, start, block)
    x = jnp.where((row >= from_M[m]) & (row < until_M[m]), x, 0)
    dy = jax.lax.dynamic_slice_in_dim(dy_AO, start, block)
    old = jax.lax.dynamic_index_in_dim(d_EIO, e, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(d_EIO, old + x.T @ dy, e, 0)

  d_EIO = jax.lax.fori_loop(0, number, one, jnp.zeros_like(kernel_EIO))
  dx_AI = _blocks(dy_AO, jnp.swapaxes(kernel_EIO, 1, 2), counts_E)
  return dx_AI, d_EIO, np.zeros(counts_E.shape, jax.dtypes.float0)


_blocks.defvjp(_forward, _backward)
