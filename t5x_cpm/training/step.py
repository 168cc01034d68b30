"""The training step: one pure function of (state, frozen, batch), built from configuration and mesh alone.

Building touches no device and no data: training, ahead-of-time compilation, benchmarks and tests call the same function.
The state is a plain dict: `step` (int32), `params`, `opt_state`, and `halted` (bool), which a loss or gradient that is not
finite sets: from then on the state stays as it was before that step, so that the cause can be looked for. Parameters that an
update made not finite set it too, and stay. Where weights lie in the memory of the hosts there are their `copies` too: see
host_memory.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from t5x_cpm import backend
from t5x_cpm import mesh as mesh_lib
from t5x_cpm.config import Config, ConfigError, row_features
from t5x_cpm.models import encoder_decoder
from t5x_cpm.models.layers import compute_dtype
from t5x_cpm.training import host_memory, losses, optimizer, partition, stability

State = dict[str, Any]
Batch = dict[str, Any]
ENCODER_FEATURES = ('encoder_input_tokens', 'encoder_segment_ids', 'encoder_positions')
DECODER_FEATURES = (
    'decoder_input_tokens', 'decoder_target_tokens', 'decoder_segment_ids', 'decoder_positions', 'decoder_loss_weights')


@dataclasses.dataclass(frozen=True)
class Step:
  """What `build` returns.

  Attributes:
    model: the model.
    fn: (state, frozen, batch) -> (state, metrics); jit-compiled, donates the state. `frozen` are parameters that are read
      but neither donated nor saved; a plain training run has none, {}.
    evaluate: (host_memory.working(state), batch) -> sums over the batch: loss, correct, weight.
    explain: (state, frozen, batch) -> the name of the first tensor that is not finite among parameters, loss and gradients
      of a step, which is not taken; None where there is none.
    init: key -> a fresh state, laid out on the mesh.
    complete: what host_memory.saved leaves of a state -> the state.
    abstract_state: shapes, dtypes and shardings of the state.
    abstract_batch: the same of a batch.
    schedule: step -> learning rate.
  """

  model: encoder_decoder.Model
  fn: Callable[..., tuple[State, dict[str, jax.Array]]]
  evaluate: Callable[..., dict[str, jax.Array]]
  explain: Callable[..., str | None]
  init: Callable[[jax.Array], State]
  complete: Callable[[State], State]
  abstract_state: State
  abstract_batch: Batch
  schedule: Callable[[Any], Any]


class Sums(NamedTuple):
  """What adds up over the parts of a batch: pairs (sum, weight) for metrics, those of each layer, and for Model.advance."""

  pairs: losses.Pairs
  layers: losses.Pairs
  updates: dict[str, jax.Array]


def batch_shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and dtypes of a training batch."""
  B, S, T = config.train.batch_size, config.task.encoder_length, config.task.decoder_length
  shapes = {name: jax.ShapeDtypeStruct((B, S), jnp.int32) for name in ENCODER_FEATURES}
  shapes |= {name: jax.ShapeDtypeStruct((B, T), jnp.int32) for name in DECODER_FEATURES}
  shapes['decoder_loss_weights'] = jax.ShapeDtypeStruct((B, T), jnp.float32)
  return shapes | {name: jax.ShapeDtypeStruct((B,), jnp.int32) for name in row_features.names(config)}


