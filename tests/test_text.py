"""The form of inputs and answers: what depends on how a run was trained."""

import dataclasses

import small_data

from t5x_cpm import vocabularies
from t5x_cpm.config import InferConfig
from t5x_cpm.data.pieces import SPANS
from t5x_cpm.inference import text


def test_where_training_masks_anywhere_an_input_ends_as_a_document_does(tmp_path):
  vocabulary = vocabularies.load(f'cpm2:{small_data.vocabulary_file(tmp_path)}')
  config = dataclasses.replace(small_data.make_config(tmp_path), infer=InferConfig(input_length=10, truncate=True))
  codec = text.Codec(vocabulary, config, info={'data': {SPANS: 'anywhere'}})
  s, eos, one = vocabulary.sentinels, vocabulary.eos_id, vocabulary.encode('一')
  request = codec.request('一<span>一')
  assert request.ids == [*one, s[0], *one, eos] and (request.blanks, request.stop) == (1, (eos, s[1]))
  assert codec.targets(request, '一') == [s[0], *one, s[1]]
  assert codec.request('一<span>').ids == codec.request('一').ids == [*one, s[0]]
  cut = codec.request('一<span>' + '一' * 30)
  assert cut.ids == [*one, s[0], *one * 8] and cut.is_cut and not request.is_cut  # cut in a document, as pieces are
  t5 = dataclasses.replace(config, task=dataclasses.replace(config.task, objective='t5'))
  for other in ((config, {}), (config, {'data': {}}), (config, None)):  # of a run that began in an earlier version
    assert text.Codec(vocabulary, other[0], info=other[1]).request('一<span>一').ids == [*one, s[0], *one, s[1]]
  assert text.Codec(vocabulary, t5, info={'data': {}}).request('一<span>一').ids == [*one, s[0], *one, s[1], eos]
