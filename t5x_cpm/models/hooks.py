"""The places in a layer where a delta may act, and what a layer sees of a delta.

A *delta* is a small set of parameters that is trained while those of the model are frozen. Its methods live in `tuning`; a
layer knows only that at a named *site* something read x and gave y, and that a delta may give something else in the place of y.
Where there is no delta, a hook is nothing.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from t5x_cpm import trees
from t5x_cpm.models.component import Component, Declared, Weight
from t5x_cpm.models.leaf import Leaf

PROMPT = 'delta/prompt'  # where the vectors lie that stand for tokens
ATTENTION = {'self': 'attention', 'cross': 'cross_attention'}
# Sites of products, and where in the role's component the matrix lies. The site of a sublayer ('self', 'cross', 'mlp') reads
# its normed input and gives its output, before the residual is added; that of 'mlp.hidden' reads and gives the activations.
PRODUCTS: dict[str, dict[str, str]] = {
    'block': {f'{site}.{name}': f'{module}/{name}' for site, module in ATTENTION.items()
              for name in ('query', 'key', 'value', 'output')},
    'experts': {f'mlp.{name}': name for name in ('wi_0', 'wi_1', 'wo')},
    'shared': {f'shared.{name}': name for name in ('wi_0', 'wi_1', 'wo')},
}
SUBLAYERS = {'self.query': 'self', 'cross.query': 'cross', 'mlp.wi_0': 'mlp'}  # a product of it -> the sublayer


@dataclasses.dataclass(frozen=True)
class Site:
  """A place in the layers of a stack.

  Attributes:
    stack: 'encoder' or 'decoder'.
    name: in its layer, such as 'self.query'.
    sizes: of the last axis of what it reads, and of what it gives.
    axes: the logical names of these two axes.
    is_product: whether y is x times a matrix.
  """

  stack: str
  name: str
  sizes: tuple[int, int]
  axes: tuple[str | None, str | None]
  is_product: bool

  @property
  def full_name(self) -> str:
    """'encoder.self.query'."""
    return f'{self.stack}.{self.name}'


def sites(component: Component, role: str) -> list[Site]:
  """The sites of the layers whose weights a component holds.

  Among experts there is none: there, rows are not those of the batch. Only their layer as a whole is a site.

  Args:
    component: of a stack of layers.
    role: what it is to them, as in Layer.roles.
  """
  leaves: dict[str, Leaf] = trees.named(component.leaves)
  depth = len(component.stacked)
  found = []
  for name, path in PRODUCTS.get(role, {}).items():
    if path not in leaves:
      continue
    (rows, columns), (reads, gives) = leaves[path].shape[depth:], leaves[path].axes[depth:]
    if depth == 1:
      found.append(Site(component.stack, name, (rows, columns), (reads, gives), True))
      if name == 'mlp.wi_0':
        found.append(Site(component.stack, 'mlp.hidden', (columns, columns), (gives, gives), False))
    if name in SUBLAYERS:
      found.append(Site(component.stack, SUBLAYERS[name], (rows, rows), (reads, reads), False))
  return found


class Method(Protocol):
  """What a method of `tuning` does in a layer."""

  def change(self, weights: Mapping[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """What a site gives in the place of y [B, T, ...], which it made of x [B, T, ...].

    `weights` are those of this site; their first axis is 1, where all rows have one delta, or B.
    """
    ...


class Delta(Protocol):
  """What a model is built with where it has a delta."""

  @property
  def methods(self) -> tuple[tuple[str, Method], ...]:
    """By name, in the order in which they act."""
    ...

  @property
  def prompt(self) -> Weight | None:
    """Vectors that stand for tokens from ModelConfig.vocab_size on, [n, tokens, D] of n slots; None where there are none."""
    ...

  @property
  def sight(self) -> tuple[bool, bool]:
    """In the encoder, whether these vectors attend to other tokens, and other tokens to them."""
    ...

  def weights(self, site: Site) -> dict[str, dict[str, Weight]]:
    """Method -> name -> what it declares for a site, without the axes of layers and slots; {} where none acts."""
    ...


def seen(delta: Delta | None, is_prompt_BS: jax.Array, mask_BTS: jax.Array) -> jax.Array:
  """A mask [B, 1, S, S] of who attends to whom in the encoder, without what `Delta.sight` takes away."""
  if delta is None or delta.prompt is None:
    return mask_BTS
  query, key = is_prompt_BS[:, None, :, None], is_prompt_BS[:, None, None, :]
  sees_text, is_seen = delta.sight
  if not sees_text:
    mask_BTS &= key | ~query
  return mask_BTS if is_seen else mask_BTS & (query | ~key)


def component(delta: Delta, base: Component, role: str) -> Declared | None:
  """The part of a delta for the layers whose weights a component holds, as site -> method -> name; None where it has none."""
  found = {site.name: weights for site in sites(base, role) if (weights := delta.weights(site))}
  return Declared(f'delta/{base.path}', found, (base.stacked[0], ('slot', 1)), base.stack) if found else None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hooks:
  """A delta as one layer sees it.

  Attributes:
    weights: site -> method -> name -> [n, ...], of n slots for deltas.
    slots: the slot of each row, int32 [B], 0 for a row without a delta; None: all rows use the first.
    methods: by name, in the order in which they act.
  """

  weights: Mapping[str, Mapping[str, Mapping[str, jax.Array]]]
  slots: jax.Array | None = None
  methods: tuple[tuple[str, Method], ...] = dataclasses.field(default=(), metadata={'static': True})

  def change(self, site: str, x: Any, y: jax.Array) -> jax.Array:
    """What the site gives in the place of y."""
    for name, method in self.methods:
      weights = self.weights.get(site, {}).get(name)
      if weights is not None:
        mine = {key: leaf[:1] if self.slots is None else leaf[self.slots] for key, leaf in weights.items()}
        changed = method.change(mine, x, y)
        y = changed if self.slots is None else jnp.where(self.slots.reshape(-1, *[1] * (y.ndim - 1)) == 0, y, changed)
    return y


Hook = Callable[[str, Any, jax.Array], jax.Array]  # (site, x, y) -> y


def nothing(site: str, x: Any, y: jax.Array) -> jax.Array:
  """The hook where there is no delta."""
  del site, x
  return y


def within(delta: Hooks | None, sublayer: str) -> Hook:
  """The hook of the sites of a sublayer, by their names there."""
  return nothing if delta is None else lambda name, x, y: delta.change(f'{sublayer}.{name}', x, y)
