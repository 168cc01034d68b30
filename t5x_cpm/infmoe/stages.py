"""The programs that a model with experts elsewhere is run by: one for each half of a layer, one for an expert, and the ends.

Layers of one stack differ in their weights alone, so that each program is compiled once for all of them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from t5x_cpm.infmoe.bundle import Place, place_of
from t5x_cpm.infmoe.formats import Stored
from t5x_cpm.models import dispatch, encoder_decoder
from t5x_cpm.models.component import Params
from t5x_cpm.models.context import Context
from t5x_cpm.models.hooks import PROMPT
from t5x_cpm.models.layer import Layer

OWN = ('self_key', 'self_value')  # what a step writes to the cache of a layer


def _between(model: encoder_decoder.Model, layer: Layer, weights: Params, parts: list[Params], x_BTD: jax.Array, ctx: Context,
             own: Any, cross: Any) -> tuple[Any, ...]:
  """The first half, and what the host needs to know of the routing; leaves of caches are [1, B, ...]."""
  ctx = ctx.at_layer(layer.index, model.delta_of(parts, ctx.row))
  cache = None if own is None else {name: leaf[0] for name, leaf in (own | cross).items()}
  h_BTD, written, u_BTD, routing = layer.before(weights, x_BTD, ctx, cache)
  written = None if written is None else {name: leaf[None] for name, leaf in written.items()}
  if routing is None:
    y_BTD = layer.experts(weights, u_BTD, None, ctx)
    return layer.after(weights, h_BTD, u_BTD, y_BTD, ctx), written
  K = routing.expert_GTK.shape[-1]
  u_ND, expert_NK = u_BTD.reshape(-1, u_BTD.shape[-1]), routing.expert_GTK.reshape(-1, K)
  return h_BTD, written, u_ND, expert_NK, routing.weight_GTK.reshape(-1, K)


def _guess(model: encoder_decoder.Model, layer: Layer, weights: Params, x_BTD: jax.Array, ctx: Context) -> jax.Array:
  return layer.guess(weights, x_BTD, ctx).expert_GTK


def _expert(model: encoder_decoder.Model, layer: Layer, form: str, y_AD: jax.Array, u_ND: jax.Array, weights: Any,
            token_M: jax.Array, place_M: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Puts tokens through an expert, and the results in their places; places beyond the end are those of no token.

  The second result is one number of them. What comes next takes the memory of the first, and cannot be waited for.
  """
  mlp = layer.roles['experts'][0]({name: Stored(parts, form) for name, parts in weights.items()})
  out_MD = mlp(u_ND[token_M])
  return y_AD.at[place_M].set(out_MD, mode='drop', unique_indices=True), out_MD[0, 0]


def _after(model: encoder_decoder.Model, layer: Layer, weights: Params, parts: list[Params], h_BTD: jax.Array, u_ND: jax.Array,
           y_AD: jax.Array, expert_NK: jax.Array, weight_NK: jax.Array, ctx: Context) -> jax.Array:
  N, K = expert_NK.shape
  y_ND = dispatch.weighted(y_AD.reshape(N, K, -1), expert_NK, weight_NK, layer.config.moe.num_experts)
  ctx = ctx.at_layer(layer.index, model.delta_of(parts, ctx.row))
  return layer.after(weights, h_BTD, u_ND.reshape(h_BTD.shape), y_ND.reshape(h_BTD.shape), ctx)


def _cross(model: encoder_decoder.Model, layer: Layer, max_len: int, weights: Params, parts: list[Params],
           encoded_BSD: jax.Array, row: Any) -> Any:
  keys, values = layer.cross_cache(weights, encoded_BSD, model.delta_of(parts, row))
  B, H, _, K = keys.shape
  empty = jnp.zeros((1, B, H, max_len, K), keys.dtype)
  return {'self_key': empty, 'self_value': empty, 'cross_key': keys[None], 'cross_value': values[None]}


