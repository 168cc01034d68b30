"""The encoder-decoder Transformer: CPM-2, and by configuration alone T5 1.1 and mT5.

A layer is three methods of its block (`attend`, `route`, `combine`) and one injected function (`experts`). The weights of the
feed-forward part live in a tree of their own, params['experts'], so that a block can be rebuilt without them.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_cpm.config import ModelConfig
from t5x_cpm.mesh import shard
from t5x_cpm.models import stack
from t5x_cpm.models.attention import Attention, Cache, additive_mask, segment_mask, write
from t5x_cpm.models.layers import MLP, Embedding, RelativeBias, RMSNorm, at_least_float32, compute_dtype, dropout, normal

Params = dict[str, Any]
Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Context:
  """What every layer of a stack sees beside its own input."""

  self_bias: jax.Array  # relative positions, broadcastable to [B, H, T, S]
  self_mask: jax.Array  # additive
  cross_mask: Any = None  # additive; None in an encoder
  encoded: Any = None  # [B, S, D]; None when decoding, where the cache holds what is needed of it
  positions: Any = None  # [B, T] of the tokens of a decoding step
  dropout_rate: float = 0.0
  key: jax.Array | None = None  # of this layer; None outside training

  def key_of(self, site: int) -> jax.Array | None:
    return None if self.key is None else jax.random.fold_in(self.key, site)

  def dropout(self, x: jax.Array, site: int) -> jax.Array:
    return dropout(x, self.dropout_rate, self.key_of(site))


class Block(nnx.Module):
  """One layer without its feed-forward weights. Pre-norm: x + f(norm(x)) for each part."""

  def __init__(self, config: ModelConfig, num_layers: int, is_decoder: bool, rngs: nnx.Rngs):
    self.attention_norm = RMSNorm(config)
    self.attention = Attention(config, num_layers, rngs)
    if is_decoder:
      self.cross_attention_norm = RMSNorm(config)
      self.cross_attention = Attention(config, num_layers, rngs)
    self.mlp_norm = RMSNorm(config)
    self.is_decoder = is_decoder

  def attend(self, x_BTD: jax.Array, ctx: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
    """Self-attention, and in a decoder cross-attention; with a cache, this step's keys and values are written to it."""
    u = self.attention_norm(x_BTD)
    keys, values = self.attention.keys_and_values(u)
    if cache is not None:
      keys, values = write(cache['self_key'], keys, ctx.positions), write(cache['self_value'], values, ctx.positions)
      cache = cache | {'self_key': keys, 'self_value': values}
    y = self.attention(u, (keys, values), ctx.self_bias, ctx.self_mask, ctx.key_of(0))
    x_BTD = x_BTD + ctx.dropout(y, 1)
    if self.is_decoder:
      u = self.cross_attention_norm(x_BTD)
      if cache is None:
        keys, values = self.cross_attention.keys_and_values(ctx.encoded)
      else:
        keys, values = cache['cross_key'], cache['cross_value']
      y = self.cross_attention(u, (keys, values), None, ctx.cross_mask, ctx.key_of(2))
      x_BTD = x_BTD + ctx.dropout(y, 3)
    return x_BTD, cache

  def route(self, h_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, None]:
    """The input of the feed-forward part, and which expert each token goes to: None, there is one."""
    return self.mlp_norm(h_BTD), None

  def combine(self, h_BTD: jax.Array, y_BTD: jax.Array, routing: None, ctx: Context) -> jax.Array:
    """The layer's output from what went into the feed-forward part and what came out of it."""
    return h_BTD + ctx.dropout(y_BTD, 4)


def _stacked_layers(config: ModelConfig, num_layers: int, is_decoder: bool, rngs: nnx.Rngs) -> tuple[Block, MLP]:
  """The blocks and feed-forward networks of a stack; every parameter has a leading axis 'layers'."""

  @nnx.split_rngs(splits=num_layers)
  @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: 'layers'})
  def make(rngs: nnx.Rngs) -> tuple[Block, MLP]:
    return Block(config, num_layers, is_decoder, rngs), MLP(config, num_layers, rngs)

  return make(rngs)


class EncoderDecoder(nnx.Module):
  """All parameters of the model. Its state is the tree that steps, checkpoints and shardings see."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.token_embedder = Embedding(config, rngs)
    self.experts: Any = nnx.Dict()
    for name, num_layers in (('encoder', config.num_encoder_layers), ('decoder', config.num_decoder_layers)):
      layers, self.experts[name] = _stacked_layers(config, num_layers, name == 'decoder', rngs)
      bias = RelativeBias(config, name == 'encoder', rngs)
      setattr(self, name, nnx.Dict(relative_bias=bias, layers=layers, final_norm=RMSNorm(config)))
    if not config.tie_embeddings:
      std = config.init_std if config.initializer == 'cpm2' else config.d_model**-0.5
      self.lm_head = normal(rngs, (config.d_model, config.vocab_size), std, ('embed', 'vocab'), config)


def dense_experts(mlp: MLP, u: jax.Array, routing: None, ctx: Context) -> jax.Array:
  """Every token through the layer's one feed-forward network."""
  return mlp(u, ctx.dropout_rate, ctx.key_of(5))


