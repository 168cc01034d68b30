"""Parameters of a model in whose place a delta has its own: some as a whole, of others the rows of a few tokens.

They lie in `delta/whole` and `delta/rows` under their names in the model, after an axis of slots, which has one.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from t5x_cpm import trees
from t5x_cpm.models.component import Component, Declared, Params, Weight
from t5x_cpm.models.hooks import Delta
from t5x_cpm.models.leaf import Leaf

PATHS = {'whole': 'delta/whole', 'rows': 'delta/rows'}


def _zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  del key
  return jnp.zeros(shape)


def part_of(delta: Delta, leaf: Leaf) -> str:
  """'whole', 'rows', or '' for what stays the model's."""
  if delta.whole(leaf):
    return 'whole'
  return 'rows' if delta.token_ids and 'vocab' in leaf.axes else ''


def put(leaf: Leaf, part: str, old: Any, new: Any, ids: tuple[int, ...]) -> Any:
  """A parameter of a model with what a delta has in its place, of which axis 0 is that of slots."""
  if part == 'whole':
    return new[0]
  index = tuple(jnp.array(ids) if axis == 'vocab' else slice(None) for axis in leaf.axes)
  return jnp.asarray(old).at[index].set(new[0].astype(old.dtype))


def _replacing(chosen: Mapping[str, tuple[Leaf, str]], ids: tuple[int, ...]) -> Callable[[Params, Params], Params]:
  """Component.replace of a component with these leaves, by their names there."""

  def replace(params: Params, own: Params) -> Params:
    held = params.get('delta', {})
    if not any(part in held for part in PATHS):
      return own  # prepared, with all in place
    values = trees.named(own)
    for name, (leaf, part) in chosen.items():
      values[name] = put(leaf, part, values[name], trees.named(held[part])[leaf.name], ids)
    return trees.nested(values)

  return replace


def components(delta: Delta, base: Iterable[Component]) -> list[Declared]:
  """The parts of a delta in which such parameters lie, which the components of the model read from then on.

  They are zero until `first_values` makes them those of the base.
  """
  weights: dict[str, dict[str, Weight]] = {part: {} for part in PATHS}
  for component in base:
    chosen = {name: (leaf, part) for name, leaf in trees.named(component.leaves).items() if (part := part_of(delta, leaf))}
    for leaf, part in chosen.values():
      axis = leaf.axes.index('vocab') if part == 'rows' else None
      shape = tuple(len(delta.token_ids) if number == axis else size for number, size in enumerate(leaf.shape))
      axes = tuple(None if number == axis else name for number, name in enumerate(leaf.axes))
      weights[part][leaf.name] = Weight((1, *shape), ('slot', *axes), _zeros)
    if chosen:
      component.replace = _replacing(chosen, delta.token_ids)
  return [Declared(PATHS[part], trees.nested(declared)) for part, declared in weights.items() if declared]


def first_values(delta: Delta, leaves: Mapping[str, Leaf], base: Params) -> dict[str, Any]:
  """What such parameters are at first, those of the base: {'whole': ..., 'rows': ...}, as far as there are any."""
  found: dict[str, dict[str, Any]] = {part: {} for part in PATHS}
  for name, value in trees.named(base).items():
    if part := part_of(delta, leaves[name]):
      own = value
      if part == 'rows':
        own = jnp.take(value, jnp.array(delta.token_ids), axis=leaves[name].axes.index('vocab'))
      found[part][name] = own[None].astype(jnp.float32)
  return {part: trees.nested(values) for part, values in found.items() if values}
