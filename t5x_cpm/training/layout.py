"""What a step is made of, before any of it is traced: what is trained, and the shape and place of every array."""

import dataclasses
import functools
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from t5x_cpm import mesh as mesh_lib
from t5x_cpm import trees, tuning
from t5x_cpm.config import Config, ConfigError, ModelConfig, row_features
from t5x_cpm.models import encoder_decoder
from t5x_cpm.models.layers import compute_dtype
from t5x_cpm.training import guidance, host_memory, optimizer

State = dict[str, Any]
Frozen = dict[str, Any]
Batch = dict[str, Any]
ENCODER_FEATURES = ('encoder_input_tokens', 'encoder_segment_ids', 'encoder_positions')
DECODER_FEATURES = (
    'decoder_input_tokens', 'decoder_target_tokens', 'decoder_segment_ids', 'decoder_positions', 'decoder_loss_weights')


@dataclasses.dataclass(frozen=True)
class Layout:
  """What the functions of a step are built from.

  Attributes:
    config: the run's configuration.
    model: the model.
    mesh: the mesh.
    leaves: a Leaf for every parameter of the state.
    trained: those of `leaves` that change by their gradient, which is what gradients and the optimizer see.
    base: a Leaf for every parameter of the frozen base; {} where the state holds all parameters.
    guided: whether a teacher has a part in the loss.
    teacher: that teacher, or several by name; None where there is none, or batches bring what it says.
    tx: the optimizer of what is trained.
    schedule: step -> learning rate.
    group_rows: rows of a batch that are routed together.
    axes: logical axes of the state as a checkpoint holds it: a tree of tuples of names.
    abstract_state: shapes, dtypes and shardings of the state, with the copies of what lies in the memory of the hosts.
    abstract_frozen: the same of what a step reads but neither changes nor saves: {'base': ..., 'teacher': ...}, if any.
    abstract_batch: the same of a batch.
    gradient_shardings: of the gradients, where MeshConfig.sharding splits the optimizer's state over data; else None.
  """

  config: Config
  model: encoder_decoder.Model
  mesh: jax.sharding.Mesh
  leaves: Any
  trained: Any
  base: Any
  guided: bool
  teacher: encoder_decoder.Model | dict[str, encoder_decoder.Model] | None
  tx: optimizer.Optimizer
  schedule: optimizer.Schedule
  group_rows: int
  axes: State
  abstract_state: State
  abstract_frozen: Frozen
  abstract_batch: Batch
  gradient_shardings: Any

  @property
  def dtype(self) -> Any:
    """The type that the model computes in."""
    return compute_dtype(self.config.model)

  def split(self, params: Any) -> tuple[Any, Any]:
    """Splits the parameters of a state in two: what is trained, and what is fixed or changes by a rule of its own."""
    return trees.split(params, self.leaves, lambda leaf: leaf.has_gradient)


def shardings_of(abstract: Any) -> Any:
  """The shardings of a tree of ShapeDtypeStruct."""
  return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _with_shardings(tree: Any, shardings: Any) -> Any:
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _axes(leaves: Any) -> Any:
  return jax.tree.map(lambda leaf: leaf.axes, leaves)


def _abstract(leaves: Any) -> Any:
  return jax.tree.map(lambda leaf: leaf.abstract, leaves)


