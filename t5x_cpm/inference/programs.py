"""What runs on the devices at inference: every function that is compiled for it is built here, with its shardings.

`build` makes the functions of one model on one mesh. They take the parameters as an argument, so that `compile` can compile the
same functions for chips that are not there. A `Program` is what an engine needs: such functions together with the parameters,
wherever these lie. `Resident` is the program whose parameters all lie on the devices.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from t5x_cpm import mesh as mesh_lib
from t5x_cpm import tuning
from t5x_cpm.config import Config, row_features
from t5x_cpm.inference import decode
from t5x_cpm.models import attention, encoder_decoder

Batch = dict[str, Any]
Params = Any
Measure = Callable[[jax.Array, Batch], Any]


class Program(Protocol):
  """A model that is ready to run. Batches are dicts of arrays [B, ...], where B is a number that `whole` returns.

  A cache is what `start` returns: leaves [L, B, ...] or [1, B, ...]. `step` and `reorder` consume the cache they are given.
  """

  def whole(self, rows: int) -> int:
    """The number of rows, rounded up to one that the devices can share evenly."""
    ...

  def start(self, batch: Batch, max_len: int) -> decode.Cache:
    """Reads the encoder's input, and makes the cache of a decoder that will read up to max_len tokens."""
    ...

  def step(self, cache: decode.Cache, tokens_BT: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, decode.Cache]:
    """Reads tokens at the given positions of each row: logits [B, T, V] after each of them, and the cache."""
    ...

  def take(self, cache: decode.Cache, rows_N: jax.Array) -> decode.Cache:
    """The cache of these rows, in this order."""
    ...

  def reorder(self, cache: decode.Cache, rows_N: jax.Array) -> decode.Cache:
    """`take` where every row is exchanged for one with the same input."""
    ...

  def generate(self, rule: decode.Rule, batch: Batch, prefix_BP: Any, stop_BE: Any, *, allowed: Any = None, seed: Any = 0,
               rows_B: Any = None) -> decode.Output:
    """`start`, and steps until every row is done; the arguments are those of `decode.while_loop`."""
    ...

  def score(self, measure: Measure, batch: Batch) -> Any:
    """measure(logits_BTV, batch) of one pass with all targets known. `measure` is a function at the level of a module."""
    ...

  def encode(self, batch: Batch) -> jax.Array:
    """The encoder's output [B, S, D]."""
    ...

  def read(self, model_dir: Any, step: int) -> None:
    """Loads the parameters of another checkpoint of the same run. Raises ConfigError where it cannot be read."""
    ...

  def with_delta(self, functions: 'Functions', delta: Params) -> 'Program':
    """The same model with a delta: functions of the model that has it, and its parameters as these take them."""
    ...

  def told(self) -> str:
    """What was done so far to bring parameters to the devices, in words; '' where there is nothing to say."""
    ...

  def compared(self, config: Config) -> str:
    """How fast it was beside what was planned, in a line; '' where nothing was."""
    ...

  def close(self) -> None:
    """Ends what runs beside the caller, after which it can read no more parameters."""
    ...


def _sharding(mesh: Any, *names: str | None) -> jax.sharding.NamedSharding:
  return jax.sharding.NamedSharding(mesh, mesh_lib.spec(names))


def _abstract(tree: Any, shardings: Any) -> Any:
  """The shapes of a tree, with shardings. A sharding in the place of a subtree applies to all of its leaves."""
  def split(sharding: Any, part: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part)

  return jax.tree.map(split, shardings, tree)


