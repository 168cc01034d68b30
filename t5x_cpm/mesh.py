"""The device mesh, and the only table that maps the meaning of an array's axis to the mesh axis that splits it."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from t5x_cpm import backend
from t5x_cpm.config import ConfigError, MeshConfig

AXES = ('data', 'model', 'expert')
Rules = dict[str, str | tuple[str, ...] | None]

# Logical axis -> mesh axis (or axes). An axis that is absent or None is not split. `heads` is the joint axis of num_heads *
# head_dim.
RULES: Rules = {
    'batch': ('data', 'expert'),
    'rows': ('data', 'expert'),  # the batch axis outside training
    'length': None,
    'embed': None,
    'heads': 'model',
    'mlp': 'model',
    'vocab': 'model',
    'expert': 'expert',
    'layers': None,
    'buckets': None,
    'slot': None,
}

# The rules for parameters or optimizer state that MeshConfig.sharding also splits over data: along d_model, over whichever of
# these two mesh axes the array's other axes leave free (an expert's weights are already split over `expert`). Weights are
# gathered where they are used.
OVER_DATA: Rules = RULES | {'embed': ('data', 'expert')}

# MeshConfig.sharding -> rules of the parameters, and of the optimizer's state.
STATE_RULES: dict[str, tuple[Rules, Rules]] = {
    'none': (RULES, RULES), 'optimizer': (RULES, OVER_DATA), 'full': (OVER_DATA, OVER_DATA)}

# The gin field that sets the size of a logical axis, for messages.
FIELDS = {
    'batch': 'TrainConfig.batch_size / TrainConfig.microbatches',
    'rows': 'InferConfig.batch_size',
    'heads': 'ModelConfig.num_heads * ModelConfig.head_dim',
    'mlp': 'ModelConfig.d_ff',
    'vocab': 'ModelConfig.vocab_size',
    'embed': 'ModelConfig.d_model',
    'expert': 'MoEConfig.num_experts',
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh data x model x expert over the given devices (default: all).

  With MeshConfig.slices, neighbours along `data` lie in one slice where possible, and `model` and `expert` never leave a slice.

  Raises:
    ConfigError: the three sizes do not multiply to the number of devices, the slices do not divide `data`, the devices do
      not form such slices, or JAX cannot start on the platform that JAX_PLATFORMS names.
  """
  devices = backend.devices() if devices is None else list(devices)
  sizes = [config.data, config.model, config.expert]
  known = math.prod(size for size in sizes if size > 0)
  if -1 in sizes:
    sizes[sizes.index(-1)] = max(len(devices) // known, 1)
  given = f'MeshConfig data={config.data}, model={config.model}, expert={config.expert}'
  if math.prod(sizes) != len(devices):
    raise ConfigError(f'{given}: the sizes must multiply to the number of devices, which is {len(devices)}.')
  # Auto is stated because jax.make_mesh defaults to Explicit, under which constraints become assertions.
  types = (AxisType.Auto,) * 3
  if config.slices == 1:
    try:
      return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # an axis that covers only part of a torus dimension, such as 32 of 4 x 4 x 4
      split = mesh_utils.create_device_mesh(tuple(sizes), devices, allow_split_physical_axes=True)
      return Mesh(split, AXES, axis_types=types)
  if sizes[0] % config.slices:
    raise ConfigError(f'{given}, slices={config.slices}: the slices split the data axis, and do not divide its {sizes[0]}.')
  by_process = getattr(devices[0], 'slice_index', None) is None  # not a TPU: each process counts as a slice
  try:
    array = mesh_utils.create_hybrid_device_mesh(
        (sizes[0] // config.slices, sizes[1], sizes[2]), (config.slices, 1, 1), devices, process_is_granule=by_process,
        allow_split_physical_axes=True)
  except (ValueError, NotImplementedError, AssertionError) as error:  # JAX asserts that a slice is a box
    kind = 'processes' if by_process else 'slices'
    count = len({device.process_index if by_process else device.slice_index for device in devices})
    raise ConfigError(f'{given}, slices={config.slices}: the devices lie in {count} {kind}, which have no such mesh. '
                      f'({error})') from None
  return Mesh(array, AXES, axis_types=types)


def _split(names: Sequence[str | None], rules: Rules) -> list[tuple[str, ...]]:
  """The mesh axes that split each dimension. A mesh axis splits only the first dimension that asks for it."""
  used: set[str] = set()
  split = []
  for name in names:
    axes = (rules.get(name) if name else None) or ()
    axes = tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes) if axis not in used)
    used.update(axes)
    split.append(axes)
  return split


def spec(names: Sequence[str | None], rules: Rules = RULES) -> PartitionSpec:
  """The partition of an array whose axes have these logical names."""
  return PartitionSpec(*((axes[0] if len(axes) == 1 else axes or None) for axes in _split(names, rules)))


def is_names(x: Any) -> bool:
  """Whether a node of a tree is one array's tuple of logical axis names."""
  return isinstance(x, tuple) and all(name is None or isinstance(name, str) for name in x)


def shardings(mesh: Mesh, names_tree: Any, rules: Rules = RULES) -> Any:
  """The tree of NamedShardings for a tree of tuples of logical axis names."""
  return jax.tree.map(lambda names: NamedSharding(mesh, spec(names, rules)), names_tree, is_leaf=is_names)


def check_divides(mesh: Mesh, shape: Sequence[int], names: Sequence[str | None], what: str, rules: Rules = RULES) -> None:
  """Raises ConfigError where the mesh cannot split an array evenly, naming the dimension, the axis and the gin field."""
  for size, name, axes in zip(shape, names, _split(names, rules), strict=True):
    if size % math.prod(mesh.shape[axis] for axis in axes):
      fields = ' * '.join(f'MeshConfig.{axis}={mesh.shape[axis]}' for axis in axes)
      raise ConfigError(
          f'{what}: dimension {name!r} has size {size}, which {fields} does not divide. Change '
          f'{FIELDS.get(str(name), "the model")} or the mesh.')


def check_tree_divides(mesh: Mesh, abstract: Any, names_tree: Any, rules: Rules = RULES) -> None:
  """Applies check_divides() to every array of a tree; errors name the array by its path."""
  names = jax.tree.leaves(names_tree, is_leaf=is_names)
  for (path, leaf), leaf_names in zip(jax.tree_util.tree_leaves_with_path(abstract), names, strict=True):
    check_divides(mesh, leaf.shape, leaf_names, jax.tree_util.keystr(path, simple=True, separator='/'), rules)


def inside(mesh: Mesh) -> Any:
  """A context for tracing, in which `shard` refers to this mesh."""
  return jax.sharding.use_abstract_mesh(mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh)


def traced(mesh: Mesh, fn: Callable[..., Any]) -> Callable[..., Any]:
  """Wraps a function so that its body runs `inside` a mesh."""
  @functools.wraps(fn)
  def on_mesh(*args: Any, **kwargs: Any) -> Any:
    with inside(mesh):
      return fn(*args, **kwargs)

  return on_mesh


def shard(x: jax.Array, *names: str | None) -> jax.Array:
  """Constrains the sharding of an activation by its logical axis names; does nothing where no mesh is set."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec(names))
