"""The encoder-decoder Transformer: CPM-2, and by configuration alone T5 1.1, mT5, Switch and CPM-2-MoE."""

from typing import Any

import jax
import jax.numpy as jnp

from t5x_cpm.config import ModelConfig
from t5x_cpm.mesh import shard
from t5x_cpm.models import model, stacks
from t5x_cpm.models.attention import Cache, additive_mask, segment_mask
from t5x_cpm.models.component import Component, Params
from t5x_cpm.models.context import Context
from t5x_cpm.models.hooks import PROMPT, Delta, seen
from t5x_cpm.models.layers import Embedding, Head, at_least_float32, compute_dtype
from t5x_cpm.models.model import Experts, resident, row_of, stack_components, summary

Batch = dict[str, Any]

STACKS = ('encoder', 'decoder')
# The logical axes of what `start` returns. Every leaf below one of these names has the same.
CACHE_AXES = {'layers': (None, 'batch', 'heads', None, None), 'encoder_valid': (None, 'batch'), 'row': (None, 'batch')}


def components(config: ModelConfig) -> list[Component]:
  """The modules of the model, in the order in which their parameters are drawn."""
  found = [Component('token_embedder', lambda rngs: Embedding(config, rngs))]
  for stack in STACKS:
    found += stack_components(config, stack)
  if not config.tie_embeddings:
    found.append(Component('', lambda rngs: Head(config, rngs)))
  return found


