"""The modules that a model is made of: how each is made, where its parameters lie, and what they are stacked over.

A module states shape, axes and initial value of its weights in its constructor. The same constructor serves three ends: fresh
parameters, their description (`leaves`), and the module that computes with given ones.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from t5x_cpm.models.leaf import Leaf

Params = dict[str, Any]


class Fixed(nnx.Variable):
  """A parameter that is drawn once and never trained."""


class Ruled(nnx.Variable):
  """A parameter that a rule of its own changes after each step, outside the gradient."""


UPDATES: dict[type[nnx.Variable], str] = {nnx.Param: 'gradient', Fixed: 'fixed', Ruled: 'rule'}  # as Leaf.update says it


def _state(tree: Any) -> Params:
  return nnx.to_pure_dict(tree)


@dataclasses.dataclass(frozen=True, eq=False)
class Component:
  """A module of a model, or a stack of modules of one kind.

  Attributes:
    path: where its parameters lie in those of the model, such as 'encoder/layers'; '' is the top.
    make: a module with fresh parameters, from random numbers; of a stack one of its modules.
    stacked: names and sizes of the leading axes of its parameters, outermost first, such as (('layers', 12), ('expert', 8)).
    stack: 'encoder' or 'decoder'; '' for what belongs to neither.
    cast: whether inference may keep its parameters in the type of computation.
  """

  path: str
  make: Callable[[nnx.Rngs], nnx.Module]
  stacked: tuple[tuple[str, int], ...] = ()
  stack: str = ''
  cast: bool = True

  def _whole(self, rngs: nnx.Rngs) -> nnx.Module:
    make = self.make
    for name, size in reversed(self.stacked):
      make = _stack_of(make, name, size)
    return make(rngs)

  def init(self, rngs: nnx.Rngs) -> Params:
    """Fresh parameters, stacks included."""
    return _state(nnx.split(self._whole(rngs))[1])

  @functools.cached_property
  def leaves(self) -> Params:
    """The description of every parameter: a tree like that of `init`; takes no memory."""
    abstract = nnx.split(nnx.eval_shape(lambda: self._whole(nnx.Rngs(params=0))))[1]

    def describe(path: Any, variable: nnx.Variable) -> Leaf:
      value, names = variable.get_value(), [str(key.key) for key in path]
      return Leaf('/'.join([self.path, *names] if self.path else names), value.shape, value.dtype,
                  variable.get_metadata('out_sharding'), self.stack, UPDATES[type(variable)],
                  variable.get_metadata('decays', True))

    return _state(jax.tree_util.tree_map_with_path(describe, abstract, is_leaf=lambda x: isinstance(x, nnx.Variable)))

  @functools.cached_property
  def _graph(self) -> Any:
    return nnx.split(nnx.eval_shape(lambda: self.make(nnx.Rngs(params=0))))[0]

  def __call__(self, params: Params) -> Any:
    """The module with given parameters, of a stack one slice of them (or slices along axes that its methods know of)."""
    return nnx.merge(self._graph, params)

  def of(self, params: Params) -> Any:
    """The component's part of the parameters of a model."""
    if not self.path:
      return {name: params[name] for name in self.leaves}
    for name in self.path.split('/'):
      params = params[name]
    return params


def _stack_of(make: Callable[[nnx.Rngs], Any], name: str, size: int) -> Callable[[nnx.Rngs], Any]:
  """Makes `size` modules as one, whose parameters have a leading axis of that name."""

  @nnx.split_rngs(splits=size)
  @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: name})
  def stack(rngs: nnx.Rngs) -> Any:
    return make(rngs)

  return stack


def placed(tree: Params, component: Component, part: Params) -> Params:
  """A tree with a component's part put where it lies."""
  names = component.path.split('/') if component.path else []
  for name in reversed(names):
    part = {name: part}
  return _merged(tree, part)


def _merged(a: Params, b: Params) -> Params:
  return a | {name: _merged(a[name], value) if name in a and isinstance(value, dict) else value for name, value in b.items()}
