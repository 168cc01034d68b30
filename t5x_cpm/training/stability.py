"""Finds what went wrong first in a run that produced a number that is not finite."""

from typing import Any

import jax
import jax.numpy as jnp

from t5x_cpm.mesh import is_names
from t5x_cpm.training import host_memory


@jax.jit
def _finite(leaves: list[jax.Array]) -> jax.Array:
  return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves])


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
