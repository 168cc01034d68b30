"""A number that rows carry beside their tokens: declared once, it arrives everywhere."""

import functools

import jax
import numpy as np
import pytest
import small_data
import small_model

from t5x_cpm import inference, tuning, vocabularies
from t5x_cpm import mesh as mesh_lib
from t5x_cpm.config import Config, ConfigError, InferConfig, MeshConfig, ModelConfig, MoEConfig, row_features
from t5x_cpm.inference import programs
from t5x_cpm.training import layout


@pytest.fixture
def language(monkeypatch):
  """Declares one more, which every model reads."""
  monkeypatch.setitem(row_features.ROW_FEATURES, 'language', row_features.RowFeature(
      needed=lambda config: True, default=lambda config: 3, from_task=lambda config, number, tasks: 10 * tasks + number))


def one_device():
  return mesh_lib.make_mesh(MeshConfig(data=1), jax.devices()[:1])


def filled(folder):
  config = small_data.make_config(folder)
  documents = small_data.random_documents(np.random.default_rng(0), [30] * 20)
  vocabulary = small_data.fill(config, {split: {'targets': documents} for split in ('train', 'validation')})
  return config, vocabulary


def test_the_reader_fills_it(tmp_path, language):
  config, _ = filled(tmp_path)
  for batch in (small_data.open_reader(config, 'train').batch(0),
                next(small_data.open_reader(config, 'validation', row={'language': 4}).eval_batches())):
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        name: (x.shape, x.dtype) for name, x in layout.batch_shapes(config).items()}
    assert batch['language'].tolist() == [10] * 8


def test_every_layer_and_the_cache_have_that_of_the_request(tmp_path, language, monkeypatch):
  rows = []

  def experts(layer, weights, u_BTD, routing, ctx):
    rows.append((*ctx.row['language'].shape, u_BTD.shape[1]))
    return layer.experts(weights, u_BTD * ctx.row['language'][:, None, None], routing, ctx)

  monkeypatch.setattr(tuning, 'build_model', functools.partial(tuning.build_model, experts=experts))
  vocabulary = vocabularies.load(f'cpm2:{small_data.vocabulary_file(tmp_path)}')
  engine = inference.load(small_model.model_dir(tmp_path, vocabulary))
  third = engine.codec.request('一<span>丁')
  assert third.row == {'language': 3}
  requests = [third, third._replace(row={'language': -2})]
  answers = engine.answer_requests(requests, engine.decode_config())
  assert answers[0].score != pytest.approx(answers[1].score, rel=0.01)
  for request, answer in zip(requests, answers):
    assert engine.answer_requests([request], engine.decode_config())[0].ids == answer.ids
  # With all tokens known at once the context has it from the batch, and step by step from the cache.
  scores, _ = engine.score_ids(requests, [answer.ids for answer in answers])
  assert scores == pytest.approx([answer.score for answer in answers], rel=1e-4)
  assert {(2, 64), (2, 1)} <= set(rows)
  cache = engine.program.start(engine._request_batch(requests), 4)
  assert cache['row']['language'].tolist() == [[3, -2]]
  assert engine.program.take(cache, np.array([1, 1, 0]))['row']['language'].tolist() == [[-2, -2, 3]]


def test_compiling_without_data_has_it(tmp_path, language):
  config, _ = filled(tmp_path)
  functions = programs.build(config, one_device())
  batch, cache = (functions.abstract_arguments(what)[1] for what in ('encode', 'decode'))
  assert batch['language'].shape == (8,) and cache['row']['language'].shape == (1, 8)


def test_without_any_there_is_nothing_more(tmp_path):
  config, _ = filled(tmp_path)
  assert row_features.names(config) == () and row_features.defaults(config) == {}
  assert set(layout.batch_shapes(config)) == {*layout.ENCODER_FEATURES, *layout.DECODER_FEATURES}
  assert set(small_data.open_reader(config, 'train').batch(0)) == set(layout.batch_shapes(config))
  functions = programs.build(config, one_device())
  batch, cache = (functions.abstract_arguments(what)[1] for what in ('encode', 'decode'))
  assert set(batch) == {'encoder_input_tokens', 'encoder_segment_ids'} and cache['row'] == {}


def test_the_domain_is_the_number_of_the_task_where_each_has_an_expert():
  moe = MoEConfig(num_experts=2, router='hash', decoder_router='domain')
  config = Config(model=ModelConfig(moe=moe), infer=InferConfig(domain=1))
  assert row_features.defaults(config) == {'domain': 1}
  assert [row_features.of_task(config, number, 2) for number in (0, 1)] == [{'domain': 0}, {'domain': 1}]
  assert row_features.of_task(config, 2, 3, {'domain': 0}) == {'domain': 0}
  with pytest.raises(ConfigError, match='an expert for each task of the mixture.*has 3, MoEConfig.num_experts = 2'):
    row_features.of_task(config, 2, 3)
  dense = Config(model=ModelConfig(moe=MoEConfig(num_experts=2, router='domain', encoder_every=0, decoder_every=0)))
  assert row_features.names(dense) == ()
