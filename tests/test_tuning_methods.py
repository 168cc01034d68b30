"""The methods of tuning that add to layers or scale what is in them, each against the formula of its paper."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_step
import test_tuning

from t5x_cpm import trees, tuning
from t5x_cpm.config import ConfigError, DeltaConfig
from t5x_cpm.models import encoder_decoder

METHODS = {
    'ia3': DeltaConfig(method='ia3'), 'bitfit': DeltaConfig(method='bitfit'),
    'adapter': DeltaConfig(method='adapter', bottleneck=3),
    'parallel': DeltaConfig(method='adapter', bottleneck=3, adapter='parallel')}


def scaled(params):
  """IA3 in the weights: the columns of keys, values and of the first matrices are what scales them."""
  flat = trees.named({name: tree for name, tree in params.items() if name != 'delta'})
  kernels = {'self.key': 'attention/key', 'self.value': 'attention/value', 'cross.key': 'cross_attention/key',
             'cross.value': 'cross_attention/value', 'mlp.hidden': 'wi_1'}
  for name, scale in trees.named(params['delta']).items():
    path, site = name.removesuffix('/ia3/scale').rsplit('/', 1)
    flat[f'{path}/{kernels[site]}'] = flat[f'{path}/{kernels[site]}'] * scale[:, 0, None, :]
  return trees.nested(flat)


@pytest.mark.parametrize('name', [
    'ia3', 'adapter', *(pytest.param(name, marks=pytest.mark.slow) for name in ('bitfit', 'parallel'))])
def test_it_is_nothing_at_first_and_decodes_as_it_was_trained(name):
  config = test_tuning.with_delta(delta=METHODS[name])
  model, plain = tuning.build_model(config), encoder_decoder.build(config.model)
  params, batch = jax.jit(model.init)(jax.random.key(0)), test_step.random_batch(config, 0)
  base = {part: tree for part, tree in params.items() if part != 'delta'}
  apply = jax.jit(lambda model, params: model.apply(params, batch)[0], static_argnums=0)
  np.testing.assert_array_equal(apply(model, params), apply(plain, base))

  changed, T = test_tuning.drawn(params), config.task.decoder_length
  expected = apply(model, changed)
  assert np.abs(expected - apply(plain, base)).max() > 0.05
  tokens = batch['decoder_input_tokens']
  cache = jax.jit(model.start, static_argnums=2)(changed, batch, T)
  logits, _ = jax.jit(model.step)(changed, cache, tokens, np.broadcast_to(np.arange(T), tokens.shape))
  np.testing.assert_allclose(logits, expected, atol=1e-4)
  if name == 'ia3':
    np.testing.assert_allclose(expected, apply(plain, scaled(changed)), atol=1e-4)


def test_rows_may_have_weights_of_their_own():
  """What `change` makes of a batch with weights for each row is what it makes of each row alone."""
  rng = np.random.default_rng(0)
  print('seed 0')
  x, y = (jnp.asarray(rng.normal(size=(4, 5, 6)), jnp.float32) for _ in range(2))
  given = {
      'ia3': {'scale': (6,)}, 'bitfit': {'bias': (6,)}, 'adapter': {'down': (6, 3), 'up': (3, 6)},
      'parallel': {'down': (6, 3), 'up': (3, 6)}, 'lora': {'a': (6, 2), 'b': (2, 6)}}
  for name, shapes in given.items():
    delta = METHODS.get(name, DeltaConfig(method='lora', rank=2, alpha=3.0))
    method = tuning.METHODS[delta.method](delta)
    weights = {key: jnp.asarray(rng.normal(size=(4, *shape)), jnp.float32) for key, shape in shapes.items()}
    together = method.change(weights, x, y)
    for row in range(4):
      one = method.change({key: leaf[row:row + 1] for key, leaf in weights.items()}, x[row:row + 1], y[row:row + 1])
      np.testing.assert_allclose(together[row], one[0], atol=1e-5)
    wanted = {
        'ia3': lambda w: y * w['scale'][:, None], 'bitfit': lambda w: y + w['bias'][:, None],
        'adapter': lambda w: y + jax.scipy.stats.norm.cdf(y @ w['down']) * (y @ w['down']) @ w['up'],
        'parallel': lambda w: y + jax.scipy.stats.norm.cdf(x @ w['down']) * (x @ w['down']) @ w['up'],
        'lora': lambda w: y + 1.5 * (x @ w['a'] @ w['b'])}[name](weights)  # gelu(x) = x P(z < x), of a normal z
    np.testing.assert_allclose(together, wanted, atol=1e-5)


def test_counts_of_cpm2():
  """A vector for each of the keys and values of 72 attentions and for the activations of 48 layers, and so on."""
  config = test_tuning.with_delta().model
  config = dataclasses.replace(config, vocab_size=64, d_model=4096, d_ff=10240, num_heads=64, head_dim=64,
                               num_encoder_layers=24, num_decoder_layers=24)
  counts = {}
  for name in ('prompt', 'prefix', 'lora', 'ia3', 'adapter', 'bitfit'):
    delta = DeltaConfig(method=name)
    model = tuning.build_model(dataclasses.replace(test_step.CONFIG, model=config, delta=delta))
    counts[name] = sum(leaf.size for leaf in jax.tree.leaves(model.leaves()['delta']))
  attentions, layers = 72, 48
  assert counts == {
      'prompt': 100 * 4096, 'prefix': attentions * 2 * 100 * 4096, 'lora': attentions * 2 * 8 * (4096 + 4096),
      'ia3': attentions * 2 * 4096 + layers * 10240,
      'adapter': (attentions + layers) * 24 * (4096 + 4096), 'bitfit': attentions * 4 * 4096 + layers * (2 * 10240 + 4096)}


def merged_experts(params, config):
  """The plain reference: the matrix of every expert with the product of its own two small ones added."""
  flat = trees.named(params)
  for name in [name for name in flat if name.endswith('/lora/a')]:
    path = name.removeprefix('delta/').removesuffix('/lora/a').replace('/experts.', '/')
    a, b = flat[name][:, 0], flat[name.removesuffix('a') + 'b'][:, 0]
    flat[path] = flat[path] + config.delta.alpha / config.delta.rank * jnp.einsum('LEIr,LErO->LEIO', a, b)
  return trees.nested({name: leaf for name, leaf in flat.items() if not name.startswith('delta/')})


@pytest.mark.parametrize('dispatch', ['dropless', pytest.param('einsum', marks=pytest.mark.slow)])
def test_lora_of_experts_equals_merged_weights(dispatch):
  """In a training pass, where `einsum` has a capacity."""
  moe = dataclasses.replace(test_tuning.EXPERTS, dispatch=dispatch, encoder_every=0, shared_experts=0)
  config = test_tuning.with_delta(delta=dataclasses.replace(test_tuning.LORA, sites=('experts',)), moe=moe)
  model, plain = tuning.build_model(config), encoder_decoder.build(config.model)
  params, batch = jax.jit(model.init)(jax.random.key(0)), test_step.random_batch(config, 0)
  leaves = {name: leaf.shape for name, leaf in trees.named(params['delta']).items()}
  assert leaves['experts/decoder/experts.wo/lora/a'] == (1, 1, 4, 32, 3) and len(leaves) == 6, leaves
  base, changed = {part: tree for part, tree in params.items() if part != 'delta'}, test_tuning.drawn(params)
  apply = jax.jit(lambda model, params: model.apply(params, batch, train=True)[0], static_argnums=0)
  expected = apply(plain, base)
  np.testing.assert_array_equal(apply(model, params), expected)
  found = apply(model, changed)
  assert np.abs(found - expected).max() > 0.1
  np.testing.assert_allclose(found, apply(plain, merged_experts(changed, config)), atol=1e-4)


def test_experts_must_be_named():
  config = test_tuning.with_delta(delta=dataclasses.replace(test_tuning.LORA, sites=('wo', '.*value')), moe=test_tuning.EXPERTS)
  assert not any('experts.' in name for name in trees.named(tuning.build_model(config).leaves()['delta']))
  with pytest.raises(ConfigError, match=r"'experts\.wo' names no place"):
    tuning.build_model(test_tuning.with_delta(delta=dataclasses.replace(test_tuning.LORA, sites=('experts.wo',))))
