"""The places in a layer where a delta may act, and what a layer sees of a delta.

A *delta* is a small set of parameters that is trained while those of the model are frozen. Its methods live in `tuning`; a
layer knows only that at a named *site* something read x and gave y, and that a delta may give something else in the place of y.
Where there is no delta, a hook is nothing.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from t5x_cpm import trees
from t5x_cpm.models.component import Component, Declared, Weight
from t5x_cpm.models.layers import dropout
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
EXPERTS = 'experts.'  # what the names of sites of experts begin with
SUBLAYERS = {'self.query': 'self', 'cross.query': 'cross', 'mlp.wi_0': 'mlp'}  # a product of it -> the sublayer


class Prefix(NamedTuple):
  """Keys and values that stand before those of an attention, at no position.

  Attributes:
    keys: [n, P, heads * head_dim]; n is 1, where all rows have one delta, or B.
    values: as keys.
    mask: which of them a row has, bool [n, P]; None: all.
  """

  keys: jax.Array
  values: jax.Array
  mask: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Site:
  """A place in the layers of a stack.

  Attributes:
    stack: 'encoder' or 'decoder'.
    name: in its layer, such as 'self.query'.
    sizes: of the last axis of what it reads, and of what it gives.
    axes: the logical names of these two axes.
    is_product: whether y is x times a matrix.
    experts: where each token is multiplied by the matrix of its expert, how many experts there are; 0 elsewhere.
  """

  stack: str
  name: str
  sizes: tuple[int, int]
  axes: tuple[str | None, str | None]
  is_product: bool
  experts: int = 0

  @property
  def full_name(self) -> str:
    """'encoder.self.query'."""
    return f'{self.stack}.{self.name}'


def sites(component: Component, role: str) -> list[Site]:
  """The sites of the layers whose weights a component holds.

  Among experts, rows are not those of the batch: the sites of their matrices have names of their own ('experts.wi_0'), and
  their layer as a whole is one.

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
    else:
      found.append(Site(component.stack, f'{EXPERTS}{path}', (rows, columns), (reads, gives), False, component.stacked[1][1]))
    if name in SUBLAYERS:
      found.append(Site(component.stack, SUBLAYERS[name], (rows, rows), (reads, reads), False))
  return found


Product = Callable[[jax.Array, jax.Array], jax.Array]  # (rows, kernels [E, I, O]) -> rows, each times that of its expert
ChangeExperts = Callable[[Mapping[str, jax.Array], jax.Array, jax.Array, Product], jax.Array]


class Method(Protocol):
  """What a method of `tuning` does in a layer."""

  def change(self, weights: Mapping[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """What a site gives in the place of y [B, T, ...], which it made of x [B, T, ...].

    `weights` are those of this site; their first axis is 1, where all rows have one delta, or B.
    """
    ...

  @property
  def dropout_rate(self) -> float:
    """Of what `change` reads, in training."""
    ...

  def prefix(self, weights: Mapping[str, jax.Array]) -> jax.Array | None:
    """What stands before what a site gives, [1 or B, P, ...], always seen and at no position; None: nothing does.

    It is asked for the sites of keys and values, and must give as many for both. `weights` are as in `change`.
    """
    ...

  @property
  def change_experts(self) -> 'ChangeExperts | None':
    """(weights [E, ...], x, y, product) -> what a matrix of each expert gives in the place of y; None: it acts in none."""
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

  @property
  def token_ids(self) -> tuple[int, ...]:
    """Tokens whose rows of the embedding and of the output the delta has."""
    ...

  def whole(self, leaf: Leaf) -> bool:
    """Whether the delta has a parameter of the model as a whole."""
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


def _of_each(weight: Weight, experts: int) -> Weight:
  return dataclasses.replace(weight, shape=(experts, *weight.shape), axes=('expert', *weight.axes))


def component(delta: Delta, base: Component, role: str) -> Declared | None:
  """The part of a delta for the layers whose weights a component holds, as site -> method -> name; None where it has none."""
  found = {}
  for site in sites(base, role):
    if weights := delta.weights(site):
      found[site.name] = weights if not site.experts else {
          method: {name: _of_each(weight, site.experts) for name, weight in declared.items()}
          for method, declared in weights.items()}
  return Declared(f'delta/{base.path}', found, (base.stacked[0], ('slot', 1)), base.stack) if found else None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InExperts:
  """What a delta does in the matrices of experts.

  Attributes:
    weights: name of the matrix -> method -> name -> [E, ...].
    methods: by name, in the order in which they act.
  """

  weights: Mapping[str, Mapping[str, Mapping[str, jax.Array]]]
  methods: tuple[tuple[str, Method], ...] = dataclasses.field(metadata={'static': True})

  def change(self, name: str, x: jax.Array, y: jax.Array, product: Product) -> jax.Array:
    """What a matrix gives in the place of y."""
    for method_name, method in self.methods:
      weights = self.weights.get(name, {}).get(method_name)
      if weights is not None and method.change_experts:
        y = method.change_experts(weights, x, y, product)
    return y


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

  def _acting(self, site: str) -> Iterator[tuple[Method, dict[str, jax.Array]]]:
    """The methods that act at a site, each with the weights that the rows have there."""
    for name, method in self.methods:
      weights = self.weights.get(site, {}).get(name)
      if weights is not None:
        yield method, {key: leaf[:1] if self.slots is None else leaf[self.slots] for key, leaf in weights.items()}

  def change(self, site: str, x: Any, y: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """What the site gives in the place of y. `key` is that of the layer; None: nothing is dropped."""
    for method, weights in self._acting(site):
      own = key if key is None or not method.dropout_rate else jax.random.fold_in(key, zlib.crc32(site.encode()))
      changed = method.change(weights, dropout(x, method.dropout_rate, own), y)
      y = changed if self.slots is None else jnp.where(self.slots.reshape(-1, *[1] * (y.ndim - 1)) == 0, y, changed)
    return y

  def prefix(self, sublayer: str) -> Prefix | None:
    """The keys and values that stand before those of an attention ('self' or 'cross'); None where there are none."""
    keys, values = ([vectors for method, weights in self._acting(f'{sublayer}.{name}')
                     if (vectors := method.prefix(weights)) is not None] for name in ('key', 'value'))
    if not keys:
      return None
    # Slots hold zeros where a delta is shorter than others, and for rows without a delta. No trained key is zero.
    joined = jnp.concatenate(keys, axis=1)
    return Prefix(joined, jnp.concatenate(values, axis=1), None if self.slots is None else (joined != 0).any(axis=-1))

  def in_experts(self) -> 'InExperts | None':
    """What acts in the matrices of experts, for all rows alike; None where nothing does."""
    sites = {site.removeprefix(EXPERTS): jax.tree.map(lambda leaf: leaf[0], methods)
             for site, methods in self.weights.items() if site.startswith(EXPERTS)}
    return InExperts(sites, self.methods) if sites else None


Hook = Callable[[str, Any, jax.Array], jax.Array]  # (site, x, y) -> y


def nothing(site: str, x: Any, y: jax.Array) -> jax.Array:
  """The hook where there is no delta."""
  del site, x
  return y


def within(delta: Hooks | None, sublayer: str, key: jax.Array | None = None) -> Hook:
  """The hook of the sites of a sublayer, by their names there; `key` as in Hooks.change."""
  return nothing if delta is None else lambda name, x, y: delta.change(f'{sublayer}.{name}', x, y, key)
