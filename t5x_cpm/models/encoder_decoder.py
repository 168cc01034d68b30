"""The encoder-decoder Transformer: CPM-2, and by configuration alone T5 1.1 and mT5.

A layer is three methods of its block (`attend`, `route`, `combine`) and one injected function (`experts`). The weights of the
feed-forward part live in a tree of their own, params['experts'], so that a block can be rebuilt without them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_cpm.config import ConfigError, ModelConfig
from t5x_cpm.config.row_features import ROW_FEATURES
from t5x_cpm.mesh import shard
from t5x_cpm.models import moe, stack
from t5x_cpm.models import routing as routing_lib
from t5x_cpm.models.attention import Cache, additive_mask, segment_mask
from t5x_cpm.models.block import Block, Context
from t5x_cpm.models.layers import MLP, Embedding, RelativeBias, RMSNorm, at_least_float32, compute_dtype, dropout, normal
from t5x_cpm.models.leaf import Leaf
from t5x_cpm.models.routing import Router, Routing

Params = dict[str, Any]
Batch = dict[str, Any]


STACKS = ('encoder', 'decoder')
CACHE_AXES = ('batch', 'heads', None, None)  # of one layer's keys and values


def _row(batch: Batch) -> dict[str, jax.Array]:
  """What the rows of a batch carry beside tokens, [B] by name."""
  return {name: batch[name] for name in ROW_FEATURES if name in batch}


def _stacked(count: int, name: str, make: Callable[[nnx.Rngs], Any], rngs: nnx.Rngs) -> Any:
  """`count` modules as one, whose parameters have a leading axis of that name."""

  @nnx.split_rngs(splits=count)
  @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: name})
  def stack(rngs: nnx.Rngs) -> Any:
    return make(rngs)

  return stack(rngs)


class EncoderDecoder(nnx.Module):
  """All parameters of the model. Its state is the tree that steps, checkpoints and shardings see."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.token_embedder = Embedding(config, rngs)
    self.experts: Any = nnx.Dict()
    for name in STACKS:
      num_layers, is_decoder, every = config.num_layers(name), name == 'decoder', config.moe.every(name)
      routed = num_layers // every if every else 0  # layers with experts

      def mlp(rngs: nnx.Rngs, num_layers: int = num_layers, width: int = 1) -> MLP:
        return MLP(config, num_layers, rngs, width)

      def experts(rngs: nnx.Rngs, mlp: Callable[[nnx.Rngs], MLP] = mlp) -> MLP:
        return _stacked(config.moe.num_experts, 'expert', mlp, rngs)

      def block(rngs: nnx.Rngs, num_layers: int = num_layers, is_decoder: bool = is_decoder) -> Block:
        return Block(config, num_layers, is_decoder, rngs)

      stack = nnx.Dict(layers=_stacked(num_layers, 'layers', block, rngs))
      self.experts[name] = _stacked(routed or num_layers, 'layers', experts if routed else mlp, rngs)
      if routed and routed < num_layers:
        self.experts[f'{name}_dense'] = _stacked(num_layers - routed, 'layers', mlp, rngs)
      if routed and config.moe.shared_experts:
        self.experts[f'{name}_shared'] = _stacked(
            routed, 'layers', functools.partial(mlp, width=config.moe.shared_experts), rngs)
      kind = config.moe.of(name)
      if routed and routing_lib.has_parameters(kind):
        stack.routers = _stacked(routed, 'layers', functools.partial(Router, config, kind), rngs)
      stack.relative_bias = RelativeBias(config, name == 'encoder', rngs)
      stack.final_norm = RMSNorm(config)
      setattr(self, name, stack)
    if not config.tie_embeddings:
      std = config.init_std if config.initializer == 'cpm2' else config.d_model**-0.5
      self.lm_head = normal(rngs, (config.d_model, config.vocab_size), std, ('embed', 'vocab'), config)


def feed_forward(mlp: MLP, u_BTD: jax.Array, routing: Routing | None, ctx: Context) -> jax.Array:
  """Every token through the layer's one feed-forward network, or through the experts it was sent to."""
  if routing is None:
    return mlp(u_BTD, lambda hidden: dropout(hidden, ctx.dropout_rate, ctx.key_of(5)))
  u_GTD = u_BTD.reshape(*routing.expert_GTK.shape[:2], -1)
  return moe.dispatch(mlp, u_GTD, routing, ctx.expert_dropout_rate, ctx.key_of(5)).reshape(u_BTD.shape)


