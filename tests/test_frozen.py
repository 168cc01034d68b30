"""A step over a frozen base: what is trained alone has gradients, moments and a place in a checkpoint."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_step

from t5x_cpm import trees
from t5x_cpm.checkpoints import arrays
from t5x_cpm.checkpoints.manager import Manager
from t5x_cpm.config import Config, ConfigError, MoEConfig
from t5x_cpm.training import host_memory, step


def with_experts(**fields) -> Config:
  moe = MoEConfig(num_experts=4, group_size=24, encoder_every=0, **fields)
  return dataclasses.replace(test_step.CONFIG, model=dataclasses.replace(test_step.CONFIG.model, moe=moe))


LOSS_FREE = with_experts(router='loss_free', bias_rate=0.5, capacity_factor=0.5)


def in_two_parts(config: Config) -> Config:
  return dataclasses.replace(config, train=dataclasses.replace(config.train, microbatches=2))


def build(config: Config, trained) -> tuple[step.Step, dict]:
  """The step, and parameters of the whole model from another seed than its state has."""
  built = test_step.build(dataclasses.replace(config, mesh=test_step.ONE_DEVICE), trained=trained)
  return built, test_step.build(config).init(jax.random.key(7))['params']


@pytest.mark.parametrize('config, trained', [
    (test_step.CONFIG, ['lm_head']), (LOSS_FREE, ['decoder']),
    (in_two_parts(with_experts(router='random_projection')), ['lm_head', 'experts'])])
def test_a_part_is_trained_over_a_base_that_stays(tmp_path, config, trained):
  built, params = build(config, trained)
  frozen = {'base': {name: tree for name, tree in params.items() if name not in trained}}
  kept = jax.device_get(frozen)
  state = built.init(jax.random.key(0), frozen)
  assert set(state['params']) == set(trained)
  batch, losses = test_step.random_batch(config, 0), []
  before = built.evaluate(host_memory.working(state), frozen, batch)
  for _ in range(8):
    state, metrics = built.fn(state, frozen, batch)
    losses.append(float(metrics['loss']))
  np.testing.assert_allclose(losses[0], before['loss'][0] / before['loss'][1], rtol=1e-5)  # routed as at inference
  assert losses[-1] < 0.9 * losses[0] and int(state['step']) == 8
  for leaf, was in zip(jax.tree.leaves(frozen), jax.tree.leaves(kept), strict=True):
    assert not leaf.is_deleted()
    np.testing.assert_array_equal(leaf, was)

  with Manager(tmp_path, config, info={}) as manager:
    manager.save(8, host_memory.saved(state), axes=built.axes)
  stored = arrays.stored(tmp_path, 8, {})
  others = {name for name in frozen['base'] for path in stored if name in path.split('/')[1:]}
  assert not others & set(params) - {'encoder', 'decoder'} and any(path.startswith('params/') for path in stored)
  assert {path.split('/')[1] for path in stored if path.startswith('params/')} == set(trained)
  with Manager(tmp_path, config, info={}) as manager:
    again = built.complete(manager.restore(host_memory.saved(built.abstract_state)))
  jax.tree.map(np.testing.assert_array_equal, again, state)


def test_no_bias_moves_over_a_frozen_base():
  config = LOSS_FREE
  built, params = build(config, ['decoder'])
  frozen = {'base': {name: tree for name, tree in params.items() if name != 'decoder'}}
  state, _ = built.fn(built.init(jax.random.key(0), frozen), frozen, test_step.random_batch(config, 0))
  assert not np.asarray(state['params']['decoder']['routers']['bias']).any()


def test_all_that_is_trained_over_nothing_is_a_plain_run():
  config = test_step.CONFIG
  names = list(build(config, None)[1])
  plain, whole = (build(config, trained)[0] for trained in (None, names))
  assert plain.abstract_frozen == whole.abstract_frozen == {}
  text = [built.fn.lower(built.abstract_state, {}, built.abstract_batch).as_text() for built in (plain, whole)]
  assert text[0] == text[1]


def test_a_base_may_have_another_type_and_is_split_like_the_parameters():
  built, params = build(test_step.CONFIG, ['lm_head'])
  wide = {name: tree for name, tree in params.items() if name != 'lm_head'}
  narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide)
  assert trees.named(built.abstract_frozen).keys() == trees.named({'base': wide}).keys()
  batch = test_step.random_batch(test_step.CONFIG, 0)
  results = []
  for base in (wide, narrow):
    frozen = {'base': base}
    state, metrics = built.fn(built.init(jax.random.key(0), frozen), frozen, batch)
    results.append(float(metrics['loss']))
    assert state['params']['lm_head'].dtype == jnp.float32
  assert results[0] != results[1] == pytest.approx(results[0], rel=0.05)


def test_a_number_of_the_base_that_is_not_finite_is_named():
  built, params = build(test_step.CONFIG, ['lm_head'])
  base = {name: tree for name, tree in params.items() if name != 'lm_head'}
  wo = base['experts']['decoder']['wo']
  frozen = {'base': base | {'experts': base['experts'] | {'decoder': base['experts']['decoder'] | {
      'wo': wo.at[1, 0, 0].set(jnp.nan)}}}}
  batch = test_step.random_batch(test_step.CONFIG, 0)
  state, metrics = built.fn(built.init(jax.random.key(0), frozen), frozen, batch)
  assert bool(metrics['halted'])
  assert built.explain(state, frozen, batch) == 'parameter/experts/decoder/wo [layer 1]'


def test_what_does_not_belong_together_is_refused():
  with pytest.raises(ConfigError, match=r"trained = \['delta'\]: expected names among decoder, encoder, experts, lm_head"):
    build(test_step.CONFIG, ['delta'])
  built, params = build(test_step.CONFIG, ['lm_head'])
  with pytest.raises(ConfigError, match=r'frozen/base/decoder/.*: expected \[.*\], given no such array'):
    built.init(jax.random.key(0), {})
  with pytest.raises(ConfigError, match=r'frozen/base/lm_head: expected no such array, given \[16, 96\]'):
    built.init(jax.random.key(0), {'base': params})
