"""Multiplies each run of rows by a matrix of its own: the rows of expert e by the matrix of expert e.

On accelerators this is jax.lax.ragged_dot. XLA:CPU multiplies all rows by the matrix of every expert for that, so on CPU a loop
goes over the experts that have rows and multiplies their rows in blocks.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_cpm import backend

# Rows of a block. A run is cut into as many blocks of the first size as fit, then of the second, then of the third; the last
# block is filled up. Large blocks run at nearly the rate of one large product, small ones waste little at the end of a run.
BLOCKS = 256, 64, 16


def _each_run(counts_E: jax.Array, run: Callable[[jax.Array, jax.Array, jax.Array, Any], Any], carry: Any) -> Any:
  """Applies carry = run(expert, first row, rows, carry) for each expert that has rows."""
  first_E = jnp.cumsum(counts_E) - counts_E
  busy_E = jnp.argsort(counts_E == 0, stable=True)

  def one(i: jax.Array, carry: Any) -> Any:
    return run(busy_E[i], first_E[busy_E[i]], counts_E[busy_E[i]], carry)

  return jax.lax.fori_loop(0, jnp.sum(counts_E > 0), one, carry)


def _each_block(
    first: jax.Array, rows: jax.Array, A: int, block: Callable[[jax.Array, int, Any, Any], Any], carry: Any) -> Any:
  """Applies carry = block(start, size, keep, carry) for each block of a run; `keep` [size, 1]: which rows count, None: all."""
  end = first + rows
  *sizes, least = [size for size in BLOCKS if size <= A] or [A]
  for size in sizes:
    number = (end - first) // size
    carry = jax.lax.fori_loop(0, number, lambda i, carry, f=first, s=size: block(f + i * s, s, None, carry), carry)
    first = first + number * size

  def last(i: jax.Array, carry: Any) -> Any:
    start = jnp.minimum(first + i * least, A - least)
    row = start + jnp.arange(least)[:, None]
    return block(start, least, (row >= first + i * least) & (row < end), carry)

  return jax.lax.fori_loop(0, -(-(end - first) // least), last, carry)


def _dot(x: jax.Array, x_axis: int, y: jax.Array, y_axis: int) -> jax.Array:
  return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())))


def _product(x_AI: jax.Array, kernel_EIO: jax.Array, counts_E: jax.Array, axis: int) -> jax.Array:
  """Multiplies each run of rows by the matrix of its expert, contracting `axis` of the matrix."""
  A = x_AI.shape[0]

  def run(expert: jax.Array, first: jax.Array, rows: jax.Array, y_AO: jax.Array) -> jax.Array:
    kernel = jax.lax.dynamic_index_in_dim(kernel_EIO, expert, keepdims=False)

    def block(start: jax.Array, size: int, keep: jax.Array | None, y_AO: jax.Array) -> jax.Array:
      y = _dot(jax.lax.dynamic_slice_in_dim(x_AI, start, size), 1, kernel, axis)
      if keep is not None:
        y = jnp.where(keep, y, jax.lax.dynamic_slice_in_dim(y_AO, start, size))
      return jax.lax.dynamic_update_slice_in_dim(y_AO, y, start, 0)

    return _each_block(first, rows, A, block, y_AO)

  return _each_run(counts_E, run, jnp.zeros((A, kernel_EIO.shape[2 - axis]), x_AI.dtype))


@jax.custom_vjp
def _blocks(x_AI: jax.Array, kernel_EIO: jax.Array, counts_E: jax.Array) -> jax.Array:
  return _product(x_AI, kernel_EIO, counts_E, 0)


def _forward(x_AI: jax.Array, kernel_EIO: jax.Array, counts_E: jax.Array) -> tuple[jax.Array, tuple]:
  return _blocks(x_AI, kernel_EIO, counts_E), (x_AI, kernel_EIO, counts_E)


def _backward(residuals: tuple, dy_AO: jax.Array) -> tuple[jax.Array, jax.Array, np.ndarray]:
  x_AI, kernel_EIO, counts_E = residuals

  def run(expert: jax.Array, first: jax.Array, rows: jax.Array, d_EIO: jax.Array) -> jax.Array:
    def block(start: jax.Array, size: int, keep: jax.Array | None, d_IO: jax.Array) -> jax.Array:
      dy = jax.lax.dynamic_slice_in_dim(dy_AO, start, size)
      if keep is not None:
        dy = jnp.where(keep, dy, 0)
      return d_IO + _dot(jax.lax.dynamic_slice_in_dim(x_AI, start, size), 0, dy, 0)

    d_IO = _each_block(first, rows, x_AI.shape[0], block, jnp.zeros_like(d_EIO, shape=d_EIO.shape[1:]))
    return jax.lax.dynamic_update_index_in_dim(d_EIO, d_IO, expert, 0)

  d_EIO = _each_run(counts_E, run, jnp.zeros_like(kernel_EIO))
  return _product(dy_AO, kernel_EIO, counts_E, 1), d_EIO, np.zeros(counts_E.shape, jax.dtypes.float0)


_blocks.defvjp(_forward, _backward)


def grouped_dot(x_AI: jax.Array, kernel_EIO: jax.Array, counts_E: jax.Array) -> jax.Array:
  """[A, O]: of the first counts_E[0] rows with kernel_EIO[0], of the next counts_E[1] with kernel_EIO[1], and so on.

  Rows after the last run are 0. Gradients flow to x and the kernels.
  """
  if backend.on_cpu():
    return _blocks(x_AI, kernel_EIO, counts_E)
  y_AO = jax.lax.ragged_dot(x_AI, kernel_EIO, counts_E.astype(jnp.int32))
  return jnp.where(jnp.arange(x_AI.shape[0])[:, None] < counts_E.sum(), y_AO, 0)  # kernels differ in what they leave there