class Model:
  """Pure functions of plain parameter trees for one configuration. Holds no array."""

  def __init__(self, config: ModelConfig, experts: Callable[..., jax.Array] = feed_forward):
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
        (name, routed): graph(lambda rngs: Block(config, 1, name == 'decoder', rngs, routed))  # noqa: B023
        for name in STACKS for routed in ((False, True) if config.moe.every(name) else (False,))}
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
    names = self._of_variables(lambda variable: variable.get_metadata('out_sharding'))
    return nnx.to_pure_dict(self._abstract_state), names

  @functools.cached_property
  def _abstract_state(self) -> Any:
    return nnx.split(nnx.eval_shape(self._make, jax.random.key(0)))[1]

  def _of_variables(self, fn: Callable[[nnx.Variable], Any]) -> Params:
    """fn of every parameter's variable, as a tree like the parameters."""
    return nnx.to_pure_dict(jax.tree.map(fn, self._abstract_state, is_leaf=lambda v: isinstance(v, nnx.Variable)))

  def leaves(self) -> Params:
    """The description of every parameter: a tree of Leaf like that of the parameters; takes no memory."""
    update = {nnx.Param: 'gradient', routing_lib.Frozen: 'fixed', routing_lib.State: 'rule'}

    def describe(path: Any, variable: nnx.Variable) -> Leaf:
      names = tuple(str(key.key) for key in path)
      stack = next((name for name in STACKS if any(part.startswith(name) for part in names[:2])), '')
      value = variable.get_value()
      return Leaf('/'.join(names), value.shape, value.dtype, variable.get_metadata('out_sharding'), stack,
                  update[type(variable)], variable.get_metadata('decays', True))

    return nnx.to_pure_dict(jax.tree_util.tree_map_with_path(
        describe, self._abstract_state, is_leaf=lambda v: isinstance(v, nnx.Variable)))

  def labels(self) -> Params:
    """'train', 'frozen' or 'state' (changed by `advance`) for every parameter: gradients and the optimizer see only 'train'."""
    label = {'gradient': 'train', 'fixed': 'frozen', 'rule': 'state'}
    return jax.tree.map(lambda leaf: label[leaf.update], self.leaves())

  def num_parameters(self) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.abstract()[0]))

  def num_active_parameters(self) -> int:
    """Parameters that one token of each stack uses: of a layer's experts, those it is sent to, on average."""
    shapes = self.abstract()[0]['experts']
    idle = 0.0
    for name in STACKS:
      if self.config.moe.every(name):
        share = self.config.moe.experts_of_token(self.config.moe.of(name)) / self.config.moe.num_experts
        idle += (1 - share) * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes[name]))
    return self.num_parameters() - round(idle)

  def prepare(self, params: Params) -> Params:
    """Parameters for many calls without gradient: cast once (but for routers), and unstacked where layers are not scanned."""
    dtype = compute_dtype(self.config)
    routers = {name: params[name]['routers'] for name in STACKS if 'routers' in params[name]}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    params |= {name: params[name] | {'routers': router} for name, router in routers.items()}
    if stack.loop(self.config) == 'scan':
      return params
    unstacked = {
        name: params[name] | {part: stack.unstack(params[name][part]) for part in ('layers', 'routers') if part in params[name]}
        for name in STACKS}
    return params | unstacked | {'experts': {name: stack.unstack(tree) for name, tree in params['experts'].items()}}

  def group_rows(self, B: int, S: int, T: int) -> int:
    """How many rows of a training batch, B encoder rows of S and decoder rows of T tokens, are routed together.

    Raises:
      ConfigError: a capacity of less than one token, or a length whose equal parts are all far shorter than a group.
    """
    config, together = self.config.moe, 1
    for name, length in zip(STACKS, (S, T)):
      if config.every(name):
        rows, parts = moe.rows_together(B, length, config.group_size)
        fewest = -(-length // config.group_size)
        if parts >= 4 * fewest:  # the balance of a group of a few tokens is none
          raise ConfigError(
              f'TaskConfig.{name}_length = {length}: its equal parts of at most MoEConfig.group_size = {config.group_size} '
              f'tokens have {length // parts}, too few to be balanced over experts. Take a length such as '
              f'{length // fewest * fewest}, or another group_size.')
        if routing_lib.has_capacity(config, config.of(name)):
          config.capacity(config.of(name), rows * length // parts)
        together = math.lcm(together, rows)
    return together

  # Forward passes.

  def _embed(self, params: Params, tokens_BT: jax.Array, ctx: Context) -> jax.Array:
    x_BTD = nnx.merge(self._embedding, params['token_embedder'])(tokens_BT, compute_dtype(self.config))
    return ctx.dropout(shard(x_BTD, 'batch', 'length', 'embed'), 0)

  def _run(self, name: str, params: Params, x_BTD: jax.Array, ctx: Context, cache: Any = None) -> tuple[jax.Array, Any, Any]:
    """The layers of one stack and its final norm: the output, the cache, and losses and metrics stacked over routed layers."""
    every = self.config.moe.every(name)
    num_layers = self.config.num_layers(name)
    period = every or 1  # layers, of which the last has experts

    def layer(x: jax.Array, parts: stack.Parts, within: int, index: Any) -> tuple[jax.Array, Any, dict]:
      routed = bool(every) and within == period - 1
      block_params = parts['layers'][within]
      if routed and 'routers' in parts:
        block_params = block_params | {'router': parts['routers'][0]}
      block = nnx.merge(self._block[name, routed], block_params)
      mlp = nnx.merge(self._mlp, parts['dense' if every and not routed else 'experts'][0 if routed else within])
      own = ctx if ctx.key is None else dataclasses.replace(ctx, key=jax.random.fold_in(ctx.key, index))
      h, layer_cache = block.attend(x, own, parts['cache'][within] if 'cache' in parts else None)
      u, routing = block.route(h, own)
      y = self.experts(mlp, u, routing, own)
      about: dict = {}
      if routing is not None:
        if 'shared' in parts:
          y = y + feed_forward(nnx.merge(self._mlp, parts['shared'][0]), u, None, own)
        about = {'losses': routing.losses, 'metrics': routing.metrics | {'left_behind': moe.left_behind(routing, own.valid)}}
      return shard(block.combine(h, y, routing, own), 'batch', 'length', 'embed'), layer_cache, about

    def fn(x: jax.Array, parts: stack.Parts, index: Any) -> tuple[jax.Array, stack.Parts]:
      outs: stack.Parts = {'about': []}
      for within in range(period):
        x, layer_cache, about = layer(x, parts, within, index * period + within)
        if cache is not None:
          outs.setdefault('cache', []).append(layer_cache)
      return x, outs | {'about': [about]}

    experts = params['experts']
    trees = {'layers': params[name]['layers'], 'routers': params[name].get('routers'), 'cache': cache, 'experts': experts[name],
             'dense': experts.get(f'{name}_dense'), 'shared': experts.get(f'{name}_shared')}
    trees = {part: tree for part, tree in trees.items() if tree is not None}
    x_BTD, outs = stack.run(fn, x_BTD, trees, num_layers // period, self.config, remat=ctx.positions is None)
    x_BTD = nnx.merge(self._norm, params[name]['final_norm'])(x_BTD)
    return ctx.dropout(x_BTD, 1), outs.get('cache'), stack.stacked(outs['about'])

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

  def encode(self, params: Params, batch: Batch) -> jax.Array:
    """encoder_input_tokens [B, S] (and encoder_segment_ids, 0 for padding) -> [B, S, D]."""
    return self._encode(params, batch, None)[0]

  def _encode(self, params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Any]:
    tokens = batch['encoder_input_tokens']
    segments = batch.get('encoder_segment_ids')
    segments = jnp.ones_like(tokens) if segments is None else segments
    S, wide = tokens.shape[1], at_least_float32(compute_dtype(self.config))
    ctx = Context(
        self_bias=self._bias_of('encoder', params).sequence(S, S, wide),
        self_mask=additive_mask(segment_mask(segments, segments), wide),
        **self._of_layers(key, tokens, segments != 0, _row(batch)))
    x_BSD, _, about = self._run('encoder', params, self._embed(params, tokens, ctx), ctx)
    return x_BSD, about

  def _of_layers(self, key: Any, ids: jax.Array, valid: jax.Array, row: dict[str, jax.Array]) -> dict[str, Any]:
    """Fields of Context that dropout and routers read."""
    return {'key': key, 'dropout_rate': self.config.dropout_rate, 'expert_dropout': self.config.moe.expert_dropout,
            'ids': ids, 'valid': valid,
            'row': {name: jnp.broadcast_to(value[:, None], ids.shape) for name, value in row.items()}}

  def apply(self, params: Params, batch: Batch, *, key: jax.Array | None = None) -> tuple[jax.Array, dict, dict, dict]:
    """One pass with all targets known.

    Args:
      params: as from `init` or `prepare`.
      batch: encoder_input_tokens, encoder_segment_ids [B, S], decoder_input_tokens, decoder_segment_ids [B, T]; and
        [B] what config.row_features names of a row.
      key: of dropout and routers; None outside training.

    Returns:
      logits [B, T, V] in at least float32; auxiliary losses, already weighted, means over the layers with experts; metrics of
      these layers, pairs (sum, weight) [L, ...] by 'encoder/...' and 'decoder/...'; and what `advance` wants, sums that
      add up over the parts of a batch.
    """
    keys = (None, None) if key is None else (jax.random.fold_in(key, 0), jax.random.fold_in(key, 1))
    encoded, about_encoder = self._encode(params, batch, keys[0])
    tokens, segments = batch['decoder_input_tokens'], batch['decoder_segment_ids']
    T, wide = tokens.shape[1], at_least_float32(encoded.dtype)
    ctx = Context(
        self_bias=self._bias_of('decoder', params).sequence(T, T, wide),
        self_mask=additive_mask(segment_mask(segments, segments, causal=True), wide),
        cross_mask=additive_mask(segment_mask(segments, batch['encoder_segment_ids']), wide),
        encoded=encoded, **self._of_layers(keys[1], tokens, segments != 0, _row(batch)))
    x_BTD, _, about_decoder = self._run('decoder', params, self._embed(params, tokens, ctx), ctx)
    abouts = {name: about for name, about in zip(STACKS, (about_encoder, about_decoder)) if about}
    losses: dict[str, jax.Array] = {}
    for name, values_L in [item for about in abouts.values() for item in about['losses'].items()]:
      losses[name] = losses.get(name, 0.0) + values_L.sum() / self._routed_layers
    metrics = {f'{stack}/{name}': pair for stack, about in abouts.items() for name, pair in about['metrics'].items()}
    updates = {name: about['metrics']['load'][0] for name, about in abouts.items() if self.config.moe.of(name) == 'loss_free'}
    return self._logits(params, x_BTD), losses, metrics, updates

  @property
  def _routed_layers(self) -> int:
    moe_config = self.config.moe
    return sum(self.config.num_layers(name) // moe_config.every(name) for name in STACKS if moe_config.every(name))

  def advance(self, params: Params, updates: dict[str, jax.Array]) -> Params:
    """Parameters after a step, where a rule of their own changes them: the biases of router 'loss_free'."""
    for name, load_LE in updates.items():
      routers = params[name]['routers']
      bias_LE = routing_lib.next_bias(routers['bias'], load_LE, self.config.moe.bias_rate)
      params = params | {name: params[name] | {'routers': routers | {'bias': bias_LE}}}
    return params

  # Decoding protocol.

  def start(self, params: Params, batch: Batch, max_len: int) -> Cache:
    """Encodes the batch and makes the cache of up to max_len decoder tokens; its leaves are [L, B, ...] or [1, B, ...]."""
    encoded = self.encode(params, batch)
    B, S, _ = encoded.shape
    segments = batch.get('encoder_segment_ids')
    valid = jnp.ones((B, S), bool) if segments is None else segments != 0

    def layer_cache(block_params: Params) -> Cache:
      block = nnx.merge(self._block['decoder', False], block_params)
      keys, values = (shard(x, *CACHE_AXES) for x in block.cross_attention.keys_and_values(encoded))
      empty = shard(jnp.zeros((B, keys.shape[1], max_len, keys.shape[3]), keys.dtype), *CACHE_AXES)
      return {'self_key': empty, 'self_value': empty, 'cross_key': keys, 'cross_value': values}

    layers = stack.each(layer_cache, params['decoder']['layers'])
    return {'layers': layers, 'encoder_valid': valid[None], 'row': {name: value[None] for name, value in _row(batch).items()}}

  def step(self, params: Params, cache: Cache, tokens_BT: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, Cache]:
    """Consumes tokens at the given positions of each row and returns the logits [B, T, V] after each of them."""
    wide = at_least_float32(compute_dtype(self.config))
    max_len = stack.first(cache['layers'])['self_key'].shape[2]
    row = {name: value[0] for name, value in cache['row'].items()}
    ctx = Context(
        self_bias=self._bias_of('decoder', params).at(positions_BT, max_len, wide),
        self_mask=additive_mask(jnp.arange(max_len) <= positions_BT[:, None, :, None], wide),
        cross_mask=additive_mask(cache['encoder_valid'][0][:, None, None, :], wide),
        positions=positions_BT, **self._of_layers(None, tokens_BT, jnp.ones(tokens_BT.shape, bool), row))
    x_BTD, layers, _ = self._run('decoder', params, self._embed(params, tokens_BT, ctx), ctx, cache['layers'])
    old = cache['layers']
    layers = tuple(a | b for a, b in zip(old, layers, strict=True)) if isinstance(old, tuple) else old | layers
    return self._logits(params, x_BTD), cache | {'layers': layers}


def build(config: ModelConfig, experts: Callable[..., jax.Array] = feed_forward) -> Model:
  """The model of a configuration."""
  return Model(config, experts)