@dataclasses.dataclass(frozen=True)
class Functions:
  """The compiled functions of one model on one mesh. Rows are split over `data` and `expert`.

  Attributes:
    config: what they were built from.
    mesh: the devices that share the work.
    model: pure functions, not compiled.
    stored: shapes, types and shardings of the parameters as a checkpoint holds them.
    params: the same as the functions below take them.
    prepare: stored -> params.
    start: (params, batch, max_len) -> cache.
    step: (params, cache, tokens_BT, positions_BT) -> (logits_BTV, cache). The cache is donated.
    take: (cache, rows_N) -> cache.
    reorder: the same where every row is exchanged for one with the same input. The cache is donated.
    generate: (params, rule, batch, prefix_BP, stop_BE, allowed, seed, rows_B) -> decode.Output; see `decode.while_loop`.
    score: (params, measure, batch) -> measure(logits_BTV, batch).
    encode: (params, batch) -> [B, S, D].
  """

  config: Config
  mesh: Any
  model: encoder_decoder.Model
  stored: Params
  params: Params
  prepare: Callable[..., Params]
  start: Callable[..., decode.Cache]
  step: Callable[..., tuple[jax.Array, decode.Cache]]
  take: Callable[..., decode.Cache]
  reorder: Callable[..., decode.Cache]
  generate: Callable[..., decode.Output]
  score: Callable[..., Any]
  encode: Callable[..., jax.Array]

  def abstract_arguments(self, step: str) -> tuple[Any, ...]:
    """The arguments of `encode` ('encode') or `step` ('decode') without the arrays, for InferConfig.batch_size rows.

    The lengths are those of TaskConfig; a decoding step has one token a row.

    Raises:
      ConfigError: the mesh does not split the rows evenly.
    """
    B, S, T = self.config.infer.batch_size, self.config.task.encoder_length, self.config.task.decoder_length
    mesh_lib.check_divides(self.mesh, (B,), ('rows',), 'a batch')
    rows = _sharding(self.mesh, 'batch')
    batch = {name: jax.ShapeDtypeStruct((B, S), jnp.int32, sharding=rows)
             for name in ('encoder_input_tokens', 'encoder_segment_ids')}
    batch |= {name: jax.ShapeDtypeStruct((B,), jnp.int32, sharding=rows) for name in row_features.names(self.config)}
    if step == 'encode':
      return self.params, batch
    cache = jax.eval_shape(functools.partial(self.model.start, max_len=T), self.params, batch)
    tokens = jax.ShapeDtypeStruct((B, 1), jnp.int32, sharding=rows)
    return self.params, _abstract(cache, mesh_lib.shardings(self.mesh, encoder_decoder.CACHE_AXES)), tokens, tokens


def read_params(functions: Functions, model_dir: Any, step: int) -> Params:
  """The parameters of a checkpoint, as the functions take them, with its base if it is a delta. A device reads its own part."""
  return functions.prepare(tuning.load_whole(model_dir, step, functions.config.delta, functions.stored))


