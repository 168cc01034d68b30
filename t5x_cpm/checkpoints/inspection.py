"""What a checkpoint of any kind holds, and in what two of them differ: the mode `inspect`."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from t5x_cpm import stored, user_files
from t5x_cpm.checkpoints import cpm2, digests, huggingface, readers, run_directory
from t5x_cpm.checkpoints.readers import BLOCK_BYTES, Index, Kind, Region, TensorReader
from t5x_cpm.checkpoints.tensors import CheckpointReader
from t5x_cpm.chips import GiB
from t5x_cpm.config import Config, ConfigError, ModelConfig

EXPECTED = ('expected the model_dir of a run, the folder of a delta, a folder of transformers or peft, the files of CPM-2, a '
            '.safetensors file, or one that torch saved')


class Opened(NamedTuple):
  """A checkpoint of any kind.

  Attributes:
    kind: what it is, in words.
    about: what it says of itself, in lines.
    reader: of its tensors.
    model: whose parameters they are, where it is a whole model of this project.
  """

  kind: str
  about: list[str]
  reader: TensorReader
  model: ModelConfig | None = None


class Together:
  """The tensors of several readers, each under a prefix."""

  def __init__(self, given: Mapping[str, TensorReader]):
    self._of = {f'{prefix}{name}': (reader, name) for prefix, reader in given.items() for name in reader.kinds}
    self.kinds: dict[str, Kind] = {name: reader.kinds[own] for name, (reader, own) in self._of.items()}

  def place(self, name: str) -> str:
    reader, own = self._of[name]
    return reader.place(own)

  def read(self, name: str, index: Region = ()) -> np.ndarray:
    reader, own = self._of[name]
    return reader.read(own, index)


def in_a_line(model: ModelConfig) -> str:
  """The sizes of a model."""
  experts = f', {model.moe.num_experts} experts (router {model.moe.router!r})' if model.moe.num_experts else ''
  return (f'{model.num_encoder_layers} + {model.num_decoder_layers} layers, d_model {model.d_model}, d_ff {model.d_ff}, '
          f'{model.num_heads} x {model.head_dim} heads, {model.vocab_size:,} rows of embeddings, {model.mlp_activation}, '
          f'{"tied" if model.tie_embeddings else "untied"} head{experts}')


def _run(path: Any, step: int | None) -> Opened:
  run = run_directory.read_run(path, step)
  config: Config = run.config
  about = [f'step {run.step:,} of {", ".join(map(str, run.steps))}; task {config.task.name!r}, vocabulary '
           f'{run.info.get("vocabulary", "unknown")}']
  method = config.delta.method
  about.append(f'{method} on {config.delta.base}' if method else in_a_line(config.model))
  if run.metrics:
    about.append('metrics: ' + ', '.join(f'{name} {value:.6g}' for name, value in sorted(run.metrics.items())))
  kind = 'a run of t5x_cpm that trains a delta' if method else 'a run of t5x_cpm'
  return Opened(kind, about, CheckpointReader(path, run.step), None if method else config.model)


def _delta(folder: pathlib.Path) -> Opened:
  about = stored.parse(folder / 'delta.json', 'Put back a copy of it.', 'weights')
  weights = about.get('weights')
  if not stored.is_plain_name(weights):
    raise ConfigError(f'{folder / "delta.json"}: weights: expected the name of a file.')
  base = about.get('base') or {}
  lines = [f'{about.get("method")} of step {about.get("step")}, on {base.get("model_dir")} at step {base.get("step")} '
           f'(fingerprint {base.get("fingerprint")})']
  return Opened('a delta of t5x_cpm', lines, readers.SafetensorsReader([folder / str(weights)]))


def _transformers(folder: pathlib.Path) -> Opened:
  described = user_files.json_file(folder / 'config.json', str(folder / 'config.json'))
  lines = [f'model_type {described.get("model_type")}']
  with contextlib.suppress(ConfigError):  # which `convert` tells; here its tensors are wanted
    lines = [f'{lines[0]}: {in_a_line(huggingface.read_config(described))}']
  return Opened('a folder of transformers', lines, readers.open_folder(folder))


def _cpm2(folder: pathlib.Path) -> Opened:
  files, parts = cpm2.find(folder), cpm2.read_parts(folder)
  first = parts[0, 0]
  lines = [f'{len(files)} files in {files[0, 0].parent}; iteration {first.about.get("iteration", "unknown")}']
  with contextlib.suppress(ConfigError):
    lines.append(in_a_line(cpm2.configuration(str(files[0, 0]), first.kinds, max(part for _, part in files) + 1)))
  given = {f'{files[place].name.removesuffix("_model_states.pt")}: ': reader for place, reader in parts.items()}
  return Opened('files of CPM-2', lines, Together(given))


def open_any(path: str, step: int | None = None) -> Opened:
  """A checkpoint of any kind. Raises ConfigError where it is of none that is known, or damaged.

  Args:
    path: a folder or file.
    step: of the checkpoint of a run; None is the last.
  """
  where = pathlib.Path(path)
  if '://' in path or (where.is_dir() and run_directory.scan(run_directory.resolve(path))[0]):
    return _run(run_directory.resolve(path), step)
  if step is not None:
    raise ConfigError(f'{path} is not the model_dir of a run: it has no --step.')
  if where.is_dir():
    for folder in (where, where / 'delta'):
      if (folder / 'delta.json').exists():
        return _delta(folder)
    if cpm2.is_folder(where):
      return _cpm2(where)
    if (where / 'config.json').exists():
      return _transformers(where)
    if found := sorted(where.glob('*.safetensors')):
      kind = 'an adapter of peft' if (where / 'adapter_config.json').exists() else 'safetensors'
      return Opened(kind, [f'{len(found)} files'], readers.SafetensorsReader(found))
    raise ConfigError(f'{path}: {EXPECTED}.')
  user_files.check(where, path)
  if where.suffix == '.safetensors':
    return Opened('a safetensors file', [], readers.SafetensorsReader([where]))
  if where.suffix not in ('.bin', '.pt', '.pth', '.ckpt'):
    raise ConfigError(f'{path}: {EXPECTED} (.bin, .pt, .pth or .ckpt).')
  reader = readers.TorchReader([where], cpm2.UNDER)
  beside = [f'beside the tensors: {", ".join(sorted(map(str, reader.about)))}'] if reader.about else []
  return Opened('a file of torch', beside, reader)


def _slices(kind: Kind) -> Iterator[Index]:
  """A tensor as a whole, or where it is a large stack of matrices, its matrices."""
  depth = max(0, len(kind.shape) - 2) if kind.nbytes > BLOCK_BYTES else 0
  return np.ndindex(*kind.shape[:depth])


def _digest(reader: TensorReader, name: str) -> str:
  kind = reader.kinds[name]
  running = digests.Running(kind.dtype, kind.shape)
  for index in _slices(kind):
    running.add(index, np.ascontiguousarray(reader.read(name, index)))
  return running.text.rpartition(' ')[2]


def show(path: str, *, step: int | None = None) -> None:
  """Prints what a checkpoint is, and name, shape, type, bytes and digest of every tensor, with totals.

  A digest is that of the values as they are stored: equal ones are told by it, whatever the format of the file.
  """
  opened = open_any(path, step)
  print(f'{path}: {opened.kind}')
  for line in opened.about:
    print(f'  {line}')
  kinds = opened.reader.kinds
  width = max(map(len, kinds), default=0)
  for name, kind in kinds.items():
    print(f'{name:<{width}}  {list(kind.shape)!s:<22} {kind.dtype!s:<9} {kind.nbytes:>15,}  {_digest(opened.reader, name)}',
          flush=True)
  size = sum(kind.nbytes for kind in kinds.values())
  print(f'{len(kinds):,} tensors, {sum(kind.nbytes // kind.dtype.itemsize for kind in kinds.values()):,} numbers, '
        f'{size:,} bytes ({size / GiB:.2f} GiB)')


def _difference(a: TensorReader, b: TensorReader, name: str) -> float:
  """The largest absolute difference of two tensors of one shape; 0: they are equal; NaN where only one is not finite."""
  largest = 0.0
  kind = a.kinds[name]
  for index in _slices(kind):
    x, y = a.read(name, index), b.read(name, index)
    for region in readers.blocks(Kind(x.shape, x.dtype)):
      one, other = (np.asarray(value[region], np.float64) for value in (x, y))
      with np.errstate(invalid='ignore'):
        apart = np.where((one == other) | (np.isnan(one) & np.isnan(other)), 0.0, np.abs(one - other))
      largest = float(np.maximum(largest, apart.max(initial=0.0)))
  return largest


def _alike(a: Opened, b: Opened) -> tuple[TensorReader, TensorReader]:
  """The readers of two checkpoints, with the names of transformers for both where one of them is of transformers."""
  result = [a.reader, b.reader]
  for number, (one, other) in enumerate(((a, b), (b, a))):
    if one.model is not None and other.kind == 'a folder of transformers':
      with contextlib.suppress(ConfigError):  # transformers has no such model
        huggingface.write_config(one.model)
        result[number] = huggingface.Exported(one.model, one.reader)
  return result[0], result[1]


def diff(path: str, other: str, *, step: int | None = None) -> None:
  """Prints what is only in one of two checkpoints, what has another shape or other values, and how much is equal."""
  a, b = _alike(open_any(path, step), open_any(other))
  counts: dict[str, Any] = dict.fromkeys(('only in the first', 'only in the second', 'of other shapes', 'of other values'), 0)
  equal = 0
  for name in dict.fromkeys([*a.kinds, *b.kinds]):
    one, two = a.kinds.get(name), b.kinds.get(name)
    if one is None or two is None:
      what, text = ('only in the second', other) if one is None else ('only in the first', path)
      text = f'only in {text}, {list((one or two or Kind((), np.dtype("f4"))).shape)}'
    elif one.shape != two.shape:
      what, text = 'of other shapes', f'{list(one.shape)} and {list(two.shape)}'
    elif largest := _difference(a, b, name):
      what, text = 'of other values', f'differs by up to {largest:.3g}'
    else:
      equal += 1
      continue
    counts[what] += 1
    print(f'{name}: {text}', flush=True)
  rest = ''.join(f', {count:,} {what}' for what, count in counts.items() if count)
  print(f'{equal:,} tensors are equal{rest}')
