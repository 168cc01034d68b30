"""A model of any family: its parameters, and its layers one by one or as whole stacks.

A family (`encoder_decoder`) lists its components and puts its stacks together. A layer is two halves with the feed-forward part
injected between them (see `layer`); `run` composes the layers of a stack into one program for training and resident inference.
"""

import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_cpm.config import ConfigError, ModelConfig
from t5x_cpm.config.row_features import ROW_FEATURES
from t5x_cpm.models import dispatch, hooks, replaced, routers, stacks
from t5x_cpm.models.component import Component, Declared, Params, placed
from t5x_cpm.models.context import Context
from t5x_cpm.models.layer import Block, Layer, table
from t5x_cpm.models.layers import MLP, RelativeBias, RMSNorm, compute_dtype
from t5x_cpm.models.leaf import Leaf

# experts(layer, its weights, u, routing, context) -> y: how the feed-forward part of a layer is computed.
Experts = Callable[[Layer, Params, jax.Array, Any, Context], jax.Array]


def row_of(batch: dict[str, Any]) -> dict[str, jax.Array]:
  """What the rows of a batch carry besides tokens, by name: int32 [B]."""
  return {name: batch[name] for name in ROW_FEATURES if name in batch}


def resident(layer: Layer, weights: Params, u_BTD: jax.Array, routing: Any, ctx: Context) -> jax.Array:
  """The feed-forward part with all weights at hand."""
  return layer.experts(weights, u_BTD, routing, ctx)


def stack_components(config: ModelConfig, stack: str) -> list[Component]:
  """The components of one stack of layers, in the order in which their parameters are drawn."""
  num_layers, own, every = config.num_layers(stack), config.own_layers(stack), config.moe.every(stack)
  routed = own // every if every else 0  # layers with experts

  def mlp(rngs: nnx.Rngs, width: int = 1) -> MLP:
    return MLP(config, num_layers, rngs, width)

  def over(count: int) -> tuple[str, int]:
    return 'layers', count

  found = [Component(f'{stack}/layers', lambda rngs: Block(config, num_layers, stack == 'decoder', rngs), (over(own),),
                     stack)]
  if routed:
    expert = 'expert', config.moe.num_experts
    found.append(Component(f'experts/{stack}', mlp, (over(routed), expert), stack))
    if routed < own:
      found.append(Component(f'experts/{stack}_dense', mlp, (over(own - routed),), stack))
    if config.moe.shared_experts:
      shared = functools.partial(mlp, width=config.moe.shared_experts)
      found.append(Component(f'experts/{stack}_shared', shared, (over(routed),), stack))
    weights = routers.get(config.moe.of(stack)).weights
    if weights is not None:  # never cast: a rounded score is another expert
      found.append(Component(f'{stack}/routers', functools.partial(weights, config), (over(routed),), stack, cast=False))
  else:
    found.append(Component(f'experts/{stack}', mlp, (over(own),), stack))
  found.append(Component(f'{stack}/relative_bias', functools.partial(RelativeBias, config, stack == 'encoder'), stack=stack))
  found.append(Component(f'{stack}/final_norm', lambda rngs: RMSNorm(config), stack=stack))
  return found


def _used(layers: dict[str, tuple[Layer, ...]]) -> list[tuple[Component, str]]:
  """Each component of the layers once, with its role in them."""
  found = {component.path: (component, role) for stack in layers.values() for layer in stack
           for role, (component, _) in layer.roles.items()}
  return list(found.values())


