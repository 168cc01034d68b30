"""Reading and writing tensors slice by slice, so that a model larger than memory streams through.

A *slice* is what lies at an index of the leading axes of a tensor: one layer, or one expert of one layer; () is the whole.
`CheckpointReader` reads slices of a checkpoint (`readers` those of other formats), `TensorWriter` makes a run directory with a
checkpoint of step 0. What it writes lies in DIR.partial until the last slice is there, so nothing is ever half made.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from etils import epath

from t5x_cpm import backend, files, stored, trees
from t5x_cpm.checkpoints import arrays, digests, quiet, run_directory
from t5x_cpm.checkpoints.manager import Manager
from t5x_cpm.checkpoints.readers import Index, Kind, Region
from t5x_cpm.checkpoints.run_directory import CheckpointError
from t5x_cpm.chips import GiB
from t5x_cpm.config import Config, to_dict
from t5x_cpm.models.leaf import Leaf
from t5x_cpm.progress import Progress

TRIM_BYTES = 16 * 2**20  # after a slice of more, freed memory is given back to the system
PARTIAL = '.partial'  # at the end of the name of a directory that is not complete
CHUNK_BYTES = 32 << 20  # at most, of what is written at a time
JOURNAL = 'slices.jsonl'  # in it, which slices are written, with their digests


def indices(leaf: Leaf) -> Iterator[Index]:
  """The slices of a parameter of a model: its layers, or the experts of its layers."""
  return np.ndindex(*leaf.shape[:len(leaf.stacked)])


def _open(spec: dict[str, Any], **options: Any) -> Any:
  import tensorstore

  return tensorstore.open(spec, **options).result()


def _store(state: epath.Path, name: str) -> Any:
  """An array of a checkpoint, as Orbax has written it, in TensorStore."""
  base = str(state) if '://' in str(state) else f'file://{os.path.abspath(state)}'
  return _open({'driver': 'zarr', 'kvstore': {
      'driver': 'ocdbt', 'base': f'{base.rstrip("/")}/', 'path': f'{name.replace("/", ".")}/'}})


def _pieces(part: Any) -> Iterator[tuple[slice, ...]]:
  """A slice of an array in rows of its chunks, so that TensorStore has one chunk of it in memory at a time."""
  rows = part.chunk_layout.read_chunk.shape[0] if part.rank else 0
  if not rows:
    yield ()
  for start in range(0, part.shape[0], rows) if rows else ():
    yield (slice(start, min(start + rows, part.shape[0])),)


class CheckpointReader:
  """The parameters of a checkpoint of this project. A tensor whose slices were all read is compared with its digest.

  Attributes:
    kinds: shape and type by name.
  """

  def __init__(self, model_dir: Any, step: int | None = None):
    """The checkpoint of a step; None is the last. Raises CheckpointError where there is none, or it is damaged."""
    self._model_dir = run_directory.resolve(model_dir)
    self._step = run_directory.choose(self._model_dir, step)
    meta = run_directory.read_meta(self._model_dir, self._step)
    found = arrays.stored(self._model_dir, self._step, meta)
    self._digests = meta.get('arrays', {})
    self.kinds = {name.removeprefix('params/'): Kind(tuple(leaf.shape), np.dtype(leaf.dtype))
                  for name, leaf in found.items() if name.startswith('params/')}
    self._running = {name: digests.Running(kind.dtype, kind.shape) for name, kind in self.kinds.items()}
    self._stores: dict[str, Any] = {}

  def place(self, name: str) -> str:
    """Where a tensor lies, for errors."""
    return f'{self._model_dir / "checkpoints" / str(self._step)}'

  def read(self, name: str, index: Region = ()) -> np.ndarray:
    """The slice at an index, or rows of one, which are not compared with a digest.

    Raises:
      DamagedCheckpointError: it cannot be read, or the tensor, of which all slices were now read, is not what was saved.
    """
    state = self._model_dir / 'checkpoints' / str(self._step) / 'state'
    try:
      if name not in self._stores:
        self._stores = {name: _store(state, f'params/{name}')}  # one at a time: each keeps a cache
      part = self._stores[name][index]
      pieces = list(_pieces(part))
      if len(pieces) == 1:  # without a copy
        value = part.read().result()
      else:
        value = np.empty(part.shape, part.dtype.numpy_dtype)
        for piece in pieces:
          value[piece] = part[piece].read().result()
    except (ValueError, OSError) as error:
      raise run_directory.damaged(self._model_dir, self._step, f'the array {name}: {quiet.reason(error)}') from error
    if any(isinstance(place, slice) for place in index):
      return value
    running = self._running[name]
    running.add(cast(Index, index), value)
    if running.is_whole and self._digests.get(f'params/{name}', running.text) != running.text:
      raise run_directory.damaged(self._model_dir, self._step, f'the array {name} in state is not what was saved')
    return value


def check_room(folder: epath.Path, needed: float, what: str) -> None:
  """Raises CheckpointError where the disk of a local folder, which need not exist, has not `needed` bytes free for `what`."""
  where = next(path for path in (folder, *folder.parents) if path.exists())
  if '://' not in str(folder) and (free := shutil.disk_usage(where).free) < needed:
    raise CheckpointError(f'{folder}: {what} takes about {needed / GiB:.1f} GiB, and {free / GiB:.1f} are free there.')


def _chunks(leaf: Leaf) -> list[int]:
  """The chunks of a parameter: rows of a slice, of at most CHUNK_BYTES, because each is in memory as it is and compressed."""
  depth = arrays.cut_axes(leaf.axes, len(leaf.shape))
  if depth == len(leaf.shape):
    return [1] * depth
  row = math.prod(leaf.shape[depth + 1:]) * np.dtype(leaf.dtype).itemsize
  return [*[1] * depth, max(1, min(leaf.shape[depth], CHUNK_BYTES // row)), *leaf.shape[depth + 1:]]


class TensorWriter:
  """Writes a run directory with the parameters of a model as the checkpoint of step 0, slice by slice in any order.

  As a context manager it completes the directory. Where an exception or a kill ends the block before, what was written stays in
  DIR.partial, and the same writer goes on with it.
  """

  def __init__(self, model_dir: Any, config: Config, info: dict[str, Any], leaves: Iterable[Leaf], made_from: Any = None):
    """Begins DIR.partial, or goes on with it.

    Args:
      model_dir: a new local directory.
      config: of the run.
      info: what else identifies it; see `Manager`.
      leaves: the parameters of its model.
      made_from: a JSON tree of what the parameters are made of; what was begun from something else is not gone on with.

    Raises:
      CheckpointError: the directory exists, or DIR.partial is of something else.
    """
    self.folder = run_directory.new(model_dir)
    self.partial = self.folder.parent / f'{self.folder.name}{PARTIAL}'
    self._leaves = {leaf.name: leaf for leaf in leaves}
    self._running = {name: digests.Running(np.dtype(leaf.dtype), leaf.shape) for name, leaf in self._leaves.items()}
    self._stores: dict[str, Any] = {}
    self._state = self.partial / 'checkpoints' / '0' / 'state'
    self._journal = self.partial / JOURNAL
    self._identity = stored.digest({'config': to_dict(config), 'info': info, 'made_from': made_from})
    if self._journal.exists():
      self._resume()
    else:
      self._begin(config, info)

  def _begin(self, config: Config, info: dict[str, Any]) -> None:
    """Has Orbax write every array with one number, and then gives it its shape: the format stays the business of Orbax."""
    if self.partial.exists():
      self.partial.rmtree()
    tiny = {name: jnp.zeros((1,) * len(leaf.shape), leaf.dtype) for name, leaf in self._leaves.items()}
    with Manager(self.partial, config, info=info) as manager:
      manager.save(0, {'step': jnp.int32(0), 'params': trees.nested(tiny)})
    for file, entries in (('array_metadatas/process_0', lambda told: told['array_metadatas']),
                          ('_METADATA', lambda told: told['tree_metadata'].values())):
      told = json.loads((self._state / file).read_text())
      for entry in entries(told):
        if 'array_metadata' in entry:
          about, name = entry['array_metadata'], entry['array_metadata']['param_name'].replace('.', '/')
        else:
          about, name = entry['value_metadata'], '/'.join(key['key'] for key in entry['key_metadata'])
        if leaf := self._leaves.get(name.removeprefix('params/')):
          about['write_shape'] = list(leaf.shape)
          about |= {'chunk_shape': _chunks(leaf)} if 'chunk_shape' in about else {}
      files.write_atomically(self._state / file, json.dumps(told).encode())
    for name, leaf in self._leaves.items():
      spec = _store(self._state, f'params/{name}').spec().to_json()
      spec['metadata'] |= {'shape': list(leaf.shape), 'chunks': _chunks(leaf)}
      spec.pop('transform', None)
      _open(spec, create=True, delete_existing=True)
    files.write_atomically(self._journal, f'{json.dumps(self._identity)}\n'.encode())

  def _resume(self) -> None:
    lines = self._journal.read_text().splitlines(keepends=True)
    if json.loads(lines[0]) != self._identity:
      raise CheckpointError(f'{self.partial} was begun by another command: delete it, or give another directory.')
    if not lines[-1].endswith('\n'):  # cut short by a kill: what comes next must not be added to it
      files.write_atomically(self._journal, ''.join(lines := lines[:-1]).encode())
    for line in lines[1:]:
      name, index, sums = json.loads(line)
      self._running[name].add_sums(tuple(index), sums)

  def has(self, name: str, index: Index = ()) -> bool:
    """Whether a slice is written already."""
    return index in self._running[name].seen

  def write(self, name: str, index: Index, value: np.ndarray) -> None:
    """Writes a slice. Raises CheckpointError where its shape is wrong, it is not finite, or the disk is full."""
    leaf = self._leaves[name]
    value = np.ascontiguousarray(value, np.dtype(leaf.dtype))
    if value.shape != leaf.shape[len(index):]:
      raise CheckpointError(f'{name}{list(index)} is {list(value.shape)}, expected {list(leaf.shape[len(index):])}.')
    with np.errstate(invalid='ignore'):
      ends = [float(value.min()), float(value.max())]  # NaN where one number is
    if not np.isfinite(ends).all():
      raise CheckpointError(f'{name}{list(index)} would have numbers that are not finite (NaN or inf).')
    with run_directory.writing(self.partial):
      try:
        if name not in self._stores:
          self._stores = {name: _store(self._state, f'params/{name}')}
        part = self._stores[name][index]
        for piece in _pieces(part):
          part[piece].write(value[piece], can_reference_source_data_indefinitely=True).result()
      except ValueError as error:  # as TensorStore tells of a full disk
        raise CheckpointError(f'{self.partial} cannot be written: {quiet.reason(error)}.') from error
      sums = self._running[name].add(index, value)
      with open(self._journal, 'a', encoding='utf-8') as file:
        file.write(json.dumps([name, index, sums]) + '\n')
    if value.nbytes > TRIM_BYTES:
      backend.give_back_memory()

  def fill(self, make: Callable[[Leaf, Index], np.ndarray], what: str) -> None:
    """Writes every slice that is not written yet, as `make` gives it, and shows how far it is.

    Args:
      make: (parameter, index) -> the slice.
      what: the name of the work.
    """
    sizes = {leaf.name: leaf.size * np.dtype(leaf.dtype).itemsize // math.prod(leaf.shape[:len(leaf.stacked)])
             for leaf in self._leaves.values()}
    total = sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in self._leaves.values())
    done = sum(sizes[name] * len(running.seen) for name, running in self._running.items())
    progress = Progress(what, 'MiB', total >> 20, done >> 20)
    # The largest slices come first, while the allocator holds nothing that it keeps for later.
    for leaf in sorted(self._leaves.values(), key=lambda leaf: -sizes[leaf.name]):
      for index in indices(leaf):
        if not self.has(leaf.name, index):
          self.write(leaf.name, index, make(leaf, index))
          before, done = done, done + sizes[leaf.name]
          if done >> 20 > before >> 20:
            progress.show(done >> 20)
    progress.close()

  def finish(self) -> None:
    """Completes the directory. Raises CheckpointError where a slice is missing."""
    missing = [name for name, running in self._running.items() if not running.is_whole]
    if missing:
      raise CheckpointError(f'{self.partial}: {missing[0]} and {len(missing) - 1} more were not written as a whole.')
    path = self.partial / 'checkpoints' / '0' / 'meta' / 'metadata'
    meta = json.loads(path.read_text())
    meta['arrays'] |= {f'params/{name}': running.text for name, running in self._running.items()}
    files.write_atomically(path, json.dumps(meta | {'seal': run_directory.seal(meta)}).encode())
    if self.folder.exists():
      self.folder.rmdir()
    self.partial.rename(self.folder)
    (self.folder / JOURNAL).unlink()  # after the rename, so that a kill between the two loses nothing

  def __enter__(self) -> 'TensorWriter':
    return self

  def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
    if error is None:
      self.finish()
