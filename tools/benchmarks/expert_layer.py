"""Times a dropless layer of experts: its parts, and how its time grows with the number of experts. Not a program of its own.

`against_pytorch.py moe` prints this at its end. There is no peer here; figures are medians of runs that take turns.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from t5x_cpm import backend
from t5x_cpm.config import ModelConfig, MoEConfig

TOKENS, GROUP = 8192, 256
COUNTS = 4, 8, 16, 32, 64, 128  # numbers of experts; with the greatest, each has 64 tokens
SHARES_OF = 8, 2048  # experts and tokens whose shares are shown

Program = Callable[[], Any]


def _alternating(programs: dict[Any, Program], repeats: int) -> dict[Any, float]:
  """Median seconds of each program. They take turns, so that other load on the machine hits all of them."""
  seconds: dict[Any, list[float]] = {name: [] for name in programs}
  for turn in range(repeats + 1):
    for name, program in programs.items():
      start = time.perf_counter()
      program()
      if turn:  # the first one compiles
        seconds[name].append(time.perf_counter() - start)
  return {name: statistics.median(each) for name, each in seconds.items()}


class Layer(NamedTuple):
  """The parts of a dropless layer, as functions of its weights and of tokens [G, T, D].

  Attributes:
    route: says where tokens go.
    dispatch: takes that as well, and gives the output of the layer.
    products: the matrix products alone, with tokens in the order in which they are.
    even: the products as if all experts had equally many tokens: one batched product for each matrix.
    arguments: random weights and tokens.
  """

  route: Callable[..., Any]
  dispatch: Callable[..., Any]
  products: Callable[..., Any]
  even: Callable[..., Any]
  arguments: tuple[Any, Any]


def _layer(model: ModelConfig, experts: int, tokens: int) -> Layer:
  import jax
  import jax.numpy as jnp
  import numpy as np
  from flax import nnx

  from t5x_cpm.models import dispatch as dispatch_lib
  from t5x_cpm.models import grouped, routers
  from t5x_cpm.models.layers import MLP
  from t5x_cpm.models.routing import RouteContext, Routing

  config = MoEConfig(num_experts=experts, dispatch='dropless')
  model = dataclasses.replace(model, moe=config)

  @nnx.split_rngs(splits=experts)
  @nnx.vmap
  def make(rngs: nnx.Rngs) -> MLP:
    return MLP(model, model.num_encoder_layers, rngs)

  def both() -> Any:
    return make(nnx.Rngs(params=0)), routers.Scores(model, nnx.Rngs(params=1))

  graph = nnx.graphdef(nnx.eval_shape(both))
  u_GTD = jnp.asarray(np.random.default_rng(0).standard_normal((tokens // GROUP, GROUP, model.d_model), np.float32))
  context = RouteContext(jnp.ones(u_GTD.shape[:2], bool), jnp.zeros(u_GTD.shape[:2], jnp.int32), train=True)

  def route(state: Any, u_GTD: jax.Array) -> Routing:
    return routers.route('switch', config, nnx.merge(graph, state)[1], u_GTD, context)

  def dispatch(state: Any, u_GTD: jax.Array, where: Routing) -> jax.Array:
    return dispatch_lib.dispatch(nnx.merge(graph, state)[0], u_GTD, where, 0.0, None)

  def products(state: Any, u_GTD: jax.Array, where: Routing) -> jax.Array:
    counts_E = jnp.bincount(where.expert_GTK.reshape(-1), length=experts)
    return nnx.merge(graph, state)[0](
        u_GTD.reshape(-1, model.d_model), product=lambda x, kernel: grouped.grouped_dot(x, kernel, counts_E))

  def even(state: Any, u_GTD: jax.Array) -> jax.Array:
    return nnx.merge(graph, state)[0](
        u_GTD.reshape(experts, -1, model.d_model), product=lambda x, kernel: jnp.einsum('eni,eio->eno', x, kernel))

  return Layer(route, dispatch, products, even, (jax.jit(lambda: nnx.state(both()))(), u_GTD))


def _ready(program: Callable, *arguments: Any) -> Program:
  import jax

  program = jax.jit(program)
  return lambda: jax.block_until_ready(program(*arguments))


def _with_gradients(fn: Callable) -> Callable:
  """The sum of all that fn returns, and its gradients with respect to the first two arguments."""
  import jax
  import jax.numpy as jnp

  def total(*arguments: Any) -> Any:
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(fn(*arguments)) if jnp.issubdtype(leaf.dtype, jnp.floating))

  return jax.value_and_grad(total, argnums=(0, 1))


def shares(model: ModelConfig, repeats: int) -> dict[str, float]:
  """Seconds of a layer, forward and backward, and of each part as a program of its own."""
  import jax

  from t5x_cpm.models import dispatch as dispatch_lib

  experts, tokens = SHARES_OF
  route, dispatch, products, _, arguments = _layer(model, experts, tokens)
  where = jax.jit(route)(*arguments)

  def layer(state: Any, u_GTD: jax.Array) -> Any:
    where = route(state, u_GTD)
    return dispatch(state, u_GTD, where), where.losses

  def there_and_back(_: Any, u_GTD: jax.Array) -> Any:
    return dispatch_lib.dispatch(lambda x, drop, product: x, u_GTD, where, 0.0, None)  # type: ignore[arg-type]

  def chosen(state: Any, u_GTD: jax.Array) -> Any:
    where = route(state, u_GTD)
    return where.weight_GTK, where.losses

  seconds = _alternating({
      'layer': _ready(_with_gradients(layer), *arguments),
      'router': _ready(_with_gradients(chosen), *arguments),
      'sort': _ready(lambda expert_A: dispatch_lib.sort_by_expert(expert_A, experts), where.expert_GTK.reshape(-1)),
      'gather': _ready(_with_gradients(there_and_back), *arguments),
      'products': _ready(_with_gradients(products), *arguments, where)}, repeats)
  seconds['gather'] -= seconds['sort']
  return seconds


def by_count(model: ModelConfig, repeats: int) -> dict[int, tuple[float, ...]]:
  """For each number of experts, seconds of TOKENS tokens: forward, with gradients, and `even` with gradients."""
  programs: dict[Any, Program] = {}
  for experts in COUNTS:
    route, dispatch, _, even, arguments = _layer(model, experts, TOKENS)

    def layer(state: Any, u_GTD: Any, route: Callable = route, dispatch: Callable = dispatch) -> Any:
      where = route(state, u_GTD)
      return dispatch(state, u_GTD, where), where.losses

    programs[experts, 0] = _ready(layer, *arguments)
    programs[experts, 1] = _ready(_with_gradients(layer), *arguments)
    programs[experts, 2] = _ready(_with_gradients(even), *arguments)
  seconds = _alternating(programs, repeats)
  return {experts: tuple(seconds[experts, which] for which in range(3)) for experts in COUNTS}


def report(model: ModelConfig, repeats: int, threads: int) -> dict[str, Any]:
  """Prints both tables, and returns their figures."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
  backend.keep_memory()
  parts = shares(model, repeats)
  whole = parts.pop('layer')
  print(f'one dropless layer of {SHARES_OF[0]} experts, {SHARES_OF[1]} tokens, forward and backward: {1e3 * whole:.1f} ms')
  print('  alone: ' + ', '.join(f'{name} {1e3 * each:.1f} ms ({each / whole:.1%})' for name, each in parts.items()))
  counts = by_count(model, repeats)
  print(f'one dropless layer of {TOKENS} tokens; of 4: against 4 experts; even: one batched product, as if loads were equal')
  print(f'{"experts":>9} {"tokens each":>12} {"forward":>9} {"of 4":>6} {"and back":>9} {"of 4":>6} {"even":>9} {"of 4":>6}')
  for experts, each in counts.items():
    columns = ' '.join(f'{one:8.3f}s {one / first:6.2f}' for one, first in zip(each, counts[COUNTS[0]], strict=True))
    print(f'{experts:9} {TOKENS // experts:12} {columns}')
  return {'layer': whole, 'parts': parts, 'counts': counts}
