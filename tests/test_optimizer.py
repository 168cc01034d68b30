"""Schedules and optimizers, against their formulas, against optax and against one optimizer per layer."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_cpm.config import ConfigError, ModelConfig, MoEConfig, OptimizerConfig
from t5x_cpm.mesh import is_names
from t5x_cpm.models import encoder_decoder
from t5x_cpm.models.leaf import Leaf
from t5x_cpm.training import optimizer

CONSTANT = {'schedule': 'constant', 'warmup_steps': 0, 'learning_rate': 0.1}
ADAFACTOR = CONSTANT | {'name': 'adafactor', 'weight_decay': 0.0, 'clip_norm': 0.0}
# One layer: a matrix that is factored each way round, one that is too small for it, a norm, a table of positions.
SHAPES = {
    'wide': (128, 160), 'tall': (160, 128), 'small': (160, 8), 'norm': {'scale': (128,)}, 'relative_bias': {'table': (32, 8)}}


def is_shape(x):
  return isinstance(x, tuple)


def random_tree(seed, shapes, scale=1.0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda shape: jnp.asarray(scale * rng.standard_normal(shape), jnp.float32), shapes, is_leaf=is_shape)


def axes_like(shapes, *stack):
  return jax.tree.map(lambda shape: (*stack, *('embed', 'mlp')[:len(shape)]), shapes, is_leaf=is_shape)


def leaves_of(params, axes):
  """What the model says of such parameters. Norms and tables of relative positions do not decay."""

  def leaf(path, names, p):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    return Leaf(name, p.shape, p.dtype, names, decays='scale' not in name and 'relative_bias' not in name)

  return jax.tree_util.tree_map_with_path(leaf, axes, params, is_leaf=is_names)


def make(config, steps, axes, params):
  return optimizer.make(config, steps, leaves_of(params, axes))


def run(tx, params, gradients):
  state = jax.jit(tx.init)(params)

  def step(gradient, state, params):
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  step = jax.jit(step)
  for gradient in gradients:
    params, state = step(gradient, state, params)
  return params, state


def assert_close(a, b, rtol):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6 * float(np.abs(y).max())), a, b)


def rates(steps, total=1000, **fields):
  schedule = optimizer.make_schedule(OptimizerConfig(**fields), total)
  return [float(schedule(step)) for step in steps]


def test_noam_is_the_published_schedule():
  # Figures of the released script: 10,000 of 200,000 updates are warmup, the peak is 1e-5, the last rate 2.2e-6.
  fields = {'schedule': 'noam', 'learning_rate': 0.001, 'warmup_steps': 10_000}
  got = rates([0, 4_999, 9_999, 39_999, 199_999], 200_000, **fields)
  np.testing.assert_allclose(got, [1e-9, 5e-6, 1e-5, 5e-6, 0.001 / math.sqrt(200_000)], rtol=1e-5)


@pytest.mark.parametrize('name', ['noam', 'inverse_square_root', 'cosine', 'linear', 'constant'])
def test_schedule_follows_its_formula(name):
  w, total, peak, end = 10, 50, 0.3, 0.1

  def expected(step):
    t = step + 1
    if name == 'noam':
      return peak / math.sqrt(w) * t / w if t <= w else peak / math.sqrt(t)
    if name == 'inverse_square_root':
      return peak / math.sqrt(max(t, w))
    p = min(max((step - w) / (total - w), 0), 1)
    fall = {'cosine': end + (1 - end) * (1 + math.cos(math.pi * p)) / 2, 'linear': 1 - (1 - end) * p, 'constant': 1}[name]
    return peak * min(t / w, 1) * fall

  steps = [0, 1, 8, 9, 10, 11, 30, 49, 50, 80]
  fields = {'schedule': name, 'learning_rate': peak, 'warmup_steps': w, 'final_scale': end}
  np.testing.assert_allclose(rates(steps, total, **fields), [expected(s) for s in steps], rtol=1e-5)
  np.testing.assert_allclose(rates(steps, 7, decay_steps=total, **fields), [expected(s) for s in steps], rtol=1e-5)
  schedule = optimizer.make_schedule(OptimizerConfig(**fields), total)
  np.testing.assert_allclose(jax.jit(jax.vmap(schedule))(jnp.asarray(steps)), [expected(s) for s in steps], rtol=1e-5)


@pytest.mark.parametrize('name', ['noam', 'inverse_square_root', 'cosine', 'linear', 'constant'])
def test_schedule_without_warmup_starts_at_its_peak(name):
  assert rates([0], schedule=name, learning_rate=0.3, warmup_steps=0) == pytest.approx([0.3])


def test_warmup_longer_than_the_decay_is_refused():
  with pytest.raises(ConfigError, match=r'warmup_steps = 100, but the cosine schedule ends at step 20.*decay_steps'):
    optimizer.make_schedule(OptimizerConfig(schedule='cosine', warmup_steps=100), 20)


@pytest.mark.parametrize('field, value', [('beta1', 1.0), ('beta2', 1.0), ('epsilon', 0.0)])
def test_what_would_divide_by_zero_is_refused(field, value):
  with pytest.raises(ConfigError, match=f'OptimizerConfig.{field} = {value}: expected a number'):
    OptimizerConfig(**{field: value}).validate()


def test_adamw_is_that_of_optax():
  params = random_tree(0, SHAPES)
  gradients = [random_tree(seed, SHAPES, 10.0**(seed - 2)) for seed in range(1, 5)]
  config = OptimizerConfig(name='adamw', weight_decay=0.1, clip_norm=0.5, **CONSTANT)
  mask = {'wide': True, 'tall': True, 'small': True, 'norm': {'scale': False}, 'relative_bias': {'table': False}}
  theirs = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1, weight_decay=0.1, mask=mask))
  ours, _ = run(make(config, 10, axes_like(SHAPES), params), params, gradients)
  assert_close(ours, run(theirs, params, gradients)[0], rtol=1e-5)


@pytest.mark.parametrize('fields', [{'name': 'adamw'}, ADAFACTOR, {'name': 'sgd', 'momentum': 0.9}])
def test_a_halted_update_keeps_the_state(fields):
  params, gradient = random_tree(0, SHAPES), random_tree(1, SHAPES)
  tx = make(OptimizerConfig(**fields), 10, axes_like(SHAPES), params)
  state = tx.update(gradient, tx.init(params), params)[1]
  bad = jax.tree.map(lambda g: g * jnp.nan, gradient)
  halted, moved = (tx.update(bad if halt else gradient, state, params, halted=jnp.bool(halt))[1] for halt in (True, False))
  jax.tree.map(np.testing.assert_array_equal, halted, state)
  assert_close(moved, tx.update(gradient, state, params)[1], rtol=1e-6)
  assert not any(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(state), strict=True))


@pytest.mark.parametrize('momentum', [0.0, 0.9])
def test_sgd_is_that_of_optax(momentum):
  params, gradients = random_tree(0, SHAPES), [random_tree(seed, SHAPES) for seed in (1, 2, 3)]
  config = OptimizerConfig(name='sgd', momentum=momentum, weight_decay=0.0, clip_norm=0.0, **CONSTANT)
  ours, _ = run(make(config, 10, axes_like(SHAPES), params), params, gradients)
  assert_close(ours, run(optax.sgd(0.1, momentum or None), params, gradients)[0], rtol=1e-5)


@pytest.mark.parametrize('scale', [True, False])
def test_adafactor_of_one_layer_is_that_of_optax(scale):
  params, gradients = random_tree(0, SHAPES), [random_tree(seed, SHAPES, 3.0**seed) for seed in range(1, 5)]
  config = OptimizerConfig(**ADAFACTOR, adafactor_parameter_scale=scale)
  ours, state = run(make(config, 10, axes_like(SHAPES), params), params, gradients)
  theirs = optax.adafactor(0.1, multiply_by_parameter_scale=scale)
  assert_close(ours, run(theirs, params, gradients)[0], rtol=1e-4)
  sizes = jax.tree.map(jnp.shape, state['inner']['statistics'])
  assert sizes['tall'] == {'row': (160,), 'col': (128,)}
  assert sizes['small'] == {'full': (160, 8)}


@pytest.mark.parametrize('stack', [('layers',), ('layers', 'expert')])
def test_adafactor_of_a_stack_is_one_optimizer_per_layer(stack):
  sizes = (3, 2)[:len(stack)]
  stacked = jax.tree.map(lambda shape: sizes + shape, SHAPES, is_leaf=is_shape)
  # Layers of very different size: shared statistics would show.
  levels = 10.0**np.arange(math.prod(sizes)).reshape(sizes)

  def spread(tree):
    return jax.tree.map(lambda x: x * levels.reshape(sizes + (1,) * (x.ndim - len(sizes))).astype(np.float32), tree)

  params = spread(random_tree(0, stacked))
  gradients = [spread(random_tree(seed, stacked)) for seed in (1, 2, 3)]
  config = OptimizerConfig(**ADAFACTOR)
  together, _ = run(make(config, 10, axes_like(SHAPES, *stack), params), params, gradients)
  layer_tx = make(config, 10, axes_like(SHAPES), random_tree(0, SHAPES))
  init, update = jax.jit(layer_tx.init), jax.jit(layer_tx.update)
  for index in np.ndindex(sizes):
    layer = lambda tree, index=index: jax.tree.map(lambda x: x[index], tree)  # noqa: E731
    alone, state = layer(params), init(layer(params))
    for gradient in gradients:
      updates, state = update(layer(gradient), state, alone)
      alone = optax.apply_updates(alone, updates)
    assert_close(layer(together), alone, rtol=1e-4)


def test_adafactor_factors_neither_routers_nor_positions():
  """However large, as in T5X: their axes are no features."""
  axes = {'router': ('layers', 'embed', None), 'relative_bias': {'table': ('buckets', None)}, 'wi': ('layers', 'embed', 'mlp')}
  params = random_tree(0, {'router': (2, 160, 128), 'relative_bias': {'table': (128, 160)}, 'wi': (2, 160, 128)})
  tx = make(OptimizerConfig(**ADAFACTOR), 10, axes, params)
  sizes = jax.tree.map(jnp.shape, jax.eval_shape(tx.init, params)['inner']['statistics'])
  assert sizes['router'] == {'full': (2, 160, 128)} and sizes['relative_bias']['table'] == {'full': (128, 160)}
  assert sizes['wi'] == {'row': (2, 160), 'col': (2, 128)}
  assert tx.axes['inner']['statistics']['router'] == {'full': axes['router']}


def test_optax_shares_statistics_over_a_stack():
  """Why there is an Adafactor here: the same stack given to optax mixes its layers."""
  shapes = {'norm': {'scale': (128, 160)}}  # 128 layers of a norm, which optax takes for a matrix
  params, gradients = random_tree(0, shapes), [random_tree(1, shapes)]
  tx = make(OptimizerConfig(**ADAFACTOR), 10, {'norm': {'scale': ('layers', 'embed')}}, params)
  ours, _ = run(tx, params, gradients)
  theirs, _ = run(optax.adafactor(0.1), params, gradients)
  assert float(jnp.abs(ours['norm']['scale'] - theirs['norm']['scale']).max()) > 1e-3


def test_weight_decay_leaves_norms_and_positions_alone():
  shapes = {
      'encoder': {'relative_bias': {'table': (8, 4)}, 'layers': {'attention_norm': {'scale': (2, 8)}, 'query': (2, 8, 8)},
                  'final_norm': {'scale': (8,)}},
      'token_embedder': {'embedding': (9, 8)}}
  params = random_tree(0, shapes)
  zeros = jax.tree.map(jnp.zeros_like, params)
  axes = jax.tree.map(lambda shape: ('x',) * len(shape), shapes, is_leaf=is_shape)
  for name in ('adamw', 'adafactor', 'sgd'):
    tx = make(OptimizerConfig(name=name, weight_decay=0.5, **CONSTANT), 10, axes, params)
    after, _ = run(tx, params, [zeros])
    changed = jax.tree.map(lambda a, b: None if np.array_equal(a, b) else np.asarray(b / a).round(4), params, after)
    assert changed['encoder']['relative_bias']['table'] is None
    assert changed['encoder']['layers']['attention_norm']['scale'] is None
    assert changed['encoder']['final_norm']['scale'] is None
    assert (changed['encoder']['layers']['query'] == np.float32(0.95)).all()
    assert (changed['token_embedder']['embedding'] == np.float32(0.95)).all()


@pytest.mark.parametrize('moe', [MoEConfig(), MoEConfig(num_experts=4, encoder_every=2, router='loss_free', shared_experts=1)])
def test_the_model_lets_all_decay_but_norms_and_positions(moe):
  leaves = encoder_decoder.build(ModelConfig(d_model=16, d_ff=16, num_heads=2, head_dim=8, moe=moe)).leaves()
  for leaf in jax.tree.leaves(leaves):
    assert leaf.decays == (not leaf.name.endswith('/scale') and 'relative_bias' not in leaf.name), leaf.name


def test_clipping_scales_the_whole_gradient():
  params = random_tree(0, SHAPES)
  gradient = random_tree(1, SHAPES)
  norm = float(optax.tree.norm(gradient))
  for limit, factor in ((norm / 4, 0.25), (norm * 4, 1.0)):
    config = OptimizerConfig(name='sgd', weight_decay=0.0, clip_norm=limit, **CONSTANT | {'learning_rate': 1.0})
    tx = make(config, 10, axes_like(SHAPES), params)
    after, _ = run(tx, params, [gradient])
    assert_close(after, jax.tree.map(lambda p, g, f=factor: p - f * g, params, gradient), rtol=1e-5)


@pytest.mark.parametrize('name', ['adamw', 'adafactor'])
def test_statistics_of_bfloat16_parameters_are_float32(name):
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_tree(0, SHAPES))
  gradients = [jax.tree.map(jnp.ones_like, params)] * 3
  after, state = run(make(OptimizerConfig(name=name, **CONSTANT), 10, axes_like(SHAPES), params), params, gradients)
  assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype('bfloat16')}
  assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim} == {jnp.dtype('float32')}


@pytest.mark.parametrize('fields', [
    {'name': 'adamw'}, {'name': 'adafactor'}, {'name': 'sgd'}, {'name': 'sgd', 'momentum': 0.9}])
def test_every_leaf_of_the_state_has_its_axes(fields):
  shapes = {'encoder': {'layers': {'wi': (3, 128, 160), 'norm': {'scale': (3, 128)}}}, 'lm_head': (128, 300)}
  axes = {
      'encoder': {'layers': {'wi': ('layers', 'embed', 'mlp'), 'norm': {'scale': ('layers', 'embed')}}},
      'lm_head': ('embed', 'vocab')}
  params = random_tree(0, shapes)
  tx = make(OptimizerConfig(**fields), 10, axes, params)
  state = tx.init(params)
  names = tx.axes
  counted = jax.tree.map(len, names, is_leaf=is_names)
  assert jax.tree.structure(counted) == jax.tree.structure(state)
  assert jax.tree.leaves(counted) == [leaf.ndim for leaf in jax.tree.leaves(state)]
  if fields['name'] == 'adafactor':
    statistics = names['inner']['statistics']
    assert statistics['encoder']['layers']['wi'] == {'row': ('layers', 'embed'), 'col': ('layers', 'mlp')}
    assert statistics['encoder']['layers']['norm']['scale'] == {'full': ('layers', 'embed')}
    assert statistics['lm_head'] == {'row': ('embed',), 'col': ('vocab',)}
  if fields['name'] == 'adamw':
    assert names['inner'].mu == names['inner'].nu == axes
