"""Writes safetensors files tensor by tensor: what is in them is known from shapes, so that nothing has to be held in memory."""

import json
import pathlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from t5x_cpm import backend, files
from t5x_cpm.checkpoints.readers import BLOCK_BYTES, DTYPES, Kind
from t5x_cpm.progress import Progress

SHARD_BYTES = 4 * 2**30
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


def _shards(kinds: Mapping[str, Kind], limit: int) -> Iterator[list[str]]:
  """Names in groups of at most `limit` bytes; a larger tensor is a group of its own."""
  group: list[str] = []
  size = 0
  for name, kind in kinds.items():
    if group and size + kind.nbytes > limit:
      yield group
      group, size = [], 0
    group.append(name)
    size += kind.nbytes
  yield group


def header(kinds: Mapping[str, Kind], multiple: int = 8) -> bytes:
  """What a file begins with: the length of a JSON object, and the object, filled up so that the data begin at a multiple.

  Args:
    kinds: shape and type of its tensors by name, in the order in which they lie in it.
    multiple: of bytes.
  """
  about: dict[str, object] = {'__metadata__': {'format': 'pt'}}
  end = 0
  for name, kind in kinds.items():
    start, end = end, end + kind.nbytes
    about[name] = {'dtype': NAMES[kind.dtype], 'shape': list(kind.shape), 'data_offsets': [start, end]}
  text = json.dumps(about, separators=(',', ':')).encode()
  text += b' ' * (-(8 + len(text)) % multiple)
  return len(text).to_bytes(8, 'little') + text


def write(folder: pathlib.Path, kinds: Mapping[str, Kind], read: Callable[[str], np.ndarray], what: str,
          limit: int = SHARD_BYTES) -> None:
  """Writes model.safetensors, or several files of at most `limit` bytes (or one tensor) and their index.

  Each file gets its name when it is complete; those that an earlier call has left are not written again.

  Args:
    folder: a local folder.
    kinds: shape and type of every tensor by name, in the order of the files.
    read: name -> the tensor.
    what: the name of the work, as its progress is shown.
    limit: bytes of a file.
  """
  shards = list(_shards(kinds, limit))
  places: dict[str, str] = {}
  total, done = sum(kind.nbytes for kind in kinds.values()), 0
  progress = Progress(what, 'MiB', total >> 20)
  for number, names in enumerate(shards, 1):
    file = folder / (f'model-{number:05}-of-{len(shards):05}.safetensors' if len(shards) > 1 else 'model.safetensors')
    places |= dict.fromkeys(names, file.name)
    if file.exists():
      done += sum(kinds[name].nbytes for name in names)
      continue
    with files.replacing(file) as out:
      out.write(header({name: kinds[name] for name in names}))
      for name in names:
        value = np.ascontiguousarray(read(name), kinds[name].dtype)
        assert value.shape == kinds[name].shape, name
        out.write(value.reshape(-1).view(np.uint8).data)
        before, done = done, done + value.nbytes
        del value  # or it would stay in memory while the next is read
        if kinds[name].nbytes > BLOCK_BYTES:
          backend.give_back_memory()
        if done >> 20 > before >> 20:
          progress.show(done >> 20)
  progress.close()
  if len(shards) > 1:
    files.write_json(folder / 'model.safetensors.index.json', {'metadata': {'total_size': total}, 'weight_map': places})
