"""Running a function over the layers of a stack.

Parameters are stacked, leaves [L, ...], in every checkpoint. A stack for inference may instead be a tuple of L trees whose
leaves are [1, ...]; what comes out has the same form, so a cache follows its parameters.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from t5x_cpm import backend
from t5x_cpm.config import ModelConfig

LayerFn = Callable[[Any, Any, Any], tuple[Any, Any]]


def loop(config: ModelConfig) -> str:
  """'scan' or 'unroll'. Unrolled layers run faster on CPU; scanned ones compile faster and are the same on accelerators."""
  if config.layer_loop != 'auto':
    return config.layer_loop
  return 'unroll' if backend.on_cpu() else 'scan'


def unstack(tree: Any) -> tuple[Any, ...]:
  """Leaves [L, ...] -> a tuple of L trees with leaves [1, ...]."""
  leaves, treedef = jax.tree.flatten(tree)
  # The transpose of a split is one concatenation; that of L slices would be a sum of L padded stacks.
  parts = [jax.lax.split(leaf, (1,) * leaf.shape[0], axis=0) for leaf in leaves]
  return tuple(jax.tree.unflatten(treedef, layer) for layer in zip(*parts, strict=True))


def first(layers: Any) -> Any:
  """The tree of the first layer, leaves without the layer axis."""
  tree = layers[0] if isinstance(layers, tuple) else layers
  return jax.tree.map(lambda leaf: leaf[0], tree)


def each(fn: Callable[[Any], Any], layers: Any) -> Any:
  """fn of each layer's tree, in the form of `layers`."""
  if isinstance(layers, tuple):
    return tuple(jax.tree.map(lambda leaf: leaf[None], fn(first((tree,)))) for tree in layers)
  return jax.lax.map(fn, layers)


def _rematerialised(fn: LayerFn, config: ModelConfig) -> LayerFn:
  if config.remat == 'none':
    return fn
  policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if config.remat == 'dots' else None
  return jax.checkpoint(fn, policy=policy)


def run(fn: LayerFn, x: Any, trees: tuple[Any, ...], config: ModelConfig, *, remat: bool) -> tuple[Any, Any]:
  """x through fn(x, tree, layer index) -> (x, out) for every layer.

  Args:
    fn: one layer.
    x: the first layer's input.
    trees: what is stacked over layers (parameters, cache); None among them stays None.
    config: chooses the loop and what the backward pass recomputes.
    remat: False where there is no backward pass.

  Returns:
    The last layer's output, and the outs in the form of `trees`.
  """
  fn = _rematerialised(fn, config) if remat else fn
  unstacked = any(isinstance(tree, tuple) for tree in trees)
  if not unstacked and loop(config) == 'scan':

    def body(carry: tuple[Any, jax.Array], tree: Any) -> tuple[tuple[Any, jax.Array], Any]:
      x, index = carry
      x, out = fn(x, tree, index)
      return (x, index + 1), out

    (x, _), outs = jax.lax.scan(body, (x, jnp.int32(0)), trees)
    return x, outs
  layers = list(zip(*[t if isinstance(t, tuple) else unstack(t) for t in trees if t is not None], strict=True))
  outs = []
  for index, layer in enumerate(layers):
    parts = iter(layer)
    tree = tuple(None if t is None else jax.tree.map(lambda leaf: leaf[0], next(parts)) for t in trees)
    x, out = fn(x, tree, index)
    outs.append(jax.tree.map(lambda leaf: leaf[None], out))
  if unstacked:
    return x, tuple(outs)
  return x, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outs)
