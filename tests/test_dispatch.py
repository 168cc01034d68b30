"""Dispatch: both ways against a plain sum over one-hot choices, forward and backward."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_cpm.config import ModelConfig, MoEConfig
from t5x_cpm.models import dispatch, grouped, routers
from t5x_cpm.models.layers import MLP
from t5x_cpm.models.routing import Routing

G, T, D, F, E = 3, 24, 8, 12, 4
CONFIG = ModelConfig(d_model=D, d_ff=F, init_std=0.3, moe=MoEConfig(num_experts=E))


def make_mlp(seed=0):
  @nnx.split_rngs(splits=E)
  @nnx.vmap
  def make(rngs):
    return MLP(CONFIG, 1, rngs)

  return make(nnx.Rngs(params=seed))


GRAPH, PARAMS = (lambda split: (split[0], nnx.to_pure_dict(split[1])))(nnx.split(make_mlp()))


def reference(params, u_GTD, routing, placed_GTK=None):
  """Every token through every expert, weighted with what it chose."""
  hot_GTKE = jax.nn.one_hot(routing.expert_GTK, E)
  weight_GTK = routing.weight_GTK if placed_GTK is None else routing.weight_GTK * placed_GTK
  mix_GTE = jnp.einsum('GTKE,GTK->GTE', hot_GTKE, weight_GTK)
  outputs = [nnx.merge(GRAPH, jax.tree.map(lambda leaf: leaf[e], params))(u_GTD) for e in range(E)]  # noqa: B023
  return sum(mix_GTE[..., e, None] * outputs[e] for e in range(E))


def routing_of(load, K, places, seed=0):
  rng = np.random.default_rng(seed)
  if load == 'random':
    expert = np.stack([rng.permutation(E)[:K] for _ in range(G * T)])
  elif load == 'empty':
    expert = rng.choice([0, 2], (G * T, 1)).repeat(K, 1) + np.arange(K) % 2  # nobody goes to the last but in second place
  else:
    expert = np.full((G * T, K), 1)
    expert[:, 1:] = E
  expert = expert.reshape(G, T, K)
  expert[0, 5:9] = E  # padding
  weight = rng.uniform(0.1, 1, (G, T, K)).astype(np.float32)
  return Routing(jnp.asarray(expert, jnp.int32), jnp.asarray(weight), E, places, None, {}, {})


@functools.cache
def compiled(fn, count):
  """(value, gradients with respect to the first `count` arguments) of a function."""
  def loss(*a):
    value = fn(*a)
    return jnp.sum(jnp.sin(value)), value

  def both(*a):
    gradients, value = jax.grad(loss, tuple(range(count)), has_aux=True)(*a)
    return value, gradients

  return jax.jit(both)


def compare(fn, want, count, *arguments):
  """Values, and gradients with respect to the first `count` arguments."""
  (value, got), (wanted, expected) = (compiled(which, count)(*arguments) for which in (fn, want))
  np.testing.assert_allclose(value, wanted, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), got, expected)


def dispatched(params, u_GTD, weight_GTK, routing):
  return dispatch.dispatch(nnx.merge(GRAPH, params), u_GTD, dataclasses.replace(routing, weight_GTK=weight_GTK), 0.0, None)


def one_hot(params, u_GTD, weight_GTK, routing):
  routing = dataclasses.replace(routing, weight_GTK=weight_GTK)
  return reference(params, u_GTD, routing, None if routing.capacity is None else dispatch.places_of(routing)[1])


@pytest.mark.parametrize('load', ['random', 'empty', 'one'])
@pytest.mark.parametrize('K', [1, 2])
@pytest.mark.parametrize('places', [None, T, 3])
def test_dispatch_equals_one_hot(load, K, places):
  routing = routing_of(load, K, places)
  u_GTD = jnp.asarray(np.random.default_rng(1).standard_normal((G, T, D)), jnp.float32)
  compare(dispatched, one_hot, 3, PARAMS, u_GTD, routing.weight_GTK, routing)


def test_places_are_taken_by_first_choices_in_order():
  expert = jnp.asarray([[[0, 1], [0, 1], [1, 0], [0, E]]])
  routing = Routing(expert, jnp.ones((1, 4, 2)), E, 2, None, {}, {})
  _, placed = dispatch.places_of(routing)
  assert placed.tolist() == [[[True, True], [True, False], [True, False], [False, False]]]
  assert dispatch.left_behind(routing, jnp.ones((1, 4), bool))[0] == 1

  confident = dataclasses.replace(routing, priority_GT=jnp.asarray([[0.1, 0.2, 0.3, 0.4]]))
  assert dispatch.places_of(confident)[1].tolist() == [[[False, False], [True, True], [True, False], [True, False]]]


def test_overflow_leaves_the_rest_of_an_even_load_alone():
  """All to one of E experts with capacity factor c: 1 - c / E of the tokens are left behind."""
  config = MoEConfig(num_experts=E, capacity_factor=1.25)
  places = routers.get('switch').capacity(config, 32)
  routing = Routing(jnp.zeros((1, 32, 1), jnp.int32), jnp.ones((1, 32, 1)), E, places, None, {}, {})
  left, tokens = dispatch.left_behind(routing, jnp.ones((1, 32), bool))
  assert left / tokens == pytest.approx(1 - 1.25 / E)


@pytest.mark.parametrize('B, length, size, want', [
    (32, 96, 512, (4, 1)), (32, 32, 512, (16, 1)), (32, 512, 512, (1, 1)), (32, 512, 256, (1, 2)), (32, 500, 256, (1, 2)),
    (32, 7, 3, (1, 7)), (32, 5, 4, (1, 5)), (4, 32, 512, (4, 1)), (6, 32, 512, (2, 1)), (3, 32, 512, (1, 1))])
def test_groups_of_rows(B, length, size, want):
  assert dispatch.rows_together(B, length, size) == want
  rows, parts = want
  x = np.arange(B * length).reshape(B, length)
  groups = dispatch.to_groups(x, size)
  assert groups.shape == (B * parts // rows, rows * length // parts) and groups.shape[1] <= size
  np.testing.assert_array_equal(groups.reshape(-1), x.reshape(-1))


@pytest.mark.parametrize('counts', [[5, 0, 9, 3], [0, 0, 0, 0], [17, 0, 0, 0], [0, 0, 0, 20], [300, 1, 128, 127]])
def test_grouped_product(counts):
  rng = np.random.default_rng(0)
  A = sum(counts) + 3
  x = jnp.asarray(rng.standard_normal((A, 6)), jnp.float32)
  kernel = jnp.asarray(rng.standard_normal((4, 6, 5)), jnp.float32)
  expert = np.repeat(np.arange(5), [*counts, 3])

  def want(x, kernel):
    padded = jnp.concatenate([kernel, jnp.zeros_like(kernel[:1])])
    return jnp.einsum('AI,AIO->AO', x, padded[expert])

  compare(lambda x, kernel: grouped.grouped_dot(x, kernel, jnp.asarray(counts)), want, 2, x, kernel)


def test_dropout_of_experts_depends_on_the_token_alone():
  """However tokens are sorted, and in the right proportion."""
  u_GTD = jnp.ones((1, 2000, D))
  key, rate = jax.random.key(0), 0.25
  mlp = nnx.merge(GRAPH, PARAMS)
  expert = jax.random.randint(jax.random.key(1), (1, 2000, 1), 0, E)
  one = Routing(expert, jnp.ones((1, 2000, 1)), E, None, None, {}, {})
  y = dispatch.dispatch(mlp, u_GTD, one, rate, key)
  plain = dispatch.dispatch(mlp, u_GTD, one, 0.0, None)
  assert not np.allclose(y, plain)
  np.testing.assert_allclose(y.mean(axis=1), plain.mean(axis=1), atol=0.05 * float(jnp.abs(plain).max()))
  shifted = dataclasses.replace(one, expert_GTK=expert.at[:, :1000].set(E))
  np.testing.assert_allclose(dispatch.dispatch(mlp, u_GTD, shifted, rate, key)[:, 1000:], y[:, 1000:], atol=1e-6)
