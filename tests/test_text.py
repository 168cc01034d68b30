"""The form of inputs and answers: what depends on how a run was trained."""

import dataclasses

import small_data

from t5x_cpm import vocabularies
from t5x_cpm.config import InferConfig
from t5x_cpm.inference import text


def test_an_input_ends_with_a_blank(tmp_path):
  vocabulary = vocabularies.load(f'cpm2:{small_data.vocabulary_file(tmp_path)}')
  config = dataclasses.replace(small_data.make_config(tmp_path), infer=InferConfig(input_length=10, truncate=True))
  codec = text.Codec(vocabulary, config)
  s, eos, one = vocabulary.sentinels, vocabulary.eos_id, vocabulary.encode('一')
  request = codec.request('一<span>一')
  assert request.ids == [*one, s[0], *one, s[1]] and (request.blanks, request.stop) == (1, (eos, s[1]))
  assert codec.targets(request, '一') == [s[0], *one, s[1]]
  assert codec.request('一<span>').ids == codec.request('一').ids == [*one, s[0]]
  cut = codec.request('一<span>' + '一' * 30)
  assert cut.ids == [*one, s[0], *one * 7, s[1]] and cut.is_cut and not request.is_cut
  t5 = dataclasses.replace(config, task=dataclasses.replace(config.task, objective='t5'))
  assert text.Codec(vocabulary, t5).request('一<span>一').ids == [*one, s[0], *one, s[1], eos]
