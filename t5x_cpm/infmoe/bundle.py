"""A bundle: a model as files from which each expert can be read alone.

  bundle.json               of which run it is, how matrices are stored, the size of each file and the digests of its tensors
  encoder-000.safetensors   a layer: its experts one after the other, then its other weights. What layers share is there once.
  rest.safetensors          what belongs to no layer
  vocabulary/               that of the run

All but the experts is stored as the checkpoint has it. Files are safetensors that any library opens. Their data begin at a
multiple of PAGE bytes, as does every expert, so that it can be mapped, or read past the system's cache; and every tensor begins
at a multiple of 64 bytes, so that XLA:CPU computes with it where it is mapped. What lies between are tensors named 'padding/N'.
"""

import functools
import itertools
import math
import mmap
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from t5x_cpm import files
from t5x_cpm.checkpoints import digests, run_directory, safetensors_files
from t5x_cpm.checkpoints.readers import Kind
from t5x_cpm.checkpoints.run_directory import CheckpointError
from t5x_cpm.config import Config, OffloadConfig, from_dict
from t5x_cpm.infmoe import about as about_lib
from t5x_cpm.infmoe.about import ABOUT, REMEDY
from t5x_cpm.infmoe.formats import FORMATS
from t5x_cpm.models import encoder_decoder
from t5x_cpm.models.layer import Layer

REST = 'rest.safetensors'
PAGE, ALIGNED = 4096, 64


class Place(NamedTuple):
  """Where the weights of a layer lie: layers that share them have the same place."""

  stack: str
  row: int

  @property
  def file(self) -> str:
    return f'{self.stack}-{self.row:03d}.safetensors'


def place_of(layer: Layer) -> Place:
  """Where the weights of a layer lie."""
  return Place(layer.stack, layer.roles['block'][1])


class Entry(NamedTuple):
  """A tensor in a file.

  Attributes:
    kind: its shape and type.
    begin: of its first byte in the file.
    leaf: the name of the parameter that it is, or is a part of, in a checkpoint; '' for padding.
    at: its place in the leading axes of that parameter.
    part: which part of a stored matrix; '' for what is stored as it is.
    expert: whether it belongs to an expert of a layer with several.
  """

  kind: Kind
  begin: int
  leaf: str = ''
  at: tuple[int, ...] = ()
  part: str = ''
  expert: bool = False


def _expert_entries(layer: Layer, given: OffloadConfig) -> Iterator[tuple[str, Entry]]:
  component, row = layer.roles['experts']
  experts = dict(component.stacked)['expert']
  for expert in range(experts):
    for name, leaf in component.leaves.items():
      I, O = leaf.shape[2:]
      for part, kind in FORMATS[given.format].kinds(I, O, given.group).items():
        yield f'experts/{expert}/{name}/{part}', Entry(kind, 0, leaf.name, (row, expert), part, True)
    yield '', Entry(Kind((), np.dtype(np.uint8)), 0)  # the end of an expert


def _dense_entries(layer: Layer, given: OffloadConfig) -> Iterator[tuple[str, Entry]]:
  for role, (component, row) in layer.roles.items():
    if role == 'experts' and layer.routed:
      continue
    for leaf in jax.tree.leaves(component.leaves):
      name, shape = f'{role}{leaf.name.removeprefix(component.path)}', leaf.shape[1:]
      if len(shape) == 2 and component.cast and given.dense_format != 'float32':  # a router's rounded score is another expert
        I, O = shape
        for part, kind in FORMATS[given.dense_format].kinds(I, O, given.group).items():
          yield f'{name}/{part}', Entry(kind, 0, leaf.name, (row,), part)
      else:
        yield name, Entry(Kind(tuple(shape), np.dtype(leaf.dtype)), 0, leaf.name, (row,))


def _laid_out(entries: Iterator[tuple[str, Entry]]) -> tuple[bytes, dict[str, Entry]]:
  """The header of a file, and its tensors with the places where they begin."""
  found: dict[str, Entry] = {}
  end = 0

  def fill(multiple: int) -> None:
    nonlocal end
    if missing := -end % multiple:
      found[f'padding/{len(found)}'] = Entry(Kind((missing,), np.dtype(np.uint8)), end)
      end += missing

  for name, entry in entries:
    fill(ALIGNED if name else PAGE)
    if name:
      found[name] = entry._replace(begin=end)
      end += entry.kind.nbytes
  fill(PAGE)
  header = safetensors_files.header({name: entry.kind for name, entry in found.items()}, PAGE)
  return header, {name: entry._replace(begin=len(header) + entry.begin) for name, entry in found.items()}


def layout(model: encoder_decoder.Model, given: OffloadConfig) -> dict[str, tuple[bytes, dict[str, Entry]]]:
  """What each file of a bundle holds: by its name, the header and the tensors.

  Raises:
    ConfigError: a matrix cannot be stored in that format.
  """
  found = {}
  for stack in model.stacks:
    for layer in model.layers[stack]:
      if place_of(layer).file not in found:
        experts = _expert_entries(layer, given) if layer.routed else iter(())
        found[place_of(layer).file] = _laid_out(itertools.chain(experts, _dense_entries(layer, given)))
  rest = ((leaf.name, Entry(Kind(tuple(leaf.shape), np.dtype(leaf.dtype)), 0, leaf.name))
          for component in model.components.values() if not component.stacked for leaf in jax.tree.leaves(component.leaves))
  return found | {REST: _laid_out(rest)}


