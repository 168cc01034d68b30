"""The device mesh, and the only table that maps what an array axis means to the mesh axis that splits it."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from t5x_cpm.config import ConfigError, MeshConfig

AXES = ('data', 'model', 'expert')

# Logical axis -> mesh axis (or axes). What is absent or None is not split. `heads` is the joint axis num_heads * head_dim.
RULES: dict[str, str | tuple[str, ...] | None] = {
    'batch': ('data', 'expert'),
    'length': None,
    'embed': None,
    'heads': 'model',
    'mlp': 'model',
    'vocab': 'model',
    'expert': 'expert',
    'layers': None,
    'buckets': None,
}

# The gin field that sets the size of a logical axis, for messages.
FIELDS = {
    'batch': 'TrainConfig.batch_size / TrainConfig.microbatches',
    'heads': 'ModelConfig.num_heads * ModelConfig.head_dim',
    'mlp': 'ModelConfig.d_ff',
    'vocab': 'ModelConfig.vocab_size',
    'embed': 'ModelConfig.d_model',
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh data x model x expert over the given devices (default: all).

  Raises:
    ConfigError: the three sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = [config.data, config.model, config.expert]
  known = math.prod(size for size in sizes if size > 0)
  if -1 in sizes:
    sizes[sizes.index(-1)] = max(len(devices) // known, 1)
  if math.prod(sizes) != len(devices):
    raise ConfigError(
        f'MeshConfig data={config.data}, model={config.model}, expert={config.expert}: the sizes must multiply to the '
        f'number of devices, which is {len(devices)}.')
  # Auto is stated because jax.make_mesh defaults to Explicit, under which constraints become assertions.
  return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def spec(names: Sequence[str | None]) -> PartitionSpec:
  """The partition of an array whose axes have these logical names."""
  return PartitionSpec(*(RULES.get(name) if name else None for name in names))


def is_names(x: Any) -> bool:
  """Whether a node of a tree is one array's tuple of logical axis names."""
  return isinstance(x, tuple) and all(name is None or isinstance(name, str) for name in x)


def shardings(mesh: Mesh, names_tree: Any) -> Any:
  """The tree of NamedShardings for a tree of tuples of logical axis names."""
  return jax.tree.map(lambda names: NamedSharding(mesh, spec(names)), names_tree, is_leaf=is_names)


def check_divides(mesh: Mesh, shape: Sequence[int], names: Sequence[str | None], what: str) -> None:
  """Raises ConfigError where the mesh cannot split an array evenly, naming the dimension, the axis and the gin field."""
  for size, name in zip(shape, names, strict=True):
    axes = RULES.get(name) if name else None
    if axes is None:
      continue
    axes = (axes,) if isinstance(axes, str) else axes
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if size % parts:
      fields = ' * '.join(f'MeshConfig.{axis}={mesh.shape[axis]}' for axis in axes)
      raise ConfigError(
          f'{what}: dimension {name!r} has size {size}, which {fields} does not divide. Change '
          f'{FIELDS.get(str(name), "the model")} or the mesh.')


def check_tree_divides(mesh: Mesh, abstract: Any, names_tree: Any) -> None:
  """check_divides() for every array of a tree, by its path."""
  names = jax.tree.leaves(names_tree, is_leaf=is_names)
  for (path, leaf), leaf_names in zip(jax.tree_util.tree_leaves_with_path(abstract), names, strict=True):
    check_divides(mesh, leaf.shape, leaf_names, jax.tree_util.keystr(path, simple=True, separator='/'))


def shard(x: jax.Array, *names: str | None) -> jax.Array:
  """Constrains an activation's sharding by its logical axis names; does nothing where no mesh is set."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec(names))
