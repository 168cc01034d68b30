"""Checkpoints: written in the background by Orbax, restored bit for bit on any mesh, and readable in parts.

Arrays of a stack of layers are stored one layer slice (one expert) per chunk, so that a checkpoint larger than memory can be
streamed through. `run_directory` says what lies where.
"""

import contextlib
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath

from t5x_cpm.config import CheckpointConfig, Config
from t5x_cpm.training import run_directory
from t5x_cpm.training.run_directory import CheckpointError, RunInfo, read_run, resolve

__all__ = ['CheckpointError', 'Manager', 'RunInfo', 'load_params', 'read_run', 'resolve']

DELETED = '.deleted'  # folder of checkpoints on their way out
MAX_CHUNK_BYTES = 128 * 2**20  # of arrays that are not stacks of layers: embedding tables


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
  """Keeps Orbax's log out of the terminal: it prints each failure of a save with four tracebacks, and raises it as well."""
  logger = logging.getLogger('absl')

  def keep(record: logging.LogRecord) -> bool:
    return 'orbax' not in record.pathname

  logger.addFilter(keep)
  try:
    yield
  finally:
    logger.removeFilter(keep)


def _named(tree: Any) -> dict[str, Any]:
  """'a/b/c' -> leaf."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}


def _save_args(path: tuple[Any, ...], leaf: Any) -> Any:
  """How one array is cut into chunks: a slice of one layer, or of one expert of one layer, is one chunk."""
  import orbax.checkpoint as ocp

  names = jax.tree_util.keystr(path, simple=True, separator='/').split('/')
  if 'experts' in names and leaf.ndim == 4:  # [layers, experts, in, out]
    return ocp.SaveArgs(shard_axes=(0, 1))
  if leaf.ndim > 1 and {'layers', 'routers', 'experts'} & set(names):
    return ocp.SaveArgs(shard_axes=(0,))
  if leaf.nbytes > MAX_CHUNK_BYTES:
    return ocp.SaveArgs(chunk_byte_size=MAX_CHUNK_BYTES)
  return ocp.SaveArgs()


class _Keep:
  """Which checkpoints stay: the newest `keep`, and the best `keep_best` of those that have the metric."""

  def __init__(self, config: CheckpointConfig):
    self.config = config

  def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
    config, count = self.config, len(checkpoints)
    newest = set(range(count - config.keep, count)) if config.keep else set(range(count))
    sign = 1 if config.best_mode == 'min' else -1
    scores = {}
    for index, checkpoint in enumerate(checkpoints):
      value = (checkpoint.metrics or {}).get(config.best_metric, math.nan)
      if math.isfinite(value):
        scores[index] = sign * value
    best = sorted(scores, key=lambda index: scores[index])[:config.keep_best]
    return [index in newest or index in best for index in range(count)]


class Manager:
  """Writes and restores the checkpoints of one run.

  Every process of the run makes one and calls it in the same order. As a context manager it closes itself; a save in
  progress is completed also when an exception leaves the block.
  """

  def __init__(self, model_dir: Any, config: Config, *, info: dict[str, Any]):
    """Makes model_dir usable, or says why it is not, before anything in it is changed.

    Args:
      model_dir: made if it does not exist.
      config: compared field by field with that of the last checkpoint.
      info: JSON tree of what else must not change between starts: fingerprints of the vocabulary and of the data.

    Raises:
      CheckpointError: the directory cannot be written, belongs to something else, or holds a run of another identity.
    """
    import orbax.checkpoint as ocp

    self.model_dir = resolve(model_dir)
    self.config = config
    self._primary = jax.process_index() == 0
    self._meta = run_directory.describe(config, info)
    self._failed = False
    with contextlib.ExitStack() as claim:
      if self._primary:
        claim.enter_context(run_directory.claim(self.model_dir))
      _wait_for_all('claimed')
      run_directory.check_identity(self.model_dir, config, info)
      _wait_for_all('checked')
      if self._primary:
        self._clear_partial()
        text = json.dumps(self._meta, ensure_ascii=False, indent=2) + '\n'
        run_directory.write_atomically(self.model_dir / 'config.json', text.encode())
      _wait_for_all('ready')
      if not (self.model_dir / 'config.json').exists():
        raise CheckpointError(
            f'--model_dir={self.model_dir}: process {jax.process_index()} does not see what process 0 has written there. Give '
            'a directory that all hosts share, or a bucket.')
      with _quiet_orbax():
        self._orbax = ocp.CheckpointManager(
            self.model_dir / 'checkpoints',
            options=ocp.CheckpointManagerOptions(
                # _Keep ranks by the metric; without a best_fn Orbax would not store it.
                best_fn=lambda metrics: metrics.get(config.checkpoint.best_metric, math.nan),
                preservation_policy=_Keep(config.checkpoint),
                # A directory that a kill left half deleted would look complete, so it is renamed first.
                todelete_subdir=DELETED))
      self._claim = claim.pop_all()

  def _clear_partial(self) -> None:
    """Says which half-written checkpoints a killed run left, and puts them where no one looks."""
    for path in run_directory.scan(self.model_dir)[1]:
      print(f'Ignoring a half-written checkpoint, left by a run that was stopped: {path}', file=sys.stderr, flush=True)
      if path.name.isdigit():  # copied in part, perhaps by hand: kept, under another name
        path.rename(path.parent / f'incomplete-{path.name}')
      else:
        path.rmtree()
    self._purge()

  def _purge(self) -> None:
    deleted = self.model_dir / 'checkpoints' / DELETED
    if self._primary and deleted.exists():
      deleted.rmtree()

  def latest_step(self) -> int | None:
    """The step of the last complete checkpoint."""
    steps, _ = run_directory.scan(self.model_dir)
    return steps[-1] if steps else None

  def save(self, step: int, state: Any, metrics: Mapping[str, float] | None = None) -> None:
    """Starts writing a checkpoint; returns when the state has been copied, so that it may be donated or changed.

    Waits for the previous save first. Does nothing if this step is saved already.

    Args:
      step: updates done.
      state: tree of arrays.
      metrics: by name, for CheckpointConfig.keep_best and for who reads the checkpoint.

    Raises:
      CheckpointError: the previous save failed, or this one failed at once.
    """
    import orbax.checkpoint as ocp

    self.wait()
    if step in run_directory.scan(self.model_dir)[0]:
      return
    values = {name: float(value) for name, value in (metrics or {}).items()}
    args = ocp.args.Composite(
        state=ocp.args.PyTreeSave(state, save_args=jax.tree_util.tree_map_with_path(_save_args, state)),
        meta=ocp.args.JsonSave(self._meta | {'step': step, 'metrics': values}))
    with self._one_error():
      self._orbax.save(step, args=args, metrics=values, force=True)

  @contextlib.contextmanager
  def _one_error(self) -> Iterator[None]:
    """Turns any failure of a save into one message, and frees what the save had written."""
    try:
      with _quiet_orbax():
        yield
    except Exception as error:
      self._failed = True
      if self._primary:
        for path in run_directory.scan(self.model_dir)[1]:
          with contextlib.suppress(OSError):
            path.rmtree()
      full = 'No space left' in str(error)
      reason = 'no space left on the device' if full else str(error).split('\n')[0] or type(error).__name__
      last = self.latest_step()
      intact = 'There is no earlier checkpoint.' if last is None else f'Those up to step {last} are intact.'
      advice = 'Make room, or lower CheckpointConfig.keep, and start' if full else 'Start'
      raise CheckpointError(
          f'Writing a checkpoint to {self.model_dir / "checkpoints"} failed: {reason}. {intact} {advice} the same command '
          'again to continue.') from error

  def wait(self) -> None:
    """Returns when the save in progress is complete; raises CheckpointError if it failed."""
    with self._one_error():
      self._orbax.wait_until_finished()
    self._purge()

  def close(self) -> None:
    """Waits, and releases the threads. Raises CheckpointError if the last save failed and that was not raised yet."""
    try:
      if not self._failed:
        self.wait()
    finally:
      with _quiet_orbax():
        self._orbax.close()
      self._claim.close()

  def __enter__(self) -> 'Manager':
    return self

  def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
    try:
      self.close()
    except CheckpointError as own:
      if error is None:
        raise
      print(own, file=sys.stderr, flush=True)  # beside the error that is on its way, not instead of it

  def restore(self, abstract_state: Any, step: int | None = None) -> Any:
    """The state of a checkpoint, bit for bit, on the given shardings.

    Args:
      abstract_state: tree of jax.ShapeDtypeStruct with shardings, such as Step.abstract_state.
      step: default: the last.

    Raises:
      CheckpointError: no such checkpoint, it is damaged, or a tensor is missing, left over, or of another shape or dtype.
    """
    step = run_directory.choose(self.model_dir, step)
    path = self.model_dir / 'checkpoints' / str(step) / 'state'
    hint = 'It was written with another model or optimizer: set ModelConfig and OptimizerConfig as they were.'
    _compare(_stored(path), _named(abstract_state), path, hint, dtypes=True)
    return _read(path, abstract_state)


def _wait_for_all(name: str) -> None:
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(f't5x_cpm.checkpoint.{name}')


def _damaged(path: epath.Path, error: Exception) -> CheckpointError:
  reason = str(error).split('\n')[0]
  return CheckpointError(f'The checkpoint {path.parent} is damaged: {reason[:200]}. Move it away to use an earlier one.')


def _stored(path: epath.Path) -> dict[str, Any]:
  """Name -> shape, dtype and storage of every array of a saved tree. Reads no array."""
  import orbax.checkpoint as ocp

  try:
    return _named(ocp.PyTreeCheckpointHandler().metadata(path).tree)
  except (OSError, ValueError) as error:
    raise _damaged(path, error) from error


def _read(path: epath.Path, abstract: Any) -> Any:
  """The arrays of a tree of ShapeDtypeStruct with shardings; what else is stored there is not read."""
  import orbax.checkpoint as ocp

  restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
  args = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=True)
  try:
    with _quiet_orbax():
      return ocp.PyTreeCheckpointHandler().restore(path, args=args)
  except (OSError, ValueError) as error:
    raise _damaged(path, error) from error


def _compare(stored: Mapping[str, Any], wanted: Mapping[str, Any], path: epath.Path, hint: str, *, dtypes: bool) -> None:
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
  """Stored name -> new name, by the longest prefix that `rename` has; names renamed to None are left out."""
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


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for name, leaf in leaves.items():
    *parents, last = name.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def load_params(
    model_dir: Any, *, step: int | None = None, into: Any = None, rename: Mapping[str, str | None] | None = None,
    shardings: Any = None) -> Any:
  """The parameters of a checkpoint alone: no optimizer state is read.

  Args:
    model_dir: of the run.
    step: default: the last checkpoint.
    into: tree of shapes and dtypes that the parameters must fit (they are converted to its dtypes). None: as stored.
    rename: {'old/path': 'new/path'}, of parameters or whole subtrees; {'old/path': None} leaves it out. A parameter that
      is in the checkpoint and not in `into` is an error unless it is left out so.
    shardings: tree like the result, or one sharding for all. None: those of `into`, else the first device.

  Returns:
    A nested dict of arrays.

  Raises:
    CheckpointError: no such checkpoint, or a parameter that is missing, left over or of another shape, by name.
  """
  model_dir = resolve(model_dir)
  step = run_directory.choose(model_dir, step)
  run_directory.read_meta(model_dir, step)  # refuses a format of the future
  path = model_dir / 'checkpoints' / str(step) / 'state'
  prefix = 'params/'
  stored = {name[len(prefix):]: leaf for name, leaf in _stored(path).items() if name.startswith(prefix)}
  new_names = _renamed(list(stored), rename or {}, path)
  renamed = {new: stored[old] for old, new in new_names.items()}
  wanted = renamed if into is None else _named(into)
  hint = 'Set ModelConfig as it was, or give `rename` (with None for what is to be left out).'
  _compare(renamed, wanted, path, hint, dtypes=False)

  one_sharding = shardings is None or isinstance(shardings, jax.sharding.Sharding)
  given = dict.fromkeys(wanted, shardings) if one_sharding else _named(shardings)
  default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = {}
  for old, new in new_names.items():
    sharding = given[new] or (getattr(wanted[new], 'sharding', None) if into is not None else None) or default
    abstract[old] = jax.ShapeDtypeStruct(stored[old].shape, wanted[new].dtype, sharding=sharding)
  loaded = _named(_read(path, {'params': _nested(abstract)})['params'])
  params = {new: loaded[old] for old, new in new_names.items()}
  if into is None:
    return _nested(params)
  return jax.tree.unflatten(jax.tree.structure(into), [params[name] for name in wanted])