def batch_shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and dtypes of a training batch."""
  B, S, T = config.train.batch_size, config.task.encoder_length, config.task.decoder_length
  shapes = {name: jax.ShapeDtypeStruct((B, S), jnp.int32) for name in ENCODER_FEATURES}
  shapes |= {name: jax.ShapeDtypeStruct((B, T), jnp.int32) for name in DECODER_FEATURES}
  shapes['decoder_loss_weights'] = jax.ShapeDtypeStruct((B, T), jnp.float32)
  shapes |= {name: jax.ShapeDtypeStruct((B,), jnp.int32) for name in row_features.names(config)}
  return shapes


def _group_rows(config: Config, model: encoder_decoder.Model, mesh: jax.sharding.Mesh) -> int:
  """How many rows are routed together. Raises ConfigError where these or the mesh do not divide a microbatch."""
  rows = config.train.batch_size // config.train.microbatches
  mesh_lib.check_divides(mesh, (rows,), ('batch',), 'a microbatch')
  group_rows = model.group_rows(
      config.train.batch_size, encoder=config.task.encoder_length, decoder=config.task.decoder_length)
  if rows % group_rows:
    raise ConfigError(
        f'TrainConfig.microbatches = {config.train.microbatches}: by MoEConfig.group_size = {config.model.moe.group_size}, '
        f'{group_rows} rows are routed together, which does not divide the {rows} rows of a microbatch. Change one of them.')
  return group_rows


def _in_two(leaves: Any, trained: Collection[str] | None) -> tuple[Any, Any]:
  """The top-level subtrees that are trained, and the frozen base."""
  if trained is None:
    return leaves, {}
  if not trained or set(trained) - leaves.keys():
    raise ConfigError(f'trained = {sorted(trained)}: expected names among {", ".join(sorted(leaves))}, at least one of them.')
  return ({name: leaf for name, leaf in leaves.items() if name in trained},
          {name: leaf for name, leaf in leaves.items() if name not in trained})


def _frozen(config: Config, mesh: jax.sharding.Mesh, base: Any,
            teacher: encoder_decoder.Model | dict[str, encoder_decoder.Model] | None) -> Frozen:
  """Shapes, dtypes and shardings of what a step only reads."""
  rules = mesh_lib.STATE_RULES[config.mesh.sharding][0]
  frozen: Frozen = {}
  if base:
    frozen['base'] = _with_shardings(tuning.held(base, config.delta), mesh_lib.shardings(mesh, _axes(base), rules))
  if teacher is not None:
    leaves, dtype = guidance.of_each(lambda model: model.leaves(), teacher), jnp.dtype(config.teacher.dtype)
    mesh_lib.check_tree_divides(mesh, {'teacher': _abstract(leaves)}, {'teacher': _axes(leaves)}, rules)
    held = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype if leaf.casts else leaf.dtype), leaves)
    frozen['teacher'] = _with_shardings(held, mesh_lib.shardings(mesh, _axes(leaves), rules))
  return frozen


def make(config: Config, mesh: jax.sharding.Mesh, trained: Collection[str] | None = None,
         teacher: guidance.Teacher = None) -> Layout:
  """The layout of a configuration on a mesh.

  Args:
    config: the run's configuration.
    mesh: the mesh to run on.
    trained, teacher: see `step.build`.

  Raises:
    ConfigError: a dimension that the mesh does not divide; a head_dim, batch or schedule that cannot work.
  """
  model = tuning.build_model(config)
  everything = model.leaves()
  param_rules, optimizer_rules = mesh_lib.STATE_RULES[config.mesh.sharding]
  for rules in (param_rules, optimizer_rules):
    mesh_lib.check_tree_divides(mesh, _abstract(everything), _axes(everything), rules)
  group_rows = _group_rows(config, model, mesh)
  leaves, base = _in_two(everything, ('delta',) if trained is None and config.delta.frozen else trained)
  by_gradient = trees.split(leaves, leaves, lambda leaf: leaf.has_gradient)[0]
  tx = optimizer.make(config.optimizer, config.train.steps, by_gradient)

  axes: State = {'step': (), 'params': _axes(leaves), 'opt_state': tx.axes, 'halted': ()}
  state: State = {
      'step': jax.ShapeDtypeStruct((), jnp.int32), 'params': _abstract(leaves),
      'opt_state': jax.eval_shape(tx.init, _abstract(by_gradient)), 'halted': jax.ShapeDtypeStruct((), jnp.bool)}
  shardings = mesh_lib.shardings(mesh, axes, param_rules)
  shardings['opt_state'] = mesh_lib.shardings(mesh, axes['opt_state'], optimizer_rules)
  if config.mesh.host_gib:
    dtype = compute_dtype(config.model)
    shardings = host_memory.move(state, shardings, leaves, config.mesh.host_gib, dtype)
    state = jax.eval_shape(functools.partial(host_memory.complete, shardings=shardings, dtype=dtype), state)
  guide = guidance.of_each(encoder_decoder.build, teacher) if isinstance(teacher, ModelConfig | dict) else None
  frozen = _frozen(config, mesh, base, guide)
  batch = batch_shapes(config) | guidance.shapes(config, teacher)
  batch_axes = {name: ('batch', 'length', None)[:shape.ndim] for name, shape in batch.items()}
  return Layout(
      config=config, model=model, mesh=mesh, leaves=leaves, trained=by_gradient, base=base,
      guided=teacher is not None, teacher=guide, tx=tx,
      schedule=optimizer.make_schedule(config.optimizer, config.train.steps), group_rows=group_rows, axes=axes,
      abstract_state=_with_shardings(state, shardings), abstract_frozen=frozen,
      abstract_batch=_with_shardings(batch, mesh_lib.shardings(mesh, batch_axes)),
      gradient_shardings=(mesh_lib.shardings(mesh, _axes(by_gradient), optimizer_rules)
                          if optimizer_rules is not mesh_lib.RULES else None))
