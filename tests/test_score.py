"""Scoring of given targets, against sums written out, and choices."""

import jax
import numpy as np
import pytest
import small_data
import small_model

from t5x_cpm import inference, vocabularies
from t5x_cpm.config import ConfigError
from t5x_cpm.inference import score


@pytest.fixture(scope='module')
def engine(tmp_path_factory):
  folder = tmp_path_factory.mktemp('score')
  vocabulary = vocabularies.load(f'cpm2:{small_data.vocabulary_file(folder)}')
  return inference.load(small_model.model_dir(folder, vocabulary))


def plain_score(engine, input_ids, target_ids):
  """One row, no padding, one position after the other."""
  batch = {'encoder_input_tokens': np.array([input_ids]), 'encoder_segment_ids': np.ones((1, len(input_ids)), np.int32),
           'decoder_input_tokens': np.array([[engine.vocabulary.bos_id, *target_ids[:-1]]]),
           'decoder_segment_ids': np.ones((1, len(target_ids)), np.int32)}
  logits = np.asarray(jax.jit(engine.program.functions.model.apply)(engine.program.params, batch)[0][0], np.float64)
  total = 0.0
  for position, token in enumerate(target_ids):
    row = logits[position]
    total += row[token] - row.max() - np.log(np.exp(row - row.max()).sum())
  return total


def test_scores_are_sums_of_log_probabilities(engine):
  inputs = ['一<span>丁', 'abc', '一<span>丁<span>', 'x<span>', 'y<span>', 'the end', 'a', 'b']
  targets = ['七', '', ['一', '丁丁'], 'q' * 30, 'a', 'z z', 'c', 'd']
  scores = engine.score(inputs, targets)
  s, encode = engine.vocabulary.sentinels, engine.vocabulary.encode
  for i, (line, parts) in enumerate(zip(inputs, targets)):
    parts = [parts] if isinstance(parts, str) else parts
    ids = [token for k, part in enumerate(parts) for token in (s[k], *encode(part))] + [s[len(parts)]]
    if i in (2, 3):
      assert scores[i] == pytest.approx(plain_score(engine, engine.codec.request(line).ids, ids), rel=1e-4), line
  assert engine.score(inputs[::-1], targets[::-1]) == pytest.approx(scores[::-1], rel=1e-5)


def test_the_score_of_a_generated_answer_is_what_generation_says(engine):
  texts = ['一<span>丁', 'abc', 'x<span>y<span>']
  for rule in ('greedy', 'sample'):
    answers = engine.answers(texts, engine.decode_config(rule=rule))
    scores, counts = engine.score_ids([engine.codec.request(line) for line in texts], [answer.ids for answer in answers])
    assert counts == [answer.tokens for answer in answers]
    assert scores == pytest.approx([answer.score for answer in answers], rel=1e-3)
  with pytest.raises(ConfigError, match='3 inputs and 1 targets'):
    engine.score(texts, ['a'])


def test_a_prefix_is_given_and_not_scored(engine):
  """By the chain rule, for prefixes of two lengths in one batch."""
  request, ids = engine.codec.request('一<span>丁'), engine.vocabulary.encode('丁七')
  longer = request._replace(prefix=(*request.prefix, *ids))
  target = engine.codec.targets(request, '一')
  (alone, given), counts = engine.score_ids([request, longer], [target, target])
  (whole, before), _ = engine.score_ids([request, request], [ids + target, ids])
  assert counts == [len(target)] * 2
  assert given == pytest.approx(whole - before, rel=1e-4) and given != pytest.approx(alone, rel=1e-2)
  answers = engine.answer_requests([request, longer], engine.decode_config())
  assert answers[0].ids == engine.answers([request.text], engine.decode_config())[0].ids
  scores, _ = engine.score_ids([request, longer], [answer.ids for answer in answers])
  assert scores == pytest.approx([answer.score for answer in answers], rel=1e-3)


@pytest.mark.parametrize('target', ['<s_0>七<s_1>', ['七', '丁<s_1>'], '<extra_id_0>七'])
def test_a_target_with_sentinels_is_refused(engine, target):
  line = '一<span>丁' if isinstance(target, str) else '一<span>丁<span>'
  with pytest.raises(ConfigError, match='would be read as characters: give the text of each blank alone'):
    engine.score([line], [target])


def test_choices(engine):
  inputs, choices = ['一<span>丁', 'x<span>y'], [['七', '一一一', '丁'], ['q', 'abc']]
  ids = engine.codec.targets
  sums, means = [], []
  for line, options in zip(inputs, choices):
    request = engine.codec.request(line)
    values = [plain_score(engine, request.ids, ids(request, option)) for option in options]
    sums.append(int(np.argmax(values)))
    means.append(int(np.argmax([value / len(ids(request, option)) for value, option in zip(values, options)])))
  assert engine.choose(inputs, choices) == sums
  assert engine.choose(inputs, choices, normalize=True) == means
  assert score.best_choice([-3.0, -4.0], [1, 2]) == 1 and score.best_choice([-3.0, -4.0]) == 0


def test_token_log_probs_survive_large_logits():
  logits = np.array([[[1000.0, 0.0, -1000.0]]], np.float32)
  got = [float(score.token_log_probs(jax.numpy.asarray(logits), jax.numpy.asarray([[i]]))[0, 0]) for i in range(3)]
  assert got == [0.0, -1000.0, -2000.0]