class Resident:
  """The program whose parameters all lie on the devices of a mesh.

  Attributes:
    functions: what it calls.
    params: the parameters as `Functions.prepare` returns them.
  """

  def __init__(self, functions: Functions, params: Params):
    self.functions, self.params = functions, params

  def whole(self, rows: int) -> int:
    share = self.functions.mesh.shape['data'] * self.functions.mesh.shape['expert']
    return -(-rows // share) * share

  def start(self, batch: Batch, max_len: int) -> decode.Cache:
    return self.functions.start(self.params, batch, max_len)

  def step(self, cache: decode.Cache, tokens_BT: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, decode.Cache]:
    return self.functions.step(self.params, cache, tokens_BT, positions_BT)

  def take(self, cache: decode.Cache, rows_N: jax.Array) -> decode.Cache:
    return self.functions.take(cache, rows_N)

  def reorder(self, cache: decode.Cache, rows_N: jax.Array) -> decode.Cache:
    return self.functions.reorder(cache, rows_N)

  def generate(self, rule: decode.Rule, batch: Batch, prefix_BP: Any, stop_BE: Any, *, allowed: Any = None, seed: Any = 0,
               rows_B: Any = None) -> decode.Output:
    return self.functions.generate(self.params, rule, batch, prefix_BP, stop_BE, allowed, seed, rows_B)

  def score(self, measure: Measure, batch: Batch) -> Any:
    return self.functions.score(self.params, measure, batch)

  def encode(self, batch: Batch) -> jax.Array:
    return self.functions.encode(self.params, batch)

  def read(self, model_dir: Any, step: int) -> None:
    self.params = read_params(self.functions, model_dir, step)

  def with_delta(self, functions: Functions, delta: Params) -> 'Resident':
    return Resident(functions, self.params | {'delta': delta})

  def told(self) -> str:
    return ''

  def compared(self, config: Config) -> str:
    return ''

  def close(self) -> None:
    pass


def _generate(model: encoder_decoder.Model, params: Params, rule: decode.Rule, batch: Batch, prefix_BP: jax.Array,
              stop_BE: jax.Array, allowed: jax.Array | None, seed: jax.Array, rows_B: jax.Array | None) -> decode.Output:
  """The encoder and the whole decoding loop as one program."""
  cache = model.start(params, batch, prefix_BP.shape[1] + rule.max_new_tokens - 1)
  return decode.while_loop(
      functools.partial(model.step, params), cache, rule, prefix_BP, stop_BE, take=attention.take, reorder=attention.reorder,
      seed=seed, rows_B=rows_B, allowed=allowed)


def _score(model: encoder_decoder.Model, params: Params, measure: Measure, batch: Batch) -> Any:
  return measure(model.apply(params, batch)[0], batch)


def _in_form_of(prepared: Params, shardings: Any) -> Any:
  """The shardings of stacks of layers in the form of prepared parameters, where a stack may be a tuple of its layers."""
  if isinstance(prepared, tuple):
    return tuple(_in_form_of(layer, shardings) for layer in prepared)
  if isinstance(prepared, dict):
    return {name: _in_form_of(tree, shardings[name]) for name, tree in prepared.items()}
  return shardings


def build(config: Config, mesh: Any) -> Functions:
  """The functions of a configuration's model for a mesh. Touches no device.

  Args:
    config: `model`, `mesh.sharding`, and for `abstract_arguments` `infer` and `task` are read.
    mesh: of this process's devices, or abstract.

  Raises:
    ConfigError: a dimension of a parameter that the mesh does not divide.
  """
  model = tuning.build_model(config)
  leaves = model.leaves()
  shapes, axes = tuning.held(leaves, config.delta), jax.tree.map(lambda leaf: leaf.axes, leaves)
  rules = mesh_lib.STATE_RULES[config.mesh.sharding][0]
  mesh_lib.check_tree_divides(mesh, shapes, axes, rules)
  stored = mesh_lib.shardings(mesh, axes, rules)
  prepared = jax.eval_shape(model.prepare, shapes)
  params = _in_form_of(prepared, stored)
  rows, cache = _sharding(mesh, 'batch'), mesh_lib.shardings(mesh, encoder_decoder.CACHE_AXES)

  def jit(fn: Callable[..., Any], given: tuple[Any, ...], result: Any, **options: Any) -> Callable[..., Any]:
    """Compiles fn; a sharding of None is left to the compiler, so that whatever another program returned fits."""
    return jax.jit(mesh_lib.traced(mesh, fn), in_shardings=given, out_shardings=result, **options)

  return Functions(
      config=config, mesh=mesh, model=model, stored=_abstract(shapes, stored), params=_abstract(prepared, params),
      prepare=jit(model.prepare, (stored,), params),
      start=jit(model.start, (params, rows), cache, static_argnums=2),
      step=jit(model.step, (params, cache, None, None), (None, cache), donate_argnums=1),
      take=jit(attention.take, (cache, None), cache),
      reorder=jit(attention.reorder, (cache, None), cache, donate_argnums=0),
      generate=jit(functools.partial(_generate, model), (params, rows, rows, rows, rows, None, rows), rows, static_argnums=1),
      score=jit(functools.partial(_score, model), (params, rows), None, static_argnums=1),
      encode=jit(model.encode, (params, rows), rows))
