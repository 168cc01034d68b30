"""Runs a function over the layers of a stack.

In every checkpoint layers are stacked: leaves are [L, ...]. For inference a stack may instead be a tuple of L trees with
leaves [1, ...]. The outputs have the form of the inputs, so a cache has that of its parameters.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from t5x_cpm import backend
from t5x_cpm.config import ModelConfig

Slices = dict[str, list[Any]]  # by name, a tree for each layer of a period
Period = Callable[[Any, Slices, Any], tuple[Any, Slices]]


def _given_too(period: Period, same: Slices) -> Period:
  """The function of a period that is also given these slices, whichever period it is."""
  return lambda x, slices, index: period(x, slices | same, index)


def loop(config: ModelConfig) -> str:
  """'scan' or 'unroll'. Unrolled layers run faster on CPU; scanned layers compile faster, and run as fast on accelerators."""
  if config.layer_loop != 'auto':
    return config.layer_loop
  return 'unroll' if backend.on_cpu() else 'scan'


def unstack(tree: Any) -> tuple[Any, ...]:
  """Leaves [L, ...] -> a tuple of L trees with leaves [1, ...]."""
  leaves, treedef = jax.tree.flatten(tree)
  # The transpose of a split is one concatenation; that of L slices would be a sum of L padded stacks.
  split = [jax.lax.split(leaf, (1,) * leaf.shape[0], axis=0) for leaf in leaves]
  return tuple(jax.tree.unflatten(treedef, layer) for layer in zip(*split, strict=True))


def first(layers: Any) -> Any:
  """The tree of the first layer, leaves without the layer axis."""
  tree = layers[0] if isinstance(layers, tuple) else layers
  return jax.tree.map(lambda leaf: leaf[0], tree)


def side_by_side(trees: dict[str, Any]) -> Any:
  """Several stacks of as many layers each, in either form, as one stack whose layers are dicts of theirs."""
  if any(isinstance(tree, tuple) for tree in trees.values()):
    return tuple(dict(zip(trees, layers)) for layers in zip(*trees.values(), strict=True))
  return trees


def repeated(layers: Any, times: int) -> Any:
  """A stack in either form, so many times over."""
  return layers * times if isinstance(layers, tuple) else jax.tree.map(lambda leaf: jnp.concatenate([leaf] * times), layers)


def each(fn: Callable[[Any], Any], layers: Any) -> Any:
  """Applies fn to each layer's tree; the result has the form of `layers`."""
  if isinstance(layers, tuple):
    return tuple(jax.tree.map(lambda leaf: leaf[None], fn(first((tree,)))) for tree in layers)
  return jax.lax.map(fn, layers)


def _rematerialised(config: ModelConfig, remat: bool, fn: Callable[..., Any]) -> Callable[..., Any]:
  if config.remat == 'none' or not remat:
    return fn
  policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if config.remat == 'dots' else None
  return jax.checkpoint(fn, policy=policy)


def _stack(trees: list[Any]) -> Any:
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _scanned(period: Period, x: Any, trees: dict[str, Any], counts: dict[str, int], periods: int,
             wrap: Callable[[Any], Any]) -> tuple[Any, dict[str, Any]]:
  # What the backward pass needs of the weights must be what the loop is given, for a slice of it would be kept as a copy: so
  # there is no axis of layers where a period has one, and taking layers apart is part of what is computed again.
  @wrap
  def one(x: Any, given: Any, index: Any) -> tuple[Any, dict[str, Any]]:
    x, outs = period(x, {name: [given[name]] if n == 1 else [jax.tree.map(lambda leaf: leaf[i], given[name])  # noqa: B023
                                                             for i in range(n)] for name, n in counts.items()}, index)
    return x, {name: _stack(out) for name, out in outs.items()}

  def body(carry: tuple[Any, jax.Array], given: Any) -> tuple[tuple[Any, jax.Array], Any]:
    x, index = carry
    x, outs = one(x, given, index)
    return (x, index + 1), outs

  grouped = {name: tree if counts[name] == 1 else jax.tree.map(lambda leaf: leaf.reshape(periods, -1, *leaf.shape[1:]), tree)
             for name, tree in trees.items()}
  (x, _), outs = jax.lax.scan(body, (x, jnp.int32(0)), grouped, length=periods)
  return x, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), outs)


def _unrolled(period: Period, x: Any, trees: dict[str, Any], counts: dict[str, int], periods: int) -> tuple[Any, Slices]:
  layers = {name: tree if isinstance(tree, tuple) else unstack(tree) for name, tree in trees.items()}
  collected: Slices = {}
  for index in range(periods):
    slices = {name: [first((tree,)) for tree in layers[name][index * n:(index + 1) * n]] for name, n in counts.items()}
    x, outs = period(x, slices, index)
    for name, out in outs.items():
      collected.setdefault(name, []).extend(out)
  return x, collected


def run(
    period: Period, x: Any, trees: dict[str, Any], periods: int, config: ModelConfig, *,
    remat: bool, shared: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
  """Runs x through a stack, one period after another.

  A period is what repeats: one layer, or several of which some differ. From a tree with n layers per period, each period is
  given a list of n trees, and it returns such lists.

  Args:
    period: (x, slices, index of the period) -> (x, outs).
    x: the first layer's input.
    trees: what is stacked over layers, by name: parameters, a cache.
    periods: how many there are.
    config: chooses the loop, and what the backward pass computes again.
    remat: False where there is no backward pass.
    shared: stacks of the layers of one period, by name, which all periods use.

  Returns:
    The last layer's output, and the outs by name, stacked over layers. If the trees are tuples of layers, so are the outs.
  """
  wrap, unstacked = functools.partial(_rematerialised, config, remat), any(isinstance(tree, tuple) for tree in trees.values())
  if shared:
    unstacked |= any(isinstance(tree, tuple) for tree in shared.values())
    period = _given_too(period, {name: [first((layer,)) for layer in (tree if isinstance(tree, tuple) else unstack(tree))]
                                 for name, tree in shared.items()})
  counts = {name: (len(tree) if isinstance(tree, tuple) else jax.tree.leaves(tree)[0].shape[0]) // periods
            for name, tree in trees.items()}
  if not unstacked and loop(config) == 'scan':
    return _scanned(period, x, trees, counts, periods, wrap)
  x, collected = _unrolled(wrap(period), x, trees, counts, periods)
  if unstacked:
    return x, {name: tuple(jax.tree.map(lambda leaf: leaf[None], tree) for tree in out) for name, out in collected.items()}
  return x, {name: _stack(out) for name, out in collected.items()}


def stacked(layers: Any) -> Any:
  """Brings either form into leaves [L, ...]."""
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *layers) if isinstance(layers, tuple) else layers
