"""Finds what went wrong first in a run that produced a number that is not finite."""

from typing import Any

import jax
import jax.numpy as jnp

from t5x_cpm import trees
from t5x_cpm.mesh import is_names
from t5x_cpm.training import host_memory


@jax.jit
def _finite(leaves: list[jax.Array]) -> jax.Array:
  return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves])


@jax.jit
def _norm(leaf: jax.Array) -> jax.Array:
  """The norm, without the overflow of the squares."""
  scale = jnp.max(jnp.abs(leaf), initial=0).astype(jnp.float32)
  return scale * jnp.sqrt(jnp.sum(jnp.square(leaf / jnp.maximum(scale, 1e-30)), dtype=jnp.float32))


def overflowing_tensor(tree: Any) -> str | None:
  """The name and size of the largest tensor where the sum of the squares of all overflows although every one is finite.

  Args:
    tree: arrays in any nesting, all finite.

  Returns:
    Such as 'parameter/lm_head (finite, but its norm of 3e+19 is too large to be squared)'; None where nothing overflows.
  """
  norms = {name: float(_norm(host_memory.brought(leaf))) for name, leaf in trees.named(tree).items()
           if jnp.issubdtype(leaf.dtype, jnp.inexact)}
  if sum(norm * norm for norm in norms.values()) <= float(jnp.finfo(jnp.float32).max):
    return None
  name = max(norms, key=lambda name: norms[name])
  return f'{name} (finite, but its norm of {norms[name]:.1e} is too large to be squared)'


def first_bad_tensor(tree: Any, axes: Any) -> str | None:
  """The name of the first tensor that holds a NaN or an infinity.

  Args:
    tree: arrays in any nesting; integers are always finite. No array is transferred to the host, only a flag for each.
    axes: a tree of the same structure, of tuples of logical axis names.

  Returns:
    The path of the tensor, such as 'decoder/layers/attention/query', followed for a stack of layers by the first bad layer,
    such as ' [layer 3]'; None where everything is finite.
  """
  names = jax.tree.leaves(axes, is_leaf=is_names)
  leaves = [(path, leaf, own) for (path, leaf), own in zip(jax.tree_util.tree_leaves_with_path(tree), names, strict=True)
            if jnp.issubdtype(leaf.dtype, jnp.inexact)]
  if not leaves:
    return None
  if any(host_memory.is_away(leaf) for _, leaf, _ in leaves):  # one after the other: they may not fit together
    flags = [jax.device_get(_finite([host_memory.brought(leaf)]))[0] for _, leaf, _ in leaves]
  else:
    flags = jax.device_get(_finite([leaf for _, leaf, _ in leaves]))
  for (path, leaf, own), finite in zip(leaves, flags, strict=True):
    if finite:
      continue
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if own[:1] == ('layers',):
      layers = jax.device_get(jnp.all(jnp.isfinite(host_memory.brought(leaf)), axis=tuple(range(1, leaf.ndim))))
      name += f' [layer {int((~layers).argmax())}]'
    return name
  return None