def means(pairs: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
  """Sums divided by their weights."""
  return {name: total / weight for name, (total, weight) in pairs.items()}


def _microbatches(batch: Batch, count: int, together: int) -> Batch:
  """[B, ...] -> [count, B / count, ...]. Rows, `together` at a time, are dealt out in turn: a device keeps rows of its own."""

  def deal(x: jax.Array) -> jax.Array:
    rows, rest = x.shape[0], x.shape[1:]
    hands = x.reshape(rows // (count * together), count, together, *rest)
    return jnp.moveaxis(hands, 1, 0).reshape(count, rows // count, *rest)

  return jax.tree.map(deal, batch)


def build(config: Config, mesh: jax.sharding.Mesh) -> Step:
  """Builds the step of a configuration for a mesh.

  Raises:
    ConfigError: a dimension that the mesh does not divide; a head_dim, batch or schedule that cannot work.
  """
  model = encoder_decoder.build(config.model)
  abstract_params, axes = model.abstract()
  param_rules, optimizer_rules = mesh_lib.STATE_RULES[config.mesh.sharding]
  for rules in (param_rules, optimizer_rules):
    mesh_lib.check_tree_divides(mesh, abstract_params, axes, rules)
  rows = config.train.batch_size // config.train.microbatches
  mesh_lib.check_divides(mesh, (rows,), ('batch',), 'a microbatch')
  group_rows = model.group_rows(
      config.train.batch_size, encoder=config.task.encoder_length, decoder=config.task.decoder_length)
  if rows % group_rows:
    raise ConfigError(
        f'TrainConfig.microbatches = {config.train.microbatches}: by MoEConfig.group_size = {config.model.moe.group_size}, '
        f'{group_rows} rows are routed together, which does not divide the {rows} rows of a microbatch. Change one of them.')
  labels = model.labels()
  trained_axes = partition.split(axes, labels)[0]
  trained_shapes = partition.split(abstract_params, labels)[0]
  tx = optimizer.make(config.optimizer, config.train.steps, trained_axes, trained_shapes)
  dtype = compute_dtype(config.model)
  decay = optimizer.weight_decays(config.optimizer, trained_shapes)
  schedule = optimizer.make_schedule(config.optimizer, config.train.steps)

  def loss_sums(params: Any, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array, Sums]:
    """The sum of the losses of the targets, the auxiliary losses of the layers, and what else adds up."""
    logits, auxiliary, layers, updates = model.apply(params, batch, key=key, train=key is not None)
    total, pairs = losses.cross_entropy(
        logits, batch['decoder_target_tokens'], batch['decoder_loss_weights'], config.optimizer.z_loss)
    pairs |= {name: (value, jnp.ones_like(value)) for name, value in auxiliary.items()}
    return total, sum(auxiliary.values(), jnp.zeros_like(total)), Sums(pairs, layers, updates)

  def gradients(params: Any, batch: Batch, key: jax.Array) -> tuple[Any, Sums]:
    """Gradients of the mean loss over the weighted targets of the whole batch, and what else adds up."""
    trained, rest = partition.split(params, labels)
    weight = jnp.maximum(batch['decoder_loss_weights'].sum(), 1e-9)

    def part(trained: Any, batch: Batch, key: jax.Array) -> tuple[Any, Sums]:
      def objective(trained: Any) -> tuple[jax.Array, Sums]:
        total, auxiliary, sums = loss_sums(partition.join(trained, rest), batch, key)
        return total / weight + auxiliary / config.train.microbatches, sums

      found, sums = jax.grad(objective, has_aux=True)(trained)
      return jax.tree.map(lambda gradient, shape: gradient.astype(shape.dtype), found, trained_shapes), sums

    count = config.train.microbatches
    if count == 1:
      return part(trained, batch, key)

    def body(carry: Any, inputs: Any) -> tuple[Any, None]:
      index, micro = inputs
      return jax.tree.map(jnp.add, carry, part(trained, micro, jax.random.fold_in(key, index))), None

    micro = _microbatches(batch, count, group_rows)
    shapes: Any = jax.eval_shape(part, trained, jax.tree.map(lambda x: x[0], micro), key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(body, zeros, (jnp.arange(count), micro))[0]

  def key_of(step: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.key(config.train.seed), step)

  def train_step(state: State, frozen: Any, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
    del frozen  # nothing of a plain run is frozen
    with mesh_lib.inside(mesh):
      grads, sums = gradients(host_memory.working(state), batch, key_of(state['step']))
    if optimizer_rules is not mesh_lib.RULES:  # a device updates its part alone, so it needs that part of the sum alone
      grads = jax.lax.with_sharding_constraint(grads, gradient_shardings)
    trained, rest = partition.split(state['params'], labels)
    norm, loss = optax.tree.norm(grads), means(sums.pairs)['loss']
    halted = state['halted']
    if config.train.check_finite:
      halted |= ~jnp.isfinite(loss) | ~jnp.isfinite(norm)

    def keep(old: Any, new: Any) -> Any:
      return jax.tree.map(lambda a, b: a if a is b else jnp.where(halted, a, b), old, new)

    if config.mesh.host_gib:
      places = {'params': partition.split(state_shardings['params'], labels)[0], 'opt_state': state_shardings['opt_state']}
      new, squares = host_memory.update(
          tx, grads, state['opt_state'], trained, places, decay, dtype, norm=norm, halted=halted)
      params, squares = partition.join(new['params'], rest), squares + optax.tree.norm(rest, squared=True)
    else:
      updates, opt_state = tx.update(grads, state['opt_state'], trained, norm=norm, halted=halted)
      params = partition.join(keep(trained, optax.apply_updates(trained, updates)), rest)
      new, squares = {'opt_state': opt_state}, optax.tree.norm(params, squared=True)
    new |= {'step': keep(state['step'], state['step'] + 1), 'params': keep(params, model.advance(params, sums.updates))}
    metrics = means(sums.pairs) | {f'router/{name}': value for name, value in means(sums.layers).items()} | {
        'gradient_norm': norm,
        'parameter_norm': jnp.sqrt(squares),
        'learning_rate': jnp.asarray(schedule(state['step']), jnp.float32),
        'encoder_tokens': (batch['encoder_segment_ids'] != 0).sum(),
        'decoder_tokens': (batch['decoder_segment_ids'] != 0).sum(),
    }
    if config.train.check_finite:
      halted |= ~jnp.isfinite(squares)  # the update itself did it: reported by this step, before anything is saved
    return new | {'halted': halted}, metrics | {'halted': halted}

  def evaluate(params: Any, batch: Batch) -> losses.Pairs:
    with mesh_lib.inside(mesh):
      return loss_sums(params, batch, None)[2].pairs

  @jax.jit
  def causes(state: State, batch: Batch) -> tuple[Any, Any]:
    with mesh_lib.inside(mesh):
      grads, sums = gradients(host_memory.working(state), batch, key_of(state['step']))
    return means(sums.pairs)['loss'], grads

  def explain(state: State, frozen: Any, batch: Batch) -> str | None:
    del frozen
    loss, grads = causes(state, batch)
    suspects = ({'parameter': state['params']}, {'loss': loss}, {'gradient': grads})
    return next(filter(None, map(stability.first_bad_tensor, suspects)), None)

  def init_state(key: jax.Array) -> State:
    params = model.init(key)
    opt_state = tx.init(partition.split(params, labels)[0])
    return {'step': jnp.int32(0), 'params': params, 'opt_state': opt_state, 'halted': jnp.bool(False)}

  def complete(state: State) -> State:
    return host_memory.complete(state, state_shardings, dtype)

  abstract = jax.eval_shape(init_state, jax.random.key(0))
  # Without shardings jit would put all moments on one device.
  state_shardings = mesh_lib.shardings(mesh, {'step': (), 'params': axes, 'halted': ()}, param_rules)
  moments = optimizer.state_axes(tx, trained_shapes, trained_axes)
  state_shardings['opt_state'] = mesh_lib.shardings(mesh, moments, optimizer_rules)
  if config.mesh.host_gib:
    state_shardings = host_memory.place(abstract, state_shardings, axes, config.mesh.host_gib, dtype)
    abstract = jax.eval_shape(complete, abstract)
  gradient_shardings = mesh_lib.shardings(mesh, trained_axes, optimizer_rules)
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  shapes = batch_shapes(config)
  batch_shardings = mesh_lib.shardings(mesh, {name: ('batch', 'length')[:shape.ndim] for name, shape in shapes.items()})

  options = backend.compiler_options(config.train.deterministic)

  def on_mesh(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

  return Step(
      model=model,
      fn=jax.jit(
          train_step, donate_argnums=0, in_shardings=(state_shardings, None, batch_shardings),
          out_shardings=(state_shardings, everywhere),
          compiler_options=options),
      evaluate=jax.jit(
          evaluate, in_shardings=(host_memory.working(state_shardings), batch_shardings), out_shardings=everywhere,
          compiler_options=options),
      explain=explain,
      init=lambda key: complete(jax.jit(init_state, out_shardings=host_memory.saved(state_shardings))(key)),
      complete=complete,
      abstract_state=on_mesh(abstract, state_shardings),
      abstract_batch=on_mesh(shapes, batch_shardings),
      schedule=schedule)
