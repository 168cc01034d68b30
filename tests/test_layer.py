"""A model layer by layer: a plain loop over both halves of each layer is the whole model, and a context passes through jit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_cpm.config import ModelConfig, MoEConfig
from t5x_cpm.models import encoder_decoder

B, S, T = 2, 6, 4
DENSE = MoEConfig()
EXPERTS = MoEConfig(num_experts=4, router='loss_free', encoder_every=2, decoder_every=2, shared_experts=1)


@functools.cache
def make(moe, loop='unroll', **fields):
  config = ModelConfig(**{
      'vocab_size': 40, 'd_model': 16, 'd_ff': 24, 'num_heads': 2, 'head_dim': 8, 'num_encoder_layers': 2, 'init_std': 0.3,
      'num_decoder_layers': 4, 'layer_loop': loop, 'moe': moe} | fields)
  model = encoder_decoder.build(config)
  return model, jax.jit(model.init)(jax.random.key(0))


def batch():
  rng = np.random.default_rng(0)
  tokens = {f'{name}_input_tokens': jnp.asarray(rng.integers(1, 40, (B, n)), jnp.int32)
            for name, n in (('encoder', S), ('decoder', T))}
  return tokens | {'encoder_segment_ids': jnp.ones((B, S), jnp.int32), 'decoder_segment_ids': jnp.ones((B, T), jnp.int32)}


def layer_by_layer(model, params, cache, tokens_BT, positions_BT, jit=lambda fn: fn):
  """`Model.step` as a plain loop: both halves of each layer, and the feed-forward part between them."""
  x, ctx = model.step_input(params, cache, tokens_BT, positions_BT)
  layers = []
  for one in model.layers['decoder']:
    weights, own = one.weights(params), ctx.at_layer(one.index)
    old = jax.tree.map(lambda leaf: leaf[one.index], cache['layers'])  # noqa: B023
    h, written, u, routing = jit(one.before)(weights, x, own, old)
    assert (routing is not None) == one.routed
    y = jit(one.experts)(weights, u, routing, own)
    x = jit(one.after)(weights, h, u, y, own)
    layers.append(old | written)
  return model.decoder_output(params, x, ctx), cache | {'layers': jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


# Half of the layers of EXPERTS are dense, so that the dense model may be small.
@pytest.mark.parametrize(
    'moe, fields', [(DENSE, {'num_encoder_layers': 1, 'num_decoder_layers': 2}), (EXPERTS, {})], ids=['dense', 'experts'])
def test_a_plain_loop_over_layers_decodes_like_the_model(moe, fields):
  """Bit for bit, every token's logits and the cache after them. With a program for each half, up to how XLA fuses them."""
  model, params = make(moe, **fields)
  given = batch()
  cache = jax.jit(model.start, static_argnums=2)(params, given, T)
  loop, step = jax.jit(functools.partial(layer_by_layer, model)), jax.jit(model.step)
  halves, _ = layer_by_layer(model, params, cache, given['decoder_input_tokens'][:, :1], jnp.zeros((B, 1), int), jit=jax.jit)
  mine, theirs = cache, cache
  for position in range(T):
    arguments = given['decoder_input_tokens'][:, position:position + 1], jnp.full((B, 1), position)
    ours, mine = loop(params, mine, *arguments)
    whole, theirs = step(params, theirs, *arguments)
    np.testing.assert_array_equal(ours, whole)
    jax.tree.map(np.testing.assert_array_equal, mine, theirs)
    if position == 0:
      np.testing.assert_allclose(halves, whole, atol=1e-5)


def test_the_table_of_layers_says_where_weights_lie():
  model, params = make(EXPERTS)
  table = [(one.routed, {role: (part.path, row) for role, (part, row) in one.roles.items()}) for one in model.layers['decoder']]
  assert table == [
      (False, {'block': ('decoder/layers', 0), 'experts': ('experts/decoder_dense', 0)}),
      (True, {'block': ('decoder/layers', 1), 'experts': ('experts/decoder', 0), 'router': ('decoder/routers', 0),
              'shared': ('experts/decoder_shared', 0)}),
      (False, {'block': ('decoder/layers', 2), 'experts': ('experts/decoder_dense', 1)}),
      (True, {'block': ('decoder/layers', 3), 'experts': ('experts/decoder', 1), 'router': ('decoder/routers', 1),
              'shared': ('experts/decoder_shared', 1)})]
  weights = model.layers['decoder'][3].weights(params)
  np.testing.assert_array_equal(weights['experts']['wo'], params['experts']['decoder']['wo'][1])
  prepared = model.prepare(params)  # unstacked
  jax.tree.map(np.testing.assert_array_equal, model.layers['decoder'][3].weights(prepared), weights)


def test_leaves_describe_the_parameters():
  model, params = make(EXPERTS)
  leaves = model.leaves()
  assert jax.tree.structure(leaves) == jax.tree.structure(params)
  for (path, array), leaf in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(leaves), strict=True):
    assert leaf.name == jax.tree_util.keystr(path, simple=True, separator='/')
    assert (leaf.shape, leaf.dtype, len(leaf.axes)) == (array.shape, array.dtype, array.ndim)
  stacked = {leaf.name: leaf.stacked for leaf in jax.tree.leaves(leaves)}
  assert stacked['experts/decoder/wo'] == ('layers', 'expert') and stacked['encoder/routers/kernel'] == ('layers',)
  assert stacked['lm_head'] == stacked['decoder/relative_bias/table'] == ()
  assert {leaf.name.split('/')[-1] for leaf in jax.tree.leaves(leaves) if not leaf.decays} == {'scale', 'table'}
  assert {leaf.name for leaf in jax.tree.leaves(leaves) if leaf.update == 'rule'} == {
      'encoder/routers/bias', 'decoder/routers/bias'}


def test_dropout_and_routing_are_apart():
  """With a key and without `train`, something is dropped, but tokens are routed as at inference; and the reverse."""
  moe = MoEConfig(num_experts=4, group_size=8, capacity_factor=0.5, encoder_every=0)
  model, params = make(moe, 'scan', dropout_rate=0.5)
  given = batch()

  def logits_and_left_behind(**how):
    logits, _, metrics, _ = jax.jit(lambda params: model.apply(params, given, **how))(params)
    return logits, float(metrics['decoder/left_behind'][0].sum())

  plain, _ = logits_and_left_behind()
  dropped, left = logits_and_left_behind(key=jax.random.key(1))
  assert left == 0 and not np.allclose(plain, dropped)
  assert logits_and_left_behind(train=True)[1] > 0


def test_scanned_and_unrolled_layers_are_the_same():
  (scanned, params), (unrolled, _) = make(EXPERTS, 'scan'), make(EXPERTS, 'unroll')
  a, b = (jax.jit(model.apply)(params, batch())[0] for model in (scanned, unrolled))
  np.testing.assert_allclose(a, b, atol=1e-5)
