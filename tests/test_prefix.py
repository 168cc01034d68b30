"""A prefix: keys and values of its own before those of each attention."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_step
import test_tuning
from flax import nnx

from t5x_cpm import inference, trees, tuning
from t5x_cpm.config import ConfigError, DeltaConfig
from t5x_cpm.models import encoder_decoder
from t5x_cpm.models.attention import Attention
from t5x_cpm.models.hooks import Hooks, Prefix
from t5x_cpm.training import train as training

base_dir = test_tuning.base_dir
P = 5
PREFIX = DeltaConfig(method='prefix', base='base', prefix_length=P)
SLOW = pytest.mark.slow
attention_with = Attention.__call__


def joined(self, x, keys_and_values, bias, mask, key=None, hook=lambda name, x, y: y, prefix=None):
  """The plain reference: the vectors are more keys and values, of which bias and mask are 0."""
  if prefix is not None:
    (B, H, _, K), P = keys_and_values[0].shape, prefix.keys.shape[1]
    before = [jnp.swapaxes(jnp.broadcast_to(one, (B, P, H * K)).reshape(B, P, H, K), 1, 2) for one in prefix[:2]]
    keys_and_values = [jnp.concatenate(pair, axis=2) for pair in zip(before, keys_and_values, strict=True)]
    mask = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(P, 0)])
    if prefix.mask is not None:
      mask = mask.at[..., :P].add(jnp.where(prefix.mask, 0, -1e9)[:, None, None])
    bias = None if bias is None else jnp.pad(bias, [(0, 0)] * (bias.ndim - 1) + [(P, 0)])
  return attention_with(self, x, keys_and_values, bias, mask, key, hook)


@functools.cache
def made(delta=PREFIX, **options):
  """A model, parameters whose delta is drawn, and a function for logits of a batch."""
  config = test_tuning.with_delta(delta=delta, **options)
  model = tuning.build_model(config)
  params = test_tuning.drawn(jax.jit(model.init)(jax.random.key(0)))
  return config, model, params, jax.jit(lambda params, batch: model.apply(params, batch)[0])


@pytest.mark.parametrize('delta, options', [
    (PREFIX, {}),
    pytest.param(dataclasses.replace(PREFIX, prefix_hidden=3), {'layer_loop': 'unroll', 'remat': 'full'}, marks=SLOW),
    pytest.param(dataclasses.replace(PREFIX, method='lora+prefix'), {'moe': test_tuning.EXPERTS}, marks=SLOW)],
    ids=['scan', 'network', 'experts'])
def test_it_is_keys_and_values_before_the_others_and_decodes_as_it_was_trained(delta, options, monkeypatch):
  config, model, params, apply = made(delta, **options)
  batch, T = test_step.random_batch(config, 0), config.task.decoder_length
  batch['encoder_segment_ids'][:, 9:] = 0  # padding
  expected, tokens = apply(params, batch), batch['decoder_input_tokens']
  prepared = model.prepare(params)
  cache, positions = jax.jit(model.start, static_argnums=2)(prepared, batch, T), np.broadcast_to(np.arange(T), tokens.shape)
  forward = jax.jit(model.step)
  for begin, end in ((0, 1), (1, T)):
    logits, cache = forward(prepared, cache, tokens[:, begin:end], positions[:, begin:end])
    np.testing.assert_allclose(logits, expected[:, begin:end], atol=1e-4)

  base = {name: tree for name, tree in params.items() if name != 'delta'}
  assert np.abs(expected - encoder_decoder.build(config.model).apply(base, batch)[0]).max() > 0.05
  monkeypatch.setattr(Attention, '__call__', joined)
  np.testing.assert_allclose(jax.jit(model.apply)(params, batch)[0], expected, atol=1e-4)


def test_each_place_may_be_left_out():
  config, _, params, apply = made()
  batch, found = test_step.random_batch(config, 0), []
  for place in config.delta.prefix_places:
    stack, part = place.split('.')
    model = tuning.build_model(dataclasses.replace(config, delta=dataclasses.replace(PREFIX, prefix_places=(place,))))
    leaves = trees.named(model.leaves()['delta'])
    assert list(leaves) == [f'{stack}/layers/{part}.{name}/prefix/vectors' for name in ('key', 'value')]
    assert sum(leaf.size for leaf in leaves.values()) == 2 * 2 * P * 16  # keys and values, layers, vectors, d_model
    # Whatever the vectors of a place are, they reach the logits.
    sites = {site: jax.tree.map(lambda x: 2 * x, tree) if site.startswith(part) else tree
             for site, tree in params['delta'][stack]['layers'].items()}
    other = params | {'delta': params['delta'] | {stack: {'layers': sites}}}
    found.append(float(jnp.abs(apply(other, batch) - apply(params, batch)).max()))
  print(found)
  assert len(set(found)) == len(found) and min(found) > 1e-3


def test_packed_rows_equal_those_that_stand_alone():
  config, _, params, apply = made()
  batch = test_step.random_batch(config, 0)
  cut = {'encoder': 5, 'decoder': 3}
  for side, at in cut.items():
    batch[f'{side}_segment_ids'][:, at:] = 2
  packed = apply(params, batch)
  for number in (1, 2):
    alone = dict(batch)
    for side, at in cut.items():
      size = at if number == 1 else batch[f'{side}_input_tokens'].shape[1] - at
      tokens, segments = (np.zeros_like(batch[f'{side}_input_tokens']) for _ in range(2))
      tokens[:, :size] = batch[f'{side}_input_tokens'][:, :at] if number == 1 else batch[f'{side}_input_tokens'][:, at:]
      segments[:, :size] = 1
      alone |= {f'{side}_input_tokens': tokens, f'{side}_segment_ids': segments}
    mine = packed[:, :cut['decoder']] if number == 1 else packed[:, cut['decoder']:]
    np.testing.assert_allclose(mine, apply(params, alone)[:, :mine.shape[1]], atol=1e-5)


@pytest.mark.parametrize('hidden', [3, pytest.param(0, marks=SLOW)])
def test_rows_may_have_prefixes_of_their_own(hidden):
  print('seed 0')
  rng = np.random.default_rng(0)
  method = tuning.METHODS['prefix'](dataclasses.replace(PREFIX, prefix_hidden=hidden))
  shapes = {'table': (3, P, hidden), 'projection': (3, hidden, 8)} if hidden else {'vectors': (3, P, 8)}
  weights = {site: {'prefix': {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}}
             for site in ('self.key', 'self.value')}
  slots = np.array([2, 0, 2, 1])
  found = Hooks(weights, jnp.asarray(slots), (('prefix', method),)).prefix('self')
  for one, site in zip(found[:2], ('self.key', 'self.value'), strict=True):
    tree = weights[site]['prefix']
    wanted = jnp.tanh(tree['table']) @ tree['projection'] if hidden else tree['vectors']
    np.testing.assert_allclose(one, wanted[slots], atol=1e-6)
  assert Hooks(weights, None, (('prefix', method),)).prefix('cross') is None
  assert Hooks(weights, None, (('prefix', method),)).prefix('self')[0].shape == (1, P, 8)

  # Attention with them is that of each row with its own.
  config = test_step.CONFIG.model
  module = Attention(dataclasses.replace(config, head_dim=4), 1, nnx.Rngs(params=0))
  x = jnp.asarray(rng.normal(size=(4, 6, config.d_model)), jnp.float32)
  mask, bias = jnp.zeros((1, 1, 6, 6)), jnp.asarray(rng.normal(size=(2, 6, 6)), jnp.float32)
  together = module(x, module.keys_and_values(x), bias, mask, prefix=found)
  for row in range(4):
    one = x[row:row + 1]
    alone = joined(module, one, module.keys_and_values(one), bias, mask, prefix=Prefix(*(part[row:row + 1] for part in found)))
    np.testing.assert_allclose(together[row], alone[0], atol=1e-5)


@pytest.mark.parametrize('fields, message', [
    ({'prefix_length': 0}, 'at least 1'), ({'prefix_hidden': -1}, 'at least 0'), ({'prefix_places': ()}, 'encoder.self'),
    ({'prefix_places': ('encoder.cross',)}, "('encoder.cross',): expected one or several different ones of encoder.self"),
    ({'prefix_places': ('decoder.self',) * 2}, 'different')])
def test_what_cannot_work_is_refused(fields, message):
  with pytest.raises(ConfigError, match=re.escape(message)):
    dataclasses.replace(PREFIX, **fields).validate()


@pytest.mark.slow
@pytest.mark.parametrize('hidden', [0, 8])
def test_it_learns(hidden):
  config = test_tuning.with_delta(delta=dataclasses.replace(PREFIX, prefix_hidden=hidden))
  built, frozen = test_tuning.frozen_step(config)
  state, batch, losses = built.init(jax.random.key(0), frozen), test_step.random_batch(config, 0), []
  for _ in range(100):
    state, metrics = built.fn(state, frozen, batch)
    losses.append(float(metrics['loss']))
  print(losses[0], losses[-1])
  assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
def test_a_run_of_a_prefix_answers_by_beams(base_dir, tmp_path):
  config = test_tuning.tuned(base_dir, delta=PREFIX, steps=2)
  config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=0.1))
  training.run(config, str(tmp_path / 'run'))
  engine = inference.load(tmp_path / 'run')
  requests = [engine.codec.request(text) for text in ('四', '五六')]
  beams = dataclasses.replace(engine.config.decode, rule='beam', beam_size=3, length_penalty=0.0, max_new_tokens=6)
  answers = engine.answer_requests(requests, beams)
  print(answers)
  sums, _ = engine.score_ids(requests, [answer.ids for answer in answers])
  np.testing.assert_allclose([answer.score for answer in answers], sums, rtol=1e-4)
  assert tuning.read(tmp_path / 'run').tensors['decoder/layers/cross.key/prefix/vectors'].shape == (2, P, 16)
