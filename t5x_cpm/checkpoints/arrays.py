"""The arrays of a checkpoint: how they are cut into chunks, and how they are read, whole or in part.

Arrays of a stack of layers are stored one layer slice (one expert) per chunk, so that a checkpoint larger than memory can be
streamed through.
"""

import contextlib
import itertools
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath

from t5x_cpm import backend, trees
from t5x_cpm.checkpoints import run_directory
from t5x_cpm.checkpoints.run_directory import CheckpointError, resolve
from t5x_cpm.mesh import is_names
from t5x_cpm.models.leaf import STACKED

MAX_CHUNK_BYTES = 128 * 2**20  # for arrays that are not stacks of layers, such as embedding tables


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
  """Keeps Orbax's log out of the terminal: it logs each failed save with four tracebacks, and raises the error too."""
  logger = logging.getLogger('absl')

  def keep(record: logging.LogRecord) -> bool:
    return 'orbax' not in record.pathname

  logger.addFilter(keep)
  try:
    yield
  finally:
    logger.removeFilter(keep)


def save_args(tree: Any, axes: Any = None) -> Any:
  """How the arrays of a tree are cut into chunks: a slice of one layer, or of one expert of one layer, is one chunk.

  Beyond the first axis, the last two are never cut: expert vectors [layers, experts, D] are cut into layers only.

  Args:
    tree: arrays.
    axes: a tree of the same structure, of tuples of logical axis names. None: no array is a stack of layers.
  """
  import orbax.checkpoint as ocp

  def args(names: tuple[str | None, ...], leaf: Any) -> Any:
    stacked = len(list(itertools.takewhile(STACKED.__contains__, names)))
    if stacked and leaf.ndim > 1:
      return ocp.SaveArgs(shard_axes=tuple(range(max(1, min(stacked, leaf.ndim - 2)))))
    return ocp.SaveArgs(chunk_byte_size=MAX_CHUNK_BYTES) if leaf.nbytes > MAX_CHUNK_BYTES else ocp.SaveArgs()

  if axes is None:
    return jax.tree.map(lambda leaf: args((), leaf), tree)
  return jax.tree.map(args, axes, tree, is_leaf=is_names)


def damaged(path: epath.Path, error: Exception) -> CheckpointError:
  reason = str(error).split('\n')[0]
  return CheckpointError(f'The checkpoint {path.parent} is damaged: {reason[:200]}. Move it away to use an earlier one.')


def stored(path: epath.Path) -> dict[str, Any]:
  """Name -> shape, dtype and storage of every array of a saved tree. Reads no array."""
  import orbax.checkpoint as ocp

  try:
    return trees.named(ocp.PyTreeCheckpointHandler().metadata(path).tree)
  except (OSError, ValueError) as error:
    raise damaged(path, error) from error


def read(path: epath.Path, abstract: Any) -> Any:
  """Reads the arrays that a tree of ShapeDtypeStruct with shardings asks for, and nothing else that is stored there."""
  import orbax.checkpoint as ocp

  restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
  args = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=True)
  try:
    with quiet_orbax():
      return ocp.PyTreeCheckpointHandler().restore(path, args=args)
  except (OSError, ValueError) as error:
    raise damaged(path, error) from error


def compare(stored: Mapping[str, Any], wanted: Mapping[str, Any], path: epath.Path, hint: str, *, dtypes: bool) -> None:
  """Raises CheckpointError with up to five tensors whose presence, shape or (if asked) dtype differ."""
  lines = []
  for name in sorted(stored.keys() | wanted.keys(), key=lambda name: (not name.startswith('params/'), name)):
    if name not in stored:
      lines.append(f'{name}: not in the checkpoint')
    elif name not in wanted:
      lines.append(f'{name}: in the checkpoint, but not in the model')
    elif tuple(stored[name].shape) != tuple(wanted[name].shape):
      lines.append(f'{name}: {list(stored[name].shape)} in the checkpoint, {list(wanted[name].shape)} in the model')
    elif dtypes and stored[name].dtype != wanted[name].dtype:
      lines.append(f'{name}: {stored[name].dtype} in the checkpoint, {wanted[name].dtype} in the model')
  if lines:
    more = [f'and {len(lines) - 5} more'] if len(lines) > 5 else []
    raise CheckpointError(f'The checkpoint {path.parent} does not fit:\n  ' + '\n  '.join(lines[:5] + more) + f'\n{hint}')


def _renamed(names: list[str], rename: Mapping[str, str | None], path: epath.Path) -> dict[str, str]:
  """Stored name -> new name, by the longest prefix in `rename`; names renamed to None are left out."""
  result, used = {}, set()
  for name in names:
    prefixes = [old for old in rename if name == old or name.startswith(old + '/')]
    used.update(prefixes)
    old = max(prefixes, key=len, default=None)
    if old is None:
      result[name] = name
      continue
    new = rename[old]
    if new is not None:
      result[name] = new + name[len(old):]
  for old in rename:
    if old not in used:
      raise CheckpointError(
          f'rename: the checkpoint {path.parent} has no parameter {old!r}. It has {", ".join(names[:8])}, ...')
  if len(set(result.values())) < len(result):
    raise CheckpointError(f'rename = {dict(rename)} gives two parameters of the checkpoint {path.parent} one name.')
  return result


def load_params(
    model_dir: Any, *, step: int | None = None, into: Any = None, rename: Mapping[str, str | None] | None = None,
    shardings: Any = None) -> Any:
  """Reads the parameters of a checkpoint, without the optimizer's state.

  Args:
    model_dir: the run's directory.
    step: the step of the checkpoint; by default the last.
    into: tree of shapes and dtypes that the parameters must fit (they are converted to its dtypes). None: as stored.
    rename: {'old/path': 'new/path'}, for parameters or whole subtrees; {'old/path': None} leaves them out. A parameter that
      is in the checkpoint but not in `into` is an error unless it is left out this way.
    shardings: tree like the result, or one sharding for all. None: those of `into`, else the first device.

  Returns:
    A nested dict of arrays.

  Raises:
    CheckpointError: there is no such checkpoint, or a parameter, which is named, is missing, left over or of another shape.
  """
  model_dir = resolve(model_dir)
  step = run_directory.choose(model_dir, step)
  run_directory.read_meta(model_dir, step)  # refuses a later format
  path = model_dir / 'checkpoints' / str(step) / 'state'
  prefix = 'params/'
  saved = {name[len(prefix):]: leaf for name, leaf in stored(path).items() if name.startswith(prefix)}
  new_names = _renamed(list(saved), rename or {}, path)
  renamed = {new: saved[old] for old, new in new_names.items()}
  wanted = renamed if into is None else trees.named(into)
  hint = 'Set ModelConfig as it was, or give `rename` (with None for what is to be left out).'
  compare(renamed, wanted, path, hint, dtypes=False)

  one_sharding = shardings is None or isinstance(shardings, jax.sharding.Sharding)
  given = dict.fromkeys(wanted, shardings) if one_sharding else trees.named(shardings)
  default = jax.sharding.SingleDeviceSharding(backend.devices()[0])
  abstract = {}
  for old, new in new_names.items():
    sharding = given[new] or (getattr(wanted[new], 'sharding', None) if into is not None else None) or default
    abstract[old] = jax.ShapeDtypeStruct(saved[old].shape, wanted[new].dtype, sharding=sharding)
  loaded = trees.named(read(path, {'params': trees.nested(abstract)})['params'])
  params = {new: loaded[old] for old, new in new_names.items()}
  if into is None:
    return trees.nested(params)
  return jax.tree.unflatten(jax.tree.structure(into), [params[name] for name in wanted])
