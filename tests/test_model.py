"""The encoder-decoder model: shapes, counts, masks, loops, packing, initialisation."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_cpm import backend
from t5x_cpm.config import ConfigError, ModelConfig
from t5x_cpm.models import encoder_decoder
from t5x_cpm.models.attention import take
from t5x_cpm.models.layers import relative_position_bucket

SMALL = ModelConfig(
    vocab_size=97, d_model=32, d_ff=48, num_heads=2, head_dim=16, num_encoder_layers=2, num_decoder_layers=2, init_std=0.2)


def random_batch(seed: int, B: int = 3, S: int = 11, T: int = 7) -> dict[str, jax.Array]:
  """A batch in which the second row has padding on both sides."""
  print(f'seed {seed}')
  rng = np.random.default_rng(seed)
  encoder, decoder = np.ones((B, S), np.int32), np.ones((B, T), np.int32)
  encoder[1, S - 3:] = 0
  decoder[1, T - 2:] = 0
  return {
      'encoder_input_tokens': jnp.asarray(rng.integers(0, 97, (B, S))), 'encoder_segment_ids': jnp.asarray(encoder),
      'decoder_input_tokens': jnp.asarray(rng.integers(0, 97, (B, T))), 'decoder_segment_ids': jnp.asarray(decoder)}


def logits_of(model, params, batch, key=None):
  """model.apply as one compiled program; without jit each operation would be compiled by itself."""
  return jax.jit(lambda p, b: model.apply(p, b, key=key)[0])(params, batch)


def assert_close(got, want, relative):
  """Equal up to a fraction of the largest entry."""
  np.testing.assert_allclose(got, want, rtol=0, atol=relative * float(np.abs(want).max()))


@pytest.fixture(scope='module')
def model() -> encoder_decoder.Model:
  return encoder_decoder.build(SMALL)


@pytest.fixture(scope='module')
def params(model):
  return jax.jit(model.init)(jax.random.key(1))


def plain_bucket(distance: int, bidirectional: bool, num_buckets: int, max_distance: int) -> int:
  """The published rule, one integer at a time."""
  offset = 0
  if bidirectional:
    num_buckets //= 2
    offset = num_buckets if distance > 0 else 0
    distance = abs(distance)
  else:
    distance = max(-distance, 0)
  exact = num_buckets // 2
  if distance < exact:
    return offset + distance
  far = exact + int(math.log(distance / exact) / math.log(max_distance / exact) * (num_buckets - exact))
  return offset + min(far, num_buckets - 1)


@pytest.mark.parametrize('bidirectional', [True, False])
def test_buckets_follow_the_published_rule(bidirectional):
  # 32 buckets and distances whose logarithm is not within rounding of a boundary; powers of two are such boundaries.
  distances = np.asarray([d for d in range(-300, 300) if abs(d) not in (16, 23, 32, 64, 128, 45, 90)], np.int32)
  got = relative_position_bucket(distances, bidirectional=bidirectional, num_buckets=32, max_distance=128)
  want = [plain_bucket(int(d), bidirectional, 32, 128) for d in distances]
  np.testing.assert_array_equal(got, want)
  on_device = relative_position_bucket(jnp.asarray(distances), bidirectional=bidirectional, num_buckets=32, max_distance=128)
  np.testing.assert_array_equal(on_device, got)


def test_bias_of_a_sequence_equals_bias_at_each_position(model, params):
  for name, T, S in (('encoder', 9, 9), ('decoder', 1, 1), ('decoder', 5, 8)):
    bias = model.module(f'{name}/relative_bias', params)
    whole = bias.sequence(T, S, jnp.float32)
    one_by_one = bias.at(jnp.arange(T)[None], S, jnp.float32)[0]
    np.testing.assert_allclose(whole, one_by_one, rtol=1e-6)


def test_abstract_tree_matches_initialised_parameters(model, params):
  abstract, names = model.abstract()
  assert jax.tree.structure(abstract) == jax.tree.structure(params)
  shapes = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, abstract, params)
  assert all(jax.tree.leaves(shapes))
  flat_names = jax.tree.leaves(names, is_leaf=lambda x: isinstance(x, tuple))
  assert [len(n) for n in flat_names] == [leaf.ndim for leaf in jax.tree.leaves(abstract)]


@pytest.mark.parametrize('vocab_size, count', [(26_240, 11_087_097_856), (51_968, 11_297_861_632)])
def test_cpm2_has_the_published_number_of_parameters(vocab_size, count):
  config = ModelConfig(
      vocab_size=vocab_size, d_model=4096, d_ff=10_240, num_heads=64, head_dim=64, num_encoder_layers=24, num_decoder_layers=24)
  assert encoder_decoder.build(config).num_parameters() == count


def test_cpm2_initialisation_has_the_published_deviations():
  config = ModelConfig(
      vocab_size=500, d_model=96, d_ff=128, num_heads=4, head_dim=24, num_encoder_layers=6, num_decoder_layers=6, init_std=0.01)
  params = encoder_decoder.build(config).init(jax.random.key(0))
  small = 0.01 / math.sqrt(12)
  for leaf, std in (
      (params['token_embedder']['embedding'], 0.01), (params['lm_head'], 0.01),
      (params['encoder']['layers']['attention']['query'], 0.01), (params['encoder']['layers']['attention']['output'], small),
      (params['experts']['decoder']['wi_1'], 0.01), (params['experts']['decoder']['wo'], small),
      (params['decoder']['relative_bias']['table'], 1.0)):
    assert float(leaf.std()) == pytest.approx(std, rel=0.15)
  first, second = params['experts']['encoder']['wi_0'][:2]
  assert not np.allclose(first, second)  # layers draw keys of their own


@pytest.mark.parametrize('remat', ['none', 'dots', 'full'])
@pytest.mark.parametrize('loop', ['scan', 'unroll'])
def test_loops_and_rematerialisation_give_the_same_gradients(params, model, loop, remat):
  batch = random_batch(3)
  other = encoder_decoder.build(dataclasses.replace(SMALL, layer_loop=loop, remat=remat))

  def loss(m):
    return jax.jit(jax.grad(lambda p: jnp.square(m.apply(p, batch)[0]).mean()))(params)

  jax.tree.map(lambda a, b: assert_close(a, b, 1e-4), loss(other), loss(model))


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
@pytest.mark.parametrize('loop', ['scan', 'unroll'])
def test_rematerialised_dots_are_those_of_attention_alone(platform, loop):
  def products(remat: str) -> int:
    model = encoder_decoder.build(dataclasses.replace(SMALL, layer_loop=loop, remat=remat, dtype='float32'))
    loss = jax.grad(lambda params: model.apply(params, random_batch(0))[0].sum())
    return without_batch(jax.make_jaxpr(loss)(jax.eval_shape(model.init, jax.random.key(0))).jaxpr)

  def without_batch(jaxpr: Any) -> int:
    count = 0
    for equation in jaxpr.eqns:
      count += equation.primitive.name == 'dot_general' and not equation.params['dimension_numbers'][1][0]
      inner = (getattr(value, 'jaxpr', value) for value in equation.params.values())
      count += sum(without_batch(part) for part in inner if hasattr(part, 'eqns'))
    return count

  with backend.compiling_for(platform):
    none, dots, full = map(products, ('none', 'dots', 'full'))
  assert 0 < none == dots < full



@pytest.mark.parametrize('loop', ['scan', 'unroll'])
def test_cached_decoding_equals_teacher_forcing(params, loop):
  model = encoder_decoder.build(dataclasses.replace(SMALL, layer_loop=loop))
  batch = random_batch(4)
  want = logits_of(model, params, batch)
  for tree in (params, model.prepare(params)):
    step = jax.jit(model.step)
    cache = jax.jit(model.start, static_argnums=2)(tree, batch, 9)
    # Two tokens at once, then one at a time, each row by an index of its own.
    logits, cache = step(tree, cache, batch['decoder_input_tokens'][:, :2], jnp.tile(jnp.arange(2), (3, 1)))
    steps = [logits]
    for t in range(2, 7):
      logits, cache = step(tree, cache, batch['decoder_input_tokens'][:, t:t + 1], jnp.full((3, 1), t))
      steps.append(logits)
    got = jnp.concatenate(steps, axis=1)
    np.testing.assert_allclose(got[0], want[0], atol=1e-4)
    np.testing.assert_allclose(got[1, :5], want[1, :5], atol=1e-4)
    moved = take(cache, jnp.asarray([2, 0]))
    assert {leaf.shape[1] for leaf in jax.tree.leaves(moved)} == {2}


def test_packed_segments_equal_separate_rows(model, params):
  rng = np.random.default_rng(5)
  print('seed 5')
  lengths = [(4, 3), (6, 2), (5, 4)]
  rows = [(rng.integers(1, 97, s), rng.integers(1, 97, t)) for s, t in lengths]
  S, T = sum(s for s, _ in lengths) + 3, sum(t for _, t in lengths) + 2
  packed = {name: np.zeros((1, S if 'encoder' in name else T), np.int32) for name in (
      'encoder_input_tokens', 'encoder_segment_ids', 'decoder_input_tokens', 'decoder_segment_ids')}
  s = t = 0
  for number, (source, target) in enumerate(rows, 1):
    packed['encoder_input_tokens'][0, s:s + len(source)] = source
    packed['encoder_segment_ids'][0, s:s + len(source)] = number
    packed['decoder_input_tokens'][0, t:t + len(target)] = target
    packed['decoder_segment_ids'][0, t:t + len(target)] = number
    s, t = s + len(source), t + len(target)
  together = logits_of(model, params, packed)[0]
  t = 0
  for source, target in rows:
    alone = logits_of(model, params, {
        'encoder_input_tokens': source[None], 'encoder_segment_ids': np.ones_like(source)[None],
        'decoder_input_tokens': target[None], 'decoder_segment_ids': np.ones_like(target)[None]})[0]
    np.testing.assert_allclose(together[t:t + len(target)], alone, atol=1e-5, rtol=1e-5)
    t += len(target)


def test_padding_reaches_nothing(model, params):
  batch = random_batch(6)
  want = logits_of(model, params, batch)
  noisy = dict(batch)
  noisy['encoder_input_tokens'] = jnp.where(batch['encoder_segment_ids'] == 0, 5, batch['encoder_input_tokens'])
  noisy['decoder_input_tokens'] = jnp.where(batch['decoder_segment_ids'] == 0, 5, batch['decoder_input_tokens'])
  got = logits_of(model, params, noisy)
  seen = np.asarray(batch['decoder_segment_ids']) != 0
  np.testing.assert_array_equal(np.asarray(got)[seen], np.asarray(want)[seen])
  assert np.isfinite(np.asarray(got)).all()


def test_decoder_sees_no_future_token(model, params):
  batch = random_batch(7)
  changed = batch | {'decoder_input_tokens': batch['decoder_input_tokens'].at[:, 4].set(0)}
  a, b = logits_of(model, params, batch), logits_of(model, params, changed)
  np.testing.assert_array_equal(a[:, :4], b[:, :4])
  assert not np.allclose(a[0, 4], b[0, 4])


def test_dropout_acts_in_training_only(params):
  model = encoder_decoder.build(dataclasses.replace(SMALL, dropout_rate=0.5, layer_loop='scan'))
  batch = random_batch(8)
  still = logits_of(model, params, batch)
  a, b = (logits_of(model, params, batch, jax.random.key(k)) for k in (1, 2))
  again = logits_of(model, params, batch, jax.random.key(1))
  np.testing.assert_array_equal(a, again)
  assert not np.allclose(a, b)
  np.testing.assert_array_equal(still, logits_of(encoder_decoder.build(SMALL), params, batch))


def test_t5_1_0_options_tie_the_head_and_use_relu():
  config = dataclasses.replace(SMALL, tie_embeddings=True, mlp_activation='relu', initializer='t5')
  model = encoder_decoder.build(config)
  params = model.init(jax.random.key(0))
  assert 'lm_head' not in params and set(params['experts']['encoder']) == {'wi_0', 'wo'}
  assert logits_of(model, params, random_batch(9)).shape == (3, 7, 97)


def test_bfloat16_compute_keeps_float32_parameters_and_logits(params):
  model = encoder_decoder.build(dataclasses.replace(SMALL, dtype='bfloat16'))
  logits = logits_of(model, params, random_batch(10))
  assert logits.dtype == jnp.float32
  exact = logits_of(encoder_decoder.build(SMALL), params, random_batch(10))
  assert float(jnp.abs(logits - exact).mean()) < 0.1 * float(exact.std())


@pytest.mark.parametrize('field, value, message', [
    ('d_model', 0, 'd_model'), ('num_buckets', 30, 'multiple of 4'), ('mlp_activation', 'swish', 'gated_gelu'),
    ('max_distance', 8, 'max_distance'), ('dropout_rate', 1.5, 'dropout_rate'), ('dtype', 'float16', 'bfloat16')])
def test_a_bad_value_is_refused_by_name(field, value, message):
  with pytest.raises(ConfigError, match=message):
    encoder_decoder.build(dataclasses.replace(SMALL, **{field: value}))
