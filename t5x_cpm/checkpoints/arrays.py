"""The arrays of a checkpoint: how they are cut into chunks, and how they are read, whole or in part.

Arrays of a stack of layers are stored one layer slice (one expert) per chunk, so that a checkpoint larger than memory can be
streamed through.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from t5x_cpm import backend, trees
from t5x_cpm.checkpoints import digests, quiet, run_directory
from t5x_cpm.checkpoints.run_directory import CheckpointError, damaged, resolve
from t5x_cpm.mesh import is_names
from t5x_cpm.models.leaf import STACKED

MAX_CHUNK_BYTES = 128 * 2**20  # for arrays that are not stacks of layers, such as embedding tables
GROUP_BYTES = 2**30  # where arrays are converted, so many are read at a time, because they are digested as they are stored


def cut_axes(names: Sequence[str | None], ndim: int) -> int:
  """Along how many leading axes an array is cut into slices of its stack.

  Beyond the first axis, the last two are never cut: expert vectors [layers, experts, D] are cut into layers only.
  """
  stacked = len(list(itertools.takewhile(STACKED.__contains__, names)))
  return max(1, min(stacked, ndim - 2)) if stacked and ndim > 1 else 0


def save_args(tree: Any, axes: Any = None) -> Any:
  """How the arrays of a tree are cut into chunks: a slice of one layer, or of one expert of one layer, is one chunk.

  Args:
    tree: arrays.
    axes: a tree of the same structure, of tuples of logical axis names. None: no array is a stack of layers.
  """
  import orbax.checkpoint as ocp

  def args(names: tuple[str | None, ...], leaf: Any) -> Any:
    if depth := cut_axes(names, leaf.ndim):
      return ocp.SaveArgs(shard_axes=tuple(range(depth)))
    return ocp.SaveArgs(chunk_byte_size=MAX_CHUNK_BYTES) if leaf.nbytes > MAX_CHUNK_BYTES else ocp.SaveArgs()

  if axes is None:
    return jax.tree.map(lambda leaf: args((), leaf), tree)
  return jax.tree.map(args, axes, tree, is_leaf=is_names)


@contextlib.contextmanager
def _reading(model_dir: epath.Path, step: int, what: str) -> Iterator[None]:
  """Turns whatever Orbax and TensorStore raise about the files of a checkpoint into one line."""
  try:
    with quiet.quiet_orbax():
      yield
  except CheckpointError:
    raise
  except Exception as error:
    if 'RESOURCE_EXHAUSTED' in str(error):  # no memory, which is not the fault of a file
      raise
    raise damaged(model_dir, step, f'{what}: {quiet.reason(error)}') from error


def stored(model_dir: epath.Path, step: int, meta: Mapping[str, Any]) -> dict[str, Any]:
  """Name -> shape, dtype and storage of every array of a checkpoint. Reads no array.

  Args:
    model_dir: the run's directory.
    step: of the checkpoint.
    meta: its description.

  Raises:
    DamagedCheckpointError: what Orbax has written of them is damaged, or says something else than the description.
  """
  import orbax.checkpoint as ocp

  run_directory.check_files(model_dir, step)
  path = model_dir / 'checkpoints' / str(step) / 'state'
  with _reading(model_dir, step, 'the list of arrays in state'):
    found = trees.named(ocp.PyTreeCheckpointHandler().metadata(path).tree)
    described = {name: digests.kind(leaf.dtype, leaf.shape) for name, leaf in found.items()}
  if 'arrays' in meta:  # else it was written before there were digests
    wanted = {name: text.rpartition(' ')[0] for name, text in meta['arrays'].items()}
    for name in sorted(wanted.keys() | described.keys()):
      if wanted.get(name) != described.get(name):
        raise damaged(model_dir, step, f'state lists the array {name} as {described.get(name, "missing")}, but '
                      f'{wanted.get(name, "none")} was saved')
  return found


def _restore(path: epath.Path, abstract: Any) -> Any:
  import orbax.checkpoint as ocp

  restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
  return ocp.PyTreeCheckpointHandler().restore(
      path, args=ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=True))


def read(model_dir: epath.Path, step: int, meta: Mapping[str, Any], abstract: Any) -> Any:
  """Reads arrays of a checkpoint, in the type that they are stored in, and compares them with their digests.

  Args:
    model_dir: the run's directory.
    step: of the checkpoint.
    meta: its description.
    abstract: tree of ShapeDtypeStruct with shardings. Nothing else that is stored is read.

  Raises:
    DamagedCheckpointError: names the first array that is not what was saved, or what cannot be read.
  """
  path = model_dir / 'checkpoints' / str(step) / 'state'
  preparing = digests.prepare() if 'arrays' in meta else None
  try:
    with _reading(model_dir, step, 'state'):
      tree = jax.block_until_ready(_restore(path, abstract))
  finally:
    if preparing:
      preparing.join()
  if isinstance(tree, Mapping) and 'step' in tree and int(tree['step']) != step:
    raise damaged(model_dir, step, f'state is that of step {int(tree["step"])}; directories of two checkpoints were mixed')
  if 'arrays' in meta:
    for name, text in digests.of_tree(tree).items():
      if meta['arrays'].get(name) != text:
        raise damaged(model_dir, step, f'the array {name} in state is not what was saved')
  return tree


def compare(stored: Mapping[str, Any], wanted: Mapping[str, Any], checkpoint: epath.Path, hint: str, *, dtypes: bool) -> None:
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
    raise CheckpointError(f'The checkpoint {checkpoint} does not fit:\n  ' + '\n  '.join(lines[:5] + more) + f'\n{hint}')


def _renamed(names: list[str], rename: Mapping[str, str | None], checkpoint: epath.Path) -> dict[str, str]:
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
          f'rename: the checkpoint {checkpoint} has no parameter {old!r}. It has {", ".join(names[:8])}, ...')
  if len(set(result.values())) < len(result):
    raise CheckpointError(f'rename = {dict(rename)} gives two parameters of the checkpoint {checkpoint} one name.')
  return result


def read_or_offer(model_dir: epath.Path, step: int, read_one: Callable[[int], Any]) -> Any:
  """What `read_one` makes of the checkpoint of a step. Where this is damaged, says which other one it can read as a whole."""
  if jax.process_count() > 1:  # the others may have read it well, and do not read another one
    offering = run_directory.offering(
        model_dir, step, lambda other: run_directory.read_meta(model_dir, other), 'whose description is intact')
  else:
    offering = run_directory.offering(model_dir, step, read_one, 'which is intact')
  with offering:
    return read_one(step)


def _groups(abstract: dict[str, Any], saved: Mapping[str, Any]) -> Iterator[list[str]]:
  """The names of arrays that are read together: all, unless some are to be converted, which are then read a few at a time."""
  group: list[str] = []
  for name in abstract:
    size = sum(math.prod(saved[other].shape) * saved[other].dtype.itemsize for other in (*group, name))
    if group and size > GROUP_BYTES and any(abstract[other].dtype != saved[other].dtype for other in abstract):
      yield group
      group = []
    group.append(name)
  yield group


def _load_params(
    model_dir: epath.Path, step: int, into: Any, rename: Mapping[str, str | None] | None, shardings: Any) -> Any:
  meta = run_directory.read_meta(model_dir, step)
  checkpoint = model_dir / 'checkpoints' / str(step)
  everything = stored(model_dir, step, meta)
  prefix = 'params/'
  saved = {name[len(prefix):]: leaf for name, leaf in everything.items() if name.startswith(prefix)}
  new_names = _renamed(list(saved), rename or {}, checkpoint)
  renamed = {new: saved[old] for old, new in new_names.items()}
  wanted = renamed if into is None else trees.named(into)
  hint = 'Set ModelConfig as it was, or give `rename` (with None for what is to be left out).'
  compare(renamed, wanted, checkpoint, hint, dtypes=False)

  one_sharding = shardings is None or isinstance(shardings, jax.sharding.Sharding)
  given = dict.fromkeys(wanted, shardings) if one_sharding else trees.named(shardings)
  default = jax.sharding.SingleDeviceSharding(backend.devices()[0])
  abstract = {}
  for old, new in new_names.items():
    sharding = given[new] or (getattr(wanted[new], 'sharding', None) if into is not None else None) or default
    abstract[old] = jax.ShapeDtypeStruct(saved[old].shape, wanted[new].dtype, sharding=sharding)
  params: dict[str, Any] = {}
  for group in _groups(abstract, saved):
    asked = trees.nested({
        old: jax.ShapeDtypeStruct(saved[old].shape, saved[old].dtype, sharding=abstract[old].sharding) for old in group})
    extra = {}
    if 'step' in everything and not params:  # says which checkpoint the arrays are of
      where = abstract[group[0]].sharding
      if isinstance(where, jax.sharding.NamedSharding):
        where = jax.sharding.NamedSharding(where.mesh, jax.sharding.PartitionSpec())
      extra = {'step': jax.ShapeDtypeStruct((), everything['step'].dtype, sharding=where)}
    loaded = trees.named(read(model_dir, step, meta, {'params': asked} | extra)['params'])
    params |= {new_names[old]: loaded.pop(old).astype(abstract[old].dtype) for old in group}
  if into is None:
    return trees.nested(params)
  return jax.tree.unflatten(jax.tree.structure(into), [params[name] for name in wanted])


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
    CheckpointError: there is no such checkpoint, or a parameter, which is named, is missing, left over or of another shape; or
      something is damaged.
  """
  model_dir = resolve(model_dir)
  step = run_directory.choose(model_dir, step)
  return read_or_offer(model_dir, step, lambda step: _load_params(model_dir, step, into, rename, shardings))
