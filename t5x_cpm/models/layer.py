"""One layer, in two halves: what comes before its feed-forward part, and what comes after it.

What lies between, `y = experts(u, routing)`, is injected. Training runs it inside the program; an engine whose experts are kept
elsewhere runs the same two halves, each as a program of its own, with its own loop over experts between them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_cpm.config import ModelConfig
from t5x_cpm.mesh import shard
from t5x_cpm.models import dispatch, hooks, routers
from t5x_cpm.models.attention import Attention, Cache, write
from t5x_cpm.models.component import Component, Params
from t5x_cpm.models.context import Context
from t5x_cpm.models.hooks import Hooks
from t5x_cpm.models.layers import MLP, RMSNorm, dropout
from t5x_cpm.models.products import dense
from t5x_cpm.models.routing import RouteContext, Routing


class Block(nnx.Module):
  """The weights of a layer without those of its feed-forward part and router. Pre-norm: x + f(norm(x)) for each part."""

  def __init__(self, config: ModelConfig, num_layers: int, is_decoder: bool, rngs: nnx.Rngs):
    self.attention_norm = RMSNorm(config)
    self.attention = Attention(config, num_layers, rngs)
    if is_decoder:
      self.cross_attention_norm = RMSNorm(config)
      self.cross_attention = Attention(config, num_layers, rngs)
    self.mlp_norm = RMSNorm(config)
    self.is_decoder = is_decoder

  def attend(self, x_BTD: jax.Array, ctx: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
    """Self-attention, and in a decoder cross-attention: x after both, and what was written to the cache."""
    u = self.attention_norm(x_BTD)
    hook = ctx.hook('self')
    keys, values = self.attention.keys_and_values(u, hook)
    written = None
    if cache is not None:
      keys, values = write(cache['self_key'], keys, ctx.positions), write(cache['self_value'], values, ctx.positions)
      written = {'self_key': keys, 'self_value': values}
    y = self.attention(u, (keys, values), ctx.self_bias, ctx.self_mask, ctx.key_of('self.weights'), hook,
                       ctx.prefix('self'))
    x_BTD = x_BTD + ctx.dropout(ctx.changed('self', u, y), 'self.output')
    if self.is_decoder:
      u, hook = self.cross_attention_norm(x_BTD), ctx.hook('cross')
      if cache is None:
        keys, values = self.cross_attention.keys_and_values(ctx.encoded, hook)
      else:
        keys, values = cache['cross_key'], cache['cross_value']
      y = self.cross_attention(u, (keys, values), None, ctx.cross_mask, ctx.key_of('cross.weights'), hook,
                               ctx.prefix('cross'))
      x_BTD = x_BTD + ctx.dropout(ctx.changed('cross', u, y), 'cross.output')
    return x_BTD, written


def _dense(mlp: MLP, u_BTD: jax.Array, ctx: Context, name: str) -> jax.Array:
  hook = ctx.hook(name)

  def drop(hidden: jax.Array) -> jax.Array:
    return dropout(hook('hidden', hidden, hidden), ctx.dropout_rate, ctx.key_of('mlp.hidden'))

  return mlp(u_BTD, drop, lambda kernel_name, x, kernel: hook(kernel_name, x, dense(x, kernel)))


def _slice_of(component: Component, row: int, params: Params) -> Params:
  tree = component.of(params)
  if isinstance(tree, tuple):  # unstacked by Model.prepare
    tree, row = tree[row], 0
  return jax.tree.map(lambda leaf: leaf[row], tree)


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
  """One layer of a model: pure functions of its own weights, and where these lie.

  Attributes:
    config: the model's configuration.
    stack: 'encoder' or 'decoder'.
    index: in its stack, from 0.
    roles: its weights by role: 'block', 'experts' (its feed-forward part), and where it has them 'router' and 'shared'. Each
      is a component, and the row of this layer in it.
    deltas: the components of a delta that act in it, and its row in each.
  """

  config: ModelConfig
  stack: str
  index: int
  roles: dict[str, tuple[Component, int]]
  deltas: tuple[tuple[Component, int], ...] = ()

  @property
  def routed(self) -> bool:
    """Whether tokens go to experts; otherwise its feed-forward part is one network."""
    return any(name == 'expert' for name, _ in self.roles['experts'][0].stacked)

  def weights(self, params: Params) -> Params:
    """The layer's own slice of a model's parameters, by role."""
    return {role: _slice_of(component, row, params) for role, (component, row) in self.roles.items()}

  def delta_weights(self, params: Params) -> list[Params]:
    """Its part of each of `deltas`."""
    return [_slice_of(component, row, params) for component, row in self.deltas]

  def before(self, weights: Params, x_BTD: jax.Array, ctx: Context, cache: Cache | None = None) -> tuple[
      jax.Array, Cache | None, jax.Array, Routing | None]:
    """Attention, norm and router.

    Args:
      weights: as from `weights`; 'experts' and 'shared' are not read.
      x_BTD: the layer's input.
      ctx: `Context.at_layer` of this layer.
      cache: of this layer when decoding.

    Returns:
      h [B, T, D], which the feed-forward part is added to; what has changed of the cache (were the encoder's keys and values
      returned too, a loop over layers would copy them for every token); the input u [B, T, D] of the feed-forward part; and
      which experts each token goes to, or None where there are none.
    """
    block = self.roles['block'][0](weights['block'])
    h_BTD, written = block.attend(x_BTD, ctx, cache)
    u_BTD = block.mlp_norm(h_BTD)
    return h_BTD, written, u_BTD, self._route(weights, u_BTD, ctx) if self.routed else None

  def _route(self, weights: Params, u_BTD: jax.Array, ctx: Context) -> Routing:
    moe = self.config.moe
    size = moe.group_size if ctx.train else u_BTD.shape[1]  # outside training a row depends on no other

    def grouped(x_BT: Any) -> jax.Array:
      return dispatch.to_groups(x_BT, size)

    row = {name: grouped(jnp.broadcast_to(values_B[:, None], u_BTD.shape[:2])) for name, values_B in ctx.row.items()}
    context = RouteContext(grouped(ctx.valid), grouped(ctx.ids), row, ctx.key_of('router'), ctx.train)
    router = self.roles['router'][0](weights['router']) if 'router' in self.roles else None
    return routers.route(moe.of(self.stack), moe, router, grouped(u_BTD), context)

  def guess(self, weights: Params, x_BTD: jax.Array, ctx: Context) -> Routing:
    """Where tokens would go if attention changed nothing: for an engine that brings experts before it is known which."""
    routing = self._route(weights, self.roles['block'][0](weights['block']).mlp_norm(x_BTD), ctx)
    assert routing is not None
    return routing

  def _axes_in_experts(self) -> Params:
    """The logical axes of the weights of Hooks.in_experts."""
    leaves = next(one.leaves for one, _ in self.deltas if one.path == f'delta/{self.roles["experts"][0].path}')
    return {site.removeprefix(hooks.EXPERTS): jax.tree.map(lambda leaf: leaf.axes[2:], methods)
            for site, methods in leaves.items() if site.startswith(hooks.EXPERTS)}

  def experts(self, weights: Params, u_BTD: jax.Array, routing: Routing | None, ctx: Context) -> jax.Array:
    """The feed-forward part with all weights at hand: every token through one network, or through the experts it goes to."""
    mlp = self.roles['experts'][0](weights['experts'])
    if routing is None:
      return _dense(mlp, u_BTD, ctx, 'mlp')
    u_GTD = u_BTD.reshape(*routing.expert_GTK.shape[:2], -1)
    delta = None if ctx.delta is None else ctx.delta.in_experts()
    y_GTD = dispatch.dispatch(mlp, u_GTD, routing, ctx.expert_dropout_rate, ctx.key_of('mlp.hidden'), delta,
                              None if delta is None else self._axes_in_experts())
    return y_GTD.reshape(u_BTD.shape)

  def after(self, weights: Params, h_BTD: jax.Array, u_BTD: jax.Array, y_BTD: jax.Array, ctx: Context) -> jax.Array:
    """The layer's output, from what `before` gave and the output y [B, T, D] of the feed-forward part."""
    if 'shared' in self.roles:
      y_BTD = y_BTD + _dense(self.roles['shared'][0](weights['shared']), u_BTD, ctx, 'shared')
    return shard(h_BTD + ctx.dropout(ctx.changed('mlp', u_BTD, y_BTD), 'mlp.output'), 'batch', 'length', 'embed')

  def cross_cache(self, weights: Params, encoded_BSD: jax.Array, delta: Hooks | None = None) -> tuple[jax.Array, jax.Array]:
    """A decoder layer's keys and values [B, H, S, K] of the encoder's output, and of what a delta makes of them."""
    attention = self.roles['block'][0](weights['block']).cross_attention
    return attention.keys_and_values(encoded_BSD, hooks.within(delta, 'cross'))


def table(config: ModelConfig, stack: str, components: dict[str, Component]) -> tuple[Layer, ...]:
  """The layers of a stack, in order.

  With experts in every n-th layer, the last of each n has them; the networks of the others lie in a component of their own.
  Layers that share their parameters have the same rows.

  Args:
    config: the model's configuration.
    stack: 'encoder' or 'decoder'.
    components: the model's components, by path.
  """
  every = config.moe.every(stack)
  layers = []
  for index in range(config.num_layers(stack)):
    routed, place = bool(every) and index % every == every - 1, index % config.own_layers(stack)
    roles = {'block': (components[f'{stack}/layers'], place)}
    if routed:
      row = place // every
      roles['experts'] = components[f'experts/{stack}'], row
      for role, path in (('router', f'{stack}/routers'), ('shared', f'experts/{stack}_shared')):
        if path in components:
          roles[role] = components[path], row
    elif every:
      roles['experts'] = components[f'experts/{stack}_dense'], place - place // every
    else:
      roles['experts'] = components[f'experts/{stack}'], place
    parts = ((components[path], row) for component, row in roles.values() if (path := f'delta/{component.path}') in components)
    layers.append(Layer(config, stack, index, roles, tuple(parts)))
  return tuple(layers)
