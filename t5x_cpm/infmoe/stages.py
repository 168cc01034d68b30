"""The programs that a model with experts elsewhere is run by: one for each half of a layer, one for an expert, and the ends.

Layers of one stack differ in their weights alone, so that each program is compiled once for all of them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from t5x_cpm.infmoe.bundle import Place, place_of
from t5x_cpm.infmoe.formats import Format
from t5x_cpm.models import dispatch, encoder_decoder, stacks
from t5x_cpm.models.component import Params
from t5x_cpm.models.context import Context
from t5x_cpm.models.layer import Layer

OWN = ('self_key', 'self_value')  # what a step writes to the cache of a layer


def _between(layer: Layer, weights: Params, x_BTD: jax.Array, ctx: Context, own: Any, cross: Any) -> tuple[Any, ...]:
  """The first half, and what the host needs to know of the routing; leaves of caches are [1, B, ...]."""
  cache = None if own is None else {name: leaf[0] for name, leaf in (own | cross).items()}
  h_BTD, written, u_BTD, routing = layer.before(weights, x_BTD, ctx, cache)
  written = None if written is None else {name: leaf[None] for name, leaf in written.items()}
  if routing is None:
    y_BTD = layer.experts(weights, u_BTD, None, ctx)
    return layer.after(weights, h_BTD, u_BTD, y_BTD, ctx), written
  K = routing.expert_GTK.shape[-1]
  return h_BTD, written, u_BTD.reshape(-1, u_BTD.shape[-1]), routing.expert_GTK.reshape(-1, K), routing.weight_GTK.reshape(-1, K)


def _expert(layer: Layer, form: Format, y_AD: jax.Array, u_ND: jax.Array, weights: Any, token_M: jax.Array,
            place_M: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Puts tokens through an expert, and the results in their places; places beyond the end are those of no token.

  The second result is one number of them. What comes next takes the memory of the first, and cannot be waited for.
  """
  component = layer.roles['experts'][0]
  mlp = component({name: jnp.zeros((), u_ND.dtype) for name in component.leaves})
  out_MD = mlp(u_ND[token_M], product=lambda name, x, kernel: form.product(x, weights[name]))
  return y_AD.at[place_M].set(out_MD, mode='drop', unique_indices=True), out_MD[0, 0]


def _after(layer: Layer, weights: Params, h_BTD: jax.Array, u_ND: jax.Array, y_AD: jax.Array, expert_NK: jax.Array,
           weight_NK: jax.Array, ctx: Context) -> jax.Array:
  N, K = expert_NK.shape
  y_ND = dispatch.weighted(y_AD.reshape(N, K, -1), expert_NK, weight_NK, layer.config.moe.num_experts)
  return layer.after(weights, h_BTD, u_ND.reshape(h_BTD.shape), y_ND.reshape(h_BTD.shape), ctx)


def _cross(layer: Layer, max_len: int, weights: Params, encoded_BSD: jax.Array) -> Any:
  keys, values = layer.cross_cache(weights, encoded_BSD)
  B, H, _, K = keys.shape
  empty = jnp.zeros((1, B, H, max_len, K), keys.dtype)
  return {'self_key': empty, 'self_value': empty, 'cross_key': keys[None], 'cross_value': values[None]}


class Stages:
  """The compiled programs of a model, and the weights that they are given.

  Attributes:
    model: whose they are.
    layers: by stack, its layers, with the place of each in the bundle.
  """

  def __init__(self, model: encoder_decoder.Model, form: Format, rest: Params, weights: dict[Place, Params]):
    """Args:
      model: of the bundle.
      form: how experts are stored.
      rest: the parameters that belong to no layer.
      weights: by place, those of its layers but for experts, by role.
    """
    self.model, self._rest, self._weights = model, rest, weights
    self.layers = {stack: [(layer, place_of(layer)) for layer in model.layers[stack]] for stack in model.stacks}
    self._encoder_input, self._encoder_output = jax.jit(model.encoder_input), jax.jit(model.encoder_output)
    self._decoder_input, self._decoder_output = jax.jit(model.decoder_input), jax.jit(model.decoder_output)
    self._step_input = jax.jit(model.step_input)
    self._programs: dict[tuple[Any, ...], Any] = {}
    self._form = form

  def _program(self, fn: Any, layer: Layer, *static: Any, donate: tuple[int, ...] = ()) -> Any:
    """A function of a layer, compiled; another layer of its kind has the same."""
    key = fn, layer.stack, layer.routed, static
    if key not in self._programs:
      self._programs[key] = jax.jit(functools.partial(fn, layer, *static), donate_argnums=donate)
    return self._programs[key]

  # The ends.

  def encoder_input(self, batch: Any) -> tuple[jax.Array, Context]:
    return self._encoder_input(self._rest, batch)

  def encoder_output(self, x_BSD: jax.Array, ctx: Context) -> jax.Array:
    return self._encoder_output(self._rest, x_BSD, ctx)

  def decoder_input(self, batch: Any, encoded_BSD: jax.Array) -> tuple[jax.Array, Context]:
    return self._decoder_input(self._rest, batch, encoded_BSD)

  def decoder_output(self, x_BTD: jax.Array, ctx: Context) -> jax.Array:
    return self._decoder_output(self._rest, x_BTD, ctx)

  def step_input(self, cache: Any, tokens_BT: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, Context]:
    return self._step_input(self._rest, cache | {'layers': cache['layers'][:1]}, tokens_BT, positions_BT)

  # The parts of a layer.

  def before(self, layer: Layer, place: Place, x_BTD: jax.Array, ctx: Context, cache: Any) -> tuple[Any, ...]:
    """`Layer.before`; of a layer without experts, all of it: (x, written)."""
    own = None if cache is None else {name: cache[name] for name in OWN}
    cross = None if cache is None else {name: leaf for name, leaf in cache.items() if name not in OWN}
    return self._program(_between, layer, donate=(3,))(self._weights[place], x_BTD, ctx, own, cross)

  def expert(self, layer: Layer, y_AD: jax.Array, u_ND: jax.Array, weights: Any, token_M: Any, place_M: Any) -> tuple[
      jax.Array, jax.Array]:
    """y with the outputs of an expert in their places, and what is there once the expert is computed; y is donated."""
    return self._program(_expert, layer, self._form, donate=(0,))(y_AD, u_ND, weights, token_M, place_M)

  def after(self, layer: Layer, place: Place, *given: Any) -> jax.Array:
    return self._program(_after, layer)(self._weights[place], *given)

  def cross_cache(self, layer: Layer, place: Place, encoded_BSD: jax.Array, max_len: int) -> Any:
    """The cache of a decoder's layer before the first token; leaves are [1, B, ...]."""
    return self._program(_cross, layer, max_len)(self._weights[place], encoded_BSD)

  def valid(self, batch: Any) -> jax.Array:
    """Which tokens of the encoder are none of padding, [1, B, S]."""
    tokens = batch['encoder_input_tokens']
    segments = batch.get('encoder_segment_ids')
    return jnp.ones((1, *tokens.shape), bool) if segments is None else jnp.asarray(segments != 0)[None]


def first_of(cache: Any) -> Any:
  """The cache of the first layer."""
  return stacks.first(cache['layers'])