class Weights(NamedTuple):
  """All parameters but those of experts, on the device.

  Attributes:
    rest: those that belong to no layer; with a delta also the vectors of its prompt.
    layers: by place, those of layers, by role.
    parts: by stack, for each layer its part of a delta.
  """

  rest: Params
  layers: dict[Place, Params]
  parts: dict[str, list[list[Params]]]

  def with_delta(self, model: encoder_decoder.Model, delta: Params) -> 'Weights':
    """These with the parameters of a delta, which `model` has."""
    tree = {'delta': delta}
    rest = self.rest | ({'delta': {'prompt': delta['prompt']}} if PROMPT in model.components else {})
    return Weights(rest, self.layers, {
        stack: [layer.delta_weights(tree) for layer in model.layers[stack]] for stack in model.stacks})


class Stages:
  """The compiled programs of a model. They take the parameters from `Weights`.

  Attributes:
    model: whose they are.
    layers: by stack, its layers, with the place of each in the bundle.
  """

  def __init__(self, model: encoder_decoder.Model, form: str):
    """form: the name of the format of experts."""
    self.model, self._form = model, form
    self.layers = {stack: [(layer, place_of(layer)) for layer in model.layers[stack]] for stack in model.stacks}
    self.encoder_input, self.encoder_output = jax.jit(model.encoder_input), jax.jit(model.encoder_output)
    self.decoder_input, self.decoder_output = jax.jit(model.decoder_input), jax.jit(model.decoder_output)
    self._step_input = jax.jit(model.step_input)
    self._programs: dict[tuple[Any, ...], Any] = {}

  def of(self, model: encoder_decoder.Model) -> 'Stages':
    """Those of the same model with a delta."""
    return Stages(model, self._form)

  def _program(self, fn: Any, layer: Layer, *static: Any, donate: tuple[int, ...] = ()) -> Any:
    """A function of a layer, compiled; another layer of its kind has the same."""
    key = fn, layer.stack, layer.routed, static
    if key not in self._programs:
      self._programs[key] = jax.jit(functools.partial(fn, self.model, layer, *static), donate_argnums=donate)
    return self._programs[key]

  def step_input(self, rest: Params, cache: Any, tokens_BT: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, Context]:
    """`Model.step_input`."""
    return self._step_input(rest, cache | {'layers': cache['layers'][:1]}, tokens_BT, positions_BT)

  def before(self, layer: Layer, weights: Params, parts: list[Params], x_BTD: jax.Array, ctx: Context,
             cache: Any) -> tuple[Any, ...]:
    """`Layer.before`: (h, written, u [N, D], experts [N, K], their weights [N, K]). Of a layer without experts, all of it:
    (x, written)."""
    own = None if cache is None else {name: cache[name] for name in OWN}
    cross = None if cache is None else {name: leaf for name, leaf in cache.items() if name not in OWN}
    return self._program(_between, layer, donate=(4,))(weights, parts, x_BTD, ctx, own, cross)

  def guess(self, layer: Layer, weights: Params, x_BTD: jax.Array, ctx: Context) -> jax.Array:
    """The experts of `Layer.guess`, [G, T, K]."""
    return self._program(_guess, layer)(weights, x_BTD, ctx)

  def expert(self, layer: Layer, y_AD: jax.Array, u_ND: jax.Array, weights: Any, token_M: Any, place_M: Any) -> tuple[
      jax.Array, jax.Array]:
    """y with the outputs of an expert in their places, and what is there once the expert is computed; y is donated."""
    return self._program(_expert, layer, self._form, donate=(0,))(y_AD, u_ND, weights, token_M, place_M)

  def after(self, layer: Layer, weights: Params, parts: list[Params], *given: Any) -> jax.Array:
    """`Layer.after`, from (h, u, y, experts, their weights, context)."""
    return self._program(_after, layer)(weights, parts, *given)

  def cross_cache(self, layer: Layer, weights: Params, parts: list[Params], encoded_BSD: jax.Array, row: Any,
                  max_len: int) -> Any:
    """The cache of a decoder's layer before the first token; leaves are [1, B, ...]."""
    return self._program(_cross, layer, max_len)(weights, parts, encoded_BSD, row)