class Model(model.Model):
  """An encoder and a decoder. See `model.Model` for parameters and single layers."""

  def __init__(self, config: ModelConfig, experts: Experts, delta: Delta | None = None):
    super().__init__(config, STACKS, components, experts, delta)

  # What stands before and after the layers.

  def _embed(self, params: Params, tokens_BT: jax.Array, ctx: Context) -> jax.Array:
    dtype, table = compute_dtype(self.config), self.module('token_embedder', params)
    if PROMPT in self.components:
      V, prompt_nPD = self.config.vocab_size, self.components[PROMPT].of(params)['table']
      number_BT = jnp.clip(tokens_BT - V, 0, prompt_nPD.shape[1] - 1)
      slots = ctx.row.get('delta')
      vectors_BTD = prompt_nPD[0 if slots is None else slots[:, None], number_BT].astype(dtype)
      x_BTD = jnp.where((tokens_BT >= V)[..., None], vectors_BTD, table(jnp.minimum(tokens_BT, V - 1), dtype))
    else:
      x_BTD = table(tokens_BT, dtype)
    return ctx.dropout(shard(x_BTD, 'batch', 'length', 'embed'), 'stack.input')

  def encoder_input(self, params: Params, batch: Batch, key: jax.Array | None = None, train: bool = False) -> tuple[
      jax.Array, Context]:
    """The input [B, S, D] of the encoder's first layer, and the context of its layers; arguments as in `apply`."""
    tokens = batch['encoder_input_tokens']
    segments = batch.get('encoder_segment_ids')
    segments = jnp.ones_like(tokens) if segments is None else segments
    S, wide = tokens.shape[1], at_least_float32(compute_dtype(self.config))
    ctx = Context(
        self_bias=self.module('encoder/relative_bias', params).sequence(S, S, wide),
        self_mask=additive_mask(seen(self.delta, tokens >= self.config.vocab_size, segment_mask(segments, segments)), wide),
        **self.context(tokens, segments != 0, row_of(batch), key, train))
    return self._embed(params, tokens, ctx), ctx

  def encoder_output(self, params: Params, x_BSD: jax.Array, ctx: Context) -> jax.Array:
    """What the decoder attends to, from the output of the encoder's last layer."""
    return ctx.dropout(self.module('encoder/final_norm', params)(x_BSD), 'stack.output')

  def decoder_input(self, params: Params, batch: Batch, encoded_BSD: jax.Array, key: jax.Array | None = None,
                    train: bool = False) -> tuple[jax.Array, Context]:
    """The input [B, T, D] of the decoder's first layer where all targets are known, and the context of its layers."""
    tokens, segments = batch['decoder_input_tokens'], batch['decoder_segment_ids']
    T, wide = tokens.shape[1], at_least_float32(encoded_BSD.dtype)
    ctx = Context(
        self_bias=self.module('decoder/relative_bias', params).sequence(T, T, wide),
        self_mask=additive_mask(segment_mask(segments, segments, causal=True), wide),
        cross_mask=additive_mask(segment_mask(segments, batch['encoder_segment_ids']), wide),
        encoded=encoded_BSD, **self.context(tokens, segments != 0, row_of(batch), key, train))
    return self._embed(params, tokens, ctx), ctx

  def step_input(self, params: Params, cache: Cache, tokens_BT: jax.Array, positions_BT: jax.Array) -> tuple[
      jax.Array, Context]:
    """As `decoder_input`, for tokens at given positions of each row over a cache."""
    wide = at_least_float32(compute_dtype(self.config))
    max_len = stacks.first(cache['layers'])['self_key'].shape[2]
    ctx = Context(
        self_bias=self.module('decoder/relative_bias', params).at(positions_BT, max_len, wide),
        self_mask=additive_mask(jnp.arange(max_len) <= positions_BT[:, None, :, None], wide),
        cross_mask=additive_mask(cache['encoder_valid'][0][:, None, None, :], wide),
        positions=positions_BT,
        **self.context(tokens_BT, jnp.ones(tokens_BT.shape, bool), {name: leaf[0] for name, leaf in cache['row'].items()}))
    return self._embed(params, tokens_BT, ctx), ctx

  def decoder_output(self, params: Params, x_BTD: jax.Array, ctx: Context) -> jax.Array:
    """Logits [B, T, V] in at least float32, from the output of the decoder's last layer."""
    return self.logits(params, ctx.dropout(self.module('decoder/final_norm', params)(x_BTD), 'stack.output'))

  def logits(self, params: Params, x_BTD: jax.Array) -> jax.Array:
    """The head: logits [B, T, V] in at least float32, from what the decoder's final norm gives."""
    wide = at_least_float32(x_BTD.dtype)
    if self.config.tie_embeddings:
      kernel = self.components['token_embedder'].of(params)['embedding'].T
      x_BTD = x_BTD * self.config.d_model**-0.5
    else:
      kernel = self.components[''].of(params)['lm_head']
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    logits = jnp.dot(x_ND, kernel.astype(x_BTD.dtype), preferred_element_type=wide)
    return shard(logits.reshape(*x_BTD.shape[:-1], -1), 'batch', 'length', 'vocab')

  # Whole passes.

  def apply(self, params: Params, batch: Batch, *, key: jax.Array | None = None, train: bool = False) -> tuple[
      jax.Array, dict, dict, dict]:
    """One pass with all targets known.

    Args:
      params: as from `init` or `prepare`.
      batch: encoder_input_tokens, encoder_segment_ids [B, S], decoder_input_tokens, decoder_segment_ids [B, T]; and each of
        config.row_features [B] that the batch has.
      key: of dropout and of random draws by routers; None: nothing is dropped or drawn.
      train: whether tokens are routed and balanced as in training.

    Returns:
      logits [B, T, V] in at least float32, and losses, metrics and updates of the layers with experts: see `model.summary`.
    """
    keys = (None, None) if key is None else (jax.random.fold_in(key, 0), jax.random.fold_in(key, 1))
    encoded_BSD, encoder = self._encode(params, batch, keys[0], train)
    x_BTD, ctx = self.decoder_input(params, batch, encoded_BSD, keys[1], train)
    x_BTD, _, decoder = self.run('decoder', params, x_BTD, ctx)
    return self.decoder_output(params, x_BTD, ctx), *summary({'encoder': encoder, 'decoder': decoder}, self.config)

  def _encode(self, params: Params, batch: Batch, key: jax.Array | None, train: bool) -> tuple[jax.Array, Any]:
    x_BSD, ctx = self.encoder_input(params, batch, key, train)
    x_BSD, _, about = self.run('encoder', params, x_BSD, ctx)
    return self.encoder_output(params, x_BSD, ctx), about

  def encode(self, params: Params, batch: Batch) -> jax.Array:
    """encoder_input_tokens [B, S] (and encoder_segment_ids, 0 for padding) -> [B, S, D]."""
    return self._encode(params, batch, None, False)[0]

  # Decoding protocol.

  def cross_cache(self, params: Params, encoded_BSD: jax.Array, row: dict[str, jax.Array], max_len: int) -> Any:
    """The cache of the decoder's layers before the first token: their own keys and values [B, H, max_len, K] are still 0."""
    one, axes = self.layers['decoder'][0], CACHE_AXES['layers'][1:]
    block = one.roles['block'][0].path
    parts = {path: self.components[path].of(params) for path in (block, f'delta/{block}') if path in self.components}

    def of_layer(given: Params) -> Cache:
      weights, *delta = given.values()
      keys, values = (shard(x, *axes) for x in one.cross_cache({'block': weights}, encoded_BSD, self.delta_of(delta, row)))
      B, H, _, K = keys.shape
      empty = shard(jnp.zeros((B, H, max_len, K), keys.dtype), *axes)
      return {'self_key': empty, 'self_value': empty, 'cross_key': keys, 'cross_value': values}

    caches = stacks.each(of_layer, stacks.side_by_side(parts))
    own = self.config.own_layers('decoder')
    return caches if own == len(self.layers['decoder']) else stacks.repeated(caches, len(self.layers['decoder']) // own)

  def start(self, params: Params, batch: Batch, max_len: int) -> Cache:
    """Encodes the batch and makes the cache of up to max_len decoder tokens; its leaves are [L, B, ...] or [1, B, ...]."""
    encoded = self.encode(params, batch)
    B, S, _ = encoded.shape
    segments = batch.get('encoder_segment_ids')
    valid = jnp.ones((B, S), bool) if segments is None else segments != 0
    row = row_of(batch)
    return {'layers': self.cross_cache(params, encoded, row, max_len), 'encoder_valid': valid[None],
            'row': {name: values_B[None] for name, values_B in row.items()}}

  def step(self, params: Params, cache: Cache, tokens_BT: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, Cache]:
    """Consumes tokens at the given positions of each row and returns the logits [B, T, V] after each of them."""
    x_BTD, ctx = self.step_input(params, cache, tokens_BT, positions_BT)
    x_BTD, written, _ = self.run('decoder', params, x_BTD, ctx, cache['layers'])
    old = cache['layers']
    layers = tuple(a | b for a, b in zip(old, written, strict=True)) if isinstance(old, tuple) else old | written
    return self.decoder_output(params, x_BTD, ctx), cache | {'layers': layers}


def build(config: ModelConfig, experts: Experts = resident, delta: Delta | None = None) -> Model:
  """The model of a configuration.

  Args:
    config: its hyperparameters.
    experts: how the feed-forward part of a layer is computed.
    delta: what acts on its layers, with parameters of its own.

  Raises:
    ConfigError: a hyperparameter or a router that cannot work.
  """
  return Model(config, experts, delta)
