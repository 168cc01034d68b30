"""Slices of chips, that is TPU slices and hosts with GPUs: how fast their chips reach each other, and their devices.

The devices are descriptions from the compilers for TPUs and GPUs; no chip is needed.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import numpy as np

from t5x_cpm import backend
from t5x_cpm.chips import CHIPS, Chip
from t5x_cpm.config import ConfigError
from t5x_cpm.config.fields import did_you_mean

# Chips that slices can be made of.
TARGETS = {name: chip for name, chip in CHIPS.items() if chip.dimensions}
EXAMPLES = 'v4:2x2x2, v4:4x4x4, v5e:4x8, v5e:16x16, v5p:2x2x2, v5p:4x4x4, v6e:4x8, v6e:16x16; hosts x GPUs, as in h100:4x8'


@dataclasses.dataclass(frozen=True)
class Slice:
  """The chips that a program runs on: one TPU slice, several alike, or hosts with GPUs.

  Attributes:
    name: as in 'v5p:4x4x4'.
    shape: of one slice, in chips; hosts x GPUs for GPUs.
    slices: how many of them there are; always 1 for GPUs, whose shape says how many hosts there are.
  """

  name: str
  chip: Chip
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def count(self) -> int:
    """Chips of all slices together."""
    return self.slices * math.prod(self.shape)

  @property
  def title(self) -> str:
    return self.name if self.slices == 1 else f'{self.slices} x {self.name}'

  @property
  def rings(self) -> tuple[bool, ...]:
    """Which dimensions of a TPU slice have links from their last chip to their first."""
    rings = tuple(size % self.chip.ring_multiple == 0 for size in self.shape)
    # A slice of three dimensions is built of cubes, and the switches that close a ring are on the cubes' sides: all or none.
    return (all(rings),) * 3 if len(rings) == 3 else rings

  def _spans(self, coordinates: Any) -> list[tuple[int, int]]:
    """For each dimension that a group spans: how many chips it has there, and over how many links a chip reaches them."""
    extents = [len(set(coordinates[:, dimension])) for dimension in range(len(self.shape))]
    return [(extent, 2 if ring and extent == size else 1)
            for extent, size, ring in zip(extents, self.shape, self.rings, strict=True) if extent > 1]

  def rate(self, coordinates: Any) -> float:
    """Bytes per second that a chip can send to the group of chips at these coordinates [n, dimensions], its own included.

    In a dimension that is a ring a chip sends over both of its links; a line has no way back, so only one of them helps.
    """
    if self.chip.platform == 'cuda':
      return self.chip.link_rate if len(set(coordinates[:, 0])) == 1 else self.chip.network_rate
    return self.chip.link_rate * max(sum(links for _, links in self._spans(coordinates)), 1)

  def exchange_seconds(self, coordinates: Any) -> float:
    """Seconds of an all-to-all for each byte that every chip of a group holds, at these coordinates [n, dimensions].

    Cut a dimension of n chips in the middle: half of what one side holds must cross to the other, which is n / 4 bytes for each
    byte that a chip holds, over the one link of a line or the two of a ring. All dimensions work at the same time.
    """
    if self.chip.platform == 'cuda':
      return (len(coordinates) - 1) / len(coordinates) / self.rate(coordinates)
    return max((extent / 4 / links for extent, links in self._spans(coordinates)), default=0.0) / self.chip.link_rate

  def coordinates(self, devices: list[Any]) -> Any:
    """Where devices lie in the slice: [n, dimensions]."""
    if self.chip.platform == 'cuda':
      return np.array([divmod(device.id, self.shape[1]) for device in devices])
    return np.array([device.coords[:self.chip.dimensions] for device in devices])


def parse(name: str, slices: int = 1) -> Slice:
  """The slice of a name such as 'v5p:4x4x4' or 'h100:4x8', or `slices` of them (ignored for GPUs).

  Raises:
    ConfigError: the chip is unknown, or the shape does not suit it; the message says what is known.
  """
  kind, _, shape = name.partition(':')
  chip = TARGETS.get(kind)
  if chip is None:
    raise ConfigError(f'--topology={name}: unknown chip {kind!r}.{did_you_mean(kind, TARGETS)} Known are {", ".join(TARGETS)}, '
                      f'with the shape of the slice in chips, as in {EXAMPLES}.')
  if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', shape) or len(shape.split('x')) != chip.dimensions:
    raise ConfigError(f'--topology={name}: a slice of {kind} has {chip.dimensions} dimensions, of at least 1, as in '
                      f'{EXAMPLES}.')
  return Slice(name, chip, tuple(map(int, shape.split('x'))), slices if chip.platform == 'tpu' else 1)


def devices(slice_: Slice) -> list[Any]:
  """The devices of a slice, to compile for. Needs the compiler of its platform, and no chip.

  Raises:
    ConfigError: the compiler is not installed, or it refuses the shape.
  """
  chip = slice_.chip
  if chip.platform == 'cuda' and importlib.util.find_spec('jax_cuda12_plugin') is None:
    raise ConfigError("compiling for GPUs needs JAX's CUDA plugin, no GPU: run pip install -e '.[gpu]'.")
  if chip.platform == 'tpu' and importlib.util.find_spec('libtpu') is None:
    raise ConfigError("compiling for a TPU needs its compiler, libtpu: run pip install -e '.[pod]' (or pip install libtpu).")
  # Without these libtpu asks for a TPU, complains that there is none, and locks out other processes that compile.
  os.environ |= {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TPU_WORKER_HOSTNAMES': 'localhost',
                 'TPU_ACCELERATOR_TYPE': 'v5p-8'}
  from jax.experimental import topologies

  name, options = slice_.name, dict(chip.options)
  if slice_.slices > 1:
    options['num_slices'] = slice_.slices
  if chip.platform == 'cuda':  # one process for each host, with its GPUs
    name, options = '', {'target_config': chip.target, 'topology': f'1x{slice_.shape[0]}x{slice_.shape[1]}'}
  try:
    with backend.quiet():
      return list(topologies.get_topology_desc(platform=chip.platform, topology_name=name, **options).devices)
  except Exception as error:
    raise ConfigError(f'--topology={slice_.name}: the compiler knows no such slice ({str(error).splitlines()[0]}). Known are, '
                      f'for example, {EXAMPLES}.') from error
