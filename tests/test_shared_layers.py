"""Layers that share the parameters of one: the same function, gradients and caches as layers that are copies of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_layer
import test_step
import test_tuning

from t5x_cpm import trees, tuning
from t5x_cpm.checkpoints import huggingface
from t5x_cpm.compile import estimate, plan
from t5x_cpm.config import ConfigError, DeltaConfig, MoEConfig
from t5x_cpm.models import encoder_decoder

DENSE = test_layer.DENSE
EXPERTS = MoEConfig(num_experts=2, router='loss_free', top_k=1, encoder_every=0, decoder_every=2)


def unshared(params, like):
  """The same parameters for every layer, in the shapes of `like`."""
  return jax.tree.map(lambda leaf, old: jnp.tile(leaf, (old.shape[0] // leaf.shape[0], *[1] * (leaf.ndim - 1))), params, like)


def both(moe, loop, **fields):
  model, params = test_layer.make(moe, loop, share_layers=True, num_decoder_layers=2 * moe.decoder_every, dropout_rate=0.2,
                                  **fields)
  plain = encoder_decoder.build(dataclasses.replace(model.config, share_layers=False))
  return model, params, plain, unshared(params, plain.abstract()[0])


@pytest.mark.parametrize('moe, loop, remat', [
    (DENSE, 'scan', 'full'), pytest.param(DENSE, 'unroll', 'none', marks=pytest.mark.slow),
    pytest.param(EXPERTS, 'scan', 'none', marks=pytest.mark.slow)])
def test_shared_layers_are_layers_of_equal_parameters(moe, loop, remat):
  """Outputs, with the dropout of each layer its own; and the gradient is the sum of those of all layers."""
  model, params, plain, copies = both(moe, loop, remat=remat)
  given = test_layer.batch()

  def loss(model, params):
    logits, losses, *about = model.apply(params, given, key=jax.random.key(1), train=True)
    return jnp.square(logits).mean() + sum(losses.values(), 0.0), (logits, *about)

  run = jax.jit(jax.value_and_grad(loss, argnums=1, has_aux=True), static_argnums=0)
  ((_, ours), gradients), ((_, theirs), expected) = run(model, params), run(plain, copies)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)

  def summed(gradient, total):
    total = total.reshape(-1, *gradient.shape).sum(0) if total.shape != gradient.shape else total
    np.testing.assert_allclose(gradient, total, atol=1e-5 + 1e-4 * np.abs(total).max())

  jax.tree.map(summed, gradients, expected)
  if moe is EXPERTS:  # one router learns from the load of both layers
    load = ours[2]['decoder']
    assert load.shape[0] == 2
    bias = model.advance(params, {'decoder': load})['decoder']['routers']['bias']
    np.testing.assert_allclose(bias[0], moe.bias_rate * np.sign(load.sum(0).mean() - load.sum(0)), atol=1e-7)


@pytest.mark.parametrize('moe, loop', [(DENSE, 'unroll'), pytest.param(EXPERTS, 'scan', marks=pytest.mark.slow)])
def test_each_layer_has_a_cache_of_its_own(moe, loop):
  model, params, plain, copies = both(moe, loop)
  given = test_layer.batch()
  arguments = given['decoder_input_tokens'], jnp.broadcast_to(jnp.arange(test_layer.T), (test_layer.B, test_layer.T))

  def decode(model, params):
    params = model.prepare(params)
    cache = model.start(params, given, test_layer.T)
    return model.step(params, cache, *arguments)

  ours, theirs = (jax.jit(decode, static_argnums=0)(*pair) for pair in ((model, params), (plain, copies)))
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)
  layers = [jax.tree.map(lambda leaf: leaf.shape, one.weights(params)) for one in model.layers['decoder']]
  assert layers == [jax.tree.map(lambda leaf: leaf.shape, one.weights(copies)) for one in plain.layers['decoder']]


def test_parameters_are_those_of_one_layer_and_work_that_of_all():
  model, params, plain, _ = both(EXPERTS, 'scan')
  names = trees.named(params)
  assert names['decoder/layers/attention/query'].shape[0] == 2 and names['experts/decoder/wo'].shape[0] == 1
  assert model.num_active_parameters() < plain.num_active_parameters()
  assert plan.six_nd(model, (10, 10)) == plan.six_nd(plain, (10, 10))
  config = dataclasses.replace(test_step.CONFIG, model=model.config)
  held = estimate._held(estimate.sizes(model.config), config)
  whole = estimate._held(estimate.sizes(plain.config), dataclasses.replace(config, model=plain.config))
  assert held.local < held.passed and whole.local == whole.passed
  assert held.passed == pytest.approx(whole.passed, rel=0.1)  # one factor for both stacks


def test_transformers_has_no_such_model():
  with pytest.raises(ConfigError, match='share_layers = True'):
    huggingface.write_config(both(DENSE, 'scan')[0].config)


@pytest.mark.slow
def test_a_delta_is_shared_as_well():
  """One LoRA for all layers of a stack is the LoRA of each, in training and over a cache."""
  config = test_tuning.with_delta(delta=DeltaConfig(method='lora', rank=2))
  shared = dataclasses.replace(config, model=dataclasses.replace(config.model, share_layers=True))
  model, plain = tuning.build_model(shared), tuning.build_model(config)
  params = test_tuning.drawn(jax.jit(model.init)(jax.random.key(0)))
  copies = unshared(params, plain.abstract()[0])
  batch, T = test_step.random_batch(config, 0), config.task.decoder_length
  expected = jax.jit(plain.apply)(copies, batch)[0]
  np.testing.assert_allclose(jax.jit(model.apply)(params, batch)[0], expected, atol=1e-5)
  tokens = batch['decoder_input_tokens']
  cache = jax.jit(model.start, static_argnums=2)(params, batch, T)
  logits, _ = jax.jit(model.step)(params, cache, tokens, np.broadcast_to(np.arange(T), tokens.shape))
  np.testing.assert_allclose(logits, expected, atol=1e-4)
