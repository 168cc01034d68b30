"""Routers: what each promises, one row of a table each, and that none of them sees padding or, at inference, the future."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_cpm.config import ConfigError, ModelConfig, MoEConfig, gin
from t5x_cpm.models import encoder_decoder, routers
from t5x_cpm.models.routers import ROUTERS
from t5x_cpm.models.routing import RouteContext

G, T, D, E = 2, 64, 16, 4


def config(router, **moe):
  every = {'decoder_every': 0} if router == 'expert_choice' else {}
  return ModelConfig(
      vocab_size=50, d_model=D, d_ff=24, num_heads=2, head_dim=8, num_encoder_layers=2, num_decoder_layers=2, init_std=0.3,
      layer_loop='scan', moe=MoEConfig(num_experts=E, router=router, group_size=T, **every, **moe))


def route(c, seed=0, train=True, u_GTD=None, key=0, **context):
  print(f'seed {seed}')
  u_GTD = inputs(seed) if u_GTD is None else u_GTD
  rng = np.random.default_rng(seed)
  kind = c.moe.router
  ctx = RouteContext(
      valid_GT=jnp.ones(u_GTD.shape[:2], bool), ids_GT=jnp.asarray(rng.integers(0, 50, u_GTD.shape[:2])),
      row={'domain': jnp.asarray(rng.integers(0, E, u_GTD.shape[:2]))}, key=jax.random.key(key) if train else None, train=train)
  ctx = dataclasses.replace(ctx, **context)
  make = ROUTERS[kind].weights
  weights = None if make is None else make(c, nnx.Rngs(params=seed))
  return jax.jit(lambda u: routers.route(kind, c.moe, weights, u, ctx))(u_GTD), weights, ctx


def probabilities(params, u_GTD):
  return np.asarray(jax.nn.softmax(u_GTD @ params.kernel[...], axis=-1))


def inputs(seed=0):
  return np.random.default_rng(seed).standard_normal((G, T, D)).astype(np.float32)


# Each router's promise.


def switch():
  result, params, _ = route(config('switch'))
  p = probabilities(params, inputs())
  np.testing.assert_array_equal(result.expert_GTK[..., 0], p.argmax(-1))
  np.testing.assert_allclose(result.weight_GTK[..., 0], p.max(-1), rtol=1e-5)
  uniform, _, _ = route(config('switch', balance_loss=0.01), u_GTD=np.zeros((G, T, D), np.float32))
  np.testing.assert_allclose(uniform.losses['balance_loss'], 0.01, rtol=1e-5)  # alpha, whatever is chosen
  assert uniform.metrics['entropy'][0] / uniform.metrics['entropy'][1] == pytest.approx(np.log(E), rel=1e-5)


def top_k():
  for renormalise in (False, True):
    result, params, _ = route(config('top_k', top_k=2, renormalise=renormalise))
    p = probabilities(params, inputs())
    np.testing.assert_array_equal(result.expert_GTK, np.argsort(-p, axis=-1)[..., :2])
    want = -np.sort(-p, axis=-1)[..., :2]
    want = want / want.sum(-1, keepdims=True) if renormalise else want
    np.testing.assert_allclose(result.weight_GTK, want, rtol=1e-5)
  one, _, _ = route(config('top_k', top_k=1))
  same, _, _ = route(config('switch'))
  np.testing.assert_array_equal(one.expert_GTK, same.expert_GTK)
  np.testing.assert_array_equal(one.weight_GTK, same.weight_GTK)
  assert one.losses == same.losses


def top_2():
  c = config('top_2', second_policy='random')
  result, params, _ = route(c)
  p = probabilities(params, inputs())
  best = -np.sort(-p, axis=-1)[..., :2]
  np.testing.assert_allclose(result.weight_GTK, best / best.sum(-1, keepdims=True), rtol=1e-5)
  kept = np.asarray(result.expert_GTK[..., 1] < E)
  assert kept[result.weight_GTK[..., 1] > 0.2].all() and not kept.all()
  by_policy = {policy: np.asarray(route(config('top_2', second_policy=policy))[0].expert_GTK[..., 1] < E)
               for policy in ('all', 'none', 'threshold')}
  assert by_policy['all'].all() and not by_policy['none'].any()
  np.testing.assert_array_equal(by_policy['threshold'], result.weight_GTK[..., 1] > 0.2)
  first, _, _ = route(config('switch'))
  np.testing.assert_allclose(result.losses['balance_loss'], first.losses['balance_loss'], rtol=1e-6)  # of first choices alone


def prototypes():
  one, _, _ = route(config('prototypes', top_k=1))
  same, _, _ = route(config('switch'))
  for name in ('expert_GTK', 'weight_GTK'):
    np.testing.assert_array_equal(getattr(one, name), getattr(same, name))
  assert one.losses == same.losses and one.capacity == same.capacity
  two, _, _ = route(config('prototypes', top_k=2))
  assert (np.asarray(two.expert_GTK) // 2 == [0, 1]).all()  # one expert of each group


def expert_choice():
  result, _, _ = route(config('expert_choice', capacity_factor=1.0))
  loads = np.stack([np.bincount(group.reshape(-1), minlength=E + 1)[:E] for group in np.asarray(result.expert_GTK)])
  assert (loads == T // E).all() and result.capacity == T // E
  with pytest.raises(ConfigError, match='cannot be causal'):
    routers.check(MoEConfig(num_experts=E, router='expert_choice'))


def hash():  # noqa: A001
  ids = jnp.arange(G * T).reshape(G, T)
  a = np.asarray(route(config('hash'), ids_GT=ids)[0].expert_GTK).reshape(-1)
  b = np.asarray(route(config('hash'), seed=5, train=False, ids_GT=ids[:, ::-1])[0].expert_GTK)[:, ::-1].reshape(-1)
  np.testing.assert_array_equal(a, b)

  def by_hand(token):
    x = token + 0x9e3779b9
    for shift, factor in ((16, 0x85ebca6b), (13, 0xc2b2ae35)):
      x = (x ^ x >> shift) * factor & 0xffffffff
    return (x ^ x >> 16) % E

  assert a.tolist() == [by_hand(token) for token in range(G * T)]
  assert np.bincount(a, minlength=E).min() > 0.6 * G * T / E


def base():
  result, params, _ = route(config('base'))
  assert all((np.bincount(group.reshape(-1), minlength=E) == T // E).all() for group in np.asarray(result.expert_GTK))
  scores = inputs() @ np.asarray(params.centroids[...])
  chosen = np.take_along_axis(scores, np.asarray(result.expert_GTK), axis=-1)
  np.testing.assert_allclose(result.weight_GTK, 1 / (1 + np.exp(-chosen)), rtol=1e-4)
  outside, _, _ = route(config('base'), train=False)
  np.testing.assert_array_equal(outside.expert_GTK[..., 0], scores.argmax(-1))


def random_projection():
  c = config('random_projection')
  result, params, _ = route(c)
  assert all((np.bincount(group.reshape(-1), minlength=E) == T // E).all() for group in np.asarray(result.expert_GTK))
  assert (np.asarray(result.weight_GTK) == 1).all() and not result.losses
  centroids = np.asarray(params.centroids[...])
  np.testing.assert_allclose(centroids.T @ centroids, 0.01 * np.eye(E), atol=1e-6)
  outside, _, _ = route(c, train=False)
  np.testing.assert_array_equal(outside.expert_GTK[..., 0], (inputs() @ centroids).argmax(-1))
  leaves = encoder_decoder.build(c).leaves()
  assert leaves['encoder']['routers']['centroids'].update == 'fixed' and leaves['lm_head'].update == 'gradient'


def domain():
  labels = jnp.asarray([[1] * T, [3] * T])
  result, _, _ = route(config('domain'), row={'domain': labels})
  np.testing.assert_array_equal(result.expert_GTK[..., 0], labels)
  with pytest.raises(ConfigError, match='feature `domain`'):
    route(config('domain'), row={})


def loss_free():
  """From one expert for nearly all tokens to a greatest load within 20 % of the mean in 500 steps; bias moves no weight."""
  c = config('loss_free', top_k=1, bias_rate=0.003)
  rng = np.random.default_rng(0)
  u = jnp.asarray(rng.standard_normal((G, 16 * T, D)) * 0.3 + rng.standard_normal(D), jnp.float32)
  _, params, ctx = route(c, u_GTD=u)

  @jax.jit
  def step(bias):
    graph, state = nnx.split(params)
    router = nnx.merge(graph, nnx.to_pure_dict(state) | {'bias': bias})
    result = routers.route('loss_free', c.moe, router, u, ctx)
    return routers.next_bias({'bias': bias}, result.metrics['load'][0], c.moe)['bias'], result

  bias, history = jnp.zeros(E), []
  for _ in range(500):
    bias, result = step(bias)
    load = np.asarray(result.metrics['load'][0])
    history.append(load.max() / load.mean() - 1)
  print(f'greatest load above the mean: {history[0]:.2f} -> {history[-1]:.2f}')
  assert history[0] > 0.5 and np.mean(history[-10:]) <= 0.2
  scores = jax.nn.sigmoid(u @ params.kernel[...])
  np.testing.assert_allclose(result.weight_GTK, jnp.take_along_axis(scores, result.expert_GTK, -1), rtol=1e-5)
  assert 'balance_loss' not in result.losses
  leaves = encoder_decoder.build(c).leaves()['decoder']['routers']
  assert {name: leaf.update for name, leaf in leaves.items()} == {'kernel': 'gradient', 'bias': 'rule'}


PROMISES = [switch, top_k, top_2, prototypes, expert_choice, hash, base, random_projection, domain, loss_free]


@pytest.mark.parametrize('promise', PROMISES, ids=lambda promise: promise.__name__)
def test_promise(promise):
  promise()


@pytest.mark.parametrize('D, E', [(16, 4), (64, 64), (4, 10)])
def test_centroids_are_at_right_angles(D, E):
  x = np.asarray(routers.orthonormal(jax.random.key(3), D, E, jnp.float32))
  np.testing.assert_allclose(np.linalg.norm(x, axis=0), 1, rtol=1e-5)
  for start in range(0, E, D):
    block = x[:, start:start + D]
    np.testing.assert_allclose(block.T @ block, np.eye(block.shape[1]), atol=1e-5)


def test_every_router_has_its_row():
  assert set(ROUTERS) == {promise.__name__ for promise in PROMISES}


# What all of them promise.


@pytest.mark.parametrize('router', ROUTERS)
def test_padding_is_never_routed(router):
  valid = np.arange(T) < np.asarray([[T], [19]])
  u = inputs()
  result, _, _ = route(config(router), valid_GT=jnp.asarray(valid))
  assert (np.asarray(result.expert_GTK)[~valid] == E).all()
  loud = np.where(valid[..., None], u, 1e3).astype(np.float32)
  other, _, _ = route(config(router), valid_GT=jnp.asarray(valid), u_GTD=loud)
  np.testing.assert_array_equal(result.expert_GTK, other.expert_GTK)
  for one, two in ((result.losses, other.losses), (result.metrics, other.metrics)):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), one, two)


def batch(B=4, S=16, T=16, seed=0):
  rng = np.random.default_rng(seed)
  tokens = {name: jnp.asarray(rng.integers(1, 50, (B, n)), jnp.int32) for name, n in (
      ('encoder_input_tokens', S), ('decoder_input_tokens', T))}
  segments = {'encoder_segment_ids': jnp.ones((B, S), jnp.int32), 'decoder_segment_ids': jnp.ones((B, T), jnp.int32)}
  return tokens | segments | {'domain': jnp.asarray(rng.integers(0, E, B))}


@functools.cache
def decoder(router, every, loop):
  """A model, its parameters and its logits as a compiled function of a batch, for both tests of decoding."""
  c = config(router, **({} if router == 'expert_choice' else {'shared_experts': 1}))
  if every > 1:
    c = dataclasses.replace(c, moe=dataclasses.replace(c.moe, encoder_every=every, decoder_every=every))
  model = encoder_decoder.build(dataclasses.replace(c, layer_loop=loop))
  params = jax.jit(model.init)(jax.random.key(0))
  return model, params, jax.jit(lambda batch: model.apply(params, batch)[0])


@pytest.mark.parametrize('router', ROUTERS)
def test_a_decoder_sees_no_future_at_inference(router):
  apply = decoder(router, 1, 'scan')[2]
  a = batch()
  b = a | {'decoder_input_tokens': a['decoder_input_tokens'].at[:, 9:].add(1) % 50}
  np.testing.assert_allclose(apply(a)[:, :9], apply(b)[:, :9], atol=1e-5)
  assert not np.allclose(apply(a)[:, 9:], apply(b)[:, 9:])


QUICK = ('switch', {}), ('switch', {'batch_prioritised': True}), ('top_2', {}), ('base', {})
LEAKS = [(name, {'dispatch': dispatch}) for name in ROUTERS if name != 'expert_choice' for dispatch in ('einsum', 'dropless')]


@pytest.mark.parametrize('router, options', [
    *QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in LEAKS)], ids=str)
def test_what_later_tokens_change_in_training_is_what_a_router_says(router, options):
  c = config(router, second_policy='all', capacity_factor=1.0, **options)
  c = dataclasses.replace(c, moe=dataclasses.replace(c.moe, encoder_every=0), num_decoder_layers=1)
  model = encoder_decoder.build(c)
  params = jax.jit(model.init)(jax.random.key(0))
  apply = jax.jit(lambda batch: model.apply(params, batch, train=True)[0])
  a = batch()
  # Only tokens of the same row: those of other rows of a group take places too, but nothing of a row's own future is in them.
  changed = max(float(jnp.abs(apply(a)[row, :9] - apply(b)[row, :9]).max()) for row in range(4) for b in (
      a | {'decoder_input_tokens': a['decoder_input_tokens'].at[row, 9:].add(shift) % 50} for shift in (1, 7, 20)))
  assert (changed > 1e-4) == bool(routers.leak(c.moe)), (changed, routers.leak(c.moe))


@pytest.mark.parametrize('router, every, loop', [
    *((name, 1, 'scan') for name in ROUTERS if name != 'expert_choice'), ('switch', 2, 'scan'), ('switch', 2, 'unroll')])
def test_decoding_by_steps_equals_teacher_forcing(router, every, loop):
  model, params, apply = decoder(router, every, loop)
  a = batch()
  want = apply(a)
  prepared = model.prepare(params)
  cache = jax.jit(model.start, static_argnums=2)(prepared, a, 6)
  step = jax.jit(model.step)
  for position in range(6):
    logits, cache = step(prepared, cache, a['decoder_input_tokens'][:, position:position + 1], jnp.full((4, 1), position))
    np.testing.assert_allclose(logits[:, 0], want[:, position], atol=1e-4)


@pytest.mark.parametrize('change, expected', [
    ({'router': 'swich'}, "router = 'swich'.*'switch'"),
    ({'num_experts': 1}, 'num_experts = 1'),
    ({'router': 'top_k', 'top_k': 9}, 'top_k = 9.*num_experts'),
    ({'router': 'prototypes', 'num_experts': 9, 'top_k': 2}, 'expected a multiple'),
    ({'decoder_router': 'expert_choice'}, 'cannot be causal'),
    ({'dispatch': 'ragged'}, 'dispatch'),
    ({'encoder_every': 3}, 'encoder_every = 3 does not divide ModelConfig.num_encoder_layers = 2')])
def test_bad_values(change, expected):
  with pytest.raises(ConfigError, match=expected):
    encoder_decoder.build(ModelConfig(moe=MoEConfig(**{'num_experts': 8} | change)))


def test_routers_stay_in_float32_where_the_rest_is_cast():
  model = encoder_decoder.build(dataclasses.replace(config('switch'), dtype='bfloat16'))
  prepared = model.prepare(model.init(jax.random.key(0)))
  assert prepared['encoder']['routers']['kernel'].dtype == jnp.float32 and prepared['lm_head'].dtype == jnp.bfloat16


def test_groups_and_capacities_that_cannot_work_are_refused():
  from t5x_cpm import mesh as mesh_lib
  from t5x_cpm.config import Config, MeshConfig, TaskConfig, TrainConfig
  from t5x_cpm.training import step

  run = Config(model=ModelConfig(moe=MoEConfig(num_experts=64, group_size=16)), train=TrainConfig(batch_size=8),
               task=TaskConfig(encoder_length=32, decoder_length=16))
  mesh = mesh_lib.make_mesh(MeshConfig(data=1), jax.devices()[:1])
  with pytest.raises(ConfigError, match='0.31 tokens of a group of 16 with 64 experts'):
    step.build(run, mesh)
  free = MoEConfig(num_experts=64, group_size=16, dispatch='dropless')
  step.build(dataclasses.replace(run, model=ModelConfig(moe=free)), mesh)  # has no capacity
  prime = dataclasses.replace(run, task=TaskConfig(encoder_length=509, decoder_length=16), model=ModelConfig(
      moe=MoEConfig(num_experts=4, group_size=256, router='random_projection')))
  with pytest.raises(ConfigError, match='encoder_length = 509: its equal parts .*group_size = 256 .*have 1, .*such as 508'):
    step.build(prime, mesh)
  many = dataclasses.replace(run, model=ModelConfig(moe=MoEConfig(num_experts=4, group_size=512)),
                             train=TrainConfig(batch_size=8, microbatches=4))
  with pytest.raises(ConfigError, match='microbatches = 4.*8 rows are routed together.*2 rows'):
    step.build(many, mesh)
  with pytest.raises(ConfigError, match=r"dimension 'expert' has size 4, which MeshConfig.expert=3.*MoEConfig.num_experts"):
    step.build(dataclasses.replace(run, model=ModelConfig(moe=MoEConfig(num_experts=4, group_size=16))),
               jax.sharding.AbstractMesh((1, 1, 3), mesh_lib.AXES))


def test_gin_sets_the_fields_of_experts():
  loaded = gin.load([], ['MoEConfig.num_experts=4', 'MoEConfig.router=hash'])
  assert (loaded.model.moe.num_experts, loaded.model.moe.router) == (4, 'hash')
  assert 'ModelConfig.moe' not in gin.dump(loaded)


ROUTER = """
import jax.numpy as jnp
from t5x_cpm.models import routers
from t5x_cpm.models.routing import Choice, Router