class Model:
  """Pure functions of plain trees of parameters for one configuration. Holds no array.

  Attributes:
    config: the model's configuration.
    stacks: names of its stacks.
    components: its modules by path, in the order in which their parameters are drawn.
    layers: its layers by stack, in order.
    delta: the methods of a delta, whose parameters are the subtree 'delta'; None: there is none.
  """

  def __init__(self, config: ModelConfig, stacks: Sequence[str], components: Callable[[ModelConfig], Sequence[Component]],
               experts: Experts, delta: hooks.Delta | None = None):
    """Raises ConfigError for a configuration that cannot work; `components` is only called with one that can."""
    config.validate()
    routers.check(config.moe)
    self.config, self.stacks, self._experts = config, tuple(stacks), experts
    self.delta = delta
    self.components = {one.path: one for one in components(config)}
    self.layers = {stack: table(config, stack, self.components) for stack in stacks}
    if delta is not None:
      parts = [hooks.component(delta, component, role) for component, role in _used(self.layers)]
      parts += replaced.components(delta, self.components.values())
      self.components |= {one.path: one for one in parts if one is not None}
      if delta.prompt is not None:
        self.components[hooks.PROMPT] = Declared(hooks.PROMPT, {'table': delta.prompt})
      self.layers = {stack: table(config, stack, self.components) for stack in stacks}

  # Parameters.

  def init(self, key: jax.Array) -> Params:
    """Fresh parameters: a nested dict of arrays."""
    rngs = nnx.Rngs(params=key)
    return self._tree(lambda one: one.init(rngs))

  def fresh(self, path: str, key: jax.Array) -> Params:
    """Fresh parameters of one component, such as 'decoder/routers'."""
    return self.components[path].init(nnx.Rngs(params=key))

  def _tree(self, subtree: Callable[[Component], Params], without: Collection[str] = ()) -> Params:
    tree: Params = {}
    for one in self.components.values():
      if one.path not in without:
        tree = placed(tree, one, subtree(one))
    return tree

  def leaves(self) -> Params:
    """The description of every parameter: a tree of Leaf like that of the parameters; takes no memory."""
    return self._tree(lambda one: one.leaves)

  def abstract(self) -> tuple[Params, Params]:
    """Shapes and dtypes, and logical axis names, of the parameters: two trees of one structure; takes no memory."""
    leaves = self.leaves()
    return jax.tree.map(lambda leaf: leaf.abstract, leaves), jax.tree.map(lambda leaf: leaf.axes, leaves)

  def num_parameters(self) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(self.leaves()))

  def num_active_parameters(self) -> int:
    """Parameters that one token of each stack uses: of a layer's experts, only those it is sent to, on average."""
    return round(sum(leaf.size * self.share(leaf) for leaf in jax.tree.leaves(self.leaves())))

  def share(self, leaf: Leaf) -> float:
    """The share of a parameter that one token of its stack passes: 1 except for experts."""
    if 'expert' not in leaf.stacked:
      return 1.0
    return routers.experts_of_token(self.config.moe, leaf.stack) / self.config.moe.num_experts

  def uses(self, leaf: Leaf) -> int:
    """How many layers use each row of a parameter: 1 except for those that share theirs."""
    return self.config.num_layers(leaf.stack) // self.config.own_layers(leaf.stack) if 'layers' in leaf.stacked else 1

  def prepare(self, params: Params) -> Params:
    """Parameters for many calls without gradient: cast once (except routers), and unstacked where layers are not scanned.

    What a delta has in the place of others is put there, once.
    """
    dtype, scanned = compute_dtype(self.config), stacks.loop(self.config) == 'scan'

    def prepared(one: Component) -> Any:
      tree = one.of(params)
      if one.cast:
        tree = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)
      return stacks.unstack(tree) if one.stacked and not scanned else tree

    return self._tree(prepared, without=replaced.PATHS.values())

  def sites(self) -> list[hooks.Site]:
    """Where a delta may act."""
    return [site for component, role in _used(self.layers) for site in hooks.sites(component, role)]

  def group_rows(self, B: int, **lengths: int) -> int:
    """How many rows of a training batch are routed together.

    Args:
      B: rows of the batch.
      **lengths: tokens in a row, by stack.

    Raises:
      ConfigError: a capacity of less than one token, or a length whose equal parts are all far shorter than a group.
    """
    config, together = self.config.moe, 1
    for stack, length in lengths.items():
      if not config.every(stack):
        continue
      rows, groups = dispatch.rows_together(B, length, config.group_size)
      fewest = -(-length // config.group_size)
      if groups >= 4 * fewest:  # a few tokens cannot be balanced over experts
        raise ConfigError(
            f'TaskConfig.{stack}_length = {length}: its equal parts of at most MoEConfig.group_size = {config.group_size} '
            f'tokens have {length // groups}, too few to be balanced over experts. Take a length such as '
            f'{length // fewest * fewest}, or another group_size.')
      routers.get(config.of(stack)).capacity(config, rows * length // groups)
      together = math.lcm(together, rows)
    return together

  def advance(self, params: Params, updates: dict[str, jax.Array]) -> Params:
    """The parameters after a step, once rules of their own have changed some, such as the biases of router 'loss_free'.

    Args:
      params: the model's parameters.
      updates: by stack, the load [layers, E] of the experts, as `apply` gives it.
    """
    for stack, load_LE in updates.items():
      advance = routers.get(self.config.moe.of(stack)).advance
      assert advance is not None
      if self.config.share_layers:  # one router, whose load is that of all layers
        load_LE = load_LE.sum(axis=0, keepdims=True)
      changed = advance(params[stack]['routers'], load_LE, self.config.moe)
      params = params | {stack: params[stack] | {'routers': changed}}
    return params

  # Layers.

  def module(self, path: str, params: Params) -> Any:
    """The module at a path, with its part of a model's parameters."""
    one = self.components[path]
    return one(one.of(params))

  def run(self, stack: str, params: Params, x_BTD: jax.Array, ctx: Context, cache: Any = None) -> tuple[jax.Array, Any, Any]:
    """Runs the layers of one stack, without what comes before and after them.

    Args:
      stack: 'encoder' or 'decoder'.
      params: the model's parameters, as from `init` or `prepare`.
      x_BTD: the first layer's input.
      ctx: the stack's context.
      cache: of its layers, stacked as they are; None for whole sequences.

    Returns:
      The last layer's output; what has changed of the cache; and {'losses', 'metrics'} of the layers with experts, stacked.
    """
    period = self.layers[stack][:self.config.period(stack)]  # what repeats: layers, of which the last has experts
    used = {component.path: component for layer in period for component, _ in (*layer.roles.values(), *layer.deltas)}
    weights_of = {path: component.of(params) for path, component in used.items()}
    shared = weights_of if self.config.share_layers else {}
    trees = ({} if shared else weights_of) | ({} if cache is None else {'cache': cache})

    def fn(x: jax.Array, given: stacks.Slices, index: Any) -> tuple[jax.Array, stacks.Slices]:
      outs: stacks.Slices = {'about': [{}]}
      for within, layer in enumerate(period):
        # A layer's row in the first period is also its place in the slices of every other period.
        weights = {role: given[component.path][row] for role, (component, row) in layer.roles.items()}
        delta = self.delta_of([given[component.path][row] for component, row in layer.deltas], ctx.row)
        own = ctx.at_layer(index * len(period) + within, delta)
        h, written, u, routing = layer.before(weights, x, own, given['cache'][within] if 'cache' in given else None)
        y = self._experts(layer, weights, u, routing, own)
        x = layer.after(weights, h, u, y, own)
        if written is not None:
          outs.setdefault('cache', []).append(written)
        if routing is not None:
          left_behind = dispatch.left_behind(routing, own.valid)
          outs['about'] = [{'losses': routing.losses, 'metrics': routing.metrics | {'left_behind': left_behind}}]
      return x, outs

    x_BTD, outs = stacks.run(
        fn, x_BTD, trees, self.config.num_layers(stack) // len(period), self.config, remat=cache is None,
        shared=shared)
    return x_BTD, outs.get('cache'), stacks.stacked(outs['about'])

  def delta_of(self, parts: Sequence[Params], row: dict[str, jax.Array]) -> hooks.Hooks | None:
    """What a delta does in a layer, from its part of each of Layer.deltas and what the rows carry; None for no parts."""
    if self.delta is None or not parts:
      return None
    weights = {site: methods for part in parts for site, methods in part.items()}
    return hooks.Hooks(weights, row.get('delta'), self.delta.methods)

  def context(self, ids_BT: jax.Array, valid_BT: jax.Array, row: dict[str, jax.Array], key: jax.Array | None = None,
              train: bool = False) -> dict[str, Any]:
    """The fields of Context that do not depend on the stack."""
    rate, experts = self.config.dropout_rate, self.config.moe.expert_dropout
    return {'ids': ids_BT, 'valid': valid_BT, 'row': row, 'key': key,
            'train': train, 'dropout_rate': rate, 'expert_dropout_rate': rate if experts < 0 else experts}


def summary(abouts: dict[str, Any], config: ModelConfig) -> tuple[dict, dict, dict]:
  """What the layers with experts report: auxiliary losses, metrics, and what `Model.advance` needs.

  Args:
    abouts: by stack, the third result of `Model.run`; empty where it has no experts.
    config: the model's configuration.

  Returns:
    Losses, already weighted, as means over the layers with experts; metrics, as pairs (sum, weight) [L, ...] by the names
    'encoder/...' and 'decoder/...'; and by stack the experts' loads, which add up over the parts of a batch.
  """
  moe, abouts = config.moe, {stack: about for stack, about in abouts.items() if about}
  routed = sum(config.num_layers(stack) // moe.every(stack) for stack in abouts)
  losses: dict[str, jax.Array] = {}
  for about in abouts.values():
    for name, values_L in about['losses'].items():
      losses[name] = losses.get(name, 0.0) + values_L.sum() / routed
  metrics = {f'{stack}/{name}': pair for stack, about in abouts.items() for name, pair in about['metrics'].items()}
  updates = {stack: about['metrics']['load'][0] for stack, about in abouts.items()
             if routers.get(moe.of(stack)).advance is not None}
  return losses, metrics, updates
