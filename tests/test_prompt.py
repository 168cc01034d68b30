"""Prompts: vectors before the inputs of a frozen base, in batches, in the model, in answers."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_data
import test_step
import test_tuning

from t5x_cpm import inference, tuning
from t5x_cpm.config import Config, ConfigError, DeltaConfig
from t5x_cpm.inference import text
from t5x_cpm.models import encoder_decoder
from t5x_cpm.training import train as training
from t5x_cpm.vocabularies import load

ROOT = pathlib.Path(__file__).resolve().parent.parent
base_dir = test_tuning.base_dir
P = 5
FEATURES = ('input_tokens', 'segment_ids', 'positions')
PROMPT = DeltaConfig(method='prompt', base='base', prompt_length=P)


def longer_vocabulary(params, config):
  """The plain reference: a model without a delta, of which the prompt is the end of the embedding table."""
  wide = dataclasses.replace(config.model, vocab_size=config.model.vocab_size + P)
  plain = {name: tree for name, tree in params.items() if name != 'delta'}
  table = jnp.concatenate([params['token_embedder']['embedding'], params['delta']['prompt']['table'][0]])
  head = jnp.pad(params['lm_head'], ((0, 0), (0, P)))
  return encoder_decoder.build(wide), plain | {'token_embedder': {'embedding': table}, 'lm_head': head}


def with_prompt(batch, V):
  """A batch whose encoder rows begin with the prompt."""
  changed = batch['encoder_input_tokens'].copy()
  changed[:, :P] = V + np.arange(P)
  return batch | {'encoder_input_tokens': changed}


@pytest.mark.parametrize('moe', [None, pytest.param(test_tuning.EXPERTS, marks=pytest.mark.slow)], ids=['dense', 'experts'])
def test_a_prompt_is_rows_of_the_embedding_table(moe):
  config = test_tuning.with_delta(delta=PROMPT, moe=moe)
  model, V = tuning.build_model(config), config.model.vocab_size
  params = jax.jit(model.init)(jax.random.key(0))
  assert model.num_parameters() - encoder_decoder.build(config.model).num_parameters() == P * config.model.d_model
  batch = with_prompt(test_step.random_batch(config, 0), V)
  plain, wide = longer_vocabulary(params, config)
  found = jax.jit(model.apply)(params, batch)[0]
  np.testing.assert_allclose(found, jax.jit(plain.apply)(wide, batch)[0][..., :V], atol=1e-5)
  other = params | {'delta': jax.tree.map(lambda x: x + 1, params['delta'])}
  assert np.abs(model.apply(other, batch)[0] - found).max() > 1e-3


def reader_of(folder, documents, **fields):
  config = small_data.make_config(folder, batch_size=2, objective='pairs', encoder_length=24, decoder_length=16)
  config = dataclasses.replace(config, delta=dataclasses.replace(PROMPT, **fields),
                               model=dataclasses.replace(config.model, vocab_size=1000))
  small_data.fill(config, {'train': documents})
  return small_data.open_reader(config, 'train'), config


def test_every_packed_input_begins_with_the_prompt(tmp_path):
  print('seed 0')
  rng = np.random.default_rng(0)
  lengths = [int(n) for n in rng.integers(1, 30, 40)]
  documents = {'inputs': small_data.random_documents(rng, lengths), 'targets': small_data.random_documents(rng, [2] * 40)}
  reader, config = reader_of(tmp_path, documents)
  eos = load(config.task.vocabulary).eos_id
  wanted = {(*range(1000, 1000 + P), *tokens[:24 - P - 1], eos) for tokens in documents['inputs']}
  found, several = set(), False
  for step in range(30):
    batch = reader.batch(step)
    for tokens, segments, positions in zip(*(batch[f'encoder_{name}'] for name in FEATURES)):
      several |= segments.max() > 1
      for number in range(1, segments.max() + 1):
        mine = segments == number
        found.add(tuple(tokens[mine].tolist()))
        assert positions[mine].tolist() == list(range(mine.sum()))
  assert found == wanted and several
  told = reader.components[0].describe()
  assert f'the inputs of {sum(n > 24 - P - 1 for n in lengths)} cut to {24 - P - 1} tokens' in told, told
  with pytest.raises(ConfigError, match=re.escape('DeltaConfig.prompt_length = 21 leaves 3')):
    reader_of(tmp_path, documents, prompt_length=21)


def test_packed_inputs_equal_those_that_stand_alone(tmp_path):
  print('seed 1')
  rng = np.random.default_rng(1)
  documents = {side: small_data.random_documents(rng, [3] * 12) for side in ('inputs', 'targets')}
  reader, config = reader_of(tmp_path, documents)
  model = tuning.build_model(dataclasses.replace(
      config, model=dataclasses.replace(test_step.CONFIG.model, vocab_size=1000)))
  params, batch = jax.jit(model.init)(jax.random.key(0)), reader.batch(0)
  apply = jax.jit(lambda batch: model.apply(params, batch)[0])
  packed = apply(batch)
  segments = batch['decoder_segment_ids']
  assert segments.max() > 1
  for number in range(1, segments.max() + 1):
    alone = {}
    for side in ('encoder', 'decoder'):
      keep = batch[f'{side}_segment_ids'] == number
      alone |= {name: np.zeros_like(value) for name, value in batch.items() if name.startswith(side)}
      for row in range(len(keep)):
        for name in (f'{side}_input_tokens', f'{side}_segment_ids'):
          alone[name][row, :keep[row].sum()] = batch[name][row][keep[row]]
    found = apply(alone)
    for row in range(len(segments)):
      mine = segments[row] == number
      np.testing.assert_allclose(packed[row][mine], found[row][:mine.sum()], atol=1e-5)


def test_a_run_of_a_prompt(base_dir, tmp_path):
  config = test_tuning.tuned(base_dir, delta=dataclasses.replace(PROMPT, prompt_init='text', prompt_text='一二三'), steps=1)
  config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=0.0))
  training.run(config, str(tmp_path / 'run'))
  vocabulary = load(config.task.vocabulary)
  saved = tuning.read(tmp_path / 'run').tensors
  again = dataclasses.replace(PROMPT, prompt_init='file', prompt_file=str(tmp_path / 'run'))
  np.testing.assert_array_equal(tuning.prompt.from_file(again, config.model.d_model), saved['prompt/table'])
  base = inference.load(base_dir)
  ids = (vocabulary.encode('一二三') * P)[:P]
  np.testing.assert_array_equal(saved['prompt/table'], base.program.params['token_embedder']['embedding'][np.array(ids)])

  # With embeddings as its vectors, it answers as its base does where these tokens stand before the input.
  engine = inference.load(tmp_path / 'run')
  request = engine.codec.request('四')
  assert request.ids[:P] == list(range(config.model.vocab_size, config.model.vocab_size + P))
  plain = [request._replace(ids=ids + request.ids[P:])]
  np.testing.assert_allclose(
      engine.score_ids([request], [[20, 21]])[0], base.score_ids(plain, [[20, 21]])[0], rtol=1e-5)
  assert engine.generate('四') == [base.answer_requests(plain, base.config.decode)[0].output]
  assert engine.encode('四')[0].shape[0] == len(request.ids) - P
  limited = text.Codec(vocabulary, dataclasses.replace(
      engine.config, infer=dataclasses.replace(engine.config.infer, input_length=6, truncate=True)))
  assert len(limited.request('四' * 30).ids) == 6 + P  # the limit counts the input alone


def test_what_a_prompt_is_at_first(base_dir, tmp_path):
  vocabulary = load(test_tuning.tuned(base_dir).task.vocabulary)
  def first(**fields):
    return tuning.prompt.first_tokens(dataclasses.replace(PROMPT, **fields), vocabulary, 3)

  assert first(prompt_init='random') == first(prompt_init='file', prompt_file='x') == []
  drawn = first(prompt_length=100)
  special = {vocabulary.pad_id, vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id, *vocabulary.sentinels}
  assert len({token for token, in drawn}) == 100 and not special & {token for token, in drawn}
  assert drawn == first(prompt_length=100)
  assert len(first(prompt_length=20_000)) == 20_000
  words = first(prompt_init='words', prompt_words=('一二', '三'))
  assert words[:2] == [vocabulary.encode('一二'), vocabulary.encode('三')] and len(words) == P
  for fields, message in (({'prompt_init': 'text'}, 'needs it'), ({'prompt_text': 'x'}, "goes with 'text'"),
                          ({'prompt_length': 0}, 'at least 1'), ({'prompt_init': 'sampled'}, "'vocabulary'"),
                          ({'prompt_init': 'words', 'prompt_words': ('x',) * 6}, '6 words for 5 vectors')):
    with pytest.raises(ConfigError, match=re.escape(message)):
      dataclasses.replace(PROMPT, **fields).validate()
  with pytest.raises(ConfigError, match="inputs of 'pairs' alone"):
    Config(delta=PROMPT).validate()

  def read(content, D=8):
    np.save(tmp_path / 'a.npy', content, allow_pickle=True)
    return tuning.prompt.from_file(
        dataclasses.replace(PROMPT, prompt_init='file', prompt_file=str(tmp_path / 'a.npy')), D)

  array = np.random.default_rng(0).normal(size=(P, 8))
  np.testing.assert_array_equal(read(array), array.astype(np.float32))
  for content, message in ((array[:4], 'has the shape (4, 8); expected (5, 8)'), (array * np.nan, 'finite'),
                           (array.astype(int), 'floating'), (np.array([None]), 'cannot be read')):
    with pytest.raises(ConfigError, match=re.escape(message)):
      read(content)
  for file in (tmp_path / 'none.npy', tmp_path):
    with pytest.raises(ConfigError):
      tuning.prompt.from_file(dataclasses.replace(PROMPT, prompt_init='file', prompt_file=str(file)), 8)


@pytest.mark.parametrize('sight', [(True, True), (False, True), (True, False), (False, False)])
def test_who_sees_whom(sight):
  config = test_tuning.with_delta(delta=dataclasses.replace(PROMPT, prompt_sees_text=sight[0], text_sees_prompt=sight[1]),
                                  num_encoder_layers=1)
  model, V = tuning.build_model(config), config.model.vocab_size
  params = jax.jit(model.init)(jax.random.key(0))
  batch = with_prompt(test_step.random_batch(config, 0), V)
  batch['encoder_segment_ids'] = np.ones_like(batch['encoder_segment_ids'])
  encode = jax.jit(model.encode)
  before = encode(params, batch)
  words = batch['encoder_input_tokens'].copy()
  words[:, P:] = (words[:, P:] + 1) % V
  with_words = np.abs(encode(params, batch | {'encoder_input_tokens': words}) - before).max(axis=(0, 2))
  other = params | {'delta': jax.tree.map(lambda x: x + 1, params['delta'])}
  with_vectors = np.abs(encode(other, batch) - before).max(axis=(0, 2))
  assert ((with_words[:P] > 1e-6) == sight[0]).all() and (with_words[P:] > 1e-6).all()
  assert ((with_vectors[P:] > 1e-6) == sight[1]).all() and (with_vectors[:P] > 1e-6).all()


@pytest.mark.slow
def test_a_prompt_first_and_then_everything(base_dir, tmp_path):
  """The two stages of CPM-2, as commands."""
  first, both = tmp_path / 'first', tmp_path / 'both'
  config = test_tuning.tuned(base_dir, delta=PROMPT, steps=2)
  training.run(config, str(first))
  flags = [f'--gin.{name}={value!r}' for name, value in (
      ('TaskConfig.name', 'local'), ('TaskConfig.objective', 'pairs'), ('TaskConfig.encoder_length', 32),
      ('TaskConfig.decoder_length', 16), ('LocalTaskConfig.files', config.local_task.files), ('TrainConfig.batch_size', 4),
      ('TaskConfig.cache_dir', str(base_dir.parent)), ('LocalTaskConfig.validation_fraction', 0.2))]

  def command(mode, *arguments):
    done = subprocess.run([sys.executable, '-m', 't5x_cpm', mode, *arguments], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {'JAX_PLATFORMS': 'cpu'})
    return done.returncode, done.stdout + done.stderr

  for steps, learning_rate in ((0, 0.0), (2, 0.0), (3, 0.1)):  # at rate 0 what is stored is what stage one ended with
    code, said = command('train', f'--init_from={first}', f'--model_dir={both}-{learning_rate}', *flags,
                         f'--gin.TrainConfig.steps={steps}', f'--gin.OptimizerConfig.learning_rate={learning_rate}')
    assert code == 0, said
  one, same, other = (inference.load(path) for path in (first, f'{both}-0.0', f'{both}-0.1'))
  for a, b, c in zip(*map(jax.tree.leaves, (one.program.params, same.program.params, other.program.params)), strict=True):
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
  assert one.generate('四', max_new_tokens=8) == same.generate('四', max_new_tokens=8)
  assert not (tmp_path / 'both-0.0' / 'delta').exists()
  for mode, arguments, message in (
      ('train', [f'--base={both}-0.1', '--gin_file=gin/runs/lora.gin', f'--model_dir={tmp_path}/no', *flags], 'together with'),
      ('train', ['--gin.DeltaConfig.train_base=True', '--gin.DeltaConfig.method=prompt', f'--model_dir={tmp_path}/no', *flags,
                 f'--gin.TaskConfig.vocabulary={config.task.vocabulary}'], '--init_from=DIR')):
    code, said = command(mode, *arguments)
    assert code == 2 and message in said, said
