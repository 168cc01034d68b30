"""The modules that a model is made of: how each is made, where its parameters lie, and what they are stacked over.

A module states shape, axes and initial value of its weights in its constructor. The same constructor serves three ends: fresh
parameters, their description (`leaves`), and the module that computes with given ones.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_cpm import trees
from t5x_cpm.models.leaf import Leaf

Params = dict[str, Any]


class Fixed(nnx.Variable):
  """A parameter that is drawn once and never trained."""


class Ruled(nnx.Variable):
  """A parameter that a rule of its own changes after each step, outside the gradient."""


UPDATES: dict[type[nnx.Variable], str] = {nnx.Param: 'gradient', Fixed: 'fixed', Ruled: 'rule'}  # as Leaf.update says it


def _stack_of(make: Callable[[nnx.Rngs], Any], size: int) -> Callable[[nnx.Rngs], Any]:
  """Makes `size` modules as one, whose parameters have a leading axis."""

  @nnx.split_rngs(splits=size)
  @nnx.vmap
  def stack(rngs: nnx.Rngs) -> Any:
    return make(rngs)

  return stack


class Component:
  """A module of a model, or a stack of modules of one kind. Holds no array.

  Attributes:
    path: where its parameters lie in those of the model, such as 'encoder/layers'; '' is the top.
    stacked: names and sizes of the leading axes of its parameters, outermost first, such as (('layers', 12), ('expert', 8)).
    stack: 'encoder' or 'decoder'; '' for what belongs to neither.
    cast: whether inference may keep its parameters in the type of computation.
    replace: (parameters of the model, own) -> own, with what a delta has in their place; None: it has nothing of them.
    leaves: the description of every parameter, a tree like that of `init`.
  """

  replace: Callable[[Params, Any], Any] | None = None

  def __init__(self, path: str, make: Callable[[nnx.Rngs], nnx.Module], stacked: tuple[tuple[str, int], ...] = (),
               stack: str = '', cast: bool = True):
    """make: a module with fresh parameters, from random numbers; of a stack one of its modules."""
    self.path, self.stacked, self.stack, self.cast = path, stacked, stack, cast
    self._make_whole = make
    for _, size in reversed(stacked):
      self._make_whole = _stack_of(self._make_whole, size)
    self._graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(params=0))))
    self.leaves = nnx.to_pure_dict(
        jax.tree_util.tree_map_with_path(self._leaf, state, is_leaf=lambda x: isinstance(x, nnx.Variable)))

  def _leaf(self, path: Any, variable: nnx.Variable) -> Leaf:
    value, names = variable.get_value(), [str(key.key) for key in path]
    return Leaf(
        name='/'.join([self.path, *names] if self.path else names),
        shape=(*(size for _, size in self.stacked), *value.shape),
        dtype=value.dtype,
        axes=(*(name for name, _ in self.stacked), *variable.get_metadata('axes')),
        stack=self.stack,
        update=UPDATES[type(variable)],
        decays=variable.get_metadata('decays', True),
        casts=self.cast)

  def init(self, rngs: nnx.Rngs) -> Params:
    """Fresh parameters, stacks included."""
    return nnx.to_pure_dict(nnx.split(self._make_whole(rngs))[1])

  def __call__(self, params: Params) -> Any:
    """The module with given parameters, of a stack one slice of them (or slices along axes that its methods know of)."""
    return nnx.merge(self._graph, params)

  def of(self, params: Params) -> Any:
    """The component's parameters among those of a model."""
    own: Any = params
    for name in self.path.split('/') if self.path else ():
      own = own[name]
    if not self.path:
      own = {name: params[name] for name in self.leaves}
    return own if self.replace is None else self.replace(params, own)


@dataclasses.dataclass(frozen=True)
class Weight:
  """One array of parameters, declared as data.

  Attributes:
    shape: without the leading axes of a stack.
    axes: the logical name of each axis.
    init: (key, shape of the whole array) -> float32.
    decays: whether weight decay applies to it.
  """

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  init: Callable[[jax.Array, tuple[int, ...]], jax.Array]
  decays: bool = False


class Declared(Component):
  """A component without a module: its parameters are declared as data, and whatever reads them takes them as they are."""

  def __init__(self, path: str, weights: Params, stacked: tuple[tuple[str, int], ...] = (), stack: str = ''):
    """weights: a nested dict of Weight. Other arguments are those of Component; all parameters are float32."""
    self.path, self.stacked, self.stack, self.cast = path, stacked, stack, True
    self._weights = trees.named(weights)
    self.leaves = trees.nested({name: self._describe(name, weight) for name, weight in self._weights.items()})

  def _describe(self, name: str, weight: Weight) -> Leaf:
    names, sizes = zip(*self.stacked) if self.stacked else ((), ())
    return Leaf(name=f'{self.path}/{name}', shape=(*sizes, *weight.shape), dtype=jnp.dtype('float32'),
                axes=(*names, *weight.axes), stack=self.stack, decays=weight.decays)

  def init(self, rngs: nnx.Rngs) -> Params:
    leaves = trees.named(self.leaves)
    return trees.nested({name: weight.init(rngs.params(), leaves[name].shape) for name, weight in self._weights.items()})

  def __call__(self, params: Params) -> Params:
    return params


def placed(tree: Params, component: Component, subtree: Params) -> Params:
  """A tree with a component's parameters put where it belongs."""
  names = component.path.split('/') if component.path else []
  for name in reversed(names):
    subtree = {name: subtree}
  return trees.merged(tree, subtree)
