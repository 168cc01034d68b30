"""Finding what went wrong first in a run that produced a number that is not finite."""

from typing import Any

import jax
import jax.numpy as jnp

from t5x_cpm.training import host_memory


@jax.jit
def _finite(leaves: list[jax.Array]) -> jax.Array:
  return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves])


def first_bad_tensor(tree: Any) -> str | None:
  """The name of the first tensor that holds a NaN or an infinity.

  Args:
    tree: arrays in any nesting; integers are always finite. One small transfer from the device, whatever their size.

  Returns:
    The path of the tensor, like 'decoder/layers/attention/query', followed for a stack of layers by the first bad
    layer, like '[layer 3]'; None where all is finite.
  """
  named = [(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
  if not named:
    return None
  if any(host_memory.is_away(leaf) for _, leaf in named):  # one after the other: they may not fit together
    flags = [jax.device_get(_finite([host_memory.brought(leaf)]))[0] for _, leaf in named]
  else:
    flags = jax.device_get(_finite([leaf for _, leaf in named]))
  for (path, leaf), finite in zip(named, flags, strict=True):
    if finite:
      continue
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if {'layers', 'experts'} & set(name.split('/')) and leaf.ndim > 1:
      layers = jax.device_get(jnp.all(jnp.isfinite(host_memory.brought(leaf)), axis=tuple(range(1, leaf.ndim))))
      name += f' [layer {int((~layers).argmax())}]'
    return name
  return None
