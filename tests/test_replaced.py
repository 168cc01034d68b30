"""Parameters that a delta trains as its own: some of the model's as a whole, of others the rows of a few tokens."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_step
import test_tuning
from test_tuning import LORA, tuned

from t5x_cpm import inference, trees, tuning
from t5x_cpm.config import ConfigError, OptimizerConfig
from t5x_cpm.models import encoder_decoder
from t5x_cpm.training import train as training
from t5x_cpm.tuning import merge

base_dir = test_tuning.base_dir
OWN = dataclasses.replace(LORA, modules_to_save=('final_norm', 'cross_attention.key'), token_ids=(7, 3))


def replaced(params, ids):
  """The plain reference: the parameters of the base with those of the delta put in."""
  flat, own = trees.named({name: tree for name, tree in params.items() if name != 'delta'}), trees.named(params['delta'])
  for name, value in own.items():
    part, _, path = name.partition('/')
    if part == 'whole':
      flat[path] = value[0]
    elif part == 'rows':
      axis = 0 if path.startswith('token_embedder') else 1
      for number, row in enumerate(ids):
        old = np.moveaxis(np.array(flat[path]), axis, 0)
        old[row] = np.moveaxis(np.array(value[0]), axis, 0)[number]
        flat[path] = np.moveaxis(old, 0, axis)
  return trees.nested(flat)


@pytest.mark.parametrize('options', [
    {'layer_loop': 'scan'}, pytest.param({'layer_loop': 'unroll', 'tie_embeddings': True}, marks=pytest.mark.slow),
    pytest.param({'moe': test_tuning.EXPERTS}, marks=pytest.mark.slow)], ids=['scan', 'tied', 'experts'])
def test_a_model_computes_with_what_the_delta_has_in_their_place(options):
  config = test_tuning.with_delta(delta=OWN, **options)
  model, plain, T = tuning.build_model(config), encoder_decoder.build(config.model), config.task.decoder_length
  params = test_tuning.drawn(jax.jit(model.init)(jax.random.key(0)))
  found = {name for name in trees.named(params['delta']) if name.startswith(('whole', 'rows'))}
  tokens = {'rows/token_embedder/embedding'} | (set() if config.model.tie_embeddings else {'rows/lm_head'})
  assert found == tokens | {'whole/decoder/final_norm/scale', 'whole/encoder/final_norm/scale',
                            'whole/decoder/layers/cross_attention/key'}
  lora = {site: tree for site, tree in params['delta'].items() if site not in ('whole', 'rows')}
  expected = jax.jit(plain.apply)(test_tuning.merged(replaced(params, OWN.token_ids) | {'delta': lora}, config),
                                  batch := test_step.random_batch(config, 0))[0]
  np.testing.assert_allclose(jax.jit(model.apply)(params, batch)[0], expected, atol=1e-4)

  prepared, inputs = model.prepare(params), batch['decoder_input_tokens']
  assert set(prepared['delta']) == set(lora)
  cache, positions = jax.jit(model.start, static_argnums=2)(prepared, batch, T), np.broadcast_to(np.arange(T), inputs.shape)
  forward = jax.jit(model.step)
  for begin, end in ((0, 1), (1, T)):
    logits, cache = forward(prepared, cache, inputs[:, begin:end], positions[:, begin:end])
    np.testing.assert_allclose(logits, expected[:, begin:end], atol=1e-4)


@pytest.mark.slow
def test_a_run_begins_with_those_of_the_base_and_trains_them(base_dir, tmp_path):
  base = trees.named(inference.load(base_dir).program.functions.model.abstract()[0])
  delta = dataclasses.replace(OWN, token_ids=(40, 41))
  config = tuned(base_dir, delta=delta, optimizer=OptimizerConfig(learning_rate=0.0, schedule='constant'))
  texts = ['一', '二三']
  training.run(config, str(tmp_path / 'still'))
  found = inference.load(tmp_path / 'still').score(texts, texts)
  np.testing.assert_allclose(found, inference.load(base_dir).score(texts, texts), rtol=1e-5)
  still = tuning.read(tmp_path / 'still').tensors
  training.run(dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=0.05, schedule='constant')),
               str(tmp_path / 'run'))
  trained = tuning.read(tmp_path / 'run').tensors
  assert trained['rows/token_embedder/embedding'].shape == (2, 16) and trained['rows/lm_head'].shape == (16, 2)
  assert trained['whole/encoder/final_norm/scale'].shape == base['encoder/final_norm/scale'].shape
  assert all(np.abs(trained[name] - still[name]).max() > 1e-3 for name in trained if name.startswith('whole'))
  assert np.abs(trained['rows/lm_head'] - still['rows/lm_head']).max() > 1e-3

  engine = inference.load(tmp_path / 'run')
  merge.merge(str(tmp_path / 'run'), str(tmp_path / 'merged'))
  np.testing.assert_allclose(inference.load(tmp_path / 'merged').score(texts, texts), engine.score(texts, texts), rtol=1e-5)
  with pytest.raises(ConfigError, match=re.escape('DeltaConfig.modules_to_save = ') + '.*cannot share a batch'):
    inference.load(base_dir, deltas={'own': tmp_path / 'run'})
  # The second stage trains them further, with everything else.
  second = dataclasses.replace(tuned(base_dir, steps=2), delta=dataclasses.replace(delta, base='', train_base=True))
  training.run(dataclasses.replace(second, train=dataclasses.replace(second.train, init_from=str(tmp_path / 'run'))),
               str(tmp_path / 'second'))
  assert np.isfinite(inference.load(tmp_path / 'second').score(texts, texts)).all()


@pytest.mark.parametrize('fields, message', [
    ({'modules_to_save': ('lm_haed',)}, 'names no parameter of the model that is trained. Did you mean lm_head'),
    ({'modules_to_save': ('(',)}, "DeltaConfig.modules_to_save: '(' is no regular expression"),
    ({'token_ids': (3, 3)}, 'expected different ids'), ({'token_ids': (-1,)}, 'from 0'),
    ({'token_ids': (10**6,)}, 'expected ids below ModelConfig.vocab_size = '),
    ({'modules_to_save': ('lm_head', 'token_embedder')}, 'leave one of the two out'),
    ({'method': '', 'base': ''}, "which trains all parameters: set the method")])
def test_what_cannot_work_is_refused(fields, message):
  config = test_tuning.with_delta(delta=dataclasses.replace(OWN, **fields))
  with pytest.raises(ConfigError, match=re.escape(message)) as error:
    config.delta.validate()
    tuning.build_model(config)
  assert '\n' not in str(error.value)


def test_lora_drops_what_it_reads():
  config = test_tuning.with_delta(delta=dataclasses.replace(LORA, sites=('encoder.self.query',), lora_dropout=0.25))
  model = tuning.build_model(config)
  params, batch = test_tuning.drawn(jax.jit(model.init)(jax.random.key(0))), test_step.random_batch(config, 0)
  logits = jax.jit(lambda params, key: model.apply(params, batch, key=key)[0])
  once, twice, none = (logits(params, key) for key in (jax.random.key(1), jax.random.key(1), None))
  np.testing.assert_array_equal(once, twice)
  assert not np.array_equal(once, logits(params, jax.random.key(2))) and not np.array_equal(once, none)
  assert not np.array_equal(once, none)
  hooks = model.delta_of([{'self.query': {'lora': {'a': jnp.eye(16)[None], 'b': jnp.eye(16)[None]}}}], {})
  x = jnp.ones((4, 50, 16))
  kept = np.asarray(hooks.change('self.query', x, jnp.zeros_like(x), jax.random.key(0))) / (LORA.alpha / LORA.rank)
  print((kept == 0).mean())
  assert 0.2 < (kept == 0).mean() < 0.3
  np.testing.assert_allclose(kept[kept != 0], 1 / 0.75, rtol=1e-5)
