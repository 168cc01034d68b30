"""Tensors in the files of other programs, read slice by slice: safetensors, and what torch saves.

A *slice* is what lies at an index of the leading axes of a tensor; () is the whole. Files are mapped rather than loaded, so
that a model larger than memory can be read; only what torch saved in its form of before version 1.6 cannot be mapped, and is
held in memory as a whole.
"""

import math
import os
import pathlib
import re
import warnings
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from t5x_cpm import stored, user_files
from t5x_cpm.config import ConfigError
from t5x_cpm.config.fields import shown

Index = tuple[int, ...]
Region = tuple[int | slice, ...]  # a slice, or rows of one
BLOCK_BYTES = 32 * 2**20  # larger tensors are read in so many rows at a time where no more is needed
NO_PICKLE = ('is damaged or holds more than tensors, and is not opened: unpickling a file may run any program. Save the model '
             'as .safetensors.')
DTYPES: dict[str, Any] = {
    'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': jnp.bfloat16, 'I64': np.int64, 'I32': np.int32,
    'I16': np.int16, 'I8': np.int8, 'U8': np.uint8, 'BOOL': np.bool_}
TORCH_DTYPES = {'float64': 'F64', 'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16', 'int64': 'I64', 'int32': 'I32',
                'int16': 'I16', 'int8': 'I8', 'uint8': 'U8', 'bool': 'BOOL'}


class Kind(NamedTuple):
  """Shape and type of a tensor."""

  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


class TensorReader(Protocol):
  """The tensors of a checkpoint of any format."""

  @property
  def kinds(self) -> Mapping[str, Kind]:
    """Shape and type by name."""
    ...

  def read(self, name: str, index: Region = ()) -> np.ndarray:
    """The slice at an index. Raises ConfigError where it cannot be read, or is not what was saved."""
    ...

  def place(self, name: str) -> str:
    """The file or folder that a tensor lies in, for errors."""
    ...


