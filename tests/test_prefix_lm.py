"""Objective 'prefix_lm': pieces of documents cut in two, and models that continue texts."""

import dataclasses

import numpy as np
import pytest
import small_data
import small_model
import test_local_task

from t5x_cpm import inference
from t5x_cpm.config import ConfigError
from t5x_cpm.data.pieces import Continuations
from t5x_cpm.inference import evaluate
from t5x_cpm.training import before
from t5x_cpm.training import train as training
from t5x_cpm.vocabularies import load

E, D = 24, 8


def parts(batch, side, kind):
  for tokens, numbers in zip(batch[f'{side}_{kind}_tokens'], batch[f'{side}_segment_ids']):
    for number in range(1, numbers.max() + 1):
      yield tuple(tokens[numbers == number].tolist())


def reader_of(folder, documents, **task):
  config = small_data.make_config(folder, batch_size=4, objective='prefix_lm', encoder_length=E, decoder_length=D, **task)
  small_data.fill(config, {'train': {'targets': documents}})
  return small_data.open_reader(config, 'train'), config


def test_inputs_and_targets_are_a_piece_of_a_document(tmp_path):
  seed = 3
  print('seed', seed)
  rng = np.random.default_rng(seed)
  # Every token says which document it is of, and where it stands there.
  lengths = rng.integers(1, 70, 12)
  documents = [(100 + 75 * number + np.arange(length)).tolist() for number, length in enumerate(lengths)]
  reader, config = reader_of(tmp_path, documents)
  eos, bos, seen = reader.vocabulary.eos_id, reader.vocabulary.bos_id, set()
  for step in range(200):
    batch = reader.batch(step)
    assert batch['encoder_segment_ids'].max() >= 1
    for inputs, targets, before_ in zip(parts(batch, 'encoder', 'input'), parts(batch, 'decoder', 'target'),
                                        parts(batch, 'decoder', 'input')):
      assert inputs[-1] == eos and before_ == (bos, *targets[:-1])
      assert 1 <= len(inputs) - 1 < E and 1 <= len(targets) <= D
      number, start = divmod(inputs[0] - 100, 75)
      piece = (*inputs[:-1], *targets)
      whole = (*documents[number], eos)
      assert piece == whole[start:start + len(piece)]
      seen |= {(number, start + place) for place in range(len(piece))}
      if start + len(piece) < len(whole):
        assert eos not in targets  # a text does not end where a piece does
  assert seen == {(number, place) for number, length in enumerate(lengths) for place in range(length + 1)}
  again = small_data.open_reader(config, 'train')
  for name, value in reader.batch(7).items():
    np.testing.assert_array_equal(value, again.batch(7)[name])
    np.testing.assert_array_equal(value[1:3], again.batch(7, slice(1, 3))[name])


@pytest.mark.parametrize('length', [2, 6, 20, E + D // 2])
def test_every_cut_is_equally_likely(tmp_path, length):
  reader, _ = reader_of(tmp_path, [list(range(100, 99 + length))] * 8)  # and an end of document
  component = reader.components[0]
  assert isinstance(component, Continuations)
  seed = 5
  print('seed', seed)
  keys = np.random.default_rng(seed).integers(0, 2**63, 8000).astype(np.uint64)
  members = np.repeat(np.asarray(component.members[:1]).reshape(-1), len(keys))
  found = component._segments(members, np.full(len(keys), length), keys).encoder_lengths - 1
  first, last = max(1, length - D), min(length - 1, E - 1)
  counts = np.bincount(found, minlength=last + 1)[first:]
  assert counts.sum() == len(keys) and len(counts) == last - first + 1
  expected = len(keys) / len(counts)
  assert ((counts - expected)**2 / expected).sum() < len(counts) + 6 * (2 * len(counts))**0.5  # chi-square


def test_no_sentinel_is_needed_and_short_documents_are_told(tmp_path):
  reader, config = reader_of(tmp_path, [[100], list(range(100, 120))])
  assert '2 documents' in reader.components[0].describe() and 'of at most' in reader.components[0].describe()
  without = load(config.task.vocabulary)
  without.sentinels = ()
  before.check_sentinels(config, without)
  pairs = dataclasses.replace(config, task=dataclasses.replace(config.task, objective='pairs'))
  with pytest.raises(ConfigError, match="'isolated', 'cpm2', 't5' or 'prefix_lm'"):
    small_data.open_reader(pairs, 'train')


@pytest.mark.slow
def test_a_model_that_continues(tmp_path):
  config = test_local_task.config_for(tmp_path, str(tmp_path / 'a.txt'), validation_fraction=0.3)
  letters = ''.join(chr(0x4e00 + n) for n in range(40))
  (tmp_path / 'a.txt').write_text('\n'.join(letters[n:] + letters[:n] for n in range(30)) + '\n', encoding='utf-8')
  vocabulary = load(config.task.vocabulary)
  run = small_model.model_dir(tmp_path, vocabulary, steps=(1,), objective='prefix_lm')
  engine = inference.load(run)
  request = engine.codec.request('一<span>丁')
  assert request.ids == [*vocabulary.encode('一<span>丁'), vocabulary.eos_id] and request.blanks == 0
  assert request.stop == (vocabulary.eos_id,) and engine.codec.prefix == (vocabulary.bos_id,)
  config = dataclasses.replace(
      engine.config, task=dataclasses.replace(config.task, objective='prefix_lm', encoder_length=32, decoder_length=24),
      local_task=config.local_task, train=dataclasses.replace(engine.config.train, batch_size=4, steps=40),
      optimizer=dataclasses.replace(engine.config.optimizer, learning_rate=0.02, schedule='constant'))
  metrics = evaluate.evaluate_task(engine, config, 'local')['local'][0]
  training.run(config, str(tmp_path / 'trained'))
  after = evaluate.evaluate_task(inference.load(tmp_path / 'trained'), config, 'local')['local'][0]
  assert after['loss'] < metrics['loss'] - 1