def turns(moe, weights, u_GTD, ctx):
  expert = jnp.broadcast_to(jnp.arange(u_GTD.shape[1])[:, None] % moe.num_experts, (*u_GTD.shape[:2], 1))
  return Choice(expert, jnp.ones(expert.shape, jnp.float32))


routers.register('turns', Router(turns))
"""


def test_a_router_of_a_module_of_ones_own(tmp_path, monkeypatch, capsys):
  from t5x_cpm import __main__

  (tmp_path / 'my_router.py').write_text(ROUTER)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(routers, 'ROUTERS', dict(ROUTERS))
  flags = ['--dry_run', '--gin.MoEConfig.num_experts=4', '--gin.MoEConfig.router=turns', '--gin.ModelConfig.vocab_size=0']
  assert __main__.main(['train', *flags]) == 2
  assert "MoEConfig.router = 'turns': expected one of 'switch', " in (error := capsys.readouterr().err)
  assert '--import=MODULE' in error and '(set in --gin.MoEConfig.router' in error
  assert __main__.main(['train', '--import=my_router', *flags]) == 0
  assert "MoEConfig.router = 'turns'" in capsys.readouterr().out

  c = config('turns', shared_experts=0)
  model = encoder_decoder.build(c)
  assert 'routers' not in model.leaves()['encoder']
  _, losses, metrics, updates = jax.jit(model.apply)(jax.jit(model.init)(jax.random.key(0)), batch())
  assert np.asarray(metrics['encoder/load'][0]).tolist() == [[16.0] * E] * 2 and not losses and not updates
  with pytest.raises(ConfigError, match="'switch' exists already"):
    routers.register('switch', routers.Router(routers.hashed))