class Bundle:
  """A bundle that is read.

  Attributes:
    folder: where it lies.
    model: what it holds.
    about: what bundle.json says.
    config: of its run.
    given: how its matrices are stored.
    entries: by file and name, its tensors.
  """

  def __init__(self, path: Any, model: encoder_decoder.Model):
    """Opens a bundle of a model.

    Raises:
      CheckpointError: it is damaged, of another version, or has other tensors than the model.
    """
    self.folder, self.model = pathlib.Path(run_directory.resolve(path)), model
    self.about = about_lib.read(path)
    self.config: Config = from_dict(self.about['config'])
    self.given = OffloadConfig(**{name: self.about[name] for name in about_lib.STORED})
    laid_out = layout(model, self.given)
    self.entries = {file: entries for file, (_, entries) in laid_out.items()}
    if self.entries.keys() != self.about['files'].keys():
      raise CheckpointError(f'{self.folder / ABOUT} lists other files than its model has. {REMEDY}')
    for file, (header, _) in laid_out.items():
      self._check_file(file, header)
    self._seen: set[tuple[str, str]] = set()  # tensors that were compared with their digests
    self._experts: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for file, entries in self.entries.items():
      for name, entry in entries.items():
        if entry.expert:
          _, expert, matrix, part = name.split('/')
          self._experts.setdefault((file, expert), {}).setdefault(matrix, {})[part] = name

  def _damaged(self, file: str, what: str) -> CheckpointError:
    return CheckpointError(f'{self.folder / file} is damaged ({what}). {REMEDY}')

  def _check_file(self, file: str, header: bytes) -> None:
    """What is cheap to check."""
    told = self.about['files'][file]
    try:
      files.check_regular(self.folder / file)
      size = (self.folder / file).stat().st_size
      with open(self.folder / file, 'rb') as opened:
        found = opened.read(len(header))
    except OSError as error:
      raise self._damaged(file, error.strerror or str(error)) from error
    if size != told['bytes']:
      raise self._damaged(file, f'it has {size:,} bytes, and had {told["bytes"]:,} when it was written')
    if found != header:
      raise self._damaged(file, 'its header is not that of its model')

  @functools.cached_property
  def maps(self) -> Mapping[str, mmap.mmap]:
    """The files, mapped."""
    found = {}
    for file in self.entries:
      with open(self.folder / file, 'rb') as opened:
        found[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    return found

  def tensor(self, file: str, name: str) -> np.ndarray:
    """A tensor as it is mapped. Its digest is compared when it is asked for the first time.

    Raises:
      CheckpointError: it is not what was written.
    """
    entry = self.entries[file][name]
    count = math.prod(entry.kind.shape)
    value = np.frombuffer(self.maps[file], entry.kind.dtype, count, entry.begin).reshape(entry.kind.shape)
    self.check(file, name, value)
    return value

  def check(self, file: str, name: str, value: np.ndarray) -> None:
    """Compares a tensor with its digest, once. Raises CheckpointError where it is not what was written."""
    if (file, name) not in self._seen:
      if digests.of_host(value) != self.about['files'][file]['digests'].get(name):
        raise self._damaged(file, f'the tensor {name} is not what was written')
      self._seen.add((file, name))

  def names(self, place: Place, expert: int) -> dict[str, dict[str, str]]:
    """The names of the tensors of an expert, by matrix and part."""
    return self._experts[place.file, str(expert)]

  @property
  def size(self) -> int:
    """Bytes of all files."""
    return sum(told['bytes'] for told in self.about['files'].values())

  @property
  def places(self) -> list[Place]:
    """The layers with experts, those of the encoder first; what layers share is there once."""
    found = {place_of(layer): layer for stack in self.model.stacks for layer in self.model.layers[stack] if layer.routed}
    return list(found)

  def begin(self, place: Place, expert: int) -> int:
    """The first byte of an expert in its file."""
    return min(self.entries[place.file][name].begin for parts in self.names(place, expert).values() for name in parts.values())

  def block(self, place: Place) -> tuple[int, dict[str, dict[str, tuple[Kind, int]]]]:
    """What an expert of a layer takes in its file: bytes, and by matrix and part what it is and where it begins."""
    entries, first = self.entries[place.file], self.begin(place, 0)
    parts = {matrix: {part: (entries[name].kind, entries[name].begin - first) for part, name in given.items()}
             for matrix, given in self.names(place, 0).items()}
    end = max(begin + kind.nbytes for given in parts.values() for kind, begin in given.values())
    return -(-end // PAGE) * PAGE, parts

  def verify(self) -> Iterator[int]:
    """Reads everything; yields the bytes of each tensor. Raises CheckpointError for the first that is not what was written."""
    for file, entries in self.entries.items():
      for name, entry in entries.items():
        if entry.leaf:
          self.tensor(file, name)
        yield entry.kind.nbytes

