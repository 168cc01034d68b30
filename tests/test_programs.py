"""Programs of inference: another one gives the same answers, and their abstract arguments say where arrays lie."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import small_data
import small_model

from t5x_cpm import inference, vocabularies
from t5x_cpm import mesh as mesh_lib
from t5x_cpm.checkpoints import arrays
from t5x_cpm.config import Config, InferConfig, MeshConfig, ModelConfig, MoEConfig, TaskConfig
from t5x_cpm.inference import decode, programs
from t5x_cpm.inference.engine import Engine
from t5x_cpm.models import attention

MODEL = ModelConfig(vocab_size=48, d_model=16, d_ff=32, num_heads=4, head_dim=8, layer_loop='scan',
                    moe=MoEConfig(num_experts=4, group_size=8, encoder_every=2, decoder_every=2))


class Plain:
  """A program that compiles nothing, and decodes by the loop in Python."""

  def __init__(self, model, params):
    self.model, self.params = model, params
    self.take, self.reorder = attention.take, attention.reorder

  def whole(self, rows):
    return rows

  def start(self, batch, max_len):
    return self.model.start(self.params, jax.tree.map(jnp.asarray, batch), max_len)

  def step(self, cache, tokens_BT, positions_BT):
    return self.model.step(self.params, cache, tokens_BT, positions_BT)

  def generate(self, rule, batch, prefix_BP, stop_BE, *, allowed=None, seed=0, rows_B=None):
    cache = self.start(batch, prefix_BP.shape[1] + rule.max_new_tokens - 1)
    *_, state = decode.python_loop(self.step, cache, rule, jnp.asarray(prefix_BP), jnp.asarray(stop_BE), take=self.take,
                                   allowed=jnp.asarray(allowed), seed=seed, rows_B=jnp.asarray(rows_B))
    return rule.result(state)

  def score(self, measure, batch):
    return measure(self.model.apply(self.params, batch)[0], batch)

  def encode(self, batch):
    return self.model.encode(self.params, batch)

  def read(self, model_dir, step):
    self.params = self.model.prepare(arrays.load_params(model_dir, step=step))


@pytest.mark.parametrize('rules', [
    [{'rule': 'beam', 'beam_size': 2}], pytest.param([{}, {'rule': 'sample', 'seed': 3}], marks=pytest.mark.slow)])
def test_an_engine_knows_no_difference_between_programs(tmp_path, rules):
  vocabulary = vocabularies.load(f'cpm2:{small_data.vocabulary_file(tmp_path)}')
  model_dir = small_model.model_dir(tmp_path, vocabulary, steps=(3, 5))
  engine = inference.load(model_dir, step=3)
  other = Engine(Plain(engine.program.functions.model, engine.program.params), vocabulary, engine.config)
  texts = ['一<span>丁', 'abc']
  for rule in rules:
    ours, theirs = (one.answers(texts, one.decode_config(max_new_tokens=4, **rule)) for one in (engine, other))
    assert [answer.ids for answer in ours] == [answer.ids for answer in theirs]
    assert [answer.score for answer in ours] == pytest.approx([answer.score for answer in theirs], rel=1e-4)
    ours, theirs = (list(one.stream(texts[0], max_new_tokens=4, **rule)) for one in (engine, other))
    assert ours == theirs
  for a, b in zip(engine.encode(texts), other.encode(texts)):
    assert abs(a - b).max() < 1e-4
  scores = engine.score(texts, ['丁', 'a'])
  assert scores == pytest.approx(other.score(texts, ['丁', 'a']), rel=1e-4)
  for one in (engine, other):
    one.read(model_dir, 5)
  assert engine.step == other.step == 5
  assert engine.score(texts, ['丁', 'a']) == pytest.approx(other.score(texts, ['丁', 'a']), rel=1e-4)
  assert engine.score(texts, ['丁', 'a']) != pytest.approx(scores, rel=1e-2), 'both read the same step'


@pytest.mark.parametrize('loop', ['scan', 'unroll'])
def test_prepared_parameters_have_the_abstract_form(loop):
  config = Config(model=dataclasses.replace(MODEL, layer_loop=loop))
  functions = programs.build(config, mesh_lib.make_mesh(MeshConfig(data=1), jax.devices()[:1]))
  prepared = functions.prepare(jax.jit(functions.model.init)(jax.random.key(0)))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), prepared) == jax.tree.map(lambda x: (x.shape, x.dtype), functions.params)
  assert isinstance(prepared['decoder']['layers'], tuple) == (loop == 'unroll')


@pytest.mark.parametrize('loop', ['scan', 'unroll'])
def test_rows_heads_and_parameters_are_split_over_the_mesh(loop):
  mesh = MeshConfig(data=2, model=2, expert=2, sharding='full')
  config = Config(model=dataclasses.replace(MODEL, layer_loop=loop), mesh=mesh,
                  task=TaskConfig(encoder_length=24, decoder_length=12), infer=InferConfig(batch_size=8))
  auto = (jax.sharding.AxisType.Auto,) * 3  # JAX 0.12 has Explicit where nothing is said
  functions = programs.build(config, jax.sharding.AbstractMesh((2, 2, 2), mesh_lib.AXES, axis_types=auto))
  params, batch = functions.abstract_arguments('encode')
  _, cache, tokens, _ = functions.abstract_arguments('decode')
  local = lambda x: x.sharding.shard_shape(x.shape)  # noqa: E731
  assert local(batch['encoder_input_tokens']) == (2, 24) and local(tokens) == (2, 1)
  assert local(cache['encoder_valid']) == (1, 2, 24)
  layers = 1 if loop == 'unroll' else 2
  first = cache['layers'][0] if loop == 'unroll' else cache['layers']
  assert local(first['self_key']) == (layers, 2, 2, 12, 8) and local(first['cross_key']) == (layers, 2, 2, 24, 8)
  kernel = params['experts']['decoder'][0] if loop == 'unroll' else params['experts']['decoder']
  assert local(kernel['wi_0']) == (1, 2, 8, 16)