class Model:
  """Pure functions of plain parameter trees for one configuration. Holds no array."""

  def __init__(self, config: ModelConfig, experts: Callable[..., jax.Array] = dense_experts):
    """experts(mlp, u, routing, context) -> y: how the feed-forward part of a layer is computed."""
    config.validate()
    self.config = config
    self.experts = experts

    def graph(make: Callable[[nnx.Rngs], Any]) -> Any:
      return nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(params=0))))[0]

    self._embedding = graph(lambda rngs: Embedding(config, rngs))
    self._norm = graph(lambda rngs: RMSNorm(config))
    self._mlp = graph(lambda rngs: MLP(config, 1, rngs))
    self._block = {
        'encoder': graph(lambda rngs: Block(config, 1, False, rngs)),
        'decoder': graph(lambda rngs: Block(config, 1, True, rngs))}
    self._bias = {
        'encoder': graph(lambda rngs: RelativeBias(config, True, rngs)),
        'decoder': graph(lambda rngs: RelativeBias(config, False, rngs))}

  def _make(self, key: jax.Array) -> EncoderDecoder:
    return EncoderDecoder(self.config, nnx.Rngs(params=key))

  # Parameters.

  def init(self, key: jax.Array) -> Params:
    """Fresh parameters: a nested dict of arrays."""
    return nnx.to_pure_dict(nnx.split(self._make(key))[1])

  def abstract(self) -> tuple[Params, Params]:
    """Shapes and dtypes, and logical axis names, of the parameters: two trees of one structure; takes no memory."""
    state = nnx.split(nnx.eval_shape(self._make, jax.random.key(0)))[1]
    names = jax.tree.map(
        lambda v: v.get_metadata('out_sharding'), state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    return nnx.to_pure_dict(state), nnx.to_pure_dict(names)

  def num_parameters(self) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.abstract()[0]))

  def prepare(self, params: Params) -> Params:
    """Parameters for many calls without gradient: cast once, and unstacked where layers are not scanned."""
    dtype = compute_dtype(self.config)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    if stack.loop(self.config) == 'scan':
      return params
    unstacked = {name: params[name] | {'layers': stack.unstack(params[name]['layers'])} for name in ('encoder', 'decoder')}
    return params | unstacked | {'experts': {name: stack.unstack(params['experts'][name]) for name in params['experts']}}

  # Forward passes.

  def _embed(self, params: Params, tokens_BT: jax.Array, ctx: Context) -> jax.Array:
    x_BTD = nnx.merge(self._embedding, params['token_embedder'])(tokens_BT, compute_dtype(self.config))
    return ctx.dropout(shard(x_BTD, 'batch', 'length', 'embed'), 0)

  def _run(self, name: str, params: Params, x_BTD: jax.Array, ctx: Context, cache: Any = None) -> tuple[jax.Array, Any]:
    """The layers of one stack and its final norm."""

    def layer(x: jax.Array, tree: Any, index: Any) -> tuple[jax.Array, Any]:
      block_params, mlp_params, layer_cache = tree
      block, mlp = nnx.merge(self._block[name], block_params), nnx.merge(self._mlp, mlp_params)
      own = ctx if ctx.key is None else dataclasses.replace(ctx, key=jax.random.fold_in(ctx.key, index))
      h, layer_cache = block.attend(x, own, layer_cache)
      u, routing = block.route(h, own)
      y = self.experts(mlp, u, routing, own)
      return shard(block.combine(h, y, routing, own), 'batch', 'length', 'embed'), layer_cache

    trees = (params[name]['layers'], params['experts'][name], cache)
    x_BTD, cache = stack.run(layer, x_BTD, trees, self.config, remat=ctx.positions is None)
    x_BTD = nnx.merge(self._norm, params[name]['final_norm'])(x_BTD)
    return ctx.dropout(x_BTD, 1), cache

  def _logits(self, params: Params, x_BTD: jax.Array) -> jax.Array:
    wide = at_least_float32(x_BTD.dtype)
    if self.config.tie_embeddings:
      kernel = params['token_embedder']['embedding'].T
      x_BTD = x_BTD * self.config.d_model**-0.5
    else:
      kernel = params['lm_head']
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    logits = jnp.dot(x_ND, kernel.astype(x_BTD.dtype), preferred_element_type=wide)
    return shard(logits.reshape(*x_BTD.shape[:-1], -1), 'batch', 'length', 'vocab')

  def _bias_of(self, name: str, params: Params) -> RelativeBias:
    return nnx.merge(self._bias[name], params[name]['relative_bias'])

  def encode(self, params: Params, batch: Batch, *, key: jax.Array | None = None) -> jax.Array:
    """encoder_input_tokens [B, S] (and encoder_segment_ids, 0 for padding) -> [B, S, D]."""
    tokens = batch['encoder_input_tokens']
    segments = batch.get('encoder_segment_ids')
    segments = jnp.ones_like(tokens) if segments is None else segments
    S, wide = tokens.shape[1], at_least_float32(compute_dtype(self.config))
    ctx = Context(
        self_bias=self._bias_of('encoder', params).sequence(S, S, wide),
        self_mask=additive_mask(segment_mask(segments, segments), wide),
        dropout_rate=self.config.dropout_rate, key=key)
    return self._run('encoder', params, self._embed(params, tokens, ctx), ctx)[0]

  def apply(self, params: Params, batch: Batch, *, key: jax.Array | None = None) -> tuple[jax.Array, dict, dict, dict]:
    """One pass with all targets known.

    Args:
      params: as from `init` or `prepare`.
      batch: encoder_input_tokens, encoder_segment_ids [B, S], decoder_input_tokens, decoder_segment_ids [B, T].
      key: of dropout; None outside training.

    Returns:
      logits [B, T, V] in at least float32, and the auxiliary losses, metrics and state updates of the layers.
    """
    keys = (None, None) if key is None else (jax.random.fold_in(key, 0), jax.random.fold_in(key, 1))
    encoded = self.encode(params, batch, key=keys[0])
    tokens, segments = batch['decoder_input_tokens'], batch['decoder_segment_ids']
    T, wide = tokens.shape[1], at_least_float32(encoded.dtype)
    ctx = Context(
        self_bias=self._bias_of('decoder', params).sequence(T, T, wide),
        self_mask=additive_mask(segment_mask(segments, segments, causal=True), wide),
        cross_mask=additive_mask(segment_mask(segments, batch['encoder_segment_ids']), wide),
        encoded=encoded, dropout_rate=self.config.dropout_rate, key=keys[1])
    x_BTD, _ = self._run('decoder', params, self._embed(params, tokens, ctx), ctx)
    return self._logits(params, x_BTD), {}, {}, {}

  # Decoding protocol.

  def start(self, params: Params, batch: Batch, max_len: int) -> tuple[Cache, jax.Array]:
    """Encodes the batch and makes the cache of up to max_len decoder tokens.

    Returns:
      The cache, leaves [L, B, ...], and the tokens [B, 0] that the decoder must consume first: none here.
    """
    encoded = self.encode(params, batch)
    B, S, _ = encoded.shape
    segments = batch.get('encoder_segment_ids')
    valid = jnp.ones((B, S), bool) if segments is None else segments != 0

    def layer_cache(block_params: Params) -> Cache:
      block = nnx.merge(self._block['decoder'], block_params)
      keys, values = block.cross_attention.keys_and_values(encoded)
      empty = jnp.zeros((B, keys.shape[1], max_len, keys.shape[3]), keys.dtype)
      return {'self_key': empty, 'self_value': empty, 'cross_key': keys, 'cross_value': values}

    layers = stack.each(layer_cache, params['decoder']['layers'])
    return {'layers': layers, 'encoder_valid': valid[None]}, jnp.zeros((B, 0), jnp.int32)

  def step(self, params: Params, cache: Cache, tokens_BT: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, Cache]:
    """Consumes tokens at the given positions of each row and returns the logits [B, T, V] after each of them."""
    wide = at_least_float32(compute_dtype(self.config))
    max_len = stack.first(cache['layers'])['self_key'].shape[2]
    ctx = Context(
        self_bias=self._bias_of('decoder', params).at(positions_BT, max_len, wide),
        self_mask=additive_mask(jnp.arange(max_len) <= positions_BT[:, None, :, None], wide),
        cross_mask=additive_mask(cache['encoder_valid'][0][:, None, None, :], wide),
        positions=positions_BT)
    x_BTD, layers = self._run('decoder', params, self._embed(params, tokens_BT, ctx), ctx, cache['layers'])
    return self._logits(params, x_BTD), cache | {'layers': layers}


def build(config: ModelConfig, experts: Callable[..., jax.Array] = dense_experts) -> Model:
  """The model of a configuration."""
  return Model(config, experts)