def blocks(kind: Kind, index: Index = ()) -> Iterator[Region]:
  """A tensor, or the slice of it at an index, as regions: the whole, or where it is large its rows, some at a time."""
  shape = kind.shape[len(index):]
  size = math.prod(shape) * kind.dtype.itemsize
  if size <= BLOCK_BYTES or len(shape) < 2:
    yield index
    return
  rows = max(1, shape[0] * BLOCK_BYTES // size)
  for start in range(0, shape[0], rows):
    yield (*index, slice(start, min(start + rows, shape[0])))


def misfits(kinds: Mapping[str, Kind], wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
  """What keeps tensors from having the wanted shapes: each one that is missing, left over, misshapen or of no real numbers."""
  problems = []
  for name, shape in wanted.items():
    kind = kinds.get(name)
    if kind is None:
      problems.append(f'{name}: missing')
    elif kind.shape != tuple(shape):
      problems.append(f'{name}: {list(kind.shape)}, expected {list(shape)}')
    elif not jnp.issubdtype(kind.dtype, jnp.floating):
      problems.append(f'{name}: of type {kind.dtype}, expected floating point')
  return problems + [f'{name}: not of this model' for name in kinds if name not in wanted]


def check_fits(what: str, problems: list[str]) -> None:
  """Raises ConfigError, which begins with `what`, with the first five problems, if there are any."""
  if problems:
    more = [f'and {len(problems) - 5} more'] if len(problems) > 5 else []
    raise ConfigError(f'{what}:\n  ' + '\n  '.join(problems[:5] + more))


def check_finite(reader: TensorReader, name: str, value: np.ndarray) -> np.ndarray:
  """The tensor, or a slice of it. Raises ConfigError where it has a NaN or inf: a damaged file, or a failed training run."""
  if not np.isfinite(value).all():
    raise ConfigError(f'{reader.place(name)}: {name} has numbers that are not finite (NaN or inf).')
  return value


def read_part(reader: TensorReader, name: str, index: Region = ()) -> np.ndarray:
  """The slice at an index, of finite numbers. Raises ConfigError where it cannot be read, or has a NaN or inf."""
  return check_finite(reader, name, reader.read(name, index))


def equal(reader: TensorReader, name: str, other: str) -> bool:
  """Whether two tensors are the same."""
  kind = reader.kinds[name]
  return kind.shape == reader.kinds[other].shape and all(
      np.array_equal(reader.read(name, region), reader.read(other, region)) for region in blocks(kind))


def files_of(folder: pathlib.Path, stem: str, suffix: str) -> list[pathlib.Path]:
  """The file `stem + suffix` of a folder, or else the parts that its index lists, or else those of such names; [] for none.

  Raises:
    ConfigError: the index is damaged.
  """
  whole, index = (folder / f'{stem}{suffix}{end}' for end in ('', '.index.json'))
  if os.path.lexists(whole):
    return [whole]
  if not os.path.lexists(index):
    return sorted(folder.glob(f'{stem}*{suffix}'))
  places = user_files.json_file(index, str(index)).get('weight_map')
  if not isinstance(places, dict) or not all(map(stored.is_plain_name, places.values())):
    raise ConfigError(f'{index}: weight_map = {shown(places)}: expected an object with the file of each tensor.')
  return sorted({folder / name for name in places.values()})


def _once(file: pathlib.Path, names: Iterable[str], found: Collection[str]) -> None:
  if twice := sorted(set(names) & set(found)):
    raise ConfigError(f'{file} holds {twice[0]}, which another of the files has too: they are not parts of one model.')


class SafetensorsReader:
  """The tensors of safetensors files."""

  def __init__(self, files: Iterable[pathlib.Path]):
    """Raises ConfigError where a file is missing or damaged, or has tensors of a type that NumPy lacks."""
    import safetensors

    self.kinds: dict[str, Kind] = {}
    self._files: dict[str, pathlib.Path] = {}
    self._open: tuple[Any, Any] = None, None
    for file in files:
      user_files.check(file, str(file))
      try:
        with safetensors.safe_open(file, 'np') as opened:
          names = list(opened.keys())
          _once(file, names, self.kinds)
          for name in names:
            part = opened.get_slice(name)
            if part.get_dtype() not in DTYPES:
              raise ConfigError(f'{file}: {name} is of type {part.get_dtype()}: expected one of {", ".join(DTYPES)}.')
            self.kinds[name] = Kind(tuple(part.get_shape()), np.dtype(DTYPES[part.get_dtype()]))
            self._files[name] = file
      except safetensors.SafetensorError as error:
        raise ConfigError(f'{file} is damaged: {error}.') from None
      except OSError as error:
        raise ConfigError(f'{file} cannot be read: {error.strerror or error}.') from None

  def place(self, name: str) -> str:
    return str(self._files[name])

  def read(self, name: str, index: Region = ()) -> np.ndarray:
    import safetensors

    file = self._files[name]
    try:
      if self._open[0] != file:
        self._open = file, safetensors.safe_open(file, 'np')
      return self._open[1].get_slice(name)[index] if index else self._open[1].get_tensor(name)
    except (safetensors.SafetensorError, OSError) as error:
      raise ConfigError(f'{file} cannot be read, or changes while it is read: {error}.') from None


def _safe_globals() -> list[Any]:
  """What the state of NumPy's random numbers, which training programs save beside the weights, is made of: data, no code."""
  from numpy._core import multiarray

  rebuild: Any = multiarray._reconstruct
  return [rebuild, (rebuild, 'numpy.core.multiarray._reconstruct'), np.ndarray, np.dtype, type(np.dtype(np.uint32))]


def _why_refused(error: Exception) -> str:
  asked = re.search(r'Unsupported (?:global|class|operand).*?(?:GLOBAL )?([A-Za-z_][\w]*(?:\.\w+)+)', str(error))
  return f' ({asked[1]} is in it)' if asked else ''


def load_torch(file: pathlib.Path) -> dict[str, Any]:
  """What `torch.save` wrote, with its tensors mapped, not loaded. No code in it is run.

  Raises:
    ConfigError: it is missing, damaged, or holds objects other than tensors and plain values; torch is not installed.
  """
  user_files.check(file, str(file))
  try:
    import torch
  except ImportError:
    raise ConfigError(f'{file} needs torch to be read: pip install t5x_cpm[torch], or save it as .safetensors.') from None
  try:
    mapped = zipfile.is_zipfile(file)  # the form of version 1.6 and later
    with warnings.catch_warnings(), torch.serialization.safe_globals(_safe_globals()):
      warnings.simplefilter('ignore')  # of how the pickle is written
      loaded = torch.load(file, map_location='cpu', weights_only=True, mmap=mapped)
    if mapped:
      with zipfile.ZipFile(file) as archive:
        broken = next((entry.filename for entry in archive.infolist() if entry.compress_type), None) or archive.testzip()
        if broken:
          raise ConfigError(f'{file} is damaged: the record {broken} in it is not what was written (CRC-32).')
  except OSError as error:
    raise ConfigError(f'{file} is damaged, or cannot be read: {error.strerror or error}.') from None
  except ConfigError:
    raise
  except Exception as error:  # whatever a pickle makes of it
    raise ConfigError(f'{file} {NO_PICKLE.replace(", and", _why_refused(error) + ", and", 1)}') from error
  if not isinstance(loaded, dict):
    raise ConfigError(f'{file} {NO_PICKLE}')
  return loaded


class TorchReader:
  """The tensors of files that `torch.save` wrote.

  Attributes:
    about: what stands beside the tensors, where they lie under a name of their own.
  """

  def __init__(self, files: Iterable[pathlib.Path], under: Collection[str] = ()):
    """The tensors of a dict, or of the dict in it that has one of the names in `under`. Errors are those of `load_torch`."""
    self.kinds: dict[str, Kind] = {}
    self.about: dict[str, Any] = {}
    self._tensors: dict[str, Any] = {}
    self._files: dict[str, pathlib.Path] = {}
    for file in files:
      loaded = load_torch(file)
      import torch  # is there: it has read the file

      inner = next((name for name in under if isinstance(loaded.get(name), dict)), None)
      if inner is not None:
        self.about |= {name: value for name, value in loaded.items() if name != inner}
        loaded = loaded[inner]
      if not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in loaded.items()):
        raise ConfigError(f'{file} {NO_PICKLE}')
      _once(file, loaded, self.kinds)
      for name, value in loaded.items():
        dtype = TORCH_DTYPES.get(str(value.dtype).removeprefix('torch.'))
        if dtype is None or value.layout != torch.strided:
          raise ConfigError(f'{file}: {name} is of type {value.dtype}: expected one of {", ".join(TORCH_DTYPES)}, not sparse.')
        self.kinds[name] = Kind(tuple(value.shape), np.dtype(DTYPES[dtype]))
        self._tensors[name], self._files[name] = value.detach(), file

  def place(self, name: str) -> str:
    return str(self._files[name])

  def read(self, name: str, index: Region = ()) -> np.ndarray:
    import torch

    value = self._tensors[name][index] if index else self._tensors[name]
    return value.view(torch.int16).numpy().view(jnp.bfloat16) if value.dtype == torch.bfloat16 else value.numpy()


def open_folder(folder: pathlib.Path, name: str = '') -> TensorReader:
  """The weights in a folder of transformers: model*.safetensors if there are any, otherwise pytorch_model*.bin.

  Raises:
    ConfigError: there is neither, which calls the folder `name`; or see the readers.
  """
  if safe := files_of(folder, 'model', '.safetensors'):
    return SafetensorsReader(safe)
  if binary := files_of(folder, 'pytorch_model', '.bin'):
    return TorchReader(binary)
  raise ConfigError(f'{name or folder} has no model*.safetensors and no pytorch_model*.bin.')
